//! Which rows run in the next step: continuous batching over integers.
//!
//! A step holds one row of every decoding sequence, then chunks of prompts up to a budget: a running stream waits for its next token no longer than a step of that many
//! prompt rows takes. Sequences are admitted when their blocks are there ([`admission`]): first those of the key that was served least ([`Shares`]), of a key in order of
//! arrival. Prompt rows are divided among keys in the same way.
//!
//! When a decoding sequence needs a block and none is left, the key with the most blocks by its weight gives back all of those of its youngest sequence, which waits to be
//! recomputed. Nobody loses its only running sequence while another has more than one, so the oldest of all always advances, and nobody starves.
//!
//! All of this first for interactive sequences, then, with what is left, for background ones. Those make room, places and blocks, for interactive ones that
//! wait, and beside interactive rows they add a bounded number of their own.

mod admission;

use std::ops::Range;

use super::{
    api::{Priority, ShareKey},
    prefix::PrefixCache,
    sequence::{Sequence, SequenceId, blocks_for},
    shares::{Shares, owner},
};
use crate::{
    kernel::BLOCK_TOKENS,
    types::{CacheSalt, TokenId},
};

/// What bounds a step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Sequences that run at once.
    pub(super) max_batch: usize,
    /// Prompt rows in a step in which interactive sequences decode.
    pub(super) prefill_chunk: usize,
    /// Prompt rows in any other; at least `prefill_chunk`.
    pub(super) idle_prefill_chunk: usize,
    /// Rows of background sequences in a step in which interactive ones have some.
    pub(super) background_rows: usize,
}

/// Consecutive rows of one sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Whose.
    pub(super) id: SequenceId,
    /// Position of the first row.
    pub(super) start: usize,
    /// How many rows.
    pub(super) rows: usize,
    /// After these rows all tokens so far are computed.
    pub(super) last: bool,
    /// The logits of the last row choose the next token.
    pub(super) sample: bool,
    /// Positions whose logits score the prompt token after them.
    pub(super) scores: Range<usize>,
}

/// The next step. Reused.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Of different sequences, decoding ones first.
    pub(super) chunks: Vec<Chunk>,
    /// Sequences that left the queue for the first time.
    pub(super) admitted: Vec<SequenceId>,
    /// Of each admitted sequence that came when its key had nothing here: the rounds since. 1: it came after the round before.
    pub(super) first_places: Vec<u64>,
    /// Sequences that lost their blocks.
    pub(super) preempted: usize,
    /// Those of them that lost them to another key's share.
    pub(super) yielded: usize,
    /// Rows that only decode, at the start.
    pub(super) decode_rows: usize,
    /// Prompt rows.
    pub(super) prefill_rows: usize,
    /// Prompt tokens of newly admitted sequences that were in the cache.
    pub(super) cached_tokens: usize,
}

/// All sequences and blocks of the engine.
#[derive(Debug)]
pub(super) struct Scheduler {
    limits: Limits,
    cache: PrefixCache,
    /// In order of their ids: background ones last.
    running: Vec<Sequence>,
    /// Those that wait, and whose turn it is.
    shares: Shares,
    /// Rounds so far.
    round: u64,
}

impl Scheduler {
    /// Nothing to do, all blocks free.
    pub(super) fn new(limits: Limits, blocks: usize) -> Self {
        Self { limits, cache: PrefixCache::new(blocks), running: Vec::new(), shares: Shares::default(), round: 0 }
    }

    /// Queues a sequence. Its number is larger than all before; alone it fits in the cache.
    pub(super) fn add(&mut self, mut sequence: Sequence) {
        sequence.arrived = self.round;
        let above = self.class(sequence.id.priority).start;
        self.shares.arrive(sequence, self.limits.max_batch.saturating_sub(above));
    }

    /// Sequences that hold blocks.
    pub(super) fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait for the first time or again.
    pub(super) fn waiting(&self) -> usize {
        self.shares.waiting()
    }

    /// The prefix cache, to count.
    pub(super) fn cache(&self) -> &PrefixCache {
        &self.cache
    }

    /// A running sequence.
    pub(super) fn get(&self, id: SequenceId) -> Option<&Sequence> {
        self.position(id).map(|at| &self.running[at])
    }

