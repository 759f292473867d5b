//! Files of models that strangers could have made: spoilt GGUF and safetensors headers, and any value in any field of config.json. An error or a model,
//! never a panic, and never more memory than the file gives reason for: a length that is not in the file would end the process here.

use std::{fs, path::PathBuf, sync::LazyLock};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    fixtures,
    loading::{GgufFile, load_bytes},
};
use crate::{
    model::load,
    types::fuzz::{cases, edits, spoil},
};

static GGUF: LazyLock<Vec<u8>> = LazyLock::new(|| GgufFile::of("golden/llama").bytes());

/// The golden folder's three files.
fn source() -> PathBuf {
    fixtures().join("golden/llama/model")
}

/// A folder with other contents of one of its files.
fn folder(file: &str, contents: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        if name == file {
            fs::write(folder.path().join(name), contents).unwrap();
        } else {
            fs::copy(source().join(name), folder.path().join(name)).unwrap();
        }
    }
    folder
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn fuzz_gguf(edits in edits(), reach in prop_oneof![Just(64usize), Just(2000), Just(40_000)]) {
        let _ = load_bytes(&spoil(&GGUF, &edits, reach));
    }

    #[test]
    fn fuzz_safetensors(edits in edits(), reach in prop_oneof![Just(16usize), Just(3000)]) {
        let bytes = fs::read(source().join("model.safetensors")).unwrap();
        let folder = folder("model.safetensors", &spoil(&bytes, &edits, reach));
        let _ = load(folder.path());
    }

    #[test]
    fn fuzz_config(field: prop::sample::Index, number: i64, bits in 0u32..63, kind in 0u8..8, text in ".{0,12}") {
        let mut config: Value = serde_json::from_slice(&fs::read(source().join("config.json")).unwrap()).unwrap();
        let fields = config.as_object().unwrap();
        let key = fields.keys().nth(field.index(fields.len())).unwrap().clone();
        config[&key] = match kind {
            0 => number.into(),
            1 => (1i64 << bits).into(),
            2 => text.into(),
            3 => json!([text]),
            4 => Value::Null,
            5 => 0.into(),
            6 => (-1.5e300).into(),
            _ => json!({"x": number}),
        };
        let folder = folder("config.json", config.to_string().as_bytes());
        let _ = load(folder.path());
    }

    #[test]
    fn fuzz_tokenizer(edits in edits()) {
        let bytes = fs::read(source().join("tokenizer.json")).unwrap();
        let folder = folder("tokenizer.json", &spoil(&bytes, &edits, usize::MAX));
        let _ = load(folder.path());
    }
}
