//! The decisions: who gets a slot now, who waits, who is next, and who loses its place when there is no more room to wait.
//!
//! The next slot goes to the tenant with the fewest slots, and among tenants with equally few to the one that was served
//! longest ago: round robin. A tenant gets a slot only while more are free than it has. So one alone has at most half of
//! them, two have a third each, and there is always one left for a tenant that comes later, however long the handshakes
//! under way may take. Tenants may be within a tenant: which of them is next is decided in the same way, and of the slots
//! that the wider one may have each takes what it needs until an eighth is left, as with places ([`admits`]).
//! *Invariant:* nobody waits who could get a slot; a tenant's line is longer than those of others only while they do not
//! want the room.

use crate::admission::admits;
use std::collections::{BTreeMap, BTreeSet};

/// Number of a waiter, in the order of arrival.
pub(super) type Entry = u64;

/// A tenant as its steps, each within the one before. No path is the beginning of another.
pub(super) type Path<K> = Box<[K]>;

/// The answer to a request for a slot.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer<K, W> {
    /// There is a slot. `done` is to be called at its end.
    Now,
    /// Wait for [`Queue::done`] to give `W` back, or [`Queue::leave`].
    Wait {
        ticket: Entry,
        /// Who lost its place in the queue to this one, and how many of its widest tenant waited before that.
        refused: Option<(Path<K>, W, usize)>,
    },
    /// There is no room to wait, and no line is long enough to give up a place. `own`: how many of the asker's widest
    /// tenant wait.
    Full { own: usize },
}

/// The free slots, and those who wait for one: `K` is a step of a tenant, `W` is how to tell a waiter.
#[derive(Debug)]
pub(super) struct Queue<K, W> {
    free: usize,
    room: usize,
    /// Counts changes, so that earlier and later can be told.
    clock: u64,
    all: Node<K, W>,
}

/// A tenant and those within it.
#[derive(Debug)]
struct Node<K, W> {
    has: usize,
    served: u64,
    /// How many wait, of this tenant and those within it.
    waiting: usize,
    /// Those who wait of the tenant itself, where no tenants are within it.
    waiters: BTreeMap<Entry, W>,
    within: BTreeMap<K, Node<K, W>>,
    /// The tenants within of which somebody waits, the next one first: how many slots it has, and when it was served.
    next: BTreeSet<(usize, u64, K)>,
    /// The same tenants by how many wait, the longest line last.
    longest: BTreeSet<(usize, K)>,
}

/// The slots that may be given: those of the queue, or within a tenant.
#[derive(Clone, Copy)]
enum Left {
    /// So many are left.
    All { free: usize },
    /// So many are left, of so many.
    Share { free: usize, of: usize },
}

impl Left {
    /// May a tenant with so many slots get another?
    fn admits(self, has: usize) -> bool {
        match self {
            Self::All { free } => has < free,
            Self::Share { free, of } => admits(has, of - free, of),
        }
    }

    /// What is left within a tenant with so many slots.
    fn within(self, has: usize) -> Self {
        let (free, of) = match self {
            // What the tenant could take one by one while more are free than it has.
            Self::All { free } => {
                let more = (free + 1).saturating_sub(has) / 2;
                (more, has + more)
            }
            // What is left of the seven eighths, but no more than is left at all.
            Self::Share { free, of } => ((of - of / 8).saturating_sub(has).min(free), of - of / 8),
        };
        Self::Share { free, of }
    }
}

impl<K: Ord + Clone, W> Queue<K, W> {
    pub(super) fn new(slots: usize, room: usize) -> Self {
        Self { free: slots, room, clock: 0, all: Node::new(0) }
    }

    /// Asks for a slot.
    pub(super) fn ask(&mut self, path: &[K], tell: W) -> Answer<K, W> {
        if self.all.admits(path, Left::All { free: self.free }) {
            self.serve(path);
            return Answer::Now;
        }
        let refused = if self.all.waiting < self.room {
            None
        } else {
            match self.all.crowd(path) {
                Some(crowd) => self.refuse(crowd),
                None => return Answer::Full { own: self.waiting_for(path) },
            }
        };
        let ticket = self.clock;
        self.all.waiting += 1;
        self.change(path, |node, _| node.waiting += 1, |node| node.waiters.insert(ticket, tell));
        Answer::Wait { ticket, refused }
    }

    /// A handshake of this tenant is over. Returns the waiters that get a slot now, usually one at most.
    pub(super) fn done(&mut self, path: &[K]) -> Vec<(Path<K>, W)> {
        self.free += 1;
        self.change(path, |node, _| node.has = node.has.saturating_sub(1), |_| ());
        let mut told = Vec::new();
        let mut next = Vec::new();
        while self.all.next(Left::All { free: self.free }, &mut next) {
            self.serve(&next);
            self.all.waiting -= 1;
            let tell = self.change(&next, |node, _| node.waiting -= 1, |node| node.waiters.pop_first());
            let path = std::mem::take(&mut next).into();
            told.extend(tell.map(|(_, tell)| (path, tell)));
        }
        told
    }

    /// A waiter goes away. `None`: it was told already.
    pub(super) fn leave(&mut self, path: &[K], ticket: Entry) -> Option<W> {
        // Looked up first, because `change` would make a tenant that is gone anew, as an empty line.
        self.all.find(path)?.waiters.get(&ticket)?;
        self.all.waiting -= 1;
        self.change(path, |node, _| node.waiting -= 1, |node| node.waiters.remove(&ticket))
    }

    pub(super) fn waiting(&self) -> usize {
        self.all.waiting
    }

