//! The registry of bound and listening sockets: one row for each socket, under its cookie, and for each address the number
//! of sockets there by protection.
//!
//! A row is written when a socket is bound, before a SYN can find it; where the binder is left alone, it is written when
//! the socket begins to listen. It is removed when the socket is closed. Who bound a socket is noted on the socket itself.
//! The binder is judged at the bind, and the task that calls `listen()` at that call; the agent judges who holds the
//! socket, and says so by [`command`]. At each address the strictest socket decides, so that no process can lower the
//! protection of another's socket.
//!
//! *Invariant:* a listening socket is left alone only where its binder and its listener were both found not to be enrolled.
//! Where that could not be found out, it is undecided.

use crate::{
    ALLOW, REFUSE,
    atomic::{exchange, minus, plus, swap},
    events::{self, NOBODY, count},
    facts::*,
    maps::*,
    quota,
};
use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_ops, xdp_md},
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, generated::bpf_sk_storage_get},
};
use bunter_common::*;
use core::{
    ffi::c_void,
    ptr::{addr_of, addr_of_mut, null_mut},
};

/// A socket was bound. Refuses the bind where the binder may be a workload and there is no room to protect it.
#[inline(always)]
pub fn bound(sock: *mut bpf_sock, address: Address) -> i32 {
    let Some(config) = recording() else { return ALLOW };
    // SAFETY: helpers and fields that this hook may use.
    let (cookie, mut key) = unsafe {
        if !is_tcp(word(addr_of!((*sock).protocol))) || bpf_get_netns_cookie(sock.cast()) != config.netns_cookie {
            return ALLOW;
        }
        let key = ListenerKey {
            address,
            netns: config.netns_cookie,
            // This hook is not shown the device, so until it listens the socket counts on every device.
            device: 0,
            port: word(addr_of!((*sock).src_port)) as u16,
            ipv6_only: (address == [0; 16] && flags(sock) & NO_IPV4 != 0) as u16,
        };
        (bpf_get_socket_cookie(sock.cast()), key)
    };
    // SAFETY: rows are never changed in place.
    let own = match unsafe { OWN.get(&cookie) } {
        Some(own) if own.kind == OWN_LISTENER || own.kind == OWN_TRIAL => true,
        Some(_) => return ALLOW,
        None => false,
    };
    // The socket may have been bound before and disconnected since.
    forget(cookie);
    let mut binder = task();
    let who = workload(config, binder.uid, binder.gid, binder.cgroup);
    let found = if own { LISTENER_LEFT_ALONE } else { protection(config, &mut binder, who) };
    let noted = remember(sock, binder);
    // A socket whose binder is left alone gets its row when it listens, since no SYN finds it before. There are two
    // exceptions. Where it may share its address, the kernel may choose it in the place of another socket. And where there
    // was no memory to note the binder on the socket (as always on an x86 processor without `cmpxchg16b`, since Linux 7.0),
    // only the row tells who bound it. Such a row counts under `BOUND_ONLY` or nowhere, because a workload may be the one
    // that listens.
    let nobody = found == LISTENER_LEFT_ALONE && !own;
    let shares = nobody && flags(sock) & MAY_SHARE != 0;
    if nobody && noted && !shares {
        return ALLOW;
    }
    if shares {
        key.device = BOUND_ONLY;
    }
    let counted = if key.port == 0 || (nobody && !shares) { 0 } else { found };
    let charged = if own { UNCHARGED } else { binder.uid };
    let row = Socket { binder, owner: binder, key, mode: 0, bound: found, listens: 0, charged, asked: 0 };
    // The row of the address shows this cookie: it tells the agent's own listeners, and goes into [`who_listens`].
    let shown = if own || shares { cookie } else { 0 };
    if enter(cookie, &row) && shift(cookie, counted, shown) {
        return ALLOW;
    }
    forget(cookie);
    count(counter::UNRECORDED);
    // A socket without note and row, whose binder is left alone, may be bound: it is undecided once it listens.
    if own || (nobody && !shares) { ALLOW } else { REFUSE }
}

/// It is an IPv6 socket that takes no IPv4.
const NO_IPV4: u32 = 1;
/// It may share its address with others.
const MAY_SHARE: u32 = 2;

/// The options that a socket had when it was bound. Where the kernel's layout is not known, it is taken to share its
/// address, and the agent finds out whether it takes IPv4.
#[inline(never)]
fn flags(sk: *mut bpf_sock) -> u32 {
    let Some(layout) = LAYOUT.get(0).filter(|layout| layout.ipv6_only != 0) else { return MAY_SHARE };
    let (byte, bit) = (byte_of(sk, layout.ipv6_only) as u32, layout.ipv6_only_bit & 7);
    let shares = byte & ((1 << bit) - 1) != 0;
    (byte >> bit & 1) * NO_IPV4 + shares as u32 * MAY_SHARE
}

