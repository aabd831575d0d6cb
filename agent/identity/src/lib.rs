//! Identities and what they are trusted by: names, certificates, revocation lists, and an authority on this host's disk.
//!
//! Pure of the agent: no kernel, no policy and no runtime, so that other programs can judge a certificate as the agent does. A
//! module imports only modules listed above it.
//!
//! *Invariant:* nothing here opens a connection, and the only files are those that a caller names.
#![forbid(unsafe_code)]

pub mod refusal;
pub mod spiffe;
pub mod trust;
pub mod authority;
