//! The policy: registration entries, destinations, rules. Loaded as a whole, checked as a whole, immutable.
//!
//! A directory of TOML files comes in ([`Policy::load`]); answers go out: who is this process ([`Policy::identify`]), may
//! it reach that address ([`Policy::outbound`]), who may reach it ([`Policy::inbound`]), and the same in rows for the
//! kernel programs ([`Policy::kernel`]). The language is described in `policies/README.md`.
//!
//! *Invariant:* what no rule allows is denied, and no clock, name service or network has a say: the same files and the
//! same question always give the same answer.

mod check;
mod expect;
mod groups;
mod kernel;
mod language;
mod load;
mod selector;
mod source;
mod table;

pub use expect::ExpectResult;
pub use kernel::{KernelCandidate, KernelDestination, KernelPolicy, KernelVerdict};
pub use selector::Accounts;
pub use source::{Rejected, Source};

use crate::document::{Problems, Purpose};
use bunter_identity::spiffe::{Pattern, SpiffeId, TrustDomain};
use language::{Expectation, Ports};
use selector::Selector;
use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::Duration,
};
use table::{Region, Table};

/// Most registration entries in one policy.
pub const MAX_WORKLOADS: usize = 65_535;
/// Most rows of [`KernelPolicy::destinations`]. Half of what the map of the kernel programs holds: during a reload it holds
/// two policies.
pub const MAX_DESTINATIONS: usize = 65_535;
/// Most rows of [`KernelPolicy::verdicts`]. As many as the map holds: rows that go are removed before new ones are written.
pub const MAX_VERDICTS: usize = 262_144;
/// Most rows that every process is looked up in: [`Policy::candidates`] without a cgroup, and [`KernelPolicy::unseen`]. A
/// quarter of what the map holds: during a reload it holds two policies, and half is for classes of cgroups.
pub const MAX_CANDIDATES: usize = 16_384;

/// A whole, checked policy.
#[derive(Debug)]
pub struct Policy {
    trust_domain: TrustDomain,
    preexisting: Preexisting,
    workloads: Vec<Workload>,
    /// The selectors of each workload, cheap ones first.
    selectors: Vec<Vec<Selector>>,
    /// Workloads filed under their first kernel-visible selector: every entry has one.
    filed: HashMap<Selector, Vec<usize>>,
    /// All cgroup selectors, sorted, once each. Their index is their number in a cgroup set.
    cgroup_selectors: Vec<Selector>,
    /// How many of them name a unit.
    unit_selectors: usize,
    entries: kernel::Entries,
    table: Table,
    /// What each region of `table` is.
    kinds: Vec<Kind>,
    allows: Vec<Allow>,
    index: AllowIndex,
    inbounds: Vec<Listeners>,
    bypasses: Vec<Plain>,
    udps: Vec<Plain>,
    expectations: Vec<Expectation>,
    rules: Vec<Arc<Rule>>,
    warnings: Problems,
    kernel: Arc<KernelPolicy>,
}

/// What a region of the table is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// Mutual TLS only; this ID has to answer (R18, R47).
    Mesh(SpiffeId),
    /// Plaintext for those whom one of these `[[bypass]]` rules names.
    Plain(Vec<usize>),
}

/// An `[[allow]]` rule.
#[derive(Debug)]
struct Allow {
    rule: Arc<Rule>,
    from: Matcher,
    to: Matcher,
    ports: Ports,
}

/// An `[[inbound]]` entry.
#[derive(Debug)]
struct Listeners {
    id: SpiffeId,
    ports: Ports,
    listen: Vec<SocketAddr>,
    permissive: Option<Arc<Rule>>,
}

/// A `[[bypass]]` or `[[udp]]` rule.
#[derive(Debug)]
struct Plain {
    rule: Arc<Rule>,
    from: Matcher,
    region: Region,
}

/// Which `[[allow]]` rules can match, by what is asked for. Indices ascend: the first rule of the files decides.
#[derive(Debug, Default)]
struct AllowIndex {
    pairs: HashMap<(SpiffeId, SpiffeId), Vec<usize>>,
    /// Rules with a pattern on either side.
    patterned: Vec<usize>,
    by_to: HashMap<SpiffeId, Vec<usize>>,
    to_patterns: Vec<usize>,
}