/// The map as the helpers take it: aya's own functions take no other context than that of a connect hook.
#[inline(always)]
fn binders() -> *mut c_void {
    (&raw const BINDERS).cast_mut().cast()
}

/// Notes on the socket itself who bound it. False where there is no memory for that.
#[inline(always)]
fn remember(sock: *mut bpf_sock, mut binder: Task) -> bool {
    // SAFETY: the context of the hook is the socket; the verifier insists on the null check.
    unsafe {
        let first = (&raw mut binder).cast();
        let noted = bpf_sk_storage_get(binders(), sock.cast(), first, BPF_SK_STORAGE_GET_F_CREATE.into());
        let Some(noted) = noted.cast::<Task>().as_mut() else { return false };
        *noted = binder;
    }
    true
}

/// A socket begins to listen. It is in the kernel's table already: until its row is written here, a SYN finds the row from
/// its bind, or none. Says whether the changes of its state are to be watched.
#[inline(always)]
pub fn listening(ops: *mut bpf_sock_ops, address: Address, port: u16) -> bool {
    let Some(config) = recording() else { return false };
    // SAFETY: helpers and fields that this hook may use; the verifier insists on the null check.
    let (netns, cookie, sk, device) = unsafe {
        let sk = (*ops).__bindgen_anon_2.sk;
        let device = if sk.is_null() { 0 } else { word(addr_of!((*sk).bound_dev_if)) };
        (bpf_get_netns_cookie(ops.cast()), bpf_get_socket_cookie(ops.cast()), sk, device)
    };
    // SAFETY: only asked whether it is there.
    if netns != config.netns_cookie || unsafe { OWN.get(&cookie) }.is_some() {
        return false;
    }
    let ipv6_only = (address == [0; 16] && flags(sk) & NO_IPV4 != 0) as u16;
    let key = ListenerKey { address, netns, device, port, ipv6_only };
    let bound = LISTENER_UNDECIDED;
    let mut row = Socket { binder: NOBODY, owner: running(), key, mode: 0, bound, listens: 1, charged: 0, asked: 0 };
    let root_listens = row.owner.uid == 0;
    row.charged = row.owner.uid;
    let who = recorded(config, row.owner.uid, row.owner.gid, row.owner.cgroup);
    let who = if row.owner.tgid == 0 { LISTENER_UNDECIDED } else { protection(config, &mut row.owner, who) };
    bound_by(config, cookie, sk, &mut row);
    // The owner is the binder where that is a workload, or where the listener is not enrolled or not known; else the
    // listener.
    let nobody_listens = who == LISTENER_LEFT_ALONE || row.owner.tgid == 0;
    if row.binder.tgid != 0 && (row.bound == LISTENER_PROTECTED || nobody_listens) {
        row.owner = row.binder;
    }
    let mut mode = if row.bound > who { row.bound } else { who };
    let may_become_anybody = root_listens || row.binder.uid == 0;
    let by_user = may_become_anybody && config.flags & FLAG_ENTRIES_BY_USER != 0;
    if mode == LISTENER_LEFT_ALONE && (by_user || config.flags & FLAG_ALL_UNDECIDED != 0) {
        mode = LISTENER_UNDECIDED;
    }
    enter(cookie, &row);
    place(cookie, &mut row, mode);
    registry_told(cookie, EVENT_LISTENING);
    true
}

/// Writes into the row who bound a socket that begins to listen, and what that task is. Where no binder was recorded, the
/// row says nobody and undecided, as it came. A binder who was left alone, or had no row, is judged anew: another policy
/// may be in force.
#[inline(always)]
fn bound_by(config: &Config, cookie: u64, sk: *mut bpf_sock, row: &mut Socket) {
    // SAFETY: fields that do not change before the socket listens.
    if let Some(before) = unsafe { SOCKETS.get(&cookie) } {
        row.binder = before.binder;
        row.bound = before.bound;
        if before.bound != LISTENER_LEFT_ALONE {
            return;
        }
    } else if !sk.is_null() {
        // SAFETY: a full socket, as sock_ops gives it; the verifier insists on the null check.
        let noted = unsafe { bpf_sk_storage_get(binders(), sk.cast(), null_mut(), 0).cast::<Task>().as_ref() };
        let Some(noted) = noted else { return };
        row.binder = *noted;
    } else {
        return;
    }
    let who = recorded(config, row.binder.uid, row.binder.gid, row.binder.cgroup);
    row.bound = protection(config, &mut row.binder, who);
}

