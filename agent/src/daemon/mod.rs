//! The agent: threads, signals, reload, drain. What happens once or now and then, and nothing per connection.
//!
//! The calling thread becomes the control thread: policy, identities, kernel events, admin socket and signals on one
//! single-threaded runtime. Shards are threads of their own ([`crate::shard`]).
//!
//! *Invariant:* what is in force stays in force until its successor has been checked and installed as a whole.

mod control;
mod kernel_record;
mod listeners;
mod preexisting;
pub mod reload;
mod status;
mod troubles;

use crate::admin;
use crate::admission::Admission;
use crate::attest::{AttestError, Attestor};
use crate::audit;
use crate::config::{Config, EngineChoice, Shards, WhenFull};
use crate::credential::NotReloaded;
use crate::credential::embedded::{Bundle, Embedded, EmbeddedError, Settings};
use crate::document::Purpose;
use crate::handshake_slots::HandshakeSlots;
use crate::identify::Identities;
use crate::intercept::{self, Options, PinnedTables, Programs};
use crate::live::OpenConnections;
use crate::offload::matrix::{EngineSupport, Matrix};
use crate::offload::selftest;
use crate::offload::{self, Choice};
use crate::pipeline::AgentState;
use crate::policy::{Policy, Rejected};
use crate::privilege::{self, Sandbox};
use crate::shard;
use crate::whence::Here;
use arc_swap::ArcSwap;
use control::Control;
use status::Settled;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use tokio::sync::watch;
use tokio::task::LocalSet;

