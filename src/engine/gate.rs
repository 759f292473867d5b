//! What handles and worker share: whose sequences are in the engine, and whether it lives.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering::SeqCst},
    },
    time::Instant,
};

use parking_lot::{Condvar, Mutex};

use super::{
    api::{Event, Priority, ShareKey},
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

/// Beside the places for all there are a fourth as many for keys that have next to nothing here, so that a flood shuts nobody out.
const KEPT: usize = 4;

/// Next to nothing is this part of the places for all, and one sequence in any case.
const SMALL: usize = 16;

/// Sequences of a priority, waiting ones included.
#[derive(Debug, Default)]
struct Places {
    all: usize,
    by_key: HashMap<ShareKey, usize>,
}

impl Places {
    /// Takes `n` places, or none: of `most` for everybody, and of those that are kept.
    fn reserve(&mut self, key: ShareKey, n: usize, most: usize) -> bool {
        let (all, own) = (self.all.saturating_add(n), self.by_key.get(&key).map_or(n, |had| had.saturating_add(n)));
        let fits = all <= most || (own <= (most / SMALL).max(1) && all <= most + (most / KEPT).max(1));
        if fits && n > 0 {
            self.all = all;
            self.by_key.insert(key, own);
        }
        fits
    }

    fn release(&mut self, key: ShareKey, n: usize) {
        self.all = self.all.saturating_sub(n);
        if let Some(own) = self.by_key.get_mut(&key) {
            *own = own.saturating_sub(n);
            if *own == 0 {
                self.by_key.remove(&key);
            }
        }
    }
}

/// The shared part.
#[derive(Debug, Default)]
pub(super) struct Gate {
    /// By priority: each has a queue of its own, so that a flood of background requests shuts nobody out.
    in_flight: [Mutex<Places>; 2],
    state: AtomicU8,
    gone: Mutex<bool>,
    left: Condvar,
}

impl Gate {
    /// Takes `n` places for a key, or none. There are `most` for all, and some more for keys that have next to nothing.
    pub(super) fn reserve(&self, (priority, key): (Priority, ShareKey), n: usize, most: usize) -> bool {
        self.in_flight[priority as usize].lock().reserve(key, n, most)
    }

    /// Gives places back.
    pub(super) fn release(&self, (priority, key): (Priority, ShareKey), n: usize) {
        self.in_flight[priority as usize].lock().release(key, n);
    }

    /// Sequences of this priority in the engine, waiting ones included.
    pub(super) fn in_flight(&self, priority: Priority) -> usize {
        self.in_flight[priority as usize].lock().all
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
    owner: (Priority, ShareKey),
    open: bool,
}

impl Outbox {
    /// For a place that was reserved.
    pub(super) fn new(events: Sender, gate: Arc<Gate>, owner: (Priority, ShareKey)) -> Self {
        Self { events, gate, owner, open: true }
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
            self.gate.release(self.owner, 1);
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
