//! The one loop: receive, schedule, run, sample, commit, send.

mod count;
mod end;

use std::{
    any::Any,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, TryRecvError},
    },
    time::{Duration, Instant},
};

use super::{
    api::{Event, FinishReason, Priority, Request, TokenOut},
    batch::{Job, Jobs, Step},
    events::Wakes,
    gate::{Gate, Health, Outbox},
    gradient::{Earnings, Gradient, Gradients},
    logits::LogitsError,
    sampler::{Counts, Sampler},
    scheduler::{Chunk, Limits, Plan, Scheduler},
    sequence::{Sequence, SequenceId},
    stats::Stats,
    trace::Trace,
};
use crate::{
    kernel::Floats,
    model::{Model, ModelError},
    types::CacheSalt,
};

/// After so many failed steps without a good one the engine gives up: the device is gone, and a restart may help.
const MAX_FAILED_STEPS: usize = 16;

/// What a handle asks of the worker.
#[derive(Debug)]
pub(super) enum Command {
    /// Run these.
    Submit(Vec<Submission>),
    /// Work on this between steps.
    Differentiate(Gradient),
    /// Forget the cached blocks of this salt.
    Purge(CacheSalt),
    /// Finish what is here, until then at most, and end.
    Shutdown(Instant),
}

/// A checked request on its way to the worker.
#[derive(Debug)]
pub(super) struct Submission {
    /// The request; its prompt has been taken out.
    pub(super) request: Request,
    /// The prompt's place in the scheduler; the worker sets its id.
    pub(super) sequence: Sequence,
    /// Where its events go.
    pub(super) outbox: Outbox,
    /// When it came.
    pub(super) submitted: Instant,
    /// Told when it ends.
    pub(super) trace: Trace,
}

/// The engine's thread.
pub(super) struct Worker {
    model: Box<dyn Model>,
    limits: Limits,
    scheduler: Scheduler,
    jobs: Jobs,
    gradients: Gradients,
    earnings: Earnings,
    next_number: u64,
    commands: Receiver<Command>,
    gate: Arc<Gate>,
    stats: Arc<Stats>,
    sampler: Sampler,
    // What a step needs, kept from the one before: a step in which nothing grows allocates nothing but what it sends.
    plan: Plan,
    step: Step,
    logits: Floats,
    /// Tasks to be woken when the step is over.
    wakes: Wakes,
    /// Set once the engine is stopping; the deadline, if there is one.
    draining: Option<Option<Instant>>,
    failed_steps: usize,
}

impl Worker {
    /// A worker that has not begun.
    pub(super) fn new(
        model: Box<dyn Model>,
        limits: Limits,
        gradient_share: f64,
        commands: Receiver<Command>,
        gate: Arc<Gate>,
        stats: Arc<Stats>,
    ) -> Self {
        let scheduler = Scheduler::new(limits, model.kv_blocks());
        let worker = Self {
            model,
            limits,
            scheduler,
            jobs: Jobs::new(),
            gradients: Gradients::default(),
            earnings: Earnings::new(gradient_share),
            next_number: 0,
            commands,
            gate,
            stats,
            sampler: Sampler::new(),
            plan: Plan::default(),
            step: Step::default(),
            logits: Floats::default(),
            wakes: Wakes::default(),
            draining: None,
            failed_steps: 0,
        };
        worker.report();
        worker
    }

    /// Runs until it is told to stop, until every handle is gone, or until it gives up.
    pub(super) fn run(mut self) {
        loop {
            match catch_unwind(AssertUnwindSafe(|| self.turn())) {
                Ok(true) => {}
                Ok(false) => break,
                Err(panic) => self.rebuild(&message_of(panic.as_ref())),
            }
            if self.failed_steps >= MAX_FAILED_STEPS {
                tracing::error!(steps = self.failed_steps, "the engine gives up: no step succeeds any more");
                self.gate.set(Health::Dead);
                break;
            }
        }
        self.leave();
    }

