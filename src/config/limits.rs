//! What a tenant may use unless an admin set something else for it.

use clap::Args;

/// Limits of a tenant. The ones of jobs and files are in [`super::TrainingArgs`].
#[derive(Debug, Clone, Default, Args)]
#[command(
    next_help_heading = "Limits of a tenant (each can be set for one tenant by `mote tenants limits`; none under --no-auth)"
)]
pub struct LimitArgs {
    /// Adapters of a tenant [default: no limit].
    #[arg(long, env = "MOTE_TENANT_ADAPTERS", value_name = "N", value_parser = bound())]
    pub tenant_adapters: Option<u64>,
    /// Bytes of a tenant's adapters, files, and jobs with their data together [default: no limit].
    #[arg(long, env = "MOTE_TENANT_STORED_BYTES", value_name = "N", value_parser = bound())]
    pub tenant_stored_bytes: Option<u64>,
    /// Requests of a tenant at once; a stream is one until it ends [default: no limit].
    #[arg(long, env = "MOTE_TENANT_CONCURRENT_REQUESTS", value_name = "N", value_parser = bound())]
    pub tenant_concurrent_requests: Option<u64>,
    /// Requests of a tenant a minute [default: no limit].
    #[arg(long, env = "MOTE_TENANT_REQUESTS_PER_MINUTE", value_name = "N", value_parser = bound())]
    pub tenant_requests_per_minute: Option<u64>,
    /// Prompt and completion tokens of a tenant a minute; a request reserves its prompt and max_tokens for each choice until it ends [default: no limit].
    #[arg(long, env = "MOTE_TENANT_TOKENS_PER_MINUTE", value_name = "N", value_parser = bound())]
    pub tenant_tokens_per_minute: Option<u64>,
    /// Tokens that a tenant's training jobs may train on in a day (UTC); then they go on the next day [default: no limit].
    #[arg(long, env = "MOTE_TENANT_TRAINED_TOKENS_PER_DAY", value_name = "N", value_parser = bound())]
    pub tenant_trained_tokens_per_day: Option<u64>,
    /// Failed attempts to show a key that one address has a minute; 0: any number.
    #[arg(long, env = "MOTE_AUTH_FAILURES_PER_MINUTE", value_name = "N", default_value_t = 60)]
    pub auth_failures_per_minute: u32,
}

/// Numbers that every JSON reader has exactly.
fn bound() -> clap::builder::RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(0..=(1 << 53) - 1)
}
