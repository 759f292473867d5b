//! Attention over the blocks of the cache, in two regions: `append` turns q and k and writes k and v, `attend` walks the blocks.
//!
//! **Invariant.** A row walks the tokens of its sequence from 0 in spans of 64 with a running maximum and sum. What lies behind its own position
//! weighs exactly nothing, so what it computes does not depend on the chunk that it came in. Slots that no row of its sequence has filled
//! are never multiplied, not even by zero: they may hold anything.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    activations::{MAX_HEIGHT, Packed, Tile, cut, pack_bf16, places},
    isa::{Kernels, Region, Tiling},
    lanes::{LANES, Lanes, load_partial, store_partial, sum, weight},
    memory::{Lines, Shared},
    prepare::rms_norm,
    step::CpuStep,
    tile::{Left, Tiles, Values},
};
use crate::{AttentionSpec, BLOCK_TOKENS, KernelError, KvShape, Precision, rounding::Layout};

const _: () = assert!(BLOCK_TOKENS == LANES, "a KV block is a panel of sixteen tokens");

/// Rows of a sequence that are attended together; they share the keys and values that are read.
pub(super) const CHUNK_ROWS: usize = 16;
/// Blocks whose scores are computed together: a span, counted from the beginning of the sequence.
const SPAN_BLOCKS: usize = 4;
/// Their tokens.
pub(super) const SPAN_TOKENS: usize = SPAN_BLOCKS * BLOCK_TOKENS;

/// The paged cache: for every layer, block and head one panel of keys `[head_dim][16 tokens]`, then panels of values `[16 tokens][16 dimensions]`.
/// What one item of attention reads of a block lies together, and so does what its neighbours read.
pub struct CpuKv {
    pub(super) shape: KvShape,
    pub(super) layout: Layout,
    pub(super) data: Lines,
    /// Bytes of a head's keys in a block.
    key_bytes: usize,
    /// Bytes of a panel of values.
    value_panel: usize,
    /// Bytes of a head's keys and values in a block.
    head_bytes: usize,
}

impl CpuKv {
    /// An empty cache; f32 beside f32 weights, else bfloat16.
    pub(super) fn new(shape: KvShape, precision: Precision) -> Result<Self, KernelError> {
        let heads = shape.tokens()? / BLOCK_TOKENS * shape.kv_heads;
        let layout = if precision == Precision::F32 { Layout::F32 } else { Layout::Bf16 };
        let (key_bytes, value_panel) = (layout.panel_bytes(shape.head_dim), layout.panel_bytes(BLOCK_TOKENS));
        let head_bytes = key_bytes + shape.head_dim.div_ceil(LANES) * value_panel;
        Ok(Self { shape, layout, data: Lines::zeroed(heads * head_bytes), key_bytes, value_panel, head_bytes })
    }

    /// The byte at which a head's keys of a block begin; its values are `key_bytes` behind.
    fn at(&self, layer: usize, block: u32, head: usize) -> usize {
        ((layer * self.shape.blocks + block as usize) * self.shape.kv_heads + head) * self.head_bytes
    }
}

/// Preparation of q, k and v: see [`append`].
pub(super) struct AppendJob<'a> {
    pub(super) spec: &'a AttentionSpec,
    pub(super) step: &'a CpuStep,
    pub(super) layer: usize,
    /// `[rows, (heads + 2 kv_heads) head_dim]`
    pub(super) qkv: &'a [f32],
    /// `[rows, heads head_dim]`, scaled by 1 / sqrt(head_dim). Each row belongs to one thread.
    pub(super) queries: Shared<f32>,
    /// Sizes of the cache.
    pub(super) kv: &'a CpuKv,
    /// First byte of the cache. Each token's slot belongs to the thread of its row: no two rows of a step share one.
    pub(super) cache: Shared<u8>,
}

