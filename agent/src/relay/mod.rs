//! relay: a `Pipe` in, a `Tally` out. The only place where bytes of an application move.
//!
//! One event loop for each flow carries both directions with TCP's own semantics: half-close either way, reset passed on,
//! back-pressure to the sender. The same loop serves engine `kernel`, engine `user` and plain pipes, each by its own
//! `record_layer`.
//! *Invariant:* bytes arrive unchanged and in order, or the receiving program gets a reset: a stream that was cut off never
//! looks like one that ended. A waiting flow holds no buffer but what a slow receiver has not taken yet.

mod buffers;
mod control;
mod exchange;
mod flow;
mod idle;
mod kernel;
mod record_layer;
mod plain;
mod reason;
mod socket;
mod user;

pub use idle::{HalfClosed, IdleSession, SessionState, StartError};
pub use reason::{CloseReason, Stop, Violation};
pub(crate) use socket::first_bytes;

use crate::offload::{Pipe, Protection};
use flow::{Start, Transfer};
use kernel::Kernel;
use plain::Plain;
use std::{
    future::Future,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use user::User;

/// When a connection that does not move is given up.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Closed after so long without a byte in either direction.
    pub idle: Option<Duration>,
    /// Given up after so long with bytes to deliver to a socket whose send queue is empty: then the kernel is stuck. A slow
    /// reader, whose queue is full, is not given up.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { idle: None, stall: Duration::from_secs(60) }
    }
}

/// How far a connection has come, for whoever watches from another thread.
#[derive(Debug, Default)]
pub struct Progress {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Progress {
    /// Bytes from the application to the peer.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
    /// Bytes from the peer to the application.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

/// What a connection came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    /// Bytes from the application to the peer.
    pub sent: u64,
    /// Bytes from the peer to the application.
    pub received: u64,
    /// Why it ended.
    pub closed: CloseReason,
}

/// Carries the bytes of a pipe until both directions have ended, something breaks, or `stop` says so. The application's
/// socket is closed when this returns, and the network's as well unless it is kept for another stream.
pub fn carry(
    pipe: Pipe,
    limits: &Limits,
    stop: impl Future<Output = Stop>,
    progress: &Progress,
) -> impl Future<Output = (Tally, Option<HalfClosed>)> {
    let Pipe { application, network, protection, early, agreement } = pipe;
    let start = Start { early, ..Start::default() };
    let shared = agreement.is_some();
    let flow = match protection {
        Protection::Plain => Any::Plain(Transfer::new(application, network, Plain, start)),
        Protection::User(keys) => Any::User(Transfer::new(application, network, User::new(keys, shared), start)),
        Protection::Kernel(keys) => Any::Kernel(Transfer::new(application, network, Kernel::new(keys, shared), start)),
    };
    idle::run(flow, agreement, limits, stop, progress)
}

/// A flow of any engine.
enum Any {
    Plain(Transfer<Plain>),
    User(Transfer<User>),
    Kernel(Transfer<Kernel>),
}

#[cfg(test)]
mod tests;
