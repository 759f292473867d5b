//! Rows of activations as the register tiles read them: cut into tiles, rounded as the weights' layout wants it, word after word.
#![allow(unsafe_code)]

use half::bf16;

use super::{
    format::GROUP_WORDS,
    isa::Tiling,
    lanes::{LANES, Lanes, quantize},
    memory::{Lines, Shared},
    tile::Left,
};
use crate::rounding::{GROUP, Layout, round_bf16};

/// Rows of the largest tile of any instruction set.
pub(super) const MAX_HEIGHT: usize = 32;

/// How activations lie that are not f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Word by word, the rows of a word side by side: four bytes, or one bfloat16 that is widened to an f32.
    Singles,
    /// The same, but two bfloat16 a word.
    Pairs,
    /// `[inputs / 32][rows][32]` bfloat16, beside weights of any layout but f32.
    Tiles,
}

/// Consecutive rows that are multiplied together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tile {
    /// First row.
    pub(super) first: usize,
    /// Rows.
    pub(super) rows: usize,
    /// Rows of the register tile, a few of which may be nobody's.
    pub(super) height: usize,
    /// Heights of the tiles before.
    pub(super) place: usize,
    /// Tiles before.
    pub(super) number: usize,
    /// What [`crate::Cores::active`] is of each of its rows, if it is the same of all.
    pub(super) active: Option<u32>,
}

/// The smallest height that takes so many rows (at most the largest height).
fn height_for(heights: &[usize], rows: usize) -> usize {
    heights.iter().copied().find(|&height| height >= rows).unwrap_or(rows)
}

/// Cuts rows into as few tiles as possible, of about equal heights. `heights` ascend.
pub(super) fn cut(rows: usize, heights: &[usize], tiles: &mut Vec<Tile>) {
    tiles.clear();
    let most = heights.last().copied().unwrap_or(1);
    let count = rows.div_ceil(most).max(1);
    let each = height_for(heights, rows.div_ceil(count));
    let (mut first, mut place) = (0, 0);
    while first < rows {
        let rows = each.min(rows - first);
        let height = height_for(heights, rows);
        tiles.push(Tile { first, rows, height, place, number: tiles.len(), active: Some(0) });
        (first, place) = (first + rows, place + height);
    }
}

/// Notes in the tiles which rows have adapters.
pub(super) fn mark(tiles: &mut [Tile], active: &[u32]) {
    for tile in tiles {
        let active = &active[tile.first..][..tile.rows];
        tile.active = active.iter().all(|other| *other == active[0]).then_some(active[0]);
    }
}

/// Rows of tiles, heights counted.
pub(super) fn places(tiles: &[Tile]) -> usize {
    tiles.last().map_or(0, |tile| tile.place + tile.height)
}

/// Where a tile begins among numbers of which each row has `each`. Behind every tile there are sixteen that are nobody's: rows are also read
/// sixteen at a time (see [`super::tile::turned`]), and what the next tile holds may be in the making.
fn beginning(tile: &Tile, each: usize) -> usize {
    tile.place * each + tile.number * LANES
}

/// How many numbers all tiles take, if each row has `each`.
fn extent(tiles: &[Tile], each: usize) -> usize {
    tiles.last().map_or(0, |tile| beginning(tile, each) + tile.height * each + LANES)
}

/// Room for packed rows; grows to the largest product.
#[derive(Default)]
pub(super) struct Packed {
    words: Lines,
    scales: Vec<f32>,
    offsets: Vec<i32>,
    sums: Vec<f32>,
}

/// Pointers into a [`Packed`], through which threads write their own tiles.
#[derive(Clone, Copy)]
pub(super) struct Room {
    layout: Layout,
    inputs: usize,
    /// Words of a row.
    pub(super) row_words: usize,
    words: Shared<u32>,
    scales: Shared<f32>,
    offsets: Shared<i32>,
    sums: Shared<f32>,
}

impl Packed {
    /// Room for the rows of these tiles, of `inputs` numbers each.
    pub(super) fn room(&mut self, layout: Layout, inputs: usize, form: Form, tiles: &[Tile]) -> Room {
        let row_words = layout.activation_words(inputs, form);
        let words = self.words.at_least(extent(tiles, row_words) * size_of::<u32>());
        let groups = if form == Form::Tiles { 0 } else { extent(tiles, layout.groups(inputs)) };
        if self.scales.len() < groups {
            self.scales.resize(groups, 0.0);
            self.offsets.resize(groups, 0);
            self.sums.resize(groups, 0.0);
        }
        Room {
            layout,
            inputs,
            row_words,
            words: Shared(words.cast()),
            scales: Shared(self.scales.as_mut_ptr()),
            offsets: Shared(self.offsets.as_mut_ptr()),
            sums: Shared(self.sums.as_mut_ptr()),
        }
    }
}

impl Room {
    /// A tile that has been packed.
    pub(super) fn left(&self, tile: Tile) -> Left {
        let group = beginning(&tile, self.layout.groups(self.inputs));
        Left {
            words: self.words.0.wrapping_add(beginning(&tile, self.row_words)),
            height: tile.height,
            rows: tile.rows,
            inputs: self.inputs,
            ahead: 0,
            scales: self.scales.0.wrapping_add(group),
            offsets: self.offsets.0.wrapping_add(group),
            sums: self.sums.0.wrapping_add(group),
            widened: std::ptr::null_mut(),
        }
    }

