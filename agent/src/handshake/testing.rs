//! Two hosts in one test: a trust domain, permits, sessions, and a foreign TLS stack that believes everybody.

use super::{Accepted, Ciphers, Error, Session, Terms, accept, connect};
use crate::{
    attest::Facts,
    authorize::Permit,
    credential::Credential,
    flow::Direction,
    identify::Parties,
    policy::{Matcher, Peers, Rule, Workload},
};
use bunter_identity::trust::{
    bundle::Trust,
    testing::{Anybody, TestCa, ca_params, domain_of, id_of, leaf_params, numbered},
};
use rcgen::CertificateParams;
use rustls::{
    ClientConfig, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    sign::CertifiedKey,
};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{
    net::{TcpListener, TcpStream},
    time::Instant,
};

pub(crate) const WEB: &str = "spiffe://example.org/web";
pub(crate) const CURL: &str = "spiffe://example.org/curl";

/// A trust domain with its authority.
pub(crate) struct World {
    ca: TestCa,
    trust: Arc<Trust>,
}

impl World {
    pub(crate) fn new() -> Self {
        let ca = TestCa::with(now_valid(ca_params("example.org")));
        let trust = Arc::new(Trust::new().with(domain_of("example.org"), ca.anchors("example.org")));
        Self { ca, trust }
    }

    /// The same world, once its authority has revoked all certificates of this workload.
    pub(crate) fn revoking(self, id: &str) -> Self {
        let trust = self.ca.trust_but("example.org", &[serial(id)]);
        Self { trust: Arc::new(trust), ..self }
    }

    /// Certificate and PKCS#8 key of a workload.
    pub(crate) fn svid(&self, id: &str) -> (CertificateDer<'static>, Vec<u8>) {
        let (certificate, key) = self.ca.leaf_with_key(numbered(now_valid(leaf_params(id)), serial(id)));
        (certificate, key.serialize_der())
    }

    pub(crate) fn ca_der(&self) -> &CertificateDer<'static> {
        &self.ca.certificate
    }

    fn credential(&self, id: &str) -> Arc<Credential> {
        let (certificate, key) = self.svid(id);
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
        let key = aws_lc_rs::sign::any_ecdsa_type(&key).unwrap();
        Arc::new(Credential {
            id: id_of(id),
            certified: Arc::new(CertifiedKey::new(vec![certificate], key)),
            not_before: SystemTime::now(),
            not_after: SystemTime::now() + Duration::from_secs(3600),
            serial: "00".into(),
        })
    }

    /// A permit for `local` to talk to `peer` alone.
    pub(crate) fn permit(&self, direction: Direction, socket: TcpStream, local: &str, peer: &str) -> Permit {
        let address = socket.local_addr().unwrap();
        let parties = Parties {
            flow: crate::flow::testing::flow(direction, socket, address, None),
            workload: Workload { number: 1, id: id_of(local) },
            trust: self.trust.clone(),
            facts: Facts { pid: 1, uid: 0, gid: 0, comm: "test".into(), executable: None, cgroup: None, note: None },
        };
        let rule = Arc::new(Rule { number: 1, name: "test".into(), idle_timeout: None });
        Permit::forged(parties, Peers(vec![(Matcher::Exact(id_of(peer)), rule)]))
    }

    /// A foreign client that accepts any server. Without `id` it has no certificate.
    pub(crate) fn foreign_client(&self, id: Option<&str>) -> ClientConfig {
        let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody));
        match id.map(|id| self.svid(id)) {
            Some((certificate, key)) => {
                let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
                builder.with_client_auth_cert(vec![certificate], key).unwrap()
            }
            None => builder.with_no_client_auth(),
        }
    }

    /// A foreign server that asks for a certificate and accepts any.
    pub(crate) fn foreign_server(&self, id: &str) -> ServerConfig {
        let (certificate, key) = self.svid(id);
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
        ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(Arc::new(Anybody))
            .with_single_cert(vec![certificate], key)
            .unwrap()
    }

    /// Shakes hands as the client, as the permit's workload.
    pub(crate) async fn connect(&self, permit: Permit, network: TcpStream, terms: Terms) -> Result<Session, Error> {
        let credential = self.credential(permit.parties().workload.id.as_str());
        connect(permit, credential, network, terms).await
    }

    /// Shakes hands as the server, as the permit's workload.
    pub(crate) async fn accept(&self, permit: Permit, terms: Terms) -> Result<Accepted, Error> {
        let credential = self.credential(permit.parties().workload.id.as_str());
        accept(permit, credential, terms).await
    }

    /// Both ends of one connection after the handshake: curl dials web. The applications' sockets are the other ends of the
    /// flows.
    pub(crate) async fn sessions(&self, ciphers: Ciphers) -> Sessions {
        self.sessions_by(terms(ciphers)).await
    }

    /// The same under other terms.
    pub(crate) async fn sessions_by(&self, terms: Terms) -> Sessions {
        let (client_application, client_own) = program().await;
        let (network_client, network_server) = pair().await;
        let client = self.permit(Direction::Outbound, client_own, CURL, WEB);
        let server = self.permit(Direction::Inbound, network_server, WEB, CURL);
        let (client, server) = tokio::join!(self.connect(client, network_client, terms), self.accept(server, terms));
        Sessions { client_application, client: client.unwrap(), server: server.unwrap() }
    }
}

pub(crate) struct Sessions {
    pub(crate) client_application: TcpStream,
    pub(crate) client: Session,
    pub(crate) server: Accepted,
}

pub(crate) fn terms(ciphers: Ciphers) -> Terms {
    Terms { deadline: Instant::now() + Duration::from_secs(10), ciphers, reuse: false }
}

/// Two ends of a loopback connection.
pub(crate) async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dial = TcpStream::connect(listener.local_addr().unwrap());
    let (dialled, accepted) = tokio::join!(dial, listener.accept());
    (dialled.unwrap(), accepted.unwrap().0)
}

/// The same between a program and the agent.
pub(crate) async fn program() -> (TcpStream, TcpStream) {
    let (program, own) = pair().await;
    crate::intercept::prepare(&own, crate::intercept::Congestion::Ordinary).unwrap();
    (program, own)
}

/// Serial number of each certificate of a workload.
fn serial(id: &str) -> &[u8] {
    &id.as_bytes()[id.len() - 3..]
}

/// The certificates of the authority's tests are valid around a fixed time, but a handshake looks at the clock.
fn now_valid(mut params: CertificateParams) -> CertificateParams {
    params.not_before = (SystemTime::now() - Duration::from_secs(365 * 24 * 3600)).into();
    params.not_after = (SystemTime::now() + Duration::from_secs(365 * 24 * 3600)).into();
    params
}
