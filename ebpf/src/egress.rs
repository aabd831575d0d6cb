//! Connections and datagrams that leave a program of this host: refused, left alone, or turned to the agent.
//!
//! A connection to a mesh destination goes to the agent or nowhere. What an enrolled workload dials beside that follows its
//! policy. Everything else is left alone. What the kernel's facts do not settle is turned to the agent, which attests.
//!
//! *Invariant:* no way through [`judge`] lets TCP to a mesh destination pass, but for the agent's own sockets and a named
//! bypass; what does not come through it (a socket from before, or from outside the tree) meets [`guard`].

use crate::{
    ALLOW, REFUSE,
    facts::*,
    maps::{FLOWS, FOREIGN, OWN},
    tell::{self, NOWHERE, count},
};
use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock, bpf_sock_addr},
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval},
    programs::SockAddrContext,
};
use aya_log_ebpf::warn;
use core::ptr::{addr_of, addr_of_mut};
use wimsey_common::*;

const ECONNREFUSED: i32 = 111;

/// What becomes of a connection.
#[derive(Clone, Copy)]
struct Verdicted {
    action: u32,
    /// Event to send, or 0, with its reason and rule.
    kind: u32,
    reason: u32,
    rule: u32,
    counter: u32,
}

const PASS: u32 = 0;
const DENY: u32 = 1;
const TURN: u32 = 2;

#[inline(always)]
fn left_alone() -> Verdicted {
    Verdicted { action: PASS, kind: 0, reason: 0, rule: 0, counter: counter::LEFT_ALONE }
}

#[inline(always)]
fn bypassed(rule: u32, counter: u32) -> Verdicted {
    Verdicted { action: PASS, kind: EVENT_BYPASSED, reason: 0, rule, counter }
}

#[inline(always)]
fn refused(reason: u32, counter: u32) -> Verdicted {
    Verdicted { action: DENY, kind: EVENT_REFUSED, reason, rule: 0, counter }
}

#[inline(always)]
fn turned() -> Verdicted {
    Verdicted { action: TURN, kind: 0, reason: 0, rule: 0, counter: counter::TURNED }
}

/// `connect()` to an IPv4 address.
#[inline(always)]
pub fn connect4(ctx: *mut bpf_sock_addr) -> i32 {
    // SAFETY: fields of the context that this hook may read and write.
    let (dialled, port) = unsafe { (mapped(word(addr_of!((*ctx).user_ip4))), port(ctx)) };
    match connect(ctx, dialled, port, 4) {
        Outcome::Allow => ALLOW,
        Outcome::Refuse => REFUSE,
        Outcome::Turn(agent) => {
            // SAFETY: as above.
            unsafe {
                addr_of_mut!((*ctx).user_ip4).write_volatile(0x7f00_0001_u32.to_be());
                addr_of_mut!((*ctx).user_port).write_volatile(agent.to_be() as u32);
            }
            ALLOW
        }
    }
}

/// `connect()` to an IPv6 address, or to an IPv4-mapped one.
#[inline(always)]
pub fn connect6(ctx: *mut bpf_sock_addr) -> i32 {
    // SAFETY: fields of the context that this hook may read and write.
    let (dialled, port) = unsafe { (words(addr_of!((*ctx).user_ip6)), port(ctx)) };
    match connect(ctx, dialled, port, 6) {
        Outcome::Allow => ALLOW,
        Outcome::Refuse => REFUSE,
        Outcome::Turn(agent) => {
            // SAFETY: as above. A socket for both families cannot reach `[::1]` once it is bound to an IPv4 address, and
            // one for IPv6 only cannot reach `::ffff:127.0.0.1`: the family of the address decides.
            unsafe {
                let (near, _) = near_end(ctx);
                let four = is_mapped(&reached(dialled, &near));
                let address = addr_of_mut!((*ctx).user_ip6).cast::<u32>();
                address.write_volatile(0);
                address.add(1).write_volatile(0);
                address.add(2).write_volatile(if four { 0xffff_u32.to_be() } else { 0 });
                address.add(3).write_volatile(if four { 0x7f00_0001_u32.to_be() } else { 1_u32.to_be() });
                addr_of_mut!((*ctx).user_port).write_volatile(agent.to_be() as u32);
            }
            ALLOW
        }
    }
}

