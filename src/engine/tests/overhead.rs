//! What a step costs beside the model. Ignored: it measures. `cargo nextest run --lib --run-ignored only overhead --no-capture`

use tracing::Span;

use super::{counting::allocations, *};
use crate::{
    engine::handle::pair,
    kernel::{Floats, StepBatch},
    model::{Model, ModelError},
};

const WIDE: usize = 49_152;

/// Logits as wide as a real vocabulary's, made once.
struct Instant {
    row: Vec<f32>,
}

impl Model for Instant {
    fn vocab_size(&self) -> usize {
        self.row.len()
    }

    fn kv_blocks(&self) -> usize {
        4096
    }

    fn forward(&mut self, batch: &StepBatch, logits: &mut Floats) -> Result<(), ModelError> {
        logits.resize(batch.logits_rows.len() * self.row.len());
        for (row, token) in logits.chunks_exact_mut(self.row.len()).zip(&batch.tokens) {
            row.copy_from_slice(&self.row);
            row[*token as usize] += 0.1;
        }
        Ok(())
    }
}

/// Peaked as a language model's: a few likely tokens over a broad floor.
fn wide_row() -> Vec<f32> {
    let noise = |i: u32| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32;
    (0..WIDE as u32).map(|i| 3.0 * noise(i) - 2.0 * noise(i + 7).max(1e-3).ln() - 4.0 * noise(i + 13)).collect()
}

fn cases() -> [(&'static str, Sampling, Option<usize>); 7] {
    [
        ("greedy", Sampling { temperature: 0.0, ..Sampling::default() }, None),
        ("greedy, 5 log-probs", Sampling { temperature: 0.0, ..Sampling::default() }, Some(5)),
        ("temperature 1", Sampling::default(), None),
        ("top_k 40", Sampling { top_k: 40, ..Sampling::default() }, None),
        ("top_p 0.95", Sampling { top_p: 0.95, ..Sampling::default() }, None),
        ("all filters", Sampling { top_k: 40, top_p: 0.95, min_p: 0.05, ..Sampling::default() }, None),
        ("bias", Sampling { temperature: 0.0, logit_bias: vec![(1, 1.0)], ..Sampling::default() }, None),
    ]
}

#[test]
fn a_decode_step_allocates_nothing_but_what_it_sends() {
    decode_within(&Span::none());
}

#[test]
fn nor_does_one_whose_sequences_are_followed() {
    let log = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(std::io::sink).finish();
    tracing::subscriber::with_default(log, || decode_within(&tracing::error_span!("request")));
}

fn decode_within(span: &Span) {
    let wide = EngineConfig { max_batch: 32, prefill_chunk: 4096, idle_prefill_chunk: 4096, ..config() };
    let (handle, mut worker) = pair(Box::new(Instant { row: wide_row()[..2000].to_vec() }), wide).unwrap();
    let filters = Sampling { top_k: 40, top_p: 0.9, min_p: 0.01, ..Sampling::default() };
    let samplings = [cases()[0].1.clone(), Sampling { top_p: 0.9, ..Sampling::default() }, filters];
    let asked = (0..32u32).map(|i| Request {
        sampling: samplings[i as usize % 3].clone(),
        span: span.clone(),
        ..adapted(prompt(30, i), 100, (i % 5) as u8)
    });
    let mut events = handle.submit_many(asked.collect()).unwrap();
    // The prompts, and some steps until everything is as large as it gets.
    (0..8).for_each(|_| assert!(worker.turn()));
    let before = (allocations(), handle.stats().steps.get());
    (0..80).for_each(|_| assert!(worker.turn()));
    let (made, steps) = (allocations() - before.0, handle.stats().steps.get() - before.1);
    assert_eq!(steps, 80);
    // A channel takes a block of memory for every 31 events; and some buffer may meet its largest row late.
    assert!(made <= 32 * 80usize.div_ceil(31) + 8, "{made} allocations in 80 steps of 32 sequences");
    events.iter_mut().for_each(|events| assert_eq!(std::iter::from_fn(|| events.try_recv()).count(), 1 + 88));
}

#[test]
#[ignore = "measures"]
fn overhead_of_a_row() {
    let row = wide_row();
    let mut sampler = Sampler::new();
    for (name, sampling, logprobs) in cases() {
        let once = |index| {
            let started = std::time::Instant::now();
            let question =
                Question::Next { sampling: &sampling, index, forbidden: &[], counts: None, logprobs, scaled: false };
            ask_with(&mut sampler, &row, WIDE, &[question], &mut |_, work| work(0)).remove(0).unwrap();
            started.elapsed()
        };
        let best = (0..500).map(once).min().unwrap();
        println!("{name}: {best:?} a row of {WIDE}, the best of 500");
    }
}

#[test]
#[ignore = "measures"]
fn overhead_of_a_step_with_64_sequences() {
    let bookkeeping = ("vocabulary of 64: all but the sampler", cases()[0].1.clone(), None);
    for (name, sampling, logprobs) in cases().into_iter().chain([bookkeeping]) {
        let width = if name.starts_with("vocabulary") { 64 } else { WIDE };
        let wide = EngineConfig { max_batch: 64, prefill_chunk: 4096, max_model_len: 1024, ..config() };
        let handle = Engine::start(Box::new(Instant { row: wide_row()[..width].to_vec() }), wide).unwrap();
        let asked: Vec<Request> = (0..64u32)
            .map(|i| Request {
                sampling: Sampling { seed: u64::from(i), ..sampling.clone() },
                logprobs,
                ..adapted(prompt(30, i), 200, i as u8)
            })
            .collect();
        handle.submit_many(asked).unwrap().into_iter().for_each(|events| drop(collect(events)));
        let steps = handle.stats().overhead_seconds.snapshot();
        let mean = steps.sum / steps.count as f64;
        println!("{name}: {:.0} us a step of 64, {:.1} us a row", mean * 1e6, mean * 1e6 / 64.0);
    }
}
