//! Who judges the peer's certificate: one `Judge` for each handshake, made by the host's `Trust` for one permit.
//!
//! *Invariant:* a judge says who the peer is only after the certificate chain was verified against the anchors of the
//! peer's own trust domain (R37), and admits nobody whom the permit does not.

use crate::{policy::Peers, spiffe::SpiffeId};
use rustls::{client::danger::ServerCertVerifier, server::danger::ClientCertVerifier};
use std::sync::Arc;

/// Whose certificates this host believes: the trust bundles in force.
pub trait Trust: Send + Sync {
    /// A judge for one handshake with one of these peers.
    fn judge(&self, peers: &Peers) -> Arc<dyn Judge>;
}

/// The verifier of one handshake, for either side.
pub trait Judge: ServerCertVerifier + ClientCertVerifier {
    /// Who the peer is, once its chain was verified; also where the permit did not admit it, for the audit record.
    fn peer(&self) -> Option<SpiffeId>;
}
