//! How much of a table one user may take: a quarter, so that nobody fills it alone.
//!
//! The programs count under the user's id, with atomic operations, so that no count is lost. Table rows that the agent
//! removes are counted in a row of its own, which nobody else writes. Where there is no room for the count of another user,
//! all further users share one.
//!
//! *Invariant:* every table row that is taken is given back exactly once, under the same user.

use crate::{
    atomic::plus,
    maps::{NO_EXIST, QUOTAS},
};
use bunter_common::*;

/// Rows of `FLOWS` that one user may have. The agent replaces this by a quarter of the rows that the map really has.
#[unsafe(no_mangle)]
static FLOWS_PER_UID: u32 = 131_072 / QUOTA_SHARE;

/// The same for `SOCKETS`.
#[unsafe(no_mangle)]
static SOCKETS_PER_UID: u32 = 131_072 / QUOTA_SHARE;

/// Takes a row of a table for a user. False: the user has as many as one may have. Two CPUs at once may take one too many.
#[inline(always)]
pub fn take(uid: u32, what: u32) -> bool {
    quota_take(uid, what) != 0
}

#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn quota_take(uid: u32, what: u32) -> u32 {
    let Some((row, by_agent)) = row(uid, what) else { return 0 };
    let most = if what == QUOTA_FLOWS { &raw const FLOWS_PER_UID } else { &raw const SOCKETS_PER_UID };
    // SAFETY: the loader overwrites the shares, so they are read in a way that keeps the compiler from assuming their
    // values; and a row that the verifier has seen to be there.
    unsafe {
        // Compared as a signed number: the agent may count what it takes away before the programs have counted it, and then
        // the difference is negative.
        if (row.read_volatile().wrapping_sub(by_agent) as i64) >= most.read_volatile() as i64 {
            return 0;
        }
        plus(row, 1);
    }
    1
}

/// Gives a row back.
#[inline(always)]
pub fn give(uid: u32, what: u32) {
    quota_give(uid, what);
}

#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn quota_give(uid: u32, what: u32) -> u32 {
    let Some((row, _)) = row(uid, what) else { return 0 };
    // SAFETY: a row that the verifier has seen to be there.
    unsafe { plus(row, u64::MAX) };
    1
}

/// The count of a user, and what the agent has given back of it.
#[inline(always)]
fn row(uid: u32, what: u32) -> Option<(*mut u64, u64)> {
    let mut key = QuotaKey { uid, what, by: QUOTA_BY_PROGRAMS };
    let mut row = QUOTAS.get_ptr_mut(&key);
    if row.is_none() {
        let _ = QUOTAS.insert(&key, &0, NO_EXIST);
        row = QUOTAS.get_ptr_mut(&key);
    }
    if row.is_none() {
        key.uid = ANY;
        row = QUOTAS.get_ptr_mut(&key);
    }
    let row = row?;
    key.by = QUOTA_BY_AGENT;
    // SAFETY: one number, read once.
    let by_agent = unsafe { QUOTAS.get(&key) }.map_or(0, |given| *given);
    Some((row, by_agent))
}
