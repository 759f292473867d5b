use super::*;
use crate::engine::{SubmitError, handle::pair};

#[test]
fn one_request_gives_what_the_model_says() {
    let (handle, _) = engine(16, config());
    let asked =
        Request { prompt_logprobs: Some(3), logprobs: Some(2), capture_logits: true, ..adapted(prompt(50, 1), 30, 5) };
    assert_eq!(collect(handle.submit(asked.clone()).unwrap()), alone(&asked));
    settle(&handle, 16);
}

#[test]
fn zero_tokens_only_score_the_prompt() {
    let (handle, _) = engine(16, config());
    for len in [1, 2, 16, 17, 33, 100] {
        let asked = Request { prompt_logprobs: Some(0), ..request(prompt(len, 2), 0) };
        let outcome = collect(handle.submit(asked.clone()).unwrap());
        assert_eq!(outcome.prompt.as_ref().unwrap().len(), len);
        assert_eq!(outcome.content(), alone(&asked));
    }
    let outcome = collect(handle.submit(request(prompt(20, 1), 0)).unwrap());
    assert_eq!((outcome.prompt, outcome.tokens.len()), (None, 0));
}

#[test]
fn sixty_four_adapters_share_one_step() {
    let many = EngineConfig { max_batch: 64, prefill_chunk: 4096, ..config() };
    let (handle, watch) = engine(1024, many);
    let mut asked: Vec<Request> = (0..64).map(|i| adapted(prompt(20 + i % 7, i as u32), 12, i as u8)).collect();
    let outcomes: Vec<Outcome> = handle.submit_many(asked.clone()).unwrap().into_iter().map(collect).collect();
    for (request, outcome) in asked.iter().zip(outcomes) {
        assert_eq!(outcome, alone(request));
    }
    assert!(watch.shapes.lock().unwrap().contains(&(64, 64)));
    let stats = handle.stats();
    wait_for(|| stats.running.get() == 0);
    assert_eq!((stats.peak_adapters.get(), stats.peak_sequences.get()), (64, 64));
    let full = |stats: crate::engine::HistogramSnapshot| stats.buckets.iter().find(|b| b.0 == 64.0).unwrap().1;
    assert_eq!(full(stats.step_all_distinct.snapshot()), 12);
    // Requests that share their cores share a slot.
    let shared = fake::cores(9);
    asked.iter_mut().for_each(|request| request.cores = Some(Arc::clone(&shared)));
    asked.iter_mut().for_each(|request| request.use_cache = false);
    handle.submit_many(asked).unwrap().into_iter().for_each(|events| drop(collect(events)));
    assert!(watch.shapes.lock().unwrap().contains(&(64, 1)));
    assert_eq!(full(stats.step_all_distinct.snapshot()), 12);
}

#[test]
fn preempted_sequences_end_as_if_nothing_had_happened() {
    // Each needs 5 blocks at its end; 8 do not hold two of them.
    let (handle, _) = engine(8, config());
    let asked: Vec<Request> = (0..6)
        .map(|i| Request { prompt_logprobs: Some(1), logprobs: Some(1), ..adapted(prompt(20, i), 60, i as u8) })
        .collect();
    let outcomes: Vec<Outcome> = handle.submit_many(asked.clone()).unwrap().into_iter().map(collect).collect();
    let preemptions: usize = outcomes.iter().map(|outcome| outcome.usage().preemptions).sum();
    assert!(preemptions > 0);
    assert_eq!(outcomes[0].usage().preemptions, 0, "the oldest is never preempted");
    for (request, outcome) in asked.iter().zip(outcomes) {
        assert_eq!(outcome.content(), alone(request));
    }
    settle(&handle, 8);
    assert_eq!(handle.stats().preemptions.get(), preemptions as u64);
}

