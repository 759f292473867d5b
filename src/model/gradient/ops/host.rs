//! One pass over rows in main memory.

use candle_core::{Device, Result, Storage, Tensor, bail};
use rayon::prelude::*;

use super::{Heads, Norm};

/// Rows that a thread takes at a time.
const ROWS: usize = 8;

/// A result of so many columns, row by row from the same row of every input. Inputs are f32 in main memory, `[rows, any width]`.
fn rowwise<const N: usize>(
    inputs: [&Tensor; N],
    width: usize,
    row: impl Fn([&[f32]; N], &mut [f32]) + Sync,
) -> Result<Tensor> {
    let inputs = inputs.map(Tensor::contiguous);
    let inputs: [Tensor; N] = match inputs.into_iter().collect::<Result<Vec<_>>>()?.try_into() {
        Ok(inputs) => inputs,
        Err(_) => bail!("as many tensors as there were"),
    };
    let rows = inputs[0].dims2()?.0;
    let held = inputs.each_ref().map(Tensor::storage_and_layout);
    let mut slices: [(&[f32], usize); N] = [(&[], 0); N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&held) {
        let Storage::Cpu(values) = &**storage else { bail!("a tensor that is not in main memory") };
        let (Some((start, end)), (count, width)) = (layout.contiguous_offsets(), layout.shape().dims2()?) else {
            bail!("a tensor that is not contiguous")
        };
        if count != rows {
            bail!("{count} rows beside {rows}");
        }
        *slice = (&values.as_slice::<f32>()?[start..end], width);
    }
    let mut out = vec![0f32; rows * width];
    out.par_chunks_mut((ROWS * width).max(1)).enumerate().for_each(|(block, out)| {
        for (i, out) in out.chunks_mut(width).enumerate() {
            let at = block * ROWS + i;
            row(slices.map(|(values, width)| &values[at * width..(at + 1) * width]), out);
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
    rowwise([x, dy, add], norm.values.len(), |[x, dy, add], out| {
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
    rowwise([qkv, angles], heads.width(), |[qkv, angles], out| {
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
    rowwise([qkv, angles, d], heads.width(), |[qkv, angles, d], out| {
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

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

pub(super) fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    let width = gate_up.dims2()?.1 / 2;
    rowwise([gate_up], width, |[gate_up], out| {
        let (gate, up) = gate_up.split_at(width);
        out.iter_mut().zip(gate.iter().zip(up)).for_each(|(out, (gate, up))| *out = gate * sigmoid(*gate) * up);
    })
}

pub(super) fn swiglu_back(gate_up: &Tensor, d: &Tensor) -> Result<Tensor> {
    let width = d.dims2()?.1;
    rowwise([gate_up, d], 2 * width, |[gate_up, d], out| {
        let (gate, up) = gate_up.split_at(width);
        let (d_gate, d_up) = out.split_at_mut(width);
        for i in 0..width {
            let s = sigmoid(gate[i]);
            let silu = gate[i] * s;
            d_up[i] = d[i] * silu;
            d_gate[i] = d[i] * up[i] * (s + silu - silu * s);
        }
    })
}
