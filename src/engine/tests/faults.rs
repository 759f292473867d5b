use super::*;
use crate::engine::{Health, SubmitError};

#[test]
fn a_failing_step_ends_its_requests_and_no_others() {
    for (token, word) in [(fake::PANICS, "the model panics"), (fake::ERRS, "on fire")] {
        let (handle, _) = engine(16, config());
        let good = adapted(prompt(40, 1), 10, 1);
        collect(handle.submit(good.clone()).unwrap());
        let bad = collect(handle.submit(request(vec![1, token, 2], 5)).unwrap());
        assert!(bad.failed.unwrap().contains(word));
        let again = collect(handle.submit(good.clone()).unwrap());
        assert_eq!(again.usage().cached_tokens, 32, "the cache outlives the failure");
        assert_eq!(again.content(), alone(&good));
        assert_eq!(handle.health(), Health::Running);
        assert_eq!((handle.stats().failed_steps.get(), handle.stats().failed.get()), (1, 1));
        settle(&handle, 16);
    }
}

#[test]
fn sequences_outside_of_the_failing_step_go_on() {
    let (handle, watch) = engine(16, EngineConfig { max_batch: 1, ..config() });
    let held = watch.hold.lock().unwrap();
    let bad = handle.submit(request(vec![fake::PANICS], 5)).unwrap();
    let good = handle.submit(request(prompt(12, 1), 5)).unwrap();
    drop(held);
    assert!(collect(bad).failed.is_some());
    assert_eq!(collect(good), alone(&request(prompt(12, 1), 5)));
}

#[test]
fn logits_that_are_not_numbers_fail_one_request() {
    let (handle, watch) = engine(16, config());
    let held = watch.hold.lock().unwrap();
    let bad = handle.submit(request(vec![3, fake::NAN], 5)).unwrap();
    let score = Request { prompt_logprobs: Some(1), ..request(vec![fake::NAN, 3], 5) };
    let scored = handle.submit(score).unwrap();
    let good = handle.submit(request(prompt(12, 1), 5)).unwrap();
    drop(held);
    assert_eq!(collect(bad).failed.as_deref(), Some("not finite"));
    assert_eq!(collect(scored).failed.as_deref(), Some("not finite"));
    assert_eq!(collect(good), alone(&request(prompt(12, 1), 5)));
    settle(&handle, 16);
}

#[test]
fn too_many_failed_steps_in_a_row_are_the_end() {
    let (handle, _) = engine(16, config());
    let mut failures = 0;
    while let Ok(events) = handle.submit(request(vec![fake::ERRS], 1)) {
        assert!(collect(events).failed.is_some());
        failures += 1;
        assert!(failures < 100);
    }
    wait_for(|| handle.health() == Health::Dead);
    assert!(failures >= 16);
    assert_eq!(handle.submit(request(vec![1], 1)).unwrap_err(), SubmitError::Stopped);
    assert!(handle.shutdown(Duration::from_secs(1)));
}

#[test]
fn shutdown_lets_everything_end_first() {
    let (handle, watch) = engine(64, EngineConfig { max_batch: 2, ..config() });
    let held = watch.hold.lock().unwrap();
    let asked: Vec<Request> = (0..6).map(|i| request(prompt(10, i), 20)).collect();
    let events = handle.submit_many(asked.clone()).unwrap();
    let other = handle.clone();
    let stopping = std::thread::spawn(move || other.shutdown(Duration::from_secs(30)));
    wait_for(|| handle.health() == Health::Draining);
    assert_eq!(handle.submit(request(vec![1], 1)).unwrap_err(), SubmitError::Stopped);
    drop(held);
    assert!(stopping.join().unwrap());
    for (request, events) in asked.iter().zip(events) {
        assert_eq!(collect(events), alone(request));
    }
    assert_eq!(handle.health(), Health::Stopped);
    assert!(handle.shutdown(Duration::MAX), "a second time is nothing");
}

#[test]
fn shutdown_cuts_off_at_its_deadline() {
    let (handle, watch) = engine(64, config());
    watch.slow.store(20, std::sync::atomic::Ordering::SeqCst);
    let events = handle.submit(request(prompt(10, 1), 500)).unwrap();
    assert!(!handle.shutdown(Duration::ZERO));
    assert!(collect(events).failed.unwrap().contains("stopped"));
}

#[test]
fn when_all_handles_are_gone_the_rest_is_still_served() {
    let (handle, watch) = engine(64, config());
    let held = watch.hold.lock().unwrap();
    let events = handle.submit(request(prompt(10, 1), 20)).unwrap();
    drop(handle);
    drop(held);
    assert_eq!(collect(events), alone(&request(prompt(10, 1), 20)));
}
