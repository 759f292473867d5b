//! Keys that share the engine: the scheduler alone, step by step, and then that company changes nobody's tokens.

use std::{collections::BTreeMap, num::NonZeroU32};

use proptest::prelude::*;

use super::*;
use crate::engine::{
    handle::pair,
    prefix::Chain,
    scheduler::{Limits, Plan, Scheduler},
    sequence::{Sequence, SequenceId},
};

const LIMITS: Limits = Limits { max_batch: 8, prefill_chunk: 64, idle_prefill_chunk: 64, background_rows: 4 };

fn share(key: u64, weight: u32) -> Share {
    Share { key: ShareKey(key), weight: NonZeroU32::new(weight).unwrap() }
}

/// A scheduler, who is in it, and what each key got.
struct Load {
    scheduler: Scheduler,
    blocks: usize,
    next: u64,
    /// Of sequences in the scheduler: key and tokens to generate.
    open: BTreeMap<SequenceId, (u64, usize)>,
    /// Prompt tokens and twice the completion tokens, a key.
    cost: BTreeMap<u64, usize>,
    preempted: usize,
    yielded: usize,
    finished: usize,
    /// As the plans say.
    first_places: Vec<u64>,
    /// In order.
    ended: Vec<SequenceId>,
}

impl Load {
    fn new(limits: Limits, blocks: usize) -> Self {
        Self {
            scheduler: Scheduler::new(limits, blocks),
            blocks,
            next: 0,
            open: BTreeMap::new(),
            cost: BTreeMap::new(),
            preempted: 0,
            yielded: 0,
            finished: 0,
            first_places: Vec::new(),
            ended: Vec::new(),
        }
    }

    fn add(&mut self, share: Share, len: usize, max_tokens: usize) -> SequenceId {
        self.add_as(Priority::Interactive, share, len, max_tokens, true)
    }

    fn add_many(&mut self, count: usize, share: Share, len: usize, max_tokens: usize) {
        (0..count).for_each(|_| {
            self.add(share, len, max_tokens);
        });
    }

    fn steps(&mut self, count: usize) {
        (0..count).for_each(|_| {
            self.step();
        });
    }

    /// Every prompt is another.
    fn add_as(&mut self, priority: Priority, share: Share, len: usize, max_tokens: usize, cached: bool) -> SequenceId {
        let id = SequenceId { priority, number: self.next };
        self.next += 1;
        let tokens: Vec<TokenId> = (0..len as u32).map(|at| at ^ ((id.number as u32) << 10)).collect();
        let chain = cached.then(|| Chain::new(CacheSalt([share.key.0 as u8; 32]), &tokens));
        self.scheduler.add(Sequence::new(id, share, tokens, max_tokens, chain, false));
        self.open.insert(id, (share.key.0, max_tokens));
        id
    }

    /// Sequences of a key that are not done.
    fn open_of(&self, key: u64) -> usize {
        self.open.values().filter(|&&(of, _)| of == key).count()
    }

    fn remove(&mut self, id: SequenceId) {
        assert!(self.scheduler.remove(id).is_some() && self.open.remove(&id).is_some());
    }

    fn step(&mut self) -> Plan {
        let mut plan = Plan::default();
        self.scheduler.schedule(&mut plan);
        self.scheduler.check();
        self.preempted += plan.preempted;
        self.yielded += plan.yielded;
        self.first_places.extend(&plan.first_places);
        for chunk in &plan.chunks {
            let (key, max_tokens) = self.open[&chunk.id];
            let before = self.scheduler.get(chunk.id).map_or(0, |sequence| sequence.paid);
            self.scheduler.commit(chunk, chunk.sample.then_some(1));
            let Some(sequence) = self.scheduler.get(chunk.id) else { panic!("it ran") };
            let prompt = sequence.paid - before;
            *self.cost.entry(key).or_default() += prompt + 2 * usize::from(chunk.sample);
            if chunk.last && sequence.generated() == max_tokens {
                self.remove(chunk.id);
                self.finished += 1;
                self.ended.push(chunk.id);
            }
        }
        self.scheduler.check();
        plan
    }

