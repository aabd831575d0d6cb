//! The rows that a policy is for the kernel programs, whatever the epoch.
//!
//! *Invariant:* pure but for the question which address this host uses to get to another; the same policy gives the same rows.

use super::{
    Error,
    error::During,
    tables::{Tables, address, map_error},
};
use crate::policy::{KernelCandidate, KernelPolicy, Policy};
use aya::maps::lpm_trie::Key;
use bunter_common::*;
use std::{
    cmp::Ordering,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::Arc,
};

/// The number of this network namespace in the keys of destinations. One agent serves one.
pub(super) const NAMESPACE: u32 = 1;

/// What a policy tells the kernel programs. [`Policy`] is one.
pub trait KernelFacts: Send + Sync {
    /// Destinations, verdicts and protected addresses.
    fn kernel(&self) -> Arc<KernelPolicy>;
    /// A number for all registration entries: facts with the same number have the same classes, and the same candidates but
    /// for the numbers of their patterns.
    fn who(&self) -> u64;
    /// The cgroup selectors that a cgroup satisfies: cgroups with equal sets share a class.
    fn cgroup_set(&self, cgroup: &str) -> Vec<u32>;
    /// Could a cgroup below this one satisfy a selector that this one does not?
    fn cgroup_open(&self, cgroup: &str) -> bool;
    /// The candidate rows for the class of cgroups with this set; for the empty set, those of entries without cgroups.
    fn candidates(&self, set: &[u32]) -> Vec<KernelCandidate>;
}

impl KernelFacts for Policy {
    fn kernel(&self) -> Arc<KernelPolicy> {
        Policy::kernel(self)
    }
    fn who(&self) -> u64 {
        Policy::who(self)
    }
    fn cgroup_set(&self, cgroup: &str) -> Vec<u32> {
        Policy::cgroup_set(self, cgroup)
    }
    fn cgroup_open(&self, cgroup: &str) -> bool {
        Policy::cgroup_open(self, cgroup)
    }
    fn candidates(&self, set: &[u32]) -> Vec<KernelCandidate> {
        Policy::candidates(self, set)
    }
}

/// A destination's key without epoch and namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Network {
    /// Prefix length with [`DESTINATION_FIXED_BITS`].
    pub(super) bits: u32,
    pub(super) port: u16,
    /// 0, or [`DESTINATION_ADDRESS`].
    pub(super) kind: u16,
    pub(super) address: Address,
}

impl Network {
    pub(super) fn key(&self, epoch: u32) -> Key<DestinationKey> {
        let key =
            DestinationKey { epoch, namespace: NAMESPACE, port: self.port, pad: self.kind, address: self.address };
        Key::new(self.bits, key)
    }

    /// The programs take the first in this order that covers an address: the port itself before any port, and the longest
    /// prefix of either.
    pub(super) fn before(&self, other: &Self) -> Ordering {
        (self.port == 0).cmp(&(other.port == 0)).then(other.bits.cmp(&self.bits))
    }
}

/// The rows of a policy for everybody, whatever the epoch; each list is sorted by its keys. Classes of cgroups are in
/// `install::Classes`.
#[derive(Debug, Default)]
pub(super) struct Rows {
    pub(super) who: u64,
    pub(super) flags: u32,
    pub(super) protected: Vec<ProtectedKey>,
    pub(super) candidates: Vec<(CandidateKey, Candidate)>,
    pub(super) destinations: Vec<(Network, Destination)>,
    pub(super) verdicts: Vec<(VerdictKey, Verdict)>,
}

