//! Policies small enough that everything about them is known.

use crate::policy::{Policy, PolicyError, Rollout, RolloutRequest, Sequence, Stop};
use crate::rng::{Purpose, Stream};

/// A log-linear policy: the logit of token k at position t after a prompt is `base + sum_j numbers_j * feature_j`, base and features fixed random numbers. Token 0 ends a completion, token k is the letter `a` + k - 1.
pub(crate) struct Toy {
    pub(crate) vocabulary: usize,
    pub(crate) numbers: usize,
    /// How far the sampler's logits are from the trainer's.
    pub(crate) mismatch: f64,
    /// Fails at its n-th call.
    pub(crate) fail_at: Option<usize>,
    /// Asks to stop at its n-th call.
    pub(crate) stop_at: Option<(usize, Stop)>,
    pub(crate) calls: usize,
    pub(crate) kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Kind {
    /// Random features of (prompt, position, token).
    Random,
    /// One token, whose logits are the numbers: the optimum is all weight on the best.
    Bandit,
}

impl Toy {
    pub(crate) fn random(numbers: usize) -> Self {
        Self { vocabulary: 5, numbers, mismatch: 0.0, fail_at: None, stop_at: None, calls: 0, kind: Kind::Random }
    }

    /// Arms `a`, `b`, ...: one number each.
    pub(crate) fn bandit(arms: usize) -> Self {
        Self { vocabulary: arms + 1, kind: Kind::Bandit, ..Self::random(arms) }
    }

    fn called(&mut self) -> Result<(), PolicyError> {
        self.calls += 1;
        if self.fail_at == Some(self.calls) {
            return Err(PolicyError::Failed("out of memory".to_owned()));
        }
        if let Some((_, stop)) = self.stop_at.as_ref().filter(|(call, _)| *call == self.calls) {
            stop.stop();
            return Err(PolicyError::Stopped);
        }
        Ok(())
    }

    /// Features of each token at a position, `[vocabulary][numbers]`, and the base's logits, `[vocabulary]`.
    fn features(&self, prompt: &[u32], position: usize) -> (Vec<Vec<f64>>, Vec<f64>) {
        if self.kind == Kind::Bandit {
            let one_hot = |token: usize| (0..self.numbers).map(|j| f64::from(u8::from(j + 1 == token))).collect();
            let base = (0..self.vocabulary).map(|token| if token == 0 { -1e4 } else { 0.0 }).collect();
            return ((0..self.vocabulary).map(one_hot).collect(), base);
        }
        let key = prompt.iter().fold(17u64, |key, &token| key.wrapping_mul(31).wrapping_add(u64::from(token)));
        let mut stream = Stream::new(key, Purpose::Task, position as u64);
        let base = (0..self.vocabulary).map(|_| stream.normal()).collect();
        let features = (0..self.vocabulary).map(|_| (0..self.numbers).map(|_| stream.normal()).collect()).collect();
        (features, base)
    }

    /// Log-probs of all tokens, `[vocabulary]`.
    fn distribution(
        &self,
        numbers: &[f32],
        prompt: &[u32],
        position: usize,
        temperature: f64,
        mismatch: f64,
    ) -> Vec<f64> {
        let (features, base) = self.features(prompt, position);
        let logits: Vec<f64> = features
            .iter()
            .zip(base)
            .enumerate()
            .map(|(token, (features, base))| {
                let sum: f64 = features.iter().zip(numbers).map(|(feature, &number)| feature * f64::from(number)).sum();
                (base + sum + mismatch * (token as f64 * 1.7).sin()) / temperature
            })
            .collect();
        let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let norm = most + logits.iter().map(|logit| (logit - most).exp()).sum::<f64>().ln();
        logits.into_iter().map(|logit| logit - norm).collect()
    }

    /// Probability of each arm of a bandit.
    pub(crate) fn arms(&self, numbers: &[f32]) -> Vec<f64> {
        self.distribution(numbers, &[1], 0, 1.0, 0.0)[1..].iter().map(|logprob| logprob.exp()).collect()
    }

    fn sample(&self, request: &RolloutRequest<'_>, seed: u64) -> Rollout {
        let (mut tokens, mut logprobs, mut finished) = (Vec::new(), Vec::new(), false);
        let mut stream = Stream::new(seed, Purpose::Task, 99);
        let longest = if self.kind == Kind::Bandit { 1 } else { request.max_tokens };
        while tokens.len() < longest && !finished {
            let greedy = request.temperature == 0.0;
            let temperature = if greedy { 1.0 } else { f64::from(request.temperature) };
            let all = self.distribution(request.numbers, request.prompt, tokens.len(), temperature, self.mismatch);
            let token = if greedy {
                (0..all.len()).max_by(|&a, &b| all[a].total_cmp(&all[b])).unwrap()
            } else {
                let mut left = stream.uniform();
                all.iter()
                    .position(|logprob| {
                        left -= logprob.exp();
                        left < 0.0
                    })
                    .unwrap_or(all.len() - 1)
            };
            tokens.push(token as u32);
            logprobs.push(all[token] as f32);
            finished = token == 0;
        }
        let finished = finished || self.kind == Kind::Bandit;
        let text = tokens.iter().filter(|&&token| token > 0).map(|&token| char::from(b'a' + token as u8 - 1)).collect();
        Rollout { tokens, logprobs, text, finished }
    }
}

impl Policy for Toy {
    fn numbers(&self) -> usize {
        self.numbers
    }

    fn rollout(&mut self, requests: &[RolloutRequest<'_>]) -> Result<Vec<Vec<Rollout>>, PolicyError> {
        self.called()?;
        Ok(requests
            .iter()
            .map(|request| request.seeds.iter().map(|&seed| self.sample(request, seed)).collect())
            .collect())
    }

    fn logprobs(
        &mut self,
        numbers: &[f32],
        sequences: &[Sequence<'_>],
        temperature: f32,
    ) -> Result<Vec<Vec<f32>>, PolicyError> {
        self.called()?;
        let score = |sequence: &Sequence<'_>| {
            let token = |(position, &token): (usize, &u32)| {
                self.distribution(numbers, sequence.prompt, position, f64::from(temperature), 0.0)[token as usize]
                    as f32
            };
            sequence.completion.iter().enumerate().map(token).collect()
        };
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
        let mut gradient = vec![0.0f64; self.numbers];
        for (sequence, weights) in sequences.iter().zip(weights) {
            for (position, (&token, &weight)) in sequence.completion.iter().zip(weights).enumerate() {
                let (features, _) = self.features(sequence.prompt, position);
                let all = self.distribution(numbers, sequence.prompt, position, f64::from(temperature), 0.0);
                for (j, slope) in gradient.iter_mut().enumerate() {
                    let mean: f64 =
                        all.iter().zip(&features).map(|(logprob, features)| logprob.exp() * features[j]).sum();
                    *slope += f64::from(weight) * (features[token as usize][j] - mean) / f64::from(temperature);
                }
            }
        }
        Ok(gradient.into_iter().map(|slope| slope as f32).collect())
    }
}
