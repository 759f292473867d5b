//! The seam to the model: what can be rolled out and differentiated.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// A request to stop, shared by who asks for it, the run and the policy. The run looks at it between its chunks; a policy may look at it between its own and answer [`PolicyError::Stopped`].
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Asks to stop; there is no way back.
    pub fn stop(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Has somebody asked?
    pub fn is_stopped(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// What to sample: one prompt under one vector of numbers, several completions (the group). Requests of one batch may have different numbers: the candidates of evolution strategies are adapters in one mixed batch.
#[derive(Debug, Clone, PartialEq)]
pub struct RolloutRequest<'a> {
    /// The adapter, `[numbers]`. All zeros is the base.
    pub numbers: &'a [f32],
    /// Token ids of the prompt, at least one.
    pub prompt: &'a [u32],
    /// One completion a seed; the same request and seed give the same tokens, whoever shares the batch.
    pub seeds: Vec<u64>,
    /// At most so many tokens a completion.
    pub max_tokens: usize,
    /// Sampling temperature; 0 is greedy. No top-k, top-p or penalties: the sampler's distribution is the policy's own.
    pub temperature: f32,
}

/// One sampled completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Rollout {
    /// Completion tokens, the stop token included when there is one.
    pub tokens: Vec<u32>,
    /// Log-prob of each token under the sampler, nats: of logits / temperature (of the raw logits when greedy).
    pub logprobs: Vec<f32>,
    /// The completion's text without the stop token.
    pub text: String,
    /// False when `max_tokens` cut it off.
    pub finished: bool,
}

/// A prompt and a completion to score. Sequences of one prompt lie next to each other in a batch, so that a policy can compute the prompt once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sequence<'a> {
    /// Token ids of the prompt, at least one.
    pub prompt: &'a [u32],
    /// Token ids of the completion, at least one.
    pub completion: &'a [u32],
}

/// A loss over the log-probs of completion tokens, given by its derivative. A pure function, so a policy may call it from any thread, for any sequence, in any order, once or twice.
pub trait TokenLoss: Send + Sync {
    /// `d loss / d log p` for each token of a sequence (an index into the batch), given the log-probs under the numbers to be differentiated, `[tokens]` nats. As many values come back as went in.
    fn weights(&self, sequence: usize, logprobs: &[f32]) -> Vec<f32>;
}

/// The derivative of a loss, and the log-probs it was taken at.
#[derive(Debug, Clone, PartialEq)]
pub struct LossGradient {
    /// `d loss / d numbers`, `[numbers]`.
    pub gradient: Vec<f32>,
    /// Log-prob of every completion token, a vector a sequence, nats.
    pub logprobs: Vec<Vec<f32>>,
}

/// Why a policy gave no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// [`Stop`] was asked for.
    #[error("stopped")]
    Stopped,
    /// It cannot: the words are for the job's owner.
    #[error("{0}")]
    Failed(String),
}

/// A frozen model under a vector of numbers. Everything is a pure function of the arguments: the same call gives the same bits, or a resumed run would not equal an uninterrupted one.
pub trait Policy {
    /// How many numbers an adapter has.
    fn numbers(&self) -> usize;

    /// Samples completions, a group a request, in the order of the requests and of their seeds.
    fn rollout(&mut self, requests: &[RolloutRequest<'_>]) -> Result<Vec<Vec<Rollout>>, PolicyError>;

    /// Log-prob of every completion token (of logits / temperature), a vector a sequence, nats. `temperature` is above zero.
    fn logprobs(
        &mut self,
        numbers: &[f32],
        sequences: &[Sequence<'_>],
        temperature: f32,
    ) -> Result<Vec<Vec<f32>>, PolicyError>;

    /// `d/d numbers` of the sum over sequences and tokens of `weight * log p(token)` (of logits / temperature): `[numbers]`. One weight a completion token.
    fn gradient(
        &mut self,
        numbers: &[f32],
        sequences: &[Sequence<'_>],
        weights: &[Vec<f32>],
        temperature: f32,
    ) -> Result<Vec<f32>, PolicyError>;

    /// The gradient of a loss whose weights depend on the log-probs themselves. The default runs [`Policy::logprobs`], then [`Policy::gradient`]. A policy that keeps its forward pass for the backward one
    /// asks `loss` for the weights in between and saves a pass.
    fn loss_gradient(
        &mut self,
        numbers: &[f32],
        sequences: &[Sequence<'_>],
        temperature: f32,
        loss: Arc<dyn TokenLoss>,
    ) -> Result<LossGradient, PolicyError> {
        let logprobs = self.logprobs(numbers, sequences, temperature)?;
        let weights: Vec<Vec<f32>> =
            logprobs.iter().enumerate().map(|(sequence, logprobs)| loss.weights(sequence, logprobs)).collect();
        let gradient = self.gradient(numbers, sequences, &weights, temperature)?;
        Ok(LossGradient { gradient, logprobs })
    }
}
