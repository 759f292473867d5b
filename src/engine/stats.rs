//! What the engine counts, for /metrics. The worker writes (handles only what they take and refuse), anyone reads; what is read together need not
//! be of one instant.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// A number that only the engine changes: a counter, a gauge or a peak.
#[derive(Debug, Default)]
pub struct Reading(AtomicU64);

impl Reading {
    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    pub(super) fn add(&self, n: usize) {
        self.0.fetch_add(n as u64, Relaxed);
    }

    pub(super) fn set(&self, n: usize) {
        self.0.store(n as u64, Relaxed);
    }

    pub(super) fn raise(&self, n: usize) {
        self.0.fetch_max(n as u64, Relaxed);
    }
}

/// Time that was spent on something. Written by one thread.
#[derive(Debug, Default)]
pub struct Seconds {
    nanoseconds: AtomicU64,
}

impl Seconds {
    /// All of it so far, in seconds.
    pub fn get(&self) -> f64 {
        self.nanoseconds.load(Relaxed) as f64 * 1e-9
    }

    pub(super) fn add(&self, time: Duration) {
        self.nanoseconds.fetch_add(time.as_nanos() as u64, Relaxed);
    }
}

/// Where the time of the engine's thread goes, from the moment it has something to do until it has nothing or begins anew. Nothing is between them.
#[derive(Debug, Default)]
pub struct Phases {
    /// Taking in requests, dropping those that nobody listens to.
    pub receive: Seconds,
    /// Choosing the rows.
    pub schedule: Seconds,
    /// Writing the batch.
    pub build: Seconds,
    /// The model.
    pub forward: Seconds,
    /// Choosing the tokens.
    pub sample: Seconds,
    /// Writing tokens and blocks down, and events into their channels.
    pub commit: Seconds,
    /// Waking those who wait for the events.
    pub wake: Seconds,
    /// Gradients.
    pub gradient: Seconds,
}

impl Phases {
    /// All of them by name, in the order of a step.
    pub fn all(&self) -> [(&'static str, &Seconds); 8] {
        [
            ("receive", &self.receive),
            ("schedule", &self.schedule),
            ("build", &self.build),
            ("forward", &self.forward),
            ("sample", &self.sample),
            ("commit", &self.commit),
            ("wake", &self.wake),
            ("gradient", &self.gradient),
        ]
    }
}

/// Counts of values by size. Written by one thread.
#[derive(Debug)]
pub struct Histogram {
    bounds: Vec<f64>,
    counts: Vec<AtomicU64>,
    /// Bits of an f64.
    sum: AtomicU64,
}

/// A histogram's contents.
#[derive(Debug, Clone, PartialEq)]
pub struct HistogramSnapshot {
    /// (upper bound, inclusive; values in this bucket alone). The last bound is infinite.
    pub buckets: Vec<(f64, u64)>,
    /// Sum of all values.
    pub sum: f64,
    /// Number of values.
    pub count: u64,
}

impl Histogram {
    fn new(mut bounds: Vec<f64>) -> Self {
        bounds.push(f64::INFINITY);
        let counts = bounds.iter().map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum: AtomicU64::new(0f64.to_bits()) }
    }

    /// From 0.25 ms to about 65 s in factors of 2.
    fn seconds() -> Self {
        Self::new((0..19).map(|power| 0.000_25 * f64::from(1u32 << power)).collect())
    }

    /// Powers of two under `most`, then `most - 1` and `most`: so that steps which are exactly full can be told from the others.
    fn sizes(most: usize) -> Self {
        let powers = std::iter::successors(Some(1usize), |n| n.checked_mul(2)).take_while(|&n| n + 1 < most);
        let mut bounds: Vec<f64> = std::iter::once(0).chain(powers).map(|n| n as f64).collect();
        bounds.extend([most.saturating_sub(1), most].map(|n| n as f64).into_iter().filter(|&n| n > 0.0));
        bounds.dedup();
        Self::new(bounds)
    }

    /// Tenths, with nothing and everything apart.
    fn shares() -> Self {
        Self::new((0..=9).map(|tenths| f64::from(tenths) / 10.0).chain([0.999, 1.0]).collect())
    }

    pub(super) fn observe(&self, value: f64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value).min(self.counts.len() - 1);
        self.counts[bucket].fetch_add(1, Relaxed);
        let sum = f64::from_bits(self.sum.load(Relaxed)) + value;
        self.sum.store(sum.to_bits(), Relaxed);
    }

    pub(super) fn observe_time(&self, time: Duration) {
        self.observe(time.as_secs_f64());
    }

    /// The contents now.
    pub fn snapshot(&self) -> HistogramSnapshot {
        let buckets: Vec<(f64, u64)> =
            self.bounds.iter().zip(&self.counts).map(|(&bound, count)| (bound, count.load(Relaxed))).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        HistogramSnapshot { buckets, sum: f64::from_bits(self.sum.load(Relaxed)), count }
    }
}

