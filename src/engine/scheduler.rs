//! Which rows run in the next step: continuous batching over integers.
//!
//! A step holds one row of every decoding sequence, then chunks of prompts, oldest sequence first, up to a budget: a running stream waits for its next
//! token no longer than a step of that many prompt rows takes. Sequences are admitted in order of arrival when their blocks are there. When a decoding
//! sequence needs a block and none is left, the youngest running sequence gives all of its blocks back and waits to be recomputed. So the
//! oldest sequence always advances, and nobody starves.
//!
//! All of this first for interactive sequences, then, with what is left, for background ones. Those make room, places and blocks, for interactive ones that
//! wait, and beside interactive rows they add a bounded number of their own.

use std::{collections::VecDeque, ops::Range};

use super::{
    api::Priority,
    blocks::Block,
    prefix::PrefixCache,
    sequence::{Sequence, SequenceId, blocks_for},
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
    /// Sequences that lost their blocks.
    pub(super) preempted: usize,
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
    /// In the same order.
    waiting: VecDeque<Sequence>,
}

impl Scheduler {
    /// Nothing to do, all blocks free.
    pub(super) fn new(limits: Limits, blocks: usize) -> Self {
        Self { limits, cache: PrefixCache::new(blocks), running: Vec::new(), waiting: VecDeque::new() }
    }

    /// Queues a sequence. Its number is larger than all before; alone it fits in the cache.
    pub(super) fn add(&mut self, sequence: Sequence) {
        let at = self.waiting.partition_point(|other| other.id < sequence.id);
        self.waiting.insert(at, sequence);
    }

    /// Sequences that hold blocks.
    pub(super) fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait for the first time or again.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
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

    /// Plans the next step, over what the plan held. Whatever it says must then be committed or removed.
    pub(super) fn schedule(&mut self, plan: &mut Plan) {
        plan.clear();
        self.grow(plan);
        if plan.preempted == 0 && self.admit(Priority::Interactive, plan) {
            self.admit(Priority::Background, plan);
        }
        // Interactive sequences come first in `running`, so whether there are any is known before the first of the others.
        let mut room =
            if self.running.first().is_some_and(is_interactive) { self.limits.background_rows } else { usize::MAX };
        for sequence in self.running.iter().filter(|sequence| sequence.remaining() == 1) {
            if !is_interactive(sequence) {
                if room == 0 {
                    break;
                }
                room -= 1;
            }
            plan.chunks.push(chunk(sequence, 1));
        }
        plan.decode_rows = plan.chunks.len();
        let mut budget = self.prefill_budget();
        // An interactive request that comes meanwhile waits for this step, so prompts of background ones are always cut short.
        let mut background = room.min(self.limits.prefill_chunk);
        for sequence in self.running.iter().filter(|sequence| sequence.remaining() > 1) {
            let most = if is_interactive(sequence) { budget } else { budget.min(background) };
            let rows = sequence.remaining().min(most);
            if rows == 0 {
                break;
            }
            budget -= rows;
            if !is_interactive(sequence) {
                background -= rows;
            }
            plan.prefill_rows += rows;
            plan.chunks.push(chunk(sequence, rows));
        }
    }

    /// Prompt rows of the next step: fewer if somebody waits for the next token of a stream.
    fn prefill_budget(&self) -> usize {
        let interactive = self.running.iter().take_while(|sequence| is_interactive(sequence));
        let decoding = interactive.into_iter().any(|sequence| sequence.remaining() == 1);
        if decoding { self.limits.prefill_chunk } else { self.limits.idle_prefill_chunk }
    }

