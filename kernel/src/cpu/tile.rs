//! The register tile: rows of activations times panels of weights.
//!
//! **Invariant.** Each output is one chain of additions in the order of the inputs, from zero (or from what the tile held), whatever tile it
//! is computed in. That is all it takes for a row's bits not to depend on the batch, on chunks or on threads.
#![allow(unsafe_code)]

use super::{
    attention::SPAN_TOKENS,
    format::{GROUP_WORDS, Groups, Q8, WORD_LINE, Words},
    isa::Tiling,
    lanes::{LANES, Lanes},
};

/// Activations as [`super::activations`] packs them: a tile of rows, word after word, the rows of a word side by side.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // some of it is for tiles, which only x86-64 has
pub(super) struct Left {
    /// `[words][height]`, or as [`super::activations::Form::Tiles`] says.
    pub(super) words: *const u32,
    /// Rows of the tile: one of the kernels' heights.
    pub(super) height: usize,
    /// Those of them that are somebody's.
    pub(super) rows: usize,
    /// Inputs: numbers of a row that take part.
    pub(super) inputs: usize,
    /// Ask for what lies so many bytes ahead of a panel while it is read; 0: nothing.
    pub(super) ahead: usize,
    /// `[groups][height]`, for integers: what an integer is worth.
    pub(super) scales: *const f32,
    /// `[groups][height]`, for integers: -128 times their sum.
    pub(super) offsets: *const i32,
    /// `[groups][height]`, for integers: what their sum is worth.
    pub(super) sums: *const f32,
    /// Where there are tiles: room for the widened weights of all panels, or null.
    pub(super) widened: *mut u8,
}

/// Where results go: `[panel][row][16]`.
#[derive(Clone, Copy)]
pub(super) struct Tiles {
    /// First number of the first row of the first panel.
    pub(super) data: *mut f32,
    /// Numbers from a panel to the next.
    pub(super) panel_stride: usize,
    /// Add to what is there; else replace it. Never with integers.
    pub(super) add: bool,
}

