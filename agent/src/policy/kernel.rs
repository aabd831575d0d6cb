//! The policy as rows for the maps of the kernel programs; see `wimsey_common` for the maps.
//!
//! *Invariant:* the rows say what the rest of this module says, or "ask the agent" (candidates), or nothing, which is a
//! denial (verdicts). They never allow more.

use super::{Kind, Matcher, Policy, Ports, Selector};
use crate::spiffe::SpiffeId;
use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};
use wimsey_common::{MODE_MESH, MODE_PLAIN, VERDICT_BYPASS, VERDICT_MESH};

const TCP: u32 = 6;
const UDP: u32 = 17;

/// The part of a policy that the kernel programs decide by; see `wimsey_common` for the maps it goes into.
#[derive(Clone, Debug, Default)]
pub struct KernelPolicy {
    /// Every destination: mesh destinations and the addresses of bypasses.
    pub destinations: Vec<KernelDestination>,
    /// (workload number, destination number, IPPROTO_*, VERDICT_*, rule number)
    pub verdicts: Vec<KernelVerdict>,
    /// Some entry has a cgroup or systemd selector.
    pub cgroup_classes: bool,
    /// Ports that are protected whether or not a listener of the workload has been seen: from `[[inbound]]`.
    pub protected: Vec<(IpAddr, u16)>,
}

/// One row for `DESTINATIONS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelDestination {
    /// 1, 2, 3, ...
    pub number: u32,
    /// Addresses.
    pub network: ipnet::IpNet,
    /// Port, or any.
    pub port: Option<u16>,
    /// `wimsey_common::MODE_MESH` or `MODE_PLAIN`.
    pub mode: u32,
}

/// One row for `VERDICTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelVerdict {
    /// Workload number.
    pub workload: u32,
    /// Destination number.
    pub destination: u32,
    /// IPPROTO_TCP or IPPROTO_UDP.
    pub protocol: u32,
    /// `wimsey_common::VERDICT_MESH` or `VERDICT_BYPASS`.
    pub action: u32,
    /// Rule number.
    pub rule: u32,
}

/// One row for `CANDIDATES` under the class of one cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelCandidate {
    /// Real uid, or any.
    pub uid: Option<u32>,
    /// Real gid, or any.
    pub gid: Option<u32>,
    /// The workload where the kernel's selectors are enough, or 0: the agent has to attest.
    pub workload: u32,
}

impl Policy {
    /// What the kernel programs need to know.
    pub fn kernel(&self) -> KernelPolicy {
        self.kernel.clone()
    }

    /// How many rows of destinations the kernel programs know: mesh destinations, the addresses of bypasses, and what lies
    /// between them.
    pub fn destinations(&self) -> usize {
        self.kernel.destinations.len()
    }

    /// The cgroup selectors that a cgroup path satisfies, as sorted indices: cgroups with equal sets share a class.
    pub fn cgroup_set(&self, cgroup: &str) -> Vec<u32> {
        let positions = super::selector::selectors_of(cgroup)
            .filter_map(|selector| self.cgroup_selectors.binary_search(&selector).ok())
            .filter_map(|position| u32::try_from(position).ok());
        let mut set: Vec<u32> = positions.collect();
        set.sort_unstable();
        set.dedup();
        set
    }

    /// The candidate rows for cgroups with this set (the empty set: entries without a cgroup selector).
    ///
    /// A row names a workload only if the entries that share its uid and gid leave no doubt. Entries with another uid or
    /// gid may match the same task; the programs find their rows by themselves and ask where the rows differ.
    pub fn candidates(&self, set: &[u32]) -> Vec<KernelCandidate> {
        let mut rows: BTreeMap<(Option<u32>, Option<u32>), Contest<'_>> = BTreeMap::new();
        for (workload, selectors) in self.workloads.iter().zip(&self.selectors) {
            let holds = |selector: &Selector| {
                let position = self.cgroup_selectors.binary_search(selector).ok();
                position
                    .and_then(|position| u32::try_from(position).ok())
                    .is_some_and(|position| set.contains(&position))
            };
            if !selectors.iter().filter(|selector| selector.is_of_cgroup()).all(holds) {
                continue;
            }
            let uid =
                selectors.iter().find_map(|selector| if let Selector::Uid(uid) = selector { Some(*uid) } else { None });
            let gid =
                selectors.iter().find_map(|selector| if let Selector::Gid(gid) = selector { Some(*gid) } else { None });
            let contest = rows.entry((uid, gid)).or_default();
            if selectors.iter().all(Selector::is_kernel_visible) {
                contest.certain(selectors.len(), workload.number, &workload.id);
            } else {
                contest.narrowed = contest.narrowed.max(selectors.len());
            }
        }
        rows.into_iter().map(|((uid, gid), contest)| KernelCandidate { uid, gid, workload: contest.winner() }).collect()
    }
}

