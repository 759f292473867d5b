//! A batch, checked, with what the kernels look up by row.

use std::{ops::Range, sync::Arc};

use super::attention::CHUNK_ROWS;
use crate::TokenId;
use crate::{
    BASE_SLOT, BLOCK_TOKENS, Cores, KernelError, StepBatch,
    check::{BatchFacts, check_batch},
};

/// Rows of one sequence that are attended together.
pub(super) struct Chunk {
    pub(super) first_row: usize,
    pub(super) rows: usize,
    /// The sequence's blocks in `CpuStep::blocks`.
    pub(super) blocks: Range<usize>,
}

/// The cores of a step where a layer finds them side by side: an adapter's own lie as far apart as all its sites are long.
#[derive(Default)]
pub(super) struct Mixing {
    /// Largest [`Cores::active`] of the step.
    rank: usize,
    slots: usize,
    /// `[sites, slots, rank, rank]`
    data: Vec<f32>,
    /// Whose cores these are, slot by slot: most steps have those of the step before.
    gathered: Vec<Arc<Cores>>,
}

impl Mixing {
    /// Gathers the cores, as far as they are not zero.
    fn gather(&mut self, cores: &[Arc<Cores>], sites: usize) {
        let rank = cores.iter().map(|cores| cores.active).max().unwrap_or(0);
        let size = rank * rank;
        let length = if size > 0 { sites * cores.len() * size } else { 0 };
        if (self.rank, self.slots, self.data.len()) != (rank, cores.len(), length) {
            (self.rank, self.slots) = (rank, cores.len());
            self.data.resize(length, 0.0);
            self.gathered.clear();
        }
        if size == 0 {
            return;
        }
        for (slot, cores) in cores.iter().enumerate() {
            match self.gathered.get_mut(slot) {
                // It is kept alive here, so that nothing else has its address.
                Some(gathered) if Arc::ptr_eq(gathered, cores) => continue,
                Some(gathered) => *gathered = cores.clone(),
                None => self.gathered.push(cores.clone()),
            }
            for (site, core) in cores.data.chunks_exact(cores.rank * cores.rank).enumerate() {
                let to = &mut self.data[(site * self.slots + slot) * size..][..size];
                for (to, from) in to.chunks_exact_mut(rank).zip(core.chunks_exact(cores.rank)) {
                    to.copy_from_slice(&from[..rank]);
                }
            }
        }
    }

    /// The core of a site for a slot, and its rank.
    pub(super) fn core(&self, site: usize, slot: u32) -> (&[f32], usize) {
        let size = self.rank * self.rank;
        (&self.data[(site * self.slots + slot as usize) * size..][..size], self.rank)
    }
}

/// A checked batch. Its vectors are filled anew step after step, and grow to the largest.
#[derive(Default)]
pub struct CpuStep {
    pub(super) facts: BatchFacts,
    pub(super) tokens: Vec<TokenId>,
    pub(super) positions: Vec<u32>,
    pub(super) slots: Vec<u32>,
    pub(super) mixing: Mixing,
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
    /// Room for the check of the batch.
    written: Vec<u32>,
}

impl CpuStep {
    /// Checks a batch and copies what a step needs of it.
    pub(super) fn fill(&mut self, batch: &StepBatch) -> Result<(), KernelError> {
        self.facts = check_batch(batch, &mut self.written)?;
        if self.facts.adapted {
            self.mixing.gather(&batch.cores, self.facts.sites);
        }
        let active = |&slot: &u32| if slot == BASE_SLOT { 0 } else { batch.cores[slot as usize].active as u32 };
        self.active.clear();
        self.active.extend(batch.slots.iter().map(active));
        self.logits_active.clear();
        self.logits_active.extend(batch.logits_rows.iter().map(|&row| self.active[row as usize]));
        self.tokens.clone_from(&batch.tokens);
        self.positions.clone_from(&batch.positions);
        self.slots.clone_from(&batch.slots);
        self.logits_rows.clone_from(&batch.logits_rows);
        self.blocks.clear();
        self.chunks.clear();
        self.row_blocks.clear();
        self.last.clear();
        self.last.resize(batch.rows(), false);
        self.chunks_are_sequences = batch.sequences.iter().all(|sequence| sequence.rows <= CHUNK_ROWS);
        for sequence in &batch.sequences {
            let blocks = self.blocks.len()..self.blocks.len() + sequence.blocks.len();
            self.blocks.extend_from_slice(&sequence.blocks);
            for first in (0..sequence.rows).step_by(CHUNK_ROWS) {
                let rows = CHUNK_ROWS.min(sequence.rows - first);
                self.chunks.push(Chunk { first_row: sequence.first_row + first, rows, blocks: blocks.clone() });
            }
            let positions = sequence.start..sequence.start + sequence.rows;
            self.last[sequence.first_row + sequence.rows - 1] = true;
            self.row_blocks.extend(positions.map(|position| sequence.blocks[position / BLOCK_TOKENS]));
        }
        Ok(())
    }

    /// Rows of the step.
    pub(super) fn rows(&self) -> usize {
        self.tokens.len()
    }
}
