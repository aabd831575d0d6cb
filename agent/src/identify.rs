//! identify: a [`Flow`] in, [`Parties`] out.
//!
//! Which registration entry matches the process on this host's end ([`crate::attest`])? Where none does, the error says so
//! in its own way ([`Error::is_unknown`]), and the pipeline chooses the refusal by where the connection goes. The entry's
//! credential ([`crate::credential`]) is asked for when a handshake needs it, and not before: what is denied, or carried in
//! plaintext, needs none.
//!
//! *Invariant:* `Parties` are made here alone, and only of an attested workload; the agent has no identity of its own to
//! put on the wire (R58).

use crate::{
    attest::{AttestError, Attested, Attestor, EntrySource, Facts},
    credential::{Credential, Provider, ProviderError},
    flow::{Flow, Listens, Origin},
    policy::{Policy, Workload},
};
use bunter_identity::{
    refusal::{Culprit, Refusal},
    spiffe::SpiffeId,
    trust::bundle::Trust,
};
use std::{fmt, sync::Arc};

/// A flow whose local end is known.
#[derive(Debug)]
pub struct Parties {
    /// The flow.
    pub flow: Flow,
    /// The local workload.
    pub workload: Workload,
    /// The trust bundles to verify the peer with: one snapshot for the whole handshake.
    pub trust: Arc<Trust>,
    /// The process that was attested.
    pub facts: Facts,
}

/// A flow whose local end is not known, and why.
#[derive(Debug)]
pub struct Unidentified {
    /// The flow, which is to be refused unless it can be identified later.
    pub flow: Flow,
    /// Why.
    pub error: Error,
}

/// Why the local end of a connection has no identity.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No registration entry matches.
    #[error("{0} has no identity: no registration entry matches it. Add a [[workload]] with selectors that it fulfils")]
    Unknown(Box<Facts>),
    /// The connection could reach a process that is not the workload.
    #[error(
        "the address of {id} is shared (SO_REUSEPORT) by {other}, who is not that workload: stop that one, or enrol it"
    )]
    Shared {
        /// The workload.
        id: SpiffeId,
        /// Who shares its address.
        other: Box<Facts>,
    },
    /// The process cannot be attested.
    #[error(transparent)]
    Attestation(#[from] AttestError),
}

/// What this stage needs beside the policy. Cheap to clone: a shard has one of its own.
#[derive(Clone, Debug)]
pub struct Identities {
    provider: Arc<dyn Provider>,
    attestor: Arc<Attestor>,
}

/// Finds out who is on this host's end of a flow.
pub async fn identify(flow: Flow, policy: &Policy, identities: &Identities) -> Result<Parties, Box<Unidentified>> {
    match identities.local(&flow, policy).await {
        Ok((workload, facts)) => Ok(Parties { flow, workload, trust: identities.provider.trust(), facts }),
        Err(error) => Err(Box::new(Unidentified { flow, error })),
    }
}

impl Identities {
    /// From where credentials come, and how processes are attested.
    pub fn new(provider: Arc<dyn Provider>, attestor: Arc<Attestor>) -> Self {
        Self { provider, attestor }
    }

    /// From where credentials come.
    pub fn provider(&self) -> &Arc<dyn Provider> {
        &self.provider
    }

    /// How processes are attested: also for listening sockets that nobody has dialled yet.
    pub fn attestor(&self) -> &Arc<Attestor> {
        &self.attestor
    }

    /// The SVID of a workload, valid now.
    pub async fn credential(&self, workload: &Workload) -> Result<Arc<Credential>, ProviderError> {
        match self.provider.ready(workload) {
            Some(credential) => Ok(credential),
            None => self.provider.obtain(workload).await,
        }
    }

    async fn local(&self, flow: &Flow, entries: &dyn EntrySource) -> Result<(Workload, Facts), Error> {
        match &flow.origin {
            Origin::Outbound { task, .. } => known(self.attestor.dialler(task, entries).await?),
            Origin::Inbound(listens) => self.listener(listens, entries).await,
        }
    }
}

impl Identities {
    /// Are all who listen now this workload?
    pub async fn is_still(&self, workload: &Workload, now: &Listens, entries: &dyn EntrySource) -> Result<(), Error> {
        let (found, facts) = self.listener(now, entries).await?;
        if found.id == workload.id {
            return Ok(());
        }
        Err(Error::Shared { id: workload.id.clone(), other: Box::new(facts) })
    }

