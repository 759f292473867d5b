//! The name of a set of weights: BLAKE3 over names, shapes and f32 values of all sites, and a version of our conventions.
//!
//! It is of the weights and not of the basis: of hundreds of thousands of singular vector entries some always sit on a rounding
//! border. Each site is hashed alone, so that sites can be read in any order and in parallel, and the hashes are hashed in order.

use std::fmt::Display;

use rayon::prelude::*;

use super::{Sites, basis::BasisError};
use crate::types::Fingerprint;

/// Part of every fingerprint. Raise the number when the same weights come to mean another basis: the order of sites, the
/// sign rule, the definition of a core.
pub(super) const CONVENTIONS: &str = "mote.basis.1";

/// The fingerprint of a model, without computing its basis. `weights` as for [`super::Basis::compute`].
///
/// # Errors
/// Weights that cannot be read or are not finite.
pub fn of_weights<E: Display>(
    sites: &Sites,
    weights: impl Fn(usize) -> Result<Vec<f32>, E> + Sync,
) -> Result<Fingerprint, BasisError> {
    let hash = |site: usize| Ok(site_hash(sites, site, &load(sites, site, &weights)?));
    let hashes: Result<Vec<_>, BasisError> = (0..sites.len()).into_par_iter().map(hash).collect();
    Ok(combine(&hashes?))
}

/// Reads and checks the weights of a site.
pub(super) fn load<E: Display>(
    sites: &Sites,
    site: usize,
    weights: impl Fn(usize) -> Result<Vec<f32>, E>,
) -> Result<Vec<f32>, BasisError> {
    let module = || sites.module(site);
    let values = weights(site).map_err(|error| BasisError::Weights { module: module(), message: error.to_string() })?;
    let (outputs, inputs) = sites.shape(site);
    if values.len() != outputs * inputs {
        let message = format!("{} values, not [{outputs}, {inputs}]", values.len());
        return Err(BasisError::Weights { module: module(), message });
    }
    if !values.iter().all(|value| value.is_finite()) {
        return Err(BasisError::NotFinite { module: module() });
    }
    Ok(values)
}

pub(super) fn site_hash(sites: &Sites, site: usize, values: &[f32]) -> blake3::Hash {
    let (outputs, inputs) = sites.shape(site);
    let mut hasher = blake3::Hasher::new();
    hash_text(&mut hasher, &sites.module(site));
    hasher.update(&(outputs as u64).to_le_bytes());
    hasher.update(&(inputs as u64).to_le_bytes());
    hash_values(&mut hasher, values);
    hasher.finalize()
}

pub(super) fn combine(site_hashes: &[blake3::Hash]) -> Fingerprint {
    let mut hasher = blake3::Hasher::new();
    hash_text(&mut hasher, CONVENTIONS);
    hasher.update(&(site_hashes.len() as u64).to_le_bytes());
    for hash in site_hashes {
        hasher.update(hash.as_bytes());
    }
    Fingerprint(*hasher.finalize().as_bytes())
}

/// Length first, so that no two lists of fields hash the same bytes.
pub(super) fn hash_text(hasher: &mut blake3::Hasher, text: &str) {
    hasher.update(&(text.len() as u64).to_le_bytes());
    hasher.update(text.as_bytes());
}

/// f32 values as little-endian bytes, through a small buffer.
pub(super) fn hash_values(hasher: &mut blake3::Hasher, values: &[f32]) {
    let mut buffer = Vec::with_capacity(64 * 1024);
    for chunk in values.chunks(16 * 1024) {
        buffer.clear();
        buffer.extend(chunk.iter().flat_map(|value| value.to_le_bytes()));
        hasher.update(&buffer);
    }
}
