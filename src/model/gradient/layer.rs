//! One layer for one tile of rows: there, and back with what is needed computed once more.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::{
    CoreGradient,
    attention::{self, Attended, Rows},
    linear::Dense,
    ops::{Heads, Norm, add, swiglu, swiglu_back},
    plan::{Plan, Tile},
    schedule::Group,
};
use crate::{
    kernel::{AttentionSpec, Cores, KernelError},
    model::transformer::Frozen,
};

/// The frozen parts of a layer, unpacked while it is worked on.
#[derive(Default)]
pub(super) struct Layer {
    products: [Option<Dense>; 4],
    facts: Option<Facts>,
}

struct Facts {
    input_norm: Norm,
    post_norm: Norm,
    heads: Heads,
}

/// What a layer's rows leave for one another, and for the way back.
pub(super) struct Exchange {
    /// Of every piece, as far as the layer has come.
    rows: Vec<Option<Rows>>,
    /// Derivatives by the keys and values of every piece, as far as the rows that see them have been visited.
    d_rows: Vec<Option<(Tensor, Tensor)>>,
    /// q|k|v of every tile before norm and rotation: on the way back of models that normalise heads.
    raw: Vec<Option<Tensor>>,
}

impl Exchange {
    pub(super) fn new(plan: &Plan) -> Self {
        let pieces = plan.pieces.len();
        let none = |count| (0..count).map(|_| None).collect();
        Self { rows: vec![None; pieces], d_rows: none(pieces), raw: vec![None; plan.tiles.len()] }
    }

    /// The pieces that one piece sees, itself last.
    fn seen(&self, plan: &Plan, piece: usize) -> Vec<&Rows> {
        plan.pieces[piece].sees.iter().filter_map(|&seen| self.rows[seen].as_ref()).collect()
    }

    /// Adds the derivatives by all keys that a piece saw to those of the pieces they belong to.
    fn add(&mut self, plan: &Plan, piece: usize, back: &attention::Back) -> candle_core::Result<()> {
        let mut first = 0;
        for &seen in &plan.pieces[piece].sees {
            let rows = plan.pieces[seen].rows.len();
            let part = |all: &Tensor| all.narrow(1, first, rows);
            let (keys, values) = (part(&back.keys)?, part(&back.values)?);
            first += rows;
            let sum = match self.d_rows[seen].take() {
                Some((k, v)) => (add_all(&k, &keys)?, add_all(&v, &values)?),
                None => (keys.contiguous()?, values.contiguous()?),
            };
            self.d_rows[seen] = Some(sum);
        }
        Ok(())
    }
}

/// `a + b`, of three dimensions.
fn add_all(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    add(&a.flatten_to(1)?, &b.contiguous()?.flatten_to(1)?)?.reshape(a.shape())
}

/// Does something for every piece: side by side on a processor, in turn on a device that has a queue of its own.
fn each<T: Send>(
    device: &Device,
    pieces: std::ops::Range<usize>,
    work: impl Fn(usize) -> candle_core::Result<T> + Send + Sync,
) -> candle_core::Result<Vec<T>> {
    if device.is_cpu() { pieces.into_par_iter().map(work).collect() } else { pieces.map(work).collect() }
}

/// A tile of a job that is under way.
pub(super) struct Place<'a> {
    pub(super) plan: &'a Plan,
    pub(super) tile: usize,
    /// Cosines and sines of the rows' positions, `[rows, head_dim]`.
    pub(super) angles: &'a Tensor,
}

impl Place<'_> {
    fn tile(&self) -> &Tile {
        &self.plan.tiles[self.tile]
    }

    /// A piece's rows of something that has all of the tile's.
    fn narrow(&self, all: &Tensor, piece: usize) -> candle_core::Result<Tensor> {
        let rows = &self.plan.pieces[piece].rows;
        all.narrow(0, rows.start - self.tile().rows.start, rows.len())
    }
}

/// Cosines and sines of some positions side by side, `[positions, head_dim]`.
pub(super) fn angles(spec: &AttentionSpec, positions: &[u32], device: &Device) -> candle_core::Result<Tensor> {
    let half = spec.head_dim / 2;
    let of = |position: &u32| {
        let at = *position as usize * half..(*position as usize + 1) * half;
        spec.cos[at.clone()].iter().chain(&spec.sin[at]).copied()
    };
    let values: Vec<f32> = positions.iter().flat_map(of).collect();
    Tensor::from_vec(values, (positions.len(), spec.head_dim), device)
}

impl Layer {
    /// Unpacks one of the four products; the first brings what is small.
    pub(super) fn load(
        &mut self,
        model: &dyn Frozen,
        layer: usize,
        group: usize,
        cores: &Cores,
    ) -> Result<(), KernelError> {
        let device = model.device();
        if group == 0 {
            *self = Self::default(); // the layer before is freed first
            let (input_norm, post_norm, attention) = model.layer(layer);
            let epsilon = model.spec().rms_eps;
            self.facts = Some(Facts {
                input_norm: Norm::new(input_norm, epsilon, &device)?,
                post_norm: Norm::new(post_norm, epsilon, &device)?,
                heads: Heads::new(attention, &device)?,
            });
        }
        let (weight, parts) = model.product(layer, Group::ALL[group], cores)?;
        self.products[group] = Some(Dense::new(weight, &parts)?);
        Ok(())
    }

    fn product(&self, group: Group) -> &Dense {
        self.products[group as usize].as_ref().expect("the schedule loads a layer's products before its tiles")
    }

    fn facts(&self) -> &Facts {
        self.facts.as_ref().expect("the schedule loads a layer before its tiles")
    }

