//! Which adapter a request runs under: `model` and the `adapter` field to a lease. An adapter that is unknown, foreign or of another base is
//! an error, never the base.

use std::sync::Arc;

use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde_json::Value;

use super::{AdapterField, Error, ErrorKind, Lease, Service, Target};
use crate::{
    adapter::{Adapter, Facts, Lease as Found, Scheme, SchemeError, codec},
    tenant::Caller,
    types::{Fingerprint, TenantId},
};

/// Most adapters in a mix.
pub const MAX_MIX: usize = 16;
/// Base64 characters of the largest adapter that travels in a request: 64 KiB of numbers.
const MAX_INLINE: usize = 88 << 10;

const LENIENT: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);

/// Bytes of base64 in the standard or the URL alphabet, padded or not.
pub(super) fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let engine = if text.contains(['-', '_']) { &URL_SAFE } else { &STANDARD };
    engine.decode(text).ok()
}

/// What `model` means, before anything is looked up.
#[derive(Debug, PartialEq)]
enum Named<'a> {
    Base,
    Adapter(&'a str),
    Inline(&'a str),
}

fn parse_model<'a>(base: &str, model: &'a str) -> Named<'a> {
    match model.strip_prefix(base) {
        Some("") => Named::Base,
        Some(rest) => match (rest.strip_prefix(':'), rest.strip_prefix('+')) {
            (Some(name), _) => Named::Adapter(name),
            (_, Some(data)) => Named::Inline(data),
            // The base's id is the beginning of an adapter's name.
            _ => Named::Adapter(model),
        },
        None => Named::Adapter(model),
    }
}

/// An adapter of the body's field, before anything is looked up.
enum Given<'a> {
    /// One in the store, and where the body names it.
    Named {
        name: &'a str,
        param: String,
    },
    Inline(Arc<Adapter>),
}

/// An adapter that a request uses.
struct Used {
    adapter: Arc<Adapter>,
    /// Whose it is, and its name; None for one that travels in the request.
    stored: Option<(TenantId, String)>,
}

impl From<Arc<Adapter>> for Used {
    fn from(adapter: Arc<Adapter>) -> Self {
        Self { adapter, stored: None }
    }
}

impl Service {
    /// Resolves what a request names. The lease keeps its adapter whatever happens to the name.
    ///
    /// # Errors
    /// 404 for an unknown or foreign adapter, 422 for one of another base, 400 for one that is malformed.
    pub async fn resolve(&self, caller: &Caller, target: &Target) -> Result<Lease, Error> {
        let named = parse_model(&self.base.model_id, &target.model);
        let given = target.adapter.as_ref().map(|field| self.given(field)).transpose()?;
        let of_model: Option<Used> = match named {
            Named::Base => None,
            Named::Adapter(name) => {
                let found = self.used(caller, name)?;
                Some(found.ok_or_else(|| Error::model_not_found(&target.model))?)
            }
            Named::Inline(data) => Some(self.inline(data, None, "model")?.into()),
        };
        let parts = match (given, of_model) {
            (None, None) => Vec::new(),
            (None, Some(adapter)) => vec![(adapter, 1.0)],
            (Some(_), Some(_)) => {
                return Err(Error::invalid(
                    "adapter",
                    "'model' names an adapter already; give the base's id there, or no 'adapter'",
                ));
            }
            (Some(given), None) => {
                let found = given.into_iter().map(|(given, weight)| Ok((self.found(caller, given)?, weight)));
                found.collect::<Result<_, Error>>()?
            }
        };
        let lease = self.lease(caller, &parts)?;
        for (_, name) in parts.iter().filter_map(|(used, _)| used.stored.as_ref()) {
            self.popularity.count(caller.tenant, &caller.tenant_name, name);
        }
        Ok(lease)
    }

