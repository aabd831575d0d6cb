//! The policy as rows for the maps of the kernel programs; see `bunter_common` for the maps.
//!
//! Who a row is about is said in numbers that name it for ever: a number is made of an ID, of the patterns that match an ID,
//! or of the rules that hold at an address, and nothing else. So rows of two policies can be compared, and a row that both
//! have is right in both. There is a row for each rule and for each destination, never for pairs of the two.
//!
//! *Invariant:* the rows say what the rest of this module says, or "ask the agent" (candidates), or nothing, which is a
//! denial (verdicts). They never allow more.

use super::{Kind, Matcher, Plain, Policy, Ports, Selector, groups::Groups};
use bunter_common::{MODE_MESH, MODE_PLAIN, VERDICT_BYPASS, VERDICT_MESH};
use bunter_identity::spiffe::{Pattern, SpiffeId};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, hash_map::Entry},
    hash::{DefaultHasher, Hash, Hasher},
    net::IpAddr,
    sync::Arc,
};

const TCP: u16 = 6;
const UDP: u16 = 17;

/// The part of a policy that the kernel programs decide by; see `bunter_common` for the maps it goes into.
#[derive(Clone, Debug, Default)]
pub struct KernelPolicy {
    /// Every destination: mesh destinations and the addresses of bypasses.
    pub destinations: Vec<KernelDestination>,
    /// What is allowed. Each key is there once.
    pub verdicts: Vec<KernelVerdict>,
    /// Some entry has a cgroup or systemd selector.
    pub cgroup_classes: bool,
    /// Real uid and gid, or any, of every entry that has a cgroup selector: tasks that could be a workload in a cgroup that
    /// is not known yet.
    pub unseen: Vec<(Option<u32>, Option<u32>)>,
    /// Ports that are protected whether or not a listener of the workload has been seen: from `[[inbound]]`.
    pub protected: Vec<(IpAddr, u16)>,
}

/// One row for `DESTINATIONS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelDestination {
    /// Addresses.
    pub network: ipnet::IpNet,
    /// Port, or any.
    pub port: Option<u16>,
    /// `bunter_common::MODE_MESH` or `MODE_PLAIN`.
    pub mode: u32,
    /// Number of the identity that has to answer, or of the bypasses that hold there.
    pub target: u64,
    /// Number of the patterns that match this identity, or 0.
    pub group: u64,
    /// Number of the UDP rules that hold there, or 0.
    pub datagrams: u64,
}

/// One row for `VERDICTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelVerdict {
    /// Number of an identity, or of the patterns that match it.
    pub source: u64,
    /// Number of what it may reach.
    pub target: u64,
    /// Port, or 0 for every port.
    pub port: u16,
    /// IPPROTO_TCP or IPPROTO_UDP.
    pub protocol: u16,
    /// `bunter_common::VERDICT_MESH` or `VERDICT_BYPASS`.
    pub action: u32,
    /// Rule number of a bypass.
    pub rule: u32,
}

/// One row for `CANDIDATES` under one class of cgroups; see `bunter_common::Candidate`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelCandidate {
    /// Real uid, or any.
    pub uid: Option<u32>,
    /// Real gid, or any.
    pub gid: Option<u32>,
    /// The workload of the entry with the most selectors, among those that the kernel can check completely; 0 where there
    /// is none, or where several workloads have as many.
    pub workload: u32,
    /// Number of its identity.
    pub source: u64,
    /// Number of the patterns that match it, or 0.
    pub group: u64,
    /// How many selectors that are, or 0.
    pub certain: u16,
    /// How many selectors the longest entry has that the agent has to attest, or 0.
    pub attested: u16,
}

impl KernelCandidate {
    /// Does the row fit a task with these ids?
    pub fn fits(&self, uid: u32, gid: u32) -> bool {
        self.uid.is_none_or(|wanted| wanted == uid) && self.gid.is_none_or(|wanted| wanted == gid)
    }
}

