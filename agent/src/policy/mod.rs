//! The policy: registration entries, destinations, rules. Loaded as a whole, checked as a whole, immutable.

use crate::spiffe::{Pattern, SpiffeId, TrustDomain};
use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

/// A whole, checked policy.
#[derive(Debug)]
pub struct Policy {}

/// A registration entry: processes that match all selectors are this workload.
#[derive(Clone, Debug)]
pub struct Workload {
    /// 1, 2, 3, ... in the order of the files.
    pub number: u32,
    /// Its identity.
    pub id: SpiffeId,
}

/// The rule that decided: what the audit line and `wimsey connections` name.
#[derive(Debug)]
pub struct Rule {
    /// Number, unique in the policy, for the kernel maps.
    pub number: u32,
    /// Name as written, or made from file and line.
    pub name: Arc<str>,
    /// Close the connection after so long without a byte in either direction.
    pub idle_timeout: Option<Duration>,
}

/// One peer, or an explicit pattern of peers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Matcher {
    /// Exactly this ID, the complete URI (R11).
    Exact(SpiffeId),
    /// An explicit pattern (R17).
    Pattern(Pattern),
}

/// The peers that may be on the other end, and the rule that lets each in.
#[derive(Clone, Debug)]
pub struct Peers(pub Vec<(Matcher, Arc<Rule>)>);

impl Peers {
    /// The rule that admits this peer, if one does.
    pub fn admits(&self, _peer: &SpiffeId) -> Option<&Arc<Rule>> {
        todo!()
    }
}

/// May this workload reach that address, and how?
#[derive(Debug)]
pub enum Outbound {
    /// By mutual TLS; the server must be in `peers` (exactly one ID: R18, R47).
    Mesh {
        /// Who must answer.
        peers: Peers,
    },
    /// In plaintext, by a named bypass.
    Bypass(Arc<Rule>),
    /// No.
    Deny,
}

/// What a protected listener takes.
#[derive(Debug)]
pub struct Inbound {
    /// Clients that may connect by mutual TLS. Empty: nobody.
    pub peers: Peers,
    /// `permissive`: plaintext is taken too, under this rule, and recorded as unauthenticated.
    pub permissive: Option<Arc<Rule>>,
}

/// What is known about a process, read when asked for and only as far as asked for.
pub trait Evidence {
    /// Real and effective user id where they agree.
    fn uid(&self) -> Option<u32>;
    /// Real and effective group id where they agree.
    fn gid(&self) -> Option<u32>;
    /// Path on the unified cgroup hierarchy, from the root of the hierarchy: `/system.slice/nginx.service`.
    fn cgroup(&self) -> Option<&str>;
    /// Path of the executable, as the kernel tells it, unless it was deleted or replaced.
    fn path(&self) -> Option<&Path>;
    /// SHA-256 of the executable's content.
    fn sha256(&self) -> Option<[u8; 32]>;
}

/// Two entries with equally many selectors match one process.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("registration entries {first} and {second} match this process equally well: add a selector to one of them")]
pub struct Ambiguous {
    /// ID of the first entry.
    pub first: SpiffeId,
    /// ID of the second entry.
    pub second: SpiffeId,
}

/// What happens to connections that were open before their workload was enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preexisting {
    /// They go on.
    Keep,
    /// They go on for so long and are then closed.
    Drain(Duration),
    /// They are closed at once.
    Kill,
}

impl Policy {
    /// The trust domain of every registration entry.
    pub fn trust_domain(&self) -> &TrustDomain {
        todo!()
    }
    /// Registration entries.
    pub fn workloads(&self) -> &[Workload] {
        todo!()
    }
    /// Which workload is this process? The entry with the most selectors wins.
    pub fn identify(&self, _evidence: &dyn Evidence) -> Result<Option<&Workload>, Ambiguous> {
        todo!()
    }
    /// Is this a mesh destination (for anybody)?
    pub fn is_mesh(&self, _to: SocketAddr) -> bool {
        todo!()
    }
    /// May this workload reach that address by TCP, and how?
    pub fn outbound(&self, _source: &SpiffeId, _to: SocketAddr) -> Outbound {
        todo!()
    }
    /// What does a listener of this workload take on this port?
    pub fn inbound(&self, _workload: &SpiffeId, _port: u16) -> Inbound {
        todo!()
    }
    /// What happens to connections from before.
    pub fn preexisting(&self) -> Preexisting {
        todo!()
    }
    /// What the kernel programs need to know.
    pub fn kernel(&self) -> KernelPolicy {
        todo!()
    }
}

/// The part of a policy that the kernel programs decide by; see `wimsey_common` for the maps it goes into.
#[derive(Clone, Debug, Default)]
pub struct KernelPolicy {
    /// Every destination: mesh destinations and the addresses of bypasses.
    pub destinations: Vec<KernelDestination>,
    /// (workload number, destination number, IPPROTO_*, VERDICT_*, rule number)
    pub verdicts: Vec<KernelVerdict>,
    /// Some entry has a cgroup or systemd selector.
    pub cgroup_classes: bool,
    /// Ports that are protected whether or not a listener of the workload has been seen: from `[[inbound]]`.
    pub protected: Vec<(std::net::IpAddr, u16)>,
}

/// One row for `DESTINATIONS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelDestination {
    /// 1, 2, 3, ...
    pub number: u32,
    /// Addresses.
    pub network: ipnet::IpNet,
    /// Port, or any.
    pub port: Option<u16>,
    /// `wimsey_common::MODE_MESH` or `MODE_PLAIN`.
    pub mode: u32,
}

/// One row for `VERDICTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelVerdict {
    /// Workload number.
    pub workload: u32,
    /// Destination number.
    pub destination: u32,
    /// IPPROTO_TCP or IPPROTO_UDP.
    pub protocol: u32,
    /// `wimsey_common::VERDICT_MESH` or `VERDICT_BYPASS`.
    pub action: u32,
    /// Rule number.
    pub rule: u32,
}

/// One row for `CANDIDATES` under the class of one cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelCandidate {
    /// Real uid, or any.
    pub uid: Option<u32>,
    /// Real gid, or any.
    pub gid: Option<u32>,
    /// The workload where the kernel's selectors are enough, or 0: the agent has to attest.
    pub workload: u32,
}

impl Policy {
    /// The cgroup selectors that a cgroup path satisfies, as sorted indices: cgroups with equal sets share a class.
    pub fn cgroup_set(&self, _cgroup: &str) -> Vec<u32> {
        todo!()
    }
    /// The candidate rows for cgroups with this set (the empty set: entries without a cgroup selector).
    pub fn candidates(&self, _set: &[u32]) -> Vec<KernelCandidate> {
        todo!()
    }
}
