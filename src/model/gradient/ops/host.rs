//! One pass over rows in main memory.

use candle_core::{Device, Result, Storage, Tensor, bail};
use rayon::prelude::*;

use super::{Exponentials, Heads, Norm};
use crate::kernel::host::Scans;

/// Rows that a thread takes at a time.
const ROWS: usize = 8;

/// A result of so many columns, row by row from the same row of every input; the function also gets the row's number. Inputs are f32 in main memory, `[rows, any width]`,
/// the later ones also `[1, any width]`, the same for every row.
fn rowwise<const N: usize>(
    inputs: [&Tensor; N],
    width: usize,
    row: impl Fn(usize, [&[f32]; N], &mut [f32]) + Sync,
) -> Result<Tensor> {
    let inputs = inputs.map(Tensor::contiguous);
    let inputs: [Tensor; N] = match inputs.into_iter().collect::<Result<Vec<_>>>()?.try_into() {
        Ok(inputs) => inputs,
        Err(_) => bail!("as many tensors as there were"),
    };
    let rows = inputs[0].dims2()?.0;
    let held = inputs.each_ref().map(Tensor::storage_and_layout);
    // values, width, and 0 for one row that stands for all
    let mut slices: [(&[f32], usize, usize); N] = [(&[], 0, 0); N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&held) {
        let Storage::Cpu(values) = &**storage else { bail!("a tensor that is not in main memory") };
        let (Some((start, end)), (count, width)) = (layout.contiguous_offsets(), layout.shape().dims2()?) else {
            bail!("a tensor that is not contiguous")
        };
        if count != rows && count != 1 {
            bail!("{count} rows beside {rows}");
        }
        let values = &values.as_slice::<f32>()?[start..end];
        *slice = (values, width, usize::from(count == rows));
    }
    let mut out = vec![0f32; rows * width];
    out.par_chunks_mut((ROWS * width).max(1)).enumerate().for_each(|(block, out)| {
        for (i, out) in out.chunks_mut(width).enumerate() {
            let at = block * ROWS + i;
            row(at, slices.map(|(values, width, step)| &values[at * step * width..][..width]), out);
        }
    });
    drop(held);
    Tensor::from_vec(out, (rows, width), &Device::Cpu)
}

/// Eight chains, then one sum: independent of the processor, and fast on all.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a8, a_rest) = a.as_chunks::<8>();
    let (b8, b_rest) = b.as_chunks::<8>();
    let mut sums = [0f32; 8];
    for (a, b) in a8.iter().zip(b8) {
        (0..8).for_each(|i| sums[i] += a[i] * b[i]);
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// `1 / sqrt(mean(x^2) + epsilon)`
fn inverse(x: &[f32], epsilon: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + epsilon).sqrt()
}

/// `out += i (w dy - x i^2 mean(w dy x))`, where i is the inverse root.
fn add_norm_back(norm: &Norm, x: &[f32], dy: &[f32], out: &mut [f32]) {
    let inverse = inverse(x, norm.epsilon);
    let weighted: Vec<f32> = norm.values.iter().zip(dy).map(|(w, d)| w * d).collect();
    let along = dot(&weighted, x) / x.len() as f32 * inverse * inverse;
    for ((out, w), x) in out.iter_mut().zip(&weighted).zip(x) {
        *out += inverse * (w - along * x);
    }
}

pub(super) fn norm_back(norm: &Norm, x: &Tensor, dy: &Tensor, add: &Tensor) -> Result<Tensor> {
    rowwise([x, dy, add], norm.values.len(), |_, [x, dy, add], out| {
        out.copy_from_slice(add);
        add_norm_back(norm, x, dy, out);
    })
}

/// Pair (i, i + n/2) by an angle, or back by it.
fn turn(head: &mut [f32], cos: &[f32], sin: &[f32], back: bool) {
    let (first, second) = head.split_at_mut(cos.len());
    for (i, (a, b)) in first.iter_mut().zip(second).enumerate() {
        let sin = if back { -sin[i] } else { sin[i] };
        (*a, *b) = (*a * cos[i] - *b * sin, *b * cos[i] + *a * sin);
    }
}

