//! The words that both halves of Wimsey speak: the keys and values of the maps that the kernel programs read and the
//! agent writes, and the events that go the other way.
//!
//! Everything here has one layout in the kernel and in user space: `#[repr(C)]`, every padding byte named, no `bool`,
//! no `Option`, no Rust enum on the wire (integers, and `TryFrom` on the reading side). Addresses are always sixteen
//! bytes, IPv4 as an IPv4-mapped IPv6 address; ports are in host byte order.
//!
//! *Invariant:* this crate has no logic that decides anything. It can be read as a table.
#![no_std]
#![deny(missing_docs)]

/// Version of the layouts below. It is part of the directory name under bpffs, so that an agent never adopts maps
/// whose layout it does not know.
pub const ABI: u32 = 2;

/// Most data shards (threads with listeners of their own) that one agent can have.
pub const MAX_SHARDS: usize = 64;

/// `uid` or `gid` in a [`CandidateKey`] that stands for "any".
pub const ANY: u32 = u32::MAX;

/// Class of a cgroup that the agent has looked at and that no registration entry names.
pub const CLASS_NONE: u32 = 0;

/// Destination id of everything that no destination entry covers.
pub const DESTINATION_OTHER: u32 = 0;

/// An IPv6 address, or an IPv4 address mapped into one (`::ffff:a.b.c.d`), in network byte order.
pub type Address = [u8; 16];

/// What the agent tells the programs about itself. One entry, replaced as a whole.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Layout version, [`ABI`].
    pub abi: u32,
    /// Generation of the policy in force. Keys of another generation do not exist for the programs.
    pub generation: u32,
    /// Cookie of the network namespace whose sockets the programs act on (`SO_NETNS_COOKIE`).
    pub netns_cookie: u64,
    /// Number of data shards, 1 to [`MAX_SHARDS`].
    pub shards: u32,
    /// [`FLAG_CGROUP_CLASSES`] and future flags.
    pub flags: u32,
}

/// Some registration entry names a cgroup or a systemd unit, so a cgroup without a class has to be looked at first.
pub const FLAG_CGROUP_CLASSES: u32 = 1;

/// Key of `CGROUPS`: which class has this cgroup under this policy generation?
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CgroupKey {
    /// Policy generation.
    pub generation: u32,
    /// Always zero.
    pub pad: u32,
    /// Id of the cgroup on the unified hierarchy (`bpf_get_current_cgroup_id`).
    pub cgroup: u64,
}

/// Key of `CANDIDATES`: the selectors of registration entries that the kernel can see. The programs look up four keys
/// under the task's cgroup class: its own uid and gid, and each replaced by [`ANY`]. Two hits that name different
/// workloads leave the choice to the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CandidateKey {
    /// Policy generation.
    pub generation: u32,
    /// Class of the cgroup, or [`CLASS_NONE`]. The rows of a class hold every entry that a task in it can match, those
    /// without a cgroup selector included.
    pub class: u32,
    /// Real user id, or [`ANY`].
    pub uid: u32,
    /// Real group id, or [`ANY`].
    pub gid: u32,
}

/// Value of `CANDIDATES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The workload, where the kernel's selectors are enough to know it; 0 where the agent has to attest the process
    /// (the entry has selectors that only user space can see, or several entries share this key).
    pub workload: u32,
    /// Always zero.
    pub pad: u32,
}

/// Key of `DESTINATIONS`, a longest-prefix-match trie over these bytes. `generation` and `port` are always matched
/// whole, so prefix lengths run from 64 (any address) to 192 (one address). Port 0 stands for any port and is looked
/// up after the port itself.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DestinationKey {
    /// Policy generation.
    pub generation: u32,
    /// Port in host byte order, or 0 for any.
    pub port: u16,
    /// Always zero.
    pub pad: u16,
    /// Address or network.
    pub address: Address,
}

/// Bits of a [`DestinationKey`] in front of the address.
pub const DESTINATION_FIXED_BITS: u32 = 64;

/// Value of `DESTINATIONS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Number of the destination, never [`DESTINATION_OTHER`].
    pub id: u32,
    /// [`MODE_MESH`] or [`MODE_PLAIN`].
    pub mode: u32,
    /// The source address that the host would use to get there: what `getsockname` shows to a program that did not
    /// bind one. All zero where it is not known.
    pub source: Address,
}

