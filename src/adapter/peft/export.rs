//! An adapter to a PEFT checkpoint that gives the same logits wherever PEFT runs.

use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;

use super::{PeftError, PeftFiles, group_key, site_key};
use crate::adapter::{
    Adapter, Assignment, Basis, Convention, ExpandError, NumberType, Scheme, SiteKind, Sites, Ties, frame::Side,
    projection, scheme::peft_groups,
};

/// Writes v, P, and A and B in the frame that the adapter came with. `base_name` is what PEFT should call the base model.
///
/// # Errors
/// [`PeftError::NotExpressible`] for what PEFT has no words for: another core than its own, groups that its rule for
/// `weight_tying` does not give, or an adapter that does not fit this basis.
pub fn export(adapter: &Adapter, sites: &Sites, basis: &Basis, base_name: &str) -> Result<PeftFiles, PeftError> {
    let scheme = adapter.scheme();
    if scheme.convention != Convention::Peft {
        let message = format!("its core is that of '{}', and PEFT has only its own", scheme.convention.name());
        return Err(PeftError::NotExpressible(message));
    }
    scheme.validate(sites, basis.rank).map_err(|error| PeftError::NotExpressible(error.to_string()))?;
    if adapter.facts().frame.as_ref().is_some_and(|frame| !frame.fits(scheme, sites)) {
        return Err(PeftError::NotExpressible(ExpandError::Frame.to_string()));
    }
    let weight_tying = weight_tying(scheme, sites).ok_or_else(|| {
        let message = "no weight_tying makes PEFT group the layers as this scheme's ties do";
        PeftError::NotExpressible(message.into())
    })?;
    let config = json!({
        "auto_mapping": null,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_v_bound": 0.02,
        "init_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "modules_to_save": null,
        "peft_type": "TINYLORA",
        "peft_version": "0.21.2",
        "projection_seed": scheme.seed,
        "r": scheme.rank,
        "revision": null,
        "save_projection": true,
        "target_modules": scheme.targets.iter().map(short_module).collect::<Vec<_>>(),
        "task_type": "CAUSAL_LM",
        "tinylora_dropout": 0.0,
        "u": scheme.u,
        "weight_tying": weight_tying,
    });
    let config = serde_json::to_vec_pretty(&config).map_err(|error| PeftError::Write(error.to_string()))?;
    Ok(PeftFiles { config, model: tensors(adapter, sites, basis)? })
}

/// `self_attn.q_proj` -> `q_proj`, as PEFT's users write it.
fn short_module(kind: SiteKind) -> &'static str {
    kind.module().rsplit('.').next().unwrap_or(kind.module())
}

/// The `weight_tying` under which PEFT's rule groups the sites as the scheme does, if there is one.
fn weight_tying(scheme: &Scheme, sites: &Sites) -> Option<f64> {
    if let Ties::Peft { weight_tying } = scheme.ties {
        return Some(weight_tying);
    }
    let (n, groups) = (scheme.targeted(sites), scheme.groups(sites));
    if groups > n {
        return None;
    }
    // Exact in the reals; the rounding of f64 is far from the half that would change the count.
    let weight_tying = if groups == 1 { 1.0 } else { 1.0 - groups as f64 / n as f64 };
    let as_peft = Scheme { ties: Ties::Peft { weight_tying }, ..scheme.clone() };
    let same = peft_groups(n, weight_tying) == groups && as_peft.assignments(sites) == scheme.assignments(sites);
    same.then_some(weight_tying)
}

fn tensors(adapter: &Adapter, sites: &Sites, basis: &Basis) -> Result<Vec<u8>, PeftError> {
    let scheme = adapter.scheme();
    let expected = scheme.numbers(sites);
    let dtype = adapter.facts().dtype;
    let actual = adapter.bytes().len() / dtype.size();
    if actual != expected {
        return Err(PeftError::NotExpressible(ExpandError::Numbers { expected, actual }.to_string()));
    }
    let number_dtype = match dtype {
        NumberType::Bf16 => Dtype::BF16,
        NumberType::F32 => Dtype::F32,
    };
    let mut out: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (group, bytes) in adapter.bytes().chunks_exact(scheme.u * dtype.size()).enumerate() {
        out.push((group_key(group), number_dtype, vec![scheme.u], bytes.to_vec()));
    }
    let rank = scheme.rank;
    for at in scheme.assignments(sites) {
        let (outputs, inputs) = sites.shape(at.site);
        let v = scaled_vectors(adapter, basis, &at, Side::V);
        let a = (0..rank).flat_map(|k| v.iter().skip(k).step_by(rank).copied());
        let b = scaled_vectors(adapter, basis, &at, Side::U);
        let p = projection(scheme.seed, at.layer_idx, scheme.u, rank, scheme.projection);
        out.push((site_key(sites, at.site, 'A'), Dtype::F32, vec![rank, inputs], le_bytes(a)));
        out.push((site_key(sites, at.site, 'B'), Dtype::F32, vec![outputs, rank], le_bytes(b)));
        out.push((site_key(sites, at.site, 'P'), Dtype::F32, vec![scheme.u, rank, rank], le_bytes(p)));
    }
    let write = |error: safetensors::SafeTensorError| PeftError::Write(error.to_string());
    let views: Result<Vec<_>, PeftError> = out
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            Ok((name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).map_err(write)?))
        })
        .collect();
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views?, Some(metadata)).map_err(write)
}

/// One side's singular vectors as the checkpoint had them, times sqrt(S): `U Q_u sqrt(S)` or `V Q_v sqrt(S)`, `[n, r]`.
fn scaled_vectors(adapter: &Adapter, basis: &Basis, at: &Assignment, side: Side) -> Vec<f32> {
    let rank = adapter.scheme().rank;
    let site = &basis.sites[at.site];
    let mut q = vec![0.0f64; basis.rank * rank];
    match &adapter.facts().frame {
        Some(frame) => frame.matrix(at, side, &mut q),
        None => (0..rank).for_each(|k| q[k * rank + k] = 1.0),
    }
    let ours = match side {
        Side::U => &site.u,
        Side::V => &site.v,
    };
    let entry = |row: &[f32], k: usize| {
        let turned: f64 = row.iter().zip(q[k..].iter().step_by(rank)).map(|(&x, q)| f64::from(x) * q).sum();
        (turned * f64::from(site.s[k]).sqrt()) as f32
    };
    ours.chunks_exact(basis.rank).flat_map(|row| (0..rank).map(move |k| entry(row, k))).collect()
}

fn le_bytes(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}
