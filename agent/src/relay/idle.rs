//! A shared connection between two uses: what is left of one, the wait for the next, and how that begins.
//!
//! *Invariant:* an [`Idle`] has no byte of any application in it or on its way to it: both streams of its last use have
//! ended. Whatever goes wrong here ends the connection, and no application has lost a byte by it.

use super::{
    Any, CloseReason, Limits, Progress, Stop, Tally, Violation,
    buffers::{Batch, Pending, with_scratch},
    exchange::{Exchange, Word},
    flow::{self, Flow, Start, network_fault},
    kernel::Kernel,
    lane::{Fault, Lane, Say, Then},
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

/// How long the peer may take to end a use that this side's application has reset.
const SETTLE: Duration = Duration::from_secs(5);
/// ... and how many bytes may still be on their way: what two sockets and a batch hold.
const SETTLE_BYTES: usize = 32 << 20;

/// The engine's side of a shared connection, without its socket.
pub struct Shared {
    kept: Kept,
    agreement: Arc<Agreement>,
}

/// A shared connection whose use is over for this side's application, while the peer may not have said so yet.
pub struct Left {
    network: TcpStream,
    pending: Pending,
    shared: Shared,
}

/// A shared connection between two uses, or one of which the next has begun and moved no byte in this process.
pub struct Idle {
    network: TcpStream,
    /// Bytes of the application that went with `begin`.
    sent: u64,
    /// `ready`, which goes with the workload's first bytes.
    greeting: Pending,
    shared: Shared,
}

/// Why a use has not begun.
#[derive(Debug)]
pub struct Unbegun {
    /// What happened to the connection.
    pub reason: CloseReason,
    /// May the workload have been given the bytes that went with `begin`? Then they must not be sent once more.
    pub lost: bool,
}

pub(super) enum Kept {
    User(User),
    Kernel(Kernel),
}

/// The same for both engines.
macro_rules! with_lane {
    ($kept:expr, $lane:ident => $body:expr) => {
        match $kept {
            Kept::User($lane) => $body,
            Kept::Kernel($lane) => $body,
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
) -> impl Future<Output = (Tally, Option<Left>)> {
    async move {
        let stop = pin!(stop);
        let closed = match &mut flow {
            Any::Plain(flow) => flow.run(limits, stop, progress).await,
            Any::User(flow) => flow.run(limits, stop, progress).await,
            Any::Kernel(flow) => flow.run(limits, stop, progress).await,
        };
        let left = match flow {
            Any::Plain(_) => None,
            Any::User(flow) => flow.leave(closed).map(|left| (left.network, left.pending, Kept::User(left.lane))),
            Any::Kernel(flow) => flow.leave(closed).map(|left| (left.network, left.pending, Kept::Kernel(left.lane))),
        };
        let left = left.zip(agreement).map(|((network, pending, kept), agreement)| Left {
            network,
            pending,
            shared: Shared { kept, agreement },
        });
        let tally = Tally { sent: progress.sent(), received: progress.received(), closed };
        (tally, left)
    }
}

impl Left {
    /// Ends what is still open of the use: says that this side's application is gone, and passes over what comes for it.
    /// None: the connection is closed.
    pub async fn settle(self) -> Option<Idle> {
        let Self { network, mut pending, mut shared } = self;
        let settled = with_lane!(&mut shared.kept, lane => timeout(SETTLE, settle(&network, lane, &mut pending)).await);
        matches!(settled, Ok(Ok(()))).then(|| Idle::new(network, shared))
    }
}

impl Idle {
    fn new(network: TcpStream, shared: Shared) -> Self {
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

    /// Number of its last use; the handshake began the first.
    pub fn uses(&self) -> u32 {
        self.shared.uses()
    }

    /// The client: begins the next use with the first bytes of its application, at most a record of them, and waits until
    /// the server's workload has accepted.
    pub async fn begin(&mut self, early: &[u8]) -> Result<(), Unbegun> {
        let Self { network, shared, sent, .. } = self;
        *sent = early.len() as u64;
        with_lane!(&mut shared.kept, lane => begin(network, lane, early).await)
    }

    /// The server: waits for the next use. Cancel safe. An error is how a connection that is not used again ends.
    pub async fn next(&mut self) -> Result<(), CloseReason> {
        let Self { network, shared, .. } = self;
        with_lane!(&mut shared.kept, lane => expect(network, lane, Word::Begin).await).map_err(network_fault)
    }

    /// Takes socket and engine apart, for the flow that the next use is.
    pub(crate) fn into_parts(self) -> (TcpStream, Shared) {
        (self.network, self.shared)
    }

    /// Carries a use that has begun, as [`super::carry`] does the first. `early`: bytes of the application that are neither in
    /// its socket any more nor went with `begin`.
    pub(crate) fn carry(
        self,
        application: TcpStream,
        early: Vec<u8>,
        limits: &Limits,
        stop: impl Future<Output = Stop>,
        progress: &Progress,
    ) -> impl Future<Output = (Tally, Option<Left>)> {
        let Self { network, sent, greeting, shared: Shared { kept, agreement } } = self;
        progress.sent.fetch_add(sent, Ordering::Relaxed);
        let start = Start { early, greeting };
        let flow = match kept {
            Kept::User(lane) => Any::User(Flow::new(application, network, lane, start)),
            Kept::Kernel(lane) => Any::Kernel(Flow::new(application, network, lane, start)),
        };
        run(flow, Some(agreement), limits, stop, progress)
    }

    /// Ends the connection in order.
    pub fn close(self) {
        self.shared.close(&self.network);
    }
}

impl Shared {
    /// What the two ends agreed on.
    pub(crate) fn agreement(&self) -> &Arc<Agreement> {
        &self.agreement
    }

    /// Number of the last use.
    pub(crate) fn uses(&self) -> u32 {
        with_lane!(&self.kept, lane => lane.exchange()).map_or(0, |exchange| exchange.number())
    }

    /// The server: have the client's first bytes come along, so that they can go to the workload at once?
    pub(crate) fn speaks(&self) -> bool {
        with_lane!(&self.kept, lane => lane.has_record())
    }

    /// The server: its workload has accepted, over the socket that these belong to. Where the lane leaves it to this
    /// process, the client hears of it when the use is carried.
    pub(crate) async fn ready(mut self, network: TcpStream) -> Result<Idle, CloseReason> {
        let mut greeting = Pending::default();
        let ready = Say::Word(Word::Ready);
        let said = with_lane!(&mut self.kept, lane => utter(&network, lane, ready, &mut greeting).await);
        said.map_err(network_fault)?;
        Ok(Idle { greeting, ..Idle::new(network, self) })
    }

    /// Ends the connection in order, of which `network` is the socket. Before `ready` it says that no workload has been given
    /// a byte.
    pub(crate) fn close(mut self, network: &TcpStream) {
        let mut pending = Pending::default();
        with_lane!(&mut self.kept, lane => {
            // Whoever cannot be told finds out by the FIN.
            if let Ok(true) = lane.say(network, Say::CloseNotify, &mut pending) {
                _ = pending.flush(|bytes| lane.write(network, bytes));
            }
        });
        socket::discard(network);
        flow::end(network);
    }
}

async fn settle<L: Lane>(network: &TcpStream, lane: &mut L, pending: &mut Pending) -> Result<(), Fault> {
    flush(network, lane, pending).await?;
    if lane.exchange().is_some_and(Exchange::is_ours_open) {
        utter(network, lane, Say::Word(Word::Abort), pending).await?;
        flush(network, lane, pending).await?;
    }
    let mut late = SETTLE_BYTES;
    while lane.exchange().is_some_and(Exchange::is_theirs_open) {
        hear(network, lane, &mut late).await?.word()?;
    }
    // The last use may have made it large.
    lane.rest();
    Ok(())
}

async fn begin<L: Lane>(network: &TcpStream, lane: &mut L, early: &[u8]) -> Result<(), Unbegun> {
    let unbegun = |lost: bool| move |fault| Unbegun { reason: network_fault(fault), lost: lost && !early.is_empty() };
    is_quiet(network, lane).map_err(unbegun(false))?;
    let mut pending = Pending::default();
    let begun = async {
        if lane.owes_key_update() {
            utter(network, lane, Say::KeyUpdate, &mut pending).await?;
        }
        utter(network, lane, Say::Word(Word::Begin), &mut pending).await?;
        if !early.is_empty() {
            lane.seal(early, &mut pending)?;
        }
        flush(network, lane, &mut pending).await
    };
    let begun = begun.await;
    begun.map_err(|fault| unbegun(!pending.is_untouched())(fault))?;
    match hear(network, lane, &mut 0).await {
        Ok(Heard::Word(Word::Ready)) => Ok(()),
        Ok(Heard::Word(_)) => Err(unbegun(true)(Violation::UnexpectedMessage.into())),
        // Under the session's keys: nobody but the server has said it, and it says nothing of the kind behind a byte that
        // it has given to a workload.
        Ok(Heard::CloseNotify) => Err(unbegun(false)(Fault::Truncated)),
        Err(fault) => Err(unbegun(!matches!(fault, Fault::Alert(_)))(fault)),
    }
}

/// Between two uses the server says nothing: what has come ends the connection.
fn is_quiet<L: Lane>(network: &TcpStream, lane: &mut L) -> Result<(), Fault> {
    match with_scratch(|scratch| lane.inbound(network, Batch::new(), scratch))?.then {
        Then::Blocked | Then::More => Ok(()),
        Then::End | Then::Word(_) => Err(Fault::Truncated),
        Then::Fault(fault) => Err(fault),
    }
}

/// Waits for this word; data or any other is a violation.
async fn expect<L: Lane>(network: &TcpStream, lane: &mut L, word: Word) -> Result<(), Fault> {
    match hear(network, lane, &mut 0).await?.word()? {
        heard if heard == word => Ok(()),
        _ => Err(Violation::UnexpectedMessage.into()),
    }
}

/// What the peer says where no byte of an application is due.
enum Heard {
    Word(Word),
    CloseNotify,
}

impl Heard {
    fn word(self) -> Result<Word, Fault> {
        match self {
            Self::Word(word) => Ok(word),
            Self::CloseNotify => Err(Fault::Truncated),
        }
    }
}

/// Waits for what the peer says next, and passes over at most so many bytes before it. Cancel safe: what has been taken off
/// the socket is in the lane.
async fn hear<L: Lane>(network: &TcpStream, lane: &mut L, late: &mut usize) -> Result<Heard, Fault> {
    loop {
        let arrived = with_scratch(|scratch| lane.inbound(network, Batch::new(), scratch))?;
        *late = late.checked_sub(arrived.bytes).ok_or(Violation::Flood)?;
        match arrived.then {
            Then::Word(word) => return Ok(Heard::Word(word)),
            Then::More => tokio::task::yield_now().await,
            Then::Blocked => {
                lane.rest();
                let signs = if L::FAILS_UNREAD { Interest::READABLE | Interest::ERROR } else { Interest::READABLE };
                if network.ready(signs).await?.is_error() && L::FAILS_UNREAD {
                    _ = socket::forget(network, Interest::ERROR);
                    lane.ask_again();
                }
            }
            Then::End => return Ok(Heard::CloseNotify),
            Then::Fault(fault) => return Err(fault),
        }
    }
}

/// Says something, which may lie in `pending` then.
async fn utter<L: Lane>(network: &TcpStream, lane: &mut L, say: Say, pending: &mut Pending) -> Result<(), Fault> {
    while !lane.say(network, say, pending)? {
        network.writable().await?;
    }
    Ok(())
}

async fn flush<L: Lane>(network: &TcpStream, lane: &mut L, pending: &mut Pending) -> Result<(), Fault> {
    while !pending.is_empty() && !pending.flush(|bytes| lane.write(network, bytes))? {
        network.writable().await?;
    }
    Ok(())
}
