//! `mote bench decode` and `mote bench prefill`: the forward pass alone, without engine and server.

use std::time::Instant;

use serde_json::{Value, json};

use super::{
    figures::{median, number, percentile, ratios, spread},
    in_turn,
    report::Report,
    subject::{Piece, Size, Subject, batch},
};
use crate::{
    app::AppError,
    config::{AdapterChoice, DecodeArgs, PrefillArgs},
    kernel::{BLOCK_TOKENS, Floats, StepBatch},
};

/// Rows of a step that fills the cache before decoding begins.
const FILL_ROWS: usize = 512;

/// What is run again and again.
struct Case {
    batch: usize,
    /// Tokens before the first step of decoding; tokens of the prompt.
    tokens: usize,
    adapters: AdapterChoice,
    steps: Vec<StepBatch>,
}

impl Case {
    /// Tokens a second of one pass.
    fn pass(&self, subject: &mut Subject, logits: &mut Floats) -> Result<f64, AppError> {
        let (begun, rows) = (Instant::now(), self.steps.iter().map(StepBatch::rows).sum::<usize>());
        for step in &self.steps {
            subject.model.forward(step, logits)?;
        }
        Ok(rows as f64 / begun.elapsed().as_secs_f64())
    }
}

/// `mote bench decode`
pub(super) fn decode(args: &DecodeArgs) -> Result<Report, AppError> {
    let most = |list: &[std::num::NonZeroUsize]| list.iter().map(|n| n.get()).max().unwrap_or(1);
    let (sequences, context, steps) = (most(&args.batch), most(&args.context), args.steps.get());
    let blocks_each = (context + steps).div_ceil(BLOCK_TOKENS);
    let adapters = args.adapters.iter().map(|choice| choice.distinct(sequences)).max().unwrap_or(0);
    let size = Size { adapters, positions: context + steps, blocks: sequences * blocks_each };
    let mut subject = Subject::load(&args.model, size, None)?;
    fill(&mut subject, sequences, context, blocks_each)?;
    let mut cases = Vec::new();
    for (&choice, batch_size, tokens) in product(&args.adapters, &args.batch, &args.context) {
        let distinct = choice.distinct(batch_size);
        let step = |step: usize| {
            let piece = |sequence: usize| {
                let slot = (distinct > 0).then(|| sequence % distinct);
                Piece { sequence, start: tokens + step, rows: 1, slot }
            };
            let pieces: Vec<Piece> = (0..batch_size).map(piece).collect();
            batch(&pieces, blocks_each, subject.model.vocab_size(), &subject.cores[..distinct], true)
        };
        cases.push(Case { batch: batch_size, tokens, adapters: choice, steps: (0..steps).map(step).collect() });
    }
    let rates = rounds(&mut subject, &cases, args.rounds.get())?;
    let flags = json!({ "model": subject.name, "precision": format!("{:?}", subject.precision), "rank": args.model.rank, "threads": args.model.threads, "steps": steps, "rounds": args.rounds });
    let mut report = Report::new("decode", flags);
    report.line(&format!(
        "{} in {:?}, --rank {}: decoding, the forward pass alone",
        subject.name, subject.precision, args.model.rank
    ));
    finish(&mut report, ["batch", "context"], &cases, &rates);
    Ok(report)
}

