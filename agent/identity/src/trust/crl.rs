//! Certificate revocation lists: certificates that are no longer good although they have not expired (R39).
//!
//! A file of PEM lists comes in with the authorities of one trust domain; checked lists go out, all of them or none. They
//! belong to the [`Trust`](super::bundle::Trust) snapshot: a handshake hands them to the path validation, and for a
//! connection that is open already they are searched by [`IssuerAndSerial`].
//!
//! *Invariant:* a list is signed by an anchor of its own trust domain and says all that its authority has revoked, and
//! there is at most one of each authority, so nobody ever has to choose between two.

use super::{
    files::{self, FileError, Guard},
    pem::{self, Content, Unread},
    x509::{Parsed, display_time, hex, system_time, unix_time},
};
use crate::{
    refusal::{Culprit, Refusal},
    spiffe::TrustDomain,
};
use rustls::pki_types::{CertificateDer, TrustAnchor};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};
use webpki::{BorrowedCertRevocationList, CertRevocationList, EndEntityCert};
use x509_parser::{
    error::X509Error, oid_registry::OID_X509_EXT_ISSUER_DISTRIBUTION_POINT, prelude::FromDer,
    revocation_list::CertificateRevocationList as Reading,
};

/// An authority that may sign lists: itself as an anchor, and its certificate.
pub(crate) type Authority<'a> = (&'a TrustAnchor<'a>, &'a CertificateDer<'a>);

/// The list of one authority.
#[derive(Debug)]
pub struct List {
    list: CertRevocationList<'static>,
    about: About,
}

/// What a list is, for `bunter status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// The authority that signed it, for people.
    pub issuer: String,
    /// Its number in hexadecimal; empty where it has none.
    pub number: String,
    /// How many certificates it revokes.
    pub revoked: usize,
    /// Since when it holds.
    pub this_update: SystemTime,
    /// When it must have been replaced.
    pub next_update: SystemTime,
}

/// What names a certificate: a serial number is unique for its issuer only (RFC 5280 section 4.1.2.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuerAndSerial {
    issuer: Box<[u8]>,
    serial: Box<[u8]>,
}

/// Why a file of lists cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CrlError {
    /// The file itself.
    #[error("revocation list of {domain}: {source}")]
    File {
        /// Trust domain that it is for.
        domain: TrustDomain,
        /// What is wrong with it.
        source: FileError,
    },
    /// No list in it.
    #[error(
        "revocation list of {domain}: {path}: holds no list: put the PEM list (X509 CRL) of its authority there, or \
         remove the file, and the key crl where the configuration has one for it"
    )]
    Empty {
        /// Trust domain that it is for.
        domain: TrustDomain,
        /// The file.
        path: PathBuf,
    },
    /// Something in it was not understood, so that nothing of it is taken.
    #[error("revocation list of {domain}: {path}:{fault}")]
    Unread {
        /// Trust domain that it is for.
        domain: TrustDomain,
        /// The file.
        path: PathBuf,
        /// What, and in which line.
        fault: Unread,
    },
    /// One of its lists.
    #[error("revocation list of {domain}: {path}: list {number}: {fault}")]
    List {
        /// Trust domain that it is for.
        domain: TrustDomain,
        /// The file.
        path: PathBuf,
        /// Which one in the file, from 1.
        number: usize,
        /// What is wrong with it.
        fault: ListFault,
    },
}