/// Destination that is reached by mutual TLS only.
pub const MODE_MESH: u32 = 1;
/// Destination that some named bypass lets enrolled workloads reach in plaintext.
pub const MODE_PLAIN: u32 = 2;

/// Key of `VERDICTS`. No entry means: denied.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VerdictKey {
    /// Policy generation.
    pub generation: u32,
    /// Workload number, never 0.
    pub workload: u32,
    /// Destination number, or [`DESTINATION_OTHER`].
    pub destination: u32,
    /// IPPROTO_TCP (6) or IPPROTO_UDP (17).
    pub protocol: u32,
}

/// Value of `VERDICTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// [`VERDICT_MESH`] or [`VERDICT_BYPASS`].
    pub action: u32,
    /// Number of the rule, for events and counters.
    pub rule: u32,
}

/// TCP: turn the connection to the agent.
pub const VERDICT_MESH: u32 = 1;
/// TCP or UDP: let it pass as it is, and count it under its rule.
pub const VERDICT_BYPASS: u32 = 2;

/// What the kernel recorded about a task at the moment when it acted on a socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    /// Process id (thread group) in the initial pid namespace.
    pub tgid: u32,
    /// Real user id.
    pub uid: u32,
    /// Real group id.
    pub gid: u32,
    /// Workload number where the kernel knew it, else 0.
    pub workload: u32,
    /// Id of the task's cgroup on the unified hierarchy.
    pub cgroup: u64,
    /// `CLOCK_BOOTTIME` in nanoseconds when it was recorded.
    pub at: u64,
    /// Name of the task, for people; it proves nothing.
    pub comm: [u8; 16],
}

/// Value of `FLOWS` (by socket cookie) and `ORIGINS` (by [`TupleKey`]): where a connection that was turned to the agent
/// wanted to go.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Who called `connect`.
    pub task: Task,
    /// Cookie of the application's socket.
    pub cookie: u64,
    /// Address that the application dialled.
    pub destination: Address,
    /// Source address to show and to dial from: what the application bound, else the destination's hint, else zero.
    pub source: Address,
    /// Port that the application dialled.
    pub destination_port: u16,
    /// Port that the application bound, or 0.
    pub source_port: u16,
    /// Number of the destination entry.
    pub destination_id: u32,
    /// Policy generation that decided.
    pub generation: u32,
    /// 4 or 6: the family of the application's socket call (an IPv4-mapped address on an IPv6 socket is 6).
    pub family: u16,
    /// Port of the agent's listener that the connection was turned to.
    pub agent_port: u16,
}

/// A TCP connection as one of its ends sees it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TupleKey {
    /// Address of the end that called `connect`.
    pub source: Address,
    /// Address that it connected to.
    pub destination: Address,
    /// Port of the end that called `connect`.
    pub source_port: u16,
    /// Port that it connected to.
    pub destination_port: u16,
    /// Always zero.
    pub pad: u32,
}

/// Value of `OWN` (by socket cookie): a socket that the agent made. Only the agent can write this map, so no other
/// process can claim to be it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Own {
    /// [`OWN_DIAL`] or [`OWN_LEG`].
    pub kind: u32,
    /// Always zero.
    pub pad: u16,
    /// For a leg: port of the true client.
    pub client_port: u16,
    /// For a leg: address of the true client, which the workload is shown.
    pub client: Address,
}

/// The agent's connection to a remote peer.
pub const OWN_DIAL: u32 = 1;
/// The agent's last leg to a local workload.
pub const OWN_LEG: u32 = 2;
/// One of the agent's listeners.
pub const OWN_LISTENER: u32 = 3;

/// Value of `LEGS` (by [`TupleKey`]): the true client behind a leg.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leg {
    /// Address of the true client.
    pub client: Address,
    /// Port of the true client.
    pub client_port: u16,
    /// Always zero.
    pub pad: [u16; 3],
}

/// Key of `LISTENERS`. The address is as bound: all zero for an IPv6 wildcard, `::ffff:0.0.0.0` for an IPv4 one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenerKey {
    /// Address as bound.
    pub address: Address,
    /// Port.
    pub port: u16,
    /// Always zero.
    pub pad: [u16; 3],
}

