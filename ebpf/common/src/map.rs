//! Names of the maps, as the programs declare them and the agent opens them.

/// `Array<Config>`, one entry.
pub const CONFIG: &str = "CONFIG";
/// `Array<TaskLayout>`, one entry.
pub const LAYOUT: &str = "LAYOUT";
/// `HashMap<CgroupKey, Placed>`.
pub const CGROUPS: &str = "CGROUPS";
/// `HashMap<CandidateKey, Candidate>`.
pub const CANDIDATES: &str = "CANDIDATES";
/// `LpmTrie<DestinationKey, Destination>`.
pub const DESTINATIONS: &str = "DESTINATIONS";
/// `HashMap<VerdictKey, Verdict>`.
pub const VERDICTS: &str = "VERDICTS";
/// `HashMap<u64, Origin>` by socket cookie.
pub const FLOWS: &str = "FLOWS";
/// `LruHashMap<TupleKey, Origin>`: connections to the agent that are not established yet.
pub const ORIGINS: &str = "ORIGINS";
/// `LruHashMap<u64, Origin>` by cookie of the agent's end: those that are established, and that the agent has not accepted
/// yet.
pub const ACCEPTED: &str = "ACCEPTED";
/// `HashMap<u64, Own>` by socket cookie.
pub const OWN: &str = "OWN";
/// `HashMap<TupleKey, Upstream>`.
pub const UPSTREAMS: &str = "UPSTREAMS";
/// `HashMap<ListenerKey, Listeners>`: how many sockets are bound where, by their protection.
pub const LISTENERS: &str = "LISTENERS";
/// `HashMap<u64, Socket>` by socket cookie: every socket that listens, and every bound one that may be a workload's.
pub const SOCKETS: &str = "SOCKETS";
/// `SkStorage<Task>`: who bound a socket.
pub const BINDERS: &str = "BINDERS";
/// `HashMap<ProtectedKey, u32>`: addresses that policy protects, with the generation that said so.
pub const PROTECTED: &str = "PROTECTED";
/// `LruHashMap<u64, u32>` by socket cookie: sockets of other network namespaces that dial an address which is a mesh
/// destination in this one. The egress guard sees packets of all namespaces and, before Linux 6.12, cannot ask for
/// the namespace of a packet.
pub const OTHER_NETNS: &str = "OTHER_NETNS";
/// `HashMap<u64, u32>` by cookie of a network namespace: those that an agent of this host serves. One map for all agents
/// of the host.
pub const SERVED: &str = "SERVED";
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
