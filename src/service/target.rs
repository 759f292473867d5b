//! What a request runs on: as the client names it, and as it was resolved.

use std::sync::Arc;

use crate::{
    adapter::Cores,
    types::{CacheSalt, Generation},
};

/// `model` and the body's `adapter`, as given.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// The base's id, an adapter's name, `base:name`, or `base+<base64url>`.
    pub model: String,
    /// The `adapter` extra, if there is one.
    pub adapter: Option<AdapterField>,
}

/// The `adapter` field of a request's body. What it names or holds is checked when it is resolved.
#[derive(Debug, Clone, PartialEq)]
pub enum AdapterField {
    /// A stored adapter.
    Named {
        /// Its name.
        name: String,
        /// Multiplies the update.
        scale: f64,
    },
    /// An adapter inside the request.
    Inline {
        /// Base64 of its bytes, standard or URL alphabet, padding optional.
        data: String,
        /// A scheme's name or its description; None is the default scheme.
        scheme: Option<serde_json::Value>,
        /// Multiplies the update.
        scale: f64,
    },
    /// A weighted sum of the numbers of stored adapters of one scheme.
    Mix(Vec<(String, f64)>),
}

/// What a request runs under, from its admission to its end: replacing or deleting the adapter changes nothing here.
#[derive(Debug, Clone)]
pub struct Lease {
    /// The adapter's cores; None for the bare base.
    pub cores: Option<Arc<Cores>>,
    /// Under which KV blocks may be shared.
    pub salt: CacheSalt,
    /// The adapter's generation, for the header; None for the bare base.
    pub generation: Option<Generation>,
    /// May the request fill the prefix cache? Not if its adapter was deleted or replaced while it was being resolved: nobody would erase its KV.
    pub cacheable: bool,
}
