mod evaluating;
mod learning;
mod refusing;
mod repeating;
mod reporting;

use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::{
    data::{DataError, Example, Place},
    eval::{EvalSettings, demonstration_loss, evaluate, final_report},
    grader::{NoRemote, build},
    hyper::{Hyperparameters, Method},
    loss::{ClipSettings, GrpoLoss, GrpoSequence, LossKind},
    policy::{RolloutRequest, Sequence, TokenLoss},
    settings::Settings,
    toy::Toy,
};

fn dataset(prompts: usize) -> Dataset {
    let example = |index: usize| Example {
        place: Place::Line(index + 1),
        prompt: vec![index as u32 + 1, 7],
        target: vec![2, 1 + index as u32 % 4, 0],
        fields: Arc::new(json!({"answer": "b"})),
    };
    Dataset::new((0..prompts).map(example).collect()).unwrap()
}

fn settings(value: Value, method: Method, items: usize) -> Settings {
    Settings::resolve(&Hyperparameters::from_json(&value).unwrap(), method, items, 11).unwrap()
}

fn grader(spec: Value) -> Box<dyn Grader> {
    build(&spec, &NoRemote).unwrap()
}

/// Reward 1 for a completion that begins with `b`.
fn begins_with_b() -> Box<dyn Grader> {
    grader(json!({"type": "regex", "pattern": "^b"}))
}

fn run_to_end(run: &mut Run, policy: &mut Toy, grader: &dyn Grader) -> Vec<StepReport> {
    let mut reports = Vec::new();
    while run.end().is_none() {
        reports.push(run.step(policy, grader, &Stop::default()).unwrap());
    }
    reports
}

fn mean_reward(reports: &[StepReport]) -> f64 {
    reports.iter().map(|report| report.metrics.reward_mean.unwrap()).sum::<f64>() / reports.len() as f64
}

fn planned(method: Method, extra: &Value) -> Settings {
    let mut hyper = json!({"steps": 10, "learning_rate": 0.1, "prompts_per_step": 3, "max_completion_tokens": 4});
    if method == Method::Grpo {
        hyper["samples_per_prompt"] = json!(4);
    }
    hyper.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    settings(hyper, method, 5)
}
