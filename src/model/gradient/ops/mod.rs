//! What lies between the products: norms, rotation, SwiGLU, and each one's way back.
//!
//! Each exists twice: `host`, one pass over rows in main memory on rayon's threads, and `composed`, the same in candle's operations for any other device.
//! The tests hold them to each other.

mod composed;
mod host;

use candle_core::{DType, Result, Tensor};

use crate::kernel::AttentionSpec;

/// An RMSNorm weight, on the device and beside it.
pub(super) struct Norm {
    pub(super) weight: Tensor,
    pub(super) values: Vec<f32>,
    pub(super) epsilon: f32,
}

impl Norm {
    pub(super) fn new(values: &[f32], epsilon: f32, device: &candle_core::Device) -> Result<Self> {
        Ok(Self { weight: Tensor::new(values, device)?, values: values.to_vec(), epsilon })
    }

    /// `x / sqrt(mean(x^2) + epsilon) * weight`
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        candle_nn::ops::rms_norm(&x.contiguous()?, &self.weight, self.epsilon)
    }

    /// `add + d(norm(x))^T dy`
    pub(super) fn back(&self, x: &Tensor, dy: &Tensor, add: &Tensor) -> Result<Tensor> {
        if x.device().is_cpu() { host::norm_back(self, x, dy, add) } else { composed::norm_back(self, x, dy, add) }
    }
}

/// How q|k|v becomes what attention takes: heads normalised (Qwen3) and turned by their position.
pub(super) struct Heads {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) q_norm: Option<Norm>,
    pub(super) k_norm: Option<Norm>,
}

impl Heads {
    pub(super) fn new(spec: &AttentionSpec, device: &candle_core::Device) -> Result<Self> {
        let norm = |norm: &Option<(Vec<f32>, f32)>| match norm {
            Some((weight, epsilon)) => Norm::new(weight, *epsilon, device).map(Some),
            None => Ok(None),
        };
        let AttentionSpec { heads, kv_heads, head_dim, .. } = *spec;
        Ok(Self { heads, kv_heads, head_dim, q_norm: norm(&spec.q_norm)?, k_norm: norm(&spec.k_norm)? })
    }

    /// Columns of q|k|v.
    pub(super) fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// `[rows, width]` of q|k|v, and the cosines and sines of each row's position side by side, `[rows, head_dim]`.
    pub(super) fn forward(&self, qkv: &Tensor, angles: &Tensor) -> Result<Tensor> {
        if qkv.device().is_cpu() { host::heads(self, qkv, angles) } else { composed::heads(self, qkv, angles) }
    }

    /// The derivative by `qkv`, from the one by what [`Heads::forward`] made of it.
    pub(super) fn back(&self, qkv: &Tensor, angles: &Tensor, d: &Tensor) -> Result<Tensor> {
        if d.device().is_cpu() {
            host::heads_back(self, qkv, angles, d)
        } else {
            composed::heads_back(self, qkv, angles, d)
        }
    }

    /// The norm of a head by its number: q's first, then k's; v's have none.
    fn norm(&self, head: usize) -> Option<&Norm> {
        if head < self.heads { self.q_norm.as_ref() } else { self.k_norm.as_ref() }
    }
}

/// gate|up `[rows, 2 n]` to `silu(gate) * up`.
pub(super) fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    if gate_up.device().is_cpu() { host::swiglu(gate_up) } else { composed::swiglu(gate_up) }
}

/// The derivative by gate|up.
pub(super) fn swiglu_back(gate_up: &Tensor, d: &Tensor) -> Result<Tensor> {
    if d.device().is_cpu() { host::swiglu_back(gate_up, d) } else { composed::swiglu_back(gate_up, d) }
}

/// `a + factor b`, row by row: factors are `[rows, 1]` or `[1, 1]`; b may be one row for all.
pub(super) fn add_scaled(a: &Tensor, b: &Tensor, factors: &Tensor) -> Result<Tensor> {
    if a.device().is_cpu() { host::add_scaled(a, b, factors) } else { composed::add_scaled(a, b, factors) }
}

