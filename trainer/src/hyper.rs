//! Hyperparameters as a user writes them: one table that is the struct, the ranges, the defaults and the documentation at once.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{advantage::RewardScale, loss::LossKind, optimizer::Schedule};

/// How a job learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Reinforcement learning with group-relative advantages.
    Grpo,
    /// Evolution strategies: candidates instead of gradients.
    Es,
    /// Supervised fine-tuning: cross-entropy on demonstrations.
    Sft,
}

impl Method {
    /// As it is written in a job.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grpo => "grpo",
            Self::Es => "es",
            Self::Sft => "sft",
        }
    }
}

/// A hyperparameter that is unknown, out of range or without meaning for the method.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("hyperparameters.{field}: {message}")]
pub struct HyperparameterError {
    /// The field's name.
    pub field: String,
    /// What is wrong with it.
    pub message: String,
}

impl HyperparameterError {
    pub(crate) fn new(field: &str, message: impl Into<String>) -> Self {
        Self { field: field.to_owned(), message: message.into() }
    }
}

/// What is to be known of a hyperparameter.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// As it is written.
    pub name: &'static str,
    /// One line for the documentation.
    pub about: &'static str,
    /// Who knows it; for others it is an error.
    pub methods: &'static [Method],
    /// Smallest value of a number.
    pub minimum: f64,
    /// Largest value of a number.
    pub maximum: f64,
    /// The value when it is not given (null: none).
    pub default: fn(Method) -> Value,
}

trait Ranged {
    fn number(&self) -> Option<f64>;
}

impl Ranged for u64 {
    fn number(&self) -> Option<f64> {
        Some(*self as f64)
    }
}

impl Ranged for f64 {
    fn number(&self) -> Option<f64> {
        Some(*self)
    }
}

macro_rules! not_ranged {
    ($($type:ty),*) => { $(impl Ranged for $type { fn number(&self) -> Option<f64> { None } })* };
}
not_ranged!(bool, LossKind, RewardScale, Schedule);

