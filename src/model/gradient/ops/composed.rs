//! In candle's operations, for any device.

use candle_core::{D, DType, Device, Result, Tensor};

use super::{Exponentials, Heads, Norm};

/// `1 / sqrt(mean(x^2) + epsilon)` over the last dimension, which stays with size 1.
fn inverse(x: &Tensor, epsilon: f32) -> Result<Tensor> {
    (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(epsilon))?.sqrt()?.recip()
}

/// `i (w dy - x i^2 mean(w dy x))`, where i is the inverse root.
fn norm_back_alone(norm: &Norm, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let inverse = inverse(x, norm.epsilon)?;
    let weighted = dy.broadcast_mul(&norm.weight)?;
    let along = ((&weighted * x)?.mean_keepdim(D::Minus1)? * inverse.sqr()?)?;
    (weighted - x.broadcast_mul(&along)?)?.broadcast_mul(&inverse)
}

pub(super) fn norm_back(norm: &Norm, x: &Tensor, dy: &Tensor, add: &Tensor) -> Result<Tensor> {
    add + norm_back_alone(norm, x, dy)?
}

/// Some heads of `[rows, width]` as `[rows, heads, head_dim]`.
fn cut(heads: &Heads, x: &Tensor, first: usize, count: usize) -> Result<Tensor> {
    let dim = heads.head_dim;
    x.narrow(1, first * dim, count * dim)?.contiguous()?.reshape((x.dims()[0], count, dim))
}

/// Pairs (i, i + n/2) of `[rows, heads, head_dim]` by an angle, or back by it.
fn turn(x: &Tensor, angles: &Tensor, back: bool) -> Result<Tensor> {
    let half = x.dims()[2] / 2;
    let cos = angles.narrow(1, 0, half)?.contiguous()?.unsqueeze(1)?;
    let sin = angles.narrow(1, half, half)?.contiguous()?.unsqueeze(1)?;
    let sin = if back { sin.neg()? } else { sin };
    let (a, b) = (x.narrow(2, 0, half)?.contiguous()?, x.narrow(2, half, half)?.contiguous()?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], 2)
}

/// q, k and v side by side again.
fn join(heads: &Heads, parts: [Tensor; 3]) -> Result<Tensor> {
    let rows = parts[0].dims()[0];
    let counts = [heads.heads, heads.kv_heads, heads.kv_heads];
    let flat = |(part, count): (Tensor, usize)| part.reshape((rows, count * heads.head_dim));
    Tensor::cat(&parts.into_iter().zip(counts).map(flat).collect::<Result<Vec<_>>>()?, 1)
}

pub(super) fn heads(heads: &Heads, qkv: &Tensor, angles: &Tensor) -> Result<Tensor> {
    let part = |first, count, norm: &Option<Norm>| {
        let x = cut(heads, qkv, first, count)?;
        let x = match norm {
            Some(norm) => x.broadcast_mul(&inverse(&x, norm.epsilon)?)?.broadcast_mul(&norm.weight)?,
            None => x,
        };
        turn(&x, angles, false)
    };
    let (q, kv) = (heads.heads, heads.kv_heads);
    join(heads, [part(0, q, &heads.q_norm)?, part(q, kv, &heads.k_norm)?, cut(heads, qkv, q + kv, kv)?])
}

pub(super) fn heads_back(heads: &Heads, qkv: &Tensor, angles: &Tensor, d: &Tensor) -> Result<Tensor> {
    let part = |first, count, norm: &Option<Norm>| {
        let d = turn(&cut(heads, d, first, count)?, angles, true)?;
        match norm {
            Some(norm) => norm_back_alone(norm, &cut(heads, qkv, first, count)?, &d),
            None => Ok(d),
        }
    };
    let (q, kv) = (heads.heads, heads.kv_heads);
    join(heads, [part(0, q, &heads.q_norm)?, part(q, kv, &heads.k_norm)?, cut(heads, d, q + kv, kv)?])
}

fn halves(gate_up: &Tensor) -> Result<(Tensor, Tensor)> {
    let width = gate_up.dims2()?.1 / 2;
    Ok((gate_up.narrow(1, 0, width)?.contiguous()?, gate_up.narrow(1, width, width)?.contiguous()?))
}

pub(super) fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    let (gate, up) = halves(gate_up)?;
    gate.silu()? * up
}

pub(super) fn swiglu_back(gate_up: &Tensor, d: &Tensor) -> Result<Tensor> {
    let (gate, up) = halves(gate_up)?;
    let sigmoid = (gate.neg()?.exp()? + 1.0)?.recip()?;
    let silu = (&gate * &sigmoid)?;
    let slope = ((&sigmoid + &silu)? - (&silu * &sigmoid)?)?;
    Tensor::cat(&[((d * up)? * slope)?, (d * silu)?], 1)
}

pub(super) fn add_scaled(a: &Tensor, b: &Tensor, factors: &Tensor) -> Result<Tensor> {
    a.broadcast_add(&b.broadcast_mul(factors)?)
}

/// `[rows, keys]`: 0, or minus infinity where a row, of the last `rows` keys, must not look.
fn causal(rows: usize, keys: usize, device: &Device) -> Result<Tensor> {
    let sees = |i: usize| if i % keys <= keys - rows + i / keys { 0.0 } else { f32::NEG_INFINITY };
    Tensor::from_vec((0..rows * keys).map(sees).collect::<Vec<f32>>(), (rows, keys), device)
}

pub(super) fn causal_softmax(scores: &Tensor, rows: usize) -> Result<Tensor> {
    let (matrices, height, keys) = scores.dims3()?;
    let mask = causal(rows, keys, scores.device())?.reshape((1, rows, 1, keys))?;
    let masked = scores.reshape((matrices, rows, height / rows, keys))?.broadcast_add(&mask)?;
    candle_nn::ops::softmax_last_dim(&masked.reshape((matrices, height, keys))?)
}

pub(super) fn softmax_back(weights: &Tensor, d: &Tensor) -> Result<Tensor> {
    let along = (d * weights)?.sum_keepdim(D::Minus1)?;
    d.broadcast_sub(&along)? * weights
}

pub(super) fn exponentials(logits: &Tensor, at_least: &Tensor) -> Result<Exponentials> {
    let largest = logits.max_keepdim(D::Minus1)?.broadcast_maximum(at_least)?;
    let values = logits.broadcast_sub(&largest)?.exp()?;
    let sum = values.to_dtype(DType::F32)?.sum_keepdim(D::Minus1)?;
    Ok(Exponentials { values, largest, sum })
}
