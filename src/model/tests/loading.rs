//! Files in every layout give the same model; broken ones give one sentence.

use std::{collections::HashMap, fs, io::Cursor};

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use gguf_file::Value as Gguf;
use serde_json::{Value, json};

use super::{
    gguf_tokenizer::golden_tokenizer,
    golden::{OPTIONS, model_of},
    *,
};

const CASES: [&str; 7] = [
    "golden/llama",
    "golden/qwen2",
    "golden2/llama3rope",
    "golden2/qwen3",
    "golden2/qwen2odd",
    "golden2/llamabias",
    "golden2/mistral",
];

fn folder(case: &str) -> PathBuf {
    fixtures().join(case).join("model")
}

/// All tensors of a case in f32.
fn tensors_of(case: &str) -> HashMap<String, Tensor> {
    let mut all = HashMap::new();
    for entry in fs::read_dir(folder(case)).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            all.extend(candle_core::safetensors::load(path, &Device::Cpu).unwrap());
        }
    }
    all.into_iter().map(|(name, tensor)| (name, tensor.to_dtype(DType::F32).unwrap())).collect()
}

fn gguf_name(name: &str) -> String {
    let pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ];
    pairs.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// What llama.cpp's converter does to q and k of llama: `w.reshape(heads, 2, head_dim / 2, ...).swapaxes(1, 2)`.
fn permute(tensor: &Tensor, heads: usize) -> Tensor {
    let dims = tensor.dims().to_vec();
    let cols = dims.get(1).copied().unwrap_or(1);
    let split = tensor.reshape((heads, 2, dims[0] / heads / 2, cols)).unwrap();
    split.transpose(1, 2).unwrap().contiguous().unwrap().reshape(dims).unwrap()
}

pub(super) struct GgufFile {
    metadata: Vec<(String, Gguf)>,
    tensors: Vec<(String, QTensor)>,
}

impl GgufFile {
    /// The case as llama.cpp's converter would write it, in f32.
    pub(super) fn of(case: &str) -> Self {
        let spec = model_of(case).spec;
        let arch = match spec.architecture {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
        };
        let size = |value: usize| Gguf::U32(value as u32);
        let mut own = vec![
            ("embedding_length", size(spec.hidden)),
            ("feed_forward_length", size(spec.intermediate)),
            ("block_count", size(spec.layers)),
            ("attention.head_count", size(spec.heads)),
            ("attention.head_count_kv", size(spec.kv_heads)),
            ("attention.key_length", size(spec.head_dim)),
            ("rope.dimension_count", size(spec.head_dim)),
            ("context_length", size(spec.max_positions)),
            ("attention.layer_norm_rms_epsilon", Gguf::F32(spec.rms_eps)),
            ("rope.freq_base", Gguf::F32(spec.rope.theta as f32)),
        ];
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        match &spec.rope.scaling {
            RopeScaling::Linear { factor } => own.extend([
                ("rope.scaling.type", Gguf::String("linear".into())),
                ("rope.scaling.factor", Gguf::F32(*factor as f32)),
            ]),
            RopeScaling::Llama3 { .. } => {
                let plain = RopeSpec { scaling: RopeScaling::Default, ..spec.rope.clone() };
                let plain = rope::inverse_frequencies(&ModelSpec { rope: plain, ..spec.clone() });
                let factors = plain.iter().zip(rope::inverse_frequencies(&spec)).map(|(plain, scaled)| plain / scaled);
                tensors.push(("rope_freqs.weight".into(), Tensor::from_iter(factors, &Device::Cpu).unwrap()));
            }
            _ => {}
        }
        for (name, tensor) in tensors_of(case) {
            let heads = match arch {
                "llama" if name.contains("q_proj") => Some(spec.heads),
                "llama" if name.contains("k_proj") => Some(spec.kv_heads),
                _ => None,
            };
            let tensor = heads.map_or(tensor.clone(), |heads| permute(&tensor, heads));
            tensors.push((gguf_name(&name), tensor));
        }
        let mut metadata = vec![("general.architecture".to_owned(), Gguf::String(arch.into()))];
        metadata.extend(own.into_iter().map(|(key, value)| (format!("{arch}.{key}"), value)));
        metadata.extend(golden_tokenizer(case, "gpt-2").into_iter().map(|(key, value)| (key.to_owned(), value)));
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let pack = |tensor: &Tensor| QTensor::quantize(tensor, GgmlDType::F32).unwrap();
        let tensors = tensors.iter().map(|(name, tensor)| (name.clone(), pack(tensor))).collect();
        Self { metadata, tensors }
    }

