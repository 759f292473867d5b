//! `mote serve` in a child process on a free loopback port, with a store of its own that goes with it.

use std::{
    collections::VecDeque,
    ffi::OsString,
    io::{BufRead as _, BufReader, Read},
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use clap::{CommandFactory as _, ValueEnum};

use super::{
    client::{Answer, Connection, Request},
    inputs::adapter_line,
    machine::Memory,
};
use crate::{
    app::AppError,
    config::{Cli, DeviceChoice, EngineArgs, ModelArgs, SyncMode},
};

/// Lines of the log that a failed start shows.
const LAST_LINES: usize = 5;
/// Adapters of one request to the batch route: the peak of memory shall be the adapters' and not the request's.
const ADAPTERS_AT_ONCE: u64 = 20_000;

/// What a server is started with.
pub(super) struct Setup<'a> {
    /// The model.
    pub(super) model: &'a ModelArgs,
    /// Its rank, which stands for the one in `model`.
    pub(super) rank: u8,
    /// The engine's limits; None: the defaults.
    pub(super) engine: Option<&'a EngineArgs>,
    /// What an acknowledged write survives.
    pub(super) sync: SyncMode,
}

/// A running server; it ends, and its folder goes, when this is dropped.
pub(super) struct Server {
    child: Child,
    address: SocketAddr,
    folder: PathBuf,
    /// Adapters `0..adapters` are registered.
    pub(super) adapters: u64,
}

impl Server {
    /// Starts one and waits until it listens: by then the model is loaded.
    pub(super) fn start(setup: &Setup<'_>) -> Result<Self, AppError> {
        let io = |what: &str| {
            let what = what.to_owned();
            move |error| AppError::Io(what, error)
        };
        let program = std::env::current_exe().map_err(io("this program"))?;
        let folder = fresh_folder();
        std::fs::create_dir_all(&folder).map_err(io(&folder.display().to_string()))?;
        let mut command = Command::new(program);
        command.args(["serve", "--no-auth", "--listen", "127.0.0.1:0", "--no-prefix-cache"]);
        // All load comes from here.
        command.args(["--max-connections-per-address", "0"]);
        command.args(["--log", "info", "--log-format", "text", "--data-dir"]).arg(&folder);
        command.args(flags(setup));
        // What the operator set for his own server is not for this one: his database least of all.
        let cli = Cli::command();
        let serve = cli.get_subcommands().filter(|command| command.get_name() == "serve");
        serve.flat_map(clap::Command::get_arguments).filter_map(|arg| arg.get_env()).for_each(|variable| {
            command.env_remove(variable);
        });
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(io("mote serve"))?;
        let log = child.stderr.take();
        let mut server = Self { child, address: SocketAddr::from(([127, 0, 0, 1], 0)), folder, adapters: 0 };
        server.address = log
            .ok_or_else(|| "no log".to_owned())
            .and_then(listening)
            .map_err(|log| AppError::Bench(format!("mote serve did not start:\n{log}")))?;
        Ok(server)
    }

    /// Its memory now.
    pub(super) fn memory(&self) -> Option<Memory> {
        Memory::of(self.child.id())
    }

    /// A connection to it.
    pub(super) async fn connect(&self) -> Result<Connection, AppError> {
        Connection::open(self.address).await.map_err(lost)
    }

