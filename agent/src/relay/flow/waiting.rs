//! Between two turns of a flow: what wakes it, and how long a direction may be under way without moving.
//!
//! *Invariant:* a flow is given up as stalled only where a socket has room and still takes nothing.

use super::{Half, Transfer, Wants};
use crate::relay::{CloseReason, Limits, Progress, Stop, record_layer::RecordLayer};
use bunter_sys::tls;
use std::{
    future::{Future, pending, poll_fn},
    os::fd::AsFd,
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};
use tokio::{
    io::Interest,
    net::TcpStream,
    time::{Instant, Sleep},
};

/// How long to wait, at least and at most, before a layer that needs it is asked again while something is under way: the
/// kernel's TLS may fail to wake an edge-triggered waiter when memory is short, and no event tells that its last record has
/// left.
const MIN_TICK: Duration = Duration::from_millis(20);
const MAX_TICK: Duration = Duration::from_secs(1);

/// How far a direction has come.
type Mark = (u64, usize, Half);

/// When each direction last moved.
pub(super) struct Moved {
    up: Instant,
    down: Instant,
    marks: (Mark, Mark),
    /// When it was last checked whether a direction is stuck for good.
    asked: Option<Instant>,
    /// Whether that check found the direction's socket with room although it had taken nothing.
    idle: [bool; 2],
}

impl Moved {
    pub(super) fn now(marks: (Mark, Mark)) -> Self {
        let now = Instant::now();
        Self { up: now, down: now, marks, asked: None, idle: [false; 2] }
    }

    pub(super) fn compare(&mut self, (up, down): (Mark, Mark)) {
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
pub(super) enum Side {
    Application,
    Network,
}

/// A stall that is due although the flow has something to do: while one direction always has, `wait` never looks at the
/// clock.
pub(super) fn stalled(deadline: Option<(Instant, Option<CloseReason>)>) -> Option<CloseReason> {
    let (at, reason) = deadline?;
    reason.filter(|reason| *reason == CloseReason::Stalled && at <= Instant::now())
}

/// Why the flow is awake again.
pub(super) enum Woken {
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
    pub(super) async fn wait(
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
        // A socket that is neither read nor written any more may still be reset, and the program at the other end has to
        // learn of it. Some layers' sockets may fail while they are read without becoming readable (`FAILS_UNREAD`).
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
                // The timer fires at the earliest deadline that it was ever set to. Activity does not move it back, which
                // would cost a timer operation each time.
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
    pub(super) fn deadline(&self, limits: &Limits, moved: &Moved) -> Option<(Instant, Option<CloseReason>)> {
        let idle = limits.idle.map(|idle| (moved.up.max(moved.down) + idle, Some(CloseReason::Idle)));
        let (up, down) = (self.up_is_under_way(), !self.down_pending.is_empty());
        if !up && !down {
            return idle;
        }
        let stall = |under_way: bool, since: Instant| {
            under_way.then(|| {
                let due = since + limits.stall;
                // Once a stall is due, it is checked for every second as long as the receiver is merely slow. The second
                // counts from the last check, because the other direction may wake the flow more often than that.
                (moved.asked.map_or(due, |asked| due.max(asked + MAX_TICK)), Some(CloseReason::Stalled))
            })
        };
        let tick = (up && self.layer.needs_ticks()).then(|| {
            // As long again as nothing has moved so far.
            let now = Instant::now();
            (now + now.duration_since(moved.up).clamp(MIN_TICK, MAX_TICK), None)
        });
        [idle, stall(up, moved.up), stall(down, moved.down), tick].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    fn up_is_under_way(&self) -> bool {
        !self.up_pending.is_empty() || matches!(self.up, Half::Ended | Half::Draining)
    }

    /// Does this reason end the flow? A stall does so only where a socket has room and still takes nothing. Each direction
    /// is judged by itself: where memory for TCP is short, one may starve while the other still moves a little.
    pub(super) fn is_over(&self, reason: CloseReason, limits: &Limits, moved: &mut Moved) -> bool {
        let now = Instant::now();
        let asked = moved.asked.replace(now);
        // Two checks in a row have to find it: a receiver that slept may have made room a moment ago, before anything was
        // written.
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

    /// How far both directions have come: how much was taken, how much of that is still to be delivered, and the state of
    /// the half.
    pub(super) fn marks(&self, progress: &Progress) -> (Mark, Mark) {
        let up = (progress.sent(), self.up_pending.left(), self.up);
        (up, (progress.received(), self.down_pending.left(), self.down))
    }
}
