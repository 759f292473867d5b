//! What all methods share: one update of the numbers.

use super::{Outcome, Step};
use crate::{
    error::TrainError,
    metrics::Metrics,
    optimizer::{Adam, clip_norm},
    sampling::Group,
};

/// The numbers on their way through a step's updates.
pub(super) struct Learner {
    pub(super) numbers: Vec<f32>,
    pub(super) adam: Adam,
    pub(super) updates: u64,
    norms: f64,
    losses: f64,
}

impl Step<'_> {
    pub(super) fn learner(&self) -> Learner {
        Learner {
            numbers: self.state.numbers.clone(),
            adam: self.state.adam.clone(),
            updates: 0,
            norms: 0.0,
            losses: 0.0,
        }
    }

    /// One update against the gradient of a loss.
    pub(super) fn update(&self, learner: &mut Learner, mut gradient: Vec<f32>, loss: f64) -> Result<(), TrainError> {
        let not_finite = |what| TrainError::NotFinite { step: self.state.step + 1, what };
        if gradient.len() != learner.numbers.len() {
            return Err(TrainError::Policy("the gradient is not one number a number".to_owned()));
        }
        if gradient.iter().any(|slope| !slope.is_finite()) || !loss.is_finite() {
            return Err(not_finite("the gradient"));
        }
        learner.norms += clip_norm(&mut gradient, self.settings.max_grad_norm);
        let rate = self.settings.learning_rate.at(self.state.step);
        learner.adam.update(&mut learner.numbers, &gradient, rate, &self.settings.adam);
        learner.losses += loss;
        learner.updates += 1;
        if learner.numbers.iter().any(|number| !number.is_finite()) {
            return Err(not_finite("a number"));
        }
        Ok(())
    }
}

impl Learner {
    /// Hands the step's result over.
    pub(super) fn finish(self, metrics: Metrics, drawn: u64, groups: Vec<Group>) -> Outcome {
        let updates = self.updates.max(1) as f64;
        let metrics = Metrics {
            gradient_norm: self.norms / updates,
            loss: metrics.loss.or((self.updates > 0).then_some(self.losses / updates)),
            updates: self.updates,
            ..metrics
        };
        Outcome { numbers: self.numbers, adam: self.adam, drawn, metrics, groups }
    }
}
