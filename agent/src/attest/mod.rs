//! Who is behind a socket: what the kernel recorded about a task in, a registration entry out.
//!
//! uid, gid and cgroup are facts that the kernel recorded in the task's own context. What only user space can see, the
//! executable, is read from the process while it is pinned, and only if an entry asks for it. It narrows an entry, but what
//! separates workloads are the kernel's facts: a process with the same ids and cgroup can make another one run any code.
//!
//! *Invariant:* what was read counts only if the process is still there and still the same at the end. Nothing that a
//! process says about itself is looked at.

mod cgroup;
mod digest;
mod error;
mod evidence;
mod facts;
mod process;

pub use error::AttestError;
pub use facts::{Attested, Facts};

use crate::{
    flow::Comm,
    lock::lock,
    policy::{Ambiguous, Evidence, Policy, Workload},
};
use bunter_common::Task;
use cgroup::Hierarchy;
use digest::Digests;
use evidence::{Decision, Gathered, Known, Need};
use process::{Executable, Ids, Process, StartTime, is_gone};
use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// Finds out which registration entry a process is. One for the whole agent.
#[derive(Debug)]
pub struct Attestor {
    hierarchy: Hierarchy,
    digests: Digests,
    /// Owners that were found for listening sockets without a record, by socket cookie, remembered for a moment.
    found: Mutex<HashMap<u64, (u32, StartTime, Instant)>>,
    /// Processes that dialled a moment ago, by their number.
    verified: Mutex<HashMap<u32, Verified>>,
}

/// How long what was found out about a process that dials holds without another look at it.
const HOLDS: Duration = Duration::from_millis(100);
/// How long the owner that was found for a listening socket holds.
const OWNER_HOLDS: Duration = Duration::from_secs(1);
/// Most dialling processes that are remembered. Each holds two descriptors.
const VERIFIED: usize = 256;

/// A process whose ids and cgroup were seen to be those that the kernel had recorded.
#[derive(Clone, Debug)]
struct Verified {
    process: Arc<Process>,
    /// uid, gid and cgroup.
    recorded: (u32, u32, u64),
    ids: Ids,
    cgroup: Option<Arc<str>>,
    at: Instant,
}

/// Whatever can say which workload shows this evidence: the policy.
pub trait EntrySource: Sync {
    /// As [`Policy::identify`].
    fn workload(&self, evidence: &dyn Evidence) -> Result<Option<Workload>, Ambiguous>;
}

impl EntrySource for Policy {
    fn workload(&self, evidence: &dyn Evidence) -> Result<Option<Workload>, Ambiguous> {
        self.identify(evidence).map(|workload| workload.cloned())
    }
}

impl Attestor {
    /// Finds what it needs on this host.
    pub fn discover() -> Result<Self, AttestError> {
        /// `PROC_PID_INIT_INO` in include/linux/proc_ns.h: the initial pid namespace always has this number.
        const INITIAL: &str = "pid:[4026531836]";
        let unseen = |error| AttestError::Host { what: "the agent's process namespace", error };
        let namespace = std::fs::read_link("/proc/self/ns/pid").map_err(unseen)?;
        if namespace != Path::new(INITIAL) {
            return Err(AttestError::PidNamespace(namespace.display().to_string()));
        }
        let hierarchy = Hierarchy::discover()?;
        Ok(Self { hierarchy, digests: Digests::default(), found: Mutex::default(), verified: Mutex::default() })
    }

    /// The process that dialled. It has to be there still, in the same cgroup and with the same ids: what is recorded
    /// alone is not enough for a connection that somebody waits for.
    ///
    /// Where no entry asks for more than the kernel recorded, what was verified of a process holds for a tenth of a second,
    /// as long as it lives and its next connections are recorded with the same ids and cgroup: the record is made in the
    /// process's own context, so what is verified besides is only that nothing has changed since.
    pub async fn dialler(&self, task: &Task, entries: &dyn EntrySource) -> Result<Attested, AttestError> {
        let facts = self.recorded(task);
        match self.recall(task, &facts, entries)? {
            Some(attested) => Ok(attested),
            // Boxed, since it is rarely needed and its future is large.
            None => Box::pin(self.look_at(task, facts, entries)).await,
        }
    }

