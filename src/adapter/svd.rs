//! The leading singular triplets of a matrix, without a full decomposition.
//!
//! Block Lanczos on `W^T W` with full reorthogonalisation and thick restarts (Golub & Van Loan, section 10.3; Wu & Simon,
//! "Thick-restart Lanczos", 2000), in f64 over f32 weights. The start block, the order of every sum and the absence of
//! fused or library functions make the result a pure function of the weights: no threads, no processor in it.

mod eigen;
mod product;

use eigen::symmetric_eigen;
use product::gram_product;

/// Angle to the exact singular vector at which a vector counts as found, by the residual over the gap.
const ANGLE: f64 = 1e-7;
/// Residual, relative to the largest eigenvalue, below which rounding hides any progress.
const FLOOR: f64 = 1e-13;
/// Columns kept before a restart, in blocks.
const BLOCKS: usize = 24;
/// Products with `W^T W` before we give up on a spectrum that does not separate; the best vectors so far are returned.
const MAX_PRODUCTS: usize = 2000;

/// Leading singular triplets, columns orthonormal, largest first; signs as they fell.
pub(super) struct Truncated {
    /// `[k][out]`: left vectors.
    pub(super) u: Vec<Vec<f64>>,
    /// Singular values.
    pub(super) s: Vec<f64>,
    /// `[k][in]`: right vectors.
    pub(super) v: Vec<Vec<f64>>,
    /// False when the spectrum was too flat to separate the vectors.
    pub(super) converged: bool,
}

/// The `count` leading triplets of row-major `w` `[rows, cols]`. `count` is at most `min(rows, cols)`, and the first
/// `exact` of them are converged; the others are estimates that come for free.
pub(super) fn truncated_svd(w: &[f32], rows: usize, cols: usize, count: usize, exact: usize) -> Truncated {
    debug_assert!(w.len() == rows * cols && exact <= count && count <= rows.min(cols));
    let mut krylov = Krylov::new(cols, exact);
    let width = (count + 1).clamp(4, 8).min(cols);
    let mut block = orthonormalise((0..width).map(|i| start_vector(i, cols)).collect()).0;
    let mut products = 0;
    let (right, converged) = loop {
        let image = gram_product(w, cols, &block);
        products += 1;
        let (next, coupling) = krylov.extend(block, image);
        let full = next.is_empty() || krylov.size() + next.len() > (BLOCKS * width).max(3 * count).min(cols);
        if full || krylov.blocks.is_multiple_of(2) || products >= MAX_PRODUCTS {
            let pairs = symmetric_eigen(&krylov.projected, krylov.size());
            let converged = krylov.converged(&pairs, &coupling);
            if converged || next.is_empty() || products >= MAX_PRODUCTS {
                break (krylov.ritz_vectors(&pairs, count), converged || next.is_empty());
            }
            if full {
                krylov.restart(&pairs, count + width);
            }
        }
        block = next;
    };
    finish(w, rows, cols, right, converged)
}

/// Left vectors from the right ones: a one-sided Jacobi on `W V` makes its columns orthogonal to full precision.
fn finish(w: &[f32], rows: usize, cols: usize, mut v: Vec<Vec<f64>>, converged: bool) -> Truncated {
    let mut images: Vec<Vec<f64>> =
        v.iter().map(|v| w.chunks_exact(cols).map(|row| product::dot_f32(row, v)).collect()).collect();
    one_sided_jacobi(&mut images, &mut v);
    let mut triplets: Vec<(f64, Vec<f64>, Vec<f64>)> =
        images.into_iter().zip(v).map(|(image, v)| (norm(&image), image, v)).collect();
    triplets.sort_by(|a, b| b.0.total_cmp(&a.0));
    let largest = triplets.first().map_or(0.0, |first| first.0);
    let (mut u, mut s, mut v) = (Vec::new(), Vec::new(), Vec::new());
    for (value, mut image, right) in triplets {
        // A zero singular value leaves its left vector open: any unit vector orthogonal to the others will do.
        if value <= largest * 1e-12 || value == 0.0 {
            image = completing_vector(&u, rows);
        } else {
            image.iter_mut().for_each(|x| *x /= value);
        }
        u.push(image);
        s.push(value);
        v.push(right);
    }
    Truncated { u, s, v, converged }
}

