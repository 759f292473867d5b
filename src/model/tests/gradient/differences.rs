//! Finite differences.

use super::*;

fn value(logprobs: &[Vec<f32>], weights: &[Vec<f32>]) -> f64 {
    let pairs = logprobs.iter().flatten().zip(weights.iter().flatten());
    pairs.map(|(l, w)| f64::from(*l) * f64::from(*w)).sum()
}

/// The derivative along directions in the space of numbers, against differences of fourth order of the forward pass; the worst relative to the steepest direction.
fn along<B: Backend>(
    fixture: &mut Fixture<B>,
    scheme: Scheme,
    sequences: &Sequences<'_>,
    temperature: f32,
    step: f64,
    directions: u64,
) -> f64 {
    let facts = fixture.facts(scheme);
    let count = facts.scheme.numbers(fixture.expander.sites());
    let numbers: Vec<f32> = noise(3, count).iter().map(|x| 0.3 * x).collect();
    let weights: Vec<Vec<f32>> =
        sequences.iter().enumerate().map(|(i, (_, c))| noise(50 + i as u64, c.len())).collect();
    let job = GradientJob::new(sequences.iter().copied(), fixture.cores(&facts, &numbers), temperature);
    let (_, gradient) = run(&mut fixture.model, job, u64::MAX, |i, _| weights[i].clone());
    let gradient = fixture.expander.pullback(&facts, 1.0, &gradient.unwrap().data).unwrap();
    let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
    let mut worst = 0f64;
    for seed in 0..directions {
        // Half the gradient itself, so that the direction is never one in which nothing happens.
        let random = noise(seed + 70, count);
        let direction: Vec<f64> =
            gradient.iter().zip(random).map(|(g, x)| 0.5 * g / norm + 0.3 * f64::from(x)).collect();
        let mut at = |steps: f64| {
            let moved: Vec<f32> =
                numbers.iter().zip(&direction).map(|(v, d)| (f64::from(*v) + steps * step * d) as f32).collect();
            let cores = fixture.cores(&facts, &moved);
            value(&logprobs(&mut fixture.model, sequences, &cores, temperature), &weights)
        };
        let difference = (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * step);
        let ours: f64 = gradient.iter().zip(&direction).map(|(g, d)| g * d).sum();
        println!("  along {seed}: {ours:.6}, difference {difference:.6}");
        worst = worst.max((ours - difference).abs() / norm);
    }
    worst
}

/// Every architecture: GQA with one key head, biases on q, k, v, norms on heads, tied and untied heads, scaled rotations; temperature, ragged lengths, one token.
#[test]
fn every_architecture() {
    for (number, case) in [
        "golden/llama",
        "golden/qwen2",
        "golden2/llama3rope",
        "golden2/qwen3",
        "golden2/qwen2odd",
        "golden2/llamabias",
        "golden2/mistral",
    ]
    .into_iter()
    .enumerate()
    {
        let mut fixture = Fixture::new(CpuBackend::new(2, None).unwrap(), model_of(case), 2, Precision::F32);
        let vocab = fixture.model.vocab_size();
        let texts: Vec<Vec<u32>> =
            [9, 1, 5, 12, 3].iter().enumerate().map(|(i, n)| text(i as u64, *n, vocab)).collect();
        let sequences: Sequences<'_> = vec![
            (&texts[0], &texts[2]),
            (&texts[0], &texts[1]),
            (&texts[0], &texts[3]),
            (&texts[1], &texts[2]),
            (&texts[4], &texts[3]),
        ];
        let scheme = [Scheme::tiny13(), Scheme::u13_tied(), Scheme::lora_xs(2, crate::adapter::Targets::ALL)]
            [number % 3]
            .clone();
        println!("{case} {:?}", scheme.convention);
        let worst = along(&mut fixture, scheme, &sequences, [1.0, 0.7, 1.4][number % 3], 0.02, 3);
        assert!(worst <= 2e-3, "{case}: {worst}");
    }
}

/// Weights as each precision rounds them, on both fast backends.
#[test]
fn every_precision() {
    for precision in [Precision::F32, Precision::Bf16, Precision::Q8, Precision::Q4] {
        let loaded = || model_of("golden/qwen2");
        let (prompt, answer) = (text(1, 11, 300), text(2, 7, 300));
        let sequences: Sequences<'_> = vec![(&prompt, &answer), (&answer, &prompt)];
        println!("{precision:?}");
        let mut fixture = Fixture::new(CpuBackend::new(2, None).unwrap(), loaded(), 2, precision);
        assert!(along(&mut fixture, Scheme::u13_tied(), &sequences, 1.0, 0.02, 2) <= 2e-3);
        let backend = CandleBackend::new(candle_core::Device::Cpu);
        let mut fixture = Fixture::new(backend, loaded(), 2, precision);
        assert!(along(&mut fixture, Scheme::u13_tied(), &sequences, 1.0, 0.02, 2) <= 2e-3);
    }
}

/// SmolLM2-135M-Instruct as its 4-bit file is served.
#[test]
fn the_quantised_real_model() {
    let loaded = super::super::smollm2::model();
    let (prompt, answers): (Vec<u32>, [Vec<u32>; 2]) = {
        let encode = |text: &str| loaded.tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        (encode("What is 12 + 30? The answer is"), [encode(" 42."), encode(" 3, because")])
    };
    let precision = loaded.weights.natural_precision();
    assert_eq!(precision, Precision::Q8);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut fixture = Fixture::new(CpuBackend::new(threads, None).unwrap(), loaded, 2, precision);
    let sequences: Sequences<'_> = answers.iter().map(|answer| (&prompt[..], &answer[..])).collect();
    let worst = along(&mut fixture, Scheme::tiny13(), &sequences, 1.0, 0.005, 2);
    println!("worst {worst:.1e}");
    assert!(worst <= 5e-3, "{worst}");
}
