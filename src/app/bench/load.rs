//! n clients at once, each on its own kept connection, each asking again when it is answered.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use futures::future::try_join_all;
use serde::Deserialize;
use serde_json::json;

use super::{
    client::{Connection, Request},
    figures::percentile,
    inputs::{adapter_name, prompt},
    server::{Server, good, lost},
};
use crate::{app::AppError, config::AdapterChoice, types::TokenId};

const COMPLETIONS: &str = "/v1/completions";
/// What prompts are drawn from, token by token: any model's tokenizer has ids for it, and the golden models' context holds it.
const POOL_TEXT: &str = "The river was low that summer, and the old mill stood still. Nobody knew who had built it, or why its wheel \
                         turned against the stream.";

/// What is asked of a server.
#[derive(Debug, Clone)]
pub(super) struct Load {
    /// Clients at once.
    pub(super) clients: usize,
    /// Under which adapters.
    pub(super) adapters: AdapterChoice,
    /// Tokens of each prompt.
    pub(super) prompt_tokens: usize,
    /// Tokens of each completion, exactly.
    pub(super) max_tokens: usize,
    /// Requests of each client, one after another.
    pub(super) requests: usize,
    /// Answers as streams: latencies are measured.
    pub(super) streamed: bool,
}

/// What came back.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Completion tokens.
    pub(super) tokens: usize,
    /// From the first request to the last answer's end.
    pub(super) time: Duration,
    /// Seconds from a request to its first token, of streams.
    pub(super) first: Vec<f64>,
    /// Seconds between tokens, of streams.
    pub(super) between: Vec<f64>,
}

impl Outcome {
    /// Completion tokens a second, over all clients.
    pub(super) fn rate(&self) -> f64 {
        self.tokens as f64 / self.time.as_secs_f64()
    }
}

/// The clients of one server.
pub(super) struct Clients {
    connections: Vec<Connection>,
    pool: Vec<TokenId>,
    /// Requests made so far: no two get the same prompt.
    made: u64,
}

#[derive(Deserialize)]
struct Completion {
    choices: Vec<Choice>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    token_ids: Vec<TokenId>,
    prompt_token_ids: Option<Vec<TokenId>>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
}

impl Clients {
    /// So many, connected.
    pub(super) async fn connect(server: &Server, count: usize) -> Result<Self, AppError> {
        let mut connections = try_join_all((0..count.max(1)).map(|_| server.connect())).await?;
        let asked = json!({ "model": "base", "prompt": POOL_TEXT, "max_tokens": 1, "return_token_ids": true });
        let body = asked.to_string();
        let answer = connections[0].send(&Request::json(COMPLETIONS, body.as_bytes())).await.map_err(lost)?;
        let answer: Completion = read(&good(answer, COMPLETIONS)?)?;
        let mut pool = answer.choices.into_iter().next().and_then(|choice| choice.prompt_token_ids).unwrap_or_default();
        pool.sort_unstable();
        pool.dedup();
        if pool.len() < 2 {
            return Err(AppError::Bench("the model's tokenizer makes no tokens of an English sentence".into()));
        }
        Ok(Self { connections, pool, made: 0 })
    }

    /// Runs a load to its end. `resident` adapters are registered on the server; every run takes others of them.
    pub(super) async fn run(&mut self, load: &Load, resident: u64) -> Result<Outcome, AppError> {
        let first = self.made;
        self.made += (load.clients * load.requests) as u64;
        let bodies: Vec<Vec<String>> = (0..load.clients)
            .map(|client| {
                let numbers = (0..load.requests).map(|request| first + (request * load.clients + client) as u64);
                numbers.map(|number| self.body(load, client, number, resident, first)).collect()
            })
            .collect();
        let begun = Instant::now();
        let connections = self.connections.iter_mut().take(load.clients);
        let outcomes =
            try_join_all(connections.zip(&bodies).map(|(connection, bodies)| client(connection, load, bodies)));
        let mut all = Outcome::default();
        for outcome in outcomes.await? {
            all.tokens += outcome.tokens;
            all.first.extend(outcome.first);
            all.between.extend(outcome.between);
        }
        all.time = begun.elapsed();
        Ok(all)
    }

    fn body(&self, load: &Load, client: usize, number: u64, resident: u64, shift: u64) -> String {
        let model = match adapter_of(load, client, resident, shift) {
            None => "base".to_owned(),
            Some(adapter) => adapter_name(adapter),
        };
        let asked = json!({
            "model": model, "prompt": prompt(number, load.prompt_tokens, &self.pool), "max_tokens": load.max_tokens,
            "temperature": 0, "ignore_eos": true, "stream": load.streamed, "return_token_ids": load.streamed,
        });
        asked.to_string()
    }
}

/// The number of a client's adapter: distinct ones lie as far apart as the registered ones allow.
fn adapter_of(load: &Load, client: usize, resident: u64, shift: u64) -> Option<u64> {
    let distinct = (load.adapters.distinct(load.clients) as u64).min(resident);
    let stride = resident.checked_div(distinct)?;
    Some(client as u64 % distinct * stride + shift % stride)
}

