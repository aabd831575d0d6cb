//! Whose handshake is next? A bounded number of handshakes are under way, the others wait, and no tenant alone can have all
//! slots or all of the room to wait.
//!
//! A tenant is a local workload that dials, or the network (or this host) from which a local workload is dialled: who such
//! a peer is will be known only by its handshake. Tenants are nested: users within this host, networks within a wider one.
//! `Queue` decides, without clock or waiting; this module lets the tasks of all shards ask it.
//!
//! *Invariant:* a slot is given back when it is dropped, also where the task that waited for it is cancelled at the moment
//! when it is given.

mod queue;

use crate::{admission::Holder, lock::lock};
use bunter_identity::{
    refusal::{Culprit, Refusal},
    spiffe::SpiffeId,
};
use queue::{Answer, Entry, Queue};
use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard},
};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

/// Who wants to shake hands, as far as that is known before the handshake.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// A local workload, which dials.
    Workload(SpiffeId),
    /// Whoever dials a local workload.
    Peer {
        from: Holder,
        /// The workload that is dialled: peers of one workload do not wait for those of another.
        to: SpiffeId,
    },
}

/// A tenant as its steps, each within the one before. There is at least one.
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

/// Shows the widest tenant, because the room is full by all that are within it.
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

    /// Waits for a slot until the deadline. Cancel safe: a task that is cancelled leaves the queue.
    pub async fn take(self: &Arc<Self>, tenant: Tenant, deadline: Instant) -> Result<Slot, Error> {
        let (tell, told) = oneshot::channel();
        let (ticket, refused) = match self.queue().ask(&tenant.0, tell) {
            Answer::Now => return Ok(self.slot(tenant)),
            Answer::Wait { ticket, refused } => (ticket, refused),
            Answer::Full { own } => return Err(Error::Full { tenant, all: self.room, own }),
        };
        let waiter = Waiter { slots: self, tenant: &tenant, ticket };
        if let Some((tenant, tell, own)) = refused {
            // If the task of the waiter that is refused is gone, nobody has to be told.
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
        // Where the slot was given or refused already, the waiter is not in the queue any more.
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
            // If the waiting task is cancelled at this very moment, the send fails and drops the slot, which gives it to
            // the next one. That happens at most once for each thread, since a task does not await between dropping its
            // receiver and leaving the queue.
            _ = tell.send(Ok(self.slots.slot(Tenant(tenant))));
        }
    }
}

#[cfg(test)]
mod tests;
