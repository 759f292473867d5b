//! What handlers share.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use axum::extract::FromRef;

use super::{edge::Edge, incoming::Incoming, large::LargeAnswers, unread::Unread};
use crate::service::Service;

/// Sizes that a request may not exceed, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// A JSON body, and an upload.
    pub body: usize,
    /// All lines of `/adapters/batch` together.
    pub batch: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { body: 32 << 20, batch: 256 << 20 }
    }
}

/// Who may call without a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthMode {
    /// Every route but health, readiness and documents needs a key.
    Keys,
    /// `--no-auth`: every request is the built-in tenant's.
    Open,
}

/// Whether the server takes new work.
#[derive(Debug, Default)]
pub struct Lifecycle {
    draining: AtomicBool,
}

impl Lifecycle {
    /// From now on `/readyz` is 503 and new completions are refused; running ones go on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Has [`Self::drain`] been called?
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }
}

/// The state of the router; cheap to clone.
#[derive(Clone)]
pub struct AppState {
    /// The use cases.
    pub service: Arc<Service>,
    /// Sizes.
    pub limits: Limits,
    /// Keys or none.
    pub auth: AuthMode,
    /// Running or draining.
    pub lifecycle: Arc<Lifecycle>,
    /// Addresses, origins, patience.
    pub edge: Arc<Edge>,
    /// What bodies on their way in may take.
    pub incoming: Arc<Incoming>,
    /// What answers on their way may take.
    pub outgoing: Arc<Outgoing>,
}

/// What answers on their way to their clients may take of the server together.
#[derive(Debug, Default)]
pub struct Outgoing {
    pub(super) large: LargeAnswers,
    pub(super) unread: Unread,
}

impl AppState {
    /// A state with default limits that asks for keys.
    pub fn new(service: Arc<Service>) -> Self {
        Self {
            service,
            limits: Limits::default(),
            auth: AuthMode::Keys,
            lifecycle: Arc::default(),
            edge: Arc::default(),
            incoming: Arc::default(),
            outgoing: Arc::default(),
        }
    }
}

impl FromRef<AppState> for Arc<Service> {
    fn from_ref(state: &AppState) -> Self {
        state.service.clone()
    }
}
