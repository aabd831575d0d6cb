//! The open connections of one agent, and what was refused so far: what `bunter connections` and `bunter status` show,
//! and what a change of policy or trust closes.
//!
//! *Invariant:* a connection is listed from the moment its bytes can move until its audit record is made.

mod places;

use places::{ConnectionSlot, ConnectionSlots};

use crate::audit::{End, Process, Record, Tls};
use crate::authorize::still_allowed;
use crate::flow::Direction;
use crate::lock::lock;
use crate::policy::Policy;
use crate::relay::{Progress, Stop};
use bunter_identity::spiffe::SpiffeId;
use bunter_identity::trust::bundle::{Trust, TrustPath};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use time::OffsetDateTime;
use tokio::sync::watch;

/// What let a connection pass, so that it can be decided again under another policy.
#[derive(Debug)]
pub enum Basis {
    /// Mutual TLS between these two.
    Mesh {
        /// The local workload.
        local: SpiffeId,
        /// The verified peer.
        peer: SpiffeId,
        /// The trust by which it was verified.
        path: Arc<TrustPath>,
    },
    /// Plaintext from the network, by a permissive rule.
    Plaintext {
        /// The local workload.
        local: SpiffeId,
    },
}

/// An open connection.
#[derive(Debug)]
pub struct Live {
    /// Number of the flow.
    pub flow: u64,
    /// Which way.
    pub direction: Direction,
    /// The dialling end.
    pub source: End,
    /// The dialled end.
    pub destination: End,
    /// What let it pass.
    pub basis: Basis,
    /// Name of the rule.
    pub rule: Option<Arc<str>>,
    /// What TLS agreed on.
    pub tls: Option<Tls>,
    /// `kernel` or `user`.
    pub engine: Option<&'static str>,
    /// The local process.
    pub process: Option<Process>,
    /// When the attempt began.
    pub since: OffsetDateTime,
    /// Bytes so far.
    pub progress: Arc<Progress>,
    /// Ends it.
    pub stop: watch::Sender<Option<Stop>>,
}

impl Live {
    /// Ends the connection, unless it is ending for another reason already.
    pub fn end(&self, stop: Stop) {
        self.stop.send_if_modified(|told| told.is_none().then(|| *told = Some(stop)).is_some());
    }
    /// Would this policy let the connection pass, and is the trust by which the peer was verified still in force?
    pub fn is_allowed_by(&self, policy: &Policy, trust: &Trust) -> bool {
        let (local, peer) = match &self.basis {
            Basis::Mesh { peer, path, .. } if !trust.still_believes(&peer.trust_domain(), path) => return false,
            Basis::Mesh { local, peer, .. } => (local, Some(peer)),
            Basis::Plaintext { local } => (local, None),
        };
        still_allowed(policy, self.direction, local, self.destination.address, peer).is_ok()
    }
}

/// Attempts that were refused with one code.
#[derive(Clone, Debug)]
pub struct Refused {
    /// How many.
    pub count: u64,
    /// When the last one was.
    pub last: OffsetDateTime,
    /// Both ends and the reason of the last one.
    pub last_reason: String,
}

/// The list of open connections is kept in so many parts, by flow number, so that shards seldom meet at a lock.
const PARTS: usize = 32;

/// The open connections and the counts of refusals. Shards write, the control thread reads.
#[derive(Debug, Default)]
pub struct OpenConnections {
    waiting: Arc<ConnectionSlots>,
    open: [Mutex<HashMap<u64, Arc<Live>>>; PARTS],
    refused: Mutex<BTreeMap<&'static str, Refused>>,
    flows: AtomicU64,
}

