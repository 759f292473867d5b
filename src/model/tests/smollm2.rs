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
pub(super) fn model() -> LoadedModel {
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

fn transformer(precision: Precision) -> (Transformer<CpuBackend>, Vec<u32>) {
    let LoadedModel { spec, weights, .. } = model();
    let eos = spec.eos.clone();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let backend = CpuBackend::new(threads, None).unwrap();
    let options = TransformerOptions { precision, max_positions: 256, kv_blocks: 16 };
    (Transformer::new(backend, spec, weights, &[], options).unwrap(), eos)
}

#[test]
fn greedy_text_in_f32_is_that_of_transformers() {
    let (mut model, eos) = transformer(Precision::F32);
    let mut equal = 0;
    for case in cases() {
        let found = greedy(&mut model, &case.prompt_ids, 32, &eos, 0..16, &None);
        equal += usize::from(found == case.greedy_ids);
        println!("{} {:?}", if found == case.greedy_ids { "equal  " } else { "DIFFERS" }, case.user);
    }
    println!("{equal} of 10 greedy continuations equal those of transformers");
    assert!(equal >= 9);
}

/// Agreement of the most likely next token at every position of the prompts and their f32 continuations.
#[test]
fn quantised_weights_mostly_choose_the_token_of_f32() {
    let tops = |precision| -> Vec<u32> {
        let (mut model, _) = transformer(precision);
        let of = |case: &Case| {
            let text = [&case.prompt_ids[..], &case.greedy_ids].concat();
            step(&mut model, &[Rows::new(&text, 0, 0..16).with_all_logits()])
        };
        cases().iter().flat_map(of).map(|logits| argmax(&logits)).collect()
    };
    let exact = tops(Precision::F32);
    for (precision, floor) in [(Precision::Bf16, 0.95), (Precision::Q8, 0.95), (Precision::Q4, 0.85)] {
        let found = tops(precision);
        let agree = exact.iter().zip(&found).filter(|(a, b)| a == b).count();
        let share = agree as f64 / exact.len() as f64;
        println!("{precision:?}: top-1 agreement with f32 {share:.4} ({agree} of {} positions)", exact.len());
        assert!(share > floor, "{precision:?}: {share}");
    }
}