impl Rows {
    /// `source` tells which address the host would use to get to another.
    pub(super) fn of(facts: &dyn KernelFacts, mut source: impl FnMut(IpAddr) -> Option<IpAddr>) -> Self {
        let policy = facts.kernel();
        let mut candidates = candidate_rows(CLASS_NONE, &facts.candidates(&[]));
        let mut flags = shapes(&candidates) << SHAPES_WITHOUT_CGROUP;
        if !candidates.is_empty() {
            flags |= FLAG_ENTRIES_BY_USER;
        }
        if !policy.protected.is_empty() {
            flags |= FLAG_PROTECTED_ADDRESSES;
        }
        if policy.cgroup_classes {
            let attested = |(uid, gid): &(Option<u32>, Option<u32>)| KernelCandidate {
                uid: *uid,
                gid: *gid,
                attested: 1,
                ..KernelCandidate::default()
            };
            let unseen: Vec<KernelCandidate> = policy.unseen.iter().map(attested).collect();
            let unseen = candidate_rows(CLASS_UNSEEN, &unseen);
            flags |= FLAG_CGROUP_CLASSES | shapes(&unseen) << SHAPES_WITH_CGROUP;
            candidates.extend(unseen);
        }
        let mut destinations: Vec<(Network, Destination)> = Vec::with_capacity(policy.destinations.len());
        for row in &policy.destinations {
            let (bits, of_family) = (u32::from(row.network.prefix_len()), u32::from(row.network.max_prefix_len()));
            // The host's address is shown only where it is the same for the whole network.
            let hint = source(row.network.network())
                .filter(|first| bits == of_family || source(row.network.broadcast()) == Some(*first))
                .map_or([0; 16], address);
            let network = Network {
                bits: DESTINATION_FIXED_BITS + 128 - of_family + bits,
                port: row.port.unwrap_or(0),
                kind: 0,
                address: address(row.network.network()),
            };
            let there = Destination {
                target: row.target,
                group: row.group,
                datagrams: row.datagrams,
                mode: row.mode,
                pad: 0,
                source: hint,
            };
            destinations.push((network, there));
            // For packets that have no ports: some port of this address is a mesh destination.
            if row.mode == MODE_MESH {
                destinations.push((Network { port: 0, kind: DESTINATION_ADDRESS, ..network }, there));
            }
        }
        let mut verdicts: Vec<(VerdictKey, Verdict)> = Vec::with_capacity(policy.verdicts.len());
        for row in &policy.verdicts {
            if row.port != 0 {
                flags |= FLAG_PORTS;
            }
            let key =
                VerdictKey { source: row.source, target: row.target, port: row.port, protocol: row.protocol, pad: 0 };
            verdicts.push((key, Verdict { action: row.action, rule: row.rule }));
        }
        candidates.sort_unstable_by_key(|row| row.0);
        destinations.sort_unstable_by_key(|row| row.0);
        // Several ports of one address make one row.
        destinations.dedup_by_key(|row| row.0);
        verdicts.sort_unstable_by_key(|row| row.0);
        let protected = policy.protected.iter();
        Self {
            who: facts.who(),
            flags,
            protected: protected
                .map(|(ip, port)| ProtectedKey { address: address(*ip), port: *port, pad: [0; 3] })
                .collect(),
            candidates,
            destinations,
            verdicts,
        }
    }
}

/// Rows of one class under epoch 0, which the caller replaces.
pub(super) fn candidate_rows(class: u32, candidates: &[KernelCandidate]) -> Vec<(CandidateKey, Candidate)> {
    let row = |row: &KernelCandidate| {
        let key = CandidateKey { epoch: 0, class, uid: row.uid.unwrap_or(ANY), gid: row.gid.unwrap_or(ANY) };
        let KernelCandidate { workload, source, group, certain, attested, .. } = *row;
        (key, Candidate { source, group, workload, certain, attested })
    };
    candidates.iter().map(row).collect()
}

/// Which forms of key these rows have.
pub(super) fn shapes(rows: &[(CandidateKey, Candidate)]) -> u32 {
    rows.iter().fold(0, |shapes, (key, _)| {
        shapes
            | match (key.uid, key.gid) {
                (ANY, ANY) => shape::NEITHER,
                (ANY, _) => shape::GID,
                (_, ANY) => shape::UID,
                _ => shape::BOTH,
            }
    })
}

/// Removes the rows of every epoch that is not to stay.
pub(super) fn sweep(tables: &Tables, stays: impl Fn(u32) -> bool) -> Result<(), Error> {
    let mut over = tables.destinations.keys().map_err(map_error(map::DESTINATIONS))?;
    over.retain(|key| !stays({ key.data() }.epoch));
    tables.destinations.remove_all(&over).map_err(map_error(map::DESTINATIONS))?;
    let mut over = tables.candidates.keys().map_err(map_error(map::CANDIDATES))?;
    over.retain(|key| !stays(key.epoch));
    tables.candidates.remove_all(&over).map_err(map_error(map::CANDIDATES))?;
    let mut over = tables.cgroups.keys().map_err(map_error(map::CGROUPS))?;
    over.retain(|key| !stays(key.epoch));
    tables.cgroups.remove_all(&over).map_err(map_error(map::CGROUPS))
}

/// Which address would this host use to get there? A connected UDP socket knows, and sends nothing.
#[derive(Default)]
pub(super) struct Sources {
    four: Option<UdpSocket>,
    six: Option<UdpSocket>,
}

impl Sources {
    pub(super) fn source_for(&mut self, to: IpAddr) -> Option<IpAddr> {
        let (socket, any): (_, SocketAddr) = match to {
            IpAddr::V4(_) => (&mut self.four, (std::net::Ipv4Addr::UNSPECIFIED, 0).into()),
            IpAddr::V6(_) => (&mut self.six, (std::net::Ipv6Addr::UNSPECIFIED, 0).into()),
        };
        if socket.is_none() {
            *socket = UdpSocket::bind(any).during(String::new).ok();
        }
        let socket = socket.as_ref()?;
        socket.connect((to, 9)).ok()?;
        let source = socket.local_addr().ok()?.ip();
        // Else the next destination would be looked up with this source address.
        rustix::net::connect_unspec(socket).ok()?;
        (!source.is_unspecified()).then_some(source)
    }
}
