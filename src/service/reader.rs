//! One choice on its way to the client: the engine's tokens become text, log-probs and an end.

use std::{collections::VecDeque, sync::Arc};

use super::{BaseInfo, Error, decoding::Budget};
use crate::{
    engine::{Event, Events, FinishReason, LogProbs, TokenOut},
    tenant::Charge,
    text::{Detokenizer, StopStrings, Tokenizer},
    types::TokenId,
};

/// The lowest log-prob that is reported: JSON has no infinity.
const LOWEST: f32 = -9999.0;

/// An encoded prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// At least one token.
    pub tokens: Arc<[TokenId]>,
    /// What the client wrote; None when it sent tokens.
    pub text: Option<Arc<str>>,
}

/// A token as log-probs show it.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenScore {
    /// Its spelling, U+FFFD for what is no character by itself.
    pub text: String,
    /// Its bytes; none for an id that the tokenizer does not have.
    pub bytes: Box<[u8]>,
    /// Where it begins in the choice's text, in characters.
    pub offset: usize,
    /// Of the raw logits; None for the first token of a prompt.
    pub logprob: Option<f32>,
    /// The likeliest tokens at this place.
    pub top: Vec<Alternative>,
}

/// A token that could have been.
#[derive(Debug, Clone, PartialEq)]
pub struct Alternative {
    /// Its spelling.
    pub text: String,
    /// Its bytes.
    pub bytes: Box<[u8]>,
    /// Of the raw logits.
    pub logprob: f32,
}

/// How a choice ended and what it cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct End {
    /// Stop (a stop token or a stop string) or length.
    pub reason: FinishReason,
    /// Tokens sampled, a stop token included.
    pub completion_tokens: usize,
    /// Prompt tokens whose KV came from the prefix cache.
    pub cached_tokens: usize,
    /// Sum of the log-probs of the sampled tokens, where they were asked for.
    pub logprob_sum: f64,
}

/// The next piece of a choice. The pieces' texts together are the choice's text.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Delta {
    /// Which choice.
    pub choice: usize,
    /// Whole characters, nothing that a stop string could still take back.
    pub text: String,
    /// Sampled tokens.
    pub tokens: Vec<TokenId>,
    /// One an entry of `tokens`, prompt tokens first under echo; empty unless asked for.
    pub scores: Vec<TokenScore>,
    /// Set on the last piece.
    pub end: Option<End>,
}

/// What a choice shows besides its text.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Show {
    /// The prompt before the completion.
    pub echo: bool,
    /// Wait for the engine's log-probs of the prompt before echoing it.
    pub prompt_scores: bool,
    /// Also the tokens that are no text: a stop token, and those of a stop string.
    pub end_tokens: bool,
    /// Runs under an adapter.
    pub adapted: bool,
}

struct Pending {
    token: TokenId,
    start: usize,
    score: Option<TokenScore>,
}

/// What a choice may use, and where it is counted.
pub(super) struct Stake {
    pub(super) charge: Arc<Charge>,
    pub(super) budget: Budget,
}

/// Reads one choice's events. Dropping it cancels the request.
pub(super) struct Reader {
    choice: usize,
    base: Arc<BaseInfo>,
    prompt: Prompt,
    events: Events,
    show: Show,
    detokenizer: Detokenizer,
    stops: StopStrings,
    stake: Stake,
    // Nothing is read before the end.
    held: bool,
    // Tokens whose text has not been shown yet.
    pending: VecDeque<Pending>,
    // Characters of the choice's text so far, and how many of them were shown.
    seen: usize,
    shown: usize,
    completion_tokens: usize,
    cached_tokens: usize,
    logprob_sum: f64,
    echoed: bool,
    ended: bool,
}

impl Reader {
    /// A reader of the choice with this number. Stop strings count after the budget's least tokens.
    pub(super) fn new(
        choice: usize,
        base: Arc<BaseInfo>,
        prompt: Prompt,
        events: Events,
        show: Show,
        stops: StopStrings,
        stake: Stake,
    ) -> Self {
        Self {
            choice,
            base,
            prompt,
            events,
            show,
            detokenizer: Detokenizer::default(),
            stops,
            stake,
            held: false,
            pending: VecDeque::new(),
            seen: 0,
            shown: 0,
            completion_tokens: 0,
            cached_tokens: 0,
            logprob_sum: 0.0,
            echoed: false,
            ended: false,
        }
    }

    /// Nobody reads a piece before the choice is complete: unless a stop string may end it, there is nothing to do, and to be woken for, until then.
    pub(super) fn hold_until_end(&mut self) {
        if self.stops.is_empty() {
            self.held = true;
            self.events.hold_until_end();
        }
    }

    /// The next piece; None after the last one. After an error there is nothing more.
    pub(super) async fn next(&mut self) -> Option<Result<Delta, Error>> {
        if self.ended {
            return None;
        }
        if self.show.echo && !self.echoed && !self.show.prompt_scores {
            return Some(Ok(self.echo(&[])));
        }
        loop {
            let delta = match self.events.recv().await {
                Some(Event::Prompt(scores)) if self.show.echo && !self.echoed => Some(self.echo(&scores)),
                Some(Event::Prompt(_)) => None,
                Some(Event::Began { cached_tokens }) => {
                    self.cached_tokens = cached_tokens;
                    None
                }
                Some(Event::Token(token)) => self.token(token),
                Some(Event::Finished(reason, usage)) => {
                    self.cached_tokens = usage.cached_tokens;
                    Some(self.finish(reason))
                }
                Some(Event::NotFinite) if self.show.adapted => {
                    self.ended = true;
                    let message = "Under this adapter the model's output is not finite: its numbers, scale or weights are too large.";
                    return Some(Err(Error::invalid("adapter", message)));
                }
                Some(Event::NotFinite) => return Some(Err(self.fail("the base's logits are not finite"))),
                Some(Event::Failed(cause)) => return Some(Err(self.fail(&cause))),
                Some(Event::Expired) => {
                    self.ended = true;
                    return Some(Err(Error::overloaded(
                        "The request was not done within the time that this server gives to one.",
                    )));
                }
                None => return Some(Err(self.fail("the engine dropped the request"))),
            };
            if let Some(delta) = delta {
                return Some(Ok(delta));
            }
        }
    }