/// Value of `LISTENERS`: a listening socket, or a port that policy protects whether anybody listens or not.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Who bound it; all zero while nobody listens.
    pub owner: Task,
    /// Cookie of the listening socket, or 0.
    pub cookie: u64,
    /// One of the `LISTENER_` modes. The programs only ever raise protection; only the agent lowers it.
    pub mode: u32,
    /// 1 for an IPv6 socket that also takes IPv4, else 0.
    pub dual: u32,
}

/// Owner known not to be enrolled: left alone.
pub const LISTENER_LEFT_ALONE: u32 = 1;
/// Owner not attested yet: through the agent while there is one, left alone when there is none.
pub const LISTENER_UNKNOWN: u32 = 2;
/// Protected: through the agent; refused when there is none.
pub const LISTENER_PROTECTED: u32 = 3;

/// What the kernel did by itself, or learnt, on the way to the agent (ring buffer `EVENTS`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// One of the `EVENT_` kinds.
    pub kind: u32,
    /// One of the `REASON_` codes, or 0.
    pub reason: u32,
    /// Number of the rule that decided, or 0.
    pub rule: u32,
    /// IPPROTO_TCP or IPPROTO_UDP.
    pub protocol: u32,
    /// The task, as far as known.
    pub task: Task,
    /// Socket cookie.
    pub cookie: u64,
    /// Source address as far as known.
    pub source: Address,
    /// Destination address as dialled; for a listener, the address bound.
    pub destination: Address,
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// Number of the destination entry.
    pub destination_id: u32,
    /// A refusal: how many there were of its kind up to this one, its row's [`Refusal::total`].
    pub total: u64,
    /// A refusal: how many it stands for, itself included.
    pub repeats: u32,
    /// Always zero.
    pub pad: u32,
}

/// Key of `QUOTAS`: how many rows of a table a user has. The value is a number; what the agent gives back is counted in a row
/// of its own. The agent makes the row of [`ANY`], for users who came when the map was full.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuotaKey {
    /// Real user id.
    pub uid: u32,
    /// One of the `QUOTA_` tables.
    pub what: u32,
    /// [`QUOTA_BY_PROGRAMS`] or [`QUOTA_BY_AGENT`].
    pub by: u32,
}

/// Rows of `FLOWS`.
pub const QUOTA_FLOWS: u32 = 1;
/// What the programs have taken and given back.
pub const QUOTA_BY_PROGRAMS: u32 = 0;
/// What the agent has given back.
pub const QUOTA_BY_AGENT: u32 = 1;
/// One user may have a table's rows divided by this.
pub const QUOTA_SHARE: u32 = 4;

/// Key of `REFUSALS`: refusals that are one to whoever reads of them. Where a user has had more kinds of refusals in a second
/// than are told one by one, or the map is full, address and port are zero and stand for all.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RefusalKey {
    /// Destination address as dialled; for a listener, the address that was dialled.
    pub destination: Address,
    /// Destination port.
    pub destination_port: u32,
    /// Real user id of the task, or owner of the socket.
    pub uid: u32,
    /// One of the `REASON_` codes.
    pub reason: u32,
    /// IPPROTO_TCP or IPPROTO_UDP.
    pub protocol: u32,
}

/// Value of `REFUSALS`. The programs only ever add to `total`, so that no count is lost between them and the agent, which
/// remembers how many of them it has written down.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// How many there were.
    pub total: u64,
    /// How many of them an event has stood for.
    pub told: u64,
    /// `CLOCK_BOOTTIME` in nanoseconds of the last event.
    pub told_at: u64,
    /// `CLOCK_BOOTTIME` in nanoseconds of the last refusal.
    pub last: u64,
    /// Who was refused first.
    pub task: Task,
    /// Its source address as far as known.
    pub source: Address,
    /// Its source port.
    pub source_port: u32,
    /// Number of the destination entry.
    pub destination_id: u32,
}

/// Nanoseconds within which a refusal of one kind is told once.
pub const REFUSAL_INTERVAL: u64 = 1_000_000_000;
/// Kinds of refusals that are told of one user in a [`REFUSAL_INTERVAL`]; what comes beyond is told without its destination.
pub const REFUSALS_PER_UID: u32 = 32;

