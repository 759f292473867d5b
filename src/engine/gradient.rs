//! Gradients between the steps: units of work of a [`GradientTask`], as many as those whom somebody waits for leave time for.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Weak, mpsc},
    time::{Duration, Instant},
};

use super::worker::message_of;
use crate::model::{CoreGradient, GradientError, GradientJob, GradientTask, Model, ModelError, Stage};

/// What every log-prob weighs, given all of them: see [`GradientTask::set_weights`].
pub type Weigh = Box<dyn FnOnce(&[Vec<f32>]) -> Vec<Vec<f32>> + Send>;

/// What to differentiate.
pub struct GradientRequest {
    /// Sequences and adapter.
    pub job: GradientJob,
    /// Called once between the way there and the way back, on the engine's thread: it must be quick. Not called if the job is not to differentiate.
    pub weigh: Weigh,
}

/// What came out.
#[derive(Debug, Clone, PartialEq)]
pub struct Differentiated {
    /// Of every completion token, a vector a completion, nats.
    pub logprobs: Vec<Vec<f32>>,
    /// The derivative by the cores, if it was wanted.
    pub gradient: Option<CoreGradient>,
}

/// Why nothing came out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GradientFailure {
    /// The engine stops.
    #[error("the engine has stopped")]
    Stopped,
    /// Under these numbers the model overflows.
    #[error("{0}")]
    NotFinite(String),
    /// The job does not fit the model, or the arithmetic failed.
    #[error("{0}")]
    Failed(String),
}

impl From<ModelError> for GradientFailure {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Gradient(GradientError::NotFinite) => Self::NotFinite(error.to_string()),
            error => Self::Failed(error.to_string()),
        }
    }
}

/// A gradient on its way. Dropping it ends the work.
#[derive(Debug)]
pub struct GradientAnswer {
    answer: mpsc::Receiver<Result<Differentiated, GradientFailure>>,
    _alive: Arc<()>,
}

impl GradientAnswer {
    /// Waits so long for the answer, which comes once. None: not yet.
    pub fn wait(&self, timeout: Duration) -> Option<Result<Differentiated, GradientFailure>> {
        match self.answer.recv_timeout(timeout) {
            Ok(answer) => Some(answer),
            Err(mpsc::RecvTimeoutError::Timeout) => None,
            Err(mpsc::RecvTimeoutError::Disconnected) => Some(Err(GradientFailure::Stopped)),
        }
    }
}

/// A request and the way back to who asked.
pub(super) struct Gradient {
    work: Work,
    weigh: Option<Weigh>,
    answer: mpsc::Sender<Result<Differentiated, GradientFailure>>,
    alive: Weak<()>,
}

enum Work {
    Asked(Option<GradientJob>),
    Begun(Box<GradientTask>),
}

impl std::fmt::Debug for Gradient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gradient").field("begun", &matches!(self.work, Work::Begun(_))).finish_non_exhaustive()
    }
}

/// A request for the worker, and where its answer comes.
pub(super) fn gradient(request: GradientRequest) -> (Gradient, GradientAnswer) {
    let (sender, answer) = mpsc::channel();
    let alive = Arc::new(());
    let GradientRequest { job, weigh } = request;
    let work = Work::Asked(Some(job));
    let gradient = Gradient { work, weigh: Some(weigh), answer: sender, alive: Arc::downgrade(&alive) };
    (gradient, GradientAnswer { answer, _alive: alive })
}

impl Gradient {
    /// About how many multiply-adds the next unit takes.
    fn upcoming(&self) -> u64 {
        match &self.work {
            Work::Asked(_) => 0,
            Work::Begun(task) => task.upcoming(),
        }
    }

    /// One unit of work; something at the end.
    fn advance(&mut self, model: &mut dyn Model) -> Result<Option<Differentiated>, ModelError> {
        let task = match &mut self.work {
            Work::Asked(job) => {
                let job = job.take().ok_or(GradientError::Failed)?;
                self.work = Work::Begun(Box::new(model.begin_gradient(job)?));
                return Ok(None);
            }
            Work::Begun(task) => task,
        };
        if task.stage() == Stage::Weights {
            let weigh = self.weigh.take().ok_or(GradientError::Failed)?;
            let weights = weigh(task.logprobs().unwrap_or_default());
            task.set_weights(&weights)?;
        } else {
            model.advance_gradient(task, 0)?;
        }
        let done = |task: &GradientTask| Differentiated {
            logprobs: task.logprobs().unwrap_or_default().to_vec(),
            gradient: task.gradient().cloned(),
        };
        Ok((task.stage() == Stage::Done).then(|| done(task)))
    }
}

/// The gradients of an engine: one at a time, so that only one needs memory, in the order in which they came. Each job waits for its answer before it asks again, so
/// jobs take turns.
#[derive(Debug, Default)]
pub(super) struct Gradients {
    queue: VecDeque<Gradient>,
    /// Seconds that steps have earned and units have not spent; below zero when a unit took longer than it should.
    credit: f64,
    /// Seconds that a multiply-add takes, about: a moving average over units.
    pace: f64,
    /// When the last unit ended, or the first of these gradients came.
    moved: Option<Instant>,
}

/// A unit that no step earned for so long is done all the same: quick steps and one large unit must not hold up a job for ever. One pause in so long is
/// rare enough to stay out of the 99th percentile of what clients wait for a token.
const PATIENCE: Duration = Duration::from_secs(1);

/// What steps leave for gradients.
#[derive(Debug)]
pub(super) struct Earnings {
    /// See `EngineConfig::gradient_share`.
    share: f64,
    /// Seconds that the interactive rows of a step take that computes no prompt: a moving average.
    usual: f64,
}

