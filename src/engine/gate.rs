//! What handles and worker share: how many sequences are in the engine, and whether it lives.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicUsize, Ordering::SeqCst},
    },
    time::Instant,
};

use parking_lot::{Condvar, Mutex};

use super::{
    api::{Event, Priority},
    events::{Sender, Wakes},
};

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
    /// By priority: each has a queue of its own, so that a flood of background requests shuts nobody out.
    in_flight: [AtomicUsize; 2],
    state: AtomicU8,
    gone: Mutex<bool>,
    left: Condvar,
}

impl Gate {
    /// Takes `n` places of `most`, or none.
    pub(super) fn reserve(&self, priority: Priority, n: usize, most: usize) -> bool {
        let more = |now: usize| now.checked_add(n).filter(|&all| all <= most);
        self.in_flight[priority as usize].fetch_update(SeqCst, SeqCst, more).is_ok()
    }

    /// Gives places back.
    pub(super) fn release(&self, priority: Priority, n: usize) {
        self.in_flight[priority as usize].fetch_sub(n, SeqCst);
    }

    /// Sequences of this priority in the engine, waiting ones included.
    pub(super) fn in_flight(&self, priority: Priority) -> usize {
        self.in_flight[priority as usize].load(SeqCst)
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
    events: Sender,
    gate: Arc<Gate>,
    priority: Priority,
    open: bool,
}

impl Outbox {
    /// For a place that was reserved.
    pub(super) fn new(events: Sender, gate: Arc<Gate>, priority: Priority) -> Self {
        Self { events, gate, priority, open: true }
    }

    /// True when nobody listens any more.
    pub(super) fn is_closed(&self) -> bool {
        self.events.is_closed()
    }

    /// Sends without waiting and without waking: that is for the end of the step.
    pub(super) fn send(&self, event: Event, wakes: &mut Wakes) {
        self.events.send(event, wakes);
    }

    /// Sends the last event.
    pub(super) fn close(mut self, event: Event, wakes: &mut Wakes) {
        self.end(event, wakes);
    }

    fn end(&mut self, event: Event, wakes: &mut Wakes) {
        if std::mem::take(&mut self.open) {
            // First the place: a client that sees the end may submit again at once.
            self.gate.release(self.priority, 1);
            self.events.send_last(event, wakes);
        }
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        let mut wakes = Wakes::default();
        self.end(Event::Failed("the engine has stopped".into()), &mut wakes);
        wakes.deliver();
    }
}