/// Value of `ALLOWANCES` (by uid): how many kinds of refusals are still told of a user.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// `CLOCK_BOOTTIME` in nanoseconds when the interval began.
    pub since: u64,
    /// How many were told in it.
    pub used: u32,
    /// Always zero.
    pub pad: u32,
}

/// A connection, or a datagram, was refused.
pub const EVENT_REFUSED: u32 = 1;
/// A connection or a UDP association passed by a named bypass.
pub const EVENT_BYPASSED: u32 = 2;
/// A socket began to listen.
pub const EVENT_LISTENING: u32 = 3;
/// A listening socket was closed.
pub const EVENT_CLOSED: u32 = 4;
/// A task acted in a cgroup that has no class yet.
pub const EVENT_UNKNOWN_CGROUP: u32 = 5;

/// The process has no identity: no registration entry can match it.
pub const REASON_NO_IDENTITY: u32 = 1;
/// Policy has no rule that lets this workload reach this destination.
pub const REASON_NOT_ALLOWED: u32 = 2;
/// A map of the kernel programs is full.
pub const REASON_MAP_FULL: u32 = 3;
/// A packet to a mesh destination from a socket that did not come through the agent (the egress guard).
pub const REASON_GUARD: u32 = 4;
/// A UDP datagram of an enrolled workload to a mesh destination.
pub const REASON_UDP: u32 = 5;
/// No agent to take the connection: its listeners are gone.
pub const REASON_NO_AGENT: u32 = 6;
/// The programs are attached but have no valid configuration.
pub const REASON_NO_CONFIG: u32 = 7;
/// The user has as many rows of a map of the kernel programs as one user may have.
pub const REASON_QUOTA: u32 = 16;

/// Indices into the per-CPU array `COUNTERS`, all counted in connections or packets since the maps were made.
pub mod counter {
    /// Connections turned to the agent.
    pub const TURNED: u32 = 0;
    /// Connections left alone.
    pub const LEFT_ALONE: u32 = 1;
    /// Connections that a named bypass let pass.
    pub const BYPASSED: u32 = 2;
    /// Connections refused at `connect`: no identity.
    pub const REFUSED_NO_IDENTITY: u32 = 3;
    /// Connections refused at `connect`: not allowed.
    pub const REFUSED_NOT_ALLOWED: u32 = 4;
    /// Connections refused at `connect`: a map was full, or the user's share of it.
    pub const REFUSED_MAP_FULL: u32 = 5;
    /// SYN packets that the egress guard dropped.
    pub const GUARD_DROPPED: u32 = 6;
    /// UDP datagrams or associations allowed to a mesh destination.
    pub const UDP_ALLOWED: u32 = 7;
    /// UDP datagrams or associations refused.
    pub const UDP_REFUSED: u32 = 8;
    /// Inbound connections steered to the agent.
    pub const STEERED: u32 = 9;
    /// Inbound connections of the agent's own last leg, admitted.
    pub const LEGS_ADMITTED: u32 = 10;
    /// Connections, outbound or inbound, refused because no agent was there.
    pub const REFUSED_NO_AGENT: u32 = 11;
    /// Events that did not fit into the ring buffer.
    pub const EVENTS_LOST: u32 = 12;
    /// Number of counters.
    pub const COUNT: u32 = 13;
}

