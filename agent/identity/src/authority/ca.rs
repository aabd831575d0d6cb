//! The embedded authority: a directory with one certificate and one key, SVIDs out.
//!
//! It is meant for one host and for labs. `ca.key` is the only long-lived secret; the keys of SVIDs are made for one
//! certificate each and live only as long as it does (R41).
//!
//! *Invariant:* an authority that is expired, exposed, or of another trust domain is never loaded, and no certificate
//! that it signs outlives it.

use crate::{
    refusal::{Culprit, Refusal},
    spiffe::{InvalidId, SpiffeId, TrustDomain},
    trust::{
        bundle::{Anchors, AuthorityFault, BundleError, Validity, check_authority, other_domain},
        files::{self, FileError, Guard},
        pem::{self, Content, Section, Unread},
        x509::{Parsed, display_time, hex, unix_time},
    },
};
use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair},
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyUsagePurpose, SanType, string::Ia5String,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};
use zeroize::Zeroizing;

/// The authority's certificate, in its directory.
pub const CERTIFICATE_FILE: &str = "ca.pem";
/// The authority's key, in its directory.
pub const KEY_FILE: &str = "ca.key";
/// The list of the certificates that it revoked, in its directory, where it revoked any.
pub const LIST_FILE: &str = "crl.pem";
/// How long a new authority lasts unless told otherwise: ten years.
pub const DEFAULT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Certificates begin so long before they are made, for peers whose clocks are a little slow.
const LEEWAY: Duration = Duration::from_secs(10);

/// An authority that can sign: certificate and key, loaded and checked.
pub struct Authority {
    domain: TrustDomain,
    certificate: CertificateDer<'static>,
    validity: Validity,
    anchors: Anchors,
    issuer: Issuer<'static, SigningKey>,
}

/// An X.509-SVID as it was made, with its key.
pub struct Issued {
    /// The certificate. The authority signed it itself, so it is the whole chain.
    pub certificate: CertificateDer<'static>,
    /// Its key, PKCS#8.
    pub key: Zeroizing<Vec<u8>>,
    /// First second of its validity.
    pub not_before: SystemTime,
    /// Last second of its validity: never after the authority's own.
    pub not_after: SystemTime,
    /// Its serial number in hexadecimal.
    pub serial: String,
}

/// Why an authority cannot be made, loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// One of its files.
    #[error("certificate authority: {error}{hint}", error = .0, hint = hint(.0))]
    File(FileError),
    /// There is one already.
    #[error("{path} is there already: Bunter does not overwrite an authority. Use it, or take another directory")]
    Exists {
        /// The file that is in the way.
        path: PathBuf,
    },
    /// Something in it was not understood, so that nothing of it is taken.
    #[error("certificate authority: {path}:{fault}")]
    Unread {
        /// The file.
        path: PathBuf,
        /// What, and in which line.
        fault: Unread,
    },
    /// Not what the file should hold.
    #[error("certificate authority: {path}: {why}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The certificate cannot sign SVIDs.
    #[error("certificate authority: {path} is not an authority: {why}")]
    NotAnAuthority {
        /// The file.
        path: PathBuf,
        /// What it lacks.
        why: &'static str,
    },
    /// The certificate is of another trust domain.
    #[error(
        "certificate authority: {path} is of {found}, but the policy's trust domain is {expected}: give the authority \
         of {expected}, or make one with bunter ca init --trust-domain {expected}"
    )]
    OtherDomain {
        /// The file.
        path: PathBuf,
        /// What the certificate says.
        found: String,
        /// What it should say.
        expected: TrustDomain,
    },
    /// It has expired.
    #[error(
        "certificate authority: {path} expired at {not_after}: make a new one with bunter ca init in a new directory"
    )]
    Expired {
        /// The file.
        path: PathBuf,
        /// When.
        not_after: String,
    },
    /// It has not begun.
    #[error("certificate authority: {path} is not valid before {not_before}, and the clock says {now}: set the clock")]
    NotYetValid {
        /// The file.
        path: PathBuf,
        /// When it begins.
        not_before: String,
        /// What the clock says.
        now: String,
    },
    /// Certificate and key are not a pair.
    #[error("certificate authority: the key in {key} is not the key of {certificate}: put the right one there")]
    KeyMismatch {
        /// The certificate file.
        certificate: PathBuf,
        /// The key file.
        key: PathBuf,
    },
    /// What it issues is not accepted with its own certificate as the anchor.
    #[error(
        "certificate authority: {path}: an SVID that it signs does not verify: {why}. Make one with bunter ca init"
    )]
    Unfit {
        /// The certificate file.
        path: PathBuf,
        /// What the path validation says.
        why: String,
    },
    /// It was asked for an identity of another trust domain.
    #[error("the authority of {domain} cannot issue {id}: it is of another trust domain")]
    ForeignId {
        /// The authority's trust domain.
        domain: TrustDomain,
        /// What was asked for.
        id: SpiffeId,
    },
    /// It was asked for a certificate without any lifetime.
    #[error("a certificate cannot have a life of {0:?}: give it at least a second")]
    NoLife(Duration),
    /// The trust domain has no valid name.
    #[error("trust domain of the authority: {0}")]
    Domain(#[from] InvalidId),
    /// The cryptographic library failed.
    #[error("certificate authority: {what} failed: {why}. This is a defect of Bunter or of this host's random numbers")]
    Crypto {
        /// What was being done.
        what: &'static str,
        /// What the library says.
        why: String,
    },
}

