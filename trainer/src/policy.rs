//! The two seams of training: what can be rolled out and differentiated, and what gives a reward.

/// What to sample: one prompt, several completions.
#[derive(Debug, Clone, PartialEq)]
pub struct RolloutRequest {
    /// Token ids of the prompt, at least one.
    pub prompt: Vec<u32>,
    /// Completions of this prompt (the group).
    pub samples: usize,
    /// At most so many tokens a completion.
    pub max_tokens: usize,
    /// Sampling temperature; 0 is greedy.
    pub temperature: f32,
    /// Sample i of the group draws with a seed derived from this and i.
    pub seed: u64,
}

/// One sampled completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Rollout {
    /// Completion tokens, the stop token included when there is one.
    pub tokens: Vec<u32>,
    /// Log-prob of each token under the sampler (of logits / temperature), nats.
    pub logprobs: Vec<f32>,
    /// The completion's text without the stop token.
    pub text: String,
    /// False when `max_tokens` cut it off.
    pub finished: bool,
}

/// One completion token's share in the loss: the gradient asked for is that of the sum over tokens of `weight * log p(token)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenWeight {
    /// The token.
    pub token: u32,
    /// Its weight.
    pub weight: f32,
}

/// The policy could not roll out or differentiate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct PolicyError(pub String);

/// A frozen model under a vector of numbers.
pub trait Policy {
    /// How many numbers.
    fn numbers(&self) -> usize;
    /// Samples completions under the numbers, a group a request, in the order of the requests.
    fn rollout(&mut self, numbers: &[f32], requests: &[RolloutRequest]) -> Result<Vec<Vec<Rollout>>, PolicyError>;
    /// Log-prob of every completion token (of logits / temperature), a vector a (prompt, completion) pair, in nats.
    fn logprobs(
        &mut self,
        numbers: &[f32],
        pairs: &[(&[u32], &[u32])],
        temperature: f32,
    ) -> Result<Vec<Vec<f32>>, PolicyError>;
    /// `d/d numbers` of the sum over pairs and tokens of `weight * log p(token)` (of logits / temperature): `[numbers]`.
    fn gradient(
        &mut self,
        numbers: &[f32],
        pairs: &[(&[u32], &[TokenWeight])],
        temperature: f32,
    ) -> Result<Vec<f32>, PolicyError>;
}

/// A grader's verdict.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grade {
    /// The score, usually in `0..=1`.
    pub reward: f32,
}

/// A completion could not be graded. This is an error of the job, never a reward of zero.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct GraderError(pub String);

/// Gives a completion its reward. The item is the dataset's JSON object, serialised.
pub trait Grader: Send + Sync {
    /// Grades one completion of one item.
    fn grade(&self, item: &str, output_text: &str) -> Result<Grade, GraderError>;
}
