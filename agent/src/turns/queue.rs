//! The decisions: who goes now, who waits, who is next, and who has to go when there is no more room.
//!
//! Next is who has the fewest turns, and among those with as few, who was served longest ago: round robin. A party gets a
//! turn only while more are free than it has. So one alone has at most half of them, two have a third each, and there is
//! always one left for whoever comes next, however long those that are under way may take.
//! *Invariant:* nobody waits who could go; no line is longer than it has to be for want of others.

use std::collections::{BTreeMap, BTreeSet};

/// Number of a waiter, in the order of coming.
pub(super) type Ticket = u64;

/// What whoever asks is told.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer<K, W> {
    /// Go. `done` is to be called at the end.
    Now,
    /// Wait for [`Queue::done`] to give `W` back, or [`Queue::leave`].
    Wait {
        ticket: Ticket,
        /// Who lost its place for this one, with the length of its line before that.
        refused: Option<(K, W, usize)>,
    },
    /// There is no room, and nobody's line is longer than one's own, which is this long.
    Full { own: usize },
}

/// Turns, and those who wait for one: `K` is whose it is, `W` is how to tell.
#[derive(Debug)]
pub(super) struct Queue<K, W> {
    free: usize,
    room: usize,
    waiting: usize,
    /// Counts what happens, so that earlier and later can be told.
    clock: u64,
    lines: BTreeMap<K, Line<W>>,
    /// Those whose line is not empty, the next one first: turns they have, when they were served.
    next: BTreeSet<(usize, u64, K)>,
    /// The same, the longest line last.
    longest: BTreeSet<(usize, K)>,
}

#[derive(Debug)]
struct Line<W> {
    has: usize,
    served: u64,
    waiters: BTreeMap<Ticket, W>,
}

impl<K: Ord + Clone, W> Queue<K, W> {
    pub(super) fn new(turns: usize, room: usize) -> Self {
        let (lines, next, longest) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        Self { free: turns, room, waiting: 0, clock: 0, lines, next, longest }
    }

    /// Asks for a turn.
    pub(super) fn ask(&mut self, key: K, tell: W) -> Answer<K, W> {
        let (has, own) = self.lines.get(&key).map_or((0, 0), |line| (line.has, line.waiters.len()));
        if has < self.free {
            self.free -= 1;
            self.change(&key, |line, clock| (line.has, line.served) = (line.has + 1, clock));
            return Answer::Now;
        }
        let refused = if self.waiting < self.room {
            None
        } else {
            match self.longest.last() {
                Some((length, longest)) if *length > own + 1 => self.refuse(*length, &longest.clone()),
                _ => return Answer::Full { own },
            }
        };
        let ticket = self.clock;
        self.waiting += 1;
        self.change(&key, |line, _| line.waiters.insert(ticket, tell));
        Answer::Wait { ticket, refused }
    }

    /// A turn of this party is over. Who has it now, if anybody waits who may.
    pub(super) fn done(&mut self, key: &K) -> Option<(K, W)> {
        self.free += 1;
        self.change(key, |line, _| line.has = line.has.saturating_sub(1));
        let (has, _, key) = self.next.first()?;
        if *has >= self.free {
            return None;
        }
        let key = key.clone();
        let tell = self.change(&key, |line, clock| {
            (line.has, line.served) = (line.has + 1, clock);
            line.waiters.pop_first()
        });
        let (_, tell) = tell?;
        self.free -= 1;
        self.waiting -= 1;
        Some((key, tell))
    }

    /// A waiter goes away. `None`: it was told already.
    pub(super) fn leave(&mut self, key: &K, ticket: Ticket) -> Option<W> {
        // Without this a party that is gone would come back as an empty line for a moment.
        self.lines.get(key)?.waiters.get(&ticket)?;
        let gone = self.change(key, |line, _| line.waiters.remove(&ticket));
        self.waiting -= usize::from(gone.is_some());
        gone
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    pub(super) fn waiting_for(&self, key: &K) -> usize {
        self.lines.get(key).map_or(0, |line| line.waiters.len())
    }

    /// Takes the newest out of a line: it has waited for the least.
    fn refuse(&mut self, length: usize, key: &K) -> Option<(K, W, usize)> {
        let (_, tell) = self.change(key, |line, _| line.waiters.pop_last())?;
        self.waiting -= 1;
        Some((key.clone(), tell, length))
    }

    /// Changes a line and what is known about it. A party without turns and waiters is forgotten.
    fn change<T>(&mut self, key: &K, change: impl FnOnce(&mut Line<W>, u64) -> T) -> T {
        self.clock += 1;
        let clock = self.clock;
        let fresh = || Line { has: 0, served: clock, waiters: BTreeMap::new() };
        let line = self.lines.entry(key.clone()).or_insert_with(fresh);
        if !line.waiters.is_empty() {
            self.next.remove(&(line.has, line.served, key.clone()));
            self.longest.remove(&(line.waiters.len(), key.clone()));
        }
        let outcome = change(line, clock);
        if !line.waiters.is_empty() {
            self.next.insert((line.has, line.served, key.clone()));
            self.longest.insert((line.waiters.len(), key.clone()));
        } else if line.has == 0 {
            self.lines.remove(key);
        }
        outcome
    }
}

#[cfg(test)]
impl<K: Ord + Clone + std::fmt::Debug, W> Queue<K, W> {
    pub(super) fn free(&self) -> usize {
        self.free
    }

    /// What must hold at any time.
    pub(super) fn check(&self, turns: usize) {
        let has: usize = self.lines.values().map(|line| line.has).sum();
        let waiting: usize = self.lines.values().map(|line| line.waiters.len()).sum();
        assert_eq!((has + self.free, waiting), (turns, self.waiting), "a turn or a waiter is lost");
        assert!(self.waiting <= self.room, "more wait than there is room for");
        assert!(self.lines.values().all(|line| line.has > 0 || !line.waiters.is_empty()), "an empty line is kept");
        let wait: BTreeSet<_> = self
            .lines
            .iter()
            .filter(|(_, line)| !line.waiters.is_empty())
            .collect::<Vec<_>>()
            .into_iter()
            .map(|(key, line)| (line.has, line.served, key.clone()))
            .collect();
        assert_eq!(wait, self.next);
        assert_eq!(wait.len(), self.longest.len());
        assert!(wait.iter().all(|(has, ..)| *has >= self.free), "somebody waits who could go");
    }
}
