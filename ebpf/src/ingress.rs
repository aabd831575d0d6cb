//! The life of sockets, and connections that come to this host.
//!
//! Who binds and listens is in the [`registry`]. A SYN for a protected listener lands on the agent's listener
//! ([`redirect_inbound`]), unless it is the agent's own upstream connection. That is recognised by its 4-tuple, which these
//! programs recorded when a socket that only the agent can register dialled. No other socket can have the 4-tuple while the
//! row is there, so no local program can imitate one.
//!
//! *Invariant:* where the registry is complete, a SYN reaches a listener without the agent only if the listener was found
//! to concern nobody enrolled.

use crate::{
    egress::{self, redirected_to},
    events::{self, count},
    facts::*,
    maps::*,
    registry,
};
use aya_ebpf::{
    bindings::{bpf_sk_lookup, bpf_sock, bpf_sock_ops, sk_action::SK_DROP, sk_action::SK_PASS},
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sock_ops_cb_flags_set},
    programs::SkLookupContext,
};
use bunter_common::*;
use core::ptr::addr_of;

const CONNECTING: u32 = aya_ebpf::bindings::BPF_SOCK_OPS_TCP_CONNECT_CB;
const ESTABLISHED: u32 = aya_ebpf::bindings::BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB;
const ACCEPTING: u32 = aya_ebpf::bindings::BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB;
const LISTENING_NOW: u32 = aya_ebpf::bindings::BPF_SOCK_OPS_TCP_LISTEN_CB;
const STATE_CHANGES: u32 = aya_ebpf::bindings::BPF_SOCK_OPS_STATE_CB;
const STATE_CB_FLAG: u32 = aya_ebpf::bindings::BPF_SOCK_OPS_STATE_CB_FLAG;

/// A socket was closed for good: forget it.
#[inline(always)]
pub fn released(sock: *mut bpf_sock) {
    let Some(config) = recording() else { return };
    // SAFETY: helpers and fields that this hook may use.
    let cookie = unsafe {
        if !is_tcp(word(addr_of!((*sock).protocol))) || bpf_get_netns_cookie(sock.cast()) != config.netns_cookie {
            return;
        }
        bpf_get_socket_cookie(sock.cast())
    };
    egress::egress_released(cookie, &mut events::event(0, 0, IPPROTO_TCP));
    let _ = OWN.remove(&cookie);
    registry::closed(cookie);
}

/// Something happened to a TCP socket.
#[inline(always)]
pub fn event(ops: *mut bpf_sock_ops) {
    // SAFETY: fields of the context that this hook may read.
    match unsafe { word(addr_of!((*ops).op)) } {
        CONNECTING => connecting(ops),
        ESTABLISHED => egress::arrived(ops),
        ACCEPTING => accepting(ops),
        LISTENING_NOW => {
            let bound = tuple(ops);
            if registry::listening(ops, bound.source, bound.source_port) {
                watch_states(ops);
            }
        }
        STATE_CHANGES => {
            // SAFETY: as above.
            let (before, state) = unsafe {
                let args = addr_of!((*ops).__bindgen_anon_1.args).cast::<u32>();
                (word(args), word(args.add(1)))
            };
            if before == TCP_LISTEN {
                // SAFETY: the helper takes the context; a field that this hook may read.
                let (cookie, sk) = unsafe { (bpf_get_socket_cookie(ops.cast()), (*ops).__bindgen_anon_2.sk) };
                registry::listens_no_more(cookie, sk);
            } else if state == TCP_CLOSE {
                // The port is still taken at this moment, so nobody else can have this 4-tuple while the row is there.
                let _ = UPSTREAMS.remove(&tuple(ops));
            }
        }
        _ => {}
    }
}

/// Asks to be told when the socket changes its state, and keeps the flags that other programs have set.
#[inline(always)]
fn watch_states(ops: *mut bpf_sock_ops) {
    // SAFETY: the helper takes the context and flags.
    unsafe {
        let flags = word(addr_of!((*ops).bpf_sock_ops_cb_flags)) | STATE_CB_FLAG;
        bpf_sock_ops_cb_flags_set(ops, flags as i32);
    }
}

/// A socket is about to send its SYN: both its addresses and ports are known.
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
            let _ = OTHER_NETNS.insert(&cookie, &1, 0);
        }
        return;
    }
    if let Some(own) = unsafe { OWN.get(&cookie) } {
        if own.kind == OWN_UPSTREAM {
            let upstream =
                Upstream { client: own.client, client_port: own.client_port, pad: [0; 3], listeners: own.listeners };
            if UPSTREAMS.insert(&tuple, &upstream, 0).is_ok() {
                watch_states(ops);
            } else {
                count(counter::REFUSED_MAP_FULL);
            }
        }
        return;
    }
    if !is_loopback(&tuple.destination) {
        return;
    }
    if let Some(origin) = redirected_to(cookie, &tuple.destination, tuple.destination_port) {
        let _ = ORIGINS.insert(&tuple, origin, 0);
    } else {
        // An earlier connection may have had this 4-tuple, and this one must not be taken for it.
        let _ = ORIGINS.remove(&tuple);
    }
}

