//! Adapters: upload, read, replace, delete.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::{
    Error, ErrorKind, Service, Upload, completion::blocking, limits::exhausted, resolve::incompatible, upload,
};
use crate::{
    adapter::{Adapter, Facts, Scheme, peft},
    store::{AdapterRecord, Contents, GenerationRecord, Idempotency, OnConflict, StoreError, Stored},
    tenant::{Caller, check_adapter_name},
    types::{Fingerprint, Generation},
};

/// What a generation's numbers are.
#[derive(Debug, Clone, PartialEq)]
pub struct Numbers {
    /// The hash of numbers, scheme, frame and base.
    pub generation: Generation,
    /// How many bytes.
    pub bytes: usize,
    /// How they are written.
    pub dtype: String,
    /// The scheme's name, or its description.
    pub scheme: Value,
    /// The base that they are for.
    pub fingerprint: Fingerprint,
    /// Taken by force: for another base than this server's.
    pub approximate: bool,
    /// This server cannot run them.
    pub incompatible: bool,
}

/// An adapter as a client sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterInfo {
    /// `adapter-` and 16 hexadecimal digits. A name that was deleted and uploaded again has another.
    pub id: String,
    /// The name.
    pub name: String,
    /// The current generation.
    pub numbers: Numbers,
    /// The name of the tenant that owns it.
    pub owner: String,
    /// May every tenant use it?
    pub public: bool,
    /// What the owner wrote.
    pub metadata: Map<String, Value>,
    /// Unix seconds.
    pub created_at: i64,
}

/// One of the generations that an adapter has had.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationInfo {
    /// What it is.
    pub numbers: Numbers,
    /// Does the name point at it?
    pub current: bool,
    /// Unix seconds.
    pub created_at: i64,
}

/// A client's own key for a request, and how to write down the answer that it shall get each time.
pub struct Retry {
    /// The header's value.
    pub key: String,
    /// The body of the answer.
    pub render: fn(AdapterInfo) -> String,
}

/// What became of an upload.
#[derive(Debug)]
pub enum Uploaded {
    /// It was stored.
    New(Box<AdapterInfo>),
    /// It was stored before under the same key, and this was the answer's body.
    Before(String),
}

/// A named scheme on this base.
#[derive(Debug, Clone, PartialEq)]
pub struct SchemeInfo {
    /// Its name.
    pub name: &'static str,
    /// Its description.
    pub scheme: Value,
    /// How many numbers an adapter has.
    pub numbers: usize,
    /// Does this server take such adapters (`--rank`)?
    pub served: bool,
}

/// The route's name in the table of answers.
const UPLOAD_ROUTE: &str = "POST /adapters";
/// Longest key of a client.
const MAX_RETRY_KEY: usize = 255;

impl Service {
    /// Stores an upload.
    ///
    /// # Errors
    /// 400, 403, 409 or 422, each naming the field.
    pub async fn upload(
        self: &Arc<Self>,
        caller: &Caller,
        upload: Upload,
        retry: Option<Retry>,
    ) -> Result<Uploaded, Error> {
        let idempotency = match retry {
            None => None,
            Some(retry) => {
                let idempotency = self.idempotency(retry, upload.digest())?;
                let Idempotency { route, key, request_hash, .. } = &idempotency;
                let kept = self.store.kept_answer(caller.tenant, route, key, request_hash).await;
                if let Some(answer) = kept.map_err(|error| store_error(error, ""))? {
                    return Ok(Uploaded::Before(answer));
                }
                Some(idempotency)
            }
        };
        let mut new = upload::prepare_apart(self.clone(), caller.clone(), upload, None).await?;
        new.idempotency = idempotency;
        let name = new.name.clone();
        match self.store.by(caller.actor()).put_adapter(new).await.map_err(|error| store_error(error, &name))? {
            Stored::New { record, .. } => Ok(Uploaded::New(Box::new(self.info(record)?))),
            Stored::Replayed(answer) => Ok(Uploaded::Before(answer)),
        }
    }

    fn idempotency(self: &Arc<Self>, retry: Retry, request_hash: [u8; 32]) -> Result<Idempotency, Error> {
        if !(1..=MAX_RETRY_KEY).contains(&retry.key.len()) {
            let message = format!("'Idempotency-Key' has 1 to {MAX_RETRY_KEY} characters.");
            return Err(Error::invalid("Idempotency-Key", message));
        }
        let (service, render) = (self.clone(), retry.render);
        // A record that was just written can be read; should it not, the retry finds an empty answer and the first none at all.
        let respond = move |record: &AdapterRecord| service.info(record.clone()).map(render).unwrap_or_default();
        Ok(Idempotency { route: UPLOAD_ROUTE, key: retry.key, request_hash, respond: Arc::new(respond) })
    }

