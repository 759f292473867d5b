//! `mote eval`

use std::{future::Future, path::Path};

use mote_trainer::{EvalSettings, Evaluation, FinalReport, Method, Stop, data::Dataset, evaluate};
use serde_json::{Map, Value, json};

use super::{
    blocking,
    files::{data_task, read, read_scheme, write_json},
    first, open,
};
use crate::{
    app::AppError,
    config::EvalArgs,
    service::training::{Local, LocalTask, measured, validate},
};

/// `mote eval`: accuracy with its interval, of an adapter and of the base.
///
/// # Errors
/// Flags and data that do not fit, with the line; a model that does not load; files that cannot be written.
pub async fn eval(args: EvalArgs, asked: impl Future<Output = ()> + Send + 'static) -> Result<String, AppError> {
    blocking(asked, move |stop| {
        let scheme = read_scheme(args.data.scheme.as_deref(), args.adapter.as_deref())?;
        let task = data_task(&args.data, Method::Grpo, scheme)?;
        let (local, engine) = open(&args.model, &args.engine)?;
        let outcome = run(&args, &local, &task, stop);
        engine.shutdown(std::time::Duration::ZERO);
        outcome
    })
    .await
}

fn run(args: &EvalArgs, local: &Local, task: &LocalTask, stop: &Stop) -> Result<String, AppError> {
    let mut prepared = local.prepare(task)?;
    let mut policy = local.policy(task.method, &prepared, stop).map_err(mote_trainer::TrainError::from)?;
    let Some(grader) = prepared.grader.take() else { return Err(AppError::Flag("--grader is required".into())) };
    let settings = EvalSettings { samples: args.data.samples, ..EvalSettings::of(&prepared.settings) };
    let data = first(prepared.training, args.limit)?;
    let progress = super::Progress::new(0, 0, &[]);
    let (parts, completions) = match &args.adapter {
        None => {
            progress.measure(data.len());
            let zeros = vec![0.0; prepared.numbers];
            let done = &mut |n| progress.measured(n);
            let found = evaluate(policy.as_mut(), grader.as_ref(), &data, &zeros, &settings, stop, done)?;
            (Map::from_iter([("zero".to_owned(), measured(&found))]), vec![("zero", found)])
        }
        Some(path) => {
            progress.measure(2 * data.len());
            let numbers = Local::read_numbers(&read(path)?, prepared.numbers)?;
            let done = &mut |n| progress.measured(n);
            let found =
                validate(policy.as_mut(), Some(grader.as_ref()), &data, &numbers, false, &settings, stop, done)?;
            let Some(FinalReport { zero, adapter, .. }) = found.report else {
                return Err(AppError::Train("there is nothing to measure".into()));
            };
            (found.parts, vec![("zero", zero), ("adapter", adapter)])
        }
    };
    progress.end();
    if let Some(path) = &args.csv {
        write_csv(path, &data, &completions, settings.temperature)?;
    }
    let lines = words(&parts);
    if let Some(path) = &args.json {
        let facts = json!({
            "model": local.base().model_id, "fingerprint": local.base().fingerprint.to_string(), "scheme": prepared.scheme.to_json(),
            "adapter": args.adapter, "data": args.data.data, "results": parts,
        });
        write_json(path, &facts)?;
    }
    Ok(lines.join("\n"))
}

/// Lines for people: `adapter: greedy 0.350 (0.288 to 0.418), sampled 0.281 (..), of 200 items`.
pub(super) fn words(parts: &Map<String, Value>) -> Vec<String> {
    let range = |interval: &Value| match (interval["low"].as_f64(), interval["high"].as_f64()) {
        (Some(low), Some(high)) => format!(" ({low:.3} to {high:.3})"),
        _ => String::new(),
    };
    let of = |(name, part): (&String, &Value)| {
        let mut words = Vec::new();
        if let Some(mean) = part["mean"].as_f64() {
            words.push(format!("{mean:+.3}{}", range(&part["interval"])));
        }
        if let Some(reward) = part["reward"].as_f64() {
            words.push(format!("greedy {reward:.3}{}", range(&part["interval"])));
        }
        if let Some(sampled) = part["sampled"].as_f64() {
            words.push(format!("sampled {sampled:.3}{}", range(&part["sampled_interval"])));
        }
        if let Some(loss) = part["loss"].as_f64() {
            words.push(format!("loss {loss:.4}"));
        }
        let shown = match name.as_str() {
            "zero" => "base",
            "full_precision" => "full precision",
            name => name,
        };
        format!("{shown}: {}, {} items", words.join(", "), part["n"])
    };
    parts.iter().map(of).collect()
}

/// A line a completion.
fn write_csv(
    path: &Path,
    data: &Dataset,
    evaluations: &[(&str, Evaluation)],
    temperature: f32,
) -> Result<(), AppError> {
    let failed = |error: csv::Error| AppError::Train(format!("{}: {error}", path.display()));
    let mut file = csv::Writer::from_path(path).map_err(failed)?;
    file.write_record(["adapter", "item", "place", "temperature", "reward", "tokens", "finished", "text"])
        .map_err(failed)?;
    for (name, evaluation) in evaluations {
        for it in &evaluation.completions {
            let temperature = if it.sample.is_none() { 0.0 } else { temperature };
            let record = [
                (*name).to_owned(),
                it.item.to_string(),
                data.examples[it.item].place.to_string(),
                temperature.to_string(),
                it.reward.to_string(),
                it.tokens.to_string(),
                it.finished.to_string(),
                it.text.clone(),
            ];
            file.write_record(record).map_err(failed)?;
        }
    }
    file.flush().map_err(|error| AppError::Io(path.display().to_string(), error))
}
