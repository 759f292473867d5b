//! The order of a gradient's units of work, and what each costs. A pure function of the plan and the model: a budget only says where to pause.

use super::plan::Plan;
use crate::model::ModelSpec;

/// Numbers of the head that are held in f32 at a time: its rows are walked in chunks of so many.
const HEAD_NUMBERS: usize = 1 << 21;
/// What it costs to unpack one number of a frozen matrix, in multiply-adds (measured: a nanosecond on one core that does 50 to 100 of them).
const UNPACK: u64 = 64;

/// The four products of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    Qkv,
    O,
    GateUp,
    Down,
}

impl Group {
    pub(super) const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    /// Numbers of its matrix.
    fn numbers(self, spec: &ModelSpec) -> usize {
        let mixed = spec.heads * spec.head_dim;
        match self {
            Self::Qkv => (mixed + 2 * spec.kv_heads * spec.head_dim) * spec.hidden,
            Self::O => mixed * spec.hidden,
            Self::GateUp => 2 * spec.intermediate * spec.hidden,
            Self::Down => spec.intermediate * spec.hidden,
        }
    }
}

/// A piece of work that is never interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// All rows: tokens to the residual stream.
    Embed,
    /// Unpacks a product of a layer.
    Load {
        layer: usize,
        group: usize,
        backward: bool,
    },
    /// A layer for a tile.
    Forward {
        layer: usize,
        tile: usize,
    },
    /// The norm before the head, and rows of the head.
    LoadHead {
        chunk: usize,
    },
    /// A chunk of the head for a tile.
    Head {
        chunk: usize,
        tile: usize,
    },
    /// Log-probs from what the chunks left.
    Logprobs,
    /// The caller must say what each log-prob weighs.
    Weights,
    /// Back through the head and its norm.
    HeadBack {
        tile: usize,
    },
    /// Queries, keys and values of a layer once more, for a tile.
    Again {
        layer: usize,
        tile: usize,
    },
    /// Back through a layer for a tile. Last tile first: a key is complete when every row that sees it has been here.
    Backward {
        layer: usize,
        tile: usize,
    },
    Done,
}

/// What a schedule depends on.
#[derive(Debug, Clone)]
pub(super) struct Schedule {
    layers: usize,
    tiles: usize,
    chunks: usize,
    chunk_rows: usize,
    differentiate: bool,
}

impl Schedule {
    pub(super) fn new(plan: &Plan, spec: &ModelSpec, differentiate: bool) -> Self {
        let chunk_rows = (HEAD_NUMBERS / spec.hidden).clamp(64, spec.vocab.max(64)).next_multiple_of(16);
        let (layers, tiles) = (spec.layers, plan.tiles.len());
        Self { layers, tiles, chunks: spec.vocab.div_ceil(chunk_rows), chunk_rows, differentiate }
    }

    /// Rows of the head in a chunk.
    pub(super) fn chunk(&self, chunk: usize, spec: &ModelSpec) -> std::ops::Range<usize> {
        chunk * self.chunk_rows..spec.vocab.min((chunk + 1) * self.chunk_rows)
    }

    /// The unit after this one.
    pub(super) fn after(&self, unit: Unit) -> Unit {
        let (last_layer, last_tile) = (self.layers - 1, self.tiles - 1);
        let load = |layer, backward| Unit::Load { layer, group: 0, backward };
        match unit {
            Unit::Embed => load(0, false),
            Unit::Load { layer, group, backward } if group < 3 => Unit::Load { layer, group: group + 1, backward },
            Unit::Load { layer, backward: false, .. } => Unit::Forward { layer, tile: 0 },
            Unit::Load { layer, backward: true, .. } => Unit::Again { layer, tile: 0 },
            Unit::Forward { layer, tile } if tile < last_tile => Unit::Forward { layer, tile: tile + 1 },
            Unit::Forward { layer, .. } if layer < last_layer => load(layer + 1, false),
            Unit::Forward { .. } => Unit::LoadHead { chunk: 0 },
            Unit::LoadHead { chunk } => Unit::Head { chunk, tile: 0 },
            Unit::Head { chunk, tile } if tile < last_tile => Unit::Head { chunk, tile: tile + 1 },
            Unit::Head { chunk, .. } if chunk + 1 < self.chunks => Unit::LoadHead { chunk: chunk + 1 },
            Unit::Head { .. } => Unit::Logprobs,
            Unit::Logprobs if self.differentiate => Unit::Weights,
            Unit::Logprobs => Unit::Done,
            Unit::Weights => Unit::HeadBack { tile: 0 },
            Unit::HeadBack { tile } if tile < last_tile => Unit::HeadBack { tile: tile + 1 },
            Unit::HeadBack { .. } => load(last_layer, true),
            Unit::Again { layer, tile } if tile < last_tile => Unit::Again { layer, tile: tile + 1 },
            Unit::Again { layer, .. } => Unit::Backward { layer, tile: last_tile },
            Unit::Backward { layer, tile } if tile > 0 => Unit::Backward { layer, tile: tile - 1 },
            Unit::Backward { layer, .. } if layer > 0 => load(layer - 1, true),
            Unit::Backward { .. } | Unit::Done => Unit::Done,
        }
    }

    /// Multiply-adds of a unit. Elementwise work is left out: it is a few percent of the products beside it.
    pub(super) fn cost(&self, unit: Unit, plan: &Plan, spec: &ModelSpec) -> u64 {
        let rows = |tile: usize| plan.tiles[tile].rows.len();
        let numbers = |groups: &[Group]| groups.iter().map(|group| group.numbers(spec)).sum::<usize>();
        let asked = |tile: usize| plan.tiles[tile].asked.len();
        // q k^T and p v, for every head
        let attention = |tile: usize| 2 * plan.pairs(&plan.tiles[tile]) * spec.heads * spec.head_dim;
        let layer = numbers(&Group::ALL);
        let cost = match unit {
            Unit::Embed => plan.rows() * spec.hidden,
            Unit::Load { group, .. } => return UNPACK * Group::ALL[group].numbers(spec) as u64,
            Unit::Forward { tile, .. } => rows(tile) * layer + attention(tile),
            Unit::LoadHead { chunk } => return UNPACK * (self.chunk(chunk, spec).len() * spec.hidden) as u64,
            Unit::Head { chunk, tile } => {
                let products = if self.differentiate { 2 } else { 1 };
                products * asked(tile) * self.chunk(chunk, spec).len() * spec.hidden
            }
            Unit::Logprobs | Unit::Weights | Unit::Done => 0,
            Unit::HeadBack { tile } => asked(tile) * spec.hidden,
            Unit::Again { tile, .. } => rows(tile) * numbers(&[Group::Qkv]),
            // o and gate|up once more, all four backwards; of attention two products again and four backwards
            Unit::Backward { tile, .. } => {
                rows(tile) * (layer + numbers(&[Group::O, Group::GateUp])) + 3 * attention(tile)
            }
        };
        cost as u64
    }

    /// Multiply-adds from this unit to the end.
    pub(super) fn cost_from(&self, mut unit: Unit, plan: &Plan, spec: &ModelSpec) -> u64 {
        let mut sum = 0;
        while unit != Unit::Done {
            sum += self.cost(unit, plan, spec);
            unit = self.after(unit);
        }
        sum
    }
}
