use super::{classes::*, plan::*, *};
use crate::{
    intercept::{
        address,
        rows::{NAMESPACE, Network},
    },
    policy::{Accounts, Policy, Source},
};
use proptest::prelude::*;
use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write,
    net::SocketAddr,
};

/// The maps as the programs see them. Rows are taken one by one, so that there is a moment after each.
#[derive(Clone, Default)]
struct Kernel {
    config: Option<Config>,
    cgroups: HashMap<CgroupKey, Placed>,
    candidates: HashMap<CandidateKey, Candidate>,
    destinations: BTreeMap<(DestinationKey, u32), Destination>,
    verdicts: HashMap<VerdictKey, Verdict>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    LeftAlone,
    Refused,
    Turned,
    Bypassed,
}

fn taken<K: Eq + std::hash::Hash, V>(rows: &mut HashMap<K, V>, key: K, after: Option<V>) {
    match after {
        Some(row) => drop(rows.insert(key, row)),
        None => drop(rows.remove(&key)),
    }
}

impl Kernel {
    fn take(&mut self, step: Step, mut after_each: impl FnMut(&Self)) {
        match step {
            Step::Verdicts(changes) => changes.into_iter().for_each(|change| {
                taken(&mut self.verdicts, change.key, change.after);
                after_each(self);
            }),
            Step::Candidates(changes) => changes.into_iter().for_each(|change| {
                taken(&mut self.candidates, change.key, change.after);
                after_each(self);
            }),
            Step::Cgroups(changes) => changes.into_iter().for_each(|change| {
                taken(&mut self.cgroups, change.key, change.after);
                after_each(self);
            }),
            Step::Destinations(changes) => changes.into_iter().for_each(|change| {
                let key = (change.key.data(), change.key.prefix_len());
                match change.after {
                    Some(row) => drop(self.destinations.insert(key, row)),
                    None => drop(self.destinations.remove(&key)),
                }
                after_each(self);
            }),
            Step::Config(change) => {
                self.config = change.after;
                after_each(self);
            }
        }
    }

    fn destination(&self, config: &Config, to: SocketAddr) -> Option<Destination> {
        let wanted = u128::from_be_bytes(address(to.ip()));
        let covers = |((key, bits), row): (&(DestinationKey, u32), &Destination)| {
            let kept = u128::MAX.checked_shl(128 + DESTINATION_FIXED_BITS - bits).unwrap_or(0);
            // A connect does not look up the rows that say whether some port of an address is a mesh destination.
            let here = key.epoch == config.epoch
                && key.pad != DESTINATION_ADDRESS
                && (key.port == 0 || key.port == to.port())
                && u128::from_be_bytes(key.address) == wanted & kept;
            here.then_some((key.port != 0, *bits, *row))
        };
        let found = self.destinations.iter().filter_map(covers).max_by_key(|(port, bits, _)| (*port, *bits));
        found.map(|(_, _, row)| row)
    }

    /// As `connect` in ebpf/src/egress.rs decides about TCP, and `datagram` about UDP, for a task of one uid and gid 0.
    fn decide(&self, uid: u32, cgroup: u64, to: SocketAddr, udp: bool) -> Outcome {
        let Some(config) = self.config else { return Outcome::LeftAlone };
        let epoch = config.epoch;
        let mut classes = vec![(CLASS_NONE, config.flags >> SHAPES_WITHOUT_CGROUP)];
        if config.flags & FLAG_CGROUP_CLASSES != 0
            && let Some(placed) = self.cgroups.get(&CgroupKey { epoch, pad: 0, cgroup })
            && placed.class != CLASS_NONE
        {
            classes.push((placed.class, config.flags >> SHAPES_WITH_CGROUP));
        }
        let (mut certain, mut workload, mut source, mut group) = (0, 0, 0, 0);
        for (class, shapes) in classes {
            for (form, uid, gid) in
                [(shape::BOTH, uid, 0), (shape::UID, uid, ANY), (shape::GID, ANY, 0), (shape::NEITHER, ANY, ANY)]
            {
                let row = self.candidates.get(&CandidateKey { epoch, class, uid, gid });
                let Some(row) = row.filter(|_| shapes & form != 0) else { continue };
                if row.certain > certain {
                    (certain, workload, source, group) = (row.certain, row.workload, row.source, row.group);
                } else if row.certain == certain && row.workload != workload {
                    workload = 0;
                }
            }
        }
        let there = self.destination(&config, to);
        let mesh = there.is_some_and(|there| there.mode == MODE_MESH);
        if certain == 0 {
            return if mesh && !udp { Outcome::Refused } else { Outcome::LeftAlone };
        }
        if udp && !mesh {
            return Outcome::LeftAlone;
        }
        if workload == 0 {
            return if udp { Outcome::Refused } else { Outcome::Turned };
        }
        let Some(there) = there else { return Outcome::Refused };
        let (targets, protocol) = if udp { ([there.datagrams, 0], 17) } else { ([there.target, there.group], 6) };
        for port in if config.flags & FLAG_PORTS == 0 { vec![0] } else { vec![0, to.port()] } {
            for target in targets {
                for source in [source, group] {
                    let row = self.verdicts.get(&VerdictKey { source, target, port, protocol, pad: 0 });
                    match row.filter(|_| source != 0 && target != 0) {
                        Some(row) if row.action == VERDICT_MESH && mesh => return Outcome::Turned,
                        Some(_) => return Outcome::Bypassed,
                        None => {}
                    }
                }
            }
        }
        Outcome::Refused
    }
}

