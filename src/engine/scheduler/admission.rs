//! Who gets a place in the batch, and who gives one up for it.
//!
//! The next is always the key that was served least. When all places (or blocks) are taken, a key that has less than its part of them takes one from a key that has more
//! than its own part and was served at least as much. Its part is that of its weight among the keys that have anything here, the taker's rounded down and the giver's
//! rounded up: so the giver has no claim to take it back, every such preemption brings the division nearer to the weights, and a key keeps its oldest sequence.
//!
//! A key that had nothing here takes its first place at once: who asks for one thing at a time waits for one step, whatever the others have queued. Who has more to do
//! takes a place only when it is behind by more than the largest sequence of the giver has cost: were they out of step, one would have ended by then; and it is more than the
//! preemption throws away. Else it gets places when sequences end.

use super::{Plan, Scheduler};
use crate::{
    engine::{
        api::{Priority, ShareKey},
        blocks::Block,
        sequence::{Sequence, blocks_for},
        shares::{self, Account, Owner, Part, owner},
    },
    kernel::BLOCK_TOKENS,
};

/// What a sequence lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lack {
    Place,
    /// So many blocks are needed.
    Blocks(usize),
}

/// What a class divides among its keys: the places or blocks that those before it do not hold.
#[derive(Debug, Clone, Copy)]
struct Scarce {
    lack: Lack,
    part: Part,
}

impl Scarce {
    /// What a key has of it.
    fn held(&self, account: &Account) -> usize {
        match self.lack {
            Lack::Place => account.running,
            Lack::Blocks(_) => account.blocks,
        }
    }

    /// Has a key more than its part, and something that it can do without?
    fn is_over(&self, account: &Account) -> bool {
        account.running > 1 && self.held(account) > self.part.ceil(account.weight)
    }

    /// Would a key still have no more than its part?
    fn is_under(&self, account: &Account) -> bool {
        let wanted = if let Lack::Blocks(blocks) = self.lack { blocks } else { 1 };
        self.held(account) + wanted <= self.part.floor(account.weight)
    }
}

/// A sequence that has to give way to those who are behind: the youngest of a key with more than its part.
#[derive(Debug, Clone, Copy)]
struct Giver {
    at: usize,
    key: ShareKey,
    /// Of the key.
    level: u128,
    /// What the largest sequence of the key has cost, by its weight.
    largest: u128,
}

/// A sequence that could be admitted.
#[derive(Debug)]
struct Candidate {
    /// Where in its key's queue.
    at: usize,
    /// Cached blocks that it starts with, held for it.
    prefix: Vec<Block>,
    /// Blocks that it needs besides.
    needed: usize,
}

/// Prompt rows of the next step, while sequences are admitted.
#[derive(Debug, Clone, Copy)]
struct Prefill {
    /// Of this class, to be divided.
    part: Part,
    /// Of sequences that run.
    taken: usize,
}

impl Prefill {
    /// May a sequence of this key come in? Not if it would only hold its blocks while others of the key are computed.
    fn has_room(&self, account: &Account) -> bool {
        self.taken < self.part.whole || account.rows < self.part.ceil(account.weight)
    }
}

impl Scheduler {
    /// Moves sequences of this priority from the queue to the running ones while there is room. Sequences that wait for another one's prefix
    /// are passed over; one that lacks blocks holds up all that are not before it: then the answer is false.
    pub(super) fn admit(&mut self, priority: Priority, plan: &mut Plan) -> bool {
        if self.shares.class(priority).all(|(_, account)| account.waiting.is_empty()) {
            return true;
        }
        let mut prefill = self.prefill(priority);
        while let Some(owner) = self.next(priority, prefill) {
            let Some(candidate) = self.candidate(owner) else { continue };
            // A spare block for each running sequence: else the newcomer would be thrown out again soon.
            let spare = self.class(priority).end;
            if !self.make_room(owner, candidate.needed + spare, plan) {
                self.cache.release(candidate.prefix);
                return false;
            }
            self.enter(owner, candidate, plan);
            prefill = self.prefill(priority);
        }
        true
    }

