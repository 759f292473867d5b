//! Everything that is counted, as Prometheus reads it.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet, text},
    metrics::{
        MetricType,
        counter::ConstCounter,
        gauge::{ConstGauge, Gauge},
    },
    registry::Registry,
};

use super::{Service, popular::Popular};
use crate::{
    engine::{Handle, Health, Histogram, Reading, Stats},
    telemetry::ProcessCollector,
    tenant::{Caller, Total},
};

/// Tenants with series of their own, those that use most.
const MOST_TENANTS: usize = 1000;

/// Adapters with series of their own, those that are asked for most.
const MOST_ADAPTERS: usize = 20;

impl Service {
    /// What a caller may see in the OpenMetrics text format: admins everything, members what their tenant did. (Sums over all tenants, less one's own, are the
    /// others'.)
    pub fn metrics_text(&self, caller: &Caller) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self.tenants_collector(caller)));
        if caller.is_admin() {
            self.register_sums(&mut registry);
        }
        let mut out = String::new();
        text::encode(&mut out, &registry)?;
        Ok(out)
    }

    fn tenants_collector(&self, caller: &Caller) -> TenantsCollector {
        if !caller.is_admin() {
            let own = self.accounts.of(caller.tenant).total().into_iter().collect();
            // Whose adapters have a place in the sketch depends on everybody's: a member could fill it and see what pushes its own out.
            return TenantsCollector { totals: own, adapters: None };
        }
        let mut totals = self.accounts.totals();
        totals.sort_by_key(|total| std::cmp::Reverse((total.usage.completion_tokens, total.usage.requests)));
        totals.truncate(MOST_TENANTS);
        TenantsCollector { totals, adapters: Some(self.popularity.top(MOST_ADAPTERS)) }
    }

    fn register_sums(&self, registry: &mut Registry) {
        self.metrics.register(registry);
        registry.register_collector(Box::new(EngineCollector(self.engine.clone())));
        registry.register_collector(Box::new(ProcessCollector));
        let adapters: Gauge = Gauge::default();
        adapters.set(i64::try_from(self.library.registry.len()).unwrap_or(i64::MAX));
        registry.register("mote_adapters_resident", "Adapters in memory, of all tenants", adapters);
        let help = "Time to expand an adapter's numbers to cores";
        registry.register("mote_cores_expand_seconds", help, self.library.expand_seconds.clone());
        let corrupt: Gauge = Gauge::default();
        corrupt.set(i64::try_from(self.library.corrupt()).unwrap_or(i64::MAX));
        registry.register("mote_adapters_damaged", "Adapters in the store that cannot be read", corrupt);
        let running: Gauge = Gauge::default();
        running.set(self.training.get().map_or(0, |training| i64::try_from(training.running()).unwrap_or(i64::MAX)));
        registry.register("mote_training_running", "Training jobs that run", running);
    }

    /// Does the engine take requests?
    pub fn is_ready(&self) -> bool {
        self.engine.health() == Health::Running
    }
}

/// What tenants used since the process started.
#[derive(Debug)]
struct TenantsCollector {
    totals: Vec<Total>,
    /// Of all tenants together, for admins.
    adapters: Option<Vec<Popular>>,
}

type OfTotal = (&'static str, &'static str, fn(&Total) -> u64);

const OF_TENANTS: [OfTotal; 3] = [
    ("mote_tenant_requests", "Requests of a tenant that were let in", |total| total.usage.requests),
    ("mote_tenant_prompt_tokens", "Prompt tokens of a tenant", |total| total.usage.prompt_tokens),
    ("mote_tenant_completion_tokens", "Tokens sampled for a tenant", |total| total.usage.completion_tokens),
];

