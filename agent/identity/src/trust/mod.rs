//! Whom to trust: bundles of anchors and revocation lists, and the judgement of a certificate against them.
//!
//! What is read from disk is read whole or refused (`pem`); what a certificate says is read in one way or refused
//! ([`x509`]).
//!
//! *Invariant:* a chain is only ever checked against the anchors and revocation lists of the trust domain that its leaf
//! names (R37, R39). Nothing here knows of policy, processes or connections.

pub mod bundle;
pub mod crl;
pub mod files;
pub(crate) mod pem;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod verify;
pub mod x509;

pub use files::FileError;
pub use pem::Unread;
pub use x509::Malformed;