    /// What a name means to the caller. An own adapter that cannot be read is an error, and never a public one of that name.
    pub(super) fn find(&self, caller: &Caller, name: &str) -> Result<Option<Found>, Error> {
        self.check_readable(caller, name)?;
        Ok(self.library.registry.resolve(caller.tenant, name))
    }

    /// An own adapter that could not be read at start is an error, whatever else has the name.
    ///
    /// # Errors
    /// 500 adapter_damaged.
    pub(super) fn check_readable(&self, caller: &Caller, name: &str) -> Result<(), Error> {
        if self.library.is_corrupt(caller.tenant, name) { Err(Error::adapter_damaged(name)) } else { Ok(()) }
    }

    fn used(&self, caller: &Caller, name: &str) -> Result<Option<Used>, Error> {
        let found = self.find(caller, name)?;
        Ok(found.map(|found| Used { adapter: found.adapter, stored: Some((found.owner, name.to_owned())) }))
    }

    /// The adapters of the body's field with their weights, checked; nothing is looked up yet.
    fn given<'a>(&self, field: &'a AdapterField) -> Result<Vec<(Given<'a>, f32)>, Error> {
        match field {
            AdapterField::Named { name, scale } => {
                let given = Given::Named { name, param: "adapter.name".into() };
                Ok(vec![(given, weight(*scale, "adapter.scale")?)])
            }
            AdapterField::Inline { data, scheme, scale } => {
                let adapter = self.inline(data, scheme.as_ref(), "adapter.data")?;
                Ok(vec![(Given::Inline(adapter), weight(*scale, "adapter.scale")?)])
            }
            AdapterField::Mix(parts) => {
                if parts.is_empty() || parts.len() > MAX_MIX {
                    return Err(Error::invalid("adapter.mix", format!("a mix has 1 to {MAX_MIX} adapters")));
                }
                let part = |(i, (name, share)): (usize, &'a (String, f64))| {
                    let given = Given::Named { name, param: format!("adapter.mix[{i}].name") };
                    Ok((given, weight(*share, &format!("adapter.mix[{i}].weight"))?))
                };
                parts.iter().enumerate().map(part).collect()
            }
        }
    }

    /// Looks up what the field names.
    fn found(&self, caller: &Caller, given: Given<'_>) -> Result<Used, Error> {
        match given {
            Given::Named { name, param } => {
                self.used(caller, name)?.ok_or_else(|| Error::adapter_not_found(name, Some(&param)))
            }
            Given::Inline(adapter) => Ok(adapter.into()),
        }
    }

    /// An adapter inside the request: never stored, gone when the request ends.
    fn inline(&self, data: &str, scheme: Option<&Value>, param: &str) -> Result<Arc<Adapter>, Error> {
        let invalid = |message: String| Error::invalid(param, message);
        if data.len() > MAX_INLINE {
            return Err(invalid(format!("an adapter inside a request has at most {MAX_INLINE} base64 characters")));
        }
        let bytes = decode_base64(data).ok_or_else(|| invalid("the adapter is not base64".into()))?;
        let scheme = match scheme {
            None => Scheme::default(),
            Some(value) => Scheme::from_json(value).map_err(|error| scheme_error(&error, "adapter."))?,
        };
        self.check_scheme(&scheme, "adapter.")?;
        let numbers = scheme.numbers(&self.base.sites);
        let dtype = codec::type_of_length(bytes.len(), numbers).map_err(|error| invalid(error.to_string()))?;
        let facts = Facts { scheme, frame: None, fingerprint: self.library.fingerprint, dtype, approximate: false };
        self.library.interner.adapter(facts, &bytes, numbers).map_err(|error| invalid(error.to_string()))
    }

    /// Does this server serve the scheme? `prefix` is what stands before `scheme` in the error's path.
    ///
    /// # Errors
    /// 400 that names the field of the scheme.
    pub(super) fn check_scheme(&self, scheme: &Scheme, prefix: &str) -> Result<(), Error> {
        if self.base.rank == 0 {
            return Err(Error::invalid(format!("{prefix}scheme"), "this server serves no adapters (--rank 0)"));
        }
        scheme.validate(&self.base.sites, self.base.rank).map_err(|error| scheme_error(&error, prefix))
    }

    fn lease(&self, caller: &Caller, parts: &[(Used, f32)]) -> Result<Lease, Error> {
        let library = &self.library;
        for (Used { adapter, .. }, _) in parts {
            if !library.is_compatible(adapter) {
                return Err(incompatible(adapter.facts().fingerprint, library.fingerprint));
            }
            if let Err(error) = adapter.scheme().validate(&self.base.sites, self.base.rank) {
                let message = format!(
                    "The adapter cannot run on this server as it was started (--rank {}): {error}.",
                    self.base.rank
                );
                return Err(Error::new(ErrorKind::Incompatible, message).with_code("incompatible_adapter"));
            }
        }
        let borrowed: Vec<(&Adapter, f32)> = parts.iter().map(|(used, weight)| (&*used.adapter, *weight)).collect();
        let salt = library.salt(caller.tenant, &borrowed);
        let cores = if borrowed.is_empty() { None } else { Some(library.cores(salt, &borrowed)?) };
        // What travelled in the request belongs to nobody: no delete will ask for its KV.
        let mut generations =
            parts.iter().filter_map(|(used, _)| Some((used.stored.as_ref()?.0, used.adapter.generation()))).peekable();
        if generations.peek().is_some()
            && let Some(forgotten) = library.note_salt(salt, generations)
        {
            self.engine.purge(forgotten);
        }
        let generation = match parts {
            [(used, _)] => Some(used.adapter.generation()),
            _ => None,
        };
        // After the salt was noted: a delete before this is seen here, a later one finds the salt.
        let cacheable = parts.iter().all(|(used, _)| self.is_current(used));
        Ok(Lease { cores, salt, generation, cacheable })
    }

    /// Does the name still mean what it meant when it was looked up?
    fn is_current(&self, used: &Used) -> bool {
        let Some((owner, name)) = &used.stored else { return true };
        let now = self.library.registry.get(*owner, name);
        now.is_some_and(|lease| lease.adapter.generation() == used.adapter.generation())
    }
}

