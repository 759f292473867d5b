//! `POST /v1/chat/completions`.

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use futures::{StreamExt as _, future::ready, stream};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    answer::{ChatLogprobs, FinishReason, Head, Usage, with_generation},
    body::{StreamOptions, decoding_body, refuse_unsupported, target},
    error::{ApiResult, BodyErrors, CommonErrors, ModelErrors},
    extract::ApiJson,
    messages::{ChatMessage, messages},
    metered::Metered,
    sse,
    state::AppState,
};
use crate::{
    service::{ChatRequest, Choice, Completion, Delta, Error},
    types::TokenId,
};

/// In which form the model answers.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct ResponseFormat {
    /// Only `text`.
    #[schema(example = "text")]
    r#type: String,
}

decoding_body! {
    /// A chat to continue. Unknown fields are ignored; the fields that are not supported are refused when they ask for something.
    pub(super) struct ChatBody {
        /// The base's id, an adapter's name, `base:name`, or `base+<base64url of an adapter's bytes>`.
        #[schema(required = true, nullable = false, example = "SmolLM2-135M-Instruct")]
        model: Option<String>,
        /// The conversation so far, at least one message.
        #[schema(required = true, nullable = false, min_items = 1)]
        messages: Option<Vec<ChatMessage>>,
        /// The older name of `max_completion_tokens`.
        #[schema(minimum = 1)]
        max_tokens: Option<u64>,
        /// Completion tokens at most; by default the rest of the context.
        #[schema(minimum = 1)]
        max_completion_tokens: Option<u64>,
        /// Log-probs of each token.
        #[schema(default = false)]
        logprobs: Option<bool>,
        /// With so many alternatives; needs `logprobs`.
        #[schema(minimum = 0, maximum = 20, default = 0)]
        top_logprobs: Option<u64>,
        /// Only `{"type": "text"}`.
        response_format: Option<ResponseFormat>,
        /// Only `["text"]`.
        modalities: Option<Vec<String>>,
        /// Not supported.
        #[schema(value_type = Option<Vec<Object>>)]
        tools: Option<Value>,
        /// Only `none` and `auto`, which ask for nothing without tools.
        #[schema(value_type = Option<String>)]
        tool_choice: Option<Value>,
        /// Not supported.
        #[schema(value_type = Option<Vec<Object>>)]
        functions: Option<Value>,
        /// Not supported, but for `none` and `auto`.
        #[schema(value_type = Option<String>)]
        function_call: Option<Value>,
        /// Not supported.
        #[schema(value_type = Option<Object>)]
        audio: Option<Value>,
        /// Not supported.
        #[schema(value_type = Option<Object>)]
        prediction: Option<Value>,
        /// Not supported.
        #[schema(value_type = Option<Object>)]
        web_search_options: Option<Value>,
        /// Not supported.
        #[schema(value_type = Option<String>)]
        reasoning_effort: Option<Value>,
        /// Not supported.
        #[schema(value_type = Option<String>)]
        verbosity: Option<Value>,
        /// Not supported: nothing is stored.
        #[schema(value_type = Option<bool>)]
        store: Option<Value>,
    }
}

/// A finished chat completion.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ChatAnswer {
    /// Of this answer.
    #[schema(example = "chatcmpl-019bd2f1c1d27c3f8f1a8c4be4a6e0f1")]
    pub id: String,
    /// `chat.completion`
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// As the request named it.
    pub model: String,
    /// Names the base weights.
    pub system_fingerprint: String,
    /// `n` of them.
    pub choices: Vec<ChatChoice>,
    /// What it cost.
    pub usage: Usage,
    /// With `return_token_ids`: the rendered conversation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<TokenId>>,
}

/// One answer to the conversation.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ChatChoice {
    /// 0..n
    pub index: usize,
    /// The answer.
    pub message: AssistantMessage,
    /// When asked for.
    #[schema(required = true)]
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// With `return_token_ids`: every sampled token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<TokenId>>,
}

/// What the model says.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AssistantMessage {
    /// `assistant`
    pub role: &'static str,
    /// The text.
    pub content: String,
    /// Always null.
    #[schema(required = true)]
    pub refusal: Option<String>,
}

