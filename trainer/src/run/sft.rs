//! A step of supervised fine-tuning: cross-entropy on a batch of demonstrations.

use std::sync::Arc;

use super::{Outcome, Step};
use crate::{
    error::TrainError,
    loss::CrossEntropy,
    metrics::Metrics,
    policy::Sequence,
    sampling::{check_logprobs, check_stop},
};

impl Step<'_> {
    pub(super) fn sft(&mut self) -> Result<Outcome, TrainError> {
        check_stop(self.stop)?;
        let drawn = self.state.drawn + self.settings.prompts_per_step as u64;
        let items: Vec<usize> = (self.state.drawn..drawn).map(|position| self.order.item(position)).collect();
        let sequences: Vec<Sequence<'_>> = items
            .iter()
            .map(|&item| &self.data.examples[item])
            .map(|example| Sequence { prompt: &example.prompt, completion: &example.target })
            .collect();
        let tokens: usize = sequences.iter().map(|sequence| sequence.completion.len()).sum();
        let loss = CrossEntropy { tokens };
        let mut learner = self.learner();
        // The data's likelihood, not the sampler's: no temperature.
        let result = self.policy.loss_gradient(&learner.numbers, &sequences, 1.0, Arc::new(loss))?;
        check_logprobs(&sequences, &result.logprobs)?;
        self.update(&mut learner, result.gradient, loss.loss(&result.logprobs))?;
        let metrics = Metrics { prompts: items.len() as u64, tokens: tokens as u64, ..Metrics::default() };
        Ok(learner.finish(metrics, drawn, Vec::new()))
    }
}
