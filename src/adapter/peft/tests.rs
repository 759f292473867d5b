//! Against what PEFT wrote and what transformers computed with it.

use std::{
    collections::HashMap,
    io::Write,
    sync::{Arc, LazyLock},
};

use half::bf16;
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use super::*;
use crate::adapter::{
    Adapter, Basis, Convention, Expander, Facts, Frame, Interner, NumberType, ProjectionDtype, Scheme, SiteKind,
    Targets, Ties, codec,
    fixtures::{self, golden},
    internal_rank, reference,
};
use crate::types::fuzz::{cases, edits as changes, spoil};

struct Model {
    sites: Sites,
    basis: Arc<Basis>,
}

/// The largest rank of the golden checkpoints.
const SERVED: usize = 4;

static MODELS: LazyLock<[Model; 2]> = LazyLock::new(|| {
    fixtures::MODELS.map(|model| {
        let sites = fixtures::sites(model);
        let basis = Arc::new(Basis::compute(&sites, internal_rank(SERVED, &sites), fixtures::weights(model)).unwrap());
        Model { sites, basis }
    })
});

fn model(name: &str) -> &'static Model {
    &MODELS[fixtures::MODELS.iter().position(|model| *model == name).unwrap()]
}

impl Model {
    fn import(&self, config: &[u8], model: &[u8]) -> Result<Imported, PeftError> {
        import(config, model, &self.sites, &self.basis, SERVED)
    }

    fn adapter(&self, imported: Imported) -> Arc<Adapter> {
        let numbers = imported.scheme.numbers(&self.sites);
        let Imported { scheme, frame, dtype, bytes, .. } = imported;
        let facts = Facts { scheme, frame, fingerprint: self.basis.fingerprint, dtype, approximate: false };
        Interner::new().adapter(facts, &bytes, numbers).unwrap()
    }

    fn of_scheme(&self, scheme: Scheme, dtype: NumberType) -> Arc<Adapter> {
        let count = scheme.numbers(&self.sites);
        let bytes = codec::encode(&fixtures::noise(3, count), dtype).unwrap();
        self.adapter(Imported { scheme, frame: None, dtype, bytes, worst_cosine: 1.0 })
    }
}

