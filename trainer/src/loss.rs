//! The losses, as what a policy needs of them: `d loss / d log p` of each token.
//!
//! GRPO's token loss (arXiv 2402.03300, clip of arXiv 1707.06347 with DAPO's separate upper bound, arXiv 2503.14476):
//! `-min(rho A, clip(rho, 1 - low, 1 + high) A) * w + beta * k3`, with `rho = exp(lp - old)`, `k3 = exp(ref - lp) - (ref - lp) - 1` (an unbiased and positive estimate of KL(policy || base), Schulman's
//! "Approximating KL divergence") and `w = min(exp(old - sampler), cap)`, the truncated importance weight between the sampler and the pass that differentiates (arXiv 1802.01561 for the truncation; as in TRL and
//! verl, a constant: no gradient flows through it). `old` is the differentiating pass at the numbers that rolled out.

use serde::{Deserialize, Serialize};

use crate::policy::TokenLoss;

/// How token losses become one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossKind {
    /// The mean over sequences of each one's mean over its tokens.
    Grpo,
    /// The sum over all tokens, divided by sequences times the longest completion allowed (arXiv 2503.20783: no bias towards short right and long wrong answers).
    DrGrpo,
    /// The mean over all tokens of the update (arXiv 2503.14476).
    Dapo,
}

impl LossKind {
    /// What each token's loss is multiplied by, a factor a sequence. `tokens`: completion tokens a sequence that count, 0 for one that is masked out. Masked sequences still count as sequences.
    pub fn factors(self, tokens: &[usize], max_tokens: usize) -> Vec<f64> {
        let sequences = tokens.len().max(1) as f64;
        let all = tokens.iter().sum::<usize>().max(1) as f64;
        let factor = |&tokens: &usize| match self {
            _ if tokens == 0 => 0.0,
            Self::Grpo => 1.0 / (sequences * tokens as f64),
            Self::DrGrpo => 1.0 / (sequences * max_tokens.max(1) as f64),
            Self::Dapo => 1.0 / all,
        };
        tokens.iter().map(factor).collect()
    }
}

/// The constants of GRPO's token loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ClipSettings {
    /// Ratios below `1 - low` give no gradient to a negative advantage.
    pub low: f64,
    /// Ratios above `1 + high` give no gradient to a positive advantage.
    pub high: f64,
    /// Weight of the KL to the base.
    pub beta: f64,
    /// The importance weight's cap; 0 turns the correction off (all weights 1).
    pub importance_cap: f64,
}

impl ClipSettings {
    /// The truncated importance weight of a token whose log-prob is `difference` higher for the trainer than for the sampler.
    pub fn importance(&self, difference: f64) -> f64 {
        if self.importance_cap > 0.0 { difference.exp().min(self.importance_cap) } else { 1.0 }
    }
}

/// What GRPO's loss needs to know of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct GrpoSequence {
    /// The completion's advantage.
    pub advantage: f64,
    /// The aggregation's factor (see [`LossKind::factors`]).
    pub factor: f64,
    /// The sampler's log-probs, `[tokens]`.
    pub sampler: Vec<f32>,
    /// Log-probs of the differentiating pass at the numbers that rolled out; None when those are the numbers being differentiated (the first update of a batch).
    pub old: Option<Vec<f32>>,
    /// The base's log-probs; None without a KL term.
    pub reference: Option<Vec<f32>>,
}

/// One sequence's share of the loss.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GrpoTerms {
    /// The sequence's share of the loss.
    pub loss: f64,
    /// `d loss / d log p`, `[tokens]`.
    pub weights: Vec<f32>,
    /// Importance weights, `[tokens]`.
    pub importance: Vec<f64>,
    /// Tokens whose gradient the clip took.
    pub clipped: usize,
}

/// GRPO's loss over a batch of sequences.
#[derive(Debug, Clone, PartialEq)]
pub struct GrpoLoss {
    /// Constants.
    pub settings: ClipSettings,
    /// In the order of the batch.
    pub sequences: Vec<GrpoSequence>,
}

