//! From a row of logits to a token: a pure function of the logits, the request's [`Sampling`], the tokens so far and the index of the token.
//!
//! Order: penalties, bias, forbidden stop tokens; then top_k, temperature, min_p, top_p (of what the others left), and one
//! draw. Log-probs are of the raw logits, or of those over the temperature.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, Ordering},
};

use parking_lot::Mutex;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

use super::{
    api::{LogProbs, Sampling},
    logits::{self, LogitsError, Weights},
};
use crate::{kernel::host::Scans, types::TokenId};

/// Below this a temperature divides by nothing sensible: greedy.
const COLDEST: f32 = 1e-5;

/// How often each token stands in the completion; prompt tokens that do not are there with 0. Kept only for requests with penalties.
#[derive(Debug, Default, Clone)]
pub(super) struct Counts(HashMap<TokenId, u32>);

impl Counts {
    /// Counts if these parameters need it.
    pub(super) fn for_request(sampling: &Sampling, prompt: &[TokenId]) -> Option<Self> {
        let repetition = sampling.repetition_penalty != 1.0;
        let other = sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0;
        let prompt = if repetition { prompt } else { &[] };
        (repetition || other).then(|| Self(prompt.iter().map(|&token| (token, 0)).collect()))
    }

    /// The completion holds one more.
    pub(super) fn add(&mut self, token: TokenId) {
        *self.0.entry(token).or_default() += 1;
    }
}

/// What a row is asked.
#[derive(Debug, Clone, Copy)]
pub(super) enum Question<'a> {
    /// How likely was this token?
    Score {
        /// The token that follows.
        token: TokenId,
        /// How many alternatives to report.
        top: usize,
    },
    /// Which token comes next?
    Next {
        /// How to choose.
        sampling: &'a Sampling,
        /// Completion tokens before this one.
        index: usize,
        /// Tokens that may not be chosen.
        forbidden: &'a [TokenId],
        /// What the penalties need.
        counts: Option<&'a Counts>,
        /// Alternatives to report, if log-probs are wanted.
        logprobs: Option<usize>,
        /// Are log-probs those of logits / temperature?
        scaled: bool,
    },
}

/// The token in question, and its log-probs if asked for.
pub(super) type Answer = Result<(TokenId, Option<LogProbs>), LogitsError>;

/// Working memory of one row at a time.
#[derive(Debug, Default)]
struct Scratch {
    adjusted: Vec<f32>,
    tiles: Vec<f32>,
    selection: Vec<f32>,
    top: Vec<(TokenId, f32)>,
    kept: Vec<f32>,
    weights: Weights,
}

/// Runs `work(0)`, ..., `work(items - 1)` in any order, on any threads.
pub(super) type Parallel<'a> = &'a mut dyn FnMut(usize, &(dyn Fn(usize) + Sync));

/// Answers the questions of a step.
#[derive(Debug)]
pub(super) struct Sampler {
    scans: Scans,
    /// A thread takes the first free one, mostly that which it had before.
    scratch: Vec<Mutex<Scratch>>,
    /// One a row. Only the thread that has the row locks it.
    answers: Vec<Mutex<Option<Answer>>>,
}

impl Sampler {
    /// With the widest instructions that this processor has.
    pub(super) fn new() -> Self {
        Self::with(Scans::best())
    }

    /// With these scans; they all give the same answers.
    pub(super) fn with(scans: Scans) -> Self {
        Self { scans, scratch: vec![Mutex::default()], answers: Vec::new() }
    }

    /// Answers a question a row; question i is about row i of `logits` `[rows, vocab]`. Rows are independent: the answers do not depend on who makes them.
    pub(super) fn answer<'a>(
        &mut self,
        logits: &[f32],
        vocab: usize,
        question: &(dyn Fn(usize) -> Option<Question<'a>> + Sync),
        parallel: Parallel<'_>,
    ) {
        let rows = logits.len().checked_div(vocab).unwrap_or(0);
        if self.answers.len() < rows {
            self.answers.resize_with(rows, Mutex::default);
        }
        self.answers.iter_mut().for_each(|answer| *answer.get_mut() = None);
        let Self { scans, scratch, answers } = self;
        let (scans, scratch, answers) = (*scans, &scratch[..], &answers[..]);
        let lacking = AtomicBool::new(false);
        parallel(rows, &|row| {
            let Some(question) = question(row) else { return };
            let logits = &logits[row * vocab..(row + 1) * vocab];
            let answer = match scratch.iter().find_map(Mutex::try_lock) {
                Some(mut scratch) => answer(scans, logits, &question, &mut scratch),
                None => {
                    lacking.store(true, Ordering::Relaxed);
                    answer(scans, logits, &question, &mut Scratch::default())
                }
            };
            *answers[row].lock() = Some(answer);
        });
        // More steps like this one, and there is one for each thread.
        if lacking.into_inner() {
            self.scratch.push(Mutex::default());
        }
    }

    /// The answer about a row, once. None if nothing was asked.
    pub(super) fn take(&mut self, row: usize) -> Option<Answer> {
        self.answers.get_mut(row)?.get_mut().take()
    }
}

