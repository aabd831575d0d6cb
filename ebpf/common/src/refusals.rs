//! How refusals are counted by their kind, and rows by their user.

use crate::{Address, Task};

/// Key of `QUOTAS`: how many rows of a table a user has. The value is a number; what the agent gives back is counted in a row
/// of its own. The agent makes the row of [`ANY`](crate::ANY), for users who came when the map was full.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuotaKey {
    /// Real user id.
    pub uid: u32,
    /// One of the `QUOTA_` tables.
    pub what: u32,
    /// [`QUOTA_BY_PROGRAMS`] or [`QUOTA_BY_AGENT`].
    pub by: u32,
}

/// Rows of `FLOWS`.
pub const QUOTA_FLOWS: u32 = 1;
/// Rows of `SOCKETS`.
pub const QUOTA_SOCKETS: u32 = 2;
/// What the programs have taken and given back.
pub const QUOTA_BY_PROGRAMS: u32 = 0;
/// What the agent has given back.
pub const QUOTA_BY_AGENT: u32 = 1;
/// One user may have a table's rows divided by this.
pub const QUOTA_SHARE: u32 = 4;

/// Key of `REFUSALS`: refusals with equal keys are reported as one kind. Where a user has had more kinds of refusals in a
/// second than are told one by one, or the map is full, address and port are zero and stand for all.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RefusalKey {
    /// Destination address as dialled; for a listener, the address that was dialled.
    pub destination: Address,
    /// Destination port.
    pub destination_port: u32,
    /// Real user id of the task, or owner of the socket.
    pub uid: u32,
    /// One of the `REASON_` codes.
    pub reason: u32,
    /// IPPROTO_TCP or IPPROTO_UDP.
    pub protocol: u32,
}

/// Value of `REFUSALS`. The programs only ever add to `total`, so that no count is lost between them and the agent, which
/// remembers how many of them it has written down.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// How many there were.
    pub total: u64,
    /// How many of them an event has stood for.
    pub told: u64,
    /// `CLOCK_BOOTTIME` in nanoseconds of the last event.
    pub told_at: u64,
    /// `CLOCK_BOOTTIME` in nanoseconds of the last refusal.
    pub last: u64,
    /// Who was refused first.
    pub task: Task,
    /// Its source address as far as known.
    pub source: Address,
    /// Its source port.
    pub source_port: u32,
    /// Number of the destination entry.
    pub destination_id: u32,
}

/// Nanoseconds within which a refusal of one kind is told once.
pub const REFUSAL_INTERVAL: u64 = 1_000_000_000;
/// Kinds of refusals that are told of one user in a [`REFUSAL_INTERVAL`]; what comes beyond is told without its destination.
pub const REFUSALS_PER_UID: u32 = 32;

/// Value of `ALLOWANCES` (by uid): how many kinds of refusals are still told of a user.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// `CLOCK_BOOTTIME` in nanoseconds when the interval began.
    pub since: u64,
    /// How many were told in it.
    pub used: u32,
    /// Always zero.
    pub pad: u32,
}