/// A piece of a streamed chat completion.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ChatChunk {
    /// The same in every chunk.
    pub id: String,
    /// `chat.completion.chunk`
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// As the request named it.
    pub model: String,
    /// Names the base weights.
    pub system_fingerprint: String,
    /// The one choice that goes on; none in the usage chunk.
    pub choices: Vec<ChatChunkChoice>,
    /// Only with `stream_options.include_usage`: null in every chunk but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
    /// With `return_token_ids`, on the first chunk of each choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<TokenId>>,
}

/// The choice that goes on.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ChatChunkChoice {
    /// Which.
    pub index: usize,
    /// The role on the first chunk, text on the later ones, nothing on the last.
    pub delta: ChatDelta,
    /// When asked for.
    #[schema(required = true)]
    pub logprobs: Option<ChatLogprobs>,
    /// Null but on the last chunk.
    #[schema(required = true)]
    pub finish_reason: Option<FinishReason>,
    /// With `return_token_ids`: the tokens sampled since the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<TokenId>>,
}

/// What is new.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(super) struct ChatDelta {
    /// `assistant`, on the first chunk only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// The next piece of the text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// Continue a conversation
///
/// The prompt is made by the model's own template; a model without one answers 400 `no_chat_template`. With `stream` the answer is
/// `text/event-stream`: chunks as `data:` lines, then `data: [DONE]`. A failure in mid-stream is a `data: {"error": ..}` line and the end.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    tag = "openai", extensions(("x-metered" = json!(true))),
    request_body = ChatBody,
    responses(
        (
            status = 200, description = "The completion.",
            content((ChatAnswer = "application/json"), (ChatChunk = "text/event-stream")),
            headers(
                ("x-adapter-generation" = String, description = "The generation of the adapter that answered; absent for the bare base and for a mix of several."),
            ),
        ),
        CommonErrors, BodyErrors, ModelErrors,
    ),
)]
pub(super) async fn chat_completions(
    State(state): State<AppState>,
    Metered(caller, admission): Metered,
    ApiJson(mut body): ApiJson<ChatBody>,
) -> ApiResult<Response> {
    let stream = body.stream.unwrap_or(false);
    let include_usage = StreamOptions::include_usage(body.stream_options.as_ref(), stream)?;
    body.refuse_what_is_not_supported()?;
    let given = body.messages.take().ok_or_else(|| Error::invalid("messages", "'messages' is required."))?;
    let messages = messages(given)?;
    let max_tokens = body.budget()?;
    let view =
        View { logprobs: body.logprobs.unwrap_or(false), ids: body.return_token_ids.unwrap_or(false), include_usage };
    let request = ChatRequest {
        target: target(body.model.take(), body.adapter.take())?,
        messages,
        decoding: body.take_decoding(max_tokens),
        logprobs: view.logprobs,
        top_logprobs: body.top_logprobs,
        return_token_ids: view.ids,
    };
    let head = Head::new("chatcmpl", request.target.model.clone(), &state.service.base);
    let completion = state.service.chat(&caller, admission, request).await?;
    let generation = completion.generation;
    let response = if stream { view.stream(head, completion) } else { view.whole(head, completion).await? };
    Ok(with_generation(response, generation))
}

impl ChatBody {
    fn refuse_what_is_not_supported(&self) -> Result<(), Error> {
        let harmless = |value: &Option<Value>| {
            value.clone().filter(|value| !value.as_str().is_some_and(|word| matches!(word, "none" | "auto")))
        };
        refuse_unsupported(&[
            ("tools", &self.tools),
            ("tool_choice", &harmless(&self.tool_choice)),
            ("functions", &self.functions),
            ("function_call", &harmless(&self.function_call)),
            ("audio", &self.audio),
            ("prediction", &self.prediction),
            ("web_search_options", &self.web_search_options),
            ("reasoning_effort", &self.reasoning_effort),
            ("verbosity", &self.verbosity),
            ("store", &self.store),
        ])?;
        if self.response_format.as_ref().is_some_and(|format| format.r#type != "text") {
            return Err(Error::invalid("response_format", "'response_format' other than text is not supported."));
        }
        if self.modalities.iter().flatten().any(|modality| modality != "text") {
            return Err(Error::invalid("modalities", "'modalities' other than text are not supported."));
        }
        Ok(())
    }

