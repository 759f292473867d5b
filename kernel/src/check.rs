//! Whether a batch makes sense: the checks that every backend's `begin` shares.

use std::ops::Range;

use super::{AttentionSpec, BASE_SLOT, BLOCK_TOKENS, Cores, Epilogue, KernelError, KvShape, LinearPart, StepBatch};
use crate::TokenId;

/// A [`KernelError::Shape`] with this message.
pub(super) fn shape(message: impl Into<String>) -> KernelError {
    KernelError::Shape(message.into())
}

/// Refuses with this message unless the condition holds.
pub(super) fn ensure(condition: bool, message: impl FnOnce() -> String) -> Result<(), KernelError> {
    if condition { Ok(()) } else { Err(KernelError::Shape(message())) }
}

/// Facts about a batch that passed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct BatchFacts {
    /// Rank of the cores; None when the batch has none.
    pub(super) rank: Option<usize>,
    /// Sites that every core covers (`usize::MAX` at rank 0: a 0 x 0 core covers them all).
    pub(super) sites: usize,
    /// Some row runs under an adapter.
    pub(super) adapted: bool,
    /// One more than the largest block number.
    pub(super) block_limit: usize,
    /// One more than the largest position.
    pub(super) position_limit: usize,
    /// One more than the largest token.
    pub(super) token_limit: usize,
}

/// Checks a batch once, so that no later operation of the step can go out of bounds because of it.
///
/// `written` is room that it uses. Besides sizes this makes sure that no KV block is written by two sequences (or twice by one): two threads could write one slot.
pub(super) fn check_batch(batch: &StepBatch, written: &mut Vec<u32>) -> Result<BatchFacts, KernelError> {
    let rows = batch.rows();
    let per_row = |name: &str, len: usize| ensure(len == rows, || format!("{name}: {len} entries for {rows} rows"));
    per_row("positions", batch.positions.len())?;
    per_row("slots", batch.slots.len())?;
    for (row, &slot) in batch.slots.iter().enumerate() {
        ensure(slot == BASE_SLOT || (slot as usize) < batch.cores.len(), || {
            format!("slots: row {row} has slot {slot}, the batch has {} cores", batch.cores.len())
        })?;
    }
    let (rank, sites) = check_cores(batch)?;
    let block_limit = check_sequences(batch, written)?;
    for (i, &row) in batch.logits_rows.iter().enumerate() {
        ensure((row as usize) < rows, || format!("logits_rows: row {row} of {rows}"))?;
        ensure(i == 0 || batch.logits_rows[i - 1] < row, || format!("logits_rows: not ascending at entry {i}"))?;
    }
    Ok(BatchFacts {
        rank,
        sites,
        adapted: batch.slots.iter().any(|&slot| slot != BASE_SLOT),
        block_limit,
        position_limit: batch.positions.iter().max().map_or(0, |&p| p as usize + 1),
        token_limit: batch.tokens.iter().max().map_or(0, |&t| t as usize + 1),
    })
}

fn check_cores(batch: &StepBatch) -> Result<(Option<usize>, usize), KernelError> {
    let Some(first) = batch.cores.first() else { return Ok((None, 0)) };
    let size = first.rank * first.rank;
    for (i, cores) in batch.cores.iter().enumerate() {
        ensure(cores.rank == first.rank, || format!("cores: rank {} beside rank {}", cores.rank, first.rank))?;
        ensure(cores.data.len() == first.data.len() && (size == 0 || cores.data.len().is_multiple_of(size)), || {
            format!("cores: entry {i} has {} numbers at rank {}", cores.data.len(), cores.rank)
        })?;
    }
    Ok((Some(first.rank), first.data.len().checked_div(size).unwrap_or(usize::MAX)))
}