pub(super) fn heads(heads: &Heads, qkv: &Tensor, angles: &Tensor) -> Result<Tensor> {
    let (dim, turned) = (heads.head_dim, heads.heads + heads.kv_heads);
    rowwise([qkv, angles], heads.width(), |_, [qkv, angles], out| {
        out.copy_from_slice(qkv);
        let (cos, sin) = angles.split_at(dim / 2);
        for (number, head) in out.chunks_exact_mut(dim).take(turned).enumerate() {
            if let Some(norm) = heads.norm(number) {
                let inverse = inverse(head, norm.epsilon);
                head.iter_mut().zip(&norm.values).for_each(|(x, w)| *x = *x * inverse * w);
            }
            turn(head, cos, sin, false);
        }
    })
}

pub(super) fn heads_back(heads: &Heads, qkv: &Tensor, angles: &Tensor, d: &Tensor) -> Result<Tensor> {
    let (dim, turned) = (heads.head_dim, heads.heads + heads.kv_heads);
    rowwise([qkv, angles, d], heads.width(), |_, [qkv, angles, d], out| {
        out.copy_from_slice(d);
        let (cos, sin) = angles.split_at(dim / 2);
        for (number, head) in out.chunks_exact_mut(dim).take(turned).enumerate() {
            turn(head, cos, sin, true);
            if let Some(norm) = heads.norm(number) {
                let dy = head.to_vec();
                head.fill(0.0);
                add_norm_back(norm, &qkv[number * dim..(number + 1) * dim], &dy, head);
            }
        }
    })
}

pub(super) fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    let (width, scans) = (gate_up.dims2()?.1 / 2, Scans::best());
    rowwise([gate_up], width, |_, [gate_up], out| {
        let (gate, up) = gate_up.split_at(width);
        scans.swiglu(gate, up, out);
    })
}

pub(super) fn swiglu_back(gate_up: &Tensor, d: &Tensor) -> Result<Tensor> {
    let (width, scans) = (d.dims2()?.1, Scans::best());
    rowwise([gate_up, d], 2 * width, |_, [gate_up, d], out| {
        let (gate, up) = gate_up.split_at(width);
        let (d_gate, d_up) = out.split_at_mut(width);
        scans.swiglu_back(gate, up, d, d_gate, d_up);
    })
}

pub(super) fn add_scaled(a: &Tensor, b: &Tensor, factors: &Tensor) -> Result<Tensor> {
    rowwise([a, b, factors], a.dims2()?.1, |_, [a, b, factor], out| {
        out.iter_mut().zip(a.iter().zip(b)).for_each(|(out, (a, b))| *out = a + b * factor[0]);
    })
}

pub(super) fn causal_softmax(scores: &Tensor, rows: usize) -> Result<Tensor> {
    let (matrices, height, keys) = scores.dims3()?;
    let (group, scans) = (height / rows, Scans::best());
    let weights = rowwise([&scores.reshape((matrices * height, keys))?], keys, |at, [scores], out| {
        let (seen, hidden) = out.split_at_mut(keys - rows + at % height / group + 1);
        seen.copy_from_slice(&scores[..seen.len()]);
        hidden.fill(0.0);
        let (_, sum) = scans.exponentials(seen, f32::NEG_INFINITY);
        let inverse = (1.0 / sum) as f32;
        seen.iter_mut().for_each(|weight| *weight *= inverse);
    })?;
    weights.reshape((matrices, height, keys))
}

pub(super) fn softmax_back(weights: &Tensor, d: &Tensor) -> Result<Tensor> {
    let (matrices, height, keys) = d.dims3()?;
    let flat = |x: &Tensor| x.reshape((matrices * height, keys));
    let d = rowwise([&flat(weights)?, &flat(d)?], keys, |_, [weights, d], out| {
        let along = dot(weights, d);
        out.iter_mut().zip(weights.iter().zip(d)).for_each(|(out, (w, d))| *out = w * (d - along));
    })?;
    d.reshape((matrices, height, keys))
}

/// The largest logit and the sum lie behind the exponentials of their row.
pub(super) fn exponentials(logits: &Tensor, at_least: &Tensor) -> Result<Exponentials> {
    let (width, scans) = (logits.dims2()?.1, Scans::best());
    let all = rowwise([logits, at_least], width + 2, |_, [logits, at_least], out| {
        let (values, sums) = out.split_at_mut(width);
        values.copy_from_slice(logits);
        let (largest, sum) = scans.exponentials(values, at_least[0]);
        sums.copy_from_slice(&[largest, sum as f32]);
    })?;
    Ok(Exponentials {
        values: all.narrow(1, 0, width)?,
        largest: all.narrow(1, width, 1)?.contiguous()?,
        sum: all.narrow(1, width + 1, 1)?.contiguous()?,
    })
}
