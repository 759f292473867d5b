//! The parts that request bodies of completions and chats share.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::schemas;
use crate::service::{AdapterField, Error, Target};

/// One stop string or several.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub(super) enum Stop {
    /// One.
    One(String),
    /// Up to four.
    Many(Vec<String>),
}

impl Stop {
    pub(super) fn into_list(self) -> Vec<String> {
        match self {
            Stop::One(stop) => vec![stop],
            Stop::Many(stops) => stops,
        }
    }
}

/// What a stream carries besides the choices.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(super) struct StreamOptions {
    /// One more chunk before `[DONE]`, with `usage` and no choices.
    #[schema(default = false)]
    pub include_usage: Option<bool>,
}

impl StreamOptions {
    /// Does the client ask for the usage chunk? Options without a stream are a mistake.
    pub(super) fn include_usage(options: Option<&Self>, stream: bool) -> Result<bool, Error> {
        match options {
            Some(_) if !stream => Err(Error::invalid("stream_options", "'stream_options' needs 'stream' to be true.")),
            options => Ok(options.and_then(|options| options.include_usage).unwrap_or(false)),
        }
    }
}

/// The adapter of this request: exactly one of `name`, `data` and `mix`.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AdapterBody {
    /// A stored adapter.
    #[schema(example = "alice")]
    pub name: Option<String>,
    /// The adapter's bytes in base64: the adapter travels inside the request.
    #[schema(example = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")]
    pub data: Option<String>,
    /// The scheme of `data`: a name or a description, as in an upload.
    #[schema(value_type = Option<schemas::Scheme>, default = "tiny13")]
    pub scheme: Option<Value>,
    /// Multiplies the update of `name` or `data`.
    #[schema(default = 1.0)]
    pub scale: Option<f64>,
    /// A weighted sum of the numbers of stored adapters of one scheme.
    pub mix: Option<Vec<MixPart>>,
}

/// One term of a mix.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MixPart {
    /// A stored adapter.
    pub name: String,
    /// Its weight.
    pub weight: f64,
}

impl AdapterBody {
    fn into_field(self) -> Result<AdapterField, Error> {
        let Self { name, data, scheme, scale, mix } = self;
        let only = |field: &str, of: &str| {
            Err(Error::invalid(format!("adapter.{field}"), format!("'adapter.{field}' is only for '{of}'.")))
        };
        match (name, data, mix) {
            (Some(_), None, None) if scheme.is_some() => only("scheme", "data"),
            (None, None, Some(_)) if scheme.is_some() => only("scheme", "data"),
            (None, None, Some(_)) if scale.is_some() => only("scale", "name' or 'data"),
            (Some(name), None, None) => Ok(AdapterField::Named { name, scale: scale.unwrap_or(1.0) }),
            (None, Some(data), None) => Ok(AdapterField::Inline { data, scheme, scale: scale.unwrap_or(1.0) }),
            (None, None, Some(mix)) if mix.is_empty() => {
                Err(Error::invalid("adapter.mix", "'adapter.mix' must name at least one adapter."))
            }
            (None, None, Some(mix)) => {
                Ok(AdapterField::Mix(mix.into_iter().map(|part| (part.name, part.weight)).collect()))
            }
            _ => Err(Error::invalid("adapter", "'adapter' takes exactly one of 'name', 'data' and 'mix'.")),
        }
    }
}

/// `model`, which is required, and `adapter`.
pub(super) fn target(model: Option<String>, adapter: Option<AdapterBody>) -> Result<Target, Error> {
    let model = model.ok_or_else(|| Error::invalid("model", "'model' is required."))?;
    Ok(Target { model, adapter: adapter.map(AdapterBody::into_field).transpose()? })
}

/// Refuses fields of OpenAI's API that ask for what this server does not do. Empty values ask for nothing.
pub(super) fn refuse_unsupported(fields: &[(&str, &Option<Value>)]) -> Result<(), Error> {
    let asks = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(entries) => !entries.is_empty(),
        Value::Bool(true) | Value::Number(_) => true,
    };
    match fields.iter().find(|(_, value)| value.as_ref().is_some_and(asks)) {
        Some((name, _)) => Err(Error::invalid(*name, format!("'{name}' is not supported by this server."))),
        None => Ok(()),
    }
}