impl Collector for TenantsCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        for (name, help, read) in OF_TENANTS {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for total in &self.totals {
                ConstCounter::new(read(total)).encode(metric.encode_family(&[("tenant", &*total.name)])?)?;
            }
        }
        let Some(adapters) = &self.adapters else { return Ok(()) };
        let help = "Requests of a tenant under an adapter, for those with most of all tenants";
        let mut metric = encoder.encode_descriptor("mote_adapter_requests", help, None, MetricType::Counter)?;
        for one in adapters {
            let labels = [("tenant", &*one.tenant_name), ("adapter", &*one.adapter)];
            ConstCounter::new(one.requests).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// Reads the engine's counters when Prometheus asks.
#[derive(Debug)]
struct EngineCollector(Handle);

type Blocks = (&'static str, fn(&Stats) -> &Reading);
type Counter = (&'static str, &'static str, fn(&Stats) -> &Reading);
type Sizes = (&'static str, &'static str, fn(&Stats) -> &Histogram);

const COUNTERS: [Counter; 15] = [
    ("mote_engine_steps", "Steps of the engine", |stats| &stats.steps),
    ("mote_engine_failed_steps", "Steps that an error ended", |stats| &stats.failed_steps),
    ("mote_engine_accepted", "Sequences taken into the queue", |stats| &stats.accepted),
    ("mote_engine_refused", "Sequences refused because the queue was full", |stats| &stats.refused),
    ("mote_engine_finished", "Sequences that came to their end", |stats| &stats.finished),
    ("mote_engine_cancelled", "Sequences whose client went away or had enough", |stats| &stats.cancelled),
    ("mote_engine_failed", "Sequences that a failed step ended", |stats| &stats.failed),
    ("mote_engine_expired", "Sequences whose deadline came before their end", |stats| &stats.expired),
    ("mote_engine_prefill_tokens", "Rows of prompts that were computed", |stats| &stats.prefill_tokens),
    ("mote_engine_cached_tokens", "Prompt tokens whose KV came from the prefix cache", |stats| &stats.cached_tokens),
    ("mote_engine_generated_tokens", "Tokens sampled", |stats| &stats.generated_tokens),
    ("mote_engine_wakes", "Tasks woken to read what a step made", |stats| &stats.wakes),
    ("mote_engine_gradients", "Gradients of training jobs that ended, well or not", |stats| &stats.gradients),
    ("mote_engine_preemptions", "Times a sequence lost its KV blocks to another", |stats| &stats.preemptions),
    ("mote_engine_yielded", "Times a sequence gave way to a tenant with less than its share", |stats| &stats.yielded),
];

const GAUGES: [Counter; 5] = [
    ("mote_engine_queue", "Sequences that wait for a place in the batch", |stats| &stats.waiting),
    ("mote_engine_running", "Sequences in the batch", |stats| &stats.running),
    ("mote_engine_peak_rows", "Most rows in one step", |stats| &stats.peak_rows),
    ("mote_engine_peak_sequences", "Most sequences in one step", |stats| &stats.peak_sequences),
    ("mote_engine_peak_adapters", "Most distinct adapters in one step", |stats| &stats.peak_adapters),
];

const BLOCKS: [Blocks; 3] = [
    ("free", |stats| &stats.blocks_free),
    ("used", |stats| &stats.blocks_used),
    ("cached", |stats| &stats.blocks_cached),
];

const HISTOGRAMS: [Sizes; 14] = [
    ("mote_engine_step_rows", "Rows of each step", |stats| &stats.step_rows),
    ("mote_engine_step_sequences", "Sequences of each step", |stats| &stats.step_sequences),
    ("mote_engine_step_adapters", "Distinct adapters of each step", |stats| &stats.step_adapters),
    (
        "mote_engine_step_all_distinct",
        "Sequences of the steps in which each ran under an adapter of its own",
        |stats| &stats.step_all_distinct,
    ),
    ("mote_engine_decode_step_seconds", "Time of steps without prompt rows", |stats| &stats.decode_seconds),
    ("mote_engine_prefill_step_seconds", "Time of steps with prompt rows", |stats| &stats.prefill_seconds),
    ("mote_engine_gradient_pause_seconds", "Time for which gradients kept a step waiting", |stats| {
        &stats.gradient_pause
    }),
    ("mote_engine_step_overhead_seconds", "Time of each step outside the model", |stats| &stats.overhead_seconds),
    ("mote_engine_queue_seconds", "Time from submission to the first step", |stats| &stats.queue_seconds),
    ("mote_engine_first_token_seconds", "Time from submission to the first token", |stats| &stats.first_token_seconds),
    ("mote_engine_between_tokens_seconds", "Time between two tokens of a sequence that is no rollout", |stats| {
        &stats.between_tokens_seconds
    }),
    (
        "mote_engine_first_place_steps",
        "Steps until a sequence had its place, of those that came when their tenant had none; 1 is the next step",
        |stats| &stats.first_place_steps,
    ),
    ("mote_engine_cached_share", "Part of each prompt that came from the prefix cache", |stats| &stats.cached_share),
    ("mote_engine_step_kv_share", "Part of the KV cache that sequences hold in each step", |stats| {
        &stats.step_kv_share
    }),
];

impl Collector for EngineCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let stats = self.0.stats();
        for (name, help, read) in COUNTERS {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(read(stats).get()).encode(metric)?;
        }
        for (name, help, read) in GAUGES {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            gauge(read(stats)).encode(metric)?;
        }
        let help = "Blocks of the KV cache";
        let mut blocks = encoder.encode_descriptor("mote_engine_kv_blocks", help, None, MetricType::Gauge)?;
        for (state, read) in BLOCKS {
            gauge(read(stats)).encode(blocks.encode_family(&[("state", state)])?)?;
        }
        let help = "Time of the engine's thread by what it does; together all of it but waiting for requests";
        let mut phases = encoder.encode_descriptor("mote_engine_phase_seconds", help, None, MetricType::Counter)?;
        for (phase, seconds) in stats.phases.all() {
            ConstCounter::new(seconds.get()).encode(phases.encode_family(&[("phase", phase)])?)?;
        }
        let help = "Time of steps by whose rows were in them";
        let mut shares =
            encoder.encode_descriptor("mote_engine_step_share_seconds", help, None, MetricType::Counter)?;
        for (class, seconds) in [("interactive", &stats.interactive_seconds), ("background", &stats.background_seconds)]
        {
            ConstCounter::new(seconds.get()).encode(shares.encode_family(&[("class", class)])?)?;
        }
        for (name, help, read) in HISTOGRAMS {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            let snapshot = read(stats).snapshot();
            metric.encode_histogram::<NoLabelSet>(snapshot.sum, snapshot.count, &snapshot.buckets, None)?;
        }
        Ok(())
    }
}

fn gauge(reading: &Reading) -> ConstGauge {
    ConstGauge::new(i64::try_from(reading.get()).unwrap_or(i64::MAX))
}