/// What the kernel has to know of a registration entry.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    uid: Option<u32>,
    gid: Option<u32>,
    /// Numbers of its cgroup selectors, sorted.
    cgroups: Vec<u32>,
    /// Selectors, and whether the kernel can check all of them.
    selectors: u16,
    certain: bool,
    source: u64,
    group: u64,
}

/// Registration entries as the kernel sees them, found by the cgroup selector that they are filed under.
#[derive(Debug, Default)]
pub(super) struct Entries {
    all: Vec<Seen>,
    without_cgroup: Vec<usize>,
    by_cgroup: HashMap<u32, Vec<usize>>,
}

impl Policy {
    /// What the kernel programs need to know.
    pub fn kernel(&self) -> Arc<KernelPolicy> {
        Arc::clone(&self.kernel)
    }

    /// A number for all registration entries: two policies with the same number take every process for the same workload.
    pub fn who(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (workload, selectors) in self.workloads.iter().zip(&self.selectors) {
            (&workload.id, selectors).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// Could an entry match a task with these ids whose cgroup is gone? An entry that asks for a cgroup alone does not
    /// count.
    pub fn names_ids(&self, uid: u32, gid: u32) -> bool {
        let fits = |seen: &Seen| seen.uid.is_none_or(|it| it == uid) && seen.gid.is_none_or(|it| it == gid);
        let asks = |seen: &Seen| seen.cgroups.is_empty() || seen.uid.is_some() || seen.gid.is_some();
        self.entries.all.iter().any(|seen| asks(seen) && fits(seen))
    }

    /// How many rows of destinations the kernel programs know: mesh destinations, the addresses of bypasses, and what lies
    /// between them.
    pub fn destinations(&self) -> usize {
        self.kernel.destinations.len()
    }

    /// The cgroup selectors that a cgroup path satisfies, as sorted indices: cgroups with equal sets share a class.
    pub fn cgroup_set(&self, cgroup: &str) -> Vec<u32> {
        let mut set: Vec<u32> =
            super::selector::selectors_of(cgroup).filter_map(|selector| self.cgroup_number(&selector)).collect();
        set.sort_unstable();
        set.dedup();
        set
    }

    /// Could a cgroup below this one satisfy a cgroup selector that this one does not?
    pub fn cgroup_open(&self, cgroup: &str) -> bool {
        let below = Selector::Cgroup(if cgroup == "/" { cgroup.to_owned() } else { format!("{cgroup}/") });
        let next = self.cgroup_selectors.partition_point(|selector| *selector < below);
        let named = self.cgroup_selectors.get(next).is_some_and(
            |selector| matches!((selector, &below), (Selector::Cgroup(path), Selector::Cgroup(below)) if path.starts_with(below)),
        );
        named || (super::selector::may_hold_units(cgroup) && self.units_held(cgroup) < self.unit_selectors)
    }

    fn units_held(&self, cgroup: &str) -> usize {
        let held: BTreeSet<Selector> = super::selector::selectors_of(cgroup)
            .filter(|selector| matches!(selector, Selector::Systemd(_)) && self.cgroup_number(selector).is_some())
            .collect();
        held.len()
    }

    fn cgroup_number(&self, selector: &Selector) -> Option<u32> {
        u32::try_from(self.cgroup_selectors.binary_search(selector).ok()?).ok()
    }

    /// The candidate rows for one class of cgroups. The empty set is every process: the entries without a cgroup selector.
    /// Another set has the entries whose cgroup selectors are all in it; the programs look at both, and a row says how much
    /// it asks for, so that they can tell which entry has the most selectors.
    pub fn candidates(&self, set: &[u32]) -> Vec<KernelCandidate> {
        let mut rows: BTreeMap<(Option<u32>, Option<u32>), Contest<'_>> = BTreeMap::new();
        let mut add = |at: usize| {
            let (Some(seen), Some(workload)) = (self.entries.all.get(at), self.workloads.get(at)) else { return };
            let contest = rows.entry((seen.uid, seen.gid)).or_default();
            if !seen.certain {
                contest.row.attested = contest.row.attested.max(seen.selectors);
                return;
            }
            match contest.id {
                Some(_) if contest.row.certain > seen.selectors => {}
                Some(first) if contest.row.certain == seen.selectors => contest.tie |= *first != workload.id,
                _ => {
                    (contest.id, contest.tie) = (Some(&workload.id), false);
                    (contest.row.workload, contest.row.certain) = (workload.number, seen.selectors);
                    (contest.row.source, contest.row.group) = (seen.source, seen.group);
                }
            }
        };
        if set.is_empty() {
            self.entries.without_cgroup.iter().for_each(|at| add(*at));
        } else {
            let filed = set.iter().filter_map(|number| self.entries.by_cgroup.get(number)).flatten();
            let holds = |at: &&usize| {
                let asks = self.entries.all.get(**at).map(|seen| seen.cgroups.as_slice());
                asks.is_some_and(|asks| asks.iter().all(|number| set.binary_search(number).is_ok()))
            };
            let mut matching: Vec<usize> = filed.filter(holds).copied().collect();
            matching.sort_unstable();
            matching.into_iter().for_each(add);
        }
        rows.into_iter().map(|((uid, gid), contest)| contest.row(uid, gid)).collect()
    }
}

/// The entries with one uid and gid.
#[derive(Default)]
struct Contest<'p> {
    row: KernelCandidate,
    /// Of the entry that `row` is about.
    id: Option<&'p SpiffeId>,
    /// Another identity has as many selectors.
    tie: bool,
}

impl Contest<'_> {
    fn row(self, uid: Option<u32>, gid: Option<u32>) -> KernelCandidate {
        let mut row = KernelCandidate { uid, gid, ..self.row };
        if self.tie {
            (row.workload, row.source, row.group) = (0, 0, 0);
        }
        row
    }
}