/// Everything the engine counts.
#[derive(Debug)]
pub struct Stats {
    /// Steps that were run.
    pub steps: Reading,
    /// Steps that an error or a panic ended.
    pub failed_steps: Reading,
    /// Sequences taken into the queue.
    pub accepted: Reading,
    /// Sequences refused because the queue was full.
    pub refused: Reading,
    /// Sequences that ended with `Finished`.
    pub finished: Reading,
    /// Sequences whose receiver went away.
    pub cancelled: Reading,
    /// Sequences that ended with `Failed`.
    pub failed: Reading,
    /// Sequences that ended with `Expired`.
    pub expired: Reading,
    /// Rows of prompts (and of recomputed completions) that were run in chunks.
    pub prefill_tokens: Reading,
    /// Prompt tokens that came from the prefix cache.
    pub cached_tokens: Reading,
    /// Tokens sampled.
    pub generated_tokens: Reading,
    /// Tasks woken to read what a step made.
    pub wakes: Reading,
    /// Gradients that ended, well or not.
    pub gradients: Reading,
    /// Time of steps by the rows of interactive requests in them.
    pub interactive_seconds: Seconds,
    /// The same of background requests, which are the rollouts of training jobs.
    pub background_seconds: Seconds,
    /// Times a sequence lost its blocks.
    pub preemptions: Reading,
    /// Of those, the times a sequence gave way to another key, which had less than its part.
    pub yielded: Reading,
    /// Sequences in the queue now, preempted ones included.
    pub waiting: Reading,
    /// Sequences that hold blocks now.
    pub running: Reading,
    /// Blocks with nothing in them.
    pub blocks_free: Reading,
    /// Blocks of running sequences.
    pub blocks_used: Reading,
    /// Blocks that only the prefix cache keeps.
    pub blocks_cached: Reading,
    /// Most rows in one step.
    pub peak_rows: Reading,
    /// Most sequences in one step.
    pub peak_sequences: Reading,
    /// Most distinct adapters in one step.
    pub peak_adapters: Reading,
    /// Rows of each step.
    pub step_rows: Histogram,
    /// Sequences of each step.
    pub step_sequences: Histogram,
    /// Distinct adapters of each step.
    pub step_adapters: Histogram,
    /// Sequences of those steps in which each ran under an adapter of its own.
    pub step_all_distinct: Histogram,
    /// Seconds of steps without prompt chunks: model, sampling and bookkeeping.
    pub decode_seconds: Histogram,
    /// Seconds of steps with prompt chunks.
    pub prefill_seconds: Histogram,
    /// Seconds for which gradients kept the next step waiting, while there were any.
    pub gradient_pause: Histogram,
    /// Seconds of each step that were not the model's: scheduling, sampling, sending.
    pub overhead_seconds: Histogram,
    /// Where the time goes.
    pub phases: Phases,
    /// Seconds from submission to admission.
    pub queue_seconds: Histogram,
    /// Seconds from submission to the first token.
    pub first_token_seconds: Histogram,
    /// Seconds between two tokens of an interactive sequence.
    pub between_tokens_seconds: Histogram,
    /// Steps from submission to admission, of sequences that came when their key had nothing in the engine. 1: it came into the step after the one that ran then.
    pub first_place_steps: Histogram,
    /// Of each admitted prompt, the part that came from the prefix cache.
    pub cached_share: Histogram,
    /// The part of the KV blocks that sequences held in each step.
    pub step_kv_share: Histogram,
}

/// Waiting longer than so many steps is all the same.
const MANY_STEPS: usize = 1 << 12;

impl Stats {
    pub(super) fn new(max_batch: usize, prefill_rows: usize) -> Self {
        let r = Reading::default;
        Self {
            steps: r(),
            failed_steps: r(),
            accepted: r(),
            refused: r(),
            finished: r(),
            cancelled: r(),
            failed: r(),
            expired: r(),
            prefill_tokens: r(),
            cached_tokens: r(),
            generated_tokens: r(),
            wakes: r(),
            gradients: r(),
            interactive_seconds: Seconds::default(),
            background_seconds: Seconds::default(),
            preemptions: r(),
            yielded: r(),
            waiting: r(),
            running: r(),
            blocks_free: r(),
            blocks_used: r(),
            blocks_cached: r(),
            peak_rows: r(),
            peak_sequences: r(),
            peak_adapters: r(),
            step_rows: Histogram::sizes(max_batch + prefill_rows),
            step_sequences: Histogram::sizes(max_batch),
            step_adapters: Histogram::sizes(max_batch),
            step_all_distinct: Histogram::sizes(max_batch),
            decode_seconds: Histogram::seconds(),
            prefill_seconds: Histogram::seconds(),
            gradient_pause: Histogram::seconds(),
            overhead_seconds: Histogram::seconds(),
            phases: Phases::default(),
            queue_seconds: Histogram::seconds(),
            first_token_seconds: Histogram::seconds(),
            between_tokens_seconds: Histogram::seconds(),
            first_place_steps: Histogram::sizes(MANY_STEPS),
            cached_share: Histogram::shares(),
            step_kv_share: Histogram::shares(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_steps_have_a_bucket_of_their_own() {
        let bounds = |most| Histogram::sizes(most).snapshot().buckets.iter().map(|b| b.0).collect::<Vec<_>>();
        assert_eq!(bounds(64), [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 63.0, 64.0, f64::INFINITY]);
        assert_eq!(bounds(1), [0.0, 1.0, f64::INFINITY]);
        assert_eq!(bounds(2), [0.0, 1.0, 2.0, f64::INFINITY]);
        assert_eq!(bounds(3), [0.0, 1.0, 2.0, 3.0, f64::INFINITY]);
    }

    #[test]
    fn a_value_counts_in_the_first_bucket_that_holds_it() {
        let histogram = Histogram::sizes(4);
        for value in [0.0, 1.0, 2.5, 3.0, 4.0, 99.0] {
            histogram.observe(value);
        }
        let snapshot = histogram.snapshot();
        assert_eq!((snapshot.count, snapshot.sum), (6, 109.5));
        assert_eq!(snapshot.buckets.iter().map(|b| b.1).collect::<Vec<_>>(), [1, 1, 0, 2, 1, 1]);
    }
}
