//! The types that both halves of Bunter share: the keys and values of the maps that the kernel programs read and the agent
//! writes, and the events that go the other way.
//!
//! Everything here has one layout in the kernel and in user space: `#[repr(C)]`, every padding byte named, no `bool`,
//! no `Option`, no Rust enum on the wire (integers, and `TryFrom` on the reading side). Addresses are always sixteen
//! bytes, IPv4 as an IPv4-mapped IPv6 address; ports are in host byte order.
//!
//! *Invariant:* this crate has no logic that decides anything. It can be read as a table.
#![no_std]
#![deny(missing_docs)]

mod listeners;
mod refusals;

pub use listeners::*;
pub use refusals::*;

/// Version of the layouts below. It is part of the directory name under bpffs, so that an agent never adopts maps
/// whose layout it does not know.
pub const ABI: u32 = 5;

/// Index of the loopback device, in every network namespace.
pub const LOOPBACK_DEVICE: u32 = 1;

/// Most data shards (threads with listeners of their own) that one agent can have.
pub const MAX_SHARDS: usize = 64;

/// `uid` or `gid` in a [`CandidateKey`] that stands for "any".
pub const ANY: u32 = u32::MAX;

/// Class of the registration entries that name no cgroup, and of a cgroup that no entry names.
pub const CLASS_NONE: u32 = 0;

/// Class under which `CANDIDATES` has a row for the uid and gid of every entry that names a cgroup, whatever cgroup that
/// is: it tells what a task in a cgroup that the agent has not looked at yet could turn out to be.
pub const CLASS_UNSEEN: u32 = u32::MAX;

/// An IPv6 address, or an IPv4 address mapped into one (`::ffff:a.b.c.d`), in network byte order.
pub type Address = [u8; 16];

/// What the agent tells the programs about itself. One entry, replaced as a whole.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Layout version, [`ABI`].
    pub abi: u32,
    /// Generation of the policy in force: it rises with every reload.
    pub generation: u32,
    /// Cookie of the network namespace whose sockets the programs act on (`SO_NETNS_COOKIE`).
    pub netns_cookie: u64,
    /// Number of data shards, 1 to [`MAX_SHARDS`].
    pub shards: u32,
    /// `FLAG_` and `SHAPES_` bits.
    pub flags: u32,
    /// Epoch of the keys in force: keys of another epoch do not exist for the programs. It rises with a reload that changes
    /// the registration entries; one that changes only what is allowed writes the rows that differ.
    pub epoch: u32,
    /// Number of the network namespace in [`DestinationKey`]s.
    pub namespace: u32,
}

/// Offsets in bytes, from the kernel's own type information (BTF): a program of kind `sock_ops` has no helper that tells
/// who is running, but may read the task.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskLayout {
    /// `task_struct.real_cred`; 0 where the layout is not known, and nothing is read then.
    pub real_cred: u32,
    /// `task_struct.tgid`.
    pub tgid: u32,
    /// `task_struct.cgroups`.
    pub cgroups: u32,
    /// `cred.uid`.
    pub uid: u32,
    /// `cred.gid`.
    pub gid: u32,
    /// `css_set.dfl_cgrp`.
    pub dfl_cgrp: u32,
    /// `cgroup.kn`.
    pub kn: u32,
    /// `kernfs_node.id`.
    pub id: u32,
    /// `sock_common.skc_net`.
    pub skc_net: u32,
    /// `net.net_cookie`.
    pub net_cookie: u32,
    /// The byte of `sock_common` in which `skc_ipv6only` is.
    pub ipv6_only: u32,
    /// Its bit there. Those before it are `skc_reuse` and `skc_reuseport`.
    pub ipv6_only_bit: u32,
    /// `sock.sk_shutdown`.
    pub shutdown: u32,
}

/// Every listening socket that is older than the programs is recorded. Where no row is found, nobody listens, or there was
/// no room to record the socket, and connections to it are refused.
pub const FLAG_REGISTRY_COMPLETE: u32 = 4;
/// The registration entries are about to change: a socket that would be left alone when it begins to listen is undecided
/// instead, until the agent has judged it.
pub const FLAG_ALL_UNDECIDED: u32 = 32;
/// Policy protects some addresses, whoever listens there.
pub const FLAG_PROTECTED_ADDRESSES: u32 = 8;
/// Some registration entry has no cgroup selector, so that a process which may change its user can become a workload.
pub const FLAG_ENTRIES_BY_USER: u32 = 16;

