//! The messages of a chat: what clients may send, and what of it templates see.

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::body::refuse_unsupported;
use crate::service::{Error, Message};

/// A message of the conversation.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct ChatMessage {
    /// Who speaks. `developer` is `system` to the template.
    role: Role,
    /// Text, or text parts, which are joined by newlines.
    #[schema(required = true, nullable = false)]
    content: Option<Content>,
    /// Ignored.
    #[expect(dead_code, reason = "only its type is checked")]
    name: Option<String>,
    /// Not supported.
    #[schema(value_type = Option<Vec<Object>>)]
    tool_calls: Option<Value>,
    /// Not supported.
    #[schema(value_type = Option<Object>)]
    function_call: Option<Value>,
    /// Not supported.
    #[schema(value_type = Option<Object>)]
    audio: Option<Value>,
    /// Not supported.
    refusal: Option<Value>,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Role {
    /// What the assistant is.
    System,
    /// The newer word for system.
    Developer,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
}

/// What a message says.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of parts, each with a 'type'")]
pub(super) enum Content {
    /// A text.
    Text(String),
    /// Parts.
    Parts(Vec<Part>),
}

/// A part of a message; only text parts are supported.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct Part {
    /// `text`
    #[schema(example = "text")]
    r#type: String,
    /// The text.
    #[schema(required = true, nullable = false)]
    text: Option<String>,
}

/// Every message as templates see it, or what is wrong with the first that cannot be.
pub(super) fn messages(given: Vec<ChatMessage>) -> Result<Vec<Message>, Error> {
    given.into_iter().enumerate().map(message).collect()
}

fn message((at, message): (usize, ChatMessage)) -> Result<Message, Error> {
    let field = |name: &str| format!("messages[{at}].{name}");
    let extras = [
        ("tool_calls", &message.tool_calls),
        ("function_call", &message.function_call),
        ("audio", &message.audio),
        ("refusal", &message.refusal),
    ];
    for (name, value) in extras {
        refuse_unsupported(&[(&field(name), value)])?;
    }
    let role = match message.role {
        Role::System | Role::Developer => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
    };
    let content = match message.content {
        None => return Err(Error::invalid(field("content"), format!("'{}' is required.", field("content")))),
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => {
            let texts = parts.into_iter().enumerate().map(|(part_at, part)| {
                let param = || field(&format!("content[{part_at}]"));
                match part {
                    Part { r#type, text: Some(text) } if r#type == "text" => Ok(text),
                    Part { r#type, text: None } if r#type == "text" => {
                        Err(Error::invalid(param(), format!("'{}': a text part needs 'text'.", param())))
                    }
                    Part { r#type, .. } => {
                        let message =
                            format!("'{}': parts of type '{}' are not supported, only text.", param(), r#type);
                        Err(Error::invalid(param(), message))
                    }
                }
            });
            texts.collect::<Result<Vec<String>, Error>>()?.join("\n")
        }
    };
    Ok(Message { role, content })
}
