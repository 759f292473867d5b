//! The grader that lives elsewhere: a webhook behind https, called within bounds.
//!
//! Who writes a job chooses the address, so a call must not become a way into the server's own networks: only hosts of the operator's list, only https, every address
//! that the name resolves to is checked, and the checked address is the one that is connected to; redirects are not followed and no proxy is used. What comes back is small and must be in time.
//!
//! The client is `ureq`: it is in the program anyway (models are fetched with it), it blocks, as a job's worker does, and its resolver can be replaced, so that there is no gap
//! between the address that was checked and the one that is used.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use mote_trainer::{
    Stop,
    grader::{ConnectRemote, Grade, GradeCall, Grader, GraderError, RemoteSpec},
};
use serde::Deserialize;
use serde_json::{Value, json};
use ureq::{
    Agent,
    config::Config,
    http::Uri,
    unversioned::{
        resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver},
        transport::{DefaultConnector, NextTimeout},
    },
};

use super::address::is_public;

/// The longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 64 << 10;
/// How often a waiting job looks whether it shall stop.
const LOOK: Duration = Duration::from_millis(25);
/// The pause before the first retry; it doubles.
const BACK_OFF: Duration = Duration::from_millis(200);
/// Completions that are on their way or wait for it at once; the rest is not copied yet.
const BATCH: usize = 1024;

/// Which remote graders may be called, and how.
#[derive(Debug, Clone)]
pub struct RemoteAccess {
    /// Hosts: `grader.example.org`, `*.example.org`, `grader.example.org:8443`. Without a port it is 443. Empty: none may be called.
    pub hosts: Vec<String>,
    /// Calls of one job at once.
    pub concurrency: usize,
    rules: Rules,
}

/// What a call must be; weaker only in tests, which serve on loopback without certificates.
#[derive(Debug, Clone, Copy)]
struct Rules {
    allows: fn(IpAddr) -> bool,
    https_only: bool,
}

impl Default for RemoteAccess {
    fn default() -> Self {
        Self::new(Vec::new(), 16)
    }
}

impl RemoteAccess {
    /// Calls to these hosts, so many at once.
    pub fn new(hosts: Vec<String>, concurrency: usize) -> Self {
        Self { hosts, concurrency: concurrency.max(1), rules: Rules { allows: is_public, https_only: true } }
    }

    /// Is `host:port` on the list?
    fn lists(&self, host: &str, port: u16) -> bool {
        self.hosts.iter().any(|entry| {
            let (name, allowed) = match entry.rsplit_once(':') {
                Some((name, digits)) if !name.ends_with(':') && digits.parse::<u16>().is_ok() => {
                    (name, digits.parse().unwrap_or(443))
                }
                _ => (entry.as_str(), 443),
            };
            let named = match name.strip_prefix("*.") {
                Some(domain) => host.strip_suffix(domain).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
                None => host == name,
            };
            named && port == allowed
        })
    }

    /// Checks an address before anything is looked up.
    fn check(&self, url: &str) -> Result<Uri, String> {
        if self.hosts.is_empty() {
            return Err("this server calls no remote graders (--grader-hosts)".to_owned());
        }
        let uri: Uri = url.parse().map_err(|error| format!("the url is malformed: {error}"))?;
        let scheme = uri.scheme_str().unwrap_or_default().to_owned();
        if scheme != "https" && self.rules.https_only {
            return Err("the url must begin with https://".to_owned());
        }
        let authority = uri.authority().ok_or("the url names no host")?;
        if authority.as_str().contains('@') {
            return Err("the url must not hold a user name or password".to_owned());
        }
        let host = authority.host().to_ascii_lowercase();
        let port = authority.port_u16().unwrap_or(if scheme == "http" { 80 } else { 443 });
        let literal = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        if literal.is_ok_and(|address| !(self.rules.allows)(address)) {
            return Err(format!("{host} is not a public address"));
        }
        if !self.lists(&host, port) {
            return Err(format!("{host}:{port} is not among the hosts that this server calls (--grader-hosts)"));
        }
        Ok(uri)
    }
}