/// The subspace built so far and `W^T W` projected onto it.
struct Krylov {
    /// Orthonormal columns `[size][n]`.
    basis: Vec<Vec<f64>>,
    /// `basis^T W^T W basis`, row-major `[size, size]`.
    projected: Vec<f64>,
    /// Columns of `basis` before the last block.
    before_last: usize,
    /// Blocks since the last restart.
    blocks: usize,
    n: usize,
    exact: usize,
}

impl Krylov {
    fn new(n: usize, exact: usize) -> Self {
        Self { basis: Vec::new(), projected: Vec::new(), before_last: 0, blocks: 0, n, exact }
    }

    fn size(&self) -> usize {
        self.basis.len()
    }

    /// Takes a block and its image under `W^T W`. Returns the next block (what of the image lies outside the subspace) and the
    /// coefficients `[next, block]` of the image in it.
    fn extend(&mut self, block: Vec<Vec<f64>>, mut image: Vec<Vec<f64>>) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
        let (old, width) = (self.size(), block.len());
        self.basis.extend(block);
        let size = self.size();
        let mut projected = vec![0.0; size * size];
        for i in 0..old {
            projected[i * size..i * size + old].copy_from_slice(&self.projected[i * old..(i + 1) * old]);
        }
        for (c, column) in image.iter_mut().enumerate() {
            let coefficients = project_out(&self.basis, column);
            for (i, &value) in coefficients.iter().enumerate() {
                projected[i * size + old + c] = value;
                projected[(old + c) * size + i] = value;
            }
            project_out(&self.basis, column); // twice is enough
        }
        for i in old..size {
            for j in old..i {
                let mean = 0.5 * (projected[i * size + j] + projected[j * size + i]);
                projected[i * size + j] = mean;
                projected[j * size + i] = mean;
            }
        }
        self.projected = projected;
        self.before_last = old;
        self.blocks += 1;
        let (mut next, coupling) = orthonormalise(image);
        // A column that was almost within the block has had its rounding errors blown up by the normalisation.
        for _ in 0..2 {
            for column in &mut next {
                project_out(&self.basis, column);
            }
            next = orthonormalise(next).0;
        }
        // No more columns than the space has room for.
        next.truncate(self.n - size);
        debug_assert!(coupling.iter().all(|row| row.len() == width));
        (next, coupling)
    }

    /// Are the leading `exact` Ritz vectors within [`ANGLE`] of singular vectors?
    fn converged(&self, pairs: &[(f64, Vec<f64>)], coupling: &[Vec<f64>]) -> bool {
        if pairs.len() <= self.exact {
            return false;
        }
        let value = |k: usize| pairs.get(k).map_or(0.0, |pair| pair.0);
        pairs.iter().take(self.exact).enumerate().all(|(k, (lambda, vector))| {
            let last = &vector[self.before_last..];
            let components = coupling.iter().map(|row| dot(row, last));
            let residual = components.map(|c| c * c).sum::<f64>().sqrt();
            let above = if k == 0 { f64::INFINITY } else { value(k - 1) - lambda };
            let gap = above.min(lambda - value(k + 1));
            residual <= (ANGLE * gap).max(FLOOR * value(0))
        })
    }

    fn ritz_vectors(&self, pairs: &[(f64, Vec<f64>)], count: usize) -> Vec<Vec<f64>> {
        let combine = |weights: &[f64]| {
            let mut out = vec![0.0; self.n];
            for (column, &weight) in self.basis.iter().zip(weights) {
                add_scaled(&mut out, weight, column);
            }
            out
        };
        pairs.iter().take(count).map(|(_, weights)| combine(weights)).collect()
    }

    /// Keeps the leading Ritz vectors only; the next block still continues the same Krylov space.
    fn restart(&mut self, pairs: &[(f64, Vec<f64>)], keep: usize) {
        let keep = keep.min(pairs.len());
        let vectors = orthonormalise(self.ritz_vectors(pairs, keep)).0;
        let size = vectors.len();
        self.projected = vec![0.0; size * size];
        for (i, pair) in pairs.iter().take(size).enumerate() {
            self.projected[i * size + i] = pair.0;
        }
        self.basis = vectors;
        self.before_last = 0;
        self.blocks = 0;
    }
}

