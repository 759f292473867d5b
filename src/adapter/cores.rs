//! From numbers to cores: done when a request is admitted, never stored.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;

use super::{
    Adapter, Basis, Convention, Facts, Frame, ProjectionDtype, Scheme, SchemeError, Sites, Targets, frame::Side,
    projection, scheme::MAX_PROJECTION_VALUES,
};
use crate::kernel::Cores;

/// Why an adapter has no cores here.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ExpandError {
    /// The scheme does not fit the model or the rank served: an adapter from another base, or from a server with a larger rank.
    #[error(transparent)]
    Scheme(#[from] SchemeError),
    /// Another count of numbers than the scheme has on this model.
    #[error("the adapter has {actual} numbers; its scheme has {expected} on this model")]
    Numbers {
        /// What the scheme has.
        expected: usize,
        /// What the adapter has.
        actual: usize,
    },
    /// A frame of another scheme or model than the adapter's.
    #[error("the adapter's singular vectors are not of this model and scheme")]
    Frame,
    /// Derivatives of other cores than the basis has.
    #[error("{actual} derivatives for cores of {expected} numbers")]
    Cores {
        /// What the cores have.
        expected: usize,
        /// What was given.
        actual: usize,
    },
    /// Adapters that are mixed must be numbers of one scheme, frame and base.
    #[error("adapters can only be mixed within one scheme and base")]
    Mix,
    /// Nothing to expand.
    #[error("a mix needs at least one adapter")]
    Empty,
    /// A weight or scale that makes numbers that are not finite.
    #[error("scale and weights must keep the adapter's numbers finite")]
    NotFinite,
}

/// What the projections of a scheme depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct ProjectionKey {
    seed: u64,
    u: usize,
    rank: usize,
    targets: Targets,
    dtype: ProjectionDtype,
}

/// Projections of every targeted site, `[n, u, r, r]`.
pub(super) type Projections = Arc<Vec<f32>>;

/// Recently used projections, bounded by the values they hold: clients may send any number of schemes.
#[derive(Debug, Default)]
struct ProjectionCache {
    entries: HashMap<ProjectionKey, (Projections, u64)>,
    values: usize,
    clock: u64,
}

/// Values kept: 32 MiB, two of the largest schemes or thousands of usual ones.
const CACHED_VALUES: usize = 2 * MAX_PROJECTION_VALUES;

impl ProjectionCache {
    fn get(&mut self, key: &ProjectionKey) -> Option<Projections> {
        self.clock += 1;
        let (projections, used) = self.entries.get_mut(key)?;
        *used = self.clock;
        Some(Arc::clone(projections))
    }

    fn insert(&mut self, key: ProjectionKey, projections: Projections) {
        self.clock += 1;
        self.values += projections.len();
        if let Some((replaced, _)) = self.entries.insert(key, (projections, self.clock)) {
            self.values -= replaced.len();
        }
        while self.values > CACHED_VALUES {
            let oldest = self.entries.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| *key);
            let Some((removed, _)) = oldest.and_then(|key| self.entries.remove(&key)) else { break };
            self.values -= removed.len();
        }
    }
}

/// Expands adapters on one model and basis.
#[derive(Debug)]
pub struct Expander {
    pub(super) sites: Sites,
    pub(super) basis: Arc<Basis>,
    pub(super) served: usize,
    projections: Mutex<ProjectionCache>,
}

impl Expander {
    /// For this model and basis. Adapters of up to rank `served` are expanded, to cores of the basis' rank
    /// ([`super::internal_rank`]).
    pub fn new(sites: Sites, basis: Arc<Basis>, served: usize) -> Self {
        let served = served.min(basis.rank);
        Self { sites, basis, served, projections: Mutex::default() }
    }

    /// The model's sites.
    pub fn sites(&self) -> &Sites {
        &self.sites
    }

    /// The basis that cores refer to.
    pub fn basis(&self) -> &Arc<Basis> {
        &self.basis
    }

