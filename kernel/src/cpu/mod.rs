//! The backend for processors: owned, prepacked weights, one fixed order for every sum.
//!
//! | file | holds |
//! |---|---|
//! | [`isa`] | run-time choice; one file an instruction set, and the products on tiles of AMX |
//! | `lanes` | sixteen lanes: the words kernels are written in, and exp |
//! | `format` | how panels of f32, bf16, 8-bit and 4-bit weights lie in memory |
//! | `activations` | rows cut into tiles, rounded and packed as the kernels read them |
//! | `tile` | the register tile: one chain of additions an output |
//! | `linear`, `prepare`, `product` | packing; norm and what adapters see; product, adapter and epilogue |
//! | `attention` | the paged cache and the walk over it |
//! | `unpack` | panels back to rows, for the gradient |
//! | `memory`, `pool` | huge pages for weights; threads |
#![allow(unsafe_code)]

mod activations;
mod attention;
mod format;
pub mod isa;
mod lanes;
mod linear;
#[cfg(test)]
mod measure;
mod memory;
mod pool;
mod prepare;
mod product;
mod step;
#[cfg(test)]
mod tests;
mod tile;
mod unpack;

use std::{ops::Range, sync::Arc};

use candle_core::{Device, Tensor};
use half::bf16;

use self::{
    activations::{Form, Packed, Tile, cut, mark, places},
    attention::{AppendJob, AttendJob, Scratch},
    isa::Kernels,
    memory::{Arena, Shared},
    pool::Pool,
    prepare::{PrepareJob, RowScratch},
    product::ProductJob,
};
pub use self::{attention::CpuKv, isa::Isa, linear::CpuLinear, memory::Floats, step::CpuStep};
use super::{
    AttentionSpec, Backend, Cores, DensePart, Epilogue, KernelError, KvShape, LinearPart, Precision, Rows, StepBatch,
    Weight,
    check::{check_attend, check_factors, check_product, check_tokens, ensure, shape},
};
use crate::TokenId;

/// See the module.
pub struct CpuBackend {
    isa: Isa,
    kernels: &'static Kernels,
    pool: Pool,
    /// Where weights live.
    arena: Arena,
    /// The rows of a product, cut.
    tiles: Vec<Tile>,
    /// The last step: its vectors serve the next one.
    step: Arc<CpuStep>,
    /// Queries of an attention, turned and scaled.
    queries: Floats,
    /// One a thread.
    threads: Vec<Thread>,
}

/// What a thread keeps from region to region.
#[derive(Default)]
struct Thread {
    /// Rows of a product: the first thread's hold those of all, unless they are so few that each thread prepares them for itself.
    packed: Packed,
    /// `C V^T x` of a product's rows, likewise.
    mixed: Floats,
    rows: RowScratch,
    attention: Scratch,
}

/// Pieces a thread that a region is dealt in: a thread that is taken away for a while leaves the rest to the others.
const PIECES: usize = 4;
/// Rows whose keys and values a thread writes at a time.
const APPENDED_ROWS: usize = 8;
/// So few rows are prepared by every thread for itself: that takes less time than to meet once more.
const FEW_ROWS: usize = 4;

impl CpuBackend {
    /// A backend with so many threads (the caller among them; 0 counts as 1), on this instruction set or the best there is.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when the processor does not have the instruction set or threads cannot be started.
    pub fn new(threads: usize, isa: Option<Isa>) -> Result<Self, KernelError> {
        let isa = isa.unwrap_or_else(|| Isa::available()[0]);
        let kernels = isa.kernels().ok_or_else(|| shape(format!("this processor has no {isa}")))?;
        let pool = Pool::new(threads).map_err(|error| shape(format!("cannot start kernel threads: {error}")))?;
        let threads = (0..pool.threads()).map(|_| Thread::default()).collect();
        Ok(Self {
            isa,
            kernels,
            pool,
            arena: Arena::default(),
            tiles: Vec::new(),
            step: Arc::default(),
            queries: Floats::default(),
            threads,
        })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }
}