    /// Whose is a listening socket, with all that share its address?
    async fn listener(&self, listens: &Listens, entries: &dyn EntrySource) -> Result<(Workload, Facts), Error> {
        let Listens { task, cookie, sharers, .. } = listens;
        let (workload, facts) = known(self.attestor.owner(task.as_ref(), *cookie, entries).await?)?;
        for (task, cookie) in sharers {
            let task = Some(task).filter(|task| task.tgid != 0);
            let other = self.attestor.owner(task, *cookie, entries).await?;
            if other.workload.as_ref().map(|other| &other.id) != Some(&workload.id) {
                return Err(Error::Shared { id: workload.id, other: Box::new(other.facts) });
            }
        }
        Ok((workload, facts))
    }
}

/// Who was attested, if that is a workload.
fn known(Attested { workload, facts }: Attested) -> Result<(Workload, Facts), Error> {
    match workload {
        Some(workload) => Ok((workload, facts)),
        None => Err(Error::Unknown(Box::new(facts))),
    }
}

impl Error {
    /// May the cause be over in a moment?
    pub fn is_passing(&self) -> bool {
        matches!(self, Error::Attestation(error) if error.is_passing())
    }

    /// The process was looked at and simply is no workload: neither its fault nor ours.
    pub fn is_unknown(&self) -> bool {
        matches!(self, Error::Unknown(_))
    }
}

impl Refusal for Error {
    fn culprit(&self) -> Culprit {
        match self {
            Error::Unknown(_) => Culprit::Policy,
            Error::Shared { .. } => Culprit::Host,
            Error::Attestation(error) => error.culprit(),
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Error::Unknown(_) => "unknown-workload",
            Error::Shared { .. } => "listener-shared",
            Error::Attestation(error) => error.code(),
        }
    }
}

impl fmt::Display for Unidentified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Unidentified {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl Refusal for Unidentified {
    fn culprit(&self) -> Culprit {
        self.error.culprit()
    }
    fn code(&self) -> &'static str {
        self.error.code()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        credential::embedded::*,
        flow::Direction,
        policy::{Accounts, Source},
    };
    use bunter_common::Task;
    use bunter_identity::{authority::ca, trust::testing::*};
    use std::{
        os::unix::process::CommandExt,
        path::PathBuf,
        process::Command,
        time::{Duration, SystemTime},
    };

    /// A user that is not root, so that an entry may name it alone.
    const NOBODY: u32 = 65534;

    struct Bench {
        _scratch: tempfile::TempDir,
        identities: Identities,
        child: std::process::Child,
        executable: PathBuf,
    }

    impl Bench {
        /// A host with an authority and a process of the user nobody; none without root, which that needs.
        fn new() -> Option<Self> {
            let attestor = match Attestor::discover() {
                Ok(attestor) if rustix::process::geteuid().is_root() => Arc::new(attestor),
                _ => {
                    eprintln!("skipped: needs root and the unified cgroup hierarchy");
                    return None;
                }
            };
            let scratch = tempfile::tempdir().unwrap();
            let ca_dir = scratch.path().join("ca");
            let trust_domain = domain_of("example.org");
            ca::init(&ca_dir, &trust_domain, ca::DEFAULT_LIFE, SystemTime::now()).unwrap();
            let svid_ttl = Duration::from_secs(3600);
            let settings = Settings { ca_dir, trust_domain, svid_ttl, bundles: Vec::new() };
            let identities = Identities::new(Arc::new(Embedded::open(settings).unwrap()), attestor);
            let child = Command::new("/bin/sleep").arg("60").uid(NOBODY).gid(NOBODY).spawn().unwrap();
            let executable = std::fs::canonicalize("/bin/sleep").unwrap();
            Some(Self { _scratch: scratch, identities, child, executable })
        }

