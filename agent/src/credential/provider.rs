//! Where identities come from: a registration entry in, a credential out.
//!
//! A [`Provider`] may make credentials itself, as [`Embedded`](super::embedded::Embedded) does, or be fed by a stream
//! from another process. Both keep what is current where every shard can read it without a lock
//! ([`Provider::ready`]); only the first connection of a workload waits ([`Provider::obtain`]).
//!
//! *Invariant:* neither function ever returns a credential that is expired or not yet valid (R41).

use super::Credential;
use crate::policy::Workload;
use bunter_identity::{
    refusal::{Culprit, Refusal},
    spiffe::{SpiffeId, TrustDomain},
    trust::bundle::Trust,
};
use std::{fmt, future::Future, pin::Pin, sync::Arc};
use tokio::sync::watch;

/// A future that a trait object can return.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A source of credentials and trust bundles.
pub trait Provider: fmt::Debug + Send + Sync + 'static {
    /// The credential of a registration entry, if a current one is at hand. Never waits, never locks.
    fn ready(&self, workload: &Workload) -> Option<Arc<Credential>>;

    /// The same, waiting until there is one. Callers bound the wait.
    fn obtain<'a>(&'a self, workload: &'a Workload) -> Pending<'a, Result<Arc<Credential>, ProviderError>>;

    /// The trust bundles as they are now. One handshake uses one snapshot.
    fn trust(&self) -> Arc<Trust>;

    /// Counts up whenever the trust bundles, or who may have which credential, have changed: established connections
    /// have to be looked at again. Rotation is no such change.
    fn changes(&self) -> watch::Receiver<u64>;

    /// Reads again what the source has on disk, for a policy of this trust domain, and checks all of it. Nothing changes
    /// before it is [committed](Reloaded::commit).
    fn reload(self: Arc<Self>, trust_domain: &TrustDomain) -> Result<Reloaded, NotReloaded>;

    /// Forgets the credentials of registration entries that are no longer in the policy (R88).
    fn retain(&self, workloads: &[Workload]);

    /// Keeps what is in use fresh, until dropped. Runs on the control runtime.
    fn maintain<'a>(&'a self) -> Pending<'a, ()>;

    /// What `bunter status` says about it.
    fn status(&self) -> ProviderStatus;
}

/// What a source has read again and found valid, and has not put in force yet.
pub struct Reloaded(Box<dyn FnOnce() + Send>);

impl Reloaded {
    /// `commit` puts it in force, and cannot fail.
    pub fn new(commit: impl FnOnce() + Send + 'static) -> Self {
        Self(Box::new(commit))
    }

    /// Puts it in force.
    pub fn commit(self) {
        (self.0)();
    }
}

impl fmt::Debug for Reloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reloaded")
    }
}

/// Why a source's files are not taken. What was in force stays in force.
#[derive(Debug)]
pub struct NotReloaded(Box<dyn Refusal>);

impl NotReloaded {
    /// For this reason.
    pub fn new(why: impl Refusal) -> Self {
        Self(Box::new(why))
    }
}

impl fmt::Display for NotReloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for NotReloaded {}

impl Refusal for NotReloaded {
    fn culprit(&self) -> Culprit {
        self.0.culprit()
    }
    fn code(&self) -> &'static str {
        self.0.code()
    }
}

/// Why there is no credential.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ProviderError {
    /// None could be had, and the last one, if any, has expired.
    #[error("no credential for {id}: {why}")]
    Unavailable {
        /// For whom.
        id: SpiffeId,
        /// What happened.
        why: Arc<str>,
        /// Who has to act.
        culprit: Culprit,
    },
    /// The one that was obtained is not valid at this time.
    #[error(
        "the credential of {id} is valid from {not_before} to {not_after}, and the clock says {now}: set the clock"
    )]
    NotValidNow {
        /// For whom.
        id: SpiffeId,
        /// Its first second.
        not_before: String,
        /// Its last second.
        not_after: String,
        /// What the clock says.
        now: String,
    },
}

impl Refusal for ProviderError {
    fn culprit(&self) -> Culprit {
        match self {
            ProviderError::Unavailable { culprit, .. } => *culprit,
            ProviderError::NotValidNow { .. } => Culprit::Host,
        }
    }
    fn code(&self) -> &'static str {
        match self {
            ProviderError::Unavailable { .. } => "credential-unavailable",
            ProviderError::NotValidNow { .. } => "credential-not-valid-now",
        }
    }
}

/// A provider's state, for people and for `--json`. Times are RFC 3339.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct ProviderStatus {
    /// `embedded`, and others later.
    pub provider: &'static str,
    /// Trust domain of the credentials that it gives.
    pub trust_domain: String,
    /// End of the authority's own validity, where the provider is its own authority.
    pub authority_not_after: Option<String>,
    /// Current credentials.
    pub credentials: Vec<CredentialStatus>,
    /// Trust anchors, by trust domain.
    pub bundles: Vec<AnchorStatus>,
    /// Revocation lists, by trust domain.
    pub lists: Vec<ListStatus>,
    /// Credentials issued or received since the start.
    pub issued: u64,
    /// Failed attempts since the start.
    pub failed: u64,
    /// Credentials that could not be made or renewed, as long as that lasts.
    pub failing: Vec<FailingStatus>,
}

/// A credential that cannot be had.
#[derive(Clone, Debug, serde::Serialize)]
pub struct FailingStatus {
    /// Number of the registration entry.
    pub workload: u32,
    /// Whose.
    pub id: String,
    /// When it was tried last, and why it failed.
    pub error: String,
}

/// One current credential.
#[derive(Clone, Debug, serde::Serialize)]
pub struct CredentialStatus {
    /// Number of the registration entry.
    pub workload: u32,
    /// Whose.
    pub id: String,
    /// Serial number of the certificate in hexadecimal.
    pub serial: String,
    /// Since when it is valid.
    pub not_before: String,
    /// Until when it is valid.
    pub not_after: String,
    /// When the next one is due.
    pub rotates_at: String,
}

/// One trust anchor.
#[derive(Clone, Debug, serde::Serialize)]
pub struct AnchorStatus {
    /// Of which trust domain.
    pub trust_domain: String,
    /// Name of the certificate.
    pub subject: String,
    /// Its serial number.
    pub serial: String,
    /// Until when it is valid.
    pub not_after: String,
}

/// One revocation list.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ListStatus {
    /// Of which trust domain.
    pub trust_domain: String,
    /// Name of the authority.
    pub issuer: String,
    /// Its number in hexadecimal.
    pub number: String,
    /// How many certificates it revokes.
    pub revoked: usize,
    /// When it must have been replaced.
    pub next_update: String,
    /// It has expired and was not replaced: peers of this authority are refused.
    pub expired: bool,
}
