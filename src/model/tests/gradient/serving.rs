//! Log-probs of this pass against those of the one that serves.

use super::*;

/// Mean and largest difference of a log-prob.
fn differences(
    model: &mut dyn Model,
    sequences: &Sequences<'_>,
    cores: &Option<Arc<Cores>>,
    nothing: &Arc<Cores>,
    temperature: f32,
) -> (f64, f64) {
    let ours = logprobs(model, sequences, cores.as_ref().unwrap_or(nothing), temperature);
    let mut all = Vec::new();
    for ((prompt, completion), ours) in sequences.iter().zip(&ours) {
        let text = [prompt, *completion].concat();
        let rows = Rows::new(&text[..text.len() - 1], 0, 0..text.len().div_ceil(BLOCK_TOKENS) as u32);
        let logits = step(model, &[rows.under(cores).with_all_logits()]);
        for (i, ours) in ours.iter().enumerate() {
            let logits: Vec<f32> = logits[prompt.len() - 1 + i].iter().map(|logit| logit / temperature).collect();
            all.push((log_prob(&logits, completion[i]) - f64::from(*ours)).abs());
        }
    }
    (all.iter().sum::<f64>() / all.len() as f64, all.into_iter().fold(0.0, f64::max))
}

fn agree<B: Backend>(backend: impl Fn() -> B, case: &str) {
    let mut fixture = Fixture::new(backend(), model_of(case), 2, Precision::F32);
    let facts = fixture.facts(Scheme::u13_tied());
    let (zero, some) = (fixture.cores(&facts, &[0.0; 13]), fixture.cores(&facts, &noise(1, 13)));
    let texts: Vec<Vec<u32>> = [3, 20, 1, 31].iter().enumerate().map(|(i, n)| text(i as u64, *n, 250)).collect();
    let sequences: Sequences<'_> =
        vec![(&texts[0], &texts[1]), (&texts[0], &texts[2]), (&texts[3], &texts[1]), (&texts[2], &texts[3])];
    for (what, cores) in [("base", None), ("zero", Some(zero.clone())), ("adapter", Some(some))] {
        for temperature in [1.0, 0.6] {
            let (_, worst) = differences(&mut fixture.model, &sequences, &cores, &zero, temperature);
            assert!(worst <= 1e-4, "{case}, {what} at {temperature}: {worst:e}");
        }
    }
}

for_every_backend! {
    llama => |make| agree(make, "golden/llama");
    qwen2 => |make| agree(make, "golden/qwen2");
    llama3rope => |make| agree(make, "golden2/llama3rope");
    qwen3 => |make| agree(make, "golden2/qwen3");
    qwen2odd => |make| agree(make, "golden2/qwen2odd");
    llamabias => |make| agree(make, "golden2/llamabias");
    mistral => |make| agree(make, "golden2/mistral");
}

#[derive(serde::Deserialize)]
struct Case {
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    top1_logprob: Vec<f64>,
}

/// What rounded activations, keys and values do to a sampler's log-probs on the real model.
#[test]
fn the_sampler_and_the_trainer_on_the_real_model() {
    let path = fixtures().join("golden/smollm2.json");
    let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let sequences: Sequences<'_> = cases.iter().map(|case| (&case.prompt_ids[..], &case.greedy_ids[..])).collect();
    let nothing = Arc::new(Cores::new(0, []));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    for (precision, mean_bound, bound) in [
        (Precision::F32, 2e-5, 1e-4),
        (Precision::Bf16, 0.02, 0.2),
        (Precision::Q8, 0.04, 0.5),
        (Precision::Q4, 0.04, 0.5),
    ] {
        let LoadedModel { spec, weights, .. } = super::super::smollm2::model();
        let options = TransformerOptions { precision, max_positions: 256, kv_blocks: 16 };
        let backend = CpuBackend::new(threads, None).unwrap();
        let mut model = Transformer::new(backend, spec, weights, &[], options).unwrap();
        let (mean, worst) = differences(&mut model, &sequences, &None, &nothing, 1.0);
        println!("{precision:?}: |sampler - trainer| mean {mean:.1e}, largest {worst:.1e}");
        assert!(mean <= mean_bound && worst <= bound, "{precision:?}: {mean} {worst}");
        if precision == Precision::F32 {
            let ours = logprobs(&mut model, &sequences, &nothing, 1.0);
            let pairs = ours.iter().flatten().zip(cases.iter().flat_map(|case| &case.top1_logprob));
            let worst = pairs.fold(0f64, |most, (a, b)| most.max((f64::from(*a) - b).abs()));
            println!("f32 against transformers: {worst:.1e}");
            assert!(worst <= 1e-3, "{worst}");
        }
    }
}
