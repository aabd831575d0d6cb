//! What listens on this host, and what each of it is found to be.
//!
//! The kernel programs tell of a listening socket; who bound it, who listens and who holds it is judged here. What nobody
//! enrolled is behind is left alone; it is looked at again now and then, because a socket can be handed on.
//!
//! *Invariant:* left alone is said only after all three were looked at. What cannot be found out stays refused, and status
//! says why.

use crate::identify::attest::{Attested, Attestor};
use crate::intercept::{self, Held, Listening, Programs};
use crate::policy::Policy;
use arc_swap::ArcSwap;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use wimsey_common::{LISTENER_LEFT_ALONE, LISTENER_PROTECTED, Task};

/// How long the next walk through the processes waits for more to look for.
const GATHER: Duration = Duration::from_millis(20);

/// Every listening socket that the agent knows of.
pub(super) struct Listeners {
    known: HashMap<u64, Known>,
    /// Sockets that are to be judged next.
    waiting: HashSet<u64>,
    /// Sockets that could not be judged, and are looked at again in a moment.
    missed: HashSet<u64>,
    /// A walk through the processes is under way.
    walking: bool,
    reports: (mpsc::UnboundedSender<Report>, mpsc::UnboundedReceiver<Report>),
    hierarchy: PathBuf,
}

/// A listening socket, and what it was found to be.
pub(super) struct Known {
    pub(super) listening: Listening,
    /// None until it was judged.
    pub(super) finding: Option<Finding>,
}

/// What a listening socket was found to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) mode: u32,
    /// For whom it listens.
    pub(super) owner: Option<Task>,
    /// Identity of the owner.
    pub(super) id: Option<String>,
    /// Why connections are refused although it is protected.
    pub(super) why: Option<String>,
}

/// What comes back from beside the loop.
pub(super) enum Report {
    /// As it was when it was read, what it was found to be, and by the policy of which generation.
    Judged(Box<(Listening, Finding, u32)>),
    /// The walk is over, or could not be made; these were not found.
    Walked(Vec<u64>, Result<(), intercept::Error>),
}

impl Listeners {
    pub(super) fn new(hierarchy: &Path) -> Self {
        Self {
            known: HashMap::new(),
            waiting: HashSet::new(),
            missed: HashSet::new(),
            walking: false,
            reports: mpsc::unbounded_channel(),
            hierarchy: hierarchy.into(),
        }
    }

    /// Every socket that is known.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Known> {
        self.known.values()
    }

    /// A socket listens, or is to be looked at again.
    pub(super) fn note(&mut self, listening: Listening) {
        let finding = self.known.remove(&listening.cookie).and_then(|known| known.finding);
        self.known.insert(listening.cookie, Known { listening, finding });
        self.waiting.insert(listening.cookie);
    }

    /// All that listens: what is not among it is gone.
    pub(super) fn note_all(&mut self, all: Vec<Listening>) {
        let there: HashSet<u64> = all.iter().map(|listening| listening.cookie).collect();
        self.known.retain(|cookie, _| there.contains(cookie));
        all.into_iter().for_each(|listening| self.note(listening));
    }

    pub(super) fn closed(&mut self, cookie: u64) {
        self.known.remove(&cookie);
    }

    /// What is nobody's in particular is looked at again: somebody may have been given it, or be known by now.
    pub(super) fn look_again(&mut self) {
        let unsettled = self.known.iter().filter(|(_, known)| !known.is_settled());
        self.waiting.extend(unsettled.map(|(cookie, _)| *cookie).chain(self.missed.drain()));
    }

    /// The next report. Cancel safe.
    pub(super) async fn report(&mut self) -> Option<Report> {
        self.reports.1.recv().await
    }

    /// Begins to judge what waits, unless that is under way.
    pub(super) fn judge(&mut self, attestor: &Arc<Attestor>, policy: &ArcSwap<Policy>, programs: &Programs) {
        if self.walking || self.waiting.is_empty() {
            return;
        }
        self.walking = true;
        let waiting = std::mem::take(&mut self.waiting);
        // As they are before anybody looks at them: what happens meanwhile is seen by that.
        let (mut listening, mut missed) = (Vec::new(), Vec::new());
        for cookie in waiting.iter().filter(|cookie| self.known.contains_key(cookie)) {
            match programs.listener(*cookie) {
                Ok(row) => listening.extend(row),
                Err(_) => missed.push(*cookie),
            }
        }
        let (policy, generation) = (policy.load_full(), programs.generation());
        let (attestor, hierarchy, report) = (attestor.clone(), self.hierarchy.clone(), self.reports.0.clone());
        tokio::task::spawn_local(async move {
            let who = (attestor.clone(), policy.clone());
            let walk = tokio::task::spawn_blocking(move || {
                intercept::holders(&waiting, &hierarchy, &|task| who.0.may_be_enrolled(task, &who.1))
            });
            let walk = walk.await;
            let ended = |error| {
                let what = "who holds the listening sockets cannot be found out".into();
                intercept::Error::Host { what, error: std::io::Error::other(error) }
            };
            let walked = match walk.unwrap_or_else(|error| Err(ended(error))) {
                Ok(held) => {
                    for listening in listening {
                        // One that is on no list is gone, or stood behind one that went while the kernel told of it
                        // (`tcp_diag_dump` in net/ipv4/tcp_diag.c counts its way back).
                        let Some(held) = held.get(&listening.cookie) else {
                            missed.push(listening.cookie);
                            continue;
                        };
                        let finding = judge(&attestor, &policy, &listening, held).await;
                        let _ = report.send(Report::Judged(Box::new((listening, finding, generation))));
                    }
                    Ok(())
                }
                Err(error) => {
                    missed.extend(listening.iter().map(|listening| listening.cookie));
                    Err(error)
                }
            };
            tokio::time::sleep(GATHER).await;
            // The loop outlives all reports but those that nobody needs any more.
            let _ = report.send(Report::Walked(missed, walked));
        });
    }

    /// Takes a report, and tells the kernel what a socket was found to be.
    pub(super) fn take(&mut self, report: Report, programs: &Programs) -> Result<(), intercept::Error> {
        let (listening, finding, generation) = match report {
            Report::Walked(missed, walked) => {
                self.walking = false;
                self.missed.extend(missed.iter().filter(|cookie| self.known.contains_key(cookie)));
                return walked;
            }
            Report::Judged(judged) => *judged,
        };
        let cookie = listening.cookie;
        let Some(known) = self.known.get_mut(&cookie) else { return Ok(()) };
        if known.finding.as_ref() == Some(&finding) && listening.mode() == finding.mode {
            return Ok(());
        }
        known.listening = listening;
        let owner = finding.owner.filter(|owner| *owner != listening.row.owner);
        if !programs.judged(&listening, finding.mode, owner, generation)? {
            // Somebody else has said something about it meanwhile, or it is gone.
            self.waiting.insert(cookie);
            return Ok(());
        }
        let address = known.listening.address();
        if known.is_left_alone() && finding.mode == LISTENER_PROTECTED {
            tracing::warn!(%address, id = ?finding.id, why = ?finding.why,
                "a listening socket that had been left alone is held by a process that is enrolled: it took plaintext \
                 until now. Name its address in [[inbound]] listen");
        } else if let Some(why) = &finding.why {
            tracing::warn!(%address, why, "connections to a listening socket are refused");
        }
        known.listening.row.mode = u64::from(finding.mode);
        if let Some(owner) = owner {
            known.listening.row.owner = owner;
        }
        known.finding = Some(finding);
        Ok(())
    }
}

