//! Reading adapters out of rows, on a connection of the pool or within the writer's transaction.

use std::sync::Arc;

use sqlx::{AnyConnection, Row as _, any::AnyRow};

use super::{
    AdapterRecord, Contents, Facts, Result, StoreError,
    ask::{self, text},
};
use crate::{
    tenant::Bound,
    types::{AdapterId, Fingerprint, Generation, TenantId},
};

/// Adapters with owner and current generation, as [`record`] reads them.
macro_rules! select_records {
    ($condition:literal) => {
        concat!(
            "SELECT a.id, a.tenant, t.name, a.name, a.public, a.metadata, a.created_at, a.updated_at, \
             g.generation, g.data, f.dtype, f.scheme, f.frame, f.fingerprint, f.forced_onto \
             FROM adapters a JOIN tenants t ON t.id = a.tenant \
             JOIN generations g ON g.adapter = a.id AND g.seq = a.seq JOIN facts f ON f.id = g.facts \
             WHERE a.deleted = 0 AND ",
            $condition
        )
    };
}
pub(super) use select_records;

/// Generations, each with the bytes that its owner is charged: its numbers, and the frame of an imported checkpoint, which is shared but may be a thousand times
/// as large.
macro_rules! select_sizes {
    ($condition:literal) => {
        concat!(
            "SELECT g.generation, CAST(OCTET_LENGTH(g.data) + COALESCE(OCTET_LENGTH(f.frame), 0) AS BIGINT) AS bytes \
             FROM generations g LEFT JOIN facts f ON f.id = g.facts WHERE ",
            $condition
        )
    };
}
pub(super) use select_sizes;

/// A row of [`select_records`].
pub(super) fn record(row: &AnyRow) -> Result<AdapterRecord> {
    Ok(AdapterRecord {
        id: AdapterId(row.try_get(0)?),
        tenant: TenantId(row.try_get(1)?),
        owner: text(row, 2)?.into(),
        name: text(row, 3)?.to_owned(),
        public: row.try_get::<i64, _>(4)? != 0,
        metadata: text(row, 5)?.to_owned(),
        created_at: row.try_get(6)?,
        updated_at: row.try_get(7)?,
        contents: contents(row, 8)?,
    })
}

/// Columns generation, data, and those of [`facts`], from a position on.
pub(super) fn contents(row: &AnyRow, at: usize) -> Result<Contents> {
    Ok(Contents { generation: generation(row, at)?, data: row.try_get(at + 1)?, facts: Arc::new(facts(row, at + 2)?) })
}

/// Columns dtype, scheme, frame, fingerprint, forced_onto, from a position on.
pub(super) fn facts(row: &AnyRow, at: usize) -> Result<Facts> {
    Ok(Facts { frame: row.try_get(at + 2)?, ..facts_without_frame(row, at, at + 3)? })
}

/// Columns dtype and scheme from one position on, fingerprint and forced_onto from another.
pub(super) fn facts_without_frame(row: &AnyRow, at: usize, bases: usize) -> Result<Facts> {
    let fingerprint = |bytes: &[u8]| array(bytes, "fingerprint").map(Fingerprint);
    let forced_onto: Option<&[u8]> = row.try_get(bases + 1)?;
    Ok(Facts {
        dtype: text(row, at)?.to_owned(),
        scheme: text(row, at + 1)?.to_owned(),
        frame: None,
        fingerprint: fingerprint(row.try_get(bases)?)?,
        forced_onto: forced_onto.map(fingerprint).transpose()?,
    })
}

/// A column that holds a generation.
pub(super) fn generation(row: &AnyRow, at: usize) -> Result<Generation> {
    Ok(Generation(array(row.try_get(at)?, "generation")?))
}

/// A column that holds what was set for a tenant.
pub(super) fn bound(row: &AnyRow, at: usize) -> Result<Option<Bound>> {
    let number: Option<i64> = row.try_get(at)?;
    number.map(Bound::from_number).transpose().map_err(|_| StoreError::Corrupt("limit"))
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
    let query = sqlx::query(select_records!("a.tenant = $1 AND a.name = $2")).bind(tenant.0).bind(name);
    ask::row(connection, query).await?.as_ref().map(record).transpose()
}

/// The number of a tenant's adapter of that name, damaged or not.
pub(super) async fn id_of(connection: &mut AnyConnection, tenant: TenantId, name: &str) -> Result<Option<i64>> {
    let query = sqlx::query("SELECT id FROM adapters WHERE tenant = $1 AND name = $2 AND deleted = 0");
    let row = query.bind(tenant.0).bind(name).fetch_optional(connection).await?;
    Ok(row.map(|row| row.try_get(0)).transpose()?)
}

/// Has a tenant an adapter of that name, damaged or not?
pub(super) async fn has_name(connection: &mut AnyConnection, tenant: TenantId, name: &str) -> Result<bool> {
    Ok(id_of(connection, tenant, name).await?.is_some())
}
