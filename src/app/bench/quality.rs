//! `mote bench quality`: what each precision costs, against the same weights in f32, on held-out text.
//!
//! A window is one prefill from position 0. The logits at positions 0..n-1 are compared, position by position, with those of f32: the mean of
//! KL(f32 || precision) in nats, how often the likeliest token is the same, and the perplexity of the text itself.

use std::{num::NonZeroUsize, path::Path};

use clap::ValueEnum;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    figures::{kl, likeliest, log_probabilities, number, percentile},
    report::Report,
};
use crate::{
    adapter::Basis,
    app::{AppError, base},
    config::{Dtype, ModelArgs, QualityArgs},
    kernel::{BASE_SLOT, BLOCK_TOKENS, Floats, SequenceRows, StepBatch},
    model::{LoadedModel, Model, Sources, TransformerOptions, load},
    text::Tokenizer,
    types::{Fingerprint, TokenId},
};

/// Tokens of a window that is cut from text.
const WINDOW: usize = 256;

/// A file of `--ids`.
#[derive(Debug, Deserialize)]
struct Ids {
    windows: Vec<Vec<TokenId>>,
}

/// One precision, and what it said so far.
struct Subject {
    name: String,
    model: Box<dyn Model>,
    tally: Tally,
}

/// Sums over positions.
#[derive(Debug, Default, PartialEq)]
struct Tally {
    kl: Vec<f64>,
    same: usize,
    /// Of the text's own next tokens.
    surprise: f64,
}

impl Tally {
    /// One position: the reference's log-probabilities, ours, and the token that came.
    fn add(&mut self, reference: &[f64], ours: &[f64], next: TokenId) {
        self.kl.push(kl(reference, ours));
        self.same += usize::from(likeliest(reference) == likeliest(ours));
        self.surprise -= ours[next as usize];
    }

    fn positions(&self) -> f64 {
        self.kl.len() as f64
    }

    fn mean_kl(&self) -> f64 {
        self.kl.iter().sum::<f64>() / self.positions()
    }

    /// Standard error of the mean.
    fn error(&self) -> f64 {
        let mean = self.mean_kl();
        let variance = self.kl.iter().map(|kl| (kl - mean).powi(2)).sum::<f64>() / (self.positions() - 1.0).max(1.0);
        (variance / self.positions()).sqrt()
    }

    fn agreement(&self) -> f64 {
        self.same as f64 / self.positions()
    }

    fn perplexity(&self) -> f64 {
        (self.surprise / self.positions()).exp()
    }
}

/// `mote bench quality`
pub(super) fn run(args: &QualityArgs) -> Result<Report, AppError> {
    let resolved = Sources::from_env().resolve(&args.model.model)?;
    let loaded = load(&resolved.path)?;
    let windows = windows(args, &loaded)?;
    let positions = windows.iter().map(Vec::len).max().unwrap_or(0);
    let mut subjects = Vec::new();
    for dtype in dtypes(&args.precisions) {
        let model = pack(&args.model, &loaded, dtype, positions)?;
        let name = dtype.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        subjects.push(Subject { name, model, tally: Tally::default() });
    }
    for (at, window) in windows.iter().enumerate() {
        tracing::info!("window {} of {}", at + 1, windows.len());
        compare(&mut subjects, window)?;
    }
    let tokens: usize = windows.iter().map(Vec::len).sum();
    let flags = json!({ "model": resolved.name, "windows": windows.len(), "tokens": tokens, "ids": args.ids, "text": args.text });
    let mut report = Report::new("quality", flags);
    report.line(&format!("{}: {} windows, {tokens} tokens, against f32", resolved.name, windows.len()));
    finish(&mut report, &subjects);
    Ok(report)
}

/// f32 first, then whatever else `--dtype` can say.
fn dtypes(chosen: &[Dtype]) -> Vec<Dtype> {
    let wanted = |dtype: &Dtype| chosen.is_empty() || chosen.contains(dtype);
    let others = Dtype::value_variants().iter().filter(|dtype| !matches!(dtype, Dtype::Auto | Dtype::F32));
    std::iter::once(Dtype::F32).chain(others.copied().filter(wanted)).collect()
}

/// Packs the same weights once more. No adapters: they would change nothing about the base.
fn pack(args: &ModelArgs, loaded: &LoadedModel, dtype: Dtype, positions: usize) -> Result<Box<dyn Model>, AppError> {
    let precision = base::precision(dtype, &loaded.weights);
    let options =
        TransformerOptions { precision, max_positions: positions, kv_blocks: positions.div_ceil(BLOCK_TOKENS) };
    let basis = Basis { rank: 0, fingerprint: Fingerprint([0; 32]), sites: Vec::new() };
    base::pack(args, usize::MAX, loaded.spec.clone(), loaded.weights.clone(), &basis, options, None)
}

/// The windows that the flags name, each of at least two tokens.
fn windows(args: &QualityArgs, loaded: &LoadedModel) -> Result<Vec<Vec<TokenId>>, AppError> {
    let (path, mut windows) = match (&args.ids, &args.text) {
        (Some(path), _) => (path, read_ids(path)?),
        (None, Some(path)) => (path, cut(&read(path)?, loaded)?),
        (None, None) => return Err(AppError::Flag("one of --ids and --text is needed".into())),
    };
    windows.truncate(args.windows.map_or(usize::MAX, NonZeroUsize::get));
    check(&windows, loaded.spec.vocab, loaded.spec.max_positions)
        .map_err(|problem| AppError::Flag(format!("{}: {problem}", path.display())))?;
    Ok(windows)
}

