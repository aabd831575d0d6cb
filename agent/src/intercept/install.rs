//! A policy on its way into the kernel's maps.
//!
//! The rows of a policy are worked out beside the control thread ([`Outlook::prepare`]), against those in force. Then they
//! are installed in steps ([`Programs::install_prepared`]), each of which can be taken back. Where the registration entries
//! change, candidates, cgroups and destinations are written under the keys of a new epoch, and one number is flipped; else
//! only the rows that differ are written, in such an order that no connection ever meets a mixture (`plan` says why).
//!
//! *Invariant:* at every moment each connection is decided as by the policy before or by the one after, or is refused. When a
//! step fails, those before it are taken back.

mod change;
mod classes;
mod plan;

pub(super) use classes::Classes;

use super::{
    Error, Programs,
    cgroups::Cgroup,
    registry::{Cleared, left_alone},
    rows::{KernelFacts, Rows, Sources, sweep},
    tables::{Tables, map_error},
    work::Work,
};
use bunter_common::*;
use bunter_sys::bpf;
use classes::{Placement, Room};
use plan::{Plan, Step, differences};
use rustix::thread::{MembarrierCommand, membarrier};
use std::{collections::HashSet, path::PathBuf, sync::Arc, time::Duration};

/// Longer than any kernel program takes, even one that has to wait for the processor.
const A_PROGRAM: Duration = Duration::from_millis(50);

/// Returns when every kernel program that was running at the call has ended. One that still goes by the number of an old
/// epoch would conclude from rows that were removed that nobody is enrolled.
fn let_programs_end() {
    // Programs run in read-side sections of RCU (`bpf_prog_run_array_cg` in kernel/bpf/cgroup.c). membarrier waits for them
    // all (`synchronize_rcu` in kernel/sched/membarrier.c), unless a processor has no clock tick or there is only one.
    let waits = std::thread::available_parallelism().is_ok_and(|processors| processors.get() > 1);
    if membarrier(MembarrierCommand::Global).is_err() || !waits {
        std::thread::sleep(A_PROGRAM);
    }
}

/// What is in force, for a policy to be prepared by on another thread.
#[derive(Debug)]
pub struct Outlook {
    in_force: Arc<Rows>,
    epoch: u32,
    cgroups: Vec<Cgroup>,
    room: Room,
    /// Where sockets are looked for, and the cgroups of their holders.
    sockets: Option<(Tables, PathBuf)>,
}

/// A policy as rows, ready to be installed.
pub struct Prepared {
    facts: Arc<dyn KernelFacts>,
    rows: Arc<Rows>,
    /// What was in force when the differences were worked out.
    against: (Arc<Rows>, u32),
    differing: [Step; 5],
    /// For a new epoch, where the registration entries change.
    anew: Option<Anew>,
}

struct Anew {
    epoch: u32,
    steps: [Step; 2],
    classes: Classes,
    placement: Placement,
    /// Listening sockets that the policy leaves alone as the one before does.
    cleared: Cleared,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared")
            .field("new_epoch", &self.anew.as_ref().map(|anew| anew.epoch))
            .finish_non_exhaustive()
    }
}

impl Prepared {
    /// How many rows for everybody are to be written or removed.
    pub fn changes(&self) -> usize {
        let [verdicts_go, destinations_come, destinations_go, candidates, verdicts_come] = &self.differing;
        let verdicts = [verdicts_go, verdicts_come].map(Step::rows).iter().sum::<usize>();
        let others: [usize; 3] = match &self.anew {
            Some(anew) => [anew.steps.iter().map(Step::rows).sum(), 0, 0],
            None => [destinations_come, destinations_go, candidates].map(Step::rows),
        };
        verdicts + others.iter().sum::<usize>()
    }
}

impl Outlook {
    /// Works out what a policy says to the kernel programs. To be called in the network namespace that the policy is for.
    /// It takes time and changes nothing.
    pub fn prepare(self, facts: Arc<dyn KernelFacts>) -> Prepared {
        let mut sources = Sources::default();
        let rows = Arc::new(Rows::of(facts.as_ref(), |to| sources.source_for(to)));
        let cleared = match &self.sockets {
            Some((tables, cgroup2)) if self.epoch != 0 && rows.who != self.in_force.who => {
                Cleared::look(tables, &self.cgroups, cgroup2, facts.as_ref())
            }
            _ => Cleared::default(),
        };
        self.against(facts, rows, cleared)
    }

