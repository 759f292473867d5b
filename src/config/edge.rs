//! What connections and requests may take, and how the server shows itself to the network.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use ipnet::IpNet;

use super::IntegrityCheck;

/// What connections and requests may take, and how the server shows itself.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connections")]
pub struct EdgeArgs {
    /// Connections at once; one more is answered 503. Each takes an open file, of which systems often allow 1024.
    #[arg(long, env = "MOTE_MAX_CONNECTIONS", value_name = "N", default_value_t = 900, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_connections: u32,
    /// Connections at once of one address (IPv6: of one /64 network); one more is answered 503. Those of --trusted-proxies do not count. 0: no limit
    /// [default: half of --max-connections].
    #[arg(long, env = "MOTE_MAX_CONNECTIONS_PER_ADDRESS", value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub max_connections_per_address: Option<u32>,
    /// Seconds for the head of a request, from its first byte; for a new connection from its beginning, TLS included.
    #[arg(long, env = "MOTE_HEADER_TIMEOUT_S", value_name = "N", default_value_t = 10, value_parser = seconds())]
    pub header_timeout_s: u64,
    /// Seconds that a connection may be idle between two requests. More than a proxy in front waits, or it sends into closed connections.
    #[arg(long, env = "MOTE_IDLE_TIMEOUT_S", value_name = "N", default_value_t = 75, value_parser = seconds())]
    pub idle_timeout_s: u64,
    /// Seconds that a request's body may take, besides one for each 16 KiB of it; then 408.
    #[arg(long, env = "MOTE_BODY_TIMEOUT_S", value_name = "N", default_value_t = 30, value_parser = seconds())]
    pub body_timeout_s: u64,
    /// Seconds that a client may read nothing of an answer that waits for it, or may let it wait in all, besides one for each 16 KiB that it read; then
    /// the connection ends, and its request with it.
    #[arg(long, env = "MOTE_WRITE_TIMEOUT_S", value_name = "N", default_value_t = 30, value_parser = seconds())]
    pub write_timeout_s: u64,
    /// A completion that would wait longer than so many seconds for its first step is answered 503 overloaded at once; 0: never.
    #[arg(long, env = "MOTE_SHED_AFTER_S", value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub shed_after_s: u64,
    /// Largest `n` and `best_of`.
    #[arg(long, env = "MOTE_MAX_CHOICES", value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=128))]
    pub max_choices: u16,
    /// Sequences of one request, which are its prompts times its choices.
    #[arg(long, env = "MOTE_MAX_SEQUENCES", value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub max_sequences: u16,
    /// Serve TLS with this chain of certificates (PEM, the server's own first).
    #[arg(long, env = "MOTE_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The private key of --tls-cert (PEM).
    #[arg(long, env = "MOTE_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Networks of proxies whose x-forwarded-for is believed, separated by commas: `10.0.0.0/8,fd00::/8` [default: none].
    #[arg(long, env = "MOTE_TRUSTED_PROXIES", value_name = "NETS", value_delimiter = ',', value_parser = network)]
    pub trusted_proxies: Vec<IpNet>,
    /// Origins whose web pages may call this server, separated by commas, or `*` [default: none].
    #[arg(long, env = "MOTE_CORS_ORIGINS", value_name = "ORIGINS", value_delimiter = ',')]
    pub cors_origins: Vec<String>,
    /// Write every prompt to the log. Without this nothing of prompts and completions is logged.
    #[arg(long, env = "MOTE_LOG_PROMPTS")]
    pub log_prompts: bool,
    /// How the embedded database is looked at before it is served.
    #[arg(long, env = "MOTE_INTEGRITY_CHECK", value_enum, default_value_t = IntegrityCheck::Quick)]
    pub integrity_check: IntegrityCheck,
}

impl EdgeArgs {
    /// `--max-connections-per-address`
    pub fn connections_per_address(&self) -> Option<u32> {
        let most = self.max_connections_per_address.unwrap_or_else(|| self.max_connections.div_ceil(2));
        (most > 0).then_some(most)
    }

    /// `--shed-after-s`
    pub fn shed_after(&self) -> Option<Duration> {
        (self.shed_after_s > 0).then(|| Duration::from_secs(self.shed_after_s))
    }
}

fn seconds() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(1..=86_400)
}

/// A network, or one address.
fn network(text: &str) -> Result<IpNet, String> {
    let text = text.trim();
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<std::net::IpAddr>().map(IpNet::from))
        .map_err(|_| format!("'{text}' is no network such as 10.0.0.0/8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_half_of_the_connections_unless_told_otherwise() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            edge: EdgeArgs,
        }
        let of_address = |flags: &str| {
            let words = format!("mote {flags}");
            <Line as clap::Parser>::parse_from(words.split_whitespace()).edge.connections_per_address()
        };
        assert_eq!(of_address(""), Some(450));
        assert_eq!(of_address("--max-connections 1"), Some(1), "never none at all");
        assert_eq!(of_address("--max-connections 10 --max-connections-per-address 64"), Some(64));
        assert_eq!(of_address("--max-connections-per-address 0"), None);
    }

    #[test]
    fn networks_parse() {
        assert_eq!(network("10.0.0.0/8").unwrap().to_string(), "10.0.0.0/8");
        assert_eq!(network(" ::1").unwrap().to_string(), "::1/128");
        assert!(network("10.0.0.0/33").is_err());
        assert!(network("everybody").is_err());
    }
}
