//! The command line.

use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
};

use anyhow::Context;
use clap::Parser;
use mote::{
    app,
    config::{AdaptersCommand, Cli, Command, KeysCommand, LogFormat, TenantsCommand},
    http,
    model::Sources,
    telemetry::SpanSink,
};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::{EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

#[cfg(not(target_env = "msvc"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The causes in one line: a backtrace tells an operator nothing.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let sink = match &cli.command {
        Command::Serve(args) => args.traces.otlp_endpoint.as_ref().map(SpanSink::start).transpose()?,
        _ => None,
    };
    let filter = EnvFilter::try_new(&cli.log).with_context(|| format!("--log {}", cli.log))?;
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let log = match cli.log_format {
        LogFormat::Text => log.boxed(),
        LogFormat::Json => log.json().boxed(),
    };
    tracing_subscriber::registry().with(log.with_filter(filter)).with(sink.as_ref().map(SpanSink::layer)).init();
    let outcome = command(cli.command);
    if let Some(sink) = sink {
        sink.flush();
    }
    outcome
}

fn command(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(args) => {
            let runtime = runtime()?;
            let outcome = runtime.block_on(async { anyhow::Ok(app::serve(*args, asked_to_stop()?).await?) });
            // What is still on a thread (a model that loads, above all) has no one left to work for.
            runtime.shutdown_background();
            outcome
        }
        Command::Train(args) => {
            say(&runtime()?.block_on(async { anyhow::Ok(app::train(*args, asked_to_stop()?).await?) })?)
        }
        Command::Eval(args) => {
            say(&runtime()?.block_on(async { anyhow::Ok(app::eval(*args, asked_to_stop()?).await?) })?)
        }
        Command::Task(args) => say(&app::task(&args)?),
        Command::Pull(args) => {
            let found = Sources::from_env().resolve(&args.model)?;
            say(&found.path.display().to_string())
        }
        Command::Openapi => say(&http::openapi().to_pretty_json()?),
        Command::Keys(args) => runtime()?.block_on(keys(args.command)),
        Command::Backup(args) => say(&runtime()?.block_on(app::backup(&args))?),
        Command::Restore(args) => runtime()?.block_on(app::restore(&args)).map_err(Into::into),
        Command::Tenants(args) => runtime()?.block_on(tenants(args.command)),
        Command::Bench(args) => say(&app::bench(args.command)?),
        Command::Adapters(args) => runtime()?.block_on(adapters(args.command)),
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

/// One answer on stdout; everything else goes to stderr.
fn say(text: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

/// Resolves at the first signal to stop; the second ends the program at once.
fn asked_to_stop() -> anyhow::Result<impl Future<Output = ()> + Send + 'static> {
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (stop, stopped) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => {}, _ = interrupt.recv() => {} }
        let _ = stop.send(());
        tokio::select! { _ = term.recv() => {}, _ = interrupt.recv() => {} }
        tracing::warn!("second signal: stopping at once");
        std::process::exit(130);
    });
    Ok(async move {
        let _ = stopped.await;
    })
}

async fn keys(command: KeysCommand) -> anyhow::Result<()> {
    match command {
        KeysCommand::Create { tenant, role, expires_in, state } => {
            say(&app::create_key(&state, &tenant, role, expires_in).await?)
        }
        KeysCommand::Rotate { id, grace, expires_in, state } => {
            say(&app::rotate_key(&state, &id, grace, expires_in).await?)
        }
        KeysCommand::List { tenant, state } => say(&app::list_keys(&state, tenant.as_deref()).await?),
        KeysCommand::Revoke { id, state } => Ok(app::revoke_key(&state, &id).await?),
    }
}

async fn tenants(command: TenantsCommand) -> anyhow::Result<()> {
    match command {
        TenantsCommand::List { state } => say(&app::list_tenants(&state).await?),
        TenantsCommand::Create { name, state } => Ok(app::create_tenant(&state, &name).await?),
        TenantsCommand::Limits { name, limits, state } => say(&app::set_limits(&state, &name, &limits).await?),
    }
}

async fn adapters(command: AdaptersCommand) -> anyhow::Result<()> {
    match command {
        AdaptersCommand::List { tenant, prefix, state } => say(&app::list_adapters(&state, &tenant, &prefix).await?),
        AdaptersCommand::Export { name, tenant, out, state } => {
            let bytes = app::export_adapter(&state, &tenant, &name).await?;
            std::fs::write(&out, bytes).with_context(|| out.display().to_string())
        }
    }
}
