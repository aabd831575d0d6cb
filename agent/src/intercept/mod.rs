//! intercept: sockets in, a `Flow` out.

use std::net::SocketAddr;
use wimsey_common::Task;

/// Which way a connection goes, seen from this host's workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// A local workload dialled.
    Outbound,
    /// A peer dialled a protected listener of this host.
    Inbound,
}

/// The address that the dialling end dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OriginalDst(pub SocketAddr);

/// An accepted connection and what the kernel recorded about it. Outbound, `socket` is the application's end; inbound, it
/// is the network's end.
#[derive(Debug)]
pub struct Flow {
    /// Number of the flow on this agent, for logs.
    pub id: u64,
    /// Which way.
    pub direction: Direction,
    /// The accepted socket.
    pub socket: tokio::net::TcpStream,
    /// Where the dialling end wanted to go.
    pub destination: OriginalDst,
    /// Outbound: the application's own address as it sees it (port 0 where it did not bind one and the hint is unknown).
    /// Inbound: the true client.
    pub source: SocketAddr,
    /// Outbound: the process that dialled. Inbound: the process that bound the listener, if any was recorded.
    pub task: Option<Task>,
    /// Inbound: cookie of the listening socket.
    pub listener_cookie: u64,
}
