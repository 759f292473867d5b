//! Panels back to rows: what the kernels multiply with, exactly, for the gradient.
#![allow(unsafe_code)]

use std::ops::Range;

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::{
    format::{GROUP_WORDS, Q4, Q8, WORD_LINE},
    isa::{Widen, WidenedGroup},
    lanes::LANES,
    linear::{CpuLinear, Panels},
};
use crate::{
    Cores, DenseFactors, DensePart, KernelError,
    check::{add_update, check_dense},
    rounding::{GROUP, Layout},
};

/// A panel, the first of its outputs that are wanted, and where they go, row after row.
type Piece<'a> = (usize, usize, &'a mut [f32]);

impl CpuLinear {
    /// See [`crate::Backend::dense`]. Panels are unpacked side by side on rayon's threads.
    pub(super) fn dense(&self, outputs: Range<usize>, cores: Option<&Cores>) -> Result<Tensor, KernelError> {
        let sites = self.parts.iter().map(|part| (part.site, part.rank));
        check_dense(self.outputs.iter().sum(), &outputs, cores, sites)?;
        let inputs = self.inputs;
        let down = cores.map(|_| self.down_rows()).unwrap_or_default();
        let mut rows = vec![0f32; outputs.len() * inputs];
        let unpack = |(panel, lane, rows): Piece<'_>| {
            unpack(&self.weights, self.widen, panel, lane, inputs, rows);
            let (info, Some(cores)) = (&self.info[panel], cores) else { return };
            let adapted = self.parts.iter().find(|part| info.rank > 0 && part.mixed == info.mixed);
            let Some(part) = adapted else { return };
            let v = &down[part.mixed * inputs..(part.mixed + part.rank) * inputs];
            for (lane, row) in (lane..).zip(rows.chunks_exact_mut(inputs)) {
                add_update(row, |i| self.up[info.up + i].0[lane], cores.site(part.site), v);
            }
        };
        self.pieces(&outputs, &mut rows).into_par_iter().for_each(unpack);
        Ok(Tensor::from_vec(rows, (outputs.len(), inputs), &Device::Cpu)?)
    }

    /// See [`crate::Backend::parts`].
    pub(super) fn dense_parts(&self) -> Result<Vec<DensePart>, KernelError> {
        let (inputs, down) = (self.inputs, self.down_rows());
        let mut adapted = self.parts.iter();
        let mut panel = 0;
        let mut of = |&outputs: &usize| {
            let panels = panel..panel + outputs.div_ceil(LANES);
            panel = panels.end;
            let lanes = |width: usize| (0..outputs).map(move |output| (output / LANES, output % LANES * width));
            let bias = (!self.bias.is_empty()).then(|| {
                let bias = &self.bias[panels.start * LANES..];
                lanes(1).map(|(panel, lane)| bias[panel * LANES + lane]).collect::<Vec<f32>>()
            });
            let rank = self.info[panels.start].rank;
            let factors = match if rank > 0 { adapted.next() } else { None } {
                Some(part) => {
                    let row = |(panel, lane): (usize, usize)| {
                        let up = self.info[panels.start + panel].up;
                        (0..rank).map(move |i| self.up[up + i].0[lane])
                    };
                    let u: Vec<f32> = lanes(1).flat_map(row).collect();
                    let v = down[part.mixed * inputs..(part.mixed + rank) * inputs].to_vec();
                    Some(DenseFactors {
                        site: part.site,
                        u: Tensor::from_vec(u, (outputs, rank), &Device::Cpu)?,
                        v: Tensor::from_vec(v, (rank, inputs), &Device::Cpu)?.t()?.contiguous()?,
                    })
                }
                None => None,
            };
            let bias = bias.map(|bias| Tensor::new(bias, &Device::Cpu)).transpose()?;
            Ok(DensePart { outputs, bias, factors })
        };
        self.outputs.iter().map(&mut of).collect()
    }

    /// V^T of all adapted parts, `[down_rows, inputs]`.
    fn down_rows(&self) -> Vec<f32> {
        let mut rows = vec![0f32; self.down_rows * self.inputs];
        for (panel, rows) in rows.chunks_mut((LANES * self.inputs).max(1)).enumerate() {
            unpack(&self.down, self.widen, panel, 0, self.inputs, rows);
        }
        rows
    }

    /// Cuts room for some outputs at the borders of panels.
    fn pieces<'a>(&self, outputs: &Range<usize>, mut room: &'a mut [f32]) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        for (panel, info) in self.info.iter().enumerate() {
            let wanted = outputs.start.max(info.column)..outputs.end.min(info.column + info.columns);
            if !wanted.is_empty() {
                let (rows, rest) = std::mem::take(&mut room).split_at_mut(wanted.len() * self.inputs);
                room = rest;
                pieces.push((panel, wanted.start - info.column, rows));
            }
        }
        pieces
    }
}

