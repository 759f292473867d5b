//! The tokenizer: text to ids, and every id to the bytes it stands for.

use std::{collections::HashMap, panic::catch_unwind, path::Path};

use tokenizers::DecoderWrapper;

use crate::types::TokenId;

/// Ids of the largest vocabulary that is taken; each has a place in a table.
const MOST_IDS: usize = 1 << 22;

/// A tokenizer that cannot be read or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file is missing or not a tokenizer.
    #[error("tokenizer: {0}")]
    Load(String),
    /// The text could not be encoded.
    #[error("the text could not be tokenized: {0}")]
    Encode(String),
    /// The decoder is of a kind whose tokens are not byte strings of their own (WordPiece, CTC, ...).
    #[error("tokenizer: the decoder '{0}' is not supported; byte-level BPE and SentencePiece decoders are")]
    Decoder(String),
}

/// What an id stands for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Piece {
    /// The bytes it adds to the text; a character may be spread over several ids.
    bytes: Box<[u8]>,
    /// A control token (`<|im_end|>`), which is not part of the text.
    special: bool,
}

/// A tokenizer with a table of the bytes of every id.
///
/// The table is what makes streaming exact: the text of a sequence is the lossy UTF-8 of the concatenated bytes, so a
/// decoder that keeps at most three unfinished bytes gives the same text token by token as in one go.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pieces: Vec<Piece>,
    longest: usize,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let failed = |words: String| TokenizerError::Load(format!("{}: {words}", path.display()));
        // The library unwraps some of what it reads.
        let inner = catch_unwind(|| tokenizers::Tokenizer::from_file(path))
            .map_err(|_| failed("it is not a tokenizer that can be read".into()))?
            .map_err(|error| failed(error.to_string()))?;
        Self::new(inner)
    }

    /// Wraps a tokenizer that is already built (from a GGUF).
    pub fn new(mut inner: tokenizers::Tokenizer) -> Result<Self, TokenizerError> {
        // A file may carry the truncation of its training run, which would silently cut prompts.
        inner.with_truncation(None).map_err(|error| TokenizerError::Load(error.to_string()))?;
        inner.with_padding(None);
        // Words that others sent: never evicted, kept once a thread, and faster the second time, which a stranger could measure.
        let mut model = inner.get_model().clone();
        model.resize_cache(0);
        inner.with_model(model);
        let spelling = Spelling::of(inner.get_decoder())?;
        let added = inner.get_added_tokens_decoder();
        let vocabulary = inner.get_vocab(true);
        let size = vocabulary.values().max().map_or(0, |&last| last as usize + 1);
        if size > MOST_IDS {
            return Err(TokenizerError::Load(format!("the id {} is beyond any vocabulary", size - 1)));
        }
        let mut pieces = vec![Piece::default(); size];
        for (token, id) in vocabulary {
            pieces[id as usize] = match added.get(&id) {
                Some(added) => Piece { bytes: added.content.as_bytes().into(), special: added.special },
                None => Piece { bytes: spelling.bytes(&token).into(), special: false },
            };
        }
        let longest = pieces.iter().map(|piece| piece.bytes.len()).max().unwrap_or(0).max(1);
        Ok(Self { inner, pieces, longest })
    }

    /// Ids of a text. `special` adds what the tokenizer puts around a text (a first `<s>`); text that spells a control token
    /// becomes that token either way, as chat templates need.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<TokenId>, TokenizerError> {
        let encoding =
            self.inner.encode_fast(text, special).map_err(|error| TokenizerError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// A text has at least so many tokens. (A normaliser may shorten a text; by a factor of four never.)
    pub fn fewest_tokens(&self, text: &str) -> usize {
        text.len() / (4 * self.longest)
    }

    /// The text of some ids, without control tokens. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[TokenId]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.text_bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes an id adds to the text: none for a control token and for an id that the tokenizer does not have.
    pub fn text_bytes(&self, id: TokenId) -> &[u8] {
        match self.pieces.get(id as usize) {
            Some(Piece { bytes, special: false }) => bytes,
            _ => &[],
        }
    }

    /// The bytes an id is written with, control tokens included: what log-probs show.
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.pieces.get(id as usize).map_or(&[], |piece| &piece.bytes)
    }

    /// [`Self::token_bytes`] as text, U+FFFD for what is no character by itself.
    pub fn token_text(&self, id: TokenId) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    /// The id of a token spelled exactly so.
    pub fn token_to_id(&self, token: &str) -> Option<TokenId> {
        self.inner.token_to_id(token)
    }
}

