//! The scheduler alone: integers in, integers out.

use super::*;
use crate::engine::{
    prefix::Chain,
    scheduler::{Limits, Plan, Scheduler},
    sequence::{Sequence, SequenceId},
};

fn scheduler(max_batch: usize, prefill_chunk: usize, blocks: usize) -> Scheduler {
    limited(Limits { max_batch, prefill_chunk, idle_prefill_chunk: prefill_chunk, background_rows: 4 }, blocks)
}

fn limited(limits: Limits, blocks: usize) -> Scheduler {
    Scheduler::new(limits, blocks)
}

fn id(number: u64) -> SequenceId {
    SequenceId { priority: Priority::Interactive, number }
}

fn background(number: u64) -> SequenceId {
    SequenceId { priority: Priority::Background, number }
}

fn sequence(number: u64, tokens: Vec<TokenId>, max_tokens: usize) -> Sequence {
    under(id(number), tokens, max_tokens)
}

fn under(id: SequenceId, tokens: Vec<TokenId>, max_tokens: usize) -> Sequence {
    let chain = Chain::new(CacheSalt([0; 32]), &tokens);
    Sequence::new(id, Share::default(), tokens, max_tokens, Some(chain), false)
}

fn plan(scheduler: &mut Scheduler) -> Plan {
    let mut plan = Plan::default();
    scheduler.schedule(&mut plan);
    plan
}

/// (id, start, rows) of each chunk.
fn shape(plan: &Plan) -> Vec<(u64, usize, usize)> {
    plan.chunks.iter().map(|chunk| (chunk.id.number, chunk.start, chunk.rows)).collect()
}

/// Schedules, and commits as if every sample were token 1.
fn step(scheduler: &mut Scheduler) -> Vec<(u64, usize, usize)> {
    let plan = plan(scheduler);
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
    assert!(
        scheduler.remove(id(0)).is_some() && scheduler.remove(id(3)).is_some() && scheduler.remove(id(9)).is_none()
    );
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
    assert_eq!(scheduler.get(id(1)).unwrap().cached, Some(48));
}

