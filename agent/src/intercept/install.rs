//! A policy on its way into the kernel's maps: rows of the next generation are written, one number is flipped, rows of the
//! one before are removed. No connection ever meets half a policy.
//!
//! *Invariant:* when it fails, the generation in force and its rows are what they were.

use super::{
    Error,
    cgroups::Cgroup,
    error::During,
    tables::{Tables, address, map_error},
};
use crate::{
    policy::{KernelCandidate, KernelPolicy, Policy},
    sys::bpf,
};
use aya::maps::lpm_trie::Key;
use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr, UdpSocket},
};
use wimsey_common::*;

/// What a policy tells the kernel programs. [`Policy`] is one.
pub trait KernelFacts: Send + Sync {
    /// Destinations, verdicts and protected addresses.
    fn kernel(&self) -> KernelPolicy;
    /// The cgroup selectors that a cgroup satisfies: cgroups with equal sets share a class.
    fn cgroup_set(&self, cgroup: &str) -> Vec<u32>;
    /// The candidate rows for cgroups with this set.
    fn candidates(&self, set: &[u32]) -> Vec<KernelCandidate>;
}

impl KernelFacts for Policy {
    fn kernel(&self) -> KernelPolicy {
        Policy::kernel(self)
    }
    fn cgroup_set(&self, cgroup: &str) -> Vec<u32> {
        Policy::cgroup_set(self, cgroup)
    }
    fn candidates(&self, set: &[u32]) -> Vec<KernelCandidate> {
        Policy::candidates(self, set)
    }
}

/// Classes of cgroups: one number for each set of selectors, in one generation.
#[derive(Debug, Default)]
pub(super) struct Classes {
    numbers: HashMap<Vec<u32>, u32>,
    /// Numbers that were given: those of a class that was forgotten are not given again.
    given: u32,
    wanted: bool,
}

/// Rows of one generation that a new cgroup brings.
#[derive(Debug, Default)]
pub(super) struct ClassRows {
    cgroup: Option<(CgroupKey, u32)>,
    candidates: Vec<(CandidateKey, Candidate)>,
    /// The class that these rows make.
    makes: Option<Vec<u32>>,
}

impl Classes {
    /// Does this generation look at cgroups at all?
    pub fn wanted(&self) -> bool {
        self.wanted
    }

    /// The class of a cgroup, and the rows that make it known.
    pub fn classify(&mut self, facts: &dyn KernelFacts, generation: u32, cgroup: &Cgroup) -> ClassRows {
        let set = facts.cgroup_set(&cgroup.path);
        let mut rows = ClassRows::default();
        let class = match self.numbers.get(&set) {
            Some(class) => *class,
            None if set.is_empty() => CLASS_NONE,
            None => {
                self.given = self.given.saturating_add(1);
                let class = self.given;
                rows.candidates = candidate_rows(facts, generation, class, &set);
                rows.makes = Some(set.clone());
                self.numbers.insert(set, class);
                class
            }
        };
        rows.cgroup = Some((CgroupKey { generation, pad: 0, cgroup: cgroup.id }, class));
        rows
    }

    /// Forgets the class that these rows were to make, since they could not be written: without all of its rows it would be
    /// one of programs that nobody enrolled.
    pub fn forget(&mut self, rows: &ClassRows, tables: &Tables) {
        if let Some(set) = &rows.makes {
            self.numbers.remove(set);
            for (key, _) in &rows.candidates {
                // Nobody looks for what stays.
                let _ = tables.candidates.remove(key);
            }
        }
    }
}

impl ClassRows {
    /// Writes the rows; the cgroup comes last, so that its class is complete when it is found.
    pub fn write(&self, tables: &Tables) -> Result<(), Error> {
        for (key, row) in &self.candidates {
            tables.candidates.put(key, row, bpf::ANY).map_err(map_error(map::CANDIDATES))?;
        }
        if let Some((key, class)) = &self.cgroup {
            tables.cgroups.put(key, class, bpf::ANY).map_err(map_error(map::CGROUPS))?;
        }
        Ok(())
    }
}

/// Everything that a generation consists of.
pub(super) struct Rows {
    pub flags: u32,
    pub classes: Classes,
    pub protected: Vec<ProtectedKey>,
    destinations: Vec<(Key<DestinationKey>, Destination)>,
    verdicts: Vec<(VerdictKey, Verdict)>,
    candidates: Vec<(CandidateKey, Candidate)>,
    cgroups: Vec<ClassRows>,
}