/// What is wrong with a list.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListFault {
    /// Not a list, or one that can be read in two ways.
    #[error("{0}")]
    Malformed(String),
    /// A kind of list that says only a part, or that cannot be understood whole.
    #[error("{0}: get a full list that the authority itself signed, of version 2, without distribution points")]
    Unsupported(&'static str),
    /// Signed by somebody who is no anchor of the trust domain.
    #[error("it is of {issuer}, which is no authority in the trust bundle: get the list of an authority in the bundle")]
    OtherAuthority {
        /// Whose it says it is.
        issuer: String,
    },
    /// The signature is not that of the authority that it names.
    #[error("its signature is not that of {issuer}, whose it says it is: get the list from that authority again")]
    Forged {
        /// Whose it says it is.
        issuer: String,
    },
    /// Its signature cannot be verified here.
    #[error("it is signed with an algorithm that Bunter does not take: let {issuer} sign with ECDSA P-256 and SHA-256")]
    Algorithm {
        /// Whose it says it is.
        issuer: String,
    },
    /// The authority's certificate does not let it sign lists.
    #[error("{issuer} may not sign lists: the key usage of its certificate lacks cRLSign")]
    NotASigner {
        /// Whose it is.
        issuer: String,
    },
    /// Two authorities have one name.
    #[error(
        "the trust bundle has two authorities with the name {issuer} and different keys, and nobody could tell at a \
         handshake whose list it is: give the new authority another name"
    )]
    Ambiguous {
        /// The name.
        issuer: String,
    },
    /// There is one of this authority already.
    #[error("there is another list of {issuer} before it: keep the newest alone")]
    Twice {
        /// Whose they are.
        issuer: String,
    },
    /// It has expired.
    #[error(
        "it was good until {next_update}, and the clock says {now}: get the current list, sign that of an embedded \
         authority anew with bunter ca revoke --refresh, or set the clock"
    )]
    Expired {
        /// When it must have been replaced.
        next_update: String,
        /// What the clock says.
        now: String,
    },
    /// It has not begun.
    #[error("it holds from {this_update}, and the clock says {now}: set the clock")]
    NotYetValid {
        /// Since when it holds.
        this_update: String,
        /// What the clock says.
        now: String,
    },
}

impl Refusal for CrlError {
    fn culprit(&self) -> Culprit {
        Culprit::Host
    }
    fn code(&self) -> &'static str {
        match self {
            CrlError::File { source, .. } => match source {
                FileError::Missing { .. } => "crl-missing",
                FileError::Exposed { .. } | FileError::ForeignOwner { .. } => "crl-permissions",
                _ => "crl-unreadable",
            },
            CrlError::Empty { .. } => "crl-empty",
            CrlError::Unread { .. } => "crl-malformed",
            CrlError::List { fault, .. } => match fault {
                ListFault::Malformed(_) => "crl-malformed",
                ListFault::Unsupported(_) => "crl-unsupported",
                ListFault::OtherAuthority { .. } => "crl-other-authority",
                ListFault::Forged { .. } => "crl-forged",
                ListFault::Algorithm { .. } => "crl-algorithm",
                ListFault::NotASigner { .. } => "crl-not-a-signer",
                ListFault::Ambiguous { .. } => "crl-ambiguous",
                ListFault::Twice { .. } => "crl-twice",
                ListFault::Expired { .. } => "crl-expired",
                ListFault::NotYetValid { .. } => "crl-not-yet-valid",
            },
        }
    }
}