/// What a number is about.
#[derive(Hash)]
enum Named<'p> {
    Identity(&'p SpiffeId),
    Sources(Vec<&'p Pattern>),
    Targets(Vec<&'p Pattern>),
    Bypasses(Vec<(&'p str, &'p Matcher)>),
    Datagrams(Vec<(&'p str, &'p Matcher)>),
}

/// Makes numbers by hashing what they name. A policy in which two names get one number is refused, which is so unlikely
/// that it should never happen.
#[derive(Default)]
struct Numbers {
    /// For each number, a second hash of the same name: where it differs, two names have one number.
    given: HashMap<u64, u64>,
    twice: bool,
}

impl Numbers {
    fn of(&mut self, named: &Named<'_>) -> u64 {
        let hash = |salt: u8| {
            let mut hasher = DefaultHasher::new();
            (salt, named).hash(&mut hasher);
            hasher.finish().max(1)
        };
        let (number, second) = (hash(0), hash(1));
        match self.given.entry(number) {
            Entry::Vacant(free) => drop(free.insert(second)),
            Entry::Occupied(given) => self.twice |= *given.get() != second,
        }
        number
    }
}

/// Ids, each with its own number and that of all the patterns that match it; and for each pattern, the numbers of the sets
/// of patterns to which it belongs.
#[derive(Default)]
struct Side<'p> {
    numbers: HashMap<&'p SpiffeId, (u64, u64)>,
    by_pattern: HashMap<&'p Pattern, Vec<u64>>,
}

impl<'p> Side<'p> {
    fn new(
        ids: impl Iterator<Item = &'p SpiffeId>,
        patterns: impl Iterator<Item = &'p Pattern>,
        named: impl Fn(Vec<&'p Pattern>) -> Named<'p>,
        numbers: &mut Numbers,
    ) -> Self {
        let groups = Groups::new(patterns);
        let mut side = Self::default();
        let mut known: HashMap<Vec<&Pattern>, u64> = HashMap::new();
        for id in ids {
            if side.numbers.contains_key(id) {
                continue;
            }
            let matching = groups.matching(id);
            let group = match known.get(&matching) {
                _ if matching.is_empty() => 0,
                Some(group) => *group,
                None => {
                    let group = numbers.of(&named(matching.clone()));
                    matching.iter().for_each(|pattern| side.by_pattern.entry(pattern).or_default().push(group));
                    known.insert(matching, group);
                    group
                }
            };
            side.numbers.insert(id, (numbers.of(&Named::Identity(id)), group));
        }
        side
    }

    /// The numbers under which rows for this matcher are found.
    fn matched<'s>(&'s self, matcher: &Matcher) -> impl Iterator<Item = u64> + use<'s> {
        let (exact, pattern) = match matcher {
            Matcher::Exact(id) => (self.numbers.get(id).map(|(number, _)| *number), None),
            Matcher::Pattern(pattern) => (None, self.by_pattern.get(pattern)),
        };
        exact.into_iter().chain(pattern.into_iter().flatten().copied())
    }
}