/// Outputs `lane..` of a panel, as many as there is room for: the inverse of [`super::format`]'s packers. Integers as they are, or as tiles widen them.
fn unpack(panels: &Panels, widen: Option<Widen>, panel: usize, lane: usize, inputs: usize, rows: &mut [f32]) {
    let bytes = panels.bytes(panel);
    if let (Layout::Q8 | Layout::Q4, Some(widen)) = (panels.layout, widen) {
        return unpack_widened(panels.layout, widen, bytes, lane, inputs, rows);
    }
    for (output, row) in (lane..).zip(rows.chunks_exact_mut(inputs)) {
        match panels.layout {
            Layout::F32 => {
                let value = |at: usize| f32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
                row.iter_mut().enumerate().for_each(|(k, w)| *w = value(4 * (k * LANES + output)));
            }
            Layout::Bf16 => {
                let value = |at: usize| bf16::from_bits(u16_at(bytes, at)).to_f32();
                row.iter_mut().enumerate().for_each(|(k, w)| *w = value(2 * ((k / 2 * LANES + output) * 2 + k % 2)));
            }
            Layout::Q8 => unpack_q8(bytes, output, row),
            Layout::Q4 => unpack_q4(bytes, output, row),
        }
    }
}

/// The same of integers that tiles widen: group by group, all sixteen outputs at once.
fn unpack_widened(layout: Layout, widen: Widen, bytes: &[u8], lane: usize, inputs: usize, rows: &mut [f32]) {
    let mut lines = WidenedGroup::default();
    for first in (0..inputs).step_by(GROUP) {
        // SAFETY: the function is of the kernels that multiply this panel, which has the group.
        unsafe { widen(layout, bytes.as_ptr(), inputs, first / GROUP, &mut lines) };
        for (output, row) in (lane..).zip(rows.chunks_exact_mut(inputs)) {
            for (k, w) in row[first..].iter_mut().take(GROUP).enumerate() {
                *w = lines.weight(output, k);
            }
        }
    }
}

/// One output of a panel of 8-bit integers.
fn unpack_q8(bytes: &[u8], output: usize, row: &mut [f32]) {
    let (scales, integers) = bytes.split_at(Q8::integers(row.len()));
    for (group, row) in row.chunks_mut(GROUP).enumerate() {
        let scale = f16::from_bits(u16_at(scales, 2 * (group * LANES + output))).to_f32();
        let words = &integers[group * GROUP_WORDS * WORD_LINE..][..GROUP_WORDS * WORD_LINE];
        for (word, fours) in row.chunks_mut(4).enumerate() {
            let ints = &words[word * WORD_LINE + 4 * output..][..4];
            fours.iter_mut().zip(ints).for_each(|(w, int)| *w = scale * f32::from(i16::from(*int) - 128));
        }
    }
}