impl ConnectRemote for RemoteAccess {
    fn connect(&self, spec: &RemoteSpec) -> Result<Box<dyn Grader>, String> {
        let url = self.check(&spec.url)?;
        let config = Agent::config_builder()
            .https_only(self.rules.https_only)
            .proxy(None)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_millis(spec.timeout_ms)))
            .user_agent(concat!("mote/", env!("CARGO_PKG_VERSION")))
            .max_idle_connections(self.concurrency)
            .max_idle_connections_per_host(self.concurrency)
            .build();
        let resolver = CheckedResolver { inner: DefaultResolver::default(), allows: self.rules.allows };
        let client = Client {
            agent: Agent::with_parts(config, DefaultConnector::default(), resolver),
            url,
            retries: spec.retries,
            timeout_ms: spec.timeout_ms,
        };
        Ok(Box::new(RemoteGrader { client: Arc::new(client), concurrency: self.concurrency }))
    }
}

/// Resolves names, and refuses those of which any address is not public.
#[derive(Debug)]
struct CheckedResolver {
    inner: DefaultResolver,
    allows: fn(IpAddr) -> bool,
}

impl Resolver for CheckedResolver {
    fn resolve(&self, uri: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let found = self.inner.resolve(uri, config, timeout)?;
        match found.iter().find(|address| !(self.allows)(address.ip())) {
            None => Ok(found),
            Some(address) => {
                let words = format!("the name points at {}, which is not a public address", address.ip());
                Err(ureq::Error::Io(std::io::Error::new(std::io::ErrorKind::PermissionDenied, words)))
            }
        }
    }
}

struct Client {
    agent: Agent,
    url: Uri,
    retries: u32,
    timeout_ms: u64,
}

/// Why a call gave no score.
struct Refusal {
    words: String,
    /// May it go better the next time?
    passing: bool,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(alias = "reward")]
    score: f64,
}

impl Client {
    /// One completion's score, tried again as often as the description says.
    fn score(&self, body: &[u8], abandoned: &AtomicBool) -> Result<f32, String> {
        let mut pause = BACK_OFF;
        for attempt in 0.. {
            match self.call(body) {
                Ok(score) => return Ok(score),
                Err(refusal) if refusal.passing && attempt < self.retries && !abandoned.load(Ordering::Acquire) => {
                    thread::sleep(pause);
                    pause = (2 * pause).min(Duration::from_secs(5));
                }
                Err(refusal) if attempt > 0 => return Err(format!("{} ({} tries)", refusal.words, attempt + 1)),
                Err(refusal) => return Err(refusal.words),
            }
        }
        unreachable!("the loop ends by itself")
    }

    fn call(&self, body: &[u8]) -> Result<f32, Refusal> {
        let lasting = |words: String| Refusal { words, passing: false };
        let request =
            self.agent.post(&self.url).header("content-type", "application/json").header("accept", "application/json");
        let mut answer = request.send(body).map_err(|error| self.failed(&error))?;
        let status = answer.status();
        if status.is_redirection() {
            return Err(lasting(format!(
                "the remote grader answered with a redirect ({status}), which is not followed"
            )));
        }
        if !status.is_success() {
            let passing = status.is_server_error() || status.as_u16() == 429;
            return Err(Refusal { words: format!("the remote grader answered {status}"), passing });
        }
        let bytes = answer.body_mut().with_config().limit(MAX_ANSWER).read_to_vec().map_err(|error| match error {
            ureq::Error::BodyExceedsLimit(limit) => {
                lasting(format!("the remote grader's answer is longer than {limit} bytes"))
            }
            error => self.failed(&error),
        })?;
        let answer: Answer = serde_json::from_slice(&bytes)
            .map_err(|_| lasting("the remote grader's answer is not {\"score\": a number}".to_owned()))?;
        let score = answer.score as f32;
        if score.is_finite() { Ok(score) } else { Err(lasting("the remote grader's score is not finite".to_owned())) }
    }

