//! Who may connect: so many connections at once, and of one address only a part of them, so that one address cannot keep all others out.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::ServerConfig;
use crate::{http::TrustedProxies, tenant::network};

/// What a connection is refused by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cap {
    /// `--max-connections`
    All,
    /// `--max-connections-per-address`
    Address,
}

impl Cap {
    /// The label of the metric.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Address => "address",
        }
    }

    /// What a client is told.
    pub(super) fn words(self) -> &'static str {
        match self {
            Self::All => "The server has as many connections as it takes.",
            Self::Address => "Your address has as many connections as the server takes of one address.",
        }
    }
}

/// The places for connections.
#[derive(Debug)]
pub(super) struct Places {
    all: Arc<Semaphore>,
    of_address: Option<Arc<Addresses>>,
    /// Whose connections are many clients': they count only in all.
    trusted: TrustedProxies,
}

/// A connection's place, until this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    _of_all: OwnedSemaphorePermit,
    _of_address: Option<Counted>,
}

impl Places {
    pub(super) fn new(config: &ServerConfig) -> Self {
        let of_address = config.max_connections_per_address;
        Self {
            all: Arc::new(Semaphore::new(config.max_connections)),
            of_address: of_address.map(|most| Arc::new(Addresses { most, open: Mutex::default() })),
            trusted: config.trusted.clone(),
        }
    }

    /// A place for a connection of an address.
    ///
    /// # Errors
    /// The cap that leaves none.
    pub(super) fn take(&self, peer: IpAddr) -> Result<Place, Cap> {
        let counted = self.of_address.as_ref().filter(|_| !self.trusted.trusts(peer.to_canonical()));
        let of_address = counted.map(|addresses| Addresses::count(addresses, peer).ok_or(Cap::Address)).transpose()?;
        let of_all = self.all.clone().try_acquire_owned().map_err(|_| Cap::All)?;
        Ok(Place { _of_all: of_all, _of_address: of_address })
    }
}

/// Connections by network. Only those with one are in it, so it is no larger than the cap on all.
#[derive(Debug)]
struct Addresses {
    most: usize,
    open: Mutex<HashMap<IpAddr, usize>>,
}

/// One of the connections of a network.
#[derive(Debug)]
struct Counted {
    addresses: Arc<Addresses>,
    network: IpAddr,
}

impl Addresses {
    /// Counts one more; None: there are as many as there may be.
    fn count(self: &Arc<Self>, peer: IpAddr) -> Option<Counted> {
        let network = network(peer);
        let mut open = self.open.lock();
        let before = open.get(&network).copied().unwrap_or(0);
        if before >= self.most {
            return None;
        }
        open.insert(network, before + 1);
        drop(open);
        Some(Counted { addresses: self.clone(), network })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Entry::Occupied(mut open) = self.addresses.open.lock().entry(self.network) {
            *open.get_mut() -= 1;
            if *open.get() == 0 {
                open.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(all: usize, of_address: Option<usize>) -> Places {
        Places::new(&ServerConfig {
            max_connections: all,
            max_connections_per_address: of_address,
            trusted: TrustedProxies(vec!["10.0.0.0/8".parse().unwrap()]),
            ..ServerConfig::default()
        })
    }

    fn take(places: &Places, peer: &str) -> Result<Place, Cap> {
        places.take(peer.parse().unwrap())
    }

    #[test]
    fn an_address_at_its_cap_keeps_nobody_else_out() {
        let places = places(5, Some(2));
        let held = [take(&places, "192.0.2.1").unwrap(), take(&places, "192.0.2.1").unwrap()];
        assert_eq!(take(&places, "192.0.2.1").unwrap_err(), Cap::Address);
        assert_eq!(take(&places, "::ffff:192.0.2.1").unwrap_err(), Cap::Address, "the same on an IPv6 socket");
        let others = [take(&places, "192.0.2.2").unwrap(), take(&places, "2001:db8::1").unwrap()];
        drop(held);
        let again = take(&places, "192.0.2.1").unwrap();
        drop((others, again));
        assert!(places.of_address.unwrap().open.lock().is_empty(), "who has no connection is forgotten");
    }

    #[test]
    fn an_ipv6_network_is_one_address() {
        let places = places(5, Some(1));
        let _held = take(&places, "2001:db8:1:2::1").unwrap();
        assert_eq!(take(&places, "2001:db8:1:2:ffff::9").unwrap_err(), Cap::Address);
        assert!(take(&places, "2001:db8:1:3::1").is_ok());
    }

    #[test]
    fn a_trusted_proxy_and_a_server_without_the_cap_count_in_all_only() {
        let capped = places(3, Some(1));
        let _held = ["10.0.0.1", "10.0.0.1", "::ffff:10.0.0.1"].map(|peer| take(&capped, peer).unwrap());
        assert_eq!(take(&capped, "10.0.0.1").unwrap_err(), Cap::All);
        let refused = take(&capped, "192.0.2.1").unwrap_err();
        assert_eq!(refused, Cap::All);
        assert!(capped.of_address.as_ref().unwrap().open.lock().is_empty(), "who got no place is not counted");
        let free = places(2, None);
        let _held = [take(&free, "192.0.2.1").unwrap(), take(&free, "192.0.2.1").unwrap()];
        assert_eq!(take(&free, "192.0.2.1").unwrap_err(), Cap::All);
    }
}