/// One output of a panel of 4-bit integers.
fn unpack_q4(bytes: &[u8], output: usize, row: &mut [f32]) {
    for (group, row) in row.chunks_mut(GROUP).enumerate() {
        let bytes = &bytes[group * Q4::GROUP_BYTES..][..Q4::GROUP_BYTES];
        let scale = f16::from_bits(u16_at(bytes, 2 * output)).to_f32();
        let min = f16::from_bits(u16_at(bytes, Q4::MINIMA + 2 * output)).to_f32();
        for (word, fours) in row.chunks_mut(4).enumerate() {
            let ints = &bytes[Q4::INTEGERS + word / 2 * WORD_LINE + 4 * output..][..4];
            let shift = 4 * (word % 2);
            fours.iter_mut().zip(ints).for_each(|(w, int)| *w = scale * f32::from(int >> shift & 15) + min);
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use crate::{
        BASE_SLOT, Backend, DensePart, Epilogue, Floats, Precision, Rows, Weight,
        cpu::{CpuBackend, CpuLinear, Isa},
        reference::ReferenceBackend,
        suite::{Group, PRECISIONS, cores, groups, rows_batch},
    };

    fn rows(tensor: &candle_core::Tensor) -> Vec<u32> {
        let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    }

    /// Outputs, the bias' bits, and the site with the bits of U and V.
    type Described = (usize, Option<Vec<u32>>, Option<(usize, Vec<u32>, Vec<u32>)>);

    fn describe(part: &DensePart) -> Described {
        let factors = part.factors.as_ref().map(|factors| (factors.site, rows(&factors.u), rows(&factors.v)));
        (part.outputs, part.bias.as_ref().map(rows), factors)
    }

    /// The reference holds what its product multiplies with as plain rows, and products of both are held to each other.
    #[test]
    fn panels_come_back_as_the_numbers_of_the_reference() {
        let backend = CpuBackend::new(1, Some(Isa::Portable)).unwrap();
        for (number, group) in groups().into_iter().enumerate() {
            for precision in PRECISIONS {
                let group = Group { precision, ..group.clone() };
                let (linear, slow) =
                    (group.pack(&backend, number as u64), group.pack(&ReferenceBackend, number as u64));
                let all: usize = group.outputs.iter().sum();
                let cores = (group.rank > 0).then(|| cores(5, group.rank, 3));
                for outputs in [0..all, 0..0, all / 3..all, all / 2..all / 2 + 1, 0..all.min(17)] {
                    for cores in [None, cores.as_deref()] {
                        let ours = backend.dense(&linear, outputs.clone(), cores).unwrap();
                        let theirs = ReferenceBackend.dense(&slow, outputs.clone(), cores).unwrap();
                        assert_eq!(ours.dims(), [outputs.len(), group.inputs]);
                        assert_eq!(rows(&ours), rows(&theirs), "{group:?} {outputs:?}");
                    }
                }
                let (ours, theirs) = (backend.parts(&linear).unwrap(), ReferenceBackend.parts(&slow).unwrap());
                let ours: Vec<_> = ours.iter().map(describe).collect();
                assert_eq!(ours, theirs.iter().map(describe).collect::<Vec<_>>(), "{group:?}");
                assert!(backend.dense(&linear, 0..all + 1, None).is_err());
            }
        }
    }

    /// The products of a linear with rows that are 1 in one place, so many at a time: its weights, input by input.
    fn multiplied(backend: &mut CpuBackend, linear: &CpuLinear, width: usize, rows: usize) -> Vec<f32> {
        let inputs = linear.inputs;
        let identity = (0..inputs * inputs).map(|i| f32::from(i % (inputs + 1) == 0)).collect();
        let table = backend.table(&Weight::from_f32(inputs, inputs, identity).unwrap(), Precision::F32).unwrap();
        let [mut x, mut out] = [inputs, width].map(|width| backend.buffer(width).unwrap());
        let all: Vec<_> = (0..inputs as u32).map(|input| (input, BASE_SLOT)).collect();
        let product = |rows: &[(u32, u32)]| {
            let step = backend.begin(&rows_batch(rows, Vec::new())).unwrap();
            backend.embed(&step, &table, &mut x).unwrap();
            backend.product(&step, linear, Rows::All, None, &x, Epilogue::Store, &mut out).unwrap();
            let mut values = Floats::default();
            backend.read(&mut out, &mut values).unwrap();
            values.to_vec()
        };
        all.chunks(rows).flat_map(product).collect()
    }

    #[test]
    fn panels_come_back_as_the_numbers_that_are_multiplied_with_in_few_rows_and_in_many() {
        for (isa, precision) in
            Isa::available().into_iter().flat_map(|isa| PRECISIONS.map(|precision| (isa, precision)))
        {
            for (number, group) in groups().into_iter().enumerate() {
                let group = Group { precision, rank: 0, bias: false, epilogue: Epilogue::Store, ..group };
                let mut backend = CpuBackend::new(1, Some(isa)).unwrap();
                let linear = group.pack(&backend, number as u64);
                let dense = backend.dense(&linear, 0..group.width(), None).unwrap();
                let dense = dense.t().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                // But for tiles, integers meet the 1 as 127 with a scale.
                let exact = isa == Isa::Amx || matches!(precision, Precision::F32 | Precision::Bf16);
                let most = if exact { 0.0 } else { 1e-6 };
                for rows in [1, 2, 3, 16, 17, 300] {
                    let got = multiplied(&mut backend, &linear, group.width(), rows);
                    let worst = got.iter().zip(&dense).fold(0f32, |worst, (got, want)| worst.max((got - want).abs()));
                    assert!(got.len() == dense.len() && worst <= most, "{isa} {group:?}, {rows} rows: {worst}");
                }
            }
        }
    }

    #[test]
    fn cores_that_do_not_fit_are_refused() {
        let backend = CpuBackend::new(1, Some(Isa::Portable)).unwrap();
        let linear = groups()[0].pack(&backend, 1);
        let dense = |rank, sites| backend.dense(&linear, 0..1, Some(&cores(1, rank, sites))).map(|_| ());
        assert!(dense(2, 3).is_ok());
        assert!(dense(3, 3).unwrap_err().to_string().contains("rank 3"));
        assert!(dense(2, 2).unwrap_err().to_string().contains("2 sites"));
    }
}
