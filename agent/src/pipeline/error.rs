//! Why a connection was refused on its way through the stages: each stage's own reasons, and the few of the pipeline.
//!
//! *Invariant:* every refusal names its stage, who has to act, and a stable code.

use crate::admission::Full;
use crate::audit::Stage;
use crate::credential::ProviderError;
use crate::{authorize, handshake, handshake_slots, identify, intercept, offload, reuse};
use bunter_identity::refusal::{Culprit, Refusal};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// Why a connection was refused before it could be relayed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no place for another connection.
    #[error(transparent)]
    TooMany(Full),
    /// A process without an identity dialled what is no mesh destination.
    #[error(
        "{0} is no mesh destination and the process has no identity, so that nothing is carried for it: the kernel lets it pass \
         by itself once it knows the process's cgroup. Dial again; and where the process matches a [[workload]] but for its path or \
         hash, run it under another user or cgroup"
    )]
    NotRelayed(SocketAddr),
    /// A bypass allows the connection: the kernel lets such connections pass, and the agent carries none.
    #[error(
        "{to} may be reached in plaintext by the rule {rule}, which the kernel lets pass by itself and nobody carries: it has \
         to know the workload by selectors that it can see (uid, gid, cgroup, systemd unit) alone"
    )]
    BypassNotRelayed {
        /// Where it wanted to go.
        to: SocketAddr,
        /// The rule.
        rule: Arc<str>,
    },
    /// The listener is no workload's, and the kernel did not know that yet.
    #[error(
        "whoever listens on {0} is no workload, which the kernel did not know yet: nothing is carried to it. Connect again; a \
         listener that is to be reached in plaintext through the agent needs an [[inbound]] with mode = \"permissive\""
    )]
    ListenerUndecided(SocketAddr),
    /// The other end was not there in time.
    #[error("the connection was not made within {0:?} ([timeouts] dial)")]
    DialTimeout(Duration),
    /// The local workload was not there in time.
    #[error("the local workload at {to} did not accept within {within:?} ([timeouts] dial)")]
    UpstreamTimeout {
        /// Where it listens.
        to: SocketAddr,
        /// So long.
        within: Duration,
    },
    /// No stage was reached, because nobody could be told about this connection.
    #[error("the audit log cannot be written, and [audit] when_full is \"refuse\"")]
    AuditUnwritable,
    /// identify refused.
    #[error(transparent)]
    Identify(identify::Error),
    /// There is no credential for the workload.
    #[error(transparent)]
    Credential(ProviderError),
    /// authorize refused.
    #[error(transparent)]
    Authorize(authorize::Reason),
    /// intercept could not connect to the other end.
    #[error(transparent)]
    Intercept(intercept::Error),
    /// There was no slot for this handshake.
    #[error(transparent)]
    HandshakeSlot(handshake_slots::Error),
    /// handshake refused.
    #[error(transparent)]
    Handshake(handshake::Cause),
    /// A further stream of a connection was refused.
    #[error(transparent)]
    Reuse(reuse::Unfit),
    /// offload refused.
    #[error(transparent)]
    Offload(offload::Error),
}

impl Error {
    /// The stage that refused.
    pub fn stage(&self) -> Stage {
        match self {
            Self::TooMany(_)
            | Self::AuditUnwritable
            | Self::DialTimeout(_)
            | Self::UpstreamTimeout { .. }
            | Self::Intercept(_) => Stage::Intercept,
            Self::Identify(_) | Self::NotRelayed(_) | Self::ListenerUndecided(_) => Stage::Identify,
            Self::Authorize(_) | Self::Reuse(_) | Self::BypassNotRelayed { .. } => Stage::Authorize,
            Self::Credential(_) | Self::HandshakeSlot(_) | Self::Handshake(_) => Stage::Handshake,
            Self::Offload(_) => Stage::Offload,
        }
    }
}

impl Refusal for Error {
    fn culprit(&self) -> Culprit {
        match self {
            Self::AuditUnwritable | Self::UpstreamTimeout { .. } => Culprit::Host,
            Self::TooMany(full) => full.culprit(),
            Self::NotRelayed(_) | Self::ListenerUndecided(_) => Culprit::Host,
            Self::BypassNotRelayed { .. } => Culprit::Policy,
            Self::DialTimeout(_) => Culprit::Peer,
            Self::Identify(error) => error.culprit(),
            Self::Credential(error) => error.culprit(),
            Self::Authorize(error) => error.culprit(),
            Self::Intercept(error) => error.culprit(),
            Self::HandshakeSlot(error) => error.culprit(),
            Self::Handshake(error) => error.culprit(),
            Self::Reuse(error) => error.culprit(),
            Self::Offload(error) => error.culprit(),
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Self::TooMany(full) => full.code(),
            Self::AuditUnwritable => "audit-unwritable",
            Self::NotRelayed(_) => "not-relayed",
            Self::BypassNotRelayed { .. } => "bypass-not-relayed",
            Self::ListenerUndecided(_) => "listener-undecided",
            Self::DialTimeout(_) => "dial-timeout",
            Self::UpstreamTimeout { .. } => "workload-timeout",
            Self::Identify(error) => error.code(),
            Self::Credential(error) => error.code(),
            Self::Authorize(error) => error.code(),
            Self::Intercept(error) => error.code(),
            Self::HandshakeSlot(error) => error.code(),
            Self::Handshake(error) => error.code(),
            Self::Reuse(error) => error.code(),
            Self::Offload(error) => error.code(),
        }
    }
}