    fn with(mut self, key: &str, value: Gguf) -> Self {
        self.metadata.retain(|(name, _)| name != key);
        self.metadata.push((key.into(), value));
        self
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let metadata: Vec<_> = self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let mut out = Cursor::new(Vec::new());
        gguf_file::write(&mut out, &metadata, &tensors).unwrap();
        out.into_inner()
    }

    fn refusal(&self) -> String {
        match load_bytes(&self.bytes()) {
            Ok(_) => panic!("it was not refused"),
            Err(error) => error.to_string(),
        }
    }
}

pub(super) fn load_bytes(bytes: &[u8]) -> Result<LoadedModel, ModelError> {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("tiny.gguf");
    fs::write(&path, bytes).unwrap();
    load(&path)
}

fn logits(model: LoadedModel) -> Vec<f32> {
    let mut model = Transformer::new(ReferenceBackend, model.spec, model.weights, &[], OPTIONS).unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| (i * 7 + 3) % 260).collect();
    step(&mut model, &[Rows::new(&tokens, 0, 0..3)]).remove(0)
}

#[test]
fn a_gguf_gives_the_logits_of_its_folder() {
    for case in CASES {
        let from_gguf = load_bytes(&GgufFile::of(case).bytes()).unwrap();
        assert_eq!(from_gguf.name, "tiny");
        assert_eq!(from_gguf.spec.eos, [0]);
        assert_eq!(from_gguf.spec.bos, Some(1));
        assert_eq!(from_gguf.special_tokens.bos.as_deref(), Some("<bos>"));
        assert_eq!(from_gguf.weights.natural_precision(), Precision::F32);
        let expected = logits(model_of(case));
        for (a, b) in logits(from_gguf).iter().zip(&expected) {
            assert!((a - b).abs() < 1e-4, "{case}: {a} {b}");
        }
    }
}

#[test]
fn other_formats_of_a_gguf_are_read() {
    let mut file = GgufFile::of("golden/qwen2"); // 96 wide: whole blocks of 32
    for (_, tensor) in &mut file.tensors {
        let wide = tensor.dequantize(&Device::Cpu).unwrap();
        let dtype = if wide.dims().len() == 2 { GgmlDType::Q8_0 } else { GgmlDType::F16 };
        *tensor = QTensor::quantize(&wide, dtype).unwrap();
    }
    let model = load_bytes(&file.bytes()).unwrap();
    assert_eq!(model.weights.natural_precision(), Precision::Q8);
    let exact = logits(model_of("golden/qwen2"));
    let close = logits(model).iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(close > 0.0 && close < 0.2, "{close}");
}

#[test]
fn what_a_gguf_says_and_we_do_not_know_is_refused() {
    let file = || GgufFile::of("golden/llama");
    let own = |key: &str, value: Gguf| file().with(&format!("llama.{key}"), value).refusal();
    for (message, word) in [
        (file().with("general.architecture", Gguf::String("gemma3".into())).refusal(), "gemma3"),
        (own("rope.scaling.type", Gguf::String("yarn".into())), "yarn"),
        (own("rope.dimension_count", Gguf::U32(8)), "rope.dimension_count"),
        (own("attention.value_length", Gguf::U32(8)), "attention.value_length"),
        (own("expert_count", Gguf::U32(8)), "expert_count"),
        (own("attention.head_count_kv", Gguf::Array(vec![Gguf::U32(2); 3])), "head_count_kv"),
        (own("attention.head_count", Gguf::U32(0)), "num_attention_heads"),
        (own("block_count", Gguf::U32(4)), "blk.3.attn_q.weight is missing"),
        (own("block_count", Gguf::U32(2)), "blk.2."),
        (own("feed_forward_length", Gguf::U32(161)), "blk.0.ffn_gate.weight has shape [160, 64]"),
        (own("embedding_length", Gguf::U32(u32::MAX)), "hidden_size"),
        (file().with("tokenizer.ggml.pre", Gguf::String("viking".into())).refusal(), "viking"),
    ] {
        assert!(message.contains(word), "{word}: {message}");
    }
    let mut bare = file();
    bare.metadata.retain(|(key, _)| key != "llama.context_length");
    assert!(bare.refusal().contains("llama.context_length is missing"));
    let mut more = GgufFile::of("golden2/qwen3");
    more.metadata.retain(|(key, _)| !key.ends_with("key_length"));
    assert!(more.refusal().contains("rope.dimension_count"));
    assert_eq!(
        load_bytes(&file().with("llama.attention.sliding_window", Gguf::U32(40)).bytes()).unwrap().spec.max_positions,
        40
    );
    let ends = file().with("tokenizer.ggml.eot_token_id", Gguf::U32(5));
    assert_eq!(load_bytes(&ends.bytes()).unwrap().spec.eos, [0, 5]);
}

