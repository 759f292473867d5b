//! The head: log-probs of the tokens asked for, and their derivative by the stream, without logits of all rows or of the whole vocabulary at a time.
//!
//! The vocabulary is walked in chunks. Each row keeps the largest logit m so far, `sum exp(l - m)` and, for the derivative, `sum exp(l - m) W_l`, all of which are
//! rescaled when m grows. So d log p / d h = (W_token - mean of W under p) / T is known before anybody says what a token weighs, and the head is unpacked once.

use candle_core::{DType, Tensor};

use super::{
    ops::{Exponentials, Norm, add_scaled, exponentials, scale},
    plan::{Plan, Tile},
};
use crate::kernel::{KernelError, Threads, matmul};

/// A tile's rows on their way through the chunks.
struct Walk {
    /// The stream, `[asked, hidden]`, and it normalised and divided by the temperature.
    x: Tensor,
    h: Tensor,
    /// `[asked, 1]` each: the largest logit, and the sum of exponentials beside it. None before the first chunk.
    sums: Option<(Tensor, Tensor)>,
    /// `[asked, hidden]`: the head's rows, each times its exponential.
    mean: Option<Tensor>,
}

/// The head's rows of targets in one chunk.
struct Found {
    /// Targets of the plan.
    targets: Vec<usize>,
    /// `[targets, hidden]`.
    rows: Tensor,
}

/// See the module.
pub(super) struct Head {
    norm: Norm,
    /// 1 / temperature, `[1, 1]`.
    sharpness: Tensor,
    differentiate: bool,
    chunk: Option<(std::ops::Range<usize>, Tensor)>,
    walks: Vec<Option<Walk>>,
    /// Logit of every target, divided by the temperature.
    logits: Vec<f32>,
    /// Of every tile.
    found: Vec<Vec<Found>>,
}

impl Head {
    pub(super) fn new(norm: Norm, temperature: f32, differentiate: bool, plan: &Plan) -> Result<Self, KernelError> {
        let tiles = plan.tiles.len();
        Ok(Self {
            sharpness: Tensor::from_vec(vec![1.0 / temperature], (1, 1), norm.weight.device())?,
            norm,
            differentiate,
            chunk: None,
            walks: (0..tiles).map(|_| None).collect(),
            logits: vec![f32::NAN; plan.targets.len()],
            found: (0..tiles).map(|_| Vec::new()).collect(),
        })
    }

    /// Takes rows of the head, `[chunk, hidden]`.
    pub(super) fn load(&mut self, chunk: std::ops::Range<usize>, rows: Tensor) {
        self.chunk = Some((chunk, rows));
    }

    /// One chunk for one tile, whose stream is `x`.
    pub(super) fn walk(&mut self, plan: &Plan, tile: usize, x: &Tensor) -> Result<(), KernelError> {
        let Tile { asked, targets, .. } = &plan.tiles[tile];
        let Some((chunk, head)) = self.chunk.as_ref().filter(|_| !asked.is_empty()) else { return Ok(()) };
        if self.walks[tile].is_none() {
            let x = x.index_select(&Tensor::new(&asked[..], x.device())?, 0)?;
            self.walks[tile] =
                Some(Walk { h: scale(&self.norm.forward(&x)?, &self.sharpness)?, x, sums: None, mean: None });
        }
        let walk = self.walks[tile].as_mut().expect("set just now");
        let logits = matmul(&walk.h, &head.t()?, Threads::All)?;
        let here: Vec<usize> =
            targets.clone().filter(|&target| chunk.contains(&(plan.targets[target].token as usize))).collect();
        if !here.is_empty() {
            let column = |target: usize| plan.targets[target].token - chunk.start as u32;
            let flat = |&target: &usize| (plan.targets[target].asked * chunk.len()) as u32 + column(target);
            let flat: Vec<u32> = here.iter().map(flat).collect();
            let values = logits.flatten_all()?.index_select(&Tensor::new(flat, x.device())?, 0)?.to_vec1::<f32>()?;
            here.iter().zip(values).for_each(|(&target, value)| self.logits[target] = value);
            if self.differentiate {
                let columns: Vec<u32> = here.iter().map(|&target| column(target)).collect();
                let rows = head.index_select(&Tensor::new(columns, x.device())?, 0)?;
                self.found[tile].push(Found { targets: here, rows });
            }
        }
        walk.add(&logits, head, self.differentiate)
    }

