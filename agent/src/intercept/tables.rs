//! The maps of the kernel programs, opened once and shared by whoever needs them; and addresses as the maps write them.
//!
//! *Invariant:* a handle is typed as `wimsey_common` types the map, and the sizes were compared when it was opened.

use super::error::Error;
use crate::sys::bpf::Table;
use aya::maps::lpm_trie::Key;
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};
use wimsey_common::*;

/// Every map that user space reads or writes row by row.
#[derive(Clone, Debug)]
pub(super) struct Tables {
    pub config: Table<u32, Config>,
    pub cgroups: Table<CgroupKey, Placed>,
    pub candidates: Table<CandidateKey, Candidate>,
    pub destinations: Table<Key<DestinationKey>, Destination>,
    pub verdicts: Table<VerdictKey, Verdict>,
    pub flows: Table<u64, Origin>,
    pub origins: Table<TupleKey, Origin>,
    pub own: Table<u64, Own>,
    pub legs: Table<TupleKey, Leg>,
    pub listeners: Table<ListenerKey, Listener>,
    pub listening: Table<u64, ListenerKey>,
    pub inbound: Table<u32, u32>,
    pub outbound: Table<u32, u32>,
}

impl Tables {
    /// Opens what is pinned in this directory.
    pub fn open(pins: &Path) -> Result<Self, Error> {
        fn table<K: aya::Pod, V: aya::Pod>(pins: &Path, map: &'static str) -> Result<Table<K, V>, Error> {
            Table::open(&pins.join(map)).map_err(|error| Error::Map { map, error })
        }
        Ok(Self {
            config: table(pins, map::CONFIG)?,
            cgroups: table(pins, map::CGROUPS)?,
            candidates: table(pins, map::CANDIDATES)?,
            destinations: table(pins, map::DESTINATIONS)?,
            verdicts: table(pins, map::VERDICTS)?,
            flows: table(pins, map::FLOWS)?,
            origins: table(pins, map::ORIGINS)?,
            own: table(pins, map::OWN)?,
            legs: table(pins, map::LEGS)?,
            listeners: table(pins, map::LISTENERS)?,
            listening: table(pins, map::LISTENING)?,
            inbound: table(pins, map::INBOUND)?,
            outbound: table(pins, map::OUTBOUND)?,
        })
    }

    /// The row of the listener that the kernel would find for this local address, as `steer` in `ebpf/src/ingress.rs`
    /// looks for it: the address itself, the IPv4 wildcard, the IPv6 wildcard.
    pub fn listener_for(&self, local: SocketAddr) -> io::Result<Option<(ListenerKey, Listener)>> {
        let exact = listener_key(local);
        let four = ListenerKey { address: address(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), ..exact };
        let six = ListenerKey { address: address(IpAddr::V6(Ipv6Addr::UNSPECIFIED)), ..exact };
        let is_four = canonical(local).is_ipv4();
        for (key, needs_dual, asked) in [(exact, false, true), (four, false, is_four), (six, is_four, true)] {
            if !asked {
                continue;
            }
            if let Some(row) = self.listeners.get(&key)?
                && (row.cookie != 0 || row.mode == LISTENER_PROTECTED)
                && (!needs_dual || row.dual != 0)
            {
                return Ok(Some((key, row)));
            }
        }
        Ok(None)
    }
}

/// An error on one map, told apart by whether the map is full.
pub(super) fn map_error(map: &'static str) -> impl Fn(io::Error) -> Error {
    move |error| match error.raw_os_error() {
        Some(libc::E2BIG | libc::ENOSPC) => Error::MapFull { map },
        _ => Error::Map { map, error },
    }
}

/// An address as the maps write it.
pub fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// An address as people write it: IPv4-mapped ones are IPv4.
pub fn ip(address: &Address) -> IpAddr {
    Ipv6Addr::from_octets(*address).to_canonical()
}

/// Address and port as people write them.
pub fn socket_address(address: &Address, port: u16) -> SocketAddr {
    SocketAddr::new(ip(address), port)
}

/// The same end with an IPv4-mapped address written as IPv4, and without scope or flow label.
pub fn canonical(end: SocketAddr) -> SocketAddr {
    SocketAddr::new(end.ip().to_canonical(), end.port())
}

/// The key of a connection from one end to the other.
pub(super) fn tuple_key(source: SocketAddr, destination: SocketAddr) -> TupleKey {
    TupleKey {
        source: address(source.ip()),
        destination: address(destination.ip()),
        source_port: source.port(),
        destination_port: destination.port(),
        pad: 0,
    }
}

/// The key of a listener that is bound to exactly this.
pub fn listener_key(bound: SocketAddr) -> ListenerKey {
    ListenerKey { address: address(bound.ip()), port: bound.port(), pad: [0; 3] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_address_is_the_same_in_either_form() {
        let four: SocketAddr = "10.0.0.2:80".parse().unwrap();
        let mapped: SocketAddr = "[::ffff:10.0.0.2]:80".parse().unwrap();
        assert_eq!(listener_key(four), listener_key(mapped));
        assert_eq!(canonical(mapped), four);
        assert_eq!(socket_address(&address(four.ip()), 80), four);
    }

    #[test]
    fn wildcards_of_the_two_families_have_different_keys() {
        let four = listener_key("0.0.0.0:80".parse().unwrap());
        let six = listener_key("[::]:80".parse().unwrap());
        assert_ne!(four, six);
        assert_eq!(six.address, [0; 16]);
    }
}
