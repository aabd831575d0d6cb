//! What the admin socket answers, put together from what the control thread knows.

use super::listeners::Listeners;
use super::preexisting::Preexisting;
use super::troubles::Troubles;
use crate::admin::{
    Agent, AuditStatus, BundleStatus, Connection, ConnectionCount, ConnectionEnd, IdentityStatus, ListenerStatus,
    PolicyStatus, RefusedStatus, RevocationStatus, Status, TableStatus,
};
use crate::audit::End;
use crate::credential::Provider;
use crate::flow::Direction;
use crate::intercept::{PinnedTables, Programs};
use crate::live::{Basis, Live, OpenConnections, Refused};
use crate::pipeline::AgentState;
use crate::privilege::Sandbox;
use bunter_common::{LISTENER_LEFT_ALONE, LISTENER_PROTECTED, counter};
use std::collections::BTreeMap;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// What was settled at start.
pub(super) struct Settled {
    /// Why this engine.
    pub(super) engine_reason: String,
    pub(super) shards: usize,
    pub(super) sandbox: Sandbox,
    pub(super) tables: PinnedTables,
}

/// What the control thread knows, lent for an answer.
pub(super) struct Known<'a> {
    pub(super) shared: &'a AgentState,
    pub(super) provider: &'a dyn Provider,
    pub(super) programs: &'a Programs,
    pub(super) settled: &'a Settled,
    /// When the agent was started.
    pub(super) since: OffsetDateTime,
    pub(super) draining: bool,
    /// When the policy in force was read.
    pub(super) policy_loaded: OffsetDateTime,
    /// Reloads that were taken or refused.
    pub(super) reloads: u64,
    /// A reload was asked for, and is not decided yet.
    pub(super) is_reading: bool,
    /// Why the last reload was refused.
    pub(super) reload_refused: Option<&'a str>,
    pub(super) listeners: &'a Listeners,
    pub(super) preexisting: &'a Preexisting,
    pub(super) troubles: &'a Troubles,
}

impl Known<'_> {
    /// The answer to `bunter status`.
    pub(super) fn status(&self) -> Status {
        status(self)
    }
}

fn status(known: &Known<'_>) -> Status {
    let shared = known.shared;
    let policy = shared.policy.load();
    let health = shared.audit.health();
    let provider = known.provider.status();
    let identity = |workload: &crate::policy::Workload| {
        let held = provider.credentials.iter().find(|held| held.workload == workload.number);
        let failing = provider.failing.iter().find(|failing| failing.workload == workload.number);
        IdentityStatus {
            id: workload.id.to_string(),
            expires: held.map(|held| held.not_after.clone()),
            error: failing.map(|failing| failing.error.clone()),
        }
    };
    let mut bundles: BTreeMap<&str, BundleStatus> = BTreeMap::new();
    for anchor in &provider.bundles {
        let bundle = bundles.entry(&anchor.trust_domain).or_insert_with(|| BundleStatus {
            trust_domain: anchor.trust_domain.clone(),
            anchors: 0,
            expires: None,
            revocations: None,
        });
        bundle.anchors += 1;
        bundle.expires = bundle.expires.take().max(Some(anchor.not_after.clone()));
    }
    for list in &provider.lists {
        let Some(bundle) = bundles.get_mut(&*list.trust_domain) else { continue };
        let all = bundle.revocations.get_or_insert_with(|| RevocationStatus {
            revoked: 0,
            next_update: list.next_update.clone(),
            expired: false,
        });
        all.revoked += list.revoked;
        all.next_update = std::cmp::min(&all.next_update, &list.next_update).clone();
        all.expired |= list.expired;
    }
    let taken = shared.admission.taken();
    Status {
        agent: Agent {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            since: text(known.since),
            netns: known.programs.netns(),
            cgroup: shared.config.cgroup.clone(),
            engine: shared.engine.engine().name().into(),
            engine_reason: known.settled.engine_reason.clone(),
            shards: known.settled.shards,
            sandbox: known.settled.sandbox.to_string(),
            draining: known.draining,
        },
        policy: PolicyStatus {
            directory: shared.config.policy_dir.clone(),
            generation: known.programs.generation(),
            loaded: text(known.policy_loaded),
            reloads: known.reloads,
            reading: known.is_reading,
            refused: known.reload_refused.map(str::to_owned),
            workloads: policy.workloads().len(),
            destinations: policy.destinations(),
        },
        audit: AuditStatus {
            path: shared.config.audit.path.clone(),
            written: health.written(),
            lost: health.lost(),
            failing: health.failing(),
            last_error: health.last_error(),
        },
        identities: policy.workloads().iter().map(identity).collect(),
        bundles: bundles.into_values().collect(),
        listeners: listeners(known.listeners),
        preexisting: known.preexisting.status(),
        refused: shared
            .registry
            .refused()
            .into_iter()
            .map(|(code, refused)| {
                let Refused { count, last, last_reason } = refused;
                (code.to_owned(), RefusedStatus { count, last: text(last), last_reason })
            })
            .collect(),
        kernel: match known.programs.counters() {
            Ok(counters) => counter::NAMES.iter().map(|name| (*name).to_owned()).zip(counters).collect(),
            Err(_) => BTreeMap::new(),
        },
        tables: tables(&known.settled.tables),
        troubles: known.troubles.status(text),
        connections: ConnectionCount {
            open: shared.registry.open_count(),
            total: shared.registry.total(),
            limit: shared.config.limits.connections,
            outbound: taken.outbound,
            inbound: taken.inbound,
            unproven: taken.unproven,
        },
    }
}