    /// What a key got of all that was given out in so many steps, both keys having always more to do than fits.
    fn share_of(&mut self, key: u64, steps: usize, mut fill: impl FnMut(&mut Self)) -> f64 {
        let before = self.cost.clone();
        for _ in 0..steps {
            fill(self);
            self.step();
        }
        let got = |key: &u64| self.cost[key] - before.get(key).copied().unwrap_or(0);
        got(&key) as f64 / self.cost.keys().map(got).sum::<usize>() as f64
    }

    /// Runs until nothing is left, and checks that nothing is.
    fn drain(&mut self, most: usize) {
        for _ in 0..most {
            if self.open.is_empty() {
                break;
            }
            self.step();
        }
        assert!(self.open.is_empty(), "{} sequences do not end", self.open.len());
        assert_eq!((self.scheduler.running(), self.scheduler.waiting()), (0, 0));
        assert_eq!(self.scheduler.cache().pool().available(), self.blocks);
        self.scheduler.schedule(&mut Plan::default());
        assert_eq!(self.scheduler.keys(), 0, "nobody is remembered");
    }
}

/// Keeps so many requests of a key in the scheduler, of lengths that vary.
fn saturate(load: &mut Load, share: Share, (len, max_tokens): (usize, usize)) {
    while load.open_of(share.key.0) < 24 {
        let vary = load.next as usize;
        load.add(share, len / 2 + vary * 7 % len.max(1) + 1, max_tokens / 2 + vary * 5 % max_tokens + 1);
    }
}

#[test]
fn two_that_saturate_get_tokens_by_their_weights() {
    let kinds = [(20, 30), (5, 80), (120, 4)];
    for (first, second) in [(1, 1), (1, 3), (3, 1), (2, 5), (1000, 3000)] {
        for (of_first, of_second) in [(kinds[0], kinds[0]), (kinds[1], kinds[0]), (kinds[0], kinds[2])] {
            let mut load = Load::new(LIMITS, 4096);
            let fill = |load: &mut Load| {
                saturate(load, share(1, first), of_first);
                saturate(load, share(2, second), of_second);
            };
            let got = load.share_of(2, 6000, fill);
            let due = f64::from(second) / f64::from(first + second);
            assert!((got / due - 1.0).abs() < 0.05, "{first}:{second}, {of_first:?} {of_second:?}: {got} of {due}");
            let preempted = load.preempted;
            let finished = load.finished;
            assert!(preempted * 20 < finished, "{of_first:?} {of_second:?}: {preempted} preemptions of {finished}");
        }
    }
}

#[test]
fn the_background_is_shared_too_also_beside_interactive_rows() {
    for interactive in [false, true] {
        let mut load = Load::new(LIMITS, 4096);
        let fill = |load: &mut Load| {
            for (key, weight) in [(1, 1), (2, 3)] {
                while load.open_of(key) < 24 {
                    load.add_as(Priority::Background, share(key, weight), 20, 30, true);
                }
            }
            if interactive && load.open_of(3) == 0 {
                load.add(share(3, 1), 10, 40);
            }
        };
        fill(&mut load);
        load.steps(50);
        let before = load.cost.clone();
        for _ in 0..6000 {
            fill(&mut load);
            load.step();
        }
        let got = |key: u64| (load.cost[&key] - before.get(&key).copied().unwrap_or(0)) as f64;
        let part = got(2) / (got(1) + got(2));
        assert!((part / 0.75 - 1.0).abs() < 0.05, "{part}");
    }
}

