//! Trust bundles: whose signatures count, for each trust domain by itself.
//!
//! A bundle is a PEM file of authority certificates, and beside it there may be one of the lists of what they revoked.
//! [`Trust`] is an immutable snapshot of all of them; whoever verifies a peer holds one snapshot for the whole handshake.
//!
//! *Invariant:* anchors of different trust domains are never in one list (R64): there is no function that returns
//! anchors without having been told the trust domain.

use super::{
    crl::{self, CrlError, IssuerAndSerial, List},
    files::{self, FileError, Guard},
    pem::{self, Content, Unread},
    x509::{Parsed, display_time, from_unix_time, unix_time},
};
use crate::{
    refusal::{Culprit, Refusal},
    spiffe::TrustDomain,
};
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use std::{
    borrow::Cow,
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};
use webpki::CertRevocationList;

/// Trust domains and the anchors of each. Cheap to look at, never changed: a new bundle makes a new snapshot.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    domains: BTreeMap<TrustDomain, Anchors>,
}

/// The anchors of one trust domain, and their lists of revoked certificates.
#[derive(Clone, Debug, Default)]
pub struct Anchors {
    anchors: Vec<TrustAnchor<'static>>,
    validity: Vec<Validity>,
    certificates: Vec<CertificateDer<'static>>,
    lists: Vec<Arc<List>>,
}

/// By what a peer was verified: what has to hold for as long as its connection is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustPath {
    /// Its certificate, and those of the authorities between it and the anchor.
    certificates: Box<[IssuerAndSerial]>,
    /// The anchor's public key, since a new authority may have the name of the one that it replaces.
    anchor: Box<[u8]>,
}

impl TrustPath {
    /// As the path validation found it.
    pub(crate) fn of(path: &webpki::VerifiedPath<'_>) -> Self {
        let below_anchor = path.intermediate_certificates().map(IssuerAndSerial::read);
        let leaf = IssuerAndSerial::read(path.end_entity());
        Self {
            certificates: std::iter::once(leaf).chain(below_anchor).collect(),
            anchor: path.anchor().subject_public_key_info.as_ref().into(),
        }
    }

    /// Its certificates, leaf first.
    pub fn certificates(&self) -> &[IssuerAndSerial] {
        &self.certificates
    }
}

/// From when to when, and which certificate, for `bunter status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Validity {
    /// First second of its validity.
    pub not_before: SystemTime,
    /// Last second of its validity.
    pub not_after: SystemTime,
    /// Its subject, for people.
    pub subject: String,
    /// Its serial number in hexadecimal.
    pub serial: String,
}