    fn fail(&mut self, cause: &str) -> Error {
        self.ended = true;
        Error::internal(cause)
    }

    fn token(&mut self, out: TokenOut) -> Option<Delta> {
        self.completion_tokens += 1;
        self.stake.charge.spend(1);
        let start = self.seen;
        self.logprob_sum += out.logprobs.as_ref().map_or(0.0, |scores| f64::from(scores.logprob));
        let score = out.logprobs.map(|scores| score(&self.base.tokenizer, out.token, Some(&scores), start));
        if !out.stop || self.show.end_tokens {
            self.pending.push_back(Pending { token: out.token, start, score });
        }
        if out.stop {
            return None; // the end follows
        }
        let text = self.detokenizer.push(&self.base.tokenizer, out.token);
        self.seen += text.chars().count();
        let (text, stopped) =
            if self.completion_tokens > self.stake.budget.min_tokens { self.stops.push(&text) } else { (text, false) };
        if stopped {
            return Some(self.stop(text));
        }
        (!text.is_empty()).then(|| self.delta(text))
    }

    /// A stop string was found: nobody needs the rest of the completion.
    fn stop(&mut self, text: String) -> Delta {
        self.events.close();
        let mut delta = self.delta(text);
        if self.show.end_tokens {
            self.flush(&mut delta, usize::MAX);
        }
        self.end(delta, FinishReason::Stop)
    }

    fn finish(&mut self, reason: FinishReason) -> Delta {
        let rest = self.detokenizer.finish();
        let (mut text, stopped) = self.stops.push(&rest);
        if !stopped {
            text += &self.stops.finish();
        }
        let mut delta = self.delta(text);
        self.flush(&mut delta, usize::MAX);
        self.end(delta, reason)
    }

    fn end(&mut self, mut delta: Delta, reason: FinishReason) -> Delta {
        self.ended = true;
        let Self { completion_tokens, cached_tokens, logprob_sum, .. } = *self;
        delta.end = Some(End { reason, completion_tokens, cached_tokens, logprob_sum });
        delta
    }

    /// A piece with this text and the tokens that begin in what has been shown by then.
    fn delta(&mut self, text: String) -> Delta {
        self.shown += text.chars().count();
        let mut delta = Delta { choice: self.choice, text, ..Delta::default() };
        self.flush(&mut delta, self.shown);
        delta
    }

    fn flush(&mut self, delta: &mut Delta, before: usize) {
        while let Some(pending) = self.pending.pop_front_if(|pending| pending.start < before) {
            delta.tokens.push(pending.token);
            delta.scores.extend(pending.score);
        }
    }

    /// The prompt as the first piece, with the engine's log-probs if there are any.
    fn echo(&mut self, scores: &[Option<LogProbs>]) -> Delta {
        self.echoed = true;
        let tokenizer = &self.base.tokenizer;
        let mut detokenizer = Detokenizer::default();
        let mut spelt = String::new();
        let mut shown = Vec::with_capacity(scores.len());
        let mut characters = 0;
        for (at, &token) in self.prompt.tokens.iter().enumerate() {
            if let Some(scores) = scores.get(at) {
                shown.push(score(tokenizer, token, scores.as_ref(), characters));
            }
            // A first token that the tokenizer put before the client's text is not part of it.
            let added = at == 0
                && tokenizer.text_bytes(token).is_empty()
                && self.prompt.text.as_ref().is_some_and(|text| !text.starts_with(&tokenizer.token_text(token)));
            if !added {
                let text = detokenizer.push_bytes(tokenizer.token_bytes(token));
                characters += text.chars().count();
                spelt += &text;
            }
        }
        spelt += &detokenizer.finish();
        let text = self.prompt.text.as_ref().map_or(spelt, |text| text.to_string());
        self.seen = text.chars().count();
        self.shown = self.seen;
        Delta { choice: self.choice, text, scores: shown, ..Delta::default() }
    }
}

impl Drop for Reader {
    /// The client left before the end: what the engine made until now is counted all the same. Of a choice that is held nobody can tell how much that was.
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if self.held {
            self.stake.charge.lose(self.stake.budget.max_tokens as u64);
            return;
        }
        let unread = std::iter::from_fn(|| self.events.try_recv());
        self.stake.charge.spend(unread.filter(|event| matches!(event, Event::Token(_))).count() as u64);
    }
}

fn score(tokenizer: &Tokenizer, token: TokenId, scores: Option<&LogProbs>, offset: usize) -> TokenScore {
    let alternative = |&(token, logprob): &(TokenId, f32)| Alternative {
        text: tokenizer.token_text(token),
        bytes: tokenizer.token_bytes(token).into(),
        logprob: logprob.max(LOWEST),
    };
    TokenScore {
        text: tokenizer.token_text(token),
        bytes: tokenizer.token_bytes(token).into(),
        offset,
        logprob: scores.map(|scores| scores.logprob.max(LOWEST)),
        top: scores.map(|scores| scores.top.iter().map(alternative).collect()).unwrap_or_default(),
    }
}