/// Which of the entries with one uid and gid is the workload of a task in this class?
#[derive(Default)]
struct Contest<'p> {
    /// Of entries that the kernel can check to the end: most selectors, the workload, and whether there is a tie.
    best: Option<(usize, u32, &'p SpiffeId)>,
    tie: bool,
    /// Most selectors of an entry that needs user space.
    narrowed: usize,
}

impl<'p> Contest<'p> {
    fn certain(&mut self, selectors: usize, workload: u32, id: &'p SpiffeId) {
        match self.best {
            Some((most, ..)) if most > selectors => {}
            Some((most, _, first)) if most == selectors => self.tie |= first != id,
            _ => (self.best, self.tie) = (Some((selectors, workload, id)), false),
        }
    }

    fn winner(&self) -> u32 {
        match self.best {
            Some((most, workload, _)) if !self.tie && self.narrowed < most => workload,
            _ => 0,
        }
    }
}

/// Computes the rows. Stops early when there are too many verdicts: `check` then refuses the policy.
pub(super) fn compile(policy: &Policy) -> KernelPolicy {
    let number = |index: usize| u32::try_from(index + 1).unwrap_or(u32::MAX);
    let rows = || policy.table.regions().iter().zip(&policy.kinds).enumerate();
    let mut verdicts = Verdicts::new(policy);
    for (index, (region, kind)) in rows() {
        match kind {
            Kind::Mesh(expected) => {
                let exact = policy.index.by_to.get(expected).into_iter().flatten();
                let mut rules: Vec<_> = exact.chain(&policy.index.to_patterns).copied().collect();
                rules.sort_unstable();
                for allow in rules.into_iter().filter_map(|rule| policy.allows.get(rule)) {
                    let ports = region.port.map_or(allow.ports == Ports::All, |port| allow.ports.contain(port));
                    if ports && allow.to.matches(expected) {
                        verdicts.add(&allow.from, number(index), TCP, VERDICT_MESH, allow.rule.number);
                    }
                }
                for udp in policy.udps.iter().filter(|udp| udp.region.covers(region)) {
                    verdicts.add(&udp.from, number(index), UDP, VERDICT_BYPASS, udp.rule.number);
                }
            }
            Kind::Plain(bypasses) => {
                for bypass in bypasses.iter().filter_map(|bypass| policy.bypasses.get(*bypass)) {
                    verdicts.add(&bypass.from, number(index), TCP, VERDICT_BYPASS, bypass.rule.number);
                }
            }
        }
        if verdicts.rows.len() > super::MAX_VERDICTS {
            break;
        }
    }
    let destinations = rows()
        .map(|(index, (region, kind))| KernelDestination {
            number: number(index),
            network: region.network,
            port: region.port,
            mode: if matches!(kind, Kind::Mesh(_)) { MODE_MESH } else { MODE_PLAIN },
        })
        .collect();
    KernelPolicy {
        destinations,
        verdicts: verdicts.finish(),
        cgroup_classes: !policy.cgroup_selectors.is_empty(),
        protected: policy.inbounds.iter().flat_map(|inbound| &inbound.listen).map(|at| (at.ip(), at.port())).collect(),
    }
}

/// Verdicts by workload, destination and protocol; the first rule of the files stays.
struct Verdicts<'p> {
    numbers: HashMap<&'p SpiffeId, Vec<u32>>,
    rows: BTreeMap<(u32, u32, u32), (u32, u32)>,
}

impl<'p> Verdicts<'p> {
    fn new(policy: &'p Policy) -> Self {
        let mut numbers: HashMap<&SpiffeId, Vec<u32>> = HashMap::new();
        for workload in &policy.workloads {
            numbers.entry(&workload.id).or_default().push(workload.number);
        }
        Self { numbers, rows: BTreeMap::new() }
    }

    fn add(&mut self, from: &Matcher, destination: u32, protocol: u32, action: u32, rule: u32) {
        let numbers: Vec<u32> = match from {
            Matcher::Exact(id) => self.numbers.get(id).cloned().unwrap_or_default(),
            Matcher::Pattern(pattern) => self
                .numbers
                .iter()
                .filter(|(id, _)| pattern.matches(id))
                .flat_map(|(_, numbers)| numbers.clone())
                .collect(),
        };
        for workload in numbers {
            self.rows.entry((workload, destination, protocol)).or_insert((action, rule));
        }
    }

    fn finish(self) -> Vec<KernelVerdict> {
        let row = |((workload, destination, protocol), (action, rule))| KernelVerdict {
            workload,
            destination,
            protocol,
            action,
            rule,
        };
        self.rows.into_iter().map(row).collect()
    }
}