/// A connection is established, at the end that was dialled. If it was redirected to the agent, its origin is moved to the
/// cookie of the socket that the agent will accept: from here on another connection may have the 4-tuple.
#[inline(always)]
fn accepting(ops: *mut bpf_sock_ops) {
    let own = tuple(ops);
    if is_loopback(&own.source) {
        // SAFETY: helpers that this hook may use.
        let (netns, cookie) = unsafe { (bpf_get_netns_cookie(ops.cast()), bpf_get_socket_cookie(ops.cast())) };
        ingress_accepted(netns, cookie, &own);
    }
}

#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn ingress_accepted(netns: u64, cookie: u64, own: *const TupleKey) -> u32 {
    // SAFETY: the verifier insists that it is null or what it should be.
    let Some(own) = (unsafe { own.as_ref() }) else { return 0 };
    let Some(config) = config() else { return 0 };
    if netns != config.netns_cookie {
        return 0;
    }
    let dialled = TupleKey {
        source: own.destination,
        destination: own.source,
        source_port: own.destination_port,
        destination_port: own.source_port,
        pad: 0,
    };
    // SAFETY: nobody changes the row while its connection is there.
    let Some(origin) = (unsafe { ORIGINS.get(&dialled) }) else { return 0 };
    if ACCEPTED.insert(&cookie, origin, 0).is_err() {
        count(counter::REFUSED_MAP_FULL);
    }
    let _ = ORIGINS.remove(&dialled);
    1
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
pub fn redirect_inbound(ctx: &SkLookupContext) -> u32 {
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
    // SAFETY: as above.
    let device = unsafe { word(addr_of!((*lookup).ingress_ifindex)) };
    let upstream =
        TupleKey { source: remote, destination: local, source_port: remote_port, destination_port: local_port, pad: 0 };
    if is_loopback(&local) {
        // A redirected connection goes to the agent that is there now, whoever has the port of the agent before it.
        // SAFETY: nobody changes the row while its connection is there.
        if let Some(origin) = unsafe { ORIGINS.get(&upstream) } {
            let index = outbound_listener(config, origin.cookie, ipv6);
            if OUTBOUND.redirect_sk_lookup(ctx, index, 0).is_ok() {
                return SK_PASS;
            }
            count(counter::REFUSED_NO_AGENT);
            refused(REASON_NO_AGENT, &upstream);
            return SK_DROP;
        }
    }
    let (mode, listeners) = protection(config, &local, local_port, ipv6, device);
    // SAFETY: rows are never changed in place.
    if let Some(upstream) = unsafe { UPSTREAMS.get(&upstream) } {
        // The upstream connection may reach only the sockets that were found to listen: none that came after them, and none
        // that may begin to listen at this moment.
        let bound = bound_only(config, &local, local_port, ipv6);
        if upstream.listeners != 0 && upstream.listeners == listeners.wrapping_add(bound) {
            count(counter::UPSTREAMS_ADMITTED);
            return SK_PASS;
        }
        return SK_DROP;
    }
    if mode == LISTENER_LEFT_ALONE {
        if is_loopback(&local) && is_the_agents(config, &local, local_port) {
            refused(REASON_DIRECT, &upstream);
            return SK_DROP;
        }
        return SK_PASS;
    }
    if mode == 0 {
        // Nobody listens there, or somebody who is not recorded and may therefore get no plaintext.
        count(counter::NO_LISTENER);
        return if config.flags & FLAG_REGISTRY_COMPLETE != 0 { SK_DROP } else { SK_PASS };
    }
    if mode == LISTENER_UNDECIDED {
        count(counter::REFUSED_UNDECIDED);
        refused(REASON_UNDECIDED, &upstream);
        return SK_DROP;
    }
    // The same listener each time: a retransmission, or the answer to a SYN cookie, has to come to it too.
    let [a, b, c, d] = split(&remote);
    let mixed = (a ^ b ^ c ^ d).wrapping_add((remote_port as u32) << 16 | local_port as u32);
    let hash = mixed.wrapping_mul(0x9e37_79b1) >> 8;
    let index = slot(config, hash, ipv6);
    if INBOUND.redirect_sk_lookup(ctx, index, 0).is_ok() {
        count(counter::REDIRECTED_INBOUND);
        return SK_PASS;
    }
    count(counter::REFUSED_NO_AGENT);
    refused(REASON_NO_AGENT, &upstream);
    SK_DROP
}

