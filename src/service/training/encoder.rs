//! Items to tokens, as the served model reads them.

use mote_trainer::data::{Encoder, Prompt};

use crate::{service::BaseInfo, types::TokenId};

/// The base's tokenizer and chat template.
pub(super) struct BaseEncoder<'a>(pub(super) &'a BaseInfo);

impl BaseEncoder<'_> {
    /// A prompt's text, and whether the tokenizer puts its own tokens around it: a template writes them itself.
    fn text(&self, prompt: &Prompt) -> Result<(String, bool), String> {
        match prompt {
            Prompt::Text(text) => Ok((text.clone(), true)),
            Prompt::Messages(messages) => {
                let template = self.0.chat_template.as_ref();
                let template = template
                    .ok_or("the model has no chat template: give items with `prompt`, or a prompt template of text")?;
                Ok((template.render(messages, true).map_err(|error| error.to_string())?, false))
            }
        }
    }

    /// A text that cannot fit, whatever its tokens, is refused before it is tokenized.
    fn encode(&self, text: &str, special: bool) -> Result<Vec<TokenId>, String> {
        if self.0.tokenizer.fewest_tokens(text) > self.0.max_model_len {
            let (bytes, context) = (text.len(), self.0.max_model_len);
            return Err(format!("is {bytes} bytes long, which is beyond the context of {context} tokens"));
        }
        self.0.tokenizer.encode(text, special).map_err(|error| error.to_string())
    }

    /// The token that ends an answer: for a conversation the one that the template writes after it, else the model's first.
    fn end(&self, prompt: &Prompt) -> Option<TokenId> {
        let first = self.0.eos.first().copied();
        let (Prompt::Messages(_), Some(template)) = (prompt, &self.0.chat_template) else { return first };
        let mark = mote_trainer::data::Message { role: mote_trainer::data::Role::Assistant, content: "mark".into() };
        let question = mote_trainer::data::Message { role: mote_trainer::data::Role::User, content: "question".into() };
        let written = template.render(&[question, mark], false).ok();
        let tail = written.as_deref().and_then(|text| text.rsplit_once("mark")).map(|(_, tail)| tail.to_owned());
        let ids = tail.and_then(|tail| self.0.tokenizer.encode(&tail, false).ok()).unwrap_or_default();
        ids.into_iter().find(|id| self.0.eos.contains(id)).or(first)
    }
}

impl Encoder for BaseEncoder<'_> {
    fn prompt(&self, prompt: &Prompt) -> Result<Vec<u32>, String> {
        let (text, special) = self.text(prompt)?;
        self.encode(&text, special)
    }

    fn completion(&self, prompt: &Prompt, text: &str) -> Result<Vec<u32>, String> {
        let (before, special) = self.text(prompt)?;
        let asked = self.encode(&before, special)?;
        let whole = self.encode(&(before + text), special)?;
        // As the model would write it: what the tokens of the whole add to the prompt's, unless a token spans both.
        let mut tokens = match whole.strip_prefix(&asked[..]) {
            Some(rest) => rest.to_vec(),
            None => self.encode(text, false)?,
        };
        tokens.extend(self.end(prompt));
        Ok(tokens)
    }

    fn context(&self) -> usize {
        self.0.max_model_len
    }
}