    /// Stores uploads in order in one transaction; each succeeds or fails by itself, and by then it is on disk. An upload that was
    /// malformed comes as its error and is answered in its place.
    ///
    /// # Errors
    /// Only the database's: then none was stored.
    pub async fn upload_many(
        &self,
        caller: &Caller,
        uploads: Vec<Result<Upload, Error>>,
    ) -> Result<Vec<Result<Generation, Error>>, Error> {
        let mut prepared = Vec::with_capacity(uploads.len());
        let mut answers = Vec::with_capacity(uploads.len());
        for upload in uploads {
            match upload.and_then(|upload| self.prepare(caller, upload, None)) {
                Ok(new) => {
                    answers.push(Ok(new.contents.generation));
                    prepared.push(new);
                }
                Err(error) => answers.push(Err(error)),
            }
        }
        let names: Vec<String> = prepared.iter().map(|new| new.name.clone()).collect();
        let store = self.store.by(caller.actor());
        let stored = store.put_adapters(prepared).await.map_err(|error| store_error(error, ""))?;
        let written = answers.iter_mut().filter(|answer| answer.is_ok());
        for ((answer, outcome), name) in written.zip(stored).zip(names) {
            if let Err(error) = outcome {
                *answer = Err(store_error(error, &name));
            }
        }
        Ok(answers)
    }

    /// Gives an adapter of the caller's another generation; with `expected`, only if that is the current one.
    ///
    /// # Errors
    /// 404, 412 generation_mismatch, and those of [`Self::upload`].
    pub async fn replace(
        self: &Arc<Self>,
        caller: &Caller,
        name: &str,
        mut upload: Upload,
        expected: Option<Generation>,
    ) -> Result<AdapterInfo, Error> {
        possible(name)?;
        match &upload.name {
            Some(other) if other != name => {
                return Err(Error::invalid(
                    "name",
                    "'name' differs from the one in the path; an adapter keeps its name.",
                ));
            }
            _ => upload.name = Some(name.to_owned()),
        }
        let conflict = Some(OnConflict::Replace(expected));
        let new = upload::prepare_apart(self.clone(), caller.clone(), upload, conflict).await?;
        self.check_owned(caller, name).await?;
        match self.store.by(caller.actor()).put_adapter(new).await.map_err(|error| store_error(error, name))? {
            Stored::New { record, .. } => self.info(record),
            Stored::Replayed(_) => Err(Error::internal("an upload without a key was replayed")),
        }
    }

    /// Erases an adapter of the caller's: its generations and their cached KV. Running requests end as they began.
    ///
    /// # Errors
    /// 404.
    pub async fn delete_adapter(&self, caller: &Caller, name: &str) -> Result<(), Error> {
        possible(name)?;
        let store = self.store.by(caller.actor());
        store.delete_adapter(caller.tenant, name).await.map_err(|error| store_error(error, name))?;
        Ok(())
    }

    /// Adapters that the caller sees, by name: at most `limit` after `after` (a name, or an id of the answers), and whether there
    /// are more.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn adapters(
        &self,
        caller: &Caller,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<(Vec<AdapterInfo>, bool), Error> {
        let by_id = match after.and_then(|id| self.ids.parse(id)) {
            Some(id) => self.store.adapter_name(caller.tenant, id).await.ok(),
            None => None,
        };
        let mut after = by_id.or_else(|| after.map(str::to_owned));
        loop {
            let mut records = self
                .store
                .list_adapters(caller.tenant, prefix, after.as_deref(), limit + 1)
                .await
                .map_err(|error| store_error(error, ""))?;
            let more = records.len() > limit as usize;
            records.truncate(limit as usize);
            after = records.last().map(|record| record.name.clone());
            // Damaged ones were named in the log when they were found, and are no reason to show none.
            records.retain(|record| self.library.adapter_of(&record.contents).is_ok());
            // An empty page would be taken for the end.
            if !more || !records.is_empty() {
                return Ok((records.into_iter().map(|record| self.info(record)).collect::<Result<_, _>>()?, more));
            }
        }
    }

    /// An adapter that the caller sees.
    ///
    /// # Errors
    /// 404.
    pub async fn adapter(&self, caller: &Caller, name: &str) -> Result<AdapterInfo, Error> {
        self.info(self.record(caller, name).await?)
    }

