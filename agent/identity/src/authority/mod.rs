//! An authority on this host's disk: its key and anchor ([`ca`]), and whom it has revoked ([`revoke`]).
//!
//! *Invariant:* a key of an authority is read into memory that is cleared, and is never printed.

pub mod ca;
pub mod revoke;
