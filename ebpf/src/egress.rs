//! Connections and datagrams that leave a program of this host: refused, left alone, or redirected to the agent.
//!
//! A connection to a mesh destination goes to the agent or nowhere. What an enrolled workload dials beside that follows its
//! policy. Everything else is left alone. What the kernel's facts do not settle is redirected to the agent, which attests.
//!
//! *Invariant:* TCP to a mesh destination passes these hooks only from the agent's own sockets or by a named bypass.
//! Sockets that the hooks do not see (made before they were attached, or outside the cgroup tree) meet the guard.

use crate::{
    ALLOW, REFUSE,
    events::{self, NOBODY, NOWHERE, count},
    facts::*,
    maps::{FLOWS, OWN, SERVED},
    quota,
};
use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr, bpf_sock_ops},
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_current_uid_gid, bpf_get_netns_cookie, bpf_get_socket_cookie,
        bpf_ktime_get_boot_ns, bpf_set_retval,
    },
};
use bunter_common::*;
use core::ptr::{addr_of, addr_of_mut};

const ECONNREFUSED: i32 = 111;
/// In nanoseconds: longer than it takes from one attached program to the next within one `connect()`.
const ONE_CALL: u64 = 100_000_000;

/// What becomes of a connection: action, event to send (or 0), its reason and the counter, a byte each, and the rule above
/// them. Packed into one number, whose parts the verifier does not track.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Decision(u64);

