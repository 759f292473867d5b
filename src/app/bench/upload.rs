//! `mote bench upload`: durable uploads a second, one by one and in bulk, and what the first token under a new adapter takes.

use std::time::Instant;

use futures::future::try_join_all;
use serde_json::{Value, json};

use super::{
    client::{Connection, Request},
    figures::{median, number, percentile, spread},
    in_turn,
    inputs::{adapter_bytes, adapter_name},
    load::{Clients, first_token, milliseconds},
    report::Report,
    server::{Server, Setup, good, lost, spelled, upload_batch},
};
use crate::{app::AppError, config::UploadArgs};

/// Tokens of the prompts whose first token is waited for.
const PROMPT_TOKENS: usize = 21;
const CASES: usize = 3;

/// `mote bench upload`
pub(super) async fn run(args: &UploadArgs) -> Result<Report, AppError> {
    if args.model.rank < 2 {
        return Err(AppError::Flag(format!("--rank {} has no room for the adapters of this load", args.model.rank)));
    }
    let sync = spelled(&args.sync).to_string_lossy().into_owned();
    let server = Server::start(&Setup { model: &args.model, rank: args.model.rank, engine: None, sync: args.sync })?;
    let flags = json!({ "model": args.model.model, "sync": sync, "singles": args.singles, "connections": args.connections, "batch": args.batch, "rounds": args.rounds });
    let mut report = Report::new("upload", flags);
    report.line(&format!("durable uploads of 26 bytes, --sync {sync}"));
    let mut next = 0;
    rates(args, &server, &mut next, &mut report).await?;
    first_tokens(args, &server, &mut next, &mut report).await?;
    Ok(report)
}

async fn rates(args: &UploadArgs, server: &Server, next: &mut u64, report: &mut Report) -> Result<(), AppError> {
    let (singles, batch) = (args.singles.get() as u64, args.batch.get() as u64);
    let mut connections = try_join_all((0..args.connections.get()).map(|_| server.connect())).await?;
    let mut rates: [Vec<f64>; CASES] = Default::default();
    // Round 0 is small and nobody counts it.
    for round in 0..=args.rounds.get() {
        tracing::info!("round {round} of {}", args.rounds);
        for case in in_turn(CASES, round) {
            let count = if case == 2 { batch } else { singles };
            let count = if round == 0 { count.min(100) } else { count };
            let from = *next;
            *next += count;
            let begun = Instant::now();
            match case {
                0 => one_by_one(&mut connections[0], from, count, 1).await?,
                1 => {
                    let step = connections.len() as u64;
                    let work = connections.iter_mut().zip(from..).map(|(connection, first)| {
                        one_by_one(connection, first, (from + count).saturating_sub(first).div_ceil(step), step)
                    });
                    try_join_all(work).await?;
                }
                _ => upload_batch(&mut connections[0], from..from + count).await?,
            }
            if round > 0 {
                rates[case].push(count as f64 / begun.elapsed().as_secs_f64());
            }
        }
    }
    let names = [
        "singles, 1 connection".to_owned(),
        format!("singles, {} connections", args.connections),
        format!("batch route, {batch} lines"),
    ];
    let (mut rows, mut results): (Vec<Vec<String>>, Vec<Value>) = (Vec::new(), Vec::new());
    for (name, rates) in names.into_iter().zip(&rates) {
        let cell = |value: f64| format!("{value:.0}");
        rows.push(vec![name.clone(), cell(median(rates)), cell(percentile(rates, 0.0)), cell(percentile(rates, 1.0))]);
        results.push(json!({ "case": name, "uploads_per_second": spread(rates) }));
    }
    report.table(&["", "uploads/s", "min", "max"], &rows);
    report.insert("uploads", results.into());
    Ok(())
}

/// Uploads adapters `first`, `first + step`, ... , each in a request of its own.
async fn one_by_one(connection: &mut Connection, first: u64, count: u64, step: u64) -> Result<(), AppError> {
    for number in (0..count).map(|at| first + at * step) {
        let path = format!("/adapters?name={}&scheme=tiny13&dtype=bf16", adapter_name(number));
        let body = &adapter_bytes(number);
        let request = Request { method: "POST", path: &path, content_type: "application/octet-stream", body };
        good(connection.send(&request).await.map_err(lost)?, "/adapters")?;
    }
    Ok(())
}

/// The first token on the base, under an adapter used before, and under one uploaded just before, in turn.
async fn first_tokens(args: &UploadArgs, server: &Server, next: &mut u64, report: &mut Report) -> Result<(), AppError> {
    let mut clients = Clients::connect(server, 1).await?;
    let mut connection = server.connect().await?;
    let mut seconds: [Vec<f64>; CASES] = Default::default();
    let used = *next;
    one_by_one(&mut connection, used, 1, 1).await?;
    *next += 1;
    for round in 0..=args.first_tokens.get() {
        for case in in_turn(CASES, round) {
            let model = match case {
                0 => "base".to_owned(),
                1 => adapter_name(used),
                _ => {
                    *next += 1;
                    one_by_one(&mut connection, *next, 1, 1).await?;
                    adapter_name(*next)
                }
            };
            let time = first_token(&mut connection, &mut clients, &model, PROMPT_TOKENS).await?;
            if round > 0 {
                seconds[case].push(time);
            }
        }
    }
    let extra = |case: usize| {
        let pairs = seconds[case].iter().zip(&seconds[0]);
        1e3 * median(&pairs.map(|(adapter, base)| adapter - base).collect::<Vec<_>>())
    };
    let (mut rows, mut results): (Vec<Vec<String>>, Vec<Value>) = (Vec::new(), Vec::new());
    for (case, name) in ["base", "an adapter used before", "an adapter just uploaded"].into_iter().enumerate() {
        let (p50, p99) = milliseconds(&seconds[case]);
        rows.push(vec![name.to_owned(), format!("{p50:.2}"), format!("{p99:.2}"), format!("{:+.2}", extra(case))]);
        results.push(json!({ "case": name, "first_token_ms": { "p50": number(p50), "p99": number(p99) }, "extra_ms": number(extra(case)) }));
    }
    report.line(&format!("\nfirst token, {PROMPT_TOKENS} tokens in, one client"));
    report.table(&["", "ms p50", "ms p99", "over base"], &rows);
    report.insert("first_tokens", results.into());
    Ok(())
}
