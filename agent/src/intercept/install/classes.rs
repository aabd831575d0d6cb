//! Cgroups and the classes that they are in.
//!
//! *Invariant:* a cgroup that would need a row and has none is below one that has a row and is open.

use super::change::Change;
use crate::intercept::{
    cgroups::Cgroup,
    rows::{KernelFacts, candidate_rows},
};
use bunter_common::*;
use std::collections::{HashMap, HashSet};

/// How many rows of one epoch the maps for cgroups may hold: during a reload they hold two epochs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub(super) cgroups: usize,
    pub(super) candidates: usize,
}

/// Classes of cgroups: one number for each set of selectors, in one epoch.
#[derive(Debug, Default)]
pub(in crate::intercept) struct Classes {
    pub(super) wanted: bool,
    pub(super) by_set: HashMap<Vec<u32>, Class>,
    /// Cgroups that have a row.
    pub(super) placed: HashSet<u64>,
    pub(super) candidates: usize,
    /// Cgroups that need a row and have none, for want of room.
    pub(super) unplaced: u64,
}

#[derive(Debug)]
pub(super) struct Class {
    pub(super) number: u32,
    pub(super) rows: Vec<(CandidateKey, Candidate)>,
}

/// The rows that a new cgroup brings.
#[derive(Debug, Default)]
pub(super) struct Placement {
    pub(super) cgroups: Vec<Change<CgroupKey, Placed>>,
    pub(super) candidates: Vec<Change<CandidateKey, Candidate>>,
}

impl Classes {
    /// Places a cgroup: makes its row, and the rows of its class where that is new. A cgroup that is what its parent is
    /// needs no row, and gets none when the map is half full. One that needs a row and finds no room is counted: it is
    /// below an open cgroup, so tasks there that could be a workload are undecided.
    pub(super) fn place(
        &mut self,
        facts: &dyn KernelFacts,
        epoch: u32,
        cgroup: &Cgroup,
        room: Room,
        into: &mut Placement,
    ) {
        if !self.wanted || self.placed.contains(&cgroup.id) {
            return;
        }
        let set = facts.cgroup_set(&cgroup.path);
        let open = facts.cgroup_open(&cgroup.path);
        if self.placed.len() >= room.cgroups / 2 {
            let parent = cgroup.parent();
            let inherits =
                !open && parent.is_some_and(|parent| !facts.cgroup_open(parent) && facts.cgroup_set(parent) == set);
            if inherits {
                return;
            }
            if self.placed.len() >= room.cgroups {
                self.unplaced += 1;
                return;
            }
        }
        let class = match self.by_set.get(&set) {
            _ if set.is_empty() => CLASS_NONE,
            Some(class) => class.number,
            None => {
                let number = u32::try_from(self.by_set.len() + 1).unwrap_or(CLASS_UNSEEN - 1);
                let mut rows = candidate_rows(number, &facts.candidates(&set));
                if self.candidates + rows.len() > room.candidates {
                    self.unplaced += 1;
                    return;
                }
                rows.iter_mut().for_each(|(key, _)| key.epoch = epoch);
                self.candidates += rows.len();
                into.candidates.extend(rows.iter().map(|(key, row)| Change::new(*key, *row)));
                self.by_set.insert(set, Class { number, rows });
                number
            }
        };
        self.placed.insert(cgroup.id);
        let key = CgroupKey { epoch, pad: 0, cgroup: cgroup.id };
        into.cgroups.push(Change::new(key, Placed { class, open: u32::from(open) }));
    }

    /// Rows whose patterns have other numbers under these facts, which have the same entries.
    pub(super) fn changes(&self, facts: &dyn KernelFacts) -> Vec<Change<CandidateKey, Candidate>> {
        let mut changes = Vec::new();
        for (set, class) in &self.by_set {
            for ((key, before), (_, after)) in
                class.rows.iter().zip(candidate_rows(class.number, &facts.candidates(set)))
            {
                if *before != after {
                    changes.push(Change { key: *key, before: Some(*before), after: Some(after) });
                }
            }
        }
        changes
    }

    pub(super) fn accept(&mut self, changes: &[Change<CandidateKey, Candidate>]) {
        let after: HashMap<CandidateKey, Candidate> =
            changes.iter().filter_map(|change| Some((change.key, change.after?))).collect();
        for (key, row) in self.by_set.values_mut().flat_map(|class| &mut class.rows) {
            *row = after.get(key).copied().unwrap_or(*row);
        }
    }
}

impl Classes {
    /// Undoes the placing of a cgroup whose rows could not be written, and of its class, if that was new with it.
    pub(super) fn forget(&mut self, cgroup: u64, set: Vec<u32>) {
        self.unplaced += 1;
        self.placed.remove(&cgroup);
        let newest = self.by_set.len();
        if self.by_set.get(&set).is_some_and(|class| class.number as usize == newest)
            && let Some(class) = self.by_set.remove(&set)
        {
            self.candidates = self.candidates.saturating_sub(class.rows.len());
        }
    }
}