impl GrpoLoss {
    /// Loss and derivative of one sequence at these log-probs.
    pub fn terms(&self, sequence: usize, logprobs: &[f32]) -> GrpoTerms {
        let it = &self.sequences[sequence];
        let mut terms = GrpoTerms::default();
        for (token, &logprob) in logprobs.iter().enumerate() {
            let logprob = f64::from(logprob);
            let old = it.old.as_ref().map_or(logprob, |old| f64::from(old[token]));
            let importance = self.settings.importance(old - f64::from(it.sampler[token]));
            let (mut loss, mut slope) = (0.0, 0.0);
            if it.advantage != 0.0 {
                let ratio = (logprob - old).exp();
                let clipped = ratio.clamp(1.0 - self.settings.low, 1.0 + self.settings.high);
                let (free, bound) = (ratio * it.advantage, clipped * it.advantage);
                loss -= free.min(bound) * importance;
                if bound < free {
                    terms.clipped += 1;
                } else {
                    slope -= free * importance;
                }
            }
            if let Some(reference) = it.reference.as_ref().filter(|_| self.settings.beta > 0.0) {
                let difference = f64::from(reference[token]) - logprob;
                loss += self.settings.beta * k3(difference);
                slope += self.settings.beta * (1.0 - difference.exp());
            }
            terms.loss += loss * it.factor;
            terms.weights.push((slope * it.factor) as f32);
            terms.importance.push(importance);
        }
        terms
    }
}

impl TokenLoss for GrpoLoss {
    fn weights(&self, sequence: usize, logprobs: &[f32]) -> Vec<f32> {
        self.terms(sequence, logprobs).weights
    }
}

/// `exp(d) - d - 1` with `d` = reference minus policy log-prob.
pub fn k3(difference: f64) -> f64 {
    difference.exp_m1() - difference
}

/// Cross-entropy on demonstrations: minus the mean log-prob over all tokens of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CrossEntropy {
    /// Tokens of the batch, above zero.
    pub tokens: usize,
}

impl CrossEntropy {
    /// The loss at these log-probs, nats a token.
    pub fn loss(&self, logprobs: &[Vec<f32>]) -> f64 {
        -logprobs.iter().flatten().map(|&logprob| f64::from(logprob)).sum::<f64>() / self.tokens as f64
    }
}