    /// q|k|v of a tile, and its rows in the exchange.
    fn project(&self, at: &Place<'_>, x: &Tensor, exchange: &mut Exchange) -> Result<Tensor, KernelError> {
        let Facts { input_norm, heads, .. } = self.facts();
        let raw = self.product(Group::Qkv).forward(&input_norm.forward(x)?)?;
        let turned = heads.forward(&raw, at.angles)?;
        let pieces = at.tile().pieces.clone();
        let rows = each(x.device(), pieces.clone(), |piece| Rows::new(heads, &at.narrow(&turned, piece)?))?;
        pieces.zip(rows).for_each(|(piece, rows)| exchange.rows[piece] = Some(rows));
        Ok(raw)
    }

    fn attend(&self, at: &Place<'_>, exchange: &Exchange, device: &Device) -> candle_core::Result<Vec<Attended>> {
        let heads = &self.facts().heads;
        each(device, at.tile().pieces.clone(), |piece| attention::attend(heads, &exchange.seen(at.plan, piece)))
    }

    /// The residual stream behind the layer.
    pub(super) fn forward(&self, at: &Place<'_>, x: &Tensor, exchange: &mut Exchange) -> Result<Tensor, KernelError> {
        self.project(at, x, exchange)?;
        let mixed = join(self.attend(at, exchange, x.device())?.into_iter().map(|attended| attended.mixed))?;
        let x = add(x, &self.product(Group::O).forward(&mixed)?)?;
        let gate_up = self.product(Group::GateUp).forward(&self.facts().post_norm.forward(&x)?)?;
        Ok(add(&x, &self.product(Group::Down).forward(&swiglu(&gate_up)?)?)?)
    }

    /// Fills the exchange for the way back.
    pub(super) fn again(&self, at: &Place<'_>, x: &Tensor, exchange: &mut Exchange) -> Result<(), KernelError> {
        let raw = self.project(at, x, exchange)?;
        let heads = &self.facts().heads;
        if heads.q_norm.is_some() || heads.k_norm.is_some() {
            exchange.raw[at.tile] = Some(raw);
        }
        Ok(())
    }

    /// The derivative by the stream before the layer, from `dy`, the one by the stream behind it; None for the first layer, whose nobody asks for.
    /// Adds the derivatives by the cores.
    pub(super) fn back(
        &self,
        at: &Place<'_>,
        x: &Tensor,
        dy: &Tensor,
        exchange: &mut Exchange,
        sum: &mut CoreGradient,
        first: bool,
    ) -> Result<Option<Tensor>, KernelError> {
        let Facts { input_norm, post_norm, .. } = self.facts();
        let attended = self.attend(at, exchange, x.device())?;
        let mixed = join(attended.iter().map(|attended| attended.mixed.clone()))?;
        let o = self.product(Group::O);
        let middle = add(x, &o.forward(&mixed)?)?;
        let d_middle = {
            let (gate_up, down) = (self.product(Group::GateUp), self.product(Group::Down));
            let normed = post_norm.forward(&middle)?;
            let inner = gate_up.forward(&normed)?;
            down.add_core_gradient(&swiglu(&inner)?, dy, sum)?;
            let d = swiglu_back(&inner, &down.back(dy)?)?;
            gate_up.add_core_gradient(&normed, &d, sum)?;
            post_norm.back(&middle, &gate_up.back(&d)?, dy)?
        };
        o.add_core_gradient(&mixed, &d_middle, sum)?;
        let d = self.attention_back(at, &attended, &o.back(&d_middle)?, exchange)?;
        let qkv = self.product(Group::Qkv);
        qkv.add_core_gradient(&input_norm.forward(x)?, &d, sum)?;
        if first {
            return Ok(None);
        }
        Ok(Some(input_norm.back(x, &qkv.back(&d)?, &d_middle)?))
    }

    /// The derivative by q|k|v of the tile's rows, from the one by what attention mixed.
    fn attention_back(
        &self,
        at: &Place<'_>,
        attended: &[Attended],
        d_mixed: &Tensor,
        exchange: &mut Exchange,
    ) -> Result<Tensor, KernelError> {
        let heads = &self.facts().heads;
        let pieces = at.tile().pieces.clone();
        let own = |piece: usize| exchange.rows[piece].as_ref().expect("the tile was projected");
        let backs = each(d_mixed.device(), pieces.clone(), |piece| {
            let d = at.narrow(d_mixed, piece)?;
            attention::back(heads, own(piece), &attended[piece - pieces.start], &d)
        })?;
        // In one order, whatever ran side by side.
        for (piece, back) in pieces.clone().zip(&backs).rev() {
            exchange.add(at.plan, piece, back)?;
        }
        let mut rows = Vec::new();
        for (piece, back) in pieces.zip(backs) {
            let count = at.plan.pieces[piece].rows.len();
            let (k, v) = match exchange.d_rows[piece].take() {
                Some(sums) => sums,
                None => exchange.rows[piece].as_ref().expect("the tile was projected").zeros()?,
            };
            let (k, v) = (attention::by_row(heads, &k, count)?, attention::by_row(heads, &v, count)?);
            rows.push(Tensor::cat(&[back.q, k, v], 1)?);
            exchange.rows[piece] = None;
        }
        let d = join(rows.into_iter())?;
        let raw = exchange.raw[at.tile].take();
        // Without norms the way back does not depend on what was turned.
        Ok(heads.back(raw.as_ref().unwrap_or(&d), at.angles, &d)?)
    }
}

/// Rows one after another.
fn join(mut rows: impl ExactSizeIterator<Item = Tensor>) -> candle_core::Result<Tensor> {
    match (rows.len(), rows.next()) {
        (1, Some(alone)) => Ok(alone),
        (_, first) => Tensor::cat(&first.into_iter().chain(rows).collect::<Vec<_>>(), 0),
    }
}