macro_rules! hyperparameters {
    ($(#[doc = $about:literal] $name:ident: $type:ty = $default:expr, $range:expr, $methods:expr;)*) => {
        /// All hyperparameters, each optional. Unknown keys are refused: a misspelt learning rate must not pass.
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Hyperparameters {
            $(
                #[doc = $about]
                #[serde(default, skip_serializing_if = "Option::is_none")]
                pub $name: Option<$type>,
            )*
        }

        /// The table, in the order of the documentation.
        pub const FIELDS: &[Field] = &[$(Field {
            name: stringify!($name),
            about: $about,
            methods: $methods,
            minimum: $range.0,
            maximum: $range.1,
            default: |method| {
                let default: fn(Method) -> $type = $default;
                serde_json::to_value(default(method)).unwrap_or_default()
            },
        }),*];

        impl Hyperparameters {
            $(
                #[allow(dead_code)] // two defaults follow from other values, and are filled in where those are known
                pub(crate) fn $name(&self, method: Method) -> $type {
                    let default: fn(Method) -> $type = $default;
                    self.$name.unwrap_or_else(|| default(method))
                }
            )*

            /// Is every given value in its range, and known to the method?
            pub(crate) fn check(&self, method: Method) -> Result<(), HyperparameterError> {
                $(
                    if let Some(value) = &self.$name {
                        check_value(stringify!($name), value.number(), $range, $methods, method)?;
                    }
                )*
                Ok(())
            }
        }
    };
}

fn check_value(
    name: &str,
    number: Option<f64>,
    (minimum, maximum): (f64, f64),
    methods: &[Method],
    method: Method,
) -> Result<(), HyperparameterError> {
    if !methods.contains(&method) {
        return Err(HyperparameterError::new(name, format!("has no meaning for the method {}", method.name())));
    }
    match number {
        Some(number) if !(minimum..=maximum).contains(&number) => {
            Err(HyperparameterError::new(name, format!("must be from {minimum} to {maximum}, not {number}")))
        }
        _ => Ok(()),
    }
}

const GRPO: &[Method] = &[Method::Grpo];
const ES: &[Method] = &[Method::Es];
const SAMPLING: &[Method] = &[Method::Grpo, Method::Es];
const ALL: &[Method] = &[Method::Grpo, Method::Es, Method::Sft];
const ANY: (f64, f64) = (0.0, 0.0);

hyperparameters! {
    #[doc = "Steps of the run; not together with epochs. One step is one batch of rollouts (sft: of demonstrations)."]
    steps: u64 = |_| 100, (1.0, 1e6), ALL;
    #[doc = "Passes over the dataset, instead of steps (null: steps are given)."]
    epochs: u64 = |_| 0, (1.0, 1e4), ALL;
    #[doc = "Prompts (sft: demonstrations) a step."]
    prompts_per_step: u64 = |_| 8, (1.0, 4096.0), ALL;
    #[doc = "Completions of each prompt a step; for es, of each prompt and candidate."]
    samples_per_prompt: u64 = |method| if method == Method::Grpo { 8 } else { 1 }, (1.0, 1024.0), SAMPLING;
    #[doc = "Longest completion, in tokens, in training and in evaluation."]
    max_completion_tokens: u64 = |_| 256, (1.0, 131_072.0), ALL;
    #[doc = "Sampling temperature of rollouts and of the sampled part of the evaluation; above 0 for grpo."]
    temperature: f64 = |_| 1.0, (0.0, 2.0), ALL;
    #[doc = "Peak learning rate of Adam on the numbers. The default is the best of a sweep with 13 numbers (bench/figure.py); the usable rate falls with the number of sites that share a number."]
    learning_rate: f64 = |method| if method == Method::Sft { 0.003 } else { 0.01 }, (1e-9, 10.0), ALL;
    #[doc = "How the learning rate moves: constant, linear or cosine (both down to zero)."]
    schedule: Schedule = |_| Schedule::Constant, ANY, ALL;
    #[doc = "Steps over which the learning rate rises to its peak."]
    warmup_steps: u64 = |_| 0, (0.0, 1e6), ALL;
    #[doc = "Longest gradient; a longer one is scaled down. 0 turns it off."]
    max_grad_norm: f64 = |_| 1.0, (0.0, 1e9), ALL;
    #[doc = "Adam's decay of the first moment."]
    adam_beta1: f64 = |_| 0.9, (0.0, 0.9999), ALL;
    #[doc = "Adam's decay of the second moment."]
    adam_beta2: f64 = |_| 0.999, (0.0, 0.999_999), ALL;
    #[doc = "Adam's epsilon."]
    adam_epsilon: f64 = |_| 1e-8, (1e-16, 1.0), ALL;
    #[doc = "Decoupled weight decay (AdamW); 0 is Adam."]
    weight_decay: f64 = |_| 0.0, (0.0, 10.0), ALL;
    #[doc = "How token losses are summed: grpo (mean of sequence means), dr_grpo (sum over sequences times max_completion_tokens) or dapo (mean over all tokens)."]
    loss: LossKind = |_| LossKind::Grpo, ANY, GRPO;
    #[doc = "What centred rewards are divided by: group, batch or none. By default none with dr_grpo, else group."]
    scale_rewards: RewardScale = |_| RewardScale::Group, ANY, GRPO;
    #[doc = "Ratios below 1 - clip_low stop pushing a bad completion down."]
    clip_low: f64 = |_| 0.2, (0.0, 1.0), GRPO;
    #[doc = "Ratios above 1 + clip_high stop pushing a good completion up. By default equal to clip_low."]
    clip_high: f64 = |_| 0.2, (0.0, 100.0), GRPO;
    #[doc = "Weight of the KL to the base (k3 estimate); 0 leaves it out."]
    beta: f64 = |_| 0.0, (0.0, 100.0), GRPO;
    #[doc = "Cap of the importance weight between sampler and trainer; 0 turns the correction off."]
    importance_weight_cap: f64 = |_| 2.0, (0.0, 1e6), GRPO;
    #[doc = "Passes over each batch of rollouts."]
    updates_per_batch: u64 = |_| 1, (1.0, 64.0), GRPO;
    #[doc = "Parts each pass is cut into, an update each; at most prompts_per_step."]
    minibatches: u64 = |_| 1, (1.0, 4096.0), GRPO;
    #[doc = "Leave completions that were cut off at max_completion_tokens out of the loss."]
    mask_truncated: bool = |_| false, ANY, GRPO;
    #[doc = "Draw further prompts, up to so many times a step, for groups whose rewards are all equal (DAPO's dynamic sampling)."]
    dynamic_sampling: u64 = |_| 0, (0.0, 64.0), GRPO;
    #[doc = "Completions a prompt on which the KL to the base is measured when beta is 0 (a forward pass each); with beta all are."]
    kl_samples_per_prompt: u64 = |_| 1, (0.0, 1024.0), GRPO;
    #[doc = "Candidates a step, an even number: each perturbation is tried with both signs."]
    population: u64 = |_| 32, (2.0, 4096.0), ES;
    #[doc = "Standard deviation of the perturbations. This default and the population's are those that the learning rate was chosen with."]
    sigma: f64 = |_| 0.1, (1e-9, 10.0), ES;
    #[doc = "Stop early after so many steps without a better moving average (over as many steps) of the reward, or of the loss for sft; 0 never does."]
    patience: u64 = |_| 0, (0.0, 1e6), ALL;
    #[doc = "By how much the moving average must be better to count."]
    min_improvement: f64 = |_| 0.0, (0.0, 1e9), ALL;
    #[doc = "Stop early once the mean reward of a step reaches this (null: never)."]
    target_reward: f64 = |_| f64::INFINITY, (-1e9, 1e9), SAMPLING;
    #[doc = "End the job, with words, if the reward has not varied within any group in so many steps from the start; 0 never does."]
    flat_reward_steps: u64 = |_| 20, (0.0, 1e6), SAMPLING;
    #[doc = "Steps between checkpoints."]
    checkpoint_every: u64 = |_| 5, (1.0, 1e6), ALL;
}

/// Completions of one step, all together: what a step may hold in memory.
const MAX_COMPLETIONS: u64 = 65_536;
/// Tokens of those completions, further draws included: a step has no checkpoint within it, and the day's tokens are counted after it.
const MAX_STEP_TOKENS: u64 = 1 << 24;

impl Hyperparameters {
    /// Reads them from JSON; the error names the field.
    pub fn from_json(value: &Value) -> Result<Self, HyperparameterError> {
        let Value::Object(object) = value else {
            return Err(HyperparameterError::new("", "must be an object"));
        };
        for (name, value) in object {
            if !FIELDS.iter().any(|field| field.name == name) {
                let known: Vec<&str> = FIELDS.iter().map(|field| field.name).collect();
                return Err(HyperparameterError::new(name, format!("unknown; known are {}", known.join(", "))));
            }
            let alone = Value::Object([(name.clone(), value.clone())].into_iter().collect());
            serde_json::from_value::<Self>(alone).map_err(|error| HyperparameterError::new(name, error.to_string()))?;
        }
        serde_json::from_value(value.clone()).map_err(|error| HyperparameterError::new("", error.to_string()))
    }

    /// What no single range can say.
    pub(crate) fn check_together(&self, method: Method) -> Result<(), HyperparameterError> {
        let fail = |field, message: &str| Err(HyperparameterError::new(field, message));
        if self.steps.is_some() && self.epochs.is_some() {
            return fail("epochs", "give steps or epochs, not both");
        }
        let prompts = self.prompts_per_step(method);
        match method {
            Method::Grpo => {
                if self.samples_per_prompt(method) < 2 {
                    return fail("samples_per_prompt", "must be at least 2: a group of one has nothing to compare");
                }
                if self.temperature(method) < 0.01 {
                    return fail(
                        "temperature",
                        "must be at least 0.01: greedy completions of a prompt are all the same",
                    );
                }
                if self.minibatches(method) > prompts {
                    return fail("minibatches", "must be at most prompts_per_step");
                }
            }
            Method::Es => {
                if !self.population(method).is_multiple_of(2) {
                    return fail("population", "must be even: each perturbation is tried with both signs");
                }
                if self.temperature(method) == 0.0 && self.samples_per_prompt(method) > 1 {
                    return fail(
                        "samples_per_prompt",
                        "must be 1 at temperature 0: greedy completions are all the same",
                    );
                }
            }
            Method::Sft => {}
        }
        if method != Method::Sft {
            let candidates = if method == Method::Es { self.population(method) } else { 1 };
            let completions = prompts * self.samples_per_prompt(method) * candidates;
            if completions > MAX_COMPLETIONS {
                let message = format!(
                    "makes more than {MAX_COMPLETIONS} completions a step, all prompts and candidates together"
                );
                return fail("samples_per_prompt", &message);
            }
            let draws = if method == Method::Grpo { 1 + self.dynamic_sampling(method) } else { 1 };
            if completions * draws * self.max_completion_tokens(method) > MAX_STEP_TOKENS {
                let message = format!(
                    "makes more than {MAX_STEP_TOKENS} tokens a step, all prompts, candidates and further draws together"
                );
                return fail("max_completion_tokens", &message);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn message(value: Value, method: Method) -> String {
        let checked = Hyperparameters::from_json(&value)
            .and_then(|hyper| hyper.check(method).and_then(|()| hyper.check_together(method)));
        checked.map_or_else(|error| error.to_string(), |()| "fine".to_owned())
    }

    #[test]
    fn every_mistake_names_its_field() {
        for (value, method, want) in [
            (json!({"learnin_rate": 0.1}), Method::Grpo, "hyperparameters.learnin_rate: unknown"),
            (json!({"learning_rate": "high"}), Method::Grpo, "hyperparameters.learning_rate: invalid type"),
            (json!({"learning_rate": 0}), Method::Grpo, "hyperparameters.learning_rate: must be from"),
            (json!({"learning_rate": -1.0}), Method::Sft, "hyperparameters.learning_rate: must be from"),
            (json!({"steps": 0}), Method::Grpo, "hyperparameters.steps: must be from"),
            (json!({"steps": 1.5}), Method::Grpo, "hyperparameters.steps: invalid type"),
            (json!({"steps": 1, "epochs": 1}), Method::Grpo, "hyperparameters.epochs: give steps or epochs"),
            (json!({"loss": "ppo"}), Method::Grpo, "hyperparameters.loss: unknown variant"),
            (json!({"sigma": 0.1}), Method::Grpo, "hyperparameters.sigma: has no meaning for the method grpo"),
            (json!({"beta": 0.1}), Method::Es, "hyperparameters.beta: has no meaning for the method es"),
            (json!({"samples_per_prompt": 4}), Method::Sft, "hyperparameters.samples_per_prompt: has no meaning"),
            (json!({"samples_per_prompt": 1}), Method::Grpo, "hyperparameters.samples_per_prompt: must be at least 2"),
            (json!({"temperature": 0}), Method::Grpo, "hyperparameters.temperature: must be at least"),
            (json!({"minibatches": 9}), Method::Grpo, "hyperparameters.minibatches: must be at most"),
            (json!({"population": 7}), Method::Es, "hyperparameters.population: must be even"),
            (json!({"temperature": 0, "samples_per_prompt": 2}), Method::Es, "hyperparameters.samples_per_prompt"),
            (
                json!({"prompts_per_step": 4096, "samples_per_prompt": 1024}),
                Method::Grpo,
                "hyperparameters.samples_per_prompt: makes",
            ),
            (
                json!({"prompts_per_step": 128, "samples_per_prompt": 32, "max_completion_tokens": 4097}),
                Method::Grpo,
                "hyperparameters.max_completion_tokens: makes more than 16777216 tokens",
            ),
            (
                json!({"prompts_per_step": 1024, "dynamic_sampling": 64}),
                Method::Grpo,
                "hyperparameters.max_completion_tokens: makes",
            ),
            (json!([1]), Method::Grpo, "hyperparameters.: must be an object"),
            (json!({}), Method::Grpo, "fine"),
            (json!({"temperature": 0}), Method::Es, "fine"),
            (json!({"epochs": 3, "learning_rate": 1e-3}), Method::Sft, "fine"),
        ] {
            let got = message(value.clone(), method);
            assert!(got.starts_with(want), "{value}: {got}");
        }
    }

    #[test]
    fn the_table_holds_every_field_with_a_default_in_range() {
        let none = serde_json::to_value(Hyperparameters::default()).unwrap();
        assert_eq!(none, json!({}));
        for field in FIELDS {
            assert!(field.about.ends_with('.'), "{}", field.name);
            for &method in field.methods {
                let default = (field.default)(method);
                if let Some(number) = default.as_f64().filter(|_| field.name != "epochs") {
                    assert!((field.minimum..=field.maximum).contains(&number), "{} {number}", field.name);
                }
                if field.name != "epochs" && !default.is_null() {
                    let given = json!({field.name: default});
                    assert!(Hyperparameters::from_json(&given).unwrap().check(method).is_ok(), "{}", field.name);
                }
            }
        }
    }
}