/// Normalises and turns some key/value heads of some rows, with the query heads that share them, and writes k and v to the cache.
///
/// # Safety
/// The processor has the instructions of `T`; the step was checked against the cache and the rotary table; these heads of rows and slots are this
/// thread's.
#[inline(always)]
pub(super) unsafe fn append<T: Tiling>(
    job: &AppendJob<'_>,
    rows: Range<usize>,
    heads: Range<usize>,
    scratch: &mut Scratch,
) {
    let spec = job.spec;
    let (kv_heads, head_dim) = (spec.kv_heads, spec.head_dim);
    let group = spec.heads / kv_heads;
    let (width, scale) = (spec.heads * head_dim, 1.0 / (head_dim as f32).sqrt());
    scratch.head.resize(head_dim, 0.0);
    let key = &mut scratch.head[..];
    for row in rows {
        let position = job.step.positions[row] as usize;
        let qkv = &job.qkv[row * (width + 2 * kv_heads * head_dim)..][..width + 2 * kv_heads * head_dim];
        let (q, rest) = qkv.split_at(width);
        let (k, v) = rest.split_at(kv_heads * head_dim);
        for head in heads.clone() {
            let of_group = head * group * head_dim..(head + 1) * group * head_dim;
            // SAFETY: row `row` of `queries` is `width` long, and this head's part of it this thread's.
            let queries = unsafe {
                std::slice::from_raw_parts_mut(job.queries.0.add(row * width + of_group.start), group * head_dim)
            };
            for (query, q) in queries.chunks_exact_mut(head_dim).zip(q[of_group].chunks_exact(head_dim)) {
                // SAFETY: the instruction set, by contract.
                unsafe { turn::<T::Lanes>(q, &spec.q_norm, spec, position, query) };
                query.iter_mut().for_each(|x| *x *= scale);
            }
            let at = job.kv.at(job.layer, job.step.row_blocks[row], head);
            let token = position % BLOCK_TOKENS;
            let value = &v[head * head_dim..][..head_dim];
            // SAFETY: the block was checked against the cache; the slot of this row is this thread's, and so is the next one if no row of
            // this step has it.
            unsafe {
                turn::<T::Lanes>(&k[head * head_dim..][..head_dim], &spec.k_norm, spec, position, key);
                let keys = job.cache.0.add(at);
                let values = keys.add(job.kv.key_bytes);
                if job.kv.layout == Layout::F32 {
                    put_f32(keys, values, job.kv.value_panel, token, key, value);
                } else {
                    // Values are multiplied in pairs of tokens: what a stranger left in the next slot must not be a NaN.
                    let alone = token.is_multiple_of(2) && job.step.last[row];
                    put_bf16::<T::Lanes>(keys, values, job.kv.value_panel, token, key, value, alone);
                }
            }
        }
    }
}

/// RMSNorm of a head if there is one, then the half-split rotation.
#[inline(always)]
unsafe fn turn<L: Lanes>(
    head: &[f32],
    norm: &Option<(Vec<f32>, f32)>,
    spec: &AttentionSpec,
    position: usize,
    out: &mut [f32],
) {
    match norm {
        // SAFETY: head, weight and out are head_dim long; the instruction set is the caller's promise.
        Some((weight, epsilon)) => unsafe {
            rms_norm::<L>(head.as_ptr(), &weight[..head.len()], *epsilon, out.as_mut_ptr())
        },
        None => out.copy_from_slice(head),
    }
    let half = head.len() / 2;
    let (cos, sin) = (&spec.cos[position * half..][..half], &spec.sin[position * half..][..half]);
    let (first, second) = out.split_at_mut(half);
    for i in 0..half {
        let (a, b) = (first[i], second[i]);
        first[i] = a * cos[i] - b * sin[i];
        second[i] = b * cos[i] + a * sin[i];
    }
}

/// Writes one head of one token.
///
/// # Safety
/// A block's head has head_dim key inputs and head_dim / 16 value panels, rounded up; the token's slot is this thread's.
#[inline(always)]
unsafe fn put_f32(keys: *mut u8, values: *mut u8, value_panel: usize, token: usize, key: &[f32], value: &[f32]) {
    for d in 0..key.len() {
        // SAFETY: the contract of this function; panels start on cache lines, so the numbers are aligned.
        unsafe {
            *keys.cast::<f32>().add(d * LANES + token) = key[d];
            *values.add(d / LANES * value_panel).cast::<f32>().add(token * LANES + d % LANES) = value[d];
        }
    }
}