/// Makes a row for a socket that has none, where its user may have one more. It counts at no address yet. False where there
/// is no row afterwards: then a SYN finds no listener and is refused.
#[inline(always)]
fn enter(cookie: u64, row: &Socket) -> bool {
    // SAFETY: only asked whether it is there.
    if unsafe { SOCKETS.get(&cookie) }.is_some() {
        return true;
    }
    let mine = row.charged != UNCHARGED;
    if mine && !quota::take(row.charged, QUOTA_SOCKETS) {
        return false;
    }
    if SOCKETS.insert(&cookie, row, NO_EXIST).is_ok() {
        return true;
    }
    if mine {
        quota::give(row.charged, QUOTA_SOCKETS);
    }
    // SAFETY: as above. The agent may have been faster.
    unsafe { SOCKETS.get(&cookie) }.is_some()
}

/// Tells the agent that something has happened to a socket.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn registry_told(cookie: u64, kind: u32) -> u32 {
    // SAFETY: what is read here was written before the socket listened.
    let Some(row) = (unsafe { SOCKETS.get(&cookie) }) else { return 0 };
    let mut event = events::event(kind, 0, IPPROTO_TCP);
    event.cookie = cookie;
    event.task = row.owner;
    event.destination = row.key.address;
    event.destination_port = row.key.port;
    events::send(&event);
    1
}

/// Replaces the row of a socket, which is counted under its new address before it is taken from the count of the old one.
#[inline(always)]
fn place(cookie: u64, row: &mut Socket, mode: u32) -> bool {
    registry_place(cookie, row, mode) != 0
}

#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn registry_place(cookie: u64, row: *mut Socket, mode: u32) -> u32 {
    // SAFETY: the verifier insists that it is null or what it should be.
    let Some(row) = (unsafe { row.as_mut() }) else { return 0 };
    let Some(place) = SOCKETS.get_ptr_mut(&cookie) else {
        count(counter::UNRECORDED);
        return 0;
    };
    // SAFETY: a row that the verifier has seen to be there; its mode is taken in one step, and while it is 0 nobody counts it.
    unsafe {
        let (counted, key) = (swap(addr_of_mut!((*place).mode), 0), (*place).key);
        let added = row.key.port == 0 || add(&row.key, unit(mode), cookie);
        (*place).binder = row.binder;
        (*place).owner = row.owner;
        (*place).key = row.key;
        (*place).bound = row.bound;
        (*place).listens = row.listens;
        addr_of_mut!((*place).mode).write_volatile(if added { mode as u64 } else { 0 });
        take(&key, unit(counted as u32));
        if !added {
            count(counter::UNRECORDED);
        }
        added as u32
    }
}

/// A socket was closed for good, or listens no more.
#[inline(always)]
pub fn closed(cookie: u64) {
    // SAFETY: what is read here was written before the socket listened.
    let Some(row) = (unsafe { SOCKETS.get(&cookie) }) else { return };
    if row.listens != 0 {
        registry_told(cookie, EVENT_CLOSED);
    }
    forget(cookie);
}

/// A socket has left LISTEN. If it was only shut down it is still bound, and may listen again without another bind. Then it
/// counts as a bound socket until it is closed.
#[inline(always)]
pub fn listens_no_more(cookie: u64, sk: *mut bpf_sock) {
    // A close marks both directions as shut down before it changes the state (`__tcp_close` in net/ipv4/tcp.c).
    let layout = LAYOUT.get(0).filter(|layout| layout.shutdown != 0);
    let closing =
        sk.is_null() || layout.is_none_or(|layout| byte_of(sk, layout.shutdown) & SHUTDOWN_MASK == SHUTDOWN_MASK);
    if closing {
        return closed(cookie);
    }
    registry_told(cookie, EVENT_CLOSED);
    registry_retire(cookie);
}

const SHUTDOWN_MASK: u8 = 3;

#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn registry_retire(cookie: u64) -> u32 {
    let Some(row) = SOCKETS.get_ptr_mut(&cookie) else { return 0 };
    // SAFETY: a row that the verifier has seen to be there; its mode is taken in one step, and while it is 0 nobody counts it.
    unsafe {
        let (counted, key) = (swap(addr_of_mut!((*row).mode), 0) as u32, (*row).key);
        let mut kept = key;
        let (device, mode, shown) = match counted {
            LISTENER_PROTECTED => (0, LISTENER_PROTECTED, 0),
            _ => (BOUND_ONLY, LISTENER_LEFT_ALONE, cookie),
        };
        kept.device = device;
        let added = add(&kept, unit(mode), shown);
        (*row).listens = 0;
        (*row).key.device = device;
        addr_of_mut!((*row).mode).write_volatile(if added { mode as u64 } else { 0 });
        take(&key, unit(counted));
    }
    1
}