/// A registration entry: processes that match all selectors are this workload.
#[derive(Clone, Debug)]
pub struct Workload {
    /// 1, 2, 3, ... in the order of the files.
    pub number: u32,
    /// Its identity.
    pub id: SpiffeId,
}

/// The rule that decided: what the audit line and `bunter connections` name.
#[derive(Debug)]
pub struct Rule {
    /// Number, unique in the policy, for the kernel maps.
    pub number: u32,
    /// Name as written, or made from file and line.
    pub name: Arc<str>,
    /// Close the connection after so long without a byte in either direction.
    pub idle_timeout: Option<Duration>,
}

/// One peer, or an explicit pattern of peers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Matcher {
    /// Exactly this ID, the complete URI (R11).
    Exact(SpiffeId),
    /// An explicit pattern (R17).
    Pattern(Pattern),
}

/// The peers that may be on the other end, and the rule that lets each in.
#[derive(Clone, Debug)]
pub struct Peers(pub Vec<(Matcher, Arc<Rule>)>);

/// May this workload reach that address, and how?
#[derive(Debug)]
pub enum Outbound {
    /// By mutual TLS; the server must be in `peers` (exactly one ID: R18, R47).
    Mesh {
        /// Who must answer.
        peers: Peers,
    },
    /// In plaintext, by a named bypass.
    Bypass(Arc<Rule>),
    /// No.
    Deny,
}

/// What a protected listener takes.
#[derive(Debug)]
pub struct Inbound {
    /// Clients that may connect by mutual TLS. Empty: nobody.
    pub peers: Peers,
    /// `permissive`: plaintext is taken too, under this rule, and recorded as unauthenticated.
    pub permissive: Option<Arc<Rule>>,
}

/// What is known about a process, read when asked for and only as far as asked for.
pub trait Evidence {
    /// Real and effective user id where they agree.
    fn uid(&self) -> Option<u32>;
    /// Real and effective group id where they agree.
    fn gid(&self) -> Option<u32>;
    /// Path on the unified cgroup hierarchy, from the root of the hierarchy: `/system.slice/nginx.service`.
    fn cgroup(&self) -> Option<&str>;
    /// Path of the executable, as the kernel tells it, unless it was deleted or replaced.
    fn path(&self) -> Option<&Path>;
    /// SHA-256 of the executable's content.
    fn sha256(&self) -> Option<[u8; 32]>;
}

/// Two entries with equally many selectors match one process.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("registration entries {first} and {second} match this process equally well: add a selector to one of them")]
pub struct Ambiguous {
    /// ID of the first entry.
    pub first: SpiffeId,
    /// ID of the second entry.
    pub second: SpiffeId,
}

/// What happens to connections that were open before their workload was enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preexisting {
    /// They go on.
    Keep,
    /// They go on for so long and are then closed.
    Drain(Duration),
    /// They are closed at once.
    Kill,
}

impl Policy {
    /// Reads and checks every `*.toml` file of a directory, in name order, with the accounts of this host.
    pub fn load(directory: &Path, purpose: Purpose) -> Result<Self, Rejected> {
        load::load(directory, &Accounts::of_this_host(), purpose)
    }

    /// Checks a policy whose text is given. No I/O. `directory` names the whole where a problem is in no one file.
    pub fn parse(directory: &str, sources: &[Source], accounts: &Accounts) -> Result<Self, Rejected> {
        check::check(directory, sources, accounts)
    }

    /// What is odd, but not wrong: one line each, with file and line.
    pub fn warnings(&self) -> &Problems {
        &self.warnings
    }

