//! The candle backend on candle's CPU device, held to the reference.

use super::*;
use crate::suite;

fn backend() -> CandleBackend {
    CandleBackend::new(Device::Cpu)
}

/// In bfloat16 the inputs of a product and its result are rounded too: 1/256 each of the largest term. 4-bit weights are not coarsened here,
/// as they are in the reference: half a step of fifteen.
fn tolerance(precision: Precision) -> f32 {
    match precision {
        Precision::F32 => 4e-6,
        Precision::Bf16 | Precision::Q8 => 2e-2,
        Precision::Q4 => 1e-1,
    }
}

#[test]
fn products_equal_the_reference() {
    suite::products_equal_reference(backend(), |group| tolerance(group.precision));
}

#[test]
fn attention_equals_the_reference() {
    suite::attention_equals_reference(backend(), tolerance);
}

#[test]
fn bad_batches_and_shapes_are_refused() {
    suite::bad_batches_are_refused(backend());
    suite::bad_shapes_are_refused(backend());
}
