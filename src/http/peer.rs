//! Where a request comes from: the one place that says so, for the audit log and for failed keys.

use std::net::{IpAddr, SocketAddr};

use axum::{extract::ConnectInfo, http::Extensions};

/// The address at the other end of the connection; None for a request that came without one.
pub(super) fn address(extensions: &Extensions) -> Option<IpAddr> {
    let ConnectInfo(address) = extensions.get::<ConnectInfo<SocketAddr>>()?;
    Some(address.ip().to_canonical())
}
