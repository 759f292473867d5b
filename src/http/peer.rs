//! Who is at the other end of a request: the socket's peer, or, behind a proxy that is trusted, whom the proxy names.

use std::net::{IpAddr, SocketAddr};

use axum::http::{Extensions, HeaderMap, HeaderName};
use ipnet::IpNet;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The socket's peer; the listener puts it into every request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Socket(pub(super) SocketAddr);

/// The client's address; `middleware::observe` puts it into every request that came over a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientAddress(pub IpAddr);

/// The client's address of a request, by its extensions. None in process, where there is no socket.
pub fn client_address(extensions: &Extensions) -> Option<IpAddr> {
    extensions.get::<ClientAddress>().map(|address| address.0)
}

/// Networks whose `x-forwarded-for` is believed.
#[derive(Debug, Clone, Default)]
pub struct TrustedProxies(pub Vec<IpNet>);

impl TrustedProxies {
    /// The client's address. From anybody but a trusted proxy the header means nothing. A proxy adds the address that it saw at the right, so of
    /// the list the rightmost address that is not a trusted proxy's is the last that one of ours vouches for; everything left of it may be made up.
    pub(super) fn client(&self, socket: IpAddr, headers: &HeaderMap) -> IpAddr {
        let socket = socket.to_canonical();
        let mut client = socket;
        let entries = headers.get_all(FORWARDED_FOR);
        let entries: Vec<&str> = entries.iter().map(|value| value.to_str().unwrap_or_default()).collect();
        let mut hops = entries.iter().rev().flat_map(|value| value.rsplit(','));
        while self.trusts(client) {
            // No more entries, or no address: the last one known is the proxy itself.
            let Some(next) = hops.next().and_then(|hop| address(hop.trim())) else { break };
            client = next;
        }
        client
    }

    /// Is it one of them? Of an address in its canonical form.
    pub(super) fn trusts(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }
}

/// An entry of the header: some proxies add the port.
fn address(text: &str) -> Option<IpAddr> {
    let address = text.parse::<IpAddr>().or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()));
    address.ok().map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(socket: &str, header: &[&str]) -> String {
        let proxies = TrustedProxies(["10.0.0.0/8", "fd00::/8"].map(|net| net.parse().unwrap()).into());
        let headers = header.iter().map(|value| (FORWARDED_FOR, value.parse().unwrap())).collect();
        proxies.client(socket.parse().unwrap(), &headers).to_string()
    }

    #[test]
    fn only_a_trusted_proxy_is_believed() {
        assert_eq!(client("203.0.113.9", &["198.51.100.1"]), "203.0.113.9");
        assert_eq!(client("10.0.0.1", &["198.51.100.1"]), "198.51.100.1");
        assert_eq!(client("10.0.0.1", &[]), "10.0.0.1");
        assert_eq!(client("fd00::1", &["2001:db8::7"]), "2001:db8::7");
        assert_eq!(client("::ffff:10.0.0.1", &["198.51.100.1"]), "198.51.100.1", "IPv4 on an IPv6 socket");
    }

    #[test]
    fn what_a_client_made_up_stands_left_of_what_the_proxy_saw() {
        assert_eq!(client("10.0.0.1", &["127.0.0.1, 198.51.100.1"]), "198.51.100.1");
        assert_eq!(client("10.0.0.1", &["198.51.100.1, 10.0.0.7 ,10.1.2.3"]), "198.51.100.1");
        assert_eq!(client("10.0.0.1", &["1.1.1.1", "198.51.100.1"]), "198.51.100.1", "two headers are one list");
        assert_eq!(client("10.0.0.1", &["10.0.0.2"]), "10.0.0.2", "all are proxies");
    }

    #[test]
    fn what_is_no_address_ends_the_search() {
        assert_eq!(client("10.0.0.1", &["198.51.100.1, unknown"]), "10.0.0.1");
        assert_eq!(client("10.0.0.1", &["198.51.100.1:4711"]), "198.51.100.1");
        assert_eq!(client("10.0.0.1", &["[2001:db8::7]:4711"]), "2001:db8::7");
        for odd in ["", ",", ",,,", "999.1.1.1", "'; drop", "10.0.0.2,,"] {
            assert!(client("10.0.0.1", &[odd]).starts_with("10.0.0."), "{odd}");
        }
    }
}