/// Repeats a statement for every row and panel of a tile, written out: the compiler leaves a loop over twelve rows a loop, and keeps the sums
/// of a loop in memory.
macro_rules! each {
    ($index:ident < $limit:ident: $body:block) => {
        each!(@unroll $index $limit $body, 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@unroll $index:ident $limit:ident $body:block, $($number:literal)*) => {
        {
            $(if $number < $limit {
                let $index = $number;
                $body
            })*
        }
    };
}

/// A tile of exactly R rows by P panels: `sums[row][panel] += x[row] w[panel]`, word after word.
#[inline(always)]
unsafe fn words<L: Lanes, W: Words, const R: usize, const P: usize>(
    left: Left,
    count: usize,
    panels: [*const u8; P],
    mut sums: [[L; P]; R],
) -> [[L; P]; R] {
    // SAFETY: the contract of `multiply`, of which this is a part.
    unsafe {
        for k in 0..count {
            let x = left.words.add(k * W::taken::<L>() * R);
            let mut weights = [W::load::<L>(panels[0], k); P];
            each!(panel < P: { if panel > 0 { weights[panel] = W::load::<L>(panels[panel], k) } });
            if left.ahead > 0 {
                each!(panel < P: { L::prefetch(panels[panel].wrapping_add(k * WORD_LINE + left.ahead)) });
            }
            each!(row < R: { each!(panel < P: {
                sums[row][panel] = W::dot(sums[row][panel], weights[panel], x.add(row), R);
            }) });
        }
        sums
    }
}

/// The same in groups: integer sums inside a group, exact, then one multiply-add with both scales.
#[inline(always)]
unsafe fn groups<L: Lanes, G: Groups, const R: usize, const P: usize>(
    left: Left,
    count: usize,
    panels: [*const u8; P],
    mut sums: [[L; P]; R],
) -> [[L; P]; R] {
    // SAFETY: the contract of `multiply`, of which this is a part.
    unsafe {
        for group in 0..count {
            let at = group * R;
            if left.ahead > 0 {
                each!(panel < P: { G::prefetch::<L>(panels[panel].wrapping_add(left.ahead), left.inputs, group) });
            }
            let mut ints = [[L::zero(); P]; R];
            each!(row < R: { each!(panel < P: { ints[row][panel] = G::start::<L>(left.offsets.add(at + row)) }) });
            for pair in 0..GROUP_WORDS / 2 {
                let x = left.words.add((group * GROUP_WORDS + 2 * pair) * R);
                let mut weights = [G::load::<L>(panels[0], left.inputs, group, pair); P];
                each!(panel < P: { if panel > 0 {
                    weights[panel] = G::load::<L>(panels[panel], left.inputs, group, pair)
                } });
                each!(row < R: { each!(panel < P: {
                    ints[row][panel] = G::dot::<L>(ints[row][panel], weights[panel].0, *x.add(row));
                }) });
                each!(row < R: { each!(panel < P: {
                    ints[row][panel] = G::dot::<L>(ints[row][panel], weights[panel].1, *x.add(R + row));
                }) });
            }
            each!(panel < P: {
                let (scale, min) = G::scales::<L>(panels[panel], group);
                each!(row < R: {
                    let both = scale.mul(L::splat(*left.scales.add(at + row)));
                    sums[row][panel] = L::from_ints(ints[row][panel]).fma(both, sums[row][panel]);
                    if G::MINIMA {
                        sums[row][panel] = min.fma(L::splat(*left.sums.add(at + row)), sums[row][panel]);
                    }
                });
            });
        }
        sums
    }
}

/// One tile of R rows by up to P panels: missing ones are the last once more, whose results nobody stores.
#[inline(always)]
unsafe fn tile<L: Lanes, K: Kernel, const R: usize, const P: usize>(left: Left, panels: &[*const u8], out: Tiles) {
    // SAFETY: the contract of `multiply`, of which this is a part; only panels that exist are read and stored.
    unsafe {
        let place = |row: usize, panel: usize| out.data.add(panel * out.panel_stride + row * LANES);
        let present = panels.len().min(P);
        let mut pointers = [panels[present - 1]; P];
        each!(panel < P: { if panel < present { pointers[panel] = panels[panel] } });
        let mut sums = [[L::splat(0.0); P]; R];
        if out.add {
            each!(panel < P: { if panel < present {
                each!(row < R: { sums[row][panel] = L::load(place(row, panel)) })
            } });
        }
        let sums = K::run::<L, R, P>(left, pointers, sums);
        each!(panel < P: { if panel < present {
            each!(row < R: { sums[row][panel].store(place(row, panel)) })
        } });
    }
}

/// The inner loop of a layout.
pub(super) trait Kernel {
    /// # Safety
    /// As for [`multiply`].
    unsafe fn run<L: Lanes, const R: usize, const P: usize>(
        left: Left,
        panels: [*const u8; P],
        sums: [[L; P]; R],
    ) -> [[L; P]; R];
}

/// Kernels of panels that go word by word, with so many inputs in a word.
pub(super) struct ByWords<W, const INPUTS: usize>(std::marker::PhantomData<W>);
/// Kernels of panels that go group by group.
pub(super) struct ByGroups<G>(std::marker::PhantomData<G>);

impl<W: Words, const INPUTS: usize> Kernel for ByWords<W, INPUTS> {
    #[inline(always)]
    unsafe fn run<L: Lanes, const R: usize, const P: usize>(
        left: Left,
        panels: [*const u8; P],
        sums: [[L; P]; R],
    ) -> [[L; P]; R] {
        // SAFETY: the caller's contract.
        unsafe { words::<L, W, R, P>(left, left.inputs.div_ceil(INPUTS), panels, sums) }
    }
}

impl<G: Groups> Kernel for ByGroups<G> {
    #[inline(always)]
    unsafe fn run<L: Lanes, const R: usize, const P: usize>(
        left: Left,
        panels: [*const u8; P],
        sums: [[L; P]; R],
    ) -> [[L; P]; R] {
        // SAFETY: the caller's contract.
        unsafe { groups::<L, G, R, P>(left, left.inputs.div_ceil(GROUP_WORDS * 4), panels, sums) }
    }
}

/// All panels by exactly R rows.
#[inline(always)]
unsafe fn panels<L: Lanes, K: Kernel, const R: usize, const P: usize>(left: Left, panels: &[*const u8], out: Tiles) {
    for (i, panels) in panels.chunks(P).enumerate() {
        // SAFETY: the contract of `multiply`; `out` has room for every panel.
        unsafe { tile::<L, K, R, P>(left, panels, Tiles { data: out.data.add(i * P * out.panel_stride), ..out }) };
    }
}

/// One output among the sixteen of a panel.
#[derive(Clone, Copy)]
pub(super) struct Column {
    /// Its panel.
    pub(super) panel: *const u8,
    /// Its number in the panel.
    pub(super) lane: usize,
}

/// Outputs that [`turned`] computes at a time.
pub(super) const MAX_COLUMNS: usize = 6;

/// The inner loop of a layout with rows in the lanes and outputs broadcast.
pub(super) trait Turned {
    /// # Safety
    /// As for [`turned`].
    unsafe fn run<L: Lanes, const C: usize>(left: Left, columns: [Column; C]) -> [L; C];
}

impl<W: Words, const INPUTS: usize> Turned for ByWords<W, INPUTS> {
    #[inline(always)]
    unsafe fn run<L: Lanes, const C: usize>(left: Left, columns: [Column; C]) -> [L; C] {
        // SAFETY: the caller's contract.
        unsafe {
            let mut sums = [L::splat(0.0); C];
            for k in 0..left.inputs.div_ceil(INPUTS) {
                let x = left.words.add(k * W::taken::<L>() * left.height);
                each!(column < C: {
                    let Column { panel, lane } = columns[column];
                    let weight = panel.add(k * WORD_LINE + 4 * lane).cast::<u32>().read();
                    sums[column] = W::dot_rows(sums[column], weight, x, left.height);
                });
            }
            sums
        }
    }
}

impl Turned for ByGroups<Q8> {
    #[inline(always)]
    unsafe fn run<L: Lanes, const C: usize>(left: Left, columns: [Column; C]) -> [L; C] {
        // SAFETY: the caller's contract.
        unsafe {
            let mut sums = [L::splat(0.0); C];
            for group in 0..left.inputs.div_ceil(GROUP_WORDS * 4) {
                let at = group * left.height;
                let mut ints = [L::start_each(left.offsets.add(at)); C];
                for k in group * GROUP_WORDS..(group + 1) * GROUP_WORDS {
                    let x = L::load_bytes(left.words.add(k * left.height).cast());
                    each!(column < C: {
                        let Column { panel, lane } = columns[column];
                        let weight = panel.add(Q8::integers(left.inputs) + k * WORD_LINE + 4 * lane).cast::<u32>().read();
                        ints[column] = L::dot_each(ints[column], weight, x);
                    });
                }
                let scales = L::load(left.scales.add(at));
                // Of one panel as a rule: asked for once.
                let mut lanes = [0f32; LANES];
                let mut of = std::ptr::null();
                each!(column < C: {
                    let Column { panel, lane } = columns[column];
                    if panel != of {
                        Q8::scales::<L>(panel, group).0.store(lanes.as_mut_ptr());
                        of = panel;
                    }
                    let both = L::splat(lanes[lane]).mul(scales);
                    sums[column] = L::from_ints(ints[column]).fma(both, sums[column]);
                });
            }
            sums
        }
    }
}

/// A few outputs for all rows of a tile, `out[c][row] = sum_k left[row][k] columns[c][k]`, with the rows in the lanes: fewer instructions than
/// [`multiply`] where there are fewer outputs than rows, and the same chains of additions, so the same bits.
///
/// # Safety
/// The processor has the instructions of `T`, inside a function compiled for them. `left` holds its rows and inputs and sixteen readable
/// numbers from each row on, every column's panel so many inputs in the layout of `K`, and `out` sixteen numbers a column, touched by nobody else.
#[inline(always)]
pub(super) unsafe fn turned<T: Tiling, K: Turned>(left: Left, columns: &[Column], out: *mut f32) {
    for (i, columns) in columns.chunks(MAX_COLUMNS).enumerate() {
        // SAFETY: the caller's contract; only columns that exist are read and stored.
        unsafe {
            let out = out.add(i * MAX_COLUMNS * LANES);
            match columns.len() {
                1..=2 => turned_chunk::<T::Lanes, K, 2>(left, columns, out),
                3..=4 => turned_chunk::<T::Lanes, K, 4>(left, columns, out),
                _ => turned_chunk::<T::Lanes, K, MAX_COLUMNS>(left, columns, out),
            }
        }
    }
}

/// Up to C outputs: missing ones are the last once more, whose results nobody stores.
#[inline(always)]
unsafe fn turned_chunk<L: Lanes, K: Turned, const C: usize>(left: Left, columns: &[Column], out: *mut f32) {
    let present = columns.len().min(C);
    let mut all = [columns[present - 1]; C];
    all[..present].copy_from_slice(&columns[..present]);
    // SAFETY: the contract of `turned`, of which this is a part.
    unsafe {
        let sums = K::run::<L, C>(left, all);
        each!(column < C: { if column < present { sums[column].store(out.add(column * LANES)) } });
    }
}

/// Weights of tokens, and the panels of their values: what the second product of attention takes.
#[derive(Clone, Copy)]
pub(super) struct Values<'a> {
    /// `[height][SPAN_TOKENS]`, of which pairs take half
    pub(super) weights: *const u32,
    /// Rows of the tile: one of the kernels' heights.
    pub(super) height: usize,
    /// Tokens in all.
    pub(super) tokens: usize,
    /// The first panel of each block of sixteen tokens.
    pub(super) blocks: &'a [*const u8],
    /// Panels of a block.
    pub(super) panels: usize,
    /// Bytes of each.
    pub(super) panel_bytes: usize,
    /// As [`Left::ahead`].
    pub(super) ahead: usize,
}

