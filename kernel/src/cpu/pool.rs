//! A small pool for the regions of a step: the caller and its workers run one function, each under its own number, and meet again.
//!
//! A step has over a hundred regions of some ten microseconds, so workers spin between them; the spin is bounded, then they give way, and
//! after a while they sleep until the next step. What a region computes never depends on who computes it.
#![allow(unsafe_code)]

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use parking_lot::{Condvar, Mutex};

/// Turns of the spin loop before a waiting thread gives way, and how often it gives way before it sleeps.
const SPINS: u32 = 4000;
const YIELDS: u32 = 50;

type Region = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Counts regions; a worker runs when it changes.
    epoch: AtomicU64,
    /// Workers that have not finished the region.
    pending: AtomicUsize,
    /// The function of the region. Written by the caller before `epoch`, while no worker runs.
    region: std::cell::UnsafeCell<Option<Region>>,
    stop: AtomicBool,
    panicked: AtomicBool,
    /// Workers asleep, or about to be: they look at `epoch` once more after raising it.
    sleeping: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `region` is only written between regions, and read by workers between the `epoch` and `pending` hand-overs, which order the accesses;
// what it points to is Sync and outlives the region, because `run` waits for every worker.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// See the module.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of so many threads, the caller among them; at least one.
    pub(super) fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            epoch: AtomicU64::new(0),
            pending: AtomicUsize::new(0),
            region: std::cell::UnsafeCell::new(None),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            sleeping: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut pool = Self { shared, workers: Vec::new() };
        for number in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let builder = std::thread::Builder::new().name(format!("mote-kernel-{number}"));
            pool.workers.push(builder.spawn(move || work(&shared, number))?);
        }
        Ok(pool)
    }

    /// Threads, the caller among them.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs the function once a thread, with numbers `0..threads`, and returns when all are done.
    pub(super) fn run(&mut self, region: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            return region(0);
        }
        // SAFETY: the lifetime is dropped from the pointer only; this function does not return before every worker is done with it.
        let region_pointer: Region = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Region>(region) };
        // SAFETY: `&mut self`, and the previous `run` waited: no worker reads the cell now.
        unsafe { *self.shared.region.get() = Some(region_pointer) };
        self.shared.pending.store(self.workers.len(), Ordering::Relaxed);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        if self.shared.sleeping.load(Ordering::SeqCst) > 0 {
            let _guard = self.shared.lock.lock();
            self.shared.wake.notify_all();
        }
        let mine = catch_unwind(AssertUnwindSafe(|| region(0)));
        let mut turns = 0u32;
        while self.shared.pending.load(Ordering::Acquire) > 0 {
            wait_a_little(&mut turns);
        }
        // Taken, not read: the next region starts with a clean slate.
        let panicked = self.shared.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
        assert!(!panicked, "a kernel thread panicked: a bug in a kernel");
    }

    /// Hands out `0..items` in pieces of so many to whichever thread is free, with the thread's number. Alone when there is one piece.
    /// For work of uneven length, and for machines that take a processor away now and then: the other thread goes on with the rest.
    pub(super) fn deal(&mut self, items: usize, piece: usize, region: &(dyn Fn(usize, std::ops::Range<usize>) + Sync)) {
        if items <= piece {
            return region(0, 0..items);
        }
        let next = AtomicUsize::new(0);
        self.run(&|thread| {
            loop {
                let first = next.fetch_add(piece, Ordering::Relaxed);
                if first >= items {
                    break;
                }
                region(thread, first..items.min(first + piece));
            }
        });
    }

    /// Runs the function once an item.
    pub(super) fn each(&mut self, items: usize, work: &(dyn Fn(usize) + Sync)) {
        self.deal(items, 1, &|_, range| range.for_each(work));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        {
            let _guard = self.shared.lock.lock();
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches panics of regions, so it ends well.
            let _ = worker.join();
        }
    }
}

/// Spins first, gives way later; returns false once it has given way often.
fn wait_a_little(turns: &mut u32) -> bool {
    *turns = turns.saturating_add(1);
    if *turns < SPINS {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
    *turns < SPINS + YIELDS
}

fn work(shared: &Shared, number: usize) {
    let mut seen = 0;
    loop {
        seen = next_epoch(shared, seen);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        // SAFETY: the epoch was raised after the cell was written, and `run` writes it again only when this worker has lowered `pending`.
        let region = unsafe { *shared.region.get() };
        if let Some(region) = region {
            // SAFETY: `run` keeps what it points to alive until `pending` is zero.
            let result = catch_unwind(AssertUnwindSafe(|| unsafe { (*region)(number) }));
            if result.is_err() {
                shared.panicked.store(true, Ordering::Relaxed);
            }
        }
        shared.pending.fetch_sub(1, Ordering::Release);
    }
}

fn next_epoch(shared: &Shared, seen: u64) -> u64 {
    let mut turns = 0;
    loop {
        let epoch = shared.epoch.load(Ordering::SeqCst);
        if epoch != seen {
            return epoch;
        }
        if wait_a_little(&mut turns) {
            continue;
        }
        let mut guard = shared.lock.lock();
        shared.sleeping.fetch_add(1, Ordering::SeqCst);
        while shared.epoch.load(Ordering::SeqCst) == seen {
            shared.wake.wait(&mut guard);
        }
        shared.sleeping.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_done_once_however_many_threads() {
        for threads in 1..5 {
            let mut pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for items in [0, 1, 2, 3, 7, 100] {
                for piece in [1, 3, 200] {
                    let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                    pool.deal(items, piece, &|thread, range| {
                        assert!(thread < threads && range.len() <= piece);
                        for item in range {
                            counts[item].fetch_add(1, Ordering::Relaxed);
                        }
                    });
                    let all = counts.iter().all(|count| count.load(Ordering::Relaxed) == 1);
                    assert!(all, "{threads} threads, {items} items, pieces of {piece}");
                }
            }
        }
    }

    #[test]
    fn sleeping_workers_wake() {
        let mut pool = Pool::new(3).unwrap();
        let count = AtomicUsize::new(0);
        for _ in 0..5 {
            pool.run(&|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            while pool.shared.sleeping.load(Ordering::SeqCst) < 2 {
                std::thread::yield_now();
            }
        }
        assert_eq!(count.load(Ordering::Relaxed), 15);
    }

    #[test]
    fn a_panic_in_a_region_reaches_the_caller() {
        let mut pool = Pool::new(2).unwrap();
        for guilty in [0, 1] {
            let result = catch_unwind(AssertUnwindSafe(|| pool.run(&|thread| assert_ne!(thread, guilty))));
            assert!(result.is_err());
            pool.run(&|_| {}); // the pool is as good as new
        }
    }
}