/// `a + b`; b may be one row for all.
pub(super) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.device().is_cpu() {
        host::add_scaled(a, b, &Tensor::ones((1, 1), DType::F32, a.device())?)
    } else {
        a.broadcast_add(b)
    }
}

/// `factor x`, row by row: factors are `[rows, 1]` or `[1, 1]`.
pub(super) fn scale(x: &Tensor, factors: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() { host::add_scaled(&x.zeros_like()?, x, factors) } else { x.broadcast_mul(factors) }
}

/// Softmax over keys, `[kv_heads, rows * group, keys]`, where the last keys are the rows' own: row i sees no more than i + 1 of them.
pub(super) fn causal_softmax(scores: &Tensor, rows: usize) -> Result<Tensor> {
    if scores.device().is_cpu() { host::causal_softmax(scores, rows) } else { composed::causal_softmax(scores, rows) }
}

/// The derivative by the scores of a softmax, from its weights and the derivative by them.
pub(super) fn softmax_back(weights: &Tensor, d: &Tensor) -> Result<Tensor> {
    if d.device().is_cpu() { host::softmax_back(weights, d) } else { composed::softmax_back(weights, d) }
}

/// `e^(logit - largest)` of rows.
pub(super) struct Exponentials {
    /// `[rows, columns]`.
    pub(super) values: Tensor,
    /// The largest of a row's logits and what was `at_least`, `[rows, 1]`.
    pub(super) largest: Tensor,
    /// Of the exponentials, `[rows, 1]`.
    pub(super) sum: Tensor,
}

