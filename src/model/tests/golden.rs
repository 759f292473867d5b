//! transformers + PEFT as the reference: logits, log-probs and greedy tokens of tiny models under every adapter.
//!
//! Twice: with cores computed here from the numbers that PEFT saved (A, B, P, v), which holds the forward pass alone, and
//! with the adapter room's basis, import and expansion.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::*;
use crate::adapter::{Basis, Expander, Facts, Interner, ProjectionDtype, Sites, peft, projection};

const TOLERANCE: f64 = 2e-4;

/// A PEFT checkpoint, taken apart: U and V of every site (zeros where it has none) and the cores.
pub(super) struct Checkpoint {
    rank: usize,
    /// U `[out, r]` and V `[in, r]` of every site.
    factors: Vec<(Vec<f32>, Vec<f32>)>,
    pub(super) cores: Arc<Cores>,
}

impl Checkpoint {
    pub(super) fn read(folder: &Path, sites: &Sites) -> Self {
        let config: Value =
            serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
        let tensors = candle_core::safetensors::load(folder.join("adapter_model.safetensors"), &Device::Cpu).unwrap();
        let rank = config["r"].as_u64().unwrap() as usize;
        let modules: Vec<&str> =
            config["target_modules"].as_array().unwrap().iter().map(|m| m.as_str().unwrap()).collect();
        let targeted: Vec<usize> = (0..sites.len())
            .filter(|site| modules.contains(&sites.module(*site).rsplit('.').next().unwrap()))
            .collect();
        // PEFT's grouping; Python rounds halves to even.
        let untied = targeted.len() as f64 * (1.0 - config["weight_tying"].as_f64().unwrap());
        let groups = (untied.round_ties_even() as usize).max(1);
        let size = (targeted.len() / groups).max(1);
        let mut factors: Vec<_> = (0..sites.len())
            .map(|site| (vec![0f32; sites.shape(site).0 * rank], vec![0f32; sites.shape(site).1 * rank]))
            .collect();
        let mut data = vec![0f32; sites.len() * rank * rank];
        for (index, &site) in targeted.iter().enumerate() {
            let of = |what: &str| format!("base_model.model.{}.tinylora_{what}", sites.module(site));
            let v = values(&tensors, &format!("base_model.tinylora_v.{}", (index / size).min(groups - 1)));
            let seed = config["projection_seed"].as_u64().unwrap();
            let p = match tensors.contains_key(&of("P")) {
                true => values(&tensors, &of("P")),
                false => projection(seed, index, v.len(), rank, ProjectionDtype::F32),
            };
            let (a, b) = (values(&tensors, &of("A")), values(&tensors, &of("B")));
            let core = &mut data[site * rank * rank..(site + 1) * rank * rank];
            factors[site] = take_apart(&a, &b, &p, &v, rank, core);
        }
        Self { rank, factors, cores: Arc::new(Cores { rank, data: data.into() }) }
    }

    pub(super) fn factors(&self) -> Vec<SiteFactors<'_>> {
        let sites = self.factors.iter().enumerate();
        sites.map(|(site, (u, v))| SiteFactors { site, u, v, rank: self.rank }).collect()
    }
}

