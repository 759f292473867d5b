//! Who holds which KV block: reference counts, a free list, and a least-recently-used list of blocks that nobody holds but whose contents are still worth keeping.
//!
//! A held block is a [`Block`], which can be neither copied nor cloned: releasing consumes it, so that a double free does not compile.

/// "No block" in the intrusive list.
const NONE: u32 = u32::MAX;

/// One reference to one KV block. Give it back with [`BlockPool::release`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a block that is dropped instead of released is lost to the pool"]
pub(super) struct Block(u32);

impl Block {
    /// The block's number in the KV cache.
    pub(super) fn id(&self) -> u32 {
        self.0
    }
}

#[derive(Debug, Clone, Copy)]
struct Meta {
    /// Live [`Block`]s with this number.
    holders: u32,
    /// The contents outlive the last holder.
    kept: bool,
    /// Neighbours in the idle list; meaningful only for a kept block without holders.
    older: u32,
    newer: u32,
}

/// The blocks of one KV cache. Every block is exactly one of free, idle (kept, nobody holds it) or held.
#[derive(Debug)]
pub(super) struct BlockPool {
    meta: Vec<Meta>,
    free: Vec<u32>,
    oldest: u32,
    newest: u32,
    idle: usize,
}

impl BlockPool {
    /// All blocks free. Low numbers are given out first.
    pub(super) fn new(blocks: usize) -> Self {
        let meta = vec![Meta { holders: 0, kept: false, older: NONE, newer: NONE }; blocks];
        Self { meta, free: (0..blocks as u32).rev().collect(), oldest: NONE, newest: NONE, idle: 0 }
    }

    /// Blocks of the cache.
    pub(super) fn len(&self) -> usize {
        self.meta.len()
    }

    /// Blocks with nothing in them.
    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that nobody holds but whose contents are kept.
    pub(super) fn idle(&self) -> usize {
        self.idle
    }

