//! How tenants take turns in the engine.

use std::num::NonZeroU32;

use crate::{
    engine::{Share, ShareKey},
    types::TenantId,
};

/// Whose turn the sequences of a tenant wait for, and its weight beside others: completions and rollouts alike.
pub(super) fn share_of(tenant: TenantId) -> Share {
    Share { key: ShareKey(tenant.0.cast_unsigned()), weight: weight_of(tenant) }
}

/// The one place where a tenant's weight is chosen.
fn weight_of(_tenant: TenantId) -> NonZeroU32 {
    NonZeroU32::MIN
}