    /// The log-prob of every target.
    pub(super) fn logprobs(&mut self, plan: &Plan) -> Result<Vec<f32>, KernelError> {
        self.chunk = None;
        let mut logprobs = Vec::with_capacity(plan.targets.len());
        for (tile, walk) in plan.tiles.iter().zip(&self.walks) {
            let Some(Walk { sums: Some((largest, sum)), .. }) = walk else { continue };
            let total = (largest + sum.log()?)?.flatten_all()?.to_vec1::<f32>()?;
            let of = |target: usize| self.logits[target] - total[plan.targets[target].asked];
            logprobs.extend(tile.targets.clone().map(of));
        }
        Ok(logprobs)
    }

    /// The derivative by a tile's stream `[rows, hidden]`, for what each target weighs.
    pub(super) fn back(&mut self, plan: &Plan, tile: usize, weights: &[f32]) -> Result<Option<Tensor>, KernelError> {
        let Some(Walk { x, h, sums: Some((_, sum)), mean: Some(mean) }) = self.walks[tile].take() else {
            return Ok(None);
        };
        let Tile { rows, asked, targets, .. } = &plan.tiles[tile];
        let device = x.device();
        let mut of_row = vec![0f32; asked.len()];
        targets.clone().for_each(|target| of_row[plan.targets[target].asked] += weights[target]);
        let of_row = Tensor::from_vec(of_row, (asked.len(), 1), device)?;
        let mut d = scale(&mean, &(of_row / sum)?.neg()?)?;
        for Found { targets, rows } in std::mem::take(&mut self.found[tile]) {
            let to: Vec<u32> = targets.iter().map(|&target| plan.targets[target].asked as u32).collect();
            let weights: Vec<f32> = targets.iter().map(|&target| weights[target]).collect();
            let weighted = scale(&rows, &Tensor::from_vec(weights, (targets.len(), 1), device)?)?;
            d = d.index_add(&Tensor::new(to, device)?, &weighted, 0)?;
        }
        let d = self.norm.back(&x, &scale(&d, &self.sharpness)?, &h.zeros_like()?)?;
        let all = Tensor::zeros((rows.len(), h.dims()[1]), DType::F32, device)?;
        Ok(Some(all.index_add(&Tensor::new(&asked[..], device)?, &d, 0)?))
    }
}

impl Walk {
    /// Takes the logits of one more chunk.
    fn add(&mut self, logits: &Tensor, head: &Tensor, differentiate: bool) -> Result<(), KernelError> {
        let device = logits.device();
        let before = match &self.sums {
            Some((largest, _)) => largest.clone(),
            None => Tensor::full(f32::NEG_INFINITY, (1, 1), device)?,
        };
        let Exponentials { values, largest, sum } = exponentials(logits, &before)?;
        let mean = if differentiate { Some(matmul(&values, head, Threads::All)?) } else { None };
        let Some((before, sum_before)) = self.sums.take() else {
            (self.sums, self.mean) = (Some((largest, sum)), mean);
            return Ok(());
        };
        let shrink = (before - &largest)?.exp()?;
        self.sums = Some((largest, (sum + (sum_before * &shrink)?)?));
        self.mean = match (mean, self.mean.take()) {
            (Some(mean), Some(before)) => Some(add_scaled(&mean, &before, &shrink)?),
            _ => None,
        };
        Ok(())
    }
}
