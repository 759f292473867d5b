//! Requests that are not done in time.

use std::time::Instant;

use super::*;
use crate::engine::handle::pair;

fn by(deadline: Instant, asked: Request) -> Request {
    Request { deadline: Some(deadline), ..asked }
}

#[test]
fn a_request_that_still_waits_at_its_deadline_ends_and_others_do_not() {
    let (model, _) = Fake::model(32);
    let (handle, mut worker) = pair(model, EngineConfig { max_batch: 1, ..config() }).unwrap();
    let first = handle.submit(request(prompt(20, 1), 8)).unwrap();
    assert!(worker.turn());
    let late = handle.submit(by(Instant::now(), request(prompt(20, 2), 8))).unwrap();
    let soon = Instant::now() + Duration::from_secs(3600);
    let third = handle.submit(by(soon, request(prompt(20, 3), 8))).unwrap();
    assert!(worker.turn());
    assert_eq!(collect(late), Outcome { failed: Some("expired".into()), ..Outcome::default() });
    while handle.stats().finished.get() < 2 {
        assert!(worker.turn());
    }
    assert_eq!(collect(first), alone(&request(prompt(20, 1), 8)));
    assert_eq!(collect(third), alone(&request(prompt(20, 3), 8)));
    assert_eq!((handle.stats().expired.get(), handle.stats().failed.get()), (1, 0));
    settle(&handle, 32);
}

#[test]
fn one_that_runs_keeps_what_it_said_and_frees_its_blocks() {
    let (handle, watch) = engine(64, config());
    watch.slow.store(5, std::sync::atomic::Ordering::SeqCst);
    // 400 steps of 5 ms at least.
    let asked = request(prompt(20, 1), 400);
    let mut events = handle.submit(by(Instant::now() + Duration::from_millis(200), asked.clone())).unwrap();
    events.hold_until_end();
    let outcome = collect(events);
    assert_eq!(outcome.failed.as_deref(), Some("expired"));
    assert!(outcome.tokens.len() < 60);
    watch.slow.store(0, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(outcome.ids(), alone(&asked).ids()[..outcome.tokens.len()]);
    settle(&handle, 64);
    // It counts as done: its place in the queue is free.
    assert!(collect(handle.submit(asked).unwrap()).finish.is_some());
}
