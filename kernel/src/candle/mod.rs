//! The backend for any candle device: the whole step as tensor operations. CUDA and Metal run this code; candle's CPU device runs it in tests.
//!
//! Weights are f32 or, for [`Precision::Bf16`] and [`Precision::Q8`], bfloat16 (8-bit files are widened: tensors have no 8-bit product).
//! Products take inputs of the weights' type; norms, adapters, scores and the residual stream are f32. A device's product may choose another
//! order of sums for another number of rows, so this backend does not promise equal bits across batches.

mod attention;
mod linear;
mod step;
#[cfg(test)]
mod tests;

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

pub use self::{
    attention::{CandleAttention, CandleKv},
    linear::CandleLinear,
    step::CandleStep,
};
use super::{
    AttentionSpec, Backend, Cores, DensePart, Epilogue, KernelError, KvShape, LinearPart, Precision, Rows, StepBatch,
    Weight,
    check::{check_product, check_tokens, ensure},
};
use crate::{Floats, TokenId};

/// See the module.
pub struct CandleBackend {
    device: Device,
}

impl CandleBackend {
    /// A backend on this device.
    pub fn new(device: Device) -> Self {
        Self { device }
    }

    /// The device it runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

/// What weights and cached keys and values are held in.
fn dtype(precision: Precision) -> DType {
    match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 | Precision::Q8 | Precision::Q4 => DType::BF16,
    }
}

/// An RMSNorm weight.
pub struct CandleNorm {
    weight: Tensor,
    epsilon: f32,
}

/// The embedding table, `[vocab, width]`.
pub struct CandleTable {
    vocab: usize,
    width: usize,
    data: Tensor,
}

/// Activations, f32 `[rows, width]`; no tensor while there are no rows.
pub struct CandleBuffer {
    width: usize,
    data: Option<Tensor>,
}

impl CandleBuffer {
    fn rows(&self) -> usize {
        self.data.as_ref().map_or(0, |data| data.dims()[0])
    }
}

/// A weight on a device in the type of its precision.
fn upload(weight: &Weight, precision: Precision, device: &Device) -> Result<Tensor, KernelError> {
    let values = Tensor::from_vec(weight.to_f32()?, (weight.rows, weight.cols), &Device::Cpu)?;
    Ok(values.to_dtype(dtype(precision))?.to_device(device)?)
}

impl Backend for CandleBackend {
    type Linear = CandleLinear;
    type Norm = CandleNorm;
    type Table = CandleTable;
    type Attention = CandleAttention;
    type Kv = CandleKv;
    type Buffer = CandleBuffer;
    type Step = CandleStep;

