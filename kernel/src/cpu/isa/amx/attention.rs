//! The two products of attention.
#![allow(unsafe_code)]

use super::{
    ROWS, TILE,
    tile::{Room, dot, load, store, tail, zero},
    widen::{Bf16, Source, prefetch},
};
use crate::{
    cpu::{
        attention::SPAN_TOKENS,
        format::WORD_LINE,
        lanes::LANES,
        tile::{Left, Tiles, Values},
    },
    rounding::GROUP,
};

/// [`super::product::multiply`] over panels of keys, after [`crate::cpu::isa::Tiling::begin`] for attention: with one tile of activations and one of weights.
///
/// # Safety
/// As for [`super::product::multiply`].
#[inline(always)]
pub(super) unsafe fn scores(left: Left, panels: &[*const u8], out: Tiles) {
    let groups = left.inputs.div_ceil(GROUP);
    let mut room = Room::<1>::new();
    for (number, &panel) in panels.iter().enumerate() {
        // SAFETY: the caller's contract.
        unsafe {
            zero!(0);
            zero!(1);
            for group in 0..groups {
                if left.ahead > 0 {
                    Bf16::prefetch(panel.wrapping_add(left.ahead), left.inputs, group);
                }
                let whole = (group + 1) * GROUP <= left.inputs;
                let keys = if whole { panel.add(group * TILE) } else { tail(panel, left.inputs, &mut room) };
                let rows = left.words.add(group * left.height * LANES);
                load!(6, keys, WORD_LINE);
                load!(4, rows, WORD_LINE);
                dot!(0, 4, 6);
                if left.height > ROWS {
                    load!(4, rows.add(ROWS * LANES), WORD_LINE);
                    dot!(1, 4, 6);
                }
            }
            let out = out.data.add(number * out.panel_stride);
            store!(0, out);
            if left.height > ROWS {
                store!(1, out.add(ROWS * LANES));
            }
        }
    }
}

/// `out[p][i][j] += sum_t weights[i][t] values[t][16 p + j]`, after [`crate::cpu::isa::Tiling::begin`] for attention.
///
/// # Safety
/// As for [`crate::cpu::tile::accumulate`].
#[inline(always)]
pub(super) unsafe fn accumulate(values: Values<'_>, out: Tiles) {
    // SAFETY: the caller's contract.
    unsafe {
        for first in (0..values.panels).step_by(4) {
            let panels = Values { panels: (values.panels - first).min(4), ..values };
            let out = Tiles { data: out.data.add(first * out.panel_stride), ..out };
            match panels.panels {
                1 => accumulate_panels::<1>(panels, first, out),
                2 => accumulate_panels::<2>(panels, first, out),
                3 => accumulate_panels::<3>(panels, first, out),
                _ => accumulate_panels::<4>(panels, first, out),
            }
        }
    }
}

/// The panels from `first` on, at most four.
#[inline(always)]
unsafe fn accumulate_panels<const P: usize>(values: Values<'_>, first: usize, out: Tiles) {
    /// Bytes of sixteen tokens' values in sixteen columns.
    const PANEL: usize = ROWS / 2 * WORD_LINE;
    let mut room = Room::<2>::new();
    // SAFETY: the contract of `accumulate`, of which this is a part. Of a block that is not full only the tokens are read that are there.
    unsafe {
        for rows in (0..values.height).step_by(ROWS) {
            let place = |panel: usize| out.data.wrapping_add(panel * out.panel_stride + rows * LANES);
            load!(0, place(0), WORD_LINE);
            if P > 1 {
                load!(1, place(1), WORD_LINE);
            }
            if P > 2 {
                load!(2, place(2), WORD_LINE);
            }
            if P > 3 {
                load!(3, place(3), WORD_LINE);
            }
            for (block, &start) in values.blocks.iter().enumerate() {
                let mut start = start.add(first * values.panel_bytes);
                if values.ahead > 0 && rows == 0 {
                    let lines = start.wrapping_add(values.ahead);
                    (0..P * PANEL).step_by(WORD_LINE).for_each(|line| prefetch(lines.wrapping_add(line)));
                }
                let tokens = values.tokens - block * LANES;
                if tokens < LANES {
                    let bytes = tokens.div_ceil(2) * WORD_LINE;
                    for panel in 0..P {
                        let to = room.start().add(panel * PANEL);
                        std::ptr::copy_nonoverlapping(start.add(panel * values.panel_bytes), to, bytes);
                        to.add(bytes).write_bytes(0, PANEL - bytes);
                    }
                    start = room.start();
                }
                let weights = values.weights.add(rows * SPAN_TOKENS + block * LANES / 2);
                load!(5, weights, SPAN_TOKENS * 4);
                load!(7, start, WORD_LINE);
                dot!(0, 5, 7);
                if P > 1 {
                    load!(7, start.add(PANEL), WORD_LINE);
                    dot!(1, 5, 7);
                }
                if P > 2 {
                    load!(7, start.add(2 * PANEL), WORD_LINE);
                    dot!(2, 5, 7);
                }
                if P > 3 {
                    load!(7, start.add(3 * PANEL), WORD_LINE);
                    dot!(3, 5, 7);
                }
            }
            store!(0, place(0));
            if P > 1 {
                store!(1, place(1));
            }
            if P > 2 {
                store!(2, place(2));
            }
            if P > 3 {
                store!(3, place(3));
            }
        }
    }
}
