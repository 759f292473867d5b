//! How the singular vectors of an imported checkpoint lie in ours.
//!
//! PEFT takes its SVD in f32. Where two singular values are within a percent of each other its vectors are turned by up to 1e-4
//! rad within their plane, which the update feels in full; its singular values are off by 1e-6. Signs cannot say it. So a
//! checkpoint keeps `Q_u = U^T B / sqrt(S)` and `Q_v = V^T A^T / sqrt(S)` a site, near a diagonal of signs, and its core becomes
//! `Q_u C Q_v^T` under our vectors, of which there are [`MARGIN`] more than the checkpoint's rank: its last pair turns too.

use super::{Assignment, Scheme, SignMask, SignMaskError, Sites};

/// Our vectors beyond a checkpoint's rank that its vectors may lean to.
pub const MARGIN: usize = 2;
/// The unit of a coordinate, f32's epsilon. Coarse against what writing vectors in f32 and reading them again costs (some 1e-8),
/// so that a frame survives export and import bit for bit; fine against the turns.
const STEP: f64 = 1.0 / UNIT as f64;
/// 1 in those units.
const UNIT: i32 = 1 << 23;
/// A column's coordinate on its own vector is 1 or -1 up to this: 0.99 of the direction, 5% of the singular value.
const MAX_STRETCH: f64 = 0.05;
/// The most that its squared coordinates on the other vectors sum to: 1.05 (1 - 0.99^2), and some.
const MAX_LEAN: f64 = 0.022;

/// First byte of a stored [`SignMask`].
const SIGNS: u8 = 1;
/// First byte of a stored [`Turn`].
const TURNED: u8 = 2;

/// U or V.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Left vectors: outputs.
    U,
    /// Right vectors: inputs.
    V,
}

/// A checkpoint's vectors in terms of ours; equal frames are equal bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Frame {
    /// The same vectors up to signs, the same on both sides: a bit a vector.
    Signs(SignMask),
    /// Turned vectors.
    Turned(Turn),
}

/// `Q_u` and `Q_v` of every targeted site.
///
/// `2 n r (r + 2)` integers: 13 kB at rank 2 on 210 sites, shared by all adapters of one checkpoint's factors. Never larger than
/// the A and B it was read from, and bounded through [`super::MAX_PROJECTION_VALUES`] as `n u r r` is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Turn {
    rank: usize,
    rows: usize,
    /// `[n, side, rank, rows]` coordinates in units of [`STEP`].
    columns: Box<[i32]>,
}

/// Bytes that are no frame of the scheme on this model.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum FrameError {
    /// An unknown first byte, or none.
    #[error("a frame begins with {SIGNS} or {TURNED}")]
    Kind,
    /// Bad signs.
    #[error(transparent)]
    Signs(#[from] SignMaskError),
    /// Another length than `n`, rank and rows make.
    #[error("a frame of {targeted} sites, rank {rank} and {rows} rows has other than {actual} bytes")]
    Length {
        /// Targeted sites.
        targeted: usize,
        /// The scheme's rank.
        rank: usize,
        /// What the bytes say.
        rows: usize,
        /// How many there are.
        actual: usize,
    },
    /// A column that is no unit vector near its axis.
    #[error("column {0} of a frame is no turned singular vector")]
    Column(usize),
}

/// Collects a frame column by column: the targeted sites in order, of each U's `rank` columns, then V's.
#[derive(Debug)]
pub(super) struct FrameBuilder {
    rank: usize,
    rows: usize,
    columns: Vec<i32>,
}

impl FrameBuilder {
    pub(super) fn new(rank: usize, rows: usize) -> Self {
        Self { rank, rows, columns: Vec::new() }
    }

    /// The next column: coordinates on our vectors, `[rows]`.
    pub(super) fn push(&mut self, coordinates: impl IntoIterator<Item = f64>) {
        self.columns.extend(coordinates.into_iter().map(|x| (x / STEP).round() as i32));
    }

    /// The next column, of a vector that is our k-th or that nothing depends on.
    pub(super) fn push_own(&mut self, k: usize) {
        self.push((0..self.rows).map(|i| f64::from(u8::from(i == k))));
    }

