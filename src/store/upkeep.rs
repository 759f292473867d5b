//! Looking after a database as a whole: is it sound, a copy of it while it is in use, and a data directory from such a copy.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};
use sqlx::{AnyConnection, Connection as _, Row as _};

use super::{
    FILE_NAME, Location, Result, Store, StoreConfig, StoreError,
    connect::{Connector, known_schema},
};

/// Lines of a check that are kept: a broken page may make thousands.
const FINDINGS: usize = 20;
/// After the name of a backup: the file with its SHA-256, as `sha256sum -c` reads it.
const SUM: &str = ".sha256";
/// What a restored database replaces is kept under this name, or under it with a number.
const REPLACED: &str = "mote.db.replaced";
/// Where a backup becomes a database.
const WORK: &str = "restore.part";

/// How a database is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// Every page and row.
    Quick,
    /// And every index against its table.
    Full,
}

impl Store {
    /// What is wrong with the database's pages and rows; nothing when it is sound, and always on PostgreSQL, which looks after its own.
    ///
    /// # Errors
    /// The check could not be made.
    pub async fn check(&self, check: Check) -> Result<Vec<String>> {
        let mut connection = self.pool.acquire().await?;
        match connection.backend_name() {
            "SQLite" => findings(&mut connection, check).await,
            _ => Ok(Vec::new()),
        }
    }
}

async fn findings(connection: &mut AnyConnection, check: Check) -> Result<Vec<String>> {
    let pragma = match check {
        Check::Quick => "PRAGMA quick_check",
        Check::Full => "PRAGMA integrity_check",
    };
    // A database that is too broken to be read fails the statement instead of answering it.
    let rows = match sqlx::query(pragma).fetch_all(connection).await {
        Ok(rows) => rows,
        Err(sqlx::Error::Database(error)) => return Ok(vec![error.message().to_owned()]),
        Err(error) => return Err(error.into()),
    };
    let mut lines = Vec::new();
    for row in rows {
        let line: String = row.try_get(0)?;
        if line != "ok" && lines.len() < FINDINGS {
            lines.push(line);
        }
    }
    Ok(lines)
}

/// Copies the database of a directory into one file, of one instant, also while a server writes to it: `VACUUM INTO` reads one snapshot and holds
/// nobody up. Beside it goes a file with its SHA-256, which is the answer. What was deleted is not in the copy.
///
/// # Errors
/// [`StoreError::Open`] for a directory without a database; [`StoreError::File`] for a target that exists or cannot be written; the database's.
pub async fn back_up(directory: &Path, out: &Path) -> Result<String> {
    let mut connection = open(directory).await?;
    if out.exists() {
        return Err(failed(out, "it exists already"));
    }
    let part = beside(out, ".part");
    // The copy has every key's hash in it. SQLite takes a file that is empty.
    let file = private(&part).map_err(|error| failed(&part, error))?;
    let copied = copy(&mut connection, &part).await;
    connection.close().await?;
    let finish = || -> io::Result<String> {
        file.sync_all()?;
        let sum = sha256(&part)?;
        let name = out.file_name().unwrap_or_default().to_string_lossy().into_owned();
        fs::write(beside(out, SUM), format!("{sum}  {name}\n"))?;
        fs::rename(&part, out)?;
        Ok(sum)
    };
    let done = match copied {
        Ok(()) => finish().map_err(|error| failed(out, error)),
        Err(error) => Err(error),
    };
    if done.is_err() {
        // Half a copy is worse than none.
        let _ = fs::remove_file(&part);
    }
    done
}

async fn copy(connection: &mut AnyConnection, into: &Path) -> Result<()> {
    let path = into.to_str().ok_or_else(|| failed(into, "the path is not UTF-8"))?;
    sqlx::query("VACUUM INTO ?").bind(path).execute(connection).await?;
    Ok(())
}

/// Makes a directory's database of a backup, after all checks: its SHA-256 (if the file is there), its integrity in full, its schema. With `force` it
/// replaces the database that is there, which is kept beside it under a name of its own; not while a server has it open.
///
/// # Errors
/// [`StoreError::File`] says what is wrong with which file, [`StoreError::NewerSchema`] that a newer program wrote the backup.
pub async fn restore(from: &Path, directory: &Path, force: bool) -> Result<()> {
    verify_sum(from)?;
    let target = directory.join(FILE_NAME);
    let occupied = fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some());
    if occupied && !force {
        return Err(failed(directory, "it is not empty; --force replaces the database in it"));
    }
    if target.exists() {
        let_go(directory).await?;
    }
    let place = |path: &Path| {
        let path = path.to_owned();
        move |error: io::Error| failed(&path, error)
    };
    fs::create_dir_all(directory).map_err(place(directory))?;
    // Checked where it will lie: the check may need to write, and a backup is not ours to change.
    let work = directory.join(WORK);
    // Of a restore that was interrupted: its log would be read into this one.
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work).map_err(place(&work))?;
    let part = work.join(FILE_NAME);
    let outcome = prepare(from, &work, &part).await.and_then(|()| {
        if target.exists() {
            set_aside(&target, directory).map_err(place(&target))?;
        }
        // A log of another database would be read into this one.
        for log in ["-wal", "-shm"] {
            let _ = fs::remove_file(beside(&target, log));
        }
        fs::rename(&part, &target).map_err(place(&target))?;
        File::open(directory).and_then(|folder| folder.sync_all()).map_err(place(directory))
    });
    let _ = fs::remove_dir_all(&work);
    outcome
}

