//! The way into the engine: checks a request, reserves its place, and hands it to the worker.

use std::{
    fmt,
    sync::{Arc, mpsc as commands},
    thread,
    time::{Duration, Instant},
};

use super::{
    api::{Priority, Request, SubmitError},
    events::{self, Events},
    gate::{Gate, Health, Outbox},
    gradient::{self, GradientAnswer, GradientRequest},
    prefix::Chain,
    scheduler::Limits,
    sequence::{Sequence, SequenceId, blocks_at_end},
    stats::Stats,
    trace::Trace,
    worker::{Command, Submission, Worker},
};
use crate::{kernel::BLOCK_TOKENS, model::Model, types::CacheSalt};

/// How long a shutdown waits beyond its deadline for a step that is still running.
const LAST_STEP: Duration = Duration::from_secs(10);

/// Nobody waits longer, and an `Instant` has an end.
const LONGEST_DRAIN: Duration = Duration::from_secs(24 * 3600);

/// What the engine may use.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Sequences that run at once; at least 1.
    pub max_batch: usize,
    /// Sequences that may wait beside `max_batch` running ones.
    pub max_queue: usize,
    /// Prompt and completion tokens of a sequence together.
    pub max_model_len: usize,
    /// Prompt rows in a step, beside one row of each decoding sequence; at least 1. It bounds how long a running stream waits for its next token.
    pub prefill_chunk: usize,
    /// The same in a step in which no interactive sequence decodes: nobody waits but for prompts. Less than `prefill_chunk` counts as that.
    pub idle_prefill_chunk: usize,
    /// Rows that background sequences may add to a step in which interactive ones have some.
    pub background_rows: usize,
    /// Time that gradients may take beside steps with interactive rows, as a multiple of what those rows take; at least 0.
    pub gradient_share: f64,
    /// The rank of the basis, which the model was packed with: cores are `rank x rank`.
    pub rank: usize,
    /// Sites that cores cover.
    pub sites: usize,
    /// May requests share KV blocks under equal salts?
    pub prefix_cache: bool,
}

/// The engine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A limit of 0.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// A share below 0.
    #[error("the share of gradients must be at least 0, not {0}")]
    Share(f64),
    /// The system gave no thread.
    #[error("the engine's thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
}

/// Starts engines.
#[derive(Debug)]
pub struct Engine;

impl Engine {
    /// Moves the model to a thread of its own and returns the way to it. The thread ends after [`Handle::shutdown`], or when all
    /// handles are gone and their requests done.
    pub fn start(model: Box<dyn Model>, config: EngineConfig) -> Result<Handle, StartError> {
        let (handle, worker) = pair(model, config)?;
        thread::Builder::new().name("engine".into()).spawn(move || worker.run())?;
        Ok(handle)
    }
}

/// A handle and the worker at its other end, which has not begun.
pub(super) fn pair(model: Box<dyn Model>, config: EngineConfig) -> Result<(Handle, Worker), StartError> {
    let least = [
        ("max_batch", config.max_batch),
        ("prefill_chunk", config.prefill_chunk),
        ("max_model_len", config.max_model_len),
        ("the number of KV blocks", model.kv_blocks()),
    ];
    if let Some((name, _)) = least.into_iter().find(|&(_, value)| value == 0) {
        return Err(StartError::Zero(name));
    }
    let (sender, receiver) = commands::channel();
    let gate = Arc::new(Gate::default());
    let limits = Limits {
        max_batch: config.max_batch,
        prefill_chunk: config.prefill_chunk,
        idle_prefill_chunk: config.idle_prefill_chunk.max(config.prefill_chunk),
        background_rows: config.background_rows,
    };
    if !(config.gradient_share >= 0.0 && config.gradient_share.is_finite()) {
        return Err(StartError::Share(config.gradient_share));
    }
    let share = config.gradient_share;
    let stats = Arc::new(Stats::new(limits.max_batch, limits.idle_prefill_chunk));
    let inner = Inner {
        commands: sender,
        gate: Arc::clone(&gate),
        stats: Arc::clone(&stats),
        vocab: model.vocab_size(),
        kv_blocks: model.kv_blocks(),
        config,
    };
    Ok((Handle { inner: Arc::new(inner) }, Worker::new(model, limits, share, receiver, gate, stats)))
}

