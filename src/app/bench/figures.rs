//! The arithmetic of a report: medians, percentiles, ratios of what was measured in the same round, and how far two distributions are apart.

use serde_json::{Value, json};

/// The value below which a share `at` (0 to 1) lies, between neighbours in proportion; NaN of nothing.
pub(super) fn percentile(values: &[f64], at: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = at.clamp(0.0, 1.0) * last as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

/// The middle value.
pub(super) fn median(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

/// Each round's value over the same round's reference: what disturbs a round disturbs both.
pub(super) fn ratios(values: &[f64], reference: &[f64]) -> Vec<f64> {
    values.iter().zip(reference).map(|(value, reference)| value / reference).collect()
}

/// The median with its surroundings.
pub(super) fn spread(values: &[f64]) -> Value {
    json!({
        "median": number(median(values)),
        "min": number(percentile(values, 0.0)),
        "max": number(percentile(values, 1.0)),
        "rounds": values.iter().map(|&value| number(value)).collect::<Vec<_>>(),
    })
}

/// Six digits are more than any of these figures is worth.
pub(super) fn number(value: f64) -> Value {
    if value == 0.0 || !value.is_finite() {
        return if value.is_finite() { json!(0.0) } else { Value::Null };
    }
    let scale = 10f64.powi(5 - value.abs().log10().floor() as i32);
    json!((value * scale).round() / scale)
}

/// Log-probabilities of a row of logits, in f64.
pub(super) fn log_probabilities(logits: &[f32], out: &mut Vec<f64>) {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    let offset = f64::from(largest) + sum.ln();
    out.clear();
    out.extend(logits.iter().map(|&logit| f64::from(logit) - offset));
}

/// `sum p (ln p - ln q)`, in nats, of two rows of log-probabilities.
pub(super) fn kl(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).filter(|(p, _)| p.is_finite()).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// The likeliest; of equals the first.
pub(super) fn likeliest(row: &[f64]) -> usize {
    row.iter().enumerate().fold(0, |best, (at, value)| if *value > row[best] { at } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_between_neighbours() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!((percentile(&values, 0.0), median(&values), percentile(&values, 1.0)), (1.0, 2.5, 4.0));
        assert!((percentile(&values, 0.99) - 3.97).abs() < 1e-12);
        assert_eq!((median(&[7.0]), percentile(&[7.0], 0.99)), (7.0, 7.0));
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_slow_round_is_slow_for_both_sides_of_a_ratio() {
        let (base, mixed) = ([100.0, 50.0, 200.0], [90.0, 45.0, 180.0]);
        assert!(ratios(&mixed, &base).iter().all(|ratio| (ratio - 0.9).abs() < 1e-12));
        assert!((median(&ratios(&[90.0, 45.0, 100.0], &base)) - 0.9).abs() < 1e-12);
    }

    #[test]
    fn numbers_are_rounded_and_never_nan() {
        assert_eq!(number(1234.56789), json!(1234.57));
        assert_eq!(number(0.000_123_456_78), json!(0.000_123_457));
        assert_eq!((number(f64::NAN), number(0.0), number(-2.5)), (Value::Null, json!(0.0), json!(-2.5)));
    }

    #[test]
    fn kl_is_that_of_two_coins() {
        let logs = |logits: &[f32]| {
            let mut out = Vec::new();
            log_probabilities(logits, &mut out);
            out
        };
        // Logits of (3/4, 1/4) and (1/2, 1/2), shifted by anything.
        let (p, q) = (logs(&[3f32.ln() + 90.0, 90.0]), logs(&[-5.0, -5.0]));
        let expected = 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln();
        assert!((kl(&p, &q) - expected).abs() < 1e-6, "{}", kl(&p, &q));
        assert_eq!(kl(&q, &q), 0.0);
        assert!((p.iter().map(|p| p.exp()).sum::<f64>() - 1.0).abs() < 1e-12);
        assert_eq!((likeliest(&p), likeliest(&q)), (0, 0));
    }

    #[test]
    fn what_cannot_happen_adds_nothing_to_kl() {
        let mut p = Vec::new();
        log_probabilities(&[0.0, f32::NEG_INFINITY], &mut p);
        assert_eq!(kl(&p, &[0.0, -1.0]), 0.0);
    }
}
