//! The flags of `--help`'s "Connections" in the words of the rooms that they are for.

use std::time::Duration;

use super::AppError;
use crate::{
    config::EdgeArgs,
    http::{
        Edge, TrustedProxies,
        server::{ServerConfig, tls_config},
    },
    service::RequestPolicy,
};

/// What connections may take.
pub(super) fn server_config(args: &EdgeArgs) -> Result<ServerConfig, AppError> {
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(certificate), Some(key)) => Some(tls_config(certificate, key)?),
        _ => None,
    };
    Ok(ServerConfig {
        max_connections: args.max_connections as usize,
        max_connections_per_address: args.connections_per_address().map(|most| most as usize),
        trusted: TrustedProxies(args.trusted_proxies.clone()),
        header_timeout: Duration::from_secs(args.header_timeout_s),
        idle_timeout: Duration::from_secs(args.idle_timeout_s),
        write_timeout: Duration::from_secs(args.write_timeout_s),
        tls,
    })
}

/// Addresses, origins, patience.
pub(super) fn edge(args: &EdgeArgs) -> Result<Edge, AppError> {
    let origin = |origin: &String| match origin.trim().trim_end_matches('/') {
        "*" => Ok("*".to_owned()),
        origin if origin.starts_with("http://") || origin.starts_with("https://") => Ok(origin.to_owned()),
        _ => Err(AppError::Flag(format!("--cors-origins {origin}: an origin is like https://app.example.org"))),
    };
    let cors_origins = args.cors_origins.iter().map(|text| {
        let wrong = |error| AppError::Flag(format!("--cors-origins {text}: {error}"));
        origin(text)?.parse().map_err(wrong)
    });
    Ok(Edge {
        body_timeout: Duration::from_secs(args.body_timeout_s),
        trusted: TrustedProxies(args.trusted_proxies.clone()),
        cors_origins: cors_origins.collect::<Result<_, _>>()?,
    })
}

/// What a completion may ask for.
pub(super) fn policy(args: &EdgeArgs) -> RequestPolicy {
    RequestPolicy {
        choices: args.max_choices.into(),
        sequences: args.max_sequences.into(),
        shed_after: args.shed_after(),
        log_prompts: args.log_prompts,
    }
}
