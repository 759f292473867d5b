//! What handles and worker share: how many sequences are in the engine, and whether it lives.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicUsize, Ordering::SeqCst},
    },
    time::Instant,
};

use parking_lot::{Condvar, Mutex};
use tokio::sync::mpsc;

use super::api::Event;

/// What the engine can do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It takes requests.
    Running,
    /// It takes no more requests and ends those that it has.
    Draining,
    /// It was shut down.
    Stopped,
    /// It gave up after too many failed steps in a row.
    Dead,
}

const STATES: [Health; 4] = [Health::Running, Health::Draining, Health::Stopped, Health::Dead];

/// The shared part.
#[derive(Debug, Default)]
pub(super) struct Gate {
    in_flight: AtomicUsize,
    state: AtomicU8,
    gone: Mutex<bool>,
    left: Condvar,
}

impl Gate {
    /// Takes `n` places of `most`, or none.
    pub(super) fn reserve(&self, n: usize, most: usize) -> bool {
        let more = |now: usize| now.checked_add(n).filter(|&all| all <= most);
        self.in_flight.fetch_update(SeqCst, SeqCst, more).is_ok()
    }

    /// Sequences in the engine, waiting ones included.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(SeqCst)
    }

    /// What the engine can do now.
    pub(super) fn health(&self) -> Health {
        STATES[usize::from(self.state.load(SeqCst)) % STATES.len()]
    }

    /// Moves on to a later state; never back.
    pub(super) fn set(&self, health: Health) {
        self.state.fetch_max(health as u8, SeqCst);
    }

    /// The worker's thread is about to end.
    pub(super) fn leave(&self) {
        *self.gone.lock() = true;
        self.left.notify_all();
    }

    /// Waits for that; false if it did not come in time.
    pub(super) fn wait(&self, until: Instant) -> bool {
        let mut gone = self.gone.lock();
        while !*gone {
            if self.left.wait_until(&mut gone, until).timed_out() {
                return *gone;
            }
        }
        true
    }
}

/// The sending side of one request. However it goes away, its place is freed and the receiver gets exactly one last event.
#[derive(Debug)]
pub(super) struct Outbox {
    events: mpsc::Sender<Event>,
    gate: Arc<Gate>,
    open: bool,
}

impl Outbox {
    /// For a place that was reserved. The channel has room for every event that the request can cause.
    pub(super) fn new(events: mpsc::Sender<Event>, gate: Arc<Gate>) -> Self {
        Self { events, gate, open: true }
    }

    /// True when nobody listens any more.
    pub(super) fn is_closed(&self) -> bool {
        self.events.is_closed()
    }

    /// Sends without waiting. A receiver that has gone is noticed by [`Outbox::is_closed`].
    pub(super) fn send(&self, event: Event) {
        let _ = self.events.try_send(event);
    }

    /// Sends the last event.
    pub(super) fn close(mut self, event: Event) {
        self.end(event);
    }

    fn end(&mut self, event: Event) {
        if std::mem::take(&mut self.open) {
            // First the place: a client that sees the end may submit again at once.
            self.gate.in_flight.fetch_sub(1, SeqCst);
            let _ = self.events.try_send(event);
        }
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.end(Event::Failed("the engine has stopped".into()));
    }
}
