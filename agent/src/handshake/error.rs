//! Why a handshake failed: whose fault, a stable code, a sentence.
//!
//! *Invariant:* an error gives the permit back, so that the caller still has the flow, its socket and what the audit
//! record needs; it holds no secret.

use super::verify::{PeerVerifier, Rejection};
use crate::authorize::Permit;
use bunter_identity::{
    refusal::{Culprit, Refusal},
    spiffe::SpiffeId,
};
use rustls::{AlertDescription, CertificateError, PeerIncompatible, PeerMisbehaved};
use std::{
    fmt,
    io::{self, ErrorKind},
};

/// A failed handshake.
#[derive(Debug)]
pub struct Error {
    cause: Cause,
    peer: Option<SpiffeId>,
    permit: Box<Permit>,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// Not TLS at all.
    #[error("the peer does not speak TLS (byte {first:#04x} where a record should begin): let it use TLS 1.3 here")]
    NotTls {
        /// The offending byte.
        first: u8,
    },
    /// A record or a handshake that is too long.
    #[error("the peer sent a record or a handshake that is longer than TLS 1.3 allows here")]
    Oversized,
    /// The peer does not offer TLS 1.3.
    #[error("the peer does not offer TLS 1.3: upgrade it")]
    Version,
    /// The peer and this host have nothing in common here.
    #[error("the peer has no {0} in common with this host")]
    Incompatible(&'static str),
    /// No certificate.
    #[error("the peer showed no certificate: give it an X.509-SVID")]
    NoCertificate,
    /// The verifier refused the peer: its certificate is not good, or no rule admits it.
    #[error(transparent)]
    Rejected(Rejection),
    /// The peer's certificate is good, but its signature with the certificate's key is not.
    #[error("the peer's certificate was refused: {0}")]
    Certificate(CertificateError),
    /// The handshake is over and nobody judged the peer.
    #[error("the handshake ended without a verdict on the peer: this is a defect, please report it")]
    Unjudged,
    /// Time is up.
    #[error("the peer did not finish the handshake in time")]
    Stalled,
    /// The peer went away.
    #[error("the peer closed the connection during the handshake")]
    Closed,
    /// The peer reset the connection.
    #[error("the peer reset the connection during the handshake")]
    Reset,
    /// The peer refused the handshake.
    #[error("the peer refused the handshake with the alert {}", alert_name(u8::from(*.0)))]
    Alert(AlertDescription),
    /// The peer broke the protocol.
    #[error("the peer broke the TLS protocol: {0}")]
    Protocol(rustls::Error),
    /// The socket failed.
    #[error("the connection to the peer failed: {0}")]
    Network(#[source] io::Error),
    /// rustls would not start or end as configured.
    #[error("this host could not run the handshake: {0}")]
    Unready(rustls::Error),
}

impl Error {
    /// The verifier's rejection says more than rustls's error can, so it is the one that is reported.
    pub(super) fn judged(cause: Cause, judge: &PeerVerifier, permit: Permit) -> Self {
        let (peer, rejection) = match judge.verdict() {
            Some(Ok(admitted)) => (Some(admitted.peer.id.clone()), None),
            Some(Err(rejection @ Rejection::NotPermitted(id))) => (Some(id.clone()), Some(rejection)),
            Some(Err(rejection)) => (None, Some(rejection)),
            None => (None, None),
        };
        let cause = rejection.map_or(cause, |rejection| Cause::Rejected(rejection.clone()));
        Self { cause, peer, permit: Box::new(permit) }
    }
    /// What went wrong.
    pub fn cause(&self) -> &Cause {
        &self.cause
    }
    /// Who the peer proved to be, if it came that far.
    pub fn peer(&self) -> Option<&SpiffeId> {
        self.peer.as_ref()
    }
    /// The permit, with the flow's own socket.
    pub fn permit(&self) -> &Permit {
        &self.permit
    }
    /// Did the peer decline because it knows none of the protocols that were offered to it (RFC 7301 section 3.2)? It may
    /// accept a handshake without the offer.
    pub fn declines_offer(&self) -> bool {
        matches!(self.cause, Cause::Alert(AlertDescription::NoApplicationProtocol))
    }
    /// Takes it apart.
    pub fn into_parts(self) -> (Cause, Permit) {
        (self.cause, *self.permit)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.peer {
            Some(peer) => write!(f, "{peer}: {}", self.cause),
            None => self.cause.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

impl Refusal for Error {
    fn culprit(&self) -> Culprit {
        self.cause.culprit()
    }

    fn code(&self) -> &'static str {
        self.cause.code()
    }
}

impl Refusal for Cause {
    fn culprit(&self) -> Culprit {
        match self {
            Self::Rejected(rejection) => rejection.culprit(),
            Self::Network(_) => Culprit::Host,
            Self::Unready(_) | Self::Unjudged => Culprit::Ourselves,
            _ => Culprit::Peer,
        }
    }

    fn code(&self) -> &'static str {
        match self {
            Self::NotTls { .. } => "peer-not-tls",
            Self::Oversized => "peer-record-too-long",
            Self::Version => "peer-tls-version",
            Self::Incompatible(_) => "peer-tls-incompatible",
            Self::NoCertificate => "peer-no-certificate",
            Self::Rejected(rejection) => rejection.code(),
            Self::Certificate(_) => "peer-certificate-signature",
            Self::Unjudged => "peer-unjudged",
            Self::Stalled => "peer-stalled",
            Self::Closed => "peer-closed",
            Self::Reset => "peer-reset",
            Self::Alert(alert) => alert_code(u8::from(*alert)),
            Self::Protocol(_) => "peer-tls-protocol",
            Self::Network(_) => "network-error",
            Self::Unready(_) => "handshake-unready",
        }
    }
}

impl Cause {
    pub(super) fn unready(error: rustls::Error) -> Self {
        Self::Unready(error)
    }

    pub(super) fn from_io(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted => Self::Reset,
            _ => Self::Network(error),
        }
    }

    pub(super) fn from_rustls(error: rustls::Error, as_client: bool) -> Self {
        use rustls::Error as Tls;
        match error {
            Tls::AlertReceived(alert) => Self::Alert(alert),
            Tls::NoCertificatesPresented => Self::NoCertificate,
            Tls::InvalidCertificate(reason) => Self::Certificate(reason),
            Tls::PeerSentOversizedRecord => Self::Oversized,
            Tls::PeerIncompatible(reason) => match reason {
                PeerIncompatible::SupportedVersionsExtensionRequired
                | PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
                | PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::Tls12NotOfferedOrEnabled => Self::Version,
                PeerIncompatible::NoCipherSuitesInCommon => Self::Incompatible("cipher suite"),
                PeerIncompatible::NoKxGroupsInCommon
                | PeerIncompatible::NamedGroupsExtensionRequired
                | PeerIncompatible::KeyShareExtensionRequired => Self::Incompatible("key exchange group"),
                PeerIncompatible::NoSignatureSchemesInCommon
                | PeerIncompatible::NoCertificateRequestSignatureSchemesInCommon
                | PeerIncompatible::SignatureAlgorithmsExtensionRequired => Self::Incompatible("signature scheme"),
                other => Self::Protocol(Tls::PeerIncompatible(other)),
            },
            Tls::PeerMisbehaved(PeerMisbehaved::SelectedUnofferedCipherSuite) if as_client => {
                Self::Incompatible("cipher suite")
            }
            Tls::General(_) | Tls::FailedToGetCurrentTime | Tls::FailedToGetRandomBytes | Tls::EncryptError => {
                Self::Unready(error)
            }
            other => Self::Protocol(other),
        }
    }

    /// The alert for a cause that rustls did not see, or has no alert for (RFC 9846 sections 5.1 and 6.2).
    pub(super) fn plain_alert(&self) -> Option<u8> {
        match self {
            Self::NotTls { .. } => Some(u8::from(AlertDescription::UnexpectedMessage)),
            Self::Oversized => Some(u8::from(AlertDescription::RecordOverflow)),
            Self::Protocol(rustls::Error::InvalidMessage(_)) => Some(u8::from(AlertDescription::DecodeError)),
            Self::Protocol(_) => Some(u8::from(AlertDescription::UnexpectedMessage)),
            _ => None,
        }
    }
}

macro_rules! alerts {
    ($($number:literal $name:literal),* $(,)?) => {
        /// The name of an alert, as RFC 9846 section 6 writes it.
        pub fn alert_name(description: u8) -> &'static str {
            match description { $($number => $name,)* _ => "unknown" }
        }
        /// The code of a refusal by the peer.
        pub(crate) fn alert_code(description: u8) -> &'static str {
            match description { $($number => concat!("peer-alert:", $name),)* _ => "peer-alert:unknown" }
        }
    };
}

alerts! {
    0 "close_notify", 10 "unexpected_message", 20 "bad_record_mac", 21 "decryption_failed", 22 "record_overflow",
    40 "handshake_failure", 42 "bad_certificate", 43 "unsupported_certificate", 44 "certificate_revoked",
    45 "certificate_expired", 46 "certificate_unknown", 47 "illegal_parameter", 48 "unknown_ca", 49 "access_denied",
    50 "decode_error", 51 "decrypt_error", 52 "too_many_cids_requested", 70 "protocol_version",
    71 "insufficient_security", 80 "internal_error", 86 "inappropriate_fallback", 90 "user_canceled",
    100 "no_renegotiation", 109 "missing_extension", 110 "unsupported_extension", 111 "certificate_unobtainable",
    112 "unrecognized_name", 113 "bad_certificate_status_response", 114 "bad_certificate_hash_value",
    115 "unknown_psk_identity", 116 "certificate_required", 117 "general_error", 120 "no_application_protocol",
    121 "ech_required",
}
