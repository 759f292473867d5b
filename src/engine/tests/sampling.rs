//! The sampler alone.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::kernel::host::Scans;

fn row(len: usize, seed: u32) -> Vec<f32> {
    (0..len as u32).map(|i| ((i * 37 + seed * 101) as f32 * 0.731).sin() * 3.0).collect()
}

fn next(row: &[f32], sampling: &Sampling, index: usize, forbidden: &[TokenId], counts: Option<&Counts>) -> TokenId {
    let question = Question::Next { sampling, index, forbidden, counts, logprobs: None, scaled: false };
    ask(row, row.len(), &[question]).remove(0).unwrap().0
}

/// Naive, in f64, over a full sort.
fn probabilities(row: &[f32], sampling: &Sampling) -> Vec<f64> {
    let mut p: Vec<(usize, f64)> =
        row.iter().map(|&l| (f64::from(l) / f64::from(sampling.temperature)).exp()).enumerate().collect();
    p.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    let floor = p[0].1 * f64::from(sampling.min_p);
    p.retain(|&(_, w)| w >= floor);
    if sampling.top_k > 0 {
        p.truncate(sampling.top_k as usize);
    }
    let total: f64 = p.iter().map(|&(_, w)| w).sum();
    let mut sum = 0.0;
    let kept = p.iter().position(|&(_, w)| {
        sum += w;
        sum >= f64::from(sampling.top_p) * total - 1e-9
    });
    p.truncate(kept.map_or(p.len(), |last| last + 1));
    let total: f64 = p.iter().map(|&(_, w)| w).sum();
    let mut out = vec![0.0; row.len()];
    p.into_iter().for_each(|(token, w)| out[token] = w / total);
    out
}

#[test]
fn draws_follow_the_distribution() {
    let row = row(100, 3);
    let cases = [
        Sampling::default(),
        Sampling { temperature: 0.6, ..Sampling::default() },
        Sampling { temperature: 1.7, top_k: 12, ..Sampling::default() },
        Sampling { top_p: 0.8, ..Sampling::default() },
        Sampling { min_p: 0.2, ..Sampling::default() },
        Sampling { top_k: 30, top_p: 0.9, min_p: 0.05, ..Sampling::default() },
    ];
    const DRAWS: usize = 40_000;
    for sampling in cases {
        let expected = probabilities(&row, &sampling);
        let mut seen = vec![0usize; row.len()];
        let sampling = Sampling { seed: 12, ..sampling };
        let question = |index| Question::Next {
            sampling: &sampling,
            index,
            forbidden: &[],
            counts: None,
            logprobs: None,
            scaled: false,
        };
        for index in 0..DRAWS {
            seen[ask(&row, row.len(), &[question(index)]).remove(0).unwrap().0 as usize] += 1;
        }
        let mut chi = 0.0;
        let mut cells = 0;
        for (&count, &p) in seen.iter().zip(&expected) {
            assert!(p > 0.0 || count == 0, "a token that was filtered out: {sampling:?}");
            if p > 0.0 {
                chi += (count as f64 - p * DRAWS as f64).powi(2) / (p * DRAWS as f64);
                cells += 1;
            }
        }
        // Mean and deviation of chi-square with so many degrees of freedom; four deviations.
        let freedom = f64::from(cells - 1);
        assert!(chi < freedom + 4.0 * (2.0 * freedom).sqrt(), "{chi} for {freedom}: {sampling:?}");
        assert!(chi > freedom - 4.0 * (2.0 * freedom).sqrt(), "too even: {chi} for {freedom}: {sampling:?}");
    }
}

#[test]
fn neighbouring_seeds_are_as_good_as_indexes() {
    let row = vec![0.0; 16];
    let mut seen = [0f64; 16];
    for seed in 0..16_000 {
        seen[next(&row, &Sampling { seed, ..Sampling::default() }, 0, &[], None) as usize] += 1.0;
    }
    let chi: f64 = seen.iter().map(|count| (count - 1000.0).powi(2) / 1000.0).sum();
    assert!(chi < 37.7, "{chi}: one in a thousand is above that for 15 degrees of freedom");
}

#[test]
fn a_draw_is_a_function_of_seed_and_index() {
    let row = row(1000, 1);
    let sampling = Sampling { seed: 5, ..Sampling::default() };
    let draws: Vec<TokenId> = (0..50).map(|index| next(&row, &sampling, index, &[], None)).collect();
    assert_eq!(draws, (0..50).map(|index| next(&row, &sampling, index, &[], None)).collect::<Vec<_>>());
    let other = Sampling { seed: 6, ..Sampling::default() };
    assert_ne!(draws, (0..50).map(|index| next(&row, &other, index, &[], None)).collect::<Vec<_>>());
    // Pinned: what a seed gives must not change with a release.
    assert_eq!(draws[..8], [835, 330, 481, 205, 836, 940, 783, 523]);
}