/// One client's requests, in turn.
async fn client(connection: &mut Connection, load: &Load, bodies: &[String]) -> Result<Outcome, AppError> {
    let mut all = Outcome::default();
    for body in bodies {
        let request = Request::json(COMPLETIONS, body.as_bytes());
        let tokens = if load.streamed {
            let (tokens, first, between) = streamed(connection, &request).await?;
            all.first.push(first);
            all.between.extend(between);
            tokens
        } else {
            let answer: Completion = read(&good(connection.send(&request).await.map_err(lost)?, COMPLETIONS)?)?;
            let usage = answer.usage.ok_or_else(|| AppError::Bench("an answer without usage".into()))?;
            if usage.prompt_tokens != load.prompt_tokens {
                let (asked, found) = (load.prompt_tokens, usage.prompt_tokens);
                return Err(AppError::Bench(format!("a prompt of {asked} tokens was read as {found}")));
            }
            usage.completion_tokens
        };
        if tokens != load.max_tokens {
            return Err(AppError::Bench(format!("asked for {} tokens, answered with {tokens}", load.max_tokens)));
        }
        all.tokens += tokens;
    }
    Ok(all)
}

/// Seconds to the first token of one request, streamed.
pub(super) async fn first_token(
    connection: &mut Connection,
    clients: &mut Clients,
    model: &str,
    prompt_tokens: usize,
) -> Result<f64, AppError> {
    let number = clients.made;
    clients.made += 1;
    let asked = json!({
        "model": model, "prompt": prompt(number, prompt_tokens, &clients.pool), "max_tokens": 2,
        "temperature": 0, "ignore_eos": true, "stream": true, "return_token_ids": true,
    });
    let body = asked.to_string();
    Ok(streamed(connection, &Request::json(COMPLETIONS, body.as_bytes())).await?.1)
}

/// Tokens of a stream, seconds to the first, seconds between them. Pieces are only noted while they come, and read afterwards.
async fn streamed(connection: &mut Connection, request: &Request<'_>) -> Result<(usize, f64, Vec<f64>), AppError> {
    let begun = Instant::now();
    let (mut bytes, mut pieces): (Vec<u8>, Vec<(f64, Range<usize>)>) = (Vec::new(), Vec::new());
    let note = |piece: &[u8]| {
        let from = bytes.len();
        bytes.extend_from_slice(piece);
        pieces.push((begun.elapsed().as_secs_f64(), from..bytes.len()));
    };
    let status = connection.stream(request, note).await.map_err(lost)?;
    if status != 200 {
        let text = String::from_utf8_lossy(&bytes);
        return Err(AppError::Bench(format!("{COMPLETIONS} answered {status}: {text}")));
    }
    let mut times = Vec::new();
    for (time, range) in pieces {
        let text = String::from_utf8_lossy(&bytes[range]).into_owned();
        for line in text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|line| *line != "[DONE]") {
            let chunk: Completion = read(line.as_bytes())?;
            let tokens = chunk.choices.iter().map(|choice| choice.token_ids.len()).sum();
            times.extend(std::iter::repeat_n(time, tokens));
        }
    }
    let Some(&first) = times.first() else {
        return Err(AppError::Bench("a stream without tokens".into()));
    };
    Ok((times.len(), first, times.windows(2).map(|pair| pair[1] - pair[0]).collect()))
}

fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, AppError> {
    serde_json::from_slice(body).map_err(|error| {
        let text = String::from_utf8_lossy(&body[..body.len().min(200)]);
        AppError::Bench(format!("an answer that is no completion ({error}): {text}"))
    })
}

/// Median and 99th percentile in milliseconds.
pub(super) fn milliseconds(seconds: &[f64]) -> (f64, f64) {
    (1e3 * percentile(seconds, 0.5), 1e3 * percentile(seconds, 0.99))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn load(clients: usize, adapters: &str) -> Load {
        let adapters = adapters.parse().unwrap();
        Load { clients, adapters, prompt_tokens: 21, max_tokens: 32, requests: 1, streamed: false }
    }

    #[test]
    fn clients_get_as_many_distinct_adapters_as_were_asked_for() {
        for (adapters, resident, expected) in [("each", 1000, 32), ("each", 8, 8), ("1", 1000, 1), ("5", 1000, 5)] {
            let load = load(32, adapters);
            for shift in [0, 1, 31, 12345] {
                let taken: HashSet<u64> =
                    (0..32).map(|client| adapter_of(&load, client, resident, shift).unwrap()).collect();
                assert_eq!(taken.len(), expected, "{adapters} of {resident}");
                assert!(taken.iter().all(|&adapter| adapter < resident));
            }
        }
        assert_eq!(adapter_of(&load(32, "none"), 3, 1000, 0), None);
        assert_eq!(adapter_of(&load(32, "each"), 3, 0, 0), None);
    }

    #[test]
    fn a_rate_is_tokens_over_the_time_of_all() {
        let outcome = Outcome { tokens: 1024, time: Duration::from_millis(500), ..Outcome::default() };
        assert_eq!(outcome.rate(), 2048.0);
        let (p50, p99) = milliseconds(&[0.010, 0.020, 0.030]);
        assert!((p50 - 20.0).abs() < 1e-9 && (p99 - 29.8).abs() < 1e-9);
    }
}