/// How the vocabulary spells bytes.
enum Spelling {
    /// GPT-2's printable stand-in for every byte.
    ByteLevel(HashMap<char, u8>),
    /// SentencePiece: `▁` is a space, `<0x0A>` a byte.
    SentencePiece,
    /// The tokens are the text.
    Plain,
}

impl Spelling {
    fn of(decoder: Option<&DecoderWrapper>) -> Result<Self, TokenizerError> {
        match decoder {
            None => Ok(Spelling::Plain),
            Some(DecoderWrapper::ByteLevel(_)) => Ok(Spelling::ByteLevel(byte_alphabet())),
            Some(DecoderWrapper::Metaspace(_) | DecoderWrapper::ByteFallback(_)) => Ok(Spelling::SentencePiece),
            // Strip, Fuse and Replace are what SentencePiece decoders are made of; what they do besides (cutting the space before a
            // whole text) does not apply to a text that continues another.
            Some(DecoderWrapper::Replace(_) | DecoderWrapper::Fuse(_) | DecoderWrapper::Strip(_)) => {
                Ok(Spelling::SentencePiece)
            }
            Some(DecoderWrapper::Sequence(sequence)) => {
                let mut spelling = Spelling::Plain;
                for decoder in sequence.get_decoders() {
                    match Self::of(Some(decoder))? {
                        Spelling::ByteLevel(alphabet) => return Ok(Spelling::ByteLevel(alphabet)),
                        other => spelling = other,
                    }
                }
                Ok(spelling)
            }
            Some(DecoderWrapper::BPE(_)) => Err(TokenizerError::Decoder("BPEDecoder".into())),
            Some(DecoderWrapper::WordPiece(_)) => Err(TokenizerError::Decoder("WordPiece".into())),
            Some(DecoderWrapper::CTC(_)) => Err(TokenizerError::Decoder("CTC".into())),
        }
    }

    fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Spelling::Plain => token.as_bytes().to_vec(),
            Spelling::ByteLevel(alphabet) => token
                .chars()
                .map(|c| alphabet.get(&c).copied())
                .collect::<Option<Vec<u8>>>()
                .unwrap_or_else(|| token.as_bytes().to_vec()),
            Spelling::SentencePiece => {
                let byte = token
                    .strip_prefix("<0x")
                    .and_then(|rest| rest.strip_suffix('>'))
                    .filter(|hex| hex.len() == 2 && hex.bytes().all(|digit| digit.is_ascii_hexdigit()))
                    .and_then(|hex| u8::from_str_radix(hex, 16).ok());
                byte.map_or_else(|| token.replace('\u{2581}', " ").into_bytes(), |byte| vec![byte])
            }
        }
    }
}

/// GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for characters from U+0100 on, in order.
fn byte_alphabet() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    (0..=u8::MAX)
        .map(|byte| {
            if printable(byte) {
                (char::from(byte), byte)
            } else {
                let stand_in = char::from_u32(next).expect("0x100.. + 68 are characters");
                next += 1;
                (stand_in, byte)
            }
        })
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn golden() -> Tokenizer {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        Tokenizer::from_file(&root.join("tests/fixtures/golden/llama/model/tokenizer.json")).unwrap()
    }

    #[test]
    fn any_text_round_trips_and_agrees_with_the_library() {
        let tokenizer = golden();
        for text in ["", "Hello, world", "  two\n\nlines\t", "naïve café 🦀🇫🇷 日本語", "\u{0}\u{7f}\u{80}"]
        {
            let ids = tokenizer.encode(text, true).unwrap();
            assert_eq!(tokenizer.decode(&ids), text);
            assert_eq!(tokenizer.inner.decode(&ids, true).unwrap(), text);
        }
    }

    #[test]
    fn control_tokens_and_ids_without_a_token_are_no_text() {
        let tokenizer = golden();
        let [hi, eos] = [tokenizer.encode("Hi", false).unwrap(), vec![tokenizer.token_to_id("<eos>").unwrap()]];
        let ids = [&hi[..], &eos, &[300, 319, u32::MAX]].concat();
        assert_eq!(tokenizer.decode(&ids), "Hi");
        assert_eq!(tokenizer.token_text(eos[0]), "<eos>");
        assert_eq!(tokenizer.token_text(319), "");
    }

    #[test]
    fn sentencepiece_spellings_are_bytes_and_spaces() {
        let spelling = Spelling::SentencePiece;
        assert_eq!(spelling.bytes("\u{2581}the"), b" the");
        assert_eq!(spelling.bytes("<0x0A>"), b"\n");
        assert_eq!(spelling.bytes("<0xZZ>"), b"<0xZZ>");
        assert_eq!(spelling.bytes("<0x+1>"), b"<0x+1>");
    }
}
