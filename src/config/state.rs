//! Where state lives, and its copies.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{Secret, SecretFile, secret::given};

/// Where state lives.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "State")]
pub struct StateArgs {
    /// Folder of the database (tenants, keys, adapters).
    #[arg(long, env = "MOTE_DATA_DIR", value_name = "DIR", default_value = "data")]
    pub data_dir: PathBuf,
    /// What an acknowledged write survives: `normal` the death of the process (kill -9), `full` also the loss of power.
    #[arg(long, env = "MOTE_SYNC", value_enum, default_value_t = SyncMode::Normal)]
    pub sync: SyncMode,
    /// A PostgreSQL URL instead of the embedded database.
    #[arg(long, env = "MOTE_DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: Option<Secret>,
    /// The same in a file, as secret stores give it.
    #[arg(long, env = "MOTE_DATABASE_URL_FILE", value_name = "FILE", conflicts_with = "database_url")]
    pub database_url_file: Option<SecretFile>,
    /// Largest embedded database in MiB; writes beyond it are answered 503 [default: what the disk holds].
    #[arg(long, env = "MOTE_MAX_DATABASE_MB", value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
    pub max_database_mb: Option<u64>,
}

impl StateArgs {
    /// The URL, if the state is in PostgreSQL.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn url(&self) -> Result<Option<Secret>, String> {
        given(self.database_url.as_ref(), self.database_url_file.as_ref())
    }
}

/// What an acknowledged write survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SyncMode {
    /// kill -9
    Normal,
    /// power loss
    Full,
}

/// How the embedded database is looked at before it is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IntegrityCheck {
    /// Not at all.
    Off,
    /// Every page and row, without comparing indexes with tables.
    Quick,
    /// Indexes too.
    Full,
}

/// `mote backup`
#[derive(Debug, Args)]
pub struct BackupArgs {
    /// The folder of the database to copy.
    #[arg(long, env = "MOTE_DATA_DIR", value_name = "DIR", default_value = "data")]
    pub data_dir: PathBuf,
    /// The file to write; it must not exist. Its SHA-256 goes to a file beside it, with `.sha256` after the name, and to stdout.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

/// `mote restore`
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The backup. When a file with `.sha256` after its name lies beside it, it must agree.
    #[arg(long, value_name = "FILE")]
    pub from: PathBuf,
    /// The folder to make a data directory of.
    #[arg(long, env = "MOTE_DATA_DIR", value_name = "DIR", default_value = "data")]
    pub data_dir: PathBuf,
    /// Replace the database that is there, which is kept as mote.db.replaced (the next ones with .2, .3, ... behind it). No server may run on it.
    #[arg(long)]
    pub force: bool,
}