    fn position(&self, id: SequenceId) -> Option<usize> {
        self.running.binary_search_by_key(&id, |sequence| sequence.id).ok()
    }

    /// The running sequences of a class.
    fn class(&self, priority: Priority) -> Range<usize> {
        let upto = |priority| self.running.partition_point(|sequence| sequence.id.priority <= priority);
        match priority {
            Priority::Interactive => 0..upto(priority),
            Priority::Background => upto(Priority::Interactive)..self.running.len(),
        }
    }

    /// Plans the next step, over what the plan held. Whatever it says must then be committed or removed.
    pub(super) fn schedule(&mut self, plan: &mut Plan) {
        plan.clear();
        self.round += 1;
        self.shares.begin();
        self.grow(plan);
        let short = plan.preempted > 0;
        if self.admit(Priority::Interactive, plan) && !short {
            self.admit(Priority::Background, plan);
        }
        let decode = |sequence: &Sequence| usize::from(sequence.remaining() == 1);
        let prefill = |sequence: &Sequence| if sequence.remaining() > 1 { sequence.remaining() } else { 0 };
        let beside = !self.class(Priority::Interactive).is_empty();
        let mut room = if beside { self.limits.background_rows } else { usize::MAX };
        self.add_rows(Priority::Interactive, usize::MAX, decode, plan);
        room -= self.add_rows(Priority::Background, room, decode, plan);
        plan.decode_rows = plan.chunks.len();
        let mut budget = self.prefill_budget();
        plan.prefill_rows = self.add_rows(Priority::Interactive, budget, prefill, plan);
        budget -= plan.prefill_rows;
        // An interactive request that comes meanwhile waits for this step, so prompts of background ones are always cut short.
        let background = budget.min(room).min(self.limits.prefill_chunk);
        plan.prefill_rows += self.add_rows(Priority::Background, background, prefill, plan);
    }

    /// Plans as many rows of each sequence of a class as it wants, oldest first. If those are more than `most`, the keys share. Says how many.
    fn add_rows(
        &mut self,
        priority: Priority,
        most: usize,
        wanted: impl Fn(&Sequence) -> usize,
        plan: &mut Plan,
    ) -> usize {
        let class = self.class(priority);
        let sequences = &self.running[class];
        let all: usize = sequences.iter().map(&wanted).sum();
        if all > most {
            self.shares.divide(priority, most, sequences.iter().map(|sequence| (sequence.share.key, wanted(sequence))));
        }
        let mut planned = 0;
        for sequence in sequences {
            let wanted = wanted(sequence);
            let rows = if all > most { self.shares.draw(sequence, wanted) } else { wanted };
            if rows > 0 {
                plan.chunks.push(chunk(sequence, rows));
                planned += rows;
            }
        }
        planned
    }

    /// Prompt rows of the next step: fewer if somebody waits for the next token of a stream.
    fn prefill_budget(&self) -> usize {
        let interactive = &self.running[self.class(Priority::Interactive)];
        let decoding = interactive.iter().any(|sequence| sequence.remaining() == 1);
        if decoding { self.limits.prefill_chunk } else { self.limits.idle_prefill_chunk }
    }

