//! The maps, with the names and types that `bunter_common::map` gives them.
//!
//! All are pinned by name, so that they outlive the agent. Hash maps, but for the LRU ones, are allocated as they fill: an
//! idle host pays only for what it uses, so the sizes can be generous.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SockMap},
};
use bunter_common::*;

/// Flag of an insertion: insert only where there is no row yet.
pub const NO_EXIST: u64 = 1;

#[map]
pub static CONFIG: Array<Config> = Array::pinned(1, 0);
#[map]
pub static LAYOUT: Array<TaskLayout> = Array::pinned(1, 0);
#[map]
pub static CGROUPS: HashMap<CgroupKey, Placed> = HashMap::pinned(65_536, BPF_F_NO_PREALLOC);
#[map]
pub static CANDIDATES: HashMap<CandidateKey, Candidate> = HashMap::pinned(65_536, BPF_F_NO_PREALLOC);
#[map]
pub static DESTINATIONS: LpmTrie<DestinationKey, Destination> = LpmTrie::pinned(131_072, 0);
#[map]
pub static VERDICTS: HashMap<VerdictKey, Verdict> = HashMap::pinned(262_144, BPF_F_NO_PREALLOC);
#[map]
pub static FLOWS: HashMap<u64, Origin> = HashMap::pinned(131_072, BPF_F_NO_PREALLOC);
#[map]
pub static ORIGINS: LruHashMap<TupleKey, Origin> = LruHashMap::pinned(32_768, 0);
#[map]
pub static ACCEPTED: LruHashMap<u64, Origin> = LruHashMap::pinned(32_768, 0);
#[map]
pub static OWN: HashMap<u64, Own> = HashMap::pinned(262_144, BPF_F_NO_PREALLOC);
#[map]
pub static UPSTREAMS: HashMap<TupleKey, Upstream> = HashMap::pinned(131_072, BPF_F_NO_PREALLOC);
#[map]
pub static LISTENERS: HashMap<ListenerKey, Listeners> = HashMap::pinned(131_072, BPF_F_NO_PREALLOC);
#[map]
pub static SOCKETS: HashMap<u64, Socket> = HashMap::pinned(131_072, BPF_F_NO_PREALLOC);
/// The kernel frees the value together with the socket, so this map cannot fill up with sockets whose end no hook has seen.
#[btf_map(pin_by_name)]
pub static BINDERS: SkStorage<Task> = SkStorage::new();
#[map]
pub static PROTECTED: HashMap<ProtectedKey, u32> = HashMap::pinned(65_536, BPF_F_NO_PREALLOC);
#[map]
pub static OTHER_NETNS: LruHashMap<u64, u32> = LruHashMap::pinned(8_192, 0);
#[map]
pub static SERVED: HashMap<u64, u32> = HashMap::pinned(4_096, BPF_F_NO_PREALLOC);
#[map]
pub static INBOUND: SockMap = SockMap::pinned(2 * MAX_SHARDS as u32, 0);
#[map]
pub static OUTBOUND: SockMap = SockMap::pinned(2 * MAX_SHARDS as u32, 0);
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(counter::COUNT, 0);
#[map]
pub static QUOTAS: HashMap<QuotaKey, u64> = HashMap::pinned(65_536, BPF_F_NO_PREALLOC);
#[map]
pub static REFUSALS: HashMap<RefusalKey, Refusal> = HashMap::pinned(4_096, BPF_F_NO_PREALLOC);
/// Where a row is evicted, that user's allowance merely begins anew.
#[map]
pub static ALLOWANCES: LruHashMap<u32, Allowance> = LruHashMap::pinned(4_096, 0);
/// Room for 1,927 events. An agent maps its pages twice in a row, so it counts twice in the agent's memory.
#[map]
pub static EVENTS: RingBuf = RingBuf::pinned(1 << 18, 0);
