//! Held-out evaluation: the reward of one greedy completion an item (pass@1 where rewards are 0 and 1), and of sampled ones.

use serde::{Deserialize, Serialize};

use crate::{
    data::Dataset,
    error::TrainError,
    grader::Grader,
    policy::{Policy, RolloutRequest, Sequence, Stop},
    rng::{Purpose, Stream},
    sampling::{Group, check_stop, grade, logprobs, roll_out},
    settings::Settings,
    stats::Estimate,
};

/// How to evaluate. It never picks a checkpoint or a rate: it only reports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalSettings {
    /// Of the sampled completions: the training's.
    pub temperature: f32,
    /// Sampled completions an item; 0 leaves them out.
    pub samples: usize,
    /// Longest completion, in tokens.
    pub max_tokens: usize,
    /// Seed of the sampled completions and the intervals.
    pub seed: u64,
    /// Items handed to the policy at once; between two batches the evaluation can be stopped. It does not change the result.
    pub batch: usize,
}

impl EvalSettings {
    /// One greedy and one sampled completion an item, as the run samples.
    pub fn of(settings: &Settings) -> Self {
        Self {
            temperature: settings.temperature,
            samples: usize::from(settings.temperature > 0.0),
            max_tokens: settings.max_completion_tokens,
            seed: settings.seed,
            batch: 32,
        }
    }
}

/// One completion of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalCompletion {
    /// The item, an index from 0.
    pub item: usize,
    /// None: the greedy one.
    pub sample: Option<usize>,
    /// The completion's text.
    pub text: String,
    /// Its reward.
    pub reward: f32,
    /// Its length.
    pub tokens: usize,
    /// False when it was cut off.
    pub finished: bool,
}

/// What an evaluation found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The mean reward of the greedy completions: pass@1 where rewards are 0 and 1.
    pub greedy: Estimate,
    /// The mean over items of each one's mean sampled reward; none without samples.
    pub sampled: Option<Estimate>,
    /// Share of completions that were cut off.
    pub truncated: f64,
    /// Every completion, items in order, the greedy one first.
    pub completions: Vec<EvalCompletion>,
    /// The greedy reward of each item.
    #[serde(skip)]
    pub scores: Vec<f64>,
}

/// Evaluates an adapter. `progress` hears how many items are done.
pub fn evaluate(
    policy: &mut dyn Policy,
    grader: &dyn Grader,
    data: &Dataset,
    numbers: &[f32],
    settings: &EvalSettings,
    stop: &Stop,
    progress: &mut dyn FnMut(usize),
) -> Result<Evaluation, TrainError> {
    let mut completions = Vec::new();
    let (mut scores, mut sampled) = (Vec::new(), Vec::new());
    let indices: Vec<usize> = (0..data.len()).collect();
    for batch in indices.chunks(settings.batch.max(1)) {
        let groups = evaluate_batch(policy, grader, data, numbers, settings, batch, stop)?;
        for group in groups {
            let rewards: Vec<f64> = group.rewards().into_iter().map(f64::from).collect();
            scores.push(rewards[0]);
            if settings.samples > 0 {
                sampled.push(rewards[1..].iter().sum::<f64>() / settings.samples as f64);
            }
            let item = group.example;
            completions.extend(group.completions.into_iter().enumerate().map(|(index, it)| EvalCompletion {
                item,
                sample: index.checked_sub(1),
                tokens: it.rollout.tokens.len(),
                finished: it.rollout.finished,
                text: it.rollout.text,
                reward: it.grade.reward,
            }));
        }
        progress(scores.len());
    }
    let truncated = completions.iter().filter(|completion| !completion.finished).count() as f64;
    Ok(Evaluation {
        greedy: Estimate::of(&scores, settings.seed),
        sampled: (settings.samples > 0).then(|| Estimate::of(&sampled, settings.seed)),
        truncated: truncated / completions.len().max(1) as f64,
        completions,
        scores,
    })
}

