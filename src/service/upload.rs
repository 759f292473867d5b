//! An upload as a client sends it, checked and turned into what the store keeps.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Map, Value};

use super::{
    Error, ErrorKind, Service,
    completion::blocking,
    resolve::{decode_base64, incompatible, scheme_error},
};
use crate::{
    adapter::{
        Facts, NumberType, Scheme, codec,
        peft::{self, PeftError, PeftFiles},
    },
    store::{Contents, NewAdapter, OnConflict},
    tenant::{Caller, NameError, check_adapter_name},
    types::Fingerprint,
};

/// Bytes of an adapter's metadata, as JSON.
const MAX_METADATA: usize = 16 << 10;

/// An adapter's numbers, in one of the forms that the API takes.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// The bytes themselves.
    Raw(Bytes),
    /// The bytes in base64.
    Base64(String),
    /// The numbers, to be rounded once.
    Numbers(Vec<f64>),
    /// A PEFT checkpoint: `adapter_config.json` and `adapter_model.safetensors`.
    Peft {
        /// The first.
        config: Bytes,
        /// The second.
        model: Bytes,
    },
    /// A zip or a gzipped tar of those two files.
    Archive(Bytes),
}

/// What a client wants stored. Nothing is checked yet.
#[derive(Debug, Clone, PartialEq)]
pub struct Upload {
    /// The name; None when the client gave none.
    pub name: Option<String>,
    /// The numbers; None when the client gave none.
    pub content: Option<Content>,
    /// `bf16` (the default) or `f32`.
    pub dtype: Option<String>,
    /// A scheme's name or description; None is the default scheme.
    pub scheme: Option<Value>,
    /// Shown with the adapter.
    pub metadata: Option<Map<String, Value>>,
    /// Visible to every tenant; for admins.
    pub public: Option<bool>,
    /// The base that the numbers are for, 64 hexadecimal digits; None asserts this server's.
    pub fingerprint: Option<String>,
    /// Take numbers of another base.
    pub force: bool,
    /// `error` (the default) or `new_generation`.
    pub on_conflict: Option<String>,
}

impl Upload {
    /// A hash of everything in it, whatever form the request had.
    pub(super) fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        let mut put = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        match &self.content {
            None => put(b"none"),
            Some(Content::Raw(bytes)) => [&b"raw"[..], bytes].into_iter().for_each(&mut put),
            Some(Content::Base64(text)) => [&b"base64"[..], text.as_bytes()].into_iter().for_each(&mut put),
            Some(Content::Numbers(numbers)) => {
                put(b"numbers");
                numbers.iter().for_each(|number| put(&number.to_bits().to_le_bytes()));
            }
            Some(Content::Peft { config, model }) => [&b"peft"[..], config, model].into_iter().for_each(&mut put),
            Some(Content::Archive(bytes)) => [&b"archive"[..], bytes].into_iter().for_each(&mut put),
        }
        let Self { name, dtype, scheme, metadata, public, fingerprint, force, on_conflict, content: _ } = self;
        // Debug writes each value and its absence unmistakably.
        put(format!("{:?}", (name, dtype, scheme, metadata, public, fingerprint, force, on_conflict)).as_bytes());
        *hasher.finalize().as_bytes()
    }
}

/// What the numbers of an upload are.
struct Numbers {
    facts: Facts,
    bytes: Vec<u8>,
}

