//! Means with 95 % intervals.

use serde::{Deserialize, Serialize};

use crate::rng::{Purpose, Stream};

/// The two-sided 95 % quantile of the standard normal.
const Z: f64 = 1.959_963_984_540_054;
const RESAMPLES: usize = 2000;

/// How an interval was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IntervalKind {
    /// Wilson's score interval, for scores that are all 0 or 1: right at few items and near 0 and 1, where the normal one is not (Wilson 1927; Brown, Cai & DasGupta 2001).
    Wilson,
    /// Percentiles of the means of 2000 resamples of the items, for scores of any other kind (Efron 1979).
    Bootstrap,
}

/// A 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
    /// How it was made.
    pub kind: IntervalKind,
}

/// A mean over items.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// Its interval; none where a single score that is not 0 or 1 gives none.
    pub interval: Option<Interval>,
    /// Items.
    pub n: usize,
}

impl Estimate {
    /// The mean of the scores, one an item: Wilson's interval if all are 0 or 1, else the bootstrap's (its draws follow from the seed).
    pub fn of(scores: &[f64], seed: u64) -> Self {
        let n = scores.len();
        let mean = if n == 0 { 0.0 } else { scores.iter().sum::<f64>() / n as f64 };
        let interval = if n > 0 && scores.iter().all(|&score| score == 0.0 || score == 1.0) {
            let (low, high) = wilson(mean * n as f64, n);
            Some(Interval { low, high, kind: IntervalKind::Wilson })
        } else if n > 1 {
            let (low, high) = bootstrap(scores, seed);
            Some(Interval { low, high, kind: IntervalKind::Bootstrap })
        } else {
            None
        };
        Self { mean, interval, n }
    }

    /// The mean of `after - before` over the same items: narrower than two intervals laid side by side, since both saw the same questions. Always the bootstrap. The slices have one length.
    pub fn of_gain(before: &[f64], after: &[f64], seed: u64) -> Self {
        let gains: Vec<f64> = before.iter().zip(after).map(|(before, after)| after - before).collect();
        let n = gains.len();
        let mean = if n == 0 { 0.0 } else { gains.iter().sum::<f64>() / n as f64 };
        let (low, high) = if n > 1 { bootstrap(&gains, seed) } else { (mean, mean) };
        Self { mean, interval: (n > 1).then_some(Interval { low, high, kind: IntervalKind::Bootstrap }), n }
    }
}

/// Wilson's 95 % score interval of a share; `n` is above zero.
pub fn wilson(successes: f64, n: usize) -> (f64, f64) {
    let n = n as f64;
    let share = successes / n;
    let centre = (share + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
    let half = Z / (1.0 + Z * Z / n) * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    ((centre - half).max(0.0), (centre + half).min(1.0))
}

fn bootstrap(scores: &[f64], seed: u64) -> (f64, f64) {
    let mut stream = Stream::new(seed, Purpose::Bootstrap, 0);
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|_| (0..scores.len()).map(|_| scores[stream.below(scores.len())]).sum::<f64>() / scores.len() as f64)
        .collect();
    means.sort_by(f64::total_cmp);
    let tail = RESAMPLES / 40;
    (means[tail], means[RESAMPLES - 1 - tail])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilson_matches_published_values() {
        // R's binom::binom.wilson: 0 of 10, 5 of 10, 81 of 263 (Newcombe 1998, table I)
        for (successes, n, low, high) in
            [(0.0, 10, 0.0, 0.2775), (5.0, 10, 0.2366, 0.7634), (81.0, 263, 0.2553, 0.3662)]
        {
            let got = wilson(successes, n);
            assert!((got.0 - low).abs() < 5e-5 && (got.1 - high).abs() < 5e-5, "{got:?}");
        }
    }

    #[test]
    fn the_kind_follows_the_scores() {
        let kind = |scores: &[f64]| Estimate::of(scores, 1).interval.map(|interval| interval.kind);
        assert_eq!(kind(&[0.0, 1.0, 1.0]), Some(IntervalKind::Wilson));
        assert_eq!(kind(&[1.0]), Some(IntervalKind::Wilson));
        assert_eq!(kind(&[0.0, 0.5]), Some(IntervalKind::Bootstrap));
        assert_eq!((kind(&[0.5]), kind(&[])), (None, None));
    }

    #[test]
    fn the_bootstrap_is_near_the_normal_interval_and_repeats() {
        let mut stream = Stream::new(9, Purpose::Task, 0);
        let scores: Vec<f64> = (0..400).map(|_| stream.uniform()).collect();
        let estimate = Estimate::of(&scores, 3);
        let half = Z * (1.0f64 / 12.0 / 400.0).sqrt();
        let interval = estimate.interval.unwrap();
        assert!(
            (interval.low - (estimate.mean - half)).abs() < 0.01
                && (interval.high - (estimate.mean + half)).abs() < 0.01
        );
        assert_eq!(estimate, Estimate::of(&scores, 3));
    }

    #[test]
    fn a_gain_on_the_same_items_is_sharper() {
        let before: Vec<f64> = (0..100).map(|i| f64::from(u8::from(i % 2 == 0))).collect();
        let after: Vec<f64> = (0..100).map(|i| f64::from(u8::from(i % 2 == 0 || i < 20))).collect();
        let gain = Estimate::of_gain(&before, &after, 1);
        assert!((gain.mean - 0.1).abs() < 1e-12);
        let interval = gain.interval.unwrap();
        assert!(interval.low > 0.0 && interval.high < 0.2, "{interval:?}");
    }
}
