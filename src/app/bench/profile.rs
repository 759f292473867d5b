//! `mote bench profile`: where the time of a step goes, by name. The engine runs as it does in a server; the backend's parts are timed one by one.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};

use super::{
    figures::number,
    inputs::Random,
    report::Report,
    subject::{Size, Subject},
};
use crate::{
    app::AppError,
    config::ProfileArgs,
    engine::{Engine, EngineConfig, Event, Handle, Request, Sampling},
    kernel::{BLOCK_TOKENS, Clock, Cores, Part, Phase},
    types::{CacheSalt, TokenId},
};

/// Steps that nobody counts.
const WARM_UP: usize = 4;

/// What the engine is asked to do.
#[derive(Clone, Copy)]
struct Work {
    sequences: usize,
    prompt: usize,
    generated: usize,
    phase: Phase,
}

/// Seconds of the steps of one kind, by name.
#[derive(Debug, Clone, PartialEq)]
struct Account {
    steps: u64,
    /// Of the steps, from the engine's clock.
    total: f64,
    parts: Vec<(&'static str, f64)>,
}

impl Account {
    fn named(&self) -> f64 {
        self.parts.iter().map(|(_, seconds)| seconds).sum()
    }

    fn share(&self, seconds: f64) -> f64 {
        seconds / self.total
    }
}

/// `mote bench profile`
pub(super) fn run(args: &ProfileArgs) -> Result<Report, AppError> {
    if !args.temperature.is_finite() || args.temperature < 0.0 {
        return Err(AppError::Flag(format!("--temperature {}: not a number from 0", args.temperature)));
    }
    let decode = args.batch.iter().map(|batch| Work {
        sequences: batch.get(),
        prompt: args.context.get(),
        generated: args.steps.get() + 1,
        phase: Phase::Decode,
    });
    let prefill = args.prefill.iter().map(|tokens| Work {
        sequences: 1,
        prompt: tokens.get(),
        generated: 1,
        phase: Phase::Prefill,
    });
    let works: Vec<Work> = decode.chain(prefill).collect();
    let most = works.iter().map(|work| work.sequences).max().unwrap_or(1);
    let positions = works.iter().map(|work| work.prompt + work.generated.max(WARM_UP + 1)).max().unwrap_or(1);
    // A block more a sequence: the engine keeps a spare one.
    let size = Size {
        adapters: args.adapters.distinct(most),
        positions,
        blocks: most * (positions.div_ceil(BLOCK_TOKENS) + 1),
    };
    let clock = Arc::new(Clock::default());
    let subject = Subject::load(&args.model, size, Some(clock.clone()))?;
    let vocab = subject.model.vocab_size();
    let (name, precision, cores) = (subject.name, subject.precision, subject.cores);
    let config = EngineConfig {
        max_batch: most,
        max_queue: most,
        max_model_len: positions,
        prefill_chunk: args.prefill_chunk.get(),
        rank: subject.rank,
        sites: subject.sites,
        prefix_cache: false,
    };
    let flags = json!({ "model": name, "precision": format!("{precision:?}"), "rank": args.model.rank, "adapters": args.adapters.to_string(), "context": args.context, "steps": args.steps, "temperature": args.temperature });
    let mut report = Report::new("profile", flags);
    report.line(&format!(
        "{name} in {precision:?}, --rank {}, adapters: {}; temperature {}",
        args.model.rank, args.adapters, args.temperature
    ));
    // The model is packed once; its engine's counters are read before and after each work.
    let engine = Engine::start(subject.model, config)?;
    let mut results = Vec::new();
    for work in works {
        let cores = &cores[..args.adapters.distinct(work.sequences)];
        let warm_up = Work { generated: WARM_UP.min(work.generated), ..work };
        let before = Counters::of(&engine);
        clock.clear();
        perform(&engine, warm_up, cores, vocab, args.temperature)?;
        let before = settled(&engine, &clock, &before);
        clock.clear();
        perform(&engine, work, cores, vocab, args.temperature)?;
        let after = settled(&engine, &clock, &before);
        let account = account(&clock, work.phase, before.until(&after));
        results.push(show(&mut report, work, &account));
    }
    report.insert("results", results.into());
    engine.shutdown(Duration::ZERO);
    Ok(report)
}

/// Sums of the engine's own counters.
#[derive(Debug, Clone, Copy, Default)]
struct Counters {
    decode: f64,
    prefill: f64,
    steps: u64,
}

impl Counters {
    fn of(engine: &Handle) -> Self {
        let stats = engine.stats();
        let (decode, prefill) = (stats.decode_seconds.snapshot(), stats.prefill_seconds.snapshot());
        // Of all that a step counts, this is last.
        let steps = stats.overhead_seconds.snapshot().count;
        Self { decode: decode.sum, prefill: prefill.sum, steps }
    }

