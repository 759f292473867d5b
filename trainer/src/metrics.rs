//! What is to be known of a step.

use serde::{Deserialize, Serialize};

use crate::{
    advantage::{is_flat, standard_deviation},
    data::Place,
    sampling::Group,
};

/// The metrics of a step. What a method does not have is absent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Mean reward of the step's completions (es: of all candidates').
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward_mean: Option<f64>,
    /// Standard deviation of the rewards over the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward_std: Option<f64>,
    /// Share of groups whose rewards are all equal: they teach nothing. (es: of prompts that all candidates answer alike.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zero_variance_groups: Option<f64>,
    /// The worst candidate's mean reward (es).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candidate_reward_min: Option<f64>,
    /// The best candidate's mean reward (es).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candidate_reward_max: Option<f64>,
    /// KL of the policy to the base, nats a token: the mean of k3 over the measured completions (all with beta, else `kl_samples_per_prompt` a prompt that teaches).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    /// Entropy of the policy, nats a token: minus the mean log-prob of the sampled tokens, which estimates it without bias.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<f64>,
    /// Share of tokens whose gradient the clip took, over all updates of the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_fraction: Option<f64>,
    /// Mean length of completions, in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_tokens_mean: Option<f64>,
    /// The longest completion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_tokens_max: Option<u64>,
    /// Share of completions cut off at `max_completion_tokens`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub truncated: Option<f64>,
    /// Mean of |trainer - sampler| log-prob over tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprob_difference_mean: Option<f64>,
    /// Its largest value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprob_difference_max: Option<f64>,
    /// Mean importance weight over tokens, truncated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub importance_weight_mean: Option<f64>,
    /// The smallest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub importance_weight_min: Option<f64>,
    /// The largest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub importance_weight_max: Option<f64>,
    /// The loss, a mean over the step's updates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Norm of the gradient before clipping, a mean over the step's updates.
    pub gradient_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Norm of the numbers after the step.
    pub numbers_norm: f64,
    /// Updates made: 0 when no group taught anything.
    pub updates: u64,
    /// Prompts drawn, those of dynamic sampling included.
    pub prompts: u64,
    /// Tokens of completions (sft: of demonstrations).
    pub tokens: u64,
}

/// Where a step's time went. Not a part of what is repeatable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Rolling out.
    pub rollout_seconds: f64,
    /// Grading.
    pub grading_seconds: f64,
    /// Log-probs, gradient and update.
    pub learning_seconds: f64,
    /// Completion tokens by the whole step's seconds.
    pub tokens_per_second: f64,
}

/// A graded completion to look at.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The item's index in the data, from 0.
    pub item: usize,
    /// The item's place in its file.
    pub place: Place,
    /// The completion's text.
    pub text: String,
    /// Its reward.
    pub reward: f32,
    /// The parts of a combined reward.
    pub parts: Vec<(String, f32)>,
    /// Its length in tokens.
    pub tokens: usize,
    /// False when it was cut off.
    pub finished: bool,
}

/// Something the job's owner should hear.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Notice {
    /// No group's rewards have varied since the start.
    RewardFlat {
        /// Steps so far.
        steps: u64,
        /// The mean reward of the last one.
        reward: f64,
    },
    /// Nearly all completions are cut off.
    Truncated {
        /// The share.
        share: f64,
    },
}

impl std::fmt::Display for Notice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::RewardFlat { steps, reward } => write!(
                f,
                "in {steps} steps no two completions of a prompt have got different rewards (all about {reward:.3}): nothing can be learnt from them"
            ),
            Self::Truncated { share } => {
                write!(f, "{:.0} % of the completions are cut off at max_completion_tokens", 100.0 * share)
            }
        }
    }
}

impl Metrics {
    /// What groups of graded completions say by themselves.
    pub(crate) fn of_groups(groups: &[Group]) -> Self {
        let rewards: Vec<f32> = groups.iter().flat_map(Group::rewards).collect();
        let rollouts = || groups.iter().flat_map(|group| group.completions.iter().map(|it| &it.rollout));
        let count = rewards.len().max(1) as f64;
        let tokens: usize = rollouts().map(|rollout| rollout.tokens.len()).sum();
        let surprise: f64 = rollouts().flat_map(|rollout| &rollout.logprobs).map(|&logprob| -f64::from(logprob)).sum();
        let flat = groups.iter().filter(|group| is_flat(&group.rewards())).count();
        Self {
            reward_mean: Some(rewards.iter().map(|&reward| f64::from(reward)).sum::<f64>() / count),
            reward_std: Some(f64::from(standard_deviation(&rewards))),
            zero_variance_groups: Some(flat as f64 / groups.len().max(1) as f64),
            entropy: (tokens > 0).then(|| surprise / tokens as f64),
            completion_tokens_mean: Some(tokens as f64 / count),
            completion_tokens_max: rollouts().map(|rollout| rollout.tokens.len() as u64).max(),
            truncated: Some(rollouts().filter(|rollout| !rollout.finished).count() as f64 / count),
            tokens: tokens as u64,
            ..Self::default()
        }
    }
}
