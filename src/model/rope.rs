//! Rotary position embedding: the table of angles.

use std::f64::consts::TAU;

use super::{ModelSpec, RopeScaling};

/// Inverse frequency of every pair, `[head_dim / 2]`, after scaling. Llama 3's scaling is
/// `_compute_llama3_parameters` of transformers. Computed in f64, rounded once to f32.
pub(super) fn inverse_frequencies(spec: &ModelSpec) -> Vec<f32> {
    let pairs = spec.head_dim / 2;
    (0..pairs)
        .map(|pair| {
            let plain = spec.rope.theta.powf(-(2.0 * pair as f64) / spec.head_dim as f64);
            let scaled = match &spec.rope.scaling {
                RopeScaling::Default => plain,
                RopeScaling::Linear { factor } => plain / factor,
                RopeScaling::Factors(factors) => plain / f64::from(factors[pair]),
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                    let wavelength = TAU / plain;
                    if wavelength > original_max_position_embeddings / low_freq_factor {
                        plain / factor
                    } else if wavelength < original_max_position_embeddings / high_freq_factor {
                        plain
                    } else {
                        let smooth = (original_max_position_embeddings / wavelength - low_freq_factor)
                            / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * plain / factor + smooth * plain
                    }
                }
            };
            scaled as f32
        })
        .collect()
}

/// Cosines and sines, each `[positions, head_dim / 2]`. The angle is the f32 product of position and frequency, as
/// transformers and candle have it: a more exact one would be another model's at long contexts.
pub(super) fn tables(spec: &ModelSpec, positions: usize) -> (Vec<f32>, Vec<f32>) {
    let frequencies = inverse_frequencies(spec);
    let angles = (0..positions).flat_map(|position| {
        frequencies.iter().map(move |frequency| f64::from(position as f32 * frequency)).collect::<Vec<_>>()
    });
    angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Architecture, RopeSpec};

    fn spec(scaling: RopeScaling) -> ModelSpec {
        ModelSpec {
            architecture: Architecture::Llama,
            hidden: 16,
            intermediate: 16,
            layers: 1,
            heads: 2,
            kv_heads: 1,
            head_dim: 8,
            vocab: 10,
            max_positions: 64,
            rms_eps: 1e-5,
            rope: RopeSpec { theta: 10_000.0, scaling },
            eos: vec![],
            bos: None,
        }
    }

    fn close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() <= 1e-6 * b.abs(), "{found:?} {expected:?}");
        }
    }

    #[test]
    fn frequencies_of_every_scaling() {
        close(&inverse_frequencies(&spec(RopeScaling::Default)), &[1.0, 0.1, 0.01, 0.001]);
        close(&inverse_frequencies(&spec(RopeScaling::Linear { factor: 4.0 })), &[0.25, 0.025, 0.0025, 0.00025]);
        close(
            &inverse_frequencies(&spec(RopeScaling::Factors(vec![1.0, 2.0, 4.0, 8.0]))),
            &[1.0, 0.05, 0.0025, 0.000125],
        );
        // From transformers 5.23 with the same numbers: kept, interpolated, divided, divided.
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 128.0,
        };
        close(&inverse_frequencies(&spec(llama3)), LLAMA3);
    }

    const LLAMA3: &[f32] = &[1.0, 0.042_751_18, 0.00125, 0.000_125];

    #[test]
    fn tables_are_position_major() {
        let (cos, sin) = tables(&spec(RopeScaling::Default), 3);
        assert_eq!(cos.len(), 12);
        close(&cos[8..], &[2f32.cos(), 0.2f32.cos(), 0.02f32.cos(), 0.002f32.cos()]);
        close(&sin[4..8], &[1f32.sin(), 0.1f32.sin(), 0.01f32.sin(), 0.001f32.sin()]);
    }
}