/// Writes one head of one token, and zeros as the value of the next if it is `alone` in its pair.
///
/// # Safety
/// As for [`put_f32`], with the instructions of `L`, for an even head_dim; the next slot is this thread's too if `alone`.
#[inline(always)]
unsafe fn put_bf16<L: Lanes>(
    keys: *mut u8,
    values: *mut u8,
    value_panel: usize,
    token: usize,
    key: &[f32],
    value: &[f32],
    alone: bool,
) {
    // SAFETY: the contract of this function; panels start on cache lines, so the numbers are aligned.
    unsafe {
        pack_bf16::<L>(key.as_ptr(), key.len(), keys.cast::<u32>().add(token), LANES);
        for first in (0..value.len()).step_by(LANES) {
            let count = LANES.min(value.len() - first);
            let mut narrow = [0u16; LANES];
            load_partial::<L>(value.as_ptr().add(first), count).store_bf16(narrow.as_mut_ptr());
            let pairs = values.add(first / LANES * value_panel).cast::<u16>().add(token / 2 * 2 * LANES + token % 2);
            for (lane, bits) in narrow[..count].iter().enumerate() {
                *pairs.add(2 * lane) = *bits;
                if alone {
                    *pairs.add(2 * lane + 1) = 0;
                }
            }
        }
    }
}

/// Attention of all rows: see [`attend`].
pub(super) struct AttendJob<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) spec: &'a AttentionSpec,
    pub(super) step: &'a CpuStep,
    pub(super) layer: usize,
    /// `[rows, heads head_dim]`, as [`append`] left them.
    pub(super) queries: Shared<f32>,
    pub(super) kv: &'a CpuKv,
    /// Append each item's own heads first: possible when no chunk needs the keys of another.
    pub(super) append: Option<&'a AppendJob<'a>>,
    /// `[rows, heads head_dim]`. The rows and heads of an item belong to one thread.
    pub(super) out: Shared<f32>,
}

impl AttendJob<'_> {
    /// Independent pieces of the result: a chunk of a sequence's rows for one key/value head.
    pub(super) fn items(&self) -> usize {
        self.step.chunks.len() * self.spec.kv_heads
    }
}

/// What a thread needs besides, kept from step to step.
#[derive(Default)]
pub(super) struct Scratch {
    /// A head of a key.
    head: Vec<f32>,
    /// The queries of an item, cut and packed.
    tiles: Vec<Tile>,
    packed: Packed,
    /// `[SPAN_BLOCKS][height, 16]`
    scores: Lines,
    /// `[height][SPAN_TOKENS]` words, of which bfloat16 take half
    weights: Lines,
    /// `[head_dim / 16][places, 16]`
    sums: Lines,
    /// Largest score so far of each query, and the weights relative to it, summed in sixteen chains.
    running: Vec<(f32, [f32; LANES])>,
    /// Panels of keys, then of values, of the blocks of a span.
    keys: Vec<*const u8>,
    values: Vec<*const u8>,
}

// SAFETY: the pointers are only read inside the call that wrote them.
unsafe impl Send for Scratch {}

/// Attention of some items.
///
/// # Safety
/// The processor has the instructions of `T`; the step was checked against the cache; the items' parts of `out` (and of what is appended) are
/// this thread's.
#[inline(always)]
pub(super) unsafe fn attend<T: Tiling>(job: &AttendJob<'_>, items: Range<usize>, scratch: &mut Scratch) {
    // SAFETY: the caller's contract.
    unsafe {
        T::begin(Region::Attention);
        for item in items {
            attend_item::<T>(job, item, scratch);
        }
        T::end();
    }
}

