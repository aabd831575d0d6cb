//! Authorities and certificates for tests, good and bad.

use super::{
    bundle::{Anchors, Trust},
    x509,
};
use crate::spiffe::{SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, string::Ia5String,
};
use rustls::pki_types::{CertificateDer, UnixTime};
use std::{
    path::Path,
    time::{Duration, SystemTime},
};

/// A fixed time in whole seconds, so that tests do not depend on the clock: 2026-11-22T05:17:00Z.
pub(crate) fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_324_620)
}

pub(crate) fn unix_now() -> UnixTime {
    x509::unix_time(now())
}

pub(crate) fn domain_of(name: &str) -> TrustDomain {
    TrustDomain::parse(name).unwrap()
}

pub(crate) fn id_of(uri: &str) -> SpiffeId {
    SpiffeId::parse(uri).unwrap()
}

/// A URI name with no check at all.
pub(crate) fn uri(text: &str) -> SanType {
    SanType::URI(Ia5String::try_from(text).unwrap())
}

fn subject(name: &str) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, "Wimsey tests");
    subject.push(DnType::CommonName, name);
    subject
}

/// What a good authority asks for.
pub(crate) fn ca_params(domain: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = subject(&format!("{domain} authority {}", x509::hex(&random())));
    params.subject_alt_names = vec![uri(&format!("spiffe://{domain}"))];
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (now() - Duration::from_secs(24 * 3600)).into();
    params.not_after = (now() + Duration::from_secs(24 * 3600)).into();
    params
}

/// What a good SVID asks for.
pub(crate) fn leaf_params(id: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = subject("workload");
    params.subject_alt_names = vec![uri(id)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params.not_before = (now() - Duration::from_secs(10)).into();
    params.not_after = (now() + Duration::from_secs(3600)).into();
    params
}

fn random() -> [u8; 4] {
    let mut bytes = [0; 4];
    aws_lc_rs::rand::fill(&mut bytes).unwrap();
    bytes
}

/// An authority that signs whatever it is asked to.
pub(crate) struct TestCa {
    pub(crate) certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl TestCa {
    pub(crate) fn new(domain: &str) -> Self {
        Self::with(ca_params(domain))
    }

    /// Self-signed with these parameters.
    pub(crate) fn with(params: CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// An authority below this one.
    pub(crate) fn intermediate(&self, params: CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    pub(crate) fn leaf(&self, params: CertificateParams) -> CertificateDer<'static> {
        self.leaf_with_key(params).0
    }

    pub(crate) fn leaf_with_key(&self, params: CertificateParams) -> (CertificateDer<'static>, KeyPair) {
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().der().clone(), key)
    }

    pub(crate) fn pem(&self) -> String {
        super::files::pem("CERTIFICATE", &self.certificate).to_string()
    }

    pub(crate) fn anchors(&self, domain: &str) -> Anchors {
        Anchors::parse(&domain_of(domain), Path::new("test.pem"), self.pem().as_bytes(), now()).unwrap()
    }

    /// This authority alone, for that trust domain.
    pub(crate) fn trust(&self, domain: &str) -> Trust {
        Trust::new().with(domain_of(domain), self.anchors(domain))
    }
}