type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(bytes: &[u8]) -> Tensors {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let mut all: Tensors = file
        .iter()
        .map(|(name, view)| (name.to_owned(), view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn file(tensors: &Tensors) -> Vec<u8> {
    let view = |(name, dtype, shape, bytes): &'static (String, Dtype, Vec<usize>, Vec<u8>)| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    };
    let leaked: &'static Tensors = Box::leak(Box::new(tensors.clone()));
    safetensors::serialize(leaked.iter().map(view), None).unwrap()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

fn bytes_of(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

fn narrowed(bytes: &[u8]) -> Vec<u8> {
    floats(bytes).into_iter().flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect()
}

#[test]
fn every_golden_checkpoint_says_what_peft_says() {
    for (name, adapter) in fixtures::cases() {
        let (case, model) = (golden(name, adapter), model(name));
        let imported = model.import(&case.config_bytes, &case.model_bytes).unwrap();
        let numbers: Vec<f32> = codec::numbers_of(&imported.bytes, imported.dtype).collect();
        assert_eq!(numbers, case.numbers(), "{name}/{adapter}");
        assert_eq!(imported.dtype, NumberType::F32);
        let groups = case.expected["v"].as_object().unwrap().len();
        assert_eq!(imported.scheme.groups(&model.sites), groups);
        assert_eq!(imported.scheme.projection, ProjectionDtype::F32);
        assert!(imported.worst_cosine > 1.0 - 1e-6, "{}", imported.worst_cosine);
        let expected = match adapter {
            "u1-13groups" => (2, 1, 13, 42),
            "r4-u3-untied" => (4, 3, model.sites.len(), 7),
            _ => (2, 13, 1, 42),
        };
        let scheme = &imported.scheme;
        assert_eq!((scheme.rank, scheme.u, groups, scheme.seed), expected, "{name}/{adapter}");
        assert!(matches!(imported.frame, Some(Frame::Turned(_))), "torch's vectors are not quite ours");
    }
}

/// `B R A` from the checkpoint's own tensors. What remains is how far PEFT's vectors lean out of the span of ours: these random
/// weights have neighbouring singular values 0.2% apart, and its SVD is in f32.
#[test]
fn the_expanded_core_is_the_checkpoints_own_update() {
    for (name, adapter) in fixtures::cases() {
        let (case, model) = (golden(name, adapter), model(name));
        let imported = model.import(&case.config_bytes, &case.model_bytes).unwrap();
        let off = worst_update(model, &model.adapter(imported), &case.model_bytes);
        assert!(off < 1e-5, "{name}/{adapter}: {off} of a site's largest entry from PEFT's");
    }
}

/// How far our update of a site is from `B R A` of the checkpoint's tensors, relative to its largest entry; the worst site.
fn worst_update(model: &Model, adapter: &Adapter, checkpoint: &[u8]) -> f64 {
    let scheme = adapter.scheme();
    let tensors: HashMap<String, Vec<f32>> = tensors(checkpoint).into_iter().map(|t| (t.0, floats(&t.3))).collect();
    let expander = Expander::new(model.sites.clone(), Arc::clone(&model.basis), SERVED);
    let cores = expander.expand(&[(adapter, 1.0)]).unwrap();
    let (numbers, r): (Vec<f32>, usize) = (adapter.numbers().collect(), scheme.rank);
    let mut worst = 0.0f64;
    for at in scheme.assignments(&model.sites) {
        let read = |part: char| tensors.get(&site_key(&model.sites, at.site, part)).cloned();
        let (a, b) = (read('A').unwrap(), read('B').unwrap());
        let drawn = || crate::adapter::projection(scheme.seed, at.layer_idx, scheme.u, r, scheme.projection);
        let p = read('P').unwrap_or_else(drawn);
        let v = &numbers[at.group * scheme.u..][..scheme.u];
        let mix = |at: usize| v.iter().zip(p.chunks(r * r)).map(|(v, p)| f64::from(*v) * f64::from(p[at])).sum::<f64>();
        let mixed: Vec<f32> = (0..r * r).map(|at| mix(at) as f32).collect();
        // B is [out, r] as U is; A is [r, in] where V is [in, r].
        let inputs = model.sites.shape(at.site).1;
        let a: Vec<f32> = (0..inputs * r).map(|entry| a[entry % r * inputs + entry / r]).collect();
        let theirs = reference::dense(&b, &mixed, &a, r);
        let factors = &model.basis.sites[at.site];
        let ours = reference::dense(&factors.u, cores.site(at.site), &factors.v, cores.rank);
        let largest = theirs.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
        assert!(largest > 1e-3, "an update that could be missed");
        worst = ours.iter().zip(&theirs).fold(worst, |worst, (a, b)| worst.max((a - b).abs() / largest));
    }
    worst
}

#[test]
fn export_and_import_again_is_the_same_adapter() {
    for (name, adapter) in fixtures::cases() {
        let (case, model) = (golden(name, adapter), model(name));
        let imported = model.import(&case.config_bytes, &case.model_bytes).unwrap();
        let adapter = model.adapter(imported.clone());
        let files = export(&adapter, &model.sites, &model.basis, "tiny").unwrap();
        let again = model.import(&files.config, &files.model).unwrap();
        assert_eq!((&again.scheme, &again.frame, &again.bytes), (&imported.scheme, &imported.frame, &imported.bytes));
        assert_eq!(model.adapter(again).generation(), adapter.generation());
        assert!(worst_update(model, &adapter, &files.model) < 1e-6, "{name}: what we write is what we compute");
        assert_eq!(read_archive(&files.to_zip().unwrap(), 1 << 20).unwrap(), files);
        // Every key and shape that PEFT wrote is there, and nothing else but P where PEFT left it out.
        let shapes = |bytes: &[u8]| tensors(bytes).into_iter().map(|t| (t.0, t.2)).collect::<Vec<_>>();
        let mut written = shapes(&files.model);
        if case.config()["save_projection"] == false {
            written.retain(|(key, _)| !key.ends_with("tinylora_P"));
        }
        assert_eq!(written, shapes(&case.model_bytes));
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&serde_json::from_slice(&files.config).unwrap()), keys(&case.config()));
    }
}

/// Writes exports for tests/python/peft_roundtrip.py: `EXPORT_TO=folder cargo nextest run --lib --run-ignored only write_exports`
#[test]
#[ignore = "writes files for a check with PEFT itself"]
fn write_exports() {
    let root = std::path::PathBuf::from(std::env::var("EXPORT_TO").expect("EXPORT_TO names a folder"));
    let write = |folder: std::path::PathBuf, files: &PeftFiles| {
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(CONFIG_FILE), &files.config).unwrap();
        std::fs::write(folder.join(MODEL_FILE), &files.model).unwrap();
    };
    for (name, adapter) in fixtures::cases() {
        let (case, model) = (golden(name, adapter), model(name));
        let imported = model.import(&case.config_bytes, &case.model_bytes).unwrap();
        let (rounded, imported) =
            (codec::decode(&imported.bytes, NumberType::F32, case.numbers().len()).unwrap(), imported);
        let bytes = codec::encode(&rounded, NumberType::Bf16).unwrap();
        let narrow = Imported { dtype: NumberType::Bf16, bytes, ..imported.clone() };
        for (kind, imported) in [("f32", imported), ("bf16", narrow)] {
            let files = export(&model.adapter(imported), &model.sites, &model.basis, "tiny").unwrap();
            write(root.join(name).join(kind).join(adapter), &files);
        }
    }
}

#[test]
fn our_own_schemes_survive_a_trip_through_peft() {
    let model = model("qwen2");
    let (v, q) = (Targets::NONE.with(SiteKind::V), Targets::NONE.with(SiteKind::Q).with(SiteKind::Down));
    let schemes = [
        Scheme::tiny13(),
        Scheme::u13_tied(),
        Scheme { ties: Ties::Groups { count: 4 }, targets: v, seed: 9, ..Scheme::tiny13() },
        Scheme { ties: Ties::Tiled { n_tie: 4 }, ..Scheme::tiny13() },
        Scheme { ties: Ties::Structured { n_tie: 4 }, targets: v, ..Scheme::tiny13() },
        Scheme { ties: Ties::Tiled { n_tie: 1 }, targets: q, u: 2, rank: 3, ..Scheme::tiny13() },
        Scheme { projection: ProjectionDtype::Bf16, ..Scheme::u13_tied() },
    ];
    let expander = Expander::new(model.sites.clone(), Arc::clone(&model.basis), SERVED);
    for scheme in schemes {
        for dtype in [NumberType::Bf16, NumberType::F32] {
            let adapter = model.of_scheme(scheme.clone(), dtype);
            let files = export(&adapter, &model.sites, &model.basis, "tiny").unwrap();
            let again = model.import(&files.config, &files.model).unwrap();
            assert_eq!(again.scheme.assignments(&model.sites), scheme.assignments(&model.sites));
            assert_eq!((again.dtype, &again.bytes[..], &again.frame), (dtype, adapter.bytes(), &None));
            assert_eq!(again.scheme.projection, scheme.projection);
            let again = model.adapter(again);
            assert_eq!(expander.expand(&[(&again, 1.0)]), expander.expand(&[(&adapter, 1.0)]), "bit for bit");
        }
    }
}

#[test]
fn what_peft_cannot_say_is_not_exported() {
    let model = model("llama");
    let schemes = [
        (Scheme::paper16(), "core is that of 'paper'"),
        (Scheme::lora_xs(2, Targets::ALL), "core is that of 'lora-xs'"),
        (Scheme { ties: Ties::Structured { n_tie: 2 }, ..Scheme::tiny13() }, "no weight_tying"),
        // 21 sites: 16 and 5, where PEFT's two groups are 10 and 11.
        (Scheme { ties: Ties::Tiled { n_tie: 16 }, ..Scheme::tiny13() }, "no weight_tying"),
        (Scheme { ties: Ties::Groups { count: 22 }, ..Scheme::tiny13() }, "no weight_tying"),
    ];
    for (scheme, message) in schemes {
        let error = export(&model.of_scheme(scheme, NumberType::F32), &model.sites, &model.basis, "tiny").unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
        assert_eq!(model.of_scheme(Scheme::tiny13(), NumberType::Bf16).scheme().convention, Convention::Peft);
    }
}

#[test]
fn every_count_of_groups_has_a_weight_tying() {
    let model = model("llama");
    for layers in [1usize, 2, 3, 24, 28, 30, 80, 126] {
        let sites = Sites { layers, ..model.sites.clone() };
        for count in 1..=sites.len() {
            let weight_tying = if count == 1 { 1.0 } else { 1.0 - count as f64 / sites.len() as f64 };
            assert_eq!(crate::adapter::scheme::peft_groups(sites.len(), weight_tying), count, "{layers} layers");
        }
    }
}

/// Changes one thing about a good checkpoint and expects a refusal that names it.
#[test]
fn bad_checkpoints_are_refused_by_name() {
    let (case, model) = (golden("llama", "u1-13groups"), model("llama"));
    let refused = |config: &Value, tensors: &Tensors| {
        let config = serde_json::to_vec(config).unwrap();
        model.import(&config, &file(tensors)).unwrap_err()
    };
    let good = tensors(&case.model_bytes);
    for (field, value, message) in [
        ("peft_type", json!("LORA"), "adapter_config.json: peft_type: 'LORA' is not TINYLORA"),
        ("r", json!(5), "adapter_config.json: r: 5 is above the largest rank served, 4"),
        ("r", json!(-1), "adapter_config.json: r: must be a whole number"),
        ("u", json!(0), "adapter_config.json: u: 0 is out of range"),
        ("u", json!(u64::MAX), "adapter_config.json: u: "),
        ("weight_tying", json!(1.5), "adapter_config.json: weight_tying: 1.5 is out of range"),
        ("weight_tying", json!("x"), "adapter_config.json: weight_tying: must be a number"),
        ("weight_tying", json!(1.0), "tinylora_v.1: is not part of a checkpoint"),
        ("weight_tying", json!(0.0), "tinylora_v.13: is missing"),
        ("projection_seed", json!(43), "is not what projection_seed 43 gives"),
        ("target_modules", json!(".*q_proj"), "target_modules: a regular expression is not supported"),
        ("target_modules", json!(["q_proj", "lm_head"]), "'lm_head' is not one of the adapted linears"),
        ("target_modules", json!(["layers.0.self_attn.q_proj"]), "targets self_attn.q_proj in some layers only"),
        ("target_modules", json!([1]), "target_modules: must be a list of module names"),
        ("target_modules", json!([]), "target_modules: at least one"),
        ("layers_to_transform", json!([0]), "layers_to_transform: is not supported"),
        ("modules_to_save", json!(["lm_head"]), "modules_to_save: is not supported"),
        ("bias", json!("all"), "bias: only \"none\""),
    ] {
        let mut config = case.config();
        config[field] = value;
        let error = refused(&config, &good).to_string();
        assert!(error.contains(message), "{field}: {error}");
    }
    let with = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        refused(&case.config(), &tensors)
    };
    let key = "base_model.model.model.layers.1.mlp.up_proj.tinylora_";
    let at = |part: &str| good.iter().position(|t| t.0 == format!("{key}{part}")).unwrap();
    let v = good.iter().position(|t| t.0 == "base_model.tinylora_v.3").unwrap();
    let message = |change: &dyn Fn(&mut Tensors)| with(change).to_string();
    assert!(message(&|t| t[v].3 = bytes_of([f32::NAN])).contains("tinylora_v.3: value 0 is not finite"));
    assert!(message(&|t| drop(t.remove(v))).contains("tinylora_v.3: is missing"));
    assert!(message(&|t| drop(t.remove(at("B")))).contains("layers.1.mlp.up_proj.tinylora_B: is missing"));
    assert!(message(&|t| drop(t.remove(at("P")))).contains("tinylora_P: is missing"));
    assert!(message(&|t| t[at("A")].2 = vec![64, 2]).contains("has shape [64, 2], not [2, 64]"));
    assert!(message(&|t| t[v].1 = Dtype::I32).contains("is I32"));
    assert!(message(&|t| t.push(("extra".into(), Dtype::F32, vec![1], vec![0; 4]))).contains("extra: is not part"));
    let none = message(&|t| t.retain(|t| !t.0.ends_with("_A") && !t.0.ends_with("_B")));
    assert!(none.contains("save_pretrained"), "{none}");
    let nudge = |t: &mut Tensors| t[at("P")].3[0] ^= 1;
    assert!(message(&nudge).contains("is not what projection_seed 42 gives for module 12"));

    let other = with(&|t| t[at("A")].3 = bytes_of(fixtures::noise(1, 128)));
    assert!(other.is_incompatible() && other.to_string().contains("made for other weights"), "{other}");
    assert!(other.to_string().contains("model.layers.1.mlp.up_proj"));
    let larger = with(&|t| t[at("A")].3 = bytes_of(floats(&t[at("A")].3).into_iter().map(|x| 2.0 * x)));
    assert!(larger.is_incompatible() && larger.to_string().contains("4.000 times"), "{larger}");
    let larger = with(&|t| t[at("B")].3 = bytes_of(floats(&t[at("B")].3).into_iter().map(|x| 2.0 * x)));
    assert!(larger.is_incompatible() && larger.to_string().contains("4.000 times"), "{larger}");
    let zero = with(&|t| t[at("B")].3.fill(0));
    assert!(zero.is_incompatible(), "{zero}");
}

#[test]
fn a_checkpoint_of_the_other_model_is_refused() {
    let (case, model) = (golden("llama", "u13-tied"), model("llama"));
    let other = fixtures::uniform_sites(3, 1, 1);
    let mut basis = Basis::clone(&model.basis);
    for site in &mut basis.sites {
        site.v.reverse();
    }
    let error = import(&case.config_bytes, &case.model_bytes, &model.sites, &basis, SERVED).unwrap_err();
    assert!(error.is_incompatible());
    assert!(import(&case.config_bytes, &case.model_bytes, &other, &basis, SERVED).is_err());
    let case = golden("qwen2", "u13-tied");
    assert!(model.import(&case.config_bytes, &case.model_bytes).is_err(), "another count of layers");
}

/// As PEFT saves on a bf16 base: A, B, P and v in bf16 (v-only: no P; its dtype follows A's).
#[test]
fn a_bf16_checkpoint_keeps_its_26_bytes_and_its_rounded_projections() {
    for adapter in ["u1-13groups", "u13-tied", "v-only"] {
        let (case, model) = (golden("llama", adapter), model("llama"));
        let narrow: Tensors = tensors(&case.model_bytes)
            .into_iter()
            .map(|(name, _, shape, bytes)| (name, Dtype::BF16, shape, narrowed(&bytes)))
            .collect();
        let imported = model.import(&case.config_bytes, &file(&narrow)).unwrap();
        assert_eq!((imported.dtype, imported.bytes.len()), (NumberType::Bf16, 26));
        assert_eq!(imported.scheme.projection, ProjectionDtype::Bf16);
        assert!(imported.worst_cosine > 0.9999);
        let off = worst_update(model, &model.adapter(imported), &widened(&narrow));
        assert!(off < 8e-3, "{adapter}: {off} of a site's largest entry, for two factors rounded by up to 2^-8");
    }
}

fn widened(narrow: &Tensors) -> Vec<u8> {
    let wide =
        |bytes: &[u8]| bytes_of(bytes.as_chunks::<2>().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()));
    file(&narrow.iter().map(|t| (t.0.clone(), Dtype::F32, t.2.clone(), wide(&t.3))).collect())
}

