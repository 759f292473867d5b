//! Reductions over one row of logits: maximum, softmax sums, the n largest. One order of summation, so that a row's result never depends on
//! threads; written so that the compiler turns each into vector instructions.

/// Values that one maximum summarises.
const TILE: usize = 128;
/// Independent sums; their order is part of the result.
const LANES: usize = 8;

/// The row cannot be read as logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum LogitsError {
    /// NaN or plus infinity.
    #[error("the logits are not numbers")]
    NotANumber,
    /// All minus infinity.
    #[error("no token has a finite logit")]
    Empty,
}

/// An integer that orders as the float does. Unlike a maximum of floats, one of integers may be taken in any order, so that the compiler
/// makes vector instructions of it.
fn key(value: f32) -> i32 {
    let bits = value.to_bits().cast_signed();
    bits ^ ((bits >> 31) & i32::MAX)
}

/// The inverse of [`key`].
fn value_of(key: i32) -> f32 {
    f32::from_bits((key ^ ((key >> 31) & i32::MAX)).cast_unsigned())
}

/// The maximum of every [`TILE`] values and of all. Refuses NaN, plus infinity and rows without a finite value.
pub(super) fn tile_maxima(values: &[f32], tiles: &mut Vec<f32>) -> Result<f32, LogitsError> {
    const INFINITY: i32 = f32::INFINITY.to_bits().cast_signed();
    tiles.clear();
    let mut largest = i32::MIN;
    let mut magnitude = 0;
    for tile in values.chunks(TILE) {
        let mut maximum = i32::MIN;
        for &value in tile {
            maximum = maximum.max(key(value));
            magnitude = magnitude.max(value.to_bits().cast_signed() & i32::MAX);
        }
        largest = largest.max(maximum);
        tiles.push(value_of(maximum));
    }
    // A NaN of either sign is larger in magnitude than infinity.
    if magnitude > INFINITY || largest == INFINITY {
        return Err(LogitsError::NotANumber);
    }
    let largest = value_of(largest);
    if values.is_empty() || largest == f32::NEG_INFINITY {
        return Err(LogitsError::Empty);
    }
    Ok(largest)
}

/// Where `largest` first stands, given the tiles' maxima.
pub(super) fn first_of(values: &[f32], tiles: &[f32], largest: f32) -> u32 {
    let tile = tiles.iter().position(|&maximum| maximum == largest).unwrap_or(0) * TILE;
    let within = values[tile..].iter().position(|&value| value == largest).unwrap_or(0);
    (tile + within) as u32
}

/// The n largest values as (index, value), largest first, ties by lower index. `tiles` are the maxima of `values`.
pub(super) fn largest(values: &[f32], tiles: &[f32], n: usize, scratch: &mut Vec<f32>) -> Vec<(u32, f32)> {
    let n = n.min(values.len());
    if n == 0 {
        return Vec::new();
    }
    // The n-th largest maximum of a tile is at most the n-th largest value: everything below it is out.
    let bound = if n <= tiles.len() {
        scratch.clear();
        scratch.extend_from_slice(tiles);
        *scratch.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a)).1
    } else {
        f32::NEG_INFINITY
    };
    let mut found: Vec<(u32, f32)> = Vec::with_capacity(4 * n);
    for (tile, _) in tiles.iter().enumerate().filter(|&(_, &maximum)| maximum >= bound) {
        let start = tile * TILE;
        let end = values.len().min(start + TILE);
        let kept = values[start..end].iter().enumerate().filter(|&(_, &value)| value >= bound);
        found.extend(kept.map(|(at, &value)| ((start + at) as u32, value)));
    }
    if found.len() > n {
        found.select_nth_unstable_by(n - 1, rank);
        found.truncate(n);
    }
    found.sort_unstable_by(rank);
    found
}

/// Larger values first, then lower indexes. (-0 and 0 are the same value.)
pub(super) fn rank(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    (b.1 + 0.0).total_cmp(&(a.1 + 0.0)).then(a.0.cmp(&b.0))
}

/// `e^x` for x <= 0, to about 1e-7 of the value; 0 below -87. The polynomial is that of Cephes' expf. Only products and sums in a fixed
/// order, so that every machine gets the same bits.
#[inline]
fn exp(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut y = 1.987_569_1e-4;
    y = y * r + 1.398_2e-3;
    y = y * r + 8.333_452e-3;
    y = y * r + 4.166_579_6e-2;
    y = y * r + 1.666_666_5e-1;
    y = y * r + 0.5;
    y = y * (r * r) + r + 1.0;
    let exponent = rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    if x > -87.0 { y * f32::from_bits(exponent) } else { 0.0 }
}

