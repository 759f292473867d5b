//! What a user sees while it trains: a bar with the reward's curve where there is a terminal, a log line a step where there is none.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mote_trainer::StepReport;
use serde_json::Value;

/// Steps that the small curve shows.
const SHOWN: usize = 32;
const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// A bar on stderr.
pub(super) struct Progress {
    bar: ProgressBar,
    steps: u64,
}

impl Progress {
    pub(super) fn new(steps: u64, done: u64, curve: &[Value]) -> Self {
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{prefix} {pos}/{len} {bar:20} {elapsed}, {eta} to go  {msg}") {
            bar.set_style(style);
        }
        bar.set_prefix("step");
        bar.set_position(done);
        bar.set_message(sparkline(curve));
        Self { bar, steps }
    }

    /// A step is done; `curve` ends with it.
    pub(super) fn step(&self, step: &StepReport, curve: &[Value]) {
        let metrics = &step.metrics;
        let (name, value) = match metrics.reward_mean {
            Some(reward) => ("reward", reward),
            None => ("loss", metrics.loss.unwrap_or(f64::NAN)),
        };
        for notice in &step.notices {
            self.bar.suspend(|| tracing::warn!("{notice}"));
        }
        if self.bar.is_hidden() {
            let (step, steps) = (step.step, self.steps);
            tracing::info!("step {step}/{steps}: {name} {value:.4}, {:.0} tokens/s", report_rate(curve));
        }
        self.bar.set_position(step.step);
        self.bar.set_message(format!("{name} {value:.3} {}", sparkline(curve)));
    }

    /// The measurement begins, of so many items.
    pub(super) fn measure(&self, items: usize) {
        if self.bar.is_hidden() {
            tracing::info!(items, "measuring on held-out items");
        }
        self.bar.set_length(items as u64);
        self.bar.set_prefix("measuring");
        self.bar.set_position(0);
        self.bar.set_message("");
    }

    /// So many items are done.
    pub(super) fn measured(&self, items: usize) {
        self.bar.set_position(items as u64);
    }

    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }
}

fn report_rate(curve: &[Value]) -> f64 {
    curve.last().and_then(|step| step["tokens_per_second"].as_f64()).unwrap_or(0.0)
}

/// What a curve is drawn of: the reward, or the loss where there is none.
pub(super) fn values(curve: &[Value]) -> (&'static str, Vec<f64>) {
    let of = |name: &str| -> Option<Vec<f64>> { curve.iter().map(|step| step[name].as_f64()).collect() };
    match of("reward_mean") {
        Some(rewards) => ("mean reward", rewards),
        None => ("loss", of("loss").unwrap_or_default()),
    }
}

/// The last steps' values as small bars, between their least and greatest.
fn sparkline(curve: &[Value]) -> String {
    let (_, values) = values(curve);
    let shown = &values[values.len().saturating_sub(SHOWN)..];
    let (low, high) =
        shown.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &v| (low.min(v), high.max(v)));
    let level = |value: f64| match high > low {
        true => ((value - low) / (high - low) * (LEVELS.len() - 1) as f64).round() as usize,
        false => 0,
    };
    shown.iter().map(|&value| LEVELS[level(value).min(LEVELS.len() - 1)]).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_small_curve_goes_from_the_least_to_the_greatest() {
        let curve: Vec<Value> = [0.0, 0.5, 1.0].map(|reward| json!({"reward_mean": reward})).to_vec();
        assert_eq!(sparkline(&curve), "▁▅█");
        assert_eq!(sparkline(&[json!({"loss": 2.0})]), "▁");
        assert_eq!(sparkline(&[]), "");
        assert_eq!(sparkline(&vec![json!({"loss": 2.0}); 100]).chars().count(), SHOWN);
    }
}
