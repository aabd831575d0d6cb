//! What the programs read: the configuration, who is running, where an address leads. Facts only; nothing is decided here.
//!
//! *Invariant:* fields of a context are read one by one, each as the 32-bit word that the kernel offers it as. Otherwise
//! the compiler emits wider, narrower or merged loads, which the verifier refuses.

use crate::events::{NOBODY, NOWHERE};
use crate::maps::{CANDIDATES, CGROUPS, CONFIG, DESTINATIONS, LAYOUT, OUTBOUND, VERDICTS};
use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid,
        bpf_get_current_task, bpf_get_current_uid_gid, bpf_ktime_get_boot_ns, bpf_map_lookup_elem,
        bpf_probe_read_kernel, bpf_sk_release,
    },
    maps::lpm_trie::Key,
};
use bunter_common::*;
use core::ptr::{addr_of, from_ref};

pub const AF_INET: u32 = 2;
pub const AF_INET6: u32 = 10;
pub const IPPROTO_TCP: u32 = 6;
pub const IPPROTO_UDP: u32 = 17;
pub const IPPROTO_UDPLITE: u32 = 136;
/// A socket that was opened as multipath TCP and, having one path only, is TCP on the wire.
pub const IPPROTO_MPTCP: u32 = 262;
pub const TCP_SYN_SENT: u32 = 2;
pub const TCP_SYN_RECV: u32 = 3;
pub const TCP_CLOSE: u32 = 7;
pub const TCP_LISTEN: u32 = 10;

/// The configuration, if there is a valid one.
#[inline(always)]
pub fn config() -> Option<&'static Config> {
    let config = CONFIG.get(0)?;
    if config.abi != ABI || config.epoch == 0 || config.shards == 0 || config.shards > MAX_SHARDS as u32 {
        return None;
    }
    Some(config)
}

/// The configuration for recording sockets, which begins before there is a policy.
#[inline(always)]
pub fn recording() -> Option<&'static Config> {
    let config = CONFIG.get(0)?;
    if config.abi != ABI || config.netns_cookie == 0 { None } else { Some(config) }
}

/// TCP, or what becomes TCP where the peer has one path only.
#[inline(always)]
pub fn is_tcp(protocol: u32) -> bool {
    protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP
}

/// A snapshot of the configuration: a reload changes the epoch, and workloads and destinations have to be looked up in one.
#[inline(always)]
pub fn at_this_moment(config: &Config) -> Config {
    // SAFETY: a reference is valid to read. Volatile: what is read here is not read again.
    unsafe { from_ref(config).read_volatile() }
}

/// A copy on the program's own stack: before Linux 6.4 a key or value of a map has to be there, and may not lie where a
/// function's argument points.
#[inline(always)]
pub fn on_the_stack<T: Copy>(given: &T) -> T {
    // SAFETY: a reference is valid to read. Volatile: the compiler must not drop the copy.
    unsafe { from_ref(given).read_volatile() }
}

/// Reads one word of a context, exactly as written here.
///
/// # Safety
/// `from` points to a field of the context that this program may read.
#[inline(always)]
pub unsafe fn word(from: *const u32) -> u32 {
    // SAFETY: promised by the caller, checked by the verifier.
    unsafe { from.read_volatile() }
}

/// Reads an IPv6 address of a context.
///
/// # Safety
/// As for [`word`].
#[inline(always)]
pub unsafe fn words(from: *const [u32; 4]) -> Address {
    let from = from.cast::<u32>();
    // SAFETY: promised by the caller, checked by the verifier; and sixteen bytes are sixteen bytes.
    unsafe { core::mem::transmute([word(from), word(from.add(1)), word(from.add(2)), word(from.add(3))]) }
}

/// `::ffff:a.b.c.d` for an IPv4 address in network byte order.
#[inline(always)]
pub fn mapped(address: u32) -> Address {
    // SAFETY: sixteen bytes are sixteen bytes.
    unsafe { core::mem::transmute([0, 0, 0xffff_u32.to_be(), address]) }
}

