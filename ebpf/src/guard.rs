//! The egress guard: what slipped past the hooks of `connect()` and `sendmsg()` does not leave the host.
//!
//! A packet is judged by the destination in its header as well as by the one that its socket is connected to: the two
//! differ where the packet is source-routed, or its destination is translated.
//!
//! *Invariant:* a SYN to a mesh destination leaves only from a socket of the agent. No SYN of anybody else reaches a socket
//! that has itself sent one to the agent, or from the agent to a workload. What is not TCP leaves an enrolled workload for
//! a mesh destination only as UDP that a rule allows.

use crate::{
    ALLOW, REFUSE,
    egress::{may_send, redirected_to},
    events::{self, NOWHERE, count},
    facts::*,
    maps::{LAYOUT, ORIGINS, OTHER_NETNS, OWN, UPSTREAMS},
};
use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock},
    helpers::{bpf_get_socket_cookie, bpf_get_socket_uid, bpf_sk_fullsock, bpf_skb_cgroup_id, bpf_skb_load_bytes},
};
use bunter_common::*;
use core::ptr::{addr_of, addr_of_mut};

/// Id of the root of the unified hierarchy.
const ROOT_CGROUP: u64 = 1;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;

/// The last line of defence: a SYN to a mesh destination leaves only from a socket of the agent. It catches what the
/// connect hooks cannot see: sockets that are older than the hooks, belong to a cgroup outside the covered tree, or were
/// made by the kernel.
///
/// Every packet of the host comes by, so the first thing asked is the state of its socket: only a TCP socket in `SYN_SENT`
/// sends a SYN of its own, whatever options or extension headers the packet has. Other protocols have [`beside_tcp`].
#[inline(always)]
pub fn guard(skb: *mut __sk_buff) -> i32 {
    // SAFETY: fields of the context that this hook may read; the verifier insists on the null checks.
    let sk: *mut bpf_sock = unsafe { (*skb).__bindgen_anon_2.sk };
    if sk.is_null() {
        return ALLOW;
    }
    // SAFETY: as above. What is not a full socket (a handshake, the end of a connection) is TCP.
    unsafe {
        let state = word(addr_of!((*sk).state));
        if state == TCP_SYN_RECV {
            return answer(skb);
        }
        if state != TCP_SYN_SENT {
            let full = bpf_sk_fullsock(sk);
            if full.is_null() || is_tcp(word(addr_of!((*full).protocol))) {
                return ALLOW;
            }
            return beside_tcp(skb, word(addr_of!((*full).protocol)));
        }
    }
    syn(skb)
}

/// The answer to a SYN, from a socket that has sent a SYN itself, or from one that was opened by a SYN with data.
#[inline(never)]
fn answer(skb: *mut __sk_buff) -> i32 {
    let Some(config) = config() else { return ALLOW };
    if !crosses(skb, config) {
        return ALLOW;
    }
    count(counter::GUARD_DROPPED);
    REFUSE
}

/// A SYN. Not inlined, so that [`beside_tcp`] has more of the stack.
#[inline(never)]
fn syn(skb: *mut __sk_buff) -> i32 {
    let Some(config) = config() else { return ALLOW };
    // SAFETY: fields of the context that this hook may read; the verifier insists on the null check.
    let sk: *mut bpf_sock = unsafe { (*skb).__bindgen_anon_2.sk };
    if sk.is_null() {
        return ALLOW;
    }
    let mut event = events::event(EVENT_REFUSED, REASON_GUARD, IPPROTO_TCP);
    // SAFETY: a socket that the verifier knows not to be null.
    (event.destination, event.destination_port) = unsafe { far_end(sk) };
    // SAFETY: fields and a helper that this hook may use. What was redirected to the agent goes to it over loopback, or
    // nowhere: the socket may have been bound to a device after its `connect()`, which with fast open sends nothing.
    if is_loopback(&event.destination) && unsafe { word(addr_of!((*skb).ifindex)) } != LOOPBACK_DEVICE {
        let cookie = unsafe { bpf_get_socket_cookie(skb.cast()) };
        let redirected = redirected_to(cookie, &event.destination, event.destination_port).is_some();
        return if redirected { REFUSE } else { ALLOW };
    }
    let mut found = mesh(config, &event.destination, event.destination_port);
    if found == 0 {
        found = next_hop(skb, config, &mut event);
    }
    if found == 0 && !crosses(skb, config) {
        return ALLOW;
    }
    // SAFETY: the helper takes the context; rows are never changed in place.
    let cookie = unsafe { bpf_get_socket_cookie(skb.cast()) };
    if unsafe { OWN.get(&cookie).is_some() || OTHER_NETNS.get(&cookie).is_some() } {
        return ALLOW;
    }
    // Redirected connections pass, even if a policy names the agent's own address (as in 127.0.0.1 with any port).
    if redirected_to(cookie, &event.destination, event.destination_port).is_some() {
        return ALLOW;
    }
    count(counter::GUARD_DROPPED);
    event.cookie = cookie;
    event.destination_id = found as u32;
    // The user of the socket, since a packet need not be sent in the context of a task.
    // SAFETY: the helper takes the context.
    event.task.uid = unsafe { bpf_get_socket_uid(skb) };
    events::refused(&mut event);
    REFUSE
}

