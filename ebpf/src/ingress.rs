//! The life of sockets, and connections that come to this host.
//!
//! Who binds and listens is recorded ([`bound`], [`event`], [`released`]); a SYN for a protected listener lands on the
//! agent's listener ([`steer`]), unless it is the agent's own last leg. Which connections those are the kernel itself has
//! written down, from sockets that only the agent could have registered, under addresses that only they can have while the
//! row is there: no local program can imitate one.
//!
//! *Invariant:* the programs only ever raise the protection of a listener.

use crate::{
    egress::turned_to,
    facts::*,
    maps::*,
    tell::{self, NOBODY, count},
};
use aya_ebpf::{
    bindings::{bpf_sk_lookup, bpf_sock, bpf_sock_ops, sk_action::SK_DROP, sk_action::SK_PASS},
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sock_ops_cb_flags_set},
    programs::SkLookupContext,
};
use core::ptr::addr_of;
use wimsey_common::*;

const CONNECTING: u32 = aya_ebpf::bindings::BPF_SOCK_OPS_TCP_CONNECT_CB;
const LISTENING_NOW: u32 = aya_ebpf::bindings::BPF_SOCK_OPS_TCP_LISTEN_CB;
const STATE_CHANGES: u32 = aya_ebpf::bindings::BPF_SOCK_OPS_STATE_CB;
const STATE_CB_FLAG: u32 = aya_ebpf::bindings::BPF_SOCK_OPS_STATE_CB_FLAG;

/// A socket was bound: remember by whom.
#[inline(always)]
pub fn bound(sock: *mut bpf_sock) {
    let Some(config) = config() else { return };
    // SAFETY: helpers and fields that this hook may use; rows are never changed in place.
    unsafe {
        let protocol = word(addr_of!((*sock).protocol));
        if protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP {
            return;
        }
        if bpf_get_netns_cookie(sock.cast()) != config.netns_cookie {
            return;
        }
        let cookie = bpf_get_socket_cookie(sock.cast());
        if OWN.get(&cookie).is_some() {
            return;
        }
        // Should the map be full, the owner is looked for in /proc when the socket begins to listen.
        let _ = BINDS.insert(&cookie, &task(), 0);
    }
}

/// A socket was closed for good: forget it.
#[inline(always)]
pub fn released(sock: *mut bpf_sock) {
    let Some(config) = config() else { return };
    // SAFETY: helpers and fields that this hook may use.
    unsafe {
        let protocol = word(addr_of!((*sock).protocol));
        if protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP {
            return;
        }
        if bpf_get_netns_cookie(sock.cast()) != config.netns_cookie {
            return;
        }
        let cookie = bpf_get_socket_cookie(sock.cast());
        let _ = FLOWS.remove(&cookie);
        let _ = OWN.remove(&cookie);
        let _ = BINDS.remove(&cookie);
        if word(addr_of!((*sock).state)) == TCP_LISTEN {
            closed(cookie);
        }
    }
}

/// A listening socket was closed. Its row stays as it is but for the owner: another socket may share the address
/// (`SO_REUSEPORT`), and only the agent finds that out.
#[inline(always)]
fn closed(cookie: u64) {
    // SAFETY: rows are never changed in place.
    let Some(key) = (unsafe { LISTENING.get(&cookie) }) else { return };
    let key = *key;
    let _ = LISTENING.remove(&cookie);
    let mut event = tell::event(EVENT_CLOSED, 0, IPPROTO_TCP);
    event.cookie = cookie;
    event.destination = key.address;
    event.destination_port = key.port;
    if let Some(row) = LISTENERS.get_ptr_mut(&key) {
        // SAFETY: a row that the verifier has seen to be there; each field is one store.
        unsafe {
            if (*row).cookie == cookie {
                event.task = (*row).owner;
                (*row).cookie = 0;
            }
        }
    }
    tell::send(&event);
}

/// Something happened to a TCP socket.
#[inline(always)]
pub fn event(ops: *mut bpf_sock_ops) {
    // SAFETY: fields of the context that this hook may read.
    match unsafe { word(addr_of!((*ops).op)) } {
        CONNECTING => connecting(ops),
        LISTENING_NOW => listening(ops),
        STATE_CHANGES => {
            // SAFETY: as above.
            let state = unsafe { word(addr_of!((*ops).__bindgen_anon_1.args).cast::<u32>().add(1)) };
            if state == TCP_CLOSE {
                // Before the port is given back, so that nobody else can have these addresses while the row is there.
                let _ = LEGS.remove(&tuple(ops));
            }
        }
        _ => {}
    }
}