/// Some registration entry names a cgroup or a systemd unit, so a task's cgroup matters.
pub const FLAG_CGROUP_CLASSES: u32 = 1;
/// Some verdict is for one port.
pub const FLAG_PORTS: u32 = 2;

/// Position of the four bits that say which of the keys of [`shape`] the entries without a cgroup selector have.
pub const SHAPES_WITHOUT_CGROUP: u32 = 8;
/// The same for the entries with one.
pub const SHAPES_WITH_CGROUP: u32 = 12;

/// The four forms of a [`CandidateKey`], as bits: those that no row has are not looked up.
pub mod shape {
    /// Uid and gid.
    pub const BOTH: u32 = 1;
    /// Uid, and any gid.
    pub const UID: u32 = 2;
    /// Any uid, and gid.
    pub const GID: u32 = 4;
    /// Any uid and gid.
    pub const NEITHER: u32 = 8;
    /// All of them.
    pub const ALL: u32 = 15;
}

/// Key of `CGROUPS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CgroupKey {
    /// Epoch.
    pub epoch: u32,
    /// Always zero.
    pub pad: u32,
    /// Id of the cgroup on the unified hierarchy (`bpf_get_current_cgroup_id`).
    pub cgroup: u64,
}

/// Value of `CGROUPS`. A cgroup without a row is what its nearest ancestor with one is, unless that one is open.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Which entries with a cgroup selector a task in it can match: the class of its rows in `CANDIDATES`.
    pub class: u32,
    /// 1 where a cgroup below could match an entry that this one does not, else 0.
    pub open: u32,
}

/// Key of `CANDIDATES`: the selectors of registration entries that the kernel can see. The programs look up a task's own
/// uid and gid, and each replaced by [`ANY`], first under [`CLASS_NONE`] and then under the class of the task's cgroup.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CandidateKey {
    /// Epoch.
    pub epoch: u32,
    /// [`CLASS_NONE`] for entries without a cgroup selector, else the class of a cgroup, or [`CLASS_UNSEEN`].
    pub class: u32,
    /// Real user id, or [`ANY`].
    pub uid: u32,
    /// Real group id, or [`ANY`].
    pub gid: u32,
}

/// Value of `CANDIDATES`. Of all rows that a task matches, the one with the most certain selectors wins, unless an entry
/// that has to be attested, or one of another workload, has as many.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Number of the workload's identity, as in [`VerdictKey::source`].
    pub source: u64,
    /// Number of the patterns that match this identity, as in [`VerdictKey::source`], or 0.
    pub group: u64,
    /// Number of the workload; 0 where several fit equally well.
    pub workload: u32,
    /// The most selectors that an entry has which the kernel can check completely, or 0.
    pub certain: u16,
    /// The most selectors that an entry has which has to be attested (by path or content of the program), or 0.
    pub attested: u16,
}

/// Key of `DESTINATIONS`, a longest-prefix-match trie over these bytes. Everything in front of the address is always
/// matched whole, so prefix lengths run from [`DESTINATION_FIXED_BITS`] (any address) to [`DESTINATION_KEY_BITS`] (one
/// address). Port 0 stands for any port and is looked up after the port itself.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DestinationKey {
    /// Epoch.
    pub epoch: u32,
    /// Number of the network namespace, [`Config::namespace`].
    pub namespace: u32,
    /// Port in host byte order, or 0 for any.
    pub port: u16,
    /// 0, or [`DESTINATION_ADDRESS`].
    pub pad: u16,
    /// Address or network.
    pub address: Address,
}

/// `pad` of a [`DestinationKey`] whose row says that some port of the address is a mesh destination: for packets without a
/// port.
pub const DESTINATION_ADDRESS: u16 = 1;

/// Bits of a [`DestinationKey`] in front of the address.
pub const DESTINATION_FIXED_BITS: u32 = 96;

