//! A step of GRPO: roll out groups, grade them, and follow the gradient of the clipped loss, once or several times.

use std::sync::Arc;

use super::{Outcome, Step, learn::Learner, rollout_seeds};
use crate::{
    advantage::{advantages, is_flat},
    data::Dataset,
    error::TrainError,
    loss::{GrpoLoss, GrpoSequence, k3},
    metrics::Metrics,
    policy::{RolloutRequest, Sequence},
    rng::{Purpose, Stream},
    sampling::{Group, check_logprobs, check_stop, grade, logprobs, roll_out},
    settings::GrpoSettings,
};

/// A completion on its way into the loss.
struct Candidate<'a> {
    group: usize,
    sequence: Sequence<'a>,
    sampler: &'a [f32],
    advantage: f64,
    /// Tokens that count: 0 for a masked one.
    tokens: usize,
    old: Option<Vec<f32>>,
    reference: Option<Vec<f32>>,
}

/// Sums over the tokens of a step.
#[derive(Default)]
struct Tally {
    tokens: usize,
    clipped: usize,
    differences: (f64, f64, usize),
    importance: (f64, f64, f64, usize),
    kl: (f64, usize),
}

impl Step<'_> {
    pub(super) fn grpo(&mut self, grpo: &GrpoSettings) -> Result<Outcome, TrainError> {
        let (groups, kept, drawn) = self.draw_groups(grpo)?;
        let data = self.data;
        let mut candidates = self.candidates(grpo, kept.iter().map(|&index| &groups[index]), data);
        let mut learner = self.learner();
        let mut tally = Tally::default();
        self.prepare(grpo, &mut candidates, &mut tally)?;
        for pass in 0..grpo.updates_per_batch {
            for minibatch in self.minibatches(grpo, kept.len(), pass) {
                self.learn_from(grpo, &candidates, &minibatch, &mut learner, &mut tally)?;
            }
        }
        if !candidates.iter().any(|candidate| candidate.is_active(grpo)) {
            self.probe(&groups, &mut tally)?;
        }
        drop(candidates);
        let metrics = Metrics { prompts: drawn - self.state.drawn, ..tally.metrics(Metrics::of_groups(&groups)) };
        Ok(learner.finish(metrics, drawn, groups))
    }

    /// Rolls out and grades a batch. With dynamic sampling, draws on until enough groups vary, and keeps only those. Gives all groups, the indices of the kept ones, and the position after the last draw.
    fn draw_groups(&mut self, grpo: &GrpoSettings) -> Result<(Vec<Group>, Vec<usize>, u64), TrainError> {
        let (mut groups, mut drawn) = (Vec::new(), self.state.drawn);
        let wanted = self.settings.prompts_per_step;
        let mut round = 0;
        loop {
            let varied = |groups: &[Group]| -> Vec<usize> {
                (0..groups.len()).filter(|&index| !is_flat(&groups[index].rewards())).collect()
            };
            let missing = wanted - varied(&groups).len().min(wanted);
            groups.extend(self.roll_out_prompts(grpo, drawn, missing)?);
            drawn += missing as u64;
            if grpo.dynamic_sampling == 0 {
                let all = (0..groups.len()).collect();
                return Ok((groups, all, drawn));
            }
            let kept = varied(&groups);
            if kept.len() >= wanted || round == grpo.dynamic_sampling {
                return Ok((groups, kept, drawn));
            }
            round += 1;
        }
    }

    fn roll_out_prompts(&mut self, grpo: &GrpoSettings, from: u64, count: usize) -> Result<Vec<Group>, TrainError> {
        let positions = from..from + count as u64;
        let items: Vec<usize> = positions.clone().map(|position| self.order.item(position)).collect();
        let requests: Vec<RolloutRequest<'_>> = positions
            .zip(&items)
            .map(|(position, &item)| RolloutRequest {
                numbers: &self.state.numbers,
                prompt: &self.data.examples[item].prompt,
                seeds: rollout_seeds(self.settings.seed, position, grpo.samples_per_prompt),
                max_tokens: self.settings.max_completion_tokens,
                temperature: self.settings.temperature,
            })
            .collect();
        let rollouts = roll_out(self.policy, self.data, &requests, &items, self.stop)?;
        self.clock.rolled_out();
        let groups = grade(self.grader, self.data, rollouts, self.stop)?;
        self.clock.graded();
        Ok(groups)
    }

    fn candidates<'g>(
        &self,
        grpo: &GrpoSettings,
        groups: impl Iterator<Item = &'g Group> + Clone,
        data: &'g Dataset,
    ) -> Vec<Candidate<'g>> {
        let rewards: Vec<Vec<f32>> = groups.clone().map(Group::rewards).collect();
        let advantages = advantages(&rewards, grpo.scale_rewards);
        let mut candidates = Vec::new();
        for (group, (it, advantages)) in groups.zip(advantages).enumerate() {
            for (completion, advantage) in it.completions.iter().zip(advantages) {
                let rollout = &completion.rollout;
                let masked = grpo.mask_truncated && !rollout.finished;
                candidates.push(Candidate {
                    group,
                    sequence: Sequence { prompt: &data.examples[it.example].prompt, completion: &rollout.tokens },
                    sampler: &rollout.logprobs,
                    advantage: f64::from(advantage),
                    tokens: if masked { 0 } else { rollout.tokens.len() },
                    old: None,
                    reference: None,
                });
            }
        }
        candidates
    }

    /// Log-probs that must be taken before the numbers move: those of the base, and with several updates a batch those of the numbers that rolled out. A KL that is only measured is measured here.
    fn prepare(
        &mut self,
        grpo: &GrpoSettings,
        candidates: &mut [Candidate<'_>],
        tally: &mut Tally,
    ) -> Result<(), TrainError> {
        let mut active: Vec<usize> = (0..candidates.len()).filter(|&index| candidates[index].is_active(grpo)).collect();
        let numbers = self.state.numbers.clone();
        if grpo.updates_per_batch * grpo.minibatches > 1 {
            let old = self.score(&numbers, candidates, &active)?;
            for (&index, old) in active.iter().zip(old) {
                candidates[index].old = Some(old);
            }
        }
        if grpo.clip.beta == 0.0 {
            let mut taken = vec![0; candidates.last().map_or(0, |last| last.group + 1)];
            active.retain(|&index| {
                taken[candidates[index].group] += 1;
                taken[candidates[index].group] <= grpo.kl_samples_per_prompt
            });
        }
        let reference = self.score(&vec![0.0; numbers.len()], candidates, &active)?;
        for (&index, reference) in active.iter().zip(reference) {
            candidates[index].reference = Some(reference);
        }
        for candidate in candidates.iter() {
            if let Some(old) = &candidate.old {
                tally.add(grpo, candidate, old);
            }
        }
        Ok(())
    }

    fn score(
        &mut self,
        numbers: &[f32],
        candidates: &[Candidate<'_>],
        indices: &[usize],
    ) -> Result<Vec<Vec<f32>>, TrainError> {
        if indices.is_empty() {
            return Ok(Vec::new());
        }
        let sequences: Vec<Sequence<'_>> = indices.iter().map(|&index| candidates[index].sequence).collect();
        logprobs(self.policy, numbers, &sequences, self.settings.temperature, self.stop)
    }

    /// The groups of each minibatch of a pass, in ascending order; shuffled when there are several.
    fn minibatches(&self, grpo: &GrpoSettings, groups: usize, pass: usize) -> Vec<Vec<usize>> {
        let parts = grpo.minibatches.min(groups).max(1);
        let order = if parts == 1 {
            (0..groups).collect()
        } else {
            let position = self.state.step * grpo.updates_per_batch as u64 + pass as u64;
            Stream::new(self.settings.seed, Purpose::Minibatch, position).permutation(groups)
        };
        let bound = |part: usize| part * groups / parts;
        (0..parts)
            .map(|part| {
                let mut groups = order[bound(part)..bound(part + 1)].to_vec();
                groups.sort_unstable();
                groups
            })
            .collect()
    }

    /// One update. Completions without a gradient still count in the loss' denominators, but are not computed.
    fn learn_from(
        &mut self,
        grpo: &GrpoSettings,
        candidates: &[Candidate<'_>],
        groups: &[usize],
        learner: &mut Learner,
        tally: &mut Tally,
    ) -> Result<(), TrainError> {
        let all: Vec<&Candidate<'_>> =
            candidates.iter().filter(|candidate| groups.binary_search(&candidate.group).is_ok()).collect();
        let tokens: Vec<usize> = all.iter().map(|candidate| candidate.tokens).collect();
        let factors = grpo.loss.factors(&tokens, self.settings.max_completion_tokens);
        let active: Vec<(&Candidate<'_>, f64)> =
            all.into_iter().zip(factors).filter(|(candidate, _)| candidate.is_active(grpo)).collect();
        if active.is_empty() {
            return Ok(());
        }
        let with_kl = grpo.clip.beta > 0.0;
        let sequence = |&(candidate, factor): &(&Candidate<'_>, f64)| GrpoSequence {
            advantage: candidate.advantage,
            factor,
            sampler: candidate.sampler.to_vec(),
            old: candidate.old.clone(),
            reference: candidate.reference.clone().filter(|_| with_kl),
        };
        let loss = Arc::new(GrpoLoss { settings: grpo.clip, sequences: active.iter().map(sequence).collect() });
        let sequences: Vec<Sequence<'_>> = active.iter().map(|(candidate, _)| candidate.sequence).collect();
        check_stop(self.stop)?;
        let result =
            self.policy.loss_gradient(&learner.numbers, &sequences, self.settings.temperature, loss.clone())?;
        check_logprobs(&sequences, &result.logprobs)?;
        let mut total = 0.0;
        for (index, ((candidate, _), logprobs)) in active.iter().zip(&result.logprobs).enumerate() {
            let terms = loss.terms(index, logprobs);
            total += terms.loss;
            tally.tokens += logprobs.len();
            tally.clipped += terms.clipped;
            if candidate.old.is_none() {
                tally.add(grpo, candidate, logprobs);
            }
        }
        self.update(learner, result.gradient, total)
    }

    /// A step that teaches nothing still measures how far sampler and trainer are apart, on one completion.
    fn probe(&mut self, groups: &[Group], tally: &mut Tally) -> Result<(), TrainError> {
        let first = groups.iter().flat_map(|group| group.completions.iter().map(move |it| (group.example, it)));
        let Some((example, it)) = first.into_iter().find(|(_, it)| !it.rollout.tokens.is_empty()) else {
            return Ok(());
        };
        let sequence = Sequence { prompt: &self.data.examples[example].prompt, completion: &it.rollout.tokens };
        let numbers = &self.state.numbers;
        let scored = logprobs(self.policy, numbers, &[sequence], self.settings.temperature, self.stop)?;
        tally.add_difference(&scored[0], &it.rollout.logprobs);
        Ok(())
    }
}

impl Candidate<'_> {
    /// Does it have a gradient?
    fn is_active(&self, grpo: &GrpoSettings) -> bool {
        self.tokens > 0 && (self.advantage != 0.0 || grpo.clip.beta > 0.0)
    }
}

impl Tally {
    fn add_difference(&mut self, trainer: &[f32], sampler: &[f32]) {
        for (trainer, sampler) in trainer.iter().zip(sampler) {
            let difference = (f64::from(*trainer) - f64::from(*sampler)).abs();
            self.differences.0 += difference;
            self.differences.1 = self.differences.1.max(difference);
            self.differences.2 += 1;
        }
    }

    /// A completion at the numbers that rolled out.
    fn add(&mut self, grpo: &GrpoSettings, candidate: &Candidate<'_>, trainer: &[f32]) {
        self.add_difference(trainer, candidate.sampler);
        for (trainer, sampler) in trainer.iter().zip(candidate.sampler) {
            let weight = grpo.clip.importance(f64::from(*trainer) - f64::from(*sampler));
            let (sum, least, most, count) = &mut self.importance;
            *least = if *count == 0 { weight } else { least.min(weight) };
            *most = most.max(weight);
            *sum += weight;
            *count += 1;
        }
        for (trainer, reference) in trainer.iter().zip(candidate.reference.iter().flatten()) {
            self.kl.0 += k3(f64::from(*reference) - f64::from(*trainer));
            self.kl.1 += 1;
        }
    }

    fn metrics(&self, groups: Metrics) -> Metrics {
        let mean = |sum: f64, count: usize| (count > 0).then(|| sum / count as f64);
        let (sum, least, most, count) = self.importance;
        Metrics {
            kl: mean(self.kl.0, self.kl.1),
            clip_fraction: mean(self.clipped as f64, self.tokens),
            logprob_difference_mean: mean(self.differences.0, self.differences.2),
            logprob_difference_max: (self.differences.2 > 0).then_some(self.differences.1),
            importance_weight_mean: mean(sum, count),
            importance_weight_min: (count > 0).then_some(least),
            importance_weight_max: (count > 0).then_some(most),
            ..groups
        }
    }
}