const MATCHERS: [&str; 5] = [
    "\"spiffe://td/a\"",
    "\"spiffe://td/ns/b\"",
    "{ pattern = \"spiffe://td/ns/*\" }",
    "{ pattern = \"spiffe://td/*\" }",
    "{ pattern = \"spiffe://td/**\" }",
];
const IDS: [&str; 4] = ["a", "ns/b", "ns/c", "d"];
const REGIONS: [&str; 7] =
    ["10.0.0.0/30:*", "10.0.0.1:80", "10.0.0.0/31:80", "10.0.0.1:*", "10.0.0.2:*", "10.0.0.2:81", "10.0.0.0/24:*"];

/// What two policies have in common, and what each has of its own: a change of a few rules.
#[derive(Clone, Debug)]
struct Text {
    workloads: Vec<(usize, usize)>,
    destinations: Vec<(usize, usize)>,
    allows: Vec<(usize, usize, bool)>,
    bypasses: Vec<(usize, usize)>,
    udps: Vec<(usize, usize)>,
}

fn texts() -> impl Strategy<Value = Text> {
    use proptest::collection::vec;
    let region = || 0..REGIONS.len();
    let matcher = || 0..MATCHERS.len();
    (
        vec((0..IDS.len(), 0..4usize), 1..4),
        vec((region(), 0..IDS.len()), 0..4),
        vec((matcher(), matcher(), any::<bool>()), 0..4),
        vec((region(), matcher()), 0..3),
        vec((region(), matcher()), 0..2),
    )
        .prop_map(|(mut workloads, mut destinations, mut allows, mut bypasses, mut udps)| {
            let mut seen = HashSet::new();
            workloads.retain(|(_, selector)| seen.insert(*selector));
            let mut seen = HashSet::new();
            destinations.retain(|(region, _)| seen.insert(*region));
            bypasses.retain(|(region, _)| seen.insert(*region));
            udps.dedup();
            let mut seen = HashSet::new();
            allows.retain(|(from, to, _)| seen.insert((*from, *to)));
            Text { workloads, destinations, allows, bypasses, udps }
        })
}

impl Text {
    fn policy(&self) -> Option<Policy> {
        const SELECTORS: [&str; 4] =
            ["\"unix:uid:1\"", "\"unix:uid:2\"", "\"unix:uid:2\", \"cgroup:/c\"", "\"cgroup:/c\""];
        let mut text = String::from("trust_domain = \"td\"\n");
        for (id, selector) in &self.workloads {
            let (id, selector) = (IDS[*id], SELECTORS[*selector]);
            writeln!(text, "[[workload]]\nid = \"spiffe://td/{id}\"\nselectors = [{selector}]").unwrap();
        }
        for (region, id) in &self.destinations {
            let (region, id) = (REGIONS[*region], IDS[*id]);
            writeln!(text, "[[destination]]\naddress = \"{region}\"\nid = \"spiffe://td/{id}\"").unwrap();
        }
        for (from, to, port) in &self.allows {
            writeln!(text, "[[allow]]\nfrom = {}\nto = {}", MATCHERS[*from], MATCHERS[*to]).unwrap();
            text += if *port { "ports = [80]\n" } else { "" };
        }
        for (kind, rules) in [("bypass", &self.bypasses), ("udp", &self.udps)] {
            for (number, (region, from)) in rules.iter().enumerate() {
                let (region, from) = (REGIONS[*region], MATCHERS[*from]);
                writeln!(text, "[[{kind}]]\nname = \"{kind}{number}\"\nfrom = {from}\naddress = \"{region}\"").unwrap();
            }
        }
        let source = Source { file: "p.toml".into(), text };
        Policy::parse("p", &[source], &Accounts::default()).ok()
    }
}