/// `sendto()` and `sendmsg()` with an IPv4 address, on a UDP socket.
#[inline(always)]
pub fn sendmsg4(ctx: *mut bpf_sock_addr) -> i32 {
    // SAFETY: fields of the context that this hook may read.
    let (dialled, port) = unsafe { (mapped(word(addr_of!((*ctx).user_ip4))), port(ctx)) };
    sendmsg(ctx, dialled, port)
}

/// `sendto()` and `sendmsg()` with an IPv6 address, on a UDP socket.
#[inline(always)]
pub fn sendmsg6(ctx: *mut bpf_sock_addr) -> i32 {
    // SAFETY: fields of the context that this hook may read.
    let (dialled, port) = unsafe { (words(addr_of!((*ctx).user_ip6)), port(ctx)) };
    sendmsg(ctx, dialled, port)
}

/// The last line: a SYN to a mesh destination leaves only from a socket of the agent. It catches what the connect hooks
/// cannot see: sockets from before they were attached, from a cgroup outside the covered tree, made by the kernel.
///
/// Every packet of the host comes by, so the first thing asked is the state of its socket: only a socket in `SYN_SENT`
/// sends a SYN of its own, whatever options or extension headers the packet has.
#[inline(always)]
pub fn guard(skb: *mut __sk_buff) -> i32 {
    // SAFETY: fields of the context that this hook may read; the verifier insists on the null check.
    let sk: *mut bpf_sock = unsafe { (*skb).__bindgen_anon_2.sk };
    if sk.is_null() || unsafe { word(addr_of!((*sk).state)) } != TCP_SYN_SENT {
        return ALLOW;
    }
    let Some(config) = config() else { return ALLOW };
    // SAFETY: a socket that the verifier knows not to be null.
    let (address, port) = unsafe { far_end(sk) };
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
    tell::send(&event);
    REFUSE
}

enum Outcome {
    Allow,
    Refuse,
    Turn(u16),
}

/// Any `connect()`: the story from the address dialled to the outcome.
#[inline(always)]
fn connect(ctx: *mut bpf_sock_addr, dialled: Address, port: u16, family: u16) -> Outcome {
    let Some(config) = config() else { return Outcome::Allow };
    let config = &at_this_moment(config);
    // SAFETY: helpers and fields that this hook may use.
    let (netns, transport, (near, near_port), cookie) =
        unsafe { (bpf_get_netns_cookie(ctx.cast()), transport(ctx), near_end(ctx), bpf_get_socket_cookie(ctx.cast())) };
    if netns != config.netns_cookie || transport == 0 {
        return Outcome::Allow;
    }
    // SAFETY: rows are never changed in place.
    if unsafe { OWN.get(&cookie) }.is_some() {
        return Outcome::Allow;
    }
    let near = blurred(near, config);
    let address = blurred(reached(dialled, &near), config);
    // While a new agent takes over, the programs of the old one have been here for the same call.
    if turned_before(config, cookie, &address, port) {
        return Outcome::Allow;
    }
    let found = destination(config, &address, port);
    let mut event = tell::event(0, 0, transport);
    event.task = task();
    event.cookie = cookie;
    event.source_port = near_port;
    event.destination = address;
    event.destination_port = port;
    let mut there = NOTHING;
    let mut hint = NOWHERE;
    if let Some(found) = found {
        event.destination_id = found.target as u32;
        there = There::of(found, port);
        hint = found.source;
    }
    event.source = if is_any(&near) { hint } else { near };

    let subject = workload(config, event.task.uid, event.task.gid, event.task.cgroup);
    let who = subject.known();
    if who != ASK && who != UNKNOWN {
        event.task.workload = who;
    }
    if who == UNKNOWN {
        event.kind = EVENT_UNKNOWN_CGROUP;
        tell::send(&event);
    }
    let listener = outbound_listener(config, cookie, !is_mapped(&address));
    let mut verdict = judge(config, transport, &there, &subject);
    let mut agent = 0;
    if verdict.action == TURN {
        agent = agent_port(listener);
        if agent == 0 {
            verdict = if who == UNKNOWN && there.mode != MODE_MESH {
                left_alone()
            } else {
                refused(REASON_NO_AGENT, counter::REFUSED_NO_AGENT)
            };
        } else if let Err(error) = remember(config, &event, family, agent) {
            verdict = refused(REASON_MAP_FULL, counter::REFUSED_MAP_FULL);
            warn!(&SockAddrContext::new(ctx), "no room for another connection in FLOWS: error {}", error);
        }
    }
    count(verdict.counter);
    if verdict.kind != 0 {
        event.kind = verdict.kind;
        event.reason = verdict.reason;
        event.rule = verdict.rule;
        tell::send(&event);
    }
    match verdict.action {
        PASS => Outcome::Allow,
        TURN => Outcome::Turn(agent),
        _ => {
            if verdict.reason == REASON_NO_AGENT {
                // SAFETY: the helper takes a number. To the program it is as if nobody listened there.
                unsafe { bpf_set_retval(-ECONNREFUSED) };
            }
            Outcome::Refuse
        }
    }
}

