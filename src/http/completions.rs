//! `POST /v1/completions`.

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
    answer::{FinishReason, Head, LegacyLogprobs, Usage, with_generation},
    body::{StreamOptions, decoding_body, refuse_unsupported, target},
    error::{ApiResult, BodyErrors, CommonErrors, ModelErrors},
    extract::ApiJson,
    metered::Metered,
    sse,
    state::AppState,
};
use crate::{
    service::{Choice, Completion, CompletionRequest, Delta, Error, Prompt as Encoded, Prompts},
    types::TokenId,
};

/// What to complete.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a string, a list of strings, a list of token ids, or a list of lists of token ids"
)]
pub(super) enum Prompt {
    /// One text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// One prompt as token ids.
    Tokens(Vec<u64>),
    /// Several prompts as token ids.
    TokenLists(Vec<Vec<u64>>),
}

impl From<Prompt> for Prompts {
    fn from(prompt: Prompt) -> Self {
        match prompt {
            Prompt::Text(text) => Self::Texts(vec![text]),
            Prompt::Texts(texts) => Self::Texts(texts),
            Prompt::Tokens(tokens) => Self::Tokens(vec![tokens]),
            Prompt::TokenLists(lists) => Self::Tokens(lists),
        }
    }
}

decoding_body! {
    /// A completion to make. Unknown fields are ignored.
    pub(super) struct CompletionBody {
        /// The base's id, an adapter's name, `base:name`, or `base+<base64url of an adapter's bytes>`.
        #[schema(required = true, nullable = false, example = "SmolLM2-135M-Instruct")]
        model: Option<String>,
        /// What to complete: a text, several, or the same as token ids.
        #[schema(required = true, nullable = false)]
        prompt: Option<Prompt>,
        /// Completion tokens at most. 0 completes nothing: with `echo` and `logprobs` it scores the prompt.
        #[schema(minimum = 0, default = 16)]
        max_tokens: Option<u64>,
        /// Make so many choices on the server and return the `n` with the highest mean log-prob. Not with `stream` when above `n`.
        #[schema(minimum = 1, maximum = 128)]
        best_of: Option<u64>,
        /// Log-probs of each token, with so many alternatives.
        #[schema(minimum = 0, maximum = 5)]
        logprobs: Option<u64>,
        /// Put the prompt before each completion.
        #[schema(default = false)]
        echo: Option<bool>,
        /// Not supported: text after the completion.
        #[schema(value_type = Option<String>)]
        suffix: Option<Value>,
        /// Not supported.
        #[schema(value_type = Option<Vec<Object>>)]
        tools: Option<Value>,
        /// Not supported.
        #[schema(value_type = Option<Vec<Object>>)]
        functions: Option<Value>,
        /// Not supported.
        #[schema(value_type = Option<Object>)]
        audio: Option<Value>,
        /// Not supported.
        #[schema(value_type = Option<Object>)]
        response_format: Option<Value>,
    }
}

/// A completion, or a chunk of one.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct CompletionAnswer {
    /// The same in every chunk.
    #[schema(example = "cmpl-019bd2f1c1d27c3f8f1a8c4be4a6e0f1")]
    pub id: String,
    /// `text_completion`
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// As the request named it.
    pub model: String,
    /// Names the base weights.
    pub system_fingerprint: String,
    /// In a chunk the one choice that goes on; none in the usage chunk.
    pub choices: Vec<CompletionChoice>,
    /// In a stream only with `stream_options.include_usage`: null in every chunk but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

/// One choice.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct CompletionChoice {
    /// Prompt by prompt, n a prompt.
    pub index: usize,
    /// The text; in a chunk its next piece.
    pub text: String,
    /// When asked for.
    #[schema(required = true)]
    pub logprobs: Option<LegacyLogprobs>,
    /// Null in a chunk that is not the choice's last.
    #[schema(required = true)]
    pub finish_reason: Option<FinishReason>,
    /// With `return_token_ids`: every sampled token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<TokenId>>,
    /// With `return_token_ids`; in a stream on the choice's first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<TokenId>>,
}

