//! How tenants take turns in the engine.

use std::num::NonZeroU32;

use crate::{
    engine::{Share, ShareKey},
    tenant::Limits,
    types::TenantId,
};

/// Whose turn the sequences of a tenant wait for, and its weight beside others: completions and rollouts alike.
pub(super) fn share_of(tenant: TenantId, limits: &Limits) -> Share {
    let weight = NonZeroU32::new(limits.weight).unwrap_or(NonZeroU32::MIN);
    Share { key: ShareKey(tenant.0.cast_unsigned()), weight }
}
