//! The real model: SmolLM2-135M-Instruct (Q4_1), against transformers on the same weights in f32.

use super::*;
use crate::kernel::Precision;

#[derive(serde::Deserialize)]
struct Case {
    user: String,
    rendered: String,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    greedy_text: String,
}

fn cases() -> Vec<Case> {
    let cases: Vec<Case> =
        serde_json::from_slice(&std::fs::read(fixtures().join("golden/smollm2.json")).unwrap()).unwrap();
    assert_eq!(cases.len(), 10);
    cases
}

/// Pulls the model if it is not cached.
fn model() -> LoadedModel {
    let resolved = Sources::from_env().resolve(DEFAULT_MODEL).unwrap();
    assert_eq!(resolved.name, "smollm2-135m");
    load(&resolved.path).unwrap()
}

#[test]
fn the_gguf_says_what_the_model_is() {
    let model = model();
    let spec = &model.spec;
    assert_eq!((spec.hidden, spec.layers, spec.heads, spec.kv_heads, spec.head_dim), (576, 30, 9, 3, 64));
    assert_eq!((spec.vocab, spec.max_positions, spec.rope.theta, spec.rms_eps), (49152, 8192, 1e5, 1e-5));
    assert_eq!(spec.eos[0], 2);
    assert_eq!(model.special_tokens.eos.as_deref(), Some("<|im_end|>"));
    assert!(!model.add_bos_token);
    assert!(model.chat_template.as_deref().unwrap().contains("<|im_start|>"));
    assert_eq!(model.weights.natural_precision(), Precision::Q8);
    assert_eq!(model.name, "SmolLM2-135M-Instruct.Q4_1");
    assert!(model.weights.head.is_none());
    assert_eq!(model.files.len(), 1);
}

#[test]
fn prompts_become_the_ids_of_transformers() {
    let tokenizer = model().tokenizer;
    for case in cases() {
        for special in [false, true] {
            let ids = tokenizer.encode(case.rendered.as_str(), special).unwrap();
            assert_eq!(ids.get_ids(), case.prompt_ids, "{}", case.user);
        }
        assert_eq!(tokenizer.decode(&case.prompt_ids, false).unwrap(), case.rendered);
        assert_eq!(tokenizer.decode(&case.greedy_ids, true).unwrap(), case.greedy_text);
    }
}