#[test]
fn a_prompt_that_was_seen_is_not_computed_again() {
    let (handle, watch) = engine(32, config());
    let asked = adapted(prompt(70, 3), 5, 1);
    assert_eq!(collect(handle.submit(asked.clone()).unwrap()), alone(&asked));
    let rows = watch.rows.swap(0, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(rows, 70 + 4);
    let again = collect(handle.submit(asked.clone()).unwrap());
    assert_eq!(again.usage().cached_tokens, 64);
    assert_eq!(watch.rows.load(std::sync::atomic::Ordering::SeqCst), 6 + 4);
    assert_eq!(again.content(), alone(&asked));
    assert_eq!(handle.stats().cached_tokens.get(), 64);
    // The completion's full blocks are known too: the next turn of a conversation.
    let mut longer = asked.clone();
    longer.prompt.extend(alone(&Request { max_tokens: 30, ..asked.clone() }).ids());
    let first = Request { max_tokens: 30, ..asked.clone() };
    collect(handle.submit(first).unwrap());
    let outcome = collect(handle.submit(longer.clone()).unwrap());
    assert_eq!(outcome.usage().cached_tokens, 96);
    assert_eq!(outcome.content(), alone(&longer));
}

#[test]
fn the_cache_is_read_only_under_the_same_salt_and_when_it_may_be() {
    let (handle, _) = engine(64, config());
    let asked = adapted(prompt(48, 4), 3, 1);
    collect(handle.submit(asked.clone()).unwrap());
    let cached = |request: Request| {
        let outcome = collect(handle.submit(request.clone()).unwrap());
        let cached = outcome.usage().cached_tokens;
        assert_eq!(outcome.content(), alone(&request));
        cached
    };
    assert_eq!(cached(adapted(prompt(48, 4), 3, 2)), 0, "another adapter");
    assert_eq!(cached(Request { salt: CacheSalt([77; 32]), ..asked.clone() }), 0, "another tenant");
    assert_eq!(cached(Request { use_cache: false, ..asked.clone() }), 0);
    assert_eq!(cached(Request { prompt_logprobs: Some(0), ..asked.clone() }), 0, "needs all logits");
    assert_eq!(cached(asked.clone()), 32, "the last token is always computed");
    handle.purge(CacheSalt([1; 32]));
    assert_eq!(cached(asked.clone()), 0, "purged");
    assert_eq!(cached(asked.clone()), 32);
    let (handle, _) = engine(64, EngineConfig { prefix_cache: false, ..config() });
    collect(handle.submit(asked.clone()).unwrap());
    assert_eq!(collect(handle.submit(asked).unwrap()).usage().cached_tokens, 0);
    assert_eq!(handle.stats().blocks_cached.get(), 0);
}

#[test]
fn a_purge_reaches_what_runs() {
    let (handle, watch) = engine(64, config());
    let asked = adapted(prompt(48, 4), 40, 1);
    let held = watch.hold.lock().unwrap();
    let events = handle.submit(asked.clone()).unwrap();
    handle.purge(asked.salt);
    drop(held);
    assert_eq!(collect(events), alone(&asked));
    settle(&handle, 64);
    assert!(handle.stats().blocks_cached.get() <= 2, "only what was published before the purge came could be there");
    handle.purge(asked.salt);
    collect(handle.submit(request(vec![1], 1)).unwrap());
    assert_eq!(collect(handle.submit(asked.clone()).unwrap()).usage().cached_tokens, 0);
}

#[test]
fn choices_of_one_prompt_compute_it_once() {
    let (handle, watch) = engine(64, EngineConfig { prefill_chunk: 1000, ..config() });
    let choices: Vec<Request> = (0..6)
        .map(|seed| Request { sampling: Sampling { seed, ..Sampling::default() }, ..adapted(prompt(100, 6), 4, 3) })
        .collect();
    let outcomes: Vec<Outcome> = handle.submit_many(choices.clone()).unwrap().into_iter().map(collect).collect();
    assert_eq!(watch.rows.load(std::sync::atomic::Ordering::SeqCst), 100 + 5 * 4 + 6 * 3);
    for (request, outcome) in choices.iter().zip(outcomes) {
        assert_eq!(outcome.content(), alone(request));
    }
}

#[test]
fn stop_tokens_end_and_min_tokens_hold_them_off() {
    let (handle, _) = engine(16, config());
    let free = alone(&request(prompt(9, 1), 20)).ids();
    let stop = free[4];
    let first = free.iter().position(|&token| token == stop).unwrap();
    let asked = Request { stop_tokens: vec![35, stop], ..request(prompt(9, 1), 20) };
    let outcome = collect(handle.submit(asked.clone()).unwrap());
    assert_eq!(outcome.tokens.len(), first + 1);
    assert!(outcome.tokens[first].stop && !outcome.tokens[..first].iter().any(|token| token.stop));
    assert_eq!(outcome.finish.unwrap().0, FinishReason::Stop);
    let asked = Request { min_tokens: 15, ..asked };
    let outcome = collect(handle.submit(asked.clone()).unwrap());
    assert!(outcome.tokens.len() > 15 && !outcome.ids()[..15].contains(&stop));
    assert_eq!(outcome.content(), alone(&asked));
}

#[test]
fn a_full_queue_refuses_all_or_nothing() {
    let (handle, watch) = engine(64, EngineConfig { max_batch: 2, max_queue: 3, ..config() });
    let held = watch.hold.lock().unwrap();
    let asked = |n: usize| vec![request(prompt(5, 1), 3); n];
    let first = handle.submit_many(asked(4)).unwrap();
    assert!(matches!(handle.submit_many(asked(2)), Err(SubmitError::QueueFull(_))));
    let second = handle.submit_many(asked(1)).unwrap();
    assert!(matches!(handle.submit(asked(1).remove(0)), Err(SubmitError::QueueFull(_))));
    assert!(matches!(handle.submit_many(asked(6)), Err(SubmitError::Invalid(_))), "can never fit");
    assert_eq!(handle.stats().refused.get(), 3);
    drop(held);
    first.into_iter().chain(second).for_each(|events| assert!(collect(events).finish.is_some()));
    assert!(handle.submit_many(asked(5)).is_ok());
}

#[test]
fn a_flood_fills_the_queue_for_itself_only() {
    let (handle, watch) = engine(64, EngineConfig { max_batch: 2, max_queue: 30, ..config() });
    let held = watch.hold.lock().unwrap();
    let of = |key: u64, n: usize| {
        let share = Share { key: ShareKey(key), ..Share::default() };
        vec![Request { share, ..request(prompt(5, 1), 3) }; n]
    };
    let is_full = |requests: Vec<Request>| matches!(handle.submit_many(requests), Err(SubmitError::QueueFull(_)));
    let mut events = handle.submit_many(of(1, 32)).unwrap();
    assert!(is_full(of(1, 1)), "the flood itself");
    // Two are a sixteenth of 32, and eight more than 32 are a fourth.
    assert!(is_full(of(2, 3)));
    for key in 2..6 {
        events.extend(handle.submit_many(of(key, 2)).unwrap());
        assert!(is_full(of(key, 1)));
    }
    assert!(is_full(of(6, 1)), "a crowd is no flood");
    drop(held);
    events.into_iter().for_each(|events| assert!(collect(events).finish.is_some()));
    assert_eq!(handle.in_flight(), 0);
    assert!(handle.submit_many(of(1, 32)).is_ok());
}

#[test]
fn what_can_never_run_is_refused() {
    let (handle, _) = engine(4, config());
    let refused = |request: Request, word: &str| match handle.submit(request) {
        Err(SubmitError::Invalid(message)) => assert!(message.contains(word), "{message}"),
        other => panic!("{other:?}"),
    };
    refused(request(vec![], 3), "empty");
    refused(request(vec![VOCAB as u32], 3), "token 40");
    refused(request(vec![1; 500], 13), "context");
    refused(request(vec![1], usize::MAX), "context");
    refused(request(vec![1; 60], 6), "KV cache");
    assert!(collect(handle.submit(request(vec![1; 60], 5)).unwrap()).finish.is_some(), "just fits");
    let wrong = |rank, numbers| Request {
        cores: Some(Arc::new(crate::kernel::Cores::new(rank, vec![0.0; numbers]))),
        ..request(vec![1], 1)
    };
    refused(wrong(1, SITES), "rank");
    refused(wrong(2, 4 * SITES - 1), "numbers");
    refused(wrong(usize::MAX, 0), "rank");
    let with = |sampling| Request { sampling, ..request(vec![1], 1) };
    refused(with(Sampling { temperature: f32::NAN, ..Sampling::default() }), "temperature");
    refused(with(Sampling { top_p: 1.5, ..Sampling::default() }), "top_p");
    refused(with(Sampling { min_p: -0.1, ..Sampling::default() }), "min_p");
    refused(with(Sampling { repetition_penalty: 0.0, ..Sampling::default() }), "repetition_penalty");
    refused(with(Sampling { logit_bias: vec![(1, f32::INFINITY)], ..Sampling::default() }), "logit_bias");
    refused(with(Sampling { logit_bias: vec![(40, 1.0)], ..Sampling::default() }), "token 40");
}

#[test]
fn a_gone_client_frees_its_blocks_and_slows_nobody() {
    let (handle, watch) = engine(32, EngineConfig { prefix_cache: false, ..config() });
    let held = watch.hold.lock().unwrap();
    let gone: Vec<Events> = (0..3).map(|i| handle.submit(request(prompt(40, i), 400)).unwrap()).collect();
    let slow = handle.submit(request(prompt(10, 9), 100)).unwrap();
    drop(gone);
    drop(held);
    // The slow client reads nothing until all is over.
    wait_for(|| handle.stats().finished.get() == 1);
    settle(&handle, 32);
    assert_eq!(handle.stats().cancelled.get(), 3);
    assert!(watch.steps.load(std::sync::atomic::Ordering::SeqCst) < 150);
    assert_eq!(collect(slow).content(), alone(&request(prompt(10, 9), 100)));
}

#[test]
fn background_requests_have_a_queue_of_their_own_and_end_as_if_alone() {
    let (handle, watch) = engine(64, EngineConfig { max_batch: 2, max_queue: 3, ..config() });
    let later = |n: u32| Request { priority: Priority::Background, ..adapted(prompt(20 + n as usize, n), 8, n as u8) };
    let held = watch.hold.lock().unwrap();
    let flood: Vec<Request> = (0..5).map(later).collect();
    let events = handle.submit_many(flood.clone()).unwrap();
    assert!(matches!(handle.submit(later(9)), Err(SubmitError::QueueFull(3))));
    let asked = adapted(prompt(33, 7), 9, 7);
    assert!(matches!(handle.submit_many(vec![asked.clone(), later(8)]), Err(SubmitError::QueueFull(_))), "all or none");
    let first = handle.submit_many(vec![asked.clone(); 5]).unwrap();
    assert!(matches!(handle.submit(asked.clone()), Err(SubmitError::QueueFull(_))));
    drop(held);
    for outcome in first.into_iter().map(collect) {
        assert_eq!(outcome.content(), alone(&asked));
    }
    for (request, events) in flood.iter().zip(events) {
        assert_eq!(collect(events).content(), alone(request));
    }
    settle(&handle, 64);
}

#[test]
fn interactive_requests_end_before_background_ones_that_came_first() {
    let (model, _) = Fake::model(64);
    let (handle, mut worker) = pair(model, EngineConfig { max_batch: 2, background_rows: 1, ..config() }).unwrap();
    let later = |n| handle.submit(Request { priority: Priority::Background, ..request(prompt(20, n), 30) }).unwrap();
    let background: Vec<Events> = (0..3).map(later).collect();
    (0..3).for_each(|_| assert!(worker.turn()));
    let interactive: Vec<Events> = (3..7).map(|n| handle.submit(request(prompt(20, n), 10)).unwrap()).collect();
    while handle.stats().finished.get() < 4 {
        assert!(worker.turn());
    }
    interactive.into_iter().for_each(|events| assert!(collect(events).finish.is_some()));
    while handle.stats().finished.get() < 7 {
        assert!(worker.turn());
    }
    for (n, events) in background.into_iter().enumerate() {
        assert_eq!(collect(events).content(), alone(&request(prompt(20, n as u32), 30)));
    }
    assert!(handle.stats().preemptions.get() > 0);
}

#[test]
fn the_phases_account_for_the_time_of_a_step() {
    let (model, watch) = Fake::model(64);
    watch.slow.store(2, std::sync::atomic::Ordering::SeqCst);
    let (handle, mut worker) = pair(model, config()).unwrap();
    let asked = (0..8).map(|n| request(prompt(20, n), 12)).collect();
    let events = handle.submit_many(asked).unwrap();
    let started = std::time::Instant::now();
    while handle.stats().finished.get() < 8 {
        assert!(worker.turn());
    }
    let elapsed = started.elapsed().as_secs_f64();
    events.into_iter().for_each(|events| assert!(collect(events).finish.is_some()));
    let phases: Vec<(&str, f64)> = handle.stats().phases.all().map(|(name, seconds)| (name, seconds.get())).to_vec();
    let sum: f64 = phases.iter().map(|(_, seconds)| seconds).sum();
    assert!(sum >= 0.95 * elapsed && sum <= elapsed, "{sum} of {elapsed}: {phases:?}");
    // A lap is never nothing, even where nothing was done.
    assert!(phases.iter().all(|&(_, seconds)| seconds > 0.0), "{phases:?}");
}

#[test]
fn a_step_wakes_each_reader_once_and_one_that_holds_only_at_the_end() {
    for hold in [false, true] {
        let (model, _) = Fake::model(64);
        let (handle, mut worker) = pair(model, config()).unwrap();
        let asked = (0..4).map(|n| Request { prompt_logprobs: Some(0), ..request(prompt(20, n), 10) }).collect();
        let readers: Vec<_> = handle
            .submit_many(asked)
            .unwrap()
            .into_iter()
            .map(|mut events| {
                if hold {
                    events.hold_until_end();
                }
                std::thread::spawn(move || assert!(collect(events).finish.is_some()))
            })
            .collect();
        while handle.stats().finished.get() < 4 {
            assert!(worker.turn());
            // Long enough for every reader to wait again.
            std::thread::sleep(Duration::from_millis(3));
        }
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        let (wakes, steps) = (handle.stats().wakes.get(), handle.stats().steps.get());
        assert!(if hold { wakes <= 4 } else { (4..=4 * steps).contains(&wakes) }, "{wakes} wakes in {steps} steps");
    }
}
