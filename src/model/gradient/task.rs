//! A gradient under way.

use std::sync::Arc;

use candle_core::Tensor;

use super::{
    CoreGradient, GradientError, GradientJob, Progress, Stage,
    head::Head,
    layer::{Exchange, Layer, Place, angles},
    ops::Norm,
    plan::Plan,
    schedule::{Schedule, Unit},
};
use crate::{
    kernel::{Cores, KernelError},
    model::{ModelError, transformer::Frozen},
};

/// A gradient under way: see the module. It belongs to the model it was begun on.
pub struct GradientTask {
    plan: Plan,
    schedule: Schedule,
    cores: Arc<Cores>,
    differentiate: bool,
    next: Unit,
    /// What `next` costs, or did before the weights were set.
    upcoming: u64,
    left: u64,
    failed: bool,
    /// The stream of every tile on the way there, its derivative on the way back.
    streams: Vec<Tensor>,
    /// Of every layer the stream before it, tile by tile.
    inputs: Vec<Vec<Tensor>>,
    angles: Vec<Tensor>,
    layer: Layer,
    exchange: Exchange,
    head: Head,
    /// Of every completion.
    logprobs: Vec<Vec<f32>>,
    /// Of every target of the plan.
    weights: Vec<f32>,
    gradient: CoreGradient,
}

impl GradientTask {
    /// Checks a job against a model whose rotary table covers so many positions.
    pub(in crate::model) fn new(model: &dyn Frozen, job: GradientJob, positions: usize) -> Result<Self, ModelError> {
        let spec = model.spec();
        let plan = Plan::new(&job, spec, positions)?;
        let GradientJob { cores, temperature, differentiate, .. } = job;
        let sites = spec.sites().len();
        if cores.data.len() != sites * cores.rank * cores.rank {
            let message = format!("cores: {} numbers for {sites} sites of rank {}", cores.data.len(), cores.rank);
            return Err(GradientError::Job(message).into());
        }
        if differentiate && (!model.is_adaptable() || cores.rank == 0) {
            return Err(GradientError::NoFactors.into());
        }
        let device = model.device();
        let norm = Norm::new(model.final_norm(), spec.rms_eps, &device).map_err(KernelError::from)?;
        let schedule = Schedule::new(&plan, spec, differentiate);
        Ok(Self {
            head: Head::new(norm, temperature, differentiate, &plan)?,
            left: schedule.cost_from(Unit::Embed, &plan, spec),
            gradient: CoreGradient { rank: cores.rank, data: vec![0.0; cores.data.len()] },
            logprobs: plan.lengths.iter().map(|&tokens| vec![f32::NAN; tokens]).collect(),
            weights: Vec::new(),
            exchange: Exchange::new(&plan),
            layer: Layer::default(),
            angles: Vec::new(),
            inputs: Vec::new(),
            streams: Vec::new(),
            failed: false,
            next: Unit::Embed,
            upcoming: schedule.cost(Unit::Embed, &plan, spec),
            differentiate,
            cores,
            schedule,
            plan,
        })
    }

    /// How far it is.
    pub fn stage(&self) -> Stage {
        match self.next {
            Unit::Weights => Stage::Weights,
            Unit::HeadBack { .. } | Unit::Again { .. } | Unit::Backward { .. } | Unit::Load { backward: true, .. } => {
                Stage::Backward
            }
            Unit::Done => Stage::Done,
            _ => Stage::Forward,
        }
    }

    /// Multiply-adds to the end, the way back included.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// About how many multiply-adds the next unit of work takes.
    pub fn upcoming(&self) -> u64 {
        self.upcoming
    }

    /// The kind of the next unit of work, for profiles.
    pub fn unit(&self) -> String {
        let unit = format!("{:?}", self.next);
        unit.split(' ').next().unwrap_or_default().to_owned()
    }

    /// Rows that go through the model: every prompt once, every completion but its last token.
    pub fn rows(&self) -> usize {
        self.plan.rows()
    }

    /// Log-prob of every completion token, nats of logits / temperature, a vector a completion; None on the way there.
    pub fn logprobs(&self) -> Option<&[Vec<f32>]> {
        (self.stage() != Stage::Forward).then_some(&self.logprobs[..])
    }

    /// What each log-prob weighs in the sum that is differentiated: as many numbers as [`GradientTask::logprobs`] has.
    ///
    /// # Errors
    /// [`GradientError::Weights`] when they do not fit or are not finite, or when it is not the time for them.
    pub fn set_weights(&mut self, weights: &[Vec<f32>]) -> Result<(), GradientError> {
        let refuse = |message: String| Err(GradientError::Weights(message));
        if self.next != Unit::Weights {
            return refuse("they are wanted once, after the log-probs".into());
        }
        if weights.len() != self.plan.lengths.len() {
            return refuse(format!("{} vectors for {} completions", weights.len(), self.plan.lengths.len()));
        }
        for (number, (weights, &tokens)) in weights.iter().zip(&self.plan.lengths).enumerate() {
            if weights.len() != tokens {
                return refuse(format!("{} for the {tokens} tokens of completion {number}", weights.len()));
            }
            if !weights.iter().all(|weight| weight.is_finite()) {
                return refuse(format!("those of completion {number} are not all finite"));
            }
        }
        let of = |target: &super::plan::Target| weights[target.completion][target.index];
        self.weights = self.plan.targets.iter().map(of).collect();
        self.next = self.schedule.after(Unit::Weights);
        Ok(())
    }

