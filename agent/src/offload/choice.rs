//! Which engine protects the records of this host, and what the operator wished.
//!
//! *Invariant:* the kernel is chosen for what the self-test saw it do, never for its version, and never for one direction
//! only.

use super::matrix::{Ability, EngineSupport, Matrix};
use crate::{config::EngineChoice, handshake::Ciphers};
use bunter_identity::refusal::{Culprit, Refusal};

/// Who protects the records of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// The kernel, by TLS_TX and TLS_RX.
    Kernel,
    /// This process.
    User,
}

impl Engine {
    /// As the audit record and the configuration write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::User => "user",
        }
    }
}

/// The engine of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The kernel.
    Kernel(Ability),
    /// This process.
    User,
}

/// The configuration insists on an engine that this host does not have.
#[derive(Debug, thiserror::Error)]
#[error(
    "engine = \"kernel\" is configured, but this kernel fails the self-test ({why}): write engine = \"auto\" or \"user\""
)]
pub struct Unavailable {
    /// The first thing that failed.
    pub why: String,
}

impl Choice {
    /// Chooses. `auto` is engine `user`, which was measured to be the cheaper (docs/adr/0012). Engine `kernel` needs a
    /// kernel that has passed the self-test.
    pub fn from(wanted: EngineChoice, matrix: &Matrix) -> Result<Self, Unavailable> {
        match (wanted, matrix.verdict()) {
            (EngineChoice::User | EngineChoice::Auto, _) => Ok(Self::User),
            (EngineChoice::Kernel, EngineSupport::Kernel { rekey }) => Ok(Self::Kernel(Ability { rekey })),
            (EngineChoice::Kernel, EngineSupport::User { why }) => Err(Unavailable { why }),
        }
    }

    /// The cipher suites that this engine can carry to the end of a connection.
    ///
    /// A kernel that takes no fresh key must not agree on AES-GCM: the peer sends a KeyUpdate by itself near the record
    /// limit of that cipher, and the connection would be lost. ChaCha20-Poly1305 has no such limit.
    pub fn ciphers(self) -> Ciphers {
        match self {
            Self::User | Self::Kernel(Ability { rekey: true }) => Ciphers::All,
            Self::Kernel(Ability { rekey: false }) => Ciphers::ChaChaOnly,
        }
    }

    /// The engine itself.
    pub fn engine(self) -> Engine {
        match self {
            Self::Kernel(_) => Engine::Kernel,
            Self::User => Engine::User,
        }
    }
}

impl Refusal for Unavailable {
    fn culprit(&self) -> Culprit {
        Culprit::Host
    }
    fn code(&self) -> &'static str {
        "engine-unavailable"
    }
}
