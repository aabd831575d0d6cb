//! The judgement of a certificate: a chain in, the peer's SPIFFE ID out. Pure: chain, role, trust and time decide.
//!
//! Host names play no part: what is dialled is mapped to an expected identity by the policy (R18, R47, R48).
//!
//! *Invariant:* a chain is only ever checked against the anchors and revocation lists of the trust domain that its leaf
//! names (R37, R39).

use super::{
    Malformed,
    bundle::{Trust, TrustPath},
    x509::{Parsed, display_time, from_unix_time},
};
use crate::{
    refusal::{Culprit, Refusal},
    spiffe::{InvalidId, SpiffeId, TrustDomain},
};
use rustls::{
    crypto::WebPkiSupportedAlgorithms,
    pki_types::{CertificateDer, UnixTime},
};
use std::{
    sync::{Arc, LazyLock},
    time::SystemTime,
};
use webpki::{
    CertRevocationList, ExpirationPolicy, RevocationCheckDepth, RevocationOptions, RevocationOptionsBuilder,
    UnknownStatusPolicy,
};

/// The longest chain that is looked at, leaf included. SPIRE's nested deployments need four.
pub const LONGEST_CHAIN: usize = 8;

/// What the peer is in this handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It was dialled.
    Server,
    /// It dialled.
    Client,
}

/// A peer whose certificate is good. Whether it may talk to us is not decided by this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedPeer {
    /// Who it is.
    pub id: SpiffeId,
    /// End of its certificate's validity.
    pub not_after: SystemTime,
    /// Its certificate's serial number in hexadecimal, for the audit line.
    pub serial: String,
    /// By what it was verified: what may be revoked, or taken out of the bundle, later.
    pub path: Arc<TrustPath>,
}

/// What is wrong with a peer's certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerCertificateError {
    /// It sent none.
    #[error("the peer sent no certificate: mutual TLS needs one")]
    Missing,
    /// It sent very many.
    #[error("the peer's chain has {0} certificates, more than {LONGEST_CHAIN}")]
    TooLong(usize),
    /// It cannot be read, or not in one way only.
    #[error("the peer's certificate cannot be read: {0}")]
    Malformed(#[from] Malformed),
    /// None, or more than one, of any scheme (R24).
    #[error("the peer's certificate carries {0} URI names; an X.509-SVID carries exactly one")]
    UriCount(usize),
    /// The URI is no SPIFFE ID of a workload (R36).
    #[error("the peer's certificate carries {uri:?}, which is no SPIFFE ID of a workload: {source}")]
    Id {
        /// As it stands there, at most a part of it.
        uri: String,
        /// What is wrong with it.
        source: InvalidId,
    },
    /// An authority must not be used as a workload (R32, R36).
    #[error("the peer's certificate is that of an authority (cA is true), not of a workload")]
    Authority,
    /// Key usage (R29, R36).
    #[error("the peer's certificate {0}")]
    KeyUsage(&'static str),
    /// Extended key usage (R31, R45).
    #[error("the peer's certificate is not for use as a {0}: its extended key usage lacks it")]
    Purpose(&'static str),
    /// No bundle for its trust domain (R61).
    #[error("the peer is of trust domain {0}, for which there is no trust bundle: add [[trust]] to trust it")]
    UnknownTrustDomain(TrustDomain),
    /// A bundle, but nothing in it is valid now.
    #[error("no anchor in the trust bundle of {0} is valid now: get its current bundle")]
    BundleExpired(TrustDomain),
    /// It, or an authority between it and the anchor, has expired.
    #[error("the peer's certificate chain expired at {not_after}, and the clock says {now}")]
    Expired {
        /// When.
        not_after: String,
        /// What the clock says.
        now: String,
    },
    /// It, or an authority between it and the anchor, has not begun.
    #[error("the peer's certificate chain is not valid before {not_before}, and the clock says {now}")]
    NotYetValid {
        /// When it begins.
        not_before: String,
        /// What the clock says.
        now: String,
    },
    /// It, or an authority between it and the anchor, is on a revocation list (R39).
    #[error(
        "the peer says that it is {id}, but its certificate {serial}, or one between it and the anchor, is on the \
         revocation list of {}: give it a new one",
        id.trust_domain()
    )]
    Revoked {
        /// Whom it claims to be.
        id: SpiffeId,
        /// Serial number of its certificate in hexadecimal.
        serial: String,
    },
    /// What the revocation list says is too old to go by (R39).
    #[error(
        "the revocation list of {domain} was good until {next_update}, and the clock says {now}: put the current one \
         there (bunter ca revoke --refresh signs that of an embedded authority anew) and reload with SIGHUP"
    )]
    ListExpired {
        /// Whose it is.
        domain: TrustDomain,
        /// When it must have been replaced.
        next_update: String,
        /// What the clock says.
        now: String,
    },
    /// It does not lead to an anchor of its own trust domain (R37).
    #[error("the peer says that it is {id}, but its certificate does not lead to an authority of {}: {why}", id.trust_domain())]
    Untrusted {
        /// Whom it claims to be.
        id: SpiffeId,
        /// What the path validation says.
        why: String,
    },
}