/// Keeps the database that is about to be replaced, under a name that nothing has. Where the file system can do it the database stays in its place as well,
/// so that there is none without one.
fn set_aside(target: &Path, directory: &Path) -> io::Result<()> {
    let names = std::iter::once(REPLACED.to_owned()).chain((2u64..).map(|number| format!("{REPLACED}.{number}")));
    for kept in names.map(|name| directory.join(name)) {
        match fs::hard_link(target, &kept) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Ok(()) => return Ok(()),
            Err(_) if kept.exists() => {}
            Err(_) => return fs::rename(target, &kept),
        }
    }
    Ok(())
}

/// What a restore that was interrupted left in a directory without a database. A new database in its place would hide that the old one is still there.
pub(super) fn interrupted(directory: &Path) -> Option<String> {
    if directory.join(FILE_NAME).exists() {
        return None;
    }
    let mut names: Vec<String> =
        fs::read_dir(directory).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    let name = names.into_iter().find(|name| name == WORK || name.starts_with(REPLACED))?;
    Some(format!(
        "there is no such file, but {name}, as after a restore that was interrupted: run `mote restore --force` again, or move the database that you want to {FILE_NAME}, or remove {name}"
    ))
}

/// Copies and checks.
async fn prepare(from: &Path, work: &Path, part: &Path) -> Result<()> {
    let copied = || -> io::Result<()> {
        let (mut source, _) = (File::open(from)?, fs::remove_file(part));
        let mut target = private(part)?;
        io::copy(&mut source, &mut target)?;
        target.sync_all()
    };
    copied().map_err(|error| failed(from, error))?;
    let mut connection = open(work).await.map_err(|error| failed(from, error))?;
    let checked = check_backup(&mut connection, from).await;
    // Out of the log and into the file, which is then the whole database.
    let closed = sqlx::raw_sql("PRAGMA journal_mode = DELETE").execute(&mut connection).await;
    connection.close().await?;
    checked?;
    closed?;
    Ok(())
}

async fn check_backup(connection: &mut AnyConnection, from: &Path) -> Result<()> {
    if let Some(first) = findings(connection, Check::Full).await?.first() {
        return Err(failed(from, format!("it is damaged: {first}")));
    }
    let version = sqlx::query("SELECT MAX(version) FROM _sqlx_migrations").fetch_one(connection).await;
    let found: i64 = version.and_then(|row| row.try_get(0)).map_err(|_| failed(from, "it is no backup of mote's"))?;
    let known = known_schema();
    if found > known { Err(StoreError::NewerSchema { found, known }) } else { Ok(()) }
}

/// The database of a directory as it is: nothing is made and no table changed.
async fn open(directory: &Path) -> Result<AnyConnection> {
    let file = directory.join(FILE_NAME);
    if !file.is_file() {
        return Err(StoreError::Open { location: file.display().to_string(), cause: "there is no such file".into() });
    }
    Connector::new(&StoreConfig::new(Location::Directory(directory.to_owned())))?.connect().await
}

/// Makes sure that nobody has the database open: only then does it leave its log behind.
async fn let_go(directory: &Path) -> Result<()> {
    // One that cannot even be opened is what a restore is for.
    let Ok(mut connection) = open(directory).await else { return Ok(()) };
    let left = sqlx::raw_sql("PRAGMA busy_timeout = 0; PRAGMA journal_mode = DELETE").execute(&mut connection).await;
    let _ = connection.close().await;
    match left {
        Err(error) if error.to_string().contains("locked") => {
            Err(failed(directory, "a server or a command has the database open; stop it first"))
        }
        _ => Ok(()),
    }
}

/// A backup without a file beside it is taken as it is; the integrity check follows.
fn verify_sum(from: &Path) -> Result<()> {
    let Ok(text) = fs::read_to_string(beside(from, SUM)) else { return Ok(()) };
    let expected = text.split_whitespace().next().unwrap_or_default();
    let found = sha256(from).map_err(|error| failed(from, error))?;
    if found == expected { Ok(()) } else { Err(failed(from, format!("its SHA-256 is {found}, not {expected}"))) }
}

fn sha256(path: &Path) -> io::Result<String> {
    let (mut file, mut hash, mut piece) = (File::open(path)?, Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            read => hash.update(&piece[..read]),
        }
    }
}

/// A new file for its owner only.
fn private(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create_new(true).write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

fn failed(path: &Path, cause: impl std::fmt::Display) -> StoreError {
    StoreError::File { path: path.display().to_string(), cause: cause.to_string() }
}
