//! Where spans go.

use clap::Args;

use crate::telemetry::OtlpEndpoint;

/// Where spans go.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Traces")]
pub struct TraceArgs {
    /// Send spans of requests, their sequences and training jobs to the OpenTelemetry collector at this URL (OTLP over HTTP, protobuf, to `/v1/traces` below it).
    /// Variables such as OTEL_EXPORTER_OTLP_HEADERS and OTEL_TRACES_SAMPLER count [default: none].
    #[arg(long, env = "MOTE_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<OtlpEndpoint>,
}
