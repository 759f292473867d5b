//! Files of `/v1/files`: data sets that are uploaded once and used by many jobs.

use super::{JobRetry, jobs::job_key, prepare::check_file};
use crate::{
    service::{Error, ErrorKind, Service, adapters::store_error, completion::blocking},
    store::{FileRecord, NewFile, StoreError},
    tenant::Caller,
};

/// Characters of a file's name.
pub const MAX_FILENAME: usize = 255;

impl Service {
    /// Keeps a file, after every line was checked. Under the client's `key` it is kept once.
    ///
    /// # Errors
    /// 400 that names the field and the line; 429 when the tenant's files would be too large together.
    pub async fn upload_file(
        &self,
        caller: &Caller,
        filename: &str,
        purpose: &str,
        bytes: Vec<u8>,
        key: Option<String>,
    ) -> Result<FileRecord, Error> {
        if purpose != "fine-tune" {
            return Err(Error::invalid("purpose", "'purpose' must be 'fine-tune'; other files are not kept."));
        }
        let filename: String = filename.chars().filter(|c| !c.is_control()).take(MAX_FILENAME).collect();
        let hash = request_hash(&filename, &bytes);
        let retry = key.map(|key| JobRetry { route: "POST /v1/files", key, request_hash: hash });
        let key = retry.map(job_key).transpose()?;
        if let Some(key) = &key {
            let known = self.store.kept_answer(caller.tenant, key.route, &key.key, &key.request_hash).await;
            if let Some(id) = known.map_err(|error| store_error(error, ""))? {
                return self.file(caller, &id).await;
            }
        }
        let config = self.training()?.config();
        let (limits, most_of_tenant) = (config.data, config.files_of_tenant);
        let bytes = blocking(move || check_file(&bytes, limits).map(|()| bytes)).await?;
        let new = NewFile {
            id: format!("file-{}", uuid::Uuid::now_v7().simple()),
            tenant: caller.tenant,
            filename,
            purpose: purpose.to_owned(),
            data: bytes,
            most_of_tenant,
            room: self.accounts.of(caller.tenant).limits().room(),
            key,
        };
        self.store.by(caller.actor()).put_file(new).await.map_err(|error| file_error(error, ""))
    }

    /// The caller's files, newest first: at most `limit` of those older than the file `after`; and whether there are more.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn files(
        &self,
        caller: &Caller,
        after: Option<&str>,
        limit: u32,
    ) -> Result<(Vec<FileRecord>, bool), Error> {
        if after.is_some_and(|id| possible(id).is_err()) {
            return Ok((Vec::new(), false));
        }
        let mut files = self.store.files(caller.tenant, after, limit + 1).await.map_err(Error::store)?;
        let more = files.len() > limit as usize;
        files.truncate(limit as usize);
        Ok((files, more))
    }

    /// A file of the caller's.
    ///
    /// # Errors
    /// 404 file_not_found.
    pub async fn file(&self, caller: &Caller, id: &str) -> Result<FileRecord, Error> {
        possible(id)?;
        self.store.file(caller.tenant, id).await.map_err(|error| file_error(error, id))
    }

    /// What is in a file of the caller's.
    ///
    /// # Errors
    /// 404 file_not_found.
    pub async fn file_data(&self, caller: &Caller, id: &str) -> Result<Vec<u8>, Error> {
        possible(id)?;
        self.store.file_data(caller.tenant, id).await.map_err(|error| file_error(error, id))
    }

    /// Erases a file of the caller's. Jobs that were made of it have their own copy until they end.
    ///
    /// # Errors
    /// 404 file_not_found.
    pub async fn delete_file(&self, caller: &Caller, id: &str) -> Result<(), Error> {
        possible(id)?;
        self.store.by(caller.actor()).delete_file(caller.tenant, id).await.map_err(|error| file_error(error, id))
    }
}

/// Of a form's parts: its boundary is another one each time.
fn request_hash(filename: &str, bytes: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(filename.len() as u64).to_le_bytes()).update(filename.as_bytes()).update(bytes);
    *hasher.finalize().as_bytes()
}

/// An id that cannot be is one that is not.
fn possible(id: &str) -> Result<(), Error> {
    let digits = id.strip_prefix("file-").filter(|digits| digits.len() == 32);
    let fits = digits.is_some_and(|digits| digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')));
    if fits { Ok(()) } else { Err(file_error(StoreError::FileNotFound, id)) }
}

fn file_error(error: StoreError, id: &str) -> Error {
    match error {
        StoreError::FileNotFound => {
            let shown: String = id.chars().filter(|c| !c.is_control()).take(64).collect();
            let message = format!("The file '{shown}' does not exist or you do not have access to it.");
            Error::new(ErrorKind::NotFound, message).with_code("file_not_found")
        }
        StoreError::FilesFull => {
            let message =
                "Your files would be larger together than this server keeps for one tenant; delete some first.";
            Error::new(ErrorKind::RateLimited, message).with_code("insufficient_quota").with_param("file")
        }
        other => store_error(other, ""),
    }
}
