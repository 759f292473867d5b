//! Rows times panels, on tiles or, if they are few, without.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{
    EARLY, FEW, RING, ROWS, TILE,
    tile::{Room, dot, load, store, tail, zero},
    widen::{Source, widen},
};
use crate::{
    cpu::{
        format::WORD_LINE,
        lanes::LANES,
        tile::{Left, Tiles},
    },
    rounding::GROUP,
};

/// `out[p][i][j] = sum_k left[i][k] panels[p][k][j]`. Widened panels are left in [`Left::widened`], if there is room.
///
/// # Safety
/// As for [`crate::cpu::tile::multiply`], after [`crate::cpu::isa::Tiling::begin`] for products. `left` holds its rows and their inputs up to a multiple of thirty-two.
#[inline(always)]
pub(super) unsafe fn multiply<S: Source>(left: Left, panels: &[*const u8], out: Tiles) {
    let bytes = left.inputs.div_ceil(GROUP) * TILE;
    for (i, panels) in panels.chunks(2).enumerate() {
        // SAFETY: the caller's contract; `out` and `widened` have room for every panel.
        unsafe {
            let kept = if left.widened.is_null() { left.widened } else { left.widened.add(2 * i * bytes) };
            let out = Tiles { data: out.data.add(2 * i * out.panel_stride), ..out };
            if S::WIDENS && left.widened.is_null() {
                match (left.rows, panels) {
                    (1, &[a, b]) => few::<S, 1, 2>(left, [a, b], out),
                    (1, &[a]) => few::<S, 1, 1>(left, [a], out),
                    (2, &[a, b]) => few::<S, 2, 2>(left, [a, b], out),
                    (2, &[a]) => few::<S, 2, 1>(left, [a], out),
                    _ => {}
                }
                if left.rows <= FEW {
                    continue;
                }
            }
            match (left.height, panels) {
                (ROWS, &[a, b]) => block::<S, 1, 2>(left, [a, b], kept, out),
                (ROWS, &[a]) => block::<S, 1, 1>(left, [a], kept, out),
                (_, &[a, b]) => block::<S, 2, 2>(left, [a, b], kept, out),
                (_, &[a]) => block::<S, 2, 1>(left, [a], kept, out),
                _ => {}
            }
        }
    }
}

/// R rows by P panels without tiles, which would have to be written first: the weights go from where they were widened into multiply-adds, in the order of
/// [the instruction](https://www.felixcloutier.com/x86/tdpbf16ps): the first numbers of pairs in one chain, the second in another, both from zero for each group;
/// then their sum is added. The instruction takes subnormal numbers for zeros, which these do not; there are none, since a weight is zero
/// or at least 2^-24 with eight bits, an activation likewise zero or at least 2^-67, and sums of their products are zero or at least 2^-105.
#[inline(always)]
unsafe fn few<S: Source, const R: usize, const P: usize>(left: Left, panels: [*const u8; P], out: Tiles) {
    // SAFETY: the contract of `multiply`, of which this is a part.
    unsafe {
        let zero = _mm512_setzero_ps();
        let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
        let mut sums = [[zero; P]; R];
        for group in 0..left.inputs.div_ceil(GROUP) {
            // The activations as f32, first and second numbers apart: a multiply-add takes one from memory for all lanes.
            let mut first = [[0f32; LANES]; R];
            let mut second = [[0f32; LANES]; R];
            for row in 0..R {
                let pairs = _mm512_loadu_si512(left.words.add((group * left.height + row) * LANES).cast());
                _mm512_storeu_si512(first[row].as_mut_ptr().cast(), _mm512_slli_epi32::<16>(pairs));
                _mm512_storeu_si512(second[row].as_mut_ptr().cast(), _mm512_and_si512(pairs, upper));
            }
            for panel in 0..P {
                if left.ahead > 0 {
                    S::prefetch(panels[panel].wrapping_add(left.ahead), left.inputs, group);
                }
                let scales = S::scales(panels[panel], group);
                let mut chains = [[zero; 2]; R];
                for eight in 0..GROUP / 8 {
                    let lines = S::lines(panels[panel], left.inputs, group, eight, scales);
                    for (line, pairs) in lines.into_iter().enumerate() {
                        let evens = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs));
                        let odds = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
                        for row in 0..R {
                            let x = |of: &[[f32; LANES]; R]| of[row][4 * eight + line];
                            chains[row][0] = _mm512_fmadd_ps(evens, _mm512_set1_ps(x(&first)), chains[row][0]);
                            chains[row][1] = _mm512_fmadd_ps(odds, _mm512_set1_ps(x(&second)), chains[row][1]);
                        }
                    }
                }
                for row in 0..R {
                    let both = _mm512_add_ps(chains[row][0], chains[row][1]);
                    sums[row][panel] = _mm512_add_ps(sums[row][panel], both);
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            for (panel, sum) in sums.into_iter().enumerate() {
                _mm512_storeu_ps(out.data.add(panel * out.panel_stride + row * LANES), sum);
            }
        }
    }
}