impl Refusal for CaError {
    fn culprit(&self) -> Culprit {
        match self {
            CaError::Crypto { .. } => Culprit::Ourselves,
            CaError::ForeignId { .. } | CaError::NoLife(_) | CaError::Domain(_) => Culprit::Policy,
            _ => Culprit::Host,
        }
    }
    fn code(&self) -> &'static str {
        match self {
            CaError::File(FileError::Missing { .. }) => "ca-missing",
            CaError::File(FileError::Exposed { .. } | FileError::ForeignOwner { .. }) => "ca-permissions",
            CaError::File(_) => "ca-file",
            CaError::Exists { .. } => "ca-exists",
            CaError::Unread { .. } | CaError::Malformed { .. } => "ca-malformed",
            CaError::NotAnAuthority { .. } => "ca-not-an-authority",
            CaError::OtherDomain { .. } => "ca-other-domain",
            CaError::Expired { .. } => "ca-expired",
            CaError::NotYetValid { .. } => "ca-not-yet-valid",
            CaError::KeyMismatch { .. } => "ca-key-mismatch",
            CaError::Unfit { .. } => "ca-unfit",
            CaError::ForeignId { .. } => "ca-foreign-id",
            CaError::NoLife(_) => "ca-no-life",
            CaError::Domain(_) => "ca-trust-domain",
            CaError::Crypto { .. } => "ca-crypto",
        }
    }
}

// Written by hand, since `#[from]` would make it the source as well: its message prints the file error already.
impl From<FileError> for CaError {
    fn from(error: FileError) -> Self {
        Self::File(error)
    }
}

fn hint(error: &FileError) -> &'static str {
    match error {
        FileError::Missing { .. } => "; make an authority with bunter ca init, or name its directory in ca_dir",
        _ => "",
    }
}

/// `bunter ca init`: makes an authority in a directory that has none.
pub fn init(dir: &Path, domain: &TrustDomain, life: Duration, now: SystemTime) -> Result<Validity, CaError> {
    let (certificate_path, key_path) = (dir.join(CERTIFICATE_FILE), dir.join(KEY_FILE));
    files::make_directory(dir)?;
    files::check_directory(dir)?;
    for path in [&certificate_path, &key_path] {
        if std::fs::symlink_metadata(path).is_ok() {
            return Err(CaError::Exists { path: path.clone() });
        }
    }
    let serial = random_serial()?;
    let (key, document) = SigningKey::generate()?;
    let (not_before, not_after) = validity(now, life, None)?;
    let mut params = params(&serial, not_before, not_after);
    // The serial number is part of the name, so that two authorities of one trust domain never have the same name.
    params.distinguished_name = subject("authority", Some(&serial));
    params.subject_alt_names = vec![uri(&format!("spiffe://{domain}"))?];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key).map_err(|error| crypto("signing the authority", error))?;
    files::write(&key_path, files::pem("PRIVATE KEY", &document).as_bytes(), Guard::Secret, false)?;
    let written =
        files::write(&certificate_path, files::pem("CERTIFICATE", certificate.der()).as_bytes(), Guard::Public, false);
    if let Err(error) = written {
        // A key without its certificate would stand in the way of the next try.
        let _ = std::fs::remove_file(&key_path);
        return Err(error.into());
    }
    Ok(Authority::load(dir, Some(domain), now)?.validity)
}