/// A socket is about to send its SYN: all four parts of its address are known.
#[inline(always)]
fn connecting(ops: *mut bpf_sock_ops) {
    let Some(config) = config() else { return };
    // SAFETY: helpers and fields that this hook may use; rows are never changed in place.
    let (netns, cookie) = unsafe { (bpf_get_netns_cookie(ops.cast()), bpf_get_socket_cookie(ops.cast())) };
    let tuple = tuple(ops);
    if netns != config.netns_cookie {
        if let Some(found) = destination(config, &tuple.destination, tuple.destination_port)
            && found.mode == MODE_MESH
        {
            let _ = FOREIGN.insert(&cookie, &1, 0);
        }
        return;
    }
    if let Some(own) = unsafe { OWN.get(&cookie) } {
        if own.kind == OWN_LEG {
            let leg = Leg { client: own.client, client_port: own.client_port, pad: [0; 3] };
            if LEGS.insert(&tuple, &leg, 0).is_ok() {
                // SAFETY: the helper takes the context and flags. Keeps what others have asked for.
                unsafe {
                    let flags = word(addr_of!((*ops).bpf_sock_ops_cb_flags)) | STATE_CB_FLAG;
                    bpf_sock_ops_cb_flags_set(ops, flags as i32);
                }
            } else {
                count(counter::REFUSED_MAP_FULL);
            }
        }
        return;
    }
    if !is_loopback(&tuple.destination) {
        return;
    }
    if let Some(origin) = turned_to(cookie, &tuple.destination, tuple.destination_port) {
        let _ = ORIGINS.insert(&tuple, origin, 0);
    } else {
        // A connection from before may have had these addresses, and nobody shall come in under its name.
        let _ = ORIGINS.remove(&tuple);
    }
}

/// A socket begins to listen.
#[inline(always)]
fn listening(ops: *mut bpf_sock_ops) {
    let Some(config) = config() else { return };
    // SAFETY: helpers and fields that this hook may use; rows are never changed in place.
    let (netns, cookie) = unsafe { (bpf_get_netns_cookie(ops.cast()), bpf_get_socket_cookie(ops.cast())) };
    if netns != config.netns_cookie || unsafe { OWN.get(&cookie) }.is_some() {
        return;
    }
    let bound = tuple(ops);
    let key = ListenerKey { address: bound.source, port: bound.source_port, pad: [0; 3] };
    // Whether an IPv6 socket takes IPv4 as well is not shown here. Where it does not, what is steered in vain is refused.
    let dual = (split(&key.address) == [0; 4]) as u32;
    let mut owner = NOBODY;
    let mut mode = LISTENER_UNKNOWN;
    if let Some(by) = unsafe { BINDS.get(&cookie) } {
        owner = *by;
        mode = match recorded(config, owner.uid, owner.gid, owner.cgroup).known() {
            NOT_ENROLLED => LISTENER_LEFT_ALONE,
            ASK | UNKNOWN => LISTENER_UNKNOWN,
            known => {
                owner.workload = known;
                LISTENER_PROTECTED
            }
        };
    }
    let mut event = tell::event(EVENT_LISTENING, 0, IPPROTO_TCP);
    event.task = owner;
    event.cookie = cookie;
    event.destination = key.address;
    event.destination_port = key.port;
    if let Some(row) = LISTENERS.get_ptr_mut(&key) {
        // SAFETY: a row that the verifier has seen to be there.
        unsafe {
            // Somebody else on an address that was left alone: it is for the agent to say so again.
            if mode == LISTENER_LEFT_ALONE && (*row).cookie != 0 {
                mode = LISTENER_UNKNOWN;
            }
            (*row).owner = owner;
            (*row).cookie = cookie;
            if (*row).mode != LISTENER_PROTECTED {
                (*row).mode = mode;
            }
            (*row).dual = dual;
        }
    } else if LISTENERS.insert(&key, &Listener { owner, cookie, mode, dual }, 0).is_err() {
        event.reason = REASON_MAP_FULL;
        count(counter::REFUSED_MAP_FULL);
    }
    if LISTENING.insert(&cookie, &key, 0).is_err() {
        event.reason = REASON_MAP_FULL;
    }
    tell::send(&event);
}