fn cgroups() -> Vec<Cgroup> {
    [("/", 1), ("/c", 2)].map(|(path, id)| Cgroup { path: path.into(), id }).into()
}

const ROOM: Room = Room { cgroups: 100, candidates: 100 };

/// What is in force for an agent: rows, epoch, classes.
#[derive(Default)]
struct InForce {
    rows: Arc<Rows>,
    epoch: u32,
    classes: Classes,
    config: Option<Config>,
}

impl InForce {
    /// The steps to a policy, and what is in force after them.
    fn plan(&self, policy: Policy) -> (Plan, InForce) {
        let outlook = Outlook {
            in_force: Arc::clone(&self.rows),
            epoch: self.epoch,
            cgroups: cgroups(),
            room: ROOM,
            sockets: None,
        };
        let facts: Arc<dyn KernelFacts> = Arc::new(policy);
        let Prepared { facts, rows, differing, anew, .. } = outlook.prepare(facts);
        let epoch = anew.as_ref().map_or(self.epoch, |anew| anew.epoch);
        let flags = rows.flags;
        let config = Config { abi: ABI, generation: 1, netns_cookie: 1, shards: 1, flags, epoch, namespace: NAMESPACE };
        let changes = if anew.is_some() { Vec::new() } else { self.classes.changes(facts.as_ref()) };
        let mut classes = Classes::default();
        let anew = anew.map(|anew| {
            classes = anew.classes;
            (anew.steps, anew.placement)
        });
        let plan = Plan::new(self.config, config, differing, changes, anew);
        (plan, InForce { rows, epoch, classes, config: Some(config) })
    }
}

fn questions() -> Vec<(u32, u64, SocketAddr, bool)> {
    let mut all = Vec::new();
    for uid in [1, 2, 3] {
        for cgroup in [1, 2] {
            for host in ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.9", "10.0.1.1"] {
                for port in [80, 81] {
                    all.extend(
                        [false, true].map(|udp| (uid, cgroup, SocketAddr::new(host.parse().unwrap(), port), udp)),
                    );
                }
            }
        }
    }
    all
}