    /// The trust domain of every registration entry.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Every trust domain that some rule names: each needs a bundle before its peers can be verified.
    pub fn trust_domains(&self) -> BTreeSet<TrustDomain> {
        let of = |matcher: &Matcher| match matcher {
            Matcher::Exact(id) => id.trust_domain(),
            Matcher::Pattern(pattern) => pattern.trust_domain(),
        };
        let destinations = self.kinds.iter().filter_map(|kind| match kind {
            Kind::Mesh(id) => Some(id.trust_domain()),
            Kind::Plain(_) => None,
        });
        let rules = self.allows.iter().flat_map(|allow| [of(&allow.from), of(&allow.to)]);
        std::iter::once(self.trust_domain.clone()).chain(destinations).chain(rules).collect()
    }

    /// Registration entries.
    pub fn workloads(&self) -> &[Workload] {
        &self.workloads
    }

    /// The registration entry with this number, as the kernel programs report it.
    pub fn workload(&self, number: u32) -> Option<&Workload> {
        self.workloads.get(usize::try_from(number).ok()?.checked_sub(1)?)
    }

    /// The selectors of an entry as text, for `bunter status`.
    pub fn selectors(&self, workload: &Workload) -> Vec<String> {
        let index = usize::try_from(workload.number).ok().and_then(|number| number.checked_sub(1));
        let selectors = index.and_then(|index| self.selectors.get(index));
        selectors.into_iter().flatten().map(Selector::to_string).collect()
    }

    /// The rule with this number, as the kernel programs report it.
    pub fn rule(&self, number: u32) -> Option<&Arc<Rule>> {
        self.rules.get(usize::try_from(number).ok()?.checked_sub(1)?)
    }

    /// Which workload is this process? The entry with the most selectors wins.
    pub fn identify(&self, evidence: &dyn Evidence) -> Result<Option<&Workload>, Ambiguous> {
        let own = [evidence.uid().map(Selector::Uid), evidence.gid().map(Selector::Gid)];
        let cgroup = evidence.cgroup().into_iter().flat_map(selector::selectors_of);
        let mut candidates: Vec<usize> =
            own.into_iter().flatten().chain(cgroup).filter_map(|key| self.filed.get(&key)).flatten().copied().collect();
        candidates.sort_unstable();

        let mut best: Option<(usize, &Workload)> = None;
        let mut rival: Option<&Workload> = None;
        for index in candidates {
            let (Some(selectors), Some(workload)) = (self.selectors.get(index), self.workloads.get(index)) else {
                continue;
            };
            if best.is_some_and(|(most, _)| selectors.len() < most)
                || !selectors.iter().all(|selector| selector.holds(evidence))
            {
                continue;
            }
            match best {
                Some((most, first)) if most == selectors.len() => {
                    rival = rival.or_else(|| (first.id != workload.id).then_some(workload));
                }
                _ => (best, rival) = (Some((selectors.len(), workload)), None),
            }
        }
        match (best, rival) {
            (Some((_, first)), Some(second)) => Err(Ambiguous { first: first.id.clone(), second: second.id.clone() }),
            (best, _) => Ok(best.map(|(_, workload)| workload)),
        }
    }

    /// Is this a mesh destination (for anybody)?
    pub fn is_mesh(&self, to: SocketAddr) -> bool {
        self.expected(to).is_some()
    }

    /// The ID that has to answer at a mesh destination.
    pub fn expected(&self, to: SocketAddr) -> Option<&SpiffeId> {
        match self.kinds.get(self.table.lookup(to)?)? {
            Kind::Mesh(id) => Some(id),
            Kind::Plain(_) => None,
        }
    }

    /// May this workload reach that address by TCP, and how?
    pub fn outbound(&self, source: &SpiffeId, to: SocketAddr) -> Outbound {
        match self.table.lookup(to).and_then(|row| self.kinds.get(row)) {
            None => Outbound::Deny,
            Some(Kind::Mesh(expected)) => match self.first_allow(source, expected, Some(to.port())) {
                Some(allow) => {
                    Outbound::Mesh { peers: Peers(vec![(Matcher::Exact(expected.clone()), allow.rule.clone())]) }
                }
                None => Outbound::Deny,
            },
            Some(Kind::Plain(bypasses)) => {
                let mut matching = bypasses.iter().filter_map(|index| self.bypasses.get(*index));
                match matching.find(|bypass| bypass.from.matches(source)) {
                    Some(bypass) => Outbound::Bypass(bypass.rule.clone()),
                    None => Outbound::Deny,
                }
            }
        }
    }

