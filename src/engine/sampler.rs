//! From a row of logits to a token: a pure function of the logits, the request's [`Sampling`], the tokens so far and the index of the token.
//!
//! Order: penalties, bias, forbidden stop tokens; then top_k, temperature, min_p, top_p (of what the others left), and one
//! draw. Log-probs are of the raw logits.

use std::collections::HashMap;

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use rayon::prelude::*;

use super::{
    api::{LogProbs, Sampling},
    logits::{self, LogitsError},
};
use crate::types::TokenId;

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
    },
}

/// The token in question, and its log-probs if asked for.
pub(super) type Answer = Result<(TokenId, Option<LogProbs>), LogitsError>;

/// Working memory of one thread.
#[derive(Debug, Default)]
struct Scratch {
    adjusted: Vec<f32>,
    weights: Vec<f32>,
    tiles: Vec<f32>,
    selection: Vec<f32>,
    candidates: Vec<(TokenId, f32)>,
    sums: Vec<f64>,
}

/// Answers the questions of a step.
#[derive(Debug)]
pub(super) struct Sampler {
    scratch: Vec<Scratch>,
}

impl Sampler {
    /// Uses as many threads as rayon has.
    pub(super) fn new() -> Self {
        Self { scratch: (0..rayon::current_num_threads().max(1)).map(|_| Scratch::default()).collect() }
    }

    /// One answer a question; question i is about row i of `logits` `[rows, vocab]`.
    pub(super) fn answer(&mut self, logits: &[f32], vocab: usize, questions: &[Question<'_>]) -> Vec<Answer> {
        let one = |scratch: &mut Scratch, (row, question): (&[f32], &Question<'_>)| answer(row, question, scratch);
        // Handing work to other threads costs tens of microseconds, about as much as a few greedy rows.
        let threads = self.scratch.len().min(questions.len() / 4);
        if threads < 2 {
            let scratch = &mut self.scratch[0];
            return logits.chunks_exact(vocab).zip(questions).map(|row| one(scratch, row)).collect();
        }
        let share = questions.len().div_ceil(threads);
        let parts: Vec<Vec<Answer>> = self
            .scratch
            .par_iter_mut()
            .zip(questions.par_chunks(share).zip(logits.par_chunks(share * vocab)))
            .map(|(scratch, (questions, logits))| {
                logits.chunks_exact(vocab).zip(questions).map(|row| one(scratch, row)).collect()
            })
            .collect();
        parts.into_iter().flatten().collect()
    }
}

fn answer(row: &[f32], question: &Question<'_>, scratch: &mut Scratch) -> Answer {
    match *question {
        Question::Score { token, top } => {
            let largest = logits::tile_maxima(row, &mut scratch.tiles)?;
            Ok((token, Some(log_probs(row, largest, token, top, scratch))))
        }
        Question::Next { sampling, index, forbidden, counts, logprobs } => {
            let largest = logits::tile_maxima(row, &mut scratch.tiles)?;
            let plain = forbidden.is_empty() && counts.is_none() && sampling.logit_bias.is_empty();
            let token = if plain {
                choose(row, largest, sampling, index, scratch)
            } else {
                let mut adjusted = std::mem::take(&mut scratch.adjusted);
                adjust(row, sampling, forbidden, counts, &mut adjusted);
                let largest = logits::tile_maxima(&adjusted, &mut scratch.tiles);
                let token = largest.map(|largest| choose(&adjusted, largest, sampling, index, scratch));
                scratch.adjusted = adjusted;
                token?
            };
            let Some(top) = logprobs else { return Ok((token, None)) };
            if !plain {
                // What is there are the adjusted row's.
                logits::tile_maxima(row, &mut scratch.tiles)?;
            }
            Ok((token, Some(log_probs(row, largest, token, top, scratch))))
        }
    }
}

/// Log-softmax of the raw row at `token`, and of its `top` likeliest tokens. `scratch.tiles` are the row's.
fn log_probs(row: &[f32], largest: f32, token: TokenId, top: usize, scratch: &mut Scratch) -> LogProbs {
    let normaliser = logits::log_sum_exp(row, largest);
    let log_prob = |value: f32| (f64::from(value) - normaliser) as f32;
    let top = logits::largest(row, &scratch.tiles, top, &mut scratch.selection);
    LogProbs {
        logprob: log_prob(row[token as usize]),
        top: top.into_iter().map(|(token, value)| (token, log_prob(value))).collect(),
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
fn choose(row: &[f32], largest: f32, sampling: &Sampling, index: usize, scratch: &mut Scratch) -> TokenId {
    if sampling.temperature < COLDEST {
        return logits::first_of(row, &scratch.tiles, largest);
    }
    let Scratch { weights, tiles, selection, candidates, sums, .. } = scratch;
    let keep = sampling.top_k as usize;
    // With top_k only the kept tokens are looked at from here on, in the order of their ids.
    let kept: Option<(Vec<TokenId>, Vec<f32>)> = (keep > 0 && keep < row.len()).then(|| {
        let mut kept = logits::largest(row, tiles, keep, selection);
        kept.sort_unstable_by_key(|&(token, _)| token);
        kept.into_iter().unzip()
    });
    let row = kept.as_ref().map_or(row, |(_, logits)| logits);
    logits::weights(row, largest, 1.0 / sampling.temperature, sampling.min_p, weights);
    if sampling.top_p < 1.0 {
        let last = logits::nucleus(weights, f64::from(sampling.top_p), selection, candidates);
        logits::cut_after(weights, last);
    }
    let drawn = logits::draw(weights, uniform(sampling.seed, index), sums);
    kept.as_ref().map_or(drawn, |(tokens, _)| tokens[drawn as usize])
}

/// A number in [0, 1) for the index-th token under a seed: the first 53 bits of ChaCha8 with the seed as key and the index as stream.
fn uniform(seed: u64, index: usize) -> f64 {
    let mut key = [0u8; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(index as u64);
    (rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}