/// 422 that names both fingerprints.
pub(super) fn incompatible(theirs: Fingerprint, ours: Fingerprint) -> Error {
    let message = format!("The adapter was made for the base {theirs}, but this server serves {ours}.");
    Error::new(ErrorKind::Incompatible, message).with_code("incompatible_adapter")
}

/// A scheme's own error, under the field that holds the scheme.
pub(super) fn scheme_error(error: &SchemeError, prefix: &str) -> Error {
    Error::invalid(format!("{prefix}{}", error.path()), error.to_string())
}

fn weight(value: f64, param: &str) -> Result<f32, Error> {
    let narrow = value as f32;
    if narrow.is_finite() { Ok(narrow) } else { Err(Error::invalid(param, "must be a finite number")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_the_base_an_adapter_or_bytes() {
        for (model, want) in [
            ("base", Named::Base),
            ("alice", Named::Adapter("alice")),
            ("base:alice", Named::Adapter("alice")),
            ("base:", Named::Adapter("")),
            ("base+AAAA", Named::Inline("AAAA")),
            ("base-2", Named::Adapter("base-2")),
            ("", Named::Adapter("")),
        ] {
            assert_eq!(parse_model("base", model), want, "{model}");
        }
    }

    #[test]
    fn base64_of_either_alphabet_with_or_without_padding() {
        let bytes = [0xfb, 0xff, 0xbf, 0x01];
        for text in ["+/+/AQ==", "-_-_AQ==", "-_-_AQ", "+/+/AQ"] {
            assert_eq!(decode_base64(text).as_deref(), Some(&bytes[..]), "{text}");
        }
        for text in ["+/-_AQ", "A", "====", "ä", "AA AA"] {
            assert_eq!(decode_base64(text), None, "{text}");
        }
    }
}