    /// Packs row `row` of a tile. The numbers behind `inputs`, up to [`Layout::padded`], are zeros.
    ///
    /// # Safety
    /// The processor has the instructions of `T`, for whose [`Tiling::FORM`] the room was made; `x` is valid for the padded inputs; the tile lies in the room and is this thread's.
    #[inline(always)]
    pub(super) unsafe fn pack<T: Tiling>(&self, tile: Tile, row: usize, x: *const f32) {
        if T::FORM == Form::Tiles {
            // SAFETY: the caller's contract.
            return unsafe { self.pack_tile::<T>(tile, row, x) };
        }
        let padded = self.layout.padded(self.inputs);
        let height = tile.height;
        // SAFETY: word k of row `row` lies at k height + row of the tile; the tile has `row_words` words a row.
        unsafe {
            let words = self.words.0.add(beginning(&tile, self.row_words) + row);
            match self.layout {
                Layout::F32 => (0..padded).for_each(|k| *words.add(k * height) = (*x.add(k)).to_bits()),
                Layout::Bf16 if T::FORM == Form::Pairs => pack_bf16::<T::Lanes>(x, padded, words, height),
                Layout::Bf16 => (0..padded).for_each(|k| *words.add(k * height) = round_bf16(*x.add(k)).to_bits()),
                Layout::Q8 | Layout::Q4 => {
                    let place = beginning(&tile, padded / GROUP) + row;
                    for group in 0..padded / GROUP {
                        let mut bytes = [0u32; GROUP_WORDS];
                        let (scale, sum) = quantize::<T::Lanes>(x.add(group * GROUP), bytes.as_mut_ptr().cast());
                        let words = words.add(group * GROUP_WORDS * height);
                        for (k, word) in bytes.into_iter().enumerate() {
                            *words.add(k * height) = word;
                        }
                        let at = place + group * height;
                        *self.scales.0.add(at) = scale;
                        *self.offsets.0.add(at) = -128 * sum as i32;
                        *self.sums.0.add(at) = scale * sum;
                    }
                }
            }
        }
    }

    /// [`Self::pack`] where activations lie in tiles: a row's groups of thirty-two, with zeros behind the last input.
    #[inline(always)]
    unsafe fn pack_tile<T: Tiling>(&self, tile: Tile, row: usize, x: *const f32) {
        // SAFETY: group g of row `row` is line g height + row of the tile; the caller vouches for `x`.
        unsafe {
            let lines = self.words.0.add(beginning(&tile, self.row_words) + row * LANES);
            for group in 0..self.inputs.div_ceil(GROUP) {
                let line = lines.add(group * tile.height * LANES);
                let (from, left) = (x.add(group * GROUP), self.inputs - group * GROUP);
                if left >= GROUP {
                    T::pack_line(self.layout, from, line);
                } else {
                    let mut last = [0f32; GROUP];
                    std::ptr::copy_nonoverlapping(from, last.as_mut_ptr(), left);
                    T::pack_line(self.layout, last.as_ptr(), line);
                }
            }
        }
    }
}

/// An even count of numbers as pairs of bfloat16, `stride` words apart.
///
/// # Safety
/// The processor has the instructions of `L`; `x` is valid for `count` numbers, `words` for half as many.
#[inline(always)]
pub(super) unsafe fn pack_bf16<L: Lanes>(x: *const f32, count: usize, words: *mut u32, stride: usize) {
    // SAFETY: the caller's contract; whole lanes first, then pair by pair.
    unsafe {
        let whole = count / LANES * LANES;
        for k in (0..whole).step_by(LANES) {
            let mut pairs = [0u32; LANES / 2];
            L::load(x.add(k)).store_bf16(pairs.as_mut_ptr().cast());
            for (i, pair) in pairs.into_iter().enumerate() {
                *words.add((k / 2 + i) * stride) = pair;
            }
        }
        for pair in whole / 2..count / 2 {
            let bits = |k: usize| u32::from(bf16::from_f32(*x.add(k)).to_bits());
            *words.add(pair * stride) = bits(2 * pair) | bits(2 * pair + 1) << 16;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_all_rows_in_order() {
        for heights in [&[1, 2, 3, 4, 6, 8, 12][..], &[1, 2, 3, 4, 6]] {
            for rows in 0..200 {
                let mut tiles = Vec::new();
                cut(rows, heights, &mut tiles);
                let (mut next, mut place) = (0, 0);
                for (number, tile) in tiles.iter().enumerate() {
                    assert!(tile.first == next && tile.place == place && tile.rows > 0 && tile.number == number);
                    assert!(tile.rows <= tile.height && heights.contains(&tile.height));
                    (next, place) = (next + tile.rows, place + tile.height);
                }
                assert_eq!(next, rows);
                assert!(place <= rows + rows / 4 + 2, "{rows} rows in {place} places");
            }
        }
    }
}
