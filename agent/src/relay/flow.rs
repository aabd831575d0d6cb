//! The loop of one flow: both directions, half-close, limits, and how it ends.
//!
//! A turn moves at most one batch each way and never waits. Between turns the flow waits for exactly the sockets that it
//! can use, for its deadline, or for the order to stop.
//! *Invariant:* nothing is read from one socket while the other has not taken what was read before.

mod pump;
mod waiting;
mod ending;

pub(super) use ending::{end, network_fault};

use super::{
    CloseReason, Limits, Progress, Stop,
    buffers::{Batch, Pending, with_scratch},
    record_layer::{Fault, RecordLayer},
};
use ending::reset;
use std::{
    future::Future,
    pin::{Pin, pin},
};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep_until},
};
use waiting::{Moved, Woken, stalled};

/// What a flow begins with.
#[derive(Default)]
pub(super) struct Start {
    /// The application's first bytes, which are not in its socket any more.
    pub(super) early: Vec<u8>,
    /// What the peer has to hear before anything else.
    pub(super) greeting: Pending,
}

pub(super) struct Transfer<L> {
    application: TcpStream,
    network: TcpStream,
    layer: L,
    up: Half,
    down: Half,
    /// Bytes for the network, as the record layer made them.
    up_pending: Pending,
    /// Bytes for the application.
    down_pending: Pending,
    up_batch: Batch,
    down_batch: Batch,
    early: Vec<u8>,
    greeting: Greeting,
    /// The fault that ends the flow as soon as `down_pending` is delivered.
    last: Option<Fault>,
    received_any: bool,
    /// Nothing more can be received from the peer.
    peer_eof: bool,
    /// The peer's application reset this stream of a shared connection.
    aborted: bool,
}

/// A connection whose application is gone, and that another application may use.
pub(super) struct HalfClosedParts<L> {
    pub(super) network: TcpStream,
    pub(super) layer: L,
    pub(super) pending: Pending,
}

/// How far one direction has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Half {
    /// Bytes may come.
    Open,
    /// The sender has ended; what is pending has to go first.
    Ended,
    /// The receiver will be told when everything has left.
    Draining,
    /// The receiver has been told.
    Closed,
}

/// How far the greeting has come, which lies in `up_pending`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Greeting {
    /// Not sent yet: what the peer has sent is given to the application first, so that its answer can go out with the
    /// greeting.
    Waits,
    /// The greeting goes out together with what the application has written by now.
    Joins,
    /// The greeting is pending like any other bytes, has been sent, or there was none.
    Said,
}

/// What the flow can use now.
#[derive(Clone, Copy, Debug, Default)]
struct Wants {
    application_read: bool,
    application_write: bool,
    network_read: bool,
    network_write: bool,
    /// There is more to do at once.
    more: bool,
}

impl<L: RecordLayer> Transfer<L> {
    /// The application's socket is already set to send a reset when it is closed (`intercept::prepare`).
    pub(super) fn new(application: TcpStream, network: TcpStream, layer: L, start: Start) -> Self {
        // Until the stream has ended in order, closing the socket must send a reset, also when the kernel closes it because
        // the agent was killed. With TLS that is not needed: a FIN without close_notify tells the peer the same.
        if !L::TLS {
            reset(&network);
        }
        let greeting = if start.greeting.is_empty() { Greeting::Said } else { Greeting::Waits };
        Self {
            application,
            network,
            layer,
            up: Half::Open,
            down: Half::Open,
            up_pending: start.greeting,
            down_pending: Pending::default(),
            up_batch: Batch::new(),
            down_batch: Batch::new(),
            early: start.early,
            greeting,
            last: None,
            received_any: false,
            peer_eof: false,
            aborted: false,
        }
    }

    pub(super) async fn run(
        &mut self,
        limits: &Limits,
        mut stop: Pin<&mut impl Future<Output = Stop>>,
        progress: &Progress,
    ) -> CloseReason {
        let mut clock = pin!(sleep_until(Instant::now()));
        let mut moved = Moved::now(self.marks(progress));
        let reason = loop {
            let wants = match with_scratch(|scratch| self.pump(scratch, progress)) {
                Ok(wants) => wants,
                Err(reason) => break reason,
            };
            if (self.up, self.down) == (Half::Closed, Half::Closed) {
                break CloseReason::Complete;
            }
            moved.compare(self.marks(progress));
            self.layer.rest();
            let deadline = self.deadline(limits, &moved);
            let over = match self.wait(wants, deadline, stop.as_mut(), clock.as_mut()).await {
                Woken::Again => stalled(deadline).filter(|reason| self.is_over(*reason, limits, &mut moved)),
                Woken::Failed(side) => self.failure(side),
                Woken::Late => {
                    let reason = deadline.and_then(|(_, reason)| reason);
                    reason.filter(|reason| self.is_over(*reason, limits, &mut moved))
                }
                Woken::Stopped(stop) => Some(CloseReason::Stopped(stop)),
            };
            if let Some(reason) = over {
                break reason;
            }
        };
        self.close(reason);
        reason
    }

    /// To be called after `run`: gives the parts of a session that may be used again. Closes the application's socket, and
    /// the network's as well where nothing may be used again.
    pub(super) fn leave(self, reason: CloseReason) -> Option<HalfClosedParts<L>> {
        let left = self.can_be_left(reason);
        left.then_some(HalfClosedParts { network: self.network, layer: self.layer, pending: self.up_pending })
    }

    fn is_shared(&self) -> bool {
        self.layer.exchange().is_some()
    }
}