/// The number of the mesh destination there, with the bit [`IS_MESH`] above it; or 0 where there is none.
#[inline(always)]
fn mesh(config: &Config, address: &Address, port: u16) -> u64 {
    match destination(config, address, port) {
        Some(found) if found.mode == MODE_MESH => IS_MESH | found.target as u32 as u64,
        _ => 0,
    }
}

const IS_MESH: u64 = 1 << 32;

/// [`mesh`] for where a packet goes next, if that is not what its socket is connected to. Where its port cannot be read, it
/// is taken for a mesh destination if any port of the address is one.
#[inline(never)]
fn next_hop(skb: *mut __sk_buff, config: &Config, event: &mut Event) -> u64 {
    let mut next = NOWHERE;
    let Some(ipv6) = header(skb, &mut next) else { return 0 };
    if split(&next) == split(&event.destination) {
        return 0;
    }
    let port = port_of(skb, ipv6, IPPROTO_TCP);
    let found = match port {
        0 if is_mesh_address(config, &next) => IS_MESH,
        0 => 0,
        port => mesh(config, &next, port),
    };
    if found != 0 {
        (event.destination, event.destination_port) = (next, port);
    }
    found
}

/// Would this packet come to a socket that has sent a SYN itself, to the agent or from it to a workload? The kernel joins
/// two sockets that have sent SYNs to each other to one connection, without a look-up of listeners (RFC 9293, 3.5:
/// simultaneous open).
#[inline(never)]
fn crosses(skb: *mut __sk_buff, config: &Config) -> bool {
    // SAFETY: fields of the context that this hook may read; the verifier insists on the null checks.
    unsafe {
        let sk: *mut bpf_sock = (*skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return false;
        }
        let ((near, near_port), (far, far_port)) = (own_end(sk), far_end(sk));
        let waiting =
            TupleKey { source: far, destination: near, source_port: far_port, destination_port: near_port, pad: 0 };
        if UPSTREAMS.get(&waiting).is_none() && ORIGINS.get(&waiting).is_none() {
            return false;
        }
        // In another network namespace the same addresses belong to other sockets.
        let namespace = LAYOUT.get(0).map_or(0, |layout| namespace_of(sk, layout));
        namespace == 0 || namespace == config.netns_cookie
    }
}

