//! A batch, checked, and on the device.

use candle_core::{DType, Device, Tensor};

use crate::{
    BASE_SLOT, BLOCK_TOKENS, KernelError, StepBatch,
    check::{BatchFacts, check_batch},
};

/// A checked batch.
pub struct CandleStep {
    pub(super) facts: BatchFacts,
    pub(super) rows: usize,
    /// How many rows' logits are wanted.
    pub(super) logits: usize,
    /// None when there are no rows.
    pub(super) data: Option<Rows>,
}

/// The rows of a step as tensors; indices are u32.
pub(super) struct Rows {
    pub(super) tokens: Tensor,
    pub(super) positions: Tensor,
    /// Entry of `cores` of every row; the base has the last, which is zero.
    pub(super) slots: Tensor,
    /// f32 `[slots + 1, sites, r * r]`; None when no row has an adapter.
    pub(super) cores: Option<Tensor>,
    /// None when no logits are wanted.
    pub(super) logits: Option<Tensor>,
    /// Slot of the cache (block * BLOCK_TOKENS + token) that takes each row's key and value.
    pub(super) cache_slots: Tensor,
    pub(super) sequences: Vec<Sequence>,
}

/// One sequence of a step.
pub(super) struct Sequence {
    pub(super) first_row: usize,
    pub(super) rows: usize,
    /// Slots of the cache of positions `0..start + rows`.
    pub(super) cache_slots: Tensor,
    /// `[1, rows, 1, start + rows]`: 0, or minus infinity where a row must not look; None for a single row, which sees all.
    pub(super) mask: Option<Tensor>,
}

fn cache_slot(blocks: &[u32], position: usize) -> u32 {
    // `CandleKv::new` makes sure that slots fit; a block number that the cache does not have is refused before it is used.
    blocks[position / BLOCK_TOKENS].wrapping_mul(BLOCK_TOKENS as u32).wrapping_add((position % BLOCK_TOKENS) as u32)
}

impl CandleStep {
    /// Checks a batch and copies it to the device.
    pub(super) fn new(batch: &StepBatch, device: &Device) -> Result<Self, KernelError> {
        let facts = check_batch(batch, &mut Vec::new())?;
        let data = if batch.rows() == 0 { None } else { Some(Rows::new(batch, &facts, device)?) };
        Ok(Self { facts, rows: batch.rows(), logits: batch.logits_rows.len(), data })
    }
}

impl Rows {
    fn new(batch: &StepBatch, facts: &BatchFacts, device: &Device) -> Result<Self, KernelError> {
        let base = batch.cores.len() as u32;
        let slots: Vec<u32> = batch.slots.iter().map(|&slot| if slot == BASE_SLOT { base } else { slot }).collect();
        let cores = match facts.rank {
            Some(rank) if facts.adapted && rank > 0 => {
                let mut data: Vec<f32> = batch.cores.iter().flat_map(|cores| cores.data.iter().copied()).collect();
                data.resize((batch.cores.len() + 1) * facts.sites * rank * rank, 0.0);
                Some(Tensor::from_vec(data, (batch.cores.len() + 1, facts.sites, rank * rank), device)?)
            }
            _ => None,
        };
        let mut cache_slots = Vec::with_capacity(batch.rows());
        let mut sequences = Vec::with_capacity(batch.sequences.len());
        for sequence in &batch.sequences {
            let end = sequence.start + sequence.rows;
            let slots: Vec<u32> = (0..end).map(|position| cache_slot(&sequence.blocks, position)).collect();
            cache_slots.extend_from_slice(&slots[sequence.start..]);
            let sees = |i: usize| if i % end <= sequence.start + i / end { 0.0 } else { f32::NEG_INFINITY };
            let mask: Option<Vec<f32>> = (sequence.rows > 1).then(|| (0..sequence.rows * end).map(sees).collect());
            let mask = mask.map(|mask| Tensor::from_vec(mask, (1, sequence.rows, 1, end), device)).transpose()?;
            let cache_slots = Tensor::new(slots, device)?;
            sequences.push(Sequence { first_row: sequence.first_row, rows: sequence.rows, cache_slots, mask });
        }
        let logits = &batch.logits_rows[..];
        Ok(Self {
            tokens: Tensor::new(&batch.tokens[..], device)?,
            positions: Tensor::new(&batch.positions[..], device)?,
            slots: Tensor::new(slots, device)?,
            cores,
            logits: if logits.is_empty() { None } else { Some(Tensor::new(logits, device)?) },
            cache_slots: Tensor::new(cache_slots, device)?.to_dtype(DType::U32)?,
            sequences,
        })
    }
}