impl Service {
    /// Checks an upload. `conflict` decides about the name unless the upload says itself.
    ///
    /// # Errors
    /// 400 that names the field; 403 for a public adapter of a member; 409 for the base's name; 422 for another base.
    pub(super) fn prepare(
        &self,
        caller: &Caller,
        upload: Upload,
        conflict: Option<OnConflict>,
    ) -> Result<NewAdapter, Error> {
        let name = self.name_of(upload.name.as_deref())?;
        let on_conflict = match conflict {
            Some(conflict) => conflict,
            None => conflict_of(upload.on_conflict.as_deref())?,
        };
        if upload.public == Some(true) && !caller.is_admin() {
            return Err(
                Error::new(ErrorKind::Forbidden, "Only an admin can make an adapter public.").with_param("public")
            );
        }
        let metadata = upload.metadata.as_ref().map(metadata_text).transpose()?;
        let public = upload.public;
        let Numbers { facts, bytes } = self.numbers_of(upload)?;
        let stored = self.library.stored_facts(&facts);
        let numbers = facts.scheme.numbers(&self.base.sites);
        let adapter = self.library.interner.adapter(facts, &bytes, numbers).map_err(|error| bad_data(&error))?;
        let contents = Contents { generation: adapter.generation(), data: bytes, facts: stored };
        Ok(NewAdapter {
            tenant: caller.tenant,
            name,
            public,
            metadata,
            contents,
            on_conflict,
            may_change_public: caller.is_admin(),
            room: self.accounts.of(caller.tenant).limits().room(),
            idempotency: None,
        })
    }

    /// A name that an adapter may get.
    ///
    /// # Errors
    /// 400; 409 for the base's name.
    pub(super) fn name_of(&self, name: Option<&str>) -> Result<String, Error> {
        let name = name.ok_or_else(|| Error::invalid("name", "'name' is required."))?;
        check_adapter_name(name).map_err(name_error)?;
        if name == self.base.model_id {
            return Err(Error::new(ErrorKind::Conflict, format!("'{name}' is the base model's name."))
                .with_code("name_taken")
                .with_param("name"));
        }
        Ok(name.to_owned())
    }

    fn numbers_of(&self, upload: Upload) -> Result<Numbers, Error> {
        let missing = || Error::invalid("data", "The numbers are missing: give 'data' (base64) or 'numbers'.");
        match upload.content.clone().ok_or_else(missing)? {
            Content::Peft { config, model } => {
                let files = PeftFiles { config: config.into(), model: model.into() };
                self.imported(&upload, &files)
            }
            Content::Archive(bytes) => {
                let limit = self.max_checkpoint();
                let files = peft::read_archive(&bytes, limit).map_err(|error| peft_error(&error))?;
                self.imported(&upload, &files)
            }
            plain => self.plain(&upload, plain),
        }
    }

    /// Raw bytes, base64 or numbers.
    fn plain(&self, upload: &Upload, content: Content) -> Result<Numbers, Error> {
        let scheme = match &upload.scheme {
            None => Scheme::default(),
            Some(value) => Scheme::from_json(value).map_err(|error| scheme_error(&error, ""))?,
        };
        self.check_scheme(&scheme, "")?;
        let dtype = match upload.dtype.as_deref() {
            None => NumberType::Bf16,
            Some(name) => {
                NumberType::from_name(name).ok_or_else(|| Error::invalid("dtype", "'dtype' is 'bf16' or 'f32'."))?
            }
        };
        let count = scheme.numbers(&self.base.sites);
        let bytes = match content {
            Content::Base64(text) => {
                decode_base64(&text).ok_or_else(|| Error::invalid("data", "'data' is not base64."))?
            }
            Content::Numbers(numbers) => codec::encode_json(&numbers, dtype, count)
                .map_err(|error| Error::invalid("numbers", format!("'numbers': {error}.")))?,
            Content::Raw(bytes) | Content::Archive(bytes) | Content::Peft { model: bytes, .. } => bytes.into(),
        };
        codec::check(&bytes, dtype, count).map_err(|error| bad_data(&error))?;
        let (fingerprint, approximate) = self.base_of(upload)?;
        Ok(Numbers { facts: Facts { scheme, frame: None, fingerprint, dtype, approximate }, bytes })
    }

