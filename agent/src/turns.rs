//! Whose handshake is next? At most so many are under way, the others wait, and neither the turns nor the room to wait can
//! be had by one party alone.
//!
//! A party is a local workload that dials, or the network of a peer that dials one: who the peer is, its handshake has yet
//! to show. `Queue` decides, without clock or waiting; this is how the tasks of all shards ask it.
//!
//! *Invariant:* a turn is given back by a drop, also where whoever waited for it went away at that very moment.

mod queue;

use crate::{
    lock::lock,
    refusal::{Culprit, Refusal},
    spiffe::SpiffeId,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use queue::{Answer, Queue, Ticket};
use std::{
    fmt,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard},
};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

/// Who wants to shake hands, as far as that is known before.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Party {
    /// A local workload, which dials.
    Workload(SpiffeId),
    /// Whoever dials a local workload from one network.
    Network {
        /// An IPv4 address, or the /64 of an IPv6 address: whoever has one of those has all of them (RFC 6177).
        from: IpNet,
        /// The workload that is dialled: a peer of one does not wait for the peers of another.
        to: SpiffeId,
    },
}

impl Party {
    /// The party of a peer at this address.
    pub fn peer(from: IpAddr, to: SpiffeId) -> Self {
        let from = match from.to_canonical() {
            IpAddr::V4(four) => IpNet::V4(Ipv4Net::from(four)),
            IpAddr::V6(six) => IpNet::V6(Ipv6Net::new_assert(six, 64).trunc()),
        };
        Self::Network { from, to }
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(id) => id.fmt(f),
            Self::Network { from, to } if from.prefix_len() == from.max_prefix_len() => {
                write!(f, "{} to {to}", from.addr())
            }
            Self::Network { from, to } => write!(f, "{from} to {to}"),
        }
    }
}

/// Why there is no turn.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no room to wait, and nobody takes more of it than this party.
    #[error("{all} handshakes wait, which is [limits] waiting, and {own} of them are those of {party}")]
    Full {
        /// Whose handshake it is.
        party: Party,
        /// Handshakes that wait.
        all: usize,
        /// Those of this party.
        own: usize,
    },
    /// The time for the handshake was over before it could begin.
    #[error(
        "no turn came within [timeouts] handshake: {own} handshakes of {party} wait, and [limits] handshakes are under way"
    )]
    Late {
        /// Whose handshake it is.
        party: Party,
        /// Handshakes of this party that wait, this one included.
        own: usize,
    },
}

impl Error {
    fn party(&self) -> &Party {
        match self {
            Self::Full { party, .. } | Self::Late { party, .. } => party,
        }
    }
}

impl Refusal for Error {
    fn culprit(&self) -> Culprit {
        match (self, self.party()) {
            (Self::Full { .. }, Party::Network { .. }) => Culprit::Peer,
            // The program dials more than this host can take.
            (Self::Full { .. }, Party::Workload(_)) | (Self::Late { .. }, _) => Culprit::Host,
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Self::Full { .. } => "handshake-queue-full",
            Self::Late { .. } => "handshake-queue-late",
        }
    }
}

/// The turns of all shards.
#[derive(Debug)]
pub struct Turns {
    queue: Mutex<Queue<Party, oneshot::Sender<Result<Turn, Error>>>>,
    room: usize,
}

impl Turns {
    /// So many handshakes may be under way, and so many more may wait.
    pub fn new(turns: usize, room: usize) -> Arc<Self> {
        Arc::new(Self { queue: Mutex::new(Queue::new(turns, room)), room })
    }

    /// Waits for a turn until the deadline. Cancel safe: who goes away leaves the line.
    pub async fn take(self: &Arc<Self>, party: Party, deadline: Instant) -> Result<Turn, Error> {
        let (tell, told) = oneshot::channel();
        let (ticket, refused) = match self.queue().ask(party.clone(), tell) {
            Answer::Now => return Ok(self.turn(party)),
            Answer::Wait { ticket, refused } => (ticket, refused),
            Answer::Full { own } => return Err(Error::Full { party, all: self.room, own }),
        };
        let waiter = Waiter { turns: self, party: &party, ticket };
        if let Some((party, tell, own)) = refused {
            // Whoever is not there any more has nothing to be told.
            _ = tell.send(Err(Error::Full { party, all: self.room, own }));
        }
        let outcome = timeout_at(deadline, told).await;
        let own = self.queue().waiting_for(&party);
        drop(waiter);
        match outcome {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) | Err(_) => Err(Error::Late { party, own }),
        }
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.queue().waiting()
    }

    fn turn(self: &Arc<Self>, party: Party) -> Turn {
        Turn { turns: self.clone(), party }
    }

    fn queue(&self) -> MutexGuard<'_, Queue<Party, oneshot::Sender<Result<Turn, Error>>>> {
        lock(&self.queue)
    }
}

/// Somebody in the line, until this is dropped.
struct Waiter<'a> {
    turns: &'a Turns,
    party: &'a Party,
    ticket: Ticket,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        // Where the turn has come already, or was refused, there is nobody in the line any more.
        let gone = self.turns.queue().leave(self.party, self.ticket);
        drop(gone);
    }
}

/// A handshake that may be under way, until this is dropped.
#[derive(Debug)]
pub struct Turn {
    turns: Arc<Turns>,
    party: Party,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let next = self.turns.queue().done(&self.party);
        if let Some((party, tell)) = next {
            // Whoever went away at this very moment gives the turn back, by the drop of what cannot be sent: once for each
            // thread at most, since between the two halves of its leaving nothing waits.
            _ = tell.send(Ok(self.turns.turn(party)));
        }
    }
}

#[cfg(test)]
mod tests;