/// `bunter ca issue`: an SVID for a peer that is not run by Bunter, as `svid.pem`, `key.pem` and `bundle.pem` in a
/// directory, each replaced as a whole (R89).
pub fn issue_files(dir: &Path, id: &SpiffeId, out: &Path, ttl: Duration, now: SystemTime) -> Result<Issued, CaError> {
    let authority = Authority::load(dir, None, now)?;
    let issued = authority.issue(id, ttl, now)?;
    files::make_directory(out)?;
    files::check_directory(out)?;
    files::write(&out.join("key.pem"), files::pem("PRIVATE KEY", &issued.key).as_bytes(), Guard::Secret, true)?;
    let svid = files::pem("CERTIFICATE", &issued.certificate);
    files::write(&out.join("svid.pem"), svid.as_bytes(), Guard::Public, true)?;
    let bundle = files::pem("CERTIFICATE", &authority.certificate);
    files::write(&out.join("bundle.pem"), bundle.as_bytes(), Guard::Public, true)?;
    Ok(issued)
}

impl Authority {
    /// Loads the authority of a directory, and checks it. `expected`: the trust domain that it must be of; without one,
    /// what its certificate says is taken.
    pub fn load(dir: &Path, expected: Option<&TrustDomain>, now: SystemTime) -> Result<Self, CaError> {
        let (certificate_path, key_path) = (dir.join(CERTIFICATE_FILE), dir.join(KEY_FILE));
        let pem = files::read(&certificate_path, Guard::Public)?;
        files::check_directory(dir)?;
        let certificate = one_section(&certificate_path, &pem, Content::Certificates)?.certificate();
        let domain = check_certificate(&certificate_path, &certificate, expected, now)?;
        let key = read_key(&key_path)?;
        let malformed = |why: String| CaError::Malformed { path: certificate_path.clone(), why };
        let parsed = Parsed::parse(&certificate).map_err(|error| malformed(error.to_string()))?;
        if parsed.public_key() != key.0.public_key().as_ref() {
            return Err(CaError::KeyMismatch { certificate: certificate_path, key: key_path });
        }
        let anchors = Anchors::parse(&domain, &certificate_path, &pem, now)
            .map_err(|error: BundleError| malformed(error.to_string()))?;
        let validity = anchors.validity().first().cloned().ok_or_else(|| malformed("holds no certificate".into()))?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|error| malformed(error.to_string()))?;
        let authority = Self { domain, certificate: certificate.clone(), validity, anchors, issuer };
        authority.prove(&certificate_path, now)?;
        Ok(authority)
    }

    /// Makes a key and a certificate for it (R23 to R30).
    pub fn issue(&self, id: &SpiffeId, ttl: Duration, now: SystemTime) -> Result<Issued, CaError> {
        if id.trust_domain() != self.domain {
            return Err(CaError::ForeignId { domain: self.domain.clone(), id: id.clone() });
        }
        let serial = random_serial()?;
        let (key, document) = SigningKey::generate()?;
        let (not_before, not_after) = validity(now, ttl, Some(self.validity.not_after))?;
        let mut params = params(&serial, not_before, not_after);
        params.distinguished_name = subject("workload", None);
        params.subject_alt_names = vec![uri(id.as_str())?];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer).map_err(|error| crypto("signing an SVID", error))?;
        Ok(Issued {
            certificate: certificate.der().clone(),
            key: document,
            not_before,
            not_after,
            serial: hex(&serial),
        })
    }

    /// Its trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// From when to when, and which one.
    pub fn validity(&self) -> &Validity {
        &self.validity
    }

    /// Did it issue this certificate?
    pub(super) fn has_issued(&self, certificate: &Parsed<'_>) -> Result<bool, CaError> {
        Ok(certificate.is_issued_by(&self.parsed()?))
    }

    /// The subject key identifier of its certificate.
    pub(super) fn key_identifier(&self) -> Result<Option<Vec<u8>>, CaError> {
        let parsed = self.parsed()?;
        let identifier = parsed.key_identifier().map_err(|error| crypto("reading the authority", error))?;
        Ok(identifier.map(<[u8]>::to_vec))
    }

    /// What signs its certificates and lists.
    pub(super) fn issuer(&self) -> &Issuer<'static, impl rcgen::SigningKey + use<>> {
        &self.issuer
    }

    fn parsed(&self) -> Result<Parsed<'_>, CaError> {
        Parsed::parse(&self.certificate).map_err(|error| crypto("reading the authority", error))
    }

    /// Itself as a trust anchor of its trust domain.
    pub fn anchors(&self) -> &Anchors {
        &self.anchors
    }

    /// Signs an SVID and verifies it, so that an authority made by other means fails at the start and not at the first
    /// handshake.
    fn prove(&self, path: &Path, now: SystemTime) -> Result<(), CaError> {
        let unfit = |error: webpki::Error| CaError::Unfit { path: path.into(), why: error.to_string() };
        let id = SpiffeId::parse(&format!("spiffe://{}/bunter/proof", self.domain))?;
        let issued = self.issue(&id, Duration::from_secs(60), now)?;
        let leaf = webpki::EndEntityCert::try_from(&issued.certificate).map_err(unfit)?;
        let anchors = self.anchors.valid_at(unix_time(now));
        let usage = webpki::KeyUsage::client_auth();
        leaf.verify_for_usage(webpki::ALL_VERIFICATION_ALGS, &anchors, &[], unix_time(now), usage, None, None)
            .map(|_| ())
            .map_err(unfit)
    }
}

