//! Puts the rooms together: a base that runs, the store, the use cases, the HTTP server, and the order in which they start and stop.

mod base;
mod bench;
mod state;
mod tenants;
mod train;

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use axum::serve::ListenerExt as _;
use tokio::net::TcpListener;

pub use base::{Base, start as start_base};
pub use bench::run as bench;
pub use state::{export_adapter, list_adapters, open_store};
pub use tenants::{create_key, create_tenant, list_keys, list_tenants, revoke_key, rotate_key, set_limits};
pub use train::{eval, task, train};

use crate::{
    adapter::BasisError,
    config::{HttpArgs, LimitArgs, ServeArgs, TrainingArgs},
    engine::{Handle, Health, StartError},
    http::{self, AppState, AuthMode, Limits},
    kernel::KernelError,
    model::ModelError,
    service::{
        Service,
        training::{DataLimits, EnginePolicies, RemoteAccess, TrainingConfig},
    },
    store::StoreError,
    text::{TemplateError, TokenizerError},
};

/// How long jobs have at least to write their checkpoints when the server stops.
const JOB_PATIENCE: Duration = Duration::from_secs(10);

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
    check_exposure(&args.http)?;
    let listen = args.http.listen;
    // Bound before the model is loaded, so that a taken port is known at once.
    let listener =
        TcpListener::bind(listen).await.map_err(|error| AppError::Io(format!("--listen {listen}"), error))?;
    let store = open_store(&args.state).await?;
    let (model, engine) = (args.model.clone(), args.engine.clone());
    let base = tokio::task::spawn_blocking(move || start_base(&model, &engine))
        .await
        .map_err(|error| AppError::Flag(format!("loading the model failed: {error}")))??;
    let engine = base.engine.clone();
    let service = Arc::new(Service::open(base.info, base.basis, base.engine, store.clone()).await?);
    // --no-auth serves one tenant without quotas.
    if !args.http.no_auth {
        limit(&service, &args.limits);
    }
    if args.limits.audit_days > 0 {
        service.keep_audit(args.limits.audit_days);
    }
    let policies = EnginePolicies::new(engine.clone(), service.base.clone(), service.library.clone());
    service.start_training(training_config(&args.training), Arc::new(policies)).await?;
    if !args.http.no_auth {
        state::first_admin_key(&store, args.http.admin_key.as_deref()).await?;
    }
    let state = AppState {
        limits: Limits { body: mebibytes(args.http.max_body_mb), batch: mebibytes(args.http.max_batch_body_mb) },
        auth: if args.http.no_auth { AuthMode::Open } else { AuthMode::Keys },
        ..AppState::new(service)
    };
    let address = listener.local_addr().map_err(|error| AppError::Io(format!("--listen {listen}"), error))?;
    tracing::info!("listening on http://{address} (documentation at http://{address}/docs)");
    let service = state.service.clone();
    let outcome = until_stopped(listener, state, engine, stop, args.http.drain()).await;
    if let Err(error) = service.write_usage().await {
        tracing::error!(%error, "what tenants used in the last second could not be written");
    }
    store.close().await;
    outcome
}

/// Serves, drains and stops the engine.
async fn until_stopped(
    listener: TcpListener,
    state: AppState,
    engine: Handle,
    stop: impl Future<Output = ()> + Send + 'static,
    drain: Duration,
) -> Result<(), AppError> {
    let (lifecycle, service) = (state.lifecycle.clone(), state.service.clone());
    let draining = Arc::new(tokio::sync::Notify::new());
    let left = Arc::new(tokio::sync::Notify::new());
    let (watched, begun, leaving) = (engine.clone(), draining.clone(), left.clone());
    let shutdown = async move {
        tokio::select! {
            () = stop => tracing::info!("stopping: running requests have {} s", drain.as_secs()),
            () = engine_death(&watched) => {}
        }
        lifecycle.drain();
        begun.notify_one();
        leaving.notify_one();
    };
    // Jobs write their checkpoints while requests still run; who follows a job's events is sent home.
    let jobs = tokio::spawn(async move {
        left.notified().await;
        if let Ok(training) = service.training()
            && !training.stop(drain.max(JOB_PATIENCE)).await
        {
            tracing::warn!("a training job did not stop in time: it goes on from its last checkpoint");
        }
    });
    // Without this the first token of a stream waits for the client to acknowledge the headers: 40 ms on Linux.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection stays with Nagle's algorithm");
        }
    });
    let server = std::future::IntoFuture::into_future(
        axum::serve(listener, http::router(state).into_make_service_with_connect_info::<SocketAddr>())
            .with_graceful_shutdown(shutdown),
    );
    let deadline = async {
        draining.notified().await;
        tokio::time::sleep(drain).await;
    };
    tokio::select! {
        served = server => served.map_err(|error| AppError::Io("the HTTP server".into(), error))?,
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

/// The flags in the service's words.
fn training_config(args: &TrainingArgs) -> TrainingConfig {
    let default = TrainingConfig::default();
    TrainingConfig {
        running: args.train_jobs.into(),
        running_of_tenant: args.train_jobs_per_tenant.into(),
        most_of_tenant: args.train_queue_per_tenant.into(),
        most: args.train_queue.into(),
        steps: args.train_max_steps.into(),
        checkpoints: args.train_checkpoints.into(),
        data: DataLimits { bytes: mebibytes(args.max_file_mb), ..default.data },
        files_of_tenant: mebibytes(args.max_files_mb_per_tenant) as u64,
        remote: RemoteAccess::new(args.grader_hosts.clone(), args.grader_concurrency.into()),
        ..default
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

fn check_exposure(http: &HttpArgs) -> Result<(), AppError> {
    if http.no_auth && !http.listen.ip().is_loopback() && !http.force_no_auth {
        return Err(AppError::Flag(format!(
            "--no-auth on {}: anybody who reaches this address could use and change everything; listen on 127.0.0.1, or add --force-no-auth",
            http.listen
        )));
    }
    // Also checked here, before the model is loaded.
    http.admin_key.as_deref().map(state::chosen_key).transpose()?;
    Ok(())
}
