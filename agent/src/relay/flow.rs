//! The loop of one flow: both directions, half-close, limits, and how it ends.
//!
//! A turn moves at most one batch each way and never waits; between turns the flow waits for exactly the sockets that
//! it could use, for its clock, or for the order to stop.
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
    /// For the network, as the layer made it.
    up_pending: Pending,
    /// For the application.
    down_pending: Pending,
    up_batch: Batch,
    down_batch: Batch,
    early: Vec<u8>,
    greeting: Greeting,
    /// What ends the flow as soon as `down_pending` is delivered.
    last: Option<Fault>,
    received_any: bool,
    /// The peer can be listened to no further.
    peer_eof: bool,
    /// The peer's application reset this stream of a shared connection.
    aborted: bool,
}

/// A connection that its application has left, and that another may use.
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
    /// The application is given what the peer has sent, and hears it before the peer hears anything.
    Waits,
    /// It goes together with what the application has said by now.
    Joins,
    /// It is like everything else that is pending, or there was none.
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
    /// Closing the application's socket is a reset already (`intercept::prepare`).
    pub(super) fn new(application: TcpStream, network: TcpStream, layer: L, start: Start) -> Self {
        // Until the stream has ended properly, whatever closes the socket is a reset: also the kernel, when the agent was
        // killed. With TLS a FIN without close_notify says the same.
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

    /// After its end: what may be used again. The application's socket is closed, and the network's too if it may not.
    pub(super) fn leave(self, reason: CloseReason) -> Option<HalfClosedParts<L>> {
        let left = self.can_be_left(reason);
        left.then_some(HalfClosedParts { network: self.network, layer: self.layer, pending: self.up_pending })
    }

    fn is_shared(&self) -> bool {
        self.layer.exchange().is_some()
    }
}
