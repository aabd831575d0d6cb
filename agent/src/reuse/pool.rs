//! The idle connections of one shard, by whom they may serve next. Only the client's side has a pool, since only the client
//! begins streams.
//!
//! *Invariant:* a connection that is taken from here was made under the policy that is in force and is within its limits of
//! age and use; and there is a bound on how many are kept.

use crate::authorize::Permit;
use crate::config::Sessions;
use crate::policy::Policy;
use crate::relay::IdleSession;
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Whom a connection may serve: the same workload, from the same address of this host, to the same destination. Who is at
/// that destination is looked at again when it is used.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    workload: u32,
    from: Option<IpAddr>,
    destination: SocketAddr,
}

impl Key {
    /// The key of what this permit allows.
    pub fn of(permit: &Permit) -> Self {
        let parties = permit.parties();
        Self {
            workload: parties.workload.number,
            from: parties.flow.dial_from().map(|from| from.ip()),
            destination: parties.flow.destination.0,
        }
    }
}

/// Idle connections.
pub struct Pool {
    limits: Sessions,
    /// How many there may be, all together.
    most: usize,
    policy: Option<Arc<Policy>>,
    spares: HashMap<Key, VecDeque<Spare>>,
    held: usize,
    closed: bool,
}

/// A connection that may be used.
pub struct Spare {
    idle: IdleSession,
    since: Instant,
}

/// How long after it was last heard of a peer is taken to be still there.
const RECENT: Duration = Duration::from_secs(1);

impl Pool {
    /// An empty one, for so many.
    pub fn new(limits: Sessions, most: usize) -> Self {
        Self { limits, most: most.max(1), policy: None, spares: HashMap::new(), held: 0, closed: false }
    }

    /// A connection for this key, the one that was used last.
    pub fn take(&mut self, policy: &Arc<Policy>, key: &Key) -> Option<Spare> {
        self.follow(policy);
        let spares = self.spares.get_mut(key)?;
        let mut found = None;
        while found.is_none() {
            let Some(spare) = spares.pop_back() else { break };
            self.held -= 1;
            if spare.is_good(&self.limits, Instant::now()) {
                found = Some(spare);
            } else {
                spare.idle.close();
            }
        }
        if spares.is_empty() {
            self.spares.remove(key);
        }
        found
    }

    /// Keeps a connection for the next flow with this key. It is closed where there is no room for it, where it is too old,
    /// or where the policy is another by now.
    pub fn put(&mut self, policy: &Arc<Policy>, key: &Key, idle: IdleSession) {
        let spare = Spare { idle, since: Instant::now() };
        let is_other = self.policy.as_ref().is_some_and(|current| !Arc::ptr_eq(current, policy));
        let is_full = self.held >= self.most;
        if self.closed || is_other || is_full || !spare.is_good(&self.limits, spare.since) {
            return spare.idle.close();
        }
        self.policy = Some(policy.clone());
        let spares = self.spares.entry(key.clone()).or_default();
        if spares.len() >= self.limits.spares {
            return spare.idle.close();
        }
        spares.push_back(spare);
        self.held += 1;
    }

    /// Closes those for this key.
    pub fn forget(&mut self, key: &Key) {
        for spare in self.spares.remove(key).into_iter().flatten() {
            self.held -= 1;
            spare.idle.close();
        }
    }

    /// Closes what has been idle for too long, or is too old.
    pub fn sweep(&mut self, now: Instant) {
        let limits = self.limits;
        let mut kept = 0;
        for spares in self.spares.values_mut() {
            for spare in std::mem::take(spares) {
                if spare.is_good(&limits, now) {
                    spares.push_back(spare);
                } else {
                    spare.idle.close();
                }
            }
            kept += spares.len();
        }
        self.held = kept;
        self.spares.retain(|_, spares| !spares.is_empty());
    }

    /// Closes all of them.
    pub fn clear(&mut self) {
        for spare in self.spares.drain().flat_map(|(_, spares)| spares) {
            spare.idle.close();
        }
        (self.held, self.policy) = (0, None);
    }

    /// Closes all of them, and keeps no more.
    pub fn close(&mut self) {
        self.closed = true;
        self.clear();
    }

    /// Closes everything if the policy has changed: what was made under another one has to be made again.
    fn follow(&mut self, policy: &Arc<Policy>) {
        if self.policy.as_ref().is_some_and(|current| !Arc::ptr_eq(current, policy)) {
            self.clear();
        }
        self.policy.get_or_insert_with(|| policy.clone());
    }
}

impl Spare {
    /// Was the peer heard of a moment ago?
    pub(super) fn is_recent(&self) -> bool {
        self.since.elapsed() < RECENT
    }

    pub(super) fn into_idle(self) -> IdleSession {
        self.idle
    }

    fn is_good(&self, limits: &Sessions, now: Instant) -> bool {
        now.saturating_duration_since(self.since) < limits.idle
            && limits.allows(self.idle.agreement().since, self.idle.streams())
    }
}
