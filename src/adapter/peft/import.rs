//! A PEFT checkpoint to an adapter: numbers, scheme and how its singular vectors lie in ours.

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use super::{PeftError, config, group_key, site_key};
use crate::adapter::{
    Assignment, Basis, Frame, MARGIN, NumberType, ProjectionDtype, Scheme, Sites, codec,
    frame::FrameBuilder,
    projection,
    scheme::{MAX_NUMBERS, MAX_PROJECTION_VALUES},
};

/// A singular vector of the checkpoint must agree with ours by more than this |cosine|.
const SAME_VECTOR: f64 = 0.99;
/// And its singular value by this ratio.
const SAME_VALUE: f64 = 0.05;
/// Relative size of a singular value below which its vectors are noise and contribute nothing.
const NEGLIGIBLE: f64 = 1e-6;

/// What a checkpoint says, in our terms.
#[derive(Debug, Clone, PartialEq)]
pub struct Imported {
    /// How its numbers become cores.
    pub scheme: Scheme,
    /// Its singular vectors in terms of ours; None: the same.
    pub frame: Option<Frame>,
    /// bf16 if the file holds them so, else f32.
    pub dtype: NumberType,
    /// The numbers, group-major.
    pub bytes: Vec<u8>,
    /// The worst |cosine| of a singular vector to ours: 1 for the same weights in f32.
    pub worst_cosine: f64,
}

/// The largest `adapter_model.safetensors` that a checkpoint of this model and rank can be.
pub fn size_limit(sites: &Sites, rank: usize) -> usize {
    let factors: usize = (0..sites.len()).map(|site| sites.shape(site).0 + sites.shape(site).1).sum();
    let values = factors * rank + MAX_PROJECTION_VALUES + MAX_NUMBERS;
    // 512 bytes of header a tensor, of which there are three a site and at most one a number.
    let header = 512 * (3 * sites.len() + 4096) + (1 << 20);
    4 * values + header
}

/// Reads the two files of a checkpoint of up to rank `served` against a model and its basis.
///
/// # Errors
/// A configuration or tensor that is missing, malformed, out of bounds or unknown, by name; factors of other weights
/// ([`PeftError::is_incompatible`]); projections that are not those of the seed.
pub fn import(config: &[u8], model: &[u8], sites: &Sites, basis: &Basis, served: usize) -> Result<Imported, PeftError> {
    let served = served.min(basis.rank);
    let mut scheme = config::parse(config, sites, served)?;
    let limit = size_limit(sites, served);
    if model.len() > limit {
        return Err(PeftError::ModelFile(format!("is larger than {limit} bytes, more than this model can need")));
    }
    let file = SafeTensors::deserialize(model).map_err(|error| PeftError::ModelFile(error.to_string()))?;
    let assignments = scheme.assignments(sites);
    require_factors(&file, sites, &assignments)?;
    let projections = check_projections(&file, sites, &scheme, &assignments)?;
    let groups = scheme.groups(sites);
    let known = 2 * assignments.len() + if projections.present { assignments.len() } else { 0 } + groups;
    let (dtype, bytes) = numbers(&file, &scheme, groups)?;
    if file.len() != known {
        return Err(unknown_tensor(&file, sites, &assignments, groups));
    }
    let factors = check_factors(&file, sites, basis, &scheme, &assignments)?;
    scheme.projection = match (projections.present, factors.all_bf16) {
        (true, _) => projections.dtype,
        // Without P, PEFT draws it again in the base's dtype, which is the one it saved A in.
        (false, true) => ProjectionDtype::Bf16,
        (false, false) => ProjectionDtype::F32,
    };
    Ok(Imported { scheme, frame: factors.frame, dtype, bytes, worst_cosine: factors.worst_cosine })
}