    /// The `[[udp]]` rule that lets this workload send datagrams to a mesh destination, if one does. UDP to anything
    /// that is not a mesh destination is left alone.
    pub fn udp(&self, source: &SpiffeId, to: SocketAddr) -> Option<&Arc<Rule>> {
        let row = self.table.lookup(to)?;
        match (self.kinds.get(row)?, self.table.regions().get(row)?) {
            (Kind::Mesh(_), region) => self.first_udp(source, region).map(|udp| &udp.rule),
            (Kind::Plain(_), _) => None,
        }
    }

    /// What does a listener of this workload take on this port?
    pub fn inbound(&self, workload: &SpiffeId, port: u16) -> Inbound {
        let exact = self.index.by_to.get(workload).into_iter().flatten();
        let mut indices: Vec<usize> = exact.chain(&self.index.to_patterns).copied().collect();
        indices.sort_unstable();
        let matching = indices.into_iter().filter_map(|index| self.allows.get(index));
        let peers = matching
            .filter(|allow| allow.to.matches(workload) && allow.ports.contain(port))
            .map(|allow| (allow.from.clone(), allow.rule.clone()))
            .collect();
        let permissive = self
            .inbounds
            .iter()
            .filter(|inbound| inbound.id == *workload && inbound.ports.contain(port))
            .find_map(|inbound| inbound.permissive.clone());
        Inbound { peers: Peers(peers), permissive }
    }

    /// What happens to connections that are older than their workload's enrolment.
    pub fn preexisting(&self) -> Preexisting {
        self.preexisting
    }

    /// The first rule of the files that lets `source` reach `expected`. No port: one that holds for every port.
    fn first_allow(&self, source: &SpiffeId, expected: &SpiffeId, port: Option<u16>) -> Option<&Allow> {
        let fits = |index: &&usize| {
            self.allows.get(**index).is_some_and(|allow| {
                let ports = port.map_or(allow.ports == Ports::All, |port| allow.ports.contain(port));
                ports && allow.from.matches(source) && allow.to.matches(expected)
            })
        };
        let exact = self.index.pairs.get(&(source.clone(), expected.clone()));
        let exact = exact.into_iter().flatten().find(fits);
        let patterned = self.index.patterned.iter().find(fits);
        let first = exact.into_iter().chain(patterned).min()?;
        self.allows.get(*first)
    }

    fn first_udp(&self, source: &SpiffeId, region: &Region) -> Option<&Plain> {
        self.udps.iter().find(|udp| udp.region.covers(region) && udp.from.matches(source))
    }
}

impl Matcher {
    /// Does it mean this ID?
    pub fn matches(&self, id: &SpiffeId) -> bool {
        match self {
            Self::Exact(exact) => exact == id,
            Self::Pattern(pattern) => pattern.matches(id),
        }
    }
}

impl Peers {
    /// The rule that admits this peer, if one does.
    pub fn admits(&self, peer: &SpiffeId) -> Option<&Arc<Rule>> {
        self.0.iter().find(|(matcher, _)| matcher.matches(peer)).map(|(_, rule)| rule)
    }

    /// Nobody is admitted.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl std::fmt::Display for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exact(id) => id.fmt(f),
            Self::Pattern(pattern) => write!(f, "{{ pattern = \"{pattern}\" }}"),
        }
    }
}

impl AllowIndex {
    fn new(allows: &[Allow]) -> Self {
        let mut index = Self::default();
        for (at, allow) in allows.iter().enumerate() {
            match (&allow.from, &allow.to) {
                (Matcher::Exact(from), Matcher::Exact(to)) => {
                    index.pairs.entry((from.clone(), to.clone())).or_default().push(at);
                }
                _ => index.patterned.push(at),
            }
            match &allow.to {
                Matcher::Exact(to) => index.by_to.entry(to.clone()).or_default().push(at),
                Matcher::Pattern(_) => index.to_patterns.push(at),
            }
        }
        index
    }
}

#[cfg(test)]
mod tests;