fn answers(kernel: &Kernel) -> Vec<Outcome> {
    questions().into_iter().map(|(uid, cgroup, to, udp)| kernel.decide(uid, cgroup, to, udp)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn at_every_moment_of_a_reload_each_connection_is_decided_as_before_or_after_or_is_refused(
        before in texts(),
        after in texts(),
        same_people in any::<bool>(),
    ) {
        let after = if same_people { Text { workloads: before.workloads.clone(), ..after } } else { after };
        let (Some(old), Some(new)) = (before.policy(), after.policy()) else { return Ok(()) };
        let mut kernel = Kernel::default();
        let (plan, in_force) = InForce::default().plan(old);
        plan.steps.into_iter().for_each(|step| kernel.take(step, |_| {}));
        let old = answers(&kernel);

        let (plan, _) = in_force.plan(new);
        let mut moments = Vec::new();
        for step in plan.steps {
            kernel.take(step, |kernel| moments.push(answers(kernel)));
        }
        let new = answers(&kernel);
        for (number, moment) in moments.iter().enumerate() {
            for (at, question) in questions().iter().enumerate() {
                prop_assert!(
                    [old[at], new[at], Outcome::Refused].contains(&moment[at]),
                    "{question:?} is {:?} after {number} of {} rows: {:?} before, {:?} after",
                    moment[at], moments.len(), old[at], new[at]
                );
            }
        }
    }

    #[test]
    fn differences_lead_to_the_same_rows_as_a_fresh_start(before in texts(), after in texts(), same_people in any::<bool>()) {
        let after = if same_people { Text { workloads: before.workloads.clone(), ..after } } else { after };
        let (Some(old), Some(new), Some(again)) = (before.policy(), after.policy(), after.policy()) else { return Ok(()) };
        let (mut reloaded, mut fresh) = (Kernel::default(), Kernel::default());
        let (plan, in_force) = InForce::default().plan(old);
        plan.steps.into_iter().for_each(|step| reloaded.take(step, |_| {}));
        in_force.plan(new).0.steps.into_iter().for_each(|step| reloaded.take(step, |_| {}));
        InForce::default().plan(again).0.steps.into_iter().for_each(|step| fresh.take(step, |_| {}));
        prop_assert_eq!(answers(&reloaded), answers(&fresh));
        prop_assert_eq!(&reloaded.verdicts, &fresh.verdicts);
    }

    #[test]
    fn a_reload_that_fails_at_any_row_is_taken_back_without_a_trace(before in texts(), after in texts(), same_people in any::<bool>()) {
        let after = if same_people { Text { workloads: before.workloads.clone(), ..after } } else { after };
        let (Some(old), Some(new)) = (before.policy(), after.policy()) else { return Ok(()) };
        let mut kernel = Kernel::default();
        let (plan, in_force) = InForce::default().plan(old);
        plan.steps.into_iter().for_each(|step| kernel.take(step, |_| {}));
        let untouched = kernel.clone();
        let mut taken = Vec::new();
        for step in in_force.plan(new).0.steps {
            // The last step that was begun is taken back as a whole, however far it came.
            kernel.take(step.again(), |_| {});
            taken.push(step);
            let mut back = kernel.clone();
            taken.iter().rev().for_each(|step| back.take(step.again().back(), |_| {}));
            prop_assert_eq!(answers(&back), answers(&untouched));
            prop_assert_eq!(&back.verdicts, &untouched.verdicts);
            prop_assert_eq!(&back.candidates, &untouched.candidates);
            prop_assert_eq!(&back.destinations, &untouched.destinations);
        }
    }
}

impl Step {
    fn again(&self) -> Self {
        match self {
            Self::Verdicts(changes) => Self::Verdicts(changes.clone()),
            Self::Destinations(changes) => Self::Destinations(changes.clone()),
            Self::Candidates(changes) => Self::Candidates(changes.clone()),
            Self::Cgroups(changes) => Self::Cgroups(changes.clone()),
            Self::Config(change) => Self::Config(*change),
        }
    }
}

#[test]
fn one_changed_rule_is_one_row() {
    let text = Text {
        workloads: vec![(0, 0), (1, 1)],
        destinations: vec![(1, 0), (4, 3)],
        allows: vec![(0, 1, false)],
        bypasses: Vec::new(),
        udps: Vec::new(),
    };
    let (_, in_force) = InForce::default().plan(text.policy().unwrap());
    let more = Text { allows: vec![(0, 1, false), (1, 0, false)], ..text };
    let outlook =
        Outlook { in_force: in_force.rows, epoch: in_force.epoch, cgroups: cgroups(), room: ROOM, sockets: None };
    assert_eq!(outlook.prepare(Arc::new(more.policy().unwrap())).changes(), 1);
}

#[test]
fn a_network_is_matched_behind_epoch_namespace_and_port() {
    let network =
        Network { bits: DESTINATION_FIXED_BITS + 96 + 24, port: 80, kind: 0, address: address([10, 0, 0, 0].into()) };
    let key = network.key(5);
    assert_eq!(key.prefix_len(), 96 + 96 + 24);
    let data = key.data();
    assert_eq!((data.epoch, data.namespace, data.port), (5, NAMESPACE, 80));
    assert_eq!(DESTINATION_KEY_BITS, 224);
}

#[test]
fn cgroups_with_the_same_selectors_share_a_class_and_room_is_kept_for_those_that_need_a_row() {
    let text = Text {
        workloads: vec![(0, 2)],
        destinations: Vec::new(),
        allows: Vec::new(),
        bypasses: Vec::new(),
        udps: Vec::new(),
    };
    let policy = text.policy().unwrap();
    let mut classes = Classes { wanted: true, ..Classes::default() };
    let room = Room { cgroups: 6, candidates: 10 };
    let mut placement = Placement::default();
    let mut place = |path: &str, id: u64, classes: &mut Classes| {
        classes.place(&policy, 1, &Cgroup { path: path.into(), id }, room, &mut placement);
        placement.cgroups.last().filter(|change| change.key.cgroup == id).and_then(|change| change.after)
    };
    assert_eq!(place("/", 1, &mut classes), Some(Placed { class: CLASS_NONE, open: 1 }));
    assert_eq!(place("/c", 2, &mut classes), Some(Placed { class: 1, open: 0 }));
    assert_eq!(place("/c/d", 3, &mut classes), Some(Placed { class: 1, open: 0 }));
    // Half full: a cgroup that inherits from its parent gets no row.
    assert_eq!(place("/c/e", 4, &mut classes), None);
    assert_eq!(place("/a", 5, &mut classes), Some(Placed { class: CLASS_NONE, open: 0 }));
    assert_eq!(place("/a/b", 6, &mut classes), None);
    assert_eq!(classes.unplaced, 0);
    for id in 7..10 {
        place(&format!("/x{id}"), id, &mut classes);
    }
    assert_eq!(classes.unplaced, 1);
}