    fn failed(&self, error: &ureq::Error) -> Refusal {
        match error {
            ureq::Error::Timeout(_) => {
                let words = format!("the remote grader did not answer within {} ms", self.timeout_ms);
                Refusal { words, passing: true }
            }
            ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                Refusal { words: format!("the remote grader may not be called: {error}"), passing: false }
            }
            ureq::Error::HostNotFound => {
                Refusal { words: "the remote grader's host was not found".to_owned(), passing: true }
            }
            error => Refusal { words: format!("the remote grader could not be reached: {error}"), passing: true },
        }
    }
}

/// Sends `{"item": {..}, "sample": {"output_text": ".."}}` and reads `{"score": 0.5}`.
struct RemoteGrader {
    client: Arc<Client>,
    concurrency: usize,
}

impl Grader for RemoteGrader {
    fn grade(&self, call: GradeCall<'_>) -> Result<Grade, GraderError> {
        let mut grades = self.grade_batch(&[call], &Stop::default()).map_err(|(_, error)| error)?;
        grades.pop().ok_or_else(|| GraderError::Failed("the remote grader gave no grade".to_owned()))
    }

    fn grade_batch(&self, calls: &[GradeCall<'_>], stop: &Stop) -> Result<Vec<Grade>, (usize, GraderError)> {
        let mut grades = Vec::with_capacity(calls.len());
        for batch in calls.chunks(BATCH) {
            let bodies = batch.iter().map(|call| {
                json!({"item": call.item, "sample": {"output_text": call.output_text}}).to_string().into_bytes()
            });
            let scores = self.scores(bodies.collect(), stop).map_err(|(at, error)| (grades.len() + at, error))?;
            grades.extend(scores.into_iter().map(Grade::of));
        }
        Ok(grades)
    }

    fn check_item(&self, _item: &Value) -> Result<(), String> {
        Ok(())
    }
}

impl RemoteGrader {
    /// Threads of their own make the calls: whoever waits here can leave at once, and a call that hangs ends by its own timeout.
    fn scores(&self, bodies: Vec<Vec<u8>>, stop: &Stop) -> Result<Vec<f32>, (usize, GraderError)> {
        let mut scores = vec![0.0; bodies.len()];
        let (bodies, next, abandoned) =
            (Arc::new(bodies), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (sender, results) = mpsc::channel();
        for _ in 0..self.concurrency.min(bodies.len()) {
            let (client, bodies, next) = (self.client.clone(), bodies.clone(), next.clone());
            let (given_up, sender) = (abandoned.clone(), sender.clone());
            let work = move || {
                while !given_up.load(Ordering::Acquire) {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(body) = bodies.get(at) else { return };
                    if sender.send((at, client.score(body, &given_up))).is_err() {
                        return;
                    }
                }
            };
            let spawned = thread::Builder::new().name("grader".into()).spawn(work);
            if let Err(error) = spawned {
                abandoned.store(true, Ordering::Release);
                return Err((0, GraderError::Failed(format!("the system gave no thread: {error}"))));
            }
        }
        drop(sender);
        let mut missing = scores.len();
        while missing > 0 {
            if stop.is_stopped() {
                abandoned.store(true, Ordering::Release);
                return Err((0, GraderError::Stopped));
            }
            match results.recv_timeout(LOOK) {
                Ok((at, Ok(score))) => {
                    scores[at] = score;
                    missing -= 1;
                }
                Ok((at, Err(words))) => {
                    abandoned.store(true, Ordering::Release);
                    return Err((at, GraderError::Failed(words)));
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err((0, GraderError::Failed("a call to the remote grader broke down".to_owned())));
                }
            }
        }
        Ok(scores)
    }
}

#[cfg(test)]
#[path = "remote_tests.rs"]
mod tests;
