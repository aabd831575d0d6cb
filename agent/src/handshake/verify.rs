//! The judgement of a peer in one handshake: its certificate is good, and a rule admits it.
//!
//! [`PeerVerifier`] puts [`bunter_identity::trust::verify`] into rustls and keeps the verdict, refusals included, for the
//! handshake to read, because rustls's own error cannot express all of it.
//!
//! *Invariant:* a handshake completes only with a peer that the policy's peers admit.

use crate::policy::{Peers, Rule};
use bunter_identity::{
    refusal::{Culprit, Refusal},
    spiffe::SpiffeId,
    trust::{
        bundle::Trust,
        verify::{ALGORITHMS, PeerCertificateError, Role, VerifiedPeer, verify_chain},
    },
};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error as TlsError, PeerIncompatible, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::verify_tls13_signature,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use std::sync::{Arc, OnceLock};

/// A peer that is who it says and that the policy admits.
#[derive(Clone, Debug)]
pub struct Admitted {
    /// The peer.
    pub peer: VerifiedPeer,
    /// The rule that admits it.
    pub rule: Arc<Rule>,
}

/// Why a handshake was ended by this side.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// The certificate.
    #[error(transparent)]
    Certificate(#[from] PeerCertificateError),
    /// A good certificate of somebody whom no rule admits.
    #[error("the peer is {0}, and no rule admits it here")]
    NotPermitted(SpiffeId),
}

impl Refusal for Rejection {
    fn culprit(&self) -> Culprit {
        match self {
            Rejection::Certificate(error) => error.culprit(),
            Rejection::NotPermitted(_) => Culprit::Policy,
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Rejection::Certificate(error) => error.code(),
            Rejection::NotPermitted(_) => "peer-not-permitted",
        }
    }
}

/// Tells rustls of a rejection, so that the peer gets the alert that RFC 9846 section 6.2 has for it.
impl From<&Rejection> for CertificateError {
    fn from(rejection: &Rejection) -> Self {
        use PeerCertificateError as E;
        let error = match rejection {
            // access_denied
            Rejection::NotPermitted(_) => return CertificateError::ApplicationVerificationFailure,
            Rejection::Certificate(error) => error,
        };
        match error {
            // bad_certificate
            E::Missing | E::TooLong(_) | E::Malformed(_) | E::UriCount(_) | E::Id { .. } => {
                CertificateError::BadEncoding
            }
            // unsupported_certificate
            E::Authority | E::KeyUsage(_) | E::Purpose(_) => CertificateError::InvalidPurpose,
            // unknown_ca
            E::UnknownTrustDomain(_) | E::BundleExpired(_) | E::ListExpired { .. } | E::Untrusted { .. } => {
                CertificateError::UnknownIssuer
            }
            // certificate_revoked
            E::Revoked { .. } => CertificateError::Revoked,
            // certificate_expired, which is also for one that is not valid yet
            E::Expired { .. } => CertificateError::Expired,
            E::NotYetValid { .. } => CertificateError::NotValidYet,
        }
    }
}

/// Verifies the peer of one handshake, and keeps the verdict.
///
/// One for each connection: it refuses to judge a second peer, so that a verdict is never taken for that of another one.
#[derive(Debug)]
pub struct PeerVerifier {
    role: Role,
    trust: Arc<Trust>,
    peers: Peers,
    verdict: OnceLock<Result<Admitted, Rejection>>,
}

impl PeerVerifier {
    /// For a handshake with a peer in this role.
    pub fn new(role: Role, trust: Arc<Trust>, peers: Peers) -> Arc<Self> {
        Arc::new(Self { role, trust, peers, verdict: OnceLock::new() })
    }

    /// What became of the peer's certificate; `None` before it came.
    pub fn verdict(&self) -> Option<&Result<Admitted, Rejection>> {
        self.verdict.get()
    }

    fn judge(
        &self,
        role: Role,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), TlsError> {
        if role != self.role {
            return Err(TlsError::General("a verifier was used for the other role".into()));
        }
        let chain: Vec<_> = std::iter::once(leaf).chain(intermediates).cloned().collect();
        let verdict = verify_chain(&chain, role, &self.trust, now).map_err(Rejection::from).and_then(|peer| {
            let rule = self.peers.admits(&peer.id).cloned();
            let rule = rule.ok_or_else(|| Rejection::NotPermitted(peer.id.clone()))?;
            Ok(Admitted { peer, rule })
        });
        let answer = verdict.as_ref().map(|_| ()).map_err(|rejection| TlsError::InvalidCertificate(rejection.into()));
        if self.verdict.set(verdict).is_err() {
            return Err(TlsError::General("a verifier was used for a second handshake".into()));
        }
        answer
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        self.judge(Role::Server, end_entity, intermediates, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, cert, dss, &ALGORITHMS)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ALGORITHMS.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn offer_client_auth(&self) -> bool {
        true
    }

    /// A client without a certificate ends the handshake (R43).
    fn client_auth_mandatory(&self) -> bool {
        true
    }

    /// Empty: names of authorities would tell every stranger who is trusted here, and a workload has one SVID anyway.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        self.judge(Role::Client, end_entity, intermediates, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, cert, dss, &ALGORITHMS)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ALGORITHMS.supported_schemes()
    }
}

fn only_tls13() -> TlsError {
    TlsError::PeerIncompatible(PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig)
}

#[cfg(test)]
mod tests;