    /// Gives every running sequence blocks for all of its tokens, oldest first, from the youngest if need be.
    fn grow(&mut self, plan: &mut Plan) {
        let mut at = 0;
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            if sequence.blocks.len() >= blocks_for(sequence.tokens.len()) {
                at += 1;
            } else if let Some(block) = self.cache.allocate() {
                sequence.blocks.push(block);
            } else if let Some(victim) = self.running.pop() {
                plan.preempted += 1;
                self.suspend(victim);
            }
        }
    }

    /// Puts a sequence back into the queue, at its place.
    fn suspend(&mut self, mut sequence: Sequence) {
        self.cache.release(std::mem::take(&mut sequence.blocks));
        sequence.computed = 0;
        sequence.preemptions += 1;
        let at = self.waiting.partition_point(|other| other.id < sequence.id);
        self.waiting.insert(at, sequence);
    }

    /// Moves sequences of this priority from the queue to the running ones while there is room. Only sequences that wait for another one's prefix
    /// are passed over; one that lacks blocks holds up all behind it: then the answer is false.
    fn admit(&mut self, priority: Priority, plan: &mut Plan) -> bool {
        let prefilling: usize = self.upto(priority).map(Sequence::remaining).filter(|&rows| rows > 1).sum();
        let mut budget = self.prefill_budget().saturating_sub(prefilling);
        let mut at = self.waiting.partition_point(|sequence| sequence.id.priority < priority);
        // Passing over the whole of a long queue in every step would cost more than it gives.
        let horizon = at + 2 * self.limits.max_batch;
        while budget > 0 && at < horizon && self.waiting.get(at).is_some_and(|next| next.id.priority == priority) {
            if self.upto(priority).count() >= self.limits.max_batch {
                break;
            }
            let Some(blocks) = self.cached_prefix(at) else {
                at += 1;
                continue;
            };
            let needed = blocks_for(self.waiting[at].tokens.len()) - blocks.len();
            // A spare block for each running sequence: else the newcomer would be thrown out again soon.
            let spare = self.upto(priority).count();
            if !self.make_room(priority, needed + spare, plan) {
                self.cache.release(blocks);
                return false;
            }
            let Some(mut sequence) = self.waiting.remove(at) else { break };
            sequence.computed = blocks.len() * BLOCK_TOKENS;
            sequence.blocks = blocks;
            sequence.blocks.extend(std::iter::repeat_with(|| self.cache.allocate()).take(needed).flatten());
            sequence.reserve();
            budget = budget.saturating_sub(sequence.remaining());
            if sequence.cached.is_none() {
                sequence.cached = Some(sequence.computed);
                plan.admitted.push(sequence.id);
                plan.cached_tokens += sequence.computed;
            }
            let place = self.running.partition_point(|other| other.id < sequence.id);
            self.running.insert(place, sequence);
        }
        true
    }

    /// Running sequences that do not have to give way to this priority.
    fn upto(&self, priority: Priority) -> impl Iterator<Item = &Sequence> {
        self.running.iter().take_while(move |sequence| sequence.id.priority <= priority)
    }

    /// Makes sure of a place and so many blocks, at the cost of sequences of a lower priority if need be; false, and nobody has lost anything, if that
    /// cannot be done.
    fn make_room(&mut self, priority: Priority, blocks: usize, plan: &mut Plan) -> bool {
        let lower = self.running.iter().filter(|sequence| sequence.id.priority > priority);
        let theirs: usize = lower.map(|sequence| sequence.blocks.len()).sum();
        // Blocks that they share count twice: then room is made that is not enough, and what lost it comes back later.
        if self.cache.pool().available() + theirs < blocks {
            return false;
        }
        while self.running.len() >= self.limits.max_batch || self.cache.pool().available() < blocks {
            let Some(victim) = self.running.pop_if(|last| last.id.priority > priority) else {
                return self.running.len() < self.limits.max_batch && self.cache.pool().available() >= blocks;
            };
            plan.preempted += 1;
            self.suspend(victim);
        }
        true
    }

    /// The cached blocks that a waiting sequence starts with, or None if a running one is about to compute the block after them.
    fn cached_prefix(&mut self, at: usize) -> Option<Vec<Block>> {
        let sequence = &self.waiting[at];
        let Some(chain) = &sequence.chain else { return Some(Vec::new()) };
        let hashes = &chain.hashes()[..sequence.readable_blocks()];
        let blocks = self.cache.lookup(hashes);
        let block = blocks.len();
        // One that may have to wait for its rows is no leader of one that need not.
        let priority = sequence.id.priority;
        let pending = |leader: &Sequence| {
            let theirs = leader.chain.as_ref().and_then(|chain| chain.hashes().get(block));
            leader.computed < (block + 1) * BLOCK_TOKENS && theirs == hashes.get(block)
        };
        if block < hashes.len() && self.upto(priority).any(pending) {
            self.cache.release(blocks);
            return None;
        }
        Some(blocks)
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
    }

    /// Takes a sequence out, wherever it is; its blocks are free or cached at once.
    pub(super) fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let mut sequence = match self.position(id) {
            Some(at) => self.running.remove(at),
            None => {
                let at = self.waiting.binary_search_by_key(&id, |sequence| sequence.id).ok()?;
                self.waiting.remove(at)?
            }
        };
        self.cache.release(std::mem::take(&mut sequence.blocks));
        Some(sequence)
    }

    /// Forgets the cached blocks of a salt. Sequences under it go on and publish nothing more.
    pub(super) fn purge(&mut self, salt: CacheSalt) {
        self.cache.purge(salt);
        for sequence in self.running.iter_mut().chain(&mut self.waiting) {
            sequence.chain.take_if(|chain| chain.salt() == salt);
        }
    }
}

impl Plan {
    fn clear(&mut self) {
        let Self { chunks, admitted, preempted, decode_rows, prefill_rows, cached_tokens } = self;
        chunks.clear();
        admitted.clear();
        (*preempted, *decode_rows, *prefill_rows, *cached_tokens) = (0, 0, 0, 0);
    }
}

fn is_interactive(sequence: &Sequence) -> bool {
    sequence.id.priority == Priority::Interactive
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