#[test]
fn a_newcomer_is_neither_starved_by_history_nor_paid_for_idleness() {
    for idle_before in [false, true] {
        let mut load = Load::new(LIMITS, 4096);
        let (a, b) = (share(1, 1), share(2, 1));
        if idle_before {
            // It was here once, and had little.
            load.add(b, 20, 5);
        }
        load.share_of(1, 3000, |load| saturate(load, a, (20, 30)));
        let both = |load: &mut Load| {
            saturate(load, a, (20, 30));
            saturate(load, b, (20, 30));
        };
        let soon = load.share_of(2, 300, both);
        assert!((0.35..0.55).contains(&soon), "{soon}");
        let later = load.share_of(2, 2000, both);
        assert!((0.475..0.525).contains(&later), "{later}");
    }
}

#[test]
fn one_thing_at_a_time_gives_no_claim_to_more_later() {
    let mut load = Load::new(LIMITS, 4096);
    let (a, b) = (share(1, 1), share(2, 1));
    // The second always has one running and the next one comes before it ends: it is never without.
    load.share_of(2, 3000, |load| {
        saturate(load, a, (20, 30));
        if load.open_of(2) < 2 {
            load.add(b, 10, 60);
        }
    });
    let burst = load.share_of(2, 500, |load| {
        saturate(load, a, (20, 30));
        saturate(load, b, (20, 30));
    });
    assert!((0.35..0.55).contains(&burst), "{burst}");
}

#[test]
fn what_is_due_to_a_newcomer_goes_by_those_who_have_their_part() {
    // One that wants little and has had little gives no claim to a third.
    let mut load = Load::new(LIMITS, 4096);
    let (a, b, modest) = (share(1, 1), share(2, 1), share(3, 1));
    load.add(modest, 10, 4000);
    load.share_of(1, 1500, |load| saturate(load, a, (20, 30)));
    let burst = load.share_of(2, 500, |load| {
        saturate(load, a, (20, 30));
        saturate(load, b, (20, 30));
    });
    assert!((0.3..0.5).contains(&burst), "{burst}");
    // And one that waits because it has had much delays nobody.
    let mut load = Load::new(LIMITS, 4096);
    load.add_many(7, a, 10, 500);
    load.steps(20);
    load.add_many(3, modest, 900, 50);
    load.steps(3);
    assert_eq!((load.scheduler.running(), load.scheduler.waiting()), (8, 2));
    let id = load.add(b, 10, 20);
    assert!(load.step().admitted.contains(&id));
}

/// Floods with one key and sends one request at a time with another, whose every request must be in the next step.
fn one_beside_a_flood(limits: Limits, blocks: usize, flood: (usize, usize), cached: bool) -> Load {
    let mut load = Load::new(limits, blocks);
    let (a, b) = (share(1, 1), share(2, 1));
    for _ in 0..64 {
        load.add_as(Priority::Interactive, a, flood.0, flood.1, cached);
    }
    load.steps(10);
    let mut asked = 0;
    while load.open_of(1) > limits.max_batch {
        if load.open_of(2) == 0 {
            let id = load.add_as(Priority::Interactive, b, 24, 12, cached);
            asked += 1;
            let plan = load.step();
            assert!(plan.admitted.contains(&id), "request {asked} has no place");
            assert!(plan.chunks.iter().any(|chunk| chunk.id == id), "request {asked} has no row");
            assert!(plan.preempted <= 3, "{} lost their blocks for one", plan.preempted);
        }
        let theirs: Vec<SequenceId> = load.open.iter().filter(|(_, open)| open.0 == 2).map(|(&id, _)| id).collect();
        let plan = load.step();
        assert!(theirs.iter().all(|&id| plan.chunks.iter().any(|chunk| chunk.id == id)), "it loses its place again");
    }
    assert!(asked > 5, "{asked} requests tell nothing");
    assert!(load.first_places.iter().all(|&rounds| rounds == 1), "{:?}", load.first_places);
    assert!(load.yielded <= 3 * asked, "{} preemptions for {asked} requests", load.yielded);
    load
}

