//! Random loads on tiny caches: every request gets what it gets alone.

use proptest::prelude::*;

use super::*;

/// One client of a random load.
#[derive(Debug, Clone)]
struct Client {
    request: Request,
    /// Reads so many events and leaves; None stays.
    leaves_after: Option<usize>,
    /// Comes after so many others were served to their end.
    late: bool,
}

prop_compose! {
    fn sampling()(
        greedy in any::<bool>(),
        temperature in 0.2f32..1.8,
        top_k in prop_oneof![Just(0u32), 1u32..30],
        top_p in prop_oneof![Just(1.0f32), 0.1f32..1.0],
        penalties in prop_oneof![Just((0.0f32, 0.0f32, 1.0f32)), (-1.0f32..1.0, -1.0f32..1.0, 0.5f32..2.0)],
        seed in 0u64..100,
    ) -> Sampling {
        Sampling {
            temperature: if greedy { 0.0 } else { temperature },
            top_k,
            top_p,
            presence_penalty: penalties.0,
            frequency_penalty: penalties.1,
            repetition_penalty: penalties.2,
            seed,
            ..Sampling::default()
        }
    }
}

prop_compose! {
    fn client()(
        len in 1usize..60,
        family in 0u32..3,
        tail in 0u32..3,
        max_tokens in 0usize..30,
        adapter in 0u8..4,
        sampling in sampling(),
        prompt_logprobs in prop::option::weighted(0.2, 0usize..4),
        logprobs in prop::option::weighted(0.3, 0usize..4),
        stop_tokens in prop::collection::vec(0u32..36, 0..2),
        min_tokens in 0usize..8,
        use_cache in prop::bool::weighted(0.8),
        later in prop::bool::weighted(0.3),
        leaves_after in prop::option::weighted(0.15, 0usize..8),
        late in any::<bool>(),
    ) -> Client {
        // Prompts of a family share their start, so that the cache is hit.
        let mut tokens = prompt(len, family);
        if let Some(last) = tokens.last_mut() {
            *last = (*last + tail) % 36;
        }
        let asked = if adapter == 0 { request(tokens, max_tokens) } else { adapted(tokens, max_tokens, adapter) };
        let priority = if later { Priority::Background } else { Priority::Interactive };
        Client {
            request: Request { sampling, prompt_logprobs, logprobs, stop_tokens, min_tokens, use_cache, priority, ..asked },
            leaves_after,
            late,
        }
    }
}

fn serve(handle: &Handle, clients: &[Client]) {
    let waiting: Vec<_> =
        clients.iter().map(|client| (client, handle.submit(client.request.clone()).unwrap())).collect();
    for (client, mut events) in waiting {
        match client.leaves_after {
            Some(after) => (0..after).for_each(|_| drop(events.blocking_recv())),
            None => assert_eq!(collect(events).content(), alone(&client.request)),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn every_request_gets_what_it_gets_alone(
        clients in prop::collection::vec(client(), 1..14),
        blocks in 6usize..24,
        max_batch in 1usize..9,
        prefill_chunk in 1usize..50,
        idle_prefill_chunk in 1usize..80,
        background_rows in 0usize..6,
        prefix_cache in prop::bool::weighted(0.8),
    ) {
        let (handle, _) = engine(blocks, EngineConfig { max_batch, prefill_chunk, idle_prefill_chunk, background_rows, prefix_cache, ..config() });
        let (late, early): (Vec<Client>, Vec<Client>) = clients.into_iter().partition(|client| client.late);
        serve(&handle, &early);
        serve(&handle, &late);
        prop_assert!(handle.shutdown(Duration::from_secs(5)));
        let stats = handle.stats();
        prop_assert_eq!(stats.blocks_free.get() + stats.blocks_cached.get(), blocks as u64);
        prop_assert_eq!((stats.running.get(), stats.waiting.get(), stats.blocks_used.get()), (0, 0, 0));
        prop_assert!(prefix_cache || stats.blocks_cached.get() == 0);
    }
}