/// The sum in f64, in eight fixed lanes.
fn sum(values: &[f32]) -> f64 {
    let mut lanes = [0f64; LANES];
    let (eights, rest) = values.as_chunks::<LANES>();
    for eight in eights {
        for lane in 0..LANES {
            lanes[lane] += f64::from(eight[lane]);
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        lanes[lane] += f64::from(value);
    }
    lanes.into_iter().sum()
}

/// The sum of what `f` makes of the values: a tile at a time, because the compiler vectorises `f` only when it is alone in its loop.
fn sum_of(values: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let mut buffer = [0f32; TILE];
    let tile = |tile: &[f32]| {
        let made = &mut buffer[..tile.len()];
        made.iter_mut().zip(tile).for_each(|(made, &value)| *made = f(value));
        sum(made)
    };
    values.chunks(TILE).map(tile).sum()
}

/// `log(sum(e^value))`; `largest` is the maximum.
pub(super) fn log_sum_exp(values: &[f32], largest: f32) -> f64 {
    f64::from(largest) + sum_of(values, |value| exp(value - largest)).ln()
}

/// `out[i] = e^((values[i] - largest) * scale)`, and 0 for those under `floor`. The largest weight is 1.
pub(super) fn weights(values: &[f32], largest: f32, scale: f32, floor: f32, out: &mut Vec<f32>) {
    out.clear();
    out.extend(values.iter().map(|&value| {
        let weight = exp((value - largest) * scale);
        if weight >= floor { weight } else { 0.0 }
    }));
}

/// Sets every weight that ranks after `last` to 0.
pub(super) fn cut_after(weights: &mut [f32], last: (u32, f32)) {
    let (index, bound) = (last.0 as usize, last.1);
    let (before, after) = weights.split_at_mut(index + 1);
    for weight in before {
        *weight = if *weight >= bound { *weight } else { 0.0 };
    }
    for weight in after {
        *weight = if *weight > bound { *weight } else { 0.0 };
    }
}

/// The last member, in [`rank`] order, of the smallest set of weights whose sum reaches `share` of all. The largest weight is 1.
pub(super) fn nucleus(weights: &[f32], share: f64, maxima: &mut Vec<f32>, found: &mut Vec<(u32, f32)>) -> (u32, f32) {
    maxima.clear();
    maxima
        .extend(weights.chunks(TILE).map(|tile| value_of(tile.iter().fold(0, |most, &weight| most.max(key(weight))))));
    let tiles_from =
        |bound: f32| maxima.iter().zip(weights.chunks(TILE)).enumerate().filter(move |(_, t)| *t.0 >= bound);
    let goal = share * sum(weights);
    // Most of the mass is usually in few weights: find a bound above which there is enough, and look no further.
    let mut bound = 0.25f32;
    let mass_from = |bound: f32| -> f64 {
        let counted = |weight: f32| if weight >= bound { weight } else { 0.0 };
        tiles_from(bound).map(|(_, (_, tile))| sum_of(tile, counted)).sum()
    };
    while bound > 1e-12 && mass_from(bound) < goal {
        bound *= 0.0625;
    }
    let bound = if bound > 1e-12 { bound } else { f32::MIN_POSITIVE };
    found.clear();
    for (tile, (_, weights)) in tiles_from(bound) {
        let kept = weights.iter().enumerate().filter(|&(_, &weight)| weight >= bound);
        found.extend(kept.map(|(at, &weight)| ((tile * TILE + at) as u32, weight)));
    }
    // Quickselect by weight: halve the part in which the border lies.
    let mut rest = found.as_mut_slice();
    let mut goal = goal;
    while rest.len() > 32 {
        let middle = rest.len() / 2;
        rest.select_nth_unstable_by(middle, rank);
        let (upper, lower) = rest.split_at_mut(middle);
        let sum: f64 = upper.iter().map(|&(_, w)| f64::from(w)).sum();
        rest = if sum >= goal {
            upper
        } else {
            goal -= sum;
            lower
        };
    }
    rest.sort_unstable_by(rank);
    let mut sum = 0.0;
    let border = rest.iter().position(|&(_, w)| {
        sum += f64::from(w);
        sum >= goal
    });
    rest[border.unwrap_or(rest.len() - 1)]
}

/// The index at which the running sum of the weights passes `u` of the total, 0 <= u < 1. Never one of weight 0.
pub(super) fn draw(weights: &[f32], u: f64, sums: &mut Vec<f64>) -> u32 {
    const STRETCH: usize = 256;
    sums.clear();
    sums.extend(weights.chunks(STRETCH).map(sum));
    let mut goal = u * sums.iter().sum::<f64>();
    let mut at = 0;
    // Rounding may carry the goal past the end: then the last stretch with any weight takes it.
    for (stretch, &sum) in sums.iter().enumerate().filter(|&(_, &sum)| sum > 0.0) {
        at = stretch * STRETCH;
        if goal < sum {
            break;
        }
        goal -= sum;
    }
    let mut chosen = at;
    for (index, &weight) in weights.iter().enumerate().skip(at).take(STRETCH).filter(|&(_, &w)| w > 0.0) {
        chosen = index;
        goal -= f64::from(weight);
        if goal < 0.0 {
            break;
        }
    }
    chosen as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn exp_is_the_exponential() {
        let mut x = 0.0f32;
        while x > -86.9 {
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) - exact).abs() <= 2e-7 * exact, "{x}");
            x -= 0.0137;
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!((exp(-88.0), exp(f32::NEG_INFINITY)), (0.0, 0.0));
    }

    #[test]
    fn refuses_what_is_not_logits() {
        let mut tiles = Vec::new();
        for len in [1, 7, 8, 65, 200] {
            for at in [0, len / 2, len - 1] {
                let mut row = vec![1.0; len];
                row[at] = f32::NAN;
                assert_eq!(tile_maxima(&row, &mut tiles), Err(LogitsError::NotANumber));
                row[at] = f32::INFINITY;
                assert_eq!(tile_maxima(&row, &mut tiles), Err(LogitsError::NotANumber));
            }
            assert_eq!(tile_maxima(&vec![f32::NEG_INFINITY; len], &mut tiles), Err(LogitsError::Empty));
        }
    }

    /// Few distinct values, so that there are ties.
    fn row() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(prop_oneof![4 => (-8i8..8).prop_map(f32::from), 1 => Just(f32::NEG_INFINITY)], 1..400)
            .prop_map(|mut row| {
                row[0] = 0.5;
                row
            })
    }

    proptest! {
        #[test]
        fn largest_is_a_stable_sort_cut_short(row in row(), n in 0usize..450) {
            let mut tiles = Vec::new();
            let top = tile_maxima(&row, &mut tiles).unwrap();
            let mut sorted: Vec<(u32, f32)> = row.iter().copied().enumerate().map(|(i, v)| (i as u32, v)).collect();
            sorted.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap());
            prop_assert_eq!((first_of(&row, &tiles, top), top), sorted[0]);
            sorted.truncate(n);
            prop_assert_eq!(largest(&row, &tiles, n, &mut Vec::new()), sorted);
        }

        #[test]
        fn nucleus_is_the_smallest_set(row in row(), share in 0.0f64..0.999) {
            let mut w = Vec::new();
            weights(&row, row.iter().copied().fold(f32::MIN, f32::max), 1.0, 0.0, &mut w);
            let total: f64 = w.iter().map(|&w| f64::from(w)).sum();
            let mut kept = w.clone();
            cut_after(&mut kept, nucleus(&w, share, &mut Vec::new(), &mut Vec::new()));
            let mass: f64 = kept.iter().map(|&w| f64::from(w)).sum();
            let smallest = kept.iter().copied().filter(|&w| w > 0.0).fold(f32::MAX, f32::min);
            let dropped = w.iter().zip(&kept).filter(|(_, kept)| **kept == 0.0).map(|(w, _)| *w).fold(0.0, f32::max);
            prop_assert!(mass >= share * total - 1e-9 * total);
            prop_assert!(mass - f64::from(smallest) <= share * total + 1e-9 * total, "one more than needed");
            prop_assert!(dropped <= smallest);
        }

        #[test]
        fn draw_inverts_the_running_sum(row in row(), u in 0.0f64..1.0) {
            let mut w = Vec::new();
            weights(&row, row.iter().copied().fold(f32::MIN, f32::max), 1.0, 0.0, &mut w);
            let at = draw(&w, u, &mut Vec::new()) as usize;
            let total: f64 = w.iter().map(|&w| f64::from(w)).sum();
            let before: f64 = w[..at].iter().map(|&w| f64::from(w)).sum();
            prop_assert!(w[at] > 0.0);
            prop_assert!(before <= u * total + 1e-9 * total && u * total <= before + f64::from(w[at]) + 1e-9 * total);
        }

        #[test]
        fn log_sum_exp_is_the_naive_one(row in row()) {
            let top = row.iter().copied().fold(f32::MIN, f32::max);
            let naive = row.iter().map(|&v| f64::from(v).exp()).sum::<f64>().ln();
            prop_assert!((log_sum_exp(&row, top) - naive).abs() < 1e-6);
        }
    }
}
