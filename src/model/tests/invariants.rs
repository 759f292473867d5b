//! The bits of a row's logits depend on its own prompt and adapter only.

use super::{
    golden::{Checkpoint, OPTIONS, model_of},
    *,
};

struct Fixture<B: Backend> {
    model: Transformer<B>,
    /// None and two adapters.
    cores: [Option<Arc<Cores>>; 3],
}

fn fixture<B: Backend>(backend: B, precision: Precision) -> Fixture<B> {
    let LoadedModel { spec, weights, .. } = model_of("golden/qwen2");
    let read = |name: &str| Checkpoint::read(&fixtures().join("golden/qwen2/adapters").join(name), &spec.sites());
    let (one, two) = (read("u13-tied"), read("u13-tied-alice"));
    let options = TransformerOptions { precision, ..OPTIONS };
    let model = Transformer::new(backend, spec, weights, &one.factors(), options).unwrap();
    Fixture { model, cores: [None, Some(one.cores), Some(two.cores)] }
}

fn text(len: usize, seed: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * 37 + seed * 101 + i * i) % 288 + 2) as u32).collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

const PRECISIONS: [Precision; 4] = [Precision::F32, Precision::Bf16, Precision::Q8, Precision::Q4];

fn chunks_and_recomputation<B: Backend>(backend: impl Fn() -> B) {
    for precision in PRECISIONS {
        let Fixture { mut model, cores } = fixture(backend(), precision);
        let cores = &cores[1];
        let prompt = text(45, 1);
        let whole = step(&mut model, &[Rows::new(&prompt, 0, 0..4).under(cores)]);
        for sizes in [vec![16, 16, 13], vec![1, 30, 14], vec![7; 7], vec![1; 45]] {
            let (mut start, mut last) = (0, Vec::new());
            for size in sizes {
                let chunk = &prompt[start..(start + size).min(prompt.len())];
                last = step(&mut model, &[Rows::new(chunk, start, [9, 5, 30, 6]).under(cores)]);
                start += chunk.len();
            }
            assert_eq!(start, prompt.len());
            assert_eq!(bits(&last[0]), bits(&whole[0]));
        }
        // A sequence that lost its blocks after some tokens is prefilled again, with them, into other blocks.
        let tokens = greedy(&mut model, &prompt, 8, &[], 12..16, cores);
        let before = step(&mut model, &[Rows::new(&tokens[7..], 52, 12..16).under(cores)]);
        let again = [&prompt[..], &tokens].concat();
        let after = step(&mut model, &[Rows::new(&again, 0, [20, 19, 25, 24]).under(cores)]);
        assert_eq!(bits(&before[0]), bits(&after[0]));
    }
}

fn mixed_batch<B: Backend>(backend: impl Fn() -> B) {
    for precision in PRECISIONS {
        let Fixture { mut model, cores } = fixture(backend(), precision);
        let texts: Vec<Vec<u32>> = (0..7).map(|i| text(1 + 5 * i, i)).collect();
        let rows: Vec<Rows<'_>> = texts
            .iter()
            .enumerate()
            .map(|(i, text)| Rows::new(text, 0, 3 * i as u32..3 * i as u32 + 3).under(&cores[i % 3]).with_all_logits())
            .collect();
        let together = step(&mut model, &rows);
        let alone: Vec<Vec<f32>> = rows.iter().flat_map(|rows| step(&mut model, std::slice::from_ref(rows))).collect();
        assert_eq!(together.len(), alone.len());
        assert!(together.iter().zip(&alone).all(|(a, b)| bits(a) == bits(b)));
        // The adapters do something, so that the equality above means something.
        let of = |cores: &Option<Arc<Cores>>, model: &mut Transformer<B>| {
            step(model, &[Rows::new(&texts[6], 0, 0..3).under(cores)]).remove(0)
        };
        let [base, one, two] = [&cores[0], &cores[1], &cores[2]].map(|cores| of(cores, &mut model));
        assert!(bits(&base) != bits(&one) && bits(&one) != bits(&two));
    }
}

for_every_backend! {
    equal bits:
    chunked_prefill_and_recomputation_keep_the_bits => chunks_and_recomputation;
    a_mixed_batch_keeps_the_bits => mixed_batch;
}

#[test]
fn bad_options_and_batches_are_errors() {
    let LoadedModel { spec, weights, .. } = model_of("golden/llama");
    let build = |options, factors: &[SiteFactors<'_>]| {
        Transformer::new(ReferenceBackend, spec.clone(), weights.clone(), factors, options)
            .map(|_| ())
            .map_err(|e| e.to_string())
    };
    assert!(build(TransformerOptions { kv_blocks: 0, ..OPTIONS }, &[]).unwrap_err().contains("KV cache"));
    assert!(build(TransformerOptions { max_positions: 257, ..OPTIONS }, &[]).unwrap_err().contains("257"));
    let lone = SiteFactors { site: 0, u: &[], v: &[], rank: 2 };
    assert!(build(OPTIONS, &[lone]).unwrap_err().contains("21"));
    let mut model = Transformer::new(ReferenceBackend, spec.clone(), weights.clone(), &[], OPTIONS).unwrap();
    let mut logits = Floats::default();
    let batch = |token, position| StepBatch {
        tokens: vec![token],
        positions: vec![position],
        slots: vec![BASE_SLOT],
        sequences: vec![SequenceRows { first_row: 0, rows: 1, start: position as usize, blocks: (0..20).collect() }],
        ..StepBatch::default()
    };
    assert!(model.forward(&batch(320, 0), &mut logits).is_err()); // the vocabulary has 320
    assert!(model.forward(&batch(1, 96), &mut logits).is_err()); // the rotary table ends
    logits.set(&[1.0]);
    model.forward(&batch(319, 95), &mut logits).unwrap();
    assert!(logits.is_empty()); // nobody reads any
    assert_eq!(kv_blocks(&spec, Precision::F32, 1), (1 << 20) / (2 * 4 * 3 * 2 * 16 * BLOCK_TOKENS));
    assert_eq!(kv_blocks(&spec, Precision::Q8, 1), 2 * kv_blocks(&spec, Precision::F32, 1));
}
