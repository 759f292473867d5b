//! Adapters: what 26 bytes mean.
//!
//! An adapter is a vector of numbers, a [`Scheme`] that says how they become an `r x r` core for every adapted linear (a *site*),
//! and the basis (U, S, V of the frozen weights, signs fixed) under which they were made, named by its fingerprint.

mod sites;

pub use crate::kernel::Cores;
pub use sites::{SiteKind, Sites};