/// Subtracts from `x` its components along orthonormal columns and returns them.
fn project_out(basis: &[Vec<f64>], x: &mut [f64]) -> Vec<f64> {
    let coefficients: Vec<f64> = basis.iter().map(|column| dot(column, x)).collect();
    for (column, &coefficient) in basis.iter().zip(&coefficients) {
        add_scaled(x, -coefficient, column);
    }
    coefficients
}

/// Gram-Schmidt, twice. Columns that are nothing but rounding of the others are dropped. Returns the orthonormal columns and the
/// coefficients `[kept, given]` that give the columns back.
fn orthonormalise(columns: Vec<Vec<f64>>) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let given = columns.len();
    let largest = columns.iter().map(|column| norm(column)).fold(0.0, f64::max);
    let mut kept: Vec<Vec<f64>> = Vec::with_capacity(given);
    let mut coefficients: Vec<Vec<f64>> = Vec::with_capacity(given);
    for (c, mut column) in columns.into_iter().enumerate() {
        for _ in 0..2 {
            for (row, value) in project_out(&kept, &mut column).into_iter().enumerate() {
                coefficients[row][c] += value;
            }
        }
        let length = norm(&column);
        if length <= largest * 1e-13 || length == 0.0 {
            continue;
        }
        column.iter_mut().for_each(|x| *x /= length);
        kept.push(column);
        let mut row = vec![0.0; given];
        row[c] = length;
        coefficients.push(row);
    }
    (kept, coefficients)
}

/// Rotates pairs of columns of `a` (and of `v` alike) until they are orthogonal (Hestenes).
fn one_sided_jacobi(a: &mut [Vec<f64>], v: &mut [Vec<f64>]) {
    for _sweep in 0..30 {
        let mut rotated = false;
        for p in 0..a.len() {
            for q in p + 1..a.len() {
                let (alpha, beta, gamma) = (dot(&a[p], &a[p]), dot(&a[q], &a[q]), dot(&a[p], &a[q]));
                if gamma == 0.0 || gamma * gamma <= 1e-32 * alpha * beta {
                    continue;
                }
                rotated = true;
                let zeta = (beta - alpha) / (2.0 * gamma);
                let tangent = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let cosine = 1.0 / (1.0 + tangent * tangent).sqrt();
                rotate(a, p, q, cosine, cosine * tangent);
                rotate(v, p, q, cosine, cosine * tangent);
            }
        }
        if !rotated {
            return;
        }
    }
}

fn rotate(columns: &mut [Vec<f64>], p: usize, q: usize, cosine: f64, sine: f64) {
    let (head, tail) = columns.split_at_mut(q);
    for (x, y) in head[p].iter_mut().zip(tail[0].iter_mut()) {
        (*x, *y) = (cosine * *x - sine * *y, sine * *x + cosine * *y);
    }
}

/// A unit vector orthogonal to the given ones: the first axis that is not (nearly) in their span.
fn completing_vector(basis: &[Vec<f64>], n: usize) -> Vec<f64> {
    for axis in 0..n {
        let mut x = vec![0.0; n];
        x[axis] = 1.0;
        project_out(basis, &mut x);
        let length = norm(&x);
        if length > 0.5 / (n as f64).sqrt() {
            project_out(basis, &mut x);
            let length = norm(&x);
            x.iter_mut().for_each(|x| *x /= length);
            return x;
        }
    }
    vec![0.0; n] // only if the columns given already span the space, which `count <= min(rows, cols)` excludes
}

/// The same pseudo-random vector for every matrix (SplitMix64), in [-1, 1).
fn start_vector(index: usize, n: usize) -> Vec<f64> {
    let value = |i: usize| {
        let mut z = ((index as u64) << 32 | i as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..n).map(value).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a, a_rest) = a.as_chunks::<4>();
    let (b, b_rest) = b.as_chunks::<4>();
    let mut lanes = [0.0f64; 4];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..4 {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]) + rest
}

fn add_scaled(out: &mut [f64], scale: f64, x: &[f64]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out += scale * x;
    }
}

fn norm(x: &[f64]) -> f64 {
    dot(x, x).sqrt()
}

