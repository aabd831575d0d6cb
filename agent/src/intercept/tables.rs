//! The maps of the kernel programs, opened once and shared by whoever needs them; and addresses as the maps write them.
//!
//! *Invariant:* a handle is typed as `bunter_common` types the map, and the sizes were compared when it was opened.

use super::error::Error;
use aya::maps::lpm_trie::Key;
use bunter_common::*;
use bunter_sys::bpf::Table;
use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::Path,
};

/// Every map that user space reads or writes row by row.
#[derive(Clone, Debug)]
pub(super) struct Tables {
    pub config: Table<u32, Config>,
    pub layout: Table<u32, TaskLayout>,
    pub cgroups: Table<CgroupKey, Placed>,
    pub candidates: Table<CandidateKey, Candidate>,
    pub destinations: Table<Key<DestinationKey>, Destination>,
    pub verdicts: Table<VerdictKey, Verdict>,
    pub flows: Table<u64, Origin>,
    pub origins: Table<TupleKey, Origin>,
    pub accepted: Table<u64, Origin>,
    pub own: Table<u64, Own>,
    pub upstreams: Table<TupleKey, Upstream>,
    pub listeners: Table<ListenerKey, Listeners>,
    pub sockets: Table<u64, Socket>,
    pub protected: Table<ProtectedKey, u32>,
    pub served: Table<u64, u32>,
    pub quotas: Table<QuotaKey, u64>,
    pub refusals: Table<RefusalKey, Refusal>,
    pub inbound: Table<u32, u32>,
    pub outbound: Table<u32, u32>,
}

impl Tables {
    /// Opens what is pinned in this directory, and the map of all agents.
    pub fn open(pins: &Path, served: &Path) -> Result<Self, Error> {
        fn table<K: aya::Pod, V: aya::Pod>(pins: &Path, map: &'static str) -> Result<Table<K, V>, Error> {
            Table::open(&pins.join(map)).map_err(|error| Error::Map { map, error })
        }
        Ok(Self {
            config: table(pins, map::CONFIG)?,
            layout: table(pins, map::LAYOUT)?,
            cgroups: table(pins, map::CGROUPS)?,
            candidates: table(pins, map::CANDIDATES)?,
            destinations: table(pins, map::DESTINATIONS)?,
            verdicts: table(pins, map::VERDICTS)?,
            flows: table(pins, map::FLOWS)?,
            origins: table(pins, map::ORIGINS)?,
            accepted: table(pins, map::ACCEPTED)?,
            own: table(pins, map::OWN)?,
            upstreams: table(pins, map::UPSTREAMS)?,
            listeners: table(pins, map::LISTENERS)?,
            sockets: table(pins, map::SOCKETS)?,
            protected: table(pins, map::PROTECTED)?,
            served: Table::open(served).map_err(|error| Error::Map { map: map::SERVED, error })?,
            quotas: table(pins, map::QUOTAS)?,
            refusals: table(pins, map::REFUSALS)?,
            inbound: table(pins, map::INBOUND)?,
            outbound: table(pins, map::OUTBOUND)?,
        })
    }

    /// Removes the row of a socket that is gone, and no longer counts it against its user. Says whether there was one.
    pub fn forget_flow(&self, cookie: u64) -> io::Result<bool> {
        let Some(origin) = self.flows.take(&cookie)? else { return Ok(false) };
        let key = |uid, by| QuotaKey { uid, what: QUOTA_FLOWS, by };
        let uid = match self.quotas.get(&key(origin.task.uid, QUOTA_BY_PROGRAMS))? {
            Some(_) => origin.task.uid,
            None => ANY,
        };
        let given = self.quotas.get(&key(uid, QUOTA_BY_AGENT))?.unwrap_or(0);
        self.quotas.put(&key(uid, QUOTA_BY_AGENT), &(given + 1), bunter_sys::bpf::ANY)?;
        Ok(true)
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

/// The key of a socket that is bound to exactly this, on any device.
pub fn listener_key(bound: SocketAddr, netns: u64) -> ListenerKey {
    ListenerKey { address: address(bound.ip()), netns, device: 0, port: bound.port(), ipv6_only: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_address_is_the_same_in_either_form() {
        let four: SocketAddr = "10.0.0.2:80".parse().unwrap();
        let mapped: SocketAddr = "[::ffff:10.0.0.2]:80".parse().unwrap();
        assert_eq!(listener_key(four, 1), listener_key(mapped, 1));
        assert_eq!(canonical(mapped), four);
        assert_eq!(socket_address(&address(four.ip()), 80), four);
    }

    #[test]
    fn wildcards_of_the_two_families_have_different_keys() {
        let four = listener_key("0.0.0.0:80".parse().unwrap(), 1);
        let six = listener_key("[::]:80".parse().unwrap(), 1);
        assert_ne!(four, six);
        assert_eq!(six.address, [0; 16]);
    }
}