/// Why the agent does not start, or did not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The policy is not taken.
    #[error(transparent)]
    Policy(#[from] Rejected),
    /// The authority, a trust bundle or a revocation list is not taken.
    #[error(transparent)]
    Identity(#[from] EmbeddedError),
    /// The same at a reload.
    #[error(transparent)]
    Reload(#[from] NotReloaded),
    /// Processes cannot be attested on this host.
    #[error(transparent)]
    Attestation(#[from] AttestError),
    /// The kernel programs cannot be loaded, attached or fed.
    #[error(transparent)]
    Kernel(#[from] intercept::Error),
    /// The configured engine does not work here.
    #[error(transparent)]
    Engine(#[from] offload::Unavailable),
    /// The audit log cannot be opened.
    #[error(transparent)]
    Audit(#[from] audit::OpenError),
    /// The admin socket cannot be made.
    #[error(transparent)]
    Admin(#[from] admin::Error),
    /// Privileges cannot be given up.
    #[error(transparent)]
    Privilege(#[from] privilege::Error),
    /// Threads, runtimes or signals cannot be had.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Runs the agent until SIGTERM or SIGINT.
pub fn run(mut config: Config) -> Result<(), Error> {
    let files = privilege::raise_file_limit()?;
    let fit = connections_within(files);
    if fit < config.limits.connections {
        // Otherwise the last ones could not even be accepted: they would hang in the kernel, and nobody would be told.
        let wanted = config.limits.connections;
        tracing::warn!(
            files,
            wanted,
            fit,
            "[limits] connections does not fit the limit of open files: raise LimitNOFILE"
        );
        config.limits.connections = fit;
    }
    let policy = Arc::new(Policy::load(&config.policy_dir, Purpose::InForce)?);
    warn_of_second_authorities(&config, &policy);
    let provider = Arc::new(Embedded::open(settings(&config, &policy))?);
    // Checked before anything looks for processes and cgroups, so that the error names the reason and not a consequence of
    // it.
    intercept::hold_against_host()?;
    let attestor = Arc::new(Attestor::discover()?);
    let matrix = selftest::run();
    let engine = Choice::from(config.engine, &matrix)?;
    let reason = reason(config.engine, &matrix);
    let shards = shard_count(config.shards);
    let options =
        Options { run_dir: config.run_dir.clone(), cgroup: config.cgroup.clone().into(), shards, sizes: Vec::new() };
    let mut programs = Programs::load(&options)?;
    let tables = PinnedTables::open(programs.places().1)?;
    let sandbox = privilege::give_up()?;
    if let Sandbox::Off { why } = &sandbox {
        tracing::warn!(why, "the agent runs without its sandbox: whoever takes it over can call all of the kernel");
    }
    let log = audit::Log::open(&config.audit.path, config.audit.when_full == WhenFull::Refuse)?;
    let shared = Arc::new(AgentState {
        policy: ArcSwap::new(policy.clone()),
        identities: Identities::new(provider.clone(), attestor),
        engine,
        registry: Arc::new(OpenConnections::default()),
        admission: Admission::new(config.limits.connections),
        here: Here::default(),
        audit: log.sender(),
        changed: watch::Sender::new(()),
        shards,
        handshake_slots: HandshakeSlots::new(config.limits.handshakes, config.limits.waiting),
        config,
    });
    // Shards first: from the moment that the policy is in the kernel's maps, connections come.
    let (closing, closed) = watch::channel(false);
    let mut threads = Vec::new();
    for unbound in programs.take_listeners() {
        let thread = shard::start(unbound, shared.clone(), closed.clone());
        threads.push(thread.map_err(|source| Error::Host { what: "a shard's thread cannot be started", source })?);
    }
    programs.install(policy)?;
    tracing::info!(shards, files, engine = engine.engine().name(), reason, %sandbox, "agent is up");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|source| Error::Host { what: "the control runtime cannot be made", source })?;
    let local = LocalSet::new();
    let outcome = runtime.block_on(local.run_until(async {
        let control = Control::new(
            shared.clone(),
            provider,
            programs,
            Settled { engine_reason: reason, shards, sandbox, tables },
        )?;
        control.run(closing, &threads).await
    }));
    join(threads);
    log.close();
    outcome
}

/// Files that are not for connections: maps, listeners, logs, and connections that are accepted only to be refused.
const OTHER_FILES: u64 = 1024;

/// How many connections fit each way. One outbound and one inbound take two sockets each, one of a peer that has not proved
/// who it is takes one, and the connections that wait for another use (a quarter of the number inbound, a quarter outbound)
/// take half a one: five and a half in all. Where files are very few, half of them are kept for other things.
fn connections_within(files: u64) -> usize {
    let others = OTHER_FILES.min(files / 2);
    usize::try_from((files - others) / 11 * 2).unwrap_or(usize::MAX)
}

/// Loads the authority, the trust bundles and the revocation lists as the agent would at start.
pub fn check_identity(config: &Config, policy: &Policy) -> Result<(), EmbeddedError> {
    Embedded::open(settings(config, policy)).map(drop)
}

/// What is to be said about `[[trust]]` entries for the policy's own trust domain: one line each. Such an entry serves to
/// replace an authority, while peers have SVIDs of the old and the new one. If it is left behind, somebody else can issue
/// the identities of this host's workloads.
pub fn second_authorities(config: &Config, policy: &Policy) -> Vec<String> {
    let own = policy.trust_domain();
    let line = |trust: &crate::config::Trust| {
        format!(
            "[[trust]] names {own}, the policy's own trust domain: the authorities in {} can issue every identity of it as \
             well; remove the entry once no peer has an SVID of theirs any more",
            trust.bundle.display()
        )
    };
    config.trust.iter().filter(|trust| trust.trust_domain == *own).map(line).collect()
}

fn warn_of_second_authorities(config: &Config, policy: &Policy) {
    for line in second_authorities(config, policy) {
        tracing::warn!("{line}");
    }
}

/// What the embedded provider is made from.
fn settings(config: &Config, policy: &Policy) -> Settings {
    let crate::config::Provider::Embedded { ca_dir, svid_ttl } = &config.identity;
    Settings {
        ca_dir: ca_dir.clone(),
        trust_domain: policy.trust_domain().clone(),
        svid_ttl: *svid_ttl,
        bundles: config.trust.iter().map(bundle).collect(),
    }
}

fn bundle(trust: &crate::config::Trust) -> Bundle {
    Bundle { trust_domain: trust.trust_domain.clone(), path: trust.bundle.clone(), crl: trust.crl.clone() }
}

/// Why this engine, for `bunter status`.
fn reason(wanted: EngineChoice, matrix: &Matrix) -> String {
    match (wanted, matrix.verdict()) {
        (EngineChoice::Auto, _) => "auto is the engine that was measured to be the cheaper (docs/adr/0012)".into(),
        (EngineChoice::User, _) => "configured".into(),
        // The agent does not start in this case (`Choice::from`).
        (EngineChoice::Kernel, EngineSupport::User { why }) => why,
        (EngineChoice::Kernel, EngineSupport::Kernel { rekey: true }) => {
            "configured, and this kernel passes the self-test".into()
        }
        (EngineChoice::Kernel, EngineSupport::Kernel { rekey: false }) => {
            "configured, and this kernel passes the self-test, but takes no fresh keys: ChaCha20-Poly1305 only".into()
        }
    }
}

fn shard_count(shards: Shards) -> usize {
    match shards {
        Shards::Exactly(count) => count.get(),
        Shards::Auto => std::thread::available_parallelism().map_or(1, usize::from).min(bunter_common::MAX_SHARDS),
    }
}

fn join(threads: Vec<JoinHandle<()>>) {
    for thread in threads.into_iter().filter(JoinHandle::is_finished) {
        if thread.join().is_err() {
            tracing::error!("a shard has panicked: this is a defect, please report it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_that_files_do_not_suffice_for_are_not_taken() {
        assert_eq!(connections_within(1024), 92);
        assert_eq!(connections_within(20_000), 3_450);
        assert_eq!(connections_within(524_288), 95_138);
        assert!(connections_within(u64::MAX) > 1 << 40);
    }
}