/// Attention of one item. Its queries are the rows of the chunk times the query heads that share the key/value head.
#[inline(always)]
unsafe fn attend_item<T: Tiling>(job: &AttendJob<'_>, item: usize, scratch: &mut Scratch) {
    let (chunk, head) = (&job.step.chunks[item / job.spec.kv_heads], item % job.spec.kv_heads);
    let (head_dim, group) = (job.spec.head_dim, job.spec.heads / job.spec.kv_heads);
    let width = job.spec.heads * head_dim;
    if let Some(append) = job.append {
        // SAFETY: the caller's contract: these rows and heads are this item's.
        unsafe { (job.kernels.append)(append, chunk.first_row..chunk.first_row + chunk.rows, head..head + 1, scratch) };
    }
    // Where head_dim numbers of the item's q-th query begin, in queries and result alike.
    let at = |query: usize| (chunk.first_row + query / group) * width + (head * group + query % group) * head_dim;
    let queries = chunk.rows * group;
    cut(queries, job.kernels.heights, &mut scratch.tiles);
    let tiles = std::mem::take(&mut scratch.tiles);
    let count = places(&tiles);
    let room = scratch.packed.room(job.kv.layout, head_dim, T::FORM, &tiles);
    for tile in &tiles {
        for row in 0..tile.rows {
            // SAFETY: these queries exist, and were written by this thread or in an earlier region; the room has these places.
            unsafe { room.pack::<T>(*tile, row, job.queries.get(at(tile.first + row))) };
        }
    }
    scratch.scores.at_least(SPAN_BLOCKS * MAX_HEIGHT * LANES * size_of::<f32>());
    scratch.weights.at_least(MAX_HEIGHT * SPAN_TOKENS * size_of::<u32>());
    let numbers = head_dim.div_ceil(LANES) * count * LANES;
    let sums = scratch.sums.at_least(numbers * size_of::<f32>()).cast::<f32>();
    // SAFETY: so many numbers are there.
    unsafe { sums.write_bytes(0, numbers) };
    scratch.running.clear();
    scratch.running.resize(count, (f32::NEG_INFINITY, [0.0; LANES]));

    let start = job.step.positions[chunk.first_row] as usize;
    let (blocks, kv) = (&job.step.blocks[chunk.blocks.clone()], job.kv);
    let tokens = start + chunk.rows;
    // SAFETY: blocks were checked against the cache.
    let panels_of = |blocks: &[u32], keys: &mut Vec<*const u8>, values: &mut Vec<*const u8>| unsafe {
        keys.clear();
        values.clear();
        for &block in blocks {
            let key = kv.data.as_ptr().add(kv.at(job.layer, block, head));
            keys.push(key);
            values.push(key.add(kv.key_bytes));
        }
    };
    // The next head of the same blocks follows, as a rule by the same thread: its keys and values lie just behind, and come meanwhile.
    let ahead = if head + 1 < job.spec.kv_heads { kv.head_bytes } else { 0 };
    for first in (0..tokens).step_by(SPAN_TOKENS) {
        let seen = SPAN_TOKENS.min(tokens - first);
        let span = first / BLOCK_TOKENS..(first + seen).div_ceil(BLOCK_TOKENS);
        panels_of(&blocks[span], &mut scratch.keys, &mut scratch.values);
        for tile in &tiles {
            // How many of the span's tokens a row of the tile sees.
            let visible = |row: usize| {
                let row = (tile.first + row) / group;
                seen.min((start + row + 1).saturating_sub(first))
            };
            // SAFETY: the contract of this function; scratch was sized for these tiles.
            unsafe {
                let left = Left { ahead: if tile.number == 0 { ahead } else { 0 }, ..room.left(*tile) };
                span_of::<T>(job, left, *tile, count, seen, visible, scratch);
            }
        }
    }
    for tile in &tiles {
        for row in 0..tile.rows {
            let place = tile.place + row;
            // SAFETY: this query's part of `out` is this thread's, and head_dim long.
            unsafe {
                let total = T::Lanes::splat(1.0 / sum(T::Lanes::load(scratch.running[place].1.as_ptr())));
                let out = job.out.get(at(tile.first + row));
                for d in (0..head_dim).step_by(LANES) {
                    let sums = sums.add((d / LANES * count + place) * LANES);
                    store_partial(T::Lanes::load(sums).mul(total), out.add(d), LANES.min(head_dim - d));
                }
            }
        }
    }
    scratch.tiles = tiles;
}