/// The four words of an address, each in network byte order.
#[inline(always)]
pub fn split(address: &Address) -> [u32; 4] {
    // SAFETY: sixteen bytes are sixteen bytes.
    unsafe { core::mem::transmute(*address) }
}

/// Is it an IPv4-mapped address?
#[inline(always)]
pub fn is_mapped(address: &Address) -> bool {
    let [a, b, c, _] = split(address);
    a | b == 0 && c == 0xffff_u32.to_be()
}

/// `127.0.0.1`, mapped, or `::1`: the two addresses that the agent listens on.
#[inline(always)]
pub fn is_loopback(address: &Address) -> bool {
    let [a, b, c, d] = split(address);
    a | b == 0 && ((c == 0xffff_u32.to_be() && d == 0x7f00_0001_u32.to_be()) || (c == 0 && d == 1_u32.to_be()))
}

/// What the kernel makes of the "any" address as a destination: loopback. (`tcp_v4_connect`, `tcp_v6_connect`; an IPv6
/// socket that is bound to an IPv4 address takes the IPv4 one.)
#[inline(always)]
pub fn reached(address: Address, bound: &Address) -> Address {
    let [a, b, c, d] = split(&address);
    if a | b | d != 0 {
        return address;
    }
    if c == 0xffff_u32.to_be() || (c == 0 && is_mapped(bound)) {
        return mapped(0x7f00_0001_u32.to_be());
    }
    if c == 0 {
        // SAFETY: sixteen bytes are sixteen bytes.
        return unsafe { core::mem::transmute::<[u32; 4], Address>([0, 0, 0, 1_u32.to_be()]) };
    }
    address
}

/// Leaves an address as it is, but makes the verifier forget what it knows of it. As long as the verifier can tell apart
/// the results of the paths by which an address came about, it follows each path to the end of the program.
#[inline(never)]
pub fn blur(address: &mut Address, epoch: u32) {
    // The index comes from a map, so the verifier has to assume that either slot could hold anything.
    let at = (epoch & 1) as usize;
    let mut both = [NOWHERE; 2];
    both[at] = *address;
    both[at ^ 1] = *address;
    // SAFETY: the first of two.
    *address = unsafe { addr_of!(both).cast::<Address>().read_volatile() };
}

/// Chooses between the two forms in which a context shows one address. Both have to be read beforehand: choosing which
/// field to read would become arithmetic on a pointer, which the verifier refuses.
#[inline(always)]
pub fn choose(family: u32, four: u32, six: Address) -> Address {
    if family == AF_INET { mapped(four) } else { six }
}

/// The socket's own end: address (mapped for IPv4) and port.
///
/// # Safety
/// `ctx` is the context of a cgroup socket-address program.
#[inline(always)]
pub unsafe fn near_end(ctx: *mut bpf_sock_addr) -> (Address, u16) {
    // SAFETY: promised by the caller; `sk` is never null in these programs.
    unsafe { own_end((*ctx).__bindgen_anon_1.sk) }
}

/// The socket's own end.
///
/// # Safety
/// `sk` is a socket that the verifier knows not to be null.
#[inline(always)]
pub unsafe fn own_end(sk: *mut bpf_sock) -> (Address, u16) {
    // SAFETY: promised by the caller.
    unsafe {
        let four = word(addr_of!((*sk).src_ip4));
        let six = words(addr_of!((*sk).src_ip6));
        (choose(word(addr_of!((*sk).family)), four, six), word(addr_of!((*sk).src_port)) as u16)
    }
}

/// The socket's other end.
///
/// # Safety
/// `sk` is a socket that the verifier knows not to be null.
#[inline(always)]
pub unsafe fn far_end(sk: *mut bpf_sock) -> (Address, u16) {
    // SAFETY: promised by the caller. `dst_port` is a 16-bit field.
    unsafe {
        let four = word(addr_of!((*sk).dst_ip4));
        let six = words(addr_of!((*sk).dst_ip6));
        let port = u16::from_be(addr_of!((*sk).dst_port).read_volatile());
        (choose(word(addr_of!((*sk).family)), four, six), port)
    }
}

