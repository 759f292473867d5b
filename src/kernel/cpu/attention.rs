//! Attention over the blocks of the cache, in two regions: `append` turns q and k and writes k and v, `attend` walks the blocks.
//!
//! **Invariant.** A row walks the blocks of its sequence from 0, one block a tile, with a running maximum and sum, and stops at its own position:
//! what it computes does not depend on the chunk that it came in. Slots behind its position are never multiplied, not even by zero: they may
//! hold anything.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    format::{Bf16, F32, Format, Store},
    isa::{Kernels, Tiling},
    lanes::{LANES, Lanes, exp, sum},
    memory::{Lines, Shared},
    product::rms_norm,
    step::CpuStep,
    tile::{Left, Tiles},
};
use crate::kernel::{AttentionSpec, BLOCK_TOKENS, KernelError, KvShape, Precision};

const _: () = assert!(BLOCK_TOKENS == LANES, "a KV block is a panel of sixteen tokens");

/// Rows of a sequence that are attended together; they share the keys and values that are read.
pub(super) const CHUNK_ROWS: usize = 16;
/// Blocks whose scores are computed together.
const BLOCKS_AT_ONCE: usize = 4;

/// The paged cache: for every layer, block and head one panel of keys `[head_dim][16 tokens]` and panels of values `[16 tokens][16 dimensions]`.
pub struct CpuKv {
    pub(super) shape: KvShape,
    pub(super) precision: Precision,
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
        let (key_bytes, value_panel) = match precision {
            Precision::F32 => (F32::panel_bytes(shape.head_dim), F32::panel_bytes(BLOCK_TOKENS)),
            Precision::Bf16 | Precision::Q8 => (Bf16::panel_bytes(shape.head_dim), Bf16::panel_bytes(BLOCK_TOKENS)),
        };
        let precision = if precision == Precision::F32 { precision } else { Precision::Bf16 };
        let values = Lines::zeroed(heads * shape.head_dim.div_ceil(LANES) * value_panel);
        Ok(Self { shape, precision, keys: Lines::zeroed(heads * key_bytes), values, key_bytes, value_panel })
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

/// Normalises and turns the heads of q and k, and writes k and v to the cache.
///
/// # Safety
/// The processor has the instructions of `T`; the step was checked against the cache and the rotary table; rows and slots are this thread's.
#[inline(always)]
pub(super) unsafe fn append<T: Tiling>(job: &AppendJob<'_>, rows: Range<usize>) {
    let spec = job.spec;
    let (heads, kv_heads, head_dim) = (spec.heads, spec.kv_heads, spec.head_dim);
    let scale = 1.0 / (head_dim as f32).sqrt();
    let mut key = vec![0f32; head_dim];
    for row in rows {
        let position = job.step.positions[row] as usize;
        let qkv = &job.qkv[row * (heads + 2 * kv_heads) * head_dim..][..(heads + 2 * kv_heads) * head_dim];
        let (q, rest) = qkv.split_at(heads * head_dim);
        let (k, v) = rest.split_at(kv_heads * head_dim);
        // SAFETY: row `row` of `queries` is this thread's and heads * head_dim long.
        let queries =
            unsafe { std::slice::from_raw_parts_mut(job.queries.0.add(row * heads * head_dim), heads * head_dim) };
        for (query, q) in queries.chunks_exact_mut(head_dim).zip(q.chunks_exact(head_dim)) {
            // SAFETY: the instruction set, by contract.
            unsafe { turn::<T::Lanes>(q, &spec.q_norm, spec, position, query) };
            query.iter_mut().for_each(|x| *x *= scale);
        }
        for head in 0..kv_heads {
            let (key_at, value_at) = job.kv.at(job.layer, job.step.row_blocks[row], head);
            let token = position % BLOCK_TOKENS;
            // SAFETY: the block was checked against the cache; the slot of this row is this thread's.
            unsafe {
                turn::<T::Lanes>(&k[head * head_dim..][..head_dim], &spec.k_norm, spec, position, &mut key);
                let value = &v[head * head_dim..][..head_dim];
                let (keys, values) = (job.keys.0.add(key_at), job.values.0.add(value_at));
                match job.kv.precision {
                    Precision::F32 => put_token::<F32>(keys, values, job.kv.value_panel, token, &key, value),
                    _ => put_token::<Bf16>(keys, values, job.kv.value_panel, token, &key, value),
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
unsafe fn put_token<F: Store>(
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
    pub(super) queries: &'a [f32],
    pub(super) kv: &'a CpuKv,
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
    /// `[queries, head_dim]`
    queries: Vec<f32>,
    /// `[BLOCKS_AT_ONCE][queries, 16]`: scores, then weights.
    scores: Vec<f32>,
    /// `[head_dim / 16][queries, 16]`
    sums: Vec<f32>,
    /// Largest score so far of each query, and the weights relative to it, summed in sixteen chains.
    running: Vec<(f32, [f32; LANES])>,
    /// Panels of a product.
    panels: Vec<*const u8>,
}

// SAFETY: the pointers in `panels` are only read inside the call that wrote them.
unsafe impl Send for Scratch {}

/// Attention of one item. Its queries are the rows of the chunk times the query heads that share the key/value head.
///
/// # Safety
/// The processor has the instructions of `T`; the step was checked against the cache; the item's part of `out` is this thread's.
#[inline(always)]
pub(super) unsafe fn attend<T: Tiling>(job: &AttendJob<'_>, item: usize, scratch: &mut Scratch) {
    let (chunk, head) = (&job.step.chunks[item / job.spec.kv_heads], item % job.spec.kv_heads);
    let (head_dim, group) = (job.spec.head_dim, job.spec.heads / job.spec.kv_heads);
    let width = job.spec.heads * head_dim;
    let queries = chunk.rows * group;
    scratch.queries.clear();
    for row in chunk.first_row..chunk.first_row + chunk.rows {
        scratch.queries.extend_from_slice(&job.queries[row * width + head * group * head_dim..][..group * head_dim]);
    }
    scratch.scores.resize(scratch.scores.len().max(BLOCKS_AT_ONCE * queries * LANES), 0.0);
    scratch.sums.clear();
    scratch.sums.resize(head_dim.div_ceil(LANES) * queries * LANES, 0.0);
    scratch.running.clear();
    scratch.running.resize(queries, (f32::NEG_INFINITY, [0.0; LANES]));

    let start = job.step.positions[chunk.first_row] as usize;
    let blocks = &job.step.blocks[chunk.blocks.clone()];
    // Blocks that every row sees whole.
    let whole = (start + 1) / BLOCK_TOKENS;
    // SAFETY: the contract of this function; scratch was sized for these queries.
    unsafe {
        for first in (0..whole).step_by(BLOCKS_AT_ONCE) {
            let blocks = &blocks[first..whole.min(first + BLOCKS_AT_ONCE)];
            walk::<T>(job, head, blocks, 0..queries, queries, BLOCK_TOKENS, scratch);
        }
        for row in 0..chunk.rows {
            let position = start + row;
            for block in whole..=position / BLOCK_TOKENS {
                let tokens = BLOCK_TOKENS.min(position + 1 - block * BLOCK_TOKENS);
                walk::<T>(job, head, &blocks[block..=block], row * group..(row + 1) * group, queries, tokens, scratch);
            }
        }
        for query in 0..queries {
            let total = sum(T::Lanes::load(scratch.running[query].1.as_ptr()));
            let row = chunk.first_row + query / group;
            let out = job.out.0.add(row * width + (head * group + query % group) * head_dim);
            for d in 0..head_dim {
                *out.add(d) = scratch.sums[(d / LANES * queries + query) * LANES + d % LANES] / total;
            }
        }
    }
}

/// Some queries of an item see the first `tokens` tokens of each of these blocks.
#[inline(always)]
unsafe fn walk<T: Tiling>(
    job: &AttendJob<'_>,
    head: usize,
    blocks: &[u32],
    range: Range<usize>,
    queries: usize,
    tokens: usize,
    scratch: &mut Scratch,
) {
    let (kv, head_dim) = (job.kv, job.spec.head_dim);
    let multiply = job.kernels.multiply(kv.precision);
    let count = range.len();
    // SAFETY: blocks were checked against the cache; scratch holds BLOCKS_AT_ONCE x queries scores and all panels of sums; only the first
    // `tokens` inputs of the value panels are read.
    unsafe {
        scratch.panels.clear();
        scratch.panels.extend(blocks.iter().map(|&block| kv.keys.as_ptr().add(kv.at(job.layer, block, head).0)));
        let left = Left {
            data: scratch.queries.as_ptr().add(range.start * head_dim),
            stride: head_dim,
            rows: count,
            inputs: head_dim,
        };
        let scores = scratch.scores.as_mut_ptr();
        multiply(left, &scratch.panels, Tiles { data: scores, panel_stride: count * LANES, add: false });
        for (i, &block) in blocks.iter().enumerate() {
            let scores = scores.add(i * count * LANES);
            for query in range.clone() {
                weigh::<T::Lanes>(scores.add((query - range.start) * LANES), tokens, query, queries, scratch);
            }
            let values = kv.values.as_ptr().add(kv.at(job.layer, block, head).1);
            scratch.panels.clear();
            scratch.panels.extend((0..head_dim.div_ceil(LANES)).map(|panel| values.add(panel * kv.value_panel)));
            let left = Left { data: scores, stride: LANES, rows: count, inputs: tokens };
            let sums = scratch.sums.as_mut_ptr().add(range.start * LANES);
            multiply(left, &scratch.panels, Tiles { data: sums, panel_stride: queries * LANES, add: true });
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
