//! How long a step of a small training takes, by hand only:
//! `cargo nextest run --lib --run-ignored only --no-capture gradient::speed`

use std::{collections::BTreeMap, time::Instant};

use super::*;

/// 6 prompts of 40 tokens, 6 completions of 24 each, on SmolLM2-135M-Instruct as it is served.
#[test]
#[ignore = "a measurement"]
fn a_step_on_the_real_model() {
    let loaded = super::super::smollm2::model();
    let precision = loaded.weights.natural_precision();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut fixture = Fixture::new(CpuBackend::new(threads, None).unwrap(), loaded, 2, precision);
    let facts = fixture.facts(Scheme::tiny13());
    let cores = fixture.cores(&facts, &[0.05; 13]);
    let texts: Vec<(Vec<u32>, Vec<u32>)> =
        (0..36).map(|i| (text(i / 6, 40, 40000), text(100 + i, 24, 40000))).collect();
    let job = || GradientJob::new(texts.iter().map(|(p, c)| (&p[..], &c[..])), cores.clone(), 1.0);
    for round in 0..3 {
        let mut task = fixture.model.begin_gradient(job()).unwrap();
        let (rows, all, since) = (task.rows(), task.left(), Instant::now());
        let mut kinds: BTreeMap<String, (u32, f64, f64, u64)> = BTreeMap::new();
        while task.stage() != Stage::Done {
            if task.stage() == Stage::Weights {
                let weights: Vec<_> = task.logprobs().unwrap().iter().map(|l| vec![1.0; l.len()]).collect();
                task.set_weights(&weights).unwrap();
            }
            let (kind, before) = (task.unit(), Instant::now());
            let spent = fixture.model.advance_gradient(&mut task, 0).unwrap().spent;
            let seconds = before.elapsed().as_secs_f64();
            let entry = kinds.entry(kind).or_default();
            *entry = (entry.0 + 1, entry.1 + seconds, entry.2.max(seconds), entry.3 + spent);
        }
        let seconds = since.elapsed().as_secs_f64();
        println!(
            "round {round}: {rows} rows, {:.0} GMAC in {seconds:.2} s, {:.0} GMAC/s",
            all as f64 / 1e9,
            all as f64 / 1e9 / seconds
        );
        for (kind, (units, seconds, longest, spent)) in kinds {
            let rate = spent as f64 / 1e9 / seconds;
            println!(
                "  {kind:<10} {units:>4} units {seconds:>6.2} s, longest {:>5.1} ms, {rate:>4.0} GMAC/s",
                longest * 1e3
            );
        }
    }
}
