//! A shared connection between two streams: what is left of one stream, the wait for the next, and how the next one begins.
//!
//! *Invariant:* an [`IdleSession`] has no byte of any application in it or on its way to it: both directions of its last
//! stream have ended. Whatever goes wrong here ends the connection, and no application loses a byte by that, unless
//! [`StartError::lost`] says that it may have.

use super::{
    Any, CloseReason, Limits, Progress, Stop, Tally, Violation,
    buffers::{Batch, Pending, with_scratch},
    exchange::{Exchange, FrameKind},
    flow::{self, Start, Transfer, network_fault},
    kernel::Kernel,
    record_layer::{ControlRecord, Fault, RecordLayer, Then},
    socket,
    user::User,
};
use crate::{handshake::Agreement, offload::Engine};
use std::{
    future::Future,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::{io::Interest, net::TcpStream, time::timeout};

/// How long the peer may take to end a stream that this side's application has reset.
const DRAIN: Duration = Duration::from_secs(5);
/// ... and how many bytes of that stream may still arrive: what two sockets and a batch hold.
const DRAIN_BYTES: usize = 32 << 20;

/// The engine's side of a shared connection, without its socket.
pub struct SessionState {
    kept: Kept,
    agreement: Arc<Agreement>,
}

/// A shared connection whose stream has ended for this side's application, while the peer may not have said so yet.
pub struct HalfClosed {
    network: TcpStream,
    pending: Pending,
    shared: SessionState,
}

/// A shared connection between two streams, or one whose next stream has begun and is not carried yet.
pub struct IdleSession {
    network: TcpStream,
    /// Bytes of the application that went with `begin`.
    sent: u64,
    /// `ready`, which goes with the workload's first bytes.
    greeting: Pending,
    shared: SessionState,
}

/// Why a stream has not begun.
#[derive(Debug)]
pub struct StartError {
    /// What happened to the connection.
    pub reason: CloseReason,
    /// May the workload have been given the bytes that went with `begin`? Then they must not be sent again.
    pub lost: bool,
}

pub(super) enum Kept {
    User(User),
    Kernel(Kernel),
}

/// The same for both engines.
macro_rules! with_layer {
    ($kept:expr, $layer:ident => $body:expr) => {
        match $kept {
            Kept::User($layer) => $body,
            Kept::Kernel($layer) => $body,
        }
    };
}

/// Runs a flow, and gives back what may be used again.
#[expect(clippy::manual_async_fn, reason = "an async fn holds its arguments twice, and this as long as the connection")]
pub(super) fn run(
    mut flow: Any,
    agreement: Option<Arc<Agreement>>,
    limits: &Limits,
    stop: impl Future<Output = Stop>,
    progress: &Progress,
) -> impl Future<Output = (Tally, Option<HalfClosed>)> {
    async move {
        let stop = pin!(stop);
        let closed = match &mut flow {
            Any::Plain(flow) => flow.run(limits, stop, progress).await,
            Any::User(flow) => flow.run(limits, stop, progress).await,
            Any::Kernel(flow) => flow.run(limits, stop, progress).await,
        };
        let left = match flow {
            Any::Plain(_) => None,
            Any::User(flow) => flow.leave(closed).map(|left| (left.network, left.pending, Kept::User(left.layer))),
            Any::Kernel(flow) => flow.leave(closed).map(|left| (left.network, left.pending, Kept::Kernel(left.layer))),
        };
        let left = left.zip(agreement).map(|((network, pending, kept), agreement)| HalfClosed {
            network,
            pending,
            shared: SessionState { kept, agreement },
        });
        let tally = Tally { sent: progress.sent(), received: progress.received(), closed };
        (tally, left)
    }
}

impl HalfClosed {
    /// Ends the directions of the stream that are still open: tells the peer that this side's application is gone, and
    /// drops what still arrives for it. None: the connection is closed.
    pub async fn drain(self) -> Option<IdleSession> {
        let Self { network, mut pending, mut shared } = self;
        let drained =
            with_layer!(&mut shared.kept, layer => timeout(DRAIN, drain(&network, layer, &mut pending)).await);
        matches!(drained, Ok(Ok(()))).then(|| IdleSession::new(network, shared))
    }
}

impl IdleSession {
    fn new(network: TcpStream, shared: SessionState) -> Self {
        Self { network, sent: 0, greeting: Pending::default(), shared }
    }

    /// What its two ends agreed on.
    pub fn agreement(&self) -> &Arc<Agreement> {
        &self.shared.agreement
    }

    /// Who protects its records.
    pub fn engine(&self) -> Engine {
        match self.shared.kept {
            Kept::User(_) => Engine::User,
            Kept::Kernel(_) => Engine::Kernel,
        }
    }

    /// Number of its last stream; the handshake began the first.
    pub fn streams(&self) -> u32 {
        self.shared.streams()
    }

    /// The client: begins the next stream with the first bytes of its application, at most a record of them, and waits until
    /// the server's workload has accepted.
    pub async fn begin(&mut self, early: &[u8]) -> Result<(), StartError> {
        let Self { network, shared, sent, .. } = self;
        *sent = early.len() as u64;
        with_layer!(&mut shared.kept, layer => begin(network, layer, early).await)
    }

    /// The server: waits for the next stream. Cancel safe. A connection that the client does not use again ends with an
    /// error here.
    pub async fn next(&mut self) -> Result<(), CloseReason> {
        let Self { network, shared, .. } = self;
        with_layer!(&mut shared.kept, layer => expect(network, layer, FrameKind::Begin).await).map_err(network_fault)
    }

    /// Separates the socket from the engine's side, so that the next stream can be made a flow of its own.
    pub(crate) fn into_parts(self) -> (TcpStream, SessionState) {
        (self.network, self.shared)
    }

    /// Carries a stream that has begun, as [`super::carry`] does the first. `early`: bytes of the application that are
    /// neither in its socket any more nor went with `begin`.
    pub(crate) fn carry(
        self,
        application: TcpStream,
        early: Vec<u8>,
        limits: &Limits,
        stop: impl Future<Output = Stop>,
        progress: &Progress,
    ) -> impl Future<Output = (Tally, Option<HalfClosed>)> {
        let Self { network, sent, greeting, shared: SessionState { kept, agreement } } = self;
        progress.sent.fetch_add(sent, Ordering::Relaxed);
        let start = Start { early, greeting };
        let flow = match kept {
            Kept::User(layer) => Any::User(Transfer::new(application, network, layer, start)),
            Kept::Kernel(layer) => Any::Kernel(Transfer::new(application, network, layer, start)),
        };
        run(flow, Some(agreement), limits, stop, progress)
    }

    /// Ends the connection in order.
    pub fn close(self) {
        self.shared.close(&self.network);
    }
}

impl SessionState {
    /// What the two ends agreed on.
    pub(crate) fn agreement(&self) -> &Arc<Agreement> {
        &self.agreement
    }

    /// Number of the last stream.
    pub(crate) fn streams(&self) -> u32 {
        with_layer!(&self.kept, layer => layer.exchange()).map_or(0, |exchange| exchange.number())
    }

    /// The server: are the client's first bytes here already, so that they can go to the workload at once?
    pub(crate) fn has_early_data(&self) -> bool {
        with_layer!(&self.kept, layer => layer.has_record())
    }

    /// The server: its workload has accepted. `network` is the socket of this connection. Where the layer leaves sending to
    /// this process, the client is told when the stream is carried.
    pub(crate) async fn ready(mut self, network: TcpStream) -> Result<IdleSession, CloseReason> {
        let mut greeting = Pending::default();
        let ready = ControlRecord::Frame(FrameKind::Ready);
        let sent = with_layer!(&mut self.kept, layer => send(&network, layer, ready, &mut greeting).await);
        sent.map_err(network_fault)?;
        Ok(IdleSession { greeting, ..IdleSession::new(network, self) })
    }

    /// Ends the connection whose socket is `network` in order. Before `ready` this tells the client that no workload has
    /// been given a byte.
    pub(crate) fn close(mut self, network: &TcpStream) {
        let mut pending = Pending::default();
        with_layer!(&mut self.kept, layer => {
            // If close_notify cannot be sent, the peer learns of the end by the FIN.
            if let Ok(true) = layer.send(network, ControlRecord::CloseNotify, &mut pending) {
                _ = pending.flush(|bytes| layer.write(network, bytes));
            }
        });
        socket::discard(network);
        flow::end(network);
    }
}

async fn drain<L: RecordLayer>(network: &TcpStream, layer: &mut L, pending: &mut Pending) -> Result<(), Fault> {
    flush(network, layer, pending).await?;
    if layer.exchange().is_some_and(Exchange::is_ours_open) {
        send(network, layer, ControlRecord::Frame(FrameKind::Abort), pending).await?;
        flush(network, layer, pending).await?;
    }
    let mut late = DRAIN_BYTES;
    while layer.exchange().is_some_and(Exchange::is_theirs_open) {
        recv(network, layer, &mut late).await?.kind()?;
    }
    // The last stream may have left the layer with a large buffer.
    layer.rest();
    Ok(())
}

async fn begin<L: RecordLayer>(network: &TcpStream, layer: &mut L, early: &[u8]) -> Result<(), StartError> {
    let unbegun =
        |lost: bool| move |fault| StartError { reason: network_fault(fault), lost: lost && !early.is_empty() };
    is_quiet(network, layer).map_err(unbegun(false))?;
    let mut pending = Pending::default();
    let begun = async {
        if layer.owes_key_update() {
            send(network, layer, ControlRecord::KeyUpdate, &mut pending).await?;
        }
        send(network, layer, ControlRecord::Frame(FrameKind::Begin), &mut pending).await?;
        if !early.is_empty() {
            layer.seal(early, &mut pending)?;
        }
        flush(network, layer, &mut pending).await
    };
    let begun = begun.await;
    begun.map_err(|fault| unbegun(!pending.is_untouched())(fault))?;
    match recv(network, layer, &mut 0).await {
        Ok(Received::Frame(FrameKind::Ready)) => Ok(()),
        Ok(Received::Frame(_)) => Err(unbegun(true)(Violation::UnexpectedMessage.into())),
        // The close_notify is under the session's keys, so the server sent it, and a server that has given a byte to a
        // workload does not end a session in this way.
        Ok(Received::CloseNotify) => Err(unbegun(false)(Fault::Truncated)),
        Err(fault) => Err(unbegun(!matches!(fault, Fault::Alert(_)))(fault)),
    }
}

/// Between two streams the server sends neither frames nor data: if any has come, or the end, the connection is not used
/// again.
fn is_quiet<L: RecordLayer>(network: &TcpStream, layer: &mut L) -> Result<(), Fault> {
    match with_scratch(|scratch| layer.inbound(network, Batch::new(), scratch))?.then {
        Then::Blocked | Then::More => Ok(()),
        Then::End | Then::Frame(_) => Err(Fault::Truncated),
        Then::Fault(fault) => Err(fault),
    }
}

/// Waits for this frame; data or any other frame is a violation.
async fn expect<L: RecordLayer>(network: &TcpStream, layer: &mut L, kind: FrameKind) -> Result<(), Fault> {
    match recv(network, layer, &mut 0).await?.kind()? {
        received if received == kind => Ok(()),
        _ => Err(Violation::UnexpectedMessage.into()),
    }
}

/// What the peer may send while no byte of an application is due.
enum Received {
    Frame(FrameKind),
    CloseNotify,
}

impl Received {
    fn kind(self) -> Result<FrameKind, Fault> {
        match self {
            Self::Frame(kind) => Ok(kind),
            Self::CloseNotify => Err(Fault::Truncated),
        }
    }
}

/// Waits for the peer's next frame or close_notify, and drops at most `late` bytes of data before it. Cancel safe: what has
/// been read from the socket is kept in the layer.
async fn recv<L: RecordLayer>(network: &TcpStream, layer: &mut L, late: &mut usize) -> Result<Received, Fault> {
    loop {
        let arrived = with_scratch(|scratch| layer.inbound(network, Batch::new(), scratch))?;
        *late = late.checked_sub(arrived.bytes).ok_or(Violation::Flood)?;
        match arrived.then {
            Then::Frame(kind) => return Ok(Received::Frame(kind)),
            Then::More => tokio::task::yield_now().await,
            Then::Blocked => {
                layer.rest();
                let signs = if L::FAILS_UNREAD { Interest::READABLE | Interest::ERROR } else { Interest::READABLE };
                if network.ready(signs).await?.is_error() && L::FAILS_UNREAD {
                    _ = socket::forget(network, Interest::ERROR);
                    layer.ask_again();
                }
            }
            Then::End => return Ok(Received::CloseNotify),
            Then::Fault(fault) => return Err(fault),
        }
    }
}

/// Sends a control record. Afterwards it may be in `pending` and has yet to be written.
async fn send<L: RecordLayer>(
    network: &TcpStream,
    layer: &mut L,
    what: ControlRecord,
    pending: &mut Pending,
) -> Result<(), Fault> {
    while !layer.send(network, what, pending)? {
        network.writable().await?;
    }
    Ok(())
}

async fn flush<L: RecordLayer>(network: &TcpStream, layer: &mut L, pending: &mut Pending) -> Result<(), Fault> {
    while !pending.is_empty() && !pending.flush(|bytes| layer.write(network, bytes))? {
        network.writable().await?;
    }
    Ok(())
}
