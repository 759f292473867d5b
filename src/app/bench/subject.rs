//! A model in this process, and adapters for it.

use std::sync::Arc;

use crate::{
    adapter::{Expander, Facts, Interner, NumberType, Scheme},
    app::{
        AppError,
        base::{self, Prepared},
    },
    config::ModelArgs,
    kernel::{BASE_SLOT, BLOCK_TOKENS, Clock, Cores, Precision, SequenceRows, StepBatch},
    model::{Model, TransformerOptions},
    types::TokenId,
};

use super::inputs::{Random, adapter_bytes};

/// How large a subject must be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    /// Distinct adapters.
    pub(super) adapters: usize,
    /// Longest sequence.
    pub(super) positions: usize,
    /// KV blocks.
    pub(super) blocks: usize,
}

/// A packed model with adapters.
pub(super) struct Subject {
    /// Its name.
    pub(super) name: String,
    /// How its weights are held.
    pub(super) precision: Precision,
    /// The forward pass.
    pub(super) model: Box<dyn Model>,
    /// Expanded adapters.
    pub(super) cores: Vec<Arc<Cores>>,
    /// The rank of the basis that it is packed with.
    pub(super) rank: usize,
    /// Sites that cores cover.
    pub(super) sites: usize,
}

impl Subject {
    /// Loads and packs, as `mote serve` does.
    ///
    /// # Errors
    /// The flags do not fit the model, or it does not load.
    pub(super) fn load(args: &ModelArgs, size: Size, clock: Option<Arc<Clock>>) -> Result<Self, AppError> {
        let Prepared { name, loaded, basis } = base::prepare(args)?;
        let (spec, weights) = (loaded.spec, loaded.weights);
        if size.positions > spec.max_positions {
            let (wanted, most) = (size.positions, spec.max_positions);
            return Err(AppError::Flag(format!("sequences of {wanted} tokens: the model was made for at most {most}")));
        }
        let basis = Arc::new(basis);
        let expander = Expander::new(spec.sites(), basis.clone(), usize::from(args.rank));
        let cores = (0..size.adapters as u64).map(|n| cores(&expander, n)).collect::<Result<_, _>>()?;
        let precision = base::precision(args.dtype, &weights);
        let options = TransformerOptions { precision, max_positions: size.positions, kv_blocks: size.blocks.max(1) };
        let sites = spec.sites().len();
        let model = base::pack(args, usize::MAX, spec, weights, &basis, options, clock)?;
        Ok(Self { name, precision, model, cores, rank: basis.rank, sites })
    }
}

fn cores(expander: &Expander, n: u64) -> Result<Arc<Cores>, AppError> {
    let scheme = Scheme::tiny13();
    let numbers = scheme.numbers(expander.sites());
    let fingerprint = expander.basis().fingerprint;
    let facts = Facts { scheme, frame: None, fingerprint, dtype: NumberType::Bf16, approximate: false };
    let refused = |error: &dyn std::fmt::Display| AppError::Flag(format!("--adapters: {error}"));
    let adapter = Interner::new().adapter(facts, &adapter_bytes(n), numbers).map_err(|error| refused(&error))?;
    expander.expand(&[(&adapter, 1.0)]).map_err(|error| refused(&error))
}

/// Some rows of one sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    /// Which sequence: it has the blocks from `sequence * blocks_each`.
    pub(super) sequence: usize,
    /// Positions before the first row.
    pub(super) start: usize,
    /// How many rows.
    pub(super) rows: usize,
    /// Under which adapter.
    pub(super) slot: Option<usize>,
}

/// A step of these pieces, of tokens below `vocab`; the logits of each piece's last row are read if `logits` says so.
pub(super) fn batch(
    pieces: &[Piece],
    blocks_each: usize,
    vocab: usize,
    cores: &[Arc<Cores>],
    logits: bool,
) -> StepBatch {
    let mut batch = StepBatch { cores: cores.to_vec(), ..StepBatch::default() };
    for &Piece { sequence, start, rows, slot } in pieces {
        let first_row = batch.rows();
        let mut random = Random((sequence * 1_000_003 + start) as u64);
        batch.tokens.extend((0..rows).map(|_| random.below(vocab) as TokenId));
        batch.positions.extend((start..start + rows).map(|position| position as u32));
        batch.slots.extend(std::iter::repeat_n(slot.map_or(BASE_SLOT, |slot| slot as u32), rows));
        let blocks = sequence * blocks_each..sequence * blocks_each + (start + rows).div_ceil(BLOCK_TOKENS);
        let blocks = blocks.map(|block| block as u32).collect();
        batch.sequences.push(SequenceRows { first_row, rows, start, blocks });
        if logits && rows > 0 {
            batch.logits_rows.push((first_row + rows - 1) as u32);
        }
    }
    batch
}
