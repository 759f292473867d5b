//! One item of a dataset: a prompt, perhaps a demonstration, and the fields a grader may name.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{DataError, Place};

/// Messages of one conversation at most.
const MAX_MESSAGES: usize = 256;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions (`developer` is read as this).
    #[serde(alias = "developer")]
    System,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What they say.
    pub content: String,
}

/// What the model is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    /// Text to continue, as in a completion: no chat template.
    Text(String),
    /// A conversation, for the model's chat template.
    Messages(Vec<Message>),
}

/// One item.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Where it stood, for error messages.
    pub place: Place,
    /// What the model is asked.
    pub prompt: Prompt,
    /// The demonstration; always there for sft.
    pub completion: Option<String>,
    /// The object as it was read: `item` in templates.
    pub fields: Arc<Value>,
}

/// A message as it was written, before we know whether it is the prompt's or a demonstration.
pub(super) struct WrittenMessage {
    pub(super) message: Message,
    /// OpenAI's `weight`: is this assistant message to be learnt?
    pub(super) learnt: bool,
}

/// Reads `messages` of an item. `tool` messages and tool calls are refused: the base cannot be asked that way.
pub(super) fn read_messages(value: &Value, place: Place) -> Result<Vec<WrittenMessage>, DataError> {
    let fail = |field: &str, message: &str| DataError::new(place, Some(field), message);
    let list = value.as_array().ok_or_else(|| fail("messages", "must be a list"))?;
    if list.is_empty() {
        return Err(fail("messages", "must not be empty"));
    }
    if list.len() > MAX_MESSAGES {
        return Err(fail("messages", &format!("holds more than {MAX_MESSAGES} messages")));
    }
    list.iter()
        .enumerate()
        .map(|(index, message)| read_message(message, place, &format!("messages[{index}]")))
        .collect()
}

fn read_message(value: &Value, place: Place, at: &str) -> Result<WrittenMessage, DataError> {
    let fail = |field: &str, message: &str| DataError::new(place, Some(field), message);
    let object = value.as_object().ok_or_else(|| fail(at, "must be an object"))?;
    for unsupported in ["tool_calls", "function_call", "tool_call_id", "audio"] {
        if object.get(unsupported).is_some_and(|value| !value.is_null()) {
            return Err(fail(&format!("{at}.{unsupported}"), "is not supported"));
        }
    }
    let role = match object.get("role").and_then(Value::as_str) {
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some(other) => {
            let message = format!("must be system, developer, user or assistant, not {other:?}");
            return Err(fail(&format!("{at}.role"), &message));
        }
        None => return Err(fail(&format!("{at}.role"), "is missing or not a string")),
    };
    let content = read_content(object.get("content"), place, &format!("{at}.content"))?;
    let learnt = match object.get("weight") {
        None | Some(Value::Null) => true,
        Some(weight) if role == Role::Assistant && weight.as_f64() == Some(1.0) => true,
        Some(weight) if role == Role::Assistant && weight.as_f64() == Some(0.0) => false,
        Some(_) => return Err(fail(&format!("{at}.weight"), "must be 0 or 1, on an assistant's message")),
    };
    Ok(WrittenMessage { message: Message { role, content }, learnt })
}

/// A string, or a list of text parts joined by newlines (as the chat route does).
fn read_content(value: Option<&Value>, place: Place, at: &str) -> Result<String, DataError> {
    let fail = |message: &str| DataError::new(place, Some(at), message);
    match value {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => {
            let text =
                |part: &Value| (part["type"] == "text").then(|| part["text"].as_str().map(str::to_owned)).flatten();
            let parts: Option<Vec<String>> = parts.iter().map(text).collect();
            parts.map(|parts| parts.join("\n")).ok_or_else(|| fail("may hold only parts of type text"))
        }
        Some(_) => Err(fail("must be a string or a list of text parts")),
        None => Err(fail("is missing")),
    }
}

/// A string field that must hold something when it is there. Null is as if absent.
pub(super) fn optional_text(
    object: &Map<String, Value>,
    name: &str,
    place: Place,
) -> Result<Option<String>, DataError> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Err(DataError::new(place, Some(name), "must not be empty")),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(DataError::new(place, Some(name), "must be a string")),
    }
}