#[test]
fn a_block_is_known_only_once_it_is_computed() {
    let mut scheduler = scheduler(8, 20, 64);
    scheduler.add(sequence(0, prompt(60, 1), 9));
    assert_eq!(step(&mut scheduler), [(0, 0, 20)]);
    // A plan that was never run leaves nothing behind either.
    assert_eq!(shape(&plan(&mut scheduler)), [(0, 20, 20)]);
    scheduler.remove(id(0));
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
        let plan = plan(&mut scheduler);
        preempted += plan.preempted;
        for chunk in &plan.chunks {
            scheduler.commit(chunk, chunk.sample.then_some(1));
            if scheduler.get(chunk.id).is_some_and(|sequence| sequence.generated() == 60) {
                let done = scheduler.remove(chunk.id).unwrap();
                assert!(done.id.number != 0 || done.preemptions == 0);
                order.push(done.id.number);
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
    scheduler.remove(id(0));
    assert_eq!(step(&mut scheduler), [(1, 0, 70), (2, 0, 5)]);
}

fn shared(background_rows: usize) -> Limits {
    Limits { max_batch: 4, prefill_chunk: 20, idle_prefill_chunk: 50, background_rows }
}

#[test]
fn prompts_are_cut_shorter_when_a_stream_waits() {
    let mut scheduler = limited(shared(4), 64);
    scheduler.add(sequence(0, prompt(70, 0), 9));
    assert_eq!(step(&mut scheduler), [(0, 0, 50)]);
    scheduler.add(sequence(1, prompt(90, 1), 9));
    assert_eq!(step(&mut scheduler), [(0, 50, 20), (1, 0, 30)]);
    assert_eq!(step(&mut scheduler), [(0, 70, 1), (1, 30, 20)]);
    scheduler.remove(id(0));
    assert_eq!(step(&mut scheduler), [(1, 50, 40)]);
}

#[test]
fn a_running_stream_is_in_every_step_and_no_step_is_longer_than_a_chunk() {
    let mut scheduler = limited(shared(6), 200);
    scheduler.add(sequence(0, prompt(5, 0), 300));
    step(&mut scheduler);
    for number in 1..200 {
        let new = if number % 3 == 0 { background(number) } else { id(number) };
        scheduler.add(under(new, prompt(1 + number as usize * 7 % 90, number as u32), 1 + number as usize % 5));
        let plan = plan(&mut scheduler);
        assert!(plan.chunks.iter().any(|chunk| chunk.id == id(0)));
        assert!(plan.prefill_rows <= 20 && plan.decode_rows <= 4);
        let theirs: usize = plan.chunks.iter().filter(|c| c.id.priority == Priority::Background).map(|c| c.rows).sum();
        assert!(theirs <= 6);
        for chunk in &plan.chunks {
            scheduler.commit(chunk, chunk.sample.then_some(1));
            let done = scheduler.get(chunk.id).is_some_and(|s| s.generated() == s.max_tokens);
            if done && chunk.id != id(0) {
                scheduler.remove(chunk.id);
            }
        }
    }
}

#[test]
fn background_takes_what_is_left() {
    let mut scheduler = limited(shared(3), 64);
    scheduler.add(under(background(0), prompt(90, 0), 9));
    // Alone it has all but the longer chunk: who comes meanwhile must not wait for that.
    assert_eq!(step(&mut scheduler), [(0, 0, 20)]);
    scheduler.add(under(background(1), prompt(5, 1), 9));
    scheduler.add(sequence(2, prompt(30, 2), 9));
    assert_eq!(step(&mut scheduler), [(2, 0, 30), (0, 20, 3)]);
    assert_eq!(step(&mut scheduler), [(2, 30, 1), (0, 23, 3)]);
    scheduler.remove(id(2));
    assert_eq!(step(&mut scheduler), [(0, 26, 20)]);
    assert_eq!(step(&mut scheduler), [(0, 46, 20)]);
    scheduler.remove(background(0));
    assert_eq!(step(&mut scheduler), [(1, 0, 5)]);
    scheduler.add(sequence(3, prompt(4, 3), 9));
    assert_eq!(step(&mut scheduler), [(1, 5, 1), (3, 0, 4)]);
    let mut none = limited(shared(0), 64);
    none.add(under(background(0), prompt(5, 0), 9));
    none.add(sequence(1, prompt(5, 1), 2));
    assert_eq!(step(&mut none), [(1, 0, 5)]);
    assert_eq!(step(&mut none), [(1, 5, 1)]);
    none.remove(id(1));
    assert_eq!(step(&mut none), [(0, 0, 5)]);
}

#[test]
fn background_makes_room_for_those_who_wait() {
    // Places: four background sequences fill the batch.
    let mut scheduler = limited(shared(8), 64);
    (0..4).for_each(|number| scheduler.add(under(background(number), prompt(3, number as u32), 9)));
    assert_eq!(step(&mut scheduler).len(), 4);
    scheduler.add(sequence(4, prompt(3, 4), 9));
    assert_eq!(step(&mut scheduler), [(0, 3, 1), (1, 3, 1), (2, 3, 1), (4, 0, 3)]);
    assert_eq!((scheduler.running(), scheduler.waiting()), (4, 1));
    // Blocks: the youngest loses them first, and comes back when they are there again.
    let mut scheduler = limited(Limits { background_rows: 99, idle_prefill_chunk: 500, ..shared(0) }, 8);
    scheduler.add(under(background(0), prompt(14, 0), 30));
    scheduler.add(under(background(1), prompt(6, 1), 30));
    step(&mut scheduler);
    scheduler.add(sequence(2, prompt(110, 2), 3));
    assert_eq!(step(&mut scheduler), [(0, 14, 1), (2, 0, 110)]);
    assert_eq!((scheduler.running(), scheduler.waiting()), (2, 1));
    scheduler.remove(id(2));
    step(&mut scheduler);
    assert_eq!(scheduler.get(background(1)).unwrap().preemptions, 1);
    // One that would not fit even so takes nothing from anybody, and nobody is admitted past it.
    let mut scheduler = limited(Limits { prefill_chunk: 500, idle_prefill_chunk: 500, ..shared(9) }, 8);
    scheduler.add(sequence(0, prompt(60, 0), 30));
    scheduler.add(under(background(1), prompt(6, 1), 30));
    step(&mut scheduler);
    scheduler.add(sequence(2, prompt(100, 2), 3));
    scheduler.add(under(background(3), prompt(6, 3), 30));
    assert_eq!(step(&mut scheduler), [(0, 60, 1), (1, 6, 1)]);
    assert_eq!(scheduler.waiting(), 2);
}

#[test]
fn nobody_waits_for_a_prefix_that_background_work_may_not_compute() {
    let mut scheduler = limited(shared(0), 64);
    scheduler.add(under(background(0), prompt(60, 1), 9));
    assert_eq!(step(&mut scheduler), [(0, 0, 20)]);
    scheduler.add(sequence(1, prompt(60, 1), 9));
    assert_eq!(step(&mut scheduler), [(1, 16, 44)]);
}
