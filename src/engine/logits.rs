//! Reductions over one row of logits: maximum, softmax sums, the n largest, a nucleus, a draw. The scans are [`Scans`]; one order of summation, so that a
//! row's result depends neither on threads nor on the processor's instruction set.

use crate::kernel::host::{STRETCH, Scans, TILE};

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

/// Makes a vector exactly so long. What it held before stays, for a scan to overwrite.
fn fit<T: Copy + Default>(vector: &mut Vec<T>, len: usize) {
    vector.resize(len, T::default());
}

/// The maximum of every [`TILE`] values and of all. Refuses NaN, plus infinity and rows without a finite value.
pub(super) fn tile_maxima(scans: Scans, values: &[f32], tiles: &mut Vec<f32>) -> Result<f32, LogitsError> {
    fit(tiles, values.len().div_ceil(TILE));
    if values.is_empty() {
        return Err(LogitsError::Empty);
    }
    let largest = scans.maxima(values, tiles).ok_or(LogitsError::NotANumber)?;
    if largest == f32::NEG_INFINITY { Err(LogitsError::Empty) } else { Ok(largest) }
}

/// Where `largest` first stands, given the tiles' maxima.
pub(super) fn first_of(values: &[f32], tiles: &[f32], largest: f32) -> u32 {
    let tile = tiles.iter().position(|&maximum| maximum == largest).unwrap_or(0) * TILE;
    let within = values[tile..].iter().position(|&value| value == largest).unwrap_or(0);
    (tile + within) as u32
}

/// The n largest values as (index, value), largest first, ties by lower index, into `found`. `tiles` are the maxima of `values`.
pub(super) fn largest(values: &[f32], tiles: &[f32], n: usize, scratch: &mut Vec<f32>, found: &mut Vec<(u32, f32)>) {
    found.clear();
    let n = n.min(values.len());
    if n == 0 {
        return;
    }
    // The n-th largest maximum of a tile is at most the n-th largest value: everything below it is out.
    let bound = if n <= tiles.len() {
        scratch.clear();
        scratch.extend_from_slice(tiles);
        *scratch.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a)).1
    } else {
        f32::NEG_INFINITY
    };
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
}

/// Larger values first, then lower indexes. (-0 and 0 are the same value.)
pub(super) fn rank(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    (b.1 + 0.0).total_cmp(&(a.1 + 0.0)).then(a.0.cmp(&b.0))
}

/// `log(sum(e^value))`; `largest` is the maximum.
pub(super) fn log_sum_exp(scans: Scans, values: &[f32], largest: f32) -> f64 {
    f64::from(largest) + scans.sum_of_exponentials(values, largest).ln()
}

/// The weights that a token is drawn by. Reused from row to row.
#[derive(Debug, Default)]
pub(super) struct Weights {
    weights: Vec<f32>,
    /// Of every [`TILE`].
    maxima: Vec<f32>,
    /// Of every [`STRETCH`].
    sums: Vec<f64>,
    candidates: Vec<(u32, f32)>,
}

impl Weights {
    /// `e^((values[i] - largest) * scale)`, and 0 for those under `floor`. The largest weight is 1.
    pub(super) fn set(&mut self, scans: Scans, values: &[f32], largest: f32, scale: f32, floor: f32) {
        fit(&mut self.weights, values.len());
        fit(&mut self.maxima, values.len().div_ceil(TILE));
        fit(&mut self.sums, values.len().div_ceil(STRETCH));
        scans.weigh(values, largest, scale, floor, &mut self.weights, &mut self.maxima, &mut self.sums);
    }

    /// Of all weights.
    pub(super) fn sum(&self) -> f64 {
        self.sums.iter().sum()
    }

    /// Sets to 0 all but the smallest set of weights, in [`rank`] order, whose sum reaches `share` of all.
    pub(super) fn keep(&mut self, scans: Scans, share: f64) {
        let (index, bound) = self.nucleus(scans, share);
        scans.cut_after(&mut self.weights, &self.maxima, &mut self.sums, index as usize, bound);
    }

    /// The last member of that set.
    fn nucleus(&mut self, scans: Scans, share: f64) -> (u32, f32) {
        /// More than any weight.
        const ABOVE_ALL: f32 = f32::from_bits(1f32.to_bits() + 1);
        let Self { weights, maxima, sums, candidates } = self;
        let goal = share * sums.iter().sum::<f64>();
        // The weights from `high` on are too few, those from `low` on are enough. Most of the mass is usually in few weights, so this begins above.
        let (mut high, mut above) = (ABOVE_ALL, 0.0);
        let mut low = 0.25f32;
        loop {
            let mass = scans.mass_from(weights, maxima, low);
            if mass >= goal {
                break;
            }
            if low < 1e-12 {
                // Rounding, or a goal of nearly all.
                (low, high, above) = (f32::MIN_POSITIVE, ABOVE_ALL, 0.0);
                break;
            }
            (high, above) = (low, mass);
            low *= 0.0625;
        }
        candidates.clear();
        scans.collect(weights, maxima, low, high, candidates);
        last_within(candidates, low, high, goal - above)
    }