    fn until(&self, later: &Self) -> Self {
        let steps = later.steps - self.steps;
        Self { decode: later.decode - self.decode, prefill: later.prefill - self.prefill, steps }
    }
}

/// The engine's counters when they hold every step that the clock has seen: requests are answered a moment before their last step is counted.
fn settled(engine: &Handle, clock: &Clock, before: &Counters) -> Counters {
    let seen = clock.steps(Phase::Decode) + clock.steps(Phase::Prefill);
    for _ in 0..1000 {
        if before.until(&Counters::of(engine)).steps >= seen {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Counters::of(engine)
}

/// The steps of one phase: the backend's parts from its clock, the engine's part as what is left of its steps around the model.
fn account(clock: &Clock, phase: Phase, engine: Counters) -> Account {
    let total = match phase {
        Phase::Decode => engine.decode,
        Phase::Prefill => engine.prefill,
    };
    let mut parts: Vec<(&'static str, f64)> =
        Part::ALL.iter().map(|&part| (part.name(), clock.seconds(phase, part))).collect();
    parts.push(("engine: schedule, sample, commit, send", total - clock.span_seconds(phase)));
    Account { steps: clock.steps(phase), total, parts }
}

/// Runs the work to its end.
fn perform(engine: &Handle, work: Work, cores: &[Arc<Cores>], vocab: usize, temperature: f32) -> Result<(), AppError> {
    let refused = |error: &dyn std::fmt::Display| AppError::Bench(format!("the engine refused: {error}"));
    let request = |sequence: usize| {
        let mut random = Random(sequence as u64);
        let prompt = (0..work.prompt).map(|_| random.below(vocab) as TokenId).collect();
        let sampling = Sampling { temperature, seed: sequence as u64, ..Sampling::default() };
        let cores = (!cores.is_empty()).then(|| cores[sequence % cores.len()].clone());
        Request {
            prompt,
            max_tokens: work.generated,
            min_tokens: 0,
            stop_tokens: Vec::new(),
            sampling,
            logprobs: None,
            prompt_logprobs: None,
            capture_logits: false,
            cores,
            salt: CacheSalt([0; 32]),
            use_cache: false,
        }
    };
    let requests = (0..work.sequences).map(request).collect();
    let events = engine.submit_many(requests).map_err(|error| refused(&error))?;
    for mut events in events {
        loop {
            match events.blocking_recv() {
                Some(Event::Finished(..)) => break,
                Some(Event::Failed(message)) => return Err(refused(&message)),
                Some(Event::NotFinite) | None => return Err(refused(&"the logits are not finite")),
                Some(_) => {}
            }
        }
    }
    Ok(())
}

fn show(report: &mut Report, work: Work, account: &Account) -> Value {
    let per_step = |seconds: f64| 1e3 * seconds / account.steps.max(1) as f64;
    let what = match work.phase {
        Phase::Decode => format!("decoding {} sequences after {} tokens", work.sequences, work.prompt),
        Phase::Prefill => format!("prefill of {} tokens", work.prompt),
    };
    let named = account.share(account.named());
    let mut rows: Vec<Vec<String>> = Vec::new();
    for &(name, seconds) in &account.parts {
        rows.push(vec![
            name.to_owned(),
            format!("{:.3}", per_step(seconds)),
            format!("{:.1}", 100.0 * account.share(seconds)),
        ]);
    }
    rows.push(vec![
        "all of it".into(),
        format!("{:.3}", per_step(account.total)),
        format!("{:.1} by name", 100.0 * named),
    ]);
    report.line(&format!("\n{what}, {} steps", account.steps));
    report.table(&["", "ms a step", "%"], &rows);
    let parts: Vec<Value> = (account.parts.iter())
        .map(|&(name, seconds)| json!({ "part": name, "ms": number(per_step(seconds)), "share": number(account.share(seconds)) }))
        .collect();
    json!({
        "phase": format!("{:?}", work.phase).to_lowercase(), "sequences": work.sequences, "prompt": work.prompt, "steps": account.steps,
        "step_ms": number(per_step(account.total)), "named_share": number(named), "parts": parts,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_engines_steps() {
        let account = Account { steps: 2, total: 2.0, parts: vec![("a", 1.5), ("b", 0.4)] };
        assert!((account.named() - 1.9).abs() < 1e-12);
        assert!((account.share(account.named()) - 0.95).abs() < 1e-12);
    }

    #[test]
    fn counters_are_compared_by_their_differences() {
        let before = Counters { decode: 1.0, prefill: 2.0, steps: 3 };
        let between = before.until(&Counters { decode: 1.5, prefill: 2.0, steps: 7 });
        assert_eq!((between.decode, between.prefill, between.steps), (0.5, 0.0, 4));
    }
}