    fn linear(&self, parts: &[LinearPart<'_>], precision: Precision) -> Result<CandleLinear, KernelError> {
        CandleLinear::new(parts, precision, &self.device)
    }

    fn norm(&self, weight: &[f32], epsilon: f32) -> Result<CandleNorm, KernelError> {
        Ok(CandleNorm { weight: Tensor::new(weight, &self.device)?, epsilon })
    }

    fn table(&self, weight: &Weight, precision: Precision) -> Result<CandleTable, KernelError> {
        let data = upload(weight, precision, &self.device)?;
        Ok(CandleTable { vocab: weight.rows, width: weight.cols, data })
    }

    fn attention(&self, spec: &AttentionSpec) -> Result<CandleAttention, KernelError> {
        CandleAttention::new(spec, &self.device)
    }

    fn kv(&self, shape: KvShape, precision: Precision) -> Result<CandleKv, KernelError> {
        CandleKv::new(shape, dtype(precision), &self.device)
    }

    fn buffer(&self, width: usize) -> Result<CandleBuffer, KernelError> {
        Ok(CandleBuffer { width, data: None })
    }

    fn begin(&mut self, batch: &StepBatch) -> Result<CandleStep, KernelError> {
        CandleStep::new(batch, &self.device)
    }

    fn embed(&mut self, step: &CandleStep, table: &CandleTable, out: &mut CandleBuffer) -> Result<(), KernelError> {
        ensure(out.width == table.width, || format!("embed: width {} into {}", table.width, out.width))?;
        ensure(step.facts.token_limit <= table.vocab, || {
            format!("tokens: {} is not below {}", step.facts.token_limit - 1, table.vocab)
        })?;
        let embed = |rows: &step::Rows| table.data.index_select(&rows.tokens, 0)?.to_dtype(DType::F32);
        out.data = step.data.as_ref().map(embed).transpose()?;
        Ok(())
    }

    fn product(
        &mut self,
        step: &CandleStep,
        linear: &CandleLinear,
        rows: Rows,
        norm: Option<&CandleNorm>,
        x: &CandleBuffer,
        epilogue: Epilogue,
        out: &mut CandleBuffer,
    ) -> Result<(), KernelError> {
        ensure(x.width == linear.inputs, || format!("product: {} inputs, the linear has {}", x.width, linear.inputs))?;
        ensure(x.rows() == step.rows, || format!("product: {} rows of a step of {}", x.rows(), step.rows))?;
        let norm_width = norm.map(|norm| norm.weight.elem_count());
        check_product(&linear.outputs, norm_width, x.width, epilogue, out.width)?;
        linear.check(step)?;
        let count = if rows == Rows::All { step.rows } else { step.logits };
        ensure(epilogue != Epilogue::Add || out.rows() == count, || {
            format!("product: adding {count} rows to {}", out.rows())
        })?;
        let (Some(data), Some(x), true) = (&step.data, &x.data, count > 0) else {
            out.data = None;
            return Ok(());
        };
        let (x, slots) = match (rows, &data.logits) {
            (Rows::Logits, Some(chosen)) => (x.index_select(chosen, 0)?, data.slots.index_select(chosen, 0)?),
            _ => (x.clone(), data.slots.clone()),
        };
        let x = match norm {
            Some(norm) => candle_nn::ops::rms_norm(&x.contiguous()?, &norm.weight, norm.epsilon)?,
            None => x,
        };
        let y = linear.forward(&x, data.cores.as_ref().map(|cores| (cores, &slots)))?;
        out.data = Some(match (epilogue, &out.data) {
            (Epilogue::Add, Some(before)) => (before + y)?,
            (Epilogue::SwiGlu, _) => {
                let (gate, up) = (y.narrow(1, 0, out.width)?, y.narrow(1, out.width, out.width)?);
                (gate.silu()? * up)?
            }
            _ => y,
        });
        Ok(())
    }

    fn attend(
        &mut self,
        step: &CandleStep,
        attention: &CandleAttention,
        layer: usize,
        qkv: &CandleBuffer,
        kv: &mut CandleKv,
        out: &mut CandleBuffer,
    ) -> Result<(), KernelError> {
        attention.check(step, kv, layer, qkv.width, out.width)?;
        ensure(qkv.rows() == step.rows, || format!("attend: {} rows of a step of {}", qkv.rows(), step.rows))?;
        out.data = match (&step.data, &qkv.data) {
            (Some(rows), Some(qkv)) => Some(attention.forward(rows, qkv, kv, layer)?),
            _ => None,
        };
        Ok(())
    }

    fn read(&mut self, buffer: &mut CandleBuffer, out: &mut Floats) -> Result<(), KernelError> {
        match &buffer.data {
            Some(data) => out.set(&data.flatten_all()?.to_vec1::<f32>()?),
            None => out.resize(0),
        }
        Ok(())
    }

    fn device(&self) -> Device {
        self.device.clone()
    }

    fn dense(
        &self,
        linear: &CandleLinear,
        outputs: Range<usize>,
        cores: Option<&Cores>,
    ) -> Result<Tensor, KernelError> {
        linear.dense(outputs, cores)
    }

    fn parts(&self, linear: &CandleLinear) -> Result<Vec<DensePart>, KernelError> {
        linear.dense_parts()
    }

    fn embedding(&self, table: &CandleTable, tokens: &[TokenId]) -> Result<Tensor, KernelError> {
        check_tokens(tokens, table.vocab)?;
        let tokens = Tensor::new(tokens, &self.device)?;
        Ok(table.data.index_select(&tokens, 0)?.to_dtype(DType::F32)?)
    }
}