/// Value of `DESTINATIONS`. Its numbers name what is there, and mean the same in every policy: a verdict about a number is
/// about every address that has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Mesh: number of the identity that has to answer. Plain: number of the bypasses that hold there. Never 0.
    pub target: u64,
    /// Mesh: number of the patterns that match this identity, or 0.
    pub group: u64,
    /// Mesh: number of the `[[udp]]` rules that hold there, or 0.
    pub datagrams: u64,
    /// [`MODE_MESH`] or [`MODE_PLAIN`].
    pub mode: u32,
    /// Always zero.
    pub pad: u32,
    /// The source address that the host would use to get there: what `getsockname` shows to a program that did not
    /// bind one. All zero where it is not known.
    pub source: Address,
}

/// Destination that is reached by mutual TLS only.
pub const MODE_MESH: u32 = 1;
/// Destination that some named bypass lets enrolled workloads reach in plaintext.
pub const MODE_PLAIN: u32 = 2;

/// Key of `VERDICTS`. No entry means: denied. It has no epoch, because its numbers have one meaning for ever.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VerdictKey {
    /// Number of a source's identity, or of the patterns that match it. Never 0.
    pub source: u64,
    /// One of the numbers of a [`Destination`]. Never 0.
    pub target: u64,
    /// Port, or 0 for every port.
    pub port: u16,
    /// IPPROTO_TCP (6) or IPPROTO_UDP (17).
    pub protocol: u16,
    /// Always zero.
    pub pad: u32,
}

/// Value of `VERDICTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// [`VERDICT_MESH`] or [`VERDICT_BYPASS`].
    pub action: u32,
    /// Number of the rule, for events and counters. 0 for [`VERDICT_MESH`]: the agent names that rule.
    pub rule: u32,
}

/// TCP: redirect the connection to the agent.
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

/// Value of `FLOWS` (by cookie of the application's socket), `ORIGINS` (by [`TupleKey`]) and `ACCEPTED` (by cookie of the
/// agent's end): where a connection that was redirected to the agent wanted to go.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Who called `connect`.
    pub task: Task,
    /// Cookie of the application's socket.
    pub cookie: u64,
    /// Address that the application dialled.
    pub destination: Address,
    /// Source address to show and to dial from: what the application bound, else [`Destination::source`], else zero.
    pub source: Address,
    /// Port that the application dialled.
    pub destination_port: u16,
    /// Port that the application bound, or 0.
    pub source_port: u16,
    /// Lower half of the number of what is there, [`Destination::target`], or 0.
    pub destination_id: u32,
    /// Policy generation that decided.
    pub generation: u32,
    /// 4 or 6: the family of the application's socket call (an IPv4-mapped address on an IPv6 socket is 6).
    pub family: u16,
    /// Port of the agent's listener to which the connection was redirected.
    pub agent_port: u16,
    /// Thread that called `connect`, in the initial pid namespace.
    pub thread: u32,
    /// 1 once the connection to the agent is established.
    pub arrived: u32,
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
    /// One of the `OWN_` kinds.
    pub kind: u32,
    /// Always zero.
    pub pad: u16,
    /// For an upstream connection: port of the true client.
    pub client_port: u16,
    /// For an upstream connection: address of the true client, which the workload is shown.
    pub client: Address,
    /// For an upstream connection: who was found to listen where it goes, by [`who_listens`].
    pub listeners: u64,
}

/// The agent's connection to a remote peer.
pub const OWN_DIAL: u32 = 1;
/// The agent's upstream connection to a local workload.
pub const OWN_UPSTREAM: u32 = 2;
/// One of the agent's listeners: it takes connections that the programs redirect to it; who dials it directly is refused.
pub const OWN_LISTENER: u32 = 3;
/// A listener that the agent has opened in order to dial it itself.
pub const OWN_TRIAL: u32 = 4;

/// Value of `UPSTREAMS` (by [`TupleKey`]): the true client behind an upstream connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// Address of the true client.
    pub client: Address,
    /// Port of the true client.
    pub client_port: u16,
    /// Always zero.
    pub pad: [u16; 3],
    /// As in [`Own`]: the upstream connection may reach these sockets, and none that listens there after them.
    pub listeners: u64,
}