/// The queries of one tile meet the `seen` tokens of a span. Rows of nobody have weights of nobody.
#[inline(always)]
unsafe fn span_of<T: Tiling>(
    job: &AttendJob<'_>,
    left: Left,
    tile: Tile,
    places: usize,
    seen: usize,
    visible: impl Fn(usize) -> usize,
    scratch: &mut Scratch,
) {
    let (kv, height, panels) = (job.kv, left.height, job.spec.head_dim.div_ceil(LANES));
    // SAFETY: scratch holds a span's scores and weights of a tile, and all panels of sums; of values only tokens are read that this step or an
    // earlier one wrote (one more if they are odd in number, see `append`).
    unsafe {
        let scores = scratch.scores.as_mut_ptr().cast::<f32>();
        let blocks = seen.div_ceil(BLOCK_TOKENS);
        let out = Tiles { data: scores, panel_stride: height * LANES, add: false };
        (job.kernels.scores(kv.layout))(left, &scratch.keys, out);
        for row in 0..tile.rows {
            let query = Query {
                layout: kv.layout,
                scores: scores.add(row * LANES),
                stride: height * LANES,
                blocks,
                visible: visible(row),
                row,
                place: tile.place + row,
                places,
                panels,
            };
            // Called by name: through a pointer it would not be compiled for the instruction set.
            if query.visible < blocks * BLOCK_TOKENS {
                weigh::<T::Lanes, true>(query, scratch);
            } else {
                weigh::<T::Lanes, false>(query, scratch);
            }
        }
        let values = Values {
            weights: scratch.weights.as_ptr().cast(),
            height,
            tokens: seen,
            blocks: &scratch.values,
            panels,
            panel_bytes: kv.value_panel,
            ahead: left.ahead,
        };
        let sums = scratch.sums.as_mut_ptr().cast::<f32>().add(tile.place * LANES);
        (job.kernels.accumulate(kv.layout))(values, Tiles { data: sums, panel_stride: places * LANES, add: true });
    }
}

/// A query whose scores of a span's tokens are known.
struct Query {
    layout: Layout,
    /// Those of the first block; those of the next lie `stride` numbers further.
    scores: *const f32,
    stride: usize,
    /// Blocks of the span.
    blocks: usize,
    /// Tokens of the span that it sees.
    visible: usize,
    /// Its row of the tile.
    row: usize,
    /// Its place among those of all tiles, so many in all.
    place: usize,
    places: usize,
    /// Panels of sums.
    panels: usize,
}

/// Turns a query's scores of a span into weights relative to the running maximum, and brings its sums down to it. MASKED: it does not see all of
/// the span.
#[inline(always)]
unsafe fn weigh<L: Lanes, const MASKED: bool>(query: Query, scratch: &mut Scratch) {
    let Query { layout, scores, stride, blocks, visible, row, place, places, panels } = query;
    // SAFETY: a query has sixteen scores a block and sixteen sums a panel; the weights have SPAN_TOKENS words for every row.
    unsafe {
        let mut largest = L::splat(f32::NEG_INFINITY);
        for block in 0..blocks {
            largest = scores_of::<L, MASKED>(scores.add(block * stride), visible, block).at_least(largest);
        }
        let running = &mut scratch.running[place];
        let before = running.0;
        let maximum = before.max(largest.largest());
        let total = running.1.as_mut_ptr();
        if maximum > before {
            running.0 = maximum;
            let decay = weight(L::splat(before - maximum));
            L::load(total).mul(decay).store(total);
            let sums = scratch.sums.as_mut_ptr().cast::<f32>();
            for panel in 0..panels {
                let sums = sums.add((panel * places + place) * LANES);
                L::load(sums).mul(decay).store(sums);
            }
        }
        let mut sum = L::load(total);
        let weights = scratch.weights.as_mut_ptr().cast::<u32>().add(row * SPAN_TOKENS);
        for block in 0..blocks {
            // What is not seen is infinitely far below the maximum, and weighs nothing.
            let scores = scores_of::<L, MASKED>(scores.add(block * stride), visible, block);
            let weight = weight(scores.sub(L::splat(maximum)));
            sum = sum.add(weight);
            if layout == Layout::Bf16 && L::PAIRS {
                weight.store_bf16(weights.add(block * BLOCK_TOKENS / 2).cast());
            } else {
                weight.store(weights.add(block * BLOCK_TOKENS).cast());
            }
        }
        sum.store(total);
    }
}

/// A query's scores of the tokens of a block of a span, minus infinity for those that it does not see: it sees `visible` of the span.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
unsafe fn scores_of<L: Lanes, const MASKED: bool>(scores: *const f32, visible: usize, block: usize) -> L {
    // SAFETY: the caller's contract.
    unsafe {
        let scores = L::load(scores);
        if !MASKED {
            return scores;
        }
        let count = visible.saturating_sub(block * BLOCK_TOKENS).min(BLOCK_TOKENS);
        scores.first(count, L::splat(f32::NEG_INFINITY))
    }
}
