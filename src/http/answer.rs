//! The parts that answers of completions and chats share.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::{
    http::{HeaderName, HeaderValue},
    response::Response,
};
use serde::{Serialize, Serializer, ser::SerializeMap as _};
use utoipa::ToSchema;

use crate::{
    service::{self, Alternative, TokenScore},
    types::Generation,
};

const GENERATION: HeaderName = HeaderName::from_static("x-adapter-generation");

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum FinishReason {
    /// A stop token or a stop string.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
}

impl From<service::FinishReason> for FinishReason {
    fn from(reason: service::FinishReason) -> Self {
        match reason {
            service::FinishReason::Stop => Self::Stop,
            service::FinishReason::Length => Self::Length,
        }
    }
}

/// What a request cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct Usage {
    /// Each prompt once, whatever the number of choices.
    pub prompt_tokens: usize,
    /// Of all choices, stop tokens and the choices that `best_of` dropped included.
    pub completion_tokens: usize,
    /// The sum.
    pub total_tokens: usize,
    /// Of the prompt tokens.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// Where prompt tokens came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct PromptTokensDetails {
    /// Those whose keys and values were in the prefix cache.
    pub cached_tokens: usize,
}

impl From<service::Usage> for Usage {
    fn from(usage: service::Usage) -> Self {
        let service::Usage { prompt_tokens, completion_tokens, cached_tokens } = usage;
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
        }
    }
}

/// Log-probs of `/v1/completions`: four lists of the same length, one entry a token.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(super) struct LegacyLogprobs {
    /// Spellings; U+FFFD stands for what is no character by itself.
    pub tokens: Vec<String>,
    /// Of the raw logits, before temperature and penalties. Null for the first token of an echoed prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// Spelling to log-prob: the likeliest tokens, and the chosen one.
    pub top_logprobs: Vec<Option<TopLogprobs>>,
    /// Where the token begins in the choice's text, in characters.
    pub text_offset: Vec<usize>,
}

/// Spelling to log-prob, likeliest first.
#[derive(Debug, Clone, PartialEq, ToSchema)]
#[schema(value_type = std::collections::HashMap<String, f32>)]
pub(super) struct TopLogprobs(Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        self.0.iter().try_for_each(|(text, logprob)| map.serialize_entry(text, logprob))?;
        map.end()
    }
}

impl LegacyLogprobs {
    /// In the order of the tokens.
    pub(super) fn of(scores: Vec<TokenScore>) -> Self {
        Self {
            token_logprobs: scores.iter().map(|score| score.logprob).collect(),
            top_logprobs: scores.iter().map(|score| score.logprob.map(|own| TopLogprobs::of(score, own))).collect(),
            text_offset: scores.iter().map(|score| score.offset).collect(),
            tokens: scores.into_iter().map(|score| score.text).collect(),
        }
    }
}

impl TopLogprobs {
    /// Two tokens may be spelt alike (as U+FFFD); then the likelier one is shown.
    fn of(score: &TokenScore, own: f32) -> Self {
        let mut entries: Vec<(String, f32)> = Vec::with_capacity(score.top.len() + 1);
        let all = score.top.iter().map(|top| (&top.text, top.logprob)).chain([(&score.text, own)]);
        for (text, logprob) in all {
            if entries.iter().all(|(other, _)| other != text) {
                entries.push((text.clone(), logprob));
            }
        }
        Self(entries)
    }
}

/// Log-probs of a chat.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(super) struct ChatLogprobs {
    /// One entry a token.
    pub content: Vec<ChatTokenLogprob>,
    /// Always null: this server does not refuse in words of its own.
    #[schema(required = true)]
    pub refusal: Option<Vec<ChatTokenLogprob>>,
}

/// A token of a chat.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(super) struct ChatTokenLogprob {
    /// Its spelling.
    pub token: String,
    /// Of the raw logits, before temperature and penalties.
    pub logprob: f32,
    /// Its bytes; a character may be spread over several tokens. Null for an id without a spelling.
    #[schema(required = true)]
    pub bytes: Option<Vec<u8>>,
    /// The likeliest tokens at this place, `top_logprobs` of them.
    pub top_logprobs: Vec<TopLogprob>,
}

/// A token that could have been.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(super) struct TopLogprob {
    /// Its spelling.
    pub token: String,
    /// Of the raw logits.
    pub logprob: f32,
    /// Its bytes.
    #[schema(required = true)]
    pub bytes: Option<Vec<u8>>,
}

impl ChatLogprobs {
    pub(super) fn of(scores: Vec<TokenScore>) -> Self {
        let bytes = |bytes: &[u8]| (!bytes.is_empty()).then(|| bytes.to_vec());
        let top = |Alternative { text, bytes: raw, logprob }: Alternative| TopLogprob {
            token: text,
            logprob,
            bytes: bytes(&raw),
        };
        let entry = |score: TokenScore| {
            Some(ChatTokenLogprob {
                logprob: score.logprob?,
                bytes: bytes(&score.bytes),
                token: score.text,
                top_logprobs: score.top.into_iter().map(top).collect(),
            })
        };
        Self { content: scores.into_iter().filter_map(entry).collect(), refusal: None }
    }
}

/// What every chunk of one answer repeats.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) system_fingerprint: String,
}

impl Head {
    pub(super) fn new(prefix: &str, model: String, base: &service::BaseInfo) -> Self {
        let id = format!("{prefix}-{}", uuid::Uuid::now_v7().simple());
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let system_fingerprint = format!("fp_{:.12}", base.fingerprint.to_string());
        Self { id, created, model, system_fingerprint }
    }
}

/// Says which generation of an adapter answered; nothing for the bare base.
pub(super) fn with_generation(mut response: Response, generation: Option<Generation>) -> Response {
    if let Some(value) = generation.and_then(|generation| HeaderValue::from_str(&generation.to_string()).ok()) {
        response.headers_mut().insert(GENERATION, value);
    }
    response
}