fn require_factors(file: &SafeTensors<'_>, sites: &Sites, assignments: &[Assignment]) -> Result<(), PeftError> {
    let has = |site: usize, part: char| file.tensor(&site_key(sites, site, part)).is_ok();
    if !assignments.iter().any(|a| has(a.site, 'A') || has(a.site, 'B')) {
        return Err(PeftError::ModelFile(
            "carries no tinylora_A and tinylora_B of this model's layers. Without them the signs of the singular vectors are \
             unknown, and no numbers can make up for them: save the adapter with PEFT's save_pretrained, which keeps them"
                .into(),
        ));
    }
    let parts = assignments.iter().flat_map(|a| [(a.site, 'A'), (a.site, 'B')]);
    for (site, part) in parts {
        if !has(site, part) {
            return Err(PeftError::tensor(&site_key(sites, site, part), "is missing"));
        }
    }
    Ok(())
}

struct Projections {
    present: bool,
    dtype: ProjectionDtype,
}

/// P must be what the seed gives, as drawn or as a bf16 base rounds it; all of it in one way.
fn check_projections(
    file: &SafeTensors<'_>,
    sites: &Sites,
    scheme: &Scheme,
    assignments: &[Assignment],
) -> Result<Projections, PeftError> {
    let count = assignments.iter().filter(|a| file.tensor(&site_key(sites, a.site, 'P')).is_ok()).count();
    if count == 0 {
        return Ok(Projections { present: false, dtype: ProjectionDtype::F32 });
    }
    let (mut exact, mut rounded) = (true, true);
    for &Assignment { site, layer_idx, .. } in assignments {
        let key = site_key(sites, site, 'P');
        let (saved, _) = tensor(file, &key, &[scheme.u, scheme.rank, scheme.rank])?;
        let ours = projection(scheme.seed, layer_idx, scheme.u, scheme.rank, ProjectionDtype::F32);
        exact &= saved == ours;
        rounded &= saved.iter().zip(&ours).all(|(saved, ours)| *saved == bf16::from_f32(*ours).to_f32());
        if !exact && !rounded {
            let message = format!(
                "is not what projection_seed {} gives for module {layer_idx}, neither in f32 nor rounded to bf16",
                scheme.seed
            );
            return Err(PeftError::tensor(&key, message));
        }
    }
    let dtype = if exact { ProjectionDtype::F32 } else { ProjectionDtype::Bf16 };
    Ok(Projections { present: true, dtype })
}

/// The numbers of all groups, in numeric order.
fn numbers(file: &SafeTensors<'_>, scheme: &Scheme, groups: usize) -> Result<(NumberType, Vec<u8>), PeftError> {
    let mut numbers = Vec::with_capacity(groups * scheme.u);
    let mut all_bf16 = true;
    for group in 0..groups {
        let (values, dtype) = tensor(file, &group_key(group), &[scheme.u])?;
        all_bf16 &= dtype == Dtype::BF16;
        numbers.extend(values);
    }
    let dtype = if all_bf16 { NumberType::Bf16 } else { NumberType::F32 };
    Ok((dtype, codec::encode(&numbers, dtype)?))
}

struct Factors {
    frame: Option<Frame>,
    all_bf16: bool,
    worst_cosine: f64,
}