    async fn look_at(&self, task: &Task, mut facts: Facts, entries: &dyn EntrySource) -> Result<Attested, AttestError> {
        let process = pin(task, &facts)?;
        let ids = process.ids().map_err(|error| failed(error, &facts))?;
        if (ids.real_uid, ids.real_gid) != (task.uid, task.gid) {
            let (uid, gid) = (ids.real_uid, ids.real_gid);
            return Err(AttestError::IdsChanged { facts: Box::new(facts), uid, gid });
        }
        facts.cgroup = Some(self.check_cgroup(&process, task.cgroup, &facts)?);
        let gathered = Gathered::new(ids.uid(), ids.gid(), facts.cgroup.clone());
        let attested = self.examine(&process, gathered, facts, entries).await?;
        self.remember(task, process, ids, attested.facts.cgroup.clone());
        Ok(attested)
    }

    /// The answer for a process that was verified a moment ago, where it depends on nothing that only a look at the process
    /// can tell.
    fn recall(&self, task: &Task, facts: &Facts, entries: &dyn EntrySource) -> Result<Option<Attested>, AttestError> {
        let known = lock(&self.verified).get(&task.tgid).cloned();
        let recorded = (task.uid, task.gid, task.cgroup);
        let is_fresh = |known: &Verified| known.recorded == recorded && known.at.elapsed() < HOLDS;
        let Some(known) = known.filter(|known| is_fresh(known) && !known.process.start().is_after(task.at)) else {
            return Ok(None);
        };
        if !known.process.is_alive().map_err(|error| failed(error, facts))? {
            // Another process may have its number by now, and that one has not been looked at.
            lock(&self.verified).remove(&task.tgid);
            return Ok(None);
        }
        let facts = Facts { cgroup: known.cgroup.clone(), ..facts.clone() };
        match Gathered::new(known.ids.uid(), known.ids.gid(), known.cgroup).decide(entries, &facts)? {
            Decision::Final(Some(workload)) => Ok(Some(Attested { workload: Some(workload), facts })),
            Decision::Final(None) | Decision::Needs(_) => Ok(None),
        }
    }

    fn remember(&self, task: &Task, process: Process, ids: Ids, cgroup: Option<Arc<str>>) {
        let recorded = (task.uid, task.gid, task.cgroup);
        let verified = Verified { process: Arc::new(process), recorded, ids, cgroup, at: Instant::now() };
        let mut all = lock(&self.verified);
        if all.len() >= VERIFIED {
            all.retain(|_, verified| verified.at.elapsed() < HOLDS);
        }
        if all.len() < VERIFIED {
            all.insert(task.tgid, verified);
        }
    }

    /// The owner of a listening socket: whoever bound it.
    ///
    /// What the kernel recorded at the bind is enough where no entry that could match asks for more, also when that process
    /// is gone: the fast path, without a look at `/proc`. Otherwise the executable is that of the binder, or where it has
    /// ended, of the oldest process in its cgroup that holds the socket. uid and gid stay those of the bind: a server that
    /// drops its privileges afterwards is still the same workload.
    ///
    /// Without a record (the socket is older than the programs), the oldest process that holds it is the owner, as it is
    /// now.
    pub async fn owner(
        &self,
        task: Option<&Task>,
        cookie: u64,
        entries: &dyn EntrySource,
    ) -> Result<Attested, AttestError> {
        let Some(task) = task.filter(|task| task.tgid != 0) else {
            return Box::pin(self.unrecorded(cookie, entries)).await;
        };
        let mut facts = self.recorded(task);
        facts.cgroup = self.hierarchy.path_of(task.cgroup).map_err(|error| failed(error, &facts))?;
        let gathered = Gathered::new(Some(task.uid), Some(task.gid), facts.cgroup.clone());
        if let Decision::Final(workload) = gathered.decide(entries, &facts)? {
            return Ok(Attested { workload, facts });
        }
        // Boxed, since it is rarely needed and its future is large.
        Box::pin(self.look_at_owner(task, facts, cookie, entries)).await
    }