        fn task(&self) -> Task {
            let now = rustix::time::clock_gettime_dynamic(rustix::time::DynamicClockId::Boottime).unwrap();
            let cgroup = std::fs::read_to_string(format!("/proc/{}/cgroup", self.child.id())).unwrap();
            let cgroup = cgroup.lines().find_map(|line| line.strip_prefix("0::")).unwrap();
            Task {
                tgid: self.child.id(),
                uid: NOBODY,
                gid: NOBODY,
                workload: 0,
                cgroup: crate::attest::number_of(cgroup),
                at: u64::try_from(now.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap(),
                comm: [0; 16],
            }
        }
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    async fn flow(direction: Direction, task: Option<Task>) -> Flow {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let socket = tokio::net::TcpStream::connect(address).await.unwrap();
        crate::flow::testing::flow(direction, socket, address, task)
    }

    fn policy(entries: &[(&str, &[String])]) -> Policy {
        let mut text = String::from("trust_domain = \"example.org\"\n");
        for (id, selectors) in entries {
            text += &format!("[[workload]]\nid = \"spiffe://example.org/{id}\"\nselectors = {selectors:?}\n");
        }
        let source = Source { file: "test.toml".into(), text };
        Policy::parse("test", &[source], &Accounts::default()).unwrap()
    }

    fn nobody() -> String {
        format!("unix:uid:{NOBODY}")
    }

    #[tokio::test]
    async fn a_dialler_gets_the_credential_of_its_most_specific_entry() {
        let Some(bench) = Bench::new() else { return };
        let path = format!("unix:path:{}", bench.executable.display());
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &std::fs::read(&bench.executable).unwrap());
        let digest = format!("unix:sha256:{}", bunter_identity::trust::x509::hex(digest.as_ref()));
        let policy = policy(&[
            ("any", &[nobody()]),
            ("sleep", &[nobody(), path.clone()]),
            ("exact", &[nobody(), path, digest]),
            ("other", &[nobody(), format!("unix:gid:{NOBODY}"), "unix:path:/bin/other".into()]),
        ]);
        let flow = flow(Direction::Outbound, Some(bench.task())).await;
        let parties = identify(flow, &policy, &bench.identities).await.unwrap();
        assert_eq!(parties.workload.id, id_of("spiffe://example.org/exact"));
        let credential = bench.identities.credential(&parties.workload).await.unwrap();
        assert_eq!(credential.id, parties.workload.id);
        assert!(credential.is_valid(SystemTime::now()));
        assert!(parties.trust.anchors(&domain_of("example.org")).is_some());
        assert_eq!(parties.facts.executable.as_ref(), Some(&bench.executable));
    }

    #[tokio::test]
    async fn a_process_without_an_entry_is_unknown_and_the_flow_comes_back() {
        let Some(bench) = Bench::new() else { return };
        let policy = policy(&[("other", &[nobody(), "unix:path:/bin/other".into()])]);
        for direction in [Direction::Outbound, Direction::Inbound] {
            let flow = flow(direction, Some(bench.task())).await;
            let refused = identify(flow, &policy, &bench.identities).await.unwrap_err();
            assert!(refused.error.is_unknown());
            assert_eq!((refused.code(), refused.culprit()), ("unknown-workload", Culprit::Policy));
            assert_eq!(refused.flow.id, 1);
            let text = refused.to_string();
            assert!(text.contains("sleep") && text.contains("uid 65534") && text.contains("cgroup"), "{text}");
        }
    }

    #[tokio::test]
    async fn a_dialler_that_died_is_refused_and_a_listener_of_the_dead_is_not() {
        let Some(mut bench) = Bench::new() else { return };
        let policy = policy(&[("any", &[nobody()])]);
        let task = bench.task();
        bench.child.kill().unwrap();
        bench.child.wait().unwrap();
        let outbound = flow(Direction::Outbound, Some(task)).await;
        let refused = identify(outbound, &policy, &bench.identities).await.unwrap_err();
        assert_eq!((refused.code(), refused.error.is_unknown()), ("process-died", false));
        let inbound = flow(Direction::Inbound, Some(task)).await;
        assert!(identify(inbound, &policy, &bench.identities).await.is_ok());
    }

    #[tokio::test]
    async fn two_entries_that_match_equally_well_are_ambiguous() {
        let Some(bench) = Bench::new() else { return };
        let path = format!("unix:path:{}", bench.executable.display());
        let policy = policy(&[("one", &[nobody(), path]), ("two", &[nobody(), format!("unix:gid:{NOBODY}")])]);
        let flow = flow(Direction::Outbound, Some(bench.task())).await;
        let refused = identify(flow, &policy, &bench.identities).await.unwrap_err();
        assert_eq!((refused.code(), refused.culprit()), ("ambiguous-entries", Culprit::Policy));
    }

    #[tokio::test]
    async fn nobody_is_guessed_where_nothing_was_recorded() {
        let Some(bench) = Bench::new() else { return };
        let policy = policy(&[("any", &[nobody()])]);
        let inbound = identify(flow(Direction::Inbound, None).await, &policy, &bench.identities).await.unwrap_err();
        assert_eq!((inbound.code(), inbound.error.is_unknown()), ("no-listener", false));
    }

    #[tokio::test]
    async fn keys_are_not_in_the_debug_text_of_a_credential() {
        let Some(bench) = Bench::new() else { return };
        let policy = policy(&[("any", &[nobody()])]);
        let flow = flow(Direction::Outbound, Some(bench.task())).await;
        let parties = identify(flow, &policy, &bench.identities).await.unwrap();
        let text = format!("{:?}", bench.identities.credential(&parties.workload).await.unwrap());
        assert!(text.contains("spiffe://example.org/any") && !text.contains("certified"), "{text}");
    }
}