    /// The index at which the running sum of the weights passes `u` of the total, 0 <= u < 1. Never one of weight 0.
    pub(super) fn draw(&self, u: f64) -> u32 {
        let mut goal = u * self.sum();
        let mut at = 0;
        // Rounding may carry the goal past the end: then the last stretch with any weight takes it.
        for (stretch, &sum) in self.sums.iter().enumerate().filter(|&(_, &sum)| sum > 0.0) {
            at = stretch * STRETCH;
            if goal < sum {
                break;
            }
            goal -= sum;
        }
        let mut chosen = at;
        for (index, &weight) in self.weights.iter().enumerate().skip(at).take(STRETCH).filter(|&(_, &w)| w > 0.0) {
            chosen = index;
            goal -= f64::from(weight);
            if goal < 0.0 {
                break;
            }
        }
        chosen as u32
    }
}

/// Of these (index, weight), in [`rank`] order, the one at which the running sum reaches the goal, or else the last. All weights are from `low` up to but
/// without `high`. Forgets some of the others.
fn last_within(candidates: &mut Vec<(u32, f32)>, low: f32, high: f32, mut goal: f64) -> (u32, f32) {
    /// So few are sorted at once.
    const FEW: usize = 64;
    const BUCKETS: usize = 256;
    if candidates.len() > FEW {
        // Positive floats lie as their bits do: buckets of equal numbers of floats, and then only the one in which the border lies.
        let width = (high.to_bits() - low.to_bits()).div_ceil(BUCKETS as u32);
        let bucket = |weight: f32| ((weight.to_bits() - low.to_bits()) / width) as usize;
        let mut masses = [0f64; BUCKETS];
        candidates.iter().for_each(|&(_, weight)| masses[bucket(weight)] += f64::from(weight));
        let mut border = 0;
        for (at, &mass) in masses.iter().enumerate().rev().filter(|&(_, &mass)| mass > 0.0) {
            border = at;
            if mass >= goal {
                break;
            }
            goal -= mass;
        }
        candidates.retain(|&(_, weight)| bucket(weight) == border);
    }
    candidates.sort_unstable_by(rank);
    let mut sum = 0.0;
    let border = candidates.iter().position(|&(_, weight)| {
        sum += f64::from(weight);
        sum >= goal
    });
    candidates[border.unwrap_or(candidates.len() - 1)]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn weighed(row: &[f32]) -> Weights {
        let mut weights = Weights::default();
        weights.set(Scans::best(), row, row.iter().copied().fold(f32::MIN, f32::max), 1.0, 0.0);
        weights
    }

    #[test]
    fn refuses_what_is_not_logits() {
        let mut tiles = Vec::new();
        for len in [1, 7, 8, 65, 200] {
            for at in [0, len / 2, len - 1] {
                let mut row = vec![1.0; len];
                row[at] = f32::NAN;
                assert_eq!(tile_maxima(Scans::best(), &row, &mut tiles), Err(LogitsError::NotANumber));
            }
            assert_eq!(tile_maxima(Scans::best(), &vec![f32::NEG_INFINITY; len], &mut tiles), Err(LogitsError::Empty));
        }
        assert_eq!(tile_maxima(Scans::best(), &[], &mut tiles), Err(LogitsError::Empty));
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
            let top = tile_maxima(Scans::best(), &row, &mut tiles).unwrap();
            let mut sorted: Vec<(u32, f32)> = row.iter().copied().enumerate().map(|(i, v)| (i as u32, v)).collect();
            sorted.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap());
            prop_assert_eq!((first_of(&row, &tiles, top), top), sorted[0]);
            sorted.truncate(n);
            let mut found = Vec::new();
            largest(&row, &tiles, n, &mut Vec::new(), &mut found);
            prop_assert_eq!(found, sorted);
        }

        #[test]
        fn a_nucleus_is_the_smallest_set(
            row in prop_oneof![3 => row(), 1 => prop::collection::vec(-9f32..2.0, 2000..4000)],
            share in 0.0f64..0.999,
        ) {
            let mut weights = weighed(&row);
            let w = weights.weights.clone();
            let total: f64 = w.iter().map(|&w| f64::from(w)).sum();
            weights.keep(Scans::best(), share);
            let kept = &weights.weights;
            let mass: f64 = kept.iter().map(|&w| f64::from(w)).sum();
            let smallest = kept.iter().copied().filter(|&w| w > 0.0).fold(f32::MAX, f32::min);
            let dropped = w.iter().zip(kept).filter(|(_, kept)| **kept == 0.0).map(|(w, _)| *w).fold(0.0, f32::max);
            prop_assert!(mass >= share * total - 1e-9 * total);
            prop_assert!(mass - f64::from(smallest) <= share * total + 1e-9 * total, "one more than needed");
            prop_assert!(dropped <= smallest);
        }

        #[test]
        fn draw_inverts_the_running_sum(row in row(), u in 0.0f64..1.0) {
            let weights = weighed(&row);
            let w = &weights.weights;
            let at = weights.draw(u) as usize;
            let total: f64 = w.iter().map(|&w| f64::from(w)).sum();
            let before: f64 = w[..at].iter().map(|&w| f64::from(w)).sum();
            prop_assert!(w[at] > 0.0);
            prop_assert!(before <= u * total + 1e-9 * total && u * total <= before + f64::from(w[at]) + 1e-9 * total);
        }

        #[test]
        fn log_sum_exp_is_the_naive_one(row in row()) {
            let top = row.iter().copied().fold(f32::MIN, f32::max);
            let naive = row.iter().map(|&v| f64::from(v).exp()).sum::<f64>().ln();
            prop_assert!((log_sum_exp(Scans::best(), &row, top) - naive).abs() < 1e-6);
        }
    }
}