/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The file itself.
    #[error("trust bundle of {domain}: {source}")]
    File {
        /// Trust domain that it is for.
        domain: TrustDomain,
        /// What is wrong with it.
        source: FileError,
    },
    /// No certificate in it.
    #[error("trust bundle of {domain}: {path}: holds no certificate: put the PEM certificates of its authority there")]
    Empty {
        /// Trust domain that it is for.
        domain: TrustDomain,
        /// The file.
        path: PathBuf,
    },
    /// Something in it was not understood, so that nothing of it is taken.
    #[error("trust bundle of {domain}: {path}:{fault}")]
    Unread {
        /// Trust domain that it is for.
        domain: TrustDomain,
        /// The file.
        path: PathBuf,
        /// What, and in which line.
        fault: Unread,
    },
    /// Not a certificate.
    #[error("trust bundle of {domain}: {path}: certificate {number}: {why}")]
    Malformed {
        /// Trust domain that it is for.
        domain: TrustDomain,
        /// The file.
        path: PathBuf,
        /// Which one in the file, from 1.
        number: usize,
        /// What is wrong.
        why: String,
    },
    /// A certificate that cannot sign others.
    #[error(
        "trust bundle of {domain}: {path}: certificate {number} ({subject}) is not an authority: {why}. Put the \
         certificate of the authority there, not one that it issued"
    )]
    NotAnAuthority {
        /// Trust domain that it is for.
        domain: TrustDomain,
        /// The file.
        path: PathBuf,
        /// Which one in the file, from 1.
        number: usize,
        /// Whose it is.
        subject: String,
        /// What it lacks.
        why: &'static str,
    },
    /// A certificate that says that it belongs to another trust domain.
    #[error(
        "trust bundle of {domain}: {path}: certificate {number} says that it is {found}, not spiffe://{domain}: bundles \
         of different trust domains must not be mixed"
    )]
    OtherDomain {
        /// Trust domain that the bundle is for.
        domain: TrustDomain,
        /// The file.
        path: PathBuf,
        /// Which one in the file, from 1.
        number: usize,
        /// The URI that it carries.
        found: String,
    },
    /// None of its certificates is valid today.
    #[error(
        "trust bundle of {domain}: {path}: none of its certificates is valid at {now} (the last one from {not_before} to \
         {not_after}): get the current bundle, or set the clock"
    )]
    NotValidNow {
        /// Trust domain that it is for.
        domain: TrustDomain,
        /// The file.
        path: PathBuf,
        /// The time that was looked at.
        now: String,
        /// Validity of the one that lasts longest.
        not_before: String,
        /// Validity of the one that lasts longest.
        not_after: String,
    },
}

impl Refusal for BundleError {
    fn culprit(&self) -> Culprit {
        Culprit::Host
    }
    fn code(&self) -> &'static str {
        match self {
            BundleError::File { source, .. } => match source {
                FileError::Missing { .. } => "bundle-missing",
                FileError::Exposed { .. } | FileError::ForeignOwner { .. } => "bundle-permissions",
                _ => "bundle-unreadable",
            },
            BundleError::Empty { .. } => "bundle-empty",
            BundleError::Unread { .. } | BundleError::Malformed { .. } => "bundle-malformed",
            BundleError::NotAnAuthority { .. } => "bundle-not-an-authority",
            BundleError::OtherDomain { .. } => "bundle-other-domain",
            BundleError::NotValidNow { .. } => "bundle-expired",
        }
    }
}

impl Trust {
    /// Nobody is trusted.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same, and these anchors for that trust domain, beside those that it already has. An authority that is being
    /// replaced has two for a while.
    #[must_use]
    pub fn with(mut self, domain: TrustDomain, anchors: Anchors) -> Self {
        let known = self.domains.entry(domain).or_default();
        for ((anchor, validity), certificate) in
            anchors.anchors.into_iter().zip(anchors.validity).zip(anchors.certificates)
        {
            if !known.certificates.contains(&certificate) {
                known.anchors.push(anchor);
                known.validity.push(validity);
                known.certificates.push(certificate);
            }
        }
        self
    }

    /// The same, and the revocation lists in this file for that trust domain. Its anchors come first: a list counts only
    /// if one of them signed it.
    pub fn with_lists(mut self, domain: &TrustDomain, path: &Path, now: SystemTime) -> Result<Self, CrlError> {
        let anchors = self.domains.entry(domain.clone()).or_default();
        let lists = crl::load(domain, path, &anchors.authorities(), &anchors.lists, now)?;
        anchors.lists.extend(lists);
        Ok(self)
    }

    /// Is a peer that was verified by this path still to be believed: is its anchor still in the bundle of its trust
    /// domain, and no certificate of the path revoked? Time plays no part: what is open may outlast its certificate.
    pub fn still_believes(&self, domain: &TrustDomain, path: &TrustPath) -> bool {
        let anchors = self.domains.get(domain).map(|anchors| &anchors.anchors[..]).unwrap_or_default();
        anchors.iter().any(|anchor| anchor.subject_public_key_info.as_ref() == &*path.anchor)
            && !self.revokes(domain, &path.certificates)
    }

