//! A `tokenizers::Tokenizer` out of GGUF metadata.
//!
//! candle-core has one (`quantized::tokenizer`), which does not fit: it gives any pre-tokenizer that it does not know
//! (smollm and llama-bpe among them) GPT-2's with a space put in front, does not ignore merges for Llama 3, and matches
//! unused tokens in text. A wrong pre-tokenizer is a silent loss of quality, so here an unknown one is refused by name.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior,
    Tokenizer,
    decoders::{byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as Decoders, strip::Strip},
    models::bpe::BPE,
    normalizers::{Prepend, Replace, Sequence as Normalizers, unicode::NFC},
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence as PreTokenizers,
        split::{Split, SplitPattern},
    },
    processors::template::TemplateProcessing,
};

use super::{
    gguf::{Meta, integer},
    no_panic,
};
use crate::{model::ModelError, types::TokenId};

// Kinds of `tokenizer.ggml.token_type`.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

// How the families' own `tokenizer.json` cut text before merging.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What `tokenizer.ggml.pre` stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pre {
    /// None: GPT-2's pattern.
    split: Option<&'static str>,
    /// Every digit is a piece (before GPT-2's pattern).
    single_digits: bool,
    /// Text is composed first.
    nfc: bool,
    /// A piece that is a token is taken whole, whatever the merges.
    ignore_merges: bool,
    /// A bos is added where the file does not say (llama.cpp's default).
    adds_bos: bool,
}

const GPT2: Pre = Pre { split: None, single_digits: false, nfc: false, ignore_merges: false, adds_bos: false };

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    /// Byte-level BPE with ranked merges.
    Bpe { pre: Pre, merges: Vec<(String, String)> },
    /// SentencePiece BPE: the merge with the best score first.
    Spm { scores: Vec<f32>, space_prefix: bool },
}

/// What the metadata say about the tokenizer, checked.
pub(super) struct Parts {
    /// Text of every id.
    pub(super) tokens: Vec<String>,
    types: Vec<u64>,
    kind: Kind,
    bos: Option<TokenId>,
    eos: Option<TokenId>,
    unk: Option<TokenId>,
    add_bos: bool,
    add_eos: bool,
}

