//! `getpeername()`, `getsockname()` and the address that `accept()` gives: what the program would see without Bunter.
//!
//! A program whose connection was redirected to the agent sees the address that it dialled and the source address that it would
//! have had. A workload that accepts the agent's upstream connection sees the true client.
//!
//! *Invariant:* nothing is decided by what is shown here. But a task that asks for the name of a listening socket holds it,
//! and the registry is told.

use crate::{egress::redirected_to, facts::*, maps::UPSTREAMS, registry};
use aya_ebpf::{bindings::bpf_sock_addr, helpers::bpf_get_socket_cookie};
use bunter_common::*;
use core::ptr::{addr_of, addr_of_mut};

#[inline(always)]
pub fn getpeername4(ctx: *mut bpf_sock_addr) {
    // SAFETY: fields of the context that this hook may read.
    let peer = unsafe { mapped(word(addr_of!((*ctx).user_ip4))) };
    if let Some((address, port)) = true_peer(ctx, peer) {
        show4(ctx, &address, port);
    }
}

#[inline(always)]
pub fn getpeername6(ctx: *mut bpf_sock_addr) {
    // SAFETY: fields of the context that this hook may read.
    let peer = unsafe { words(addr_of!((*ctx).user_ip6)) };
    if let Some((address, port)) = true_peer(ctx, peer) {
        show6(ctx, &address, port);
    }
}

#[inline(always)]
pub fn getsockname4(ctx: *mut bpf_sock_addr) {
    if let Some((address, port)) = true_self(ctx) {
        show4(ctx, &address, port);
    }
}

#[inline(always)]
pub fn getsockname6(ctx: *mut bpf_sock_addr) {
    if let Some((address, port)) = true_self(ctx) {
        show6(ctx, &address, port);
    }
}

/// The true peer, where the other end is the agent's.
#[inline(always)]
fn true_peer(ctx: *mut bpf_sock_addr, peer: Address) -> Option<(Address, u16)> {
    config()?;
    // SAFETY: helpers and fields that this hook may use; rows are never changed in place.
    unsafe {
        let port = u16::from_be(word(addr_of!((*ctx).user_port)) as u16);
        if let Some(origin) = redirected_to(bpf_get_socket_cookie(ctx.cast()), &peer, port) {
            return Some((origin.destination, origin.destination_port));
        }
        let (near, near_port) = near_end(ctx);
        let upstream = UPSTREAMS.get(&TupleKey {
            source: peer,
            destination: near,
            source_port: port,
            destination_port: near_port,
            pad: 0,
        })?;
        Some((upstream.client, upstream.client_port))
    }
}

/// The address that the socket would have if its connection had not been redirected to the agent.
#[inline(always)]
fn true_self(ctx: *mut bpf_sock_addr) -> Option<(Address, u16)> {
    config()?;
    // SAFETY: helpers and fields that this hook may use; rows are never changed in place.
    unsafe {
        let sk = (*ctx).__bindgen_anon_1.sk;
        if word(addr_of!((*sk).state)) == TCP_LISTEN {
            // A process that is given a listening socket by another usually asks for its name.
            registry::held(bpf_get_socket_cookie(ctx.cast()));
            if word(addr_of!((*sk).protocol)) == IPPROTO_MPTCP {
                // What the kernel looks up for a SYN is a socket inside this multipath socket, with a cookie of its own.
                let (address, port) = near_end(ctx);
                registry::held_at(address, port, word(addr_of!((*sk).bound_dev_if)));
            }
            return None;
        }
        let (peer, peer_port) = far_end(sk);
        let origin = redirected_to(bpf_get_socket_cookie(ctx.cast()), &peer, peer_port)?;
        if split(&origin.source) == [0; 4] {
            return None;
        }
        Some((origin.source, u16::from_be(word(addr_of!((*ctx).user_port)) as u16)))
    }
}

#[inline(always)]
fn show4(ctx: *mut bpf_sock_addr, address: &Address, port: u16) {
    let [_, _, _, four] = split(address);
    // SAFETY: fields of the context that this hook may write.
    unsafe {
        addr_of_mut!((*ctx).user_ip4).write_volatile(four);
        addr_of_mut!((*ctx).user_port).write_volatile(port.to_be() as u32);
    }
}

#[inline(always)]
fn show6(ctx: *mut bpf_sock_addr, address: &Address, port: u16) {
    let [a, b, c, d] = split(address);
    // SAFETY: fields of the context that this hook may write.
    unsafe {
        let to = addr_of_mut!((*ctx).user_ip6).cast::<u32>();
        to.write_volatile(a);
        to.add(1).write_volatile(b);
        to.add(2).write_volatile(c);
        to.add(3).write_volatile(d);
        addr_of_mut!((*ctx).user_port).write_volatile(port.to_be() as u32);
    }
}