/// Removes a socket, and takes it from the count of its address.
#[inline(always)]
pub fn forget(cookie: u64) {
    registry_forget(cookie);
}

#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn registry_forget(cookie: u64) -> u32 {
    let Some(row) = SOCKETS.get_ptr_mut(&cookie) else { return 0 };
    // SAFETY: a row that the verifier has seen to be there; its mode is taken in one step, so that it is given back once.
    let (mode, key, charged) = unsafe { (swap(addr_of_mut!((*row).mode), 0), (*row).key, (*row).charged) };
    take(&key, unit(mode as u32));
    if SOCKETS.remove(&cookie).is_ok() && charged != UNCHARGED {
        quota::give(charged, QUOTA_SOCKETS);
    }
    1
}

/// Sets the mode of a socket. `shown`: its cookie, if the row of its address is to show it, or 0.
#[inline(always)]
fn shift(cookie: u64, mode: u32, shown: u64) -> bool {
    registry_shift(cookie, mode, shown) != 0
}

#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn registry_shift(cookie: u64, mode: u32, shown: u64) -> u32 {
    let Some(row) = SOCKETS.get_ptr_mut(&cookie) else { return (mode == 0) as u32 };
    // SAFETY: a row that the verifier has seen to be there.
    let (before, key) = unsafe { (addr_of!((*row).mode).read_volatile(), (*row).key) };
    if before == mode as u64 {
        return 1;
    }
    // The new count comes before the old one goes.
    if !add(&key, unit(mode), shown) {
        return 0;
    }
    // SAFETY: as above.
    let done = unsafe { exchange(addr_of_mut!((*row).mode), before, mode as u64) };
    // If it was not done, the mode was changed meanwhile or the socket is being closed: the new count is taken back.
    take(&key, unit(if done { before as u32 } else { mode }));
    done as u32
}

/// What the agent says about a socket.
#[inline(always)]
pub fn command(ctx: *mut xdp_md) -> u32 {
    // SAFETY: fields of the context that this program may read; nothing is read beyond the end.
    let said = unsafe {
        let (start, end) = ((*ctx).data as usize, (*ctx).data_end as usize);
        if start + size_of::<Command>() > end {
            return COMMAND_STALE;
        }
        (start as *const Command).read_unaligned()
    };
    match said.kind {
        COMMAND_SET => set(&said),
        COMMAND_RECORD => record(&said),
        COMMAND_FORGET => {
            forget(said.cookie);
            COMMAND_DONE
        }
        _ => COMMAND_STALE,
    }
}

#[inline(always)]
fn set(said: &Command) -> u32 {
    let Some(row) = SOCKETS.get_ptr_mut(&said.cookie) else { return COMMAND_STALE };
    // SAFETY: a row that the verifier has seen to be there. Only the agent changes the owner of a socket that listens.
    unsafe {
        if (*row).listens == 0 {
            return COMMAND_STALE;
        }
        if said.generation != 0 {
            let generation = config().map_or(0, |config| config.generation);
            if said.generation != generation || said.asked != addr_of!((*row).asked).read_volatile() {
                return COMMAND_STALE;
            }
        }
        if said.owner.tgid != 0 {
            addr_of_mut!((*row).owner).write_volatile(said.owner);
        }
        if (*row).key.ipv6_only != said.key.ipv6_only {
            let mut moved = *row;
            moved.key.ipv6_only = said.key.ipv6_only;
            return if place(said.cookie, &mut moved, said.mode) { COMMAND_DONE } else { COMMAND_FULL };
        }
    }
    if shift(said.cookie, said.mode, 0) { COMMAND_DONE } else { COMMAND_STALE }
}

#[inline(always)]
fn record(said: &Command) -> u32 {
    // SAFETY: only asked whether it is there.
    if unsafe { SOCKETS.get(&said.cookie) }.is_some() {
        return COMMAND_STALE;
    }
    let (owner, key, bound, charged) = (said.owner, said.key, LISTENER_UNDECIDED, said.owner.uid);
    let mut row = Socket { binder: NOBODY, owner, key, mode: 0, bound, listens: 1, charged, asked: 0 };
    if enter(said.cookie, &row) && place(said.cookie, &mut row, said.mode) { COMMAND_DONE } else { COMMAND_FULL }
}

