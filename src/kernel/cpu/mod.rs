//! The backend for processors: owned, prepacked weights, one fixed order for every sum.
//!
//! | file | holds |
//! |---|---|
//! | [`isa`] | run-time choice; one file an instruction set |
//! | `lanes` | sixteen f32 lanes: the words kernels are written in, and exp |
//! | `format` | how panels of f32, bf16 and 8-bit weights lie in memory |
//! | `tile` | the register tile: one chain of multiply-adds an output |
//! | `linear`, `product` | packing; norm, product, adapter and epilogue |
//! | `attention` | the paged cache and the walk over it |
//! | `pool` | threads |
#![allow(unsafe_code)]

mod attention;
mod format;
pub mod isa;
mod lanes;
mod linear;
#[cfg(test)]
mod measure;
mod memory;
mod pool;
mod product;
mod step;
#[cfg(test)]
mod tests;
mod tile;

use half::bf16;

pub use self::{attention::CpuKv, isa::Isa, linear::CpuLinear, step::CpuStep};
use self::{
    attention::{AppendJob, AttendJob, Scratch},
    isa::Kernels,
    memory::Shared,
    pool::Pool,
    product::{PrepareJob, ProductJob},
};
use super::{
    AttentionSpec, Backend, Epilogue, KernelError, KvShape, LinearPart, Precision, Rows, StepBatch, Weight,
    check::{check_attend, check_factors, check_product, ensure, shape},
};

/// See the module.
pub struct CpuBackend {
    isa: Isa,
    kernels: &'static Kernels,
    pool: Pool,
    /// Rows of a product, gathered and normalised.
    prepared: Vec<f32>,
    /// `C V^T x` of a product's rows.
    mixed: Vec<f32>,
    /// Queries of an attention, turned and scaled.
    queries: Vec<f32>,
    /// One a thread.
    scratch: Vec<Scratch>,
}

impl CpuBackend {
    /// A backend with so many threads (the caller among them; 0 counts as 1), on this instruction set or the best there is.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when the processor does not have the instruction set or threads cannot be started.
    pub fn new(threads: usize, isa: Option<Isa>) -> Result<Self, KernelError> {
        let isa = isa.unwrap_or_else(|| Isa::available()[0]);
        let kernels = isa.kernels().ok_or_else(|| shape(format!("this processor has no {isa}")))?;
        let pool = Pool::new(threads).map_err(|error| shape(format!("cannot start kernel threads: {error}")))?;
        let scratch = (0..pool.threads()).map(|_| Scratch::default()).collect();
        let (prepared, mixed, queries) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { isa, kernels, pool, prepared, mixed, queries, scratch })
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
    data: Vec<f32>,
}

impl CpuBuffer {
    /// Makes room; what the rows hold is unspecified.
    fn resize(&mut self, rows: usize) {
        self.rows = rows;
        grow(&mut self.data, rows * self.width);
    }

    fn used(&self) -> &[f32] {
        &self.data[..self.rows * self.width]
    }
}

/// Makes a vector at least so long.
fn grow(data: &mut Vec<f32>, len: usize) {
    if data.len() < len {
        data.resize(len, 0.0);
    }
}

impl Backend for CpuBackend {
    type Linear = CpuLinear;
    type Norm = CpuNorm;
    type Table = CpuTable;
    type Attention = AttentionSpec;
    type Kv = CpuKv;
    type Buffer = CpuBuffer;
    type Step = CpuStep;

