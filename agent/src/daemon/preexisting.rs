//! Connections that were there before their workload was enrolled: what the policy says becomes of them.
//!
//! *Invariant:* a connection whose time is up is closed; where that fails, the reason is noted and it is tried again.

use super::troubles::Troubles;
use crate::admin::PreexistingStatus;
use crate::intercept::{OldConnection, Programs, Work};
use crate::policy::{self, Policy};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Instant;

/// Those that are known.
#[derive(Default)]
pub(super) struct Preexisting {
    /// By their two ends, and when each is to be closed.
    known: HashMap<(SocketAddr, SocketAddr), (OldConnection, Option<Instant>)>,
    /// Something could not be done, and is to be tried again.
    due: bool,
}

impl Preexisting {
    /// Is something to be tried again?
    pub(super) fn is_due(&self) -> bool {
        self.due
    }

    /// Looks for them, and closes those whose time is up.
    pub(super) fn look(&mut self, programs: &Programs, policy: &Policy, troubles: &mut Troubles) {
        let found = programs.preexisting(|to| policy.is_mesh(to));
        self.due = found.is_err();
        let Some(found) = troubles.observe(Work::OldConnections, found) else { return };
        self.known.retain(|ends, _| found.iter().any(|old| (old.local, old.remote) == *ends));
        for old in found {
            let due = match policy.preexisting() {
                policy::Preexisting::Keep => None,
                policy::Preexisting::Drain(time) => Some(Instant::now() + time),
                policy::Preexisting::Kill => Some(Instant::now()),
            };
            self.known.entry((old.local, old.remote)).or_insert((old, due));
        }
        self.close(programs, troubles);
    }

    /// Closes those whose time is up.
    pub(super) fn close(&mut self, programs: &Programs, troubles: &mut Troubles) {
        let now = Instant::now();
        let again = &mut self.due;
        self.known.retain(|_, (old, due)| {
            if due.is_none_or(|due| due > now) {
                return true;
            }
            match programs.kill(old) {
                Ok(_) => {
                    tracing::info!(local = %old.local, remote = %old.remote, "closed a connection from before enrolment");
                    false
                }
                Err(error) => {
                    troubles.note(Work::OldConnections, &format!("{} - {}: {error}", old.local, old.remote));
                    *again = true;
                    true
                }
            }
        });
    }

    /// For `bunter status`.
    pub(super) fn status(&self) -> Vec<PreexistingStatus> {
        let describe = |(old, due): &(OldConnection, Option<Instant>)| PreexistingStatus {
            local: old.local,
            remote: old.remote,
            action: match due {
                None => "keep".into(),
                Some(due) => format!("closed in {} s", due.saturating_duration_since(Instant::now()).as_secs()),
            },
        };
        self.known.values().map(describe).collect()
    }
}
