//! Early stopping, and the report of a reward that teaches nothing.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::{
    metrics::{Metrics, Notice},
    settings::Settings,
};

/// Cut-off completions are worth a notice from this share on.
const MANY_TRUNCATED: f64 = 0.9;

/// Why a run ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum End {
    /// All steps are done.
    Steps,
    /// `target_reward` was reached.
    TargetReached {
        /// The step's mean reward.
        reward: f64,
    },
    /// No better moving average for `patience` steps.
    NoImprovement {
        /// The patience.
        steps: u64,
    },
    /// The reward has not varied within any group since the start: the job has failed.
    RewardNeverVaried {
        /// Steps so far.
        steps: u64,
        /// The last step's mean reward.
        reward: f64,
    },
}

impl End {
    /// Is there nothing to publish?
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::RewardNeverVaried { .. })
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Steps => f.write_str("all steps are done"),
            Self::TargetReached { reward } => write!(f, "the mean reward reached {reward:.3}"),
            Self::NoImprovement { steps } => write!(f, "no improvement in {steps} steps"),
            Self::RewardNeverVaried { steps, reward } => write!(
                f,
                "the reward never varied: in {steps} steps no two completions of a prompt got different rewards (all about {reward:.3}), so there was nothing to learn from. Look at the samples: does the grader see the answers, and can the model \
                 sometimes give them?"
            ),
        }
    }
}

/// What early stopping remembers; a part of the checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Monitor {
    /// Has any group varied yet?
    signal_seen: bool,
    truncation_told: bool,
    /// The last `patience` scores.
    recent: VecDeque<f64>,
    best: Option<f64>,
    since_best: u64,
}

impl Monitor {
    /// Takes in a step (counted from 1).
    pub(super) fn observe(&mut self, step: u64, metrics: &Metrics, settings: &Settings) -> (Vec<Notice>, Option<End>) {
        let stopping = &settings.stopping;
        let mut notices = Vec::new();
        self.signal_seen |= metrics.zero_variance_groups.is_some_and(|share| share < 1.0);
        if let Some(share) = metrics.truncated.filter(|share| *share >= MANY_TRUNCATED && !self.truncation_told) {
            self.truncation_told = true;
            notices.push(Notice::Truncated { share });
        }
        if let Some(reward) = metrics.reward_mean {
            let limit = stopping.flat_reward_steps;
            if !self.signal_seen && limit > 0 {
                if step >= limit {
                    return (notices, Some(End::RewardNeverVaried { steps: step, reward }));
                }
                if step == limit.div_ceil(4) {
                    notices.push(Notice::RewardFlat { steps: step, reward });
                }
            }
            if stopping.target_reward.is_some_and(|target| reward >= target) {
                return (notices, Some(End::TargetReached { reward }));
            }
        }
        let score = metrics.reward_mean.or(metrics.loss.map(|loss| -loss));
        let tired = score.is_some_and(|score| self.is_tired(score, stopping.patience, stopping.min_improvement));
        (notices, tired.then_some(End::NoImprovement { steps: stopping.patience }))
    }

    fn is_tired(&mut self, score: f64, patience: u64, min_improvement: f64) -> bool {
        if patience == 0 {
            return false;
        }
        self.recent.push_back(score);
        if (self.recent.len() as u64) < patience {
            return false;
        }
        let average = self.recent.iter().sum::<f64>() / self.recent.len() as f64;
        self.recent.pop_front();
        if self.best.is_none_or(|best| average > best + min_improvement) {
            self.best = Some(average);
            self.since_best = 0;
        } else {
            self.since_best += 1;
        }
        self.since_best >= patience
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::hyper::{Hyperparameters, Method};

    fn settings(value: serde_json::Value) -> Settings {
        Settings::resolve(&Hyperparameters::from_json(&value).unwrap(), Method::Grpo, 4, 0).unwrap()
    }

    fn steps(settings: &Settings, rewards: &[(f64, bool)]) -> (Vec<Notice>, Option<(usize, End)>) {
        let mut monitor = Monitor::default();
        let mut all = Vec::new();
        for (index, &(reward, signal)) in rewards.iter().enumerate() {
            let zero_variance_groups = Some(if signal { 0.5 } else { 1.0 });
            let metrics = Metrics { reward_mean: Some(reward), zero_variance_groups, ..Metrics::default() };
            let (notices, end) = monitor.observe(index as u64 + 1, &metrics, settings);
            all.extend(notices);
            if let Some(end) = end {
                return (all, Some((index + 1, end)));
            }
        }
        (all, None)
    }

    #[test]
    fn a_reward_that_never_varies_is_told_and_ends_the_run() {
        let flat = settings(json!({"flat_reward_steps": 8}));
        let (notices, end) = steps(&flat, &[(0.25, false); 20]);
        assert_eq!(notices, [Notice::RewardFlat { steps: 2, reward: 0.25 }]);
        let (step, end) = end.unwrap();
        assert_eq!((step, end.clone()), (8, End::RewardNeverVaried { steps: 8, reward: 0.25 }));
        assert!(end.is_failure() && end.to_string().contains("the reward never varied"));
        let mut late = vec![(0.0, false); 20];
        late[6].1 = true;
        assert_eq!(steps(&flat, &late).1, None);
        let never = settings(json!({"flat_reward_steps": 0}));
        assert_eq!(steps(&never, &[(0.0, false); 50]), (vec![], None));
    }

    #[test]
    fn patience_watches_the_moving_average() {
        let patient = settings(json!({"patience": 3, "min_improvement": 0.01}));
        let rising: Vec<(f64, bool)> = (0..30).map(|i| (f64::from(i) * 0.02, true)).collect();
        assert_eq!(steps(&patient, &rising).1, None);
        let mut stuck = rising[..5].to_vec();
        stuck.extend([(0.08, true); 20]);
        let (step, end) = steps(&patient, &stuck).1.unwrap();
        assert_eq!(end, End::NoImprovement { steps: 3 });
        // The averages still rise with steps 6 and 7, as 0.08 fills the window; then three that do not.
        assert_eq!(step, 9, "the average last rose by more than 0.01 at step 6");
    }

    #[test]
    fn a_target_ends_the_run() {
        let settings = settings(json!({"target_reward": 0.9}));
        assert_eq!(steps(&settings, &[(0.5, true), (0.95, true)]).1, Some((2, End::TargetReached { reward: 0.95 })));
    }
}
