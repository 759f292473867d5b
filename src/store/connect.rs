//! Opening a database: SQLite in a directory or PostgreSQL by URL, and bringing its tables up to date.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use sqlx::{
    AnyConnection, AnyPool, ConnectOptions as _, Connection as _,
    any::{AnyConnectOptions, AnyPoolOptions},
    migrate::{MigrateError, Migrator},
};

use super::{Faults, Result, StoreError, error::sqlite_kind, rows::Dialect, upkeep};

static SQLITE: Migrator = sqlx::migrate!("src/store/migrations/sqlite");
static POSTGRES: Migrator = sqlx::migrate!("src/store/migrations/postgres");

/// The database's file in the data directory.
pub const FILE_NAME: &str = "mote.db";

/// A page of the database, which is SQLite's default.
const PAGE_BYTES: u64 = 4096;

/// How long a statement waits for another process (`mote keys`) to finish its write.
const BUSY: Duration = Duration::from_secs(10);

/// Between two attempts at what SQLite does not wait for itself.
const BUSY_PAUSE: Duration = Duration::from_millis(5);

/// Pages that the writer's connection keeps: inner pages of the trees of a million adapters.
const WRITER_CACHE_KIB: u32 = 32 * 1024;

/// The same of each reader, which asks for single rows.
const READER_CACHE_KIB: u32 = 4 * 1024;

/// Where the state is kept.
#[derive(Clone, PartialEq, Eq)]
pub enum Location {
    /// SQLite, in the file [`FILE_NAME`] of a directory that is made when it is not there.
    Directory(PathBuf),
    /// PostgreSQL, `postgres://user:password@host/database`.
    Postgres(String),
}

/// It shows no password.
impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Location::Directory(path) => write!(f, "{}", path.join(FILE_NAME).display()),
            Location::Postgres(url) => f.write_str(url.rsplit_once('@').map_or("postgres", |(_, host)| host)),
        }
    }
}

impl std::fmt::Debug for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// The newest schema of the embedded database that this program knows.
pub(super) fn known_schema() -> i64 {
    SQLITE.iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// What an acknowledged write survives. (PostgreSQL has its own setting, `synchronous_commit`.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sync {
    /// The end of the process, kill -9 included.
    #[default]
    Process,
    /// The loss of power too: every commit waits for the disk.
    Full,
}

/// How to open the store.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Where.
    pub location: Location,
    /// What a write survives.
    pub sync: Sync,
    /// Connections for reading, besides the one that writes.
    pub readers: u32,
    /// Bytes that the embedded database may have; a write that needs more fails as on a full disk.
    pub most_bytes: Option<u64>,
    /// What goes wrong, in tests.
    pub faults: Option<Arc<Faults>>,
}

impl StoreConfig {
    /// The usual configuration of a place.
    pub fn new(location: Location) -> Self {
        Self { location, sync: Sync::default(), readers: 4, most_bytes: None, faults: None }
    }
}

/// Opens connections of one configuration.
#[derive(Clone)]
pub(super) struct Connector {
    options: AnyConnectOptions,
    pragmas: Option<String>,
    location: String,
    faults: Option<Arc<Faults>>,
}

impl Connector {
    pub(super) fn new(config: &StoreConfig) -> Result<Self> {
        sqlx::any::install_default_drivers();
        let location = config.location.to_string();
        let failed = |cause: String| StoreError::Open { location: location.clone(), cause };
        let (url, pragmas) = match &config.location {
            Location::Directory(path) => {
                if let Some(words) = upkeep::interrupted(path) {
                    return Err(StoreError::Open {
                        location: path.join(FILE_NAME).display().to_string(),
                        cause: words,
                    });
                }
                let file = prepare_file(path).map_err(|error| failed(error.to_string()))?;
                (sqlite_url(&file).map_err(failed)?, Some(pragmas(config.sync, config.most_bytes)))
            }
            Location::Postgres(url) if url.starts_with("postgres://") || url.starts_with("postgresql://") => {
                (url.clone(), None)
            }
            Location::Postgres(_) => return Err(failed("the URL does not begin with postgres://".into())),
        };
        let options: AnyConnectOptions = url.parse().map_err(|error: sqlx::Error| failed(error.to_string()))?;
        let faults = config.faults.clone();
        // Statements carry adapters' names and hashes of keys; errors are logged where they are handled.
        Ok(Self { options: options.disable_statement_logging(), pragmas, location, faults })
    }

    pub(super) fn faults(&self) -> Option<&Faults> {
        self.faults.as_deref()
    }

    pub(super) fn is_sqlite(&self) -> bool {
        self.pragmas.is_some()
    }

    pub(super) fn dialect(&self) -> Dialect {
        if self.is_sqlite() { Dialect::Sqlite } else { Dialect::Postgres }
    }

    /// One connection.
    pub(super) async fn connect(&self) -> Result<AnyConnection> {
        let mut connection = self.options.connect().await.map_err(|error| self.failed(error))?;
        self.set_up(&mut connection, WRITER_CACHE_KIB).await.map_err(|error| self.failed(error))?;
        Ok(connection)
    }