/// Complete a prompt
///
/// With `stream` the answer is `text/event-stream`: chunks of the same shape as `data:` lines, then `data: [DONE]`. A failure in mid-stream is a
/// `data: {"error": ..}` line and the end.
#[utoipa::path(
    post,
    path = "/v1/completions",
    tag = "openai", extensions(("x-metered" = json!(true))),
    request_body = CompletionBody,
    responses(
        (
            status = 200, description = "The completion.",
            content((CompletionAnswer = "application/json"), (CompletionAnswer = "text/event-stream")),
            headers(
                ("x-adapter-generation" = String, description = "The generation of the adapter that answered; absent for the bare base and for a mix of several."),
            ),
        ),
        CommonErrors, BodyErrors, ModelErrors,
    ),
)]
pub(super) async fn completions(
    State(state): State<AppState>,
    Metered(caller, admission): Metered,
    ApiJson(mut body): ApiJson<CompletionBody>,
) -> ApiResult<Response> {
    let stream = body.stream.unwrap_or(false);
    let include_usage = StreamOptions::include_usage(body.stream_options.as_ref(), stream)?;
    refuse_unsupported(&[
        ("suffix", &body.suffix),
        ("tools", &body.tools),
        ("functions", &body.functions),
        ("audio", &body.audio),
        ("response_format", &body.response_format),
    ])?;
    let prompts = body.prompt.take().ok_or_else(|| Error::invalid("prompt", "'prompt' is required."))?.into();
    let max_tokens = body.max_tokens;
    let view = View { logprobs: body.logprobs.is_some(), ids: body.return_token_ids.unwrap_or(false), include_usage };
    let request = CompletionRequest {
        target: target(body.model.take(), body.adapter.take())?,
        prompts,
        decoding: body.take_decoding(max_tokens),
        best_of: body.best_of,
        echo: body.echo.unwrap_or(false),
        logprobs: body.logprobs,
        stream,
        return_token_ids: view.ids,
    };
    let head = Head::new("cmpl", request.target.model.clone(), &state.service.base);
    let completion = state.service.complete(&caller, admission, request).await?;
    let generation = completion.generation;
    let response = if stream { view.stream(head, completion) } else { view.whole(head, completion).await? };
    Ok(with_generation(response, generation))
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
        let (choices, usage) = completion.collect().await?;
        let choices = choices.into_iter().enumerate().map(|(index, choice)| self.choice(index, choice)).collect();
        Ok(Json(answer(head, choices, Some(Some(usage.into())))).into_response())
    }

    fn choice(self, index: usize, choice: Choice) -> CompletionChoice {
        let Choice { text, tokens, scores, reason, prompt } = choice;
        CompletionChoice {
            index,
            text,
            logprobs: self.logprobs.then(|| LegacyLogprobs::of(scores)),
            finish_reason: Some(reason.into()),
            token_ids: self.ids.then_some(tokens),
            prompt_token_ids: self.ids.then(|| prompt.tokens.to_vec()),
        }
    }

    fn stream(self, head: Head, completion: Completion) -> Response {
        let mut prompts: Vec<Option<Encoded>> =
            (0..completion.choices()).map(|choice| Some(completion.prompt(choice).clone())).collect();
        let mut used = crate::service::Usage::default();
        let pieces = completion.into_stream().map(Some).chain(stream::once(ready(None)));
        sse::respond(pieces.map(move |piece| match piece.transpose()? {
            Some((delta, usage)) => {
                used = usage;
                let prompt = prompts[delta.choice].take();
                let choice = self.chunk(delta, prompt.as_ref());
                Ok(vec![answer(head.clone(), vec![choice], self.include_usage.then_some(None))])
            }
            None if self.include_usage => Ok(vec![answer(head.clone(), Vec::new(), Some(Some(used.into())))]),
            None => Ok(Vec::new()),
        }))
    }

    /// `prompt` on the choice's first chunk.
    fn chunk(self, delta: Delta, prompt: Option<&Encoded>) -> CompletionChoice {
        let Delta { choice, text, tokens, scores, end } = delta;
        CompletionChoice {
            index: choice,
            text,
            logprobs: self.logprobs.then(|| LegacyLogprobs::of(scores)),
            finish_reason: end.map(|end| end.reason.into()),
            token_ids: self.ids.then_some(tokens),
            prompt_token_ids: prompt.filter(|_| self.ids).map(|prompt| prompt.tokens.to_vec()),
        }
    }
}

fn answer(head: Head, choices: Vec<CompletionChoice>, usage: Option<Option<Usage>>) -> CompletionAnswer {
    let Head { id, created, model, system_fingerprint } = head;
    CompletionAnswer { id, object: "text_completion", created, model, system_fingerprint, choices, usage }
}