struct Inner {
    /// Unbounded, but the gate bounds what is in it.
    commands: commands::Sender<Command>,
    gate: Arc<Gate>,
    stats: Arc<Stats>,
    vocab: usize,
    kv_blocks: usize,
    config: EngineConfig,
}

/// The engine, for everybody else. Cheap to clone; nothing here waits for a step except [`Handle::shutdown`].
#[derive(Clone)]
pub struct Handle {
    inner: Arc<Inner>,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("config", &self.inner.config).field("health", &self.health()).finish()
    }
}

impl Handle {
    /// Queues one request. See [`Handle::submit_many`].
    pub fn submit(&self, request: Request) -> Result<Events, SubmitError> {
        let mut events = self.submit_many(vec![request])?;
        events.pop().ok_or(SubmitError::Stopped)
    }

    /// Queues all of these requests or none, one receiver a request, in order. They may run in one step.
    ///
    /// # Errors
    /// `Invalid` if one of them can never run here, `QueueFull` if those of a priority would be more than `max_batch` running and `max_queue` waiting (a fourth more for keys
    /// that have no more than a sixteenth of these), `Stopped` after a shutdown or when the engine is dead.
    pub fn submit_many(&self, requests: Vec<Request>) -> Result<Vec<Events>, SubmitError> {
        let Inner { config, gate, stats, .. } = &*self.inner;
        if gate.health() != Health::Running {
            return Err(SubmitError::Stopped);
        }
        requests.iter().try_for_each(|request| self.check(request))?;
        let (count, most) = (requests.len(), config.max_batch + config.max_queue);
        if count > most {
            return Err(SubmitError::Invalid(format!(
                "{count} sequences at once, but the engine holds at most {most}"
            )));
        }
        let owner = |request: &Request| (request.priority, request.share.key);
        // Runs of one owner: as a rule there is one.
        let runs: Vec<_> =
            requests.chunk_by(|a, b| owner(a) == owner(b)).map(|run| (owner(&run[0]), run.len())).collect();
        for (at, &(owner, n)) in runs.iter().enumerate() {
            if !gate.reserve(owner, n, most) {
                runs[..at].iter().for_each(|&(owner, n)| gate.release(owner, n));
                stats.refused.add(count);
                let waiting = gate.in_flight(owner.0).saturating_sub(config.max_batch);
                return Err(SubmitError::QueueFull(waiting));
            }
        }
        let (submissions, events) = requests.into_iter().map(|request| self.prepare(request)).unzip();
        // A worker that has just ended drops what is sent to it.
        self.inner.commands.send(Command::Submit(submissions)).map_err(|_| SubmitError::Stopped)?;
        stats.accepted.add(count);
        Ok(events)
    }

    /// Asks for a gradient. It is computed between steps; nobody who waits for tokens waits much longer for it.
    ///
    /// # Errors
    /// `Stopped` after a shutdown or when the engine is dead; everything else is in the answer.
    pub fn differentiate(&self, request: GradientRequest) -> Result<GradientAnswer, SubmitError> {
        if self.health() != Health::Running {
            return Err(SubmitError::Stopped);
        }
        let (gradient, answer) = gradient::gradient(request);
        self.inner.commands.send(Command::Differentiate(gradient)).map_err(|_| SubmitError::Stopped)?;
        Ok(answer)
    }

    /// The hashes of the prompt are made here, on the caller's thread, and not between two steps.
    fn prepare(&self, mut request: Request) -> (Submission, Events) {
        let (sender, events) = events::channel();
        let outbox = Outbox::new(sender, Arc::clone(&self.inner.gate), (request.priority, request.share.key));
        let tokens = std::mem::take(&mut request.prompt);
        let shared = self.inner.config.prefix_cache && request.use_cache;
        let chain = shared.then(|| Chain::new(request.salt, &tokens));
        // The worker numbers sequences as they come to it.
        let id = SequenceId { priority: request.priority, number: 0 };
        let scored = request.prompt_logprobs.is_some();
        let sequence = Sequence::new(id, request.share, tokens, request.max_tokens, chain, scored);
        let trace = Trace::within(&request.span);
        (Submission { request, sequence, outbox, submitted: Instant::now(), trace }, events)
    }

