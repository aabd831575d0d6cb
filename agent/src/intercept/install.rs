//! A policy on its way into the kernel's maps.
//!
//! What a policy says is worked out beside the control thread ([`Outlook::prepare`]), from a look at what is in force. Then it
//! is installed in steps ([`Programs::install_prepared`]), each of which can be taken back. Where it changes who is who,
//! candidates, cgroups and destinations are written under the keys of a new epoch, and one number is flipped; else only the
//! rows that differ are written, in such an order that no connection ever meets a mixture ([`Plan`] says why).
//!
//! *Invariant:* at every moment each connection is decided as by the policy before or by the one after, or is refused. When a
//! step fails, those before it are taken back.

use super::{
    Error, Programs,
    cgroups::Cgroup,
    error::During,
    tables::{Tables, address, map_error},
};
use crate::{
    policy::{KernelCandidate, KernelPolicy, Policy},
    sys::bpf,
};
use aya::{Pod, maps::lpm_trie::Key};
use std::{
    cmp::Ordering,
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::Arc,
};
use wimsey_common::*;

/// The number of this network namespace in the keys of destinations. One agent serves one.
pub(super) const NAMESPACE: u32 = 1;

/// What a policy tells the kernel programs. [`Policy`] is one.
pub trait KernelFacts: Send + Sync {
    /// Destinations, verdicts and protected addresses.
    fn kernel(&self) -> Arc<KernelPolicy>;
    /// A number of all registration entries: facts with the same have the same candidates, but for the numbers of their
    /// patterns, and classes.
    fn who(&self) -> u64;
    /// The cgroup selectors that a cgroup satisfies: cgroups with equal sets share a class.
    fn cgroup_set(&self, cgroup: &str) -> Vec<u32>;
    /// Could a cgroup below this one satisfy a selector that this one does not?
    fn cgroup_open(&self, cgroup: &str) -> bool;
    /// The candidate rows for the class of cgroups with this set; for the empty set, those of entries without cgroups.
    fn candidates(&self, set: &[u32]) -> Vec<KernelCandidate>;
}

impl KernelFacts for Policy {
    fn kernel(&self) -> Arc<KernelPolicy> {
        Policy::kernel(self)
    }
    fn who(&self) -> u64 {
        Policy::who(self)
    }
    fn cgroup_set(&self, cgroup: &str) -> Vec<u32> {
        Policy::cgroup_set(self, cgroup)
    }
    fn cgroup_open(&self, cgroup: &str) -> bool {
        Policy::cgroup_open(self, cgroup)
    }
    fn candidates(&self, set: &[u32]) -> Vec<KernelCandidate> {
        Policy::candidates(self, set)
    }
}

/// A destination's key without epoch and namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Network {
    /// Prefix length with [`DESTINATION_FIXED_BITS`].
    bits: u32,
    port: u16,
    address: Address,
}

impl Network {
    fn key(&self, epoch: u32) -> Key<DestinationKey> {
        let key = DestinationKey { epoch, namespace: NAMESPACE, port: self.port, pad: 0, address: self.address };
        Key::new(self.bits, key)
    }

    /// The programs take the first in this order that covers an address: the port itself before any port, and the longest
    /// prefix of either.
    fn before(&self, other: &Self) -> Ordering {
        (self.port == 0).cmp(&(other.port == 0)).then(other.bits.cmp(&self.bits))
    }
}

/// The rows of a policy for everybody, whatever the epoch; each list is sorted by its keys. Classes of cgroups are in
/// [`Classes`].
#[derive(Debug, Default)]
pub(super) struct Rows {
    who: u64,
    flags: u32,
    protected: Vec<ListenerKey>,
    candidates: Vec<(CandidateKey, Candidate)>,
    destinations: Vec<(Network, Destination)>,
    verdicts: Vec<(VerdictKey, Verdict)>,
}