    /// Registers adapters until there are `count`.
    pub(super) async fn register(&mut self, count: u64) -> Result<(), AppError> {
        let mut connection = self.connect().await?;
        while self.adapters < count {
            let until = count.min(self.adapters + ADAPTERS_AT_ONCE);
            upload_batch(&mut connection, self.adapters..until).await?;
            self.adapters = until;
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Uploads adapters in one request to the batch route; every line must be stored.
pub(super) async fn upload_batch(connection: &mut Connection, numbers: std::ops::Range<u64>) -> Result<(), AppError> {
    let expected = numbers.end - numbers.start;
    let body: String = numbers.map(adapter_line).collect();
    let request = Request {
        method: "POST",
        path: "/adapters/batch",
        content_type: "application/x-ndjson",
        body: body.as_bytes(),
    };
    let answer = good(connection.send(&request).await.map_err(lost)?, "/adapters/batch")?;
    let text = String::from_utf8_lossy(&answer);
    if let Some(line) = text.lines().find(|line| !line.contains("\"generation\"")) {
        return Err(AppError::Bench(format!("an adapter was refused: {line}")));
    }
    let stored = text.lines().count() as u64;
    if stored != expected {
        return Err(AppError::Bench(format!("{stored} of {expected} adapters were answered")));
    }
    Ok(())
}

/// The body of an answer that is a success.
pub(super) fn good(answer: Answer, path: &str) -> Result<Vec<u8>, AppError> {
    if (200..300).contains(&answer.status) {
        return Ok(answer.body);
    }
    let text = String::from_utf8_lossy(&answer.body);
    Err(AppError::Bench(format!("{path} answered {}: {text}", answer.status)))
}

/// The server went away.
pub(super) fn lost(error: std::io::Error) -> AppError {
    AppError::Io("the server under measurement".into(), error)
}

fn fresh_folder() -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("mote-bench-{}-{number}", std::process::id()))
}

/// The flags of `mote serve` that say the same as these arguments.
fn flags(setup: &Setup<'_>) -> Vec<OsString> {
    let Setup { model, rank, engine, sync } = setup;
    let mut flags: Vec<OsString> = Vec::new();
    let mut flag = |name: &str, value: OsString| flags.extend([name.into(), value]);
    flag("--model", (&model.model).into());
    flag("--model-id", "base".into());
    flag("--dtype", spelled(&model.dtype));
    flag("--device", device(model.device).into());
    flag("--isa", spelled(&model.isa));
    flag("--rank", rank.to_string().into());
    flag("--sync", spelled(sync));
    if let Some(threads) = model.threads {
        flag("--threads", threads.to_string().into());
    }
    if let Some(folder) = &model.basis_dir {
        flag("--basis-dir", folder.into());
    }
    if let Some(engine) = engine {
        flag("--max-batch", engine.max_batch.to_string().into());
        flag("--max-queue", engine.max_queue.to_string().into());
        flag("--prefill-chunk", engine.prefill_chunk.to_string().into());
        flag("--idle-prefill-chunk", engine.idle_prefill_chunk.to_string().into());
        flag("--background-rows", engine.background_rows.to_string().into());
        flag("--gradient-share", engine.gradient_share.to_string().into());
        if let Some(length) = engine.max_model_len {
            flag("--max-model-len", length.to_string().into());
        }
        if let Some(mebibytes) = engine.kv_cache_mb {
            flag("--kv-cache-mb", mebibytes.to_string().into());
        }
    }
    flags
}

/// A value as the command line spells it.
pub(super) fn spelled<T: ValueEnum>(value: &T) -> OsString {
    // Every value of ours can be given as a flag.
    value.to_possible_value().map_or_else(OsString::new, |value| value.get_name().into())
}

fn device(device: DeviceChoice) -> String {
    match device {
        DeviceChoice::Auto => "auto".into(),
        DeviceChoice::Cpu => "cpu".into(),
        DeviceChoice::Cuda(number) => format!("cuda:{number}"),
        DeviceChoice::Metal => "metal".into(),
    }
}

/// Reads the log until it names the address; a thread reads away what follows. The log's end is the error.
fn listening(log: impl Read + Send + 'static) -> Result<SocketAddr, String> {
    let mut lines = BufReader::new(log).lines().map_while(Result::ok);
    let mut last: VecDeque<String> = VecDeque::new();
    for line in lines.by_ref() {
        if let Some(address) = address_in(&line) {
            thread::spawn(move || lines.for_each(drop));
            return Ok(address);
        }
        last.push_back(line);
        if last.len() > LAST_LINES {
            last.pop_front();
        }
    }
    Err(Vec::from(last).join("\n"))
}

fn address_in(line: &str) -> Option<SocketAddr> {
    let rest = line.split_once("listening on http://")?.1;
    rest.split([' ', '/', '\u{1b}']).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::config::{BenchCommand, Command as Given};

    #[test]
    fn the_address_is_found_in_the_log() {
        let line =
            "2026-01-01T00:00:00Z  INFO mote::app: listening on http://127.0.0.1:4711 (documentation at http://x)";
        assert_eq!(address_in(line), Some(SocketAddr::from(([127, 0, 0, 1], 4711))));
        assert_eq!(address_in("model loaded"), None);
        let log = "a\nb\nc\nd\ne\nerror: no\n";
        assert_eq!(listening(log.as_bytes()), Err("b\nc\nd\ne\nerror: no".to_owned()));
    }

    /// Flags that `mote bench` took and `mote serve` would not take again are found here and not in an hour's measurement.
    #[test]
    fn the_child_gets_the_same_flags() {
        let line = "mote bench served --model some/model --dtype bf16 --device cpu --threads 3 --rank 2 --kv-cache-mb 7 --max-batch 9 --basis-dir b";
        let Given::Bench(bench) = Cli::parse_from(line.split(' ')).command else { panic!("not a bench") };
        let BenchCommand::Served(args) = bench.command else { panic!("not served") };
        let setup = Setup { model: &args.model, rank: 1, engine: Some(&args.engine), sync: SyncMode::Full };
        let words = ["mote", "serve"].into_iter().map(OsString::from).chain(flags(&setup));
        let Given::Serve(serve) = Cli::parse_from(words).command else { panic!("not serve") };
        assert_eq!((serve.model.model.as_str(), serve.model.rank, serve.model.threads), ("some/model", 1, Some(3)));
        assert_eq!((serve.model.dtype, serve.model.device), (args.model.dtype, args.model.device));
        assert_eq!((serve.engine.max_batch, serve.engine.kv_cache_mb, serve.state.sync), (9, Some(7), SyncMode::Full));
        assert_eq!(serve.model.basis_dir, args.model.basis_dir);
    }

    /// A flag that `mote serve` gets one day must be passed on as well.
    #[test]
    fn every_flag_of_the_model_and_the_engine_is_passed_on() {
        let line = "mote bench served --threads 3 --kv-cache-mb 7 --max-model-len 64 --basis-dir b";
        let Given::Bench(bench) = Cli::parse_from(line.split(' ')).command else { panic!("not a bench") };
        let BenchCommand::Served(args) = bench.command else { panic!("not served") };
        let setup = Setup { model: &args.model, rank: 2, engine: Some(&args.engine), sync: SyncMode::Normal };
        let passed = flags(&setup);
        let cli = Cli::command();
        let serve = cli.find_subcommand("serve").unwrap();
        let flags = serve.get_arguments().filter(|arg| matches!(arg.get_help_heading(), Some("Model" | "Engine")));
        let missing: Vec<&str> = (flags.filter_map(|arg| arg.get_long()))
            // The first is for who looks after a basis, the second is always given.
            .filter(|long| !["recompute-basis", "no-prefix-cache"].contains(long))
            .filter(|long| !passed.contains(&OsString::from(format!("--{long}"))))
            .collect();
        assert_eq!(missing, [""; 0]);
    }
}