/// What is at the address dialled: the words of [`Destination`] that decide.
struct There {
    mode: u32,
    port: u16,
    target: u64,
    group: u64,
    datagrams: u64,
}

/// No destination entry covers it.
const NOTHING: There = There { mode: 0, port: 0, target: 0, group: 0, datagrams: 0 };

impl There {
    #[inline(always)]
    fn of(found: &Destination, port: u16) -> Self {
        let Destination { mode, target, group, datagrams, .. } = *found;
        Self { mode, port, target, group, datagrams }
    }
}

/// The decision, from the facts alone.
#[inline(always)]
fn judge(config: &Config, transport: u32, there: &There, subject: &Who) -> Verdicted {
    if transport == IPPROTO_UDP {
        return datagram(config, there, subject);
    }
    let who = subject.known();
    if who == ASK || who == UNKNOWN {
        return turned();
    }
    if who == NOT_ENROLLED {
        return if there.mode == MODE_MESH {
            refused(REASON_NO_IDENTITY, counter::REFUSED_NO_IDENTITY)
        } else {
            left_alone()
        };
    }
    let row = verdict(config, subject, there.target, there.group, there.port, IPPROTO_TCP);
    if row.action == VERDICT_MESH && there.mode == MODE_MESH {
        turned()
    } else if row.action == VERDICT_BYPASS {
        bypassed(row.rule, counter::BYPASSED)
    } else {
        refused(REASON_NOT_ALLOWED, counter::REFUSED_NOT_ALLOWED)
    }
}

/// The decision for UDP: only an enrolled workload's datagrams to a mesh destination are anybody's business.
#[inline(always)]
fn datagram(config: &Config, there: &There, subject: &Who) -> Verdicted {
    let who = subject.known();
    if there.mode != MODE_MESH || who == NOT_ENROLLED {
        return left_alone();
    }
    if who != ASK && who != UNKNOWN && there.datagrams != 0 {
        let row = verdict(config, subject, there.datagrams, 0, 0, IPPROTO_UDP);
        if row.action == VERDICT_BYPASS {
            return bypassed(row.rule, counter::UDP_ALLOWED);
        }
    }
    refused(REASON_UDP, counter::UDP_REFUSED)
}

