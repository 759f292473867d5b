//! Attention over the blocks of the cache, in two regions: `append` turns q and k and writes k and v, `attend` walks the blocks.
//!
//! **Invariant.** A row walks the blocks of its sequence from 0, one block a tile, with a running maximum and sum, and stops at its own position:
//! what it computes does not depend on the chunk that it came in. Slots behind its position are never multiplied, not even by zero: they may
//! hold anything.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    activations::{MAX_HEIGHT, Packed, Room, Tile, cut, cut_exactly, pack_bf16, places},
    format::{Bf16, F32, Words},
    isa::{Kernels, Tiling},
    lanes::{LANES, Lanes, exp, sum},
    memory::{Lines, Shared},
    product::rms_norm,
    step::CpuStep,
    tile::{Left, Tiles},
};
use crate::kernel::{AttentionSpec, BLOCK_TOKENS, KernelError, KvShape, Precision, rounding::Layout};

const _: () = assert!(BLOCK_TOKENS == LANES, "a KV block is a panel of sixteen tokens");

/// Rows of a sequence that are attended together; they share the keys and values that are read.
pub(super) const CHUNK_ROWS: usize = 16;
/// Blocks whose scores are computed together.
const BLOCKS_AT_ONCE: usize = 4;

/// The paged cache: for every layer, block and head one panel of keys `[head_dim][16 tokens]` and panels of values `[16 tokens][16 dimensions]`.
pub struct CpuKv {
    pub(super) shape: KvShape,
    layout: Layout,
    pub(super) keys: Lines,
    pub(super) values: Lines,
    /// Bytes of a head's keys in a block.
    key_bytes: usize,
    /// Bytes of a panel of values.
    value_panel: usize,
}

impl CpuKv {
    /// An empty cache; f32 beside f32 weights, else bfloat16.
    pub(super) fn new(shape: KvShape, precision: Precision) -> Result<Self, KernelError> {
        let heads = shape.tokens()? / BLOCK_TOKENS * shape.kv_heads;
        let layout = if precision == Precision::F32 { Layout::F32 } else { Layout::Bf16 };
        let (key_bytes, value_panel) = (layout.panel_bytes(shape.head_dim), layout.panel_bytes(BLOCK_TOKENS));
        let values = Lines::zeroed(heads * shape.head_dim.div_ceil(LANES) * value_panel);
        Ok(Self { shape, layout, keys: Lines::zeroed(heads * key_bytes), values, key_bytes, value_panel })
    }

