//! The egress guard: what slipped past the hooks of `connect()` and `sendmsg()` does not leave the host.
//!
//! *Invariant:* a SYN to a mesh destination leaves only from a socket of the agent, and what is not TCP leaves an enrolled
//! workload for one only as UDP, by a rule.

use crate::{
    ALLOW, REFUSE,
    egress::{may_send, turned_to},
    facts::*,
    maps::{FOREIGN, LAYOUT, OWN},
    tell::{self, count},
};
use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock},
    helpers::{bpf_get_socket_cookie, bpf_get_socket_uid, bpf_sk_fullsock, bpf_skb_cgroup_id, bpf_skb_load_bytes},
};
use core::ptr::{addr_of, addr_of_mut};
use wimsey_common::*;

/// Id of the root of the unified hierarchy.
const ROOT_CGROUP: u64 = 1;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;

/// The last line: a SYN to a mesh destination leaves only from a socket of the agent. It catches what the connect hooks
/// cannot see: sockets from before they were attached, from a cgroup outside the covered tree, made by the kernel.
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
    // SAFETY: as above. What is no whole socket (a handshake, the end of a connection) is TCP.
    unsafe {
        if word(addr_of!((*sk).state)) != TCP_SYN_SENT {
            let full = bpf_sk_fullsock(sk);
            if full.is_null() || is_tcp(word(addr_of!((*full).protocol))) {
                return ALLOW;
            }
            return beside_tcp(skb, word(addr_of!((*full).protocol)));
        }
    }
    syn(skb)
}

/// A SYN: not inlined, so that what it needs of the stack is not taken from [`beside_tcp`].
#[inline(never)]
fn syn(skb: *mut __sk_buff) -> i32 {
    let Some(config) = config() else { return ALLOW };
    // SAFETY: fields of the context that this hook may read; the verifier insists on the null check.
    let sk: *mut bpf_sock = unsafe { (*skb).__bindgen_anon_2.sk };
    if sk.is_null() {
        return ALLOW;
    }
    // SAFETY: a socket that the verifier knows not to be null.
    let (address, port) = unsafe { far_end(sk) };
    // SAFETY: fields and a helper that this hook may use. What was turned to the agent goes to it over loopback, or nowhere: the
    // socket may have been bound to a device after its `connect()`, which with fast open sends nothing.
    if is_loopback(&address) && unsafe { word(addr_of!((*skb).ifindex)) } != LOOPBACK_DEVICE {
        return if turned_to(unsafe { bpf_get_socket_cookie(skb.cast()) }, &address, port).is_some() {
            REFUSE
        } else {
            ALLOW
        };
    }
    let Some(found) = destination(config, &address, port) else { return ALLOW };
    if found.mode != MODE_MESH {
        return ALLOW;
    }
    // SAFETY: the helper takes the context; rows are never changed in place.
    let cookie = unsafe { bpf_get_socket_cookie(skb.cast()) };
    if unsafe { OWN.get(&cookie).is_some() || FOREIGN.get(&cookie).is_some() } {
        return ALLOW;
    }
    // A policy may name the agent's own address, as in 127.0.0.1 with any port.
    if turned_to(cookie, &address, port).is_some() {
        return ALLOW;
    }
    count(counter::GUARD_DROPPED);
    let mut event = tell::event(EVENT_REFUSED, REASON_GUARD, IPPROTO_TCP);
    event.cookie = cookie;
    event.destination = address;
    event.destination_port = port;
    event.destination_id = found.target as u32;
    // Whoever has the socket: no task may be on its way here with the packet.
    // SAFETY: the helper takes the context.
    event.task.uid = unsafe { bpf_get_socket_uid(skb) };
    tell::refused(&mut event);
    REFUSE
}

/// A packet of a socket that is not TCP: of an enrolled workload, it reaches a mesh destination as UDP by a rule, and in no
/// other way.
#[inline(never)]
fn beside_tcp(skb: *mut __sk_buff, protocol: u32) -> i32 {
    let Some(config) = config() else { return ALLOW };
    let mut event = tell::event(EVENT_REFUSED, REASON_PROTOCOL, protocol);
    let mut ipv6 = false;
    // SAFETY: helpers and fields that this hook may use; each load is of as many bytes as there is room for.
    unsafe {
        match u16::from_be(word(addr_of!((*skb).protocol)) as u16) {
            ETH_P_IP => {
                let mut to = 0_u32;
                if bpf_skb_load_bytes(skb.cast(), 16, addr_of_mut!(to).cast(), 4) != 0 {
                    return ALLOW;
                }
                event.destination = mapped(to);
            }
            ETH_P_IPV6 => {
                ipv6 = true;
                if bpf_skb_load_bytes(skb.cast(), 24, addr_of_mut!(event.destination).cast(), 16) != 0 {
                    return ALLOW;
                }
            }
            _ => return ALLOW,
        }
    }
    let Some(layout) = LAYOUT.get(0).filter(|_| is_mesh_address(config, &event.destination)) else { return ALLOW };
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
        // Nobody has made the socket, and somebody else may write to it: a datagram leaves in the context of whoever writes.
        // What the kernel itself sends (sockets of root, in the root of the tree) leaves in anybody's.
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
        event.destination_port = udp_port(skb, ipv6);
        let Some(found) = destination(config, &event.destination, event.destination_port) else { return ALLOW };
        event.destination_id = found.target as u32;
        if may_send(config, found, event.destination_port, &subject) {
            return ALLOW;
        }
        count(counter::UDP_REFUSED);
    } else {
        count(counter::PROTOCOL_DROPPED);
    }
    tell::refused(&mut event);
    REFUSE
}

/// The destination port of a UDP packet, or 0 where its header is not in its usual place (fragments, extension headers).
#[inline(always)]
fn udp_port(skb: *mut __sk_buff, ipv6: bool) -> u16 {
    let mut first = 0_u8;
    let mut port = 0_u16;
    // SAFETY: each load is of as many bytes as there is room for.
    unsafe {
        if bpf_skb_load_bytes(skb.cast(), 0, addr_of_mut!(first).cast(), 1) != 0 {
            return 0;
        }
        let header = if ipv6 { 40 } else { (first as u32 & 15) * 4 };
        if bpf_skb_load_bytes(skb.cast(), header + 2, addr_of_mut!(port).cast(), 2) != 0 {
            return 0;
        }
    }
    u16::from_be(port)
}