/// What the kernel programs decided or learnt, sent to the agent (ring buffer `EVENTS`).
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
    /// Lower half of the number of what is there, [`Destination::target`], or 0.
    pub destination_id: u32,
    /// A refusal: how many there were of its kind up to this one, its row's [`Refusal::total`].
    pub total: u64,
    /// A refusal: how many it stands for, itself included.
    pub repeats: u32,
    /// Always zero.
    pub pad: u32,
}

/// A connection, or a datagram, was refused.
pub const EVENT_REFUSED: u32 = 1;
/// A connection or a UDP association passed by a named bypass.
pub const EVENT_BYPASSED: u32 = 2;
/// A socket began to listen.
pub const EVENT_LISTENING: u32 = 3;
/// A listening socket was closed, or listens no more.
pub const EVENT_CLOSED: u32 = 4;
/// A process that may be enrolled has asked for the name of a listening socket that was not protected. The socket is
/// undecided from then on.
pub const EVENT_HELD: u32 = 6;
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
/// A connection to an undecided listener: the agent has not said yet whose it is.
pub const REASON_UNDECIDED: u32 = 8;
/// The socket is bound to a device, so that it cannot reach the agent.
pub const REASON_DEVICE: u32 = 9;
/// A connection was redirected to the agent and never arrived there.
pub const REASON_NEVER_ARRIVED: u32 = 10;
/// A packet of a protocol other than TCP and UDP (ICMP included) from an enrolled workload to a mesh destination.
pub const REASON_PROTOCOL: u32 = 11;
/// An enrolled process in a network namespace without an agent dialled a mesh destination of this one.
pub const REASON_NAMESPACE: u32 = 12;
/// A listener of the agent itself was dialled.
pub const REASON_DIRECT: u32 = 13;
/// The user has as many rows of a map of the kernel programs as one user may have.
pub const REASON_QUOTA: u32 = 16;

/// Every reason for which the programs refuse.
pub const REASONS: [u32; 14] = [
    REASON_NO_IDENTITY,
    REASON_NOT_ALLOWED,
    REASON_MAP_FULL,
    REASON_GUARD,
    REASON_UDP,
    REASON_NO_AGENT,
    REASON_NO_CONFIG,
    REASON_UNDECIDED,
    REASON_DEVICE,
    REASON_NEVER_ARRIVED,
    REASON_PROTOCOL,
    REASON_NAMESPACE,
    REASON_DIRECT,
    REASON_QUOTA,
];

pub mod counter;

pub mod map;

/// Lookup key length in bits of a whole [`DestinationKey`].
pub const DESTINATION_KEY_BITS: u32 = (core::mem::size_of::<DestinationKey>() * 8) as u32;

const _: () = {
    assert!(core::mem::size_of::<Config>() == 32);
    assert!(core::mem::size_of::<CgroupKey>() == 16);
    assert!(core::mem::size_of::<Placed>() == 8);
    assert!(core::mem::size_of::<CandidateKey>() == 16);
    assert!(core::mem::size_of::<Candidate>() == 24);
    assert!(core::mem::size_of::<DestinationKey>() == 28);
    assert!(core::mem::size_of::<Destination>() == 48);
    assert!(core::mem::size_of::<VerdictKey>() == 24);
    assert!(core::mem::size_of::<Task>() == 48);
    assert!(core::mem::size_of::<Origin>() == 112);
    assert!(core::mem::size_of::<TupleKey>() == 40);
    assert!(core::mem::size_of::<Own>() == 32);
    assert!(core::mem::size_of::<Upstream>() == 32);
    assert!(core::mem::size_of::<ListenerKey>() == 32);
    assert!(core::mem::size_of::<Listeners>() == 24);
    assert!(core::mem::size_of::<ProtectedKey>() == 24);
    assert!(core::mem::size_of::<Socket>() == 152);
    assert!(core::mem::size_of::<Command>() == 104);
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
    pod!(
        Config,
        CgroupKey,
        Placed,
        CandidateKey,
        Candidate,
        DestinationKey,
        Destination,
        VerdictKey,
        Verdict,
        Task,
        TaskLayout,
        Origin
    );
    pod!(TupleKey, Own, Upstream, ListenerKey, Listeners, ProtectedKey, Socket, Command, Event);
    pod!(RefusalKey, Refusal, Allowance, QuotaKey);
}
