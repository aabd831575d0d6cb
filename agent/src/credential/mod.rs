//! The SVID of a workload, and where it comes from.
//!
//! *Invariant:* a credential belongs to the workload for which it was asked for, and is never used outside its validity.

pub mod embedded;
mod provider;

pub use provider::{
    AnchorStatus, CredentialStatus, FailingStatus, ListStatus, NotReloaded, Pending, Provider, ProviderError,
    ProviderStatus, Reloaded,
};

use bunter_identity::spiffe::SpiffeId;
use std::{fmt, sync::Arc, time::SystemTime};

/// An X.509-SVID with its key, ready for a handshake.
pub struct Credential {
    /// Whose it is.
    pub id: SpiffeId,
    /// Chain, leaf first, and the signing key.
    pub certified: Arc<rustls::sign::CertifiedKey>,
    /// When it begins to be valid.
    pub not_before: SystemTime,
    /// When it must no longer be used (R41).
    pub not_after: SystemTime,
    /// Serial number in hexadecimal, for the audit line.
    pub serial: Arc<str>,
}

impl Credential {
    /// May it be used at this time?
    pub fn is_valid(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
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
