//! The model room as a whole: golden cases, broken files, the real model.

mod fuzz;
mod gguf_tokenizer;
mod golden;
mod gradient;
mod invariants;
mod loading;
mod smollm2;
mod source;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::*;
use crate::kernel::{
    BASE_SLOT, BLOCK_TOKENS, Backend, Cores, Floats, Precision, SequenceRows, SiteFactors, StepBatch,
    candle::CandleBackend, cpu::CpuBackend, reference::ReferenceBackend,
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Some rows of one sequence in a step.
#[derive(Clone)]
struct Rows<'a> {
    tokens: &'a [u32],
    start: usize,
    blocks: Vec<u32>,
    cores: Option<Arc<Cores>>,
    /// Read the logits of every row rather than of the last.
    all_logits: bool,
}

impl<'a> Rows<'a> {
    fn new(tokens: &'a [u32], start: usize, blocks: impl IntoIterator<Item = u32>) -> Self {
        Self { tokens, start, blocks: blocks.into_iter().collect(), cores: None, all_logits: false }
    }

    fn under(mut self, cores: &Option<Arc<Cores>>) -> Self {
        self.cores.clone_from(cores);
        self
    }

    fn with_all_logits(mut self) -> Self {
        self.all_logits = true;
        self
    }
}

/// One ragged step; the logits of every read row, in order.
fn step(model: &mut dyn Model, sequences: &[Rows<'_>]) -> Vec<Vec<f32>> {
    let mut batch = StepBatch::default();
    for rows in sequences {
        let first_row = batch.rows();
        batch.tokens.extend(rows.tokens);
        batch.positions.extend((rows.start..rows.start + rows.tokens.len()).map(|position| position as u32));
        let slot = match &rows.cores {
            None => BASE_SLOT,
            Some(cores) => {
                batch.cores.push(cores.clone());
                batch.cores.len() as u32 - 1
            }
        };
        batch.slots.extend(rows.tokens.iter().map(|_| slot));
        let end = batch.rows() as u32;
        batch.logits_rows.extend(if rows.all_logits { first_row as u32..end } else { end - 1..end });
        let (start, blocks) = (rows.start, rows.blocks.clone());
        batch.sequences.push(SequenceRows { first_row, rows: rows.tokens.len(), start, blocks });
    }
    let mut logits = Floats::default();
    logits.set(&[f32::NAN; 3]); // whatever was there is replaced
    model.forward(&batch, &mut logits).unwrap();
    assert_eq!(logits.len(), batch.logits_rows.len() * model.vocab_size());
    logits.chunks(model.vocab_size()).map(<[f32]>::to_vec).collect()
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().fold(0, |best, (i, logit)| if *logit > logits[best] { i } else { best });
    best as u32
}

fn log_prob(logits: &[f32], token: u32) -> f64 {
    let largest = f64::from(logits[argmax(logits) as usize]);
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum();
    f64::from(logits[token as usize]) - largest - sum.ln()
}

/// Greedy continuation with the KV cache, stopping after a token of `stop`.
fn greedy(
    model: &mut dyn Model,
    prompt: &[u32],
    count: usize,
    stop: &[u32],
    blocks: std::ops::Range<u32>,
    cores: &Option<Arc<Cores>>,
) -> Vec<u32> {
    let mut logits = step(model, &[Rows::new(prompt, 0, blocks.clone()).under(cores)]);
    let mut tokens: Vec<u32> = Vec::new();
    while tokens.len() < count {
        let token = argmax(&logits[0]);
        tokens.push(token);
        if stop.contains(&token) {
            break;
        }
        let start = prompt.len() + tokens.len() - 1;
        logits = step(model, &[Rows::new(&[token], start, blocks.clone()).under(cores)]);
    }
    tokens
}

/// Every backend that the cases are held to, on this processor. `equal bits` leaves out candle, which does not promise them.
macro_rules! for_every_backend {
    (equal bits: $($name:ident => $body:expr;)*) => {
        $(
            mod $name {
                use super::*;

                #[test]
                fn reference() {
                    ($body)(|| ReferenceBackend);
                }

                #[test]
                fn cpu() {
                    ($body)(|| CpuBackend::new(2, None).unwrap());
                }
            }
        )*
    };
    ($($name:ident => $body:expr;)*) => {
        for_every_backend! { equal bits: $($name => $body;)* }
        mod candle {
            use super::*;
            $(
                #[test]
                fn $name() {
                    ($body)(|| CandleBackend::new(candle_core::Device::Cpu));
                }
            )*
        }
    };
}
use for_every_backend;
