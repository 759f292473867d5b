//! The slow, obviously right backend: plain loops over row-major f32, sums in f64.
//!
//! Its numbers are what the other backends are held to. It rounds weights and cached keys and values exactly as the precision says,
//! so that only the order and width of sums differ from a fast backend.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::{
    AttentionSpec, BASE_SLOT, BLOCK_TOKENS, Backend, Cores, DenseFactors, DensePart, Epilogue, KernelError, KvShape,
    LinearPart, Precision, Rows, StepBatch,
    check::{
        add_update, check_attend, check_batch, check_dense, check_factors, check_product, check_tokens, ensure, shape,
    },
    rounding::{Layout, from_q4, from_q8, round_activations, round_bf16, round_kv, round_weights},
    weight::Weight,
};
use crate::{Floats, TokenId};

/// See the module.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReferenceBackend;

/// A group of linears, each as the precision rounds it.
pub struct ReferenceLinear {
    layout: Layout,
    inputs: usize,
    parts: Vec<Part>,
}

struct Part {
    outputs: usize,
    /// `[outputs, inputs]`
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    factors: Option<Factors>,
}

struct Factors {
    site: usize,
    rank: usize,
    /// `[outputs, rank]`
    u: Vec<f32>,
    /// `[rank, inputs]`
    v: Vec<f32>,
}

/// Weight and epsilon.
pub struct ReferenceNorm {
    weight: Vec<f32>,
    epsilon: f32,
}

/// The embedding.
pub struct ReferenceTable {
    vocab: usize,
    width: usize,
    /// `[vocab, width]`
    data: Vec<f32>,
}

/// Keys and values, `[layers, blocks, BLOCK_TOKENS, kv_heads * head_dim]` each.
pub struct ReferenceKv {
    shape: KvShape,
    precision: Precision,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl ReferenceKv {
    /// Where the first number of this position of a sequence lies.
    fn at(&self, layer: usize, blocks: &[u32], position: usize) -> usize {
        let block = layer * self.shape.blocks + blocks[position / BLOCK_TOKENS] as usize;
        (block * BLOCK_TOKENS + position % BLOCK_TOKENS) * self.shape.kv_heads * self.shape.head_dim
    }
}

/// Activations.
pub struct ReferenceBuffer {
    width: usize,
    rows: usize,
    data: Vec<f32>,
}

impl ReferenceBuffer {
    fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.width..(row + 1) * self.width]
    }

    fn resize(&mut self, rows: usize) {
        self.rows = rows;
        self.data.resize(rows * self.width, 0.0);
    }
}

impl Backend for ReferenceBackend {
    type Linear = ReferenceLinear;
    type Norm = ReferenceNorm;
    type Table = ReferenceTable;
    type Attention = AttentionSpec;
    type Kv = ReferenceKv;
    type Buffer = ReferenceBuffer;
    type Step = StepBatch;

