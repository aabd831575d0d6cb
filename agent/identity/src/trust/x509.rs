//! The few things that Bunter looks at in a certificate by itself, beside what the path validation does.
//!
//! *Invariant:* anything that cannot be read in exactly one way (an extension twice, bytes after the end, a name that is no
//! text) is malformed; nothing is skipped.

use rustls::pki_types::UnixTime;
use std::time::{Duration, SystemTime};
use x509_parser::{
    certificate::X509Certificate,
    error::X509Error,
    extensions::{GeneralName, ParsedExtension},
    oid_registry::OID_X509_EXT_SUBJECT_KEY_IDENTIFIER,
    prelude::FromDer,
    revocation_list::CertificateRevocationList,
};

/// What cannot be read in a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub(crate) &'static str);

/// The tag of a `uniformResourceIdentifier` among the general names (RFC 5280 section 4.2.1.6).
const URI_TAG: u32 = 6;

/// A certificate, read as far as Bunter needs it.
pub(crate) struct Parsed<'a> {
    certificate: X509Certificate<'a>,
}

/// Key usage bits that decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeyUsage {
    pub(crate) digital_signature: bool,
    pub(crate) key_cert_sign: bool,
    pub(crate) crl_sign: bool,
}

/// Extended key usages that decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Purposes {
    pub(crate) server: bool,
    pub(crate) client: bool,
}

impl<'a> Parsed<'a> {
    pub(crate) fn parse(der: &'a [u8]) -> Result<Self, Malformed> {
        match X509Certificate::from_der(der) {
            Ok(([], certificate)) => Ok(Self { certificate }),
            Ok(_) => Err(Malformed("there are bytes after the certificate")),
            Err(_) => Err(Malformed("it is not an X.509 certificate in DER")),
        }
    }

    /// Every URI among the subject alternative names, whatever its scheme.
    pub(crate) fn uris(&self) -> Result<Vec<&str>, Malformed> {
        let names = self
            .certificate
            .subject_alternative_name()
            .map_err(|_| Malformed("its subject alternative names are there twice or cannot be read"))?;
        let mut uris = Vec::new();
        for name in names.iter().flat_map(|names| &names.value.general_names) {
            match name {
                GeneralName::URI(uri) => uris.push(*uri),
                GeneralName::Invalid(tag, _) if tag.0 == URI_TAG => {
                    return Err(Malformed("a URI among its subject alternative names is no text"));
                }
                _ => {}
            }
        }
        Ok(uris)
    }

    /// The cA flag; absent basic constraints mean false (RFC 5280 section 4.2.1.9).
    pub(crate) fn is_ca(&self) -> Result<bool, Malformed> {
        self.certificate
            .basic_constraints()
            .map(|constraints| constraints.is_some_and(|constraints| constraints.value.ca))
            .map_err(|_| Malformed("its basic constraints are there twice or cannot be read"))
    }

    pub(crate) fn key_usage(&self) -> Result<Option<KeyUsage>, Malformed> {
        let usage =
            self.certificate.key_usage().map_err(|_| Malformed("its key usage is there twice or cannot be read"))?;
        Ok(usage.map(|usage| KeyUsage {
            digital_signature: usage.value.digital_signature(),
            key_cert_sign: usage.value.key_cert_sign(),
            crl_sign: usage.value.crl_sign(),
        }))
    }

    pub(crate) fn purposes(&self) -> Result<Option<Purposes>, Malformed> {
        let usage = self
            .certificate
            .extended_key_usage()
            .map_err(|_| Malformed("its extended key usage is there twice or cannot be read"))?;
        Ok(usage.map(|usage| Purposes { server: usage.value.server_auth, client: usage.value.client_auth }))
    }

    /// Is there a name constraint over URIs? Path validation refuses every chain under one.
    pub(crate) fn constrains_uris(&self) -> Result<bool, Malformed> {
        let constraints = self
            .certificate
            .name_constraints()
            .map_err(|_| Malformed("its name constraints are there twice or cannot be read"))?;
        Ok(constraints.is_some_and(|constraints| {
            let subtrees = [&constraints.value.permitted_subtrees, &constraints.value.excluded_subtrees];
            subtrees.into_iter().flatten().flatten().any(|subtree| matches!(subtree.base, GeneralName::URI(_)))
        }))
    }

    pub(crate) fn not_before(&self) -> SystemTime {
        system_time(self.certificate.validity().not_before.timestamp())
    }

    pub(crate) fn not_after(&self) -> SystemTime {
        system_time(self.certificate.validity().not_after.timestamp())
    }

    pub(crate) fn subject(&self) -> String {
        self.certificate.subject().to_string()
    }

    pub(crate) fn serial(&self) -> String {
        hex(self.certificate.raw_serial())
    }

    /// The octets of the INTEGER, as they are encoded.
    pub(crate) fn raw_serial(&self) -> &[u8] {
        self.certificate.raw_serial()
    }

    /// Was it issued by this authority, by its name and its signature?
    pub(crate) fn is_issued_by(&self, authority: &Parsed<'_>) -> bool {
        self.certificate.issuer().as_raw() == authority.certificate.subject().as_raw()
            && self.certificate.verify_signature(Some(authority.certificate.public_key())).is_ok()
    }

    /// Is the signature of the list by this authority's key?
    pub(crate) fn check_signature_of(&self, list: &CertificateRevocationList<'_>) -> Result<(), X509Error> {
        list.verify_signature(self.certificate.public_key())
    }

    /// Its subject key identifier, where it has one.
    pub(crate) fn key_identifier(&self) -> Result<Option<&[u8]>, Malformed> {
        let extension = self
            .certificate
            .get_extension_unique(&OID_X509_EXT_SUBJECT_KEY_IDENTIFIER)
            .map_err(|_| Malformed("its subject key identifier is there twice"))?;
        match extension.map(x509_parser::extensions::X509Extension::parsed_extension) {
            None => Ok(None),
            Some(ParsedExtension::SubjectKeyIdentifier(identifier)) => Ok(Some(identifier.0)),
            Some(_) => Err(Malformed("its subject key identifier cannot be read")),
        }
    }

    /// SubjectPublicKeyInfo's key bits.
    pub(crate) fn public_key(&self) -> &[u8] {
        &self.certificate.public_key().subject_public_key.data
    }
}

/// Lower-case hexadecimal, as `openssl x509 -serial` writes it but for the case.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A time for people and logs: `2026-11-22T05:17:00Z`.
pub fn display_time(time: SystemTime) -> String {
    // The last second that four digits of year can say; humantime cannot print a later one.
    const LAST: Duration = Duration::from_secs(253_402_300_799);
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().min(LAST);
    humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + since).to_string()
}

/// The same point in time for rustls.
pub fn unix_time(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

/// The same point in time for everybody else.
pub fn from_unix_time(time: UnixTime) -> SystemTime {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(time.as_secs())).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// The same point in time, from a certificate or a list.
pub fn system_time(seconds: i64) -> SystemTime {
    // Before 1970 is as good as 1970: long over for `not_after`, long begun for `not_before`.
    from_unix_time(UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(seconds).unwrap_or(0))))
}