impl Known {
    /// It is somebody's, and not for want of knowing better.
    fn is_settled(&self) -> bool {
        self.finding.as_ref().is_some_and(|finding| finding.id.is_some() && finding.why.is_none())
    }

    fn is_left_alone(&self) -> bool {
        self.finding.as_ref().is_some_and(|finding| finding.mode == LISTENER_LEFT_ALONE)
    }
}

/// Binder, listener and holders: whoever of them is a workload makes the socket that workload's.
async fn judge(attestor: &Attestor, policy: &Policy, listening: &Listening, held: &Held) -> Finding {
    let row = &listening.row;
    let mut tasks: Vec<Task> = Vec::new();
    for task in [row.binder, row.owner].iter().chain(&held.holders).filter(|task| task.tgid != 0) {
        let same = |other: &Task| (other.uid, other.gid, other.cgroup) == (task.uid, task.gid, task.cgroup);
        if !tasks.iter().any(same) {
            tasks.push(*task);
        }
    }
    let mut found: Option<(Task, String)> = None;
    let mut why = None;
    for task in tasks {
        match attestor.owner(Some(&task), listening.cookie, policy).await {
            Ok(Attested { workload: Some(workload), .. }) => {
                let id = workload.id.to_string();
                match &found {
                    Some((_, other)) if *other != id => {
                        why = Some(format!(
                            "it belongs to {other} and to {id}: a socket can be that of one workload only"
                        ));
                    }
                    _ => found = Some((Task { workload: workload.number, ..task }, id)),
                }
            }
            Ok(Attested { workload: None, facts }) if attestor.may_be_enrolled(&task, policy) => {
                why.get_or_insert_with(|| {
                    format!("{facts} has the user, group and cgroup of an entry, but not its unix:path or unix:sha256")
                });
            }
            Ok(_) => {}
            // The kernel has judged the binder when it was there.
            Err(_) if task == row.binder && row.bound == LISTENER_LEFT_ALONE => {}
            Err(error) => why = Some(error.to_string()),
        }
    }
    match found {
        Some((owner, id)) => {
            // Others that hold it, and are nobody, change nothing.
            let why = why.filter(|why| why.starts_with("it belongs"));
            Finding { mode: LISTENER_PROTECTED, owner: Some(owner), id: Some(id), why }
        }
        None if why.is_some() => Finding { mode: LISTENER_PROTECTED, owner: None, id: None, why },
        None => Finding { mode: LISTENER_LEFT_ALONE, owner: None, id: None, why: None },
    }
}
