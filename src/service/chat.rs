//! A chat: messages become a prompt by the model's own template, and the rest is a completion.

use std::time::Instant;

use serde::Serialize;

use super::{
    BaseInfo, Error, Service,
    completion::{Completion, Plan, blocking, encode},
    decoding::Decoding,
    reader::{Prompt, Show},
};
use crate::tenant::{Admission, Caller};

/// At most so many alternatives in `/v1/chat/completions`.
pub const MAX_TOP_LOGPROBS: u64 = 20;

/// A message as templates see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// system, user or assistant.
    pub role: &'static str,
    /// Text.
    pub content: String,
}

/// `/v1/chat/completions` in the service's words.
#[derive(Debug, Clone)]
pub struct ChatRequest {
    /// What `model` and `adapter` say.
    pub target: super::Target,
    /// At least one.
    pub messages: Vec<Message>,
    /// How.
    pub decoding: Decoding,
    /// Log-probs of the completion.
    pub logprobs: bool,
    /// With so many alternatives, 0..=20; needs `logprobs`.
    pub top_logprobs: Option<u64>,
    /// Token ids beside the text.
    pub return_token_ids: bool,
}

impl Service {
    /// Starts a chat completion. Everything that can be wrong with the request is found before the engine hears of it.
    pub async fn chat(&self, caller: &Caller, admission: Admission, request: ChatRequest) -> Result<Completion, Error> {
        let started = Instant::now();
        let checked = request.decoding.check(&self.base)?;
        if request.decoding.max_tokens == Some(0) {
            return Err(Error::invalid("max_tokens", "'max_tokens' must be at least 1."));
        }
        let logprobs = logprobs(&request)?;
        if request.messages.is_empty() {
            return Err(Error::invalid("messages", "'messages' must hold at least one message."));
        }
        self.policy.check_choices(checked.n, checked.n)?;
        let lease = self.resolve(caller, &request.target).await?;
        let place = self.admit(caller, checked.n)?;
        let base = self.base.clone();
        let prompt = blocking(move || prompt(&base, &request.messages)).await?;
        let show = Show { end_tokens: request.return_token_ids, ..Show::default() };
        let best_of = checked.n;
        self.policy.log(caller.tenant, std::slice::from_ref(&prompt));
        let plan = Plan {
            prompts: vec![prompt],
            checked,
            default_max_tokens: None,
            param: "messages",
            best_of,
            logprobs,
            show,
            place,
        };
        self.start(caller, plan, admission, lease, started)
    }
}

fn logprobs(request: &ChatRequest) -> Result<Option<usize>, Error> {
    let top = request.top_logprobs.unwrap_or(0);
    if top > MAX_TOP_LOGPROBS {
        let message = format!("'top_logprobs' must be between 0 and {MAX_TOP_LOGPROBS}; it is {top}.");
        return Err(Error::invalid("top_logprobs", message));
    }
    if top > 0 && !request.logprobs {
        return Err(Error::invalid("top_logprobs", "'top_logprobs' needs 'logprobs' to be true."));
    }
    Ok(request.logprobs.then_some(top as usize))
}

/// The template writes the special tokens itself, so the tokenizer adds none.
fn prompt(base: &BaseInfo, messages: &[Message]) -> Result<Prompt, Error> {
    let template = base.chat_template.as_ref().ok_or_else(|| {
        let message = format!("The model '{}' has no chat template; use /v1/completions.", base.model_id);
        Error::invalid("messages", message).with_code("no_chat_template")
    })?;
    let text = template.render(messages, true).map_err(|error| Error::invalid("messages", format!("{error}.")))?;
    encode(base, text, false, "messages")
}