/// All singular values with their right vectors, by a one-sided Jacobi on every column: what the truncated one is held to.
#[cfg(test)]
pub(super) fn full_svd(w: &[f32], rows: usize, cols: usize) -> Vec<(f64, Vec<f64>)> {
    let mut a: Vec<Vec<f64>> = (0..cols).map(|j| (0..rows).map(|i| f64::from(w[i * cols + j])).collect()).collect();
    let mut v: Vec<Vec<f64>> = (0..cols).map(|j| (0..cols).map(|i| f64::from(u8::from(i == j))).collect()).collect();
    one_sided_jacobi(&mut a, &mut v);
    let mut pairs: Vec<(f64, Vec<f64>)> = a.iter().map(|a| norm(a)).zip(v).collect();
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0));
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::fixtures::noise;

    fn assert_matches(w: &[f32], rows: usize, cols: usize, exact: usize) {
        let count = (exact + 1).min(rows.min(cols));
        let ours = truncated_svd(w, rows, cols, count, exact);
        let full = full_svd(w, rows, cols);
        assert!(ours.converged);
        for k in 0..exact {
            assert!((ours.s[k] - full[k].0).abs() <= 1e-10 * full[0].0, "{rows}x{cols} s[{k}]");
            let cosine = dot(&ours.v[k], &full[k].1).abs();
            assert!(cosine > 1.0 - 1e-10, "{rows}x{cols} v[{k}]: {cosine}");
            let image: Vec<f64> = w.chunks_exact(cols).map(|row| product::dot_f32(row, &ours.v[k])).collect();
            let error = image.iter().zip(&ours.u[k]).map(|(w, u)| (w - ours.s[k] * u).abs()).fold(0.0, f64::max);
            assert!(error <= 1e-12 * full[0].0, "W v = s u");
        }
        for i in 0..count {
            for j in 0..count {
                let one = f64::from(u8::from(i == j));
                assert!((dot(&ours.u[i], &ours.u[j]) - one).abs() < 1e-12, "{rows}x{cols}: U orthonormal");
                assert!((dot(&ours.v[i], &ours.v[j]) - one).abs() < 1e-12, "{rows}x{cols}: V orthonormal");
            }
        }
    }

    #[test]
    fn equals_a_full_svd_on_flat_random_spectra_of_any_shape() {
        for (rows, cols) in [(1, 1), (1, 9), (9, 1), (5, 5), (40, 64), (64, 40), (96, 96), (200, 130)] {
            for exact in [1, 2, 4, 11] {
                if exact <= rows.min(cols) {
                    assert_matches(&noise((rows * 1000 + cols) as u64, rows * cols), rows, cols, exact);
                }
            }
        }
    }

    #[test]
    fn equals_a_full_svd_when_a_spectrum_decays() {
        let (rows, cols) = (80, 60);
        let (left, right) = (noise(1, rows * 20), noise(2, cols * 20));
        let entry = |i: usize, j: usize| {
            (0..20).map(|k| left[i * 20 + k] * right[j * 20 + k] * 0.6f32.powi(k as i32)).sum::<f32>()
        };
        let w: Vec<f32> = (0..rows * cols).map(|at| entry(at / cols, at % cols)).collect();
        assert_matches(&w, rows, cols, 8);
    }

    #[test]
    fn zero_and_rank_one_matrices_still_give_orthonormal_factors() {
        for w in [vec![0.0f32; 12 * 7], (0..12 * 7).map(|at| (at % 7) as f32).collect()] {
            let ours = truncated_svd(&w, 12, 7, 4, 3);
            for i in 0..4 {
                for j in 0..4 {
                    let one = f64::from(u8::from(i == j));
                    assert!((dot(&ours.u[i], &ours.u[j]) - one).abs() < 1e-12);
                    assert!((dot(&ours.v[i], &ours.v[j]) - one).abs() < 1e-12);
                }
            }
        }
    }

    #[test]
    fn equal_singular_values_end_too() {
        // The identity: every vector is a singular vector; nothing separates, and nothing may hang.
        let w: Vec<f32> = (0..50 * 50).map(|at| f32::from(u8::from(at / 50 == at % 50))).collect();
        let ours = truncated_svd(&w, 50, 50, 3, 2);
        assert!(ours.s.iter().all(|s| (s - 1.0).abs() < 1e-12));
    }
}
