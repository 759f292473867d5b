//! `mote train`, `mote eval` and `mote task`.

use std::{num::NonZeroUsize, path::PathBuf};

use clap::{Args, ValueEnum};

use super::{EngineArgs, ModelArgs};

/// How to learn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MethodChoice {
    /// Reinforcement learning with group-relative advantages.
    Grpo,
    /// Evolution strategies: no gradient.
    Es,
    /// Cross-entropy on demonstrations.
    Sft,
}

/// Data and how completions are judged.
#[derive(Debug, Args)]
#[command(next_help_heading = "Data")]
pub struct DataArgs {
    /// Items: JSON lines or one JSON list, such as GSM8K and SVAMP as they are.
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// What makes the prompt of items without `messages`: text with `{{item.FIELD}}` in it, or a JSON list of messages [default: what the data's shape says].
    #[arg(long, value_name = "TEMPLATE")]
    pub prompt: Option<String>,
    /// Grader: a type such as `number` or `string_check` (against the item's answer), a JSON description, or @FILE with one [default: what the data's shape says].
    #[arg(long, value_name = "GRADER")]
    pub grader: Option<String>,
    /// Scheme of the adapter: a name or a JSON description [default: what stands beside the adapter's file, else `tiny13`].
    #[arg(long, value_name = "SCHEME")]
    pub scheme: Option<String>,
    /// A hyperparameter, e.g. `steps=20`, `learning_rate=0.03`, `max_completion_tokens=24`, `temperature=1` (all are in the API's documentation of POST /adapters/train). Repeatable.
    #[arg(long = "set", short = 's', value_name = "NAME=VALUE")]
    pub set: Vec<String>,
    /// Of every random choice.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Completions of each item in the evaluation that are sampled at the temperature of training, beside the greedy one.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub samples: usize,
}

/// `mote train`
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// What to learn from.
    #[command(flatten)]
    pub data: DataArgs,
    /// Held-out items: the base and the adapter are measured on them at the end.
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    pub validation: Option<PathBuf>,
    /// Measure on so many of them only.
    #[arg(long, value_name = "N", help_heading = "Data")]
    pub validation_limit: Option<NonZeroUsize>,
    /// How to learn.
    #[arg(long, value_enum, default_value_t = MethodChoice::Grpo)]
    pub method: MethodChoice,
    /// Begin at this adapter instead of at the base.
    #[arg(long, value_name = "FILE")]
    pub init: Option<PathBuf>,
    /// Also measure the adapter before it is rounded.
    #[arg(long)]
    pub full_precision: bool,
    /// The adapter: its numbers in bf16. Beside it are written FILE.json (scheme, curve and results) and FILE.svg (the curve).
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Go on from FILE.checkpoint of an earlier run with the same flags, if there is one.
    #[arg(long)]
    pub resume: bool,
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The engine.
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// `mote eval`
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// What to measure on.
    #[command(flatten)]
    pub data: DataArgs,
    /// The adapter's file; without it the base alone is measured.
    #[arg(long, value_name = "FILE")]
    pub adapter: Option<PathBuf>,
    /// Measure on so many items only.
    #[arg(long, value_name = "N", help_heading = "Data")]
    pub limit: Option<NonZeroUsize>,
    /// Write every completion to this CSV file.
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Write the results as JSON to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The engine.
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// A task with checkable answers, made up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TaskChoice {
    /// Sums of one- and two-digit numbers; graded by the last number.
    Arithmetic,
    /// Tiny word problems whose answer must be the number and nothing else: half the reward is for the form.
    OnlyNumber,
}

/// `mote task`
#[derive(Debug, Args)]
pub struct TaskArgs {
    /// Which.
    #[arg(value_enum)]
    pub task: TaskChoice,
    /// Folder for `train.jsonl`, `validation.jsonl` and `grader.json`.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Items to train on.
    #[arg(long, value_name = "N", default_value_t = 400)]
    pub train: usize,
    /// Held-out items.
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub validation: usize,
    /// Of the draw.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}
