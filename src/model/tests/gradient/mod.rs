//! The gradient against PyTorch's, against finite differences, and against itself cut in other ways.

mod cuts;
mod differences;
mod golden;
mod serving;
mod speed;

use super::{golden::model_of, *};
use crate::adapter::{Basis, Expander, Facts, NumberType, Scheme, internal_rank};

type Sequences<'a> = Vec<(&'a [u32], &'a [u32])>;

/// Runs a task to its end with units of any number a call; weights as a function of the completion and the log-probs.
fn run(
    model: &mut dyn Model,
    job: GradientJob,
    budget: u64,
    weights: impl Fn(usize, &[f32]) -> Vec<f32>,
) -> (Vec<Vec<f32>>, Option<CoreGradient>) {
    let mut task = model.begin_gradient(job).unwrap();
    loop {
        match model.advance_gradient(&mut task, budget).unwrap().stage {
            Stage::Forward | Stage::Backward => {}
            Stage::Weights => {
                let logprobs = task.logprobs().unwrap().to_vec();
                let weights: Vec<_> = logprobs.iter().enumerate().map(|(i, l)| weights(i, l)).collect();
                task.set_weights(&weights).unwrap();
            }
            Stage::Done => return (task.logprobs().unwrap().to_vec(), task.gradient().cloned()),
        }
    }
}

/// The log-probs alone.
fn logprobs(model: &mut dyn Model, sequences: &Sequences<'_>, cores: &Arc<Cores>, temperature: f32) -> Vec<Vec<f32>> {
    let job = GradientJob::new(sequences.iter().copied(), cores.clone(), temperature).only_logprobs();
    let (logprobs, gradient) = run(model, job, u64::MAX, |_, _| unreachable!("nobody asked for a derivative"));
    assert!(gradient.is_none());
    logprobs
}

/// A model with a basis of its own, and how numbers become cores and back.
struct Fixture<B: Backend> {
    model: Transformer<B>,
    expander: Expander,
}

impl<B: Backend> Fixture<B> {
    fn new(backend: B, loaded: LoadedModel, served: usize, precision: Precision) -> Self {
        let LoadedModel { spec, weights, .. } = loaded;
        let sites = spec.sites();
        let basis = Basis::compute(&sites, internal_rank(served, &sites), |site| weights.site(site).to_f32()).unwrap();
        let basis = Arc::new(basis);
        let options = TransformerOptions { precision, max_positions: 96, kv_blocks: 32 };
        let model = Transformer::new(backend, spec, weights, &site_factors(&basis), options).unwrap();
        Self { model, expander: Expander::new(sites, basis, served) }
    }

    fn facts(&self, scheme: Scheme) -> Facts {
        let fingerprint = self.expander.basis().fingerprint;
        Facts { scheme, frame: None, fingerprint, dtype: NumberType::F32, approximate: false }
    }

    fn cores(&self, facts: &Facts, numbers: &[f32]) -> Arc<Cores> {
        let bytes = crate::adapter::codec::encode(numbers, NumberType::F32).unwrap();
        let adapter = crate::adapter::Interner::new().adapter(facts.clone(), &bytes, numbers.len()).unwrap();
        self.expander.expand(&[(&adapter, 1.0)]).unwrap()
    }
}

/// Numbers in -1..1.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn text(seed: u64, len: usize, vocab: usize) -> Vec<u32> {
    noise(seed, len).into_iter().map(|x| ((x + 1.0) * 0.5 * (vocab - 1) as f32) as u32).collect()
}