/// Adds to all panels of R rows the weighted values of all tokens, in their order.
#[inline(always)]
unsafe fn accumulate_rows<L: Lanes, W: Words, const INPUTS: usize, const R: usize, const P: usize>(
    values: Values<'_>,
    out: Tiles,
) {
    // SAFETY: the contract of `accumulate`, of which this is a part.
    unsafe {
        for first in (0..values.panels).step_by(P) {
            let place = |row: usize, panel: usize| out.data.add((first + panel) * out.panel_stride + row * LANES);
            let present = P.min(values.panels - first);
            let mut sums = [[L::splat(0.0); P]; R];
            each!(panel < P: { if panel < present { each!(row < R: { sums[row][panel] = L::load(place(row, panel)) }) } });
            for (block, &start) in values.blocks.iter().enumerate() {
                let tokens = LANES.min(values.tokens - block * LANES);
                let x = values.weights.add(block * LANES / INPUTS * W::taken::<L>());
                // A panel that is not there is the first once more, and its sums are nobody's.
                let mut panels = [start.add(first * values.panel_bytes); P];
                each!(panel < P: { if panel < present { panels[panel] = start.add((first + panel) * values.panel_bytes) } });
                for k in 0..tokens.div_ceil(INPUTS) {
                    if values.ahead > 0 {
                        each!(panel < P: { L::prefetch(panels[panel].wrapping_add(k * WORD_LINE + values.ahead)) });
                    }
                    let mut weights = [W::load::<L>(panels[0], k); P];
                    each!(panel < P: { if panel > 0 { weights[panel] = W::load::<L>(panels[panel], k) } });
                    // Row by row: a factor is read once for all panels, and forgotten.
                    each!(row < R: {
                        let x = x.add(row * SPAN_TOKENS + k * W::taken::<L>());
                        each!(panel < P: { sums[row][panel] = W::dot(sums[row][panel], weights[panel], x, 1) });
                    });
                }
            }
            each!(panel < P: { if panel < present { each!(row < R: { sums[row][panel].store(place(row, panel)) }) } });
        }
    }
}

