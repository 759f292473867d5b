//! Tokenizers out of GGUF metadata, against the tokenizers that they describe.

use candle_core::quantized::gguf_file::Value as Gguf;
use serde_json::Value;
use tokenizers::Tokenizer;

use super::*;
use crate::model::loader::{tokenizer_from_gguf, tokenizer_refusal};

pub(super) fn strings(values: impl IntoIterator<Item = impl Into<String>>) -> Gguf {
    Gguf::Array(values.into_iter().map(|value| Gguf::String(value.into())).collect())
}

fn kinds(values: &[i32]) -> Gguf {
    Gguf::Array(values.iter().map(|value| Gguf::I32(*value)).collect())
}

fn text(value: &str) -> Gguf {
    Gguf::String(value.into())
}

const BYTES: [&str; 4] = ["<eos>", "<bos>", "<tool>", "<unused>"];

/// The vocabulary of a golden `tokenizer.json` as GGUF metadata.
pub(super) fn golden_tokenizer(case: &str, pre: &str) -> Vec<(&'static str, Gguf)> {
    let path = fixtures().join(case).join("model/tokenizer.json");
    let json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocab.len()];
    vocab.iter().for_each(|(token, id)| tokens[id.as_u64().unwrap() as usize] = token.clone());
    let merges = json["model"]["merges"].as_array().unwrap().iter();
    let merges = merges.map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()));
    let mut types = vec![1; tokens.len()];
    (types[0], types[1]) = (3, 3);
    vec![
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text(pre)),
        ("tokenizer.ggml.merges", strings(merges)),
        ("tokenizer.ggml.tokens", strings(tokens)),
        ("tokenizer.ggml.token_type", kinds(&types)),
        ("tokenizer.ggml.bos_token_id", Gguf::U32(1)),
        ("tokenizer.ggml.eos_token_id", Gguf::U32(0)),
    ]
}

fn ids(tokenizer: &Tokenizer, text: &str, special: bool) -> Vec<u32> {
    tokenizer.encode(text, special).unwrap().get_ids().to_vec()
}

#[test]
fn byte_level_bpe_equals_the_tokenizer_json_it_came_from() {
    let original = model_of_folder("golden/llama");
    let ours = tokenizer_from_gguf(golden_tokenizer("golden/llama", "gpt-2")).unwrap();
    for text in [
        "what is 12 + 30 ? the answer is 42 .",
        "how many clips did she sell altogether",
        " leading  double\n\nnewlines\t12345",
        "<bos>what<eos>",
        "naïve café 東京 😀 \u{0}",
        "",
    ] {
        let expected = ids(&original, text, false);
        assert_eq!(ids(&ours, text, false), expected, "{text:?}");
        assert_eq!(ours.decode(&expected, false).unwrap(), original.decode(&expected, false).unwrap());
    }
}

fn model_of_folder(case: &str) -> Tokenizer {
    Tokenizer::from_file(fixtures().join(case).join("model/tokenizer.json")).unwrap()
}

/// The vocabulary of single bytes, some whole words that no merge makes, and every kind of token.
fn bytes_and_words(pre: &str) -> Vec<(&'static str, Gguf)> {
    let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
    let mut bytes: Vec<String> = alphabet.into_iter().map(String::from).collect();
    bytes.sort();
    let tokens: Vec<String> = BYTES.map(str::to_owned).into_iter().chain(bytes).chain(["123".into()]).collect();
    let mut types = vec![1; tokens.len()];
    types[..4].copy_from_slice(&[3, 3, 4, 5]);
    vec![
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text(pre)),
        ("tokenizer.ggml.merges", strings(Vec::<String>::new())),
        ("tokenizer.ggml.tokens", strings(tokens)),
        ("tokenizer.ggml.token_type", kinds(&types)),
        ("tokenizer.ggml.bos_token_id", Gguf::U32(1)),
        ("tokenizer.ggml.eos_token_id", Gguf::U32(0)),
    ]
}

#[test]
fn kinds_of_tokens_and_what_is_added() {
    let mut metadata = bytes_and_words("gpt-2");
    let plain = tokenizer_from_gguf(metadata.clone()).unwrap();
    // Control and user-defined tokens are found in text, unused ones are not.
    assert_eq!(ids(&plain, "<bos><tool>", true), [1, 2]);
    assert_eq!(ids(&plain, "<unused>", true).len(), "<unused>".len());
    // Only control tokens are special.
    assert_eq!(plain.decode(&[1, 2], true).unwrap(), "<tool>");
    metadata.push(("tokenizer.ggml.add_bos_token", Gguf::Bool(true)));
    metadata.push(("tokenizer.ggml.add_eos_token", Gguf::Bool(true)));
    let both = tokenizer_from_gguf(metadata).unwrap();
    assert_eq!(ids(&both, "<tool>", true), [1, 2, 0]);
    assert_eq!(ids(&both, "<tool>", false), [2]);
}

