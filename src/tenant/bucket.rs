//! A token bucket that keeps exact accounts: so much at once, and the same evenly over each minute.

use std::time::{Duration, Instant};

/// Nanoseconds of a minute. Levels are whole numbers of a token's part of this size, so nothing is ever rounded away.
const MINUTE: i128 = 60_000_000_000;

/// Full at first; refilled at `limit` a minute. The time is an argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bucket {
    limit: u64,
    level: i128,
    at: Instant,
}

/// What a client may know about a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// At most so many a minute.
    pub limit: u64,
    /// So many are left now.
    pub remaining: u64,
    /// Until all of them are back.
    pub reset: Duration,
}

impl Bucket {
    /// A full bucket.
    pub(super) fn new(limit: u64, now: Instant) -> Self {
        Self { limit, level: scaled(limit), at: now }
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Takes so many, or says how long until they would be there. More than the limit are never there.
    pub(super) fn take(&mut self, count: u64, now: Instant) -> Result<(), Duration> {
        self.refill(now);
        let missing = scaled(count) - self.level;
        if missing > 0 {
            return Err(self.time_for(missing));
        }
        self.level -= scaled(count);
        Ok(())
    }

    /// Puts back what was taken and not used.
    pub(super) fn give(&mut self, count: u64, now: Instant) {
        self.refill(now);
        self.level = (self.level + scaled(count)).min(scaled(self.limit));
    }

    /// Another limit: what was used stays used.
    pub(super) fn resize(&mut self, limit: u64, now: Instant) {
        self.refill(now);
        self.level = (self.level + scaled(limit) - scaled(self.limit)).clamp(0, scaled(limit));
        self.limit = limit;
    }

    pub(super) fn rate(&mut self, now: Instant) -> Rate {
        self.refill(now);
        let remaining = u64::try_from(self.level / MINUTE).unwrap_or(0);
        Rate { limit: self.limit, remaining, reset: self.time_for(scaled(self.limit) - self.level) }
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at).as_nanos().min(MINUTE as u128) as i128;
        self.level = (self.level + i128::from(self.limit) * elapsed).min(scaled(self.limit));
        self.at = self.at.max(now);
    }

    /// How long until so much more has come in.
    fn time_for(&self, missing: i128) -> Duration {
        let limit = i128::from(self.limit.max(1));
        Duration::from_nanos(u64::try_from((missing + limit - 1) / limit).unwrap_or(u64::MAX))
    }
}

fn scaled(count: u64) -> i128 {
    i128::from(count) * MINUTE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn a_full_bucket_gives_its_limit_at_once_and_then_as_time_goes_by() {
        let start = Instant::now();
        let mut bucket = Bucket::new(3, start);
        for _ in 0..3 {
            assert_eq!(bucket.take(1, start), Ok(()));
        }
        assert_eq!(bucket.take(1, start), Err(seconds(20)));
        assert_eq!(bucket.take(1, start + seconds(19)), Err(seconds(1)));
        assert_eq!(bucket.take(1, start + seconds(20)), Ok(()));
        assert_eq!(bucket.rate(start + seconds(20)), Rate { limit: 3, remaining: 0, reset: seconds(60) });
        assert_eq!(bucket.rate(start + seconds(79)), Rate { limit: 3, remaining: 2, reset: seconds(1) });
        assert_eq!(bucket.rate(start + seconds(9_000)), Rate { limit: 3, remaining: 3, reset: Duration::ZERO });
    }

    #[test]
    fn what_was_not_used_comes_back_and_never_more() {
        let start = Instant::now();
        let mut bucket = Bucket::new(100, start);
        bucket.take(80, start).unwrap();
        bucket.give(50, start);
        assert_eq!(bucket.rate(start).remaining, 70);
        bucket.give(u64::MAX, start);
        assert_eq!(bucket.rate(start).remaining, 100);
    }

    #[test]
    fn another_limit_keeps_what_was_used() {
        let start = Instant::now();
        let mut bucket = Bucket::new(10, start);
        bucket.take(4, start).unwrap();
        bucket.resize(20, start);
        assert_eq!(bucket.rate(start).remaining, 16);
        bucket.resize(2, start);
        assert_eq!((bucket.limit(), bucket.rate(start).remaining), (2, 0));
        bucket.resize(0, start);
        assert!(bucket.take(1, start + seconds(600)).is_err(), "a limit of nothing never passes");
    }

    #[test]
    fn a_clock_that_goes_back_and_huge_numbers_do_no_harm() {
        let start = Instant::now() + seconds(1_000);
        let mut bucket = Bucket::new(u64::MAX, start);
        bucket.take(u64::MAX, start).unwrap();
        assert!(bucket.take(1, start - seconds(500)).is_err());
        assert_eq!(bucket.take(u64::MAX, start + seconds(60)), Ok(()));
    }

    proptest! {
        /// Over any sequence of takes, no more passes than the limit and what the time brought.
        #[test]
        fn nothing_passes_that_was_not_there(limit in 1u64..500, steps in prop::collection::vec((0u64..2_000, 0u64..60), 1..60)) {
            let start = Instant::now();
            let mut bucket = Bucket::new(limit, start);
            let (mut now, mut passed) = (start, 0u128);
            for (wait, count) in steps {
                now += Duration::from_millis(wait);
                if bucket.take(count, now).is_ok() {
                    passed += u128::from(count);
                }
            }
            let millis = now.duration_since(start).as_millis();
            prop_assert!(passed * 60_000 <= u128::from(limit) * (60_000 + millis));
        }

        /// Who waits as long as it was told gets what it asked for.
        #[test]
        fn the_wait_that_is_told_is_enough(limit in 1u64..1_000_000, first in 0u64..1_000_000, second in 0u64..1_000_000) {
            let start = Instant::now();
            let mut bucket = Bucket::new(limit, start);
            bucket.take(first.min(limit), start).unwrap();
            if let Err(wait) = bucket.take(second.min(limit), start) {
                prop_assert_eq!(bucket.take(second.min(limit), start + wait), Ok(()));
            }
        }
    }
}