/// Token id (a decimal string) to bias.
pub(super) type LogitBias = BTreeMap<String, f64>;

/// Declares a request body: its own fields, then the ones that choose tokens, which completions and chats share.
macro_rules! decoding_body {
    ($(#[$meta:meta])* pub(super) struct $name:ident { $($own:tt)* }) => {
        $(#[$meta])*
        #[derive(Debug, Deserialize, ToSchema)]
        pub(super) struct $name {
            $($own)*
            /// 0 is greedy.
            #[schema(minimum = 0, maximum = 2, default = 1.0)]
            temperature: Option<f64>,
            /// Keep the smallest set of tokens whose probability reaches this.
            #[schema(minimum = 0, maximum = 1, default = 1.0)]
            top_p: Option<f64>,
            /// Keep so many of the likeliest tokens; 0 and -1 keep all.
            #[schema(minimum = -1, default = 0)]
            top_k: Option<i64>,
            /// Drop tokens less likely than this share of the likeliest.
            #[schema(minimum = 0, maximum = 1, default = 0.0)]
            min_p: Option<f64>,
            /// Subtracted from the logits of tokens that the completion holds.
            #[schema(minimum = -2, maximum = 2, default = 0.0)]
            presence_penalty: Option<f64>,
            /// Subtracted once for each time that the completion holds the token.
            #[schema(minimum = -2, maximum = 2, default = 0.0)]
            frequency_penalty: Option<f64>,
            /// Divides positive and multiplies negative logits of tokens in prompt or completion.
            #[schema(minimum = 0.01, maximum = 10, default = 1.0)]
            repetition_penalty: Option<f64>,
            /// Token id to a number between -100 and 100 that is added to its logit.
            #[schema(example = json!({"50": -100}))]
            logit_bias: Option<$crate::http::body::LogitBias>,
            /// The same seed gives the same tokens; random by default. Choice k of a prompt uses a seed made of this and k.
            seed: Option<i64>,
            /// Choices a prompt.
            #[schema(minimum = 1, maximum = 128, default = 1)]
            n: Option<u64>,
            /// Up to four texts at which a choice ends; they are not part of it.
            stop: Option<$crate::http::body::Stop>,
            /// Neither a stop token nor a stop string ends a choice before so many tokens.
            #[schema(minimum = 0, default = 0)]
            min_tokens: Option<u64>,
            /// Go on after the model's end-of-sequence tokens.
            #[schema(default = false)]
            ignore_eos: Option<bool>,
            /// Adds `token_ids` to each choice and `prompt_token_ids`: every sampled token, the ones that end a choice included.
            #[schema(default = false)]
            return_token_ids: Option<bool>,
            /// The answer is a stream of server-sent events.
            #[schema(default = false)]
            stream: Option<bool>,
            /// Only with `stream`.
            stream_options: Option<$crate::http::body::StreamOptions>,
            /// Ignored.
            #[expect(dead_code, reason = "only its type is checked")]
            user: Option<String>,
            /// The adapter, when `model` does not name it.
            adapter: Option<$crate::http::body::AdapterBody>,
        }

        impl $name {
            fn take_decoding(&mut self, max_tokens: Option<u64>) -> $crate::service::Decoding {
                $crate::service::Decoding {
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k,
                    min_p: self.min_p,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    repetition_penalty: self.repetition_penalty,
                    logit_bias: self.logit_bias.take().unwrap_or_default(),
                    seed: self.seed,
                    n: self.n,
                    stop: self.stop.take().map(|stop| stop.into_list()).unwrap_or_default(),
                    max_tokens,
                    min_tokens: self.min_tokens,
                    ignore_eos: self.ignore_eos.unwrap_or(false),
                }
            }
        }
    };
}
pub(super) use decoding_body;
