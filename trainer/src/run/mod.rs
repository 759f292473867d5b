//! A run: step by step, each step a transaction. What a step needs is in the state (numbers, optimiser, counters), what it draws is a function of seed and counters, so a checkpoint after any step goes on
//! as if nothing had happened.

mod checkpoint;
mod es;
mod grpo;
mod learn;
mod monitor;
mod sft;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

pub use checkpoint::{Checkpoint, CheckpointError, State};
pub use monitor::End;
use monitor::Monitor;

use crate::{
    data::Dataset,
    error::TrainError,
    grader::{Grade, GradeCall, Grader, GraderError},
    metrics::{Metrics, Notice, Sample, Timing},
    optimizer::{Adam, norm},
    policy::{Policy, Stop},
    rng::{Purpose, Stream},
    sampling::{Graded, Group},
    settings::{MethodSettings, Settings},
};

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    /// Its metrics.
    pub metrics: Metrics,
    /// Its time.
    pub timing: Timing,
    /// Its graded completions.
    pub samples: Vec<Sample>,
    /// What the job's owner should hear.
    pub notices: Vec<Notice>,
    /// Set after the last step: why it is the last.
    pub end: Option<End>,
}

/// A training run over a dataset.
#[derive(Debug, Clone)]
pub struct Run {
    settings: Settings,
    data: Dataset,
    state: State,
    order: Order,
}

/// What a method's step hands back: everything that changes.
struct Outcome {
    numbers: Vec<f32>,
    adam: Adam,
    drawn: u64,
    metrics: Metrics,
    groups: Vec<Group>,
}

/// What a method's step works with.
struct Step<'a> {
    settings: &'a Settings,
    data: &'a Dataset,
    state: &'a State,
    order: &'a mut Order,
    policy: &'a mut dyn Policy,
    grader: &'a dyn Grader,
    stop: &'a Stop,
    clock: Clock,
}

impl Run {
    /// A new run from these numbers (zeros, or an adapter to go on from).
    pub fn new(settings: Settings, data: Dataset, numbers: Vec<f32>) -> Result<Self, TrainError> {
        let adam = Adam::new(numbers.len());
        let state = State { step: 0, drawn: 0, numbers, adam, monitor: Monitor::default(), end: None };
        Self::with_state(settings, data, state)
    }

    fn with_state(settings: Settings, data: Dataset, state: State) -> Result<Self, TrainError> {
        if state.numbers.is_empty() || state.numbers.iter().any(|number| !number.is_finite()) {
            return Err(TrainError::Invalid("the numbers must be finite, and at least one".to_owned()));
        }
        if settings.method == MethodSettings::Sft
            && let Some(example) = data.examples.iter().find(|example| example.target.is_empty())
        {
            return Err(TrainError::Invalid(format!("{} has no demonstration: sft needs one", example.place)));
        }
        let order = Order::new(settings.seed, data.len());
        Ok(Self { settings, data, state, order })
    }

    /// One step. An error leaves the run as it was. The grader is not asked in an sft run ([`NoGrader`] will do).
    pub fn step(
        &mut self,
        policy: &mut dyn Policy,
        grader: &dyn Grader,
        stop: &Stop,
    ) -> Result<StepReport, TrainError> {
        if self.state.end.is_some() {
            return Err(TrainError::Ended);
        }
        if policy.numbers() != self.state.numbers.len() {
            let message = format!("the run has {} numbers, the policy {}", self.state.numbers.len(), policy.numbers());
            return Err(TrainError::Invalid(message));
        }
        let mut step = Step {
            settings: &self.settings,
            data: &self.data,
            state: &self.state,
            order: &mut self.order,
            policy,
            grader,
            stop,
            clock: Clock::start(),
        };
        let outcome = match &self.settings.method {
            MethodSettings::Grpo(grpo) => step.grpo(grpo)?,
            MethodSettings::Es(es) => step.es(es)?,
            MethodSettings::Sft => step.sft()?,
        };
        let timing = step.clock.finish(outcome.metrics.tokens);
        Ok(self.commit(outcome, timing))
    }