    /// The derivative by the cores; None before the end, or if it was not wanted.
    pub fn gradient(&self) -> Option<&CoreGradient> {
        (self.next == Unit::Done && self.differentiate).then_some(&self.gradient)
    }

    /// Does units until the next one would exceed the budget (multiply-adds), at least one; stops where weights are wanted, and at the end.
    pub(in crate::model) fn advance(&mut self, model: &dyn Frozen, budget: u64) -> Result<Progress, ModelError> {
        if self.failed {
            return Err(GradientError::Failed.into());
        }
        let mut spent = 0;
        while !matches!(self.next, Unit::Weights | Unit::Done) {
            let cost = self.schedule.cost(self.next, &self.plan, model.spec());
            if spent > 0 && spent + cost > budget {
                break;
            }
            // Until the unit has ended well: an error or a panic leaves half of it behind.
            self.failed = true;
            self.run(model)?;
            self.failed = false;
            self.next = self.schedule.after(self.next);
            self.upcoming = self.schedule.cost(self.next, &self.plan, model.spec());
            spent += cost;
            self.left -= cost;
        }
        Ok(Progress { stage: self.stage(), spent, left: self.left })
    }

    fn run(&mut self, model: &dyn Frozen) -> Result<(), ModelError> {
        match self.next {
            Unit::Embed => self.embed(model),
            Unit::Load { layer, group, .. } => {
                if group == 0 {
                    self.exchange = Exchange::new(&self.plan);
                }
                Ok(self.layer.load(model, layer, group, &self.cores)?)
            }
            Unit::LoadHead { chunk } => {
                self.layer = Layer::default();
                let rows = self.schedule.chunk(chunk, model.spec());
                self.head.load(rows.clone(), model.head(rows)?);
                Ok(())
            }
            // On one of rayon's threads: from elsewhere every product would wake them anew.
            _ if model.device().is_cpu() => rayon::scope(|_| self.compute()),
            _ => self.compute(),
        }
    }

    /// A unit that needs what has been loaded only.
    fn compute(&mut self) -> Result<(), ModelError> {
        let Self { plan, streams, inputs, layer: weights, exchange, angles, head, .. } = self;
        let place = |tile: usize| Place { plan, tile, angles: &angles[tile] };
        match self.next {
            Unit::Forward { tile, .. } => {
                let x = weights.forward(&place(tile), &streams[tile], exchange)?;
                let before = std::mem::replace(&mut streams[tile], x);
                if self.differentiate {
                    if tile == 0 {
                        inputs.push(Vec::with_capacity(plan.tiles.len()));
                    }
                    inputs.last_mut().into_iter().for_each(|layer| layer.push(before.clone()));
                }
            }
            Unit::Head { tile, .. } => head.walk(plan, tile, &streams[tile])?,
            Unit::Logprobs => {
                let logprobs = head.logprobs(plan)?;
                if !logprobs.iter().all(|logprob| logprob.is_finite()) {
                    return Err(GradientError::NotFinite.into());
                }
                for (target, logprob) in plan.targets.iter().zip(logprobs) {
                    self.logprobs[target.completion][target.index] = logprob;
                }
            }
            Unit::HeadBack { tile } => {
                streams[tile] = match head.back(plan, tile, &self.weights)? {
                    Some(d) => d,
                    None => streams[tile].zeros_like().map_err(KernelError::from)?,
                };
            }
            Unit::Again { layer, tile } => weights.again(&place(tile), &inputs[layer][tile], exchange)?,
            Unit::Backward { layer, tile } => {
                let (x, first) = (&inputs[layer][tile], layer == 0);
                let d = weights.back(&place(tile), x, &streams[tile], exchange, &mut self.gradient, first)?;
                if let Some(d) = d {
                    streams[tile] = d;
                }
                inputs[layer].pop(); // the last tile's: they are visited in reverse
                if first && tile == 0 {
                    self.finish()?;
                }
            }
            Unit::Embed | Unit::Load { .. } | Unit::LoadHead { .. } | Unit::Weights | Unit::Done => {}
        }
        Ok(())
    }

    fn embed(&mut self, model: &dyn Frozen) -> Result<(), ModelError> {
        let (_, _, attention) = model.layer(0);
        for tile in &self.plan.tiles {
            let rows = tile.rows.clone();
            self.streams.push(model.embedding(&self.plan.tokens[rows.clone()])?);
            let angles = angles(attention, &self.plan.positions[rows], &model.device());
            self.angles.push(angles.map_err(KernelError::from)?);
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), ModelError> {
        self.layer = Layer::default();
        self.streams.clear();
        match self.gradient.data.iter().all(|value| value.is_finite()) {
            true => Ok(()),
            false => Err(GradientError::NotFinite.into()),
        }
    }
}
