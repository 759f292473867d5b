//! Reading adapters out of rows, on a connection of the pool or within the writer's transaction.

use std::sync::Arc;

use sqlx::{AnyConnection, Row as _, any::AnyRow};

use super::{AdapterRecord, Contents, Result, StoreError};
use crate::types::{AdapterId, Fingerprint, Generation, TenantId};

/// Adapters with owner and current generation, as [`record`] reads them.
macro_rules! select_records {
    ($condition:literal) => {
        concat!(
            "SELECT a.id, a.tenant, t.name, a.name, a.public, a.metadata, a.created_at, a.updated_at, \
             g.generation, g.data, g.dtype, s.json, m.mask, g.fingerprint, g.forced_onto \
             FROM adapters a JOIN tenants t ON t.id = a.tenant \
             JOIN generations g ON g.adapter = a.id AND g.seq = a.seq \
             JOIN schemes s ON s.id = g.scheme LEFT JOIN signs m ON m.id = g.signs \
             WHERE a.deleted = 0 AND ",
            $condition
        )
    };
}
pub(super) use select_records;

/// A row of [`select_records`].
pub(super) fn record(row: &AnyRow) -> Result<AdapterRecord> {
    Ok(AdapterRecord {
        id: AdapterId(row.try_get(0)?),
        tenant: TenantId(row.try_get(1)?),
        owner: row.try_get::<&str, _>(2)?.into(),
        name: row.try_get(3)?,
        public: row.try_get::<i64, _>(4)? != 0,
        metadata: row.try_get(5)?,
        created_at: row.try_get(6)?,
        updated_at: row.try_get(7)?,
        contents: contents(row, 8)?,
    })
}

/// Columns generation, data, dtype, scheme, mask, fingerprint, forced_onto, from a position on.
pub(super) fn contents(row: &AnyRow, at: usize) -> Result<Contents> {
    Ok(Contents {
        generation: Generation(array(row.try_get(at)?, "generation")?),
        data: row.try_get(at + 1)?,
        dtype: row.try_get(at + 2)?,
        scheme: row.try_get::<&str, _>(at + 3)?.into(),
        signs: row.try_get::<Option<&[u8]>, _>(at + 4)?.map(Arc::from),
        fingerprint: Fingerprint(array(row.try_get(at + 5)?, "fingerprint")?),
        forced_onto: forced_onto(row.try_get(at + 6)?)?,
    })
}

/// The base that an adapter was forced onto.
pub(super) fn forced_onto(bytes: Option<&[u8]>) -> Result<Option<Fingerprint>> {
    bytes.map(|bytes| Ok(Fingerprint(array(bytes, "fingerprint")?))).transpose()
}

/// A hash of a known length.
pub(super) fn array<const N: usize>(bytes: &[u8], what: &'static str) -> Result<[u8; N]> {
    bytes.try_into().map_err(|_| StoreError::Corrupt(what))
}

/// A tenant's own adapter.
pub(super) async fn own_record(
    connection: &mut AnyConnection,
    tenant: TenantId,
    name: &str,
) -> Result<Option<AdapterRecord>> {
    let row = sqlx::query(select_records!("a.tenant = $1 AND a.name = $2"))
        .bind(tenant.0)
        .bind(name)
        .fetch_optional(connection)
        .await?;
    row.as_ref().map(record).transpose()
}