    /// Fails whatever is left, here or still in the channel; only then may a shutdown return.
    fn leave(mut self) {
        self.gate.set(Health::Stopped);
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
        }
        self.fail_all("the engine stopped before the request was done");
        self.gradients.stop();
        self.report();
        self.wakes.deliver();
        let gate = Arc::clone(&self.gate);
        drop(self);
        gate.leave();
    }

    /// One round; false at the end.
    pub(super) fn turn(&mut self) -> bool {
        let Some(mut clock) = self.receive() else { return false };
        let stats = Arc::clone(&self.stats);
        self.cancel_deserted();
        self.expire(clock.last);
        stats.phases.receive.add(clock.lap());
        let mut earned = None;
        if !self.jobs.is_empty() {
            let mut plan = std::mem::take(&mut self.plan);
            let began = clock.last;
            self.scheduler.schedule(&mut plan);
            self.count_plan(&plan);
            stats.phases.schedule.add(clock.lap());
            if !plan.chunks.is_empty()
                && let Some(forward) = self.run_step(&plan, &mut clock)
            {
                let time = clock.last - began;
                self.count_step(&plan, time, forward);
                earned = Some(self.earned(&plan, time));
            }
            self.plan = plan;
        }
        self.report();
        stats.wakes.add(self.wakes.len());
        self.wakes.deliver();
        stats.phases.wake.add(clock.lap());
        stats.gradients.add(self.gradients.run(self.model.as_mut(), earned));
        let pause = clock.lap();
        stats.phases.gradient.add(pause);
        if earned.is_some() && !self.gradients.is_empty() {
            stats.gradient_pause.observe_time(pause);
        }
        true
    }

    /// Takes what handles sent; waits for it if there is nothing else to do. None when it is time to end, else a clock that began when the waiting ended.
    fn receive(&mut self) -> Option<Clock> {
        let first = if self.jobs.is_empty() && self.gradients.is_empty() && self.draining.is_none() {
            Some(self.commands.recv().ok()?)
        } else {
            None
        };
        let clock = Clock::start();
        first.into_iter().for_each(|command| self.obey(command));
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    self.draining.get_or_insert(None);
                    break;
                }
            }
        }
        let goes_on = match self.draining {
            None => true,
            Some(deadline) => !self.jobs.is_empty() && deadline.is_none_or(|deadline| Instant::now() < deadline),
        };
        goes_on.then_some(clock)
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submissions) => submissions.into_iter().for_each(|submission| self.add(submission)),
            Command::Differentiate(gradient) => self.gradients.push(gradient),
            Command::Purge(salt) => self.scheduler.purge(salt),
            Command::Shutdown(deadline) => {
                self.draining = Some(Some(deadline));
                // Their jobs go on with the next engine.
                self.gradients.stop();
            }
        }
    }

    fn add(&mut self, submission: Submission) {
        let Submission { request, mut sequence, outbox, submitted, trace } = submission;
        sequence.id = SequenceId { priority: request.priority, number: self.next_number };
        self.next_number += 1;
        let counts = Counts::for_request(&request.sampling, &sequence.tokens);
        let scores = request.prompt_logprobs.map(|_| vec![None]);
        self.jobs.insert(sequence.id, Job { request, outbox, submitted, token_at: None, counts, scores, trace });
        self.scheduler.add(sequence);
    }

    /// Runs a plan and says how long the model took. A failure, even a panic, in the model or the sampler ends the requests of this step and no other:
    /// nothing of the scheduler has changed by then, and blocks are published only after they were computed.
    fn run_step(&mut self, plan: &Plan, clock: &mut Clock) -> Option<Duration> {
        let stats = Arc::clone(&self.stats);
        self.step.build(plan, &self.scheduler, &self.jobs);
        stats.phases.build.add(clock.lap());
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            self.forward()?;
            let forward = clock.lap();
            stats.phases.forward.add(forward);
            self.sample(plan);
            Ok(forward)
        }));
        let failure = match outcome {
            Ok(Ok(forward)) => {
                stats.phases.sample.add(clock.lap());
                self.failed_steps = 0;
                self.commit(plan, clock.last);
                stats.phases.commit.add(clock.lap());
                return Some(forward);
            }
            Ok(Err(error)) => ModelError::to_string(&error),
            Err(panic) => message_of(panic.as_ref()),
        };
        tracing::error!(sequences = plan.chunks.len(), error = failure, "a step failed");
        self.failed_steps += 1;
        self.stats.failed_steps.add(1);
        for chunk in &plan.chunks {
            self.fail(chunk.id, format!("the step failed: {failure}"));
        }
        None
    }

    fn forward(&mut self) -> Result<(), ModelError> {
        // Not cleared before: the model may exchange this memory for its own, and then need not fill it anew.
        self.model.forward(&self.step.batch, &mut self.logits)?;
        let expected = self.step.batch.logits_rows.len() * self.model.vocab_size();
        if self.logits.len() != expected {
            let found = self.logits.len();
            return Err(ModelError::Unsupported(format!("the model returned {found} logits instead of {expected}")));
        }
        Ok(())
    }

    /// One answer a row of logits, made on the model's threads.
    fn sample(&mut self, plan: &Plan) {
        let Self { model, scheduler, jobs, sampler, step, logits, .. } = self;
        let question = |row| step.question(plan, scheduler, jobs, row);
        sampler.answer(logits, model.vocab_size(), &question, &mut |rows, work| model.parallel(rows, work));
    }

    /// Tells the scheduler and the clients what came out, and when.
    fn commit(&mut self, plan: &Plan, now: Instant) {
        let mut row = 0;
        for chunk in &plan.chunks {
            let rows = row..row + chunk.scores.len() + usize::from(chunk.sample);
            row = rows.end;
            if let Err(error) = self.commit_chunk(chunk, rows, now) {
                if let Some(job) = self.jobs.get(&chunk.id) {
                    tracing::error!(parent: &job.request.span, %error, "a request failed");
                }
                self.end_failed(chunk.id, "not_finite", Event::NotFinite);
            }
        }
    }

    /// `rows` are the rows of logits that are about this chunk. Fails, and then the request has to, if one of them cannot be read.
    fn commit_chunk(&mut self, chunk: &Chunk, rows: Range<usize>, now: Instant) -> Result<(), LogitsError> {
        let Some(job) = self.jobs.get_mut(&chunk.id) else { return Ok(()) };
        for answer in rows.clone().take(chunk.scores.len()).filter_map(|row| self.sampler.take(row)) {
            let (_, logprobs) = answer?;
            if let Some(scores) = &mut job.scores {
                scores.push(logprobs);
            }
        }
        let next = if chunk.sample { self.sampler.take(rows.end - 1).transpose()? } else { None };
        if let Some(scores) = job.scores.take_if(|_| chunk.last) {
            job.outbox.send(Event::Prompt(scores), &mut self.wakes);
        }
        self.scheduler.commit(chunk, next.as_ref().map(|&(token, _)| token));
        let Some((token, logprobs)) = next else {
            if chunk.last {
                self.finish(chunk.id, FinishReason::Length);
            }
            return Ok(());
        };
        let Some(sequence) = self.scheduler.get(chunk.id) else { return Ok(()) };
        let (generated, most) = (sequence.generated(), sequence.max_tokens);
        if generated == 1 {
            job.outbox.send(Event::Began { cached_tokens: sequence.cached.unwrap_or(0) }, &mut self.wakes);
            let waited = now.saturating_duration_since(job.submitted);
            job.trace.first_token = Some(waited);
            self.stats.first_token_seconds.observe_time(waited);
        }
        if let Some(before) = job.token_at.replace(now)
            && chunk.id.priority == Priority::Interactive
        {
            self.stats.between_tokens_seconds.observe_time(now.saturating_duration_since(before));
        }
        self.stats.generated_tokens.add(1);
        if let Some(counts) = &mut job.counts {
            counts.add(token);
        }
        let stop = job.request.stop_tokens.contains(&token);
        let vocab = self.model.vocab_size();
        let logits = job.request.capture_logits.then(|| self.logits[(rows.end - 1) * vocab..][..vocab].into());
        job.outbox.send(Event::Token(TokenOut { token, stop, logprobs, logits }), &mut self.wakes);
        if stop {
            self.finish(chunk.id, FinishReason::Stop);
        } else if generated == most {
            self.finish(chunk.id, FinishReason::Length);
        }
        Ok(())
    }

    /// After a panic outside of a step nothing about sequences and blocks can be trusted: all requests fail, the cache is forgotten.
    fn rebuild(&mut self, message: &str) {
        tracing::error!(message, "the engine's loop failed; it starts anew");
        self.failed_steps += 1;
        self.scheduler = Scheduler::new(self.limits, self.model.kv_blocks());
        self.fail_all(&format!("the engine failed: {message}"));
        self.wakes.deliver();
    }
}