    /// Blocks that [`BlockPool::allocate`] could give out.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.idle
    }

    /// Would releasing this reference make the block available?
    pub(super) fn is_sole(&self, block: &Block) -> bool {
        self.meta[block.0 as usize].holders == 1
    }

    /// A block to write to: a free one, or else the idle one that was released longest ago, whose contents are lost.
    /// The flag says the latter. None if every block is held.
    pub(super) fn allocate(&mut self) -> Option<(Block, bool)> {
        let (id, evicted) = match self.free.pop() {
            Some(id) => (id, false),
            None if self.oldest != NONE => (self.oldest, true),
            None => return None,
        };
        if evicted {
            self.unlink(id);
            self.meta[id as usize].kept = false;
        }
        self.meta[id as usize].holders = 1;
        Some((Block(id), evicted))
    }

    /// Another reference to a kept block; None if its contents are not kept.
    pub(super) fn hold(&mut self, id: u32) -> Option<Block> {
        let meta = self.meta.get(id as usize).filter(|meta| meta.kept)?;
        if meta.holders == 0 {
            self.unlink(id);
        }
        self.meta[id as usize].holders += 1;
        Some(Block(id))
    }

    /// Gives a reference back. The last one makes the block idle if it is kept, else free.
    pub(super) fn release(&mut self, block: Block) {
        let id = block.0;
        let meta = &mut self.meta[id as usize];
        meta.holders -= 1;
        if meta.holders == 0 {
            if meta.kept { self.link(id) } else { self.free.push(id) }
        }
    }

    /// The contents of a held block are worth keeping after its last holder.
    pub(super) fn keep(&mut self, block: &Block) {
        self.meta[block.0 as usize].kept = true;
    }

    /// The contents of a kept block are worthless from now on. Its holders, if any, keep their references.
    pub(super) fn forget(&mut self, id: u32) {
        let meta = &mut self.meta[id as usize];
        if !std::mem::take(&mut meta.kept) {
            return;
        }
        if meta.holders == 0 {
            self.unlink(id);
            self.free.push(id);
        }
    }

    fn link(&mut self, id: u32) {
        let older = self.newest;
        let meta = &mut self.meta[id as usize];
        (meta.older, meta.newer) = (older, NONE);
        match older {
            NONE => self.oldest = id,
            older => self.meta[older as usize].newer = id,
        }
        self.newest = id;
        self.idle += 1;
    }

    fn unlink(&mut self, id: u32) {
        let Meta { older, newer, .. } = self.meta[id as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.meta[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.meta[newer as usize].older = older,
        }
        self.idle -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn idle_blocks_are_taken_oldest_first_and_only_when_nothing_is_free() {
        let mut pool = BlockPool::new(3);
        let held: Vec<Block> = (0..3).map(|_| pool.allocate().unwrap().0).collect();
        assert!(pool.allocate().is_none());
        for block in held.into_iter().rev() {
            if block.id() != 1 {
                pool.keep(&block);
            }
            pool.release(block);
        }
        assert_eq!((pool.free(), pool.idle()), (1, 2));
        let order: Vec<(u32, bool)> = (0..3)
            .map(|_| {
                let (block, evicted) = pool.allocate().unwrap();
                (block.id(), evicted)
            })
            .collect();
        assert_eq!(order, [(1, false), (2, true), (0, true)]);
    }

    #[test]
    fn a_forgotten_block_is_free_at_once_or_after_its_last_holder() {
        let mut pool = BlockPool::new(2);
        let (a, _) = pool.allocate().unwrap();
        let (b, _) = pool.allocate().unwrap();
        pool.keep(&a);
        pool.keep(&b);
        let (a_id, b_id) = (a.id(), b.id());
        let again = pool.hold(a_id).unwrap();
        pool.release(b);
        pool.forget(a_id);
        pool.forget(b_id);
        pool.forget(b_id);
        assert!(pool.hold(a_id).is_none() && pool.hold(b_id).is_none() && pool.hold(99).is_none());
        assert_eq!((pool.free(), pool.idle()), (1, 0));
        pool.release(a);
        assert_eq!(pool.free(), 1);
        pool.release(again);
        assert_eq!(pool.free(), 2);
    }

    proptest! {
        /// Against a naive model: counts in a map, idle blocks in a queue.
        #[test]
        fn follows_a_naive_model(ops in prop::collection::vec((0u8..5, any::<prop::sample::Index>()), 0..300)) {
            const BLOCKS: usize = 6;
            let mut pool = BlockPool::new(BLOCKS);
            let mut held: Vec<Block> = Vec::new();
            let mut kept = [false; BLOCKS];
            let mut idle: VecDeque<u32> = VecDeque::new();
            let count = |held: &[Block], id: u32| held.iter().filter(|b| b.id() == id).count();
            for (op, index) in ops {
                match op {
                    0 => match pool.allocate() {
                        Some((block, evicted)) => {
                            prop_assert_eq!(count(&held, block.id()), 0);
                            if evicted {
                                prop_assert_eq!(idle.pop_front(), Some(block.id()));
                            }
                            prop_assert_eq!(std::mem::take(&mut kept[block.id() as usize]), evicted);
                            held.push(block);
                        }
                        None => prop_assert!((0..BLOCKS as u32).all(|id| count(&held, id) > 0)),
                    },
                    1 if !held.is_empty() => {
                        let block = held.swap_remove(index.index(held.len()));
                        let id = block.id();
                        pool.release(block);
                        if count(&held, id) == 0 && kept[id as usize] {
                            idle.push_back(id);
                        }
                    }
                    2 if !held.is_empty() => {
                        let block = &held[index.index(held.len())];
                        pool.keep(block);
                        kept[block.id() as usize] = true;
                    }
                    3 => {
                        let id = index.index(BLOCKS) as u32;
                        let block = pool.hold(id);
                        prop_assert_eq!(block.is_some(), kept[id as usize]);
                        held.extend(block);
                        idle.retain(|&other| other != id || !kept[id as usize]);
                    }
                    4 => {
                        let id = index.index(BLOCKS) as u32;
                        pool.forget(id);
                        kept[id as usize] = false;
                        idle.retain(|&other| other != id);
                    }
                    _ => {}
                }
                let in_use = (0..BLOCKS as u32).filter(|&id| count(&held, id) > 0).count();
                prop_assert_eq!(pool.idle(), idle.len());
                prop_assert_eq!(pool.free() + pool.idle() + in_use, pool.len());
                prop_assert_eq!(pool.available(), BLOCKS - in_use);
            }
        }
    }
}
