//! The update of a site, computed the slow and obviously right way. Every fast kernel is tested against it.

/// `U (C (V^T x))` in f64.
///
/// `u` is `[out, r]`, `core` `[r, r]`, `v` `[in, r]`, all row-major; `x` is `[in]`, the result `[out]`.
///
/// # Panics
/// When the slices do not have these shapes.
pub fn delta(u: &[f32], core: &[f32], v: &[f32], rank: usize, x: &[f32]) -> Vec<f64> {
    assert_eq!(core.len(), rank * rank, "the core is [r, r]");
    assert_eq!(v.len(), x.len() * rank, "V is [in, r]");
    assert_eq!(u.len() % rank, 0, "U is [out, r]");
    let projected: Vec<f64> = (0..rank)
        .map(|j| x.iter().enumerate().map(|(i, &x)| f64::from(v[i * rank + j]) * f64::from(x)).sum())
        .collect();
    let mixed: Vec<f64> =
        (0..rank).map(|i| (0..rank).map(|j| f64::from(core[i * rank + j]) * projected[j]).sum()).collect();
    u.chunks_exact(rank).map(|row| row.iter().zip(&mixed).map(|(&u, &m)| f64::from(u) * m).sum()).collect()
}

/// The dense `[out, in]` update `U C V^T`, row-major: what merging would add to the weight.
///
/// # Panics
/// As [`delta`].
pub fn dense(u: &[f32], core: &[f32], v: &[f32], rank: usize) -> Vec<f64> {
    let inputs = v.len() / rank;
    let outputs = u.len() / rank;
    let mut out = vec![0.0; outputs * inputs];
    for column in 0..inputs {
        let mut x = vec![0.0; inputs];
        x[column] = 1.0;
        for (row, value) in delta(u, core, v, rank, &x).into_iter().enumerate() {
            out[row * inputs + column] = value;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_the_product_by_hand() {
        // U = [[1], [2]], C = [[3]], V = [[5], [7]], x = [1, 10]: V^T x = 75, C of it 225.
        assert_eq!(delta(&[1.0, 2.0], &[3.0], &[5.0, 7.0], 1, &[1.0, 10.0]), [225.0, 450.0]);
        assert_eq!(dense(&[1.0, 2.0], &[3.0], &[5.0, 7.0], 1), [15.0, 21.0, 30.0, 42.0]);
    }

    #[test]
    fn the_core_maps_columns_of_v_to_columns_of_u() {
        // Only C[0][1]: reads V's second column, writes U's first.
        assert_eq!(
            delta(&[1.0, 0.0, 0.0, 1.0], &[0.0, 2.0, 0.0, 0.0], &[1.0, 0.0, 0.0, 1.0], 2, &[3.0, 4.0]),
            [8.0, 0.0]
        );
    }
}