impl Issued {
    /// Chain and key as rustls takes them.
    pub fn certified(&self) -> Result<rustls::sign::CertifiedKey, CaError> {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(&self.key[..]));
        let key = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&key)
            .map_err(|error| crypto("loading the key of an SVID", error))?;
        Ok(rustls::sign::CertifiedKey::new(vec![self.certificate.clone()], key))
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("trust_domain", &self.domain)
            .field("validity", &self.validity)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Issued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issued")
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// A P-256 key whose memory aws-lc wipes when it goes; no `Debug`, no `Clone`.
struct SigningKey(EcdsaKeyPair);

impl SigningKey {
    fn generate() -> Result<(Self, Zeroizing<Vec<u8>>), CaError> {
        let failed = |error: aws_lc_rs::error::Unspecified| crypto("making a key", error);
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).map_err(failed)?;
        // The document wipes itself when it goes.
        let document = key.to_pkcs8v1().map_err(failed)?;
        Ok((Self(key), Zeroizing::new(document.as_ref().to_vec())))
    }
}

impl rcgen::PublicKeyData for SigningKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.public_key().as_ref()
    }
    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl rcgen::SigningKey for SigningKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signature = self.0.sign(&SystemRandom::new(), message).map_err(|_| rcgen::Error::RemoteKeyError)?;
        Ok(signature.as_ref().to_vec())
    }
}

/// The one section of a file of the authority.
fn one_section(path: &Path, pem: &[u8], content: Content) -> Result<Section, CaError> {
    let mut sections = pem::sections(pem, content).map_err(|fault| CaError::Unread { path: path.into(), fault })?;
    let kind = if content == Content::Key { "private key" } else { "certificate" };
    let malformed = |why: String| CaError::Malformed { path: path.into(), why };
    if let Some(second) = sections.get(1) {
        let line = second.line;
        return Err(malformed(format!(
            "holds another {kind} in line {line}: leave the one of the authority alone in it"
        )));
    }
    sections.pop().ok_or_else(|| malformed(format!("holds no PEM {kind}: put that of the authority there")))
}

