//! `W^T W X` for a few columns in one pass over the rows of W.

/// `W^T (W x)` for each column x `[cols]`; `w` is row-major with `cols` columns. A row is read once for both products.
pub(super) fn gram_product(w: &[f32], cols: usize, columns: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let mut out = Vec::with_capacity(columns.len());
    let (fours, rest) = columns.as_chunks::<4>();
    for four in fours {
        out.extend(pass(w, cols, four.each_ref()));
    }
    match rest {
        [a] => out.extend(pass(w, cols, [a])),
        [a, b] => out.extend(pass(w, cols, [a, b])),
        [a, b, c] => out.extend(pass(w, cols, [a, b, c])),
        _ => {}
    }
    out
}

/// K columns at once, interleaved so that the K values of a coordinate are neighbours.
fn pass<const K: usize>(w: &[f32], cols: usize, columns: [&Vec<f64>; K]) -> [Vec<f64>; K] {
    let x: Vec<[f64; K]> = (0..cols).map(|i| columns.map(|column| column[i])).collect();
    let mut y = vec![[0.0f64; K]; cols];
    for row in w.chunks_exact(cols) {
        let image = row_image(row, &x);
        for (y, &w) in y.iter_mut().zip(row) {
            let w = f64::from(w);
            for k in 0..K {
                y[k] += image[k] * w;
            }
        }
    }
    std::array::from_fn(|k| y.iter().map(|y| y[k]).collect())
}

/// The inner products of a row with K columns, in four fixed partial sums.
fn row_image<const K: usize>(row: &[f32], x: &[[f64; K]]) -> [f64; K] {
    let mut lanes = [[0.0f64; K]; 4];
    let (rows, row_rest) = row.as_chunks::<4>();
    let (xs, x_rest) = x.as_chunks::<4>();
    for (row, x) in rows.iter().zip(xs) {
        for lane in 0..4 {
            let w = f64::from(row[lane]);
            for k in 0..K {
                lanes[lane][k] += w * x[lane][k];
            }
        }
    }
    for (&w, x) in row_rest.iter().zip(x_rest) {
        for k in 0..K {
            lanes[0][k] += f64::from(w) * x[k];
        }
    }
    std::array::from_fn(|k| (lanes[0][k] + lanes[1][k]) + (lanes[2][k] + lanes[3][k]))
}

/// The inner product of a row of weights with a vector.
pub(super) fn dot_f32(row: &[f32], x: &[f64]) -> f64 {
    let mut lanes = [0.0f64; 4];
    let (rows, row_rest) = row.as_chunks::<4>();
    let (xs, x_rest) = x.as_chunks::<4>();
    for (row, x) in rows.iter().zip(xs) {
        for lane in 0..4 {
            lanes[lane] += f64::from(row[lane]) * x[lane];
        }
    }
    let rest: f64 = row_rest.iter().zip(x_rest).map(|(&w, x)| f64::from(w) * x).sum();
    (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]) + rest
}
