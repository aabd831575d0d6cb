//! What the programs report: counters, and events about what the agent could not know otherwise.
//!
//! *Invariant:* nothing here changes what happens to a connection. An event that does not fit is counted and dropped; a
//! refusal is counted under its kind before its event is sent, so that the agent finds it counted.

use crate::atomic::plus;
use crate::maps::{ALLOWANCES, COUNTERS, EVENTS, REFUSALS};
use aya_ebpf::helpers::bpf_ktime_get_boot_ns;
use bunter_common::*;
use core::ptr::addr_of_mut;

/// Adds one to a counter of `bunter_common::counter`.
#[inline(always)]
pub fn count(which: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(which) {
        // SAFETY: a slot of a per-CPU array, which no other CPU touches and which the verifier has seen to be there.
        unsafe { *counter += 1 }
    }
}

/// Puts an event into the ring buffer. Not inlined: it is the rare way, and its code is the same in every program.
#[inline(never)]
pub fn send(event: &Event) {
    if EVENTS.output(event, 0).is_err() {
        count(counter::EVENTS_LOST);
    }
}

/// Counts a refusal under its kind, and tells it unless one of its kind was told within the last second.
///
/// Where a user has more kinds of refusals in one second than are told, or there is no room for another kind, the refusal
/// is counted without its destination. Only if there is no room for that either is it lost, and counted as a lost event.
#[inline(always)]
pub fn refused(event: &mut Event) {
    tell_refused(event);
}

/// A function that the verifier checks on its own: once, and not again for each caller.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn tell_refused(event: *mut Event) -> u32 {
    // SAFETY: the verifier insists that it is null or an event.
    let Some(event) = (unsafe { event.as_mut() }) else { return 0 };
    count_refusal(event);
    0
}

#[inline(always)]
fn count_refusal(event: &mut Event) {
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    let mut key = RefusalKey {
        destination: event.destination,
        destination_port: event.destination_port as u32,
        uid: event.task.uid,
        reason: event.reason,
        protocol: event.protocol,
    };
    // A known kind is told once in an interval; a new one uses up some of the user's allowance.
    let mut row = REFUSALS.get_ptr_mut(&key);
    let mut new = false;
    if row.is_none() {
        if allowed(event.task.uid, now) {
            new = REFUSALS.insert(&key, &NEVER, 0).is_ok();
            row = REFUSALS.get_ptr_mut(&key);
        }
        if row.is_none() {
            (key.destination, key.destination_port) = (NOWHERE, 0);
            row = REFUSALS.get_ptr_mut(&key);
            if row.is_none() {
                new = REFUSALS.insert(&key, &NEVER, 0).is_ok();
                row = REFUSALS.get_ptr_mut(&key);
            }
            (event.destination, event.destination_port, event.destination_id) = (NOWHERE, 0, 0);
        }
    }
    let Some(row) = row else { return count(counter::EVENTS_LOST) };
    // SAFETY: a row that the verifier has seen to be there. The total is added to in one step. The other fields may be
    // written by two CPUs at once: then both tell, and the agent, which goes by the totals, counts none of them twice.
    unsafe {
        if new {
            (*row).task = event.task;
            (*row).source = event.source;
            (*row).source_port = event.source_port as u32;
            (*row).destination_id = event.destination_id;
        }
        let total = addr_of_mut!((*row).total);
        plus(total, 1);
        (*row).last = now;
        let before = addr_of_mut!((*row).told).read_volatile();
        let told_at = addr_of_mut!((*row).told_at).read_volatile();
        if before != 0 && now.wrapping_sub(told_at) < REFUSAL_INTERVAL {
            return;
        }
        let sum = total.read_volatile();
        (*row).told_at = now;
        (*row).told = sum;
        event.total = sum;
        event.repeats = sum.wrapping_sub(before) as u32;
    }
    send(event);
}

/// May another kind of refusal of this user be told in this interval?
#[inline(always)]
fn allowed(uid: u32, now: u64) -> bool {
    let mut row = ALLOWANCES.get_ptr_mut(&uid);
    if row.is_none() {
        let _ = ALLOWANCES.insert(&uid, &UNUSED, 0);
        row = ALLOWANCES.get_ptr_mut(&uid);
    }
    let Some(row) = row else { return false };
    // SAFETY: a row that the verifier has seen to be there; two CPUs at once may allow one too many.
    unsafe {
        if now.wrapping_sub((*row).since) >= REFUSAL_INTERVAL {
            (*row).since = now;
            (*row).used = 0;
        }
        (*row).used += 1;
        (*row).used <= REFUSALS_PER_UID
    }
}

/// The allowance of a user before anything was refused. Not on the stack, of which the callers need most.
static UNUSED: Allowance = Allowance { since: 0, used: 0, pad: 0 };

/// A row of `REFUSALS` before its first refusal, likewise.
static NEVER: Refusal = Refusal {
    total: 0,
    told: 0,
    told_at: 0,
    last: 0,
    task: NOBODY,
    source: NOWHERE,
    source_port: 0,
    destination_id: 0,
};

/// An event in which nothing is known yet.
#[inline(always)]
pub fn event(kind: u32, reason: u32, protocol: u32) -> Event {
    Event {
        kind,
        reason,
        rule: 0,
        protocol,
        task: NOBODY,
        cookie: 0,
        source: NOWHERE,
        destination: NOWHERE,
        source_port: 0,
        destination_port: 0,
        destination_id: 0,
        total: 0,
        repeats: 0,
        pad: 0,
    }
}

/// No address known.
pub const NOWHERE: Address = [0; 16];

/// No task known.
pub const NOBODY: Task = Task { tgid: 0, uid: 0, gid: 0, workload: 0, cgroup: 0, at: 0, comm: [0; 16] };