/// Reads the lists of a trust domain from a PEM file and checks all of them. `known`: those that are there already.
pub(crate) fn load(
    domain: &TrustDomain,
    path: &Path,
    authorities: &[Authority<'_>],
    known: &[Arc<List>],
    now: SystemTime,
) -> Result<Vec<Arc<List>>, CrlError> {
    let pem = files::read(path, Guard::Public).map_err(|source| CrlError::File { domain: domain.clone(), source })?;
    let lists = parse(domain, path, &pem, authorities, known)?;
    for (index, list) in lists.iter().enumerate() {
        list.check_time(now).map_err(|fault| CrlError::List {
            domain: domain.clone(),
            path: path.into(),
            number: index + 1,
            fault,
        })?;
    }
    Ok(lists)
}

/// The same from the content of the file and without a look at the clock; `path` is for the errors.
pub(crate) fn parse(
    domain: &TrustDomain,
    path: &Path,
    pem: &[u8],
    authorities: &[Authority<'_>],
    known: &[Arc<List>],
) -> Result<Vec<Arc<List>>, CrlError> {
    let mut lists: Vec<Arc<List>> = Vec::new();
    let sections = pem::sections(pem, Content::Lists).map_err(|fault| CrlError::Unread {
        domain: domain.clone(),
        path: path.into(),
        fault,
    })?;
    for (index, section) in sections.iter().enumerate() {
        let list = List::read(&section.der, authorities).and_then(|list| {
            match known.iter().chain(&lists).any(|other| other.is_of(&list)) {
                true => Err(ListFault::Twice { issuer: list.about.issuer }),
                false => Ok(list),
            }
        });
        let number = index + 1;
        let list = list.map_err(|fault| CrlError::List { domain: domain.clone(), path: path.into(), number, fault })?;
        lists.push(Arc::new(list));
    }
    match lists.is_empty() {
        true => Err(CrlError::Empty { domain: domain.clone(), path: path.into() }),
        false => Ok(lists),
    }
}

/// Reads a list that can be read in one way only; who signed it and whether it is current is not checked here.
pub(crate) fn read(der: &[u8]) -> Result<Reading<'_>, ListFault> {
    let malformed = |why: &str| ListFault::Malformed(why.into());
    let reading = match Reading::from_der(der) {
        Ok(([], reading)) => reading,
        Ok(_) => return Err(malformed("there are bytes after the list")),
        Err(_) => return Err(malformed("it is not an X.509 revocation list in DER")),
    };
    let extensions = reading.tbs_cert_list.extensions_map();
    let extensions = extensions.map_err(|_| malformed("one of its extensions is there twice"))?;
    // The path validation would use a list with a distribution point for the certificates that name this point, and
    // silently pass the others.
    if extensions.contains_key(&OID_X509_EXT_ISSUER_DISTRIBUTION_POINT) {
        return Err(ListFault::Unsupported("it has an issuing distribution point, so it may be a part"));
    }
    if reading.iter_revoked_certificates().any(|entry| entry.extensions_map().is_err()) {
        return Err(malformed("an extension of one of its entries is there twice"));
    }
    Ok(reading)
}

impl List {
    fn read(der: &[u8], authorities: &[Authority<'_>]) -> Result<Self, ListFault> {
        let reading = read(der)?;
        let borrowed = BorrowedCertRevocationList::from_der(der).map_err(from_webpki)?;
        let list = CertRevocationList::Owned(borrowed.to_owned().map_err(from_webpki)?);
        // Two readers of the same bytes must see the same entries.
        let serials: Vec<_> = borrowed.into_iter().flatten().map(|entry| entry.serial_number).collect();
        if reading.iter_revoked_certificates().map(|entry| entry.raw_serial()).ne(serials.iter().copied()) {
            return Err(ListFault::Malformed("its entries can be read in two ways".into()));
        }
        let issuer = reading.issuer().to_string();
        let next_update = reading.next_update().ok_or(ListFault::Malformed("it does not say until when".into()))?;
        check_signer(&reading, list.issuer(), &issuer, authorities)?;
        let about = About {
            issuer,
            number: reading.crl_number().map(|number| hex(&number.to_bytes_be())).unwrap_or_default(),
            revoked: serials.len(),
            this_update: system_time(reading.last_update().timestamp()),
            next_update: system_time(next_update.timestamp()),
        };
        Ok(Self { list, about })
    }

    /// May it be used at this time?
    fn check_time(&self, now: SystemTime) -> Result<(), ListFault> {
        let (this_update, next_update) = (self.about.this_update, self.about.next_update);
        if now < this_update {
            return Err(ListFault::NotYetValid { this_update: display_time(this_update), now: display_time(now) });
        }
        if self.is_expired(now) {
            return Err(ListFault::Expired { next_update: display_time(next_update), now: display_time(now) });
        }
        Ok(())
    }

    /// Has it expired at this time? From the second at which it expires on, peers of its authority are refused.
    pub fn is_expired(&self, now: SystemTime) -> bool {
        unix_time(now) >= unix_time(self.about.next_update)
    }

    /// What it is.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// As the path validation takes it.
    pub(crate) fn as_webpki(&self) -> &CertRevocationList<'static> {
        &self.list
    }

    /// Does it revoke this certificate?
    pub fn revokes(&self, certificate: &IssuerAndSerial) -> bool {
        // If the list cannot be searched, every certificate of its authority counts as revoked.
        self.list.issuer() == &*certificate.issuer && !matches!(self.list.find_serial(&certificate.serial), Ok(None))
    }

    fn is_of(&self, other: &Self) -> bool {
        self.list.issuer() == other.list.issuer()
    }
}

impl IssuerAndSerial {
    /// Of a certificate that is well-formed.
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let certificate = EndEntityCert::try_from(certificate).ok()?;
        Some(Self::read(&certificate))
    }

    /// Of a certificate that was read.
    pub(crate) fn read(certificate: &webpki::Cert<'_>) -> Self {
        Self { issuer: certificate.issuer().into(), serial: certificate.serial().into() }
    }
}