/// Files the registration entries. Their numbers come with [`compile`].
pub(super) fn entries(policy: &Policy) -> Entries {
    let mut entries = Entries::default();
    for (at, selectors) in policy.selectors.iter().enumerate() {
        let mut cgroups: Vec<u32> = selectors.iter().filter_map(|selector| policy.cgroup_number(selector)).collect();
        cgroups.sort_unstable();
        match cgroups.first() {
            None => entries.without_cgroup.push(at),
            Some(first) => entries.by_cgroup.entry(*first).or_default().push(at),
        }
        let uid = selectors.iter().find_map(|one| if let Selector::Uid(uid) = one { Some(*uid) } else { None });
        let gid = selectors.iter().find_map(|one| if let Selector::Gid(gid) = one { Some(*gid) } else { None });
        entries.all.push(Seen {
            uid,
            gid,
            cgroups,
            selectors: u16::try_from(selectors.len()).unwrap_or(u16::MAX),
            certain: selectors.iter().all(Selector::is_kernel_visible),
            source: 0,
            group: 0,
        });
    }
    entries
}

/// Computes the rows, and gives the entries their numbers. Stops early when there are too many verdicts: `check` then refuses
/// the policy. `None` where two names have one number.
pub(super) fn compile(policy: &Policy, entries: &mut Entries) -> Option<KernelPolicy> {
    let mut numbers = Numbers::default();
    let allows = || policy.allows.iter();
    let plain = || policy.bypasses.iter().chain(&policy.udps);
    let from_patterns = allows().map(|allow| &allow.from).chain(plain().map(|plain| &plain.from)).filter_map(pattern);
    let ids = policy.workloads.iter().map(|workload| &workload.id);
    let sources = Side::new(ids, from_patterns, Named::Sources, &mut numbers);
    let expected = policy.kinds.iter().filter_map(|kind| if let Kind::Mesh(id) = kind { Some(id) } else { None });
    let targets =
        Side::new(expected, allows().map(|allow| &allow.to).filter_map(pattern), Named::Targets, &mut numbers);
    for (seen, workload) in entries.all.iter_mut().zip(&policy.workloads) {
        (seen.source, seen.group) = sources.numbers.get(&workload.id).copied().unwrap_or_default();
    }

    let mut verdicts = Verdicts { sources: &sources, rows: HashMap::new(), sets: HashSet::new() };
    for allow in allows() {
        let ports = match &allow.ports {
            Ports::All => &[0][..],
            Ports::Some(ports) => ports,
        };
        for target in targets.matched(&allow.to) {
            verdicts.mesh(&allow.from, target, ports);
        }
        if verdicts.rows.len() > super::MAX_VERDICTS {
            break;
        }
    }
    let mut destinations = Vec::with_capacity(policy.kinds.len());
    for (region, kind) in policy.table.regions().iter().zip(&policy.kinds) {
        let mut row = KernelDestination {
            network: region.network,
            port: region.port,
            mode: MODE_MESH,
            target: 0,
            group: 0,
            datagrams: 0,
        };
        match kind {
            Kind::Mesh(expected) => {
                (row.target, row.group) = targets.numbers.get(expected).copied().unwrap_or_default();
                let holding: Vec<&Plain> = policy.udps.iter().filter(|udp| udp.region.covers(region)).collect();
                if !holding.is_empty() {
                    row.datagrams = numbers.of(&Named::Datagrams(named(&holding)));
                    verdicts.plain(row.datagrams, UDP, &holding);
                }
            }
            Kind::Plain(bypasses) => {
                let holding: Vec<&Plain> = bypasses.iter().filter_map(|at| policy.bypasses.get(*at)).collect();
                row.mode = MODE_PLAIN;
                row.target = numbers.of(&Named::Bypasses(named(&holding)));
                verdicts.plain(row.target, TCP, &holding);
            }
        }
        destinations.push(row);
        if verdicts.rows.len() > super::MAX_VERDICTS {
            break;
        }
    }
    let unseen: BTreeSet<_> =
        entries.all.iter().filter(|seen| !seen.cgroups.is_empty()).map(|seen| (seen.uid, seen.gid)).collect();
    (!numbers.twice).then(|| KernelPolicy {
        destinations,
        verdicts: verdicts.finish(),
        cgroup_classes: !policy.cgroup_selectors.is_empty(),
        unseen: unseen.into_iter().collect(),
        protected: policy.inbounds.iter().flat_map(|inbound| &inbound.listen).map(|at| (at.ip(), at.port())).collect(),
    })
}

