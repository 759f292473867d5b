//! A backend that adds up how long each part of a step takes, for profiles.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use candle_core::{Device, Tensor};

use super::{
    AttentionSpec, Backend, Cores, DensePart, Epilogue, KernelError, KvShape, LinearPart, Precision, Rows, StepBatch,
    weight::Weight,
};
use crate::{Floats, TokenId};

/// The parts of a step, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Preparing the step from its batch.
    Begin,
    /// The embedding.
    Embed,
    /// Norm, then q, k and v.
    Qkv,
    /// Appending keys and values, and the walk over the cache.
    Attention,
    /// o, added to the residual stream.
    O,
    /// Norm, then gate and up, and SwiGLU.
    GateUp,
    /// down, added to the residual stream.
    Down,
    /// Norm and head, for the rows somebody reads.
    Head,
    /// Copying logits to the host.
    Read,
}

impl Part {
    /// Every part.
    pub const ALL: [Self; 9] = [
        Self::Begin,
        Self::Embed,
        Self::Qkv,
        Self::Attention,
        Self::O,
        Self::GateUp,
        Self::Down,
        Self::Head,
        Self::Read,
    ];

    /// Its name in a table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Begin => "begin",
            Self::Embed => "embed",
            Self::Qkv => "qkv",
            Self::Attention => "attention",
            Self::O => "o",
            Self::GateUp => "gate_up",
            Self::Down => "down",
            Self::Head => "head",
            Self::Read => "read",
        }
    }
}

/// Where [`Timed`] writes: the time of every part so far. Shared with who reads.
#[derive(Debug, Default)]
pub struct Clock {
    nanoseconds: [AtomicU64; Part::ALL.len()],
    steps: AtomicU64,
}

impl Clock {
    /// Seconds in a part so far.
    pub fn seconds(&self, part: Part) -> f64 {
        self.nanoseconds[part as usize].load(Relaxed) as f64 * 1e-9
    }

    /// Steps begun so far.
    pub fn steps(&self) -> u64 {
        self.steps.load(Relaxed)
    }
}

/// A backend that runs another one and writes the time of every part to a [`Clock`]. On devices that work ahead of their host, the time
/// shows where the host waits.
pub struct Timed<B> {
    inner: B,
    clock: Arc<Clock>,
    /// The part before: o and down, both added to the residual stream, follow attention and gate|up.
    last: Part,
}

impl<B> Timed<B> {
    /// Wraps a backend.
    pub fn new(inner: B, clock: Arc<Clock>) -> Self {
        Self { inner, clock, last: Part::Read }
    }

    fn ended(&mut self, part: Part, since: Instant) {
        self.last = part;
        self.clock.nanoseconds[part as usize].fetch_add(since.elapsed().as_nanos() as u64, Relaxed);
    }

    fn role(&self, rows: Rows, epilogue: Epilogue) -> Part {
        match (epilogue, rows) {
            (Epilogue::SwiGlu, _) => Part::GateUp,
            (Epilogue::Add, _) if self.last == Part::Attention => Part::O,
            (Epilogue::Add, _) => Part::Down,
            (Epilogue::Store, Rows::Logits) => Part::Head,
            (Epilogue::Store, Rows::All) => Part::Qkv,
        }
    }
}

impl<B: Backend> Backend for Timed<B> {
    type Linear = B::Linear;
    type Norm = B::Norm;
    type Table = B::Table;
    type Attention = B::Attention;
    type Kv = B::Kv;
    type Buffer = B::Buffer;
    type Step = B::Step;

    fn linear(&self, parts: &[LinearPart<'_>], precision: Precision) -> Result<B::Linear, KernelError> {
        self.inner.linear(parts, precision)
    }

    fn norm(&self, weight: &[f32], epsilon: f32) -> Result<B::Norm, KernelError> {
        self.inner.norm(weight, epsilon)
    }

    fn table(&self, weight: &Weight, precision: Precision) -> Result<B::Table, KernelError> {
        self.inner.table(weight, precision)
    }

    fn attention(&self, spec: &AttentionSpec) -> Result<B::Attention, KernelError> {
        self.inner.attention(spec)
    }

    fn kv(&self, shape: KvShape, precision: Precision) -> Result<B::Kv, KernelError> {
        self.inner.kv(shape, precision)
    }

    fn buffer(&self, width: usize) -> Result<B::Buffer, KernelError> {
        self.inner.buffer(width)
    }

    fn begin(&mut self, batch: &StepBatch) -> Result<B::Step, KernelError> {
        let since = Instant::now();
        self.clock.steps.fetch_add(1, Relaxed);
        let step = self.inner.begin(batch)?;
        self.ended(Part::Begin, since);
        Ok(step)
    }

    fn embed(&mut self, step: &B::Step, table: &B::Table, out: &mut B::Buffer) -> Result<(), KernelError> {
        let since = Instant::now();
        self.inner.embed(step, table, out)?;
        self.ended(Part::Embed, since);
        Ok(())
    }

    fn product(
        &mut self,
        step: &B::Step,
        linear: &B::Linear,
        rows: Rows,
        norm: Option<&B::Norm>,
        x: &B::Buffer,
        epilogue: Epilogue,
        out: &mut B::Buffer,
    ) -> Result<(), KernelError> {
        let since = Instant::now();
        self.inner.product(step, linear, rows, norm, x, epilogue, out)?;
        self.ended(self.role(rows, epilogue), since);
        Ok(())
    }

    fn attend(
        &mut self,
        step: &B::Step,
        attention: &B::Attention,
        layer: usize,
        qkv: &B::Buffer,
        kv: &mut B::Kv,
        out: &mut B::Buffer,
    ) -> Result<(), KernelError> {
        let since = Instant::now();
        self.inner.attend(step, attention, layer, qkv, kv, out)?;
        self.ended(Part::Attention, since);
        Ok(())
    }

    fn read(&mut self, buffer: &mut B::Buffer, out: &mut Floats) -> Result<(), KernelError> {
        let since = Instant::now();
        self.inner.read(buffer, out)?;
        self.ended(Part::Read, since);
        Ok(())
    }

    fn device(&self) -> Device {
        self.inner.device()
    }

    fn dense(&self, linear: &B::Linear, outputs: Range<usize>, cores: Option<&Cores>) -> Result<Tensor, KernelError> {
        self.inner.dense(linear, outputs, cores)
    }

    fn parts(&self, linear: &B::Linear) -> Result<Vec<DensePart>, KernelError> {
        self.inner.parts(linear)
    }

    fn embedding(&self, table: &B::Table, tokens: &[TokenId]) -> Result<Tensor, KernelError> {
        self.inner.embedding(table, tokens)
    }

    fn parallel(&mut self, items: usize, work: &(dyn Fn(usize) + Sync)) {
        self.inner.parallel(items, work);
    }
}