    /// A PEFT checkpoint. It carries its basis: whether it is of this base is seen and not asserted.
    fn imported(&self, upload: &Upload, files: &PeftFiles) -> Result<Numbers, Error> {
        if self.base.rank == 0 {
            return Err(Error::invalid("adapter_config", "This server serves no adapters (--rank 0)."));
        }
        for (given, field) in [(upload.scheme.is_some(), "scheme"), (upload.dtype.is_some(), "dtype")] {
            if given {
                return Err(Error::invalid(field, format!("'{field}' comes from the checkpoint; leave it out.")));
            }
        }
        let (fingerprint, approximate) = self.base_of(upload)?;
        let expander = &self.library.expander;
        let imported = peft::import(&files.config, &files.model, expander.sites(), expander.basis(), self.base.rank)
            .map_err(|error| peft_error(&error))?;
        let (scheme, frame, dtype) = (imported.scheme, imported.frame, imported.dtype);
        Ok(Numbers { facts: Facts { scheme, frame, fingerprint, dtype, approximate }, bytes: imported.bytes })
    }

    /// The base that an upload says it is for, and whether it is taken by force.
    fn base_of(&self, upload: &Upload) -> Result<(Fingerprint, bool), Error> {
        let ours = self.library.fingerprint;
        let Some(text) = &upload.fingerprint else { return Ok((ours, false)) };
        let theirs: Fingerprint =
            text.parse().map_err(|error| Error::invalid("fingerprint", format!("'fingerprint': {error}.")))?;
        if theirs != ours && !upload.force {
            return Err(incompatible(theirs, ours).with_param("fingerprint"));
        }
        Ok((theirs, theirs != ours))
    }

    /// The largest checkpoint that makes sense on this base, in bytes.
    pub fn max_checkpoint(&self) -> usize {
        peft::size_limit(&self.base.sites, self.base.rank) + (1 << 20)
    }
}

/// What a client wants done with a name that is taken.
///
/// # Errors
/// 400.
pub(super) fn conflict_of(word: Option<&str>) -> Result<OnConflict, Error> {
    match word {
        None | Some("error") => Ok(OnConflict::Error),
        Some("new_generation") => Ok(OnConflict::NewGeneration),
        Some(_) => Err(Error::invalid("on_conflict", "'on_conflict' is 'error' or 'new_generation'.")),
    }
}

fn name_error(error: NameError) -> Error {
    Error::invalid("name", format!("'name': {error}."))
}

fn bad_data(error: &codec::CodecError) -> Error {
    Error::invalid("data", format!("The adapter's data: {error}."))
}

/// Metadata as the store keeps it.
///
/// # Errors
/// 400 when it is too long.
pub(super) fn metadata_text(metadata: &Map<String, Value>) -> Result<String, Error> {
    let text = serde_json::to_string(metadata).map_err(Error::internal)?;
    if text.len() > MAX_METADATA {
        return Err(Error::invalid("metadata", format!("'metadata' has at most {MAX_METADATA} bytes as JSON.")));
    }
    Ok(text)
}

/// 422 for factors of other weights, 400 for anything else in a checkpoint.
pub(super) fn peft_error(error: &PeftError) -> Error {
    match error {
        PeftError::OtherWeights { .. } => {
            Error::new(ErrorKind::Incompatible, format!("The checkpoint does not fit this base: {error}."))
                .with_code("incompatible_adapter")
                .with_param(error.param())
        }
        PeftError::Write(_) => Error::internal(error),
        _ => Error::invalid(error.param(), format!("{error}.")),
    }
}

/// Keeps the upload's tail out of the way of the runtime: PEFT checkpoints take a while to check.
pub(super) fn is_heavy(upload: &Upload) -> bool {
    matches!(upload.content, Some(Content::Peft { .. } | Content::Archive(_)))
}

/// For [`Service::prepare`] on another thread.
pub(super) async fn prepare_apart(
    service: Arc<Service>,
    caller: Caller,
    upload: Upload,
    conflict: Option<OnConflict>,
) -> Result<NewAdapter, Error> {
    if !is_heavy(&upload) {
        return service.prepare(&caller, upload, conflict);
    }
    blocking(move || service.prepare(&caller, upload, conflict)).await
}
