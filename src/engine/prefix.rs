//! The prefix cache: which full block holds the KV of which tokens, under which salt.
//!
//! A block's key is a hash chain over (salt, all tokens up to the block's end). The salt is the *key* of the hash, so that blocks of two
//! tenants or two adapters never meet, and a lookup under one salt can learn nothing of another.

use std::collections::HashMap;

use super::blocks::{Block, BlockPool};
use crate::{
    kernel::BLOCK_TOKENS,
    types::{CacheSalt, TokenId},
};

/// Names the contents of one full block.
pub(super) type ChainHash = [u8; 32];

/// The hashes of a sequence's full blocks, in order.
#[derive(Debug, Clone)]
pub(super) struct Chain {
    salt: CacheSalt,
    hashes: Vec<ChainHash>,
}

impl Chain {
    /// The chain of these tokens.
    pub(super) fn new(salt: CacheSalt, tokens: &[TokenId]) -> Self {
        let mut chain = Self { salt, hashes: Vec::with_capacity(tokens.len() / BLOCK_TOKENS) };
        chain.extend(tokens);
        chain
    }

    /// Makes room for the hashes of so many tokens.
    pub(super) fn reserve(&mut self, tokens: usize) {
        self.hashes.reserve_exact((tokens / BLOCK_TOKENS).saturating_sub(self.hashes.len()));
    }

    /// Hashes the blocks that became full. `tokens` are all tokens of the sequence and continue those seen before.
    pub(super) fn extend(&mut self, tokens: &[TokenId]) {
        for block in tokens.chunks_exact(BLOCK_TOKENS).skip(self.hashes.len()) {
            let mut input = [0u8; 32 + 4 * BLOCK_TOKENS];
            if let Some(parent) = self.hashes.last() {
                input[..32].copy_from_slice(parent);
            }
            for (bytes, token) in input[32..].chunks_exact_mut(4).zip(block) {
                bytes.copy_from_slice(&token.to_le_bytes());
            }
            self.hashes.push(*blake3::keyed_hash(&self.salt.0, &input).as_bytes());
        }
    }

    /// Under which salt.
    pub(super) fn salt(&self) -> CacheSalt {
        self.salt
    }

    /// One hash a full block.
    pub(super) fn hashes(&self) -> &[ChainHash] {
        &self.hashes
    }
}

/// The block pool and the index of its kept blocks.
#[derive(Debug)]
pub(super) struct PrefixCache {
    pool: BlockPool,
    /// Of every published block, by hash.
    index: HashMap<ChainHash, u32>,
    /// The same, by block.
    published: Vec<Option<(ChainHash, CacheSalt)>>,
}

impl PrefixCache {
    /// An empty cache over so many blocks.
    pub(super) fn new(blocks: usize) -> Self {
        Self { pool: BlockPool::new(blocks), index: HashMap::new(), published: vec![None; blocks] }
    }

    /// The pool, to count.
    pub(super) fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// A block to write to; forgets what it held. None if every block is held.
    pub(super) fn allocate(&mut self) -> Option<Block> {
        let (block, evicted) = self.pool.allocate()?;
        if evicted {
            self.unindex(block.id());
        }
        Some(block)
    }

    /// Gives blocks of one sequence back, the last ones first: a chain is useless without its start, so the start is evicted last.
    pub(super) fn release(&mut self, blocks: Vec<Block>) {
        for block in blocks.into_iter().rev() {
            self.pool.release(block);
        }
    }

    /// The blocks of the longest known prefix of these hashes.
    pub(super) fn lookup(&mut self, hashes: &[ChainHash]) -> Vec<Block> {
        hashes.iter().map_while(|hash| self.pool.hold(*self.index.get(hash)?)).collect()
    }

    /// Makes a computed block known. If another block has the same contents already, that one stays and this one remains private.
    pub(super) fn publish(&mut self, block: &Block, hash: ChainHash, salt: CacheSalt) {
        let id = block.id();
        if self.published[id as usize].is_some() || self.index.contains_key(&hash) {
            return;
        }
        self.index.insert(hash, id);
        self.published[id as usize] = Some((hash, salt));
        self.pool.keep(block);
    }

    /// Forgets every block published under this salt. Sequences that hold such blocks go on.
    pub(super) fn purge(&mut self, salt: CacheSalt) {
        for id in 0..self.published.len() {
            if self.published[id].is_some_and(|(_, published)| published == salt) {
                self.unindex(id as u32);
                self.pool.forget(id as u32);
            }
        }
    }

