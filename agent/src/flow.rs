//! A connection that came to the agent, and what the kernel recorded about it. `intercept` makes it; every stage after that
//! reads it.
//!
//! *Invariant:* a flow's destination is what the kernel recorded under the connection's own addresses, never a guess.

use bunter_common::Task;
use std::{fmt, net::SocketAddr};

/// Which way a connection goes, seen from this host's workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// A local workload dialled.
    Outbound,
    /// A peer dialled a protected listener of this host.
    Inbound,
}

/// The name that a program, or whoever started it, has given to the task: a hint for people. It may hold any byte, and
/// proves nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Comm([u8; 16]);

impl Comm {
    /// The name of a task.
    pub fn of(task: &Task) -> Self {
        Self(task.comm)
    }

    /// Is there no name?
    pub fn is_empty(&self) -> bool {
        self.bytes().is_empty()
    }

    fn bytes(&self) -> &[u8] {
        self.0.split(|byte| *byte == 0).next().unwrap_or_default()
    }
}

/// A name that is too long is cut off, as the kernel does it.
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

/// An accepted connection and what the kernel recorded about it.
#[derive(Debug)]
pub struct Flow {
    /// Number of the flow on this agent, for logs.
    pub id: u64,
    /// The accepted socket: outbound, the application's end; inbound, the network's end.
    pub socket: tokio::net::TcpStream,
    /// Where the dialling end wanted to go.
    pub destination: OriginalDst,
    /// Outbound: the application's own address as the application sees it. If it did not bind one and the host's address
    /// for the destination is not known, its loopback address and port 0. Inbound: the true client.
    pub source: SocketAddr,
    /// From which side it came, and what is known of that side alone.
    pub origin: Origin,
}

/// From which side a flow came.
#[derive(Debug)]
pub enum Origin {
    /// A local workload dialled.
    Outbound {
        /// The process that dialled.
        task: Task,
        /// What the agent's own connection is bound to: the address that the application bound, or the one that it would have
        /// had, with the port that it bound or 0. `None` where nothing is known.
        dial_from: Option<SocketAddr>,
    },
    /// A peer dialled a protected listener of this host.
    Inbound(Listens),
}

/// Who listens at an address.
#[derive(Debug, Default)]
pub struct Listens {
    /// The process that the listening socket is for, if that was recorded.
    pub task: Option<Task>,
    /// Its cookie, or 0.
    pub cookie: u64,
    /// Others that share the address (`SO_REUSEPORT`), and the cookies of their sockets. A connection may reach any of them.
    pub sharers: Box<[(Task, u64)]>,
    /// [`bunter_common::who_listens`], over all places where the kernel looks. The upstream connection can reach them
    /// alone.
    pub who: u64,
}

impl Listens {
    /// Is that the same socket of the same process, with the same ones sharing its address?
    pub fn is_the_same(&self, other: &Self) -> bool {
        (self.task, self.cookie, self.who) == (other.task, other.cookie, other.who)
    }
}

impl Flow {
    /// Which way.
    pub fn direction(&self) -> Direction {
        match self.origin {
            Origin::Outbound { .. } => Direction::Outbound,
            Origin::Inbound(_) => Direction::Inbound,
        }
    }

    /// The process on this host: outbound, the one that dialled; inbound, the one that the listening socket is for, if that
    /// was recorded.
    pub fn task(&self) -> Option<&Task> {
        match &self.origin {
            Origin::Outbound { task, .. } => Some(task),
            Origin::Inbound(listens) => listens.task.as_ref(),
        }
    }

    /// Who listens where a flow from the network goes.
    pub fn listens(&self) -> Option<&Listens> {
        match &self.origin {
            Origin::Outbound { .. } => None,
            Origin::Inbound(listens) => Some(listens),
        }
    }

    /// What the agent's own connection to the peer is to be bound to.
    pub fn dial_from(&self) -> Option<SocketAddr> {
        match self.origin {
            Origin::Outbound { dial_from, .. } => dial_from,
            Origin::Inbound(_) => None,
        }
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    const NOBODY: Task = Task { tgid: 0, uid: 0, gid: 0, workload: 0, cgroup: 0, at: 0, comm: [0; 16] };

    /// A flow of which nothing is known but where it goes and who is on this host's end.
    pub(crate) fn flow(
        direction: Direction,
        socket: tokio::net::TcpStream,
        destination: SocketAddr,
        task: Option<Task>,
    ) -> Flow {
        let origin = match direction {
            Direction::Outbound => Origin::Outbound { task: task.unwrap_or(NOBODY), dial_from: None },
            Direction::Inbound => Origin::Inbound(Listens { task, ..Listens::default() }),
        };
        Flow { id: 1, socket, destination: OriginalDst(destination), source: destination, origin }
    }
}
