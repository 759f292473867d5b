//! How to choose tokens and when to stop, as clients ask for it, and as the engine takes it.

use std::collections::BTreeMap;

use super::{BaseInfo, Error};
use crate::{engine::Sampling, types::TokenId};

/// At most so many choices for one prompt.
pub const MAX_CHOICES: u64 = 128;
/// At most so many stop strings.
pub const MAX_STOPS: usize = 4;
/// Longest stop string; each choice looks for them all.
pub(super) const MAX_STOP_BYTES: usize = 1024;
/// Most tokens with a bias; each choice has them all.
pub(super) const MAX_BIASES: usize = 1024;

/// The fields that completions and chats share, as given; None is the default.
#[derive(Debug, Clone, Default)]
pub struct Decoding {
    /// 0..=2, 1 by default; 0 is greedy.
    pub temperature: Option<f64>,
    /// 0..=1, 1 by default.
    pub top_p: Option<f64>,
    /// Keep so many of the likeliest tokens; 0 or -1 (the default) keeps all.
    pub top_k: Option<i64>,
    /// 0..=1, 0 by default.
    pub min_p: Option<f64>,
    /// -2..=2, 0 by default.
    pub presence_penalty: Option<f64>,
    /// -2..=2, 0 by default.
    pub frequency_penalty: Option<f64>,
    /// Above 0 and up to 10, 1 by default.
    pub repetition_penalty: Option<f64>,
    /// Token id (in decimal) to -100..=100.
    pub logit_bias: BTreeMap<String, f64>,
    /// The same seed gives the same tokens; random by default.
    pub seed: Option<i64>,
    /// Choices a prompt, 1..=128, 1 by default.
    pub n: Option<u64>,
    /// Up to four texts, not empty, at which a choice ends.
    pub stop: Vec<String>,
    /// Completion tokens at most.
    pub max_tokens: Option<u64>,
    /// Neither a stop token nor a stop string ends a choice before so many tokens; 0 by default.
    pub min_tokens: Option<u64>,
    /// Go on after the model's end-of-sequence tokens.
    pub ignore_eos: bool,
}

impl Decoding {
    /// Checks everything that does not depend on the prompt, in the order of the fields.
    pub fn check(&self, base: &BaseInfo) -> Result<Checked, Error> {
        let top_k = match self.top_k.unwrap_or(0) {
            -1 | 0 => 0,
            k @ 1.. => u32::try_from(k).unwrap_or(u32::MAX),
            _ => return Err(Error::invalid("top_k", "'top_k' must be -1 or 0 (all tokens), or at least 1.")),
        };
        let sampling = Sampling {
            temperature: within("temperature", self.temperature, 1.0, 0.0, 2.0)?,
            top_k,
            top_p: within("top_p", self.top_p, 1.0, 0.0, 1.0)?,
            min_p: within("min_p", self.min_p, 0.0, 0.0, 1.0)?,
            presence_penalty: within("presence_penalty", self.presence_penalty, 0.0, -2.0, 2.0)?,
            frequency_penalty: within("frequency_penalty", self.frequency_penalty, 0.0, -2.0, 2.0)?,
            repetition_penalty: self.repetition_penalty()?,
            logit_bias: self.logit_bias(base)?,
            seed: 0,
        };
        let n = self.n.unwrap_or(1);
        if !(1..=MAX_CHOICES).contains(&n) {
            return Err(Error::invalid("n", format!("'n' must be between 1 and {MAX_CHOICES}; it is {n}.")));
        }
        if self.stop.len() > MAX_STOPS {
            return Err(Error::invalid("stop", format!("'stop' may hold up to {MAX_STOPS} strings.")));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::invalid("stop", "'stop' must not hold an empty string."));
        }
        if self.stop.iter().any(|stop| stop.len() > MAX_STOP_BYTES) {
            let message = format!("'stop': a string may have up to {MAX_STOP_BYTES} bytes.");
            return Err(Error::invalid("stop", message));
        }
        if let (Some(min), Some(max)) = (self.min_tokens, self.max_tokens)
            && min > max
        {
            return Err(Error::invalid("min_tokens", format!("'min_tokens' ({min}) is above 'max_tokens' ({max}).")));
        }
        Ok(Checked {
            sampling,
            seed: self.seed.map(|seed| seed as u64),
            n: n as usize,
            stop: self.stop.clone(),
            stop_tokens: if self.ignore_eos { Vec::new() } else { base.eos.clone() },
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens.unwrap_or(0),
        })
    }

    fn repetition_penalty(&self) -> Result<f32, Error> {
        match self.repetition_penalty.unwrap_or(1.0) {
            penalty if (0.01..=10.0).contains(&penalty) => Ok(penalty as f32),
            _ => Err(Error::invalid("repetition_penalty", "'repetition_penalty' must be between 0.01 and 10.")),
        }
    }

    fn logit_bias(&self, base: &BaseInfo) -> Result<Vec<(TokenId, f32)>, Error> {
        let invalid = |message: String| Error::invalid("logit_bias", message);
        let entry = |(key, &bias): (&String, &f64)| {
            let token: TokenId = key
                .parse()
                .ok()
                .filter(|&token| (token as usize) < base.vocab)
                .ok_or_else(|| invalid(format!("'logit_bias': '{key}' is not a token id below {}.", base.vocab)))?;
            if !(-100.0..=100.0).contains(&bias) {
                return Err(invalid(format!("'logit_bias': the bias of {key} must be between -100 and 100.")));
            }
            Ok((token, bias as f32))
        };
        if self.logit_bias.len() > MAX_BIASES {
            return Err(invalid(format!("'logit_bias' may hold up to {MAX_BIASES} tokens.")));
        }
        self.logit_bias.iter().map(entry).collect()
    }
}