/// A task asks for the name of a socket. If the task may be enrolled and the socket listens and is not protected, the
/// socket is undecided from now on, and what the agent has found out about it before does not count any more.
#[inline(always)]
pub fn held(cookie: u64) {
    let Some(row) = SOCKETS.get_ptr_mut(&cookie) else { return };
    // SAFETY: a row that the verifier has seen to be there.
    unsafe {
        if (*row).listens == 0 || addr_of!((*row).mode).read_volatile() == LISTENER_PROTECTED as u64 {
            return;
        }
    }
    let Some(config) = config() else { return };
    let mut holder = task();
    let who = workload(config, holder.uid, holder.gid, holder.cgroup);
    if protection(config, &mut holder, who) == LISTENER_LEFT_ALONE {
        return;
    }
    // SAFETY: as above. Of two at once one may be lost: what matters is that it is another number than before.
    unsafe { addr_of_mut!((*row).asked).write_volatile(addr_of!((*row).asked).read_volatile().wrapping_add(1)) };
    // Undecided: the agent looks who holds it.
    if shift(cookie, LISTENER_UNDECIDED, 0) {
        registry_told(cookie, EVENT_HELD);
    }
}

/// The same for the socket that was the last to begin listening at an address.
#[inline(always)]
pub fn held_at(address: Address, port: u16, device: u32) {
    let Some(config) = recording() else { return };
    let mut key = ListenerKey { address, netns: config.netns_cookie, device, port, ipv6_only: 0 };
    // SAFETY: a word that is read once.
    if let Some(row) = unsafe { LISTENERS.get(&key) } {
        held(row.cookie);
    }
    key.ipv6_only = 1;
    // SAFETY: as above.
    if let Some(row) = unsafe { LISTENERS.get(&key) } {
        held(row.cookie);
    }
}

/// What a socket of this task is to be, from the task alone.
#[inline(always)]
fn protection(config: &Config, task: &mut Task, who: Who) -> u32 {
    if config.epoch == 0 {
        return LISTENER_UNDECIDED;
    }
    match who.known() {
        NOT_ENROLLED => LISTENER_LEFT_ALONE,
        UNKNOWN => LISTENER_UNDECIDED,
        // Only the agent can tell whether the task is a workload: it takes the connections, and refuses them if it is not.
        ASK => LISTENER_PROTECTED,
        known => {
            task.workload = known;
            LISTENER_PROTECTED
        }
    }
}

/// Adds to the counts of an address. `cookie`: the socket that the row is to show, or 0.
#[inline(always)]
fn add(key: &ListenerKey, amount: u64, cookie: u64) -> bool {
    registry_add(key, amount, cookie) != 0
}

#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn registry_add(key: *const ListenerKey, amount: u64, cookie: u64) -> u32 {
    // SAFETY: the verifier insists that it is null or what it should be.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    let key = &on_the_stack(key);
    if amount == 0 {
        return 1;
    }
    let tag = tag(key);
    for _ in 0..4 {
        let Some(row) = LISTENERS.get_ptr_mut(key) else {
            if LISTENERS.insert(key, &Listeners { counts: amount, cookie, tag }, NO_EXIST).is_ok() {
                return 1;
            }
            continue;
        };
        // SAFETY: a row that the verifier has seen to be there. It may belong to another address by now: the tag tells.
        unsafe {
            let counts = addr_of_mut!((*row).counts);
            let before = plus(counts, amount);
            if addr_of!((*row).tag).read_volatile() == tag && before & DYING == 0 {
                if cookie != 0 {
                    addr_of_mut!((*row).cookie).write_volatile(cookie);
                }
                return 1;
            }
            if before & DYING == 0 {
                minus(counts, amount);
            }
        }
    }
    0
}

/// Takes from the counts of an address, and removes the row with the last.
#[inline(always)]
fn take(key: &ListenerKey, amount: u64) {
    registry_take(key, amount);
}

#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn registry_take(key: *const ListenerKey, amount: u64) -> u32 {
    // SAFETY: the verifier insists that it is null or what it should be.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    let key = &on_the_stack(key);
    if amount == 0 {
        return 0;
    }
    let Some(row) = LISTENERS.get_ptr_mut(key) else { return 0 };
    // SAFETY: a row that the verifier has seen to be there, and that the count which is taken now has kept there.
    unsafe {
        let counts = addr_of_mut!((*row).counts);
        if minus(counts, amount) == amount && exchange(counts, 0, DYING) {
            let _ = LISTENERS.remove(key);
        }
    }
    1
}
