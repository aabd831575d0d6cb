//! Busy polling: a shard that asks its sockets again and again for a moment, instead of sleeping until one reports.
//!
//! Waking a thread costs more than the bytes of a short message. Where messages follow one another closely, a shard with a
//! processor to spare gains by staying awake; everywhere else it only burns it. So it stays awake for [`WINDOW`] after it
//! has moved bytes, and only where the bytes before came within as much: what the last pause was like, the next one will be.
//!
//! *Invariant:* a shard that moves nothing sleeps, and one that is held up by others keeps off for [`PAUSE`].

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    task::{Poll, Waker},
    time::{Duration, Instant},
};

/// How long to stay awake for the next bytes: what a round trip of a short message takes through two agents in one rack.
const WINDOW: Duration = Duration::from_micros(200);
/// A turn that takes longer than this was held up: others want this processor.
const HELD_UP: Duration = Duration::from_millis(2);
/// So long it is left to them.
const PAUSE: Duration = Duration::from_millis(100);

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

/// Keeps the runtime of this thread asking its sockets while it pays. Runs for as long as the thread serves.
pub async fn stay() {
    let (mut pace, mut seen) = (Pace::default(), MOVED.get());
    loop {
        poll_fn(|context| match MOVED.get() == seen {
            true => {
                ASLEEP.set(Some(context.waker().clone()));
                Poll::Pending
            }
            false => Poll::Ready(()),
        })
        .await;
        let mut before = Instant::now();
        loop {
            let now = Instant::now();
            if now.duration_since(before) > HELD_UP {
                pace.held_up(now);
            }
            if MOVED.get() != seen {
                seen = MOVED.get();
                pace.moved(now);
            }
            if !pace.pays(now) {
                break;
            }
            before = now;
            // The runtime asks its sockets, without waiting, before it comes back here.
            tokio::task::yield_now().await;
        }
    }
}

/// When it pays. Pure.
#[derive(Debug, Default)]
struct Pace {
    /// When bytes were moved last.
    last: Option<Instant>,
    /// They came soon after those before.
    soon: bool,
    /// Not before.
    off_until: Option<Instant>,
}

impl Pace {
    fn moved(&mut self, now: Instant) {
        self.soon = self.last.is_some_and(|last| now.duration_since(last) <= WINDOW);
        self.last = Some(now);
    }

    fn held_up(&mut self, now: Instant) {
        self.off_until = Some(now + PAUSE);
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
        let (mut pace, start) = (Pace::default(), Instant::now());
        let at = |micros| start + Duration::from_micros(micros);
        assert!(!pace.pays(at(0)));
        pace.moved(at(0));
        assert!(!pace.pays(at(1)), "nothing is known of what comes next");
        pace.moved(at(180));
        assert!(pace.pays(at(181)) && pace.pays(at(380)) && !pace.pays(at(381)));
        pace.moved(at(5000));
        assert!(!pace.pays(at(5001)), "the last pause was long, and so may the next one be");
        pace.moved(at(5050));
        assert!(pace.pays(at(5051)));
    }

    #[test]
    fn whoever_else_wants_the_processor_gets_it() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        pace.moved(start);
        pace.moved(start);
        assert!(pace.pays(start));
        pace.held_up(start);
        assert!(!pace.pays(start));
        let later = start + PAUSE;
        pace.moved(later);
        pace.moved(later);
        assert!(pace.pays(later));
    }

    #[tokio::test]
    async fn a_thread_that_moves_nothing_sleeps() {
        let set = tokio::task::LocalSet::new();
        set.run_until(async {
            let staying = tokio::task::spawn_local(stay());
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