/// Verifies a peer's certificate chain, leaf first, as it came off the wire (R35 to R37, R44, R45, R61).
pub fn verify_peer(
    chain: &[CertificateDer<'_>],
    role: Role,
    trust: &Trust,
    now: UnixTime,
) -> Result<SpiffeId, PeerCertificateError> {
    verify_chain(chain, role, trust, now).map(|peer| peer.id)
}

/// The same, with more about the certificate.
pub fn verify_chain(
    chain: &[CertificateDer<'_>],
    role: Role,
    trust: &Trust,
    now: UnixTime,
) -> Result<VerifiedPeer, PeerCertificateError> {
    let (leaf, intermediates) = chain.split_first().ok_or(PeerCertificateError::Missing)?;
    if chain.len() > LONGEST_CHAIN {
        return Err(PeerCertificateError::TooLong(chain.len()));
    }
    let parsed = Parsed::parse(leaf)?;
    let id = workload_id(&parsed)?;
    check_leaf(&parsed, role)?;
    let domain = id.trust_domain();
    let known = trust.anchors(&domain).ok_or_else(|| PeerCertificateError::UnknownTrustDomain(domain.clone()))?;
    let anchors = known.valid_at(now);
    if anchors.is_empty() {
        return Err(PeerCertificateError::BundleExpired(domain));
    }
    let untrusted = |error: webpki::Error| from_webpki(error, &id, &parsed, now);
    let end_entity = webpki::EndEntityCert::try_from(leaf).map_err(untrusted)?;
    // Two readers of the same bytes must see the same name.
    if end_entity.valid_uri_names().ne([id.as_str()]) {
        return Err(Malformed("its subject alternative names can be read in two ways").into());
    }
    let usage = match role {
        Role::Server => webpki::KeyUsage::server_auth(),
        Role::Client => webpki::KeyUsage::client_auth(),
    };
    let check_path = |path: &webpki::VerifiedPath<'_>| check_intermediates(path, &domain);
    let lists = known.revocations();
    let path = end_entity
        .verify_for_usage(ALGORITHMS.all, &anchors, intermediates, now, usage, revocation(&lists), Some(&check_path))
        .map_err(untrusted)?;
    let path = Arc::new(TrustPath::of(&path));
    Ok(VerifiedPeer { id, not_after: parsed.not_after(), serial: parsed.serial(), path })
}

/// How revocation lists count: for the whole path, and only while they are current. An authority without a list has
/// revoked nothing, since lists are optional.
fn revocation<'a>(lists: &'a [&'a CertRevocationList<'a>]) -> Option<RevocationOptions<'a>> {
    // This fails only where there are no lists, and then there is nothing to check.
    let options = RevocationOptionsBuilder::new(lists).ok()?;
    let options = options.with_depth(RevocationCheckDepth::Chain).with_status_policy(UnknownStatusPolicy::Allow);
    Some(options.with_expiration_policy(ExpirationPolicy::Enforce).build())
}

impl Refusal for PeerCertificateError {
    fn culprit(&self) -> Culprit {
        match self {
            PeerCertificateError::UnknownTrustDomain(_) => Culprit::Policy,
            PeerCertificateError::BundleExpired(_) | PeerCertificateError::ListExpired { .. } => Culprit::Host,
            _ => Culprit::Peer,
        }
    }
    fn code(&self) -> &'static str {
        match self {
            PeerCertificateError::Missing => "peer-no-certificate",
            PeerCertificateError::TooLong(_) => "peer-chain-too-long",
            PeerCertificateError::Malformed(_) => "peer-certificate-malformed",
            PeerCertificateError::UriCount(_) => "peer-uri-count",
            PeerCertificateError::Id { .. } => "peer-id-invalid",
            PeerCertificateError::Authority => "peer-certificate-is-authority",
            PeerCertificateError::KeyUsage(_) => "peer-key-usage",
            PeerCertificateError::Purpose(_) => "peer-key-purpose",
            PeerCertificateError::UnknownTrustDomain(_) => "peer-trust-domain-unknown",
            PeerCertificateError::BundleExpired(_) => "peer-bundle-expired",
            PeerCertificateError::Expired { .. } => "peer-certificate-expired",
            PeerCertificateError::NotYetValid { .. } => "peer-certificate-not-yet-valid",
            PeerCertificateError::Revoked { .. } => "peer-certificate-revoked",
            PeerCertificateError::ListExpired { .. } => "peer-crl-expired",
            PeerCertificateError::Untrusted { .. } => "peer-untrusted",
        }
    }
}