#[test]
fn who_sends_one_at_a_time_is_in_the_next_step_beside_a_flood() {
    one_beside_a_flood(LIMITS, 4096, (20, 200), true).drain(10_000);
    one_beside_a_flood(LIMITS, 4096, (20, 200), false).drain(10_000);
    let wide = Limits { max_batch: 48, prefill_chunk: 256, ..LIMITS };
    one_beside_a_flood(wide, 4096, (20, 300), true).drain(10_000);
}

#[test]
fn a_flood_of_long_prompts_does_not_keep_others_from_their_first_chunk() {
    one_beside_a_flood(LIMITS, 4096, (900, 5), true).drain(10_000);
    one_beside_a_flood(Limits { prefill_chunk: 16, idle_prefill_chunk: 16, ..LIMITS }, 4096, (400, 2), true)
        .drain(20_000);
}

#[test]
fn a_flood_that_holds_all_blocks_gives_some_back() {
    // Eight sequences of up to 20 blocks: the cache is always full.
    one_beside_a_flood(LIMITS, 80, (100, 200), true).drain(40_000);
    one_beside_a_flood(LIMITS, 80, (100, 200), false).drain(40_000);
}

#[test]
fn the_oldest_of_the_flood_is_never_the_one_that_gives_way() {
    let mut load = Load::new(LIMITS, 4096);
    load.add_many(16, share(1, 1), 20, 100);
    let mut steps = 0;
    while !load.open.is_empty() {
        if steps % 6 == 0 && load.open_of(1) > 1 {
            load.add(share(2, 1), 5, 3);
        }
        load.step();
        steps += 1;
        assert!(steps < 2000);
    }
    assert!(load.yielded > 10);
    let of_flood: Vec<u64> = load.ended.iter().map(|id| id.number).filter(|&number| number < 16).collect();
    assert_eq!(of_flood[..7], [0, 1, 2, 3, 4, 5, 6], "the first seven were never preempted");
}

#[test]
fn a_key_may_take_no_more_than_its_part_and_cannot_be_robbed_of_it() {
    let mut load = Load::new(LIMITS, 4096);
    load.add_many(20, share(1, 1), 10, 400);
    load.steps(60);
    load.add_many(20, share(2, 1), 10, 400);
    load.steps(250);
    // Four places each, taken one after the other, and then nothing moves any more.
    assert_eq!((load.yielded, load.preempted), (4, 4));
    let plan = load.step();
    let of = |key: u64| plan.chunks.iter().filter(|chunk| load.open[&chunk.id].0 == key).count();
    assert_eq!((of(1), of(2)), (4, 4));
}

#[test]
fn more_keys_than_places_take_turns() {
    let mut load = Load::new(LIMITS, 4096);
    let keys = 30;
    load.share_of(0, 4000, |load| {
        for key in 0..keys {
            while load.open_of(key) < 2 {
                load.add(share(key, 1), 20, 30);
            }
        }
    });
    let costs: Vec<usize> = load.cost.values().copied().collect();
    let (least, most) = (costs.iter().min().unwrap(), costs.iter().max().unwrap());
    assert!(costs.len() == keys as usize && most - least < 500, "{costs:?}");
    assert!(load.preempted * 20 < load.finished, "{} for {}", load.preempted, load.finished);
}

#[test]
fn tokens_from_the_cache_cost_nothing_and_those_computed_again_neither() {
    let mut load = Load::new(LIMITS, 4096);
    let tokens: Vec<TokenId> = prompt(64, 3);
    for number in 0..2 {
        let id = SequenceId { priority: Priority::Interactive, number };
        let chain = Chain::new(CacheSalt([1; 32]), &tokens);
        load.scheduler.add(Sequence::new(id, share(1, 1), tokens.clone(), 5, Some(chain), false));
        load.open.insert(id, (1, 5));
        load.steps(8);
        // The last block is computed for its logits: 16 tokens of 64 the second time.
        assert_eq!(load.cost[&1], [64 + 10, 64 + 10 + 16 + 10][number as usize]);
    }
}