    fn check(&self, request: &Request) -> Result<(), SubmitError> {
        self.problem(request).map_or(Ok(()), |problem| Err(SubmitError::Invalid(problem)))
    }

    /// Why this request can never run here.
    fn problem(&self, request: &Request) -> Option<String> {
        let Inner { config, vocab, kv_blocks, .. } = &*self.inner;
        let (prompt, most) = (request.prompt.len(), request.max_tokens);
        if prompt == 0 {
            return Some("the prompt is empty".into());
        }
        let total = prompt.saturating_add(most);
        if total > config.max_model_len {
            let context = config.max_model_len;
            return Some(format!(
                "the context holds {context} tokens, but {prompt} of the prompt and {most} of the completion make {total}"
            ));
        }
        let (needed, blocks) = (blocks_at_end(prompt, most), *kv_blocks);
        if needed > blocks {
            let tokens = blocks * BLOCK_TOKENS;
            return Some(format!(
                "prompt and completion make {total} tokens, but the KV cache holds {tokens}; give it more memory"
            ));
        }
        let biased = request.sampling.logit_bias.iter().map(|(token, _)| token);
        if let Some(token) = request.prompt.iter().chain(biased).find(|&&token| token as usize >= *vocab) {
            return Some(format!("token {token} is not in the vocabulary of {vocab} tokens"));
        }
        if let Some(cores) = &request.cores {
            let Some(numbers) = cores.rank.checked_mul(cores.rank).and_then(|n| n.checked_mul(config.sites)) else {
                return Some("the adapter's rank is too large".into());
            };
            if cores.rank != config.rank || cores.data.len() != numbers {
                let (rank, length, served, sites) = (cores.rank, cores.data.len(), config.rank, config.sites);
                return Some(format!(
                    "the adapter has {length} numbers of rank {rank}, but rank {served} at {sites} sites is served"
                ));
            }
        }
        sampling_problem(request)
    }

    /// Interactive sequences in the engine, waiting ones included.
    pub fn in_flight(&self) -> usize {
        self.inner.gate.in_flight(Priority::Interactive)
    }

    /// What the engine counts.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.inner.stats
    }

    /// Forgets the cached KV of a salt, before any request submitted after this. Running requests under it go on unchanged.
    pub fn purge(&self, salt: CacheSalt) {
        // A worker that has ended has no cache either.
        let _ = self.inner.commands.send(Command::Purge(salt));
    }

    /// What the engine can do now.
    pub fn health(&self) -> Health {
        self.inner.gate.health()
    }

    /// What the engine was started with.
    pub fn config(&self) -> &EngineConfig {
        &self.inner.config
    }

    /// Takes no more requests, lets those that it has (waiting ones included) end within `drain`, fails the rest, and ends the thread. Waits for it: call it
    /// where waiting is allowed. True if nothing was cut off.
    pub fn shutdown(&self, drain: Duration) -> bool {
        let deadline = Instant::now() + drain.min(LONGEST_DRAIN);
        self.inner.gate.set(Health::Draining);
        let failed = self.inner.stats.failed.get();
        let _ = self.inner.commands.send(Command::Shutdown(deadline));
        self.inner.gate.wait(deadline + LAST_STEP) && self.inner.stats.failed.get() == failed
    }
}

/// Parameters that no draw can be made with.
fn sampling_problem(request: &Request) -> Option<String> {
    let sampling = &request.sampling;
    let share = 0.0..=1.0;
    let wrong = [
        ("temperature", sampling.temperature.is_finite() && sampling.temperature >= 0.0),
        ("top_p", share.contains(&sampling.top_p)),
        ("min_p", share.contains(&sampling.min_p)),
        ("presence_penalty", sampling.presence_penalty.is_finite()),
        ("frequency_penalty", sampling.frequency_penalty.is_finite()),
        ("repetition_penalty", sampling.repetition_penalty.is_finite() && sampling.repetition_penalty > 0.0),
        ("logit_bias", sampling.logit_bias.iter().all(|(_, bias)| bias.is_finite())),
    ];
    wrong.into_iter().find(|(_, fine)| !fine).map(|(name, _)| format!("{name} is out of range"))
}