fn read(path: &Path) -> Result<String, AppError> {
    std::fs::read_to_string(path).map_err(|error| AppError::Io(path.display().to_string(), error))
}

fn read_ids(path: &Path) -> Result<Vec<Vec<TokenId>>, AppError> {
    let ids: Ids = serde_json::from_str(&read(path)?)
        .map_err(|error| AppError::Flag(format!("--ids {}: {error}", path.display())))?;
    Ok(ids.windows)
}

fn cut(text: &str, loaded: &LoadedModel) -> Result<Vec<Vec<TokenId>>, AppError> {
    let ids = Tokenizer::new(loaded.tokenizer.clone())?.encode(text, false)?;
    let window = WINDOW.min(loaded.spec.max_positions);
    Ok(ids.chunks(window).filter(|window| window.len() >= 2).map(<[TokenId]>::to_vec).collect())
}

fn check(windows: &[Vec<TokenId>], vocab: usize, longest: usize) -> Result<(), String> {
    if windows.is_empty() {
        return Err("no window of two tokens or more".into());
    }
    for (at, window) in windows.iter().enumerate() {
        let length = window.len();
        if !(2..=longest).contains(&length) {
            return Err(format!("window {at} has {length} tokens, not 2 to {longest}"));
        }
        if let Some(token) = window.iter().find(|&&token| token as usize >= vocab) {
            return Err(format!("window {at} has token {token}, which is not below {vocab}"));
        }
    }
    Ok(())
}

/// Runs a window through every subject; the first is the reference.
fn compare(subjects: &mut [Subject], window: &[TokenId]) -> Result<(), AppError> {
    let predicted = window.len() - 1;
    // The last token's logits predict what nobody knows.
    let tokens = window[..predicted].to_vec();
    let rows = predicted as u32;
    let batch = StepBatch {
        positions: (0..rows).collect(),
        slots: vec![BASE_SLOT; predicted],
        cores: Vec::new(),
        sequences: vec![SequenceRows {
            first_row: 0,
            rows: predicted,
            start: 0,
            blocks: (0..predicted.div_ceil(BLOCK_TOKENS) as u32).collect(),
        }],
        logits_rows: (0..rows).collect(),
        tokens,
    };
    let (mut logits, mut ours) = (Floats::default(), Vec::new());
    let mut reference: Vec<Vec<f64>> = Vec::new();
    for Subject { model, tally, .. } in subjects {
        model.forward(&batch, &mut logits)?;
        for (at, row) in logits.chunks(model.vocab_size()).enumerate() {
            log_probabilities(row, &mut ours);
            if reference.len() == at {
                reference.push(ours.clone());
            }
            tally.add(&reference[at], &ours, window[at + 1]);
        }
    }
    Ok(())
}

fn finish(report: &mut Report, subjects: &[Subject]) {
    let (mut rows, mut results): (Vec<Vec<String>>, Vec<Value>) = (Vec::new(), Vec::new());
    for Subject { name, tally, .. } in subjects {
        rows.push(vec![
            name.clone(),
            format!("{:.6}", tally.mean_kl()),
            format!("{:.6}", tally.error()),
            format!("{:.5}", percentile(&tally.kl, 0.99)),
            format!("{:.4}", tally.agreement()),
            format!("{:.4}", tally.perplexity()),
        ]);
        results.push(json!({
            "precision": name, "positions": tally.kl.len(), "kl_mean": number(tally.mean_kl()), "kl_error": number(tally.error()),
            "kl_p99": number(percentile(&tally.kl, 0.99)), "top1_agreement": number(tally.agreement()), "perplexity": number(tally.perplexity()),
        }));
    }
    report.table(&["precision", "KL mean", "+-", "KL p99", "top-1", "perplexity"], &rows);
    report.insert("results", results.into());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_precision_appears_once_and_f32_first() {
        let all = dtypes(&[]);
        assert_eq!(all[0], Dtype::F32);
        assert_eq!(all.len(), Dtype::value_variants().len() - 1, "all but auto");
        assert_eq!(dtypes(&[Dtype::Q8]), [Dtype::F32, Dtype::Q8]);
        assert_eq!(dtypes(&[Dtype::F32]), [Dtype::F32]);
    }

    #[test]
    fn a_tally_is_means_over_positions() {
        let (certain, even) = ([0.75f64.ln(), 0.25f64.ln()], [0.5f64.ln(), 0.5f64.ln()]);
        let other = [0.25f64.ln(), 0.75f64.ln()];
        let mut tally = Tally::default();
        tally.add(&certain, &even, 0);
        tally.add(&certain, &other, 1);
        let (first, second) = (0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln(), 0.5 * 3f64.ln());
        assert!((tally.mean_kl() - (first + second) / 2.0).abs() < 1e-12);
        assert!((tally.error() - (first - second).abs() / 2.0).abs() < 1e-12);
        assert_eq!(tally.agreement(), 0.5);
        // exp of the mean of ln 2 and ln 4/3
        assert!((tally.perplexity() - (2.0f64 * 4.0 / 3.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn windows_that_do_not_fit_are_named() {
        let problem = |windows: &[Vec<TokenId>]| check(windows, 100, 4).unwrap_err();
        assert!(problem(&[]).contains("no window"));
        assert!(problem(&[vec![1, 2], vec![1]]).contains("window 1 has 1 tokens"));
        assert!(problem(&[vec![1; 5]]).contains("2 to 4"));
        assert!(problem(&[vec![1, 100]]).contains("token 100"));
        assert_eq!(check(&[vec![0, 99]], 100, 4), Ok(()));
    }
}