    /// Has an authority of this trust domain revoked one of these certificates?
    pub fn revokes(&self, domain: &TrustDomain, path: &[IssuerAndSerial]) -> bool {
        let lists = self.domains.get(domain).map(|anchors| &anchors.lists[..]).unwrap_or_default();
        lists.iter().any(|list| path.iter().any(|certificate| list.revokes(certificate)))
    }

    /// The anchors of exactly this trust domain, if it is known (R61).
    pub fn anchors(&self, domain: &TrustDomain) -> Option<&Anchors> {
        self.domains.get(domain)
    }

    /// Every trust domain that is known.
    pub fn domains(&self) -> impl Iterator<Item = (&TrustDomain, &Anchors)> {
        self.domains.iter()
    }
}

impl Anchors {
    /// Reads the bundle of a trust domain from a PEM file and checks all of it.
    pub fn load(domain: &TrustDomain, path: &Path, now: SystemTime) -> Result<Self, BundleError> {
        let bytes =
            files::read(path, Guard::Public).map_err(|source| BundleError::File { domain: domain.clone(), source })?;
        Self::parse(domain, path, &bytes, now)
    }

    /// The same from the content of the file; `path` is for the errors.
    pub fn parse(domain: &TrustDomain, path: &Path, pem: &[u8], now: SystemTime) -> Result<Self, BundleError> {
        let mut anchors = Self::default();
        let sections = pem::sections(pem, Content::Certificates).map_err(|fault| BundleError::Unread {
            domain: domain.clone(),
            path: path.into(),
            fault,
        })?;
        for (index, section) in sections.iter().enumerate() {
            anchors.add(domain, path, index + 1, section.certificate())?;
        }
        anchors.check_validity(domain, path, now)?;
        Ok(anchors)
    }

    /// The anchors that are valid at that time. Path validation does not look at the validity of an anchor, so it has to
    /// be done here.
    pub fn valid_at(&self, now: UnixTime) -> Cow<'_, [TrustAnchor<'static>]> {
        let now = from_unix_time(now);
        if self.validity.iter().all(|validity| validity.contains(now)) {
            return Cow::Borrowed(&self.anchors);
        }
        let valid = self.anchors.iter().zip(&self.validity).filter(|(_, validity)| validity.contains(now));
        Cow::Owned(valid.map(|(anchor, _)| anchor.clone()).collect())
    }

    /// What they have revoked, as the path validation takes it.
    pub fn revocations(&self) -> Vec<&CertRevocationList<'static>> {
        self.lists.iter().map(|list| list.as_webpki()).collect()
    }

    /// The lists of what they have revoked.
    pub fn lists(&self) -> &[Arc<List>] {
        &self.lists
    }

    /// Who may have signed a list.
    pub(crate) fn authorities(&self) -> Vec<crl::Authority<'_>> {
        self.anchors.iter().zip(&self.certificates).collect()
    }

    /// What each anchor is and until when.
    pub fn validity(&self) -> &[Validity] {
        &self.validity
    }

    /// The certificates themselves, to hand on to foreign peers.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    fn add(
        &mut self,
        domain: &TrustDomain,
        path: &Path,
        number: usize,
        certificate: CertificateDer<'static>,
    ) -> Result<(), BundleError> {
        let malformed = |why: String| BundleError::Malformed { domain: domain.clone(), path: path.into(), number, why };
        let parsed = Parsed::parse(&certificate).map_err(|error| malformed(error.to_string()))?;
        check_authority(&parsed).map_err(|fault| match fault {
            AuthorityFault::Malformed(why) => malformed(why.to_string()),
            AuthorityFault::NotAnAuthority(why) => BundleError::NotAnAuthority {
                domain: domain.clone(),
                path: path.into(),
                number,
                subject: parsed.subject(),
                why,
            },
        })?;
        if let Some(found) = other_domain(&parsed, domain).map_err(|error| malformed(error.to_string()))? {
            return Err(BundleError::OtherDomain { domain: domain.clone(), path: path.into(), number, found });
        }
        let validity = Validity {
            not_before: parsed.not_before(),
            not_after: parsed.not_after(),
            subject: parsed.subject(),
            serial: parsed.serial(),
        };
        let anchor = webpki::anchor_from_trusted_cert(&certificate)
            .map_err(|error| malformed(format!("it cannot be a trust anchor: {error}")))?
            .to_owned();
        self.anchors.push(anchor);
        self.validity.push(validity);
        self.certificates.push(certificate);
        Ok(())
    }

    fn check_validity(&self, domain: &TrustDomain, path: &Path, now: SystemTime) -> Result<(), BundleError> {
        let Some(longest) = self.validity.iter().max_by_key(|validity| validity.not_after) else {
            return Err(BundleError::Empty { domain: domain.clone(), path: path.into() });
        };
        for validity in self.validity.iter().filter(|validity| !validity.contains(now)) {
            tracing::warn!(trust_domain = %domain, bundle = %path.display(), subject = validity.subject,
                not_after = display_time(validity.not_after), "a certificate of the bundle is not valid now");
        }
        if self.valid_at(unix_time(now)).is_empty() {
            return Err(BundleError::NotValidNow {
                domain: domain.clone(),
                path: path.into(),
                now: display_time(now),
                not_before: display_time(longest.not_before),
                not_after: display_time(longest.not_after),
            });
        }
        Ok(())
    }
}