    fn against(self, facts: Arc<dyn KernelFacts>, rows: Arc<Rows>, cleared: Cleared) -> Prepared {
        let anew = (self.epoch == 0 || rows.who != self.in_force.who).then(|| {
            let epoch = self.epoch.checked_add(1).unwrap_or(1);
            let mut classes = Classes { wanted: rows.flags & FLAG_CGROUP_CLASSES != 0, ..Classes::default() };
            let mut placement = Placement::default();
            for cgroup in &self.cgroups {
                classes.place(facts.as_ref(), epoch, cgroup, self.room, &mut placement);
            }
            Anew { epoch, steps: Plan::anew(&rows, epoch), classes, placement, cleared }
        });
        let differing = Plan::differing(&self.in_force, &rows, self.epoch);
        Prepared { facts, rows, against: (self.in_force, self.epoch), differing, anew }
    }
}

impl Programs {
    /// Puts a policy in force and gives its generation. When it fails, nothing has changed.
    ///
    /// Listeners keep their modes; see [`Programs::listeners`] for attesting their owners again.
    pub fn install(&mut self, facts: Arc<dyn KernelFacts>) -> Result<u32, Error> {
        let prepared = self.outlook()?.prepare(facts);
        self.install_prepared(prepared)
    }

    /// What is in force, for a policy to be prepared against.
    pub fn outlook(&mut self) -> Result<Outlook, Error> {
        self.watch();
        // The root first: if there is not room for all, a cgroup has a row before those below it.
        let mut cgroups = self.cgroups.all();
        cgroups.sort_unstable_by(|one, other| one.path.cmp(&other.path));
        Ok(Outlook {
            in_force: Arc::clone(&self.rows),
            epoch: self.epoch,
            cgroups,
            room: self.room(),
            sockets: Some((self.tables.clone(), self.host.cgroup2.clone())),
        })
    }

    /// Puts a prepared policy in force and gives its generation, as [`Programs::install`] does.
    pub fn install_prepared(&mut self, prepared: Prepared) -> Result<u32, Error> {
        self.watch();
        let (against, epoch) = &prepared.against;
        let prepared = if Arc::ptr_eq(against, &self.rows) && *epoch == self.epoch {
            prepared
        } else {
            // Another policy has been installed since.
            self.outlook()?.against(prepared.facts, prepared.rows, Cleared::default())
        };
        let Prepared { facts, rows, differing, anew, .. } = prepared;
        self.fits(&rows, anew.is_some())?;
        let generation = self.generation.checked_add(1).unwrap_or(1);
        let before = self.tables.config.get(&0).map_err(map_error(map::CONFIG))?.filter(|_| self.epoch != 0);
        let epoch = anew.as_ref().map_or(self.epoch, |anew| anew.epoch);
        let complete = std::mem::replace(&mut self.complete, true);
        let after = self.config(generation, epoch, rows.flags);
        let changes = if anew.is_some() { Vec::new() } else { self.classes.changes(facts.as_ref()) };
        let (mut classes, mut cleared) = (None, None);
        let anew = anew.map(|mut anew| {
            self.update_placement(facts.as_ref(), &mut anew);
            classes = Some(anew.classes);
            cleared = Some(anew.cleared);
            (anew.steps, anew.placement)
        });
        let plan = Plan::new(before, after, differing, changes.clone(), anew);

        // Listeners from before, and those that the new policy may judge differently, are refused until they are judged.
        let protected: HashSet<ProtectedKey> = rows.protected.iter().copied().collect();
        let done = self.protect(&protected).and_then(|new| {
            let looked = cleared.map_or(Ok(()), |cleared| self.raise(before, &cleared));
            looked.and_then(|()| plan.carry_out(&self.tables)).inspect_err(|_| self.unprotect_again(&new))
        });
        if let Err(error) = done {
            if classes.is_some() {
                self.leave_undecided(before, false);
            }
            self.complete = complete;
            return Err(error);
        }
        let gone = std::mem::replace(&mut self.rows, Arc::clone(&rows));
        let epoch_before = std::mem::replace(&mut self.epoch, epoch);
        self.generation = generation;
        discard((self.facts.replace(facts), Arc::clone(&gone)));
        self.classes.accept(&changes);
        let classes_before = classes.map(|classes| std::mem::replace(&mut self.classes, classes));
        let protected_before = std::mem::replace(&mut self.protected, protected);
        // From here on the new policy is in force, and what cannot be tidied up is only a loss of room.
        let over: Vec<ProtectedKey> = protected_before.difference(&self.protected).copied().collect();
        let swept = classes_before.map_or(Ok(()), |classes| self.remove_epoch(epoch_before, &gone, &classes));
        if let Err(error) = swept.and_then(|()| self.unprotect(&over)) {
            tracing::warn!(%error, "rows of the policy before could not be removed from the kernel maps");
        }
        Ok(generation)
    }

