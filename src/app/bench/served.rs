//! `mote bench served`: a server under n clients, on the bare base, with one adapter for all, and with one each.

use std::num::NonZeroUsize;

use serde_json::{Value, json};

use super::{
    figures::{median, number, percentile, ratios, spread},
    in_turn,
    load::{Clients, Load, Outcome, milliseconds},
    report::Report,
    server::{Server, Setup, spelled},
};
use crate::{
    app::AppError,
    config::{AdapterChoice, ServedArgs, SyncMode},
};

/// A server and who calls it.
struct Target {
    server: Server,
    clients: Clients,
}

/// A load on one of the targets.
struct Case {
    /// In the report.
    label: String,
    target: usize,
    load: Load,
    /// The case that it is compared with.
    reference: Option<usize>,
}

/// What a case's rounds brought.
#[derive(Default)]
struct Findings {
    rates: Vec<f64>,
    first: Vec<f64>,
    between: Vec<f64>,
}

/// `mote bench served`
pub(super) async fn run(args: &ServedArgs) -> Result<Report, AppError> {
    let most = args.clients.iter().map(|n| n.get()).max().unwrap_or(1);
    let adapters = args.adapters.iter().map(|choice| choice.distinct(most)).max().unwrap_or(0);
    if (adapters > 0 || !args.resident.is_empty()) && args.model.rank < 2 {
        let rank = args.model.rank;
        return Err(AppError::Flag(format!(
            "--rank {rank} has no room for the adapters of this load; give --adapters 0"
        )));
    }
    let flags = json!({
        "model": args.model.model, "dtype": spelled(&args.model.dtype).to_string_lossy(), "rank": args.model.rank, "threads": args.model.threads,
        "prompt_tokens": args.prompt_tokens, "max_tokens": args.max_tokens, "requests": args.requests, "rounds": args.rounds,
        "max_batch": args.engine.max_batch, "prefill_chunk": args.engine.prefill_chunk,
    });
    let mut report = Report::new("served", flags);
    report.line(&format!(
        "{} in {}, --rank {}, over HTTP: {} tokens in, {} out, {} request(s) a client, prompts distinct, no prefix cache",
        args.model.model,
        spelled(&args.model.dtype).to_string_lossy(),
        args.model.rank,
        args.prompt_tokens,
        args.max_tokens,
        args.requests
    ));
    adapters_and_clients(args, most, adapters as u64, &mut report).await?;
    if let Some(rank) = args.compare_rank {
        ranks(args, most, rank, &mut report).await?;
    }
    if !args.resident.is_empty() {
        resident(args, most, &mut report).await?;
    }
    Ok(report)
}

async fn start(args: &ServedArgs, rank: u8, clients: usize) -> Result<Target, AppError> {
    let setup = Setup { model: &args.model, rank, engine: Some(&args.engine), sync: SyncMode::Normal };
    tracing::info!(rank, "starting a server");
    let server = Server::start(&setup)?;
    let clients = Clients::connect(&server, clients).await?;
    Ok(Target { server, clients })
}

fn load(args: &ServedArgs, clients: usize, adapters: AdapterChoice) -> Load {
    Load {
        clients,
        adapters,
        prompt_tokens: args.prompt_tokens.get(),
        max_tokens: args.max_tokens.get(),
        requests: args.requests.get(),
        streamed: false,
    }
}

/// Every case in every round; one round before that nobody counts.
async fn measure(args: &ServedArgs, targets: &mut [Target], cases: &[Case]) -> Result<Vec<Findings>, AppError> {
    let mut findings: Vec<Findings> = cases.iter().map(|_| Findings::default()).collect();
    let (whole, streamed) = (args.rounds.get(), args.streamed_rounds);
    for round in 0..=whole + streamed {
        tracing::info!("round {round} of {}", whole + streamed);
        for at in in_turn(cases.len(), round) {
            let Case { target, load, .. } = &cases[at];
            let Target { server, clients } = &mut targets[*target];
            let load = Load { streamed: round > whole, ..load.clone() };
            let outcome: Outcome = clients.run(&load, server.adapters).await?;
            let found = &mut findings[at];
            if load.streamed {
                found.first.extend(outcome.first);
                found.between.extend(outcome.between);
            } else if round > 0 {
                found.rates.push(outcome.rate());
            }
        }
    }
    Ok(findings)
}

/// The main table: base, one adapter, each its own, for every number of clients.
async fn adapters_and_clients(
    args: &ServedArgs,
    most: usize,
    adapters: u64,
    report: &mut Report,
) -> Result<(), AppError> {
    let mut target = start(args, args.model.rank, most).await?;
    let loaded = target.server.memory();
    target.server.register(adapters).await?;
    let mut choices = vec![AdapterChoice::Base];
    choices.extend(args.adapters.iter().filter(|choice| **choice != AdapterChoice::Base));
    let mut cases = Vec::new();
    for clients in args.clients.iter().map(|n| n.get()) {
        let reference = cases.len();
        cases.extend(choices.iter().map(|&choice| Case {
            label: choice.to_string(),
            target: 0,
            load: load(args, clients, choice),
            reference: Some(reference),
        }));
    }
    let mut targets = [target];
    let findings = measure(args, &mut targets, &cases).await?;
    table(report, "adapters", "/ base", "served", &cases, &findings);
    if let Some((before, after)) = loaded.zip(targets[0].server.memory()) {
        let (before, peak) = (mebibytes(before.resident), mebibytes(after.peak));
        report.line(&format!("memory of the server: {before:.0} MiB resident when loaded, {peak:.0} MiB at most"));
        report.insert("memory_mib", json!({ "loaded": number(before), "peak": number(peak) }));
    }
    Ok(())
}