#[test]
fn truncated_and_corrupt_gguf_files_are_errors() {
    let bytes = GgufFile::of("golden/llama").bytes();
    assert!(load_bytes(&bytes).is_ok());
    let cuts = (0..200).chain((200..bytes.len()).step_by(4001)).chain([bytes.len() - 40]);
    for cut in cuts {
        let error = load_bytes(&bytes[..cut]).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("tiny.gguf"), "{cut}: {error}");
    }
    let alignment = GgufFile::of("golden/llama").with("general.alignment", Gguf::U32(0));
    assert!(alignment.refusal().contains("broken"));
    // Any outcome but a panic: some changes are harmless (a letter of a merge), most are not.
    let header = bytes.len() - 4 * 100_000;
    let mut state = 1u64;
    let mut refused = 0;
    for _ in 0..400 {
        let mut changed = bytes.clone();
        for _ in 0..2 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            changed[(state >> 33) as usize % header.min(9000)] = (state >> 20) as u8;
        }
        refused += usize::from(load_bytes(&changed).is_err());
    }
    assert!(refused > 50, "{refused}");
}

/// A copy of a case that a test may change.
fn copy(case: &str) -> tempfile::TempDir {
    let temp = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(folder(case)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, temp.path().join(path.file_name().unwrap())).unwrap();
    }
    temp
}

