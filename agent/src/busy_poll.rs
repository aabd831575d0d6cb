//! Busy polling: a shard that asks its sockets again and again for a moment, instead of sleeping until one reports.
//!
//! Waking a thread costs more than the bytes of a short message. Where messages follow one another closely, a shard with a
//! processor to spare gains by staying awake; elsewhere that only wastes processor time. So a shard stays awake for
//! `WINDOW` after it has moved bytes, and only where the bytes before those came within that time as well: the next pause
//! is expected to be like the last.
//!
//! Where other threads want the processor, staying awake may keep them from making the very bytes that are waited for.
//!
//! *Invariant:* a shard that moves nothing sleeps. One that stayed awake in vain, or that was kept from its processor, does
//! not stay awake for a while, which is longer each time.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    task::{Poll, Waker},
    time::{Duration, Instant},
};

/// How long to stay awake for the next bytes: what a round trip of a short message takes through two agents in one rack.
const WINDOW: Duration = Duration::from_micros(200);
/// A thread that had to do without the processor for longer than this, while it wanted it, takes it that others want it
/// too.
const HELD_UP: Duration = Duration::from_micros(50);
/// For how long it then does not stay awake, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

thread_local! {
    static MOVED: Cell<u64> = const { Cell::new(0) };
    static ASLEEP: RefCell<Option<Waker>> = const { RefCell::new(None) };
}

/// A flow of this thread has moved bytes.
pub fn moved() {
    MOVED.set(MOVED.get().wrapping_add(1));
    if let Some(sleeper) = ASLEEP.take() {
        sleeper.wake();
    }
}

/// Keeps the runtime of this thread asking its sockets while that pays. Runs for as long as the thread serves.
pub async fn run() {
    let (mut backoff, mut seen) = (Backoff::default(), MOVED.get());
    loop {
        poll_fn(|context| match MOVED.get() == seen {
            true => {
                ASLEEP.set(Some(context.waker().clone()));
                Poll::Pending
            }
            false => Poll::Ready(()),
        })
        .await;
        seen = MOVED.get();
        let mut now = Instant::now();
        backoff.moved(now);
        if !backoff.pays(now) {
            continue;
        }
        let (mut since, mut in_vain) = ((now, processor_time()), true);
        while backoff.pays(now) {
            // The runtime asks its sockets, without waiting, before it comes back here.
            tokio::task::yield_now().await;
            now = Instant::now();
            if MOVED.get() == seen {
                continue;
            }
            (seen, in_vain) = (MOVED.get(), false);
            backoff.moved(now);
            // Nothing sleeps in this loop: the time that this thread did not have the processor, others had it.
            let used = processor_time();
            backoff.took(now, now.duration_since(since.0), used.saturating_sub(since.1));
            since = (now, used);
        }
        if in_vain {
            backoff.leave_it(now);
        }
    }
}

fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// When staying awake pays. Pure.
#[derive(Debug, Default)]
struct Backoff {
    /// When bytes were moved last.
    last: Option<Instant>,
    /// Those bytes came soon after the ones before them.
    soon: bool,
    /// Staying awake does not pay before this.
    off_until: Option<Instant>,
    /// How long the last pause from staying awake was; none since that has gone well.
    pause: Option<Duration>,
}

impl Backoff {
    fn moved(&mut self, now: Instant) {
        self.soon = self.last.is_some_and(|last| now.duration_since(last) <= WINDOW);
        self.last = Some(now);
    }

    /// Staying awake took so much time, of which this thread had the processor for so much.
    fn took(&mut self, now: Instant, time: Duration, used: Duration) {
        if time.saturating_sub(used) <= HELD_UP {
            self.pause = None;
        } else {
            self.leave_it(now);
        }
    }

    /// Staying awake did not pay: pauses for a while.
    fn leave_it(&mut self, now: Instant) {
        let pause = self.pause.map_or(PAUSES.0, |pause| (2 * pause).min(PAUSES.1));
        (self.pause, self.off_until) = (Some(pause), Some(now + pause));
    }

    fn pays(&self, now: Instant) -> bool {
        let recent = self.last.is_some_and(|last| now.duration_since(last) <= WINDOW);
        self.soon && recent && self.off_until.is_none_or(|until| now >= until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_pays_while_bytes_follow_one_another_closely() {
        let (mut backoff, start) = (Backoff::default(), Instant::now());
        let at = |micros| start + Duration::from_micros(micros);
        assert!(!backoff.pays(at(0)));
        backoff.moved(at(0));
        assert!(!backoff.pays(at(1)), "nothing is known of what comes next");
        backoff.moved(at(180));
        assert!(backoff.pays(at(181)) && backoff.pays(at(380)) && !backoff.pays(at(381)));
        backoff.moved(at(5000));
        assert!(!backoff.pays(at(5001)), "the last pause was long, and so may the next one be");
        backoff.moved(at(5050));
        assert!(backoff.pays(at(5051)));
    }

    #[test]
    fn whoever_else_wants_the_processor_gets_it_for_longer_each_time() {
        let (mut backoff, mut now) = (Backoff::default(), Instant::now());
        let (short, long) = (Duration::from_micros(30), Duration::from_micros(300));
        for pause in [100, 200, 400].map(Duration::from_millis) {
            backoff.moved(now);
            backoff.moved(now);
            assert!(backoff.pays(now));
            backoff.took(now, long, short);
            assert!(!backoff.pays(now));
            backoff.moved(now + pause - short);
            backoff.moved(now + pause - short);
            assert!(!backoff.pays(now + pause - short));
            now += pause;
        }
        backoff.took(now, long, long - short);
        backoff.took(now, long, short);
        assert_eq!(backoff.pause, Some(PAUSES.0), "it went well in between");
    }

    #[tokio::test]
    async fn a_thread_that_moves_nothing_sleeps() {
        let set = tokio::task::LocalSet::new();
        set.run_until(async {
            let staying = tokio::task::spawn_local(run());
            tokio::task::yield_now().await;
            let asleep = || ASLEEP.with_borrow(Option::is_some);
            assert!(asleep());
            moved();
            moved();
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert!(asleep(), "awake for a window at most");
            staying.abort();
        })
        .await;
    }
}
