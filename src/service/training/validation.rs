//! The measurement at the end of a job: the base, the adapter as it is published, and perhaps the one before rounding.

use mote_trainer::{
    EvalSettings, FinalReport, Policy, Stop, TrainError, data::Dataset, demonstration_loss, final_report,
    grader::Grader, round_to_bf16,
};
use serde_json::{Map, Value, json};

use super::report;

/// Demonstrations whose loss is taken at once.
const LOSS_BATCH: usize = 32;

/// What was found.
#[derive(Debug)]
pub struct Validation {
    /// As a job's result shows it, a part by name.
    pub parts: Map<String, Value>,
    /// Everything, where there is a grader.
    pub report: Option<FinalReport>,
}

/// Measures numbers on held-out items: rewards if there is a grader, the loss if all items have a demonstration. `progress` hears how many completions' items are done.
///
/// # Errors
/// The policy's, the grader's, or that it was stopped.
#[allow(clippy::too_many_arguments)]
pub fn validate(
    policy: &mut dyn Policy,
    grader: Option<&dyn Grader>,
    data: &Dataset,
    numbers: &[f32],
    full_precision: bool,
    settings: &EvalSettings,
    stop: &Stop,
    progress: &mut dyn FnMut(usize),
) -> Result<Validation, TrainError> {
    let mut parts = Map::new();
    let mut found = None;
    if let Some(grader) = grader {
        let measured = final_report(policy, grader, data, numbers, full_precision, settings, stop, progress)?;
        parts.insert("zero".to_owned(), report::measured(&measured.zero));
        parts.insert("adapter".to_owned(), report::measured(&measured.adapter));
        if let Some(full) = &measured.full_precision {
            parts.insert("full_precision".to_owned(), report::measured(full));
        }
        parts.insert("gain".to_owned(), report::estimate(&measured.gain));
        found = Some(measured);
    }
    if data.examples.iter().all(|example| !example.target.is_empty()) {
        let rounded = round_to_bf16(numbers);
        let mut vectors = vec![("zero", vec![0.0; rounded.len()]), ("adapter", rounded)];
        if full_precision {
            vectors.push(("full_precision", numbers.to_vec()));
        }
        for (name, numbers) in vectors {
            let loss = demonstration_loss(policy, data, &numbers, LOSS_BATCH, stop)?;
            let part = parts.entry(name).or_insert_with(|| json!({"n": data.len()}));
            part["loss"] = json!(loss);
        }
    }
    Ok(Validation { parts, report: found })
}