    /// Counts the prompt rows that sequences of this class and those before it still need, and each key's.
    fn prefill(&mut self, priority: Priority) -> Prefill {
        self.count(priority);
        let rows = |sequences: &[Sequence]| -> usize {
            sequences.iter().map(Sequence::remaining).filter(|&rows| rows > 1).sum()
        };
        let class = self.class(priority);
        let (above, taken) = (rows(&self.running[..class.start]), rows(&self.running[class]));
        let whole = self.prefill_budget().saturating_sub(above);
        Prefill { part: Part { whole, weights: self.shares.weights(priority) }, taken }
    }

    /// The key whose turn it is: of those that may have a place the one with the least level; of equal ones that with the fewest places by its weight, then who came first.
    fn next(&self, priority: Priority, prefill: Prefill) -> Option<Owner> {
        let full = self.class(priority).end >= self.limits.max_batch;
        let scarce = self.scarce(priority, Lack::Place);
        let givers = if full { self.givers(priority, scarce) } else { Vec::new() };
        let turn = |&(key, account): &(ShareKey, &Account)| {
            let first = account.waiting.get(account.next).map(|sequence| sequence.id);
            (account.level(), account.price(account.running), first, key)
        };
        let ready = self.shares.class(priority).filter(|&(key, account)| {
            !account.out
                && account.next < account.waiting.len()
                && prefill.has_room(account)
                && (!full || givers.iter().any(|giver| may_take((key, account), scarce, giver)))
        });
        ready.min_by_key(turn).map(|(key, _)| (priority, key))
    }

    /// The first sequence of a key that need not wait for another's prefix. None: nothing of it in this round.
    fn candidate(&mut self, owner: Owner) -> Option<Candidate> {
        // Passing over the whole of a long queue in every step would cost more than it gives.
        let horizon = 2 * self.limits.max_batch;
        loop {
            let at = self.shares.get(owner)?.next;
            if at < horizon
                && let Some(candidate) = self.ready(owner, at)
            {
                return Some(candidate);
            }
            let account = self.shares.get_mut(owner)?;
            if at >= horizon || at >= account.waiting.len() {
                account.out = true;
                return None;
            }
            account.next += 1;
        }
    }

    /// A waiting sequence with the cached blocks that it starts with, or None if a running one is about to compute the block after them.
    fn ready(&mut self, owner: Owner, at: usize) -> Option<Candidate> {
        let sequence = self.shares.get(owner)?.waiting.get(at)?;
        let all = blocks_for(sequence.tokens.len());
        let Some(chain) = &sequence.chain else { return Some(Candidate { at, prefix: Vec::new(), needed: all }) };
        let hashes = &chain.hashes()[..sequence.readable_blocks()];
        let prefix = self.cache.lookup(hashes);
        let block = prefix.len();
        let pending = |leader: &Sequence| {
            let theirs = leader.chain.as_ref().and_then(|chain| chain.hashes().get(block));
            leader.computed < (block + 1) * BLOCK_TOKENS && theirs == hashes.get(block)
        };
        // One that may have to wait for its rows is no leader of one that need not.
        if block < hashes.len() && self.running[..self.class(owner.0).end].iter().any(pending) {
            self.cache.release(prefix);
            return None;
        }
        Some(Candidate { at, needed: all - block, prefix })
    }

    /// Gives a waiting sequence its place; there is room.
    fn enter(&mut self, owner: Owner, candidate: Candidate, plan: &mut Plan) {
        let Candidate { at, prefix, needed } = candidate;
        let Some(mut sequence) = self.shares.take(owner, at) else { return self.cache.release(prefix) };
        sequence.computed = prefix.len() * BLOCK_TOKENS;
        sequence.blocks = prefix;
        sequence.blocks.extend(std::iter::repeat_with(|| self.cache.allocate()).take(needed).flatten());
        sequence.reserve();
        if sequence.cached.is_none() {
            sequence.cached = Some(sequence.computed);
            plan.admitted.push(sequence.id);
            plan.cached_tokens += sequence.computed;
            if self.shares.get(owner).is_some_and(|account| account.fresh) {
                plan.first_places.push(self.round - sequence.arrived);
            }
        }
        self.shares.enter(&mut sequence);
        let place = self.running.partition_point(|other| other.id < sequence.id);
        self.running.insert(place, sequence);
    }