impl Rows {
    /// The rows of a policy for these cgroups. `source` tells which address the host would use to get to another.
    pub fn of(
        facts: &dyn KernelFacts,
        generation: u32,
        cgroups: &[Cgroup],
        source: impl Fn(IpAddr) -> Option<IpAddr>,
    ) -> Self {
        let policy = facts.kernel();
        let mut classes = Classes { numbers: HashMap::new(), given: 0, wanted: policy.cgroup_classes };
        let of_cgroups = if policy.cgroup_classes {
            cgroups.iter().map(|cgroup| classes.classify(facts, generation, cgroup)).collect()
        } else {
            Vec::new()
        };
        let candidates = candidate_rows(facts, generation, CLASS_NONE, &[]);
        let by_user = if candidates.is_empty() { 0 } else { FLAG_ENTRIES_BY_USER };
        let destinations = policy.destinations.iter().flat_map(|destination| {
            let network = destination.network;
            let (bits, of_family) = (u32::from(network.prefix_len()), u32::from(network.max_prefix_len()));
            // The host's address is shown only where it is the same for the whole network.
            let hint = source(network.network())
                .filter(|first| bits == of_family || source(network.broadcast()) == Some(*first))
                .map_or([0; 16], address);
            let key = DestinationKey {
                generation,
                port: destination.port.unwrap_or(0),
                pad: 0,
                address: address(network.network()),
            };
            let bits = DESTINATION_FIXED_BITS + 128 - of_family + bits;
            let row = Destination { id: destination.number, mode: destination.mode, source: hint };
            // For packets that have no ports: some port of this address is a mesh destination.
            let address = DestinationKey { port: 0, pad: DESTINATION_ADDRESS, ..key };
            let address = (destination.mode == MODE_MESH).then_some((Key::new(bits, address), row));
            std::iter::once((Key::new(bits, key), row)).chain(address)
        });
        let verdicts = policy.verdicts.iter().map(|row| {
            let key =
                VerdictKey { generation, workload: row.workload, destination: row.destination, protocol: row.protocol };
            (key, Verdict { action: row.action, rule: row.rule })
        });
        Self {
            flags: by_user | if policy.cgroup_classes { FLAG_CGROUP_CLASSES } else { 0 },
            protected: policy
                .protected
                .iter()
                .map(|(ip, port)| ProtectedKey { address: address(*ip), port: *port, pad: [0; 3] })
                .collect(),
            destinations: destinations.collect(),
            verdicts: verdicts.collect(),
            candidates,
            cgroups: of_cgroups,
            classes,
        }
    }

    /// Writes all rows. The caller removes them when this fails.
    pub fn write(&self, tables: &Tables) -> Result<(), Error> {
        for (key, row) in &self.destinations {
            tables.destinations.put(key, row, bpf::ANY).map_err(map_error(map::DESTINATIONS))?;
        }
        for (key, row) in &self.verdicts {
            tables.verdicts.put(key, row, bpf::ANY).map_err(map_error(map::VERDICTS))?;
        }
        for (key, row) in &self.candidates {
            tables.candidates.put(key, row, bpf::ANY).map_err(map_error(map::CANDIDATES))?;
        }
        self.cgroups.iter().try_for_each(|rows| rows.write(tables))
    }
}

fn candidate_rows(facts: &dyn KernelFacts, generation: u32, class: u32, set: &[u32]) -> Vec<(CandidateKey, Candidate)> {
    let mut rows: HashMap<CandidateKey, Candidate> = HashMap::new();
    for candidate in facts.candidates(set) {
        let key =
            CandidateKey { generation, class, uid: candidate.uid.unwrap_or(ANY), gid: candidate.gid.unwrap_or(ANY) };
        // Two entries on one key: only the agent can tell them apart.
        rows.entry(key)
            .and_modify(|row| {
                if row.workload != candidate.workload {
                    row.workload = 0;
                }
            })
            .or_insert(Candidate { workload: candidate.workload, pad: 0 });
    }
    rows.into_iter().collect()
}

