//! What the programs and the agent know of listening sockets.

use crate::{Address, Task};

/// Key of `LISTENERS`: where a socket is bound. The address is as bound: all zero for an IPv6 wildcard, `::ffff:0.0.0.0` for
/// an IPv4 one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenerKey {
    /// Address as bound.
    pub address: Address,
    /// Cookie of the network namespace.
    pub netns: u64,
    /// Index of the device that the socket is bound to (`SO_BINDTODEVICE`, the scope of a link-local address), or 0; or
    /// [`BOUND_ONLY`].
    pub device: u32,
    /// Port.
    pub port: u16,
    /// 1 for an IPv6 socket that takes no IPv4, as far as that is known, else 0.
    pub ipv6_only: u16,
}

/// [`ListenerKey::device`] for sockets that are left alone, are bound, do not listen, and may share their address with
/// others that do (`SO_REUSEADDR`, `SO_REUSEPORT`). The kernel may choose one of them a moment before the programs hear
/// that it listens.
pub const BOUND_ONLY: u32 = u32::MAX;

/// Value of `LISTENERS`: how many sockets are bound to one address, by their protection. The strictest that is there counts.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listeners {
    /// Three counts in one word, so that all three are read and changed in one step: see [`unit()`]. Bit 63 says that the
    /// row is about to be removed.
    pub counts: u64,
    /// Cookie of the socket that has begun to listen here last, or 0.
    pub cookie: u64,
    /// [`tag`] of the key that the row belongs to: rows are used again for other keys.
    pub tag: u64,
}

/// Bit of [`Listeners::counts`]: the row is about to be removed, and what is added to it is lost.
pub const DYING: u64 = 1 << 63;

/// What one socket with this mode adds to [`Listeners::counts`].
#[must_use]
pub const fn unit(mode: u32) -> u64 {
    match mode {
        LISTENER_LEFT_ALONE => 1,
        LISTENER_UNDECIDED => 1 << 21,
        LISTENER_PROTECTED => 1 << 42,
        _ => 0,
    }
}

/// How many sockets with this mode a row counts.
#[must_use]
pub const fn counted(counts: u64, mode: u32) -> u64 {
    let unit = unit(mode);
    match counts.checked_div(unit) {
        Some(above) => above & 0x1f_ffff,
        None => 0,
    }
}

/// How many sockets a row counts, whatever they are.
#[must_use]
pub const fn all_counted(counts: u64) -> u64 {
    let counts = counts & !DYING;
    (counts & 0x1f_ffff) + (counts >> 21 & 0x1f_ffff) + (counts >> 42)
}

/// The strictest mode that a row counts, or 0.
#[must_use]
pub const fn strictest(counts: u64) -> u32 {
    let counts = counts & !DYING;
    if counts >> 42 != 0 {
        LISTENER_PROTECTED
    } else if counts >> 21 != 0 {
        LISTENER_UNDECIDED
    } else if counts != 0 {
        LISTENER_LEFT_ALONE
    } else {
        0
    }
}

/// A number for the sockets that listen at one address, to be added up over all addresses where the kernel looks for the
/// listener of a connection. The sum changes as soon as a socket comes, goes or takes another's place. 0: there is none.
#[must_use]
pub const fn who_listens(row: &Listeners) -> u64 {
    let all = all_counted(row.counts);
    if all == 0 {
        return 0;
    }
    (row.cookie ^ all << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
}

/// A number by which a row of `LISTENERS` is known to belong to a key.
#[must_use]
pub const fn tag(key: &ListenerKey) -> u64 {
    let low = u64::from_ne_bytes([
        key.address[8],
        key.address[9],
        key.address[10],
        key.address[11],
        key.address[12],
        key.address[13],
        key.address[14],
        key.address[15],
    ]);
    let place = (key.device as u64) << 32 | (key.port as u64) << 16 | key.ipv6_only as u64;
    (low ^ place).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Value of `SOCKETS` (by socket cookie): a socket that is bound or listens, and who bound it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// Who bound it; all zero where nobody was recorded.
    pub binder: Task,
    /// For whom it listens: who bound it, who began to listen, or who was found to hold it.
    pub owner: Task,
    /// Where it is.
    pub key: ListenerKey,
    /// The mode under which `LISTENERS` counts it: one of the `LISTENER_` modes, or 0 where it does not. 64 bits, as the
    /// atomic operations need.
    pub mode: u64,
    /// What the binder is: one of the `LISTENER_` modes.
    pub bound: u32,
    /// 1 while it listens.
    pub listens: u32,
    /// The real user id under which `QUOTAS` counts the row, or [`UNCHARGED`].
    pub charged: u32,
    /// How often somebody who may be enrolled has asked for the name of the socket, until it was protected.
    pub asked: u32,
}

/// [`Socket::charged`] of the agent's own listeners, which count in no user's share.
pub const UNCHARGED: u32 = u32::MAX;

/// Nobody concerned is enrolled: left alone. Never the result of a failed look-up.
pub const LISTENER_LEFT_ALONE: u32 = 1;
/// Not known yet: refused until the agent has said what it is.
pub const LISTENER_UNDECIDED: u32 = 2;
/// Protected: through the agent; refused when there is none.
pub const LISTENER_PROTECTED: u32 = 3;

/// Key of `PROTECTED`: an address that policy protects, whoever listens there and whether anybody does.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProtectedKey {
    /// As in [`ListenerKey`].
    pub address: Address,
    /// Port.
    pub port: u16,
    /// Always zero.
    pub pad: [u16; 3],
}

/// What the agent says about a socket: the input of the program `registry`, which the agent runs by itself
/// (`BPF_PROG_TEST_RUN`). Counts and rows change in the kernel only, so that user space is never in the middle of a change.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// One of the `COMMAND_` kinds.
    pub kind: u32,
    /// The mode that the socket has from here on.
    pub mode: u32,
    /// Which socket.
    pub cookie: u64,
    /// Where it is, for [`COMMAND_RECORD`]; and whether it takes IPv4, for [`COMMAND_SET`].
    pub key: ListenerKey,
    /// For whom it listens; all zero leaves that as it is.
    pub owner: Task,
    /// For [`COMMAND_SET`]: [`Socket::asked`] when it was judged. If somebody has asked since, it is to be judged anew.
    pub asked: u32,
    /// Under which generation of the policy it was judged, or 0: the judgement holds under any.
    pub generation: u32,
}

/// Sets the mode and the owner of a listening socket.
pub const COMMAND_SET: u32 = 1;
/// Records a listening socket that the programs have not seen.
pub const COMMAND_RECORD: u32 = 2;
/// Forgets a socket that is gone.
pub const COMMAND_FORGET: u32 = 3;

/// The command was carried out (`XDP_PASS`).
pub const COMMAND_DONE: u32 = 2;
/// There is no such socket, or it is recorded already, or it has to be judged anew (`XDP_DROP`).
pub const COMMAND_STALE: u32 = 1;
/// A map is full (`XDP_TX`).
pub const COMMAND_FULL: u32 = 3;
