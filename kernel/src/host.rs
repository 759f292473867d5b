//! Scans over rows of numbers that the host makes between steps, such as those of the sampler over a row of logits.
//!
//! Each scan is written once, in plain Rust, and compiled for every instruction set below; which one runs is chosen by what the processor has. Rust neither
//! fuses a product with a sum nor reorders sums of floats, so that **all of them give the same bits**: wider registers only do the same sooner.
#![allow(unsafe_code)]

/// Values that one maximum summarises.
pub const TILE: usize = 128;
/// Weights that one sum summarises.
pub const STRETCH: usize = 2 * TILE;
/// Independent sums; their order is part of the result.
const LANES: usize = 8;

/// The scans for one instruction set that this processor has: there is no other way to get one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scans(Level);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Scans {
    /// For every instruction set that this processor has, the widest first; the last one is what the target guarantees.
    pub fn available() -> Vec<Self> {
        let mut levels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl");
            if avx512 && is_x86_feature_detected!("avx512dq") && is_x86_feature_detected!("avx512bw") {
                levels.push(Level::Avx512);
            }
            if is_x86_feature_detected!("avx2") {
                levels.push(Level::Avx2);
            }
        }
        levels.push(Level::Portable);
        levels.into_iter().map(Self).collect()
    }

    /// The widest that this processor has.
    pub fn best() -> Self {
        Self::available()[0]
    }
}

macro_rules! scans {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)? = $body:ident;)*) => {
        #[cfg(target_arch = "x86_64")]
        mod avx512 {
            $(#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw")]
            pub(super) fn $name($($arg: $type),*) $(-> $result)? {
                super::$body($($arg),*)
            })*
        }

        #[cfg(target_arch = "x86_64")]
        mod avx2 {
            $(#[target_feature(enable = "avx2")]
            pub(super) fn $name($($arg: $type),*) $(-> $result)? {
                super::$body($($arg),*)
            })*
        }

        impl Scans {
            $($(#[$doc])*
            #[allow(clippy::too_many_arguments)]
            pub fn $name(self, $($arg: $type),*) $(-> $result)? {
                match self.0 {
                    // SAFETY: the body is safe code compiled for these instructions, and only a processor that has them makes this value.
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx512 => unsafe { avx512::$name($($arg),*) },
                    // SAFETY: as above.
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx2 => unsafe { avx2::$name($($arg),*) },
                    Level::Portable => $body($($arg),*),
                }
            })*
        }
    };
}

mod rows;

scans! {
    /// The maximum of every [`TILE`] values, and of all. None if one of them is NaN or plus infinity, or if there is none. `tiles` has one place a tile.
    fn maxima(values: &[f32], tiles: &mut [f32]) -> Option<f32> = maxima;
    /// The sum of `e^(value - largest)`; `largest` is the maximum.
    fn sum_of_exponentials(values: &[f32], largest: f32) -> f64 = sum_of_exponentials;
    /// `weights[i] = e^((values[i] - largest) * scale)`, and 0 for those under `floor`; with the maximum of every [`TILE`] and the sum of every
    /// [`STRETCH`] of them. The largest weight is 1.
    fn weigh(values: &[f32], largest: f32, scale: f32, floor: f32, weights: &mut [f32], maxima: &mut [f32], sums: &mut [f64]) = weigh;
    /// The sum of the weights that are at least `bound`; `maxima` are those of [`Scans::weigh`].
    fn mass_from(weights: &[f32], maxima: &[f32], bound: f32) -> f64 = mass_from;
    /// Adds (index, weight) of the weights from `low` up to but without `high`, in order.
    fn collect(weights: &[f32], maxima: &[f32], low: f32, high: f32, found: &mut Vec<(u32, f32)>) = collect;
    /// Sets to 0 every weight under `bound` and those after `index` that are equal to it; `sums` become those of what is left.
    fn cut_after(weights: &mut [f32], maxima: &[f32], sums: &mut [f64], index: usize, bound: f32) = cut_after;
}

/// An integer that orders as the float does. Unlike a maximum of floats, one of integers may be taken in any order, so that the compiler
/// makes vector instructions of it.
#[inline(always)]
fn key(value: f32) -> i32 {
    let bits = value.to_bits().cast_signed();
    bits ^ ((bits >> 31) & i32::MAX)
}

/// The inverse of [`key`].
#[inline(always)]
fn value_of(key: i32) -> f32 {
    f32::from_bits((key ^ ((key >> 31) & i32::MAX)).cast_unsigned())
}

#[inline(always)]
fn maxima(values: &[f32], tiles: &mut [f32]) -> Option<f32> {
    const INFINITY: i32 = f32::INFINITY.to_bits().cast_signed();
    let mut largest = i32::MIN;
    let mut magnitude = 0;
    for (tile, out) in values.chunks(TILE).zip(tiles) {
        let mut maximum = i32::MIN;
        for &value in tile {
            maximum = maximum.max(key(value));
            magnitude = magnitude.max(value.to_bits().cast_signed() & i32::MAX);
        }
        largest = largest.max(maximum);
        *out = value_of(maximum);
    }
    // A NaN of either sign is larger in magnitude than infinity.
    (!values.is_empty() && magnitude <= INFINITY && largest != INFINITY).then(|| value_of(largest))
}

