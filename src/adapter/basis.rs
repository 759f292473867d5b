//! U, S and V of every adapted weight: what an adapter's numbers are numbers *of*.

use std::fmt::Display;

use rayon::prelude::*;

use super::{MARGIN, Sites, fingerprint, svd::truncated_svd};
use crate::types::Fingerprint;

/// A vector of a recomputed basis must agree with the cached one by more than this cosine.
pub const AGREEMENT: f64 = 0.9999;

/// Singular values of neighbours closer than this ratio make their vectors sensitive to rounding in the weights.
const CLOSE: f32 = 1.0005;

/// Why there is no basis.
#[derive(Debug, thiserror::Error)]
pub enum BasisError {
    /// The weights of a site could not be had.
    #[error("weights of {module}: {message}")]
    Weights {
        /// Module path of the site.
        module: String,
        /// What the loader said.
        message: String,
    },
    /// A weight is NaN or infinite.
    #[error("weights of {module} are not finite")]
    NotFinite {
        /// Module path of the site.
        module: String,
    },
    /// A rank that a site does not have.
    #[error("rank {rank} is out of range: {module} is [{outputs}, {inputs}]")]
    Rank {
        /// The rank asked for.
        rank: usize,
        /// Module path of the narrowest site.
        module: String,
        /// Its outputs.
        outputs: usize,
        /// Its inputs.
        inputs: usize,
    },
}

/// The leading singular triplets of one site, largest first. For each k the entry of `u_k` with the largest magnitude (the
/// first of them) is positive.
#[derive(Debug, Clone, PartialEq)]
pub struct SiteBasis {
    /// `[out, r]` row-major, orthonormal columns.
    pub u: Vec<f32>,
    /// `[r]` singular values.
    pub s: Vec<f32>,
    /// `[in, r]` row-major, orthonormal columns.
    pub v: Vec<f32>,
    /// An estimate of the next singular value (0 if there is none): how well the last vector is determined.
    pub next_sigma: f32,
}

/// The basis of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Basis {
    /// Vectors a site: [`internal_rank`] of the rank served.
    pub rank: usize,
    /// Which weights it is of.
    pub fingerprint: Fingerprint,
    /// One a site.
    pub sites: Vec<SiteBasis>,
}

/// Two neighbouring singular values so close that the vectors are poorly determined.
#[derive(Debug, Clone, PartialEq)]
pub struct Unstable {
    /// The site.
    pub site: usize,
    /// The earlier of the two values, from 0.
    pub k: usize,
    /// Its ratio to the later one, near 1.
    pub ratio: f32,
}

/// The worst match of two bases of the same weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Agreement {
    /// Signed cosine: a flipped vector is as useless as another one.
    pub cosine: f64,
    /// The site.
    pub site: usize,
    /// The singular pair, from 0.
    pub k: usize,
}

impl Agreement {
    /// Do adapters mean the same under both?
    pub fn holds(&self) -> bool {
        self.cosine > AGREEMENT
    }
}

impl Basis {
    /// Computes basis and fingerprint in one pass over the weights, sites in parallel. `weights(site)` is row-major `[out, in]`
    /// f32 (after dequantising); at most one site a thread is held at a time.
    ///
    /// The result does not depend on the number of threads or the processor.
    ///
    /// # Errors
    /// A rank some site does not have, weights that cannot be read or are not finite.
    pub fn compute<E: Display>(
        sites: &Sites,
        rank: usize,
        weights: impl Fn(usize) -> Result<Vec<f32>, E> + Sync,
    ) -> Result<Self, BasisError> {
        check_rank(sites, rank)?;
        let of_site = |site: usize| {
            let values = fingerprint::load(sites, site, &weights)?;
            let (outputs, inputs) = sites.shape(site);
            let (basis, converged) = SiteBasis::compute(&values, outputs, inputs, rank);
            if !converged {
                let module = sites.module(site);
                tracing::warn!(
                    module,
                    "singular values too close to separate their vectors; adapters may not carry over"
                );
            }
            Ok((basis, fingerprint::site_hash(sites, site, &values)))
        };
        let results: Result<Vec<_>, BasisError> = (0..sites.len()).into_par_iter().map(of_site).collect();
        let (site_bases, hashes): (Vec<_>, Vec<_>) = results?.into_iter().unzip();
        Ok(Self { rank, fingerprint: fingerprint::combine(&hashes), sites: site_bases })
    }

