//! What a gradient computes, as integers: which rows there are, how they are cut, who sees whom.
//!
//! Every row is a token that goes through the model. A prompt has its rows once, whatever the number of its completions; a completion's last token has none, because
//! nobody asks what follows it. Rows lie one after another, prompt before completions, and are cut into *tiles* of equal height, the unit of work. A *piece* is what a tile
//! has of one prompt or completion: attention runs piece by piece.

use std::ops::Range;

use super::{GradientError, GradientJob};
use crate::{model::ModelSpec, types::TokenId};

/// Rows of one prompt or completion in one tile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// Rows of the plan.
    pub(super) rows: Range<usize>,
    /// Pieces that these rows attend to, in the order of their positions; the last is this one.
    pub(super) sees: Vec<usize>,
}

/// Consecutive rows that are computed together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tile {
    /// Rows of the plan.
    pub(super) rows: Range<usize>,
    /// Its pieces.
    pub(super) pieces: Range<usize>,
    /// Rows whose logits somebody asks for, counted from the tile's first, ascending.
    pub(super) asked: Vec<u32>,
    /// What is asked of them, by row.
    pub(super) targets: Range<usize>,
}

/// One token whose log-prob is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Target {
    /// Index into the tile's `asked`.
    pub(super) asked: usize,
    /// The token.
    pub(super) token: TokenId,
    /// Number of the completion.
    pub(super) completion: usize,
    /// Index of the token in it.
    pub(super) index: usize,
}

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) tokens: Vec<TokenId>,
    pub(super) positions: Vec<u32>,
    pub(super) pieces: Vec<Piece>,
    pub(super) tiles: Vec<Tile>,
    pub(super) targets: Vec<Target>,
    /// Tokens of every completion.
    pub(super) lengths: Vec<usize>,
}

/// A prompt or a completion on its way into a plan.
struct Segment<'a> {
    tokens: &'a [TokenId],
    /// Position of the first token.
    start: usize,
    /// The prompt's pieces.
    before: Vec<usize>,
}

impl Plan {
    /// Checks a job and cuts it.
    pub(super) fn new(job: &GradientJob, spec: &ModelSpec, positions: usize) -> Result<Self, GradientError> {
        check(job, spec, positions)?;
        let mut plan = Self {
            tokens: Vec::new(),
            positions: Vec::new(),
            pieces: Vec::new(),
            tiles: Vec::new(),
            targets: Vec::new(),
            lengths: Vec::new(),
        };
        // (row, target), in the order of the rows at the end
        let mut asked: Vec<(usize, Target)> = Vec::new();
        for group in &job.groups {
            let prompt = Segment { tokens: &group.prompt, start: 0, before: Vec::new() };
            let sees = plan.push(prompt, job.tile_rows);
            let last = plan.tokens.len() - 1;
            for tokens in &group.completions {
                let completion = plan.lengths.len();
                plan.lengths.push(tokens.len());
                let target = |index: usize| Target { asked: 0, token: tokens[index], completion, index };
                let first = plan.tokens.len();
                asked.push((last, target(0)));
                asked.extend((1..tokens.len()).map(|index| (first + index - 1, target(index))));
                let rows = &tokens[..tokens.len() - 1];
                plan.push(Segment { tokens: rows, start: group.prompt.len(), before: sees.clone() }, job.tile_rows);
            }
        }
        asked.sort_by_key(|(row, target)| (*row, target.completion));
        plan.cut(&asked, job.tile_rows);
        Ok(plan)
    }

    /// Adds rows, cut into pieces where a tile ends; returns the pieces that a continuation sees.
    fn push(&mut self, segment: Segment<'_>, tile_rows: usize) -> Vec<usize> {
        let mut sees = segment.before;
        let end = self.tokens.len() + segment.tokens.len();
        let positions = segment.start..segment.start + segment.tokens.len();
        let mut row = self.tokens.len();
        self.tokens.extend_from_slice(segment.tokens);
        self.positions.extend(positions.map(|position| position as u32));
        while row < end {
            let rows = row..end.min((row / tile_rows + 1) * tile_rows);
            row = rows.end;
            sees.push(self.pieces.len());
            self.pieces.push(Piece { rows, sees: sees.clone() });
        }
        sees
    }

    fn cut(&mut self, asked: &[(usize, Target)], tile_rows: usize) {
        let (mut piece, mut next) = (0, 0);
        for first in (0..self.tokens.len()).step_by(tile_rows) {
            let rows = first..self.tokens.len().min(first + tile_rows);
            let pieces = piece..piece + self.pieces[piece..].partition_point(|piece| piece.rows.start < rows.end);
            piece = pieces.end;
            let mut of_tile: Vec<u32> = Vec::new();
            let targets = self.targets.len()..self.targets.len() + asked[next..].partition_point(|a| a.0 < rows.end);
            for (row, target) in &asked[next..next + targets.len()] {
                let row = (row - first) as u32;
                if of_tile.last() != Some(&row) {
                    of_tile.push(row);
                }
                self.targets.push(Target { asked: of_tile.len() - 1, ..*target });
            }
            next += targets.len();
            self.tiles.push(Tile { rows, pieces, asked: of_tile, targets });
        }
    }

    /// Rows in all.
    pub(super) fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Keys that a piece attends to.
    pub(super) fn seen(&self, piece: usize) -> usize {
        self.pieces[piece].sees.iter().map(|&piece| self.pieces[piece].rows.len()).sum()
    }

    /// Pairs of a row and a key that it meets in a tile, masked ones included.
    pub(super) fn pairs(&self, tile: &Tile) -> usize {
        tile.pieces.clone().map(|piece| self.pieces[piece].rows.len() * self.seen(piece)).sum()
    }
}

fn check(job: &GradientJob, spec: &ModelSpec, positions: usize) -> Result<(), GradientError> {
    let bad = |what: String| Err(GradientError::Job(what));
    if job.groups.iter().all(|group| group.completions.is_empty()) {
        return bad("completions: none".into());
    }
    if !(job.temperature.is_finite() && job.temperature > 0.0) {
        return bad(format!("temperature: {} is not above 0", job.temperature));
    }
    if job.tile_rows == 0 {
        return bad("tile_rows: 0".into());
    }
    for (number, group) in job.groups.iter().enumerate() {
        if group.prompt.is_empty() {
            return bad(format!("prompt {number}: no tokens"));
        }
        if let Some(empty) = group.completions.iter().position(Vec::is_empty) {
            return bad(format!("prompt {number}: completion {empty} has no tokens"));
        }
        let longest = group.completions.iter().map(|tokens| tokens.len() - 1).max().unwrap_or(0);
        if group.prompt.len() + longest > positions {
            let rows = group.prompt.len() + longest;
            return bad(format!(
                "prompt {number}: {rows} positions with its longest completion; the context has {positions}"
            ));
        }
        let tokens = group.completions.iter().flatten().chain(&group.prompt);
        if let Some(token) = tokens.copied().find(|&token| token as usize >= spec.vocab) {
            return bad(format!("prompt {number}: token {token} is not below {}", spec.vocab));
        }
    }
    Ok(())
}