    /// Could an entry match a task, by what the kernel recorded of it? In a cgroup that is not found, yes.
    pub fn may_be_enrolled(&self, task: &Task, policy: &Policy) -> bool {
        let Ok(Some(path)) = self.hierarchy.path_of(task.cgroup) else { return true };
        let set = policy.cgroup_set(&path);
        let rows = [policy.candidates(&set), policy.candidates(&[])];
        rows.iter().flatten().any(|row| row.fits(task.uid, task.gid))
    }

    /// Was a recorded task not enrolled, as far as can be said now that its cgroup is gone? It was not known as a workload
    /// when it was recorded, and no entry names its user or group. Entries that ask for a cgroup alone are about tasks in
    /// other cgroups.
    pub fn was_nobody(&self, task: &Task, policy: &Policy) -> bool {
        task.workload == 0
            && self.hierarchy.is_gone(task.cgroup).unwrap_or(false)
            && !policy.names_ids(task.uid, task.gid)
    }

    async fn look_at_owner(
        &self,
        task: &Task,
        mut facts: Facts,
        cookie: u64,
        entries: &dyn EntrySource,
    ) -> Result<Attested, AttestError> {
        let process = match pin(task, &facts) {
            Ok(process) => process,
            Err(AttestError::Died(_) | AttestError::Reused(_)) => {
                let processes = self.hierarchy.processes(task.cgroup).map_err(|error| failed(error, &facts))?;
                let detail = || format!(" in the cgroup of {facts}, who bound it and is gone");
                oldest_holder(processes, cookie)
                    .await
                    .ok_or_else(|| AttestError::NoOwner { cookie, detail: detail() })?
            }
            Err(error) => return Err(error),
        };
        facts.pid = process.pid();
        facts.cgroup = Some(self.check_cgroup(&process, task.cgroup, &facts)?);
        let gathered = Gathered::new(Some(task.uid), Some(task.gid), facts.cgroup.clone());
        self.examine(&process, gathered, facts, entries).await
    }

    async fn unrecorded(&self, cookie: u64, entries: &dyn EntrySource) -> Result<Attested, AttestError> {
        if cookie == 0 {
            return Err(AttestError::NoListener);
        }
        let process = self.find(cookie).await.ok_or_else(|| AttestError::NoOwner { cookie, detail: String::new() })?;
        let mut facts = Facts {
            pid: process.pid(),
            uid: u32::MAX,
            gid: u32::MAX,
            comm: Comm::default(),
            executable: None,
            cgroup: None,
            note: None,
        };
        let ids = process.ids().map_err(|error| failed(error, &facts))?;
        (facts.uid, facts.gid) = (ids.real_uid, ids.real_gid);
        facts.cgroup = Some(process.cgroup().map_err(|error| failed(error, &facts))?.into());
        let gathered = Gathered::new(ids.uid(), ids.gid(), facts.cgroup.clone());
        self.examine(&process, gathered, facts, entries).await
    }

    /// Looks at the executable as far as the entries ask, and at the process once more at the end.
    async fn examine(
        &self,
        process: &Process,
        mut gathered: Gathered,
        mut facts: Facts,
        entries: &dyn EntrySource,
    ) -> Result<Attested, AttestError> {
        let mut executable = None;
        let workload = loop {
            match gathered.decide(entries, &facts)? {
                Decision::Final(workload) => break workload,
                Decision::Needs(need) => {
                    if executable.is_none() {
                        executable = process.executable().map_err(|error| failed(error, &facts))?;
                    }
                    self.fill(need, &mut gathered, executable.as_ref(), &mut facts).await;
                }
            }
        };
        if !process.is_same().map_err(|error| failed(error, &facts))? {
            return Err(AttestError::Died(Box::new(facts)));
        }
        if let Some(before) = &executable {
            let after = process.executable().map_err(|error| failed(error, &facts))?;
            if after.is_none_or(|after| (after.device, after.inode) != (before.device, before.inode)) {
                return Err(AttestError::Exec(Box::new(facts)));
            }
        } else if workload.is_none() {
            // Only for the message.
            facts.executable = process.executable().ok().flatten().map(|executable| executable.path);
        }
        Ok(Attested { workload, facts })
    }

