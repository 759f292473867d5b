//! Load shedding: a request that would wait longer than `--shed-after-s` for its first step is refused at once, with 503 and when to come again.
//!
//! A newcomer's wait is the sequences before it by the pace at which sequences end. The pace is measured over the last `after` in which there was a queue:
//! an idle server's pace says nothing. What stands before a newcomer is the queue; but tenants take turns, so to one with few requests it is no more
//! than a round for each of its own: `(own + 1) * tenants`. So the flood of one tenant sheds that tenant's requests, and a crowd sheds everybody's.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::Error;
use crate::{engine::Handle, types::TenantId};

/// Looks back that a window is made of.
const MARKS: u32 = 16;
/// Longest `retry-after`.
const LONGEST: f64 = 60.0;

/// Decides who is refused.
#[derive(Debug, Default)]
pub(super) struct Shedder {
    after: Option<Duration>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// Sequences of running and waiting requests by tenant; no entry without one.
    own: HashMap<TenantId, usize>,
    /// Sequences that the engine was given.
    submitted: u64,
    pace: Pace,
}

/// A request's place in the count, until its answer is sent or given up.
#[derive(Debug)]
pub(super) struct Place {
    state: Arc<Mutex<State>>,
    tenant: TenantId,
    sequences: usize,
}

impl Shedder {
    pub(super) fn new(after: Option<Duration>) -> Self {
        Self { after, state: Arc::default() }
    }

    /// A place for a request of so many sequences.
    ///
    /// # Errors
    /// 503 overloaded.
    pub(super) fn admit(&self, engine: &Handle, tenant: TenantId, sequences: usize) -> Result<Place, Error> {
        let mut state = self.state.lock();
        if let Some(after) = self.after {
            let in_flight = engine.in_flight();
            let waiting = in_flight.saturating_sub(engine.stats().running.get() as usize);
            let ended = state.submitted.saturating_sub(in_flight as u64);
            if let Some(pace) = state.pace.observe(Instant::now(), after, waiting, ended) {
                let wait = state.before(tenant, waiting) as f64 / pace;
                if wait > after.as_secs_f64() {
                    return Err(overloaded(wait, after));
                }
            }
        }
        *state.own.entry(tenant).or_default() += sequences;
        Ok(Place { state: self.state.clone(), tenant, sequences })
    }
}

impl State {
    /// Sequences that go before a newcomer of the tenant.
    fn before(&self, tenant: TenantId, waiting: usize) -> usize {
        let own = self.own.get(&tenant).copied().unwrap_or(0);
        let tenants = self.own.len() + usize::from(own == 0);
        waiting.min((own + 1).saturating_mul(tenants))
    }
}

impl Place {
    /// The engine took the sequences.
    pub(super) fn submitted(&self) {
        self.state.lock().submitted += self.sequences as u64;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.state.lock();
        if let Some(own) = state.own.get_mut(&self.tenant) {
            *own -= self.sequences;
            if *own == 0 {
                state.own.remove(&self.tenant);
            }
        }
    }
}

/// How many sequences ended by when, since there has been a queue.
#[derive(Debug, Default)]
struct Pace {
    marks: VecDeque<(Instant, u64)>,
}

impl Pace {
    /// Sequences a second; None while there is no queue, or it has not been there for half of `after`. A queue can only have gone where a newcomer finds
    /// none, so looking at arrivals is enough.
    fn observe(&mut self, now: Instant, after: Duration, waiting: usize, ended: u64) -> Option<f64> {
        if waiting == 0 {
            self.marks.clear();
            return None;
        }
        while self.marks.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= after) {
            self.marks.pop_front();
        }
        if self.marks.back().is_none_or(|(at, _)| now.duration_since(*at) >= after / MARKS) {
            self.marks.push_back((now, ended));
        }
        let &(since, before) = self.marks.front()?;
        let elapsed = now.duration_since(since);
        // Where nothing has ended yet, the next may end now: the shortest wait that fits what was seen.
        (elapsed >= after / 2).then(|| ended.saturating_sub(before).max(1) as f64 / elapsed.as_secs_f64())
    }
}

fn overloaded(wait: f64, after: Duration) -> Error {
    let message = format!("The server is overloaded: this request would wait about {wait:.0} s for its turn.");
    let mut error = Error::overloaded(message);
    error.retry_after = Some((wait - after.as_secs_f64()).ceil().clamp(1.0, LONGEST) as u64);
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::ErrorKind;

    const AFTER: Duration = Duration::from_secs(16);

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn a_pace_is_known_when_there_has_been_a_queue_for_a_while() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        assert_eq!(pace.observe(start, AFTER, 0, 1000), None);
        assert_eq!(pace.observe(start + seconds(100), AFTER, 5, 1000), None, "a queue that has just begun");
        assert_eq!(pace.observe(start + seconds(107), AFTER, 5, 1007), None);
        assert_eq!(pace.observe(start + seconds(108), AFTER, 5, 1016), Some(2.0));
        assert_eq!(pace.observe(start + seconds(109), AFTER, 0, 1016), None, "the queue went");
        assert_eq!(pace.observe(start + seconds(110), AFTER, 1, 1016), None);
        assert_eq!(pace.observe(start + seconds(120), AFTER, 1, 1016), Some(0.1), "nothing has ended yet");
    }

    #[test]
    fn a_pace_is_of_the_last_while() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        for second in 0..100 {
            pace.observe(start + seconds(second), AFTER, 5, second.min(50) * 10);
        }
        let now = pace.observe(start + seconds(100), AFTER, 5, 500).unwrap();
        assert!(now <= 1.0 / 16.0, "{now}");
        assert!(pace.marks.len() <= MARKS as usize + 2, "{}", pace.marks.len());
    }

    #[test]
    fn a_flood_stands_before_its_own_tenant_and_a_crowd_before_everybody() {
        let mut state = State::default();
        let (flood, other) = (TenantId(1), TenantId(2));
        state.own.insert(flood, 200);
        assert_eq!(state.before(flood, 136), 136);
        assert_eq!(state.before(other, 136), 2);
        state.own.insert(other, 3);
        assert_eq!(state.before(other, 136), 8);
        state.own.extend((10..1010).map(|tenant| (TenantId(tenant), 1)));
        assert_eq!(state.before(TenantId(5000), 900), 900);
    }

    #[test]
    fn places_are_given_back() {
        let shedder = Shedder::new(None);
        let place = |tenant, sequences| {
            *shedder.state.lock().own.entry(TenantId(tenant)).or_default() += sequences;
            Place { state: shedder.state.clone(), tenant: TenantId(tenant), sequences }
        };
        let (first, second) = (place(1, 2), place(1, 3));
        assert_eq!(shedder.state.lock().own[&TenantId(1)], 5);
        drop(first);
        assert_eq!(shedder.state.lock().own[&TenantId(1)], 3);
        drop(second);
        assert!(shedder.state.lock().own.is_empty());
    }

    #[test]
    fn who_is_refused_is_told_when_to_come() {
        let error = overloaded(40.2, AFTER);
        assert_eq!((error.kind, error.code, error.retry_after), (ErrorKind::Unavailable, Some("overloaded"), Some(25)));
        assert_eq!(overloaded(1e9, AFTER).retry_after, Some(60));
        assert_eq!(overloaded(f64::INFINITY, AFTER).retry_after, Some(60));
    }
}
