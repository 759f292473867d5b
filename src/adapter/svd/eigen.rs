//! All eigenpairs of a small symmetric matrix: Householder tridiagonalisation and implicit QL (EISPACK's tred2 and tql2).

/// Eigenpairs of a row-major symmetric `[n, n]` matrix, largest eigenvalue first; vectors are orthonormal.
pub(super) fn symmetric_eigen(matrix: &[f64], n: usize) -> Vec<(f64, Vec<f64>)> {
    // `z[j]` is row j: tred2 leaves the accumulated transform in it, one vector a column.
    let mut z: Vec<Vec<f64>> = matrix.chunks_exact(n.max(1)).map(<[f64]>::to_vec).collect();
    let (mut diagonal, mut off) = tridiagonalise(&mut z);
    // Vectors as rows: the rotations then run over contiguous memory.
    let mut vectors: Vec<Vec<f64>> = (0..n).map(|j| (0..n).map(|i| z[i][j]).collect()).collect();
    implicit_ql(&mut diagonal, &mut off, &mut vectors);
    let mut pairs: Vec<(f64, Vec<f64>)> = diagonal.into_iter().zip(vectors).collect();
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0));
    pairs
}

// Indexed as in EISPACK: rows and columns of one matrix are read and written in the same loops.
#[allow(clippy::needless_range_loop)]
/// Reduces `z` to tridiagonal form; returns the diagonal and, from index 1, the off-diagonal. `z` becomes the transform.
fn tridiagonalise(z: &mut [Vec<f64>]) -> (Vec<f64>, Vec<f64>) {
    let n = z.len();
    let (mut d, mut e) = (vec![0.0; n], vec![0.0; n]);
    for i in (1..n).rev() {
        let scale: f64 = z[i][..i].iter().map(|x| x.abs()).sum();
        if i == 1 || scale == 0.0 {
            e[i] = z[i][i - 1];
            d[i] = 0.0;
            continue;
        }
        z[i][..i].iter_mut().for_each(|x| *x /= scale);
        let mut h: f64 = z[i][..i].iter().map(|x| x * x).sum();
        let f = z[i][i - 1];
        let g = if f >= 0.0 { -h.sqrt() } else { h.sqrt() };
        e[i] = scale * g;
        h -= f * g;
        z[i][i - 1] = f - g;
        let mut sum = 0.0;
        for j in 0..i {
            z[j][i] = z[i][j] / h;
            let mut g = 0.0;
            for k in 0..=j {
                g += z[j][k] * z[i][k];
            }
            for k in j + 1..i {
                g += z[k][j] * z[i][k];
            }
            e[j] = g / h;
            sum += e[j] * z[i][j];
        }
        let half = sum / (h + h);
        for j in 0..i {
            let f = z[i][j];
            e[j] -= half * f;
            let g = e[j];
            for k in 0..=j {
                z[j][k] -= f * e[k] + g * z[i][k];
            }
        }
        d[i] = h;
    }
    accumulate(z, &mut d);
    e.rotate_left(usize::from(n > 0)); // off-diagonal of rows (0, 1), (1, 2), ...; the last entry is unused
    (d, e)
}

#[allow(clippy::needless_range_loop)] // as above
/// Multiplies the Householder reflections together and collects the diagonal.
fn accumulate(z: &mut [Vec<f64>], d: &mut [f64]) {
    let n = z.len();
    for i in 0..n {
        if d[i] != 0.0 && i > 0 {
            for j in 0..i {
                let g: f64 = (0..i).map(|k| z[i][k] * z[k][j]).sum();
                for k in 0..i {
                    z[k][j] -= g * z[k][i];
                }
            }
        }
        d[i] = z[i][i];
        z[i][i] = 1.0;
        for j in 0..i {
            z[j][i] = 0.0;
            z[i][j] = 0.0;
        }
    }
}

/// Diagonalises a tridiagonal matrix, rotating `vectors` (one a row) along.
fn implicit_ql(d: &mut [f64], e: &mut [f64], vectors: &mut [Vec<f64>]) {
    let n = d.len();
    for l in 0..n {
        // Thirty is EISPACK's bound; a Krylov projection needs two or three.
        for _ in 0..60 {
            let split = (l..n - 1).find(|&m| e[m].abs() <= f64::EPSILON * (d[m].abs() + d[m + 1].abs()));
            let m = split.unwrap_or(n - 1);
            if m == l {
                break;
            }
            let g = (d[l + 1] - d[l]) / (2.0 * e[l]);
            let r = length(g, 1.0);
            let mut g = d[m] - d[l] + e[l] / (g + if g >= 0.0 { r } else { -r });
            let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
            let mut underflow = false;
            for i in (l..m).rev() {
                let (f, b) = (s * e[i], c * e[i]);
                let r = length(f, g);
                e[i + 1] = r;
                if r == 0.0 {
                    d[i + 1] -= p;
                    e[m] = 0.0;
                    underflow = true;
                    break;
                }
                s = f / r;
                c = g / r;
                g = d[i + 1] - p;
                let r = (d[i] - g) * s + 2.0 * c * b;
                p = s * r;
                d[i + 1] = g + p;
                g = c * r - b;
                rotate(vectors, i, s, c);
            }
            if !underflow {
                d[l] -= p;
                e[l] = g;
                e[m] = 0.0;
            }
        }
    }
}

fn rotate(vectors: &mut [Vec<f64>], i: usize, s: f64, c: f64) {
    let (head, tail) = vectors.split_at_mut(i + 1);
    for (x, y) in head[i].iter_mut().zip(tail[0].iter_mut()) {
        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
    }
}

/// `sqrt(a^2 + b^2)` without overflow, and without libm's hypot, whose last bit differs between systems.
fn length(a: f64, b: f64) -> f64 {
    let (large, small) = if a.abs() > b.abs() { (a.abs(), b.abs()) } else { (b.abs(), a.abs()) };
    if large == 0.0 {
        return 0.0;
    }
    let ratio = small / large;
    large * (1.0 + ratio * ratio).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::fixtures::noise;

    #[test]
    fn vectors_are_orthonormal_and_diagonalise() {
        for n in [1usize, 2, 3, 8, 33] {
            let raw = noise(n as u64, n * n);
            let matrix: Vec<f64> = (0..n * n).map(|at| f64::from(raw[at] + raw[at % n * n + at / n])).collect();
            let pairs = symmetric_eigen(&matrix, n);
            assert_eq!(pairs.len(), n);
            for (k, (value, vector)) in pairs.iter().enumerate() {
                for i in 0..n {
                    let product: f64 = (0..n).map(|j| matrix[i * n + j] * vector[j]).sum();
                    assert!((product - value * vector[i]).abs() < 1e-12, "n = {n}, pair {k}");
                }
                for (l, (_, other)) in pairs.iter().enumerate() {
                    let inner: f64 = vector.iter().zip(other).map(|(a, b)| a * b).sum();
                    assert!((inner - f64::from(u8::from(k == l))).abs() < 1e-12);
                }
            }
            assert!(pairs.windows(2).all(|pair| pair[0].0 >= pair[1].0));
        }
    }

    #[test]
    fn zero_and_diagonal_matrices_pass_through() {
        assert!(symmetric_eigen(&[0.0; 9], 3).iter().all(|pair| pair.0 == 0.0));
        let values: Vec<f64> = symmetric_eigen(&[1.0, 0.0, 0.0, 5.0], 2).into_iter().map(|pair| pair.0).collect();
        assert_eq!(values, [5.0, 1.0]);
        assert!(symmetric_eigen(&[], 0).is_empty());
    }
}