    fn unindex(&mut self, id: u32) {
        if let Some((hash, _)) = self.published[id as usize].take() {
            self.index.remove(&hash);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: CacheSalt = CacheSalt([1; 32]);
    const B: CacheSalt = CacheSalt([2; 32]);

    fn fill(cache: &mut PrefixCache, chain: &Chain) -> Vec<u32> {
        let blocks: Vec<Block> = chain.hashes().iter().map(|_| cache.allocate().unwrap()).collect();
        for (block, hash) in blocks.iter().zip(chain.hashes()) {
            cache.publish(block, *hash, chain.salt());
        }
        let ids = blocks.iter().map(Block::id).collect();
        cache.release(blocks);
        ids
    }

    fn found(cache: &mut PrefixCache, chain: &Chain) -> Vec<u32> {
        let blocks = cache.lookup(chain.hashes());
        let ids = blocks.iter().map(Block::id).collect();
        cache.release(blocks);
        ids
    }

    #[test]
    fn a_hash_names_salt_and_all_tokens_before() {
        let tokens: Vec<TokenId> = (0..40).collect();
        let chain = Chain::new(A, &tokens);
        assert_eq!(chain.hashes().len(), 2);
        let mut grown = Chain::new(A, &tokens[..20]);
        grown.extend(&tokens);
        assert_eq!(grown.hashes(), chain.hashes());
        assert_ne!(Chain::new(B, &tokens).hashes()[0], chain.hashes()[0]);
        let mut other = tokens.clone();
        other[0] = 7;
        let other = Chain::new(A, &other);
        assert!(other.hashes()[0] != chain.hashes()[0] && other.hashes()[1] != chain.hashes()[1]);
        // The same 16 tokens at another place are another block.
        let twice = Chain::new(A, &[&tokens[..16], &tokens[..16]].concat());
        assert_ne!(twice.hashes()[0], twice.hashes()[1]);
    }

    #[test]
    fn lookup_finds_the_longest_prefix_of_its_own_salt_only() {
        let mut cache = PrefixCache::new(8);
        let tokens: Vec<TokenId> = (0..48).collect();
        let ids = fill(&mut cache, &Chain::new(A, &tokens));
        assert_eq!(found(&mut cache, &Chain::new(A, &tokens)), ids);
        assert_eq!(found(&mut cache, &Chain::new(A, &tokens[..47])), ids[..2]);
        assert!(found(&mut cache, &Chain::new(B, &tokens)).is_empty());
    }

    #[test]
    fn eviction_takes_the_end_of_a_chain_first() {
        let mut cache = PrefixCache::new(3);
        let chain = Chain::new(A, &(0..48).collect::<Vec<_>>());
        let ids = fill(&mut cache, &chain);
        let block = cache.allocate().unwrap();
        assert_eq!(block.id(), ids[2]);
        assert_eq!(found(&mut cache, &chain), ids[..2]);
        cache.release(vec![block]);
    }

    #[test]
    fn purge_forgets_one_salt_even_where_a_sequence_holds_it() {
        let mut cache = PrefixCache::new(8);
        let tokens: Vec<TokenId> = (0..32).collect();
        let (a, b) = (Chain::new(A, &tokens), Chain::new(B, &tokens));
        fill(&mut cache, &a);
        fill(&mut cache, &b);
        let held = cache.lookup(a.hashes());
        cache.purge(A);
        assert!(found(&mut cache, &a).is_empty());
        assert_eq!(found(&mut cache, &b).len(), 2);
        assert_eq!((cache.pool().free(), cache.pool().idle()), (4, 2));
        cache.release(held);
        assert_eq!((cache.pool().free(), cache.pool().idle()), (6, 2));
    }

    #[test]
    fn the_first_of_two_equal_blocks_stays() {
        let mut cache = PrefixCache::new(4);
        let chain = Chain::new(A, &[5; 16]);
        let first = fill(&mut cache, &chain);
        let second = cache.allocate().unwrap();
        cache.publish(&second, chain.hashes()[0], A);
        cache.release(vec![second]);
        assert_eq!(found(&mut cache, &chain), first);
        assert_eq!((cache.pool().free(), cache.pool().idle()), (3, 1));
    }
}
