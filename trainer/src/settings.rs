//! Hyperparameters with every default filled in and everything checked: what a run follows.

use serde::{Deserialize, Serialize};

use crate::{
    advantage::RewardScale,
    hyper::{HyperparameterError, Hyperparameters, Method},
    loss::{ClipSettings, LossKind},
    optimizer::{AdamSettings, LearningRate},
};

/// The plan of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Seed of every random choice.
    pub seed: u64,
    /// Steps of the run.
    pub steps: u64,
    /// Prompts (demonstrations) a step.
    pub prompts_per_step: usize,
    /// Longest completion, in tokens.
    pub max_completion_tokens: usize,
    /// Sampling temperature.
    pub temperature: f32,
    /// The learning rate's plan.
    pub learning_rate: LearningRate,
    /// The optimiser's constants.
    pub adam: AdamSettings,
    /// Longest gradient; 0 is no limit.
    pub max_grad_norm: f64,
    /// When to stop before the last step.
    pub stopping: Stopping,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// What only this method has.
    pub method: MethodSettings,
}

/// What belongs to one method.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MethodSettings {
    /// Group-relative policy optimisation.
    Grpo(GrpoSettings),
    /// Evolution strategies.
    Es(EsSettings),
    /// Cross-entropy on demonstrations.
    Sft,
}

/// GRPO's own settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GrpoSettings {
    /// Completions a prompt.
    pub samples_per_prompt: usize,
    /// How token losses are summed.
    pub loss: LossKind,
    /// What centred rewards are divided by.
    pub scale_rewards: RewardScale,
    /// Clip, KL and importance weight.
    pub clip: ClipSettings,
    /// Passes over a batch.
    pub updates_per_batch: usize,
    /// Parts of a pass.
    pub minibatches: usize,
    /// Leave cut-off completions out of the loss.
    pub mask_truncated: bool,
    /// Further draws for groups without variance.
    pub dynamic_sampling: usize,
    /// Completions a prompt on which KL is measured when it is not in the loss.
    pub kl_samples_per_prompt: usize,
}

/// Evolution strategies' own settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EsSettings {
    /// Completions a prompt and candidate.
    pub samples_per_prompt: usize,
    /// Mirrored pairs of candidates.
    pub pairs: usize,
    /// Standard deviation of the perturbations.
    pub sigma: f64,
}

/// When to stop early.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stopping {
    /// Steps without a better moving average; 0 never stops.
    pub patience: u64,
    /// What counts as better.
    pub min_improvement: f64,
    /// A mean reward that is good enough.
    pub target_reward: Option<f64>,
    /// Steps from the start without any variance of the reward within a group; 0 never stops.
    pub flat_reward_steps: u64,
}

impl Settings {
    /// Checks the hyperparameters and fills in the defaults. `items` is the size of the dataset, above zero; epochs become `ceil(epochs * items / prompts_per_step)` steps.
    pub fn resolve(
        hyper: &Hyperparameters,
        method: Method,
        items: usize,
        seed: u64,
    ) -> Result<Self, HyperparameterError> {
        hyper.check(method)?;
        hyper.check_together(method)?;
        let prompts_per_step = hyper.prompts_per_step(method);
        let steps = match hyper.epochs {
            Some(epochs) => (epochs * items as u64).div_ceil(prompts_per_step).max(1),
            None => hyper.steps(method),
        };
        let adam = AdamSettings {
            beta1: hyper.adam_beta1(method),
            beta2: hyper.adam_beta2(method),
            epsilon: hyper.adam_epsilon(method),
            weight_decay: hyper.weight_decay(method),
        };
        let learning_rate = LearningRate {
            peak: hyper.learning_rate(method),
            schedule: hyper.schedule(method),
            warmup_steps: hyper.warmup_steps(method),
            steps,
        };
        let stopping = Stopping {
            patience: hyper.patience(method),
            min_improvement: hyper.min_improvement(method),
            target_reward: Some(hyper.target_reward(method)).filter(|target| target.is_finite()),
            flat_reward_steps: hyper.flat_reward_steps(method),
        };
        Ok(Self {
            seed,
            steps,
            prompts_per_step: prompts_per_step as usize,
            max_completion_tokens: hyper.max_completion_tokens(method) as usize,
            temperature: hyper.temperature(method) as f32,
            learning_rate,
            adam,
            max_grad_norm: hyper.max_grad_norm(method),
            stopping,
            checkpoint_every: hyper.checkpoint_every(method),
            method: MethodSettings::resolve(hyper, method),
        })
    }