/// Who is running.
#[inline(always)]
pub fn task() -> Task {
    let ids = bpf_get_current_uid_gid();
    Task {
        tgid: (bpf_get_current_pid_tgid() >> 32) as u32,
        uid: ids as u32,
        gid: (ids >> 32) as u32,
        workload: 0,
        // SAFETY: helpers without arguments.
        cgroup: unsafe { bpf_get_current_cgroup_id() },
        at: unsafe { bpf_ktime_get_boot_ns() },
        comm: bpf_get_current_comm().unwrap_or([0; 16]),
    }
}

/// Who is running, for programs that have no helper for that. All zero where the layout of a task is not known.
#[inline(always)]
pub fn running() -> Task {
    let mut found = NOBODY;
    facts_running(&mut found);
    found
}

#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn facts_running(found: *mut Task) -> u32 {
    // SAFETY: the verifier insists that it is null or what it should be.
    let Some(found) = (unsafe { found.as_mut() }) else { return 0 };
    let Some(layout) = LAYOUT.get(0).filter(|layout| layout.real_cred != 0) else { return 0 };
    // SAFETY: helpers without arguments; memory of the kernel is read by a helper that checks what it reads.
    unsafe {
        let task = bpf_get_current_task();
        let credentials = pointer(task, layout.real_cred);
        let groups = pointer(task, layout.cgroups);
        let node = pointer(pointer(groups, layout.dfl_cgrp), layout.kn);
        found.uid = number(credentials, layout.uid);
        found.gid = number(credentials, layout.gid);
        found.cgroup = pointer(node, layout.id);
        // Set last: a task without a tgid counts as not known.
        if found.cgroup != 0 && credentials != 0 {
            found.tgid = number(task, layout.tgid);
        }
        found.at = bpf_ktime_get_boot_ns();
    }
    1
}

/// The cookie of the network namespace of a socket, for programs that have no helper for that (`cgroup_skb`, before Linux
/// 6.12). 0 where it is not known.
#[inline(always)]
pub fn namespace_of(sk: *mut bpf_sock, layout: &TaskLayout) -> u64 {
    if layout.net_cookie == 0 {
        return 0;
    }
    // SAFETY: memory of the kernel is read by a helper that checks what it reads. The verifier forbids arithmetic on the
    // socket's address, but not reading it as a number from where it is stored.
    unsafe {
        let socket = bpf_probe_read_kernel(addr_of!(sk).cast::<u64>()).unwrap_or(0);
        pointer(pointer(socket, layout.skc_net), layout.net_cookie)
    }
}

/// One byte of the kernel's own socket, or 0 where it cannot be read.
#[inline(always)]
pub fn byte_of(sk: *mut bpf_sock, offset: u32) -> u8 {
    // SAFETY: as in `namespace_of`.
    unsafe {
        let socket = bpf_probe_read_kernel(addr_of!(sk).cast::<u64>()).unwrap_or(0);
        bpf_probe_read_kernel((socket + offset as u64) as *const u8).unwrap_or(0)
    }
}

/// Eight bytes of the kernel's memory, or 0 where they cannot be read.
#[inline(always)]
unsafe fn pointer(base: u64, offset: u32) -> u64 {
    // SAFETY: the helper checks what it reads.
    unsafe { bpf_probe_read_kernel((base + offset as u64) as *const u64) }.unwrap_or(0)
}

/// Four bytes likewise; where they cannot be read, an id that nobody has.
#[inline(always)]
unsafe fn number(base: u64, offset: u32) -> u32 {
    // SAFETY: the helper checks what it reads.
    unsafe { bpf_probe_read_kernel((base + offset as u64) as *const u32) }.unwrap_or(u32::MAX)
}

/// No registration entry can match.
pub const NOT_ENROLLED: u32 = 0;
/// The agent has to attest the process before anybody knows.
pub const ASK: u32 = u32::MAX;
/// The agent has not looked at the cgroup yet, and an entry could match.
pub const UNKNOWN: u32 = u32::MAX - 1;

