//! The loop of one flow: both directions, half-close, limits, and how it ends.
//!
//! A turn moves at most one batch each way and never waits; between turns the flow waits for exactly the sockets that
//! it could use, for its clock, or for the order to stop.
//! *Invariant:* nothing is read from one socket while the other has not taken what was read before.

use super::{
    CloseReason, Limits, Progress, Stop, Violation,
    buffers::{Batch, Pending, Scratch, with_scratch},
    control,
    exchange::FrameKind,
    plain,
    record_layer::{ControlRecord, Fault, Outbound, RecordLayer, Then},
    socket,
};
use rustix::{
    io::writev,
    net::{SendFlags, Shutdown, send, shutdown},
};
use socket2::SockRef;
use std::{
    future::{Future, pending, poll_fn},
    io::{self, IoSlice},
    ops::Range,
    os::fd::AsFd,
    pin::{Pin, pin},
    sync::atomic::Ordering,
    task::Poll,
    time::Duration,
};
use tokio::{
    io::Interest,
    net::TcpStream,
    time::{Instant, Sleep, sleep_until},
};
use wimsey_sys::tls;

/// How often a layer that needs it is asked again while something is under way: the kernel's TLS may miss to wake an
/// edge-triggered waiter when memory is short, and nothing tells when its last record has left.
const MIN_TICK: Duration = Duration::from_millis(20);
const MAX_TICK: Duration = Duration::from_secs(1);

/// Where a layer cannot tell whether there is more, it is asked again in the same turn after so little.
const SMALL: usize = 4096;

/// ... and so many times.
const MAX_SMALL: u32 = 16;

/// Pieces of one vectored write.
const PIECES: usize = 64;

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
    /// The peer's application reset this use of a shared connection.
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

/// How far a direction has come.
type Mark = (u64, usize, Half);

/// When each direction last moved.
struct Moved {
    up: Instant,
    down: Instant,
    marks: (Mark, Mark),
    /// When it was last asked whether one of them is stuck for good.
    asked: Option<Instant>,
    /// Whether each was found then with room and nothing taken.
    idle: [bool; 2],
}

impl Moved {
    fn now(marks: (Mark, Mark)) -> Self {
        let now = Instant::now();
        Self { up: now, down: now, marks, asked: None, idle: [false; 2] }
    }

    fn compare(&mut self, (up, down): (Mark, Mark)) {
        if (up, down) == self.marks {
            return;
        }
        crate::busy_poll::moved();
        let now = Instant::now();
        if up != self.marks.0 {
            self.up = now;
        }
        if down != self.marks.1 {
            self.down = now;
        }
        self.marks = (up, down);
    }
}

#[derive(Clone, Copy, Debug)]
enum Side {
    Application,
    Network,
}

/// A stall that is due, though there is something to do: where one direction always has, nobody asks the clock.
fn stalled(deadline: Option<(Instant, Option<CloseReason>)>) -> Option<CloseReason> {
    let (at, reason) = deadline?;
    reason.filter(|reason| *reason == CloseReason::Stalled && at <= Instant::now())
}

/// Why the flow is awake again.
enum Woken {
    /// There is something to do.
    Again,
    /// A socket reports an error.
    Failed(Side),
    /// The deadline has come.
    Late,
    /// The agent wants it to end.
    Stopped(Stop),
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

    fn pump(&mut self, scratch: &mut Scratch, progress: &Progress) -> Result<Wants, CloseReason> {
        let mut wants = Wants::default();
        if self.greeting == Greeting::Waits {
            self.greeting = Greeting::Joins;
            self.pump_downstream(scratch, progress, &mut wants)?;
            wants.more = true;
            return Ok(wants);
        }
        self.pump_upstream(scratch, progress, &mut wants)?;
        self.pump_downstream(scratch, progress, &mut wants)?;
        Ok(wants)
    }

