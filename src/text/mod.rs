//! Text: tokenizer, chat template, and the way back from tokens to text while they arrive.
//!
//! Nothing here knows the engine or HTTP. A token of the model that the tokenizer does not have (models pad their vocabulary)
//! decodes to nothing and is never an error.

mod detokenizer;
mod stop;
mod template;
mod tokenizer;

pub use detokenizer::Detokenizer;
pub use stop::StopStrings;
pub use template::{ChatTemplate, TemplateError};
pub use tokenizer::{Tokenizer, TokenizerError};