    /// Before the registration entries change: every listener that was left alone is undecided until it is judged anew, but
    /// for those that are `cleared`; and so is every socket that begins to listen from here on.
    fn raise(&mut self, before: Option<Config>, cleared: &Cleared) -> Result<(), Error> {
        self.leave_undecided(before, true);
        self.listeners()?;
        for listening in left_alone(&self.tables)?.iter().filter(|listening| !cleared.holds(listening)) {
            self.set_listener_mode(listening, LISTENER_UNDECIDED, None)?;
        }
        Ok(())
    }

    /// Makes the programs treat as undecided every socket that would be left alone when it begins to listen, or ends that.
    fn leave_undecided(&self, in_force: Option<Config>, on: bool) {
        let Some(config) = in_force else { return };
        let flags = config.flags & !FLAG_ALL_UNDECIDED | if on { FLAG_ALL_UNDECIDED } else { 0 };
        if let Err(error) = self.tables.config.put(&0, &Config { flags, ..config }, bpf::ANY) {
            tracing::warn!(%error, "the programs cannot be told that who is who is about to change");
        } else if on {
            let_programs_end();
        }
    }

    /// Is there room for this policy?
    fn fits(&self, rows: &Rows, anew: bool) -> Result<(), Error> {
        let before = &self.rows;
        let destinations = if anew {
            before.destinations.len() + rows.destinations.len()
        } else {
            let [_, come] = differences(&before.destinations, &rows.destinations);
            before.destinations.len() + come.iter().filter(|change| change.before.is_none()).count()
        };
        for (map, wanted, room) in [
            (map::DESTINATIONS, destinations, self.tables.destinations.room()),
            (map::VERDICTS, rows.verdicts.len(), self.tables.verdicts.room()),
            (map::CANDIDATES, rows.candidates.len(), self.tables.candidates.room() / 4),
        ] {
            if wanted > room {
                return Err(Error::MapFull { map });
            }
        }
        Ok(())
    }

    fn room(&self) -> Room {
        Room { cgroups: self.tables.cgroups.room() / 2, candidates: self.tables.candidates.room() / 4 }
    }

    /// Cgroups may have come and gone since the policy was prepared.
    fn update_placement(&self, facts: &dyn KernelFacts, anew: &mut Anew) {
        let cgroups = self.cgroups.all();
        let alive: HashSet<u64> = cgroups.iter().map(|cgroup| cgroup.id).collect();
        anew.placement.cgroups.retain(|change| alive.contains(&change.key.cgroup));
        anew.classes.placed.retain(|id| alive.contains(id));
        for cgroup in &cgroups {
            anew.classes.place(facts, anew.epoch, cgroup, self.room(), &mut anew.placement);
        }
    }

    /// Removes the rows of an epoch: those that are known, or after a start all that are found in the maps.
    fn remove_epoch(&self, epoch: u32, rows: &Rows, classes: &Classes) -> Result<(), Error> {
        let_programs_end();
        if rows.destinations.is_empty() && rows.candidates.is_empty() {
            return sweep(&self.tables, |of| of != epoch);
        }
        let tables = &self.tables;
        let destinations: Vec<_> = rows.destinations.iter().map(|(network, _)| network.key(epoch)).collect();
        tables.destinations.remove_all(&destinations).map_err(map_error(map::DESTINATIONS))?;
        let everybody = rows.candidates.iter().map(|(key, _)| CandidateKey { epoch, ..*key });
        let of_classes = classes.by_set.values().flat_map(|class| class.rows.iter().map(|(key, _)| *key));
        let candidates: Vec<_> = everybody.chain(of_classes).collect();
        tables.candidates.remove_all(&candidates).map_err(map_error(map::CANDIDATES))?;
        let cgroups: Vec<_> = classes.placed.iter().map(|id| CgroupKey { epoch, pad: 0, cgroup: *id }).collect();
        tables.cgroups.remove_all(&cgroups).map_err(map_error(map::CGROUPS))
    }

