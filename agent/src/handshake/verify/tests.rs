use super::*;
use crate::policy::Matcher;
use bunter_identity::trust::testing::*;
use rcgen::CertificateParams;
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, ServerConfig, ServerConnection,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use std::time::Duration;

const WEB: &str = "spiffe://example.org/web";

fn peers(ids: &[&str]) -> Peers {
    let rule = |id: &&str| {
        let rule = Rule { number: 1, name: "test".into(), idle_timeout: None };
        (Matcher::Exact(id_of(id)), Arc::new(rule))
    };
    Peers(ids.iter().map(rule).collect())
}

struct Outcome {
    client: Result<(), TlsError>,
    server: Result<(), TlsError>,
    seen_by_client: Option<Result<Admitted, Rejection>>,
    seen_by_server: Option<Result<Admitted, Rejection>>,
}

#[derive(Debug)]
struct Clock;

impl rustls::time_provider::TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix_now())
    }
}

/// A whole TLS 1.3 handshake in memory. The server is `spiffe://example.org/web`; without `client_leaf` the client has no
/// certificate.
fn handshake(ca: &TestCa, client_leaf: Option<CertificateParams>, by_client: &[&str], by_server: &[&str]) -> Outcome {
    handshake_in(ca, ca.trust("example.org"), client_leaf, by_client, by_server)
}

/// The same where both ends have this trust.
fn handshake_in(
    ca: &TestCa,
    trust: Trust,
    client_leaf: Option<CertificateParams>,
    by_client: &[&str],
    by_server: &[&str],
) -> Outcome {
    let trust = Arc::new(trust);
    let client_sees = PeerVerifier::new(Role::Server, trust.clone(), peers(by_client));
    let server_sees = PeerVerifier::new(Role::Client, trust, peers(by_server));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let certified = |params| {
        let (leaf, key) = ca.leaf_with_key(params);
        (vec![leaf], PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())))
    };
    let (chain, key) = certified(leaf_params(WEB));
    let server = ServerConfig::builder_with_details(provider.clone(), Arc::new(Clock))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(server_sees.clone())
        .with_single_cert(chain, key)
        .unwrap();
    let client = ClientConfig::builder_with_details(provider, Arc::new(Clock))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(client_sees.clone());
    let client = match client_leaf {
        Some(params) => {
            let (chain, key) = certified(params);
            client.with_client_auth_cert(chain, key).unwrap()
        }
        None => client.with_no_client_auth(),
    };
    let name = ServerName::try_from("bunter.invalid").unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
    let mut server = ServerConnection::new(Arc::new(server)).unwrap();
    let (mut client_result, mut server_result) = (Ok(()), Ok(()));
    for _ in 0..6 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        server.read_tls(&mut &wire[..]).unwrap();
        server_result = server_result.and(server.process_new_packets().map(|_| ()));
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        client.read_tls(&mut &wire[..]).unwrap();
        client_result = client_result.and(client.process_new_packets().map(|_| ()));
    }
    Outcome {
        client: client_result,
        server: server_result,
        seen_by_client: client_sees.verdict().cloned(),
        seen_by_server: server_sees.verdict().cloned(),
    }
}

const CURL: &str = "spiffe://example.org/curl";

fn alert(result: &Result<(), TlsError>) -> AlertDescription {
    match result {
        Err(TlsError::AlertReceived(alert)) => *alert,
        other => panic!("no alert but {other:?}"),
    }
}

#[test]
fn both_sides_learn_the_peer_and_the_rule_that_admits_it() {
    let ca = TestCa::new("example.org");
    let outcome = handshake(&ca, Some(leaf_params(CURL)), &[WEB], &[CURL]);
    assert_eq!((outcome.client, outcome.server), (Ok(()), Ok(())));
    let (server, client) = (outcome.seen_by_client.unwrap().unwrap(), outcome.seen_by_server.unwrap().unwrap());
    assert_eq!((server.peer.id.as_str(), client.peer.id.as_str()), (WEB, CURL));
    assert_eq!(&*client.rule.name, "test");
    assert_eq!(client.peer.not_after, now() + Duration::from_secs(3600));
}

