//! What the worker counts: of every plan and step, and whose time it was.

use std::time::Duration;

use super::Worker;
use crate::{
    engine::{api::Priority, scheduler::Plan},
    kernel::BASE_SLOT,
};

impl Worker {
    /// Seconds that a step earns for gradients; counts whose time it was.
    pub(super) fn earned(&mut self, plan: &Plan, time: Duration) -> f64 {
        let rows = |priority: Priority| -> usize {
            plan.chunks.iter().filter(|chunk| chunk.id.priority == priority).map(|chunk| chunk.rows).sum()
        };
        let (interactive, background) = (rows(Priority::Interactive), rows(Priority::Background));
        let part = interactive as f64 / (interactive + background).max(1) as f64;
        self.stats.interactive_seconds.add(time.mul_f64(part));
        self.stats.background_seconds.add(time.mul_f64(1.0 - part));
        self.earnings.of(time.as_secs_f64(), interactive, background, plan.prefill_rows > 0)
    }

    pub(super) fn count_plan(&mut self, plan: &Plan) {
        let Self { stats, jobs, scheduler, .. } = self;
        stats.preemptions.add(plan.preempted);
        stats.yielded.add(plan.yielded);
        stats.cached_tokens.add(plan.cached_tokens);
        if !plan.chunks.is_empty() {
            let pool = scheduler.cache().pool();
            stats.step_kv_share.observe((pool.len() - pool.available()) as f64 / pool.len() as f64);
        }
        plan.first_places.iter().for_each(|&rounds| stats.first_place_steps.observe(rounds as f64));
        for &id in &plan.admitted {
            let (Some(job), Some(sequence)) = (jobs.get_mut(&id), scheduler.get(id)) else { continue };
            let waited = job.submitted.elapsed();
            job.trace.queued = Some(waited);
            stats.queue_seconds.observe_time(waited);
            stats.cached_share.observe(sequence.cached.unwrap_or(0) as f64 / sequence.prompt as f64);
        }
    }

    pub(super) fn count_step(&self, plan: &Plan, time: Duration, model_time: Duration) {
        let (stats, batch) = (&self.stats, &self.step.batch);
        let (rows, sequences) = (batch.rows(), plan.chunks.len());
        let base = batch.slots.contains(&BASE_SLOT);
        let adapters = batch.cores.len();
        stats.steps.add(1);
        stats.prefill_tokens.add(plan.prefill_rows);
        stats.peak_rows.raise(rows);
        stats.peak_sequences.raise(sequences);
        stats.peak_adapters.raise(adapters);
        stats.step_rows.observe(rows as f64);
        stats.step_sequences.observe(sequences as f64);
        stats.step_adapters.observe(adapters as f64);
        if adapters == sequences && !base {
            stats.step_all_distinct.observe(sequences as f64);
        }
        let seconds = if plan.prefill_rows > 0 { &stats.prefill_seconds } else { &stats.decode_seconds };
        seconds.observe_time(time);
        stats.overhead_seconds.observe_time(time.saturating_sub(model_time));
    }

    /// Sets the gauges.
    pub(super) fn report(&self) {
        let pool = self.scheduler.cache().pool();
        self.stats.waiting.set(self.scheduler.waiting());
        self.stats.running.set(self.scheduler.running());
        self.stats.blocks_free.set(pool.free());
        self.stats.blocks_cached.set(pool.idle());
        self.stats.blocks_used.set(pool.len() - pool.available());
    }
}
