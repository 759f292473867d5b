//! The model as a policy, through the serving engine: rollouts are requests behind everybody's, gradients are computed between its steps.

use std::{ops::Range, sync::Arc, time::Duration};

use mote_trainer::{LossGradient, Method, Policy, PolicyError, Rollout, RolloutRequest, Sequence, Stop, TokenLoss};
use tokio::runtime;

use super::rollouts::Rollouts;
use crate::{
    adapter::{Facts, NumberType, Scheme},
    engine::{Differentiated, GradientFailure, GradientJob, GradientRequest, Handle, SubmitError, Weigh},
    service::{BaseInfo, Library, Service},
    tenant::Accounts,
    types::TenantId,
};

/// How often a waiting job looks whether it shall stop.
pub(super) const LOOK: Duration = Duration::from_millis(25);
/// What the gradient of one batch of sequences may keep of the way there (`4 * hidden * layers` bytes a row); more sequences are several batches, whose derivatives are added.
const KEPT_BYTES: usize = 512 << 20;

/// What a policy is made for.
#[derive(Debug, Clone, Copy)]
pub struct PolicyRequest<'a> {
    /// The job's id.
    pub job: &'a str,
    /// Its owner.
    pub tenant: TenantId,
    /// How it learns.
    pub method: Method,
    /// What its numbers mean.
    pub scheme: &'a Scheme,
    /// How many they are.
    pub numbers: usize,
    /// Asks the job to stop: a policy that waits or computes for long looks at it.
    pub stop: &'a Stop,
}

/// Where jobs get their policy from.
pub trait PolicySource: Send + Sync {
    /// Can jobs of this method run here? Asked when a job is made; the words are for its owner.
    fn supports(&self, method: Method) -> Result<(), String>;

    /// A policy for one job, made and used on the job's thread.
    fn policy(&self, request: &PolicyRequest<'_>) -> Result<Box<dyn Policy>, PolicyError>;
}

/// Policies over the serving engine.
#[derive(Clone)]
pub struct EnginePolicies {
    pub(super) engine: Handle,
    pub(super) base: Arc<BaseInfo>,
    pub(super) library: Arc<Library>,
    /// What rollouts weigh beside the requests of other tenants.
    pub(super) accounts: Arc<Accounts>,
    pub(super) runtime: runtime::Handle,
}

impl EnginePolicies {
    /// Over the engine of a service. Within a runtime.
    pub fn of(service: &Service) -> Self {
        let (base, library) = (service.base.clone(), service.library.clone());
        Self::new(service.engine.clone(), base, library, service.accounts.clone())
    }

    /// Over an engine. Within a runtime.
    pub fn new(engine: Handle, base: Arc<BaseInfo>, library: Arc<Library>, accounts: Arc<Accounts>) -> Self {
        Self { engine, base, library, accounts, runtime: runtime::Handle::current() }
    }
}

impl PolicySource for EnginePolicies {
    fn supports(&self, _method: Method) -> Result<(), String> {
        match self.base.rank {
            0 => Err("this server serves no adapters: it runs with --rank 0".to_owned()),
            _ => Ok(()),
        }
    }

