//! Authorities and certificates for tests, good and bad, and who believes all of them.
#![expect(missing_docs, reason = "for tests: the names say it")]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot be set up fails")]

use super::{
    bundle::{Anchors, Trust},
    verify::ALGORITHMS,
    x509,
};
use crate::spiffe::{SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName as Subject, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber, SigningKey, string::Ia5String,
};
use rustls::{
    DigitallySignedStruct, DistinguishedName, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use std::{
    path::Path,
    time::{Duration, SystemTime},
};

/// A fixed time in whole seconds, so that tests do not depend on the clock: 2026-11-22T05:17:00Z.
pub fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_324_620)
}

pub fn unix_now() -> UnixTime {
    x509::unix_time(now())
}

pub fn domain_of(name: &str) -> TrustDomain {
    TrustDomain::parse(name).unwrap()
}

pub fn id_of(uri: &str) -> SpiffeId {
    SpiffeId::parse(uri).unwrap()
}

/// A URI name with no check at all.
pub fn uri(text: &str) -> SanType {
    SanType::URI(Ia5String::try_from(text).unwrap())
}

fn subject(name: &str) -> Subject {
    let mut subject = Subject::new();
    subject.push(DnType::OrganizationName, "Bunter tests");
    subject.push(DnType::CommonName, name);
    subject
}

/// What a good authority asks for.
pub fn ca_params(domain: &str) -> CertificateParams {
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
pub fn leaf_params(id: &str) -> CertificateParams {
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

/// What a good list asks for that revokes these serial numbers.
pub fn list_params(serials: &[&[u8]]) -> CertificateRevocationListParams {
    let entry = |serial: &&[u8]| RevokedCertParams {
        serial_number: SerialNumber::from_slice(serial),
        revocation_time: now().into(),
        reason_code: None,
        invalidity_date: None,
    };
    CertificateRevocationListParams {
        this_update: (now() - Duration::from_secs(3600)).into(),
        next_update: (now() + Duration::from_secs(3600)).into(),
        crl_number: SerialNumber::from_slice(&[7]),
        issuing_distribution_point: None,
        revoked_certs: serials.iter().map(entry).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    }
}

/// The same with a serial number.
pub fn numbered(mut params: CertificateParams, serial: &[u8]) -> CertificateParams {
    params.serial_number = Some(SerialNumber::from_slice(serial));
    params
}

fn random() -> [u8; 4] {
    let mut bytes = [0; 4];
    aws_lc_rs::rand::fill(&mut bytes).unwrap();
    bytes
}

/// The same trust, and this list.
pub fn with_list(trust: Trust, domain: &str, list: &[u8]) -> Trust {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("crl.pem");
    std::fs::write(&path, &*super::files::pem("X509 CRL", list)).unwrap();
    trust.with_lists(&domain_of(domain), &path, now()).unwrap()
}

/// DER: tag, length, value.
pub fn tlv(tag: u8, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len()).unwrap();
    let head = match length {
        0..0x80 => vec![tag, length as u8],
        0x80..0x100 => vec![tag, 0x81, length as u8],
        _ => [&[tag, 0x82][..], &length.to_be_bytes()].concat(),
    };
    [&head[..], value].concat()
}

/// The elements inside one of DER, each whole.
pub fn parts(der: &[u8]) -> Vec<Vec<u8>> {
    let (head, length) = length(der);
    let mut rest = &der[head..head + length];
    let mut parts = Vec::new();
    while !rest.is_empty() {
        let (head, length) = self::length(rest);
        let (part, after) = rest.split_at(head + length);
        parts.push(part.to_vec());
        rest = after;
    }
    parts
}

fn length(der: &[u8]) -> (usize, usize) {
    match der[1] {
        short @ 0..0x80 => (2, short.into()),
        long => {
            let octets = usize::from(long & 0x7f);
            (2 + octets, der[2..2 + octets].iter().fold(0, |sum, octet| sum << 8 | usize::from(*octet)))
        }
    }
}

/// An authority that signs whatever it is asked to.
pub struct TestCa {
    pub certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl TestCa {
    pub fn new(domain: &str) -> Self {
        Self::with(ca_params(domain))
    }

    /// Self-signed with these parameters.
    pub fn with(params: CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// An authority below this one.
    pub fn intermediate(&self, params: CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    pub fn leaf(&self, params: CertificateParams) -> CertificateDer<'static> {
        self.leaf_with_key(params).0
    }

    pub fn leaf_with_key(&self, params: CertificateParams) -> (CertificateDer<'static>, KeyPair) {
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().der().clone(), key)
    }

    pub fn pem(&self) -> String {
        super::files::pem("CERTIFICATE", &self.certificate).to_string()
    }

    /// A list of what it revoked, in DER.
    pub fn list(&self, params: CertificateRevocationListParams) -> Vec<u8> {
        params.signed_by(&self.issuer).unwrap().der().to_vec()
    }

    /// The trust in it with a list that revokes these serial numbers.
    pub fn trust_but(&self, domain: &str, serials: &[&[u8]]) -> Trust {
        with_list(self.trust(domain), domain, &self.list(list_params(serials)))
    }

    /// The parts of a `TBSCertList`, changed and signed again whatever they say.
    pub fn changed_list(&self, list: &[u8], change: impl FnOnce(&mut Vec<Vec<u8>>)) -> Vec<u8> {
        let outer = parts(list);
        let mut body = parts(&outer[0]);
        change(&mut body);
        let body = tlv(0x30, &body.concat());
        let signature = self.issuer.key().sign(&body).unwrap();
        tlv(0x30, &[body, outer[1].clone(), tlv(3, &[&[0][..], &signature].concat())].concat())
    }

    pub fn anchors(&self, domain: &str) -> Anchors {
        Anchors::parse(&domain_of(domain), Path::new("test.pem"), self.pem().as_bytes(), now()).unwrap()
    }

    /// This authority alone, for that trust domain.
    pub fn trust(&self, domain: &str) -> Trust {
        Trust::new().with(domain_of(domain), self.anchors(domain))
    }
}

/// Believes everybody who can sign with the key of the certificate that they show.
#[derive(Debug)]
pub struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &ALGORITHMS)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &ALGORITHMS)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ALGORITHMS.supported_schemes()
    }
}

impl ClientCertVerifier for Anybody {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &ALGORITHMS)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &ALGORITHMS)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ALGORITHMS.supported_schemes()
    }
}