/// What the appended rows cost everyone: the base at two ranks.
async fn ranks(args: &ServedArgs, most: usize, other: u8, report: &mut Report) -> Result<(), AppError> {
    let mut targets = Vec::new();
    for rank in [other, args.model.rank] {
        targets.push(start(args, rank, most).await?);
    }
    let mut cases = Vec::new();
    for clients in args.clients.iter().map(|n| n.get()) {
        let reference = cases.len();
        cases.extend([other, args.model.rank].iter().enumerate().map(|(target, rank)| Case {
            label: format!("rank {rank}"),
            target,
            load: load(args, clients, AdapterChoice::Base),
            reference: Some(reference),
        }));
    }
    let findings = measure(args, &mut targets, &cases).await?;
    report.line(&format!("\nthe base at --rank {} over --rank {other}, two servers in turn", args.model.rank));
    table(report, "base at", &format!("/ rank {other}"), "ranks", &cases, &findings);
    Ok(())
}

/// The same load over few and many registered adapters, a server each.
async fn resident(args: &ServedArgs, most: usize, report: &mut Report) -> Result<(), AppError> {
    let mut targets = Vec::new();
    let (mut rows, mut memory): (Vec<Vec<String>>, Vec<Value>) = (Vec::new(), Vec::new());
    for count in args.resident.iter().map(|n| n.get() as u64) {
        let mut target = start(args, args.model.rank, most).await?;
        // The first adapter brings tables and pages with it that the others share.
        target.server.register(count.min(1)).await?;
        let before = target.server.memory();
        let begun = std::time::Instant::now();
        tracing::info!(count, "registering adapters");
        target.server.register(count).await?;
        let seconds = begun.elapsed().as_secs_f64();
        if let Some((before, after)) = before.zip(target.server.memory()).filter(|_| count > 1) {
            let grown = after.resident.saturating_sub(before.resident) as f64;
            let each = grown / (count - 1) as f64;
            rows.push(vec![
                count.to_string(),
                format!("{:.1}", grown / f64::from(1 << 20)),
                format!("{each:.0}"),
                format!("{:.0}", count as f64 / seconds),
            ]);
            memory.push(json!({
                "adapters": count, "grown_mib": number(grown / f64::from(1 << 20)), "bytes_each": number(each), "peak_mib": number(mebibytes(after.peak)),
                "registered_per_second": number(count as f64 / seconds),
            }));
        }
        targets.push(target);
    }
    let cases: Vec<Case> = (args.resident.iter().enumerate())
        .map(|(target, count): (usize, &NonZeroUsize)| Case {
            label: format!("{count} resident"),
            target,
            load: load(args, most, AdapterChoice::Each),
            reference: Some(0),
        })
        .collect();
    let findings = measure(args, &mut targets, &cases).await?;
    report.line("\neach client its own of so many registered adapters, a server for each number, in turn");
    table(report, "adapters", "/ first", "resident", &cases, &findings);
    report.table(&["adapters", "MiB more", "bytes each", "registered/s"], &rows);
    report.insert("resident_memory", memory.into());
    Ok(())
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn table(report: &mut Report, label: &str, ratio: &str, key: &str, cases: &[Case], findings: &[Findings]) {
    let (mut rows, mut results): (Vec<Vec<String>>, Vec<Value>) = (Vec::new(), Vec::new());
    for (case, found) in cases.iter().zip(findings) {
        let over = case.reference.map(|at| ratios(&found.rates, &findings[at].rates)).unwrap_or_default();
        let (first, between) = (milliseconds(&found.first), milliseconds(&found.between));
        let pair = |(p50, p99): (f64, f64), digits: usize| match p50.is_finite() {
            true => format!("{p50:.digits$} / {p99:.digits$}"),
            false => String::new(),
        };
        rows.push(vec![
            case.label.clone(),
            case.load.clients.to_string(),
            format!("{:.0}", median(&found.rates)),
            format!("{:.0}..{:.0}", percentile(&found.rates, 0.0), percentile(&found.rates, 1.0)),
            format!("{:.3}", median(&over)),
            format!("{:.3}..{:.3}", percentile(&over, 0.25), percentile(&over, 0.75)),
            pair(first, 1),
            pair(between, 2),
        ]);
        let latency = |(p50, p99): (f64, f64)| json!({ "p50": number(p50), "p99": number(p99) });
        results.push(json!({
            label.replace(' ', "_"): case.label, "clients": case.load.clients, "tokens_per_second": spread(&found.rates), "ratio": spread(&over),
            "first_token_ms": latency(first), "between_tokens_ms": latency(between),
        }));
    }
    let head =
        [label, "clients", "tok/s", "min..max", ratio, "quartiles", "first token ms p50/p99", "between ms p50/p99"];
    report.table(&head, &rows);
    report.insert(key, results.into());
}