    /// Reads the verdicts that an agent before has left, so that differences from them can be written.
    pub(super) fn adopt_verdicts(tables: &Tables) -> Result<Rows, Error> {
        let full = map_error(map::VERDICTS);
        let mut verdicts = Vec::new();
        for key in tables.verdicts.keys().map_err(&full)? {
            verdicts.extend(tables.verdicts.get(&key).map_err(&full)?.map(|row| (key, row)));
        }
        verdicts.sort_unstable_by_key(|row| row.0);
        verdicts.dedup_by_key(|row| row.0);
        Ok(Rows { verdicts, ..Rows::default() })
    }

    /// Classifies new cgroups. Those that get no row now get one with the policy to come, or it fails.
    fn watch(&mut self) {
        let watched = self.watch_cgroups();
        self.observe(Work::Cgroups, watched);
    }

    pub(super) fn watch_cgroups(&mut self) -> Result<(), Error> {
        let changes = self.cgroups.changes()?;
        for id in changes.removed {
            self.classes.placed.remove(&id);
            let key = CgroupKey { epoch: self.epoch, pad: 0, cgroup: id };
            if let Err(error) = self.tables.cgroups.remove(&key) {
                tracing::warn!(%error, "the row of a cgroup that is gone stays in the kernel map CGROUPS");
            }
        }
        self.classify(&changes.made)
    }

    /// Tries again to write the rows of cgroups for which there was no room. Until then the programs do not know them.
    pub fn retry(&mut self) -> Result<(), Error> {
        let placed = &self.classes.placed;
        let again: Vec<Cgroup> = self.cgroups.all().into_iter().filter(|cgroup| !placed.contains(&cgroup.id)).collect();
        self.classify(&again)
    }

    pub(super) fn classify_unknown(&mut self, id: u64) -> Result<(), Error> {
        if self.classes.placed.contains(&id) {
            return Ok(());
        }
        let made = self.cgroups.rescan();
        self.classify(&made)?;
        // Known before, and not placed: there was no room then.
        let known: Vec<Cgroup> = self.cgroups.all().into_iter().filter(|cgroup| cgroup.id == id).collect();
        self.classify(&known)
    }

    /// Writes the rows of new cgroups. A cgroup that does not fit is counted; the others are written all the same.
    fn classify(&mut self, cgroups: &[Cgroup]) -> Result<(), Error> {
        let Some(facts) = self.facts.clone() else { return Ok(()) };
        let mut outcome = Ok(());
        for cgroup in cgroups {
            let (unplaced, mut placement) = (self.classes.unplaced, Placement::default());
            self.classes.place(facts.as_ref(), self.epoch, cgroup, self.room(), &mut placement);
            let Placement { cgroups, candidates } = placement;
            // The cgroup comes last, so that its class is complete when it is found.
            let steps = vec![Step::Candidates(candidates), Step::Cgroups(cgroups)];
            let mut problem = (self.classes.unplaced > unplaced).then(|| "there is no room".to_owned());
            if let Err(error) = (Plan { steps }).carry_out(&self.tables) {
                self.classes.forget(cgroup.id, facts.cgroup_set(&cgroup.path));
                problem = Some(error.to_string());
            }
            if let Some(problem) = problem {
                tracing::debug!(cgroup = %cgroup.path, problem,
                    "a cgroup has no row in the kernel maps: whoever could be a workload there is refused");
                outcome = Err(Error::MapFull { map: map::CGROUPS });
            }
        }
        outcome
    }

    /// Cgroups that have no row in the kernel maps and would need one, since the policy began to be in force.
    pub fn unplaced_cgroups(&self) -> u64 {
        self.classes.unplaced
    }
}

/// Drops what is no longer in force on a thread of its own, where it can: a large policy takes longer to take apart than to
/// replace.
fn discard(past: impl Send + 'static) {
    // Where there can be no thread, it is dropped here with the closure.
    drop(std::thread::Builder::new().name("bunter-discard".into()).spawn(move || drop(past)));
}

#[cfg(test)]
mod tests;
