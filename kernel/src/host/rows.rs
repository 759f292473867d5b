//! Scans that the gradient makes over rows of activations, for every instruction set as [`super`] says.

use super::*;

scans! {
    /// Replaces every value by `e^(value - m)`, where m is the largest of them and `at_least`; gives m and the sum. All are NaN if a value is NaN or plus infinity.
    fn exponentials(values: &mut [f32], at_least: f32) -> (f32, f64) = exponentials;
    /// `out = gate / (1 + e^-gate) * up`
    fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) = swiglu;
    /// The derivatives of [`Scans::swiglu`] by gate and up, from the one by its result.
    fn swiglu_back(gate: &[f32], up: &[f32], d: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) = swiglu_back;
}

#[inline(always)]
fn exponentials(values: &mut [f32], at_least: f32) -> (f32, f64) {
    const INFINITY: i32 = f32::INFINITY.to_bits().cast_signed();
    let (mut largest, mut magnitude) = (key(at_least), 0);
    for &value in &*values {
        largest = largest.max(key(value));
        magnitude = magnitude.max(value.to_bits().cast_signed() & i32::MAX);
    }
    if magnitude > INFINITY || largest == INFINITY {
        values.fill(f32::NAN);
        return (f32::NAN, f64::NAN);
    }
    let largest = value_of(largest);
    let mut total = 0.0;
    for tile in values.chunks_mut(TILE) {
        // Two loops: the compiler makes vectors of each, but not of both in one.
        tile.iter_mut().for_each(|value| *value = exp(*value - largest));
        total += sum(tile);
    }
    (largest, total)
}

/// `1 / (1 + e^-x)`, from the exponential of what is not positive.
#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    let e = exp(-x.abs());
    let numerator = if x > 0.0 { 1.0 } else { e };
    numerator / (1.0 + e)
}

#[inline(always)]
fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate * sigmoid(*gate) * up;
    }
}

#[inline(always)]
fn swiglu_back(gate: &[f32], up: &[f32], d: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
    for ((((d_gate, d_up), gate), up), d) in d_gate.iter_mut().zip(d_up).zip(gate).zip(up).zip(d) {
        let s = sigmoid(*gate);
        let silu = gate * s;
        *d_up = d * silu;
        *d_gate = d * up * (s + silu - silu * s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|i| ((i * 37 + 11) % 101) as f32 * 0.02 * scale - scale).collect()
    }

    fn bits(row: &[f32]) -> Vec<u32> {
        row.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn they_are_what_they_say_with_the_same_bits_everywhere() {
        for len in [1, 7, 64, 130, 1000] {
            let (gate, up, d) = (row(len, 8.0), row(len, 2.0), row(len, 1.0));
            let mut all = Vec::new();
            for scans in Scans::available() {
                let mut exponentials = gate.clone();
                let (largest, total) = scans.exponentials(&mut exponentials, -3.0);
                let expected = gate.iter().fold(-3f32, |most, x| most.max(*x));
                assert_eq!(largest, expected);
                for (x, e) in gate.iter().zip(&exponentials) {
                    assert!((f64::from(*e) - f64::from(x - largest).exp()).abs() < 3e-7);
                }
                assert!((total - exponentials.iter().map(|e| f64::from(*e)).sum::<f64>()).abs() < 1e-9 * total);
                let (mut out, mut d_gate, mut d_up) = (vec![0.0; len], vec![0.0; len], vec![0.0; len]);
                scans.swiglu(&gate, &up, &mut out);
                scans.swiglu_back(&gate, &up, &d, &mut d_gate, &mut d_up);
                for i in 0..len {
                    let (g, u) = (f64::from(gate[i]), f64::from(up[i]));
                    let silu = |g: f64| g / (1.0 + (-g).exp());
                    let slope = (silu(g + 1e-5) - silu(g - 1e-5)) / 2e-5;
                    assert!((f64::from(out[i]) - silu(g) * u).abs() < 1e-5);
                    assert!((f64::from(d_up[i]) - silu(g) * f64::from(d[i])).abs() < 1e-5);
                    assert!((f64::from(d_gate[i]) - slope * u * f64::from(d[i])).abs() < 1e-5);
                }
                all.push([exponentials, out, d_gate, d_up].map(|row| bits(&row)));
            }
            assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so() {
        for scans in Scans::available() {
            for bad in [f32::NAN, f32::INFINITY, -f32::NAN] {
                let mut row = row(70, 1.0);
                row[40] = bad;
                let (largest, total) = scans.exponentials(&mut row, f32::NEG_INFINITY);
                assert!(largest.is_nan() && total.is_nan() && row[3].is_nan());
                let mut out = [0.0];
                scans.swiglu(&[bad], &[1.0], &mut out);
                assert!(!out[0].is_finite());
            }
            let mut row = [1.0, f32::NEG_INFINITY];
            assert_eq!(scans.exponentials(&mut row, f32::NEG_INFINITY), (1.0, 1.0));
            assert_eq!(row, [1.0, 0.0]);
        }
    }
}
