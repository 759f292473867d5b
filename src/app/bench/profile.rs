//! `mote bench profile`: where the time of a step goes, by name. The engine runs as it does in a server; its own laps and the backend's parts are
//! read before and after a stretch of equal steps, and compared with the time on the wall.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

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
    engine::{Engine, EngineConfig, Event, Events, Handle, Priority, Request, Sampling, Share},
    kernel::{BLOCK_TOKENS, Clock, Cores, Part},
    types::{CacheSalt, TokenId},
};

/// Decoding steps that nobody counts.
const WARM_UP: usize = 4;

/// What is looked at.
#[derive(Clone, Copy)]
enum Work {
    /// So many sequences, each after a prompt, for so many steps in which all of them decode.
    Decode { sequences: usize, prompt: usize, steps: usize },
    /// One prompt, until its first token is there.
    Prefill { prompt: usize },
}

impl Work {
    fn sequences(self) -> usize {
        match self {
            Self::Decode { sequences, .. } => sequences,
            Self::Prefill { .. } => 1,
        }
    }

    /// Tokens of each prompt, and of each completion. The sequences that begin first go on until the last one has had its steps.
    fn tokens(self, prefill_chunk: usize) -> (usize, usize) {
        match self {
            Self::Decode { sequences, prompt, steps } => {
                (prompt, steps + WARM_UP + 2 + (sequences * prompt).div_ceil(prefill_chunk) + sequences)
            }
            Self::Prefill { prompt } => (prompt, 1),
        }
    }
}

/// What the clocks show.
#[derive(Debug, Clone, PartialEq)]
struct Reading {
    at: Instant,
    steps: u64,
    parts: Vec<(&'static str, f64)>,
}

impl Reading {
    /// The backend's parts, then the engine's. Its time in the model is not one of them: what the parts leave of it has no name.
    fn now(engine: &Handle, clock: &Clock) -> Self {
        let mut parts: Vec<(&'static str, f64)> = Part::ALL.map(|part| (part.name(), clock.seconds(part))).into();
        let phases = engine.stats().phases.all();
        parts.extend(phases.into_iter().filter(|(name, _)| *name != "forward").map(|(name, time)| (name, time.get())));
        Self { at: Instant::now(), steps: clock.steps(), parts }
    }
}

/// Where the time between two readings went.
#[derive(Debug, Clone, PartialEq)]
struct Account {
    steps: u64,
    /// Seconds on the wall.
    total: f64,
    parts: Vec<(&'static str, f64)>,
}

impl Account {
    fn between(before: &Reading, after: &Reading) -> Self {
        let parts = before.parts.iter().zip(&after.parts).map(|((name, from), (_, to))| (*name, to - from));
        Self { steps: after.steps - before.steps, total: (after.at - before.at).as_secs_f64(), parts: parts.collect() }
    }

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
    let (prompt, steps, prefill_chunk) = (args.context.get(), args.steps.get(), args.prefill_chunk.get());
    let decode = args.batch.iter().map(|batch| Work::Decode { sequences: batch.get(), prompt, steps });
    let works: Vec<Work> =
        decode.chain(args.prefill.iter().map(|tokens| Work::Prefill { prompt: tokens.get() })).collect();
    let most = works.iter().map(|work| work.sequences()).max().unwrap_or(1);
    let lengths = works.iter().map(|work| work.tokens(prefill_chunk)).map(|(prompt, generated)| prompt + generated);
    let positions = lengths.max().unwrap_or(1);
    // A block more a sequence: the engine keeps a spare one.
    let blocks = most * (positions.div_ceil(BLOCK_TOKENS) + 1);
    let clock = Arc::new(Clock::default());
    let size = Size { adapters: args.adapters.distinct(most), positions, blocks };
    let subject = Subject::load(&args.model, size, Some(clock.clone()))?;
    let (name, precision) = (subject.name, subject.precision);
    let config = EngineConfig {
        max_batch: most,
        max_queue: most,
        max_model_len: positions,
        prefill_chunk,
        idle_prefill_chunk: prefill_chunk,
        background_rows: 0,
        gradient_share: 1.0,
        rank: subject.rank,
        sites: subject.sites,
        prefix_cache: false,
    };
    let mut report = Report::new(
        "profile",
        json!({
            "model": name, "precision": format!("{precision:?}"), "rank": args.model.rank, "threads": args.model.threads, "adapters": args.adapters.to_string(),
            "context": args.context, "steps": args.steps, "temperature": args.temperature, "prefill_chunk": prefill_chunk,
        }),
    );
    report.line(&format!(
        "{name} in {precision:?}, --rank {}, adapters: {}, temperature {}",
        args.model.rank, args.adapters, args.temperature
    ));
    let vocab = subject.model.vocab_size();
    let user = User {
        engine: Engine::start(subject.model, config)?,
        clock,
        vocab,
        prefill_chunk,
        temperature: args.temperature,
    };
    let mut results = Vec::new();
    for work in works {
        let cores = &subject.cores[..args.adapters.distinct(work.sequences())];
        let account = match work {
            Work::Decode { steps, .. } => user.decode(work, steps, cores)?,
            Work::Prefill { .. } => {
                user.prefill(work, cores)?; // once for nobody
                user.prefill(work, cores)?
            }
        };
        results.push(show(&mut report, work, &account));
    }
    report.insert("results", results.into());
    user.engine.shutdown(Duration::ZERO);
    Ok(report)
}

/// Who uses the engine.
struct User {
    engine: Handle,
    clock: Arc<Clock>,
    vocab: usize,
    prefill_chunk: usize,
    temperature: f32,
}

impl User {
    fn reading(&self) -> Reading {
        Reading::now(&self.engine, &self.clock)
    }