#[test]
fn a_key_that_owes_is_remembered_while_others_run_and_only_then() {
    let mut load = Load::new(LIMITS, 4096);
    let (a, b) = (share(1, 1), share(2, 1));
    load.add(b, 10, 200);
    load.step();
    load.add(a, 60, 1);
    load.steps(2);
    assert_eq!(load.open_of(1), 0);
    assert_eq!(load.scheduler.keys(), 2, "it paid more than the one that runs");
    load.steps(60);
    assert_eq!(load.scheduler.keys(), 1, "and no longer does");
    load.drain(1000);
}

#[test]
fn company_and_preemption_by_others_change_no_token() {
    let (model, _) = Fake::model(64);
    let (handle, mut worker) = pair(model, EngineConfig { max_batch: 4, ..config() }).unwrap();
    let of = |key: u64, asked: Request| Request { share: share(key, 1), ..asked };
    let flood: Vec<Request> = (0..12)
        .map(|n| Request { logprobs: Some(1), use_cache: n % 2 == 0, ..of(1, adapted(prompt(20, n), 40, n as u8)) })
        .collect();
    let events = handle.submit_many(flood.clone()).unwrap();
    let mut singles: Vec<(Request, Events)> = Vec::new();
    for turn in 0.. {
        if turn % 12 == 4 && singles.len() < 10 {
            let asked = of(2, Request { prompt_logprobs: Some(0), ..adapted(prompt(30, 50 + turn), 6, 99) });
            singles.push((asked.clone(), handle.submit(asked).unwrap()));
        }
        if handle.stats().finished.get() == 22 {
            break;
        }
        assert!(worker.turn());
    }
    for (asked, events) in singles {
        assert_eq!(collect(events).content(), alone(&asked));
    }
    for (asked, events) in flood.iter().zip(events) {
        assert_eq!(collect(events).content(), alone(asked));
    }
    assert!(handle.stats().yielded.get() > 0);
    settle(&handle, 64);
}

/// What may happen before a step.
#[derive(Debug, Clone)]
enum Happens {
    Arrives { key: u64, weight: u32, len: usize, max_tokens: usize, background: bool, cached: bool },
    Leaves(prop::sample::Index),
    Nothing,
}

fn happens() -> impl Strategy<Value = Happens> {
    let arrives = (0u64..5, 1u32..6, 1usize..90, 0usize..40, prop::bool::weighted(0.3), prop::bool::weighted(0.8));
    prop_oneof![
        3 => arrives.prop_map(|(key, weight, len, max_tokens, background, cached)| {
            Happens::Arrives { key, weight, len, max_tokens, background, cached }
        }),
        1 => any::<prop::sample::Index>().prop_map(Happens::Leaves),
        3 => Just(Happens::Nothing),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
    /// After every step the books agree; in the end everything has ended, every block is free, and nobody is remembered.
    #[test]
    fn every_sequence_ends_whatever_comes_and_goes(
        happens in prop::collection::vec(happens(), 1..250),
        max_batch in 1usize..9,
        blocks in 9usize..40,
        prefill_chunk in 1usize..50,
        background_rows in 0usize..6,
    ) {
        let limits = Limits { max_batch, prefill_chunk, idle_prefill_chunk: 2 * prefill_chunk, background_rows };
        let mut load = Load::new(limits, blocks);
        for event in happens {
            match event {
                Happens::Arrives { key, weight, len, max_tokens, background, cached } => {
                    let priority = if background { Priority::Background } else { Priority::Interactive };
                    load.add_as(priority, share(key, weight), len, max_tokens, cached);
                }
                Happens::Leaves(index) if !load.open.is_empty() => {
                    let id = *load.open.keys().nth(index.index(load.open.len())).unwrap();
                    load.remove(id);
                }
                _ => {}
            }
            load.step();
        }
        load.drain(60_000);
        // Without new arrivals preemptions end too: none is the price of nothing.
        prop_assert!(load.preempted <= 60 * load.next as usize, "{} preemptions of {}", load.preempted, load.next);
    }
}