fn within(name: &str, value: Option<f64>, default: f64, min: f64, max: f64) -> Result<f32, Error> {
    let value = value.unwrap_or(default);
    if (min..=max).contains(&value) {
        return Ok(value as f32);
    }
    Err(Error::invalid(name, format!("'{name}' must be between {min} and {max}; it is {value}.")))
}

/// [`Decoding`] in the engine's terms.
#[derive(Debug, Clone)]
pub struct Checked {
    sampling: Sampling,
    seed: Option<u64>,
    /// Choices a prompt.
    pub n: usize,
    /// Stop strings.
    pub stop: Vec<String>,
    /// Stop tokens.
    pub stop_tokens: Vec<TokenId>,
    max_tokens: Option<u64>,
    min_tokens: u64,
}

impl Checked {
    /// The sampling of the k-th choice of a prompt. Choice 0 uses the seed itself; the others are independent of it and of one another.
    pub fn sampling(&self, k: usize) -> Result<Sampling, Error> {
        let seed = match self.seed {
            Some(seed) => split(seed, k as u64),
            None => getrandom::u64().map_err(Error::internal)?,
        };
        Ok(Sampling { seed, ..self.sampling.clone() })
    }

    /// Completion tokens for a prompt of so many, or why it does not fit the context. `default`: when none are asked for; None takes the rest of the context.
    /// `param` is the field that holds the prompt.
    pub fn budget(&self, base: &BaseInfo, prompt: usize, default: Option<usize>, param: &str) -> Result<Budget, Error> {
        let context = base.max_model_len;
        let rest = context.checked_sub(prompt);
        let asked = self.max_tokens;
        let max_tokens = match (rest, asked) {
            (Some(rest), Some(asked)) if asked <= rest as u64 => Some(asked as usize),
            (Some(rest @ 1..), None) => Some(default.map_or(rest, |default| default.min(rest))),
            _ => None,
        };
        let Some(max_tokens) = max_tokens else {
            let tail = asked.map_or(String::new(), |asked| format!(" and {asked} completion tokens were asked for"));
            let message = format!(
                "This model's maximum context length is {context} tokens. The prompt has {prompt} tokens{tail}. Please reduce the length."
            );
            return Err(Error::invalid(param, message).with_code("context_length_exceeded"));
        };
        let min_tokens = usize::try_from(self.min_tokens).unwrap_or(usize::MAX);
        if min_tokens > max_tokens {
            let message =
                format!("'min_tokens' ({min_tokens}) is above the {max_tokens} tokens that may be generated.");
            return Err(Error::invalid("min_tokens", message));
        }
        Ok(Budget { max_tokens, min_tokens })
    }
}

/// How many tokens a choice may and must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// At most.
    pub max_tokens: usize,
    /// At least, unless the context ends.
    pub min_tokens: usize,
}

/// The k-th seed of a seed: itself, then SplitMix64 outputs (Steele, Lea, Flood 2014).
fn split(seed: u64, k: u64) -> u64 {
    if k == 0 {
        return seed;
    }
    let mut z = seed.wrapping_add(k.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