/// Whose list it is: an authority that may sign lists, and that did.
fn check_signer(
    reading: &Reading<'_>,
    name: &[u8],
    issuer: &str,
    authorities: &[Authority<'_>],
) -> Result<(), ListFault> {
    let of_that_name = || authorities.iter().filter(|(anchor, _)| anchor.subject.as_ref() == name);
    let issuer = issuer.to_owned();
    let Some((anchor, certificate)) = of_that_name().next() else { return Err(ListFault::OtherAuthority { issuer }) };
    if of_that_name().any(|(other, _)| other.subject_public_key_info != anchor.subject_public_key_info) {
        return Err(ListFault::Ambiguous { issuer });
    }
    let malformed = |error: super::x509::Malformed| ListFault::Malformed(format!("{issuer}: {error}"));
    let signer = Parsed::parse(certificate).map_err(malformed)?;
    if signer.key_usage().map_err(malformed)?.is_some_and(|usage| !usage.crl_sign) {
        return Err(ListFault::NotASigner { issuer });
    }
    // A list whose algorithm the path validation does not take would have every peer refused: it is refused here instead.
    let oid = reading.signature_algorithm.oid().as_bytes();
    let is_oid = |known: &[u8]| {
        known
            .strip_prefix(&[6])
            .and_then(|rest| rest.split_first())
            .is_some_and(|(length, rest)| usize::from(*length) == oid.len() && rest.starts_with(oid))
    };
    if !webpki::ALL_VERIFICATION_ALGS.iter().any(|known| is_oid(known.signature_alg_id().as_ref())) {
        return Err(ListFault::Algorithm { issuer });
    }
    match signer.check_signature_of(reading) {
        Ok(()) => Ok(()),
        Err(X509Error::SignatureUnsupportedAlgorithm) => Err(ListFault::Algorithm { issuer }),
        Err(_) => Err(ListFault::Forged { issuer }),
    }
}

fn from_webpki(error: webpki::Error) -> ListFault {
    use webpki::Error as E;
    let what = match error {
        E::UnsupportedDeltaCrl => "it is a delta list, which says only what has changed",
        E::UnsupportedIndirectCrl => "it is an indirect list, which speaks for other authorities",
        E::UnsupportedCriticalExtension => "it has a critical extension that Bunter does not know",
        E::UnsupportedCrlVersion => "it is not of version 2",
        E::UnsupportedRevocationReason => "one of its entries has a reason that no full list has",
        error => return ListFault::Malformed(format!("it is not a well-formed revocation list: {error}")),
    };
    ListFault::Unsupported(what)
}

#[cfg(test)]
mod tests;