/// A packet of a socket that is not TCP. An enrolled workload's reaches a mesh destination only as UDP that a rule allows.
#[inline(never)]
fn beside_tcp(skb: *mut __sk_buff, protocol: u32) -> i32 {
    let Some(config) = config() else { return ALLOW };
    let mut event = events::event(EVENT_REFUSED, REASON_PROTOCOL, protocol);
    let Some(ipv6) = header(skb, &mut event.destination) else { return ALLOW };
    let mut routed = false;
    if !is_mesh_address(config, &event.destination) {
        // The socket may still be connected to a mesh destination that is reached by way of another host.
        routed = connected(skb, &mut event.destination);
        if !routed || !is_mesh_address(config, &event.destination) {
            return ALLOW;
        }
    }
    let Some(layout) = LAYOUT.get(0) else { return ALLOW };
    // SAFETY: helpers that this hook may use. Who made the socket is all that is known of a packet.
    unsafe {
        let namespace = namespace_of((*skb).__bindgen_anon_2.sk, layout);
        if namespace != 0 && namespace != config.netns_cookie {
            return ALLOW;
        }
        event.task.uid = bpf_get_socket_uid(skb);
        event.task.gid = ANY;
        event.task.cgroup = bpf_skb_cgroup_id(skb);
        event.cookie = bpf_get_socket_cookie(skb.cast());
    }
    let mut subject = recorded(config, event.task.uid, event.task.gid, event.task.cgroup);
    if subject.known() == NOT_ENROLLED {
        // Whoever made the socket is not enrolled, but another task may write to it: a datagram leaves in the context of
        // the task that writes. What the kernel itself sends (sockets of root, in the root cgroup) may leave in any task's
        // context.
        if event.task.uid == 0 && event.task.cgroup == ROOT_CGROUP {
            return ALLOW;
        }
        event.task = running();
        if event.task.tgid == 0 {
            return ALLOW;
        }
        subject = recorded(config, event.task.uid, event.task.gid, event.task.cgroup);
        if subject.known() == NOT_ENROLLED {
            return ALLOW;
        }
    }
    if protocol == IPPROTO_UDP || protocol == IPPROTO_UDPLITE {
        event.reason = REASON_UDP;
        event.protocol = IPPROTO_UDP;
        event.destination_port = port_of(skb, ipv6, protocol);
        // Where the port cannot be read, no rule can allow it.
        if event.destination_port != 0 {
            let Some(found) = destination(config, &event.destination, event.destination_port) else { return ALLOW };
            event.destination_id = found.target as u32;
            if !routed && may_send(config, found, event.destination_port, &subject) {
                return ALLOW;
            }
        }
        count(counter::UDP_REFUSED);
    } else {
        count(counter::PROTOCOL_DROPPED);
    }
    events::refused(&mut event);
    REFUSE
}

/// Where a packet goes, as its header says, and whether that is by IPv6. None for what is no IP, or cannot be read.
#[inline(always)]
fn header(skb: *mut __sk_buff, to: &mut Address) -> Option<bool> {
    // SAFETY: helpers and fields that this hook may use; each load is of as many bytes as there is room for.
    unsafe {
        match u16::from_be(word(addr_of!((*skb).protocol)) as u16) {
            ETH_P_IP => {
                let mut four = 0_u32;
                if bpf_skb_load_bytes(skb.cast(), 16, addr_of_mut!(four).cast(), 4) != 0 {
                    return None;
                }
                *to = mapped(four);
                Some(false)
            }
            ETH_P_IPV6 if bpf_skb_load_bytes(skb.cast(), 24, to.as_mut_ptr().cast(), 16) == 0 => Some(true),
            _ => None,
        }
    }
}

/// The address that the socket of a packet is connected to. False where it is not connected.
#[inline(never)]
fn connected(skb: *mut __sk_buff, to: &mut Address) -> bool {
    // SAFETY: fields of the context that this hook may read; the verifier insists on the null checks.
    unsafe {
        let sk: *mut bpf_sock = (*skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return false;
        }
        let full = bpf_sk_fullsock(sk);
        if full.is_null() {
            return false;
        }
        let (address, port) = far_end(full);
        *to = address;
        port != 0
    }
}

/// The destination port of a packet of this protocol, or 0 where its header is not in its usual place: fragments, extension
/// headers, a routing header.
#[inline(always)]
fn port_of(skb: *mut __sk_buff, ipv6: bool, protocol: u32) -> u16 {
    let mut first = 0_u8;
    let mut next = 0_u8;
    let mut port = 0_u16;
    // SAFETY: each load is of as many bytes as there is room for.
    unsafe {
        if bpf_skb_load_bytes(skb.cast(), 0, addr_of_mut!(first).cast(), 1) != 0
            || bpf_skb_load_bytes(skb.cast(), if ipv6 { 6 } else { 9 }, addr_of_mut!(next).cast(), 1) != 0
            || next as u32 != protocol
        {
            return 0;
        }
        let at = if ipv6 { 40 } else { (first as u32 & 15) * 4 };
        if bpf_skb_load_bytes(skb.cast(), at + 2, addr_of_mut!(port).cast(), 2) != 0 {
            return 0;
        }
    }
    u16::from_be(port)
}