fn check_certificate(
    path: &Path,
    certificate: &CertificateDer<'_>,
    expected: Option<&TrustDomain>,
    now: SystemTime,
) -> Result<TrustDomain, CaError> {
    let malformed = |error: crate::trust::Malformed| CaError::Malformed { path: path.into(), why: error.to_string() };
    let parsed = Parsed::parse(certificate).map_err(malformed)?;
    check_authority(&parsed).map_err(|fault| match fault {
        AuthorityFault::Malformed(error) => malformed(error),
        AuthorityFault::NotAnAuthority(why) => CaError::NotAnAuthority { path: path.into(), why },
    })?;
    let uris = parsed.uris().map_err(malformed)?;
    let name = match uris.as_slice() {
        [uri] => uri.strip_prefix("spiffe://"),
        _ => None,
    };
    let name = name.ok_or(CaError::NotAnAuthority {
        path: path.into(),
        why: "it does not carry exactly one URI, spiffe:// and its trust domain",
    })?;
    let domain = TrustDomain::parse(name).map_err(|error| CaError::Malformed {
        path: path.into(),
        why: format!("its URI spiffe://{name} is no trust domain: {error}"),
    })?;
    if let Some(expected) = expected
        && let Some(found) = other_domain(&parsed, expected).map_err(malformed)?
    {
        return Err(CaError::OtherDomain { path: path.into(), found, expected: expected.clone() });
    }
    if now < parsed.not_before() {
        let not_before = display_time(parsed.not_before());
        return Err(CaError::NotYetValid { path: path.into(), not_before, now: display_time(now) });
    }
    if now >= parsed.not_after() {
        return Err(CaError::Expired { path: path.into(), not_after: display_time(parsed.not_after()) });
    }
    Ok(domain)
}

fn read_key(path: &Path) -> Result<SigningKey, CaError> {
    let malformed = |why: String| CaError::Malformed { path: path.into(), why };
    let pem = files::read(path, Guard::Secret)?;
    let section = one_section(path, &pem, Content::Key)?;
    let key = EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_ASN1_SIGNING, &section.der);
    key.map(SigningKey).map_err(|error| malformed(format!("holds no ECDSA P-256 key: {error}")))
}

/// Certificates count in whole seconds: cut here, so that what is written down and what is signed are the same.
pub(super) fn validity(
    now: SystemTime,
    life: Duration,
    limit: Option<SystemTime>,
) -> Result<(SystemTime, SystemTime), CaError> {
    let seconds = unix_time(now).as_secs();
    let life = life.as_secs();
    if life == 0 {
        return Err(CaError::NoLife(Duration::ZERO));
    }
    // RFC 5280 section 4.1.2.5 has four digits for the year.
    const LAST: u64 = 253_402_300_799;
    let limit = limit.map_or(LAST, |limit| unix_time(limit).as_secs());
    let at = |seconds: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.min(LAST));
    Ok((at(seconds.saturating_sub(LEEWAY.as_secs())), at(seconds.saturating_add(life).min(limit))))
}

fn params(serial: &[u8], not_before: SystemTime, not_after: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.serial_number = Some(rcgen::SerialNumber::from_slice(serial));
    params.not_before = not_before.into();
    params.not_after = not_after.into();
    params
}

/// Never empty, so that the names do not have to be critical (R27), and the same for every workload: the identity is in
/// the URI alone.
fn subject(role: &str, serial: Option<&[u8]>) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, "Bunter");
    subject.push(DnType::CommonName, serial.map_or_else(|| role.into(), |serial| format!("{role} {}", hex(serial))));
    subject
}

fn uri(text: &str) -> Result<SanType, CaError> {
    Ia5String::try_from(text).map(SanType::URI).map_err(|error| crypto("writing a URI name", error))
}

/// 127 random bits with the highest one set: positive, never zero, at most 20 octets (RFC 5280 section 4.1.2.2).
fn random_serial() -> Result<[u8; 16], CaError> {
    let mut serial = [0u8; 16];
    aws_lc_rs::rand::fill(&mut serial).map_err(|error| crypto("random numbers", error))?;
    let [first, ..] = &mut serial;
    *first = *first & 0x7f | 0x40;
    Ok(serial)
}

fn crypto(what: &'static str, why: impl std::fmt::Display) -> CaError {
    CaError::Crypto { what, why: why.to_string() }
}

#[cfg(test)]
mod tests;