/// See [`Exponentials`]; `at_least` is `[rows, 1]` or `[1, 1]`.
pub(super) fn exponentials(logits: &Tensor, at_least: &Tensor) -> Result<Exponentials> {
    if logits.device().is_cpu() {
        host::exponentials(logits, at_least)
    } else {
        composed::exponentials(logits, at_least)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn noise(seed: u64, shape: (usize, usize)) -> Tensor {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let values: Vec<f32> = (0..shape.0 * shape.1).map(|_| next()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn close(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
        assert_eq!(a.dims(), b.dims(), "{what}");
        let worst = (a.to_dtype(DType::F64).unwrap() - b.to_dtype(DType::F64).unwrap()).unwrap().abs().unwrap();
        let worst = worst.flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap();
        assert!(worst <= tolerance, "{what}: {worst:e}");
    }

    fn heads(norms: bool) -> (Heads, Tensor) {
        let (heads, kv_heads, head_dim) = (4, 2, 6);
        let norm = |seed| {
            norms.then(|| {
                let weight = noise(seed, (1, head_dim)).flatten_all().unwrap().to_vec1::<f32>().unwrap();
                Norm::new(&weight, 1e-5, &Device::Cpu).unwrap()
            })
        };
        let angles: Vec<f32> = (0..5 * 3).map(|i| i as f32 * 0.3).collect();
        let angles: Vec<f32> = angles
            .chunks(3)
            .flat_map(|row| row.iter().map(|a| a.cos()).chain(row.iter().map(|a| a.sin())).collect::<Vec<_>>())
            .collect();
        let angles = Tensor::from_vec(angles, (5, head_dim), &Device::Cpu).unwrap();
        (Heads { heads, kv_heads, head_dim, q_norm: norm(5), k_norm: norm(6) }, angles)
    }

    #[test]
    fn both_implementations_agree() {
        let weight = noise(1, (1, 37)).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let norm = Norm::new(&weight, 1e-5, &Device::Cpu).unwrap();
        let (x, dy, add) = (noise(2, (9, 37)), noise(3, (9, 37)), noise(4, (9, 37)));
        let (a, b) = (host::norm_back(&norm, &x, &dy, &add), composed::norm_back(&norm, &x, &dy, &add));
        close("norm", &a.unwrap(), &b.unwrap(), 1e-5);
        let (gate_up, d) = (noise(5, (9, 46)).affine(6.0, 0.0).unwrap(), noise(6, (9, 23)));
        close("swiglu", &host::swiglu(&gate_up).unwrap(), &composed::swiglu(&gate_up).unwrap(), 1e-5);
        let (a, b) = (host::swiglu_back(&gate_up, &d).unwrap(), composed::swiglu_back(&gate_up, &d).unwrap());
        close("swiglu back", &a, &b, 1e-5);
        let (row, factors) = (noise(9, (1, 37)), noise(10, (9, 1)));
        let (a, b) = (host::add_scaled(&x, &row, &factors), composed::add_scaled(&x, &row, &factors));
        close("add scaled", &a.unwrap(), &b.unwrap(), 1e-6);
        let three = |x: Tensor| x.reshape((2, 6, 5)).unwrap();
        let (scores, d) = (three(noise(11, (6, 10))), three(noise(12, (6, 10))));
        let (a, b) = (host::causal_softmax(&scores, 3).unwrap(), composed::causal_softmax(&scores, 3).unwrap());
        close("softmax", &a, &b, 1e-6);
        close("softmax back", &host::softmax_back(&a, &d).unwrap(), &composed::softmax_back(&a, &d).unwrap(), 1e-6);
        let logits = noise(13, (9, 300)).affine(9.0, 0.0).unwrap();
        let (a, b) =
            (host::exponentials(&logits, &factors).unwrap(), composed::exponentials(&logits, &factors).unwrap());
        close("exponentials", &a.values.contiguous().unwrap(), &b.values, 1e-6);
        close("largest", &a.largest, &b.largest, 0.0);
        close("sum", &a.sum, &b.sum, 1e-4);
        for norms in [false, true] {
            let (heads, angles) = heads(norms);
            let (qkv, d) = (noise(7, (5, heads.width())), noise(8, (5, heads.width())));
            let (a, b) = (host::heads(&heads, &qkv, &angles), composed::heads(&heads, &qkv, &angles));
            close("heads", &a.unwrap(), &b.unwrap(), 1e-5);
            let (a, b) = (host::heads_back(&heads, &qkv, &angles, &d), composed::heads_back(&heads, &qkv, &angles, &d));
            close("heads back", &a.unwrap(), &b.unwrap(), 1e-5);
        }
    }

    /// `<f'(x) e, d> = <e, back(d)>`, the left side by central differences.
    fn transposes(what: &str, x: &Tensor, d: &Tensor, f: impl Fn(&Tensor) -> Tensor, back: &Tensor) {
        let e = noise(99, x.dims2().unwrap());
        let dot = |a: &Tensor, b: &Tensor| {
            let product = (a.to_dtype(DType::F64).unwrap() * b.to_dtype(DType::F64).unwrap()).unwrap();
            product.sum_all().unwrap().to_scalar::<f64>().unwrap()
        };
        let step = 1e-2;
        let at = |sign: f64| f(&(x + (&e * (sign * step)).unwrap()).unwrap());
        let left = dot(&((at(1.0) - at(-1.0)).unwrap() / (2.0 * step)).unwrap(), d);
        let right = dot(&e, back);
        assert!((left - right).abs() <= 2e-3 * left.abs().max(1.0), "{what}: {left} and {right}");
    }

    #[test]
    fn the_way_back_is_the_transposed_derivative() {
        let weight = noise(1, (1, 37)).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let norm = Norm::new(&weight, 1e-5, &Device::Cpu).unwrap();
        let (x, dy) = (noise(2, (9, 37)), noise(3, (9, 37)));
        let back = norm.back(&x, &dy, &x.zeros_like().unwrap()).unwrap();
        transposes("norm", &x, &dy, |x| norm.forward(x).unwrap(), &back);
        let (gate_up, d) = (noise(5, (9, 46)), noise(6, (9, 23)));
        transposes("swiglu", &gate_up, &d, |x| swiglu(x).unwrap(), &swiglu_back(&gate_up, &d).unwrap());
        for norms in [false, true] {
            let (heads, angles) = heads(norms);
            let (qkv, d) = (noise(7, (5, heads.width())), noise(8, (5, heads.width())));
            let back = heads.back(&qkv, &angles, &d).unwrap();
            transposes("heads", &qkv, &d, |x| heads.forward(x, &angles).unwrap(), &back);
        }
    }
}
