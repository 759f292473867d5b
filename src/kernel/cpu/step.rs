//! A batch, checked, with what the kernels look up by row.

use std::{ops::Range, sync::Arc};

use super::attention::CHUNK_ROWS;
use crate::kernel::{
    BASE_SLOT, BLOCK_TOKENS, Cores, KernelError, StepBatch,
    check::{BatchFacts, check_batch},
};
use crate::types::TokenId;

/// Rows of one sequence that are attended together.
pub(super) struct Chunk {
    pub(super) first_row: usize,
    pub(super) rows: usize,
    /// The sequence's blocks in `CpuStep::blocks`.
    pub(super) blocks: Range<usize>,
}

/// A checked batch.
pub struct CpuStep {
    pub(super) facts: BatchFacts,
    pub(super) tokens: Vec<TokenId>,
    pub(super) positions: Vec<u32>,
    pub(super) slots: Vec<u32>,
    pub(super) cores: Vec<Arc<Cores>>,
    pub(super) logits_rows: Vec<u32>,
    /// For every row [`Cores::active`] of its adapter, 0 on the base.
    pub(super) active: Vec<u32>,
    /// The same of `logits_rows`.
    pub(super) logits_active: Vec<u32>,
    /// Blocks of all sequences, one after another.
    pub(super) blocks: Vec<u32>,
    pub(super) chunks: Vec<Chunk>,
    /// The block that takes each row's key and value.
    pub(super) row_blocks: Vec<u32>,
    /// Whether a row is the last that its sequence has in the step.
    pub(super) last: Vec<bool>,
    /// No sequence has more rows than a chunk: then no chunk needs the keys of another.
    pub(super) chunks_are_sequences: bool,
}

impl CpuStep {
    /// Checks a batch and copies what a step needs of it.
    pub(super) fn new(batch: &StepBatch) -> Result<Self, KernelError> {
        let facts = check_batch(batch)?;
        let active = |&slot: &u32| if slot == BASE_SLOT { 0 } else { batch.cores[slot as usize].active as u32 };
        let active: Vec<u32> = batch.slots.iter().map(active).collect();
        let mut step = Self {
            facts,
            tokens: batch.tokens.clone(),
            positions: batch.positions.clone(),
            slots: batch.slots.clone(),
            cores: batch.cores.clone(),
            logits_rows: batch.logits_rows.clone(),
            logits_active: batch.logits_rows.iter().map(|&row| active[row as usize]).collect(),
            active,
            blocks: Vec::new(),
            chunks: Vec::new(),
            row_blocks: Vec::with_capacity(batch.rows()),
            last: vec![false; batch.rows()],
            chunks_are_sequences: batch.sequences.iter().all(|sequence| sequence.rows <= CHUNK_ROWS),
        };
        for sequence in &batch.sequences {
            let blocks = step.blocks.len()..step.blocks.len() + sequence.blocks.len();
            step.blocks.extend_from_slice(&sequence.blocks);
            for first in (0..sequence.rows).step_by(CHUNK_ROWS) {
                let rows = CHUNK_ROWS.min(sequence.rows - first);
                step.chunks.push(Chunk { first_row: sequence.first_row + first, rows, blocks: blocks.clone() });
            }
            let positions = sequence.start..sequence.start + sequence.rows;
            step.last[sequence.first_row + sequence.rows - 1] = true;
            step.row_blocks.extend(positions.map(|position| sequence.blocks[position / BLOCK_TOKENS]));
        }
        Ok(step)
    }

    /// Rows of the step.
    pub(super) fn rows(&self) -> usize {
        self.tokens.len()
    }
}
