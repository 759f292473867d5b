//! From items to tokens. The tokenizer and the chat template are the server's, behind a trait.

use std::sync::Arc;

use serde_json::Value;

use super::{DataError, DataErrors, Item, Place, Prompt, collect};

/// Turns text into tokens as the served model does. An error is about the text it was given, in words for its owner.
pub trait Encoder {
    /// The prompt's tokens: a conversation through the chat template with the generation prompt, text as a completion's prompt is.
    fn prompt(&self, prompt: &Prompt) -> Result<Vec<u32>, String>;
    /// The tokens of this completion after this prompt, with the token that ends it.
    fn completion(&self, prompt: &Prompt, text: &str) -> Result<Vec<u32>, String>;
    /// The longest sequence the model takes, in tokens.
    fn context(&self) -> usize;
}

/// An item in tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Where it stood.
    pub place: Place,
    /// The prompt's tokens, at least one.
    pub prompt: Vec<u32>,
    /// The demonstration's tokens; empty where none is needed.
    pub target: Vec<u32>,
    /// `item` in templates.
    pub fields: Arc<Value>,
}

/// Examples, shared and never changed.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// At least one.
    pub examples: Arc<[Example]>,
    /// Demonstrations that were longer than the token limit and lost their end.
    pub shortened: usize,
    digest: u64,
}

impl Dataset {
    /// A dataset of examples that exist already; at least one.
    pub fn new(examples: Vec<Example>) -> Result<Self, DataErrors> {
        if examples.is_empty() {
            return Err(DataErrors::one(Place::All, None, "holds no item"));
        }
        let digest = digest(&examples);
        Ok(Self { examples: examples.into(), shortened: 0, digest })
    }

    /// How many examples.
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// Never: a dataset holds at least one example.
    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// A fingerprint of tokens and fields (FNV-1a): a checkpoint goes on only with the data it was made with. Not a defence against anybody.
    pub fn digest(&self) -> u64 {
        self.digest
    }
}

/// Encodes items. `targets`: are demonstrations needed? A prompt must leave room for `max_completion_tokens` in the context; a longer demonstration loses its end.
pub fn encode(
    items: &[Item],
    encoder: &dyn Encoder,
    max_completion_tokens: usize,
    targets: bool,
) -> Result<Dataset, DataErrors> {
    let mut shortened = 0;
    let examples = collect(items, |item| {
        let fail = |field: &str, message: String| DataError::new(item.place, Some(field), message);
        let field = if matches!(item.prompt, Prompt::Messages(_)) { "messages" } else { "prompt" };
        let prompt = encoder.prompt(&item.prompt).map_err(|error| fail(field, error))?;
        if prompt.is_empty() {
            return Err(fail(field, "is empty in tokens".to_owned()));
        }
        if prompt.len() + max_completion_tokens > encoder.context() {
            let message = format!(
                "is {} tokens long; with {max_completion_tokens} of the completion (max_completion_tokens) that is beyond the context of {}",
                prompt.len(),
                encoder.context()
            );
            return Err(fail(field, message));
        }
        let mut target = Vec::new();
        if targets {
            let text = item.completion.as_deref().ok_or_else(|| fail("completion", "is missing".to_owned()))?;
            target = encoder.completion(&item.prompt, text).map_err(|error| fail("completion", error))?;
            if target.is_empty() {
                return Err(fail("completion", "is empty in tokens".to_owned()));
            }
            shortened += usize::from(target.len() > max_completion_tokens);
            target.truncate(max_completion_tokens);
        }
        Ok(Example { place: item.place, prompt, target, fields: item.fields.clone() })
    })?;
    Ok(Dataset { shortened, ..Dataset::new(examples)? })
}

fn digest(examples: &[Example]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut add = |bytes: &[u8]| {
        for &byte in bytes {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for example in examples {
        for tokens in [&example.prompt, &example.target] {
            add(&(tokens.len() as u64).to_le_bytes());
            tokens.iter().for_each(|token| add(&token.to_le_bytes()));
        }
        add(example.fields.to_string().as_bytes());
    }
    hash
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::{ReadOptions, read_values};

    /// A token a byte, 0 at the end; refuses a `!`.
    struct Bytes;

    impl Encoder for Bytes {
        fn prompt(&self, prompt: &Prompt) -> Result<Vec<u32>, String> {
            let text = match prompt {
                Prompt::Text(text) => text.clone(),
                Prompt::Messages(messages) => messages.iter().map(|message| message.content.clone()).collect(),
            };
            if text.contains('!') {
                Err("cannot be encoded".to_owned())
            } else {
                Ok(text.bytes().map(u32::from).collect())
            }
        }

        fn completion(&self, _prompt: &Prompt, text: &str) -> Result<Vec<u32>, String> {
            Ok(text.bytes().map(u32::from).chain([0]).collect())
        }

        fn context(&self) -> usize {
            10
        }
    }

    fn encoded(values: Vec<Value>, targets: bool) -> Result<Dataset, DataErrors> {
        let items = read_values(values, &ReadOptions { supervised: targets, ..ReadOptions::default() })?;
        encode(&items, &Bytes, 4, targets)
    }

    #[test]
    fn prompts_and_demonstrations_become_tokens() {
        let values =
            vec![json!({"prompt": "ab", "completion": "xy"}), json!({"prompt": "c", "completion": "long one"})];
        let data = encoded(values.clone(), true).unwrap();
        assert_eq!(data.examples[0].prompt, [97, 98]);
        assert_eq!(data.examples[0].target, [120, 121, 0]);
        assert_eq!(data.examples[1].target, [108, 111, 110, 103]);
        assert_eq!((data.shortened, data.len()), (1, 2));
        let without = encoded(values, false).unwrap();
        assert!(without.examples[0].target.is_empty());
        assert_ne!(without.digest(), data.digest());
        assert_eq!(data.digest(), data.clone().digest());
    }

    #[test]
    fn what_cannot_be_encoded_names_its_place() {
        let wrong = |text: &str| {
            encoded(vec![json!({"prompt": "ok"}), json!({"prompt": text})], false).unwrap_err().to_string()
        };
        assert_eq!(wrong("no!"), "item 2, `prompt`: cannot be encoded");
        assert!(wrong("seven77").starts_with("item 2, `prompt`: is 7 tokens long; with 4"));
        let chat =
            encoded(vec![json!({"messages": [{"role": "user", "content": ""}]})], false).unwrap_err().to_string();
        assert_eq!(chat, "item 1, `messages`: is empty in tokens");
    }
}
