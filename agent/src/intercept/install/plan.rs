//! The steps from one policy to another, and back.
//!
//! *Invariant:* at every moment each connection is decided as by the policy before or by the one after, or is refused.

use super::{
    change::{Change, Changes},
    classes::Placement,
};
use crate::intercept::{
    Error,
    rows::{Network, Rows},
    tables::{Tables, map_error},
};
use aya::{Pod, maps::lpm_trie::Key};
use bunter_common::*;
use bunter_sys::bpf;
use std::cmp::Ordering;

/// What two sorted lists of rows differ in: rows that go, and rows that come or change.
pub(super) fn differences<K: Ord + Copy, V: PartialEq + Copy>(
    before: &[(K, V)],
    after: &[(K, V)],
) -> [Changes<K, V>; 2] {
    let (mut go, mut come) = (Vec::new(), Vec::new());
    let (mut before, mut after) = (before.iter().peekable(), after.iter().peekable());
    loop {
        let order = match (before.peek(), after.peek()) {
            (None, None) => return [go, come],
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(one), Some(other)) => one.0.cmp(&other.0),
        };
        let old = if order.is_le() { before.next() } else { None };
        let new = if order.is_ge() { after.next() } else { None };
        match (old, new) {
            (Some((key, row)), None) => go.push(Change { key: *key, before: Some(*row), after: None }),
            (None, Some((key, row))) => come.push(Change::new(*key, *row)),
            (Some((key, row)), Some((_, new))) if row != new => {
                come.push(Change { key: *key, before: Some(*row), after: Some(*new) });
            }
            _ => {}
        }
    }
}

/// Part of an installation.
pub(super) enum Step {
    Verdicts(Vec<Change<VerdictKey, Verdict>>),
    Destinations(Vec<Change<Key<DestinationKey>, Destination>>),
    Candidates(Vec<Change<CandidateKey, Candidate>>),
    Cgroups(Vec<Change<CgroupKey, Placed>>),
    Config(Change<u32, Config>),
}

impl Step {
    pub(super) fn take(&self, tables: &Tables) -> Result<(), Error> {
        match self {
            Self::Verdicts(changes) => write(&tables.verdicts, map::VERDICTS, changes),
            Self::Destinations(changes) => write(&tables.destinations, map::DESTINATIONS, changes),
            Self::Candidates(changes) => write(&tables.candidates, map::CANDIDATES, changes),
            Self::Cgroups(changes) => write(&tables.cgroups, map::CGROUPS, changes),
            Self::Config(change) => write(&tables.config, map::CONFIG, std::slice::from_ref(change)),
        }
    }

    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Verdicts(changes) => changes.len(),
            Self::Destinations(changes) => changes.len(),
            Self::Candidates(changes) => changes.len(),
            Self::Cgroups(changes) => changes.len(),
            Self::Config(_) => 1,
        }
    }

    /// The step that takes this one back, in the opposite order.
    pub(super) fn back(self) -> Self {
        fn back<K, V>(changes: Vec<Change<K, V>>) -> Vec<Change<K, V>> {
            let turned = |Change { key, before, after }| Change { key, before: after, after: before };
            changes.into_iter().rev().map(turned).collect()
        }
        match self {
            Self::Verdicts(changes) => Self::Verdicts(back(changes)),
            Self::Destinations(changes) => Self::Destinations(back(changes)),
            Self::Candidates(changes) => Self::Candidates(back(changes)),
            Self::Cgroups(changes) => Self::Cgroups(back(changes)),
            Self::Config(Change { key, before, after }) => Self::Config(Change { key, before: after, after: before }),
        }
    }
}

/// Writes rows in their order, as many at once as the kernel takes.
pub(super) fn write<K: Pod, V: Pod>(
    table: &bpf::Table<K, V>,
    name: &'static str,
    changes: &[Change<K, V>],
) -> Result<(), Error> {
    for run in changes.chunk_by(|one, next| one.after.is_some() == next.after.is_some()) {
        let keys: Vec<K> = run.iter().map(|change| change.key).collect();
        let values: Vec<V> = run.iter().filter_map(|change| change.after).collect();
        let done = if values.is_empty() { table.remove_all(&keys) } else { table.put_all(&keys, &values) };
        done.map_err(map_error(name))?;
    }
    Ok(())
}

