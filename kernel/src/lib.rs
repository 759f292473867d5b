//! The arithmetic of a step, behind one seam.
//!
//! A *step* is one pass of a ragged batch through the model: rows of prefill chunks and of decoding sequences side by
//! side, each row under its own adapter. The model says *what* to compute in terms of [`Backend`];
//! a backend says *how*: [`cpu`] on owned, prepacked buffers, [`candle`] on any candle device.
//!
//! Every frozen linear is `y = W x + b + U (C_row (V^T x))` with orthonormal U `[out, r]` and V `[in, r]` shared by all adapters
//! and an `r x r` core that depends on the row's adapter only. V's columns may be appended to W as r more output rows; the core and U are then
//! an epilogue on the output tile.
//!
//! **Invariant.** The bits of a row's result do not depend on the other rows of the batch, on how a sequence is cut
//! into chunks, or on the number of threads (on CUDA: only with `--deterministic`). So a backend uses one accumulation order for a row whatever the batch size,
//! and attention walks the blocks of a sequence from 0 in fixed tiles for prefill and decode alike.

mod backend;
pub mod candle;
mod check;
#[cfg(test)]
pub(crate) mod counting;
pub mod cpu;
pub mod host;
mod matmul;
pub mod reference;
mod rounding;
#[cfg(test)]
mod suite;
mod timed;
mod weight;

pub use backend::{
    AttentionSpec, Backend, DenseFactors, DensePart, Epilogue, KernelError, KvShape, LinearPart, Precision, Rows,
    SiteFactors,
};
pub use cpu::Floats;
pub use matmul::{Threads, matmul};
pub use timed::{Clock, Part, Timed};
pub use weight::Weight;

use std::sync::Arc;

/// A token's number in the model's vocabulary.
pub type TokenId = u32;

/// Tokens in a KV block. Fixed: the prefix cache hashes whole blocks.
pub const BLOCK_TOKENS: usize = 16;

/// The slot of rows that run on the bare base.
pub const BASE_SLOT: u32 = u32::MAX;

/// One adapter's cores for every site, expanded and zero-padded to the rank of the basis.
#[derive(Debug, Clone, PartialEq)]
pub struct Cores {
    /// The rank r of the basis: cores are r x r.
    pub rank: usize,
    /// `[sites, r, r]`, row-major: `data[s*r*r + i*r + j]` is the entry that takes the j-th column of V to the i-th column of U.
    pub data: Box<[f32]>,
    /// Rows and columns from here on are zero in every core: a backend need not multiply them. At most `rank`.
    pub active: usize,
}

impl Cores {
    /// Cores from their numbers; see [`Cores::data`].
    pub fn new(rank: usize, data: impl Into<Box<[f32]>>) -> Self {
        let data = data.into();
        let reach = |i: usize| (i / rank % rank).max(i % rank) + 1;
        let used = data.iter().enumerate().filter(|(_, value)| **value != 0.0 || value.is_nan());
        let active = used.map(|(i, _)| reach(i)).max().unwrap_or(0);
        Self { rank, data, active }
    }

    /// The `r x r` core of one site, row-major.
    pub fn site(&self, site: usize) -> &[f32] {
        let size = self.rank * self.rank;
        &self.data[site * size..(site + 1) * size]
    }
}

/// The rows that one sequence has in a step: consecutive rows of the batch, consecutive positions of the sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceRows {
    /// First row of the batch.
    pub first_row: usize,
    /// How many rows.
    pub rows: usize,
    /// Position of the first row in its sequence: so many tokens are in the KV cache already.
    pub start: usize,
    /// The sequence's KV blocks in order; they cover at least `start + rows` positions.
    pub blocks: Vec<u32>,
}

/// One ragged step. Everything that a forward pass depends on, besides the weights and the KV cache, is here: there is no ambient state.
#[derive(Debug, Clone, Default)]
pub struct StepBatch {
    /// Token of every row.
    pub tokens: Vec<TokenId>,
    /// Position of every row in its sequence.
    pub positions: Vec<u32>,
    /// Index into `cores` of every row, or [`BASE_SLOT`].
    pub slots: Vec<u32>,
    /// The distinct adapters of this step.
    pub cores: Vec<Arc<Cores>>,
    /// The sequences; together they cover every row once, in order.
    pub sequences: Vec<SequenceRows>,
    /// Rows whose logits somebody reads, ascending.
    pub logits_rows: Vec<u32>,
}

impl StepBatch {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }
}