/// A step that computes prompts leaves at least this part of what it would else: a server that does nothing but take prompts trains too.
const LEAST: f64 = 0.25;

impl Earnings {
    /// None yet.
    pub(super) fn new(share: f64) -> Self {
        Self { share, usual: 0.0 }
    }

    /// Seconds for gradients after a step: what its interactive rows took, of which there are so many beside background ones, times the share; all of it
    /// when there were none. Whoever waits for a token behind a step with a prompt has waited longer than usual already: that comes off the pause.
    pub(super) fn of(&mut self, time: f64, interactive: usize, background: usize, prefills: bool) -> f64 {
        if interactive == 0 {
            return time;
        }
        let own = time * interactive as f64 / (interactive + background) as f64;
        if !prefills {
            self.usual += if self.usual == 0.0 { own } else { NEWEST * (own - self.usual) };
            return self.share * own;
        }
        let late = (own - self.usual).max(0.0);
        (self.share * self.usual - late).max(LEAST * self.share * own)
    }
}

/// Is a unit to be done whatever it costs?
fn is_due(earned: Option<f64>, waited: Duration) -> bool {
    earned.is_none_or(|earned| earned > 0.0 && waited >= PATIENCE)
}

/// How much of the newest makes a moving average.
const NEWEST: f64 = 0.1;
/// Units that cost less say nothing about the pace.
const TELLING: u64 = 10_000_000;

impl Gradients {
    pub(super) fn push(&mut self, gradient: Gradient) {
        self.queue.push_back(gradient);
    }

    /// Is there none that somebody waits for?
    pub(super) fn is_empty(&mut self) -> bool {
        self.queue.retain(|gradient| gradient.alive.strong_count() > 0);
        self.queue.is_empty()
    }

    /// Tells everybody that the engine stops.
    pub(super) fn stop(&mut self) {
        for gradient in self.queue.drain(..) {
            let _ = gradient.answer.send(Err(GradientFailure::Stopped));
        }
    }

    /// Does units of work: one if no step was run, else about as many as take `earned` seconds. Returns how many gradients ended.
    pub(super) fn run(&mut self, model: &mut dyn Model, earned: Option<f64>) -> usize {
        let mut ended = 0;
        if self.is_empty() {
            (self.credit, self.moved) = (0.0, None);
            return ended;
        }
        let waited = self.moved.get_or_insert_with(Instant::now).elapsed();
        match earned {
            // What was saved up in one step is not for the next: nobody shall wait longer than a step for it.
            Some(earned) => self.credit = (self.credit + earned).min(earned),
            None => self.credit = 0.0,
        }
        let mut first = is_due(earned, waited);
        while let Some(cost) = self.queue.front().map(Gradient::upcoming) {
            // A unit begins when at least half of it is paid for, so that pauses are right on average.
            if !first && self.credit <= 0.5 * cost as f64 * self.pace {
                break;
            }
            first = false;
            let began = Instant::now();
            ended += usize::from(self.unit(model));
            let took = began.elapsed().as_secs_f64();
            self.moved = Some(Instant::now());
            if cost >= TELLING {
                let pace = took / cost as f64;
                self.pace += if self.pace == 0.0 { pace } else { NEWEST * (pace - self.pace) };
            }
            if earned.is_some() {
                self.credit -= took;
            }
        }
        ended
    }

    /// One unit of the first; true if that was its last. A failure, even a panic, ends this gradient and nothing else.
    fn unit(&mut self, model: &mut dyn Model) -> bool {
        let Some(gradient) = self.queue.front_mut() else { return false };
        let answer = match catch_unwind(AssertUnwindSafe(|| gradient.advance(model))) {
            Ok(Ok(None)) => return false,
            Ok(Ok(Some(done))) => Ok(done),
            Ok(Err(error)) => Err(error.into()),
            Err(panic) => Err(GradientFailure::Failed(message_of(panic.as_ref()))),
        };
        if let Err(error) = &answer {
            tracing::warn!(%error, "a gradient failed");
        }
        let _ = gradient.answer.send(answer);
        self.queue.pop_front();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_earns_its_interactive_part_times_the_share() {
        let mut earnings = Earnings::new(0.5);
        assert_eq!(earnings.of(0.008, 0, 4, true), 0.008, "nobody waits");
        assert_eq!(earnings.of(0.008, 4, 0, false), 0.004);
        assert_eq!(earnings.of(0.008, 1, 3, false), 0.001);
    }

    #[test]
    fn a_unit_that_nothing_pays_for_is_done_after_a_while() {
        assert!(is_due(None, Duration::ZERO), "nobody is served");
        assert!(!is_due(Some(1e-6), Duration::from_millis(900)));
        assert!(is_due(Some(1e-6), Duration::from_millis(1000)));
        assert!(!is_due(Some(0.0), Duration::from_secs(9)), "the operator wants none beside others");
    }

    #[test]
    fn what_a_prompt_takes_comes_off_the_pause() {
        let mut earnings = Earnings::new(1.0);
        assert_eq!(earnings.of(0.004, 8, 0, false), 0.004);
        let pause = earnings.of(0.006, 30, 0, true);
        assert!((pause - 0.002).abs() < 1e-12, "6 ms and the pause are as long as 4 ms and theirs: {pause}");
        assert!((earnings.of(0.020, 99, 0, true) - 0.005).abs() < 1e-12, "a quarter at least");
        assert!((earnings.of(0.003, 30, 0, true) - 0.004).abs() < 1e-12, "a quick one is as the usual");
        assert_eq!(Earnings::new(1.0).of(0.020, 99, 0, true), 0.005, "where nothing but prompts comes");
        assert_eq!(Earnings::new(0.0).of(0.020, 99, 0, true), 0.0);
    }
}
