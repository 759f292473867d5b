//! The prompt of items that bring none: a template a job gives.

use serde::Deserialize;
use serde_json::Value;

use super::{Message, Prompt, Role};
use crate::template::{Scope, Template, TemplateError};

/// A template of the text to continue, or of a conversation: `"Q: {{item.question}}\nA:"`, or `[{"role": "user", "content": "{{item.question}}"}]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptTemplate {
    /// Text to continue.
    Text(Template),
    /// A conversation.
    Messages(Vec<(Role, Template)>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MessageTemplate {
    role: Role,
    content: String,
}

impl PromptTemplate {
    /// Reads a template from a job's JSON: a string, or a list of messages.
    pub fn from_json(value: &Value) -> Result<Self, TemplateError> {
        let without_output = |source: &str| {
            let template = Template::parse(source)?;
            if template.uses_output() {
                return Err(TemplateError(
                    "a prompt cannot name `sample.output_text`: there is no completion yet".to_owned(),
                ));
            }
            Ok(template)
        };
        match value {
            Value::String(source) if source.is_empty() => Err(TemplateError("a prompt must not be empty".to_owned())),
            Value::String(source) => without_output(source).map(Self::Text),
            Value::Array(list) if !list.is_empty() => {
                let message = |value: &Value| {
                    let message =
                        MessageTemplate::deserialize(value).map_err(|error| TemplateError(error.to_string()))?;
                    Ok((message.role, without_output(&message.content)?))
                };
                list.iter().map(message).collect::<Result<_, _>>().map(Self::Messages)
            }
            _ => Err(TemplateError("a prompt is a string or a list of messages".to_owned())),
        }
    }

    /// The prompt of an item.
    pub fn render(&self, item: &Value) -> Result<Prompt, TemplateError> {
        let scope = Scope { item, output_text: None };
        match self {
            Self::Text(template) => template.render(scope).map(Prompt::Text),
            Self::Messages(messages) => messages
                .iter()
                .map(|(role, content)| Ok(Message { role: *role, content: content.render(scope)? }))
                .collect::<Result<_, _>>()
                .map(Prompt::Messages),
        }
    }
}
