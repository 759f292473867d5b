//! What a caller may name in `model`.

use super::{Error, Service, adapters::store_error};
use crate::{
    store::{AdapterRecord, StoreError},
    tenant::Caller,
};

/// Adapters of one page of the store.
const PAGE: u32 = 1000;

/// Something that `model` may name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Model {
    /// The base.
    Base,
    /// An adapter that the caller sees.
    Adapter {
        /// Its name.
        name: String,
        /// The name of the tenant that owns it.
        owner: String,
        /// Unix seconds.
        created_at: i64,
    },
}

impl From<AdapterRecord> for Model {
    fn from(record: AdapterRecord) -> Self {
        let AdapterRecord { name, owner, created_at, .. } = record;
        Self::Adapter { name, owner: owner.to_string(), created_at }
    }
}

impl Service {
    /// The base (unless `after` names something), then the adapters that the caller sees in the order of names, at most `limit`
    /// models together; and whether there are more.
    pub async fn models(
        &self,
        caller: &Caller,
        after: Option<&str>,
        limit: usize,
    ) -> Result<(Vec<Model>, bool), Error> {
        let mut models: Vec<Model> = if after.is_none() { vec![Model::Base] } else { Vec::new() };
        // After the base come all adapters.
        let mut last = after.filter(|&after| after != self.base.model_id).map(str::to_owned);
        // One more than asked for says whether there are more.
        while models.len() <= limit {
            let page = self.store.list_adapters(caller.tenant, "", last.as_deref(), PAGE).await;
            let page = page.map_err(|error| store_error(error, ""))?;
            let full = page.len() == PAGE as usize;
            last = page.last().map(|record| record.name.clone());
            models.extend(page.into_iter().map(Model::from));
            if !full {
                break;
            }
        }
        let more = models.len() > limit;
        models.truncate(limit);
        Ok((models, more))
    }

    /// The base by its id, or an adapter by `name` or `base:name`.
    ///
    /// # Errors
    /// 404 model_not_found; 500 adapter_damaged.
    pub async fn model(&self, caller: &Caller, id: &str) -> Result<Model, Error> {
        let base = &self.base.model_id;
        if id == base {
            return Ok(Model::Base);
        }
        let name = id.strip_prefix(base.as_str()).and_then(|rest| rest.strip_prefix(':')).unwrap_or(id);
        self.check_readable(caller, name)?;
        match self.store.adapter(caller.tenant, name).await {
            Ok(record) => Ok(record.into()),
            Err(StoreError::AdapterNotFound) => Err(Error::model_not_found(id)),
            Err(error) => Err(store_error(error, name)),
        }
    }
}