fn refusal_of(folder: &Path) -> String {
    match load(folder) {
        Ok(_) => panic!("it was not refused"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn three_files_are_enough() {
    let temp = copy("golden/llama");
    for entry in fs::read_dir(temp.path()).unwrap() {
        let path = entry.unwrap().path();
        if !["config.json", "model.safetensors", "tokenizer.json"]
            .contains(&path.file_name().unwrap().to_str().unwrap())
        {
            fs::remove_file(path).unwrap();
        }
    }
    let model = load(temp.path()).unwrap();
    assert_eq!(
        model.special_tokens,
        SpecialTokens { bos: Some("<bos>".into()), eos: Some("<eos>".into()), ..Default::default() }
    );
    assert_eq!((model.chat_template, model.add_bos_token), (None, false));
    assert_eq!(model.name, temp.path().file_name().unwrap().to_str().unwrap());
    for (name, word) in [
        ("model.safetensors", "model.safetensors.index.json"),
        ("tokenizer.json", "tokenizer.json"),
        ("config.json", "config.json"),
    ] {
        fs::remove_file(temp.path().join(name)).unwrap();
        assert!(refusal_of(temp.path()).contains(word));
    }
    assert!(refusal_of(Path::new("/nonexistent/model")).contains("/nonexistent/model"));
}

#[test]
fn templates_and_special_tokens_in_every_spelling() {
    let temp = copy("golden/llama");
    let write = |name: &str, value: &Value| fs::write(temp.path().join(name), value.to_string()).unwrap();
    write(
        "tokenizer_config.json",
        &json!({"chat_template": "one", "bos_token": {"content": "<bos>"}, "eos_token": null}),
    );
    write("special_tokens_map.json", &json!({"pad_token": "<eos>", "bos_token": "no"}));
    let model = load(temp.path()).unwrap();
    assert_eq!(model.chat_template.as_deref(), Some("one"));
    let expected =
        SpecialTokens { bos: Some("<bos>".into()), eos: Some("<eos>".into()), pad: Some("<eos>".into()), unk: None };
    assert_eq!(model.special_tokens, expected);
    let list = json!([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]);
    write("tokenizer_config.json", &json!({"chat_template": list}));
    assert_eq!(load(temp.path()).unwrap().chat_template.as_deref(), Some("two"));
    fs::write(temp.path().join("chat_template.jinja"), "three").unwrap();
    assert_eq!(load(temp.path()).unwrap().chat_template.as_deref(), Some("three"));
    // A tokenizer that cuts, pads and adds a bos.
    let path = temp.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    tokenizer["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    tokenizer["post_processor"] = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}}});
    write("tokenizer.json", &tokenizer);
    fs::remove_file(temp.path().join("special_tokens_map.json")).unwrap();
    let model = load(temp.path()).unwrap();
    assert!(model.add_bos_token);
    assert!(model.tokenizer.encode("abcdefgh", true).unwrap().len() > 4);
    write("tokenizer_config.json", &json!(["not", "a", "map"]));
    assert!(load(temp.path()).is_ok());
    fs::write(temp.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(refusal_of(temp.path()).contains("tokenizer_config.json"));
}

#[test]
fn broken_safetensors_are_errors() {
    let temp = copy("golden/llama");
    let path = temp.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let cuts = (0..100).chain((100..bytes.len()).step_by(20_011)).chain([bytes.len() - 1]);
    for cut in cuts {
        fs::write(&path, &bytes[..cut]).unwrap();
        assert!(refusal_of(temp.path()).contains("model.safetensors"), "{cut}");
    }
    fs::write(&path, [&bytes[..], b"x"].concat()).unwrap();
    assert!(refusal_of(temp.path()).contains("model.safetensors"));
    let mut absurd = bytes.clone();
    absurd[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&path, &absurd).unwrap();
    assert!(refusal_of(temp.path()).contains("header"));
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let temp = copy("golden/llama");
    let tensors = tensors_of("golden/llama");
    let refusal = |change: &dyn Fn(&mut HashMap<String, Tensor>)| {
        let mut tensors = tensors.clone();
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, temp.path().join("model.safetensors")).unwrap();
        refusal_of(temp.path())
    };
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    let up = "model.layers.1.mlp.up_proj.weight";
    let missing = refusal(&|tensors| drop(tensors.remove(up)));
    assert!(missing.contains(&format!("{up} is missing")), "{missing}");
    let shape = refusal(&|tensors| drop(tensors.insert(up.into(), zeros(&[64, 160], DType::F32))));
    assert!(shape.contains(&format!("{up} has shape [64, 160], the configuration says [160, 64]")), "{shape}");
    let dtype = refusal(&|tensors| drop(tensors.insert(up.into(), zeros(&[160, 64], DType::F64))));
    assert!(dtype.contains(up) && dtype.contains("F64"), "{dtype}");
    let extra = "model.layers.0.self_attn.sinks";
    let unknown = refusal(&|tensors| drop(tensors.insert(extra.into(), zeros(&[4], DType::F32))));
    assert!(unknown.contains(extra), "{unknown}");
    // These are harmless: an old buffer, and the copy of a tied head.
    let mut tensors = tensors.clone();
    tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), zeros(&[8], DType::F32));
    tensors.insert("lm_head.weight".into(), zeros(&[320, 64], DType::F32));
    candle_core::safetensors::save(&tensors, temp.path().join("model.safetensors")).unwrap();
    assert!(load(temp.path()).unwrap().weights.head.is_none());
}

#[test]
fn shards_are_followed_and_stay_in_the_folder() {
    let temp = copy("golden2/qwen2odd");
    assert!(load(temp.path()).is_ok());
    let index = temp.path().join("model.safetensors.index.json");
    let shards = fs::read_to_string(&index).unwrap();
    fs::write(&index, shards.replace("model-00002-of", "../../model-00002-of")).unwrap();
    assert!(refusal_of(temp.path()).contains("../../model"));
    fs::write(&index, shards).unwrap();
    fs::remove_file(temp.path().join("model-00003-of-00005.safetensors")).unwrap();
    assert!(refusal_of(temp.path()).contains("model-00003-of-00005"));
}