    fn policy(&self, request: &PolicyRequest<'_>) -> Result<Box<dyn Policy>, PolicyError> {
        let facts = Facts {
            scheme: request.scheme.clone(),
            frame: None,
            fingerprint: self.library.fingerprint,
            dtype: NumberType::F32,
            approximate: false,
        };
        let (tenant, numbers, stop) = (request.tenant, request.numbers, request.stop.clone());
        Ok(Box::new(EnginePolicy(Rollouts { parts: self.clone(), facts, tenant, numbers, stop })))
    }
}

/// What to say when the model overflows under a job's numbers.
pub(super) fn not_finite() -> PolicyError {
    let words = "under these numbers the model's output is not finite; a smaller learning rate may help";
    PolicyError::Failed(words.to_owned())
}

/// The policy of one job.
struct EnginePolicy(Rollouts);

impl EnginePolicy {
    /// Log-probs of the sequences, batch after batch, and the sum of the batches' derivatives. `weigh` makes the function that weighs the log-probs of a batch; None: log-probs only.
    fn differentiate(
        &self,
        numbers: &[f32],
        sequences: &[Sequence<'_>],
        temperature: f32,
        weigh: Option<&dyn Fn(Range<usize>) -> Weigh>,
    ) -> Result<(Vec<Vec<f32>>, Vec<f64>), PolicyError> {
        let Rollouts { parts, facts, .. } = &self.0;
        let failed = |error: &dyn std::fmt::Display| PolicyError::Failed(error.to_string());
        let expander = &parts.library.expander;
        let adapter = self.0.adapter(numbers)?;
        let cores = expander.expand(&[(&adapter, 1.0)]).map_err(|error| failed(&error))?;
        let sites = expander.sites();
        let kept = 4 * sites.shapes[0].1 * sites.layers;
        let mut logprobs = Vec::with_capacity(sequences.len());
        let mut sum = vec![0f64; numbers.len()];
        for batch in batches(sequences, KEPT_BYTES / kept.max(1)) {
            let pairs = sequences[batch.clone()].iter().map(|sequence| (sequence.prompt, sequence.completion));
            let job = GradientJob::new(pairs, cores.clone(), temperature);
            let request = match weigh {
                Some(weigh) => GradientRequest { job, weigh: weigh(batch) },
                None => GradientRequest { job: job.only_logprobs(), weigh: Box::new(|_| Vec::new()) },
            };
            let done = self.wait(request)?;
            logprobs.extend(done.logprobs);
            if let Some(gradient) = done.gradient {
                let of_numbers = expander.pullback(facts, 1.0, &gradient.data).map_err(|error| failed(&error))?;
                sum.iter_mut().zip(of_numbers).for_each(|(sum, value)| *sum += value);
            }
        }
        Ok((logprobs, sum))
    }

    fn wait(&self, request: GradientRequest) -> Result<Differentiated, PolicyError> {
        let answer = match self.0.parts.engine.differentiate(request) {
            Ok(answer) => answer,
            // The server ends; the job goes on with the next one.
            Err(SubmitError::Stopped) => return Err(PolicyError::Stopped),
            Err(error) => return Err(PolicyError::Failed(error.to_string())),
        };
        loop {
            if self.0.stop.is_stopped() {
                return Err(PolicyError::Stopped);
            }
            match answer.wait(LOOK) {
                None => {}
                Some(Ok(done)) => return Ok(done),
                Some(Err(GradientFailure::Stopped)) => return Err(PolicyError::Stopped),
                Some(Err(GradientFailure::NotFinite(_))) => return Err(not_finite()),
                Some(Err(GradientFailure::Failed(error))) => {
                    tracing::error!(error, "a gradient failed");
                    return Err(PolicyError::Failed(format!("the gradient failed: {error}")));
                }
            }
        }
    }
}

/// Cuts sequences into batches of about so many rows of the model, between prompts if that is possible. A function of the sequences alone.
fn batches(sequences: &[Sequence<'_>], rows: usize) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    let mut filled = 0;
    for (at, sequence) in sequences.iter().enumerate() {
        let follows = at > 0 && sequences[at - 1].prompt == sequence.prompt;
        let own = sequence.completion.len();
        let with_prompt = own + sequence.prompt.len();
        match batches.last_mut() {
            Some(batch) if follows && filled + own <= rows => {
                (batch.end, filled) = (at + 1, filled + own);
            }
            Some(batch) if !follows && filled + with_prompt <= rows => {
                (batch.end, filled) = (at + 1, filled + with_prompt);
            }
            _ => {
                batches.push(at..at + 1);
                filled = with_prompt;
            }
        }
    }
    batches
}

fn to_f32(gradient: Vec<f64>) -> Vec<f32> {
    gradient.into_iter().map(|value| value as f32).collect()
}

impl Policy for EnginePolicy {
    fn numbers(&self) -> usize {
        self.0.numbers
    }

    fn rollout(&mut self, requests: &[RolloutRequest<'_>]) -> Result<Vec<Vec<Rollout>>, PolicyError> {
        self.0.rollout(requests)
    }

    fn logprobs(
        &mut self,
        numbers: &[f32],
        sequences: &[Sequence<'_>],
        temperature: f32,
    ) -> Result<Vec<Vec<f32>>, PolicyError> {
        self.differentiate(numbers, sequences, temperature, None).map(|(logprobs, _)| logprobs)
    }

    fn gradient(
        &mut self,
        numbers: &[f32],
        sequences: &[Sequence<'_>],
        weights: &[Vec<f32>],
        temperature: f32,
    ) -> Result<Vec<f32>, PolicyError> {
        let weigh = |batch: Range<usize>| -> Weigh {
            let weights = weights.get(batch).map(<[_]>::to_vec).unwrap_or_default();
            Box::new(move |_| weights)
        };
        self.differentiate(numbers, sequences, temperature, Some(&weigh)).map(|(_, gradient)| to_f32(gradient))
    }

    fn loss_gradient(
        &mut self,
        numbers: &[f32],
        sequences: &[Sequence<'_>],
        temperature: f32,
        loss: Arc<dyn TokenLoss>,
    ) -> Result<LossGradient, PolicyError> {
        let weigh = |batch: Range<usize>| -> Weigh {
            let loss = loss.clone();
            Box::new(move |logprobs| {
                logprobs.iter().enumerate().map(|(at, logprobs)| loss.weights(batch.start + at, logprobs)).collect()
            })
        };
        let (logprobs, gradient) = self.differentiate(numbers, sequences, temperature, Some(&weigh))?;
        Ok(LossGradient { gradient: to_f32(gradient), logprobs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_end_between_prompts_and_never_lose_a_sequence() {
        let tokens = [0u32; 64];
        let sequence = |prompt: usize, completion: usize| Sequence {
            prompt: &tokens[..prompt],
            completion: &tokens[..completion],
        };
        // Prompts of 10 and 12 tokens, three completions of 5 each: 25 and 27 rows.
        let sequences: Vec<_> = [10, 10, 10, 12, 12, 12, 11].map(|prompt| sequence(prompt, 5)).to_vec();
        assert_eq!(batches(&sequences, 1000), vec![0..7; 1]);
        assert_eq!(batches(&sequences, 30), [0..3, 3..6, 6..7]);
        assert_eq!(batches(&sequences, 20), [0..2, 2..3, 3..4, 4..5, 5..6, 6..7]);
        assert_eq!(batches(&sequences, 1).len(), 7, "what does not fit is alone");
        assert!(batches(&[], 10).is_empty());
    }
}