#[test]
fn a_good_certificate_of_a_workload_that_is_not_meant_is_refused_with_access_denied() {
    // R47, R50: trust in the authority is not enough.
    let ca = TestCa::new("example.org");
    let outcome = handshake(&ca, Some(leaf_params(CURL)), &["spiffe://example.org/other"], &[CURL]);
    assert_eq!(alert(&outcome.server), AlertDescription::AccessDenied);
    let rejection = outcome.seen_by_client.unwrap().unwrap_err();
    assert_eq!((rejection.code(), rejection.culprit()), ("peer-not-permitted", Culprit::Policy));

    let outcome = handshake(&ca, Some(leaf_params(CURL)), &[WEB], &[]);
    assert_eq!(alert(&outcome.client), AlertDescription::AccessDenied);
    assert_eq!(outcome.seen_by_server.unwrap().unwrap_err(), Rejection::NotPermitted(id_of(CURL)));
}

#[test]
fn a_client_without_a_certificate_ends_the_handshake() {
    // R43
    let ca = TestCa::new("example.org");
    let outcome = handshake(&ca, None, &[WEB], &[CURL]);
    assert_eq!(alert(&outcome.client), AlertDescription::CertificateRequired);
    assert!(outcome.server.is_err() && outcome.seen_by_server.is_none());
}

#[test]
fn each_kind_of_bad_certificate_gets_its_alert() {
    let ca = TestCa::new("example.org");
    let alert_for = |change: fn(&mut CertificateParams)| {
        let mut params = leaf_params(CURL);
        change(&mut params);
        alert(&handshake(&ca, Some(params), &[WEB], &[CURL]).client)
    };
    assert_eq!(alert_for(|params| params.subject_alt_names.push(uri(WEB))), AlertDescription::BadCertificate);
    assert_eq!(alert_for(|params| params.key_usages.clear()), AlertDescription::UnsupportedCertificate);
    let unknown = |params: &mut CertificateParams| params.subject_alt_names = vec![uri("spiffe://example.net/x")];
    assert_eq!(alert_for(unknown), AlertDescription::UnknownCA);
    let expired = |params: &mut CertificateParams| params.not_after = (now() - Duration::from_secs(1)).into();
    assert_eq!(alert_for(expired), AlertDescription::CertificateExpired);
    let trust = ca.trust_but("example.org", &[&[5]]);
    let outcome = handshake_in(&ca, trust, Some(numbered(leaf_params(CURL), &[5])), &[WEB], &[CURL]);
    assert_eq!(alert(&outcome.client), AlertDescription::CertificateRevoked);
    let rejection = outcome.seen_by_server.unwrap().unwrap_err();
    assert_eq!((rejection.code(), rejection.culprit()), ("peer-certificate-revoked", Culprit::Peer));
    assert!(rejection.to_string().contains(CURL), "{rejection}");
}

#[test]
fn a_verifier_judges_one_peer_only() {
    let ca = TestCa::new("example.org");
    let verifier = PeerVerifier::new(Role::Client, Arc::new(ca.trust("example.org")), peers(&[WEB]));
    let leaf = ca.leaf(leaf_params(WEB));
    assert!(verifier.verify_client_cert(&leaf, &[], unix_now()).is_ok());
    assert!(verifier.verify_client_cert(&leaf, &[], unix_now()).is_err());
    let name = ServerName::try_from("bunter.invalid").unwrap();
    assert!(verifier.verify_server_cert(&leaf, &[], &name, &[], unix_now()).is_err());
}

#[test]
fn no_authority_is_named_to_strangers_and_a_certificate_is_mandatory() {
    let trust = TestCa::new("example.org").trust("example.org");
    let verifier = PeerVerifier::new(Role::Client, Arc::new(trust), peers(&[]));
    assert!(ClientCertVerifier::root_hint_subjects(&*verifier).is_empty());
    assert!(verifier.offer_client_auth() && verifier.client_auth_mandatory());
}