#[test]
fn pre_tokenizers_by_name() {
    let pieces = |pre: &str| -> Vec<String> {
        use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};
        let tokenizer = tokenizer_from_gguf(bytes_and_words(pre)).unwrap();
        let mut cut = PreTokenizedString::from("Don't 1234 YouTube\n\n  foo!!/x");
        tokenizer.get_pre_tokenizer().unwrap().pre_tokenize(&mut cut).unwrap();
        let splits = cut.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(piece, ..)| piece.replace('Ġ', "_").replace('Ċ', "\\")).collect()
    };
    assert_eq!(pieces("gpt-2").join("|"), "Don|'t|_1234|_YouTube|\\\\_|_foo|!!/|x");
    assert_eq!(pieces("smollm").join("|"), "Don|'t|_|1|2|3|4|_YouTube|\\\\_|_foo|!!/|x");
    assert_eq!(pieces("qwen2").join("|"), "Don|'t|_|1|2|3|4|_YouTube|\\\\|_|_foo|!!/|x");
    assert_eq!(pieces("llama-bpe").join("|"), "Don|'t|_|123|4|_YouTube|\\\\|_|_foo|!!/|x");
    assert_eq!(pieces("tekken").join("|"), "Don|'t|_|1|2|3|4|_You|Tube|\\\\|_|_foo|!!/|x");
}

#[test]
fn llama3_takes_whole_tokens_and_adds_a_bos() {
    let llama3 = tokenizer_from_gguf(bytes_and_words("llama-bpe")).unwrap();
    let whole = 4 + 256;
    assert_eq!(ids(&llama3, "123", true), [1, whole]);
    let gpt2 = tokenizer_from_gguf(bytes_and_words("gpt-2")).unwrap();
    assert_eq!(ids(&gpt2, "123", true).len(), 3);
    // Qwen2 composes: e and a combining accent are the two bytes of é.
    let qwen2 = tokenizer_from_gguf(bytes_and_words("qwen2")).unwrap();
    assert_eq!(ids(&qwen2, "e\u{301}", true), ids(&gpt2, "é", true));
}

#[test]
fn sentence_piece_equals_sentencepiece() {
    let json: Value = serde_json::from_slice(&std::fs::read(fixtures().join("golden2/spm.json")).unwrap()).unwrap();
    let list = |key: &str| json[key].as_array().unwrap().clone();
    let scores = list("scores").iter().map(|score| Gguf::F32(score.as_f64().unwrap() as f32)).collect();
    let types: Vec<i32> = list("types").iter().map(|kind| kind.as_i64().unwrap() as i32).collect();
    let metadata = vec![
        ("tokenizer.ggml.model", text("llama")),
        ("tokenizer.ggml.tokens", strings(list("tokens").iter().map(|token| token.as_str().unwrap().to_owned()))),
        ("tokenizer.ggml.scores", Gguf::Array(scores)),
        ("tokenizer.ggml.token_type", kinds(&types)),
        ("tokenizer.ggml.unknown_token_id", Gguf::U32(0)),
        ("tokenizer.ggml.bos_token_id", Gguf::U32(1)),
        ("tokenizer.ggml.eos_token_id", Gguf::U32(2)),
    ];
    let tokenizer = tokenizer_from_gguf(metadata).unwrap();
    let texts = list("texts");
    assert!(texts.len() > 5);
    for (text, expected) in texts.iter().zip(list("ids")) {
        let text = text.as_str().unwrap();
        let expected: Vec<u32> = serde_json::from_value(expected).unwrap();
        assert_eq!(ids(&tokenizer, text, false), expected, "{text:?}");
        assert_eq!(tokenizer.decode(&expected, true).unwrap(), text);
        assert_eq!(ids(&tokenizer, text, true)[1..], expected); // a bos, as llama.cpp adds by default
    }
    assert_eq!(ids(&tokenizer, "</s>", false), [2]);
}

/// The library has room for the longest token of the vocabulary and no more, and puts both halves there unasked.
#[test]
fn merges_that_make_a_token_longer_than_any_are_refused_and_no_panic() {
    for merge in ["<unused> a", "a <unused>"] {
        let mut metadata = bytes_and_words("gpt-2");
        metadata.retain(|(key, _)| *key != "tokenizer.ggml.merges");
        metadata.push(("tokenizer.ggml.merges", strings([merge])));
        let refusal = tokenizer_refusal(metadata);
        assert!(refusal.contains("the GGUF's tokenizer: it is broken"), "{refusal}");
    }
}

#[test]
fn refusals_name_the_tokenizer() {
    let change = |key: &str, value: Option<Gguf>| {
        let mut metadata = bytes_and_words("gpt-2");
        metadata.retain(|(name, _)| *name != key);
        if let (Some(value), Some(key)) = (value, KEYS.into_iter().find(|name| *name == key)) {
            metadata.push((key, value));
        }
        tokenizer_refusal(metadata)
    };
    const KEYS: [&str; 5] = [
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
    ];
    assert!(change(KEYS[0], Some(text("bert"))).contains("bert"));
    assert!(change(KEYS[0], Some(text("llama"))).contains("scores"));
    assert!(change(KEYS[1], Some(text("poro-chat"))).contains("poro-chat"));
    assert!(change(KEYS[2], None).contains("merges"));
    assert!(change(KEYS[2], Some(strings(["ab"]))).contains("ab"));
    assert!(change(KEYS[2], Some(strings(["not there"]))).contains("tokenizer"));
    assert!(change(KEYS[3], Some(Gguf::U32(1))).contains("tokens"));
    assert!(change(KEYS[3], Some(kinds(&[1]))).contains("tokens"));
}