    /// From the moment in which every sequence decodes until the last one has had its steps: the batch is full all the while.
    fn decode(&self, work: Work, steps: usize, cores: &[Arc<Cores>]) -> Result<Account, AppError> {
        let mut sequences = self.submit(work, cores)?;
        for events in &mut sequences {
            next_token(events)?;
        }
        let Some(last) = sequences.last_mut() else { return Err(AppError::Bench("no sequences".into())) };
        for _ in 0..WARM_UP {
            next_token(last)?;
        }
        let before = self.reading();
        for _ in 0..steps {
            next_token(last)?;
        }
        let account = Account::between(&before, &self.reading());
        drop(sequences); // which cancels them
        if account.steps == 0 {
            return Err(AppError::Bench("the steps were over before they were measured: ask for more --steps".into()));
        }
        while self.engine.stats().running.get() > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(account)
    }

    /// From the request to its first token.
    fn prefill(&self, work: Work, cores: &[Arc<Cores>]) -> Result<Account, AppError> {
        let before = self.reading();
        for mut events in self.submit(work, cores)? {
            next_token(&mut events)?;
        }
        Ok(Account::between(&before, &self.reading()))
    }

    fn submit(&self, work: Work, cores: &[Arc<Cores>]) -> Result<Vec<Events>, AppError> {
        let (prompt, max_tokens) = work.tokens(self.prefill_chunk);
        let request = |sequence: usize| {
            let mut random = Random(sequence as u64);
            Request {
                prompt: (0..prompt).map(|_| random.below(self.vocab) as TokenId).collect(),
                max_tokens,
                min_tokens: 0,
                stop_tokens: Vec::new(),
                sampling: Sampling { temperature: self.temperature, seed: sequence as u64, ..Sampling::default() },
                logprobs: None,
                prompt_logprobs: None,
                scaled_logprobs: false,
                capture_logits: false,
                cores: (!cores.is_empty()).then(|| cores[sequence % cores.len()].clone()),
                salt: CacheSalt([0; 32]),
                use_cache: false,
                priority: Priority::Interactive,
                share: Share::default(),
                deadline: None,
                span: tracing::Span::none(),
            }
        };
        let requests = (0..work.sequences()).map(request).collect();
        self.engine.submit_many(requests).map_err(|error| AppError::Bench(format!("the engine refused: {error}")))
    }
}

/// Waits for the next token of a sequence.
fn next_token(events: &mut Events) -> Result<(), AppError> {
    loop {
        let ended = match events.blocking_recv() {
            Some(Event::Token(_)) => return Ok(()),
            Some(Event::Began { .. } | Event::Prompt(_)) => continue,
            Some(Event::Failed(message)) => message,
            Some(Event::NotFinite) => "the logits are not finite".into(),
            Some(Event::Expired) => "its deadline came".into(),
            Some(Event::Finished(..)) | None => "the completion ended too early".into(),
        };
        return Err(AppError::Bench(format!("the engine stopped: {ended}")));
    }
}

fn show(report: &mut Report, work: Work, account: &Account) -> Value {
    let per_step = |seconds: f64| 1e3 * seconds / account.steps.max(1) as f64;
    let (phase, prompt, what) = match work {
        Work::Decode { sequences, prompt, .. } => {
            ("decode", prompt, format!("decoding {sequences} sequences after {prompt} tokens"))
        }
        Work::Prefill { prompt } => ("prefill", prompt, format!("prefill of {prompt} tokens")),
    };
    let named = account.named();
    let row = |name: &str, seconds: f64| {
        vec![name.to_owned(), format!("{:.3}", per_step(seconds)), format!("{:.1}", 100.0 * account.share(seconds))]
    };
    let mut rows: Vec<Vec<String>> = account.parts.iter().map(|&(name, seconds)| row(name, seconds)).collect();
    rows.push(row("by name", named));
    rows.push(row("by the clock on the wall", account.total));
    report.line(&format!("\n{what}, {} steps", account.steps));
    report.table(&["", "ms a step", "%"], &rows);
    let parts: Vec<Value> = (account.parts.iter())
        .map(|&(name, seconds)| json!({ "part": name, "ms": number(per_step(seconds)), "share": number(account.share(seconds)) }))
        .collect();
    json!({
        "phase": phase, "sequences": work.sequences(), "prompt": prompt, "steps": account.steps, "step_ms": number(per_step(account.total)),
        "named_share": number(account.share(named)), "parts": parts,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_the_difference_of_two_readings() {
        let at = Instant::now();
        let before = Reading { at, steps: 3, parts: vec![("a", 1.0), ("b", 0.5)] };
        let after = Reading { at: at + Duration::from_secs(2), steps: 5, parts: vec![("a", 2.5), ("b", 0.9)] };
        let account = Account::between(&before, &after);
        assert_eq!((account.steps, account.total), (2, 2.0));
        assert!((account.named() - 1.9).abs() < 1e-12);
        assert!((account.share(account.named()) - 0.95).abs() < 1e-12);
    }

    #[test]
    fn the_first_sequences_go_on_until_the_last_has_had_its_steps() {
        // 32 prompts of 64 tokens in chunks of 256: the last begins 8 steps or more after the first.
        let (prompt, generated) = Work::Decode { sequences: 32, prompt: 64, steps: 10 }.tokens(256);
        assert!(prompt == 64 && generated > 10 + WARM_UP + 8);
        assert_eq!(Work::Prefill { prompt: 512 }.tokens(256), (512, 1));
    }
}
