//! Bunter's kernel programs, one line each: what a program decides is in [`egress`], [`guard`], [`names`], [`ingress`] and
//! [`registry`], what it reads is in [`facts`], what it leaves behind for the agent is in [`maps`] and [`events`].
//!
//! Attached to a cgroup: `connect4/6`, `sendmsg4/6`, `getpeername4/6`, `getsockname4/6`, `post_bind4/6`, `sock_release`,
//! `sock_ops` and the egress guard; attached to a network namespace: `sk_lookup`. Every one of them is in Linux 5.15 and
//! uses no helper newer than that but `bpf_set_retval` (5.18).
//!
//! *Invariant:* a program acts only on sockets of the namespace that `CONFIG` names, and without a valid `CONFIG` it
//! leaves everything alone: there are no mesh destinations then.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod atomic;
mod egress;
mod facts;
mod guard;
mod ingress;
mod maps;
mod names;
mod quota;
mod registry;
mod events;

use aya_ebpf::{
    EbpfContext,
    macros::{cgroup_skb, cgroup_sock, cgroup_sock_addr, sk_lookup, sock_ops, xdp},
    programs::{SkBuffContext, SkLookupContext, SockAddrContext, SockContext, SockOpsContext, XdpContext},
};

/// What a cgroup program returns to let the call or the packet go on.
const ALLOW: i32 = 1;
/// What a cgroup program returns to refuse it: `EPERM`, unless the program set another error.
const REFUSE: i32 = 0;

#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    egress::connect4(ctx.sock_addr)
}

#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    egress::connect6(ctx.sock_addr)
}

#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    egress::sendmsg4(ctx.sock_addr)
}

#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    egress::sendmsg6(ctx.sock_addr)
}

#[cgroup_sock_addr(getpeername4)]
fn getpeername4(ctx: SockAddrContext) -> i32 {
    names::getpeername4(ctx.sock_addr);
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
fn getpeername6(ctx: SockAddrContext) -> i32 {
    names::getpeername6(ctx.sock_addr);
    ALLOW
}

#[cgroup_sock_addr(getsockname4)]
fn getsockname4(ctx: SockAddrContext) -> i32 {
    names::getsockname4(ctx.sock_addr);
    ALLOW
}

#[cgroup_sock_addr(getsockname6)]
fn getsockname6(ctx: SockAddrContext) -> i32 {
    names::getsockname6(ctx.sock_addr);
    ALLOW
}

#[cgroup_sock(post_bind4)]
fn post_bind4(ctx: SockContext) -> i32 {
    // SAFETY: a field that this hook may read, and the other may not.
    registry::bound(ctx.sock, facts::mapped(unsafe { facts::word(&raw const (*ctx.sock).src_ip4) }))
}

#[cgroup_sock(post_bind6)]
fn post_bind6(ctx: SockContext) -> i32 {
    // SAFETY: as above.
    registry::bound(ctx.sock, unsafe { facts::words(&raw const (*ctx.sock).src_ip6) })
}

#[cgroup_sock(sock_release)]
fn sock_release(ctx: SockContext) -> i32 {
    ingress::released(ctx.sock);
    ALLOW
}

#[sock_ops]
fn tcp_events(ctx: SockOpsContext) -> u32 {
    ingress::event(ctx.ops);
    ALLOW as u32
}

#[cgroup_skb(egress)]
fn guard(ctx: SkBuffContext) -> i32 {
    guard::guard(ctx.as_ptr().cast())
}

#[sk_lookup]
fn redirect_inbound(ctx: SkLookupContext) -> u32 {
    ingress::redirect_inbound(&ctx)
}

/// Attached nowhere: the agent runs it by itself.
#[xdp]
fn registry(ctx: XdpContext) -> u32 {
    registry::command(ctx.ctx)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // No program has a way to panic; the linker refuses an object in which one has.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