impl Parts {
    pub(super) fn read(meta: &Meta) -> Result<Self, ModelError> {
        let tokens = strings(meta, "tokenizer.ggml.tokens")?;
        let types = match meta.get("tokenizer.ggml.token_type") {
            Some(Value::Array(types)) => types.iter().map(|kind| integer(kind).unwrap_or(1)).collect(),
            _ => vec![1; tokens.len()],
        };
        let model = meta.string("tokenizer.ggml.model").unwrap_or("missing");
        let kind = match model {
            "gpt2" => Kind::Bpe { pre: pre(meta.string("tokenizer.ggml.pre"))?, merges: merges(meta)? },
            "llama" => Kind::Spm {
                scores: scores(meta, tokens.len())?,
                space_prefix: meta.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true),
            },
            other => {
                return Err(ModelError::Unsupported(format!(
                    "tokenizer.ggml.model {other} is not supported (supported: gpt2, llama)"
                )));
            }
        };
        let id = |key: &str| {
            let id = meta.integer(&format!("tokenizer.ggml.{key}_token_id"))?;
            (id < tokens.len() as u64).then_some(id as TokenId)
        };
        // llama.cpp's defaults where the file does not say.
        let adds_by_default = matches!(kind, Kind::Spm { .. } | Kind::Bpe { pre: Pre { adds_bos: true, .. }, .. });
        Ok(Self {
            bos: id("bos"),
            eos: id("eos"),
            unk: id("unknown"),
            add_bos: meta.flag("tokenizer.ggml.add_bos_token").unwrap_or(adds_by_default),
            add_eos: meta.flag("tokenizer.ggml.add_eos_token").unwrap_or(false),
            tokens,
            types,
            kind,
        })
    }

    /// Control tokens: never in text that a user means literally.
    pub(super) fn control_tokens(&self) -> impl Iterator<Item = (TokenId, &str)> {
        let tokens = self.tokens.iter().zip(&self.types).enumerate();
        tokens.filter(|(_, (_, kind))| **kind == CONTROL).map(|(id, (token, _))| (id as TokenId, token.as_str()))
    }

    pub(super) fn build(self) -> Result<Tokenizer, ModelError> {
        no_panic(|| self.try_build()).map_err(|error| ModelError::Load(format!("the GGUF's tokenizer: {error}")))
    }

    fn try_build(self) -> Result<Tokenizer, tokenizers::Error> {
        let vocab: HashMap<String, u32> = self.tokens.iter().cloned().zip(0..).collect();
        let mut tokenizer = match &self.kind {
            Kind::Bpe { pre, merges } => byte_level(*pre, vocab, merges.clone())?,
            Kind::Spm { scores, space_prefix } => {
                let merges = spm_merges(&self.tokens, &self.types, scores, &vocab);
                let unk = self.unk.map(|id| self.tokens[id as usize].clone());
                sentence_piece(vocab, merges, unk, *space_prefix)?
            }
        };
        let of_kind = |wanted: &[u64], special: bool| -> Vec<AddedToken> {
            let tokens = self.tokens.iter().zip(&self.types).filter(|(_, kind)| wanted.contains(kind));
            tokens.map(|(token, _)| AddedToken::from(token.clone(), special).normalized(false)).collect()
        };
        tokenizer.add_special_tokens(of_kind(&[CONTROL, UNKNOWN], true))?;
        tokenizer.add_tokens(of_kind(&[USER_DEFINED], false))?;
        if let Some(template) = self.template()? {
            tokenizer.with_post_processor(Some(template));
        }
        Ok(tokenizer)
    }

    /// bos before and eos after plain text, as the file asks.
    fn template(&self) -> Result<Option<TemplateProcessing>, tokenizers::Error> {
        let named =
            |id: Option<TokenId>, wanted: bool| id.filter(|_| wanted).map(|id| (self.tokens[id as usize].clone(), id));
        let (bos, eos) = (named(self.bos, self.add_bos), named(self.eos, self.add_eos));
        if bos.is_none() && eos.is_none() {
            return Ok(None);
        }
        let piece = |token: &Option<(String, u32)>| token.iter().map(|(text, _)| text.clone()).collect::<Vec<_>>();
        let template = TemplateProcessing::builder()
            .try_single([piece(&bos), vec!["$A".to_owned()], piece(&eos)].concat())?
            .special_tokens(bos.into_iter().chain(eos).collect::<Vec<_>>())
            .build()?;
        Ok(Some(template))
    }
}

fn pre(name: Option<&str>) -> Result<Pre, ModelError> {
    let whole = |split| Pre { split: Some(split), ignore_merges: true, adds_bos: true, ..GPT2 };
    match name {
        None | Some("gpt-2" | "gpt2" | "default") => Ok(GPT2),
        Some("smollm") => Ok(Pre { single_digits: true, ..GPT2 }),
        Some("qwen2") => Ok(Pre { split: Some(QWEN2), nfc: true, ..GPT2 }),
        Some("deepseek-r1-qwen") => Ok(Pre { split: Some(QWEN2), ..GPT2 }),
        Some("llama-bpe" | "llama3" | "llama-v3") => Ok(whole(LLAMA3)),
        Some("tekken") => Ok(whole(TEKKEN)),
        Some(other) => Err(ModelError::Unsupported(format!(
            "pre-tokenizer {other} (tokenizer.ggml.pre) is not supported (supported: gpt-2, smollm, qwen2, deepseek-r1-qwen, llama-bpe, tekken)"
        ))),
    }
}

