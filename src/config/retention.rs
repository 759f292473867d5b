//! How long is kept what would else grow without end.

use clap::Args;

/// Days for which things are kept, and how many of some.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "How long things are kept (0: for ever, or all)")]
pub struct RetentionArgs {
    /// Days for which the audit log is kept.
    #[arg(long, env = "MOTE_AUDIT_DAYS", value_name = "N", default_value_t = 365, value_parser = days())]
    pub audit_days: u32,
    /// Entries of the audit log that are kept of each tenant: the newest.
    #[arg(long, env = "MOTE_AUDIT_ENTRIES", value_name = "N", default_value_t = 5_000_000)]
    pub audit_entries: u32,
    /// Days for which a training job is kept after its end, with its events, checkpoints and samples; its adapter stays.
    #[arg(long, env = "MOTE_JOB_DAYS", value_name = "N", default_value_t = 365, value_parser = days())]
    pub job_days: u32,
    /// Days for which a key is listed after it was revoked or expired.
    #[arg(long, env = "MOTE_KEY_DAYS", value_name = "N", default_value_t = 90, value_parser = days())]
    pub key_days: u32,
    /// Days for which tenants' usage is kept.
    #[arg(long, env = "MOTE_USAGE_DAYS", value_name = "N", default_value_t = 400, value_parser = days())]
    pub usage_days: u32,
}

fn days() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(0..=36_500)
}
