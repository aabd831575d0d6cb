//! Whose handshake is next? At most so many are under way, the others wait, and neither the slots nor the room to wait can
//! be had by one tenant alone.
//!
//! A tenant is a local workload that dials, or whoever dials one from this host or a network: who the peer is, its handshake
//! has yet to show. Tenants are within tenants: users of this host, networks of a wider one. `Queue` decides, without clock
//! or waiting; this is how the tasks of all shards ask it.
//!
//! *Invariant:* a slot is given back by a drop, also where whoever waited for it went away at that very moment.

mod queue;

use crate::{admission::Holder, lock::lock};
use queue::{Answer, Entry, Queue};
use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard},
};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};
use wimsey_identity::{
    refusal::{Culprit, Refusal},
    spiffe::SpiffeId,
};

/// Who wants to shake hands, as far as that is known before.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// A local workload, which dials.
    Workload(SpiffeId),
    /// Whoever dials a local workload.
    Peer {
        from: Holder,
        /// The workload that is dialled: a peer of one does not wait for the peers of another.
        to: SpiffeId,
    },
}

/// The same, each within the one before. None is empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant(Box<[Step]>);

impl Tenant {
    /// A local workload, which dials.
    pub fn workload(id: SpiffeId) -> Self {
        Self([Step::Workload(id)].into())
    }

    /// Whoever dials a local workload and has yet to show who it is.
    pub fn peer(from: &[Holder], to: &SpiffeId) -> Self {
        Self(from.iter().map(|from| Step::Peer { from: from.clone(), to: to.clone() }).collect())
    }

    fn dials_out(&self) -> bool {
        matches!(*self.0, [Step::Workload(_), ..])
    }
}

/// The widest tenant: what is full is full by all that are within it.
impl fmt::Display for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.first() {
            Some(Step::Workload(id)) => id.fmt(f),
            Some(Step::Peer { from, to }) => write!(f, "{from} to {to}"),
            None => f.write_str("nobody"),
        }
    }
}

/// Why there is no slot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no room to wait, and nobody takes more of it than this tenant.
    #[error("{all} handshakes wait, which is [limits] waiting, and {own} of them are those of {tenant}")]
    Full {
        /// Whose handshake it is.
        tenant: Tenant,
        /// Handshakes that wait.
        all: usize,
        /// Those of this tenant.
        own: usize,
    },
    /// The time for the handshake was over before it could begin.
    #[error(
        "no slot came within [timeouts] handshake: {own} handshakes of {tenant} wait, and [limits] handshakes are under way"
    )]
    Late {
        /// Whose handshake it is.
        tenant: Tenant,
        /// Handshakes of this tenant that wait, this one included.
        own: usize,
    },
}

impl Refusal for Error {
    fn culprit(&self) -> Culprit {
        match self {
            Self::Full { tenant, .. } if !tenant.dials_out() => Culprit::Peer,
            // The program dials more than this host can take.
            Self::Full { .. } | Self::Late { .. } => Culprit::Host,
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Self::Full { .. } => "handshake-queue-full",
            Self::Late { .. } => "handshake-queue-late",
        }
    }
}

/// The slots of all shards.
#[derive(Debug)]
pub struct HandshakeSlots {
    queue: Mutex<Queue<Step, oneshot::Sender<Result<Slot, Error>>>>,
    room: usize,
}

impl HandshakeSlots {
    /// So many handshakes may be under way, and so many more may wait.
    pub fn new(slots: usize, room: usize) -> Arc<Self> {
        Arc::new(Self { queue: Mutex::new(Queue::new(slots, room)), room })
    }

    /// Waits for a slot until the deadline. Cancel safe: who goes away leaves the queue.
    pub async fn take(self: &Arc<Self>, tenant: Tenant, deadline: Instant) -> Result<Slot, Error> {
        let (tell, told) = oneshot::channel();
        let (ticket, refused) = match self.queue().ask(&tenant.0, tell) {
            Answer::Now => return Ok(self.slot(tenant)),
            Answer::Wait { ticket, refused } => (ticket, refused),
            Answer::Full { own } => return Err(Error::Full { tenant, all: self.room, own }),
        };
        let waiter = Waiter { slots: self, tenant: &tenant, ticket };
        if let Some((tenant, tell, own)) = refused {
            // Whoever is not there any more has nothing to be told.
            _ = tell.send(Err(Error::Full { tenant: Tenant(tenant), all: self.room, own }));
        }
        let outcome = timeout_at(deadline, told).await;
        let own = self.queue().waiting_for(&tenant.0);
        drop(waiter);
        match outcome {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) | Err(_) => Err(Error::Late { tenant, own }),
        }
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.queue().waiting()
    }

    fn slot(self: &Arc<Self>, tenant: Tenant) -> Slot {
        Slot { slots: self.clone(), tenant }
    }

    fn queue(&self) -> MutexGuard<'_, Queue<Step, oneshot::Sender<Result<Slot, Error>>>> {
        lock(&self.queue)
    }
}

/// Somebody in the queue, until this is dropped.
struct Waiter<'a> {
    slots: &'a HandshakeSlots,
    tenant: &'a Tenant,
    ticket: Entry,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        // Where the slot has come already, or was refused, there is nobody in the queue any more.
        let gone = self.slots.queue().leave(&self.tenant.0, self.ticket);
        drop(gone);
    }
}

/// A handshake that may be under way, until this is dropped.
#[derive(Debug)]
pub struct Slot {
    slots: Arc<HandshakeSlots>,
    tenant: Tenant,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let next = self.slots.queue().done(&self.tenant.0);
        for (tenant, tell) in next {
            // Whoever went away at this very moment gives the slot back, by the drop of what cannot be sent: once for each
            // thread at most, since between the two halves of its leaving nothing waits.
            _ = tell.send(Ok(self.slots.slot(Tenant(tenant))));
        }
    }
}

#[cfg(test)]
mod tests;