/// Returns one more than the largest block number.
fn check_sequences(batch: &StepBatch, written: &mut Vec<u32>) -> Result<usize, KernelError> {
    let mut next_row = 0;
    written.clear();
    for (i, sequence) in batch.sequences.iter().enumerate() {
        ensure(sequence.first_row == next_row && sequence.rows > 0, || {
            format!(
                "sequences: entry {i} has {} rows from row {}, expected row {next_row}",
                sequence.rows, sequence.first_row
            )
        })?;
        let end = next_row.checked_add(sequence.rows).filter(|&end| end <= batch.rows());
        let end =
            end.ok_or_else(|| shape(format!("sequences: entry {i} ends after the batch's {} rows", batch.rows())))?;
        let tokens = sequence.start.checked_add(sequence.rows).filter(|&tokens| tokens <= u32::MAX as usize);
        let tokens =
            tokens.ok_or_else(|| shape(format!("sequences: entry {i} starts at position {}", sequence.start)))?;
        ensure(sequence.blocks.len() >= tokens.div_ceil(BLOCK_TOKENS), || {
            format!("sequences: entry {i} has {} blocks for {tokens} tokens", sequence.blocks.len())
        })?;
        for (offset, row) in (next_row..end).enumerate() {
            ensure(batch.positions[row] as usize == sequence.start + offset, || {
                format!("positions: row {row} has {}, expected {}", batch.positions[row], sequence.start + offset)
            })?;
        }
        written.extend_from_slice(&sequence.blocks[sequence.start / BLOCK_TOKENS..tokens.div_ceil(BLOCK_TOKENS)]);
        next_row = end;
    }
    ensure(next_row == batch.rows(), || format!("sequences: they cover {next_row} of {} rows", batch.rows()))?;
    written.sort_unstable();
    if let Some(pair) = written.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(shape(format!("sequences: block {} is written twice", pair[0])));
    }
    let all = batch.sequences.iter().flat_map(|sequence| &sequence.blocks);
    Ok(all.max().map_or(0, |&block| block as usize + 1))
}

impl LinearPart<'_> {
    /// Checks the sizes of one part of a group with so many inputs.
    pub(super) fn check(&self, inputs: usize) -> Result<(), KernelError> {
        let (outputs, cols) = (self.weight.rows, self.weight.cols);
        ensure(cols == inputs, || format!("linear: {cols} inputs beside a part with {inputs}"))?;
        if let Some(bias) = self.bias {
            ensure(bias.len() == outputs, || format!("linear: a bias of {} for {outputs} outputs", bias.len()))?;
        }
        if let Some(factors) = self.factors {
            let rank = factors.rank;
            ensure(Some(factors.u.len()) == outputs.checked_mul(rank), || {
                format!("linear: U of site {} has {} numbers, not {outputs} x {rank}", factors.site, factors.u.len())
            })?;
            ensure(Some(factors.v.len()) == inputs.checked_mul(rank), || {
                format!("linear: V of site {} has {} numbers, not {inputs} x {rank}", factors.site, factors.v.len())
            })?;
        }
        Ok(())
    }
}

impl AttentionSpec {
    /// Checks that the sizes fit one another.
    pub(super) fn check(&self) -> Result<(), KernelError> {
        let head_dim = self.head_dim;
        ensure(head_dim > 0 && head_dim.is_multiple_of(2), || format!("head_dim: {head_dim} is not even"))?;
        ensure(self.kv_heads > 0 && self.heads > 0 && self.heads.is_multiple_of(self.kv_heads), || {
            format!("kv_heads: {} does not divide {} heads", self.kv_heads, self.heads)
        })?;
        for (name, norm) in [("q_norm", &self.q_norm), ("k_norm", &self.k_norm)] {
            let len = norm.as_ref().map_or(head_dim, |(weight, _)| weight.len());
            ensure(len == head_dim, || format!("{name}: {len} weights for a head of {head_dim}"))?;
        }
        ensure(self.cos.len() == self.sin.len(), || {
            format!("rope: {} cosines, {} sines", self.cos.len(), self.sin.len())
        })
    }

    /// Positions that the rotary table covers.
    pub(super) fn positions(&self) -> usize {
        self.cos.len() / (self.head_dim / 2)
    }
}

impl KvShape {
    /// Tokens of all layers and blocks, provided that the whole cache can be addressed.
    pub(super) fn tokens(&self) -> Result<usize, KernelError> {
        let tokens = self.layers.checked_mul(self.blocks).and_then(|blocks| blocks.checked_mul(BLOCK_TOKENS));
        // Eight bytes a number is more than any layout takes.
        let bytes = |tokens: usize| {
            tokens.checked_mul(self.kv_heads)?.checked_mul(self.head_dim.next_multiple_of(16))?.checked_mul(8)
        };
        tokens.filter(|&tokens| bytes(tokens).is_some_and(|bytes| bytes <= isize::MAX as usize)).ok_or_else(|| {
            shape(format!("kv cache: {} layers of {} blocks cannot be addressed", self.layers, self.blocks))
        })
    }
}

