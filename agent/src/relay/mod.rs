//! relay: a `Pipe` in, a `Tally` out. The only place where bytes of an application move.
//!
//! One event loop for each flow carries both directions with TCP's own semantics: half-close either way, reset passed
//! on, back-pressure to the sender. The same loop serves engine `kernel`, engine `user` and plain pipes (`lane`).
//! *Invariant:* bytes arrive unchanged, in order, or the receiving program gets a reset: a stream that was cut never
//! looks like one that ended. A flow that waits holds no buffer but what a slow receiver has not taken yet.

mod buffers;
mod control;
mod flow;
mod kernel;
mod lane;
mod plain;
mod reason;
mod socket;
mod user;

pub use reason::{CloseReason, Stop, Violation};

use crate::offload::{Lane, Pipe};
use flow::Flow;
use kernel::Kernel;
use plain::Plain;
use std::{
    future::Future,
    pin::pin,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use user::User;

/// When a connection that does not move is given up.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Closed after so long without a byte in either direction.
    pub idle: Option<Duration>,
    /// Given up after so long with bytes to deliver to a socket whose send queue is empty: the kernel is stuck. A slow
    /// reader, whose queue is full, is left in peace.
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

/// Carries the bytes of a pipe until both directions have ended, something breaks, or `stop` says so. Both sockets are
/// closed when it returns.
pub fn carry(
    pipe: Pipe,
    limits: &Limits,
    stop: impl Future<Output = Stop>,
    progress: &Progress,
) -> impl Future<Output = Tally> {
    // Not `async fn`: the future of one holds its arguments twice, and this one is held for as long as the connection.
    let Pipe { application, network, lane } = pipe;
    let mut flow = match lane {
        Lane::Plain => Any::Plain(Flow::new(application, network, Plain)),
        Lane::User(keys) => Any::User(Flow::new(application, network, User::new(keys))),
        Lane::Kernel(keys) => Any::Kernel(Flow::new(application, network, Kernel::new(keys))),
    };
    async move {
        let stop = pin!(stop);
        let closed = match &mut flow {
            Any::Plain(flow) => flow.run(limits, stop, progress).await,
            Any::User(flow) => flow.run(limits, stop, progress).await,
            Any::Kernel(flow) => flow.run(limits, stop, progress).await,
        };
        drop(flow);
        Tally { sent: progress.sent(), received: progress.received(), closed }
    }
}

/// A flow of any engine.
enum Any {
    Plain(Flow<Plain>),
    User(Flow<User>),
    Kernel(Flow<Kernel>),
}

#[cfg(test)]
mod tests;