impl Rows {
    /// `source` tells which address the host would use to get to another.
    fn of(facts: &dyn KernelFacts, mut source: impl FnMut(IpAddr) -> Option<IpAddr>) -> Self {
        let policy = facts.kernel();
        let mut candidates = candidate_rows(CLASS_NONE, &facts.candidates(&[]));
        let mut flags = shapes(&candidates) << SHAPES_WITHOUT_CGROUP;
        if policy.cgroup_classes {
            let attested = |(uid, gid): &(Option<u32>, Option<u32>)| KernelCandidate {
                uid: *uid,
                gid: *gid,
                attested: 1,
                ..KernelCandidate::default()
            };
            let unseen: Vec<KernelCandidate> = policy.unseen.iter().map(attested).collect();
            let unseen = candidate_rows(CLASS_UNSEEN, &unseen);
            flags |= FLAG_CGROUP_CLASSES | shapes(&unseen) << SHAPES_WITH_CGROUP;
            candidates.extend(unseen);
        }
        let mut destinations: Vec<(Network, Destination)> = Vec::with_capacity(policy.destinations.len());
        for row in &policy.destinations {
            let (bits, of_family) = (u32::from(row.network.prefix_len()), u32::from(row.network.max_prefix_len()));
            // The host's address is shown only where it is the same for the whole network.
            let hint = source(row.network.network())
                .filter(|first| bits == of_family || source(row.network.broadcast()) == Some(*first))
                .map_or([0; 16], address);
            let network = Network {
                bits: DESTINATION_FIXED_BITS + 128 - of_family + bits,
                port: row.port.unwrap_or(0),
                address: address(row.network.network()),
            };
            let there = Destination {
                target: row.target,
                group: row.group,
                datagrams: row.datagrams,
                mode: row.mode,
                pad: 0,
                source: hint,
            };
            destinations.push((network, there));
        }
        let mut verdicts: Vec<(VerdictKey, Verdict)> = Vec::with_capacity(policy.verdicts.len());
        for row in &policy.verdicts {
            if row.port != 0 {
                flags |= FLAG_PORTS;
            }
            let key =
                VerdictKey { source: row.source, target: row.target, port: row.port, protocol: row.protocol, pad: 0 };
            verdicts.push((key, Verdict { action: row.action, rule: row.rule }));
        }
        candidates.sort_unstable_by_key(|row| row.0);
        destinations.sort_unstable_by_key(|row| row.0);
        verdicts.sort_unstable_by_key(|row| row.0);
        let protected = policy.protected.iter();
        Self {
            who: facts.who(),
            flags,
            protected: protected.map(|(ip, port)| super::tables::listener_key(SocketAddr::new(*ip, *port))).collect(),
            candidates,
            destinations,
            verdicts,
        }
    }
}

/// Rows of one class under epoch 0, which the caller replaces.
fn candidate_rows(class: u32, candidates: &[KernelCandidate]) -> Vec<(CandidateKey, Candidate)> {
    let row = |row: &KernelCandidate| {
        let key = CandidateKey { epoch: 0, class, uid: row.uid.unwrap_or(ANY), gid: row.gid.unwrap_or(ANY) };
        let KernelCandidate { workload, source, group, certain, attested, .. } = *row;
        (key, Candidate { source, group, workload, certain, attested })
    };
    candidates.iter().map(row).collect()
}

/// Which forms of key these rows have.
fn shapes(rows: &[(CandidateKey, Candidate)]) -> u32 {
    rows.iter().fold(0, |shapes, (key, _)| {
        shapes
            | match (key.uid, key.gid) {
                (ANY, ANY) => shape::NEITHER,
                (ANY, _) => shape::GID,
                (_, ANY) => shape::UID,
                _ => shape::BOTH,
            }
    })
}

/// How many rows of one epoch the maps for cgroups may hold: during a reload they hold two epochs.
#[derive(Clone, Copy, Debug)]
struct Room {
    cgroups: usize,
    candidates: usize,
}