/// Is this the address of one of the agent's own listeners? Connections that the programs redirect to them are handled
/// before this is asked.
#[inline(always)]
fn is_the_agents(config: &Config, local: &Address, port: u16) -> bool {
    let key = ListenerKey { address: *local, netns: config.netns_cookie, device: 0, port, ipv6_only: 0 };
    // SAFETY: one word each, read once.
    let cookie = unsafe { LISTENERS.get(&key) }.map_or(0, |row| row.cookie);
    unsafe { OWN.get(&cookie) }.is_some_and(|own| own.kind == OWN_LISTENER)
}

/// Sends the event of an inbound connection that was refused.
#[inline(always)]
fn refused(reason: u32, tuple: &TupleKey) {
    ingress_refused(reason, tuple);
}

#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn ingress_refused(reason: u32, tuple: *const TupleKey) -> u32 {
    // SAFETY: the verifier insists that it is null or what it should be.
    let Some(tuple) = (unsafe { tuple.as_ref() }) else { return 0 };
    let mut event = events::event(EVENT_REFUSED, reason, IPPROTO_TCP);
    event.source = tuple.source;
    event.source_port = tuple.source_port;
    event.destination = tuple.destination;
    event.destination_port = tuple.destination_port;
    events::refused(&mut event);
    1
}

/// The strictest mode of the sockets that the kernel would consider, bound to the device that the segment came in by or to
/// none; 0 where there are none. With it comes the sum of [`who_listens`].
#[inline(always)]
fn protection(config: &Config, local: &Address, port: u16, ipv6: bool, device: u32) -> (u32, u64) {
    let found = places(config, local, port, ipv6, 0, device);
    if config.flags & FLAG_PROTECTED_ADDRESSES != 0 && is_protected(local, port, ipv6) {
        return (LISTENER_PROTECTED, found.listeners);
    }
    (strictest(found.counts), found.listeners)
}

/// The sum of [`who_listens`] of the sockets that are bound where the kernel would look and may begin to listen there.
#[inline(always)]
fn bound_only(config: &Config, local: &Address, port: u16, ipv6: bool) -> u64 {
    places(config, local, port, ipv6, BOUND_ONLY, 0).listeners
}

/// The rows of the address itself, of the IPv4 wildcard and of the IPv6 one, under `device` and, if it is not 0, under
/// `and_device` too.
#[inline(always)]
fn places(config: &Config, local: &Address, port: u16, ipv6: bool, device: u32, and_device: u32) -> Found {
    let mut key = ListenerKey { address: *local, netns: config.netns_cookie, device, port, ipv6_only: 0 };
    let mut found = Found { counts: 0, listeners: 0 };
    ingress_counts(&key, and_device, &mut found);
    if !ipv6 {
        key.address = mapped(0);
        ingress_counts(&key, and_device, &mut found);
    }
    key.address = [0; 16];
    ingress_counts(&key, and_device, &mut found);
    if ipv6 {
        key.ipv6_only = 1;
        ingress_counts(&key, and_device, &mut found);
    }
    found
}

/// Who is bound where the kernel would look.
#[repr(C)]
pub struct Found {
    /// The counts of all places, combined by a bitwise or: they tell only whether there are sockets of a kind.
    counts: u64,
    /// The sum of [`who_listens`].
    listeners: u64,
}

#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn ingress_counts(key: *const ListenerKey, device: u32, found: *mut Found) -> u32 {
    // SAFETY: the verifier insists that they are null or what they should be.
    let (Some(key), Some(found)) = (unsafe { (key.as_ref(), found.as_mut()) }) else { return 0 };
    let mut key = on_the_stack(key);
    // SAFETY: words that are read once.
    if let Some(row) = unsafe { LISTENERS.get(&key) } {
        found.counts |= row.counts;
        found.listeners = found.listeners.wrapping_add(who_listens(row));
    }
    if device != 0 {
        key.device = device;
        // SAFETY: as above.
        if let Some(row) = unsafe { LISTENERS.get(&key) } {
            found.counts |= row.counts;
            found.listeners = found.listeners.wrapping_add(who_listens(row));
        }
    }
    1
}

/// Does policy protect this address whoever listens there?
#[inline(always)]
fn is_protected(local: &Address, port: u16, ipv6: bool) -> bool {
    let mut key = ProtectedKey { address: *local, port, pad: [0; 3] };
    // SAFETY: only asked whether it is there.
    unsafe {
        if PROTECTED.get(&key).is_some() {
            return true;
        }
        key.address = [0; 16];
        if PROTECTED.get(&key).is_some() {
            return true;
        }
        key.address = mapped(0);
        !ipv6 && PROTECTED.get(&key).is_some()
    }
}