/// Removes the rows of every generation that is not to stay.
pub(super) fn sweep(tables: &Tables, stays: impl Fn(u32) -> bool) -> Result<(), Error> {
    for key in tables.destinations.keys().map_err(map_error(map::DESTINATIONS))? {
        if !stays(key.data().generation) {
            tables.destinations.remove(&key).map_err(map_error(map::DESTINATIONS))?;
        }
    }
    for key in tables.verdicts.keys().map_err(map_error(map::VERDICTS))? {
        if !stays(key.generation) {
            tables.verdicts.remove(&key).map_err(map_error(map::VERDICTS))?;
        }
    }
    for key in tables.candidates.keys().map_err(map_error(map::CANDIDATES))? {
        if !stays(key.generation) {
            tables.candidates.remove(&key).map_err(map_error(map::CANDIDATES))?;
        }
    }
    for key in tables.cgroups.keys().map_err(map_error(map::CGROUPS))? {
        if !stays(key.generation) {
            tables.cgroups.remove(&key).map_err(map_error(map::CGROUPS))?;
        }
    }
    Ok(())
}

/// Which address would this host use to get there? A connected UDP socket knows, and sends nothing.
pub(super) fn source_for(destination: IpAddr) -> Option<IpAddr> {
    let any: SocketAddr = match destination {
        IpAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).during(String::new).ok()?;
    socket.connect((destination, 9)).ok()?;
    let source = socket.local_addr().ok()?.ip();
    (!source.is_unspecified()).then_some(source)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{KernelDestination, KernelVerdict};

    struct Facts(KernelPolicy);

    impl KernelFacts for Facts {
        fn kernel(&self) -> KernelPolicy {
            self.0.clone()
        }
        fn cgroup_set(&self, cgroup: &str) -> Vec<u32> {
            if cgroup.starts_with("/web") { vec![0] } else { Vec::new() }
        }
        fn candidates(&self, set: &[u32]) -> Vec<KernelCandidate> {
            let mut rows = vec![
                KernelCandidate { uid: Some(7), gid: None, workload: 1 },
                KernelCandidate { uid: Some(7), gid: None, workload: 2 },
            ];
            if !set.is_empty() {
                rows.push(KernelCandidate { uid: None, gid: None, workload: 3 });
            }
            rows
        }
    }

    fn cgroup(path: &str, id: u64) -> Cgroup {
        Cgroup { path: path.into(), id }
    }

    fn rows(classes: bool) -> Rows {
        let facts = Facts(KernelPolicy {
            destinations: vec![
                KernelDestination { number: 1, network: "10.0.0.0/24".parse().unwrap(), port: Some(80), mode: 1 },
                KernelDestination { number: 2, network: "fd00::2/128".parse().unwrap(), port: None, mode: 2 },
            ],
            verdicts: vec![KernelVerdict { workload: 1, destination: 1, protocol: 6, action: 1, rule: 9 }],
            cgroup_classes: classes,
            protected: Vec::new(),
        });
        let cgroups = [cgroup("/", 1), cgroup("/web", 2), cgroup("/web/inner", 3)];
        let source = |to: IpAddr| Some(if to.is_ipv4() { "10.0.0.9".parse().unwrap() } else { to });
        Rows::of(&facts, 5, &cgroups, source)
    }

    #[test]
    fn a_network_is_matched_behind_generation_and_port() {
        let rows = rows(false);
        let (key, row) = rows.destinations[0];
        assert_eq!(key.prefix_len(), 64 + 96 + 24);
        assert_eq!({ key.data() }.port, 80);
        assert_eq!(row.source, address("10.0.0.9".parse().unwrap()));
        let (key, _) = rows.destinations[1];
        assert_eq!(key.prefix_len(), DESTINATION_KEY_BITS);
        assert_eq!({ key.data() }.port, 0);
    }

    #[test]
    fn two_entries_on_one_key_leave_the_choice_to_the_agent() {
        let rows = rows(false);
        assert_eq!(
            rows.candidates,
            [(CandidateKey { generation: 5, class: 0, uid: 7, gid: ANY }, Candidate { workload: 0, pad: 0 })]
        );
    }

    #[test]
    fn cgroups_with_the_same_selectors_share_a_class() {
        let rows = rows(true);
        let classes: Vec<u32> = rows.cgroups.iter().filter_map(|row| row.cgroup).map(|(_, class)| class).collect();
        assert_eq!(classes, [CLASS_NONE, 1, 1]);
        assert_eq!(rows.cgroups[1].candidates.len(), 2);
        assert!(rows.cgroups[2].candidates.is_empty());
    }
}