/// Byte-level BPE as the families' own `tokenizer.json` describe it.
fn byte_level(
    pre: Pre,
    vocab: HashMap<String, u32>,
    merges: Vec<(String, String)>,
) -> Result<Tokenizer, tokenizers::Error> {
    let bpe = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
        .ignore_merges(pre.ignore_merges)
        .build()?;
    let mut tokenizer = Tokenizer::new(ModelWrapper::BPE(bpe));
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    if pre.single_digits {
        steps.push(Digits::new(true).into());
    }
    if let Some(pattern) = pre.split {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        steps.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into());
    }
    steps.push(ByteLevel::new(false, true, pre.split.is_none()).into());
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(steps)));
    tokenizer.with_decoder(Some(ByteLevel::new(true, true, true)));
    if pre.nfc {
        tokenizer.with_normalizer(Some(NFC))?;
    }
    Ok(tokenizer)
}

/// SentencePiece BPE the way transformers converts it: spaces become U+2581, unknown characters become bytes.
fn sentence_piece(
    vocab: HashMap<String, u32>,
    merges: Vec<(String, String)>,
    unk: Option<String>,
    space_prefix: bool,
) -> Result<Tokenizer, tokenizers::Error> {
    let mut bpe = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some(unk) = unk {
        bpe = bpe.unk_token(unk);
    }
    let mut tokenizer = Tokenizer::new(ModelWrapper::BPE(bpe.build()?));
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    let mut decoders: Vec<DecoderWrapper> =
        vec![Replace::new("\u{2581}", " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if space_prefix {
        normalizers.push(Prepend::new("\u{2581}".into()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    normalizers.push(Replace::new(" ", "\u{2581}")?.into());
    tokenizer.with_normalizer(Some(Normalizers::new(normalizers)))?;
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    Ok(tokenizer)
}

/// Every way to make a piece of two others, best score first (`generate_merges` of transformers).
fn spm_merges(tokens: &[String], types: &[u64], scores: &[f32], vocab: &HashMap<String, u32>) -> Vec<(String, String)> {
    let mut merges: Vec<(f32, u32, u32)> = Vec::new();
    for ((token, kind), score) in tokens.iter().zip(types).zip(scores) {
        if *kind != 1 {
            continue; // control tokens and bytes are no result of a merge
        }
        let mut ways: Vec<(u32, u32)> = token
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| Some((*vocab.get(&token[..at])?, *vocab.get(&token[at..])?)))
            .collect();
        ways.sort_unstable();
        merges.extend(ways.into_iter().map(|(left, right)| (*score, left, right)));
    }
    let chars = |id: u32| tokens[id as usize].chars().count();
    merges.sort_by(|a, b| {
        b.0.total_cmp(&a.0).then_with(|| chars(b.1).cmp(&chars(a.1))).then_with(|| chars(b.2).cmp(&chars(a.2)))
    });
    merges.into_iter().map(|(_, left, right)| (tokens[left as usize].clone(), tokens[right as usize].clone())).collect()
}

fn strings(meta: &Meta, key: &str) -> Result<Vec<String>, ModelError> {
    let Some(Value::Array(values)) = meta.get(key) else {
        return Err(ModelError::Load(format!("GGUF key {key} is missing: the file has no tokenizer")));
    };
    let text = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        _ => Err(ModelError::Load(format!("GGUF key {key} is not a list of strings"))),
    };
    values.iter().map(text).collect()
}

fn merges(meta: &Meta) -> Result<Vec<(String, String)>, ModelError> {
    let split = |merge: &String| match merge.split_once(' ') {
        Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
        None => Err(ModelError::Load(format!("tokenizer.ggml.merges: {merge:?} is not two pieces"))),
    };
    strings(meta, "tokenizer.ggml.merges")?.iter().map(split).collect()
}

fn scores(meta: &Meta, tokens: usize) -> Result<Vec<f32>, ModelError> {
    let scores = match meta.get("tokenizer.ggml.scores") {
        Some(Value::Array(values)) => values.iter().map(|value| value.to_f32().ok()).collect::<Option<Vec<_>>>(),
        _ => None,
    };
    scores
        .filter(|scores| scores.len() == tokens)
        .ok_or_else(|| ModelError::Load("tokenizer.ggml.scores does not have a number for every token".into()))
}
