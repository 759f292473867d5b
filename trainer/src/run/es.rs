//! A step of evolution strategies: candidates are adapters in one mixed batch; no gradient is asked for.

use super::{Outcome, Step, rollout_seeds};
use crate::{
    error::TrainError,
    es::{candidates, centred_ranks, descent_direction, perturbations},
    metrics::Metrics,
    policy::RolloutRequest,
    sampling::{Group, grade, roll_out},
    settings::EsSettings,
};

impl Step<'_> {
    pub(super) fn es(&mut self, es: &EsSettings) -> Result<Outcome, TrainError> {
        let numbers = &self.state.numbers;
        let noise = perturbations(self.settings.seed, self.state.step, es.pairs, numbers.len());
        let candidates = candidates(numbers, &noise, es.sigma);
        let drawn = self.state.drawn + self.settings.prompts_per_step as u64;
        let prompts: Vec<(u64, usize)> =
            (self.state.drawn..drawn).map(|position| (position, self.order.item(position))).collect();
        let groups = self.try_candidates(es, &candidates, &prompts)?;

        // groups: for each prompt, all completions of candidate 0, then of candidate 1, ...
        let fitness: Vec<f64> = (0..candidates.len())
            .map(|candidate| {
                let own = |group: &Group| {
                    let completions = &group.completions[candidate * es.samples_per_prompt..][..es.samples_per_prompt];
                    completions.iter().map(|it| f64::from(it.grade.reward)).sum::<f64>()
                };
                groups.iter().map(own).sum::<f64>() / (groups.len() * es.samples_per_prompt) as f64
            })
            .collect();
        let ranks = centred_ranks(&fitness);
        let mut learner = self.learner();
        if ranks.iter().any(|&rank| rank != 0.0) {
            let direction = descent_direction(&noise, &ranks, es.sigma, numbers.len());
            self.update(&mut learner, direction, 0.0)?;
        }
        let metrics = Metrics {
            candidate_reward_min: fitness.iter().copied().reduce(f64::min),
            candidate_reward_max: fitness.iter().copied().reduce(f64::max),
            prompts: prompts.len() as u64,
            ..Metrics::of_groups(&groups)
        };
        let mut outcome = learner.finish(metrics, drawn, groups);
        outcome.metrics.loss = None;
        Ok(outcome)
    }

    /// All candidates on all prompts, in one batch. Candidates share each prompt's seeds: with common random numbers their difference is less noise.
    fn try_candidates(
        &mut self,
        es: &EsSettings,
        candidates: &[Vec<f32>],
        prompts: &[(u64, usize)],
    ) -> Result<Vec<Group>, TrainError> {
        let mut requests = Vec::with_capacity(candidates.len() * prompts.len());
        let mut examples = Vec::with_capacity(requests.capacity());
        for &(position, item) in prompts {
            let seeds = rollout_seeds(self.settings.seed, position, es.samples_per_prompt);
            for numbers in candidates {
                requests.push(RolloutRequest {
                    numbers,
                    prompt: &self.data.examples[item].prompt,
                    seeds: seeds.clone(),
                    max_tokens: self.settings.max_completion_tokens,
                    temperature: self.settings.temperature,
                });
                examples.push(item);
            }
        }
        let rollouts = roll_out(self.policy, self.data, &requests, &examples, self.stop)?;
        self.clock.rolled_out();
        let by_candidate = grade(self.grader, self.data, rollouts, self.stop)?;
        self.clock.graded();
        let join = |groups: &[Group]| Group {
            example: groups[0].example,
            completions: groups.iter().flat_map(|group| group.completions.iter().cloned()).collect(),
        };
        Ok(by_candidate.chunks(candidates.len()).map(join).collect())
    }
}