impl TokenLoss for CrossEntropy {
    fn weights(&self, _sequence: usize, logprobs: &[f32]) -> Vec<f32> {
        vec![(-1.0 / self.tokens as f64) as f32; logprobs.len()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> ClipSettings {
        ClipSettings { low: 0.2, high: 0.28, beta: 0.0, importance_cap: 2.0 }
    }

    fn one(advantage: f64, old: f32, sampler: f32, reference: Option<f32>, settings: ClipSettings) -> GrpoLoss {
        let reference = reference.map(|it| vec![it]);
        let sequence = GrpoSequence { advantage, factor: 1.0, sampler: vec![sampler], old: Some(vec![old]), reference };
        GrpoLoss { settings, sequences: vec![sequence] }
    }

    #[test]
    fn the_clip_takes_the_gradient_where_the_paper_says() {
        // (advantage, ratio, clipped?): only moves further along a gain already banked are cut.
        for (advantage, ratio, cut) in [
            (1.0, 1.0, false),
            (1.0, 1.27, false),
            (1.0, 1.29, true),
            (1.0, 0.5, false),
            (-1.0, 0.81, false),
            (-1.0, 0.79, true),
            (-1.0, 3.0, false),
        ] {
            let old = -1.5f32;
            let now = old + (ratio as f32).ln();
            let terms = one(advantage, old, old, None, settings()).terms(0, &[now]);
            assert_eq!(terms.clipped == 1, cut, "advantage {advantage} ratio {ratio}");
            let (loss, slope) = match (cut, advantage > 0.0) {
                (false, _) => (-advantage * ratio, -advantage * ratio),
                (true, true) => (-1.28 * advantage, 0.0),
                (true, false) => (-0.8 * advantage, 0.0),
            };
            assert!(
                (terms.loss - loss).abs() < 1e-5 && (f64::from(terms.weights[0]) - slope).abs() < 1e-5,
                "{terms:?}"
            );
        }
    }

    #[test]
    fn the_importance_weight_is_capped_and_can_be_off() {
        for (difference, cap, want) in
            [(0.0, 2.0, 1.0), (0.5, 2.0, 0.5f64.exp()), (3.0, 2.0, 2.0), (500.0, 3.0, 3.0), (3.0, 0.0, 1.0)]
        {
            let settings = ClipSettings { importance_cap: cap, ..settings() };
            let terms = one(1.0, -1.0, -1.0 - difference as f32, None, settings).terms(0, &[-1.0]);
            assert!((terms.importance[0] - want).abs() < 1e-6 && (terms.loss + want).abs() < 1e-6);
            assert!((f64::from(terms.weights[0]) + want).abs() < 1e-6);
        }
    }

    #[test]
    fn k3_is_zero_at_home_positive_elsewhere_and_unbiased() {
        assert_eq!(k3(0.0), 0.0);
        assert!([-3.0, -0.1, 1e-9, 0.1, 3.0].iter().all(|&d| k3(d) >= 0.0));
        // E_p[k3] = KL(p || q), exactly, for p = (.7, .3), q = (.4, .6)
        let (p, q) = ([0.7f64, 0.3], [0.4f64, 0.6]);
        let mean: f64 = (0..2).map(|i| p[i] * k3((q[i] / p[i]).ln())).sum();
        let kl: f64 = (0..2).map(|i| p[i] * (p[i] / q[i]).ln()).sum();
        assert!((mean - kl).abs() < 1e-12);
    }

    #[test]
    fn without_old_log_probs_the_ratio_is_one() {
        let mut loss = one(0.7, -2.0, -2.1, None, settings());
        let explicit = loss.terms(0, &[-2.0]);
        loss.sequences[0].old = None;
        assert_eq!(loss.terms(0, &[-2.0]), explicit);
    }

    #[test]
    fn aggregation_follows_each_variant() {
        let tokens = [2, 6, 0];
        assert_eq!(LossKind::Grpo.factors(&tokens, 10), [1.0 / 6.0, 1.0 / 18.0, 0.0]);
        assert_eq!(LossKind::DrGrpo.factors(&tokens, 10), [1.0 / 30.0, 1.0 / 30.0, 0.0]);
        assert_eq!(LossKind::Dapo.factors(&tokens, 10), [1.0 / 8.0, 1.0 / 8.0, 0.0]);
        assert!(LossKind::Dapo.factors(&[], 10).is_empty());
    }

    /// Central differences in the log-probs, for every combination of terms.
    #[test]
    fn weights_are_the_derivative_of_the_loss() {
        let logprobs = [-0.3f32, -1.2, -2.5, -0.05];
        for beta in [0.0, 0.04, 1.0] {
            for cap in [0.0, 2.0] {
                for advantage in [1.3, -0.8, 0.0] {
                    let sequence = GrpoSequence {
                        advantage,
                        factor: 0.37,
                        sampler: vec![-0.31, -1.0, -2.6, -0.9],
                        old: Some(vec![-0.25, -1.3, -1.5, -0.5]),
                        reference: Some(vec![-0.5, -1.1, -2.0, -0.2]),
                    };
                    let settings = ClipSettings { beta, importance_cap: cap, ..settings() };
                    let loss = GrpoLoss { settings, sequences: vec![sequence] };
                    let terms = loss.terms(0, &logprobs);
                    for token in 0..logprobs.len() {
                        let at = |delta: f32| {
                            let mut moved = logprobs;
                            moved[token] += delta;
                            (loss.terms(0, &moved).loss, f64::from(moved[token]))
                        };
                        let ((high, x1), (low, x0)) = (at(1e-3), at(-1e-3));
                        let slope = (high - low) / (x1 - x0);
                        assert!((slope - f64::from(terms.weights[token])).abs() < 1e-5, "{slope} {terms:?}");
                    }
                }
            }
        }
    }
}