fn values(tensors: &HashMap<String, Tensor>, name: &str) -> Vec<f32> {
    let tensor = tensors.get(name).unwrap_or_else(|| panic!("{name}"));
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// A = sqrt(S) V^T `[r, in]`, B = U sqrt(S) `[out, r]`; core = sqrt(S) (sum_i v_i P_i) sqrt(S).
fn take_apart(a: &[f32], b: &[f32], p: &[f32], v: &[f32], rank: usize, core: &mut [f32]) -> (Vec<f32>, Vec<f32>) {
    let inputs = a.len() / rank;
    let roots: Vec<f64> =
        a.chunks(inputs).map(|row| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()).collect();
    for (i, row) in core.chunks_mut(rank).enumerate() {
        for (j, entry) in row.iter_mut().enumerate() {
            let mixed: f64 =
                v.iter().enumerate().map(|(k, v)| f64::from(*v) * f64::from(p[(k * rank + i) * rank + j])).sum();
            *entry = (roots[i] * mixed * roots[j]) as f32;
        }
    }
    let u = b.iter().enumerate().map(|(at, x)| (f64::from(*x) / roots[at % rank]) as f32).collect();
    let v =
        (0..inputs * rank).map(|at| (f64::from(a[at % rank * inputs + at / rank]) / roots[at % rank]) as f32).collect();
    (u, v)
}

#[derive(serde::Deserialize)]
struct Outputs {
    last_logits: Vec<Vec<f32>>,
    greedy: Vec<Vec<u32>>,
    continuation_logprobs: Vec<Vec<f64>>,
}

#[derive(serde::Deserialize)]
struct Expected {
    prompts: Vec<Vec<u32>>,
    continuation: Vec<u32>,
    base: Outputs,
    adapters: HashMap<String, Outputs>,
}

pub(super) fn model_of(case: &str) -> LoadedModel {
    load(&fixtures().join(case).join("model")).unwrap()
}

pub(super) const OPTIONS: TransformerOptions =
    TransformerOptions { precision: Precision::F32, max_positions: 96, kv_blocks: 32 };

/// All prompts in one ragged step with the continuation behind each, then each prompt's greedy tokens.
fn compare(what: &str, model: &mut dyn Model, expected: &Expected, outputs: &Outputs, cores: &Option<Arc<Cores>>) {
    compare_within(TOLERANCE, what, model, expected, outputs, cores);
}

fn compare_within(
    tolerance: f64,
    what: &str,
    model: &mut dyn Model,
    expected: &Expected,
    outputs: &Outputs,
    cores: &Option<Arc<Cores>>,
) {
    let texts: Vec<Vec<u32>> = expected.prompts.iter().map(|p| [&p[..], &expected.continuation].concat()).collect();
    let rows: Vec<Rows<'_>> = texts
        .iter()
        .enumerate()
        .map(|(i, text)| Rows::new(text, 0, 4 * i as u32..4 * i as u32 + 4).under(cores).with_all_logits())
        .collect();
    let mut logits = step(model, &rows).into_iter();
    for (i, (prompt, text)) in expected.prompts.iter().zip(&texts).enumerate() {
        let logits: Vec<Vec<f32>> = logits.by_ref().take(text.len()).collect();
        let last = &logits[prompt.len() - 1];
        let furthest =
            last.iter().zip(&outputs.last_logits[i]).fold(0f64, |most, (a, b)| most.max(f64::from((a - b).abs())));
        assert!(furthest <= tolerance, "{what}: prompt {i}: logits differ by {furthest}");
        assert_eq!(last.len(), outputs.last_logits[i].len());
        for (j, expected_log_prob) in outputs.continuation_logprobs[i].iter().enumerate() {
            let found = log_prob(&logits[prompt.len() - 1 + j], expected.continuation[j]);
            let difference = (found - expected_log_prob).abs();
            assert!(difference <= tolerance, "{what}: prompt {i}, token {j}: log-probs differ by {difference}");
        }
        let found = greedy(model, prompt, outputs.greedy[i].len(), &[], 20..28, cores);
        assert_eq!(found, outputs.greedy[i], "{what}: prompt {i}: greedy tokens");
    }
}

fn golden<B: Backend>(backend: impl Fn() -> B, case: &str, adapters: usize) {
    let folder = fixtures().join(case);
    let expected: Expected = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    assert_eq!(expected.adapters.len(), adapters);
    let LoadedModel { spec, weights, .. } = model_of(case);
    let mut plain = Transformer::new(backend(), spec.clone(), weights.clone(), &[], OPTIONS).unwrap();
    compare(case, &mut plain, &expected, &expected.base, &None);
    for (name, outputs) in &expected.adapters {
        let what = format!("{case}, {name}");
        let checkpoint = Checkpoint::read(&folder.join("adapters").join(name), &spec.sites());
        let factors = checkpoint.factors();
        let mut model = Transformer::new(backend(), spec.clone(), weights.clone(), &factors, OPTIONS).unwrap();
        compare(&what, &mut model, &expected, outputs, &Some(checkpoint.cores.clone()));
        // The base is still the base beside packed factors.
        compare(&what, &mut model, &expected, &expected.base, &None);
    }
}

for_every_backend! {
    llama => |make| golden(make, "golden/llama", 5);
    qwen2 => |make| golden(make, "golden/qwen2", 5);
    llama3rope => |make| golden(make, "golden2/llama3rope", 2);
    qwen3 => |make| golden(make, "golden2/qwen3", 2);
    qwen2odd => |make| golden(make, "golden2/qwen2odd", 2);
    llamabias => |make| golden(make, "golden2/llamabias", 1);
    mistral => |make| golden(make, "golden2/mistral", 1);
}

/// Checkpoints whose factors are off by more than the tolerance allows: PEFT takes its SVD in f32, and where two singular
/// values are within 1% its vectors are turned by up to 1e-4 against the exact ones. Our basis is exact, and a sign a
/// vector cannot express a turn. (With PEFT's own vectors these cases are within 1e-5: see the cases above.)
const TURNED: [(&str, &str); 2] = [("golden/qwen2", "v-only"), ("golden2/qwen3", "r4-u16")];

/// The way of the server: our own basis of the loaded weights, PEFT's files imported against it, numbers expanded to
/// cores, every adapter zero-padded to one served rank and all of them over one model.
fn imported<B: Backend>(backend: impl Fn() -> B, case: &str, rank: usize) {
    let folder = fixtures().join(case);
    let expected: Expected = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let LoadedModel { spec, weights, .. } = model_of(case);
    let sites = spec.sites();
    let basis = Arc::new(Basis::compute(&sites, rank, |site| weights.site(site).to_f32()).unwrap());
    let expander = Expander::new(sites.clone(), basis.clone());
    let mut model = Transformer::new(backend(), spec, weights, &site_factors(&basis), OPTIONS).unwrap();
    for (name, outputs) in &expected.adapters {
        let files = folder.join("adapters").join(name);
        let read = |name: &str| std::fs::read(files.join(name)).unwrap();
        let imported = peft::import(&read(peft::CONFIG_FILE), &read(peft::MODEL_FILE), &sites, &basis).unwrap();
        let numbers = imported.scheme.numbers(&sites);
        let facts = Facts {
            scheme: imported.scheme,
            dtype: imported.dtype,
            fingerprint: basis.fingerprint,
            signs: imported.signs,
            approximate: false,
        };
        let adapter = Interner::new().adapter(facts, &imported.bytes, numbers).unwrap();
        let cores = expander.expand(&[(&adapter, 1.0)]).unwrap();
        let tolerance = if TURNED.contains(&(case, name.as_str())) { 5e-4 } else { TOLERANCE };
        let what = format!("{case}, {name} imported");
        compare_within(tolerance, &what, &mut model, &expected, outputs, &Some(cores));
        let nothing = expander.expand(&[(&adapter, 0.0)]).unwrap();
        compare(&format!("{case}, {name} at scale 0"), &mut model, &expected, &expected.base, &Some(nothing));
    }
}

for_every_backend! {
    llama_imported => |make| imported(make, "golden/llama", 4);
    qwen2_imported => |make| imported(make, "golden/qwen2", 4);
    llama3rope_imported => |make| imported(make, "golden2/llama3rope", 2);
    qwen3_imported => |make| imported(make, "golden2/qwen3", 4);
    qwen2odd_imported => |make| imported(make, "golden2/qwen2odd", 3);
    llamabias_imported => |make| imported(make, "golden2/llamabias", 2);
    mistral_imported => |make| imported(make, "golden2/mistral", 3);
}

#[test]
fn specs_of_the_cases() {
    let spec = |case: &str| model_of(case).spec;
    let llama3 = spec("golden2/llama3rope");
    assert!(matches!(llama3.rope.scaling, RopeScaling::Llama3 { .. }));
    assert_eq!((llama3.head_dim, llama3.kv_heads, llama3.heads), (16, 1, 5));
    assert_eq!(spec("golden2/qwen3").architecture, Architecture::Qwen3);
    assert_eq!(spec("golden2/llamabias").rope.scaling, RopeScaling::Linear { factor: 2.5 });
    assert_eq!(spec("golden2/mistral").max_positions, 96); // its window
    assert_eq!(spec("golden2/qwen2odd").eos, [0]);
    let precision = |case: &str| model_of(case).weights.natural_precision();
    assert_eq!(precision("golden/llama"), Precision::F32);
    assert_eq!(precision("golden2/qwen3"), Precision::Bf16); // f16 on disk
    assert_eq!(model_of("golden2/qwen2odd").files.len(), 5);
}
