//! What the programs leave for people to see: counters, and events for what the agent could not know.
//!
//! *Invariant:* nothing here changes what happens to a connection. An event that does not fit is counted and dropped.

use crate::maps::{COUNTERS, EVENTS};
use wimsey_common::{Address, Event, Task, counter};

/// Adds one to a counter of `wimsey_common::counter`.
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
    }
}

/// No address known.
pub const NOWHERE: Address = [0; 16];

/// No task known.
pub const NOBODY: Task = Task { tgid: 0, uid: 0, gid: 0, workload: 0, cgroup: 0, at: 0, comm: [0; 16] };
