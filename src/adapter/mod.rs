//! Adapters: what 26 bytes mean.
//!
//! An adapter is a vector of numbers, a [`Scheme`] that says how they become an `r x r` core for every adapted linear (a *site*),
//! and the basis (U, S, V of the frozen weights, signs fixed) under which they were made, named by its fingerprint.

#[allow(clippy::module_inception)] // the room is named after what it holds
mod adapter;
mod basis;
mod cache;
pub mod codec;
mod cores;
mod fingerprint;
#[cfg(test)]
pub(crate) mod fixtures;
mod frame;
pub mod peft;
mod projection;
mod pullback;
pub mod reference;
mod registry;
mod scheme;
mod signs;
mod sites;
mod svd;

pub use crate::kernel::Cores;
pub use adapter::{Adapter, Facts, Interner, cache_salt};
pub use basis::{AGREEMENT, Agreement, Basis, BasisError, SiteBasis, Unstable, internal_rank};
pub use cache::{BasisCache, Loaded, ModelFiles, Origin};
pub use codec::{CodecError, NumberType};
pub use cores::{ExpandError, Expander};
pub use fingerprint::of_weights as fingerprint_of_weights;
pub use frame::{Frame, FrameError, MARGIN, Turn};
pub use projection::projection;
pub use registry::{Lease, MAX_NAME, Registry, RegistryError, check_name};
pub use scheme::{
    Assignment, Convention, MAX_NUMBERS, MAX_PROJECTION_VALUES, MAX_RANK, MAX_U, ProjectionDtype, Scheme, SchemeError,
    Targets, Ties,
};
pub use signs::{SignMask, SignMaskError};
pub use sites::{SiteKind, Sites};
