//! Puts the rooms together: a base that runs, the store, the use cases, the HTTP server, and the order in which they start and stop.

mod backup;
mod base;
mod bench;
mod exposure;
mod state;
mod tenants;
mod train;

use std::{future::Future, sync::Arc, time::Duration};

use futures::FutureExt as _;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use backup::{backup, restore};
pub use base::{Base, start as start_base};
pub use bench::run as bench;
pub use state::{export_adapter, list_adapters, open_store};
pub use tenants::{create_key, create_tenant, list_keys, list_tenants, revoke_key, rotate_key, set_limits};
pub use train::{eval, task, train};

use crate::{
    adapter::BasisError,
    config::{HttpArgs, LimitArgs, RetentionArgs, Secret, ServeArgs, TrainingArgs},
    engine::{Handle, Health, StartError},
    http::{
        self, AppState, AuthMode, Limits,
        server::{ServerConfig, TlsError, serve as serve_http},
    },
    kernel::KernelError,
    model::ModelError,
    service::{
        Retention, Service,
        training::{DataLimits, EnginePolicies, RemoteAccess, TrainingConfig, UNLIMITED},
    },
    store::{Store, StoreError},
    text::{TemplateError, TokenizerError},
};

/// How long jobs have at least to write their checkpoints when the server stops.
const JOB_PATIENCE: Duration = Duration::from_secs(10);
/// How long the database has to write what it has and close.
const STORE_PATIENCE: Duration = Duration::from_secs(10);