    /// An adapter that the caller sees, and its current numbers.
    ///
    /// # Errors
    /// 404.
    pub async fn weights(&self, caller: &Caller, name: &str) -> Result<(AdapterInfo, Arc<Adapter>), Error> {
        let record = self.record(caller, name).await?;
        let adapter = self.read(&record.contents, name)?;
        Ok((self.info(record)?, adapter))
    }

    /// A zip of the adapter as a PEFT checkpoint.
    ///
    /// # Errors
    /// 422 for an adapter of another base, 400 for one that PEFT has no words for.
    pub async fn export(self: &Arc<Self>, adapter: Arc<Adapter>) -> Result<Vec<u8>, Error> {
        if !self.library.is_compatible(&adapter) {
            return Err(incompatible(adapter.facts().fingerprint, self.library.fingerprint));
        }
        let service = self.clone();
        let zip = move || {
            let expander = &service.library.expander;
            let files = peft::export(&adapter, expander.sites(), expander.basis(), &service.base.model_id);
            files.and_then(|files| files.to_zip()).map_err(|error| match error {
                peft::PeftError::NotExpressible(_) => Error::invalid("format", format!("The adapter {error}.")),
                error => upload::peft_error(&error),
            })
        };
        blocking(zip).await
    }

    /// Generations of an adapter of the caller's, newest first: at most `limit` of those uploaded before `after`, and whether there are more.
    ///
    /// # Errors
    /// 404.
    pub async fn generations(
        &self,
        caller: &Caller,
        name: &str,
        after: Option<Generation>,
        limit: u32,
    ) -> Result<(Vec<GenerationInfo>, bool), Error> {
        let own = self.store_own(caller, name).await?.ok_or_else(|| Error::adapter_not_found(name, None))?;
        let records = self.store.generations(own.id, after, limit + 1).await;
        let mut records = records.map_err(|error| store_error(error, name))?;
        let more = records.len() > limit as usize;
        records.truncate(limit as usize);
        // Damaged ones are left out, as of any list.
        Ok((records.iter().filter_map(|record| self.generation(record, name).ok()).collect(), more))
    }

    /// Points a name of the caller's at a generation that it had before.
    ///
    /// # Errors
    /// 404 when there is no such adapter or generation.
    pub async fn rollback(&self, caller: &Caller, name: &str, generation: Generation) -> Result<AdapterInfo, Error> {
        possible(name)?;
        match self.store.by(caller.actor()).rollback(caller.tenant, name, generation).await {
            Ok((record, _)) => self.info(record),
            Err(StoreError::GenerationNotFound) => Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "The adapter '{name}' has no generation {generation}: it never had it, or has had too many since."
                ),
            )
            .with_code("adapter_not_found")
            .with_param("generation")),
            Err(error) => Err(store_error(error, name)),
        }
    }

    /// The named schemes, the default first.
    pub fn schemes(&self) -> Vec<SchemeInfo> {
        let info = |name: &'static str| {
            let scheme = Scheme::preset(name)?;
            Some(SchemeInfo {
                name,
                scheme: scheme.to_full_json(),
                numbers: scheme.numbers(&self.base.sites),
                served: scheme.validate(&self.base.sites, self.base.rank).is_ok(),
            })
        };
        Scheme::PRESETS.into_iter().filter_map(info).collect()
    }

    /// What a name means to the caller. An own adapter that is damaged is an error, whatever else has the name; of others' there is none.
    async fn record(&self, caller: &Caller, name: &str) -> Result<AdapterRecord, Error> {
        self.check_readable(caller, name)?;
        let record = self.store.adapter(caller.tenant, name).await.map_err(|error| store_error(error, name))?;
        if record.tenant != caller.tenant && self.library.adapter_of(&record.contents).is_err() {
            return Err(Error::adapter_not_found(name, None));
        }
        Ok(record)
    }

    async fn store_own(&self, caller: &Caller, name: &str) -> Result<Option<AdapterRecord>, Error> {
        self.check_readable(caller, name)?;
        self.store.own_adapter(caller.tenant, name).await.map_err(|error| store_error(error, name))
    }

    /// Has the caller an adapter of that name? A damaged one counts: it can be replaced.
    ///
    /// # Errors
    /// 404.
    async fn check_owned(&self, caller: &Caller, name: &str) -> Result<(), Error> {
        match self.store.own_adapter(caller.tenant, name).await {
            Ok(Some(_)) | Err(StoreError::AdapterDamaged) => Ok(()),
            Ok(None) => Err(Error::adapter_not_found(name, None)),
            Err(error) => Err(store_error(error, name)),
        }
    }

    /// The adapter that a record of that name describes.
    fn read(&self, contents: &Contents, name: &str) -> Result<Arc<Adapter>, Error> {
        self.library.adapter_of(contents).map_err(|error| damaged(name, &error))
    }

    fn info(&self, record: AdapterRecord) -> Result<AdapterInfo, Error> {
        Ok(AdapterInfo {
            id: self.ids.show(record.id),
            numbers: self.numbers(&record.contents, &record.name)?,
            owner: record.owner.to_string(),
            public: record.public,
            metadata: serde_json::from_str(&record.metadata).map_err(|error| damaged(&record.name, &error))?,
            created_at: record.created_at,
            name: record.name,
        })
    }

    fn generation(&self, record: &GenerationRecord, name: &str) -> Result<GenerationInfo, Error> {
        let facts = self.library.facts_of(&record.facts).map_err(|error| damaged(name, &error))?.0;
        let numbers = self.described(record.generation, record.bytes, &facts);
        Ok(GenerationInfo { numbers, current: record.current, created_at: record.created_at })
    }

    fn numbers(&self, contents: &Contents, name: &str) -> Result<Numbers, Error> {
        let adapter = self.read(contents, name)?;
        Ok(self.described(contents.generation, contents.data.len(), adapter.facts()))
    }

    fn described(&self, generation: Generation, bytes: usize, facts: &Facts) -> Numbers {
        let served = facts.scheme.validate(&self.base.sites, self.base.rank).is_ok();
        Numbers {
            generation,
            bytes,
            dtype: facts.dtype.name().to_owned(),
            scheme: facts.scheme.to_json(),
            fingerprint: facts.fingerprint,
            approximate: facts.approximate,
            incompatible: !(served && self.library.is_of_this_base(facts)),
        }
    }
}