/// A datagram on a socket that is not connected. What is allowed is counted and not told: it would be told for each.
#[inline(always)]
fn sendmsg(ctx: *mut bpf_sock_addr, dialled: Address, port: u16) -> i32 {
    let Some(config) = config() else { return ALLOW };
    let config = &at_this_moment(config);
    // SAFETY: helpers and fields that this hook may use.
    let (netns, (near, near_port)) = unsafe { (bpf_get_netns_cookie(ctx.cast()), near_end(ctx)) };
    if netns != config.netns_cookie {
        return ALLOW;
    }
    let address = reached(dialled, &near);
    let Some(found) = destination(config, &address, port) else { return ALLOW };
    if found.mode != MODE_MESH {
        return ALLOW;
    }
    let mut event = tell::event(EVENT_REFUSED, REASON_UDP, IPPROTO_UDP);
    event.task = task();
    let subject = workload(config, event.task.uid, event.task.gid, event.task.cgroup);
    let who = subject.known();
    let verdict = datagram(config, &There::of(found, port), &subject);
    if verdict.action == PASS {
        if verdict.kind != 0 {
            count(verdict.counter);
        }
        return ALLOW;
    }
    if who != ASK && who != UNKNOWN {
        event.task.workload = who;
    }
    // SAFETY: the helper takes the context.
    event.cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    event.source = near;
    event.source_port = near_port;
    event.destination = address;
    event.destination_port = port;
    event.destination_id = found.target as u32;
    count(counter::UDP_REFUSED);
    tell::send(&event);
    if who == UNKNOWN {
        event.kind = EVENT_UNKNOWN_CGROUP;
        event.reason = 0;
        tell::send(&event);
    }
    REFUSE
}

/// Records where a connection that is turned to the agent wanted to go.
#[inline(always)]
fn remember(config: &Config, event: &Event, family: u16, agent_port: u16) -> Result<(), i32> {
    let origin = Origin {
        task: event.task,
        cookie: event.cookie,
        destination: event.destination,
        source: event.source,
        destination_port: event.destination_port,
        source_port: event.source_port,
        destination_id: event.destination_id,
        generation: config.generation,
        family,
        agent_port,
    };
    FLOWS.insert(&event.cookie, &origin, 0)
}

/// Is this what a `connect()` of this socket was turned to?
#[inline(always)]
pub fn turned_to(cookie: u64, address: &Address, port: u16) -> Option<&'static Origin> {
    if !is_loopback(address) {
        return None;
    }
    // SAFETY: rows are replaced only by this same socket's next connect.
    let origin = unsafe { FLOWS.get(&cookie) }?;
    if origin.agent_port == port { Some(origin) } else { None }
}

/// The same, and the agent is still the one who listens there.
#[inline(always)]
fn turned_before(config: &Config, cookie: u64, address: &Address, port: u16) -> bool {
    turned_to(cookie, address, port).is_some()
        && agent_port(outbound_listener(config, cookie, !is_mapped(address))) == port
}

/// IPPROTO_TCP or IPPROTO_UDP, or 0 for what is neither.
///
/// # Safety
/// `ctx` is the context of a cgroup socket-address program.
#[inline(always)]
unsafe fn transport(ctx: *mut bpf_sock_addr) -> u32 {
    // SAFETY: promised by the caller.
    match unsafe { word(addr_of!((*ctx).protocol)) } {
        IPPROTO_TCP | IPPROTO_MPTCP => IPPROTO_TCP,
        IPPROTO_UDP | IPPROTO_UDPLITE => IPPROTO_UDP,
        _ => 0,
    }
}

/// # Safety
/// `ctx` is the context of a cgroup socket-address program.
#[inline(always)]
unsafe fn port(ctx: *mut bpf_sock_addr) -> u16 {
    // SAFETY: promised by the caller.
    u16::from_be(unsafe { word(addr_of!((*ctx).user_port)) } as u16)
}

#[inline(always)]
fn is_any(address: &Address) -> bool {
    let [a, b, c, d] = split(address);
    a | b | d == 0 && (c == 0 || c == 0xffff_u32.to_be())
}