    /// Which method.
    pub fn method(&self) -> Method {
        match self.method {
            MethodSettings::Grpo(_) => Method::Grpo,
            MethodSettings::Es(_) => Method::Es,
            MethodSettings::Sft => Method::Sft,
        }
    }
}

impl MethodSettings {
    fn resolve(hyper: &Hyperparameters, method: Method) -> Self {
        let samples_per_prompt = hyper.samples_per_prompt(method) as usize;
        match method {
            Method::Grpo => {
                let loss = hyper.loss(method);
                let unscaled = loss == LossKind::DrGrpo && hyper.scale_rewards.is_none();
                Self::Grpo(GrpoSettings {
                    samples_per_prompt,
                    loss,
                    scale_rewards: if unscaled { RewardScale::None } else { hyper.scale_rewards(method) },
                    clip: ClipSettings {
                        low: hyper.clip_low(method),
                        high: hyper.clip_high.unwrap_or_else(|| hyper.clip_low(method)),
                        beta: hyper.beta(method),
                        importance_cap: hyper.importance_weight_cap(method),
                    },
                    updates_per_batch: hyper.updates_per_batch(method) as usize,
                    minibatches: hyper.minibatches(method) as usize,
                    mask_truncated: hyper.mask_truncated(method),
                    dynamic_sampling: hyper.dynamic_sampling(method) as usize,
                    kl_samples_per_prompt: hyper.kl_samples_per_prompt(method) as usize,
                })
            }
            Method::Es => Self::Es(EsSettings {
                samples_per_prompt,
                pairs: hyper.population(method) as usize / 2,
                sigma: hyper.sigma(method),
            }),
            Method::Sft => Self::Sft,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn resolve(value: serde_json::Value, method: Method, items: usize) -> Settings {
        Settings::resolve(&Hyperparameters::from_json(&value).unwrap(), method, items, 3).unwrap()
    }

    #[test]
    fn epochs_become_steps() {
        assert_eq!(resolve(json!({"epochs": 3, "prompts_per_step": 8}), Method::Sft, 10).steps, 4);
        assert_eq!(resolve(json!({"epochs": 1, "prompts_per_step": 64}), Method::Grpo, 10).steps, 1);
        assert_eq!(resolve(json!({}), Method::Grpo, 10).steps, 100);
    }

    #[test]
    fn defaults_that_follow_other_values() {
        let grpo = |value| match resolve(value, Method::Grpo, 10).method {
            MethodSettings::Grpo(grpo) => grpo,
            _ => unreachable!("grpo was asked for"),
        };
        assert_eq!(grpo(json!({})).scale_rewards, RewardScale::Group);
        assert_eq!(grpo(json!({"loss": "dr_grpo"})).scale_rewards, RewardScale::None);
        assert_eq!(grpo(json!({"loss": "dr_grpo", "scale_rewards": "batch"})).scale_rewards, RewardScale::Batch);
        assert_eq!(grpo(json!({"clip_low": 0.1})).clip.high, 0.1);
        assert_eq!(
            grpo(json!({"clip_high": 0.28})).clip,
            ClipSettings { low: 0.2, high: 0.28, beta: 0.0, importance_cap: 2.0 }
        );
        assert_eq!(resolve(json!({"target_reward": 0.9}), Method::Es, 1).stopping.target_reward, Some(0.9));
        assert_eq!(resolve(json!({}), Method::Es, 1).stopping.target_reward, None);
        assert_eq!(
            resolve(json!({}), Method::Es, 1).method,
            MethodSettings::Es(EsSettings { samples_per_prompt: 1, pairs: 16, sigma: 0.1 })
        );
    }

    #[test]
    fn settings_survive_json() {
        for method in [Method::Grpo, Method::Es, Method::Sft] {
            let settings = resolve(json!({"learning_rate": 0.1, "adam_epsilon": 1.1e-8}), method, 7);
            assert_eq!(settings.method(), method);
            let text = serde_json::to_string(&settings).unwrap();
            assert_eq!(serde_json::from_str::<Settings>(&text).unwrap(), settings);
        }
    }
}