fn answer(scans: Scans, row: &[f32], question: &Question<'_>, scratch: &mut Scratch) -> Answer {
    match *question {
        Question::Score { token, top } => {
            let largest = logits::tile_maxima(scans, row, &mut scratch.tiles)?;
            Ok((token, Some(log_probs(scans, row, largest, token, top, 1.0, scratch))))
        }
        Question::Next { sampling, index, forbidden, counts, logprobs, scaled } => {
            let largest = logits::tile_maxima(scans, row, &mut scratch.tiles)?;
            let plain = forbidden.is_empty() && counts.is_none() && sampling.logit_bias.is_empty();
            let token = if plain {
                choose(scans, row, largest, sampling, index, scratch)
            } else {
                let mut adjusted = std::mem::take(&mut scratch.adjusted);
                adjust(row, sampling, forbidden, counts, &mut adjusted);
                let largest = logits::tile_maxima(scans, &adjusted, &mut scratch.tiles);
                let token = largest.map(|largest| choose(scans, &adjusted, largest, sampling, index, scratch));
                scratch.adjusted = adjusted;
                token?
            };
            let Some(top) = logprobs else { return Ok((token, None)) };
            if !plain {
                // What is there are the adjusted row's.
                logits::tile_maxima(scans, row, &mut scratch.tiles)?;
            }
            let is_greedy = sampling.temperature < COLDEST;
            let scale = if scaled && !is_greedy { 1.0 / sampling.temperature } else { 1.0 };
            Ok((token, Some(log_probs(scans, row, largest, token, top, scale, scratch))))
        }
    }
}

/// Log-softmax of the raw row times `scale` at `token`, and of its `top` likeliest tokens. `scratch.tiles` are the row's.
fn log_probs(
    scans: Scans,
    row: &[f32],
    largest: f32,
    token: TokenId,
    top: usize,
    scale: f32,
    scratch: &mut Scratch,
) -> LogProbs {
    let Scratch { tiles, selection, top: found, weights, .. } = scratch;
    let normaliser = if scale == 1.0 {
        logits::log_sum_exp(scans, row, largest)
    } else {
        weights.set(scans, row, largest, scale, 0.0);
        f64::from(largest) * f64::from(scale) + weights.sum().ln()
    };
    let log_prob = |value: f32| (f64::from(value) * f64::from(scale) - normaliser) as f32;
    logits::largest(row, tiles, top, selection, found);
    LogProbs {
        logprob: log_prob(row[token as usize]),
        top: found.iter().map(|&(token, value)| (token, log_prob(value))).collect(),
    }
}

/// The logits that are sampled from: penalties, then bias, then what is forbidden.
fn adjust(row: &[f32], sampling: &Sampling, forbidden: &[TokenId], counts: Option<&Counts>, adjusted: &mut Vec<f32>) {
    adjusted.clear();
    adjusted.extend_from_slice(row);
    // Each token is touched by itself, so the map's order does not matter.
    for (&token, &count) in counts.into_iter().flat_map(|counts| &counts.0) {
        let Some(logit) = adjusted.get_mut(token as usize) else { continue };
        let factor = sampling.repetition_penalty;
        *logit = if *logit > 0.0 { *logit / factor } else { *logit * factor };
        if count > 0 {
            *logit -= sampling.presence_penalty + sampling.frequency_penalty * count as f32;
        }
    }
    for &(token, bias) in &sampling.logit_bias {
        if let Some(logit) = adjusted.get_mut(token as usize) {
            *logit += bias;
        }
    }
    for &token in forbidden {
        if let Some(logit) = adjusted.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Chooses from adjusted logits, whose maxima are in `scratch.tiles`.
fn choose(
    scans: Scans,
    row: &[f32],
    largest: f32,
    sampling: &Sampling,
    index: usize,
    scratch: &mut Scratch,
) -> TokenId {
    if sampling.temperature < COLDEST {
        return logits::first_of(row, &scratch.tiles, largest);
    }
    let Scratch { tiles, selection, top, kept, weights, .. } = scratch;
    let keep = sampling.top_k as usize;
    // With top_k only the kept tokens are looked at from here on, in the order of their ids.
    let few = keep > 0 && keep < row.len();
    if few {
        logits::largest(row, tiles, keep, selection, top);
        top.sort_unstable_by_key(|&(token, _)| token);
        kept.clear();
        kept.extend(top.iter().map(|&(_, logit)| logit));
    }
    let row = if few { &kept[..] } else { row };
    weights.set(scans, row, largest, 1.0 / sampling.temperature, sampling.min_p);
    if sampling.top_p < 1.0 {
        weights.keep(scans, f64::from(sampling.top_p));
    }
    let drawn = weights.draw(uniform(sampling.seed, index));
    if few { top[drawn as usize].0 } else { drawn }
}

/// A number in [0, 1) for the index-th token under a seed: the first 53 bits of ChaCha8 with the seed as key and the index as stream.
fn uniform(seed: u64, index: usize) -> f64 {
    let mut key = [0u8; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(index as u64);
    (rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}