/// Classes of cgroups: one number for each set of selectors, in one epoch.
#[derive(Debug, Default)]
pub(super) struct Classes {
    wanted: bool,
    by_set: HashMap<Vec<u32>, Class>,
    /// Cgroups that have a row.
    placed: HashSet<u64>,
    candidates: usize,
    /// Cgroups that need a row and have none, for want of room.
    unplaced: u64,
}

#[derive(Debug)]
struct Class {
    number: u32,
    rows: Vec<(CandidateKey, Candidate)>,
}

/// The rows that a new cgroup brings.
#[derive(Debug, Default)]
struct Placement {
    cgroups: Vec<Change<CgroupKey, Placed>>,
    candidates: Vec<Change<CandidateKey, Candidate>>,
}

impl Classes {
    /// Places a cgroup: its row, with the rows of its class where that is new. One that is what its parent is can do without a
    /// row, and does when the map is half full. One that cannot do without and finds no room is counted: it is below an open
    /// cgroup, so whoever could be somebody there is refused.
    fn place(&mut self, facts: &dyn KernelFacts, epoch: u32, cgroup: &Cgroup, room: Room, into: &mut Placement) {
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
    fn changes(&self, facts: &dyn KernelFacts) -> Vec<Change<CandidateKey, Candidate>> {
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

    fn accept(&mut self, changes: &[Change<CandidateKey, Candidate>]) {
        let after: HashMap<CandidateKey, Candidate> =
            changes.iter().filter_map(|change| Some((change.key, change.after?))).collect();
        for (key, row) in self.by_set.values_mut().flat_map(|class| &mut class.rows) {
            *row = after.get(key).copied().unwrap_or(*row);
        }
    }
}

/// One row before and after.
#[derive(Clone, Copy, Debug)]
struct Change<K, V> {
    key: K,
    before: Option<V>,
    after: Option<V>,
}

type Changes<K, V> = Vec<Change<K, V>>;

impl<K, V> Change<K, V> {
    fn new(key: K, after: V) -> Self {
        Self { key, before: None, after: Some(after) }
    }
}

/// What two sorted lists of rows differ in: rows that go, and rows that come or change.
fn differences<K: Ord + Copy, V: PartialEq + Copy>(before: &[(K, V)], after: &[(K, V)]) -> [Changes<K, V>; 2] {
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
enum Step {
    Verdicts(Vec<Change<VerdictKey, Verdict>>),
    Destinations(Vec<Change<Key<DestinationKey>, Destination>>),
    Candidates(Vec<Change<CandidateKey, Candidate>>),
    Cgroups(Vec<Change<CgroupKey, Placed>>),
    Config(Change<u32, Config>),
}

impl Step {
    fn take(&self, tables: &Tables) -> Result<(), Error> {
        match self {
            Self::Verdicts(changes) => write(&tables.verdicts, map::VERDICTS, changes),
            Self::Destinations(changes) => write(&tables.destinations, map::DESTINATIONS, changes),
            Self::Candidates(changes) => write(&tables.candidates, map::CANDIDATES, changes),
            Self::Cgroups(changes) => write(&tables.cgroups, map::CGROUPS, changes),
            Self::Config(change) => write(&tables.config, map::CONFIG, std::slice::from_ref(change)),
        }
    }

    fn rows(&self) -> usize {
        match self {
            Self::Verdicts(changes) => changes.len(),
            Self::Destinations(changes) => changes.len(),
            Self::Candidates(changes) => changes.len(),
            Self::Cgroups(changes) => changes.len(),
            Self::Config(_) => 1,
        }
    }

    /// The step that takes this one back, in the opposite order.
    fn back(self) -> Self {
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
fn write<K: Pod, V: Pod>(table: &bpf::Table<K, V>, name: &'static str, changes: &[Change<K, V>]) -> Result<(), Error> {
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
/// A verdict is about numbers that mean the same in both policies, so one that both have is right in both. The steps are: the
/// verdicts that go; who is who and what is where; the verdicts that come. Until the last, the verdicts are those that both
/// have, so whatever a connection finds of the rest, the policy that it is from agrees, or it is refused. It finds all of one:
/// where people change, the epoch is flipped for them and for destinations at once. Where only destinations change, a
/// new row is written when those that the programs prefer to it are there, and an old one goes when those that it is
/// preferred to are gone: so the first that covers an address is always the old policy's first or the new one's.
#[derive(Default)]
struct Plan {
    steps: Vec<Step>,
}

impl Plan {
    /// `before` is the configuration in force, if any is. `anew` has the rows of a new epoch; without it the people stay who
    /// they are, and `classes` are the rows of cgroups that change.
    fn new(
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
        // The flags that make the programs ask more come before what needs them, and go after it.
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

    /// The people stay who they are: only what differs is written, under the same epoch.
    fn differing(before: &Rows, after: &Rows, epoch: u32) -> [Step; 5] {
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
    fn anew(after: &Rows, epoch: u32) -> [Step; 2] {
        let candidates = after.candidates.iter().map(|(key, row)| of_that(Change::new(*key, *row), epoch));
        let destinations = after.destinations.iter().map(|(network, row)| Change::new(network.key(epoch), *row));
        [Step::Candidates(candidates.collect()), Step::Destinations(destinations.collect())]
    }

    /// Takes all steps or none.
    fn carry_out(self, tables: &Tables) -> Result<(), Error> {
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

fn of_that(mut change: Change<CandidateKey, Candidate>, epoch: u32) -> Change<CandidateKey, Candidate> {
    change.key.epoch = epoch;
    change
}

/// What is in force, for a policy to be prepared by on another thread.
#[derive(Debug)]
pub struct Outlook {
    in_force: Arc<Rows>,
    epoch: u32,
    cgroups: Vec<Cgroup>,
    room: Room,
}

/// A policy as rows, ready to be installed.
pub struct Prepared {
    facts: Arc<dyn KernelFacts>,
    rows: Arc<Rows>,
    /// What was in force when the differences were worked out.
    against: (Arc<Rows>, u32),
    differing: [Step; 5],
    /// For a new epoch, where people change.
    anew: Option<Anew>,
}

struct Anew {
    epoch: u32,
    steps: [Step; 2],
    classes: Classes,
    placement: Placement,
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
    /// Works out what a policy says to the kernel programs. It takes time, in the network namespace that the policy is for, and
    /// changes nothing.
    pub fn prepare(self, facts: Arc<dyn KernelFacts>) -> Prepared {
        let mut sources = Sources::default();
        let rows = Arc::new(Rows::of(facts.as_ref(), |to| sources.source_for(to)));
        self.against(facts, rows)
    }

    fn against(self, facts: Arc<dyn KernelFacts>, rows: Arc<Rows>) -> Prepared {
        let anew = (self.epoch == 0 || rows.who != self.in_force.who).then(|| {
            let epoch = self.epoch.checked_add(1).unwrap_or(1);
            let mut classes = Classes { wanted: rows.flags & FLAG_CGROUP_CLASSES != 0, ..Classes::default() };
            let mut placement = Placement::default();
            for cgroup in &self.cgroups {
                classes.place(facts.as_ref(), epoch, cgroup, self.room, &mut placement);
            }
            Anew { epoch, steps: Plan::anew(&rows, epoch), classes, placement }
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

    /// What a policy is prepared by.
    pub fn outlook(&mut self) -> Result<Outlook, Error> {
        self.watch_cgroups()?;
        // The root first: what is above has a row before what is below, should there be room for some only.
        let mut cgroups = self.cgroups.all();
        cgroups.sort_unstable_by(|one, other| one.path.cmp(&other.path));
        Ok(Outlook { in_force: Arc::clone(&self.rows), epoch: self.epoch, cgroups, room: self.room() })
    }

    /// Puts a prepared policy in force and gives its generation, as [`Programs::install`] does.
    pub fn install_prepared(&mut self, prepared: Prepared) -> Result<u32, Error> {
        self.watch_cgroups()?;
        let (against, epoch) = &prepared.against;
        let prepared = if Arc::ptr_eq(against, &self.rows) && *epoch == self.epoch {
            prepared
        } else {
            // Another policy has been installed since.
            self.outlook()?.against(prepared.facts, prepared.rows)
        };
        let Prepared { facts, rows, differing, anew, .. } = prepared;
        self.fits(&rows, anew.is_some())?;
        let generation = self.generation.checked_add(1).unwrap_or(1);
        let before = self.tables.config.get(&0).map_err(map_error(map::CONFIG))?.filter(|_| self.epoch != 0);
        let epoch = anew.as_ref().map_or(self.epoch, |anew| anew.epoch);
        let after = self.config(generation, epoch, rows.flags);
        let changes = if anew.is_some() { Vec::new() } else { self.classes.changes(facts.as_ref()) };
        let mut classes = None;
        let anew = anew.map(|mut anew| {
            self.update_placement(facts.as_ref(), &mut anew);
            classes = Some(anew.classes);
            (anew.steps, anew.placement)
        });
        let plan = Plan::new(before, after, differing, changes.clone(), anew);

        let protected = protect(&self.tables, &rows.protected)?;
        if let Err(error) = plan.carry_out(&self.tables) {
            unprotect(&self.tables, &protected)?;
            return Err(error);
        }
        let gone = std::mem::replace(&mut self.rows, Arc::clone(&rows));
        let epoch_before = std::mem::replace(&mut self.epoch, epoch);
        self.generation = generation;
        discard((self.facts.replace(facts), Arc::clone(&gone)));
        self.classes.accept(&changes);
        let classes_before = classes.map(|classes| std::mem::replace(&mut self.classes, classes));
        let protected_before = std::mem::replace(&mut self.protected, rows.protected.iter().copied().collect());
        // From here on the new policy is in force, and what cannot be tidied up is only a loss of room.
        let over: Vec<ListenerKey> = protected_before.difference(&self.protected).copied().collect();
        let swept = classes_before.map_or(Ok(()), |classes| self.remove_epoch(epoch_before, &gone, &classes));
        if let Err(error) = swept.and_then(|()| unprotect(&self.tables, &over)) {
            tracing::warn!(%error, "rows of the policy before could not be removed from the kernel maps");
        }
        Ok(generation)
    }

    /// Is there room for this policy?
    fn fits(&self, rows: &Rows, anew: bool) -> Result<(), Error> {
        let before = &self.rows;
        let destinations = if anew {
            before.destinations.len() + rows.destinations.len()
        } else {
            before.destinations.len()
                + differences(&before.destinations, &rows.destinations).iter().map(Vec::len).sum::<usize>()
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

    /// Removes what an epoch had: what is known of it, and after a start all that is there.
    fn remove_epoch(&self, epoch: u32, rows: &Rows, classes: &Classes) -> Result<(), Error> {
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

    pub(super) fn watch_cgroups(&mut self) -> Result<(), Error> {
        let changes = self.cgroups.changes()?;
        for id in changes.removed {
            self.classes.placed.remove(&id);
            let key = CgroupKey { epoch: self.epoch, pad: 0, cgroup: id };
            if let Err(error) = self.tables.cgroups.remove(&key) {
                tracing::warn!(%error, "the row of a cgroup that is gone stays in the kernel map CGROUPS");
            }
        }
        self.classify(&changes.made);
        Ok(())
    }

    pub(super) fn classify_unknown(&mut self, id: u64) {
        if self.classes.placed.contains(&id) {
            return;
        }
        let made = self.cgroups.rescan();
        self.classify(&made);
        // Known before, and not placed: there was no room then.
        let known: Vec<Cgroup> = self.cgroups.all().into_iter().filter(|cgroup| cgroup.id == id).collect();
        self.classify(&known);
    }

    /// Writes the rows of new cgroups. What does not fit is counted and refused, and ends nothing.
    fn classify(&mut self, cgroups: &[Cgroup]) {
        let Some(facts) = self.facts.clone() else { return };
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
                tracing::warn!(cgroup = %cgroup.path, problem,
                    "a cgroup has no row in the kernel maps: whoever could be a workload there is refused");
            }
        }
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
    drop(std::thread::Builder::new().name("wimsey-discard".into()).spawn(move || drop(past)));
}

impl Classes {
    /// Undoes the placing of a cgroup whose rows could not be written, and of its class, if that was new with it.
    fn forget(&mut self, cgroup: u64, set: Vec<u32>) {
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

/// Removes the rows of every epoch that is not to stay.
pub(super) fn sweep(tables: &Tables, stays: impl Fn(u32) -> bool) -> Result<(), Error> {
    let mut over = tables.destinations.keys().map_err(map_error(map::DESTINATIONS))?;
    over.retain(|key| !stays({ key.data() }.epoch));
    tables.destinations.remove_all(&over).map_err(map_error(map::DESTINATIONS))?;
    let mut over = tables.candidates.keys().map_err(map_error(map::CANDIDATES))?;
    over.retain(|key| !stays(key.epoch));
    tables.candidates.remove_all(&over).map_err(map_error(map::CANDIDATES))?;
    let mut over = tables.cgroups.keys().map_err(map_error(map::CGROUPS))?;
    over.retain(|key| !stays(key.epoch));
    tables.cgroups.remove_all(&over).map_err(map_error(map::CGROUPS))
}

/// Makes sure that these addresses are protected, and says which rows are new.
pub(super) fn protect(tables: &Tables, addresses: &[ListenerKey]) -> Result<Vec<ListenerKey>, Error> {
    let mut new = Vec::new();
    for key in addresses {
        let row = tables.listeners.get(key).map_err(map_error(map::LISTENERS))?;
        let nobody = Task { tgid: 0, uid: 0, gid: 0, workload: 0, cgroup: 0, at: 0, comm: [0; 16] };
        let mut raised = row.unwrap_or(Listener { owner: nobody, cookie: 0, mode: 0, dual: 1 });
        if raised.mode == LISTENER_PROTECTED {
            continue;
        }
        raised.mode = LISTENER_PROTECTED;
        if let Err(error) = tables.listeners.put(key, &raised, bpf::ANY) {
            unprotect(tables, &new)?;
            return Err(map_error(map::LISTENERS)(error));
        }
        if row.is_none() {
            new.push(*key);
        }
    }
    Ok(new)
}

/// Takes protection from addresses on which nobody listens. Where somebody does, the agent looks at the owner first.
pub(super) fn unprotect(tables: &Tables, addresses: &[ListenerKey]) -> Result<(), Error> {
    for key in addresses {
        let free = matches!(tables.listeners.get(key), Ok(Some(row)) if row.cookie == 0);
        if free
            && let Some(row) = tables.listeners.take(key).map_err(map_error(map::LISTENERS))?
            && row.cookie != 0
        {
            // Somebody began to listen in between.
            tables.listeners.put(key, &row, bpf::NEW).map_err(map_error(map::LISTENERS))?;
        }
    }
    Ok(())
}

/// Which address would this host use to get there? A connected UDP socket knows, and sends nothing.
#[derive(Default)]
struct Sources {
    four: Option<UdpSocket>,
    six: Option<UdpSocket>,
}

impl Sources {
    fn source_for(&mut self, to: IpAddr) -> Option<IpAddr> {
        let (socket, any): (_, SocketAddr) = match to {
            IpAddr::V4(_) => (&mut self.four, (std::net::Ipv4Addr::UNSPECIFIED, 0).into()),
            IpAddr::V6(_) => (&mut self.six, (std::net::Ipv6Addr::UNSPECIFIED, 0).into()),
        };
        if socket.is_none() {
            *socket = UdpSocket::bind(any).during(String::new).ok();
        }
        let socket = socket.as_ref()?;
        socket.connect((to, 9)).ok()?;
        let source = socket.local_addr().ok()?.ip();
        // Else the next destination would be asked for from this address.
        rustix::net::connect_unspec(socket).ok()?;
        (!source.is_unspecified()).then_some(source)
    }
}

#[cfg(test)]
mod tests;
