//! `mote train`, `mote eval` and `mote task`: training and measuring in this process, over the same engine, trainer and graders as the server's jobs.

mod chart;
mod evaluate;
mod files;
mod progress;

use std::{future::Future, path::Path, time::Instant};

use mote_trainer::{EvalSettings, Method, NoGrader, Run, Stop, TrainError, data::Dataset, grader::Grader};
use serde_json::{Value, json};

pub use evaluate::eval;

use self::{
    files::{beside, data_task, read, read_scheme, write, write_json},
    progress::Progress,
};
use super::{AppError, base};
use crate::{
    config::{EngineArgs, MethodChoice, ModelArgs, TaskArgs, TaskChoice, TrainArgs},
    engine::Handle,
    service::{
        Error,
        training::{DataLimits, Local, LocalTask, Prepared, TrainingConfig, validate},
    },
};

/// A data set of the command line is the user's own: it is as long as the memory allows.
const LIMITS: DataLimits = DataLimits { bytes: 4 << 30, line_bytes: 64 << 20, items: 10_000_000 };

impl From<Error> for AppError {
    fn from(error: Error) -> Self {
        Self::Train(error.message)
    }
}

impl From<TrainError> for AppError {
    fn from(error: TrainError) -> Self {
        match error {
            TrainError::Stopped => Self::Interrupted,
            error => Self::Train(error.to_string()),
        }
    }
}

/// The method of a flag.
fn method_of(choice: MethodChoice) -> Method {
    match choice {
        MethodChoice::Grpo => Method::Grpo,
        MethodChoice::Es => Method::Es,
        MethodChoice::Sft => Method::Sft,
    }
}

/// A base of one's own, and what to stop when done.
fn open(model: &ModelArgs, engine: &EngineArgs) -> Result<(Local, Handle), AppError> {
    let base = base::start(model, engine)?;
    let handle = base.engine.clone();
    let config = TrainingConfig { data: LIMITS, steps: u64::MAX, ..TrainingConfig::default() };
    Ok((Local::new(base.info, base.basis, base.engine, config), handle))
}

/// Runs blocking work that can be asked to stop.
async fn blocking<T: Send + 'static>(
    asked: impl Future<Output = ()> + Send + 'static,
    work: impl FnOnce(&Stop) -> Result<T, AppError> + Send + 'static,
) -> Result<T, AppError> {
    let stop = Stop::default();
    let told = stop.clone();
    let watch = tokio::spawn(async move {
        asked.await;
        told.stop();
    });
    let outcome = tokio::task::spawn_blocking(move || work(&stop)).await;
    watch.abort();
    outcome.map_err(|error| AppError::Train(format!("the work failed: {error}")))?
}

/// The first items of a data set.
fn first(data: Dataset, most: Option<std::num::NonZeroUsize>) -> Result<Dataset, AppError> {
    match most.map(usize::from).filter(|&most| most < data.len()) {
        None => Ok(data),
        Some(most) => Dataset::new(data.examples[..most].to_vec()).map_err(|error| AppError::Train(error.to_string())),
    }
}

/// `mote train`: what was found, in words. Interrupted, it leaves a checkpoint to go on from.
///
/// # Errors
/// Flags and data that do not fit, with the line; a model that does not load; files that cannot be written.
pub async fn train(args: TrainArgs, asked: impl Future<Output = ()> + Send + 'static) -> Result<String, AppError> {
    blocking(asked, move |stop| {
        let method = method_of(args.method);
        let init = args.init.as_deref();
        let mut task = data_task(&args.data, method, read_scheme(args.data.scheme.as_deref(), init)?)?;
        task.validation = args.validation.as_deref().map(read).transpose()?;
        let (local, engine) = open(&args.model, &args.engine)?;
        let outcome = run(&args, &local, &task, stop);
        engine.shutdown(std::time::Duration::ZERO);
        outcome
    })
    .await
}