#[test]
fn greedy_takes_the_largest_and_of_equals_the_lowest() {
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let mut row = row(300, 2);
    row[77] = 9.0;
    row[201] = 9.0;
    assert_eq!(next(&row, &greedy, 0, &[], None), 77);
    assert_eq!(next(&row, &greedy, 0, &[77], None), 201);
    assert_eq!(next(&row, &Sampling { logit_bias: vec![(5, 100.0)], ..greedy.clone() }, 0, &[], None), 5);
    assert_eq!(next(&row, &Sampling { logit_bias: vec![(77, -100.0)], ..greedy.clone() }, 0, &[], None), 201);
    assert_eq!(next(&row, &Sampling { top_k: 1, ..Sampling::default() }, 0, &[], None), 77);
    assert_eq!(next(&row, &Sampling { top_p: 0.0, ..Sampling::default() }, 0, &[], None), 77);
    for index in 0..20 {
        let token = next(&row, &Sampling { min_p: 1.0, ..Sampling::default() }, index, &[], None);
        assert!(token == 77 || token == 201);
    }
}

#[test]
fn penalties_follow_their_formulas() {
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let counted = |sampling: &Sampling, prompt: &[TokenId], completion: &[TokenId]| {
        let mut counts = Counts::for_request(sampling, prompt).unwrap();
        completion.iter().for_each(|&token| counts.add(token));
        counts
    };
    let pick = |row: &[f32], sampling: &Sampling, prompt: &[TokenId], completion: &[TokenId]| {
        next(row, sampling, 0, &[], Some(&counted(sampling, prompt, completion)))
    };
    // Presence: once, for tokens of the completion only.
    let presence = Sampling { presence_penalty: 1.0, ..greedy.clone() };
    assert_eq!(pick(&[3.0, 2.5, 1.9], &presence, &[0], &[]), 0);
    assert_eq!(pick(&[3.0, 2.5, 1.9], &presence, &[], &[0, 0, 0]), 1);
    assert_eq!(pick(&[3.0, 1.9, 1.8], &presence, &[], &[0, 0, 0]), 0);
    // Frequency: each time.
    let frequency = Sampling { frequency_penalty: 0.5, ..greedy.clone() };
    assert_eq!(pick(&[3.0, 1.9, 1.8], &frequency, &[0], &[0, 0]), 0);
    assert_eq!(pick(&[3.0, 1.9, 1.8], &frequency, &[0], &[0, 0, 0]), 1);
    // Repetition: prompt and completion, divides or multiplies.
    let repetition = Sampling { repetition_penalty: 2.0, ..greedy.clone() };
    assert_eq!(pick(&[3.0, 1.6, 1.0], &repetition, &[0], &[]), 1);
    assert_eq!(pick(&[3.0, 1.6, 1.0], &repetition, &[0], &[1]), 0);
    assert_eq!(pick(&[-1.0, -1.5, -1.9], &repetition, &[0], &[]), 1);
    assert!(Counts::for_request(&greedy, &[1]).is_none());
}

#[test]
fn log_probs_are_the_log_softmax_of_the_raw_row() {
    for len in [5, 64, 100, 5000] {
        let row = row(len, 9);
        let normaliser = row.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
        let naive = |token: TokenId| f64::from(row[token as usize]) - normaliser;
        let mut order: Vec<TokenId> = (0..len as u32).collect();
        order.sort_by(|&a, &b| row[b as usize].partial_cmp(&row[a as usize]).unwrap());
        for n in [0, 1, 5, 20] {
            // Temperature, bias and forbidden tokens choose, but do not show.
            let sampling = Sampling { temperature: 0.3, logit_bias: vec![(3, 50.0)], top_k: 2, ..Sampling::default() };
            let question = Question::Next {
                sampling: &sampling,
                index: 0,
                forbidden: &[1],
                counts: None,
                logprobs: Some(n),
                scaled: false,
            };
            let (token, logprobs) = ask(&row, len, &[question]).remove(0).unwrap();
            let logprobs = logprobs.unwrap();
            assert_eq!(token, 3);
            assert!((f64::from(logprobs.logprob) - naive(3)).abs() < 2e-6);
            let ids: Vec<TokenId> = logprobs.top.iter().map(|&(token, _)| token).collect();
            assert_eq!(ids, order[..n.min(len)]);
            assert!(logprobs.top.iter().all(|&(token, p)| (f64::from(p) - naive(token)).abs() < 2e-6));
        }
    }
}

