//! Adapters as `/adapters` shows them.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::schemas;
use crate::service::{AdapterInfo, GenerationInfo, Numbers};

/// An adapter and its current generation.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct AdapterObject {
    /// Stays while the adapter lives; a name that was deleted and uploaded again has another.
    #[schema(example = "adapter-000000000000002a")]
    pub id: String,
    /// `adapter`
    pub object: &'static str,
    /// What `model` names.
    #[schema(example = "alice")]
    pub name: String,
    /// The current generation: the hash of numbers, scheme and base.
    #[schema(example = "0123456789abcdef0123456789abcdef")]
    pub generation: String,
    /// Size of the numbers.
    #[schema(example = 26)]
    pub bytes: usize,
    /// `bf16` or `f32`
    pub dtype: String,
    /// The scheme's name, or its description.
    #[schema(value_type = schemas::Scheme)]
    pub scheme: Value,
    /// The base that the numbers are for.
    pub fingerprint: String,
    /// The tenant that owns it.
    pub owner: String,
    /// May every tenant use it?
    pub public: bool,
    /// What the owner wrote.
    #[schema(value_type = Object)]
    pub metadata: Map<String, Value>,
    /// Unix seconds.
    pub created_at: i64,
    /// Present and true: taken by force for another base than this server's.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[schema(required = false)]
    pub approximate: bool,
    /// Present and true: this server cannot run it, since it is for another base or for a larger rank.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[schema(required = false)]
    pub incompatible: bool,
}

impl From<AdapterInfo> for AdapterObject {
    fn from(info: AdapterInfo) -> Self {
        let AdapterInfo { id, name, numbers, owner, public, metadata, created_at } = info;
        let Numbers { generation, bytes, dtype, scheme, fingerprint, approximate, incompatible } = numbers;
        Self {
            id,
            object: "adapter",
            name,
            generation: generation.to_string(),
            bytes,
            dtype,
            scheme,
            fingerprint: fingerprint.to_string(),
            owner,
            public,
            metadata,
            created_at,
            approximate,
            incompatible,
        }
    }
}

/// A page of adapters.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AdapterList {
    /// `list`
    pub object: &'static str,
    /// In the order of names.
    pub data: Vec<AdapterObject>,
    /// Are there more after the last one?
    pub has_more: bool,
}

/// A generation of an adapter.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct GenerationObject {
    /// `adapter.generation`
    pub object: &'static str,
    /// The hash of numbers, scheme and base.
    pub generation: String,
    /// Does the name point at it?
    pub current: bool,
    /// Size of the numbers.
    pub bytes: usize,
    /// `bf16` or `f32`
    pub dtype: String,
    /// The scheme's name, or its description.
    #[schema(value_type = schemas::Scheme)]
    pub scheme: Value,
    /// The base that the numbers are for.
    pub fingerprint: String,
    /// Unix seconds.
    pub created_at: i64,
}

impl From<GenerationInfo> for GenerationObject {
    fn from(info: GenerationInfo) -> Self {
        let Numbers { generation, bytes, dtype, scheme, fingerprint, .. } = info.numbers;
        Self {
            object: "adapter.generation",
            generation: generation.to_string(),
            current: info.current,
            bytes,
            dtype,
            scheme,
            fingerprint: fingerprint.to_string(),
            created_at: info.created_at,
        }
    }
}

/// Generations of an adapter.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct GenerationList {
    /// `list`
    pub object: &'static str,
    /// The newest upload first.
    pub data: Vec<GenerationObject>,
    /// Are there more after the last one?
    pub has_more: bool,
}

/// The numbers of an adapter.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct WeightsObject {
    /// The adapter.
    pub name: String,
    /// Its current generation.
    pub generation: String,
    /// `bf16` or `f32`
    pub dtype: String,
    /// The scheme's name, or its description.
    #[schema(value_type = schemas::Scheme)]
    pub scheme: Value,
    /// The base that the numbers are for.
    pub fingerprint: String,
    /// Group-major, groups in numeric order; exact.
    pub numbers: Vec<f64>,
    /// The bytes in base64.
    pub data: String,
}

/// All that a client needs to make an adapter's bytes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SchemeList {
    /// The base's id.
    pub base: String,
    /// The base's fingerprint.
    pub fingerprint: String,
    /// Adapted linears of the base, 7 a layer.
    pub sites: usize,
    /// The largest rank served; 0 serves no adapters.
    pub rank: usize,
    /// The named schemes, the default first.
    pub schemes: Vec<SchemeObject>,
}

/// A named scheme on this base.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SchemeObject {
    /// What `scheme` names.
    pub name: &'static str,
    /// The description that the name stands for.
    #[schema(value_type = schemas::SchemeDescription)]
    pub scheme: Value,
    /// How many numbers an adapter has: 2 bytes each in bf16, 4 in f32.
    pub numbers: usize,
    /// Does this server take such adapters?
    pub served: bool,
}