    /// None if all vectors are ours.
    pub(super) fn finish(mut self, scheme: &Scheme, sites: &Sites) -> Option<Frame> {
        let (rank, rows) = (self.rank, self.rows);
        debug_assert_eq!(Some(self.columns.len()), entries(scheme, sites, rows));
        // Both sides negated is the same core: U's first column is positive.
        for site in self.columns.chunks_exact_mut(2 * rank * rows).filter(|site| site[0] < 0) {
            site.iter_mut().for_each(|entry| *entry = -*entry);
        }
        let only_signs = |site: &[i32]| {
            let (u, v) = site.split_at(rank * rows);
            let own = |at: usize| i32::from(at % rows == at / rows) * UNIT;
            u == v && u.iter().enumerate().all(|(at, &x)| x.abs() == own(at))
        };
        if !self.columns.chunks_exact(2 * rank * rows).all(only_signs) {
            return Some(Frame::Turned(Turn { rank, rows, columns: self.columns.into() }));
        }
        let mut negative = vec![false; sites.len() * rank];
        for Assignment { site, layer_idx, .. } in scheme.assignments(sites) {
            let u = &self.columns[layer_idx * 2 * rank * rows..];
            (0..rank).for_each(|k| negative[site * rank + k] = u[k * rows + k] < 0);
        }
        SignMask::new(sites.len(), rank, |site, k| negative[site * rank + k]).map(Frame::Signs)
    }
}

impl Turn {
    fn column(&self, targeted: usize, side: Side, k: usize) -> &[i32] {
        let at = ((targeted * 2 + side as usize) * self.rank + k) * self.rows;
        &self.columns[at..at + self.rows]
    }
}

impl Frame {
    /// Is it of this scheme on this model?
    pub fn fits(&self, scheme: &Scheme, sites: &Sites) -> bool {
        match self {
            Frame::Signs(mask) => mask.fits(sites.len(), scheme.rank),
            Frame::Turned(turn) => {
                turn.rank == scheme.rank && Some(turn.columns.len()) == entries(scheme, sites, turn.rows)
            }
        }
    }

    /// Q of a targeted site into `out`, row-major `[out.len() / rank, rank]`: a saved vector is our vectors times a column of it.
    /// Coordinates on more of our vectors than `out` has room for are left out.
    ///
    /// # Panics
    /// If it does not [fit](Self::fits) the scheme that the assignment is of.
    pub(super) fn matrix(&self, at: &Assignment, side: Side, out: &mut [f64]) {
        out.fill(0.0);
        let rank = match self {
            Frame::Signs(mask) => mask.rank(),
            Frame::Turned(turn) => turn.rank,
        };
        for k in 0..rank {
            match self {
                Frame::Signs(mask) => out[k * rank + k] = f64::from(mask.sign(at.site, k)),
                Frame::Turned(turn) => {
                    let column = turn.column(at.layer_idx, side, k);
                    for (entry, &x) in out.iter_mut().skip(k).step_by(rank).zip(column) {
                        *entry = f64::from(x) * STEP;
                    }
                }
            }
        }
    }

    /// What a store keeps, and what is hashed: a byte for the kind, then the mask's bits, or the rows (u16) and all columns (i32)
    /// of the turn, little endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Frame::Signs(mask) => [&[SIGNS], mask.as_bytes()].concat(),
            Frame::Turned(turn) => {
                let mut bytes = vec![TURNED];
                bytes.extend((turn.rows as u16).to_le_bytes());
                bytes.extend(turn.columns.iter().flat_map(|entry| entry.to_le_bytes()));
                bytes
            }
        }
    }

    /// What a store kept.
    ///
    /// # Errors
    /// Bytes that [`Self::to_bytes`] cannot have made for this scheme on this model.
    pub fn from_bytes(bytes: &[u8], scheme: &Scheme, sites: &Sites) -> Result<Self, FrameError> {
        match bytes {
            [SIGNS, bits @ ..] => Ok(Self::Signs(SignMask::from_bytes(bits, sites.len(), scheme.rank)?)),
            [TURNED, low, high, columns @ ..] => {
                let (rank, rows) = (scheme.rank, usize::from(u16::from_le_bytes([*low, *high])));
                let (values, rest) = columns.as_chunks::<4>();
                let sound = (rank.max(1)..=rank.saturating_add(MARGIN)).contains(&rows) && rest.is_empty();
                if !sound || Some(values.len()) != entries(scheme, sites, rows) {
                    let (targeted, actual) = (scheme.targeted(sites), bytes.len());
                    return Err(FrameError::Length { targeted, rank, rows, actual });
                }
                let columns: Box<[i32]> = values.iter().map(|&value| i32::from_le_bytes(value)).collect();
                let bad = columns.chunks_exact(rows).enumerate().find(|(c, column)| !is_turned_axis(column, c % rank));
                match bad {
                    Some((c, _)) => Err(FrameError::Column(c)),
                    None => Ok(Self::Turned(Turn { rank, rows, columns })),
                }
            }
            _ => Err(FrameError::Kind),
        }
    }
}

