//! Gradients beside requests, over a model that has none: what becomes of those who wait. (That they are right, and do not change a token, is tested over the golden models.)

use std::time::Duration;

use super::*;
use crate::engine::{GradientFailure, GradientJob, GradientRequest};

const SOON: Duration = Duration::from_secs(5);

fn asked() -> GradientRequest {
    let (prompt, completion): (&[u32], &[u32]) = (&[1, 2], &[3]);
    let job = GradientJob::new([(prompt, completion)], fake::cores(1), 1.0);
    GradientRequest { job, weigh: Box::new(|_| Vec::new()) }
}

#[test]
fn a_model_without_gradients_says_so_and_serves_on() {
    let (handle, _) = engine(32, config());
    let answer = handle.differentiate(asked()).unwrap();
    let failure = answer.wait(SOON).unwrap().map(|done| done.gradient).unwrap_err();
    assert_eq!(failure, GradientFailure::Failed("this model cannot be differentiated".into()));
    let events = handle.submit(request(prompt(20, 1), 3)).unwrap();
    assert!(collect(events).finish.is_some());
    assert_eq!(handle.stats().gradients.get(), 1);
}

#[test]
fn a_stop_reaches_who_waits_and_later_ones_are_refused() {
    let (handle, watch) = engine(32, config());
    let held = watch.hold.lock().unwrap();
    let events = handle.submit(request(prompt(20, 1), 3)).unwrap();
    let answer = handle.differentiate(asked()).unwrap();
    let other = handle.clone();
    let stopping = std::thread::spawn(move || other.shutdown(SOON));
    while handle.health() == crate::engine::Health::Running {
        std::thread::yield_now();
    }
    drop(held);
    assert!(stopping.join().unwrap());
    assert!(collect(events).finish.is_some());
    // Before the stop came it may have been its turn.
    let failure = answer.wait(SOON).unwrap().unwrap_err();
    assert!(matches!(failure, GradientFailure::Stopped | GradientFailure::Failed(_)), "{failure}");
    assert!(handle.differentiate(asked()).is_err());
}

#[test]
fn nobody_works_for_who_has_gone() {
    let (model, _) = fake::Fake::model(32);
    let (handle, mut worker) = crate::engine::handle::pair(model, config()).unwrap();
    drop(handle.differentiate(asked()).unwrap());
    let events = handle.submit(request(prompt(20, 1), 1)).unwrap();
    while handle.stats().finished.get() < 1 {
        assert!(worker.turn());
    }
    assert!(collect(events).finish.is_some());
    assert_eq!(handle.stats().gradients.get(), 0);
}