/// Levels of the hierarchy at which an unknown cgroup's ancestors are looked for. In a deeper cgroup the nearest known
/// ancestor may be missed. That is safe: a farther one is marked open if any cgroup below it could match more entries.
const LEVELS: i32 = 16;

/// Who is a task?
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Who {
    /// Number of the workload, or [`NOT_ENROLLED`] or [`ASK`].
    pub workload: u32,
    /// 1 where the cgroup is not known yet and an entry could match there; `workload` is then what a task with this uid and
    /// gid would be in its nearest known ancestor.
    pub undecided: u32,
    /// Number of the identity, and of the patterns that match it; for [`verdict`].
    pub source: u64,
    pub group: u64,
}

impl Who {
    /// The workload, or [`UNKNOWN`] where that is not decided.
    #[inline(always)]
    pub fn known(&self) -> u32 {
        if self.undecided != 0 { UNKNOWN } else { self.workload }
    }
}

/// Which workload is the running task, with these ids and cgroup? An unknown cgroup counts as its nearest known ancestor.
#[inline(always)]
pub fn workload(config: &Config, uid: u32, gid: u32, cgroup: u64) -> Who {
    let mut found = NOT_ASKED;
    facts_workload(in_force(config), (gid as u64) << 32 | uid as u64, cgroup, &mut found);
    found
}

/// Which workload is a task with these ids and this cgroup, if it need not be the running one? Ancestors are not looked up.
#[inline(always)]
pub fn recorded(config: &Config, uid: u32, gid: u32, cgroup: u64) -> Who {
    let mut found = NOT_ASKED;
    facts_recorded(in_force(config), (gid as u64) << 32 | uid as u64, cgroup, &mut found);
    found
}

const NOT_ASKED: Who = Who { workload: NOT_ENROLLED, undecided: 1, source: 0, group: 0 };

/// Epoch and flags, as the functions below take them.
#[inline(always)]
fn in_force(config: &Config) -> u64 {
    (config.epoch as u64) << 32 | config.flags as u64
}

/// [`workload`], as a function that the verifier checks on its own. `ids`: gid and uid. Separate from [`facts_recorded`],
/// because not every program has the helper for a cgroup's ancestors.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn facts_workload(in_force: u64, ids: u64, cgroup: u64, found: *mut Who) -> u32 {
    // SAFETY: the verifier insists that it is null or what it should be.
    let Some(found) = (unsafe { found.as_mut() }) else { return 0 };
    let (epoch, flags) = ((in_force >> 32) as u32, in_force as u32);
    let mut placed = Placed { class: CLASS_NONE, open: 0 };
    let mut seen = 1;
    if flags & FLAG_CGROUP_CLASSES != 0 {
        // SAFETY: rows are never changed in place.
        match unsafe { CGROUPS.get(&CgroupKey { epoch, pad: 0, cgroup }) } {
            Some(known) => placed = *known,
            None => {
                seen = 0;
                let inherited = inherited(epoch);
                placed = Placed { class: inherited as u32, open: (inherited >> 32) as u32 };
            }
        }
    }
    who(epoch, flags, ids, &placed, seen, found);
    1
}

/// [`recorded`], likewise.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn facts_recorded(in_force: u64, ids: u64, cgroup: u64, found: *mut Who) -> u32 {
    // SAFETY: the verifier insists that it is null or what it should be.
    let Some(found) = (unsafe { found.as_mut() }) else { return 0 };
    let (epoch, flags) = ((in_force >> 32) as u32, in_force as u32);
    let mut placed = Placed { class: CLASS_NONE, open: 1 };
    let mut seen = 1;
    if flags & FLAG_CGROUP_CLASSES != 0 {
        // SAFETY: rows are never changed in place.
        match unsafe { CGROUPS.get(&CgroupKey { epoch, pad: 0, cgroup }) } {
            Some(known) => placed = *known,
            None => seen = 0,
        }
    }
    who(epoch, flags, ids, &placed, seen, found);
    1
}

