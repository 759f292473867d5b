//! The scheduler alone: integers in, integers out.

use super::*;
use crate::engine::{
    prefix::Chain,
    scheduler::{Limits, Plan, Scheduler},
    sequence::Sequence,
};

fn scheduler(max_batch: usize, prefill_chunk: usize, blocks: usize) -> Scheduler {
    Scheduler::new(Limits { max_batch, prefill_chunk }, blocks)
}

fn sequence(id: u64, tokens: Vec<TokenId>, max_tokens: usize) -> Sequence {
    let chain = Chain::new(CacheSalt([0; 32]), &tokens);
    Sequence::new(id, tokens, max_tokens, Some(chain), false)
}

/// (id, start, rows) of each chunk.
fn shape(plan: &Plan) -> Vec<(u64, usize, usize)> {
    plan.chunks.iter().map(|chunk| (chunk.id, chunk.start, chunk.rows)).collect()
}

/// Schedules, and commits as if every sample were token 1.
fn step(scheduler: &mut Scheduler) -> Vec<(u64, usize, usize)> {
    let plan = scheduler.schedule();
    plan.chunks.iter().for_each(|chunk| scheduler.commit(chunk, chunk.sample.then_some(1)));
    shape(&plan)
}

#[test]
fn decoding_rows_come_first_then_prompts_in_order_up_to_the_budget() {
    let mut scheduler = scheduler(8, 20, 64);
    scheduler.add(sequence(0, prompt(5, 0), 9));
    assert_eq!(step(&mut scheduler), [(0, 0, 5)]);
    scheduler.add(sequence(1, prompt(30, 1), 9));
    scheduler.add(sequence(2, prompt(12, 2), 9));
    assert_eq!(step(&mut scheduler), [(0, 5, 1), (1, 0, 20)]);
    assert_eq!(step(&mut scheduler), [(0, 6, 1), (1, 20, 10), (2, 0, 10)]);
    assert_eq!(step(&mut scheduler), [(0, 7, 1), (1, 30, 1), (2, 10, 2)]);
    assert_eq!(step(&mut scheduler), [(0, 8, 1), (1, 31, 1), (2, 12, 1)]);
}

#[test]
fn no_more_run_than_the_batch_holds() {
    let mut scheduler = scheduler(2, 100, 64);
    (0..4).for_each(|id| scheduler.add(sequence(id, prompt(5, id as u32), 9)));
    assert_eq!(step(&mut scheduler).len(), 2);
    assert_eq!((scheduler.running(), scheduler.waiting()), (2, 2));
    assert!(scheduler.remove(0).is_some() && scheduler.remove(3).is_some() && scheduler.remove(9).is_none());
    assert_eq!(step(&mut scheduler), [(1, 5, 1), (2, 0, 5)]);
}

#[test]
fn a_follower_waits_for_the_prefix_and_others_pass() {
    let mut scheduler = scheduler(8, 64, 64);
    scheduler.add(sequence(0, prompt(60, 1), 9));
    scheduler.add(sequence(1, prompt(60, 1), 9));
    scheduler.add(sequence(2, prompt(40, 2), 9));
    assert_eq!(step(&mut scheduler), [(0, 0, 60), (2, 0, 4)]);
    assert_eq!(step(&mut scheduler), [(0, 60, 1), (1, 48, 12), (2, 4, 36)]);
    assert_eq!(scheduler.get(1).unwrap().cached, Some(48));
}

#[test]
fn a_block_is_known_only_once_it_is_computed() {
    let mut scheduler = scheduler(8, 20, 64);
    scheduler.add(sequence(0, prompt(60, 1), 9));
    assert_eq!(step(&mut scheduler), [(0, 0, 20)]);
    // A plan that was never run leaves nothing behind either.
    assert_eq!(shape(&scheduler.schedule()), [(0, 20, 20)]);
    scheduler.remove(0);
    scheduler.add(sequence(1, prompt(60, 1), 9));
    assert_eq!(step(&mut scheduler), [(1, 16, 20)]);
}

#[test]
fn the_youngest_gives_way_and_comes_back_before_those_who_came_later() {
    // Five blocks; each of three sequences starts with one and grows.
    let mut scheduler = scheduler(3, 100, 5);
    (0..5).for_each(|id| scheduler.add(sequence(id, prompt(14, id as u32), 60)));
    let mut order = Vec::new();
    let mut preempted = 0;
    for _ in 0..1000 {
        let plan = scheduler.schedule();
        preempted += plan.preempted;
        for chunk in &plan.chunks {
            scheduler.commit(chunk, chunk.sample.then_some(1));
            if scheduler.get(chunk.id).is_some_and(|sequence| sequence.generated() == 60) {
                let done = scheduler.remove(chunk.id).unwrap();
                assert!(done.id != 0 || done.preemptions == 0);
                order.push(done.id);
            }
        }
    }
    assert_eq!(order, [0, 1, 2, 3, 4]);
    assert!(preempted > 0);
    let pool = scheduler.cache().pool();
    assert_eq!(pool.available(), 5);
}

#[test]
fn a_sequence_that_lacks_blocks_is_not_overtaken() {
    let mut scheduler = scheduler(8, 1000, 8);
    scheduler.add(sequence(0, prompt(60, 1), 9));
    step(&mut scheduler);
    scheduler.add(sequence(1, prompt(70, 2), 9));
    scheduler.add(sequence(2, prompt(5, 3), 9));
    assert_eq!(step(&mut scheduler), [(0, 60, 1)]);
    scheduler.remove(0);
    assert_eq!(step(&mut scheduler), [(1, 0, 70), (2, 0, 5)]);
}
