//! The one way in which rustls is configured here.
//!
//! *Invariant:* TLS 1.3 alone; both ends show a certificate; nothing of one connection is kept for another (R56, R57).

use super::{Cause, verify::PeerVerifier};
use crate::credential::Credential;
use rustls::{
    CipherSuite, ClientConfig, ServerConfig, SupportedCipherSuite,
    client::Resumption,
    crypto::{
        CryptoProvider,
        aws_lc_rs::{self, cipher_suite, kx_group},
    },
    server::NoServerSessionStorage,
    sign::SingleCertAndKey,
    version::TLS13,
};
use std::sync::{Arc, OnceLock};

/// Which cipher suites may be agreed on, in the order of preference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ciphers {
    /// AES-128-GCM, AES-256-GCM, ChaCha20-Poly1305.
    #[default]
    All,
    /// ChaCha20-Poly1305 alone: it has no record limit, so that a kernel that cannot take fresh keys can carry it.
    ChaChaOnly,
}

impl Ciphers {
    fn suites(self) -> &'static [SupportedCipherSuite] {
        const ALL: &[SupportedCipherSuite] = &[
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ];
        const CHACHA_ONLY: &[SupportedCipherSuite] = &[cipher_suite::TLS13_CHACHA20_POLY1305_SHA256];
        match self {
            Self::All => ALL,
            Self::ChaChaOnly => CHACHA_ONLY,
        }
    }

    fn provider(self) -> &'static Arc<CryptoProvider> {
        static ALL: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
        static CHACHA_ONLY: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
        let provider = match self {
            Self::All => &ALL,
            Self::ChaChaOnly => &CHACHA_ONLY,
        };
        provider.get_or_init(|| {
            Arc::new(CryptoProvider {
                cipher_suites: self.suites().to_vec(),
                kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1],
                ..aws_lc_rs::default_provider()
            })
        })
    }
}

/// The protocol of two agents that carry one connection of the applications after the other over a TLS connection:
/// docs/SESSIONS.md. A peer that does not know it ignores the offer (RFC 7301 section 3.1), and its TLS connection carries
/// one connection only.
pub(super) const REUSE: &[u8] = b"bunter/1";

/// A cipher suite's name as IANA writes it.
pub(super) fn cipher_name(suite: SupportedCipherSuite) -> &'static str {
    match suite.suite() {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => "TLS_AES_128_GCM_SHA256",
        CipherSuite::TLS13_AES_256_GCM_SHA384 => "TLS_AES_256_GCM_SHA384",
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => "TLS_CHACHA20_POLY1305_SHA256",
        _ => "unknown",
    }
}

pub(super) fn client(
    credential: &Credential,
    judge: Arc<PeerVerifier>,
    ciphers: Ciphers,
    reuse: bool,
) -> Result<Arc<ClientConfig>, Cause> {
    let own = Arc::new(SingleCertAndKey::from(credential.certified.clone()));
    let mut config = ClientConfig::builder_with_provider(ciphers.provider().clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(Cause::unready)?
        .dangerous()
        .with_custom_certificate_verifier(judge)
        .with_client_cert_resolver(own);
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config.alpn_protocols = protocols(reuse);
    config.enable_early_data = false;
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}

fn protocols(reuse: bool) -> Vec<Vec<u8>> {
    if reuse { vec![REUSE.to_vec()] } else { Vec::new() }
}

pub(super) fn server(
    credential: &Credential,
    judge: Arc<PeerVerifier>,
    ciphers: Ciphers,
    reuse: bool,
) -> Result<Arc<ServerConfig>, Cause> {
    let own = Arc::new(SingleCertAndKey::from(credential.certified.clone()));
    let mut config = ServerConfig::builder_with_provider(ciphers.provider().clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(Cause::unready)?
        .with_client_cert_verifier(judge)
        .with_cert_resolver(own);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.alpn_protocols = protocols(reuse);
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config.send_half_rtt_data = false;
    config.ignore_client_order = true;
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}