impl OpenConnections {
    /// Counts a flow that begins its walk.
    pub fn begin(&self) {
        self.flows.fetch_add(1, Ordering::Relaxed);
    }
    /// Takes one of the places for connections that wait for another stream: a quarter of `all`. They are separate from the
    /// places for flows, so that a waiting connection keeps nobody out.
    pub fn wait(&self, all: usize) -> Option<ConnectionSlot> {
        self.waiting.take((all / 4).max(1)).ok()
    }
    /// Flows so far.
    pub fn total(&self) -> u64 {
        self.flows.load(Ordering::Relaxed)
    }
    /// Lists a connection until the guard is dropped.
    pub fn enter(self: &Arc<Self>, live: Live) -> Entered {
        let live = Arc::new(live);
        lock(self.part(live.flow)).insert(live.flow, live.clone());
        Entered { registry: self.clone(), live }
    }
    /// The open connections, by flow number.
    pub fn open(&self) -> Vec<Arc<Live>> {
        let mut open: Vec<_> = Vec::new();
        for part in &self.open {
            open.extend(lock(part).values().cloned());
        }
        open.sort_by_key(|live| live.flow);
        open
    }
    /// How many are open.
    pub fn open_count(&self) -> usize {
        self.open.iter().map(|part| lock(part).len()).sum()
    }
    fn part(&self, flow: u64) -> &Mutex<HashMap<u64, Arc<Live>>> {
        let [first, ..] = &self.open;
        self.open.get((flow % PARTS as u64) as usize).unwrap_or(first)
    }
    /// Ends the connections that this policy would not let pass, and those whose peer's certificate is revoked or comes
    /// from an authority that is trusted no more. Returns how many.
    pub fn revoke(&self, policy: &Policy, trust: &Trust) -> usize {
        let hit = self.open().into_iter().filter(|live| !live.is_allowed_by(policy, trust));
        hit.inspect(|live| live.end(Stop::Revoked)).count()
    }
    /// Ends all connections.
    pub fn stop_all(&self, stop: Stop) {
        for live in self.open() {
            live.end(stop);
        }
    }
    /// Counts a refused attempt.
    pub fn count_refused(&self, record: &Record) {
        let mut refused = lock(&self.refused);
        let entry = refused.entry(record.code).or_insert_with(|| Refused {
            count: 0,
            last: record.time,
            last_reason: String::new(),
        });
        entry.count += record.count;
        entry.last = record.last.unwrap_or(record.time);
        entry.last_reason = format!("{} -> {}: {}", record.source, record.destination, record.reason);
    }
    /// What was refused so far, by code.
    pub fn refused(&self) -> BTreeMap<&'static str, Refused> {
        lock(&self.refused).clone()
    }
}

/// A connection is listed while this lives.
#[derive(Debug)]
pub struct Entered {
    registry: Arc<OpenConnections>,
    live: Arc<Live>,
}

impl Entered {
    /// The connection.
    pub fn live(&self) -> &Live {
        &self.live
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        lock(self.registry.part(self.live.flow)).remove(&self.live.flow);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Accounts, Source};
    use bunter_identity::trust::testing::{TestCa, domain_of, id_of, leaf_params, numbered, unix_now};
    use bunter_identity::trust::verify::{Role, verify_chain};

    const POLICY: &str = r#"
        trust_domain = "example.org"
        [[workload]]
        id = "spiffe://example.org/web"
        selectors = ["unix:uid:7"]
        [[allow]]
        from = "spiffe://example.org/curl"
        to = "spiffe://example.org/web"
    "#;

    fn connection(flow: u64, path: Arc<TrustPath>) -> (Live, watch::Receiver<Option<Stop>>) {
        let (stop, told) = watch::channel(None);
        let end = |port| End { id: None, address: ([10, 0, 0, 1], port).into() };
        let (local, peer) = (id_of("spiffe://example.org/web"), id_of("spiffe://example.org/curl"));
        let live = Live {
            flow,
            direction: Direction::Inbound,
            source: end(4000),
            destination: end(80),
            basis: Basis::Mesh { local, peer, path },
            rule: None,
            tls: None,
            engine: None,
            process: None,
            since: OffsetDateTime::now_utc(),
            progress: Arc::default(),
            stop,
        };
        (live, told)
    }

    #[test]
    fn a_connection_ends_with_its_certificate_or_its_authority_and_no_other_does() {
        // R39
        let source = Source { file: "test.toml".into(), text: POLICY.into() };
        let policy = Policy::parse("test", &[source], &Accounts::default()).unwrap();
        let (ca, other) = (TestCa::new("example.org"), TestCa::new("example.org"));
        let path = |ca: &TestCa, serial: u8| {
            let leaf = ca.leaf(numbered(leaf_params("spiffe://example.org/curl"), &[serial]));
            verify_chain(&[leaf], Role::Client, &ca.trust("example.org"), unix_now()).unwrap().path
        };
        let registry = Arc::new(OpenConnections::default());
        let (revoked, told) = connection(1, path(&ca, 5));
        let (another, another_told) = connection(2, path(&ca, 6));
        let (elsewhere, elsewhere_told) = connection(3, path(&other, 5));
        let _entered = [revoked, another, elsewhere].map(|live| registry.enter(live));
        let ended = || [&told, &another_told, &elsewhere_told].map(|told| told.borrow().is_some());
        let both = |trust: Trust| trust.with(domain_of("example.org"), other.anchors("example.org"));
        assert_eq!(registry.revoke(&policy, &both(ca.trust("example.org"))), 0);
        // Two authorities have the same name: a serial number revokes only a certificate of its own authority.
        assert_eq!(registry.revoke(&policy, &both(ca.trust_but("example.org", &[&[5]]))), 1);
        assert_eq!(ended(), [true, false, false]);
        // The other authority is no longer in the bundle.
        registry.revoke(&policy, &ca.trust("example.org"));
        assert_eq!(ended(), [true, false, true]);
        registry.revoke(&policy, &Trust::new());
        assert_eq!(ended(), [true, true, true]);
        assert_eq!(*told.borrow(), Some(Stop::Revoked));
    }
}