/// The program could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// A flag asks for what cannot be.
    #[error("{0}")]
    Flag(String),
    /// The model cannot be found, loaded or packed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The backend cannot run it.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The basis cannot be computed.
    #[error(transparent)]
    Basis(#[from] BasisError),
    /// The model's tokenizer is broken.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The model's chat template is broken.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The engine cannot start.
    #[error(transparent)]
    Engine(#[from] StartError),
    /// The database cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Certificate or key.
    #[error("TLS: {0}")]
    Tls(#[from] TlsError),
    /// No randomness for a key.
    #[error("the system gave no random bytes: {0}")]
    Random(#[from] getrandom::Error),
    /// A file or the network.
    #[error("{0}: {1}")]
    Io(String, std::io::Error),
    /// A measurement that has no meaning: the server refused, or answered something else than what was asked.
    #[error("{0}")]
    Bench(String),
    /// Training cannot begin or go on.
    #[error("{0}")]
    Train(String),
    /// Somebody asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// The engine died; a supervisor should start the program anew.
    #[error("the engine has stopped; see the log")]
    EngineDead,
}

/// `mote serve`: runs until `stop` resolves, then drains: no new work, running requests get `--drain-seconds`.
///
/// # Errors
/// What kept it from starting; [`AppError::EngineDead`] when the engine died under it.
pub async fn serve(args: ServeArgs, stop: impl Future<Output = ()> + Send + 'static) -> Result<(), AppError> {
    let admin_key = check_exposure(&args.http)?;
    let server = exposure::server_config(&args.edge)?;
    let edge = exposure::edge(&args.edge)?;
    let listen = args.http.listen;
    // Bound before the model is loaded, so that a taken port is known at once.
    let listener =
        TcpListener::bind(listen).await.map_err(|error| AppError::Io(format!("--listen {listen}"), error))?;
    let stop = stop.shared();
    let store = open_store(&args.state).await?;
    state::check_integrity(&store, args.edge.integrity_check).await?;
    let (model, engine) = (args.model.clone(), args.engine.clone());
    let loading = tokio::task::spawn_blocking(move || start_base(&model, &engine));
    let base = tokio::select! {
        base = loading => base.map_err(|error| AppError::Flag(format!("loading the model failed: {error}")))??,
        () = stop.clone() => {
            tracing::info!("stopping: the model was not loaded yet");
            close(&store).await;
            return Ok(());
        }
    };
    let service = Service::open(base.info, base.basis, base.engine, store.clone()).await?;
    let mut service = service.with_policy(exposure::policy(&args.edge));
    service.request_timeout = args.http.request_timeout();
    let service = Arc::new(service);
    // --no-auth serves one tenant without quotas.
    if !args.http.no_auth {
        limit(&service, &args.limits);
    }
    service.keep_for(retention(&args.retention));
    let policies = EnginePolicies::of(&service);
    service.start_training(training_config(&args.training, args.http.no_auth), Arc::new(policies)).await?;
    if !args.http.no_auth {
        state::first_admin_key(&store, admin_key.as_ref().map(Secret::expose)).await?;
    }
    let state = AppState {
        limits: Limits { body: mebibytes(args.http.max_body_mb), batch: mebibytes(args.http.max_batch_body_mb) },
        auth: if args.http.no_auth { AuthMode::Open } else { AuthMode::Keys },
        edge: Arc::new(edge),
        ..AppState::new(service)
    };
    let address = listener.local_addr().map_err(|error| AppError::Io(format!("--listen {listen}"), error))?;
    let scheme = if server.tls.is_some() { "https" } else { "http" };
    tracing::info!("listening on {scheme}://{address} (documentation at {scheme}://{address}/docs)");
    let service = state.service.clone();
    let outcome = until_stopped(listener, state, server, stop, args.http.drain()).await;
    if let Err(error) = service.write_usage().await {
        tracing::error!(%error, "what tenants used in the last second could not be written");
    }
    close(&store).await;
    outcome
}

/// Closes the store, which takes as long as the last writes do, within a deadline.
async fn close(store: &Store) {
    if tokio::time::timeout(STORE_PATIENCE, store.close()).await.is_err() {
        tracing::warn!("the database did not close in time: it is put right at the next start");
    }
}

/// Serves, drains and stops the engine. Whoever watches sees it in this order: not ready, no new work, the last answers, the end.
///
/// # Errors
/// [`AppError::EngineDead`] when the engine died.
pub async fn until_stopped(
    listener: TcpListener,
    state: AppState,
    config: ServerConfig,
    stop: impl Future<Output = ()> + Send + 'static,
    drain: Duration,
) -> Result<(), AppError> {
    let (lifecycle, service) = (state.lifecycle.clone(), state.service.clone());
    let engine = service.engine.clone();
    let metrics = service.metrics.connections.clone();
    let draining = CancellationToken::new();
    let (watched, begun) = (engine.clone(), draining.clone());
    let shutdown = async move {
        tokio::select! {
            () = stop => tracing::info!("stopping: running requests have {} s", drain.as_secs()),
            () = engine_death(&watched) => {}
        }
        lifecycle.drain();
        begun.cancel();
    };
    // Jobs write their checkpoints while requests still run; who follows a job's events is sent home.
    let begun = draining.clone();
    let jobs = tokio::spawn(async move {
        begun.cancelled().await;
        if let Ok(training) = service.training()
            && !training.stop(drain.max(JOB_PATIENCE)).await
        {
            tracing::warn!("a training job did not stop in time: it goes on from its last checkpoint");
        }
    });
    let deadline = async {
        draining.cancelled().await;
        tokio::time::sleep(drain).await;
    };
    tokio::select! {
        served = serve_http(listener, http::router(state), config, metrics, shutdown) => {
            served.map_err(|error| AppError::Io("the HTTP server".into(), error))?;
        }
        () = deadline => tracing::warn!("the drain deadline is over: open requests are cut off"),
    }
    let _ = jobs.await; // it does not panic
    if engine.health() == Health::Dead {
        return Err(AppError::EngineDead);
    }
    // Requests whose clients are still connected were waited for above; the rest ends now.
    let ended = tokio::task::spawn_blocking(move || engine.shutdown(Duration::ZERO)).await;
    tracing::info!(cut_off = !ended.unwrap_or(false), "stopped");
    Ok(())
}

/// The flags in the service's words. With `--no-auth` the one tenant has what there is.
fn training_config(args: &TrainingArgs, no_auth: bool) -> TrainingConfig {
    let default = TrainingConfig::default();
    let of_tenant = |most: u64| if no_auth { UNLIMITED } else { most };
    TrainingConfig {
        running: args.train_jobs.into(),
        running_of_tenant: of_tenant(args.train_jobs_per_tenant.into()),
        turn: Duration::from_secs(args.train_turn_s.into()),
        most_of_tenant: of_tenant(args.train_queue_per_tenant.into()),
        most: args.train_queue.into(),
        steps: args.train_max_steps.into(),
        checkpoints: args.train_checkpoints.into(),
        data: DataLimits { bytes: mebibytes(args.max_file_mb), ..default.data },
        files_of_tenant: of_tenant(mebibytes(args.max_files_mb_per_tenant) as u64),
        remote: RemoteAccess::new(args.grader_hosts.clone(), args.grader_concurrency.into()),
        ..default
    }
}

/// For how long what is kept, and how much of it.
fn retention(args: &RetentionArgs) -> Retention {
    let kept = |most: u32| Some(most).filter(|most| *most > 0);
    Retention {
        audit: kept(args.audit_days),
        audit_entries: kept(args.audit_entries),
        jobs: kept(args.job_days),
        keys: kept(args.key_days),
        usage: kept(args.usage_days),
    }
}

/// What tenants may use unless something else was set for them.
fn limit(service: &Service, args: &LimitArgs) {
    service.accounts.set_defaults(|limits| {
        limits.adapters = args.tenant_adapters;
        limits.stored_bytes = args.tenant_stored_bytes;
        limits.concurrent_requests = args.tenant_concurrent_requests;
        limits.requests_per_minute = args.tenant_requests_per_minute;
        limits.tokens_per_minute = args.tenant_tokens_per_minute;
        limits.trained_tokens_per_day = args.tenant_trained_tokens_per_day;
    });
    let failures = u64::from(args.auth_failures_per_minute);
    service.directory.limit_failures((failures > 0).then_some(failures));
}

/// Resolves when the engine can do no more.
async fn engine_death(engine: &Handle) {
    while engine.health() != Health::Dead {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    tracing::error!("the engine is dead");
}

fn mebibytes(count: u32) -> usize {
    (count as usize) << 20
}

/// The admin key that the flags give, if they do: read and checked before the model is loaded.
fn check_exposure(http: &HttpArgs) -> Result<Option<Secret>, AppError> {
    if http.no_auth && !http.listen.ip().is_loopback() && !http.force_no_auth {
        return Err(AppError::Flag(format!(
            "--no-auth on {}: anybody who reaches this address could use and change everything; listen on 127.0.0.1, or add --force-no-auth",
            http.listen
        )));
    }
    let key = http.admin_key().map_err(|words| AppError::Flag(format!("--admin-key-file {words}")))?;
    key.as_ref().map(|key| state::chosen_key(key.expose())).transpose()?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Flags {
        #[command(flatten)]
        training: TrainingArgs,
    }

    #[test]
    fn without_keys_one_tenant_may_train_and_keep_what_the_server_may() {
        let args = Flags::parse_from(["mote", "--train-queue", "7"]).training;
        let (with, without) = (training_config(&args, false), training_config(&args, true));
        let of_tenant = |config: &TrainingConfig| {
            [config.running_of_tenant, config.most_of_tenant, config.files_of_tenant].map(|most| most == UNLIMITED)
        };
        assert_eq!((of_tenant(&with), of_tenant(&without)), ([false; 3], [true; 3]));
        assert_eq!((without.running, without.most), (with.running, 7));
    }
}