/// An RMSNorm weight.
pub struct CpuNorm {
    weight: Vec<f32>,
    epsilon: f32,
}

/// The embedding table: f32 if the model runs in f32, else bfloat16.
pub struct CpuTable {
    vocab: usize,
    width: usize,
    data: TableData,
}

enum TableData {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

/// Activations.
pub struct CpuBuffer {
    width: usize,
    rows: usize,
    data: Floats,
}

impl CpuBuffer {
    /// Makes room; what the rows hold is unspecified.
    fn resize(&mut self, rows: usize) {
        self.rows = rows;
        self.data.resize(rows * self.width);
    }

    fn used(&self) -> &[f32] {
        &self.data[..self.rows * self.width]
    }
}

impl Backend for CpuBackend {
    type Linear = CpuLinear;
    type Norm = CpuNorm;
    type Table = CpuTable;
    type Attention = AttentionSpec;
    type Kv = CpuKv;
    type Buffer = CpuBuffer;
    type Step = Arc<CpuStep>;

    fn linear(&self, parts: &[LinearPart<'_>], precision: Precision) -> Result<CpuLinear, KernelError> {
        CpuLinear::pack(&self.arena, self.kernels, parts, precision)
    }

    fn norm(&self, weight: &[f32], epsilon: f32) -> Result<CpuNorm, KernelError> {
        Ok(CpuNorm { weight: weight.to_vec(), epsilon })
    }

    fn table(&self, weight: &Weight, precision: Precision) -> Result<CpuTable, KernelError> {
        let values = weight.to_f32()?;
        let data = match precision {
            Precision::F32 => TableData::F32(values),
            Precision::Bf16 | Precision::Q8 | Precision::Q4 => {
                TableData::Bf16(values.into_iter().map(bf16::from_f32).collect())
            }
        };
        Ok(CpuTable { vocab: weight.rows, width: weight.cols, data })
    }

    fn attention(&self, spec: &AttentionSpec) -> Result<AttentionSpec, KernelError> {
        spec.check()?;
        Ok(spec.clone())
    }

    fn kv(&self, shape: KvShape, precision: Precision) -> Result<CpuKv, KernelError> {
        CpuKv::new(shape, precision)
    }

    fn buffer(&self, width: usize) -> Result<CpuBuffer, KernelError> {
        Ok(CpuBuffer { width, rows: 0, data: Floats::default() })
    }

    fn begin(&mut self, batch: &StepBatch) -> Result<Arc<CpuStep>, KernelError> {
        if Arc::get_mut(&mut self.step).is_none() {
            self.step = Arc::default(); // somebody still holds the last one
        }
        if let Some(step) = Arc::get_mut(&mut self.step) {
            step.fill(batch)?;
        }
        Ok(Arc::clone(&self.step))
    }

    fn embed(&mut self, step: &Arc<CpuStep>, table: &CpuTable, out: &mut CpuBuffer) -> Result<(), KernelError> {
        let width = table.width;
        ensure(out.width == width, || format!("embed: width {width} into {}", out.width))?;
        ensure(step.facts.token_limit <= table.vocab, || {
            format!("tokens: {} is not below {}", step.facts.token_limit - 1, table.vocab)
        })?;
        out.resize(step.rows());
        for (row, &token) in step.tokens.iter().enumerate() {
            let (out, at) = (&mut out.data[row * width..(row + 1) * width], token as usize * width);
            match &table.data {
                TableData::F32(data) => out.copy_from_slice(&data[at..at + width]),
                TableData::Bf16(data) => {
                    out.iter_mut().zip(&data[at..at + width]).for_each(|(out, value)| *out = value.to_f32());
                }
            }
        }
        Ok(())
    }

    fn product(
        &mut self,
        step: &Arc<CpuStep>,
        linear: &CpuLinear,
        rows: Rows,
        norm: Option<&CpuNorm>,
        x: &CpuBuffer,
        epilogue: Epilogue,
        out: &mut CpuBuffer,
    ) -> Result<(), KernelError> {
        let inputs = linear.inputs;
        ensure(x.width == inputs, || format!("product: {} inputs, the linear has {inputs}", x.width))?;
        ensure(x.rows == step.rows(), || format!("product: {} rows of a step of {}", x.rows, step.rows()))?;
        check_product(&linear.outputs, norm.map(|norm| norm.weight.len()), inputs, epilogue, out.width)?;
        linear.parts.iter().try_for_each(|part| check_factors(&step.facts, part.rank, part.site))?;
        let (chosen, count, active) = match rows {
            Rows::All => (None, step.rows(), &step.active),
            Rows::Logits => (Some(&step.logits_rows[..]), step.logits_rows.len(), &step.logits_active),
        };
        ensure(epilogue != Epilogue::Add || out.rows == count, || {
            format!("product: adding {count} rows to {}", out.rows)
        })?;
        out.resize(count);
        if count == 0 {
            return Ok(());
        }
        let kernels = linear.kernels(self.kernels);
        cut(count, kernels.heights, &mut self.tiles);
        let adapted = step.facts.adapted && !linear.parts.is_empty();
        if adapted {
            mark(&mut self.tiles, active);
        }
        let few = count <= FEW_ROWS;
        let halves = kernels.form == Form::Tiles && !few && self.tiles.len() < self.pool.threads();
        let rooms = |thread: &mut Thread| {
            thread.mixed.resize(if adapted { places(&self.tiles) * linear.down_rows } else { 0 });
            let room = thread.packed.room(linear.layout, inputs, kernels.form, &self.tiles);
            (room, Shared(thread.mixed.as_mut_ptr()))
        };
        let out = Shared(out.data.as_mut_ptr());
        let (x, tiles, width) = (x.used(), &self.tiles[..], linear.width(epilogue));
        let jobs = |(room, mixed)| {
            let norm = norm.map(|norm| (&norm.weight[..], norm.epsilon));
            let (mixing, slots) = (adapted.then_some(&step.mixing), &step.slots[..]);
            let active = if adapted { &active[..] } else { &[] };
            let prepare =
                PrepareJob { kernels, linear, x, chosen, norm, tiles, halves, room, mixing, slots, active, mixed };
            (prepare, ProductJob { kernels, linear, tiles, room, mixed, active, epilogue, out, width })
        };
        let (prepare, product) = jobs(rooms(&mut self.threads[0]));
        let (units, at_once) = (product.units(), product.units_at_once());
        let threads = self.pool.threads();
        if few {
            let states = Shared(self.threads.as_mut_ptr());
            let pieces = units.div_ceil(at_once);
            let region = |thread: usize| {
                // SAFETY: one state a thread, and each thread has its own number.
                let state = unsafe { &mut *states.get(thread) };
                let (prepare, product) = jobs(rooms(state));
                let piece = |thread: usize| units.min(pieces * thread / threads * at_once);
                // SAFETY: `kernels` are of an instruction set that this processor has; the rooms are this thread's, and the columns of a unit
                // are written by the thread that has the unit.
                unsafe {
                    (kernels.prepare)(&prepare, 0..prepare.pieces(), &mut state.rows);
                    (kernels.product)(&product, piece(thread)..piece(thread + 1), &mut state.rows);
                }
            };
            self.pool.run(&region);
            return Ok(());
        }
        let states = Shared(self.threads.as_mut_ptr());
        self.pool.deal(prepare.pieces(), 1, &|thread, pieces| {
            // SAFETY: as above; only the scratch of the thread's state is used, and pieces are handed out once each.
            unsafe { (kernels.prepare)(&prepare, pieces, &mut (*states.get(thread)).rows) };
        });
        self.pool.deal(units, units.div_ceil(threads * PIECES).next_multiple_of(at_once), &|thread, units| {
            // SAFETY: as above; units are handed out once each.
            unsafe { (kernels.product)(&product, units, &mut (*states.get(thread)).rows) };
        });
        Ok(())
    }

    fn attend(
        &mut self,
        step: &Arc<CpuStep>,
        attention: &AttentionSpec,
        layer: usize,
        qkv: &CpuBuffer,
        kv: &mut CpuKv,
        out: &mut CpuBuffer,
    ) -> Result<(), KernelError> {
        check_attend(&step.facts, attention, &kv.shape, layer, qkv.width, out.width)?;
        ensure(qkv.rows == step.rows(), || format!("attend: {} rows of a step of {}", qkv.rows, step.rows()))?;
        out.resize(step.rows());
        self.queries.resize(step.rows() * out.width);
        let kernels = self.kernels.of(kv.layout, false);
        let cache = Shared(kv.data.as_mut_ptr());
        let queries = Shared(self.queries.as_mut_ptr());
        let append = AppendJob { spec: attention, step, layer, qkv: qkv.used(), queries, kv, cache };
        let states = Shared(self.threads.as_mut_ptr());
        let apart = !step.chunks_are_sequences;
        if apart {
            self.pool.deal(step.rows(), APPENDED_ROWS, &|thread, rows| {
                // SAFETY: `kernels` are of an instruction set that this processor has; begin() and check_attend() checked the step against the cache
                // and the table; rows are handed out once each, and begin() made sure that no two rows share a slot of the cache.
                unsafe { (kernels.append)(&append, rows, 0..attention.kv_heads, &mut (*states.get(thread)).attention) };
            });
        }
        let out = Shared(out.data.as_mut_ptr());
        let append = (!apart).then_some(&append);
        let job = AttendJob { kernels, spec: attention, step, layer, queries, kv, append, out };
        // The heads of a chunk lie side by side in the cache and go to one thread, unless chunks are few.
        let piece = if step.chunks.len() >= PIECES * self.pool.threads() { attention.kv_heads } else { 1 };
        self.pool.deal(job.items(), piece, &|thread, items| {
            // SAFETY: as above; one state a thread, and each thread has its own number; items are handed out once each, and no two share
            // an element of the result or, where they append, a head of a slot.
            unsafe { (kernels.attend)(&job, items, &mut (*states.get(thread)).attention) };
        });
        Ok(())
    }

    fn read(&mut self, buffer: &mut CpuBuffer, out: &mut Floats) -> Result<(), KernelError> {
        std::mem::swap(&mut buffer.data, out);
        out.resize(buffer.rows * buffer.width);
        buffer.rows = 0;
        Ok(())
    }

    fn dense(&self, linear: &CpuLinear, outputs: Range<usize>, cores: Option<&Cores>) -> Result<Tensor, KernelError> {
        linear.dense(outputs, cores)
    }

    fn parts(&self, linear: &CpuLinear) -> Result<Vec<DensePart>, KernelError> {
        linear.dense_parts()
    }

    fn embedding(&self, table: &CpuTable, tokens: &[TokenId]) -> Result<Tensor, KernelError> {
        check_tokens(tokens, table.vocab)?;
        let width = table.width;
        let mut rows = Vec::with_capacity(tokens.len() * width);
        for token in tokens {
            let at = *token as usize * width;
            match &table.data {
                TableData::F32(data) => rows.extend_from_slice(&data[at..at + width]),
                TableData::Bf16(data) => rows.extend(data[at..at + width].iter().map(|value| value.to_f32())),
            }
        }
        Ok(Tensor::from_vec(rows, (tokens.len(), width), &Device::Cpu)?)
    }

    fn parallel(&mut self, items: usize, work: &(dyn Fn(usize) + Sync)) {
        self.pool.each(items, work);
    }
}
