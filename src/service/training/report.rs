//! What a job tells its owner: events, samples, the result; all as JSON texts for the store.

use mote_trainer::{
    End, Estimate, EvalCompletion, Evaluation, Metrics, Notice, Sample, StepReport, Timing, data::Place,
};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::{
    service::Error,
    store::{EventLevel, NewEvent},
};

/// Samples of a step that are kept, and of an evaluation.
const MOST_SAMPLES: usize = 16;
const MOST_EVALUATED: usize = 256;
/// Characters of a sample's text that are kept.
const MOST_TEXT: usize = 4096;
/// Characters of a message.
const MOST_MESSAGE: usize = 2000;

/// Words that others may have chosen, for a column: no control characters, not too long.
pub(super) fn plain(text: &str) -> String {
    let mut plain: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MOST_MESSAGE).collect();
    if plain.len() < text.len() && text.chars().count() > MOST_MESSAGE {
        plain.push('…');
    }
    plain
}

/// An event.
pub(super) fn event(kind: &'static str, level: EventLevel, message: &str, data: &Value) -> NewEvent {
    NewEvent { kind, level, message: plain(message), data: data.to_string() }
}

/// The numbers of a step, one flat object: metrics that repeat, then times that do not.
pub(super) fn step_metrics(step: u64, metrics: &Metrics, timing: &Timing) -> Value {
    let mut all = Map::new();
    all.insert("step".to_owned(), json!(step));
    for part in [serde_json::to_value(metrics), serde_json::to_value(timing)] {
        if let Ok(Value::Object(part)) = part {
            all.extend(part);
        }
    }
    Value::Object(all)
}

/// What a step has to tell.
pub(super) fn step_events(report: &StepReport, steps: u64, metrics: &Value) -> Vec<NewEvent> {
    let it = &report.metrics;
    let mut words = format!("Step {}/{steps}:", report.step);
    if let (Some(mean), Some(std)) = (it.reward_mean, it.reward_std) {
        words += &format!(" reward {mean:.4} (std {std:.4}),");
    }
    if let Some(loss) = it.loss {
        words += &format!(" training loss={loss:.4},");
    }
    words += &format!(" {:.0} tokens/s", report.timing.tokens_per_second);
    let mut events = vec![event("step", EventLevel::Info, &words, metrics)];
    events.extend(report.notices.iter().map(notice));
    events
}

fn notice(notice: &Notice) -> NewEvent {
    let data = serde_json::to_value(notice).unwrap_or_default();
    event("notice", EventLevel::Warn, &format!("Notice: {notice}."), &data)
}

/// That a checkpoint was written.
pub(super) fn checkpoint_event(step: u64) -> NewEvent {
    event("checkpoint", EventLevel::Info, &format!("Checkpoint after step {step}."), &json!({"step": step}))
}

/// That the run has ended and the measuring begins.
pub(super) fn evaluation_event(end: &End, items: usize) -> NewEvent {
    let words = format!("Training has ended ({end}); evaluating on {items} validation items.");
    event("evaluation", EventLevel::Info, &words, &json!({"end": end, "items": items}))
}

/// An error as jobs show it.
pub(super) fn error_value(error: &Error, default_code: &str) -> Value {
    json!({"code": error.code.unwrap_or(default_code), "message": plain(&error.message), "param": error.param})
}

/// That a job has failed.
pub(super) fn failed_event(error: &Value) -> NewEvent {
    let words = format!("The job failed: {}", error["message"].as_str().unwrap_or_default());
    event("status", EventLevel::Error, &words, &json!({"status": "failed", "error": error}))
}

/// That the adapter is published.
pub(super) fn succeeded_events(name: &str, result: &Value) -> Vec<NewEvent> {
    let words = format!("The adapter is published as '{name}'.");
    vec![
        event("result", EventLevel::Info, &words, result),
        event("status", EventLevel::Info, "The job has succeeded.", &json!({"status": "succeeded"})),
    ]
}

#[derive(Serialize)]
struct ShownSample {
    item: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f32>,
    text: String,
    reward: f32,
    #[serde(skip_serializing_if = "Map::is_empty")]
    parts: Map<String, Value>,
    tokens: usize,
    finished: bool,
}

fn clipped(text: &str) -> String {
    match text.char_indices().nth(MOST_TEXT) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

/// The first of a step's graded completions, as a JSON list.
pub(super) fn samples(samples: &[Sample]) -> String {
    let shown = samples.iter().take(MOST_SAMPLES).map(|sample| ShownSample {
        item: sample.item,
        line: match sample.place {
            Place::Line(line) => Some(line),
            Place::Item(_) | Place::All => None,
        },
        temperature: None,
        text: clipped(&sample.text),
        reward: sample.reward,
        parts: sample.parts.iter().map(|(name, reward)| (name.clone(), json!(reward))).collect(),
        tokens: sample.tokens,
        finished: sample.finished,
    });
    serde_json::to_string(&shown.collect::<Vec<_>>()).unwrap_or_else(|_| "[]".to_owned())
}

/// The first of an evaluation's completions, as a JSON list.
pub(super) fn evaluated(evaluation: &Evaluation, temperature: f32) -> String {
    let shown = evaluation.completions.iter().take(MOST_EVALUATED).map(|it: &EvalCompletion| ShownSample {
        item: it.item,
        line: None,
        temperature: Some(if it.sample.is_none() { 0.0 } else { temperature }),
        text: clipped(&it.text),
        reward: it.reward,
        parts: Map::new(),
        tokens: it.tokens,
        finished: it.finished,
    });
    serde_json::to_string(&shown.collect::<Vec<_>>()).unwrap_or_else(|_| "[]".to_owned())
}

/// `{"reward", "interval", "sampled", "sampled_interval", "n", "truncated"}`
pub fn measured(evaluation: &Evaluation) -> Value {
    let sampled = evaluation.sampled.as_ref();
    json!({
        "reward": evaluation.greedy.mean,
        "interval": evaluation.greedy.interval,
        "sampled": sampled.map(|estimate| estimate.mean),
        "sampled_interval": sampled.and_then(|estimate| estimate.interval),
        "n": evaluation.greedy.n,
        "truncated": evaluation.truncated,
    })
}

/// `{"mean", "interval", "n"}`
pub(super) fn estimate(estimate: &Estimate) -> Value {
    json!({"mean": estimate.mean, "interval": estimate.interval, "n": estimate.n})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_plain_and_not_too_long() {
        assert_eq!(plain("a\0b\nc"), "a b c");
        assert_eq!(plain(&"é".repeat(3000)).chars().count(), MOST_MESSAGE + 1);
        assert_eq!(plain("naïve"), "naïve");
        assert_eq!(clipped(&"é".repeat(5000)).chars().count(), MOST_TEXT + 1);
    }
}