    fn linear(&self, parts: &[LinearPart<'_>], precision: Precision) -> Result<CpuLinear, KernelError> {
        CpuLinear::pack(parts, precision)
    }

    fn norm(&self, weight: &[f32], epsilon: f32) -> Result<CpuNorm, KernelError> {
        Ok(CpuNorm { weight: weight.to_vec(), epsilon })
    }

    fn table(&self, weight: &Weight, precision: Precision) -> Result<CpuTable, KernelError> {
        let values = weight.to_f32()?;
        let data = match precision {
            Precision::F32 => TableData::F32(values),
            Precision::Bf16 | Precision::Q8 => TableData::Bf16(values.into_iter().map(bf16::from_f32).collect()),
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
        Ok(CpuBuffer { width, rows: 0, data: Vec::new() })
    }

    fn begin(&mut self, batch: &StepBatch) -> Result<CpuStep, KernelError> {
        CpuStep::new(batch)
    }

    fn embed(&mut self, step: &CpuStep, table: &CpuTable, out: &mut CpuBuffer) -> Result<(), KernelError> {
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
        step: &CpuStep,
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
        let (chosen, count, slots) = match rows {
            Rows::All => (None, step.rows(), &step.slots),
            Rows::Logits => (Some(&step.logits_rows[..]), step.logits_rows.len(), &step.logits_slots),
        };
        ensure(epilogue != Epilogue::Add || out.rows == count, || {
            format!("product: adding {count} rows to {}", out.rows)
        })?;
        out.resize(count);
        let adapted = step.facts.adapted && !linear.parts.is_empty();
        let copies = norm.is_some() || chosen.is_some();
        grow(&mut self.prepared, if copies { count * inputs } else { 0 });
        grow(&mut self.mixed, if adapted { count * linear.down_rows } else { 0 });
        if copies || adapted {
            let job = PrepareJob {
                kernels: self.kernels,
                linear,
                x: x.used(),
                chosen,
                norm: norm.map(|norm| (&norm.weight[..], norm.epsilon)),
                prepared: Shared(self.prepared.as_mut_ptr()),
                cores: if adapted { &step.cores } else { &[] },
                slots: &step.slots,
                mixed: Shared(self.mixed.as_mut_ptr()),
            };
            let (job, tile) = (&job, self.kernels.rows);
            self.pool.split(count.div_ceil(tile), &|tiles| {
                // SAFETY: `kernels` are of an instruction set that this processor has; `prepared` and `mixed` hold `count` rows, which the pool
                // hands out in disjoint ranges.
                unsafe { (job.kernels.prepare)(job, tiles.start * tile..count.min(tiles.end * tile)) };
            });
        }
        let job = ProductJob {
            kernels: self.kernels,
            linear,
            x: if copies { &self.prepared } else { x.used() },
            rows: count,
            mixed: &self.mixed,
            slots: if adapted { slots } else { &[] },
            epilogue,
            out: Shared(out.data.as_mut_ptr()),
            width: out.width,
        };
        if count > 0 {
            let job = &job;
            self.pool.split(job.units(), &|units| {
                // SAFETY: as above; `out` holds `count` rows, and the columns of a unit are written by the thread that has the unit.
                unsafe { (job.kernels.product)(job, units) };
            });
        }
        Ok(())
    }

    fn attend(
        &mut self,
        step: &CpuStep,
        attention: &AttentionSpec,
        layer: usize,
        qkv: &CpuBuffer,
        kv: &mut CpuKv,
        out: &mut CpuBuffer,
    ) -> Result<(), KernelError> {
        check_attend(&step.facts, attention, &kv.shape, layer, qkv.width, out.width)?;
        ensure(qkv.rows == step.rows(), || format!("attend: {} rows of a step of {}", qkv.rows, step.rows()))?;
        out.resize(step.rows());
        grow(&mut self.queries, step.rows() * out.width);
        let kernels = self.kernels;
        let (keys, values) = (Shared(kv.keys.as_mut_ptr()), Shared(kv.values.as_mut_ptr()));
        let queries = Shared(self.queries.as_mut_ptr());
        let job = AppendJob { spec: attention, step, layer, qkv: qkv.used(), queries, kv, keys, values };
        let rows_at_once = if step.rows() <= 4 { step.rows().max(1) } else { 1 };
        self.pool.split(step.rows().div_ceil(rows_at_once), &|rows| {
            let rows = rows.start * rows_at_once..step.rows().min(rows.end * rows_at_once);
            // SAFETY: `kernels` are of an instruction set that this processor has; begin() and check_attend() checked the step against the cache
            // and the table; rows are handed out in disjoint ranges, and begin() made sure that no two rows share a slot of the cache.
            unsafe { (kernels.append)(&job, rows) };
        });
        let out = Shared(out.data.as_mut_ptr());
        let job = AttendJob { kernels, spec: attention, step, layer, queries: &self.queries, kv, out };
        let scratch = Shared(self.scratch.as_mut_ptr());
        let (job, scratch) = (&job, &scratch);
        self.pool.deal(job.items(), 1, &|thread, items| {
            // SAFETY: one scratch a thread, and each thread has its own number.
            let scratch = unsafe { &mut *scratch.0.add(thread) };
            for item in items {
                // SAFETY: as above; items are handed out once each, and no two share an element of the result.
                unsafe { (job.kernels.attend)(job, item, scratch) };
            }
        });
        Ok(())
    }

    fn read(&mut self, buffer: &mut CpuBuffer, out: &mut Vec<f32>) -> Result<(), KernelError> {
        std::mem::swap(&mut buffer.data, out);
        out.truncate(buffer.rows * buffer.width);
        buffer.rows = 0;
        Ok(())
    }

    fn parallel(&mut self, items: usize, work: &(dyn Fn(usize) + Sync)) {
        self.pool.each(items, work);
    }
}