/// The connection that a socket makes, or the address that it is bound to.
#[inline(always)]
fn tuple(ops: *mut bpf_sock_ops) -> TupleKey {
    // SAFETY: fields of the context that this hook may read. The remote port is in network byte order in the upper half.
    unsafe {
        let family = word(addr_of!((*ops).family));
        let (near4, near6) = (word(addr_of!((*ops).local_ip4)), words(addr_of!((*ops).local_ip6)));
        let (far4, far6) = (word(addr_of!((*ops).remote_ip4)), words(addr_of!((*ops).remote_ip6)));
        TupleKey {
            source: choose(family, near4, near6),
            destination: choose(family, far4, far6),
            source_port: word(addr_of!((*ops).local_port)) as u16,
            destination_port: u32::from_be(word(addr_of!((*ops).remote_port))) as u16,
            pad: 0,
        }
    }
}

/// A SYN has come in: whose is it?
#[inline(always)]
pub fn steer(ctx: &SkLookupContext) -> u32 {
    let lookup: *mut bpf_sk_lookup = ctx.lookup;
    let Some(config) = config() else { return SK_PASS };
    // SAFETY: fields of the context that this hook may read. The remote port is in network byte order.
    let (ipv6, local, local_port, remote, remote_port) = unsafe {
        if word(addr_of!((*lookup).protocol)) != IPPROTO_TCP {
            return SK_PASS;
        }
        let family = word(addr_of!((*lookup).family));
        let (local4, local6) = (word(addr_of!((*lookup).local_ip4)), words(addr_of!((*lookup).local_ip6)));
        let (remote4, remote6) = (word(addr_of!((*lookup).remote_ip4)), words(addr_of!((*lookup).remote_ip6)));
        (
            family == AF_INET6,
            choose(family, local4, local6),
            word(addr_of!((*lookup).local_port)) as u16,
            choose(family, remote4, remote6),
            u16::from_be(addr_of!((*lookup).remote_port).read_volatile()),
        )
    };
    let mode = protection(&local, local_port, ipv6);
    if mode != LISTENER_PROTECTED && mode != LISTENER_UNKNOWN {
        return SK_PASS;
    }
    let leg =
        TupleKey { source: remote, destination: local, source_port: remote_port, destination_port: local_port, pad: 0 };
    // SAFETY: rows are never changed in place.
    if unsafe { LEGS.get(&leg) }.is_some() {
        count(counter::LEGS_ADMITTED);
        return SK_PASS;
    }
    // The same listener each time: what a retransmission, or the answer to a SYN cookie, needs.
    let [a, b, c, d] = split(&remote);
    let mixed = (a ^ b ^ c ^ d).wrapping_add((remote_port as u32) << 16 | local_port as u32);
    let hash = mixed.wrapping_mul(0x9e37_79b1) >> 8;
    let index = slot(config, hash, ipv6);
    if INBOUND.redirect_sk_lookup(ctx, index, 0).is_ok() {
        count(counter::STEERED);
        return SK_PASS;
    }
    if mode == LISTENER_UNKNOWN {
        return SK_PASS;
    }
    count(counter::REFUSED_NO_AGENT);
    let mut event = tell::event(EVENT_REFUSED, REASON_NO_AGENT, IPPROTO_TCP);
    event.source = remote;
    event.source_port = remote_port;
    event.destination = local;
    event.destination_port = local_port;
    tell::send(&event);
    SK_DROP
}

/// The mode of the listener that the kernel would find: the address itself, then the IPv4 wildcard, then the IPv6 one. A
/// row whose socket is closed is nobody's, unless policy protects the address.
#[inline(always)]
fn protection(local: &Address, port: u16, ipv6: bool) -> u32 {
    let exact = live(&ListenerKey { address: *local, port, pad: [0; 3] }, false);
    if exact != 0 {
        return exact;
    }
    if !ipv6 {
        let wildcard = live(&ListenerKey { address: mapped(0), port, pad: [0; 3] }, false);
        if wildcard != 0 {
            return wildcard;
        }
    }
    live(&ListenerKey { address: [0; 16], port, pad: [0; 3] }, !ipv6)
}

#[inline(always)]
fn live(key: &ListenerKey, needs_dual: bool) -> u32 {
    // SAFETY: fields are read once each; the agent and `listening` change a row field by field at worst.
    match unsafe { LISTENERS.get(key) } {
        Some(row) if needs_dual && row.dual == 0 => 0,
        Some(row) if row.cookie != 0 || row.mode == LISTENER_PROTECTED => row.mode,
        _ => 0,
    }
}
