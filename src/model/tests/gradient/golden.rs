//! Loss and gradient of PyTorch with PEFT, in f32, for every adapter: through import, expansion and pull-back.

use std::collections::HashMap;

use super::*;
use crate::adapter::{Interner, peft};

#[derive(serde::Deserialize)]
struct Outputs {
    continuation_logprobs: Vec<Vec<f64>>,
    loss: f64,
    grad_v: HashMap<String, Vec<f64>>,
}

#[derive(serde::Deserialize)]
struct Expected {
    prompts: Vec<Vec<u32>>,
    continuation: Vec<u32>,
    adapters: HashMap<String, Outputs>,
}

fn golden<B: Backend>(backend: impl Fn() -> B, case: &str) {
    let folder = fixtures().join(case);
    let expected: Expected = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let Fixture { mut model, expander } = Fixture::new(backend(), model_of(case), 4, Precision::F32);
    assert_eq!(expected.adapters.len(), 5);
    for (name, outputs) in &expected.adapters {
        let read = |file: &str| std::fs::read(folder.join("adapters").join(name).join(file)).unwrap();
        let (config, tensors) = (read(peft::CONFIG_FILE), read(peft::MODEL_FILE));
        let imported = peft::import(&config, &tensors, expander.sites(), expander.basis(), 4).unwrap();
        let facts = Facts {
            scheme: imported.scheme,
            dtype: imported.dtype,
            fingerprint: expander.basis().fingerprint,
            frame: imported.frame,
            approximate: false,
        };
        let numbers = facts.scheme.numbers(expander.sites());
        let adapter = Interner::new().adapter(facts.clone(), &imported.bytes, numbers).unwrap();
        let cores = expander.expand(&[(&adapter, 1.0)]).unwrap();
        let sequences = expected.prompts.iter().map(|prompt| (&prompt[..], &expected.continuation[..]));
        let tokens = (expected.prompts.len() * expected.continuation.len()) as f32;
        let job = GradientJob::new(sequences, cores, 1.0);
        let (logprobs, gradient) = run(&mut model, job, u64::MAX, |_, l| vec![-1.0 / tokens; l.len()]);
        let mut worst = 0f64;
        for (ours, theirs) in logprobs.iter().flatten().zip(outputs.continuation_logprobs.iter().flatten()) {
            worst = worst.max((f64::from(*ours) - theirs).abs());
        }
        let loss = -logprobs.iter().flatten().map(|l| f64::from(*l)).sum::<f64>() / f64::from(tokens);
        let ours = expander.pullback(&facts, 1.0, &gradient.unwrap().data).unwrap();
        let theirs: Vec<f64> =
            (0..outputs.grad_v.len()).flat_map(|group| outputs.grad_v[&group.to_string()].clone()).collect();
        assert_eq!(ours.len(), theirs.len());
        let largest = theirs.iter().fold(0f64, |most, value| most.max(value.abs()));
        let off = ours.iter().zip(&theirs).fold(0f64, |most, (a, b)| most.max((a - b).abs())) / largest;
        println!(
            "{case} {name}: loss {:.1e}, log-probs {worst:.1e}, gradient {off:.1e} of {largest:.2}",
            loss - outputs.loss
        );
        assert!((loss - outputs.loss).abs() <= 1e-4, "{case} {name}: loss {loss}, not {}", outputs.loss);
        assert!(worst <= 2e-4, "{case} {name}: a log-prob is off by {worst}");
        assert!(off <= 1e-3, "{case} {name}: the gradient is off by {off} of its largest entry");
    }
}

for_every_backend! {
    llama => |make| golden(make, "golden/llama");
    qwen2 => |make| golden(make, "golden/qwen2");
}
