//! identify: a `Flow` in, `Parties` out.

use crate::{intercept::Flow, policy::Workload, spiffe::SpiffeId};
use std::{sync::Arc, time::SystemTime};

/// An X.509-SVID with its key, ready for a handshake.
#[derive(Debug)]
pub struct Credential {
    /// Whose it is.
    pub id: SpiffeId,
    /// Chain, leaf first, and the signing key.
    pub certified: Arc<rustls::sign::CertifiedKey>,
    /// When it must no longer be used (R41).
    pub not_after: SystemTime,
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
}