fn run(args: &TrainArgs, local: &Local, task: &LocalTask, stop: &Stop) -> Result<String, AppError> {
    let mut prepared = local.prepare(task)?;
    let validation = prepared.validation.take().map(|data| first(data, args.validation_limit)).transpose()?;
    let mut policy = local.policy(task.method, &prepared, stop).map_err(TrainError::from)?;
    let initial = match &args.init {
        None => vec![0.0; prepared.numbers],
        Some(path) => Local::read_numbers(&read(path)?, prepared.numbers)?,
    };
    let Prepared { settings, training, grader, scheme, .. } = prepared;
    let grader = grader.as_deref();
    let checkpoint = beside(&args.out, "checkpoint");
    let (mut run, mut curve) = match saved(args, &checkpoint)? {
        None => (Run::new(settings.clone(), training, initial)?, Vec::new()),
        Some((state, curve)) => {
            let run = serde_json::from_value(state)
                .map_err(|error| error.to_string())
                .and_then(|state| Run::resume(state, &settings, training).map_err(|error| error.to_string()));
            (run.map_err(|error| AppError::Train(format!("{}: {error}", checkpoint.display())))?, curve)
        }
    };
    let began = Instant::now();
    let progress = Progress::new(settings.steps, run.steps_done(), &curve);
    let grading: &dyn Grader = grader.unwrap_or(&NoGrader);
    let save = |run: &Run, curve: &[Value]| write_json(&checkpoint, &json!({"run": run.checkpoint(), "curve": curve}));
    while run.end().is_none() {
        match run.step(policy.as_mut(), grading, stop) {
            Ok(step) => {
                curve.push(metrics_of(&step));
                progress.step(&step, &curve);
                if run.checkpoint_due() {
                    save(&run, &curve)?;
                }
            }
            Err(TrainError::Stopped) => {
                save(&run, &curve)?;
                return Err(AppError::Interrupted);
            }
            Err(error) => return Err(error.into()),
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    if let Some(end) = run.end().filter(|end| end.is_failure()) {
        return Err(AppError::Train(end.to_string()));
    }
    // From here on only the measurement can be lost.
    save(&run, &curve)?;
    write(&args.out, &Local::write_numbers(run.numbers())?)?;
    let mut report = json!({
        "model": local.base().model_id, "fingerprint": local.base().fingerprint.to_string(), "scheme": scheme.to_json(), "dtype": "bf16",
        "numbers": run.numbers().len(), "method": task.method, "seed": task.seed, "hyperparameters": task.hyperparameters,
        "grader": task.grader, "prompt": task.prompt, "data": args.data.data, "steps": run.steps_done(), "end": run.end(),
        "seconds": seconds,
    });
    let mut words = vec![format!("{} steps in {seconds:.0} s; {}", run.steps_done(), args.out.display())];
    if let Some(data) = validation {
        let began = Instant::now();
        let eval = EvalSettings { samples: args.data.samples, ..EvalSettings::of(&settings) };
        progress.measure(data.len() * (2 + usize::from(args.full_precision)));
        let found =
            validate(policy.as_mut(), grader, &data, run.numbers(), args.full_precision, &eval, stop, &mut |n| {
                progress.measured(n);
            })?;
        words.extend(evaluate::words(&found.parts));
        report["validation"] = Value::Object(found.parts);
        report["validation_seconds"] = began.elapsed().as_secs_f64().into();
    }
    progress.end();
    report["curve"] = curve.clone().into();
    write_json(&beside(&args.out, "json"), &report)?;
    let title = format!("{}, {} numbers, {}", task.method.name(), run.numbers().len(), local.base().model_id);
    chart::write_svg(&beside(&args.out, "svg"), &title, &curve)?;
    // What it was for is there now.
    let _ = std::fs::remove_file(&checkpoint);
    Ok(words.join("\n"))
}

/// The metrics of a step and its time, one flat object.
fn metrics_of(step: &mote_trainer::StepReport) -> Value {
    let mut value = serde_json::to_value(&step.metrics).unwrap_or_default();
    if let (Value::Object(all), Ok(Value::Object(timing))) = (&mut value, serde_json::to_value(step.timing)) {
        all.insert("step".to_owned(), step.step.into());
        all.extend(timing);
    }
    value
}

/// What an earlier run left: its state and the curve so far.
fn saved(args: &TrainArgs, path: &Path) -> Result<Option<(Value, Vec<Value>)>, AppError> {
    if !args.resume || !path.exists() {
        return Ok(None);
    }
    let broken = || AppError::Train(format!("{}: not a checkpoint of mote train", path.display()));
    let mut value: Value = serde_json::from_slice(&read(path)?).map_err(|_| broken())?;
    let Value::Array(curve) = value["curve"].take() else { return Err(broken()) };
    Ok(Some((value["run"].take(), curve)))
}

/// `mote task`: writes a made-up task; says where.
///
/// # Errors
/// More items than the task has questions; files that cannot be written.
pub fn task(args: &TaskArgs) -> Result<String, AppError> {
    let task = match args.task {
        TaskChoice::Arithmetic => mote_trainer::tasks::Task::Arithmetic,
        TaskChoice::OnlyNumber => mote_trainer::tasks::Task::OnlyNumber,
    };
    let split = task.split(args.train, args.validation, args.seed).ok_or_else(|| {
        AppError::Flag(format!("--train and --validation: the task has {} different questions", task.len()))
    })?;
    std::fs::create_dir_all(&args.out).map_err(|error| AppError::Io(args.out.display().to_string(), error))?;
    for (name, items) in [("train.jsonl", &split.train), ("validation.jsonl", &split.validation)] {
        let lines: String = items.iter().map(|item| format!("{item}\n")).collect();
        write(&args.out.join(name), lines.as_bytes())?;
    }
    write_json(&args.out.join("grader.json"), &task.grader())?;
    Ok(args.out.display().to_string())
}
