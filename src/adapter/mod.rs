//! Adapters: what 26 bytes mean.
//!
//! An adapter is a vector of numbers, a [`Scheme`] that says how they become an `r x r` core for every adapted linear (a *site*),
//! and the basis (U, S, V of the frozen weights, signs fixed) under which they were made, named by its fingerprint.

mod basis;
mod cache;
pub mod codec;
mod fingerprint;
#[cfg(test)]
pub(crate) mod fixtures;
mod projection;
pub mod reference;
mod scheme;
mod signs;
mod sites;
mod svd;

pub use basis::{AGREEMENT, Agreement, Basis, BasisError, SiteBasis, Unstable};
pub use cache::{BasisCache, Loaded, ModelFiles, Origin};
pub use codec::{CodecError, NumberType};
pub use fingerprint::of_weights as fingerprint_of_weights;
pub use projection::projection;
pub use scheme::{Assignment, Convention, ProjectionDtype, Scheme, SchemeError, Targets, Ties};
pub use signs::{SignMask, SignMaskError};
pub use sites::{SiteKind, Sites};
