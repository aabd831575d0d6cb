//! identify: a [`Flow`] in, [`Parties`] out.
//!
//! Two steps: which registration entry is the process on this host's end ([`attest`]), and the credential of that entry
//! ([`provider`]). A process without an entry is no failure of this room: it says so in its own way
//! ([`Error::is_unknown`]), and the pipeline relays or refuses by where the connection goes.
//!
//! *Invariant:* `Parties` are only made here, with a credential that is valid now and belongs to the attested workload;
//! the agent has no identity of its own to put on the wire (R58).

pub mod attest;
pub mod bundle;
pub mod ca;
mod cgroup;
mod digest;
pub mod embedded;
mod files;
mod process;
pub mod provider;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod x509;

use crate::{
    intercept::{Direction, Flow},
    policy::{Policy, Workload},
    refusal::{Culprit, Refusal},
    spiffe::SpiffeId,
};
use attest::{AttestError, Attested, Attestor, Facts, Registry};
use bundle::Trust;
pub use files::FileError;
use provider::{Provider, ProviderError};
use std::{fmt, sync::Arc, time::SystemTime};
pub use x509::Malformed;

/// An X.509-SVID with its key, ready for a handshake.
pub struct Credential {
    /// Whose it is.
    pub id: SpiffeId,
    /// Chain, leaf first, and the signing key.
    pub certified: Arc<rustls::sign::CertifiedKey>,
    /// Before that it is not valid yet.
    pub not_before: SystemTime,
    /// When it must no longer be used (R41).
    pub not_after: SystemTime,
    /// Serial number in hexadecimal, for the audit line.
    pub serial: Arc<str>,
}

/// A flow whose local end is known.
#[derive(Debug)]
pub struct Parties {
    /// The flow.
    pub flow: Flow,
    /// The local workload.
    pub workload: Workload,
    /// Its SVID.
    pub credential: Arc<Credential>,
    /// The trust bundles to verify the peer with: one snapshot for the whole handshake.
    pub trust: Arc<Trust>,
    /// The process that was attested.
    pub facts: Facts,
}

/// A flow whose local end is not known, and why.
#[derive(Debug)]
pub struct Unidentified {
    /// The flow, to relay or to refuse.
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
    /// Nothing was recorded about who dialled.
    #[error("nothing was recorded about the process that dialled")]
    NoRecord,
    /// It cannot be attested.
    #[error(transparent)]
    Attestation(#[from] AttestError),
    /// There is no credential for it.
    #[error(transparent)]
    Credential(#[from] ProviderError),
}

/// What this room needs beside the policy. Cheap to clone: a shard has one of its own.
#[derive(Clone, Debug)]
pub struct Identities {
    provider: Arc<dyn Provider>,
    attestor: Arc<Attestor>,
}

/// Finds out who is on this host's end of a flow, and gets its credential.
pub async fn identify(flow: Flow, policy: &Policy, identities: &Identities) -> Result<Parties, Box<Unidentified>> {
    match identities.local(&flow, policy).await {
        Ok((workload, facts, credential)) => {
            Ok(Parties { flow, workload, credential, trust: identities.provider.trust(), facts })
        }
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

    async fn local(
        &self,
        flow: &Flow,
        registry: &dyn Registry,
    ) -> Result<(Workload, Facts, Arc<Credential>), Error> {
        let Attested { workload, facts } = match (flow.direction, &flow.task) {
            (Direction::Outbound, Some(task)) => self.attestor.dialler(task, registry).await?,
            (Direction::Outbound, None) => return Err(Error::NoRecord),
            (Direction::Inbound, task) => self.attestor.owner(task.as_ref(), flow.listener_cookie, registry).await?,
        };
        let Some(workload) = workload else { return Err(Error::Unknown(Box::new(facts))) };
        let credential = match self.provider.ready(&workload) {
            Some(credential) => credential,
            None => self.provider.obtain(&workload).await?,
        };
        Ok((workload, facts, credential))
    }
}

impl Credential {
    /// May it be used at this time?
    pub fn is_valid(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }
}

impl Error {
    /// The process was looked at and simply is no workload: neither its fault nor ours.
    pub fn is_unknown(&self) -> bool {
        matches!(self, Error::Unknown(_))
    }
}

impl Refusal for Error {
    fn culprit(&self) -> Culprit {
        match self {
            Error::Unknown(_) => Culprit::Policy,
            Error::NoRecord => Culprit::Host,
            Error::Attestation(error) => error.culprit(),
            Error::Credential(error) => error.culprit(),
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Error::Unknown(_) => "unknown-workload",
            Error::NoRecord => "no-origin",
            Error::Attestation(error) => error.code(),
            Error::Credential(error) => error.code(),
        }
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential")
            .field("id", &self.id)
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
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