    /// How many wait of the widest tenant.
    pub(super) fn waiting_for(&self, path: &[K]) -> usize {
        path.first().and_then(|key| self.all.within.get(key)).map_or(0, |node| node.waiting)
    }

    /// Takes the newest waiter out of a line: it has waited for the shortest time.
    fn refuse(&mut self, path: Path<K>) -> Option<(Path<K>, W, usize)> {
        let own = self.waiting_for(&path);
        self.all.waiting -= 1;
        let (_, tell) = self.change(&path, |node, _| node.waiting -= 1, |node| node.waiters.pop_last())?;
        Some((path, tell, own))
    }

    fn serve(&mut self, path: &[K]) {
        self.free -= 1;
        self.change(path, |node, clock| (node.has, node.served) = (node.has + 1, clock), |_| ());
    }

    fn change<T>(
        &mut self,
        path: &[K],
        each: impl Fn(&mut Node<K, W>, u64),
        last: impl FnOnce(&mut Node<K, W>) -> T,
    ) -> T {
        self.clock += 1;
        self.all.change(path, self.clock, &each, last)
    }
}

impl<K: Ord + Clone, W> Node<K, W> {
    fn new(clock: u64) -> Self {
        let (waiters, within, next, longest) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        Self { has: 0, served: clock, waiting: 0, waiters, within, next, longest }
    }

    fn find(&self, path: &[K]) -> Option<&Self> {
        path.iter().try_fold(self, |node, key| node.within.get(key))
    }

    /// May this tenant get a slot at every step?
    fn admits(&self, path: &[K], left: Left) -> bool {
        let Some((key, rest)) = path.split_first() else { return true };
        match self.within.get(key) {
            Some(node) => left.admits(node.has) && node.admits(rest, left.within(node.has)),
            None => left.admits(0),
        }
    }

    /// The path to the next waiter, if one may get a slot.
    fn next(&self, left: Left, path: &mut Vec<K>) -> bool {
        if self.within.is_empty() {
            return !self.waiters.is_empty();
        }
        for (has, _, key) in &self.next {
            if !left.admits(*has) {
                return false;
            }
            path.push(key.clone());
            // All who wait within it may have to leave a slot for one that has not come yet.
            if self.within.get(key).is_some_and(|node| node.next(left.within(*has), path)) {
                return true;
            }
            path.pop();
        }
        false
    }

    /// A tenant whose line is longer than this one's would be, at the first step where there is any.
    fn crowd(&self, path: &[K]) -> Option<Path<K>> {
        let (mut node, mut before) = (Some(self), Vec::new());
        for key in path {
            let around = node?;
            let own = around.within.get(key).map_or(0, |node| node.waiting);
            let (length, longest) = around.longest.last()?;
            if *length > own + 1 {
                before.push(longest.clone());
                around.within.get(longest)?.to_longest(&mut before);
                return Some(before.into());
            }
            before.push(key.clone());
            node = around.within.get(key);
        }
        None
    }

    fn to_longest(&self, path: &mut Vec<K>) {
        if let Some((_, key)) = self.longest.last() {
            path.push(key.clone());
            self.within.get(key).into_iter().for_each(|node| node.to_longest(path));
        }
    }

    /// Changes the tenants on a path, and the order in which they are kept. One without slots and waiters is forgotten.
    fn change<T>(
        &mut self,
        path: &[K],
        clock: u64,
        each: &impl Fn(&mut Self, u64),
        last: impl FnOnce(&mut Self) -> T,
    ) -> T {
        let Some((key, rest)) = path.split_first() else { return last(self) };
        let node = self.within.entry(key.clone()).or_insert_with(|| Self::new(clock));
        if node.waiting > 0 {
            self.next.remove(&(node.has, node.served, key.clone()));
            self.longest.remove(&(node.waiting, key.clone()));
        }
        each(node, clock);
        let outcome = node.change(rest, clock, each, last);
        if node.waiting > 0 {
            self.next.insert((node.has, node.served, key.clone()));
            self.longest.insert((node.waiting, key.clone()));
        } else if node.has == 0 {
            self.within.remove(key);
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
    pub(super) fn check(&self, slots: usize) {
        let (has, waiting) = self.all.check();
        assert_eq!((has + self.free, waiting), (slots, self.all.waiting), "a slot or a waiter is lost");
        assert!(waiting <= self.room, "more wait than there is room for");
        assert!(!self.all.next(Left::All { free: self.free }, &mut Vec::new()), "somebody waits who could go");
        // A widest tenant without a slot could get one as long as any is free.
        let idle = self.all.within.values().any(|node| node.has == 0);
        assert!(!idle || self.free == 0, "a tenant without a slot waits while slots are free");
    }
}

#[cfg(test)]
impl<K: Ord + Clone + std::fmt::Debug, W> Node<K, W> {
    /// The slots and the waiters within.
    fn check(&self) -> (usize, usize) {
        let mut sum = (0, self.waiters.len());
        for node in self.within.values() {
            assert!(node.has > 0 || node.waiting > 0, "an empty line is kept");
            let (has, waiting) = node.check();
            assert!(waiting == node.waiting && (node.within.is_empty() || has == node.has), "a count is wrong");
            sum = (sum.0 + node.has, sum.1 + waiting);
        }
        let waits = || self.within.iter().filter(|(_, node)| node.waiting > 0);
        let next: BTreeSet<_> = waits().map(|(key, node)| (node.has, node.served, key.clone())).collect();
        let longest: BTreeSet<_> = waits().map(|(key, node)| (node.waiting, key.clone())).collect();
        assert_eq!((&next, &longest), (&self.next, &self.longest));
        sum
    }
}
