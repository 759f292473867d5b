//! The engine as a whole over a model that notices every mistake.

mod behaviour;
#[path = "../../../kernel/src/counting.rs"]
mod counting;
mod deadlines;
mod fairness;
pub(super) mod fake;
mod faults;
mod gradients;
mod overhead;
mod random;
mod sampling;
mod scheduling;

use std::{sync::Arc, time::Duration};

use fake::{Fake, RANK, SITES, VOCAB, Watch};

use super::{
    api::{
        Event, FinishReason, LogProbs, Priority, PromptLogProbs, Request, Sampling, Share, ShareKey, TokenOut, Usage,
    },
    events::Events,
    handle::{Engine, EngineConfig, Handle},
    sampler::{Answer, Counts, Parallel, Question, Sampler},
};
use crate::types::{CacheSalt, TokenId};

pub(super) fn config() -> EngineConfig {
    EngineConfig {
        max_batch: 8,
        max_queue: 64,
        max_model_len: 512,
        prefill_chunk: 32,
        idle_prefill_chunk: 32,
        background_rows: 4,
        gradient_share: 1.0,
        rank: RANK,
        sites: SITES,
        prefix_cache: true,
    }
}

fn engine(blocks: usize, config: EngineConfig) -> (Handle, Arc<Watch>) {
    let (model, watch) = Fake::model(blocks);
    (Engine::start(model, config).unwrap(), watch)
}

/// A greedy request on the base.
fn request(prompt: Vec<TokenId>, max_tokens: usize) -> Request {
    Request {
        prompt,
        max_tokens,
        min_tokens: 0,
        stop_tokens: Vec::new(),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        logprobs: None,
        prompt_logprobs: None,
        scaled_logprobs: false,
        capture_logits: false,
        cores: None,
        salt: CacheSalt([0; 32]),
        use_cache: true,
        priority: Priority::Interactive,
        share: Share::default(),
        deadline: None,
        span: tracing::Span::none(),
    }
}

/// A request under an adapter, with the salt that belongs to it.
pub(super) fn adapted(prompt: Vec<TokenId>, max_tokens: usize, adapter: u8) -> Request {
    Request {
        cores: Some(fake::cores(u32::from(adapter))),
        salt: CacheSalt([adapter; 32]),
        ..request(prompt, max_tokens)
    }
}

/// A prompt of harmless tokens.
pub(super) fn prompt(len: usize, seed: u32) -> Vec<TokenId> {
    (0..len as u32).map(|i| (i * i + 7 * i + seed * 13 + i / 5 * seed) % 36).collect()
}

/// What a request came to.
#[derive(Debug, Clone, PartialEq, Default)]
struct Outcome {
    prompt: Option<PromptLogProbs>,
    tokens: Vec<TokenOut>,
    finish: Option<(FinishReason, Usage)>,
    failed: Option<String>,
}

impl Outcome {
    fn ids(&self) -> Vec<TokenId> {
        self.tokens.iter().map(|token| token.token).collect()
    }

    fn usage(&self) -> Usage {
        self.finish.expect("finished").1
    }

    /// Without what may differ between two runs: how much was cached and how often it was preempted.
    fn content(mut self) -> Self {
        if let Some((_, usage)) = &mut self.finish {
            usage.cached_tokens = 0;
            usage.preemptions = 0;
        }
        self
    }
}

/// Reads a request's events to the end and checks their order.
fn collect(mut events: Events) -> Outcome {
    let mut outcome = Outcome::default();
    while let Some(event) = events.blocking_recv() {
        assert!(outcome.finish.is_none() && outcome.failed.is_none(), "an event after the last");
        match event {
            Event::Prompt(scores) => {
                assert!(outcome.prompt.is_none() && outcome.tokens.is_empty());
                outcome.prompt = Some(scores);
            }
            Event::Began { .. } => assert!(outcome.tokens.is_empty()),
            Event::Token(token) => outcome.tokens.push(token),
            Event::Finished(reason, usage) => outcome.finish = Some((reason, usage)),
            Event::Failed(message) => outcome.failed = Some(message),
            Event::NotFinite => outcome.failed = Some("not finite".into()),
            Event::Expired => outcome.failed = Some("expired".into()),
        }
    }
    assert!(outcome.finish.is_some() || outcome.failed.is_some(), "the channel ended without a last event");
    outcome
}

/// The sampler's answers, made one after the other.
fn ask(logits: &[f32], vocab: usize, questions: &[Question<'_>]) -> Vec<Answer> {
    let mut sampler = Sampler::new();
    ask_with(&mut sampler, logits, vocab, questions, &mut |items, work| (0..items).for_each(work))
}

fn ask_with(
    sampler: &mut Sampler,
    logits: &[f32],
    vocab: usize,
    questions: &[Question<'_>],
    parallel: Parallel<'_>,
) -> Vec<Answer> {
    sampler.answer(logits, vocab, &|row| questions.get(row).copied(), parallel);
    (0..questions.len()).map(|row| sampler.take(row).unwrap()).collect()
}

/// What a request gives without an engine: the whole sequence anew for every token.
fn alone(request: &Request) -> Outcome {
    let ask = |row: &[f32], question: Question<'_>| ask(row, VOCAB, &[question]).remove(0).unwrap();
    let cores = request.cores.as_deref();
    let mut tokens = request.prompt.clone();
    let mut counts = Counts::for_request(&request.sampling, &tokens);
    let mut outcome = Outcome::default();
    if let Some(top) = request.prompt_logprobs {
        let rows = fake::logits_alone(cores, &tokens);
        let score = |(row, &token): (&Vec<f32>, &TokenId)| ask(row, Question::Score { token, top }).1;
        outcome.prompt = Some(std::iter::once(None).chain(rows.iter().zip(&tokens[1..]).map(score)).collect());
    }
    let mut reason = FinishReason::Length;
    for index in 0..request.max_tokens {
        let row = fake::logits_alone(cores, &tokens).pop().unwrap();
        let forbidden = if index < request.min_tokens { &request.stop_tokens[..] } else { &[] };
        let (sampling, logprobs) = (&request.sampling, request.logprobs);
        let question = Question::Next {
            sampling,
            index,
            forbidden,
            counts: counts.as_ref(),
            logprobs,
            scaled: request.scaled_logprobs,
        };
        let (token, logprobs): (TokenId, Option<LogProbs>) = ask(&row, question);
        tokens.push(token);
        counts.iter_mut().for_each(|counts| counts.add(token));
        let stop = request.stop_tokens.contains(&token);
        let logits = request.capture_logits.then(|| row.into_boxed_slice());
        outcome.tokens.push(TokenOut { token, stop, logprobs, logits });
        if stop {
            reason = FinishReason::Stop;
            break;
        }
    }
    let (prompt_tokens, completion_tokens) = (request.prompt.len(), outcome.tokens.len());
    outcome.finish = Some((reason, Usage { prompt_tokens, completion_tokens, ..Usage::default() }));
    outcome
}

/// Waits until the engine has nothing to do, and checks that it holds no block.
fn settle(handle: &Handle, blocks: usize) {
    let stats = handle.stats();
    let unheld = || stats.blocks_free.get() + stats.blocks_cached.get() == blocks as u64;
    wait_for(|| stats.running.get() == 0 && stats.waiting.get() == 0 && stats.blocks_used.get() == 0 && unheld());
}

fn wait_for(done: impl Fn() -> bool) {
    for _ in 0..5000 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("it did not happen within five seconds");
}