/// `out[p][i][j] += sum_t weights[i][t] values[t][16 p + j]`.
///
/// # Safety
/// The processor has the instructions of `T`, inside a function compiled for them. Every block has its panels, with as many tokens as are
/// left for it, and `out` has room for all panels and rows, touched by nobody else.
#[inline(always)]
pub(super) unsafe fn accumulate<T: Tiling, W: Words, const INPUTS: usize>(values: Values<'_>, out: Tiles) {
    // SAFETY: the caller's contract.
    unsafe {
        match values.height {
            1 => accumulate_rows::<T::Lanes, W, INPUTS, 1, 4>(values, out),
            2 => accumulate_rows::<T::Lanes, W, INPUTS, 2, 4>(values, out),
            3 if T::WIDE => accumulate_rows::<T::Lanes, W, INPUTS, 3, 4>(values, out),
            3 => accumulate_rows::<T::Lanes, W, INPUTS, 3, 2>(values, out),
            4 => accumulate_rows::<T::Lanes, W, INPUTS, 4, 2>(values, out),
            6 if T::WIDE => accumulate_rows::<T::Lanes, W, INPUTS, 6, 2>(values, out),
            6 => accumulate_rows::<T::Lanes, W, INPUTS, 6, 1>(values, out),
            8 if T::WIDE => accumulate_rows::<T::Lanes, W, INPUTS, 8, 2>(values, out),
            12 if T::WIDE => accumulate_rows::<T::Lanes, W, INPUTS, 12, 2>(values, out),
            height => unreachable!("no tile of {height} rows"),
        }
    }
}

/// `out[p][i][j] = sum_k left[i][k] panels[p][k][j]`; see [`Tiles::add`].
///
/// # Safety
/// The processor has the instructions of `T`, inside a function compiled for them. `left` holds its rows and inputs, every panel so
/// many inputs in the layout of `K`, and `out` as many panels and rows, touched by nobody else.
#[inline(always)]
pub(super) unsafe fn multiply<T: Tiling, K: Kernel>(left: Left, list: &[*const u8], out: Tiles) {
    // SAFETY: the caller's contract.
    unsafe {
        match left.height {
            1 => panels::<T::Lanes, K, 1, 4>(left, list, out),
            2 => panels::<T::Lanes, K, 2, 4>(left, list, out),
            3 => panels::<T::Lanes, K, 3, 2>(left, list, out),
            4 => panels::<T::Lanes, K, 4, 2>(left, list, out),
            6 if T::WIDE => panels::<T::Lanes, K, 6, 2>(left, list, out),
            6 => panels::<T::Lanes, K, 6, 1>(left, list, out),
            8 if T::WIDE => panels::<T::Lanes, K, 8, 1>(left, list, out),
            12 if T::WIDE => panels::<T::Lanes, K, 12, 1>(left, list, out),
            height => unreachable!("no tile of {height} rows"),
        }
    }
}