    /// Gives every running sequence blocks for all of its tokens, oldest first, from others if need be.
    fn grow(&mut self, plan: &mut Plan) {
        let mut at = 0;
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            if sequence.blocks.len() >= blocks_for(sequence.tokens.len()) {
                at += 1;
            } else if let Some(block) = self.cache.allocate() {
                sequence.blocks.push(block);
            } else if let Some(victim) = self.victim() {
                self.suspend(victim, plan);
                at -= usize::from(victim < at);
            } else {
                break;
            }
        }
    }

    /// Who loses its blocks when somebody has to: of the lowest class that runs, the youngest sequence of the key with the most blocks by its weight; if no key has two,
    /// the youngest of all.
    fn victim(&mut self) -> Option<usize> {
        let youngest = self.running.len().checked_sub(1)?;
        let priority = self.running[youngest].id.priority;
        self.count(priority);
        let several = self.shares.class(priority).filter(|(_, account)| account.running > 1);
        let most: Option<ShareKey> =
            several.max_by_key(|(_, account)| account.price(account.blocks)).map(|(key, _)| key);
        most.map_or(Some(youngest), |key| self.running.iter().rposition(|other| owner(other) == (priority, key)))
    }

    /// Counts blocks and prompt rows of the keys of a class anew.
    fn count(&mut self, priority: Priority) {
        self.shares.class_mut(priority).for_each(|account| (account.blocks, account.rows) = (0, 0));
        for sequence in &self.running[self.class(priority)] {
            if let Some(account) = self.shares.get_mut(owner(sequence)) {
                account.blocks += sequence.blocks.len();
                account.rows += if sequence.remaining() > 1 { sequence.remaining() } else { 0 };
            }
        }
    }

    /// Puts a running sequence back into the queue, at its place.
    fn suspend(&mut self, at: usize, plan: &mut Plan) {
        let mut sequence = self.running.remove(at);
        self.cache.release(std::mem::take(&mut sequence.blocks));
        sequence.computed = 0;
        sequence.preemptions += 1;
        plan.preempted += 1;
        self.shares.suspend(sequence);
    }

    /// A planned chunk was computed; `token` is what its last row chose. Publishes the blocks that it filled.
    pub(super) fn commit(&mut self, chunk: &Chunk, token: Option<TokenId>) {
        let Some(at) = self.position(chunk.id) else { return };
        let sequence = &mut self.running[at];
        sequence.computed = chunk.start + chunk.rows;
        if !chunk.scores.is_empty() {
            sequence.scored = chunk.scores.end;
        }
        if let Some(chain) = &mut sequence.chain {
            chain.extend(&sequence.tokens);
            for block in chunk.start / BLOCK_TOKENS..sequence.computed / BLOCK_TOKENS {
                self.cache.publish(&sequence.blocks[block], chain.hashes()[block], chain.salt());
            }
        }
        sequence.tokens.extend(token);
        self.shares.charge(sequence, usize::from(token.is_some()));
    }

    /// Takes a sequence out, wherever it is; its blocks are free or cached at once.
    pub(super) fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let Some(at) = self.position(id) else { return self.shares.remove(id) };
        let mut sequence = self.running.remove(at);
        self.shares.leave(&sequence);
        self.cache.release(std::mem::take(&mut sequence.blocks));
        Some(sequence)
    }

    /// Forgets the cached blocks of a salt. Sequences under it go on and publish nothing more.
    pub(super) fn purge(&mut self, salt: CacheSalt) {
        self.cache.purge(salt);
        for sequence in self.running.iter_mut().chain(self.shares.all_waiting()) {
            sequence.chain.take_if(|chain| chain.salt() == salt);
        }
    }
}

#[cfg(test)]
impl Scheduler {
    /// Everything that is kept twice agrees.
    pub(super) fn check(&self) {
        self.shares.check(&self.running);
        assert!(
            self.running.windows(2).all(|pair| pair[0].id < pair[1].id) && self.running.len() <= self.limits.max_batch
        );
        let blocks = self.running.iter().flat_map(|sequence| &sequence.blocks).map(|block| block.id());
        let held: std::collections::BTreeSet<u32> = blocks.collect();
        assert_eq!(held.len(), self.cache.pool().len() - self.cache.pool().available());
    }

    /// Keys that are remembered, those without sequences included.
    pub(super) fn keys(&self) -> usize {
        self.shares.len()
    }
}

impl Plan {
    fn clear(&mut self) {
        let Self { chunks, admitted, first_places, preempted, yielded, decode_rows, prefill_rows, cached_tokens } =
            self;
        chunks.clear();
        admitted.clear();
        first_places.clear();
        (*preempted, *yielded, *decode_rows, *prefill_rows, *cached_tokens) = (0, 0, 0, 0, 0);
    }
}

fn chunk(sequence: &Sequence, rows: usize) -> Chunk {
    let start = sequence.computed;
    let end = start + rows;
    let last = end == sequence.tokens.len();
    let first_score = start.max(sequence.scored);
    let last_score = if sequence.score_prompt { end.min(sequence.prompt - 1).max(first_score) } else { first_score };
    Chunk {
        id: sequence.id,
        start,
        rows,
        last,
        sample: last && sequence.generated() < sequence.max_tokens,
        scores: first_score..last_score,
    }
}
