//! transformers + PEFT as the reference: logits, log-probs and greedy tokens of tiny models under every adapter.
//!
//! Twice: with cores computed here from the numbers that PEFT saved (A, B, P, v), which holds the forward pass alone, and
//! with the adapter room's basis, import and expansion.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::*;
use crate::adapter::{Basis, Expander, Facts, Interner, ProjectionDtype, Sites, internal_rank, peft, projection};

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
        Self { rank, factors, cores: Arc::new(Cores::new(rank, data)) }
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

/// Everything within the tolerance, and the greedy tokens.
fn compare(what: &str, model: &mut dyn Model, expected: &Expected, outputs: &Outputs, cores: &Option<Arc<Cores>>) {
    let (difference, place) = worst_difference(model, expected, outputs, cores);
    assert!(difference <= TOLERANCE, "{what}: {place} differ by {difference}");
    for (i, prompt) in expected.prompts.iter().enumerate() {
        let found = greedy(model, prompt, outputs.greedy[i].len(), &[], 20..28, cores);
        assert_eq!(found, outputs.greedy[i], "{what}: prompt {i}: greedy tokens");
    }
}

/// All prompts in one ragged step with the continuation behind each: the worst difference of a logit or log-prob, and where.
fn worst_difference(
    model: &mut dyn Model,
    expected: &Expected,
    outputs: &Outputs,
    cores: &Option<Arc<Cores>>,
) -> (f64, String) {
    let texts: Vec<Vec<u32>> = expected.prompts.iter().map(|p| [&p[..], &expected.continuation].concat()).collect();
    let rows: Vec<Rows<'_>> = texts
        .iter()
        .enumerate()
        .map(|(i, text)| Rows::new(text, 0, 4 * i as u32..4 * i as u32 + 4).under(cores).with_all_logits())
        .collect();
    let mut logits = step(model, &rows).into_iter();
    let mut all: Vec<(f64, String)> = Vec::new();
    for (i, (prompt, text)) in expected.prompts.iter().zip(&texts).enumerate() {
        let logits: Vec<Vec<f32>> = logits.by_ref().take(text.len()).collect();
        let last = &logits[prompt.len() - 1];
        assert_eq!(last.len(), outputs.last_logits[i].len());
        let pairs = last.iter().zip(&outputs.last_logits[i]);
        all.extend(pairs.map(|(a, b)| (f64::from((a - b).abs()), format!("logits of prompt {i}"))));
        for (j, expected_log_prob) in outputs.continuation_logprobs[i].iter().enumerate() {
            let found = log_prob(&logits[prompt.len() - 1 + j], expected.continuation[j]);
            all.push(((found - expected_log_prob).abs(), format!("log-probs of prompt {i}, token {j},")));
        }
    }
    assert!(all.iter().all(|(difference, _)| difference.is_finite()));
    all.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
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
    llama_imported => |make| imported(make, "golden/llama", 4);
    qwen2_imported => |make| imported(make, "golden/qwen2", 4);
    llama3rope_imported => |make| imported(make, "golden2/llama3rope", 2);
    qwen3_imported => |make| imported(make, "golden2/qwen3", 4);
    qwen2odd_imported => |make| imported(make, "golden2/qwen2odd", 3);
    llamabias_imported => |make| imported(make, "golden2/llamabias", 2);
    mistral_imported => |make| imported(make, "golden2/mistral", 3);
}

/// The way of the server: our own basis of the loaded weights, PEFT's files imported against it, numbers expanded to
/// cores, every adapter zero-padded to one rank and all of them over one model.
struct Imported<M> {
    model: M,
    sites: Sites,
    basis: Arc<Basis>,
    expander: Expander,
    served: usize,
}

impl<B: Backend + 'static> Imported<Transformer<B>> {
    fn new(backend: B, loaded: LoadedModel, served: usize) -> Self {
        let LoadedModel { spec, weights, .. } = loaded;
        let sites = spec.sites();
        let rank = internal_rank(served, &sites);
        let basis = Arc::new(Basis::compute(&sites, rank, |site| weights.site(site).to_f32()).unwrap());
        let expander = Expander::new(sites.clone(), basis.clone(), served);
        let model = Transformer::new(backend, spec, weights, &site_factors(&basis), OPTIONS).unwrap();
        Self { model, sites, basis, expander, served }
    }

    fn cores(&self, checkpoint: &Path, scale: f32) -> Option<Arc<Cores>> {
        let read = |name: &str| std::fs::read(checkpoint.join(name)).unwrap();
        let (config, tensors) = (read(peft::CONFIG_FILE), read(peft::MODEL_FILE));
        let imported = peft::import(&config, &tensors, &self.sites, &self.basis, self.served).unwrap();
        let numbers = imported.scheme.numbers(&self.sites);
        let facts = Facts {
            scheme: imported.scheme,
            dtype: imported.dtype,
            fingerprint: self.basis.fingerprint,
            frame: imported.frame,
            approximate: false,
        };
        let adapter = Interner::new().adapter(facts, &imported.bytes, numbers).unwrap();
        Some(self.expander.expand(&[(&adapter, scale)]).unwrap())
    }
}

fn imported<B: Backend + 'static>(backend: impl Fn() -> B, case: &str, served: usize) {
    let folder = fixtures().join(case);
    let expected: Expected = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let mut imported = Imported::new(backend(), model_of(case), served);
    for (name, outputs) in &expected.adapters {
        let checkpoint = folder.join("adapters").join(name);
        let cores = imported.cores(&checkpoint, 1.0);
        compare(&format!("{case}, {name} imported"), &mut imported.model, &expected, outputs, &cores);
        let nothing = imported.cores(&checkpoint, 0.0);
        compare(&format!("{case}, {name} at scale 0"), &mut imported.model, &expected, &expected.base, &nothing);
    }
}

/// Other cases of the same layout, at rank 8: `MOTE_GOLDEN_DIR=folder cargo nextest run --lib --run-ignored only
/// imported_of_a_folder --no-capture` prints the worst difference of each adapter.
#[test]
#[ignore = "needs a folder of golden cases, which MOTE_GOLDEN_DIR names"]
fn imported_of_a_folder() {
    let root = std::path::PathBuf::from(std::env::var("MOTE_GOLDEN_DIR").expect("MOTE_GOLDEN_DIR names a folder"));
    let mut worst = 0f64;
    for case in std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()) {
        let expected: Expected = serde_json::from_slice(&std::fs::read(case.join("expected.json")).unwrap()).unwrap();
        let backend = CpuBackend::new(2, None).unwrap();
        let mut imported = Imported::new(backend, load(&case.join("model")).unwrap(), 8);
        for (name, outputs) in &expected.adapters {
            let cores = imported.cores(&case.join("adapters").join(name), 1.0);
            let (difference, place) = worst_difference(&mut imported.model, &expected, outputs, &cores);
            println!("{}, {name}: {place} differ by {difference:.2e}", case.display());
            worst = worst.max(difference);
        }
    }
    assert!(worst <= TOLERANCE, "{worst}");
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