/// A times sixteen rows by P panels.
#[inline(always)]
unsafe fn block<S: Source, const A: usize, const P: usize>(
    left: Left,
    panels: [*const u8; P],
    kept: *mut u8,
    out: Tiles,
) {
    let groups = left.inputs.div_ceil(GROUP);
    let mut ring = Room::<{ 2 * RING }>::new();
    // Where widened groups lie: each at its own place, or at one of a few.
    let (room, stride, places) =
        if kept.is_null() { (ring.start(), RING * TILE, RING - 1) } else { (kept, groups * TILE, usize::MAX) };
    let mut tails = [const { Room::<1>::new() }; 2];
    // SAFETY: the contract of `multiply`, of which this is a part.
    unsafe {
        if S::WIDENS {
            for group in 0..EARLY.min(groups) {
                widen::<S, P>(left.inputs, panels, group, room.add((group & places) * TILE), stride);
            }
        }
        zero!(0);
        zero!(1);
        zero!(2);
        zero!(3);
        for group in 0..groups {
            let next = group + EARLY;
            if S::WIDENS && next < groups {
                widen::<S, P>(left.inputs, panels, next, room.add((next & places) * TILE), stride);
            }
            if left.ahead > 0 {
                S::prefetch(panels[0].wrapping_add(left.ahead), left.inputs, group);
                if P == 2 {
                    S::prefetch(panels[1].wrapping_add(left.ahead), left.inputs, group);
                }
            }
            let (mut first, mut second) = if S::WIDENS {
                let first = room.add((group & places) * TILE).cast_const();
                (first, first.wrapping_add(stride))
            } else {
                (panels[0].add(group * TILE), panels[P - 1].add(group * TILE))
            };
            if !S::WIDENS && (group + 1) * GROUP > left.inputs {
                let [a, b] = &mut tails;
                (first, second) = (tail(panels[0], left.inputs, a), tail(panels[P - 1], left.inputs, b));
            }
            let rows = left.words.add(group * left.height * LANES);
            load!(4, rows, WORD_LINE);
            load!(6, first, WORD_LINE);
            dot!(0, 4, 6);
            if P == 2 {
                load!(7, second, WORD_LINE);
                dot!(1, 4, 7);
            }
            if A == 2 {
                load!(5, rows.add(ROWS * LANES), WORD_LINE);
                dot!(2, 5, 6);
                if P == 2 {
                    dot!(3, 5, 7);
                }
            }
        }
        store!(0, out.data);
        if A == 2 {
            store!(2, out.data.add(ROWS * LANES));
        }
        if P == 2 {
            store!(1, out.data.add(out.panel_stride));
            if A == 2 {
                store!(3, out.data.add(out.panel_stride + ROWS * LANES));
            }
        }
    }
}

/// `out[i][j] = sum_k left[i][k] panel[k][j]` for the `columns` outputs of a narrow panel: sixteen lines a group, each of `columns` pairs. Every other group is
/// summed apart, since one chain of so few products would wait for itself.
///
/// # Safety
/// As for [`multiply`], after [`crate::cpu::isa::Tiling::begin`] for so many columns. Of a tile's second sixteen rows nothing is read if no row is somebody's.
#[inline(always)]
pub(super) unsafe fn see_down(left: Left, panel: *const u8, columns: usize, out: Tiles) {
    let line = columns * size_of::<u32>();
    let tall = left.rows > ROWS;
    let mut odd = Room::<2>::new();
    // SAFETY: the contract of this function.
    unsafe {
        zero!(0);
        zero!(1);
        zero!(2);
        zero!(3);
        for group in 0..left.inputs.div_ceil(GROUP) {
            let rows = left.words.add(group * left.height * LANES);
            let lines = panel.add(group * ROWS * line);
            macro_rules! sum {
                ($first:literal, $second:literal, $weights:literal) => {
                    load!(4, rows, WORD_LINE);
                    load!($weights, lines, line);
                    dot!($first, 4, $weights);
                    if tall {
                        load!(5, rows.add(ROWS * LANES), WORD_LINE);
                        dot!($second, 5, $weights);
                    }
                };
            }
            if group % 2 == 0 {
                sum!(0, 2, 6);
            } else {
                sum!(1, 3, 7);
            }
        }
        let odd = odd.start();
        store!(0, out.data);
        store!(1, odd);
        if tall {
            store!(2, out.data.add(ROWS * LANES));
            store!(3, odd.add(TILE));
        }
        // Numbers beyond a row's columns were written by nobody and are read by nobody.
        let some = ((1_u32 << columns) - 1) as u16;
        for row in 0..left.rows {
            let (at, odd) = (out.data.add(row * LANES), odd.cast::<f32>().add(row * LANES));
            let sum = _mm512_add_ps(_mm512_maskz_loadu_ps(some, at), _mm512_maskz_loadu_ps(some, odd));
            _mm512_mask_storeu_ps(at, some, sum);
        }
    }
}