    fn budget(&self) -> Result<Option<u64>, Error> {
        for (param, value) in [("max_completion_tokens", self.max_completion_tokens), ("max_tokens", self.max_tokens)] {
            if value == Some(0) {
                return Err(Error::invalid(param, format!("'{param}' must be at least 1.")));
            }
        }
        Ok(self.max_completion_tokens.or(self.max_tokens))
    }
}

/// What the client asked to see.
#[derive(Debug, Clone, Copy)]
struct View {
    logprobs: bool,
    ids: bool,
    include_usage: bool,
}

impl View {
    async fn whole(self, head: Head, completion: Completion) -> ApiResult<Response> {
        let prompt_token_ids = self.ids.then(|| completion.prompt(0).tokens.to_vec());
        let (choices, usage) = completion.collect().await?;
        let choices = choices.into_iter().enumerate().map(|(index, choice)| self.choice(index, choice)).collect();
        let Head { id, created, model, system_fingerprint } = head;
        let object = "chat.completion";
        let usage = usage.into();
        let answer = ChatAnswer { id, object, created, model, system_fingerprint, choices, usage, prompt_token_ids };
        Ok(Json(answer).into_response())
    }

    fn choice(self, index: usize, choice: Choice) -> ChatChoice {
        let Choice { text, tokens, scores, reason, .. } = choice;
        ChatChoice {
            index,
            message: AssistantMessage { role: "assistant", content: text, refusal: None },
            logprobs: self.logprobs.then(|| ChatLogprobs::of(scores)),
            finish_reason: reason.into(),
            token_ids: self.ids.then_some(tokens),
        }
    }

    fn stream(self, head: Head, completion: Completion) -> Response {
        let prompt = self.ids.then(|| completion.prompt(0).tokens.to_vec());
        let usage = self.include_usage.then_some(None);
        let first = (0..completion.choices()).map(|index| {
            let delta = ChatDelta { role: Some("assistant"), content: Some(String::new()) };
            let choice = ChatChunkChoice { index, delta, logprobs: None, finish_reason: None, token_ids: None };
            chunk(&head, vec![choice], usage, prompt.clone())
        });
        let first = stream::once(ready(Ok(first.collect::<Vec<_>>())));
        let mut used = crate::service::Usage::default();
        let pieces = completion.into_stream().map(Some).chain(stream::once(ready(None)));
        sse::respond(first.chain(pieces.map(move |piece| match piece.transpose()? {
            Some((delta, so_far)) => {
                used = so_far;
                Ok(self.choices(delta).map(|choice| chunk(&head, vec![choice], usage, None)).collect())
            }
            None if self.include_usage => Ok(vec![chunk(&head, Vec::new(), Some(Some(used.into())), None)]),
            None => Ok(Vec::new()),
        })))
    }

    /// A piece as chunks: its text, then its end, whose delta is empty.
    fn choices(self, delta: Delta) -> impl Iterator<Item = ChatChunkChoice> {
        let Delta { choice: index, text, tokens, scores, end } = delta;
        let alone = text.is_empty();
        let carried = |here: bool| (here && self.logprobs, here && self.ids);
        let (mut scores, mut tokens) = (Some(scores), Some(tokens));
        let mut build = move |delta, here, finish_reason| {
            let (logprobs, ids) = carried(here);
            ChatChunkChoice {
                index,
                delta,
                logprobs: logprobs.then(|| ChatLogprobs::of(scores.take().unwrap_or_default())),
                finish_reason,
                token_ids: ids.then(|| tokens.take().unwrap_or_default()),
            }
        };
        let body = (!alone).then(|| build(ChatDelta { role: None, content: Some(text) }, true, None));
        // Tokens that are no text (a stop token, when ids are asked for) go with the end.
        let last = end.map(|end| build(ChatDelta::default(), alone, Some(end.reason.into())));
        body.into_iter().chain(last)
    }
}

fn chunk(
    head: &Head,
    choices: Vec<ChatChunkChoice>,
    usage: Option<Option<Usage>>,
    prompt_token_ids: Option<Vec<TokenId>>,
) -> ChatChunk {
    let Head { id, created, model, system_fingerprint } = head.clone();
    let object = "chat.completion.chunk";
    ChatChunk { id, object, created, model, system_fingerprint, choices, usage, prompt_token_ids }
}