    /// Makes sure of a place and so many blocks, at the cost of a lower class and of keys with more than their part if need be; false, and nobody has lost anything, if
    /// that cannot be done.
    fn make_room(&mut self, owner: Owner, blocks: usize, plan: &mut Plan) -> bool {
        let class = self.class(owner.0);
        // Blocks that they share count twice: then room is made that is not enough, and what lost it comes back later.
        let lower: usize = self.running[class.end..].iter().map(|sequence| sequence.blocks.len()).sum();
        let lacking = blocks.saturating_sub(self.cache.pool().available() + lower);
        if lacking > 0 && self.obtainable(owner, blocks) < lacking {
            return false;
        }
        loop {
            let lack = if self.running.len() >= self.limits.max_batch {
                Lack::Place
            } else if self.cache.pool().available() < blocks {
                Lack::Blocks(blocks)
            } else {
                return true;
            };
            if self.running.len() > self.class(owner.0).end {
                let Some(victim) = self.victim() else { return false };
                self.suspend(victim, plan);
            } else {
                let Some(giver) = self.giver(owner, lack) else { return false };
                self.suspend(giver.at, plan);
                plan.yielded += 1;
            }
            self.count(owner.0);
        }
    }

    /// All that a class divides of what is lacking.
    fn scarce(&self, priority: Priority, lack: Lack) -> Scarce {
        let above = &self.running[..self.class(priority).start];
        let whole = match lack {
            Lack::Place => self.limits.max_batch.saturating_sub(above.len()),
            Lack::Blocks(_) => {
                let theirs: usize = above.iter().map(|sequence| sequence.blocks.len()).sum();
                self.cache.pool().len().saturating_sub(theirs)
            }
        };
        Scarce { lack, part: Part { whole, weights: self.shares.weights(priority) } }
    }

    /// Of every key with more than its part, the youngest sequence.
    fn givers(&self, priority: Priority, scarce: Scarce) -> Vec<Giver> {
        let over = self.shares.class(priority).filter(|(_, account)| scarce.is_over(account));
        over.filter_map(|(key, account)| {
            let theirs = || self.running.iter().enumerate().filter(|(_, other)| owner(other) == (priority, key));
            let largest = account.price(theirs().map(|(_, sequence)| shares::cost(sequence)).max()?);
            Some(Giver { at: theirs().next_back()?.0, key, level: account.level(), largest })
        })
        .collect()
    }

    /// The one of them that was served most, of those that have to give way to this key.
    fn giver(&self, (priority, key): Owner, lack: Lack) -> Option<Giver> {
        let (account, scarce) = (self.shares.get((priority, key))?, self.scarce(priority, lack));
        let givers = self.givers(priority, scarce).into_iter();
        givers.filter(|giver| may_take((key, account), scarce, giver)).max_by_key(|giver| giver.level)
    }

    /// Blocks that givers would make available to this key, at least: those that are theirs alone.
    fn obtainable(&self, (priority, key): Owner, blocks: usize) -> usize {
        let Some(account) = self.shares.get((priority, key)) else { return 0 };
        let scarce = self.scarce(priority, Lack::Blocks(blocks));
        let givers = self.givers(priority, scarce).into_iter();
        let theirs = |giver: Giver| {
            let from = self.shares.get((priority, giver.key));
            let (mut held, running, part) =
                from.map_or((0, 1, 0), |from| (from.blocks, from.running, scarce.part.ceil(from.weight)));
            let youngest = self.running.iter().rev().filter(move |other| owner(other) == (priority, giver.key));
            let given = youngest.take(running - 1).take_while(move |sequence| {
                let over = held > part;
                held -= sequence.blocks.len();
                over
            });
            given.flat_map(|sequence| &sequence.blocks).filter(|block| self.cache.pool().is_sole(block)).count()
        };
        givers.filter(|giver| may_take((key, account), scarce, giver)).map(theirs).sum()
    }
}

/// Does a giver have to give way to this key?
fn may_take((key, account): (ShareKey, &Account), scarce: Scarce, giver: &Giver) -> bool {
    let behind = |by: u128| account.level() + by <= giver.level;
    key != giver.key && ((account.fresh && behind(0)) || (scarce.is_under(account) && behind(giver.largest)))
}
