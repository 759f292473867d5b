//! The golden models and PEFT checkpoints, for the tests of this room.

use std::{fs, path::PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;

use super::{Frame, Scheme, SiteKind, Sites, frame::FrameBuilder};

pub(crate) const MODELS: [&str; 2] = ["llama", "qwen2"];
pub(crate) const ADAPTERS: [&str; 5] = ["u1-13groups", "u13-tied", "u13-tied-alice", "r4-u3-untied", "v-only"];

pub(crate) fn cases() -> impl Iterator<Item = (&'static str, &'static str)> {
    MODELS.into_iter().flat_map(|model| ADAPTERS.into_iter().map(move |name| (model, name)))
}

fn folder(model: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden").join(model)
}

pub(crate) fn sites(model: &str) -> Sites {
    let config: Value = serde_json::from_slice(&fs::read(folder(model).join("model/config.json")).unwrap()).unwrap();
    let size = |key: &str| config[key].as_u64().unwrap() as usize;
    let (hidden, inter, heads) = (size("hidden_size"), size("intermediate_size"), size("num_attention_heads"));
    let head_dim = config["head_dim"].as_u64().map_or(hidden / heads, |dim| dim as usize);
    let (q, kv) = (heads * head_dim, size("num_key_value_heads") * head_dim);
    let shapes =
        [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inter, hidden), (inter, hidden), (hidden, inter)];
    Sites { layers: size("num_hidden_layers"), shapes }
}

fn read_f32(bytes: &[u8], name: &str) -> Option<Vec<f32>> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let tensor = file.tensor(name).ok()?;
    assert_eq!(tensor.dtype(), safetensors::Dtype::F32);
    Some(tensor.data().as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
}

/// The weights of a golden model: site -> row-major `[out, in]`.
pub(crate) fn weights(model: &str) -> impl Fn(usize) -> Result<Vec<f32>, String> + Sync {
    let (bytes, sites) = (fs::read(folder(model).join("model/model.safetensors")).unwrap(), sites(model));
    move |site| read_f32(&bytes, &format!("{}.weight", sites.module(site))).ok_or_else(|| "missing".to_owned())
}

/// A PEFT checkpoint and what transformers made of it.
pub(crate) struct Golden {
    pub(crate) sites: Sites,
    pub(crate) config_bytes: Vec<u8>,
    pub(crate) model_bytes: Vec<u8>,
    pub(crate) expected: Value,
}

pub(crate) fn golden(model: &str, name: &str) -> Golden {
    let adapter = folder(model).join("adapters").join(name);
    let expected: Value = serde_json::from_slice(&fs::read(folder(model).join("expected.json")).unwrap()).unwrap();
    Golden {
        sites: sites(model),
        config_bytes: fs::read(adapter.join("adapter_config.json")).unwrap(),
        model_bytes: fs::read(adapter.join("adapter_model.safetensors")).unwrap(),
        expected: expected["adapters"][name].clone(),
    }
}

impl Golden {
    pub(crate) fn config(&self) -> Value {
        serde_json::from_slice(&self.config_bytes).unwrap()
    }

    pub(crate) fn tensor(&self, name: &str) -> Option<Vec<f32>> {
        read_f32(&self.model_bytes, name)
    }

    /// The numbers as transformers' own run recorded them, group-major.
    pub(crate) fn numbers(&self) -> Vec<f32> {
        let groups = self.expected["v"].as_object().unwrap();
        let group = |g: usize| groups[&g.to_string()].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32);
        (0..groups.len()).flat_map(group).collect()
    }
}

/// A small deterministic stream of values in [-1, 1), for made-up weights.
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Sites of a made-up model in which every kind is `[out, in]`.
pub(crate) fn uniform_sites(layers: usize, out: usize, input: usize) -> Sites {
    Sites { layers, shapes: [(out, input); SiteKind::ALL.len()] }
}

/// A frame whose vectors lean by up to `lean` to each of the other `rows` ones, every site, side and vector differently, with
/// signs of all four kinds.
pub(crate) fn turned(scheme: &Scheme, sites: &Sites, rows: usize, lean: f64) -> Option<Frame> {
    let mut builder = FrameBuilder::new(scheme.rank, rows);
    for c in 0..scheme.targeted(sites) * 2 * scheme.rank {
        let k = c % scheme.rank;
        let mut coordinates: Vec<f64> = noise(c as u64 + 1, rows).iter().map(|&x| f64::from(x) * lean).collect();
        coordinates[k] = if c % 3 == 1 { -1.0 } else { 1.0 };
        builder.push(coordinates);
    }
    builder.finish(scheme, sites)
}