/// Cuts the time of a round into laps, with nothing between them.
struct Clock {
    last: Instant,
}

impl Clock {
    fn start() -> Self {
        Self { last: Instant::now() }
    }

    /// Time since the lap before.
    fn lap(&mut self) -> Duration {
        let before = std::mem::replace(&mut self.last, Instant::now());
        self.last - before
    }
}

/// What a panic said.
pub(super) fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a panic without a message").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{
        handle::pair,
        tests::{adapted, config, prompt},
    };

    #[test]
    fn after_a_panic_in_the_loop_itself_it_starts_anew() {
        let (model, _) = crate::engine::tests::fake::Fake::model(32);
        let (handle, mut worker) = pair(model, config()).unwrap();
        let asked = adapted(prompt(40, 1), 2, 1);
        let mut first = handle.submit(asked.clone()).unwrap();
        assert!(worker.turn());
        worker.rebuild("lost count");
        assert!(matches!(first.try_recv().unwrap(), Event::Failed(message) if message.contains("lost count")));
        let mut second = handle.submit(asked).unwrap();
        (0..3).for_each(|_| assert!(worker.turn()));
        assert_eq!(second.try_recv().unwrap(), Event::Began { cached_tokens: 0 });
        assert!(matches!(second.try_recv().unwrap(), Event::Token(_)));
        assert!(matches!(second.try_recv().unwrap(), Event::Token(_)));
        let Event::Finished(_, usage) = second.try_recv().unwrap() else { panic!("not finished") };
        assert_eq!(usage.cached_tokens, 0, "the cache was forgotten");
        worker.report();
        assert_eq!(handle.stats().blocks_used.get(), 0);
        assert_eq!((handle.stats().failed.get(), handle.stats().finished.get()), (1, 1));
    }
}