/// What the nearest known ancestor of the running task's cgroup is: its class, and in the upper half whether it is open.
#[inline(never)]
fn inherited(epoch: u32) -> u64 {
    let mut level = LEVELS;
    while level > 0 {
        level -= 1;
        // SAFETY: the helper takes a number, and gives 0 where the task's cgroup is not that deep. Rows are never changed
        // in place.
        unsafe {
            let cgroup = bpf_get_current_ancestor_cgroup_id(level);
            if cgroup != 0
                && let Some(row) = CGROUPS.get(&CgroupKey { epoch, pad: 0, cgroup })
            {
                return (row.open as u64) << 32 | row.class as u64;
            }
        }
    }
    1 << 32 | CLASS_NONE as u64
}

/// What the rows of `CANDIDATES` that a task matches say together.
#[repr(C)]
pub struct Contest {
    source: u64,
    group: u64,
    workload: u32,
    certain: u32,
    attested: u32,
}

/// No row was found yet.
const NOBODY_YET: Contest = Contest { source: 0, group: 0, workload: 0, certain: 0, attested: 0 };

#[inline(always)]
fn who(epoch: u32, flags: u32, ids: u64, placed: &Placed, seen: u32, found: &mut Who) {
    let without = flags >> SHAPES_WITHOUT_CGROUP & shape::ALL;
    let with = flags >> SHAPES_WITH_CGROUP & shape::ALL;
    let mut contest = NOBODY_YET;
    let mut undecided = 0;
    if seen == 0 && placed.open != 0 {
        candidates(epoch, CLASS_UNSEEN, ids, with, &mut contest);
        undecided = (contest.attested != 0) as u32;
        contest = NOBODY_YET;
    }
    candidates(epoch, CLASS_NONE, ids, without, &mut contest);
    if placed.class != CLASS_NONE {
        candidates(epoch, placed.class, ids, with, &mut contest);
    }
    let workload = if contest.certain == 0 && contest.attested == 0 {
        NOT_ENROLLED
    } else if contest.workload == 0 || contest.attested >= contest.certain {
        ASK
    } else {
        contest.workload
    };
    *found = Who { workload, undecided, source: contest.source, group: contest.group };
}

#[inline(always)]
fn candidates(epoch: u32, class: u32, ids: u64, shapes: u32, contest: &mut Contest) {
    facts_candidates(epoch, class, ids, shapes, contest);
}

/// Adds the rows of a class.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn facts_candidates(epoch: u32, class: u32, ids: u64, shapes: u32, contest: *mut Contest) -> u32 {
    // SAFETY: the verifier insists that it is null or what it should be.
    let Some(contest) = (unsafe { contest.as_mut() }) else { return 0 };
    let mut form = 0;
    while form < 4 {
        if shapes & 1 << form != 0 {
            let uid = if form & 2 == 0 { ids as u32 } else { ANY };
            let gid = if form & 1 == 0 { (ids >> 32) as u32 } else { ANY };
            // SAFETY: a row is replaced as a whole, and one of the two is as good as the other.
            if let Some(row) = unsafe { CANDIDATES.get(&CandidateKey { epoch, class, uid, gid }) } {
                let (certain, attested) = (row.certain as u32, row.attested as u32);
                if attested > contest.attested {
                    contest.attested = attested;
                }
                if certain > contest.certain {
                    contest.certain = certain;
                    contest.workload = row.workload;
                    contest.source = row.source;
                    contest.group = row.group;
                } else if certain == contest.certain && row.workload != contest.workload {
                    contest.workload = 0;
                }
            }
        }
        form += 1;
    }
    1
}

/// What policy says about a source and a target: rows for both identities come first, then for one and the patterns that
/// match the other, then for both's patterns; every port before the dialled one. `action` 0: denied.
#[inline(always)]
pub fn verdict(config: &Config, who: &Who, target: u64, group: u64, port: u16, protocol: u32) -> Verdict {
    let mut what = port as u32 | protocol << 16;
    if config.flags & FLAG_PORTS != 0 && group | target != 0 {
        what |= BY_PORT;
    }
    let found = verdicts(who.source, who.group, target, group, what);
    Verdict { action: (found >> 32) as u32, rule: found as u32 }
}