impl Decision {
    #[inline(always)]
    const fn new(action: u32, kind: u32, reason: u32, rule: u32, counter: u32) -> Self {
        Self(action as u64 | (kind as u64) << 8 | (reason as u64) << 16 | (counter as u64) << 24 | (rule as u64) << 32)
    }
    #[inline(always)]
    fn action(self) -> u32 {
        self.0 as u32 & 0xff
    }
    #[inline(always)]
    fn kind(self) -> u32 {
        (self.0 >> 8) as u32 & 0xff
    }
    #[inline(always)]
    fn reason(self) -> u32 {
        (self.0 >> 16) as u32 & 0xff
    }
    #[inline(always)]
    fn counter(self) -> u32 {
        (self.0 >> 24) as u32 & 0xff
    }
    #[inline(always)]
    fn rule(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

const PASS: u32 = 0;
const DENY: u32 = 1;
const REDIRECT: u32 = 2;

#[inline(always)]
fn left_alone() -> Decision {
    Decision::new(PASS, 0, 0, 0, counter::LEFT_ALONE)
}

#[inline(always)]
fn bypassed(rule: u32, counter: u32) -> Decision {
    Decision::new(PASS, EVENT_BYPASSED, 0, rule, counter)
}

#[inline(always)]
fn refused(reason: u32, counter: u32) -> Decision {
    Decision::new(DENY, EVENT_REFUSED, reason, 0, counter)
}

#[inline(always)]
fn redirected() -> Decision {
    Decision::new(REDIRECT, 0, 0, 0, counter::REDIRECTED)
}

/// `connect()` to an IPv4 address.
#[inline(always)]
pub fn connect4(ctx: *mut bpf_sock_addr) -> i32 {
    // SAFETY: fields of the context that this hook may read and write.
    let (dialled, port) = unsafe { (mapped(word(addr_of!((*ctx).user_ip4))), port(ctx)) };
    match connect(ctx, dialled, port, 4) {
        Outcome::Allow => ALLOW,
        Outcome::Refuse => REFUSE,
        Outcome::Turn(agent, _) => {
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
        Outcome::Turn(agent, four) => {
            // SAFETY: as above. A socket for both families cannot reach `[::1]` once it is bound to an IPv4 address, and
            // one for IPv6 only cannot reach `::ffff:127.0.0.1`: the family of the address decides.
            unsafe {
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

/// A `connect()` or a datagram in another network namespace, to an address that is a mesh destination in this one. Where
/// that namespace has no agent, nobody can protect the connection: it is counted, and refused if the task may be enrolled.
/// Says whether it is allowed.
#[inline(never)]
fn elsewhere(config: &Config, netns: u64, event: &mut Event) -> bool {
    let Some(found) = destination(config, &event.destination, event.destination_port) else { return true };
    // SAFETY: only asked whether it is there.
    if found.mode != MODE_MESH || unsafe { SERVED.get(&netns) }.is_some() {
        return true;
    }
    count(counter::OTHER_NAMESPACES);
    if workload(config, event.task.uid, event.task.gid, event.task.cgroup).known() == NOT_ENROLLED {
        return true;
    }
    event.kind = EVENT_REFUSED;
    event.reason = REASON_NAMESPACE;
    event.destination_id = found.target as u32;
    events::refused(event);
    false
}

enum Outcome {
    Allow,
    Refuse,
    /// Redirect to this port of the agent; the second field says whether by IPv4.
    Turn(u16, bool),
}

/// Any `connect()`, from the address dialled to the outcome.
#[inline(always)]
fn connect(ctx: *mut bpf_sock_addr, dialled: Address, port: u16, family: u16) -> Outcome {
    let Some(config) = config() else { return Outcome::Allow };
    let config = &at_this_moment(config);
    // SAFETY: helpers and fields that this hook may use.
    let (netns, transport, near, cookie, device) = unsafe {
        let sk: *mut bpf_sock = (*ctx).__bindgen_anon_1.sk;
        let device = word(addr_of!((*sk).bound_dev_if));
        (bpf_get_netns_cookie(ctx.cast()), transport(ctx), near_end(ctx), bpf_get_socket_cookie(ctx.cast()), device)
    };
    let mut event = events::event(0, 0, transport);
    event.cookie = cookie;
    (event.source, event.source_port) = near;
    event.destination_port = port;
    if netns != config.netns_cookie {
        event.task = task();
        event.destination = dialled;
        return if transport == 0 || elsewhere(config, netns, &mut event) { Outcome::Allow } else { Outcome::Refuse };
    }
    if transport == 0 {
        return Outcome::Allow;
    }
    // SAFETY: rows are never changed in place.
    if unsafe { OWN.get(&cookie) }.is_some() {
        return Outcome::Allow;
    }
    blur(&mut event.source, config.epoch);
    event.destination = reached(dialled, &event.source);
    blur(&mut event.destination, config.epoch);
    let four = is_mapped(&event.destination);
    // While a new agent takes over, the old one's programs are still attached, and may have redirected this same call
    // already.
    if redirected_before(config, cookie, &event.destination, port) {
        return Outcome::Allow;
    }
    let found = destination(config, &event.destination, port);
    event.task = task();
    if is_any(&event.source) {
        event.source = NOWHERE;
    }
    if let Some(found) = found {
        event.destination_id = found.target as u32;
        if is_any(&event.source) {
            event.source = found.source;
        }
    }
    let subject = workload(config, event.task.uid, event.task.gid, event.task.cgroup);
    let who = subject.known();
    if who != ASK && who != UNKNOWN {
        event.task.workload = who;
    }
    let mut verdict = judged(config, found, &subject, transport << 16 | port as u32);
    let mut agent = 0;
    if verdict.action() == REDIRECT {
        agent = agent_port(outbound_listener(config, cookie, !four));
        if agent == 0 {
            verdict = refused(REASON_NO_AGENT, counter::REFUSED_NO_AGENT);
        } else if device > LOOPBACK_DEVICE {
            verdict = refused(REASON_DEVICE, counter::REFUSED_NOT_ALLOWED);
        } else {
            let full = remember(&event, config.generation, family, agent);
            if full != 0 {
                verdict = refused(full, counter::REFUSED_MAP_FULL);
            }
        }
    }
    report(&mut event, verdict, who);
    if verdict.action() == REDIRECT {
        return Outcome::Turn(agent, four);
    }
    // Remove what an earlier `connect()` of this socket has recorded: another process may have the socket now.
    egress_released(cookie, &mut event);
    if verdict.action() == PASS {
        return Outcome::Allow;
    }
    if verdict.reason() == REASON_NO_AGENT {
        // SAFETY: the helper takes a number. To the application it looks as if nobody listened there.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    Outcome::Refuse
}

/// Counts the decision, and sends the events that belong to it.
#[inline(always)]
fn report(event: &mut Event, verdict: Decision, who: u32) {
    count(verdict.counter());
    if who == UNKNOWN {
        event.kind = EVENT_UNKNOWN_CGROUP;
        events::send(event);
    }
    event.kind = verdict.kind();
    event.reason = verdict.reason();
    event.rule = verdict.rule();
    if event.kind == EVENT_REFUSED {
        events::refused(event);
    } else if event.kind != 0 {
        events::send(event);
    }
}

/// The decision about a `connect()`. `what`: transport and port. Not inlined, so that the verifier does not follow each
/// answer separately.
#[inline(never)]
fn judged(config: &Config, found: Option<&'static Destination>, subject: &Who, what: u32) -> Decision {
    let there = match found {
        Some(found) => There::of(found, what as u16),
        None => NOTHING,
    };
    judge(config, what >> 16, &there, subject)
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
fn judge(config: &Config, transport: u32, there: &There, subject: &Who) -> Decision {
    if transport == IPPROTO_UDP {
        return datagram(config, there, subject);
    }
    let who = subject.known();
    if there.mode == MODE_MESH {
        // Only a connection to a mesh destination is the agent's: it attests who dials before anything is sent.
        if who == ASK || who == UNKNOWN {
            return redirected();
        }
        if who == NOT_ENROLLED {
            return refused(REASON_NO_IDENTITY, counter::REFUSED_NO_IDENTITY);
        }
    } else {
        // Where only the agent could tell whether the task is a workload (`ASK`) it is not confined: others may have the
        // same ids and cgroup as the workload. A task in a cgroup that is not known yet is judged as in the nearest known
        // ancestor.
        if subject.workload == NOT_ENROLLED || subject.workload == ASK {
            return left_alone();
        }
    }
    let row = verdict(config, subject, there.target, there.group, there.port, IPPROTO_TCP);
    if row.action == VERDICT_MESH && there.mode == MODE_MESH {
        redirected()
    } else if row.action == VERDICT_BYPASS {
        bypassed(row.rule, counter::BYPASSED)
    } else {
        refused(REASON_NOT_ALLOWED, counter::REFUSED_NOT_ALLOWED)
    }
}

/// The decision for UDP: datagrams are left alone, unless they are an enrolled workload's to a mesh destination.
#[inline(always)]
fn datagram(config: &Config, there: &There, subject: &Who) -> Decision {
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

/// May this subject send datagrams there?
#[inline(always)]
pub fn may_send(config: &Config, found: &Destination, port: u16, subject: &Who) -> bool {
    datagram(config, &There::of(found, port), subject).action() == PASS
}

/// A datagram on a socket that is not connected. What is allowed is counted and sends no event: there would be one for each
/// datagram.
#[inline(always)]
fn sendmsg(ctx: *mut bpf_sock_addr, dialled: Address, port: u16) -> i32 {
    let Some(config) = config() else { return ALLOW };
    let config = &at_this_moment(config);
    // SAFETY: helpers and fields that this hook may use.
    let (netns, (near, near_port)) = unsafe { (bpf_get_netns_cookie(ctx.cast()), near_end(ctx)) };
    let mut event = events::event(EVENT_REFUSED, REASON_UDP, IPPROTO_UDP);
    event.destination = reached(dialled, &near);
    event.destination_port = port;
    event.task = task();
    if netns != config.netns_cookie {
        return if elsewhere(config, netns, &mut event) { ALLOW } else { REFUSE };
    }
    let Some(found) = destination(config, &event.destination, port) else { return ALLOW };
    if found.mode != MODE_MESH {
        return ALLOW;
    }
    let subject = workload(config, event.task.uid, event.task.gid, event.task.cgroup);
    let who = subject.known();
    let verdict = datagram(config, &There::of(found, port), &subject);
    if verdict.action() == PASS {
        if verdict.kind() != 0 {
            count(verdict.counter());
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
    event.destination_id = found.target as u32;
    count(counter::UDP_REFUSED);
    if who == UNKNOWN {
        event.kind = EVENT_UNKNOWN_CGROUP;
        events::send(&event);
        event.kind = EVENT_REFUSED;
    }
    events::refused(&mut event);
    REFUSE
}

/// Records where a connection that is redirected to the agent wanted to go. Gives the reason where there is no room, else 0.
#[inline(always)]
fn remember(event: &Event, generation: u32, family: u16, agent_port: u16) -> u32 {
    egress_remember(event, generation, family as u32, agent_port as u32)
}

#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn egress_remember(event: *const Event, generation: u32, family: u32, agent_port: u32) -> u32 {
    // SAFETY: the verifier insists that it is null or what it should be.
    let Some(event) = (unsafe { event.as_ref() }) else { return REASON_MAP_FULL };
    let (cookie, uid) = (on_the_stack(&event.cookie), event.task.uid);
    // A socket that dials again has its row already.
    // SAFETY: rows are replaced only by this same socket's next connect.
    let before = unsafe { FLOWS.get(&cookie) }.map(|origin| origin.task.uid);
    let takes = before != Some(uid);
    if takes && !quota::take(uid, QUOTA_FLOWS) {
        return REASON_QUOTA;
    }
    if FLOWS.insert(&cookie, &NO_ORIGIN, 0).is_err() {
        if takes {
            quota::give(uid, QUOTA_FLOWS);
        }
        return REASON_MAP_FULL;
    }
    if takes && let Some(before) = before {
        quota::give(before, QUOTA_FLOWS);
    }
    let Some(origin) = FLOWS.get_ptr_mut(&cookie) else { return REASON_MAP_FULL };
    // SAFETY: a row that the verifier has seen to be there. Nobody looks at it before this call has sent its SYN.
    unsafe {
        (*origin).task = event.task;
        (*origin).cookie = event.cookie;
        (*origin).destination = event.destination;
        (*origin).source = event.source;
        (*origin).destination_port = event.destination_port;
        (*origin).source_port = event.source_port;
        (*origin).destination_id = event.destination_id;
        (*origin).generation = generation;
        (*origin).family = family as u16;
        (*origin).agent_port = agent_port as u16;
        (*origin).thread = bpf_get_current_pid_tgid() as u32;
    }
    0
}

/// A row before it is filled in. Not on the stack, of which the callers need most.
static NO_ORIGIN: Origin = Origin {
    task: NOBODY,
    cookie: 0,
    destination: NOWHERE,
    source: NOWHERE,
    destination_port: 0,
    source_port: 0,
    destination_id: 0,
    generation: 0,
    family: 0,
    agent_port: 0,
    thread: 0,
    arrived: 0,
};

/// Is this the agent's address to which a `connect()` of this socket was redirected? Gives the record of that connection.
#[inline(always)]
pub fn redirected_to(cookie: u64, address: &Address, port: u16) -> Option<&'static Origin> {
    if !is_loopback(address) {
        return None;
    }
    // SAFETY: rows are replaced only by this same socket's next connect.
    let origin = unsafe { FLOWS.get(&cookie) }?;
    if origin.agent_port == port { Some(origin) } else { None }
}

/// The same, if it was redirected by this very call and the agent still listens on that port.
#[inline(always)]
fn redirected_before(config: &Config, cookie: u64, address: &Address, port: u16) -> bool {
    let Some(origin) = redirected_to(cookie, address, port) else { return false };
    // SAFETY: a helper without arguments.
    let age = unsafe { bpf_ktime_get_boot_ns() }.wrapping_sub(origin.task.at);
    let ids = bpf_get_current_uid_gid();
    bpf_get_current_pid_tgid() as u32 == origin.thread
        && (ids as u32, (ids >> 32) as u32) == (origin.task.uid, origin.task.gid)
        && age < ONE_CALL
        && agent_port(outbound_listener(config, cookie, !is_mapped(address))) == port
}

/// A connection that was redirected to the agent is established: from now on the agent reports what becomes of it.
#[inline(always)]
pub fn arrived(ops: *mut bpf_sock_ops) {
    // SAFETY: the helper takes the context.
    let cookie = unsafe { bpf_get_socket_cookie(ops.cast()) };
    if let Some(origin) = FLOWS.get_ptr_mut(&cookie) {
        // SAFETY: a row that the verifier has seen to be there; one store.
        unsafe { addr_of_mut!((*origin).arrived).write_volatile(1) };
    }
}

/// A socket was closed, or dials again. If its connection was redirected to the agent and never arrived there, no audit
/// line tells of it yet, so an event is sent. `event`: memory for that event.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn egress_released(cookie: u64, event: *mut Event) -> u32 {
    // SAFETY: the verifier insists that it is null or what it should be.
    let Some(event) = (unsafe { event.as_mut() }) else { return 0 };
    // SAFETY: rows are replaced only by this same socket's next connect.
    let Some(origin) = (unsafe { FLOWS.get(&cookie) }) else { return 0 };
    if origin.arrived == 0 {
        event.kind = EVENT_REFUSED;
        event.reason = REASON_NEVER_ARRIVED;
        event.protocol = IPPROTO_TCP;
        event.task = origin.task;
        event.cookie = origin.cookie;
        event.source = origin.source;
        event.source_port = origin.source_port;
        event.destination = origin.destination;
        event.destination_port = origin.destination_port;
        event.destination_id = origin.destination_id;
        events::refused(event);
    }
    let uid = origin.task.uid;
    if FLOWS.remove(&cookie).is_ok() {
        quota::give(uid, QUOTA_FLOWS);
    }
    1
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