fn pattern(matcher: &Matcher) -> Option<&Pattern> {
    match matcher {
        Matcher::Exact(_) => None,
        Matcher::Pattern(pattern) => Some(pattern),
    }
}

fn named<'p>(rules: &[&'p Plain]) -> Vec<(&'p str, &'p Matcher)> {
    rules.iter().map(|plain| (&*plain.rule.name, &plain.from)).collect()
}

/// Verdicts by source, target, port and protocol, with the action and the rule.
struct Verdicts<'s, 'p> {
    sources: &'s Side<'p>,
    rows: HashMap<(u64, u64, u16, u16), (u32, u32)>,
    /// Targets and protocols whose plain rules are there.
    sets: HashSet<(u64, u16)>,
}

impl Verdicts<'_, '_> {
    fn mesh(&mut self, from: &Matcher, target: u64, ports: &[u16]) {
        for source in self.sources.matched(from) {
            for port in ports {
                self.rows.insert((source, target, *port, TCP), (VERDICT_MESH, 0));
            }
        }
    }

    /// The rules that hold at one target, in the order of the files: of those for one source the first is named. The row of
    /// an identity is found before that of its patterns, so it names the first of both.
    fn plain(&mut self, target: u64, protocol: u16, rules: &[&Plain]) {
        if !self.sets.insert((target, protocol)) {
            return;
        }
        for plain in rules {
            for source in self.sources.matched(&plain.from) {
                self.rows.entry((source, target, 0, protocol)).or_insert_with(|| {
                    let id = if let Matcher::Exact(id) = &plain.from { Some(id) } else { None };
                    let first = id.and_then(|id| rules.iter().find(|rule| rule.from.matches(id)));
                    (VERDICT_BYPASS, first.unwrap_or(plain).rule.number)
                });
            }
        }
    }

    fn finish(self) -> Vec<KernelVerdict> {
        let row = |((source, target, port, protocol), (action, rule))| KernelVerdict {
            source,
            target,
            port,
            protocol,
            action,
            rule,
        };
        self.rows.into_iter().map(row).collect()
    }
}
