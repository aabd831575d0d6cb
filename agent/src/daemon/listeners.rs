//! What listens on this host, and what each listening socket is found to be.
//!
//! The kernel programs report listening sockets; who bound one, who listens on it and who holds it is judged here. A socket
//! with nobody enrolled behind it is left alone, and looked at again now and then, because a socket can be passed to
//! another process.
//!
//! *Invariant:* a socket is left alone only after all three were looked at. One of which something cannot be found out
//! stays refused, and status says why.

use crate::attest::{Attested, Attestor};
use crate::intercept::{self, Held, Listening, Programs, Walk};
use crate::policy::Policy;
use arc_swap::ArcSwap;
use bunter_common::{LISTENER_LEFT_ALONE, LISTENER_PROTECTED, Task};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

mod lines;

/// How long the next walk through the processes waits, so that it looks for more sockets at once.
const GATHER: Duration = Duration::from_millis(20);
/// How long a walk goes on before what it has found is reported.
const STRIDE: Duration = Duration::from_millis(100);

/// After how many walks in a row that did not find a socket all listening sockets are read anew.
const GONE: u32 = 2;

/// Every listening socket that the agent knows of.
pub(super) struct Listeners {
    known: HashMap<u64, Known>,
    /// Sockets that are to be judged next.
    waiting: HashSet<u64>,
    /// Sockets that could not be judged, and are looked at again in a moment.
    missed: HashSet<u64>,
    /// Some sockets have been missing for so long that all are to be read anew.
    stale: bool,
    /// Sockets that were judged and are to be looked at again.
    again: HashSet<u64>,
    /// A walk through the processes is under way.
    walking: bool,
    /// Where the walk is only for sockets that are looked at again: tells it to stop because others wait that were not
    /// looked at yet.
    make_way: Option<Arc<AtomicBool>>,
    lines: lines::Lines,
    reports: (mpsc::UnboundedSender<Report>, mpsc::UnboundedReceiver<Report>),
    hierarchy: PathBuf,
}

