//! Rollouts of a job: ordinary requests of the serving engine, behind everybody's.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    sync::Arc,
    time::Duration,
};

use mote_trainer::{PolicyError, Rollout, RolloutRequest, Stop};
use tracing::Span;

use super::policy::{EnginePolicies, LOOK, not_finite};
use crate::{
    adapter::{Adapter, Cores, Facts, NumberType, codec},
    engine::{Event, Events, FinishReason, Health, Priority, Request, Sampling, SubmitError},
    service::share::share_of,
    types::{CacheSalt, TenantId},
};

/// How long a full engine is left alone.
const BACK_OFF: Duration = Duration::from_millis(50);

/// Rollouts of one job.
pub(super) struct Rollouts {
    pub(super) parts: EnginePolicies,
    pub(super) facts: Facts,
    pub(super) tenant: TenantId,
    pub(super) numbers: usize,
    pub(super) stop: Stop,
}

/// Numbers as the engine takes them.
#[derive(Clone)]
struct Candidate {
    cores: Option<Arc<Cores>>,
    salt: CacheSalt,
}

/// One completion on its way.
struct Running {
    request: usize,
    seed: u64,
    events: Events,
}

/// How a completion ended.
enum Outcome {
    Done(Rollout),
    /// A step of the engine failed, perhaps for another's sake; asked again, the same comes out.
    Broken(String),
}

/// How often a completion is asked for again.
const TRIES: usize = 3;

impl Rollouts {
    /// Numbers as an adapter that has no name: expanded for the engine, never stored.
    ///
    /// # Errors
    /// Numbers that are not finite, or not as many as the scheme's.
    pub(super) fn adapter(&self, numbers: &[f32]) -> Result<Arc<Adapter>, PolicyError> {
        let failed = |error: String| PolicyError::Failed(error);
        let bytes = codec::encode(numbers, NumberType::F32).map_err(|error| failed(error.to_string()))?;
        let interner = &self.parts.library.interner;
        interner.adapter(self.facts.clone(), &bytes, self.numbers).map_err(|error| failed(error.to_string()))
    }

    /// Cores of numbers, and under which hash their KV may be shared: by completions of this tenant under the same numbers. All zeros is the base.
    fn candidate(&self, numbers: &[f32]) -> Result<Candidate, PolicyError> {
        let library = &self.parts.library;
        if numbers.iter().all(|&number| number == 0.0) {
            return Ok(Candidate { cores: None, salt: library.salt(self.tenant, &[]) });
        }
        let adapter = self.adapter(numbers)?;
        let parts: [(&Adapter, f32); 1] = [(&adapter, 1.0)];
        let salt = library.salt(self.tenant, &parts);
        let cores = library.cores(salt, &parts).map_err(|error| PolicyError::Failed(error.message))?;
        Ok(Candidate { cores: Some(cores), salt })
    }