    /// The same basis with fewer vectors: truncated SVDs nest.
    pub fn truncated(&self, rank: usize) -> Self {
        let rank = rank.min(self.rank);
        let sites = self.sites.iter().map(|site| site.truncated(self.rank, rank)).collect();
        Self { rank, fingerprint: self.fingerprint, sites }
    }

    /// Singular values too close to tell their vectors apart reliably, worst first. Adapters still work on *this* basis, which is
    /// why it is cached; another machine's recomputation may not match.
    pub fn unstable(&self) -> Vec<Unstable> {
        let of_site = |(site, basis): (usize, &SiteBasis)| {
            let value = move |k: usize| basis.s.get(k).copied().unwrap_or(basis.next_sigma);
            let pairs = (0..self.rank).map(move |k| Unstable { site, k, ratio: value(k) / value(k + 1) });
            pairs.filter(|pair| pair.ratio < CLOSE).collect::<Vec<_>>()
        };
        let mut all: Vec<Unstable> = self.sites.iter().enumerate().flat_map(of_site).collect();
        all.sort_by(|a, b| a.ratio.total_cmp(&b.ratio));
        all
    }

    /// The worst cosine between corresponding vectors, over the ranks that both have. None if a shape differs.
    pub fn agreement(&self, other: &Self) -> Option<Agreement> {
        let rank = self.rank.min(other.rank);
        let mut worst = Agreement { cosine: 1.0, site: 0, k: 0 };
        if self.sites.len() != other.sites.len() {
            return None;
        }
        for (site, (a, b)) in self.sites.iter().zip(&other.sites).enumerate() {
            for (a, b) in [(&a.u, &b.u), (&a.v, &b.v)] {
                if a.len() * other.rank != b.len() * self.rank {
                    return None;
                }
                for k in 0..rank {
                    let cosine = cosine(column(a, self.rank, k), column(b, other.rank, k));
                    if cosine.is_nan() || cosine < worst.cosine {
                        worst = Agreement { cosine, site, k };
                    }
                }
            }
        }
        Some(worst)
    }
}

impl SiteBasis {
    /// The basis, and whether its vectors converged.
    fn compute(weights: &[f32], outputs: usize, inputs: usize, rank: usize) -> (Self, bool) {
        let count = (rank + 1).min(outputs.min(inputs));
        let mut svd = truncated_svd(weights, outputs, inputs, count, rank);
        for k in 0..rank {
            if negative_by_convention(&svd.u[k]) {
                svd.u[k].iter_mut().for_each(|x| *x = -*x);
                svd.v[k].iter_mut().for_each(|x| *x = -*x);
            }
        }
        let basis = Self {
            u: interleave(&svd.u[..rank]),
            s: svd.s[..rank].iter().map(|&s| s as f32).collect(),
            v: interleave(&svd.v[..rank]),
            next_sigma: svd.s.get(rank).map_or(0.0, |&s| s as f32),
        };
        (basis, svd.converged)
    }

    fn truncated(&self, from: usize, to: usize) -> Self {
        let take = |values: &[f32]| values.chunks_exact(from).flat_map(|row| row[..to].iter().copied()).collect();
        let next_sigma = self.s.get(to).copied().unwrap_or(self.next_sigma);
        Self { u: take(&self.u), s: self.s[..to].to_vec(), v: take(&self.v), next_sigma }
    }
}

/// Is the first entry of the largest magnitude negative? Judged on the f32 values, which are what is stored and compared.
fn negative_by_convention(u: &[f64]) -> bool {
    let mut largest = 0.0f32;
    for x in u.iter().map(|&x| x as f32) {
        if x.abs() > largest.abs() {
            largest = x;
        }
    }
    largest < 0.0
}

/// Columns to row-major `[n, k]`.
fn interleave(columns: &[Vec<f64>]) -> Vec<f32> {
    let n = columns.first().map_or(0, Vec::len);
    (0..n).flat_map(|i| columns.iter().map(move |column| column[i] as f32)).collect()
}