    /// From the application to the network.
    fn pump_upstream(
        &mut self,
        scratch: &mut Scratch,
        progress: &Progress,
        wants: &mut Wants,
    ) -> Result<(), CloseReason> {
        let early = std::mem::take(&mut self.early);
        if !early.is_empty() {
            progress.sent.fetch_add(early.len() as u64, Ordering::Relaxed);
            let sealed = self.layer.seal(&early, &mut self.up_pending);
            sealed.map_err(|fault| self.network_fault(fault))?;
        }
        let joins = std::mem::replace(&mut self.greeting, Greeting::Said) == Greeting::Joins;
        if !joins && !self.flush_up()? {
            wants.network_write = true;
            return Ok(());
        }
        if self.up == Half::Open && self.layer.owes_key_update() {
            let said = self.layer.say(&self.network, ControlRecord::KeyUpdate, &mut self.up_pending);
            if !said.map_err(|fault| self.network_fault(fault))? || !self.flush_up()? {
                wants.network_write = true;
                return Ok(());
            }
        }
        if self.up == Half::Open {
            let outbound = self.layer.outbound(&self.application, self.up_batch, scratch);
            match outbound.map_err(application_fault)? {
                Outbound::Blocked => {
                    wants.application_read = true;
                    wants.network_write = !self.flush_up()?;
                }
                Outbound::End => self.up = Half::Ended,
                Outbound::Bytes { taken, wire } => {
                    progress.sent.fetch_add(taken as u64, Ordering::Relaxed);
                    self.send(scratch, wire, taken, wants)?;
                }
            }
        }
        if self.up == Half::Ended {
            let end = if self.is_shared() { ControlRecord::Frame(FrameKind::End) } else { ControlRecord::CloseNotify };
            let said = self.layer.say(&self.network, end, &mut self.up_pending);
            if !said.map_err(|fault| self.network_fault(fault))? {
                wants.network_write = true;
                return Ok(());
            }
            self.up = Half::Draining;
        }
        if self.up == Half::Draining {
            if !self.flush_up()? {
                wants.network_write = true;
            } else if self.is_shared() {
                self.up = Half::Closed;
            } else if self.layer.has_drained(&self.network).map_err(|error| self.network_fault(error.into()))? {
                end(&self.network);
                self.up = Half::Closed;
            }
        }
        Ok(())
    }

    fn flush_up(&mut self) -> Result<bool, CloseReason> {
        if self.up_pending.is_empty() {
            return Ok(true);
        }
        let flushed = self.up_pending.flush(|bytes| self.layer.write(&self.network, bytes));
        flushed.map_err(|error| self.network_fault(error.into()))
    }

    fn send(
        &mut self,
        scratch: &Scratch,
        wire: Range<usize>,
        taken: usize,
        wants: &mut Wants,
    ) -> Result<(), CloseReason> {
        let bytes = scratch.bytes.get(wire).unwrap_or_default();
        let all = if self.up_pending.is_empty() {
            let written = self.layer.write(&self.network, bytes).map_err(|error| self.network_fault(error.into()))?;
            self.up_pending.keep(bytes.get(written..).unwrap_or_default());
            self.up_pending.is_empty()
        } else {
            // Behind the greeting, with which it goes out.
            self.up_pending.keep(bytes);
            self.flush_up()?
        };
        let full = taken == self.up_batch.bytes();
        if !all {
            self.up_batch.was_too_much();
            wants.network_write = true;
        } else if full {
            self.up_batch.was_full();
            wants.more = true;
        } else {
            // A short read: there is no more until the next edge.
            wants.application_read = true;
        }
        Ok(())
    }

    /// From the network to the application.
    fn pump_downstream(
        &mut self,
        scratch: &mut Scratch,
        progress: &Progress,
        wants: &mut Wants,
    ) -> Result<(), CloseReason> {
        if !self.down_pending.is_empty() {
            let flushed = self.down_pending.flush(|bytes| plain::put(&self.application, bytes));
            if !flushed.map_err(|error| application_fault(error.into()))? {
                wants.application_write = true;
                return Ok(());
            }
        }
        if let Some(fault) = self.last.take() {
            return Err(self.network_fault(fault));
        }
        let mut turns = 0;
        while self.down == Half::Open && self.receive(scratch, progress, wants)? {
            turns += 1;
            if turns == MAX_SMALL {
                wants.more = true;
                break;
            }
        }
        wants.more |= self.up == Half::Open && self.layer.owes_key_update() && !wants.network_write;
        if self.down == Half::Ended && self.down_pending.is_empty() {
            end(&self.application);
            self.down = Half::Closed;
        }
        Ok(())
    }