/// Names of the maps, as the programs declare them and the agent opens them.
pub mod map {
    /// `Array<Config>`, one entry.
    pub const CONFIG: &str = "CONFIG";
    /// `HashMap<CgroupKey, u32>`: class of a cgroup.
    pub const CGROUPS: &str = "CGROUPS";
    /// `HashMap<CandidateKey, Candidate>`.
    pub const CANDIDATES: &str = "CANDIDATES";
    /// `LpmTrie<DestinationKey, Destination>`.
    pub const DESTINATIONS: &str = "DESTINATIONS";
    /// `HashMap<VerdictKey, Verdict>`.
    pub const VERDICTS: &str = "VERDICTS";
    /// `HashMap<u64, Origin>` by socket cookie.
    pub const FLOWS: &str = "FLOWS";
    /// `LruHashMap<TupleKey, Origin>`.
    pub const ORIGINS: &str = "ORIGINS";
    /// `HashMap<u64, Own>` by socket cookie.
    pub const OWN: &str = "OWN";
    /// `HashMap<TupleKey, Leg>`.
    pub const LEGS: &str = "LEGS";
    /// `HashMap<ListenerKey, Listener>`.
    pub const LISTENERS: &str = "LISTENERS";
    /// `HashMap<u64, Task>` by socket cookie: who bound the socket.
    pub const BINDS: &str = "BINDS";
    /// `HashMap<u64, ListenerKey>` by socket cookie: what a listening socket listens on. A socket that is being closed
    /// does not show its address to the programs.
    pub const LISTENING: &str = "LISTENING";
    /// `LruHashMap<u64, u32>` by socket cookie: sockets of other network namespaces that dial an address which is a mesh
    /// destination in this one. The egress guard sees packets of all namespaces and, before Linux 6.12, cannot ask for
    /// the namespace of a packet.
    pub const FOREIGN: &str = "FOREIGN";
    /// `SockMap` of the agent's outbound listeners, two a shard as in [`INBOUND`]. A listener is in it exactly as long as
    /// it listens, so a port that the agent has left and somebody else has taken is never used.
    pub const OUTBOUND: &str = "OUTBOUND";
    /// `SockMap` of the agent's inbound listeners, two a shard: `2 * shard` for IPv4, `2 * shard + 1` for IPv6.
    pub const INBOUND: &str = "INBOUND";
    /// `PerCpuArray<u64>` of [`counter::COUNT`](super::counter::COUNT) entries.
    pub const COUNTERS: &str = "COUNTERS";
    /// `HashMap<QuotaKey, u64>`.
    pub const QUOTAS: &str = "QUOTAS";
    /// `HashMap<RefusalKey, Refusal>`: what was refused, counted by its kind.
    pub const REFUSALS: &str = "REFUSALS";
    /// `LruHashMap<u32, Allowance>` by uid.
    pub const ALLOWANCES: &str = "ALLOWANCES";
    /// `RingBuf` of [`Event`](super::Event)s.
    pub const EVENTS: &str = "EVENTS";
}

/// Lookup key length in bits of a whole [`DestinationKey`].
pub const DESTINATION_KEY_BITS: u32 = (core::mem::size_of::<DestinationKey>() * 8) as u32;

const _: () = {
    assert!(core::mem::size_of::<Config>() == 24);
    assert!(core::mem::size_of::<CgroupKey>() == 16);
    assert!(core::mem::size_of::<CandidateKey>() == 16);
    assert!(core::mem::size_of::<DestinationKey>() == 24);
    assert!(core::mem::size_of::<Destination>() == 24);
    assert!(core::mem::size_of::<VerdictKey>() == 16);
    assert!(core::mem::size_of::<Task>() == 48);
    assert!(core::mem::size_of::<Origin>() == 104);
    assert!(core::mem::size_of::<TupleKey>() == 40);
    assert!(core::mem::size_of::<Own>() == 24);
    assert!(core::mem::size_of::<Leg>() == 24);
    assert!(core::mem::size_of::<ListenerKey>() == 24);
    assert!(core::mem::size_of::<Listener>() == 64);
    assert!(core::mem::size_of::<Event>() == 128);
    assert!(core::mem::size_of::<QuotaKey>() == 12);
    assert!(core::mem::size_of::<RefusalKey>() == 32);
    assert!(core::mem::size_of::<Refusal>() == 104);
    assert!(core::mem::size_of::<Allowance>() == 16);
};

#[cfg(feature = "user")]
mod pod {
    use super::*;
    // SAFETY: each of these is `#[repr(C)]`, `Copy`, made of integers and arrays of integers only, and has no implicit
    // padding (the size assertions above and the named `pad` fields), so any bit pattern is a value and every byte is
    // initialised. JUSTIFICATION: aya's typed maps ask for this promise, and it can only be given here.
    macro_rules! pod { ($($type:ty),*) => { $( unsafe impl aya::Pod for $type {} )* } }
    pod!(Config, CgroupKey, CandidateKey, Candidate, DestinationKey, Destination, VerdictKey, Verdict, Task, Origin);
    pod!(TupleKey, Own, Leg, ListenerKey, Listener, Event, RefusalKey, Refusal, Allowance, QuotaKey);
}