/// `e^x` for x <= 0, to about 1e-7 of the value; 0 below -87. The polynomial is that of Cephes' expf. Only products and sums in a fixed
/// order, so that every machine gets the same bits.
#[inline(always)]
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

/// Adds to eight fixed lanes.
#[inline(always)]
fn add_to(lanes: &mut [f64; LANES], values: &[f32]) {
    let (eights, rest) = values.as_chunks::<LANES>();
    for eight in eights {
        for lane in 0..LANES {
            lanes[lane] += f64::from(eight[lane]);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(value);
    }
}

/// The sum in f64, in eight fixed lanes.
#[inline(always)]
fn sum(values: &[f32]) -> f64 {
    let mut lanes = [0f64; LANES];
    add_to(&mut lanes, values);
    lanes.iter().sum()
}

#[inline(always)]
fn sum_of_exponentials(values: &[f32], largest: f32) -> f64 {
    let mut total = 0.0;
    let mut made = [0f32; TILE];
    for tile in values.chunks(TILE) {
        // Two loops: the compiler makes vectors of each, but not of both in one.
        made.iter_mut().zip(tile).for_each(|(made, &value)| *made = exp(value - largest));
        total += sum(&made[..tile.len()]);
    }
    total
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn weigh(
    values: &[f32],
    largest: f32,
    scale: f32,
    floor: f32,
    weights: &mut [f32],
    maxima: &mut [f32],
    sums: &mut [f64],
) {
    let stretches = values.chunks(STRETCH).zip(weights.chunks_mut(STRETCH)).zip(maxima.chunks_mut(STRETCH / TILE));
    for (((values, weights), maxima), sum) in stretches.zip(sums) {
        let mut lanes = [0f64; LANES];
        for ((values, weights), maximum) in values.chunks(TILE).zip(weights.chunks_mut(TILE)).zip(maxima) {
            for (weight, &value) in weights.iter_mut().zip(values) {
                let made = exp((value - largest) * scale);
                *weight = if made >= floor { made } else { 0.0 };
            }
            let mut most = 0;
            for &weight in weights.iter() {
                most = most.max(key(weight));
            }
            *maximum = value_of(most);
            add_to(&mut lanes, weights);
        }
        *sum = lanes.iter().sum();
    }
}

#[inline(always)]
fn mass_from(weights: &[f32], maxima: &[f32], bound: f32) -> f64 {
    let mut total = 0.0;
    let mut kept = [0f32; TILE];
    for (tile, _) in weights.chunks(TILE).zip(maxima).filter(|&(_, &maximum)| maximum >= bound) {
        for (kept, &weight) in kept.iter_mut().zip(tile) {
            *kept = if weight >= bound { weight } else { 0.0 };
        }
        total += sum(&kept[..tile.len()]);
    }
    total
}

#[inline(always)]
fn collect(weights: &[f32], maxima: &[f32], low: f32, high: f32, found: &mut Vec<(u32, f32)>) {
    /// So many weights are passed over at once when none is among them.
    const STEP: usize = 16;
    for (tile, (weights, _)) in
        weights.chunks(TILE).zip(maxima).enumerate().filter(|(_, (_, maximum))| **maximum >= low)
    {
        for (step, weights) in weights.chunks(STEP).enumerate() {
            let mut any = 0u32;
            for &weight in weights {
                any |= u32::from(weight >= low) & u32::from(weight < high);
            }
            if any > 0 {
                let first = tile * TILE + step * STEP;
                let kept = weights.iter().enumerate().filter(|&(_, &weight)| weight >= low && weight < high);
                found.extend(kept.map(|(at, &weight)| ((first + at) as u32, weight)));
            }
        }
    }
}

#[inline(always)]
fn cut_after(weights: &mut [f32], maxima: &[f32], sums: &mut [f64], index: usize, bound: f32) {
    let stretches = weights.chunks_mut(STRETCH).zip(maxima.chunks(STRETCH / TILE)).zip(sums);
    for (stretch, ((weights, maxima), total)) in stretches.enumerate() {
        if maxima.iter().all(|&maximum| maximum < bound) {
            weights.fill(0.0);
            *total = 0.0;
            continue;
        }
        let here = (index + 1).saturating_sub(stretch * STRETCH).min(weights.len());
        let (before, after) = weights.split_at_mut(here);
        for weight in before {
            *weight = if *weight >= bound { *weight } else { 0.0 };
        }
        for weight in after {
            *weight = if *weight > bound { *weight } else { 0.0 };
        }
        *total = sum(weights);
    }
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
    fn rows_that_are_not_numbers_have_no_maximum() {
        for scans in Scans::available() {
            assert_eq!(scans.maxima(&[], &mut []), None);
            for len in [1usize, 7, 8, 65, 200] {
                let mut tiles = vec![0.0; len.div_ceil(TILE)];
                assert_eq!(scans.maxima(&vec![f32::NEG_INFINITY; len], &mut tiles), Some(f32::NEG_INFINITY));
                for at in [0, len / 2, len - 1] {
                    for wrong in [f32::NAN, -f32::NAN, f32::INFINITY] {
                        let mut row = vec![1.0; len];
                        row[at] = wrong;
                        assert_eq!(scans.maxima(&row, &mut tiles), None);
                    }
                }
            }
        }
    }

    /// Everything that the scans make of a row, as bits.
    fn all(scans: Scans, row: &[f32], scale: f32, floor: f32) -> (Vec<u32>, Vec<u64>) {
        let tiles = row.len().div_ceil(TILE);
        let (mut tops, mut weights, mut maxima) = (vec![0.0; tiles], vec![9.0; row.len()], vec![9.0; tiles]);
        let mut sums = vec![9.0; row.len().div_ceil(STRETCH)];
        let largest = scans.maxima(row, &mut tops).unwrap();
        let mut wide = vec![scans.sum_of_exponentials(row, largest)];
        scans.weigh(row, largest, scale, floor, &mut weights, &mut maxima, &mut sums);
        wide.extend(&sums);
        let mut narrow = [tops, weights.clone(), maxima.clone()].concat();
        for bound in [1.0, 0.25, 1e-3, 1e-12] {
            wide.push(scans.mass_from(&weights, &maxima, bound));
            let mut found = Vec::new();
            scans.collect(&weights, &maxima, bound, 2.0 * bound, &mut found);
            narrow.extend(found.iter().flat_map(|&(at, weight)| [at as f32, weight]));
        }
        let last = weights.len() / 2;
        let bound = weights[last];
        scans.cut_after(&mut weights, &maxima, &mut sums, last, bound);
        wide.extend(&sums);
        narrow.extend(&weights);
        (narrow.into_iter().map(f32::to_bits).collect(), wide.into_iter().map(f64::to_bits).collect())
    }

    proptest! {
        #[test]
        fn every_instruction_set_gives_the_same_bits(
            row in prop::collection::vec(prop_oneof![8 => -40f32..20.0, 1 => Just(f32::NEG_INFINITY), 1 => Just(-0.0)], 0..900),
            scale in 0.3f32..8.0,
            floor in prop_oneof![Just(0.0f32), 0.0f32..0.5],
        ) {
            let row: Vec<f32> = std::iter::once(1.5).chain(row).collect();
            let expected = all(Scans(Level::Portable), &row, scale, floor);
            for scans in Scans::available() {
                prop_assert_eq!(all(scans, &row, scale, floor), expected.clone(), "{:?}", scans);
            }
        }

        #[test]
        fn sums_and_maxima_are_those_of_the_weights(
            row in prop::collection::vec(-20f32..20.0, 1..900),
            scale in 0.3f32..3.0,
            at in any::<prop::sample::Index>(),
        ) {
            let scans = Scans::best();
            let tiles = row.len().div_ceil(TILE);
            let (mut maxima, mut weights) = (vec![0.0; tiles], vec![0.0; row.len()]);
            let mut sums = vec![0.0; row.len().div_ceil(STRETCH)];
            let largest = scans.maxima(&row, &mut maxima).unwrap();
            prop_assert_eq!(largest, row.iter().copied().fold(f32::MIN, f32::max));
            scans.weigh(&row, largest, scale, 0.0, &mut weights, &mut maxima, &mut sums);
            let check = |weights: &[f32], sums: &[f64]| {
                weights.chunks(STRETCH).zip(sums).all(|(stretch, sum)| {
                    let naive: f64 = stretch.iter().map(|&weight| f64::from(weight)).sum();
                    (naive - sum).abs() <= 1e-12 * naive
                })
            };
            prop_assert!(check(&weights, &sums));
            prop_assert!(weights.chunks(TILE).zip(&maxima).all(|(tile, &maximum)| tile.iter().copied().fold(0.0, f32::max) == maximum));
            let last = at.index(row.len());
            let (bound, before) = (weights[last], weights.clone());
            let from = |bound: f32| before.iter().copied().enumerate().filter(move |&(_, weight)| weight >= bound);
            let naive: f64 = from(bound).map(|(_, weight)| f64::from(weight)).sum();
            prop_assert!((scans.mass_from(&weights, &maxima, bound) - naive).abs() <= 1e-12 * naive);
            let mut found = Vec::new();
            scans.collect(&weights, &maxima, bound, 0.7, &mut found);
            prop_assert!(found.iter().copied().eq(from(bound).filter(|&(_, w)| w < 0.7).map(|(at, w)| (at as u32, w))));
            scans.cut_after(&mut weights, &maxima, &mut sums, last, bound);
            prop_assert!(check(&weights, &sums));
            for (index, (&before, &after)) in before.iter().zip(&weights).enumerate() {
                let kept = before > bound || (before == bound && index <= last);
                prop_assert_eq!(after, if kept { before } else { 0.0 });
            }
        }
    }
}