    /// A pool for reading.
    pub(super) async fn pool(&self, size: u32) -> Result<AnyPool> {
        let this = self.clone();
        let mut options = AnyPoolOptions::new().max_connections(size.max(1)).acquire_timeout(Duration::from_secs(30));
        if self.is_sqlite() {
            // All at once and for good: where the directory has become read-only no more can be opened, and reading shall go on.
            options =
                options.min_connections(size.max(1)).idle_timeout(None).max_lifetime(None).test_before_acquire(false);
        }
        options
            .after_connect(move |connection, _| {
                let this = this.clone();
                Box::pin(async move { this.set_up(connection, READER_CACHE_KIB).await })
            })
            .connect_with(self.options.clone())
            .await
            .map_err(|error| self.failed(error))
    }

    async fn set_up(&self, connection: &mut AnyConnection, cache_kib: u32) -> std::result::Result<(), sqlx::Error> {
        let Some(pragmas) = &self.pragmas else { return Ok(()) };
        let pragmas = format!("{pragmas} PRAGMA cache_size = -{cache_kib};");
        // SQLite does not wait for others, whatever its timeout says, where two that wait could wait for each other: of those that make a new database a
        // WAL one, all but one are told at once that it is locked.
        let begun = Instant::now();
        loop {
            match sqlx::raw_sql(sqlx::AssertSqlSafe(pragmas.clone())).execute(&mut *connection).await {
                Err(error) if is_busy(&error) && begun.elapsed() < BUSY => tokio::time::sleep(BUSY_PAUSE).await,
                done => return done.map(|_| ()),
            }
        }
    }

    /// How a writing transaction begins: SQLite takes the write lock at once, so that what is read in it stays true.
    pub(super) fn begin_statement(&self) -> &'static str {
        if self.is_sqlite() { "BEGIN IMMEDIATE" } else { "BEGIN" }
    }

    /// Brings the tables to the newest schema that this program knows.
    pub(super) async fn migrate(&self, connection: &mut AnyConnection) -> Result<()> {
        self.migrate_to(None, connection).await
    }

    /// Brings the tables to a schema: as an older program left them, for tests. None: the newest.
    pub(super) async fn migrate_to(&self, schema: Option<i64>, connection: &mut AnyConnection) -> Result<()> {
        if !self.is_sqlite() {
            // The migrator holds a lock of the session around one transaction a migration.
            return self.run(&POSTGRES, schema, connection).await;
        }
        // SQLite has no such lock: one transaction under the write lock, so that of two processes that open a new directory
        // one waits for the other.
        let mut tx = connection.begin_with(self.begin_statement()).await.map_err(|error| self.failed(error))?;
        self.run(&SQLITE, schema, &mut tx).await?;
        tx.commit().await.map_err(|error| self.failed(error))
    }

    async fn run(&self, migrator: &Migrator, schema: Option<i64>, connection: &mut AnyConnection) -> Result<()> {
        match migrator.run_direct(schema, connection, false).await {
            Ok(()) => Ok(()),
            Err(MigrateError::VersionMissing(found)) => {
                let known = migrator.iter().map(|migration| migration.version).max().unwrap_or(0);
                Err(StoreError::NewerSchema { found, known })
            }
            Err(error) => Err(self.failed(error)),
        }
    }

    fn failed(&self, cause: impl std::fmt::Display) -> StoreError {
        StoreError::Open { location: self.location.clone(), cause: cause.to_string() }
    }
}

/// SQLITE_BUSY and its relatives.
fn is_busy(error: &sqlx::Error) -> bool {
    const SQLITE_BUSY: u32 = 5;
    sqlite_kind(error) == Some(SQLITE_BUSY)
}

/// Makes the directory and the file, readable for their owner only when they are new.
fn prepare_file(directory: &Path) -> std::io::Result<PathBuf> {
    std::fs::create_dir_all(directory)?;
    let file = std::path::absolute(directory)?.join(FILE_NAME);
    let mut options = std::fs::OpenOptions::new();
    // Never an existing one: closing it would drop the locks that this process may hold on it through SQLite.
    options.create_new(true).write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    match options.open(&file) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(file),
    }
}

/// A URL of a file, whatever characters its path has.
fn sqlite_url(file: &Path) -> std::result::Result<String, String> {
    let path = file.to_str().ok_or("the path is not UTF-8")?;
    let mut url = String::from("sqlite://");
    for byte in path.bytes() {
        match byte {
            b'/' | b'-' | b'.' | b'_' | b'~' => url.push(byte as char),
            byte if byte.is_ascii_alphanumeric() => url.push(byte as char),
            byte => url.push_str(&format!("%{byte:02X}")),
        }
    }
    Ok(url + "?mode=rw")
}

/// WAL: readers and the writer do not wait for each other, and a commit is one append. `secure_delete`: what is deleted is
/// overwritten with zeros.
fn pragmas(sync: Sync, most_bytes: Option<u64>) -> String {
    let sync = match sync {
        Sync::Process => "NORMAL",
        Sync::Full => "FULL",
    };
    // A smaller number than there are pages already means that many.
    let most = most_bytes.map(|bytes| format!(" PRAGMA max_page_count = {};", (bytes / PAGE_BYTES).max(1)));
    let most = most.unwrap_or_default();
    format!(
        "PRAGMA busy_timeout = {}; PRAGMA journal_mode = WAL; PRAGMA synchronous = {sync}; \
         PRAGMA foreign_keys = ON; PRAGMA secure_delete = ON; PRAGMA temp_store = MEMORY;{most}",
        BUSY.as_millis()
    )
}