/// Column k of row-major `[n, rank]`.
pub(super) fn column(values: &[f32], rank: usize, k: usize) -> impl Iterator<Item = f64> + Clone + '_ {
    values.iter().skip(k).step_by(rank).map(|&x| f64::from(x))
}

/// The cosine of the angle between two vectors; NaN if one is zero.
fn cosine(a: impl Iterator<Item = f64>, b: impl Iterator<Item = f64>) -> f64 {
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (a, b) in a.zip(b) {
        ab += a * b;
        aa += a * a;
        bb += b * b;
    }
    ab / (aa * bb).sqrt()
}

/// The rank of the basis that a server of adapters up to rank `served` needs: [`MARGIN`] more, for the [`super::Frame`]s of
/// imported checkpoints, as far as the narrowest site has them. 0 stays 0.
pub fn internal_rank(served: usize, sites: &Sites) -> usize {
    let narrowest = sites.shapes.iter().map(|&(outputs, inputs)| outputs.min(inputs)).min().unwrap_or(0);
    // A rank that a site does not have stays what it is, and is refused by name.
    if served == 0 { 0 } else { (served + MARGIN).min(narrowest).max(served) }
}

pub(super) fn check_rank(sites: &Sites, rank: usize) -> Result<(), BasisError> {
    let narrowest = (0..sites.len().min(7)).min_by_key(|&site| sites.shape(site).0.min(sites.shape(site).1));
    let Some(site) = narrowest else { return Ok(()) };
    let (outputs, inputs) = sites.shape(site);
    if rank == 0 || rank > outputs.min(inputs) {
        return Err(BasisError::Rank { rank, module: sites.module(site), outputs, inputs });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::fixtures::{self, golden, noise, uniform_sites};

    /// torch's full SVD, as PEFT saved it: A = sqrt(S) V^T and B = U sqrt(S), up to a sign a pair.
    #[test]
    fn equals_the_full_svd_that_peft_saved() {
        for model in fixtures::MODELS {
            let sites = fixtures::sites(model);
            let basis = Basis::compute(&sites, 4, fixtures::weights(model)).unwrap();
            let case = golden(model, "r4-u3-untied");
            for (site, ours) in basis.sites.iter().enumerate() {
                let name = |part: &str| format!("base_model.model.{}.tinylora_{part}", sites.module(site));
                let (a, b) = (case.tensor(&name("A")).unwrap(), case.tensor(&name("B")).unwrap());
                let inputs = sites.shape(site).1;
                for k in 0..4 {
                    let a_k = a[k * inputs..(k + 1) * inputs].iter().map(|&x| f64::from(x));
                    let v_cosine = cosine(column(&ours.v, 4, k), a_k.clone());
                    let u_cosine = cosine(column(&ours.u, 4, k), column(&b, 4, k));
                    assert!(v_cosine.abs() > 1.0 - 1e-7, "{model} {} v[{k}]: {v_cosine}", sites.module(site));
                    assert!(u_cosine.abs() > 1.0 - 1e-7, "{model} {} u[{k}]: {u_cosine}", sites.module(site));
                    assert_eq!(v_cosine.signum(), u_cosine.signum());
                    let s: f64 = a_k.map(|a| a * a).sum();
                    assert!((s - f64::from(ours.s[k])).abs() < 1e-5 * s, "{model} s[{k}]");
                }
            }
        }
    }

    #[test]
    fn the_largest_entry_of_every_left_vector_is_positive() {
        let basis = Basis::compute(&fixtures::sites("llama"), 3, fixtures::weights("llama")).unwrap();
        for site in &basis.sites {
            for k in 0..3 {
                let largest = column(&site.u, 3, k).max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
                assert!(largest > 0.0);
            }
        }
        assert!(!negative_by_convention(&[0.5, -0.5]) && negative_by_convention(&[-0.5, 0.5]), "ties: the first");
    }

    #[test]
    fn ranks_nest_and_threads_do_not_matter() {
        let sites = fixtures::sites("llama");
        let weights = fixtures::weights("llama");
        let two = Basis::compute(&sites, 2, &weights).unwrap();
        let five = Basis::compute(&sites, 5, &weights).unwrap();
        assert_eq!(two.fingerprint, five.fingerprint, "the fingerprint is of the weights, not of the rank");
        let agreement = two.agreement(&five).unwrap();
        assert!(agreement.cosine > 1.0 - 1e-9, "{agreement:?}");
        assert_eq!(five.truncated(2).agreement(&two), two.agreement(&five.truncated(2)));
        assert_eq!(five.truncated(2).sites[3].s, five.sites[3].s[..2]);
        let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(one_thread.install(|| Basis::compute(&sites, 2, &weights).unwrap()), two, "bit for bit");
    }

    #[test]
    fn any_changed_weight_name_or_shape_is_another_fingerprint() {
        let sites = uniform_sites(1, 6, 5);
        let weights = |site: usize| Ok::<_, String>(noise(site as u64, 30));
        let basis = Basis::compute(&sites, 2, weights).unwrap();
        let nudged = |site: usize| {
            let mut values = noise(site as u64, 30);
            if site == 6 {
                values[29] = f32::from_bits(values[29].to_bits() ^ 1);
            }
            Ok::<_, String>(values)
        };
        assert_ne!(Basis::compute(&sites, 2, nudged).unwrap().fingerprint, basis.fingerprint);
        assert_ne!(Basis::compute(&uniform_sites(1, 5, 6), 2, weights).unwrap().fingerprint, basis.fingerprint);
        assert_eq!(fingerprint::of_weights(&sites, weights).unwrap(), basis.fingerprint);
    }

    #[test]
    fn close_singular_values_are_reported_and_bad_input_is_named() {
        let sites = uniform_sites(1, 4, 4);
        let diagonal = |values: [f32; 4]| {
            move |_: usize| Ok::<_, String>((0..16).map(|at| if at % 5 == 0 { values[at / 5] } else { 0.0 }).collect())
        };
        let basis = Basis::compute(&sites, 2, diagonal([3.0, 2.0, 1.9999, 1.0])).unwrap();
        let unstable = basis.unstable();
        assert_eq!((unstable.len(), unstable[0].k), (7, 1));
        assert!(Basis::compute(&sites, 2, diagonal([3.0, 2.0, 1.0, 0.5])).unwrap().unstable().is_empty());
        let message = |result: Result<Basis, BasisError>| result.unwrap_err().to_string();
        let nan = message(Basis::compute(&sites, 2, diagonal([3.0, f32::NAN, 1.0, 0.5])));
        assert_eq!(nan, "weights of model.layers.0.self_attn.q_proj are not finite");
        assert!(message(Basis::compute(&sites, 5, diagonal([1.0; 4]))).starts_with("rank 5 is out of range"));
        let broken =
            |site: usize| if site == 3 { Err("no such tensor") } else { diagonal([1.0; 4])(site).map_err(|_| "") };
        assert!(message(Basis::compute(&sites, 2, broken)).ends_with("self_attn.o_proj: no such tensor"));
        let short = |_: usize| Ok::<_, String>(vec![0.0; 15]);
        assert!(message(Basis::compute(&sites, 2, short)).contains("15 values"));
    }

    /// The shapes of SmolLM2-135M with the flattest spectra there are. `cargo nextest run --lib --run-ignored only basis_of_a_real_size`
    #[test]
    #[ignore = "a measurement: prints seconds"]
    fn basis_of_a_real_size() {
        let (hidden, kv, inter) = (576, 192, 1536);
        let shapes = [
            (hidden, hidden),
            (kv, hidden),
            (kv, hidden),
            (hidden, hidden),
            (inter, hidden),
            (inter, hidden),
            (hidden, inter),
        ];
        let sites = Sites { layers: 30, shapes };
        let weights = |site: usize| Ok::<_, String>(noise(site as u64, sites.shape(site).0 * sites.shape(site).1));
        let start = std::time::Instant::now();
        let basis = Basis::compute(&sites, 2, weights).unwrap();
        println!("{:?} for {} sites, {} unstable", start.elapsed(), basis.sites.len(), basis.unstable().len());
    }
}