/// The caller's adapter cannot be read; why goes to the log.
fn damaged(name: &str, cause: &dyn std::fmt::Display) -> Error {
    tracing::error!(name, %cause, "an adapter in the store cannot be read");
    Error::adapter_damaged(name)
}

/// A name that cannot be is one that is not: it never reaches the writer, whose transaction others share.
fn possible(name: &str) -> Result<(), Error> {
    check_adapter_name(name).map_err(|_| Error::adapter_not_found(name, None))
}

/// The store's error in the words of the API.
pub(super) fn store_error(error: StoreError, name: &str) -> Error {
    if let Some(error) = exhausted(&error) {
        return error;
    }
    let conflict = |message: String| Error::new(ErrorKind::Conflict, message);
    match error {
        StoreError::NameTaken => {
            conflict(format!("You have an adapter named '{name}'; 'on_conflict': 'new_generation' replaces it."))
                .with_code("name_taken")
                .with_param("name")
        }
        StoreError::PublicNameTaken => conflict(format!("Another tenant has a public adapter named '{name}'."))
            .with_code("name_taken")
            .with_param("name"),
        StoreError::NameReserved => conflict(format!(
            "A training job of yours will publish an adapter named '{name}'; it has reserved the name."
        ))
        .with_code("name_taken")
        .with_param("name"),
        StoreError::PublicAdapter => {
            Error::new(ErrorKind::Forbidden, format!("'{name}' is public: only an admin can change or delete it."))
        }
        StoreError::AdapterNotFound => Error::adapter_not_found(name, None),
        StoreError::GenerationMismatch { current } => {
            Error::new(ErrorKind::PreconditionFailed, format!("The current generation of '{name}' is {current}."))
                .with_code("generation_mismatch")
                .with_param("If-Match")
        }
        StoreError::IdempotencyMismatch => conflict("The 'Idempotency-Key' came before with another request.".into())
            .with_code("idempotency_key_reused")
            .with_param("Idempotency-Key"),
        StoreError::Closed => Error::new(ErrorKind::Unavailable, "The server is shutting down.").with_code("draining"),
        StoreError::TenantNotFound => {
            Error::new(ErrorKind::Unauthenticated, "The key's tenant is gone.").with_code("invalid_api_key")
        }
        StoreError::AdapterDamaged => Error::adapter_damaged(name),
        StoreError::AnswerDamaged => {
            let message = "The answer that was kept for this 'Idempotency-Key' is damaged in the server's store.";
            Error::new(ErrorKind::Internal, message).with_param("Idempotency-Key")
        }
        other => Error::store(other),
    }
}