/// For each item a group: the greedy completion, then the sampled ones.
fn evaluate_batch(
    policy: &mut dyn Policy,
    grader: &dyn Grader,
    data: &Dataset,
    numbers: &[f32],
    settings: &EvalSettings,
    batch: &[usize],
    stop: &Stop,
) -> Result<Vec<Group>, TrainError> {
    let request = |example: usize, seeds: Vec<u64>, temperature: f32| RolloutRequest {
        numbers,
        prompt: &data.examples[example].prompt,
        seeds,
        max_tokens: settings.max_tokens,
        temperature,
    };
    let mut requests: Vec<RolloutRequest<'_>> = Vec::new();
    let mut examples = Vec::new();
    for &example in batch {
        requests.push(request(example, vec![0], 0.0));
        examples.push(example);
        if settings.samples > 0 {
            let mut stream = Stream::new(settings.seed, Purpose::Evaluation, example as u64);
            let seeds = (0..settings.samples).map(|_| stream.bits()).collect();
            requests.push(request(example, seeds, settings.temperature));
            examples.push(example);
        }
    }
    let rollouts = roll_out(policy, data, &requests, &examples, stop)?;
    let groups = grade(grader, data, rollouts, stop)?;
    let mut joined: Vec<Group> = Vec::new();
    for group in groups {
        match joined.last_mut().filter(|last| last.example == group.example) {
            Some(last) => last.completions.extend(group.completions),
            None => joined.push(group),
        }
    }
    Ok(joined)
}

/// The cross-entropy of held-out demonstrations, nats a token: an sft run's other measure. The data must hold demonstrations.
pub fn demonstration_loss(
    policy: &mut dyn Policy,
    data: &Dataset,
    numbers: &[f32],
    batch: usize,
    stop: &Stop,
) -> Result<f64, TrainError> {
    let (mut sum, mut tokens) = (0.0, 0usize);
    for examples in data.examples.chunks(batch.max(1)) {
        let sequences: Vec<_> =
            examples.iter().map(|example| Sequence { prompt: &example.prompt, completion: &example.target }).collect();
        let logprobs = logprobs(policy, numbers, &sequences, 1.0, stop)?;
        sum -= logprobs.iter().flatten().map(|&logprob| f64::from(logprob)).sum::<f64>();
        tokens += logprobs.iter().map(Vec::len).sum::<usize>();
    }
    Ok(sum / tokens.max(1) as f64)
}

/// The last word on a run: what is published against what the base does, on held-out items.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FinalReport {
    /// All numbers zero: the base, on this server.
    pub zero: Evaluation,
    /// The adapter as it is published: its numbers rounded.
    pub adapter: Evaluation,
    /// The adapter before rounding, where it was asked for.
    pub full_precision: Option<Evaluation>,
    /// The gain of the greedy reward over the base, item by item.
    pub gain: Estimate,
}

/// Evaluates the base, the rounded adapter and, if asked, the adapter before rounding, with the same completions' seeds.
#[allow(clippy::too_many_arguments)]
pub fn final_report(
    policy: &mut dyn Policy,
    grader: &dyn Grader,
    data: &Dataset,
    numbers: &[f32],
    full_precision: bool,
    settings: &EvalSettings,
    stop: &Stop,
    progress: &mut dyn FnMut(usize),
) -> Result<FinalReport, TrainError> {
    let mut done = 0;
    let mut one = |numbers: &[f32]| {
        check_stop(stop)?;
        let result = evaluate(policy, grader, data, numbers, settings, stop, &mut |items| progress(done + items));
        done += data.len();
        result
    };
    let zero = one(&vec![0.0; numbers.len()])?;
    let adapter = one(&round_to_bf16(numbers))?;
    let full_precision = if full_precision { Some(one(numbers)?) } else { None };
    let gain = Estimate::of_gain(&zero.scores, &adapter.scores, settings.seed);
    Ok(FinalReport { zero, adapter, full_precision, gain })
}

/// The nearest bf16 values, ties to even: what 26 bytes hold. The numbers are finite.
pub fn round_to_bf16(numbers: &[f32]) -> Vec<f32> {
    let round = |number: &f32| {
        let bits = number.to_bits();
        f32::from_bits(bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
    };
    numbers.iter().map(round).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_nearest_even() {
        for (x, want) in [
            (1.0f32, 1.0f32),
            (1.0 + 1.0 / 256.0, 1.0),
            (1.0 + 3.0 / 256.0, 1.0 + 4.0 / 256.0),
            (1.0 + 1.01 / 256.0, 1.0 + 2.0 / 256.0),
            (-0.05, -0.050_048_828),
            (0.0, 0.0),
        ] {
            assert_eq!(round_to_bf16(&[x]), [want], "{x}");
        }
    }
}