/// Nobody's SVD gives them, but PEFT would compute with them: U and V keep their own signs and turns.
#[test]
fn sides_may_differ_in_their_signs() {
    let (case, model) = (golden("llama", "r4-u3-untied"), model("llama"));
    let mut flipped = tensors(&case.model_bytes);
    for (key, _, shape, bytes) in &mut flipped {
        if key.contains("layers.1.") && key.ends_with("_A") {
            let second = floats(bytes).into_iter().enumerate();
            *bytes = bytes_of(second.map(|(at, x)| if at / shape[1] == 1 { -x } else { x }));
        }
    }
    let bytes = file(&flipped);
    let adapter = model.adapter(model.import(&case.config_bytes, &bytes).unwrap());
    assert!(worst_update(model, &adapter, &bytes) < 1e-5);
    let plain = model.adapter(model.import(&case.config_bytes, &case.model_bytes).unwrap());
    assert!(worst_update(model, &plain, &bytes) > 0.1, "it is another update");
}

fn tar_gz(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    for (path, bytes) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        // Written past `set_path`, which would refuse what an attacker would not.
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        tar.append(&header, *bytes).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap()
}

fn zip_of(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (path, bytes) in entries {
        zip.start_file(*path, zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

#[test]
fn archives_are_read_whatever_their_paths_and_bounded() {
    let files = PeftFiles { config: b"{}".to_vec(), model: vec![1, 2, 3] };
    let entries: [(&str, &[u8]); 3] = [
        ("../../etc/adapter_config.json", b"{}"),
        ("README.md", b"hello"),
        ("a/b/adapter_model.safetensors", &[1, 2, 3]),
    ];
    for archive in [zip_of(&entries), tar_gz(&entries)] {
        assert_eq!(read_archive(&archive, 100).unwrap(), files);
        assert!(read_archive(&archive, 4).unwrap_err().to_string().contains("too large"));
    }
    let message = |bytes: &[u8]| read_archive(bytes, 1000).unwrap_err().to_string();
    assert_eq!(message(b"hello"), "archive: is neither a zip nor a gzipped tar");
    assert!(message(&zip_of(&entries[..2])).contains("has no adapter_model.safetensors"));
    assert!(message(&tar_gz(&entries[1..])).contains("has no adapter_config.json"));
    let twice = [("a/adapter_config.json", &b"{}"[..]), ("adapter_config.json", b"{}")];
    assert!(message(&zip_of(&twice)).contains("twice") && message(&tar_gz(&twice)).contains("twice"));
    // 64 MiB of zeros in 64 KiB: in the file we want, and in one that we skip.
    let zeros = vec![0; 64 << 20];
    for name in ["adapter_model.safetensors", "other"] {
        let bomb = [(name, &zeros[..]), ("adapter_config.json", b"{}")];
        assert!(message(&tar_gz(&bomb)).contains("too large"), "{name}");
    }
    assert!(
        message(&zip_of(&[("adapter_model.safetensors", &zeros), ("adapter_config.json", b"{}")]))
            .contains("too large")
    );
}

/// Configuration, tensors, and both in a zip and in a gzipped tar.
type Checkpoint = (Vec<u8>, Vec<u8>, Vec<u8>, Vec<u8>);

fn checkpoint() -> &'static Checkpoint {
    static CHECKPOINT: LazyLock<Checkpoint> = LazyLock::new(|| {
        let case = golden("llama", "u1-13groups");
        let entries: [(&str, &[u8]); 2] = [(CONFIG_FILE, &case.config_bytes), (MODEL_FILE, &case.model_bytes)];
        let (zip, tar) = (zip_of(&entries), tar_gz(&entries));
        (case.config_bytes, case.model_bytes, zip, tar)
    });
    &CHECKPOINT
}

/// Some bytes overwritten, then perhaps cut short.
fn mutated(bytes: &[u8], edits: &[(prop::sample::Index, u8)], keep: Option<prop::sample::Index>) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (at, value) in edits {
        let at = at.index(bytes.len());
        bytes[at] = *value;
    }
    if let Some(keep) = keep {
        bytes.truncate(keep.index(bytes.len()));
    }
    bytes
}

fn edits() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    prop::collection::vec(any::<(prop::sample::Index, u8)>(), 0..6)
}