/// A listening socket, and what it was found to be.
pub(super) struct Known {
    pub(super) listening: Listening,
    /// None until it was judged.
    pub(super) finding: Option<Finding>,
    /// How many walks in a row have not found it among what listens.
    unlisted: u32,
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

impl Finding {
    fn is_settled(&self) -> bool {
        self.id.is_some() && self.why.is_none()
    }
}

/// What comes back from beside the loop.
pub(super) enum Report {
    /// The socket as it was when it was read, what it was found to be, and by the policy of which generation.
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
            stale: false,
            again: HashSet::new(),
            walking: false,
            make_way: None,
            lines: lines::Lines::default(),
            reports: mpsc::unbounded_channel(),
            hierarchy: hierarchy.into(),
        }
    }

    /// Every socket that is known.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Known> {
        self.known.values()
    }

    /// The listeners that have not been judged yet. One that is gone is among them until all that listens has been listed.
    pub(super) fn unjudged(&self) -> HashSet<u64> {
        let unjudged = self.known.iter().filter(|(_, known)| known.finding.is_none());
        unjudged.map(|(cookie, _)| *cookie).collect()
    }

    /// A socket listens, or is to be looked at again.
    pub(super) fn note(&mut self, listening: Listening) {
        let finding = self.known.remove(&listening.cookie).and_then(|known| known.finding);
        self.known.insert(listening.cookie, Known { listening, finding, unlisted: 0 });
        self.waiting.insert(listening.cookie);
    }

    /// Takes the list of all listening sockets: one that is not in it is gone.
    pub(super) fn note_all(&mut self, all: Vec<Listening>) {
        let there: HashSet<u64> = all.iter().map(|listening| listening.cookie).collect();
        self.known.retain(|cookie, _| there.contains(cookie));
        all.into_iter().for_each(|listening| self.note(listening));
    }

    pub(super) fn closed(&mut self, cookie: u64) {
        self.known.remove(&cookie);
    }

    /// Marks sockets to be looked at again: those that are not settled, because somebody may have been given them or be
    /// known by now, and those whose end nothing reports.
    pub(super) fn look_again(&mut self) {
        self.lines.write_counts(Instant::now());
        let unsettled = self.known.iter().filter(|(_, known)| !known.is_settled() || !known.is_watched());
        self.again.extend(unsettled.map(|(cookie, _)| *cookie));
        self.waiting.extend(self.missed.drain());
    }

    /// Have sockets probably stopped listening without a report of it? The answer is true once, until more of them are
    /// found.
    pub(super) fn are_stale(&mut self) -> bool {
        std::mem::take(&mut self.stale)
    }

    /// The next report. Cancel safe.
    pub(super) async fn report(&mut self) -> Option<Report> {
        self.reports.1.recv().await
    }

    /// Begins to judge what waits, unless that is under way.
    pub(super) fn judge(&mut self, attestor: &Arc<Attestor>, policy: &ArcSwap<Policy>, programs: &Programs) {
        if self.walking {
            if let Some(make_way) = self.make_way.as_ref().filter(|_| !self.waiting.is_empty()) {
                make_way.store(true, Ordering::Relaxed);
            }
            return;
        }
        let mut waiting = std::mem::take(&mut self.waiting);
        // In a walk for sockets that were not looked at yet, those that are looked at again cost nothing more. A walk for
        // the latter alone makes way for the former.
        let make_way = Arc::new(AtomicBool::new(false));
        self.make_way = waiting.is_empty().then(|| make_way.clone());
        waiting.extend(self.again.drain());
        if waiting.is_empty() {
            return;
        }
        self.walking = true;
        // The rows are read before anybody looks at the sockets, so that a change meanwhile is noticed when the finding is
        // written.
        let (mut listening, mut missed) = (Vec::new(), Vec::new());
        for cookie in waiting.iter().filter(|cookie| self.known.contains_key(cookie)) {
            match programs.listener(*cookie) {
                Ok(row) => listening.extend(row),
                Err(_) => missed.push(*cookie),
            }
        }
        let report = self.reports.0.clone();
        let mut round = Round {
            listening,
            missed,
            told: HashMap::new(),
            attestor: attestor.clone(),
            policy: policy.load_full(),
            generation: programs.generation(),
            make_way,
            report: report.clone(),
        };
        let hierarchy = self.hierarchy.clone();
        tokio::task::spawn_local(async move {
            let walked = round.walk(waiting, hierarchy).await;
            if walked.is_err() {
                round.missed.extend(round.listening.iter().map(|listening| listening.cookie));
            }
            tokio::time::sleep(GATHER).await;
            // If the loop is gone, nobody needs the report.
            let _ = report.send(Report::Walked(round.missed, walked));
        });
    }

    /// Takes a report, and tells the kernel what a socket was found to be.
    pub(super) fn take(&mut self, report: Report, programs: &Programs) -> Result<(), intercept::Error> {
        let (listening, finding, generation) = match report {
            Report::Walked(missed, walked) => {
                self.walking = false;
                for cookie in missed {
                    let Some(known) = self.known.get_mut(&cookie) else { continue };
                    known.unlisted += 1;
                    self.stale |= known.unlisted >= GONE;
                    self.missed.insert(cookie);
                }
                return walked;
            }
            Report::Judged(judged) => *judged,
        };
        let cookie = listening.cookie;
        let Some(known) = self.known.get_mut(&cookie) else { return Ok(()) };
        known.unlisted = 0;
        if known.finding.as_ref() == Some(&finding) && listening.mode() == finding.mode {
            return Ok(());
        }
        known.listening = listening;
        let owner = finding.owner.filter(|owner| *owner != listening.row.owner);
        if !programs.judged(&listening, finding.mode, owner, generation)? {
            // The policy or the socket has changed meanwhile, or the socket is gone.
            self.waiting.insert(cookie);
            return Ok(());
        }
        let address = known.listening.address();
        let was_left_alone = known.is_left_alone() && finding.mode == LISTENER_PROTECTED;
        let uid = owner.unwrap_or(known.listening.row.owner).uid;
        if !(was_left_alone || finding.why.is_some()) || !self.lines.may_write(uid, Instant::now()) {
            // There is no line to write, or it has only been counted.
        } else if was_left_alone {
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
    /// Was it found to be one workload's, with nothing in doubt?
    fn is_settled(&self) -> bool {
        self.finding.as_ref().is_some_and(Finding::is_settled)
    }

    /// Do the kernel programs report when it is closed? A socket of unknown binder began to listen before they were
    /// attached, and if it is one of multipath TCP they do not see its end.
    fn is_watched(&self) -> bool {
        self.listening.row.binder.tgid != 0
    }

    fn is_left_alone(&self) -> bool {
        self.finding.as_ref().is_some_and(|finding| finding.mode == LISTENER_LEFT_ALONE)
    }
}

/// One look at sockets that wait.
struct Round {
    listening: Vec<Listening>,
    /// Those that could not be looked at.
    missed: Vec<u64>,
    /// How many holders of a socket had been found when it was last judged during the walk.
    told: HashMap<u64, usize>,
    attestor: Arc<Attestor>,
    policy: Arc<Policy>,
    generation: u32,
    /// Set when other sockets wait that were not looked at yet.
    make_way: Arc<AtomicBool>,
    report: mpsc::UnboundedSender<Report>,
}

impl Round {
    /// Looks who holds the sockets, and reports what they are: that one is a workload's as soon as that is seen, that one
    /// is nobody's only when every process has been looked at.
    async fn walk(&mut self, cookies: HashSet<u64>, hierarchy: PathBuf) -> Result<(), intercept::Error> {
        let who = (self.attestor.clone(), self.policy.clone());
        let begin = move || Walk::begin(&cookies, &hierarchy, &|task| who.0.may_be_enrolled(task, &who.1));
        let mut walk = beside(begin).await??;
        loop {
            let done;
            (done, walk) = beside(move || (walk.go_on(STRIDE), walk)).await?;
            if done {
                break;
            }
            self.report_early(&walk).await;
            if self.make_way.load(Ordering::Relaxed) {
                // A socket that was not judged stays as it was, and is looked at again.
                return Ok(());
            }
        }
        let mut nobodys = Vec::new();
        for listening in std::mem::take(&mut self.listening) {
            // A socket that is not listed is gone, or was skipped because one before it went while the kernel listed them
            // (`tcp_diag_dump` in net/ipv4/tcp_diag.c finds its place by counting).
            match walk.held(listening.cookie) {
                None => self.missed.push(listening.cookie),
                Some(held) if held.holders.is_empty() && !is_recorded(&listening) => nobodys.push((listening, held)),
                Some(held) => self.report(listening, &held, true).await,
            }
        }
        if nobodys.is_empty() {
            return Ok(());
        }
        let cookies = nobodys.iter().map(|(listening, _)| listening.cookie).collect();
        let somebodys = beside(move || walk.held_by_others(&cookies, STRIDE)).await?;
        for (listening, held) in nobodys {
            self.report(listening, &held, somebodys.contains(&listening.cookie)).await;
        }
        Ok(())
    }

    /// Reports the sockets that are seen to be a workload's already, so that they need not wait for processes with very
    /// many descriptors.
    async fn report_early(&mut self, walk: &Walk) {
        for listening in &self.listening {
            let Some(held) = walk.held(listening.cookie) else { continue };
            let told = self.told.entry(listening.cookie).or_default();
            if held.holders.len() == *told {
                continue;
            }
            *told = held.holders.len();
            let finding = judge(&self.attestor, &self.policy, listening, &held, true).await;
            if finding.is_settled() {
                let judged = Report::Judged(Box::new((*listening, finding, self.generation)));
                let _ = self.report.send(judged);
            }
        }
    }

    async fn report(&self, listening: Listening, held: &Held, is_held: bool) {
        let finding = judge(&self.attestor, &self.policy, &listening, held, is_held).await;
        let _ = self.report.send(Report::Judged(Box::new((listening, finding, self.generation))));
    }
}

/// Does work that would block the loop on a thread of its own.
async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, intercept::Error> {
    tokio::task::spawn_blocking(work).await.map_err(|error| intercept::Error::Host {
        what: "who holds the listening sockets cannot be found out".into(),
        error: std::io::Error::other(error),
    })
}

/// Is anything known of who bound it, or began to listen?
fn is_recorded(listening: &Listening) -> bool {
    listening.row.binder.tgid != 0 || listening.row.owner.tgid != 0
}

/// The reason that is given where connections to a listening socket are refused because no process is found behind it.
const NOBODYS: &str = "no process can be found that bound it, began to listen or holds it, as where it is in io_uring or on its \
                       way in a message alone, or is the kernel's own: start its server again while the agent runs";

/// Judges by binder, listener and holders: if any of them is a workload, the socket is that workload's. `is_held`: some
/// process holds the socket, be it one that no entry can match.
async fn judge(attestor: &Attestor, policy: &Policy, listening: &Listening, held: &Held, is_held: bool) -> Finding {
    let row = &listening.row;
    let mut tasks: Vec<Task> = Vec::new();
    for task in [row.binder, row.owner].iter().chain(&held.holders).filter(|task| task.tgid != 0) {
        let same = |other: &Task| (other.uid, other.gid, other.cgroup) == (task.uid, task.gid, task.cgroup);
        if !tasks.iter().any(same) {
            tasks.push(*task);
        }
    }
    let all_are_nobody = held.holders.is_empty() && held.unread.is_none();
    let mut found: Option<(Task, String)> = None;
    let mut why = held.unread.clone();
    if tasks.is_empty() && !is_held {
        why = Some(NOBODYS.into());
    }
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
            // The binder is gone. When it bound the socket, the kernel found it to be nobody enrolled.
            Err(_) if task == row.binder && row.bound == LISTENER_LEFT_ALONE => {}
            // A recorded process was nobody, as far as can be said now that its cgroup is gone: then those who hold the
            // socket now decide.
            Err(_) if all_are_nobody && attestor.was_nobody(&task, policy) => {}
            Err(error) => why = Some(error.to_string()),
        }
    }
    match found {
        Some((owner, id)) => {
            // What is unclear about the others changes nothing, unless the socket belongs to a second workload.
            let why = why.filter(|why| why.starts_with("it belongs"));
            Finding { mode: LISTENER_PROTECTED, owner: Some(owner), id: Some(id), why }
        }
        None if why.is_some() => Finding { mode: LISTENER_PROTECTED, owner: None, id: None, why },
        None => Finding { mode: LISTENER_LEFT_ALONE, owner: None, id: None, why: None },
    }
}