    /// Samples completions through the engine, as [`mote_trainer::Policy::rollout`] asks. KV of the numbers is forgotten afterwards: nobody will ask for it again.
    ///
    /// # Errors
    /// [`PolicyError::Stopped`]; what the engine could not do.
    pub(super) fn rollout(&self, requests: &[RolloutRequest<'_>]) -> Result<Vec<Vec<Rollout>>, PolicyError> {
        let mut candidates: HashMap<Vec<u32>, Candidate> = HashMap::new();
        for request in requests {
            let key: Vec<u32> = request.numbers.iter().map(|number| number.to_bits()).collect();
            if let Entry::Vacant(vacant) = candidates.entry(key) {
                vacant.insert(self.candidate(request.numbers)?);
            }
        }
        let outcome = self.run(requests, &candidates);
        for candidate in candidates.into_values().filter(|candidate| candidate.cores.is_some()) {
            self.parts.engine.purge(candidate.salt);
        }
        outcome
    }

    fn run(
        &self,
        requests: &[RolloutRequest<'_>],
        candidates: &HashMap<Vec<u32>, Candidate>,
    ) -> Result<Vec<Vec<Rollout>>, PolicyError> {
        let mut waiting =
            requests.iter().enumerate().flat_map(|(at, request)| request.seeds.iter().map(move |seed| (at, *seed)));
        let mut done: Vec<Vec<Rollout>> =
            requests.iter().map(|request| Vec::with_capacity(request.seeds.len())).collect();
        // A place in the batch becomes free and the next sequence is there already; more at once would only lie in the queue.
        let most = 2 * self.parts.engine.config().max_batch;
        let mut running: VecDeque<Running> = VecDeque::with_capacity(most);
        loop {
            while running.len() < most
                && let Some((at, seed)) = waiting.next()
            {
                running.push_back(self.begin(requests, candidates, at, seed)?);
            }
            let Some(mut next) = running.pop_front() else { return Ok(done) };
            let mut tries = 1;
            let rollout = loop {
                match self.finish(&mut next.events)? {
                    Outcome::Done(rollout) => break rollout,
                    Outcome::Broken(_) if self.parts.engine.health() != Health::Running => {
                        return Err(PolicyError::Stopped);
                    }
                    Outcome::Broken(cause) if tries < TRIES => {
                        tracing::warn!(%cause, "a rollout failed and is tried again");
                        tries += 1;
                        next = self.begin(requests, candidates, next.request, next.seed)?;
                    }
                    Outcome::Broken(cause) => {
                        tracing::error!(%cause, "a rollout failed");
                        return Err(PolicyError::Failed("the engine failed in a rollout".to_owned()));
                    }
                }
            };
            done[next.request].push(rollout);
        }
    }

    fn begin(
        &self,
        requests: &[RolloutRequest<'_>],
        candidates: &HashMap<Vec<u32>, Candidate>,
        at: usize,
        seed: u64,
    ) -> Result<Running, PolicyError> {
        let request = &requests[at];
        let key: Vec<u32> = request.numbers.iter().map(|number| number.to_bits()).collect();
        let candidate = candidates.get(&key).ok_or_else(|| PolicyError::Failed("unknown numbers".to_owned()))?;
        Ok(Running { request: at, seed, events: self.submit(request, seed, candidate)? })
    }

    fn submit(&self, request: &RolloutRequest<'_>, seed: u64, candidate: &Candidate) -> Result<Events, PolicyError> {
        loop {
            if self.stop.is_stopped() {
                return Err(PolicyError::Stopped);
            }
            let sequence = Request {
                prompt: request.prompt.to_vec(),
                max_tokens: request.max_tokens,
                min_tokens: 0,
                stop_tokens: self.parts.base.eos.clone(),
                sampling: Sampling { temperature: request.temperature, seed, ..Sampling::default() },
                logprobs: Some(0),
                prompt_logprobs: None,
                // As the trainer's are.
                scaled_logprobs: true,
                capture_logits: false,
                cores: candidate.cores.clone(),
                salt: candidate.salt,
                use_cache: true,
                priority: Priority::Background,
                share: share_of(self.tenant, &self.parts.accounts.of(self.tenant).limits()),
                deadline: None,
                // A step has thousands.
                span: Span::none(),
            };
            match self.parts.engine.submit(sequence) {
                Ok(mut events) => {
                    events.hold_until_end();
                    return Ok(events);
                }
                Err(SubmitError::QueueFull(_)) => std::thread::sleep(BACK_OFF),
                // The server ends; the job goes on with the next one.
                Err(SubmitError::Stopped) => return Err(PolicyError::Stopped),
                Err(error) => return Err(PolicyError::Failed(error.to_string())),
            }
        }
    }

    /// Reads a completion to its end.
    fn finish(&self, events: &mut Events) -> Result<Outcome, PolicyError> {
        let tokenizer = &self.parts.base.tokenizer;
        let (mut tokens, mut logprobs, mut text) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            match self.next(events)? {
                Some(Event::Token(out)) => {
                    let scores = out.logprobs.as_ref();
                    let missing = || PolicyError::Failed("the engine gave no log-probs".to_owned());
                    logprobs.push(scores.map(|scores| scores.logprob).ok_or_else(missing)?);
                    if !out.stop {
                        text.extend_from_slice(tokenizer.text_bytes(out.token));
                    }
                    tokens.push(out.token);
                }
                Some(Event::Finished(reason, _)) => {
                    let text = String::from_utf8_lossy(&text).into_owned();
                    let finished = reason == FinishReason::Stop;
                    return Ok(Outcome::Done(Rollout { tokens, logprobs, text, finished }));
                }
                Some(Event::NotFinite) => return Err(not_finite()),
                Some(Event::Failed(cause)) => return Ok(Outcome::Broken(cause)),
                Some(Event::Expired) => return Ok(Outcome::Broken("its deadline came".to_owned())),
                Some(Event::Prompt(_) | Event::Began { .. }) => {}
                // The engine has stopped: the server ends, and the job goes on with the next one.
                None => return Err(PolicyError::Stopped),
            }
        }
    }

    fn next(&self, events: &mut Events) -> Result<Option<Event>, PolicyError> {
        if let Some(event) = events.try_recv() {
            return Ok(Some(event));
        }
        loop {
            if self.stop.is_stopped() {
                return Err(PolicyError::Stopped);
            }
            // Within the future: a timer is made on the runtime.
            let waited = self.parts.runtime.block_on(async { tokio::time::timeout(LOOK, events.recv()).await });
            if let Ok(event) = waited {
                return Ok(event);
            }
        }
    }
}