    /// Cores of a weighted sum of adapters, `[sites, R, R]` where R is the basis' rank: one part is an adapter with its scale,
    /// several are a mix. Sums run in f64 in a fixed order: equal parts, equal bits.
    ///
    /// # Errors
    /// A scheme that does not fit, adapters of different facts, weights that overflow.
    pub fn expand(&self, parts: &[(&Adapter, f32)]) -> Result<Arc<Cores>, ExpandError> {
        let (first, _) = parts.first().ok_or(ExpandError::Empty)?;
        let same = |other: &Facts| {
            let facts = first.facts();
            (&facts.scheme, &facts.frame, &facts.fingerprint) == (&other.scheme, &other.frame, &other.fingerprint)
        };
        if !parts.iter().all(|(adapter, _)| same(adapter.facts())) {
            return Err(ExpandError::Mix);
        }
        let scheme = first.scheme();
        scheme.validate(&self.sites, self.served)?;
        let frame = first.facts().frame.as_ref();
        if frame.is_some_and(|frame| !frame.fits(scheme, &self.sites)) {
            return Err(ExpandError::Frame);
        }
        let expected = scheme.numbers(&self.sites);
        let mut numbers = vec![0.0f64; expected];
        for (adapter, weight) in parts {
            let actual = adapter.bytes().len() / adapter.facts().dtype.size();
            if actual != expected {
                return Err(ExpandError::Numbers { expected, actual });
            }
            for (sum, number) in numbers.iter_mut().zip(adapter.numbers()) {
                *sum += f64::from(*weight) * f64::from(number);
            }
        }
        let cores = self.cores(scheme, frame, &numbers);
        // Checked at the end: products with S and P can overflow f32 where the numbers alone do not.
        if !cores.data.iter().all(|value| value.is_finite()) {
            return Err(ExpandError::NotFinite);
        }
        Ok(Arc::new(cores))
    }

    fn cores(&self, scheme: &Scheme, frame: Option<&Frame>, numbers: &[f64]) -> Cores {
        let (r, rank) = (scheme.rank, self.basis.rank);
        let mut data = vec![0.0f32; self.sites.len() * rank * rank];
        let projections = self.projections(scheme);
        let mut core = vec![0.0f64; r * r];
        let (mut u, mut v) = (vec![0.0f64; rank * r], vec![0.0f64; rank * r]);
        for at in scheme.assignments(&self.sites) {
            let size = scheme.group_size();
            let of_group = &numbers[at.group * size..(at.group + 1) * size];
            match &projections {
                None => core.copy_from_slice(of_group),
                Some(p) => mix(of_group, &p[at.layer_idx * size * r * r..(at.layer_idx + 1) * size * r * r], &mut core),
            }
            core.iter_mut().enumerate().for_each(|(entry, value)| *value *= self.stretch(scheme, at.site, entry));
            let out = &mut data[at.site * rank * rank..(at.site + 1) * rank * rank];
            match frame {
                None => (0..r * r).for_each(|entry| out[entry / r * rank + entry % r] = core[entry] as f32),
                Some(frame) => {
                    frame.matrix(&at, Side::U, &mut u);
                    frame.matrix(&at, Side::V, &mut v);
                    turn(&u, &core, &v, r, out);
                }
            }
        }
        Cores::new(rank, data)
    }

    /// What singular values make of an entry (row-major, of `r * r`) of a site's core.
    pub(super) fn stretch(&self, scheme: &Scheme, site: usize, entry: usize) -> f64 {
        let s = &self.basis.sites[site].s;
        let (s_i, s_j) = (f64::from(s[entry / scheme.rank]), f64::from(s[entry % scheme.rank]));
        match scheme.convention {
            Convention::Peft => s_i.sqrt() * s_j.sqrt(),
            Convention::Paper | Convention::LoraXs => s_i,
        }
    }

    /// Drawn outside the lock: two threads may draw the same values, none waits for another's.
    pub(super) fn projections(&self, scheme: &Scheme) -> Option<Projections> {
        if scheme.convention == Convention::LoraXs {
            return None;
        }
        let Scheme { seed, u, rank, targets, projection: dtype, .. } = *scheme;
        let key = ProjectionKey { seed, u, rank, targets, dtype };
        if let Some(found) = self.projections.lock().get(&key) {
            return Some(found);
        }
        let n = scheme.targeted(&self.sites);
        let drawn: Projections = Arc::new((0..n).flat_map(|i| projection(seed, i, u, rank, dtype)).collect());
        self.projections.lock().insert(key, Arc::clone(&drawn));
        Some(drawn)
    }
}

/// `out = Q_u C Q_v^T`: `core` is `[r, r]`, `u` and `v` are `[R, r]`, `out` is `[R, R]`.
fn turn(u: &[f64], core: &[f64], v: &[f64], r: usize, out: &mut [f32]) {
    let rank = u.len() / r;
    let mut row = vec![0.0; r];
    for (u, out) in u.chunks_exact(r).zip(out.chunks_exact_mut(rank)) {
        for (j, entry) in row.iter_mut().enumerate() {
            *entry = (0..r).map(|i| u[i] * core[i * r + j]).sum();
        }
        for (v, out) in v.chunks_exact(r).zip(out) {
            *out = row.iter().zip(v).map(|(x, v)| x * v).sum::<f64>() as f32;
        }
    }
}

