//! Attention of one piece over the pieces it sees, and its way back.

use candle_core::{Result, Tensor};

use super::ops::{Heads, causal_softmax, softmax_back};
use crate::kernel::{Threads, matmul};

/// Pieces run side by side.
const ALONE: Threads = Threads::One;

/// Queries, keys and values of a piece's rows.
#[derive(Clone)]
pub(super) struct Rows {
    /// Divided by the root of `head_dim`: `[kv_heads, rows * group, head_dim]`, where `group` query heads share a key head.
    q: Tensor,
    /// `[kv_heads, rows, head_dim]`.
    k: Tensor,
    v: Tensor,
}

/// What the way back needs of the way there.
pub(super) struct Attended {
    /// `[rows, heads * head_dim]`.
    pub(super) mixed: Tensor,
    /// Of all keys that are seen, `[kv_heads, keys, head_dim]`.
    keys: Tensor,
    values: Tensor,
    /// `[kv_heads, rows * group, keys]`.
    weights: Tensor,
}

/// Derivatives by what [`attend`] took.
pub(super) struct Back {
    /// `[rows, heads * head_dim]`.
    pub(super) q: Tensor,
    /// Of all keys that were seen, `[kv_heads, keys, head_dim]`.
    pub(super) keys: Tensor,
    pub(super) values: Tensor,
}

fn scale(heads: &Heads) -> f64 {
    1.0 / (heads.head_dim as f64).sqrt()
}

/// `[rows, count * head_dim]` to `[kv_heads, rows * count / kv_heads, head_dim]`.
fn by_key_head(heads: &Heads, x: &Tensor) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let group = width / heads.head_dim / heads.kv_heads;
    let x = x.contiguous()?.reshape((rows, heads.kv_heads, group, heads.head_dim))?;
    x.transpose(0, 1)?.contiguous()?.reshape((heads.kv_heads, rows * group, heads.head_dim))
}

/// The way back of [`by_key_head`].
pub(super) fn by_row(heads: &Heads, x: &Tensor, rows: usize) -> Result<Tensor> {
    let group = x.dims()[1] / rows;
    let x = x.reshape((heads.kv_heads, rows, group, heads.head_dim))?.transpose(0, 1)?;
    x.contiguous()?.reshape((rows, heads.kv_heads * group * heads.head_dim))
}

impl Rows {
    /// From rows of what [`Heads::forward`] made.
    pub(super) fn new(heads: &Heads, qkv: &Tensor) -> Result<Self> {
        let (q, kv) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
        let part = |first, width| by_key_head(heads, &qkv.narrow(1, first, width)?);
        Ok(Self { q: (part(0, q)? * scale(heads))?, k: part(q, kv)?, v: part(q + kv, kv)? })
    }

    fn rows(&self) -> usize {
        self.k.dims()[1]
    }

    /// Nothing, in the shape of keys and values.
    pub(super) fn zeros(&self) -> Result<(Tensor, Tensor)> {
        Ok((self.k.zeros_like()?, self.v.zeros_like()?))
    }
}

/// The rows of the last piece attend to all of the others and, causally, to themselves.
pub(super) fn attend(heads: &Heads, seen: &[&Rows]) -> Result<Attended> {
    let own = seen[seen.len() - 1];
    let join = |of: fn(&Rows) -> &Tensor| match seen {
        [alone] => Ok(of(alone).clone()),
        _ => Tensor::cat(&seen.iter().map(|rows| of(rows)).collect::<Vec<_>>(), 1),
    };
    let (keys, values) = (join(|rows| &rows.k)?, join(|rows| &rows.v)?);
    let rows = own.rows();
    let scores = matmul(&own.q, &keys.t()?, ALONE)?;
    let weights = causal_softmax(&scores, rows)?;
    let mixed = by_row(heads, &matmul(&weights, &values, ALONE)?, rows)?;
    Ok(Attended { mixed, keys, values, weights })
}

/// `d` is the derivative by `mixed`.
pub(super) fn back(heads: &Heads, own: &Rows, attended: &Attended, d: &Tensor) -> Result<Back> {
    let Attended { keys, values, weights, .. } = attended;
    let d = by_key_head(heads, d)?;
    let d_values = matmul(&weights.t()?, &d, ALONE)?;
    let d_weights = matmul(&d, &values.t()?, ALONE)?;
    let d_scores = softmax_back(weights, &d_weights)?;
    let q = (by_row(heads, &matmul(&d_scores, keys, ALONE)?, own.rows())? * scale(heads))?;
    let d_keys = matmul(&d_scores.t()?, &own.q, ALONE)?;
    Ok(Back { q, keys: d_keys, values: d_values })
}