impl Validity {
    /// Both ends are inside (RFC 5280 section 4.1.2.5).
    pub fn contains(&self, time: SystemTime) -> bool {
        self.not_before <= time && unix_time(time).as_secs() <= unix_time(self.not_after).as_secs()
    }
}

/// Why a certificate is no authority.
pub(crate) enum AuthorityFault {
    Malformed(super::x509::Malformed),
    NotAnAuthority(&'static str),
}

impl From<super::x509::Malformed> for AuthorityFault {
    fn from(malformed: super::x509::Malformed) -> Self {
        AuthorityFault::Malformed(malformed)
    }
}

/// May this certificate sign SVIDs (R28, R29, R33)?
pub(crate) fn check_authority(parsed: &Parsed<'_>) -> Result<(), AuthorityFault> {
    if !parsed.is_ca()? {
        return Err(AuthorityFault::NotAnAuthority("its basic constraints do not say cA"));
    }
    if parsed.key_usage()?.is_some_and(|usage| !usage.key_cert_sign) {
        return Err(AuthorityFault::NotAnAuthority("its key usage lacks keyCertSign"));
    }
    if parsed.constrains_uris()? {
        return Err(AuthorityFault::NotAnAuthority(
            "it has a name constraint over URIs, and every chain below such a one is refused",
        ));
    }
    Ok(())
}

/// The URI that shows that an authority belongs to another trust domain, where it carries one (R32).
pub(crate) fn other_domain(
    parsed: &Parsed<'_>,
    domain: &TrustDomain,
) -> Result<Option<String>, super::x509::Malformed> {
    let expected = format!("spiffe://{domain}");
    Ok(parsed.uris()?.into_iter().find(|uri| *uri != expected).map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};
    use std::time::Duration;

    fn load(domain: &str, pem: &str) -> Result<Anchors, BundleError> {
        Anchors::parse(&domain_of(domain), Path::new("/etc/bunter/b.pem"), pem.as_bytes(), now())
    }

    #[test]
    fn a_bundle_of_several_authorities_is_read_whole() {
        let pem = format!("{}{}", TestCa::new("example.org").pem(), TestCa::new("example.org").pem());
        assert_eq!(load("example.org", &pem).unwrap().anchors.len(), 2);
    }

    #[test]
    fn bundles_of_different_domains_are_never_merged() {
        // R64
        let org = load("example.org", &TestCa::new("example.org").pem()).unwrap();
        let net = load("example.net", &TestCa::new("example.net").pem()).unwrap();
        let trust = Trust::new().with(domain_of("example.org"), org).with(domain_of("example.net"), net);
        assert_eq!(trust.anchors(&domain_of("example.org")).unwrap().anchors.len(), 1);
        assert_eq!(trust.anchors(&domain_of("example.net")).unwrap().anchors.len(), 1);
        assert!(trust.anchors(&domain_of("example.com")).is_none());
    }

    #[test]
    fn the_same_authority_twice_counts_once() {
        let ca = TestCa::new("example.org");
        let one = load("example.org", &ca.pem()).unwrap();
        let trust = Trust::new().with(domain_of("example.org"), one.clone()).with(domain_of("example.org"), one);
        assert_eq!(trust.anchors(&domain_of("example.org")).unwrap().anchors.len(), 1);
    }

    #[test]
    fn a_bundle_that_names_another_domain_is_refused() {
        let error = load("example.org", &TestCa::new("example.net").pem()).unwrap_err();
        assert_eq!(error.code(), "bundle-other-domain");
        assert!(error.to_string().contains("spiffe://example.net"), "{error}");
    }

    #[test]
    fn an_authority_without_a_uri_is_taken_for_the_domain_that_the_configuration_names() {
        let mut params = ca_params("example.org");
        params.subject_alt_names.clear();
        assert!(load("example.org", &TestCa::with(params).pem()).is_ok());
    }

    #[test]
    fn an_empty_bundle_garbage_and_a_leaf_are_refused() {
        assert_eq!(load("example.org", "").unwrap_err().code(), "bundle-empty");
        assert_eq!(load("example.org", "no pem at all").unwrap_err().code(), "bundle-empty");
        let broken = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
        assert_eq!(load("example.org", broken).unwrap_err().code(), "bundle-malformed");
        let half = "-----BEGIN CERTIFICATE-----\nMIIB\n";
        assert_eq!(load("example.org", half).unwrap_err().code(), "bundle-malformed");
        let leaf = TestCa::new("example.org").leaf(leaf_params("spiffe://example.org/web"));
        let error = load("example.org", &files::pem("CERTIFICATE", &leaf)).unwrap_err();
        assert_eq!(error.code(), "bundle-not-an-authority");
    }

    #[test]
    fn an_expired_bundle_is_refused_and_one_expired_certificate_in_it_is_not_used() {
        let mut params = ca_params("example.org");
        params.not_before = (now() - Duration::from_secs(7200)).into();
        params.not_after = (now() - Duration::from_secs(3600)).into();
        let expired = TestCa::with(params).pem();
        assert_eq!(load("example.org", &expired).unwrap_err().code(), "bundle-expired");
        let both = load("example.org", &format!("{expired}{}", TestCa::new("example.org").pem())).unwrap();
        assert_eq!(both.anchors.len(), 2);
        assert_eq!(both.valid_at(unix_time(now())).len(), 1);
    }

    #[test]
    fn a_bundle_of_the_future_is_refused() {
        let mut params = ca_params("example.org");
        params.not_before = (now() + Duration::from_secs(3600)).into();
        assert_eq!(load("example.org", &TestCa::with(params).pem()).unwrap_err().code(), "bundle-expired");
    }

    #[test]
    fn an_authority_that_may_not_sign_certificates_is_refused() {
        let mut params = ca_params("example.org");
        params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
        assert_eq!(load("example.org", &TestCa::with(params).pem()).unwrap_err().code(), "bundle-not-an-authority");
    }

    #[test]
    fn a_world_writable_or_missing_bundle_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("b.pem");
        let load = || Anchors::load(&domain_of("example.org"), &path, now());
        assert_eq!(load().unwrap_err().code(), "bundle-missing");
        std::fs::write(&path, TestCa::new("example.org").pem()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        assert_eq!(load().unwrap_err().code(), "bundle-permissions");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(load().is_ok());
    }
}