/// Checks the widths of a product: of its parts, of the norm before it, and of what it is stored to.
pub(super) fn check_product(
    parts: &[usize],
    norm: Option<usize>,
    inputs: usize,
    epilogue: Epilogue,
    out: usize,
) -> Result<(), KernelError> {
    let outputs: usize = parts.iter().sum();
    if let Some(width) = norm {
        ensure(width == inputs, || format!("product: a norm of {width} for {inputs} inputs"))?;
    }
    let expected = match epilogue {
        Epilogue::Store | Epilogue::Add => outputs,
        Epilogue::SwiGlu => {
            ensure(parts.len() == 2 && parts[0] == parts[1], || {
                format!("product: SwiGlu needs gate and up, not {parts:?}")
            })?;
            parts[0]
        }
    };
    ensure(out == expected, || format!("product: {expected} outputs into a buffer of {out}"))
}

/// Checks that the cores of a step fit an adapted linear.
pub(super) fn check_factors(facts: &BatchFacts, rank: usize, site: usize) -> Result<(), KernelError> {
    let Some(cores) = facts.rank else { return Ok(()) };
    ensure(cores == rank, || format!("cores: rank {cores}, the linear of site {site} was packed with rank {rank}"))?;
    ensure(site < facts.sites, || format!("cores: {} sites, the linear is site {site}", facts.sites))
}

/// Checks what [`super::Backend::dense`] is asked for: rows of a group with so many outputs, under cores that fit its sites (number and rank each).
pub(super) fn check_dense(
    outputs: usize,
    wanted: &Range<usize>,
    cores: Option<&Cores>,
    mut sites: impl Iterator<Item = (usize, usize)>,
) -> Result<(), KernelError> {
    ensure(wanted.start <= wanted.end && wanted.end <= outputs, || format!("dense: rows {wanted:?} of {outputs}"))?;
    let Some(cores) = cores else { return Ok(()) };
    sites.try_for_each(|(site, rank)| {
        ensure(cores.rank == rank, || {
            format!("cores: rank {}, the linear of site {site} has rank {rank}", cores.rank)
        })?;
        let size = rank * rank;
        ensure((site + 1) * size <= cores.data.len(), || {
            format!("cores: {} sites, the linear is site {site}", cores.data.len() / size.max(1))
        })
    })
}

/// Checks tokens that are to be embedded.
pub(super) fn check_tokens(tokens: &[TokenId], vocab: usize) -> Result<(), KernelError> {
    match tokens.iter().find(|&&token| token as usize >= vocab) {
        Some(token) => Err(shape(format!("tokens: {token} is not below {vocab}"))),
        None => Ok(()),
    }
}

/// Adds an adapter's update to one row of a frozen matrix: `row += sum_j (sum_i u_i C_ij) v_j`, where `v` holds the `rank` vectors V^T one after another.
pub(super) fn add_update(row: &mut [f32], u: impl Fn(usize) -> f32, core: &[f32], v: &[f32]) {
    let rank = core.len().isqrt();
    for (j, v) in v.chunks_exact(row.len()).enumerate() {
        let factor: f64 = (0..rank).map(|i| f64::from(u(i)) * f64::from(core[i * rank + j])).sum();
        if factor != 0.0 {
            let factor = factor as f32;
            row.iter_mut().zip(v).for_each(|(row, v)| *row += factor * v);
        }
    }
}

/// Checks that a step fits the attention of a layer and its cache.
pub(super) fn check_attend(
    facts: &BatchFacts,
    spec: &AttentionSpec,
    kv: &KvShape,
    layer: usize,
    qkv: usize,
    out: usize,
) -> Result<(), KernelError> {
    let (heads, kv_heads, head_dim) = (spec.heads, spec.kv_heads, spec.head_dim);
    ensure(kv.kv_heads == kv_heads && kv.head_dim == head_dim, || {
        format!("attend: a cache of {} x {} for {kv_heads} heads of {head_dim}", kv.kv_heads, kv.head_dim)
    })?;
    ensure(layer < kv.layers, || format!("attend: layer {layer} of a cache of {}", kv.layers))?;
    ensure(qkv == (heads + 2 * kv_heads) * head_dim, || format!("attend: q|k|v is {qkv} wide"))?;
    ensure(out == heads * head_dim, || format!("attend: the result is {} wide, the buffer {out}", heads * head_dim))?;
    ensure(facts.block_limit <= kv.blocks, || format!("blocks: {} of {}", facts.block_limit - 1, kv.blocks))?;
    ensure(facts.position_limit <= spec.positions(), || {
        format!("positions: {}, the rotary table ends at {}", facts.position_limit - 1, spec.positions())
    })
}