    /// Takes one batch. True: it was small, and there may be more right behind it.
    fn receive(&mut self, scratch: &mut Scratch, progress: &Progress, wants: &mut Wants) -> Result<bool, CloseReason> {
        let arrived = self.layer.inbound(&self.network, self.down_batch, scratch);
        let arrived = arrived.map_err(|fault| self.network_fault(fault))?;
        self.peer_eof = matches!(arrived.then, Then::End | Then::Fault(_));
        if arrived.bytes > 0 {
            self.received_any = true;
            progress.received.fetch_add(arrived.bytes as u64, Ordering::Relaxed);
            self.deliver(scratch, arrived.bytes).map_err(|error| application_fault(error.into()))?;
        }
        let delivered = self.down_pending.is_empty();
        if !delivered {
            self.down_batch.was_too_much();
            wants.application_write = true;
        } else if arrived.taken == self.down_batch.bytes() {
            self.down_batch.was_full();
        }
        // A shared connection that ends in the middle of a use has cut it.
        let then =
            if arrived.then == Then::End && self.is_shared() { Then::Fault(Fault::Truncated) } else { arrived.then };
        match then {
            Then::More if delivered && arrived.taken < SMALL => return Ok(true),
            Then::More => wants.more |= delivered,
            Then::Blocked => wants.network_read = delivered,
            Then::End | Then::Frame(FrameKind::End) => self.down = Half::Ended,
            Then::Frame(FrameKind::Abort) => {
                self.aborted = true;
                return Err(CloseReason::PeerReset);
            }
            Then::Frame(FrameKind::Begin | FrameKind::Ready) => {
                return Err(CloseReason::PeerViolation(Violation::UnexpectedMessage));
            }
            Then::Fault(fault) if delivered => return Err(self.network_fault(fault)),
            Then::Fault(fault) => self.last = Some(fault),
        }
        Ok(false)
    }

