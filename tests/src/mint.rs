//! Certificates of every kind, good ones and those that must be refused, from a lab authority's own key.
//!
//! *Invariant:* [`Terms::default`] is a correct X.509-SVID; each hostile test changes one thing of it.

use anyhow::Context;
use rcgen::{
    CertificateParams, CertificateRevocationListParams, CertificateSigningRequestParams, DistinguishedName,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber, string::Ia5String,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use std::path::Path;
use time::{Duration, OffsetDateTime};

/// A certificate authority whose key the lab has.
pub struct Mint {
    issuer: Issuer<'static, KeyPair>,
    authority: CertificateDer<'static>,
}

/// A certificate with its key.
pub struct Svid {
    /// Leaf and authority.
    pub chain: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
    /// Leaf as PEM.
    pub certificate_pem: String,
    /// Key as PEM (PKCS #8).
    pub key_pem: String,
}

impl Svid {
    /// The key, as rustls wants it.
    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.clone()))
    }
}

/// What stands in a certificate.
#[derive(Clone, Debug)]
pub struct Terms {
    /// URI SANs.
    pub uris: Vec<String>,
    /// DNS SANs.
    pub names: Vec<String>,
    /// Valid from, relative to now.
    pub from: Duration,
    /// Valid until, relative to now.
    pub until: Duration,
    /// Extended key usages.
    pub usages: Vec<ExtendedKeyUsagePurpose>,
    /// Key usages.
    pub key_usages: Vec<KeyUsagePurpose>,
    /// A CA certificate.
    pub authority: bool,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            uris: Vec::new(),
            names: Vec::new(),
            from: Duration::minutes(-5),
            until: Duration::hours(1),
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            key_usages: vec![KeyUsagePurpose::DigitalSignature],
            authority: false,
        }
    }
}

impl Terms {
    /// A correct SVID of this ID.
    pub fn of(id: &str) -> Self {
        Self { uris: vec![id.to_owned()], ..Self::default() }
    }
}

impl Mint {
    /// The authority whose `ca.pem` and `ca.key` lie in the directory.
    pub fn open(directory: &Path) -> crate::Result<Self> {
        let read = |name: &str| {
            let path = directory.join(name);
            std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
        };
        let (certificate, key) = (read("ca.pem")?, KeyPair::from_pem(&read("ca.key")?)?);
        let authority = CertificateDer::from_pem_slice(certificate.as_bytes())?;
        Ok(Self { issuer: Issuer::from_ca_cert_pem(&certificate, key)?, authority })
    }

    /// An authority of its own for a trust domain, valid in this span relative to now. Gives its PEM files as well.
    pub fn found(domain: &str, from: Duration, until: Duration) -> crate::Result<(Self, String, String)> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, format!("authority of {domain}"));
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(format!("spiffe://{domain}"))?)];
        params.not_before = OffsetDateTime::now_utc() + from;
        params.not_after = OffsetDateTime::now_utc() + until;
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        let (pem, key_pem) = (certificate.pem(), key.serialize_pem());
        Ok((Self { issuer: Issuer::new(params, key), authority: certificate.der().clone() }, pem, key_pem))
    }

    /// A certificate on these terms.
    pub fn issue(&self, terms: &Terms) -> crate::Result<Svid> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "lab");
        for uri in &terms.uris {
            params.subject_alt_names.push(SanType::URI(Ia5String::try_from(uri.as_str())?));
        }
        for name in &terms.names {
            params.subject_alt_names.push(SanType::DnsName(Ia5String::try_from(name.as_str())?));
        }
        params.not_before = OffsetDateTime::now_utc() + terms.from;
        params.not_after = OffsetDateTime::now_utc() + terms.until;
        params.extended_key_usages.clone_from(&terms.usages);
        params.key_usages.clone_from(&terms.key_usages);
        params.use_authority_key_identifier_extension = true;
        params.is_ca =
            if terms.authority { IsCa::Ca(rcgen::BasicConstraints::Unconstrained) } else { IsCa::ExplicitNoCa };
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Svid {
            chain: vec![certificate.der().clone(), self.authority.clone()],
            key: key.serialize_der(),
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    /// The certificate, in PEM, that answers a request (PKCS #10, PEM), with the names that the request asks for.
    pub fn sign(&self, request: &str) -> crate::Result<String> {
        let mut request = CertificateSigningRequestParams::from_pem(request)?;
        let params = &mut request.params;
        params.not_before = OffsetDateTime::now_utc() - Duration::minutes(5);
        params.not_after = OffsetDateTime::now_utc() + Duration::hours(12);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        Ok(request.signed_by(&self.issuer)?.pem())
    }

    /// A list, in PEM, that revokes these serial numbers, good until then relative to now.
    pub fn list(&self, serials: &[u8], until: Duration) -> crate::Result<String> {
        let now = OffsetDateTime::now_utc();
        let revoked_certs = serials.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from_slice(&[*serial]),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: now - Duration::hours(1),
            next_update: now + until,
            crl_number: SerialNumber::from_slice(&[1]),
            issuing_distribution_point: None,
            revoked_certs: revoked_certs.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(params.signed_by(&self.issuer)?.pem()?)
    }

    /// A correct SVID of this ID.
    pub fn svid(&self, id: &str) -> crate::Result<Svid> {
        self.issue(&Terms::of(id))
    }
}
