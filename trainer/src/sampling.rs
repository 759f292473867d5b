//! Rolling out and grading, for training and evaluation alike: the answers of policy and grader are checked here, once.

use crate::{
    data::{Dataset, Example, Place},
    error::TrainError,
    grader::{Grade, GradeCall, Grader},
    policy::{Policy, Rollout, RolloutRequest, Sequence, Stop},
};

/// A graded completion.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Graded {
    pub(crate) rollout: Rollout,
    pub(crate) grade: Grade,
}

/// The completions of one request, and of which example.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Group {
    pub(crate) example: usize,
    pub(crate) completions: Vec<Graded>,
}

impl Group {
    pub(crate) fn rewards(&self) -> Vec<f32> {
        self.completions.iter().map(|completion| completion.grade.reward).collect()
    }
}

/// Rolls out requests and grades what comes back. `examples[i]` is the dataset's index of request i.
pub(crate) fn roll_out(
    policy: &mut dyn Policy,
    data: &Dataset,
    requests: &[RolloutRequest<'_>],
    examples: &[usize],
    stop: &Stop,
) -> Result<Vec<(usize, Vec<Rollout>)>, TrainError> {
    check_stop(stop)?;
    let groups = policy.rollout(requests)?;
    if groups.len() != requests.len() {
        return Err(TrainError::Policy(format!("{} requests gave {} groups", requests.len(), groups.len())));
    }
    for (request, group) in requests.iter().zip(&groups) {
        if group.len() != request.seeds.len() {
            return Err(TrainError::Policy(format!("{} seeds gave {} completions", request.seeds.len(), group.len())));
        }
        for rollout in group {
            let ok = rollout.tokens.len() == rollout.logprobs.len() && rollout.tokens.len() <= request.max_tokens;
            if !ok || rollout.logprobs.iter().any(|logprob| !logprob.is_finite()) {
                let message =
                    "a completion is longer than asked for, or its log-probs are not one finite number a token";
                return Err(TrainError::Policy(message.to_owned()));
            }
        }
    }
    debug_assert!(examples.iter().all(|&example| example < data.len()));
    Ok(examples.iter().copied().zip(groups).collect())
}

/// Grades completions.
pub(crate) fn grade(
    grader: &dyn Grader,
    data: &Dataset,
    rollouts: Vec<(usize, Vec<Rollout>)>,
    stop: &Stop,
) -> Result<Vec<Group>, TrainError> {
    check_stop(stop)?;
    let flat: Vec<(&Example, &Rollout)> = rollouts
        .iter()
        .flat_map(|(example, group)| group.iter().map(|rollout| (&data.examples[*example], rollout)))
        .collect();
    let calls: Vec<GradeCall<'_>> =
        flat.iter().map(|(example, rollout)| GradeCall { item: &example.fields, output_text: &rollout.text }).collect();
    let place = |index: usize| flat.get(index).map_or(Place::All, |(example, _)| example.place);
    let grades = grader.grade_batch(&calls, stop).map_err(|(index, error)| TrainError::grader(place(index), error))?;
    if grades.len() != calls.len() {
        let message = format!("{} completions got {} grades", calls.len(), grades.len());
        return Err(TrainError::Grader { place: Place::All, message });
    }
    if let Some(index) = grades.iter().position(|grade| !grade.reward.is_finite()) {
        let message = format!("the reward is {}", grades[index].reward);
        return Err(TrainError::Grader { place: place(index), message });
    }
    let mut grades = grades.into_iter();
    let mut graded = |rollout| Some(Graded { rollout, grade: grades.next()? });
    Ok(rollouts
        .into_iter()
        .map(|(example, group)| Group { example, completions: group.into_iter().filter_map(&mut graded).collect() })
        .collect())
}

/// Log-probs of sequences, checked.
pub(crate) fn logprobs(
    policy: &mut dyn Policy,
    numbers: &[f32],
    sequences: &[Sequence<'_>],
    temperature: f32,
    stop: &Stop,
) -> Result<Vec<Vec<f32>>, TrainError> {
    check_stop(stop)?;
    let logprobs = policy.logprobs(numbers, sequences, temperature)?;
    check_logprobs(sequences, &logprobs)?;
    Ok(logprobs)
}

/// One log-prob a token, a vector a sequence.
pub(crate) fn check_logprobs(sequences: &[Sequence<'_>], logprobs: &[Vec<f32>]) -> Result<(), TrainError> {
    let fits = sequences.len() == logprobs.len()
        && sequences.iter().zip(logprobs).all(|(sequence, logprobs)| sequence.completion.len() == logprobs.len());
    if fits { Ok(()) } else { Err(TrainError::Policy("log-probs are not one a completion token".to_owned())) }
}

pub(crate) fn check_stop(stop: &Stop) -> Result<(), TrainError> {
    if stop.is_stopped() { Err(TrainError::Stopped) } else { Ok(()) }
}