/// Compares A and B with our vectors: refuses those of other weights, keeps how the others lie in ours.
fn check_factors(
    file: &SafeTensors<'_>,
    sites: &Sites,
    basis: &Basis,
    scheme: &Scheme,
    assignments: &[Assignment],
) -> Result<Factors, PeftError> {
    let rank = scheme.rank;
    let rows = (rank + MARGIN).min(basis.rank);
    let mut frame = FrameBuilder::new(rank, rows);
    let (mut all_bf16, mut worst_cosine) = (true, 1.0f64);
    for &Assignment { site, .. } in assignments {
        let (outputs, inputs) = sites.shape(site);
        let (b, _) = tensor(file, &site_key(sites, site, 'B'), &[outputs, rank])?;
        let (a, dtype) = tensor(file, &site_key(sites, site, 'A'), &[rank, inputs])?;
        all_bf16 &= dtype == Dtype::BF16;
        let ours = &basis.sites[site];
        // U from B, then V from A, whose vectors are rows: the order that the builder wants.
        let mut side = |ours_of_side: &[f32], saved: &[f32], start: usize, step: usize, n: usize| {
            for k in 0..rank {
                let s = f64::from(ours.s[k]);
                if s <= NEGLIGIBLE * f64::from(ours.s[0]) {
                    frame.push_own(k);
                    continue;
                }
                let vector = saved.iter().skip(k * start).step_by(step).take(n);
                let (coordinates, square) = coordinates(vector, ours_of_side, basis.rank, rows);
                let cosine = coordinates[k].abs() / square.sqrt();
                compare(cosine, square / s).map_err(|detail| PeftError::OtherWeights {
                    module: sites.module(site),
                    detail: format!("singular pair {} {detail}", k + 1),
                })?;
                frame.push(coordinates.into_iter().map(|x| x / s.sqrt()));
                worst_cosine = worst_cosine.min(cosine);
            }
            Ok::<(), PeftError>(())
        };
        side(&ours.u, &b, 1, rank, outputs)?;
        side(&ours.v, &a, inputs, 1, inputs)?;
    }
    Ok(Factors { frame: frame.finish(scheme, sites), all_bf16, worst_cosine })
}

/// Inner products of a vector with the first `rows` of our vectors, row-major `[n, rank]`, and its squared length.
fn coordinates<'a>(vector: impl Iterator<Item = &'a f32>, ours: &[f32], rank: usize, rows: usize) -> (Vec<f64>, f64) {
    let (mut products, mut square) = (vec![0.0; rows], 0.0);
    for (&x, ours) in vector.zip(ours.chunks_exact(rank)) {
        let x = f64::from(x);
        square += x * x;
        for (product, &u) in products.iter_mut().zip(ours) {
            *product += x * f64::from(u);
        }
    }
    (products, square)
}

/// Is a saved vector ours up to a sign and a small turn? Written so that NaN is not.
fn compare(cosine: f64, value_ratio: f64) -> Result<(), String> {
    let same_vector = cosine > SAME_VECTOR;
    if !same_vector {
        return Err(format!("agrees with this base's only by a cosine of {cosine:.3}"));
    }
    let same_value = (value_ratio - 1.0).abs() <= SAME_VALUE;
    if !same_value {
        return Err(format!("is {value_ratio:.3} times as large as this base's"));
    }
    Ok(())
}

/// A tensor's finite values as f32, of exactly this shape.
fn tensor(file: &SafeTensors<'_>, name: &str, shape: &[usize]) -> Result<(Vec<f32>, Dtype), PeftError> {
    let view = file.tensor(name).map_err(|_| PeftError::tensor(name, "is missing"))?;
    if view.shape() != shape {
        return Err(PeftError::tensor(name, format!("has shape {:?}, not {shape:?}", view.shape())));
    }
    let data = view.data();
    let pairs = || data.as_chunks::<2>().0.iter();
    let values: Vec<f32> = match view.dtype() {
        Dtype::F32 => data.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
        Dtype::BF16 => pairs().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect(),
        Dtype::F16 => pairs().map(|&bytes| f16::from_le_bytes(bytes).to_f32()).collect(),
        other => return Err(PeftError::tensor(name, format!("is {other:?}; F32, BF16 and F16 are read"))),
    };
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok((values, view.dtype())),
        Some(at) => Err(PeftError::tensor(name, format!("value {at} is not finite"))),
    }
}

fn unknown_tensor(file: &SafeTensors<'_>, sites: &Sites, assignments: &[Assignment], groups: usize) -> PeftError {
    let site_keys = assignments.iter().flat_map(|a| ['A', 'B', 'P'].map(|part| site_key(sites, a.site, part)));
    let known: std::collections::HashSet<String> = site_keys.chain((0..groups).map(group_key)).collect();
    match file.names().into_iter().filter(|name| !known.contains(*name)).min() {
        Some(name) => PeftError::tensor(
            name,
            format!("is not part of a checkpoint with these target_modules and this weight_tying ({groups} groups)"),
        ),
        None => PeftError::ModelFile("has some tinylora_P but not all".into()),
    }
}
