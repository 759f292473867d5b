//! One sequence as the scheduler sees it: tokens, how far its KV is computed, and in which blocks.

use super::{
    api::{Priority, Share},
    blocks::Block,
    prefix::Chain,
};
use crate::{kernel::BLOCK_TOKENS, types::TokenId};

/// Orders sequences as they are served: interactive ones first, each class in order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SequenceId {
    /// The class.
    pub(super) priority: Priority,
    /// Grows in order of arrival, over both classes.
    pub(super) number: u64,
}

/// Blocks that hold so many tokens.
pub(super) fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

/// Blocks that a request needs at its end. The KV of its last token is never computed.
pub(super) fn blocks_at_end(prompt: usize, max_tokens: usize) -> usize {
    blocks_for(prompt + max_tokens.saturating_sub(1))
}

/// A sequence, waiting or running.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Whose turn it is.
    pub(super) id: SequenceId,
    /// Who pays for it.
    pub(super) share: Share,
    /// The prompt and what was generated after it.
    pub(super) tokens: Vec<TokenId>,
    /// Prompt tokens.
    pub(super) prompt: usize,
    /// Tokens to generate at most.
    pub(super) max_tokens: usize,
    /// Tokens whose KV is in `blocks`.
    pub(super) computed: usize,
    /// In order; empty while waiting.
    pub(super) blocks: Vec<Block>,
    /// None: this sequence neither reads nor fills the prefix cache.
    pub(super) chain: Option<Chain>,
    /// Somebody reads the logits of every prompt position.
    pub(super) score_prompt: bool,
    /// Leading prompt positions whose logits were read; survives preemption.
    pub(super) scored: usize,
    /// Prompt tokens found in the cache at the first admission; None before it.
    pub(super) cached: Option<usize>,
    /// Leading prompt tokens that were paid for or came from the cache; survives preemption, so that nobody pays for being preempted.
    pub(super) paid: usize,
    /// The round of the scheduler in which it came.
    pub(super) arrived: u64,
    /// How often the blocks were taken away.
    pub(super) preemptions: usize,
}

impl Sequence {
    /// A sequence that has just arrived.
    pub(super) fn new(
        id: SequenceId,
        share: Share,
        tokens: Vec<TokenId>,
        max_tokens: usize,
        chain: Option<Chain>,
        score_prompt: bool,
    ) -> Self {
        let prompt = tokens.len();
        Self {
            id,
            share,
            tokens,
            prompt,
            max_tokens,
            computed: 0,
            blocks: Vec::new(),
            chain,
            score_prompt,
            scored: 0,
            cached: None,
            paid: 0,
            arrived: 0,
            preemptions: 0,
        }
    }

    /// Makes room for all that it can become, so that no step has to.
    pub(super) fn reserve(&mut self) {
        let rest = self.prompt + self.max_tokens - self.tokens.len();
        self.tokens.reserve_exact(rest);
        let blocks = blocks_at_end(self.prompt, self.max_tokens).max(self.blocks.len());
        self.blocks.reserve_exact(blocks - self.blocks.len());
        if let Some(chain) = &mut self.chain {
            chain.reserve(self.prompt + self.max_tokens);
        }
    }

    /// Tokens generated so far.
    pub(super) fn generated(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    /// Prompt tokens that nobody has paid for.
    pub(super) fn unpaid(&self) -> usize {
        self.prompt - self.paid
    }

    /// Tokens whose KV is still to be computed.
    pub(super) fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Full blocks at the start that may come from the cache. The last token is always computed, for its logits, and so is every
    /// prompt position whose logits are still to be read.
    pub(super) fn readable_blocks(&self) -> usize {
        let last = self.tokens.len() - 1;
        let unread = self.score_prompt && self.scored < self.prompt - 1;
        (if unread { last.min(self.scored) } else { last }) / BLOCK_TOKENS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_least_the_last_token_and_all_unread_positions_are_computed() {
        let id = SequenceId { priority: Priority::Interactive, number: 0 };
        let mut sequence = Sequence::new(id, Share::default(), vec![1; 33], 4, None, false);
        assert_eq!(sequence.readable_blocks(), 2);
        sequence.tokens.pop();
        sequence.prompt -= 1;
        assert_eq!(sequence.readable_blocks(), 1);
        sequence.score_prompt = true;
        assert_eq!(sequence.readable_blocks(), 0);
        sequence.scored = 20;
        assert_eq!(sequence.readable_blocks(), 1);
        sequence.scored = 31;
        assert_eq!(sequence.readable_blocks(), 1);
        sequence.tokens.push(9);
        assert_eq!(sequence.readable_blocks(), 2);
    }

    #[test]
    fn the_last_token_needs_no_block() {
        assert_eq!(blocks_at_end(16, 0), 1);
        assert_eq!(blocks_at_end(16, 1), 1);
        assert_eq!(blocks_at_end(16, 2), 2);
        assert_eq!(blocks_at_end(1, 16), 1);
        assert_eq!(blocks_at_end(1, 17), 2);
    }
}
