//! The wall clock: what records carry. It may jump; whatever measures a time uses `Instant`.

use std::time::{SystemTime, UNIX_EPOCH};

/// Unix seconds; 0 before 1970.
pub fn unix_now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
    #[cfg(test)]
    let now = now + tests::JUMP.get();
    now
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    thread_local! {
        /// By how much the clock of this thread is wrong.
        pub(super) static JUMP: Cell<i64> = const { Cell::new(0) };
    }

    /// From now on the clock of this thread, and so of a test with a runtime of one thread, is wrong by so many seconds.
    pub(crate) fn jump(seconds: i64) {
        JUMP.set(seconds);
    }
}
