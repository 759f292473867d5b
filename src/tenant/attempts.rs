//! Failed attempts to show a key, by address: who guesses has to wait.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::bucket::Bucket;

/// Addresses that are remembered by themselves; all further ones share one account.
const MOST: usize = 16_384;
/// Entries that have become worthless are not looked for more often than this.
const SWEEP: Duration = Duration::from_secs(1);

/// Failures of each address, in bounded memory.
#[derive(Debug)]
pub(super) struct Attempts {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Failures a minute; None: as many as anybody likes.
    limit: Option<u64>,
    known: HashMap<IpAddr, Bucket>,
    /// Of whoever did not fit.
    others: Option<Bucket>,
    swept: Option<Instant>,
}

impl Attempts {
    pub(super) fn new(limit: Option<u64>) -> Self {
        Self { state: Mutex::new(State { limit, known: HashMap::new(), others: None, swept: None }) }
    }

    /// From now on so many failures a minute.
    pub(super) fn set_limit(&self, limit: Option<u64>) {
        let mut state = self.state.lock();
        state.limit = limit;
        (state.known, state.others) = (HashMap::new(), None);
    }

    /// May the address try?
    ///
    /// # Errors
    /// How long it has to wait.
    pub(super) fn check(&self, address: IpAddr, now: Instant) -> Result<(), Duration> {
        let mut state = self.state.lock();
        if state.limit.is_none() {
            return Ok(());
        }
        let full = state.known.len() >= MOST;
        let bucket = match state.known.get_mut(&network(address)) {
            None if full => state.others.as_mut(),
            known => known,
        };
        bucket.map_or(Ok(()), |bucket| {
            let mut look = bucket.clone();
            look.take(1, now)
        })
    }

    /// The address failed.
    pub(super) fn failed(&self, address: IpAddr, now: Instant) {
        let mut state = self.state.lock();
        let Some(limit) = state.limit else { return };
        let key = network(address);
        if state.known.len() >= MOST && !state.known.contains_key(&key) {
            state.sweep(now);
        }
        let room = state.known.len() < MOST || state.known.contains_key(&key);
        let bucket = match room {
            true => state.known.entry(key).or_insert_with(|| Bucket::new(limit, now)),
            false => state.others.get_or_insert_with(|| Bucket::new(limit, now)),
        };
        // One that is empty stays empty.
        let _ = bucket.take(1, now);
    }
}

impl State {
    /// Drops the addresses that have nothing left to answer for.
    fn sweep(&mut self, now: Instant) {
        if self.swept.is_some_and(|at| now.saturating_duration_since(at) < SWEEP) {
            return;
        }
        self.swept = Some(now);
        self.known.retain(|_, bucket| {
            let rate = bucket.rate(now);
            rate.remaining < rate.limit
        });
    }
}

/// Whom an address stands for: a customer of IPv6 has a whole /64 of them.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn address(number: u32) -> IpAddr {
        Ipv4Addr::from(number).into()
    }

    #[test]
    fn who_fails_too_often_waits_and_the_others_do_not() {
        let (attempts, start) = (Attempts::new(Some(3)), Instant::now());
        for _ in 0..3 {
            assert_eq!(attempts.check(address(1), start), Ok(()));
            attempts.failed(address(1), start);
        }
        assert_eq!(attempts.check(address(1), start), Err(Duration::from_secs(20)));
        assert_eq!(attempts.check(address(2), start), Ok(()));
        assert_eq!(attempts.check(address(1), start + Duration::from_secs(20)), Ok(()));
    }

    #[test]
    fn neighbours_of_one_network_count_together() {
        let (attempts, now) = (Attempts::new(Some(1)), Instant::now());
        attempts.failed("2001:db8:1:2::1".parse().unwrap(), now);
        assert!(attempts.check("2001:db8:1:2:ffff::9".parse().unwrap(), now).is_err());
        assert!(attempts.check("2001:db8:1:3::1".parse().unwrap(), now).is_ok());
        attempts.failed("::ffff:10.0.0.1".parse().unwrap(), now);
        assert!(attempts.check("10.0.0.1".parse().unwrap(), now).is_err());
        assert!(attempts.check("10.0.0.2".parse().unwrap(), now).is_ok());
    }

    #[test]
    fn memory_is_bounded_and_a_flood_of_addresses_frees_nobody() {
        let (attempts, start) = (Attempts::new(Some(2)), Instant::now());
        for number in 0..2 * MOST as u32 {
            attempts.failed(address(number), start);
            attempts.failed(address(number), start);
        }
        assert_eq!(attempts.state.lock().known.len(), MOST);
        assert!(attempts.check(address(0), start).is_err(), "the first is still known");
        assert!(attempts.check(address(u32::MAX), start).is_err(), "a stranger shares the last account");
        let later = start + Duration::from_secs(120);
        attempts.failed(address(u32::MAX), later);
        assert_eq!(attempts.state.lock().known.len(), 1, "the others have nothing left to answer for");
        assert!(attempts.check(address(u32::MAX - 1), later).is_ok());
    }

    #[test]
    fn without_a_limit_nothing_is_kept() {
        let (attempts, now) = (Attempts::new(None), Instant::now());
        (0..100).for_each(|_| attempts.failed(address(1), now));
        assert!(attempts.check(address(1), now).is_ok() && attempts.state.lock().known.is_empty());
    }
}