    fn linear(&self, parts: &[LinearPart<'_>], precision: Precision) -> Result<ReferenceLinear, KernelError> {
        let first = parts.first().ok_or_else(|| shape("a group of no linears"))?;
        let inputs = first.weight.cols;
        let layout = Layout::of(precision, parts);
        let parts = parts.iter().map(|part| pack(part, inputs, layout)).collect::<Result<_, _>>()?;
        Ok(ReferenceLinear { layout, inputs, parts })
    }

    fn norm(&self, weight: &[f32], epsilon: f32) -> Result<ReferenceNorm, KernelError> {
        Ok(ReferenceNorm { weight: weight.to_vec(), epsilon })
    }

    fn table(&self, weight: &Weight, precision: Precision) -> Result<ReferenceTable, KernelError> {
        let mut data = weight.to_f32()?;
        if precision != Precision::F32 {
            data.iter_mut().for_each(|x| *x = round_bf16(*x));
        }
        Ok(ReferenceTable { vocab: weight.rows, width: weight.cols, data })
    }

    fn attention(&self, spec: &AttentionSpec) -> Result<AttentionSpec, KernelError> {
        spec.check()?;
        Ok(spec.clone())
    }

    fn kv(&self, shape: KvShape, precision: Precision) -> Result<ReferenceKv, KernelError> {
        let size = shape.tokens()? * shape.kv_heads * shape.head_dim;
        Ok(ReferenceKv { shape, precision, keys: vec![0.0; size], values: vec![0.0; size] })
    }

    fn buffer(&self, width: usize) -> Result<ReferenceBuffer, KernelError> {
        Ok(ReferenceBuffer { width, rows: 0, data: Vec::new() })
    }

    fn begin(&mut self, batch: &StepBatch) -> Result<StepBatch, KernelError> {
        check_batch(batch, &mut Vec::new())?;
        Ok(batch.clone())
    }

    fn embed(
        &mut self,
        step: &StepBatch,
        table: &ReferenceTable,
        out: &mut ReferenceBuffer,
    ) -> Result<(), KernelError> {
        ensure(out.width == table.width, || format!("embed: width {} into {}", table.width, out.width))?;
        out.resize(step.rows());
        for (row, &token) in step.tokens.iter().enumerate() {
            let token = token as usize;
            ensure(token < table.vocab, || format!("tokens: {token} is not below {}", table.vocab))?;
            let width = table.width;
            out.data[row * width..(row + 1) * width].copy_from_slice(&table.data[token * width..(token + 1) * width]);
        }
        Ok(())
    }

    fn product(
        &mut self,
        step: &StepBatch,
        linear: &ReferenceLinear,
        rows: Rows,
        norm: Option<&ReferenceNorm>,
        x: &ReferenceBuffer,
        epilogue: Epilogue,
        out: &mut ReferenceBuffer,
    ) -> Result<(), KernelError> {
        let facts = check_batch(step, &mut Vec::new())?;
        ensure(x.width == linear.inputs, || format!("product: {} inputs, the linear has {}", x.width, linear.inputs))?;
        ensure(x.rows == step.rows(), || format!("product: {} rows of a step of {}", x.rows, step.rows()))?;
        let widths: Vec<usize> = linear.parts.iter().map(|part| part.outputs).collect();
        check_product(&widths, norm.map(|norm| norm.weight.len()), x.width, epilogue, out.width)?;
        for factors in linear.parts.iter().filter_map(|part| part.factors.as_ref()) {
            check_factors(&facts, factors.rank, factors.site)?;
        }
        let chosen: Vec<usize> = match rows {
            Rows::All => (0..step.rows()).collect(),
            Rows::Logits => step.logits_rows.iter().map(|&row| row as usize).collect(),
        };
        ensure(epilogue != Epilogue::Add || out.rows == chosen.len(), || {
            format!("product: adding {} rows to {}", chosen.len(), out.rows)
        })?;
        out.resize(chosen.len());
        for (i, &row) in chosen.iter().enumerate() {
            let mut input = match norm {
                Some(norm) => rms_norm(x.row(row), &norm.weight, norm.epsilon),
                None => x.row(row).to_vec(),
            };
            round_activations(&mut input, linear.layout);
            let y = product_row(step, linear, row, &input);
            let out = &mut out.data[i * out.width..(i + 1) * out.width];
            match epilogue {
                Epilogue::Store => out.iter_mut().zip(y).for_each(|(out, y)| *out = y as f32),
                Epilogue::Add => out.iter_mut().zip(y).for_each(|(out, y)| *out = (f64::from(*out) + y) as f32),
                Epilogue::SwiGlu => {
                    let (gate, up) = y.split_at(y.len() / 2);
                    for (out, (gate, up)) in out.iter_mut().zip(gate.iter().zip(up)) {
                        *out = (gate / (1.0 + (-gate).exp()) * up) as f32;
                    }
                }
            }
        }
        Ok(())
    }

    fn attend(
        &mut self,
        step: &StepBatch,
        attention: &AttentionSpec,
        layer: usize,
        qkv: &ReferenceBuffer,
        kv: &mut ReferenceKv,
        out: &mut ReferenceBuffer,
    ) -> Result<(), KernelError> {
        let facts = check_batch(step, &mut Vec::new())?;
        let (heads, kv_heads, head_dim) = (attention.heads, attention.kv_heads, attention.head_dim);
        check_attend(&facts, attention, &kv.shape, layer, qkv.width, out.width)?;
        ensure(qkv.rows == step.rows(), || format!("attend: {} rows of a step of {}", qkv.rows, step.rows()))?;
        out.resize(step.rows());
        let mut queries = Vec::new();
        for sequence in &step.sequences {
            for row in sequence.first_row..sequence.first_row + sequence.rows {
                let position = step.positions[row] as usize;
                let (q, rest) = qkv.row(row).split_at(heads * head_dim);
                let (k, v) = rest.split_at(kv_heads * head_dim);
                let rotated = |heads: &[f32], norm: &Option<(Vec<f32>, f32)>| -> Vec<f32> {
                    heads.chunks(head_dim).flat_map(|head| rotate(head, norm, attention, position)).collect()
                };
                let precision = kv.precision;
                let scale = 1.0 / (head_dim as f32).sqrt();
                let query = rotated(q, &attention.q_norm).into_iter().map(|q| round_kv(q * scale, precision));
                queries.push(query.collect::<Vec<f32>>());
                let to = kv.at(layer, &sequence.blocks, position);
                for (i, (k, v)) in rotated(k, &attention.k_norm).iter().zip(v).enumerate() {
                    kv.keys[to + i] = round_kv(*k, precision);
                    kv.values[to + i] = round_kv(*v, precision);
                }
            }
        }
        for sequence in &step.sequences {
            for (row, query) in queries.iter().enumerate().skip(sequence.first_row).take(sequence.rows) {
                for head in 0..heads {
                    let q = &query[head * head_dim..(head + 1) * head_dim];
                    let offset = head / (heads / kv_heads) * head_dim;
                    let positions = 0..=step.positions[row] as usize;
                    let at: Vec<usize> = positions.map(|p| kv.at(layer, &sequence.blocks, p) + offset).collect();
                    let result = attend_head(q, &kv.keys, &kv.values, &at);
                    let to = row * out.width + head * head_dim;
                    out.data[to..to + head_dim].copy_from_slice(&result);
                }
            }
        }
        Ok(())
    }

    fn read(&mut self, buffer: &mut ReferenceBuffer, out: &mut Floats) -> Result<(), KernelError> {
        out.set(&buffer.data);
        Ok(())
    }

    fn dense(
        &self,
        linear: &ReferenceLinear,
        outputs: Range<usize>,
        cores: Option<&Cores>,
    ) -> Result<Tensor, KernelError> {
        let all = linear.parts.iter().map(|part| part.outputs).sum();
        let factors = linear.parts.iter().filter_map(|part| part.factors.as_ref());
        check_dense(all, &outputs, cores, factors.map(|factors| (factors.site, factors.rank)))?;
        let mut rows = Vec::new();
        for part in &linear.parts {
            for (output, weight) in part.weight.chunks(linear.inputs).enumerate() {
                let mut row = weight.to_vec();
                if let (Some(factors), Some(cores)) = (&part.factors, cores) {
                    let u = |i| factors.u[output * factors.rank + i];
                    add_update(&mut row, u, cores.site(factors.site), &factors.v);
                }
                rows.push(row);
            }
        }
        let count = outputs.len();
        Ok(Tensor::from_vec(rows[outputs].concat(), (count, linear.inputs), &Device::Cpu)?)
    }

    fn parts(&self, linear: &ReferenceLinear) -> Result<Vec<DensePart>, KernelError> {
        let tensor = |values: &[f32], shape: (usize, usize)| Tensor::from_slice(values, shape, &Device::Cpu);
        let of = |part: &Part| {
            let factors = match &part.factors {
                Some(Factors { site, rank, u, v }) => {
                    let v = tensor(v, (*rank, linear.inputs))?.t()?.contiguous()?;
                    Some(DenseFactors { site: *site, u: tensor(u, (part.outputs, *rank))?, v })
                }
                None => None,
            };
            let bias = part.bias.as_ref().map(|bias| Tensor::new(&bias[..], &Device::Cpu)).transpose()?;
            Ok(DensePart { outputs: part.outputs, bias, factors })
        };
        linear.parts.iter().map(of).collect()
    }

    fn embedding(&self, table: &ReferenceTable, tokens: &[TokenId]) -> Result<Tensor, KernelError> {
        check_tokens(tokens, table.vocab)?;
        let row = |&token: &TokenId| &table.data[token as usize * table.width..][..table.width];
        let rows: Vec<f32> = tokens.iter().flat_map(row).copied().collect();
        Ok(Tensor::from_vec(rows, (tokens.len(), table.width), &Device::Cpu)?)
    }
}

fn pack(part: &LinearPart<'_>, inputs: usize, layout: Layout) -> Result<Part, KernelError> {
    part.check(inputs)?;
    let weight = match layout {
        Layout::Q8 => from_q8(&part.weight.to_q8()?, inputs),
        Layout::Q4 => from_q4(&part.weight.to_q4()?, inputs),
        _ => round_weights(part.weight.to_f32()?, inputs, layout),
    };
    let factors = part.factors.filter(|factors| factors.rank > 0).map(|factors| {
        let rank = factors.rank;
        let v = (0..rank * inputs).map(|i| factors.v[i % inputs * rank + i / inputs]).collect();
        let v = round_weights(v, inputs, layout.of_factors());
        Factors { site: factors.site, rank, u: factors.u.to_vec(), v }
    });
    Ok(Part { outputs: part.weight.rows, weight, bias: part.bias.map(<[f32]>::to_vec), factors })
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// `x / sqrt(mean(x^2) + epsilon) * weight`
fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let scale = 1.0 / (dot(x, x) / x.len() as f64 + f64::from(epsilon)).sqrt();
    x.iter().zip(weight).map(|(x, w)| (f64::from(*x) * scale * f64::from(*w)) as f32).collect()
}

/// `W x + b + U (C (V^T x))` of one row, all parts after one another.
fn product_row(step: &StepBatch, linear: &ReferenceLinear, row: usize, x: &[f32]) -> Vec<f64> {
    let mut y = Vec::new();
    for part in &linear.parts {
        let first = y.len();
        for output in 0..part.outputs {
            let bias = part.bias.as_ref().map_or(0.0, |bias| f64::from(bias[output]));
            y.push(dot(&part.weight[output * linear.inputs..(output + 1) * linear.inputs], x) + bias);
        }
        let (Some(factors), slot) = (&part.factors, step.slots[row]) else { continue };
        if slot == BASE_SLOT {
            continue;
        }
        let rank = factors.rank;
        let core = step.cores[slot as usize].site(factors.site);
        let down: Vec<f64> = factors.v.chunks(linear.inputs).map(|column| dot(column, x)).collect();
        for i in 0..rank {
            let mixed: f64 = (0..rank).map(|j| f64::from(core[i * rank + j]) * down[j]).sum();
            for output in 0..part.outputs {
                y[first + output] += f64::from(factors.u[output * rank + i]) * mixed;
            }
        }
    }
    y
}

/// One head of q or k: normalised, then turned by its position (half-split pairs i and i + head_dim/2).
fn rotate(head: &[f32], norm: &Option<(Vec<f32>, f32)>, spec: &AttentionSpec, position: usize) -> Vec<f32> {
    let head = match norm {
        Some((weight, epsilon)) => rms_norm(head, weight, *epsilon),
        None => head.to_vec(),
    };
    let half = head.len() / 2;
    let mut out = vec![0f32; head.len()];
    for i in 0..half {
        let (cos, sin) = (f64::from(spec.cos[position * half + i]), f64::from(spec.sin[position * half + i]));
        let (a, b) = (f64::from(head[i]), f64::from(head[half + i]));
        out[i] = (a * cos - b * sin) as f32;
        out[half + i] = (b * cos + a * sin) as f32;
    }
    out
}

/// softmax(q k) v over the positions whose numbers start at `at`.
fn attend_head(q: &[f32], keys: &[f32], values: &[f32], at: &[usize]) -> Vec<f32> {
    let scores: Vec<f64> = at.iter().map(|&at| dot(q, &keys[at..at + q.len()])).collect();
    let largest = scores.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let total: f64 = weights.iter().sum();
    let column = |d: usize| weights.iter().zip(at).map(|(w, at)| w * f64::from(values[at + d])).sum::<f64>() / total;
    (0..q.len()).map(|d| column(d) as f32).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{Cores, SequenceRows, SiteFactors};

    /// One token in one sequence, under slot 0 of these cores.
    fn one_row(position: usize, token: u32, cores: Vec<Arc<Cores>>) -> StepBatch {
        StepBatch {
            tokens: vec![token],
            positions: vec![position as u32],
            slots: vec![if cores.is_empty() { BASE_SLOT } else { 0 }],
            cores,
            sequences: vec![SequenceRows { first_row: 0, rows: 1, start: position, blocks: vec![0] }],
            logits_rows: vec![0],
        }
    }

    /// W = [[1, 2], [3, 4]], b = [10, 20], x = [1, -1]: W x + b = [9, 19]. V^T x = [3, -1] for V = [[1, 0], [-2, 1]];
    /// C = [[1, 2], [0, 5]] makes [1, -5]; U = [[1, 0], [0, 2]] adds [1, -10].
    #[test]
    fn a_product_by_hand() {
        let mut backend = ReferenceBackend;
        let weight = Weight::from_f32(2, 2, vec![1.0, 2.0, 3.0, 4.0]).unwrap();
        let factors = SiteFactors { site: 1, u: &[1.0, 0.0, 0.0, 2.0], v: &[1.0, 0.0, -2.0, 1.0], rank: 2 };
        let part = LinearPart { weight: &weight, bias: Some(&[10.0, 20.0]), factors: Some(factors) };
        let linear = backend.linear(&[part], Precision::F32).unwrap();
        let core = [9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 0.0, 5.0];
        let cores = Arc::new(Cores::new(2, core));
        let table = backend.table(&Weight::from_f32(1, 2, vec![1.0, -1.0]).unwrap(), Precision::F32).unwrap();
        let (mut x, mut out) = (backend.buffer(2).unwrap(), backend.buffer(2).unwrap());
        for (cores, want) in [(vec![cores], [10.0, 9.0]), (Vec::new(), [9.0, 19.0])] {
            let step = backend.begin(&one_row(0, 0, cores)).unwrap();
            backend.embed(&step, &table, &mut x).unwrap();
            backend.product(&step, &linear, Rows::All, None, &x, Epilogue::Store, &mut out).unwrap();
            let mut values = Floats::default();
            backend.read(&mut out, &mut values).unwrap();
            assert_eq!(*values, want);
        }
    }

    /// Two tokens, one head of size 2, no rotation at position 0 and a quarter turn at position 1. Token 0 sees itself: its value.
    /// Token 1: q = [0, 1] turns to [-1, 0], its key [sqrt(2) ln 3, 0] turns to [0, sqrt(2) ln 3], token 0's key is [-sqrt(2) ln 3, 0]: scores are
    /// ln 3 and 0, weights 3/4 and 1/4.
    #[test]
    fn an_attention_by_hand() {
        let mut backend = ReferenceBackend;
        let key = 2f32.sqrt() * 3f32.ln();
        let rows = vec![0.0, 1.0, -key, 0.0, 4.0, 8.0, 0.0, 1.0, key, 0.0, 0.0, 4.0];
        let table = backend.table(&Weight::from_f32(2, 6, rows).unwrap(), Precision::F32).unwrap();
        let spec = AttentionSpec {
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            q_norm: None,
            k_norm: None,
            cos: Arc::new(vec![1.0, 0.0]),
            sin: Arc::new(vec![0.0, 1.0]),
        };
        let mut kv = backend.kv(KvShape { layers: 1, blocks: 1, kv_heads: 1, head_dim: 2 }, Precision::F32).unwrap();
        let (mut qkv, mut out) = (backend.buffer(6).unwrap(), backend.buffer(2).unwrap());
        for (position, want) in [(0, [4.0, 8.0]), (1, [3.0, 7.0])] {
            let step = backend.begin(&one_row(position, position as u32, Vec::new())).unwrap();
            backend.embed(&step, &table, &mut qkv).unwrap();
            backend.attend(&step, &spec, 0, &qkv, &mut kv, &mut out).unwrap();
            let mut values = Floats::default();
            backend.read(&mut out, &mut values).unwrap();
            assert!(values.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-6), "{values:?}");
        }
    }
}