    fn commit(&mut self, outcome: Outcome, timing: Timing) -> StepReport {
        let mut metrics = outcome.metrics;
        metrics.learning_rate = self.settings.learning_rate.at(self.state.step);
        metrics.numbers_norm = norm(&outcome.numbers);
        self.state.step += 1;
        self.state.drawn = outcome.drawn;
        self.state.numbers = outcome.numbers;
        self.state.adam = outcome.adam;
        let step = self.state.step;
        let (notices, mut end) = self.state.monitor.observe(step, &metrics, &self.settings);
        if end.is_none() && step >= self.settings.steps {
            end = Some(End::Steps);
        }
        self.state.end.clone_from(&end);
        let samples = outcome.groups.into_iter().flat_map(|group| self.samples(group)).collect();
        StepReport { step, metrics, timing, samples, notices, end }
    }

    fn samples(&self, group: Group) -> Vec<Sample> {
        let place = self.data.examples[group.example].place;
        let sample = |it: Graded| Sample {
            item: group.example,
            place,
            tokens: it.rollout.tokens.len(),
            finished: it.rollout.finished,
            text: it.rollout.text,
            reward: it.grade.reward,
            parts: it.grade.parts,
        };
        group.completions.into_iter().map(sample).collect()
    }

    /// The plan.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The master numbers, f32.
    pub fn numbers(&self) -> &[f32] {
        &self.state.numbers
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.state.step
    }

    /// Why the run is over, once it is.
    pub fn end(&self) -> Option<&End> {
        self.state.end.as_ref()
    }

    /// Is it time for a checkpoint: every `checkpoint_every` steps, and at the end?
    pub fn checkpoint_due(&self) -> bool {
        self.state.end.is_some() || self.state.step.is_multiple_of(self.settings.checkpoint_every)
    }

    /// All that is needed to go on, here or after a crash.
    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint::new(&self.settings, &self.data, &self.state)
    }

    /// Goes on from a checkpoint. It must be of these settings and this data.
    pub fn resume(checkpoint: Checkpoint, settings: &Settings, data: Dataset) -> Result<Self, CheckpointError> {
        let state = checkpoint.into_state(settings, &data)?;
        Self::with_state(settings.clone(), data, state).map_err(|error| CheckpointError(error.to_string()))
    }
}

/// The order in which prompts are drawn: every epoch all of them, in an order of its own.
#[derive(Debug, Clone)]
struct Order {
    seed: u64,
    items: usize,
    epoch: Option<(u64, Vec<usize>)>,
}

impl Order {
    fn new(seed: u64, items: usize) -> Self {
        Self { seed, items, epoch: None }
    }

    /// The item at a position of the endless sequence of epochs.
    fn item(&mut self, position: u64) -> usize {
        let (epoch, index) = (position / self.items as u64, (position % self.items as u64) as usize);
        match &self.epoch {
            Some((current, order)) if *current == epoch => order[index],
            _ => {
                let order = Stream::new(self.seed, Purpose::Shuffle, epoch).permutation(self.items);
                let item = order[index];
                self.epoch = Some((epoch, order));
                item
            }
        }
    }
}

/// Seeds of the completions of the prompt drawn at a position.
fn rollout_seeds(seed: u64, position: u64, samples: usize) -> Vec<u64> {
    let mut stream = Stream::new(seed, Purpose::Rollout, position);
    (0..samples).map(|_| stream.bits()).collect()
}

/// Where a step's time goes.
struct Clock {
    start: Instant,
    last: Instant,
    rollout: Duration,
    grading: Duration,
    learning: Duration,
}

impl Clock {
    fn start() -> Self {
        let now = Instant::now();
        Self { start: now, last: now, rollout: Duration::ZERO, grading: Duration::ZERO, learning: Duration::ZERO }
    }

    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.last, now)
    }

    fn rolled_out(&mut self) {
        let lap = self.lap();
        self.rollout += lap;
    }

    fn graded(&mut self) {
        let lap = self.lap();
        self.grading += lap;
    }

    fn finish(mut self, tokens: u64) -> Timing {
        let lap = self.lap();
        self.learning += lap;
        let seconds = (self.last - self.start).as_secs_f64();
        Timing {
            rollout_seconds: self.rollout.as_secs_f64(),
            grading_seconds: self.grading.as_secs_f64(),
            learning_seconds: self.learning.as_secs_f64(),
            tokens_per_second: if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 },
        }
    }
}

/// The grader of a job that has none.
#[derive(Debug, Clone, Copy)]
pub struct NoGrader;

impl Grader for NoGrader {
    fn grade(&self, _call: GradeCall<'_>) -> Result<Grade, GraderError> {
        Err(GraderError::Failed("this job has no grader".to_owned()))
    }

    fn check_item(&self, _item: &serde_json::Value) -> Result<(), String> {
        Ok(())
    }
}