fn tables(tables: &PinnedTables) -> Vec<TableStatus> {
    let tables = tables.count().unwrap_or_else(|error| {
        tracing::warn!(%error, "how full the kernel's tables are cannot be said");
        Vec::new()
    });
    tables.into_iter().map(Into::into).collect()
}

fn listeners(all: &Listeners) -> Vec<ListenerStatus> {
    let mut listeners: Vec<ListenerStatus> = all
        .iter()
        .filter(|known| known.listening.mode() != LISTENER_LEFT_ALONE)
        .map(|known| ListenerStatus {
            address: known.listening.address(),
            id: known.finding.as_ref().and_then(|finding| finding.id.clone()),
            pid: known.listening.row.owner.tgid,
            mode: if known.listening.mode() == LISTENER_PROTECTED { "protected" } else { "undecided" }.into(),
            refused: known.finding.as_ref().and_then(|finding| finding.why.clone()),
        })
        .collect();
    listeners.sort_by_key(|listener| (listener.address.port(), listener.address));
    listeners
}

pub(super) fn connections(registry: &OpenConnections) -> Vec<Connection> {
    registry.open().iter().map(|live| connection(live)).collect()
}

fn connection(live: &Live) -> Connection {
    let end = |end: &End| ConnectionEnd { id: end.id.as_ref().map(ToString::to_string), address: end.address };
    Connection {
        flow: live.flow,
        direction: match live.direction {
            Direction::Outbound => "outbound".into(),
            Direction::Inbound => "inbound".into(),
        },
        source: end(&live.source),
        destination: end(&live.destination),
        method: if matches!(live.basis, Basis::Mesh { .. }) { "mtls" } else { "plaintext" }.into(),
        tls: live.tls.as_ref().map(|tls| format!("{} {}", tls.group, tls.cipher)),
        engine: live.engine.map(Into::into),
        rule: live.rule.as_ref().map(ToString::to_string),
        pid: live.process.as_ref().map(|process| process.pid),
        since: text(live.since),
        sent: live.progress.sent(),
        received: live.progress.received(),
    }
}

fn text(time: OffsetDateTime) -> String {
    time.format(&Rfc3339).unwrap_or_default()
}
