//! A policy so small that a job takes milliseconds: one token, whose logits are the adapter's numbers. Letter k is number k's, so a reward for a letter has a known optimum.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use mote::service::training::{Method, PolicyRequest, PolicySource};
use mote_trainer::{Policy, PolicyError, Rollout, RolloutRequest, Sequence, Stop};

/// What a test may do to every policy of a server.
#[derive(Default)]
pub(crate) struct Toy {
    /// Calls so far, of all policies.
    pub(crate) calls: AtomicUsize,
    /// How long a call takes, in milliseconds.
    pub(crate) delay: AtomicUsize,
    /// From this call on (0: never) all fail.
    pub(crate) fails_from: AtomicUsize,
    /// The call that panics (0: none).
    pub(crate) panics_at: AtomicUsize,
}

impl Toy {
    pub(crate) fn slow(milliseconds: usize) -> Arc<Self> {
        Arc::new(Self { delay: AtomicUsize::new(milliseconds), ..Self::default() })
    }
}

/// Where jobs get their toys.
pub(crate) struct Toys(pub(crate) Arc<Toy>);

impl PolicySource for Toys {
    fn supports(&self, _method: Method) -> Result<(), String> {
        Ok(())
    }

    fn policy(&self, request: &PolicyRequest<'_>) -> Result<Box<dyn Policy>, PolicyError> {
        Ok(Box::new(ToyPolicy { toy: self.0.clone(), numbers: request.numbers, stop: request.stop.clone() }))
    }
}

struct ToyPolicy {
    toy: Arc<Toy>,
    numbers: usize,
    stop: Stop,
}

impl ToyPolicy {
    fn called(&self) -> Result<(), PolicyError> {
        let call = self.toy.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let is = |limit: &AtomicUsize| limit.load(Ordering::SeqCst);
        for _ in 0..is(&self.toy.delay) {
            if self.stop.is_stopped() {
                return Err(PolicyError::Stopped);
            }
            thread::sleep(Duration::from_millis(1));
        }
        assert!(is(&self.toy.panics_at) != call, "the toy broke");
        match is(&self.toy.fails_from) {
            from if from > 0 && call >= from => Err(PolicyError::Failed("the toy is out of order".to_owned())),
            _ => Ok(()),
        }
    }

    fn logprobs(numbers: &[f32], temperature: f32) -> Vec<f64> {
        let scaled: Vec<f64> = numbers.iter().map(|&number| f64::from(number) / f64::from(temperature)).collect();
        let most = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let norm = most + scaled.iter().map(|logit| (logit - most).exp()).sum::<f64>().ln();
        scaled.into_iter().map(|logit| logit - norm).collect()
    }

    fn sample(request: &RolloutRequest<'_>, seed: u64) -> Rollout {
        let greedy = request.temperature == 0.0;
        let all = Self::logprobs(request.numbers, if greedy { 1.0 } else { request.temperature });
        let letter = if greedy {
            // The first of the largest.
            (0..all.len()).rev().max_by(|&a, &b| all[a].total_cmp(&all[b])).unwrap()
        } else {
            let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let mut left = ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64;
            let found = all.iter().position(|logprob| {
                left -= logprob.exp();
                left < 0.0
            });
            found.unwrap_or(all.len() - 1)
        };
        let text = char::from(b'a' + letter as u8).to_string();
        Rollout { tokens: vec![letter as u32], logprobs: vec![all[letter] as f32], text, finished: true }
    }

    fn class(&self, token: u32) -> usize {
        token as usize % self.numbers
    }
}

impl Policy for ToyPolicy {
    fn numbers(&self) -> usize {
        self.numbers
    }

    fn rollout(&mut self, requests: &[RolloutRequest<'_>]) -> Result<Vec<Vec<Rollout>>, PolicyError> {
        self.called()?;
        let group =
            |request: &RolloutRequest<'_>| request.seeds.iter().map(|&seed| Self::sample(request, seed)).collect();
        Ok(requests.iter().map(group).collect())
    }

    fn logprobs(
        &mut self,
        numbers: &[f32],
        sequences: &[Sequence<'_>],
        temperature: f32,
    ) -> Result<Vec<Vec<f32>>, PolicyError> {
        self.called()?;
        let all = Self::logprobs(numbers, temperature);
        let score =
            |sequence: &Sequence<'_>| sequence.completion.iter().map(|&token| all[self.class(token)] as f32).collect();
        Ok(sequences.iter().map(score).collect())
    }

    fn gradient(
        &mut self,
        numbers: &[f32],
        sequences: &[Sequence<'_>],
        weights: &[Vec<f32>],
        temperature: f32,
    ) -> Result<Vec<f32>, PolicyError> {
        self.called()?;
        let all = Self::logprobs(numbers, temperature);
        let mut gradient = vec![0.0f64; numbers.len()];
        for (sequence, weights) in sequences.iter().zip(weights) {
            for (&token, &weight) in sequence.completion.iter().zip(weights) {
                let class = self.class(token);
                for (j, slope) in gradient.iter_mut().enumerate() {
                    let hit = f64::from(u8::from(j == class));
                    *slope += f64::from(weight) * (hit - all[j].exp()) / f64::from(temperature);
                }
            }
        }
        Ok(gradient.into_iter().map(|slope| slope as f32).collect())
    }
}