/// `n * 2 * rank * rows`, if that is a number.
fn entries(scheme: &Scheme, sites: &Sites, rows: usize) -> Option<usize> {
    scheme.targeted(sites).checked_mul(2)?.checked_mul(scheme.rank)?.checked_mul(rows)
}

/// Could import have made it as a column k?
fn is_turned_axis(column: &[i32], k: usize) -> bool {
    let squares = |(i, &x): (usize, &i32)| if i == k { 0.0 } else { (f64::from(x) * STEP).powi(2) };
    let lean: f64 = column.iter().enumerate().map(squares).sum();
    (f64::from(column[k]).abs() * STEP - 1.0).abs() <= MAX_STRETCH && lean <= MAX_LEAN
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::adapter::fixtures::{noise, turned, uniform_sites};

    fn scheme() -> Scheme {
        Scheme::tiny13()
    }

    fn sites() -> Sites {
        uniform_sites(2, 10, 8)
    }

    fn matrices(frame: &Frame) -> Vec<[Vec<f64>; 2]> {
        let of_site = |at: &Assignment| {
            [Side::U, Side::V].map(|side| {
                let mut q = vec![9.0; 4 * 2];
                frame.matrix(at, side, &mut q);
                q
            })
        };
        scheme().assignments(&sites()).iter().map(of_site).collect()
    }

    #[test]
    fn small_turns_are_recovered_to_the_step() {
        let mut builder = FrameBuilder::new(2, 4);
        let mut given = Vec::new();
        for c in 0..2 * 2 * sites().len() {
            let mut column: Vec<f64> = noise(c as u64, 4).iter().map(|&x| 3e-4 * f64::from(x)).collect();
            column[c % 2] += 1.0;
            // The sign of a whole site must come out as none.
            let sign = if c / 4 % 2 == 0 { -1.0 } else { 1.0 };
            builder.push(column.iter().map(|x| sign * x));
            given.push(column);
        }
        let frame = builder.finish(&scheme(), &sites()).unwrap();
        assert!(frame.fits(&scheme(), &sites()) && matches!(frame, Frame::Turned(_)));
        for (c, column) in given.iter().enumerate() {
            let q = &matrices(&frame)[c / 4][c / 2 % 2];
            let off = (0..4).map(|i| (q[i * 2 + c % 2] - column[i]).abs()).fold(0.0, f64::max);
            assert!(off <= STEP / 2.0, "column {c}: {off}");
        }
    }

    /// What is left of ours after a trip through f32 is ours.
    #[test]
    fn vectors_that_are_ours_up_to_signs_are_a_mask_or_nothing() {
        let (mut same, mut flipped) = (FrameBuilder::new(2, 4), FrameBuilder::new(2, 4));
        for c in 0..2 * 2 * sites().len() {
            let mut column: Vec<f64> = noise(c as u64, 4).iter().map(|&x| 3e-8 * f64::from(x)).collect();
            column[c % 2] += 1.0;
            same.push(column.iter().copied());
            column[c % 2] *= if c % 2 == 1 && c / 4 == 5 { -1.0 } else { 1.0 };
            flipped.push(column);
        }
        assert_eq!(same.finish(&scheme(), &sites()), None);
        let mask = SignMask::new(14, 2, |site, k| site == 5 && k == 1).unwrap();
        assert_eq!(flipped.finish(&scheme(), &sites()), Some(Frame::Signs(mask)));
        // Signs that the sides do not share are no mask.
        let apart = turned(&scheme(), &sites(), 4, 0.0).unwrap();
        assert!(matches!(apart, Frame::Turned(_)));
    }

    #[test]
    fn bytes_come_back_and_others_are_refused() {
        let (scheme, sites) = (scheme(), sites());
        let mask = SignMask::new(14, 2, |site, k| site == 3 && k == 1).map(Frame::Signs).unwrap();
        let frame = turned(&scheme, &sites, 4, 1e-3).unwrap();
        for frame in [&mask, &frame] {
            assert_eq!(Frame::from_bytes(&frame.to_bytes(), &scheme, &sites).as_ref(), Ok(frame));
        }
        let bytes = frame.to_bytes();
        let with = |at: usize, value: i32| {
            let mut bytes = bytes.clone();
            bytes[3 + 4 * at..7 + 4 * at].copy_from_slice(&value.to_le_bytes());
            Frame::from_bytes(&bytes, &scheme, &sites)
        };
        // Entries 0 and 5 are columns 0 and 1 on their own vectors; 1 is column 0 on another.
        for (at, value, column) in
            [(0, 0, 0), (0, UNIT / 16 * 17, 0), (1, UNIT / 6, 0), (1, i32::MIN, 0), (5, i32::MAX, 1), (5, i32::MIN, 1)]
        {
            assert_eq!(with(at, value), Err(FrameError::Column(column)));
        }
        assert!(with(0, -UNIT).is_ok() && with(1, UNIT / 8).is_ok());
        assert_eq!(Frame::from_bytes(&[], &scheme, &sites), Err(FrameError::Kind));
        assert_eq!(Frame::from_bytes(&[3, 4, 0], &scheme, &sites), Err(FrameError::Kind));
        for rows in [0u16, 1, 3, 5, u16::MAX] {
            let bytes = [&[TURNED], &rows.to_le_bytes()[..], &bytes[3..]].concat();
            assert!(matches!(Frame::from_bytes(&bytes, &scheme, &sites), Err(FrameError::Length { .. })), "{rows}");
        }
        for (scheme, sites) in
            [(Scheme { rank: 1, ..scheme.clone() }, sites.clone()), (scheme, uniform_sites(3, 10, 8))]
        {
            assert!(Frame::from_bytes(&bytes, &scheme, &sites).is_err() && !frame.fits(&scheme, &sites));
            assert!(Frame::from_bytes(&mask.to_bytes(), &scheme, &sites).is_err() && !mask.fits(&scheme, &sites));
        }
    }

    #[test]
    fn rows_that_a_basis_lacks_are_left_out() {
        let (scheme, sites) = (scheme(), sites());
        let frame = turned(&scheme, &sites, 4, 1e-3).unwrap();
        for at in scheme.assignments(&sites) {
            let (mut all, mut some, mut more) = (vec![0.0; 8], vec![0.0; 4], vec![9.0; 12]);
            frame.matrix(&at, Side::V, &mut all);
            frame.matrix(&at, Side::V, &mut some);
            frame.matrix(&at, Side::V, &mut more);
            assert_eq!((&all[..4], &all[..], &more[8..]), (&some[..], &more[..8], &[0.0; 4][..]));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_frame_panic(
            noise in prop::collection::vec(any::<u8>(), 0..300), edits in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 0..4)
        ) {
            let (scheme, sites) = (scheme(), sites());
            drop(Frame::from_bytes(&noise, &scheme, &sites));
            let mut bytes = turned(&scheme, &sites, 4, 1e-3).unwrap().to_bytes();
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(frame) = Frame::from_bytes(&bytes, &scheme, &sites) {
                prop_assert!(frame.fits(&scheme, &sites));
                prop_assert_eq!(frame.to_bytes(), bytes);
                prop_assert!(matrices(&frame).iter().flatten().flatten().all(|x| x.abs() <= 1.0 + MAX_STRETCH));
            }
        }
    }
}
