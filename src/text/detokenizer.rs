//! Tokens to text as they arrive, never half a character.

use super::Tokenizer;
use crate::types::TokenId;

/// Keeps the bytes of a character until it is whole.
///
/// What it has emitted is always a prefix of the text of all tokens: U+FFFD appears only for bytes that no later token can
/// complete.
#[derive(Debug, Clone, Default)]
pub struct Detokenizer {
    pending: Vec<u8>,
}

impl Detokenizer {
    /// The text that this token completes; often empty.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: TokenId) -> String {
        self.push_bytes(tokenizer.text_bytes(token))
    }

    /// What is left when no more tokens come: an unfinished character is one U+FFFD.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }

    /// The same for bytes that do not come from a token's text.
    pub fn push_bytes(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = &self.pending[..];
        while !rest.is_empty() {
            match std::str::from_utf8(rest) {
                Ok(whole) => {
                    text.push_str(whole);
                    rest = &[];
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    let Some(broken) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[broken..];
                }
            }
        }
        let done = self.pending.len() - rest.len();
        self.pending.drain(..done);
        text
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_character_over_several_tokens_comes_out_once_and_whole() {
        let tokenizer = super::super::tokenizer::tests::golden();
        let ids = tokenizer.encode("a🦀b", false).unwrap();
        assert!(ids.len() > 3, "the fixture must split the crab");
        let mut detokenizer = Detokenizer::default();
        let pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(&tokenizer, id)).collect();
        assert_eq!(pieces.concat(), "a🦀b");
        assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
        assert_eq!(detokenizer.finish(), "");
    }

    #[test]
    fn an_unfinished_character_is_one_replacement_at_the_end() {
        let mut detokenizer = Detokenizer::default();
        assert_eq!(detokenizer.push_bytes(b"x\xf0\x9f"), "x");
        assert_eq!(detokenizer.push_bytes(b"\xa6"), "");
        assert_eq!(detokenizer.finish(), "\u{fffd}");
        assert_eq!(detokenizer.finish(), "");
    }

    proptest! {
        #[test]
        fn any_cut_of_any_bytes_gives_the_lossy_text(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..5), 0..12)) {
            let mut detokenizer = Detokenizer::default();
            let mut text: String = chunks.iter().map(|chunk| detokenizer.push_bytes(chunk)).collect();
            text.push_str(&detokenizer.finish());
            let whole = chunks.concat();
            prop_assert_eq!(text, String::from_utf8_lossy(&whole));
        }

        #[test]
        fn valid_text_never_shows_a_replacement(text in "\\PC{0,12}", cuts in prop::collection::vec(0usize..48, 0..6)) {
            let bytes = text.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let mut detokenizer = Detokenizer::default();
            let out: String = cuts.windows(2).map(|pair| detokenizer.push_bytes(&bytes[pair[0]..pair[1]])).collect();
            prop_assert_eq!(out, text);
        }
    }
}