#[test]
fn scaled_log_probs_are_those_of_the_distribution_that_is_sampled() {
    for (len, temperature) in [(5, 0.5), (100, 2.0), (5000, 0.01), (5000, 0.7), (5000, 1.0), (100, 0.0)] {
        let row = row(len, 4);
        let sampling = Sampling { temperature, ..Sampling::default() };
        let ask_one = |scaled| {
            let question = Question::Next {
                sampling: &sampling,
                index: 1,
                forbidden: &[],
                counts: None,
                logprobs: Some(1),
                scaled,
            };
            let (token, logprobs) = ask(&row, len, &[question]).remove(0).unwrap();
            (token, logprobs.unwrap())
        };
        let (token, scaled) = ask_one(true);
        let temperature = if temperature == 0.0 { 1.0 } else { f64::from(temperature) };
        let most = row.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = row.iter().map(|&l| ((f64::from(l) - f64::from(most)) / temperature).exp()).sum();
        let naive = |token: TokenId| (f64::from(row[token as usize]) - f64::from(most)) / temperature - sum.ln();
        for (token, logprob) in [(token, scaled.logprob), scaled.top[0]] {
            assert!(
                (f64::from(logprob) - naive(token)).abs() < 1e-5 * naive(token).abs().max(1.0),
                "{len} {temperature}"
            );
        }
        assert_eq!((token, scaled) == ask_one(false), temperature == 1.0);
    }
}

/// Runs items on so many threads at once, each taking the next one.
fn on_threads(threads: usize, items: usize, work: &(dyn Fn(usize) + Sync)) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let item = next.fetch_add(1, Ordering::SeqCst);
                    if item >= items {
                        break;
                    }
                    work(item);
                }
            });
        }
    });
}

#[test]
fn rows_are_each_as_alone_whatever_the_threads_and_instructions() {
    let vocab = 777;
    let rows: Vec<Vec<f32>> = (0..50).map(|seed| row(vocab, seed)).collect();
    let samplings: Vec<Sampling> = (0..50u64)
        .map(|seed| Sampling {
            seed,
            temperature: 0.1 * seed as f32,
            top_k: (seed % 5) as u32 * 10,
            top_p: if seed % 3 == 0 { 0.7 } else { 1.0 },
            presence_penalty: if seed % 7 == 0 { 0.5 } else { 0.0 },
            logit_bias: if seed % 4 == 0 { vec![(9, 2.0)] } else { Vec::new() },
            ..Sampling::default()
        })
        .collect();
    let counts: Vec<Option<Counts>> = samplings.iter().map(|sampling| Counts::for_request(sampling, &[1, 2])).collect();
    let questions: Vec<Question<'_>> = samplings
        .iter()
        .zip(&counts)
        .enumerate()
        .map(|(at, (sampling, counts))| match at % 6 {
            5 => Question::Score { token: at as u32, top: 3 },
            _ => Question::Next {
                sampling,
                index: 3,
                forbidden: &[4],
                counts: counts.as_ref(),
                logprobs: Some(2),
                scaled: false,
            },
        })
        .collect();
    let alone: Vec<Answer> =
        rows.iter().zip(&questions).map(|(row, question)| ask(row, vocab, &[*question]).remove(0)).collect();
    assert_eq!(alone.len(), 50);
    let logits = rows.concat();
    for scans in Scans::available() {
        let mut sampler = Sampler::with(scans);
        for threads in [1, 2, 3, 8] {
            let mut parallel = |items: usize, work: &(dyn Fn(usize) + Sync)| on_threads(threads, items, work);
            let together = ask_with(&mut sampler, &logits, vocab, &questions, &mut parallel);
            assert_eq!(together, alone, "{scans:?}, {threads} threads");
        }
    }
    // An answer can be taken once, and does not outlive its step.
    let mut sampler = Sampler::new();
    assert_eq!(ask_with(&mut sampler, &logits, vocab, &questions, &mut |n, work| on_threads(2, n, work)), alone);
    assert!(sampler.take(0).is_none());
    sampler.answer(&logits[..2 * vocab], vocab, &|_| None, &mut |n, work| on_threads(2, n, work));
    assert!(sampler.take(1).is_none());
}

#[test]
fn when_nothing_can_be_chosen_it_says_so() {
    let sampling = Sampling::default();
    let question = Question::Next {
        sampling: &sampling,
        index: 0,
        forbidden: &[0, 1],
        counts: None,
        logprobs: None,
        scaled: false,
    };
    assert!(ask(&[1.0, 2.0], 2, &[question])[0].is_err());
    assert!(ask(&[1.0, f32::NAN], 2, &[question])[0].is_err());
}