/// `out = sum_i v_i P_i`, `p` `[u, r, r]`.
fn mix(v: &[f64], p: &[f32], out: &mut [f64]) {
    out.fill(0.0);
    for (v, p) in v.iter().zip(p.chunks_exact(out.len())) {
        for (out, p) in out.iter_mut().zip(p) {
            *out += v * f64::from(*p);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{
        Assignment, Interner, NumberType, SignMask, Ties, codec,
        fixtures::{noise, turned, uniform_sites},
        reference,
    };

    fn expander(rank: usize) -> Expander {
        let sites = uniform_sites(3, 10, 8);
        let basis = Basis::compute(&sites, rank, |site| Ok::<_, String>(noise(site as u64, 80))).unwrap();
        Expander::new(sites, Arc::new(basis), rank)
    }

    fn adapter(expander: &Expander, scheme: Scheme, frame: Option<Frame>, seed: u64) -> Arc<Adapter> {
        let count = scheme.numbers(&expander.sites);
        let bytes = codec::encode(&noise(seed, count), NumberType::F32).unwrap();
        let fingerprint = expander.basis.fingerprint;
        let facts = Facts { scheme, frame, fingerprint, dtype: NumberType::F32, approximate: false };
        Interner::new().adapter(facts, &bytes, count).unwrap()
    }

    /// The formulas of METHOD, entry by entry.
    #[test]
    fn each_convention_is_its_formula() {
        let expander = expander(3);
        let ties = Ties::Structured { n_tie: 2 };
        for convention in [Convention::Peft, Convention::Paper, Convention::LoraXs] {
            let scheme = match convention {
                Convention::LoraXs => Scheme::lora_xs(2, Targets::ALL),
                _ => Scheme { convention, u: 3, ties, ..Scheme::tiny13() },
            };
            let adapter = adapter(&expander, scheme.clone(), None, 5);
            let numbers: Vec<f32> = adapter.numbers().collect();
            let cores = expander.expand(&[(&adapter, 1.0)]).unwrap();
            assert_eq!(cores.data.len(), 21 * 9);
            for Assignment { site, layer_idx, group } in scheme.assignments(&expander.sites) {
                let s = &expander.basis.sites[site].s;
                let p = projection(42, layer_idx, 3, 2, ProjectionDtype::F32);
                for i in 0..3 {
                    for j in 0..3 {
                        let sum = |n: usize| (0..n).map(|k| numbers[group * 3 + k] * p[k * 4 + i * 2 + j]).sum::<f32>();
                        let expected = match convention {
                            _ if i == 2 || j == 2 => 0.0,
                            Convention::Peft => s[i].sqrt() * sum(3) * s[j].sqrt(),
                            Convention::Paper => s[i] * sum(3),
                            Convention::LoraXs => s[i] * numbers[group * 4 + i * 2 + j],
                        };
                        let ours = cores.site(site)[i * 3 + j];
                        assert!((ours - expected).abs() < 1e-5, "{convention:?} {site} {i} {j}: {ours} {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn signs_turn_a_core_into_d_c_d() {
        let expander = expander(2);
        let mask = SignMask::new(21, 2, |site, k| site == 4 && k == 1).map(Frame::Signs);
        let plain = expander.expand(&[(&adapter(&expander, Scheme::tiny13(), None, 9), 1.0)]).unwrap();
        let signed = expander.expand(&[(&adapter(&expander, Scheme::tiny13(), mask, 9), 1.0)]).unwrap();
        for site in 0..21 {
            let (a, b) = (plain.site(site), signed.site(site));
            let flip = if site == 4 { -1.0 } else { 1.0 };
            assert_eq!([a[0], a[1] * flip, a[2] * flip, a[3]], [b[0], b[1], b[2], b[3]]);
        }
    }

    /// The update is that of the turned vectors themselves, U Q_u and V Q_v, under the plain core.
    #[test]
    fn a_turned_core_is_the_update_of_the_turned_vectors() {
        let mut expander = expander(4);
        expander.served = 2;
        let frame = turned(&Scheme::u13_tied(), &expander.sites, 4, 0.05);
        let plain = expander.expand(&[(&adapter(&expander, Scheme::u13_tied(), None, 9), 1.0)]).unwrap();
        let by_frame = adapter(&expander, Scheme::u13_tied(), frame.clone(), 9);
        let ours = expander.expand(&[(&by_frame, 1.0)]).unwrap();
        for at in Scheme::u13_tied().assignments(&expander.sites) {
            let basis = &expander.basis.sites[at.site];
            let vectors = |ours: &[f32], side| {
                let mut q = vec![0.0; 4 * 2];
                frame.as_ref().unwrap().matrix(&at, side, &mut q);
                let entry =
                    |row: &[f32], k: usize| (0..4).map(|i| f64::from(row[i]) * q[i * 2 + k]).sum::<f64>() as f32;
                ours.chunks(4).flat_map(|row| [entry(row, 0), entry(row, 1)]).collect::<Vec<f32>>()
            };
            let c = plain.site(at.site);
            let (u, v) = (vectors(&basis.u, Side::U), vectors(&basis.v, Side::V));
            let expected = reference::dense(&u, &[c[0], c[1], c[4], c[5]], &v, 2);
            let found = reference::dense(&basis.u, ours.site(at.site), &basis.v, 4);
            let scale = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            assert!(expected.iter().zip(&found).all(|(a, b)| (a - b).abs() < 1e-6 * scale), "site {}", at.site);
        }
        let elsewhere = adapter(&expander, Scheme { rank: 1, ..Scheme::u13_tied() }, frame, 9);
        assert_eq!(expander.expand(&[(&elsewhere, 1.0)]), Err(ExpandError::Frame));
        let wide = adapter(&expander, Scheme { rank: 3, ..Scheme::tiny13() }, None, 1);
        let error = expander.expand(&[(&wide, 1.0)]).unwrap_err().to_string();
        assert!(error.contains("above the largest rank served, 2"), "the margin is not for adapters: {error}");
    }

    #[test]
    fn scale_and_mix_are_linear_and_untargeted_sites_are_zero() {
        let expander = expander(2);
        let scheme = Scheme { targets: Targets::NONE.with(super::super::SiteKind::V), ..Scheme::u13_tied() };
        let (a, b) = (adapter(&expander, scheme.clone(), None, 1), adapter(&expander, scheme, None, 2));
        let cores = |parts: &[(&Adapter, f32)]| expander.expand(parts).unwrap().data.clone();
        let (one, other, mixed) = (cores(&[(&a, 1.0)]), cores(&[(&b, 1.0)]), cores(&[(&a, 0.7), (&b, -0.3)]));
        for i in 0..mixed.len() {
            assert!((0.7 * one[i] - 0.3 * other[i] - mixed[i]).abs() < 1e-5);
            assert!(i / 4 % 7 == 2 || mixed[i] == 0.0, "only v is targeted");
        }
        assert_eq!(cores(&[(&a, 1.0)]), one, "bit for bit");
        assert!(cores(&[(&a, 0.0)]).iter().all(|&value| value == 0.0));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let expander = expander(2);
        let tiny = adapter(&expander, Scheme::tiny13(), None, 1);
        let tied = adapter(&expander, Scheme::u13_tied(), None, 1);
        let wide = adapter(&expander, Scheme { rank: 3, ..Scheme::tiny13() }, None, 1);
        assert_eq!(expander.expand(&[]), Err(ExpandError::Empty));
        assert_eq!(expander.expand(&[(&tiny, 0.5), (&tied, 0.5)]), Err(ExpandError::Mix));
        assert!(expander.expand(&[(&wide, 1.0)]).unwrap_err().to_string().starts_with("scheme.rank: 3"));
        assert_eq!(expander.expand(&[(&tiny, f32::MAX), (&tiny, f32::MAX)]), Err(ExpandError::NotFinite));
        assert_eq!(expander.expand(&[(&tiny, f32::NAN)]), Err(ExpandError::NotFinite));
        let elsewhere = Expander::new(uniform_sites(4, 10, 8), Arc::clone(expander.basis()), 2);
        let paper = adapter(&expander, Scheme { ties: Ties::Tiled { n_tie: 1 }, ..Scheme::paper16() }, None, 1);
        assert_eq!(elsewhere.expand(&[(&paper, 1.0)]), Err(ExpandError::Numbers { expected: 28, actual: 21 }));
    }

    #[test]
    fn projections_are_kept_within_their_bound() {
        let mut cache = ProjectionCache::default();
        let key = |seed| ProjectionKey { seed, u: 1, rank: 2, targets: Targets::ALL, dtype: ProjectionDtype::F32 };
        for seed in 0..10 {
            cache.insert(key(seed), Arc::new(vec![0.0; CACHED_VALUES / 4]));
            assert!(cache.get(&key(0)).is_some(), "used last, kept");
            cache.insert(key(seed), Arc::new(vec![0.0; CACHED_VALUES / 4]));
        }
        assert_eq!((cache.entries.len(), cache.values), (4, CACHED_VALUES));
        assert!(cache.get(&key(9)).is_some() && cache.get(&key(5)).is_none());
    }
}