proptest! {
    #![proptest_config(cases(400))]

    #[test]
    fn no_bytes_make_import_panic(
        config_edits in edits(), config_keep: Option<prop::sample::Index>,
        model_edits in edits(), model_keep: Option<prop::sample::Index>, header_edits in edits(),
    ) {
        let (config, model_bytes, ..) = checkpoint();
        let model = model("llama");
        let config = mutated(config, &config_edits, config_keep.filter(|_| config_edits.len() > 3));
        let mut tensors = mutated(model_bytes, &model_edits, model_keep.filter(|_| model_edits.len() > 3));
        // The header is a tenth of the file; aim at it too.
        let header = tensors.len().min(6000);
        if header > 0 {
            for (at, value) in header_edits {
                tensors[at.index(header)] = value;
            }
        }
        if let Ok(imported) = model.import(&config, &tensors) {
            let numbers = imported.scheme.numbers(&model.sites);
            prop_assert!(codec::check(&imported.bytes, imported.dtype, numbers).is_ok());
        }
    }

    #[test]
    fn any_value_in_any_field_is_taken_or_refused(
        field in 0usize..21, number: i64, float: f64, kind in 0u8..6, text in ".{0,12}"
    ) {
        let (config, tensors, ..) = checkpoint();
        let mut config: Value = serde_json::from_slice(config).unwrap();
        let key = config.as_object().unwrap().keys().nth(field).unwrap().clone();
        config[&key] = match kind {
            0 => number.into(),
            1 => float.into(),
            2 => text.into(),
            3 => json!([text]),
            4 => Value::Null,
            _ => json!({"x": number}),
        };
        drop(model("llama").import(&serde_json::to_vec(&config).unwrap(), tensors));
    }

    #[test]
    fn no_bytes_make_an_archive_panic(edits in edits(), keep: Option<prop::sample::Index>, tar: bool) {
        let (_, _, zip, gz) = checkpoint();
        let bytes = mutated(if tar { gz } else { zip }, &edits, keep.filter(|_| edits.len() > 2));
        drop(read_archive(&bytes, 1 << 20));
    }

    /// Lengths, counts and pieces in wrong places, in archives and in the header of the tensors.
    #[test]
    fn fuzz_archives_and_headers(changed in changes(), tar: bool, start: bool) {
        let (config, tensors, zip, gz) = checkpoint();
        let bytes = if tar { gz } else { zip };
        let limit = tensors.len() + 1000;
        if let Ok(files) = read_archive(&spoil(bytes, &changed, if start { 200 } else { usize::MAX }), limit) {
            prop_assert!(files.config.len().max(files.model.len()) <= limit);
        }
        drop(model("llama").import(config, &spoil(tensors, &changed, if start { 16 } else { 6000 })));
    }

    #[test]
    fn no_noise_is_a_checkpoint(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(model("llama").import(&bytes, &bytes).is_err());
        prop_assert!(read_archive(&bytes, 1 << 20).is_err());
    }
}