    /// Where a head's keys and values of a block begin: byte offsets into `keys` and `values`.
    fn at(&self, layer: usize, block: u32, head: usize) -> (usize, usize) {
        let index = (layer * self.shape.blocks + block as usize) * self.shape.kv_heads + head;
        (index * self.key_bytes, index * self.shape.head_dim.div_ceil(LANES) * self.value_panel)
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
    /// First byte of the cache's keys. Each token's slot belongs to the thread of its row: no two rows of a step share one.
    pub(super) keys: Shared<u8>,
    /// First byte of the cache's values.
    pub(super) values: Shared<u8>,
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
            let (key_at, value_at) = job.kv.at(job.layer, job.step.row_blocks[row], head);
            let token = position % BLOCK_TOKENS;
            let value = &v[head * head_dim..][..head_dim];
            // SAFETY: the block was checked against the cache; the slot of this row is this thread's, and so is the next one if no row of
            // this step has it.
            unsafe {
                turn::<T::Lanes>(&k[head * head_dim..][..head_dim], &spec.k_norm, spec, position, key);
                let (keys, values) = (job.keys.0.add(key_at), job.values.0.add(value_at));
                if job.kv.layout == Layout::F32 {
                    put_token::<F32>(keys, values, job.kv.value_panel, token, key, value);
                } else {
                    put_token::<Bf16>(keys, values, job.kv.value_panel, token, key, value);
                    if token.is_multiple_of(2) && job.step.last[row] {
                        // Values are multiplied in pairs of tokens: what a stranger left in the next slot must not be a NaN.
                        for d in 0..head_dim {
                            Bf16::put(values.add(d / LANES * job.kv.value_panel), token + 1, d % LANES, 0.0);
                        }
                    }
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
#[inline(always)]
unsafe fn put_token<F: Words>(
    keys: *mut u8,
    values: *mut u8,
    value_panel: usize,
    token: usize,
    key: &[f32],
    value: &[f32],
) {
    for d in 0..key.len() {
        // SAFETY: a block's head has head_dim key inputs and head_dim / 16 value panels, rounded up; the slot is the caller's.
        unsafe {
            F::put(keys, d, token, key[d]);
            F::put(values.add(d / LANES * value_panel), token, d % LANES, value[d]);
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
    /// Tiles of the query heads that share a key/value head.
    group: Vec<Tile>,
    /// Tiles of all queries of an item.
    all: Vec<Tile>,
    /// Queries in tiles of all, and in tiles of one row's.
    packed: Packed,
    packed_rows: Packed,
    /// `[BLOCKS_AT_ONCE][height, 16]`
    scores: Vec<f32>,
    /// Weights of a block, packed: `[words][height]`.
    weights: Vec<u32>,
    /// `[head_dim / 16][places, 16]`
    sums: Vec<f32>,
    /// Largest score so far of each query, and the weights relative to it, summed in sixteen chains.
    running: Vec<(f32, [f32; LANES])>,
    /// Panels of a product.
    panels: Vec<*const u8>,
}

// SAFETY: the pointers in `panels` are only read inside the call that wrote them.
unsafe impl Send for Scratch {}

/// Attention of one item. Its queries are the rows of the chunk times the query heads that share the key/value head; each row's take the
/// places of whole tiles, so that a tile never reaches into the next row.
///
/// # Safety
/// The processor has the instructions of `T`; the step was checked against the cache; the item's part of `out` (and of what is appended) is
/// this thread's.
#[inline(always)]
pub(super) unsafe fn attend<T: Tiling>(job: &AttendJob<'_>, item: usize, scratch: &mut Scratch) {
    let (chunk, head) = (&job.step.chunks[item / job.spec.kv_heads], item % job.spec.kv_heads);
    let (head_dim, group) = (job.spec.head_dim, job.spec.heads / job.spec.kv_heads);
    let width = job.spec.heads * head_dim;
    if let Some(append) = job.append {
        // SAFETY: the caller's contract: these rows and heads are this item's.
        unsafe { (job.kernels.append)(append, chunk.first_row..chunk.first_row + chunk.rows, head..head + 1, scratch) };
    }
    cut(group, job.kernels.heights, &mut scratch.group);
    let row_places = places(&scratch.group);
    let queries = chunk.rows * row_places;
    cut_exactly(queries, job.kernels.heights, &mut scratch.all);
    let room = scratch.packed.room(job.kv.layout, head_dim, queries);
    let room_rows = scratch.packed_rows.room(job.kv.layout, head_dim, queries);
    // SAFETY: row and head of the queries exist, and were written by this thread or in an earlier region.
    let query = |row: usize, member: usize| unsafe {
        job.queries.0.add((chunk.first_row + row) * width + (head * group + member) * head_dim).cast_const()
    };
    // SAFETY: the rooms were made for so many places, and are this thread's; places that are nobody's hold whatever they held.
    unsafe {
        for row in 0..chunk.rows {
            for tile in &scratch.group {
                let of_row = Tile { place: row * row_places + tile.place, ..*tile };
                for i in 0..tile.rows {
                    let x = query(row, tile.first + i);
                    room_rows.pack::<T::Lanes>(of_row, i, x);
                    let place = of_row.place + i;
                    let after = scratch.all.partition_point(|all| all.place <= place);
                    let all = scratch.all[after - 1];
                    room.pack::<T::Lanes>(all, place - all.place, x);
                }
            }
        }
    }
    scratch.scores.resize(BLOCKS_AT_ONCE * MAX_HEIGHT * LANES, 0.0);
    scratch.weights.resize(MAX_HEIGHT * BLOCK_TOKENS, 0);
    scratch.sums.clear();
    scratch.sums.resize(head_dim.div_ceil(LANES) * queries * LANES, 0.0);
    scratch.running.clear();
    scratch.running.resize(queries, (f32::NEG_INFINITY, [0.0; LANES]));

    let start = job.step.positions[chunk.first_row] as usize;
    let blocks = &job.step.blocks[chunk.blocks.clone()];
    // Blocks that every row sees whole.
    let whole = (start + 1) / BLOCK_TOKENS;
    let (all, of_group) = (std::mem::take(&mut scratch.all), std::mem::take(&mut scratch.group));
    let mut walk = |room: &Room, tile: Tile, blocks: &[u32], tokens: usize| {
        // SAFETY: the contract of this function; scratch was sized for these queries.
        unsafe { walk::<T>(job, head, blocks, room.left(tile), tile.place, queries, tokens, scratch) };
    };
    for first in (0..whole).step_by(BLOCKS_AT_ONCE) {
        let blocks = &blocks[first..whole.min(first + BLOCKS_AT_ONCE)];
        all.iter().for_each(|tile| walk(&room, *tile, blocks, BLOCK_TOKENS));
    }
    for row in 0..chunk.rows {
        let position = start + row;
        for block in whole..=position / BLOCK_TOKENS {
            let tokens = BLOCK_TOKENS.min(position + 1 - block * BLOCK_TOKENS);
            for tile in &of_group {
                let tile = Tile { place: row * row_places + tile.place, ..*tile };
                walk(&room_rows, tile, &blocks[block..=block], tokens);
            }
        }
    }
    for row in 0..chunk.rows {
        for tile in &of_group {
            for i in 0..tile.rows {
                let place = row * row_places + tile.place + i;
                let at = (chunk.first_row + row) * width + (head * group + tile.first + i) * head_dim;
                // SAFETY: this row and head of `out` are this thread's, and head_dim long.
                unsafe {
                    let total = sum(T::Lanes::load(scratch.running[place].1.as_ptr()));
                    let out = job.out.0.add(at);
                    for d in 0..head_dim {
                        *out.add(d) = scratch.sums[(d / LANES * queries + place) * LANES + d % LANES] / total;
                    }
                }
            }
        }
    }
    (scratch.all, scratch.group) = (all, of_group);
}

/// The queries of one tile, whose places begin at `first`, see the first `tokens` tokens of each of these blocks.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
unsafe fn walk<T: Tiling>(
    job: &AttendJob<'_>,
    head: usize,
    blocks: &[u32],
    left: Left,
    first: usize,
    queries: usize,
    tokens: usize,
    scratch: &mut Scratch,
) {
    let (kv, head_dim, height) = (job.kv, job.spec.head_dim, left.height);
    let multiply = job.kernels.multiply(kv.layout);
    // SAFETY: blocks were checked against the cache; scratch holds BLOCKS_AT_ONCE x height scores and all panels of sums; only the first
    // `tokens` inputs of the value panels are read (one more if they are odd in number, see `append`).
    unsafe {
        scratch.panels.clear();
        scratch.panels.extend(blocks.iter().map(|&block| kv.keys.as_ptr().add(kv.at(job.layer, block, head).0)));
        let scores = scratch.scores.as_mut_ptr();
        multiply(left, &scratch.panels, Tiles { data: scores, panel_stride: height * LANES, add: false });
        for (i, &block) in blocks.iter().enumerate() {
            for row in 0..height {
                let scores = scores.add((i * height + row) * LANES);
                weigh::<T::Lanes>(scores, tokens, first + row, queries, scratch);
                let words = scratch.weights.as_mut_ptr().add(row);
                if kv.layout == Layout::F32 {
                    (0..tokens).for_each(|k| *words.add(k * height) = (*scores.add(k)).to_bits());
                } else {
                    pack_bf16::<T::Lanes>(scores, BLOCK_TOKENS, words, height);
                }
            }
            let values = kv.values.as_ptr().add(kv.at(job.layer, block, head).1);
            scratch.panels.clear();
            scratch.panels.extend((0..head_dim.div_ceil(LANES)).map(|panel| values.add(panel * kv.value_panel)));
            let weights = Left { words: scratch.weights.as_ptr(), inputs: tokens, ..left };
            let sums = scratch.sums.as_mut_ptr().add(first * LANES);
            multiply(weights, &scratch.panels, Tiles { data: sums, panel_stride: queries * LANES, add: true });
        }
    }
}

/// Turns the scores of one query and block into weights relative to the running maximum, and brings the query's sums down to it.
#[inline(always)]
unsafe fn weigh<L: Lanes>(scores: *mut f32, tokens: usize, query: usize, queries: usize, scratch: &mut Scratch) {
    // SAFETY: a query has sixteen scores, of which `tokens` count, and sixteen sums a panel.
    unsafe {
        for token in tokens..LANES {
            *scores.add(token) = f32::NEG_INFINITY;
        }
        let running = &mut scratch.running[query];
        let before = running.0;
        let maximum = before.max(L::load(scores).largest());
        exp(L::load(scores).sub(L::splat(maximum))).store(scores);
        for token in tokens..LANES {
            *scores.add(token) = 0.0;
        }
        let total = running.1.as_mut_ptr();
        if maximum > before {
            let decay = exp(L::splat(before - maximum));
            L::load(total).mul(decay).store(total);
            for panel in scratch.sums.chunks_exact_mut(queries * LANES) {
                let sums = panel[query * LANES..(query + 1) * LANES].as_mut_ptr();
                L::load(sums).mul(decay).store(sums);
            }
        }
        L::load(total).add(L::load(scores)).store(total);
        running.0 = maximum;
    }
}