/// `mote bench prefill`
pub(super) fn prefill(args: &PrefillArgs) -> Result<Report, AppError> {
    let most = args.tokens.iter().map(|n| n.get()).max().unwrap_or(1);
    let blocks = most.div_ceil(BLOCK_TOKENS);
    let adapters = args.adapters.iter().map(|choice| choice.distinct(1)).max().unwrap_or(0);
    let mut subject = Subject::load(&args.model, Size { adapters, positions: most, blocks }, None)?;
    let mut cases = Vec::new();
    for (&choice, _, tokens) in product(&args.adapters, &[std::num::NonZeroUsize::MIN], &args.tokens) {
        let distinct = choice.distinct(1);
        let piece = Piece { sequence: 0, start: 0, rows: tokens, slot: (distinct > 0).then_some(0) };
        let step = batch(&[piece], blocks, subject.model.vocab_size(), &subject.cores[..distinct], true);
        cases.push(Case { batch: 1, tokens, adapters: choice, steps: vec![step] });
    }
    let rates = rounds(&mut subject, &cases, args.rounds.get())?;
    let flags = json!({ "model": subject.name, "precision": format!("{:?}", subject.precision), "rank": args.model.rank, "threads": args.model.threads, "rounds": args.rounds });
    let mut report = Report::new("prefill", flags);
    report.line(&format!(
        "{} in {:?}, --rank {}: one prompt in one step, logits of its last token",
        subject.name, subject.precision, args.model.rank
    ));
    finish(&mut report, ["prompts", "tokens"], &cases, &rates);
    Ok(report)
}

/// Every combination, the first list slowest.
fn product<'a, T>(
    first: &'a [T],
    second: &'a [std::num::NonZeroUsize],
    third: &'a [std::num::NonZeroUsize],
) -> impl Iterator<Item = (&'a T, usize, usize)> {
    first.iter().flat_map(move |a| second.iter().flat_map(move |b| third.iter().map(move |c| (a, b.get(), c.get()))))
}

/// Keys and values of real tokens for every sequence, so that attention reads what it would read.
fn fill(subject: &mut Subject, sequences: usize, context: usize, blocks_each: usize) -> Result<(), AppError> {
    let mut logits = Floats::default();
    let vocab = subject.model.vocab_size();
    tracing::info!(sequences, context, "filling the KV cache");
    for sequence in 0..sequences {
        for start in (0..context).step_by(FILL_ROWS) {
            let piece = Piece { sequence, start, rows: FILL_ROWS.min(context - start), slot: None };
            subject.model.forward(&batch(&[piece], blocks_each, vocab, &[], false), &mut logits)?;
        }
    }
    Ok(())
}

/// Tokens a second of every case in every round, after one pass of each that nobody counts.
fn rounds(subject: &mut Subject, cases: &[Case], rounds: usize) -> Result<Vec<Vec<f64>>, AppError> {
    let mut logits = Floats::default();
    for case in cases {
        case.pass(subject, &mut logits)?;
    }
    let mut rates = vec![Vec::new(); cases.len()];
    for round in 0..rounds {
        tracing::info!("round {} of {rounds}", round + 1);
        for at in in_turn(cases.len(), round) {
            rates[at].push(cases[at].pass(subject, &mut logits)?);
        }
    }
    Ok(rates)
}

fn finish(report: &mut Report, names: [&str; 2], cases: &[Case], rates: &[Vec<f64>]) {
    let base_of = |case: &Case| {
        let is_base = |other: &Case| {
            other.adapters == AdapterChoice::Base && (other.batch, other.tokens) == (case.batch, case.tokens)
        };
        cases.iter().position(is_base).map(|at| &rates[at])
    };
    let (mut rows, mut results): (Vec<Vec<String>>, Vec<Value>) = (Vec::new(), Vec::new());
    for (case, rates) in cases.iter().zip(rates) {
        let over_base = base_of(case).map(|base| median(&ratios(rates, base)));
        let cell = |value: f64| format!("{value:.0}");
        rows.push(vec![
            case.adapters.to_string(),
            case.batch.to_string(),
            case.tokens.to_string(),
            cell(median(rates)),
            cell(percentile(rates, 0.0)),
            cell(percentile(rates, 1.0)),
            over_base.map_or_else(String::new, |ratio| format!("{ratio:.3}")),
        ]);
        results.push(json!({
            "adapters": case.adapters.to_string(), names[0]: case.batch, names[1]: case.tokens,
            "tokens_per_second": spread(rates), "ratio_to_base": over_base.map(number),
        }));
    }
    report.table(&["adapters", names[0], names[1], "tok/s", "min", "max", "/ base"], &rows);
    report.insert("results", results.into());
}