    async fn fill(&self, need: Need, gathered: &mut Gathered, executable: Option<&Executable>, facts: &mut Facts) {
        if need == Need::Cgroup {
            // The cgroup was filled in before this point; if it is asked for all the same, there is none.
            gathered.cgroup = Known::Is(None);
            return;
        }
        let Some(executable) = executable else {
            facts.note = Some("its executable cannot be read".into());
            (gathered.path, gathered.sha256) = (Known::Is(None), Known::Is(None));
            return;
        };
        facts.executable = Some(executable.path.clone());
        match need {
            Need::Cgroup | Need::Path => {
                if !executable.is_at_path {
                    facts.note = Some(
                        "its executable was deleted or replaced, or is not the file of that path on this host".into(),
                    );
                }
                gathered.path = Known::Is(executable.is_at_path.then(|| executable.path.clone()));
            }
            Need::Sha256 => {
                let digest = self.digests.of(executable).await;
                gathered.sha256 = Known::Is(digest.map_err(|error| facts.note = Some(error.to_string())).ok());
            }
        }
    }

    /// Is the process in the cgroup that was recorded? Gives its path.
    fn check_cgroup(&self, process: &Process, recorded: u64, facts: &Facts) -> Result<Arc<str>, AttestError> {
        let path = process.cgroup().map_err(|error| failed(error, facts))?;
        match self.hierarchy.id_of(&path).map_err(|error| failed(error, facts))? {
            Some(id) if id == recorded => Ok(path.into()),
            _ => Err(AttestError::Moved { facts: Box::new(facts.clone()), now: path }),
        }
    }

    /// The oldest process on this host that holds a socket. Looking at every process takes milliseconds, so the answer
    /// holds for a second, as long as that process lives.
    async fn find(&self, cookie: u64) -> Option<Process> {
        const REMEMBERED: usize = 1024;
        let known = lock(&self.found).get(&cookie).copied();
        if let Some((pid, start, _)) = known.filter(|(_, _, at)| at.elapsed() < OWNER_HOLDS)
            && let Ok(Some(process)) = Process::pin(pid)
            && process.start() == start
        {
            return Some(process);
        }
        let processes = std::fs::read_dir("/proc").ok()?;
        let numbers = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        let process = oldest_holder(numbers, cookie).await?;
        let mut found = lock(&self.found);
        if found.len() >= REMEMBERED {
            found.clear();
        }
        found.insert(cookie, (process.pid(), process.start(), Instant::now()));
        Some(process)
    }

    fn recorded(&self, task: &Task) -> Facts {
        Facts {
            pid: task.tgid,
            uid: task.uid,
            gid: task.gid,
            comm: Comm::of(task),
            executable: None,
            cgroup: None,
            note: None,
        }
    }
}

fn pin(task: &Task, facts: &Facts) -> Result<Process, AttestError> {
    let process = Process::pin(task.tgid).map_err(|error| failed(error, facts))?;
    let process = process.ok_or_else(|| AttestError::Died(Box::new(facts.clone())))?;
    if process.start().is_after(task.at) {
        return Err(AttestError::Reused(Box::new(facts.clone())));
    }
    Ok(process)
}

/// On a thread for blocking work: a process may have very many descriptors.
async fn oldest_holder(processes: Vec<u32>, cookie: u64) -> Option<Process> {
    if cookie == 0 {
        return None;
    }
    let search = move || {
        let pinned = processes.into_iter().filter_map(|pid| Process::pin(pid).ok().flatten());
        pinned.filter(|process| process.holds_socket(cookie).unwrap_or(false)).min_by_key(Process::start)
    };
    tokio::task::spawn_blocking(search).await.ok().flatten()
}

fn failed(error: io::Error, facts: &Facts) -> AttestError {
    let facts = Box::new(facts.clone());
    if is_gone(&error) { AttestError::Died(facts) } else { AttestError::Unreadable { facts, source: error } }
}

/// The number of a cgroup of this host, by its path.
#[cfg(test)]
pub(crate) fn number_of(cgroup: &str) -> u64 {
    Hierarchy::discover().unwrap().id_of(cgroup).unwrap().unwrap()
}

#[cfg(test)]
mod tests;
