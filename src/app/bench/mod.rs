//! `mote bench`: our own figures, each from one run on one machine, with a word on whether it was idle.
//!
//! | file | measures |
//! |---|---|
//! | `forward` | the forward pass alone: decoding and prefill |
//! | `served` | a server under n clients (`server`, `client` and `load` are the means) |
//! | `upload` | durable uploads, and the first token after one |
//! | `quality` | each precision against f32 |
//! | `profile` | where the time of a step goes |
//!
//! Cases that are compared run in turn within each round, and ratios are taken within rounds: a machine whose speed wanders makes all cases of a round
//! slow. No measurement is part of a test; tests only see to it that the commands work.

mod client;
mod figures;
mod forward;
mod inputs;
mod load;
mod machine;
mod profile;
mod quality;
mod report;
mod served;
mod server;
mod subject;
#[cfg(test)]
mod tests;
mod upload;

use tokio::signal::unix::{SignalKind, signal};

use super::AppError;
use crate::config::BenchCommand;

/// `mote bench`: the table; what `--json` asks for is written.
///
/// # Errors
/// A flag that does not fit the model, a model that does not load, a server that refuses, a file that cannot be written.
pub fn run(command: BenchCommand) -> Result<String, AppError> {
    let watch = machine::Watch::begin();
    let (report, args) = match &command {
        BenchCommand::Decode(args) => (forward::decode(args)?, &args.report),
        BenchCommand::Prefill(args) => (forward::prefill(args)?, &args.report),
        BenchCommand::Served(args) => (on_one_thread(served::run(args))?, &args.report),
        BenchCommand::Upload(args) => (on_one_thread(upload::run(args))?, &args.report),
        BenchCommand::Quality(args) => (quality::run(args)?, &args.report),
        BenchCommand::Profile(args) => (profile::run(args)?, &args.report),
    };
    report.finish(&watch.end(), args)
}

/// The clients share the cores with the server that they measure: one thread is all they get.
fn on_one_thread<T>(work: impl Future<Output = Result<T, AppError>>) -> Result<T, AppError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| AppError::Io("the clients' runtime".into(), error))?.block_on(async {
        let (mut term, mut interrupt) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
        let told = async {
            match (&mut term, &mut interrupt) {
                (Ok(term), Ok(interrupt)) => tokio::select! { _ = term.recv() => {}, _ = interrupt.recv() => {} },
                _ => std::future::pending().await,
            }
        };
        // Dropping the work ends its servers and removes their folders.
        tokio::select! { outcome = work => outcome, () = told => Err(AppError::Bench("interrupted".into())) }
    })
}

/// The cases in an order that differs from round to round, forwards and backwards: no case follows another more often than that other follows it. What a case leaves behind, such
/// as a processor that is slower after a minute's work, would else be its neighbour's in every round.
fn in_turn(cases: usize, round: usize) -> impl Iterator<Item = usize> {
    let place = move |at: usize| if round.is_multiple_of(2) { at } else { cases - 1 - at };
    (0..cases).map(move |at| (place(at) + round / 2) % cases)
}