/// Signature algorithms of aws-lc-rs, in certificates and in the handshake.
pub static ALGORITHMS: LazyLock<WebPkiSupportedAlgorithms> =
    LazyLock::new(|| rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms);

/// Exactly one URI of any scheme, and it is the SPIFFE ID of a workload, byte for byte as it is printed (R13, R24, R36).
fn workload_id(parsed: &Parsed<'_>) -> Result<SpiffeId, PeerCertificateError> {
    let uris = parsed.uris()?;
    let [uri] = uris.as_slice() else { return Err(PeerCertificateError::UriCount(uris.len())) };
    let id = SpiffeId::parse(uri)
        .map_err(|source| PeerCertificateError::Id { uri: uri.chars().take(256).collect(), source })?;
    if id.as_str() != *uri {
        return Err(Malformed("its SPIFFE ID is not in its canonical form").into());
    }
    Ok(id)
}

fn check_leaf(parsed: &Parsed<'_>, role: Role) -> Result<(), PeerCertificateError> {
    if parsed.is_ca()? {
        return Err(PeerCertificateError::Authority);
    }
    let usage = parsed.key_usage()?.ok_or(PeerCertificateError::KeyUsage("has no key usage"))?;
    if usage.key_cert_sign || usage.crl_sign {
        return Err(PeerCertificateError::KeyUsage("has a key usage that allows to sign certificates or CRLs"));
    }
    if !usage.digital_signature {
        return Err(PeerCertificateError::KeyUsage("has a key usage that lacks digitalSignature"));
    }
    match (parsed.purposes()?, role) {
        (Some(purposes), Role::Server) if !purposes.server => Err(PeerCertificateError::Purpose("server")),
        (Some(purposes), Role::Client) if !purposes.client => Err(PeerCertificateError::Purpose("client")),
        _ => Ok(()),
    }
}

/// What the path validation leaves out about authorities between leaf and anchor: the key usage (RFC 5280 section 6.1.4
/// (n)), and that an authority whose certificate carries a URI is of the same trust domain (R32, R37).
fn check_intermediates(path: &webpki::VerifiedPath<'_>, domain: &TrustDomain) -> Result<(), webpki::Error> {
    let own = format!("spiffe://{domain}");
    for certificate in path.intermediate_certificates() {
        let der = certificate.der();
        let parsed = Parsed::parse(&der).map_err(|_| webpki::Error::BadDer)?;
        let usage = parsed.key_usage().map_err(|_| webpki::Error::BadDer)?;
        if usage.is_some_and(|usage| !usage.key_cert_sign) {
            return Err(webpki::Error::EndEntityUsedAsCa);
        }
        let uris = parsed.uris().map_err(|_| webpki::Error::BadDer)?;
        if uris.iter().any(|uri| *uri != own) {
            return Err(webpki::Error::NameConstraintViolation);
        }
    }
    Ok(())
}

fn from_webpki(error: webpki::Error, id: &SpiffeId, leaf: &Parsed<'_>, now: UnixTime) -> PeerCertificateError {
    let time = |time: UnixTime| display_time(from_unix_time(time));
    match error {
        webpki::Error::CertExpired { not_after, .. } => {
            PeerCertificateError::Expired { not_after: time(not_after), now: time(now) }
        }
        webpki::Error::CertNotValidYet { not_before, .. } => {
            PeerCertificateError::NotYetValid { not_before: time(not_before), now: time(now) }
        }
        webpki::Error::CertRevoked => PeerCertificateError::Revoked { id: id.clone(), serial: leaf.serial() },
        webpki::Error::CrlExpired { next_update, .. } => PeerCertificateError::ListExpired {
            domain: id.trust_domain(),
            next_update: time(next_update),
            now: time(now),
        },
        webpki::Error::BadDer | webpki::Error::BadDerTime | webpki::Error::ExtensionValueInvalid => {
            Malformed("it is not well-formed X.509").into()
        }
        error => PeerCertificateError::Untrusted { id: id.clone(), why: error.to_string() },
    }
}

#[cfg(test)]
mod tests;