/// The steps from what is in force to another policy.
///
/// A verdict is about numbers that mean the same in both policies, so one that both have is right in both. The steps are:
/// remove the verdicts that go; change candidates, cgroups and destinations; add the verdicts that come. Until the last
/// step, the verdicts are those that both policies have. So whichever policy's candidates and destinations a connection
/// finds, it is decided as by that policy, or refused. It never finds a mixture of these: where registration entries
/// change, one change of the epoch is for candidates, cgroups and destinations at once. Where only destinations change, a
/// new row is written when those that the programs prefer to it are there, and an old one is removed when those to which it
/// is preferred are gone: so the first row that covers an address is always the old policy's first or the new one's.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) steps: Vec<Step>,
}

impl Plan {
    /// `before` is the configuration in force, if any is. `anew` has the rows of a new epoch; without it the registration
    /// entries stay as they are, and `classes` are the rows of classes of cgroups that change.
    pub(super) fn new(
        before: Option<Config>,
        after: Config,
        differing: [Step; 5],
        classes: Vec<Change<CandidateKey, Candidate>>,
        anew: Option<([Step; 2], Placement)>,
    ) -> Self {
        let flags = after.flags | before.map_or(0, |before| before.flags);
        let mut last = before;
        let mut configured =
            |config: Config| Step::Config(Change { key: 0, before: last.replace(config), after: Some(config) });
        let [verdicts_go, destinations_come, destinations_go, candidates, verdicts_come] = differing;
        let mut steps = Vec::new();
        // Flags that make the programs look up more are set before the rows that need them come, and cleared after those
        // are gone.
        steps.extend(before.map(|before| configured(Config { flags, ..before })));
        match anew {
            Some((rows, Placement { candidates, cgroups })) => {
                steps.extend([Step::Candidates(candidates), Step::Cgroups(cgroups)]);
                steps.extend(rows);
                steps.push(verdicts_go);
                steps.extend(before.map(|_| configured(Config { flags, ..after })));
                steps.push(verdicts_come);
            }
            None => {
                steps.extend([verdicts_go, destinations_come, destinations_go, candidates]);
                steps.extend([Step::Candidates(classes), verdicts_come]);
            }
        }
        steps.push(configured(after));
        Self { steps }
    }

    /// Where the registration entries stay as they are: only the rows that differ are written, under the same epoch.
    pub(super) fn differing(before: &Rows, after: &Rows, epoch: u32) -> [Step; 5] {
        let [verdicts_go, verdicts_come] = differences(&before.verdicts, &after.verdicts);
        let [mut go, mut come] = differences(&before.destinations, &after.destinations);
        come.sort_by(|one, other| one.key.before(&other.key));
        go.sort_by(|one, other| other.key.before(&one.key));
        let of_epoch = |changes: Vec<Change<Network, Destination>>| {
            let under =
                |Change { key, before, after }: Change<Network, _>| Change { key: key.key(epoch), before, after };
            changes.into_iter().map(under).collect()
        };
        let [_, candidates] = differences(&before.candidates, &after.candidates);
        [
            Step::Verdicts(verdicts_go),
            Step::Destinations(of_epoch(come)),
            Step::Destinations(of_epoch(go)),
            Step::Candidates(candidates.into_iter().map(|change| of_that(change, epoch)).collect()),
            Step::Verdicts(verdicts_come),
        ]
    }

    /// All rows for candidates and destinations that a new epoch has, beside those for cgroups.
    pub(super) fn anew(after: &Rows, epoch: u32) -> [Step; 2] {
        let candidates = after.candidates.iter().map(|(key, row)| of_that(Change::new(*key, *row), epoch));
        let destinations = after.destinations.iter().map(|(network, row)| Change::new(network.key(epoch), *row));
        [Step::Candidates(candidates.collect()), Step::Destinations(destinations.collect())]
    }

    /// Takes all steps or none.
    pub(super) fn carry_out(self, tables: &Tables) -> Result<(), Error> {
        let mut taken = Vec::with_capacity(self.steps.len());
        for step in self.steps {
            let done = step.take(tables);
            taken.push(step);
            if let Err(error) = done {
                for step in taken.into_iter().rev() {
                    if let Err(error) = step.back().take(tables) {
                        tracing::error!(%error, "a step of a policy that failed to be installed cannot be taken back");
                    }
                }
                return Err(error);
            }
        }
        Ok(())
    }
}

pub(super) fn of_that(mut change: Change<CandidateKey, Candidate>, epoch: u32) -> Change<CandidateKey, Candidate> {
    change.key.epoch = epoch;
    change
}
