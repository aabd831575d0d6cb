//! intercept: sockets in, a [`Flow`] out.
//!
//! The kernel programs of `ebpf/` turn connections to the agent. [`Programs`] loads and attaches them, puts policies into
//! their maps and tells what they have to tell, on the control runtime. Each shard has a [`Door`]: accepted connections come
//! in with what the kernel recorded about them, the agent's own connections go out.
//!
//! ```text
//! control:  Programs::load ▶ doorways ▶ install(policy) ▶ listeners ▶ notice, notice, ...      release()
//! shard:    Doorway::open ▶ Door ▶ accept_outbound / accept_inbound ▶ Flow ... Dialler: dial / leg
//! ```
//!
//! In this order at start: `load`, `install`, then `listeners` and `set_listener_mode` for each, then `preexisting`. After a
//! reload: `install`, and the listeners again, since the new policy may see their owners with other eyes.
//!
//! *Invariant:* a flow's destination is what the kernel recorded under the connection's own addresses, never a guess.

mod cgroups;
mod control;
mod diagnostics;
mod door;
mod error;
mod host;
mod install;
mod layout;
mod owners;
mod programs;
mod refusals;
mod registry;
mod room;
mod tables;
mod work;

pub use control::{Notice, OldConnection, Options, Programs};
pub use diagnostics::user_of;
#[cfg(test)]
pub(crate) use door::{Congestion, prepare};
pub use door::{Dialler, Door, Doorway, Listens, Opening, claim_listener};
pub use error::{Error, Holder};
pub use host::{Finding, findings, hold_against_host};
pub use install::{KernelFacts, Outlook, Prepared};
pub use owners::{Held, Walk};
pub use programs::release;
pub use refusals::Refused;
pub use registry::Listening;
pub use room::{Room, Rooms};
pub use tables::{address, canonical, ip, listener_key, socket_address};
pub use work::Work;

use std::{fmt, net::SocketAddr};
use wimsey_common::Task;

/// Which way a connection goes, seen from this host's workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// A local workload dialled.
    Outbound,
    /// A peer dialled a protected listener of this host.
    Inbound,
}

/// What a program calls itself, or whoever started it: a hint for people. It may hold any byte, and proves nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Comm([u8; 16]);

impl Comm {
    /// The name of a task.
    pub fn of(task: &Task) -> Self {
        Self(task.comm)
    }

    /// Has it none?
    pub fn is_empty(&self) -> bool {
        self.bytes().is_empty()
    }

    fn bytes(&self) -> &[u8] {
        self.0.split(|byte| *byte == 0).next().unwrap_or_default()
    }
}

/// What does not fit into it is cut off, as the kernel does it.
impl From<&str> for Comm {
    fn from(name: &str) -> Self {
        let mut bytes = [0; 16];
        bytes.iter_mut().zip(name.bytes()).take(15).for_each(|(to, from)| *to = from);
        Self(bytes)
    }
}

impl fmt::Display for Comm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(self.bytes()))
    }
}

impl serde::Serialize for Comm {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&String::from_utf8_lossy(self.bytes()))
    }
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
    /// Outbound: the first bytes of the application, where they have been taken off its socket already.
    pub early: Vec<u8>,
    /// Where the dialling end wanted to go.
    pub destination: OriginalDst,
    /// Outbound: the application's own address as it sees it. Where it did not bind one and the host's address for the
    /// destination is not known, its loopback address, and port 0.
    /// Inbound: the true client.
    pub source: SocketAddr,
    /// Outbound: what [`Dialler::dial`] binds to: the address that the application bound, or the one that it would have had, with
    /// the port that it bound or 0. `None` where nothing is known.
    pub dial_from: Option<SocketAddr>,
    /// Outbound: the process that dialled. Inbound: the process that bound the listener, if any was recorded.
    pub task: Option<Task>,
    /// Inbound: others that share the listener's address (`SO_REUSEPORT`), and the cookies of their sockets. The connection may
    /// reach any of them.
    pub sharers: Box<[(Task, u64)]>,
    /// Outbound: cookie of the application's socket.
    pub cookie: u64,
    /// Inbound: cookie of the listening socket.
    pub listener_cookie: u64,
    /// Inbound: who listened when it was looked at ([`wimsey_common::who_listens`]). The last leg is for them alone.
    pub listeners: u64,
}