    /// Writes the segments of the scratch to the application, and keeps what it does not take. There is nothing pending, so
    /// there is room as far as is known; of a socket that was made a moment ago nothing is known: it is asked itself.
    fn deliver(&mut self, scratch: &Scratch, total: usize) -> io::Result<()> {
        let mut left = total;
        let mut segments = scratch.segments.iter().map(|range| scratch.bytes.get(range.clone()).unwrap_or_default());
        if scratch.segments.len() == 1 {
            let bytes = segments.next().unwrap_or_default();
            let send = || send(&self.application, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            let written = socket::write_unasked(&self.application, bytes.len(), send)?;
            self.down_pending.keep(bytes.get(written..).unwrap_or_default());
            return Ok(());
        }
        while left > 0 {
            let mut pieces = [IoSlice::new(&[]); PIECES];
            let (mut count, mut length) = (0, 0);
            for (piece, segment) in pieces.iter_mut().zip(segments.by_ref()) {
                *piece = IoSlice::new(segment);
                count += 1;
                length += segment.len();
            }
            let pieces = pieces.get(..count).unwrap_or_default();
            if pieces.is_empty() {
                break;
            }
            let mut written = if self.down_pending.is_empty() {
                socket::write_unasked(&self.application, length, || writev(&self.application, pieces))?
            } else {
                0
            };
            for piece in pieces {
                let skip = written.min(piece.len());
                written -= skip;
                self.down_pending.keep(piece.get(skip..).unwrap_or_default());
            }
            left -= length.min(left);
        }
        Ok(())
    }

    async fn wait(
        &self,
        wants: Wants,
        deadline: Option<(Instant, Option<CloseReason>)>,
        mut stop: Pin<&mut impl Future<Output = Stop>>,
        mut clock: Pin<&mut Sleep>,
    ) -> Woken {
        if let Some((at, _)) = deadline
            && at < clock.deadline()
        {
            clock.as_mut().reset(at);
        }
        // A socket that is neither read nor written any more may still be reset, and the other program has to know. One
        // that is read may fail without having anything to read.
        let (at_network, at_application) = match (self.up, self.down) {
            (Half::Open, Half::Closed) => (true, false),
            (Half::Closed, Half::Open) => (L::FAILS_UNREAD, true),
            (_, Half::Open) => (L::FAILS_UNREAD, false),
            _ => (false, false),
        };
        let report = async |socket: &TcpStream, wanted: bool| match wanted {
            true => _ = socket.ready(Interest::ERROR).await,
            false => pending().await,
        };
        let mut network_failed = pin!(report(&self.network, at_network));
        let mut application_failed = pin!(report(&self.application, at_application));
        let woken = poll_fn(|context| {
            if let Poll::Ready(stop) = stop.as_mut().poll(context) {
                return Poll::Ready(Woken::Stopped(stop));
            }
            let ready = wants.more
                || (wants.application_read && self.application.poll_read_ready(context).is_ready())
                    | (wants.application_write && self.application.poll_write_ready(context).is_ready())
                    | (wants.network_read && self.network.poll_read_ready(context).is_ready())
                    | (wants.network_write && self.network.poll_write_ready(context).is_ready());
            if ready {
                return Poll::Ready(Woken::Again);
            }
            if network_failed.as_mut().poll(context).is_ready() {
                return Poll::Ready(Woken::Failed(Side::Network));
            }
            if application_failed.as_mut().poll(context).is_ready() {
                return Poll::Ready(Woken::Failed(Side::Application));
            }
            let Some((at, _)) = deadline else { return Poll::Pending };
            if clock.as_mut().poll(context).is_ready() {
                // It rings at the earliest time that it was ever set for: activity does not cost a timer each time.
                if at <= Instant::now() {
                    return Poll::Ready(Woken::Late);
                }
                clock.as_mut().reset(at);
                return clock.as_mut().poll(context).map(|()| Woken::Late);
            }
            Poll::Pending
        })
        .await;
        if wants.more && matches!(woken, Woken::Again) {
            // The other flows of the shard come first.
            tokio::task::yield_now().await;
        }
        woken
    }

    /// Until when to wait, and what it means when nothing has happened by then.
    fn deadline(&self, limits: &Limits, moved: &Moved) -> Option<(Instant, Option<CloseReason>)> {
        let idle = limits.idle.map(|idle| (moved.up.max(moved.down) + idle, Some(CloseReason::Idle)));
        let (up, down) = (self.up_is_under_way(), !self.down_pending.is_empty());
        if !up && !down {
            return idle;
        }
        let stall = |under_way: bool, since: Instant| {
            under_way.then(|| {
                let due = since + limits.stall;
                // Once it is due it is asked every second, for as long as the receiver is just slow: a second since it was
                // asked, for the other direction may wake the flow more often than that.
                (moved.asked.map_or(due, |asked| due.max(asked + MAX_TICK)), Some(CloseReason::Stalled))
            })
        };
        let tick = (up && self.layer.needs_ticks()).then(|| {
            // As long again as it has been waiting.
            let now = Instant::now();
            (now + now.duration_since(moved.up).clamp(MIN_TICK, MAX_TICK), None)
        });
        [idle, stall(up, moved.up), stall(down, moved.down), tick].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    fn up_is_under_way(&self) -> bool {
        !self.up_pending.is_empty() || matches!(self.up, Half::Ended | Half::Draining)
    }

    /// Is this the end? A stall is one only where a socket has room and takes nothing all the same. Each direction is
    /// judged by itself: where memory for TCP is short, one may starve while the other trickles.
    fn is_over(&self, reason: CloseReason, limits: &Limits, moved: &mut Moved) -> bool {
        let now = Instant::now();
        let asked = moved.asked.replace(now);
        // Found twice: a receiver that has slept may have made room a moment ago, and nothing was written into it yet.
        let stuck = |socket: &TcpStream, under_way: bool, since: Instant, found: &mut bool| {
            let idle = under_way
                && now.duration_since(since) >= limits.stall
                && tls::unacknowledged(socket.as_fd()).is_ok_and(|queued| queued == 0);
            let before = std::mem::replace(found, idle);
            idle && before && asked.is_some_and(|asked| asked > since)
        };
        let [up, down] = &mut moved.idle;
        reason != CloseReason::Stalled
            || stuck(&self.network, self.up_is_under_way(), moved.up, up)
            || stuck(&self.application, !self.down_pending.is_empty(), moved.down, down)
    }

    /// How far both directions have come: what was taken, what of it is still to be delivered, and what was said.
    fn marks(&self, progress: &Progress) -> (Mark, Mark) {
        let up = (progress.sent(), self.up_pending.left(), self.up);
        (up, (progress.received(), self.down_pending.left(), self.down))
    }

    /// A socket reported an error. Where it is still read, reading it says which one.
    fn failure(&mut self, side: Side) -> Option<CloseReason> {
        let socket = match side {
            Side::Network => &self.network,
            Side::Application => &self.application,
        };
        _ = socket::forget(socket, Interest::ERROR);
        match side {
            Side::Network if self.down == Half::Open => {
                self.layer.ask_again();
                None
            }
            Side::Network => self.network.take_error().ok().flatten().map(|error| self.network_fault(error.into())),
            Side::Application => {
                self.application.take_error().ok().flatten().map(|error| application_fault(error.into()))
            }
        }
    }

    fn network_fault(&self, fault: Fault) -> CloseReason {
        match fault {
            Fault::Alert(alert) if !self.received_any && control::is_refusal(alert) => CloseReason::PeerRefused(alert),
            fault => network_fault(fault),
        }
    }

    fn is_shared(&self) -> bool {
        self.layer.exchange().is_some()
    }

    /// Can the connection be used again, after this use of it has ended in this way?
    fn can_be_left(&self, reason: CloseReason) -> bool {
        let Some(exchange) = self.layer.exchange().filter(|_| !self.peer_eof) else { return false };
        match reason {
            CloseReason::Complete => true,
            // What cannot be said any more, since the stream has ended already, only a reset can say.
            CloseReason::ApplicationReset | CloseReason::ApplicationLost(_) => exchange.is_ours_open(),
            CloseReason::PeerReset => self.aborted,
            _ => false,
        }
    }

    /// After its end: what may be used again. The application's socket is closed, and the network's too if it may not.
    pub(super) fn leave(self, reason: CloseReason) -> Option<HalfClosedParts<L>> {
        let left = self.can_be_left(reason);
        left.then_some(HalfClosedParts { network: self.network, layer: self.layer, pending: self.up_pending })
    }

    fn close(&mut self, reason: CloseReason) {
        if self.can_be_left(reason) {
            if reason != CloseReason::Complete {
                reset(&self.application);
            }
            return;
        }
        if reason == CloseReason::Complete {
            // What comes behind close_notify is ignored (RFC 9846 section 6.1), and must not turn into a reset that
            // overtakes our last bytes.
            socket::discard(&self.network);
            return;
        }
        reset(&self.application);
        if !(L::TLS && self.tell(reason)) {
            reset(&self.network);
        }
    }

    /// Tells the peer why. False: it could not be told, or need not be.
    fn tell(&mut self, reason: CloseReason) -> bool {
        let Some(alert) = reason.alert() else { return false };
        if !matches!(self.up, Half::Open | Half::Ended) || !matches!(self.flush_up(), Ok(true)) {
            return false;
        }
        let said = self.layer.say(&self.network, ControlRecord::Alert(alert), &mut self.up_pending);
        if !matches!(said, Ok(true)) || !matches!(self.flush_up(), Ok(true)) {
            return false;
        }
        socket::discard(&self.network);
        end(&self.network);
        true
    }
}

pub(super) fn network_fault(fault: Fault) -> CloseReason {
    match fault {
        Fault::Io(libc::ECONNRESET | libc::EPIPE | libc::ECONNABORTED) => CloseReason::PeerReset,
        Fault::Io(number) => CloseReason::PeerLost(number),
        Fault::Truncated => CloseReason::PeerTruncated,
        Fault::Violation(violation) => CloseReason::PeerViolation(violation),
        Fault::Alert(alert) => CloseReason::PeerAlert(alert),
        Fault::Ours(reason) => reason,
    }
}

fn application_fault(fault: Fault) -> CloseReason {
    match fault {
        Fault::Io(libc::ECONNRESET | libc::EPIPE | libc::ECONNABORTED) => CloseReason::ApplicationReset,
        Fault::Io(number) => CloseReason::ApplicationLost(number),
        Fault::Ours(reason) => reason,
        // A layer finds these in what the network sends.
        Fault::Truncated | Fault::Violation(_) | Fault::Alert(_) => CloseReason::PeerTruncated,
    }
}

/// The receiver reads the end of the stream, after everything that is still on its way.
pub(super) fn end(socket: &TcpStream) {
    // Closing is orderly again. If that fails the socket is gone, and its next read or write says so.
    _ = SockRef::from(socket).set_linger(None);
    // A socket that is not connected any more has nobody to tell; its next read or write says so.
    _ = shutdown(socket, Shutdown::Write);
}

/// Closing the socket will be a reset.
fn reset(socket: &TcpStream) {
    // A socket that is gone already needs no reset.
    _ = socket.set_zero_linger();
}