/// Bit of `what` in [`verdicts`]: also look for rows of the port.
const BY_PORT: u32 = 1 << 31;

#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn verdicts(source: u64, sources: u64, target: u64, targets: u64, what: u32) -> u64 {
    let protocol = (what >> 16) as u16 & 0x7fff;
    let most = if what & BY_PORT != 0 { 8 } else { 4 };
    let mut turn = 0;
    while turn < 8 {
        let key = VerdictKey {
            source: if turn & 1 == 0 { source } else { sources },
            target: if turn & 2 == 0 { target } else { targets },
            port: if turn & 4 == 0 { 0 } else { what as u16 },
            protocol,
            pad: 0,
        };
        if turn < most && key.source != 0 && key.target != 0 {
            // SAFETY: a row is replaced as a whole, and one of the two is as good as the other.
            if let Some(row) = unsafe { VERDICTS.get(&key) } {
                return (row.action as u64) << 32 | row.rule as u64;
            }
        }
        turn += 1;
    }
    0
}

/// A trie key as the kernel wants it: the length, then the bytes.
#[repr(C)]
struct Prefixed {
    bits: u32,
    key: DestinationKey,
}

/// The destination entry that covers an address and port: the port itself first, then "any port".
#[inline(never)]
pub fn destination(config: &Config, address: &Address, port: u16) -> Option<&'static Destination> {
    let mut key = Prefixed {
        bits: DESTINATION_KEY_BITS,
        key: DestinationKey { epoch: config.epoch, namespace: config.namespace, port, pad: 0, address: *address },
    };
    if let Some(found) = covering(&key) {
        return Some(found);
    }
    key.key.port = 0;
    covering(&key)
}

/// Is some port of this address a mesh destination?
#[inline(always)]
pub fn is_mesh_address(config: &Config, address: &Address) -> bool {
    let key = DestinationKey {
        epoch: config.epoch,
        namespace: config.namespace,
        port: 0,
        pad: DESTINATION_ADDRESS,
        address: *address,
    };
    covering(&Prefixed { bits: DESTINATION_KEY_BITS, key }).is_some()
}

#[inline(always)]
fn covering(key: &Prefixed) -> Option<&'static Destination> {
    // SAFETY: `Key` has the layout of `Prefixed`, without its alignment.
    DESTINATIONS.get(unsafe { &*from_ref(key).cast::<Key<DestinationKey>>() })
}

/// Which of the agent's outbound listeners takes the connections of this socket? Always the same one.
#[inline(always)]
pub fn outbound_listener(config: &Config, cookie: u64, ipv6: bool) -> u32 {
    // Cookies are consecutive numbers, often with a stride: multiplicative hashing spreads them.
    let hash = (cookie.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32;
    slot(config, hash, ipv6)
}

/// Index of a listener of the agent in a socket map.
#[inline(always)]
pub fn slot(config: &Config, hash: u32, ipv6: bool) -> u32 {
    // `config()` has checked that there is a shard, but the compiler does not know that and would emit a panic.
    hash.checked_rem(config.shards).unwrap_or(0) * 2 + ipv6 as u32
}

/// The port of one of the agent's outbound listeners, or 0 where the agent is gone.
#[inline(always)]
pub fn agent_port(index: u32) -> u16 {
    // SAFETY: looking a socket up in a socket map takes a reference, which is given back on every way out.
    unsafe {
        let map = (&raw const OUTBOUND).cast_mut();
        let sk = bpf_map_lookup_elem(map.cast(), from_ref(&index).cast()).cast::<bpf_sock>();
        if sk.is_null() {
            return 0;
        }
        let port = word(addr_of!((*sk).src_port));
        let state = word(addr_of!((*sk).state));
        bpf_sk_release(sk.cast());
        if state == TCP_LISTEN { port as u16 } else { 0 }
    }
}
