use super::*;
use crate::trust::testing::*;
use rcgen::{BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose};
use std::time::Duration;

const WEB: &str = "spiffe://example.org/web";

/// One authority of example.org, and what a leaf of it is taken for.
struct Judge {
    ca: TestCa,
    trust: Trust,
}

impl Judge {
    fn new() -> Self {
        let ca = TestCa::new("example.org");
        let trust = ca.trust("example.org");
        Self { ca, trust }
    }

    fn leaf(&self, change: impl FnOnce(&mut CertificateParams)) -> Result<SpiffeId, PeerCertificateError> {
        self.leaf_as(Role::Server, change)
    }

    fn leaf_as(
        &self,
        role: Role,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Result<SpiffeId, PeerCertificateError> {
        let mut params = leaf_params(WEB);
        change(&mut params);
        self.chain(&[self.ca.leaf(params)], role)
    }

    fn chain(&self, chain: &[CertificateDer<'_>], role: Role) -> Result<SpiffeId, PeerCertificateError> {
        verify_peer(chain, role, &self.trust, unix_now())
    }

    fn code(&self, change: impl FnOnce(&mut CertificateParams)) -> &'static str {
        self.leaf(change).unwrap_err().code()
    }

    fn uri_code(&self, text: &str) -> &'static str {
        self.code(|params| params.subject_alt_names = vec![uri(text)])
    }
}

// What is accepted.

#[test]
fn a_good_svid_is_accepted_in_both_roles() {
    let judge = Judge::new();
    assert_eq!(judge.leaf_as(Role::Server, |_| {}).unwrap(), id_of(WEB));
    assert_eq!(judge.leaf_as(Role::Client, |_| {}).unwrap(), id_of(WEB));
}

#[test]
fn an_svid_below_an_intermediate_of_the_same_trust_domain_is_accepted() {
    // R35
    let judge = Judge::new();
    let middle = judge.ca.intermediate(ca_params("example.org"));
    let chain = [middle.leaf(leaf_params(WEB)), middle.certificate.clone()];
    assert_eq!(judge.chain(&chain, Role::Client).unwrap(), id_of(WEB));
    // The anchor sent along, and certificates that belong to nobody, do no harm.
    let stranger = TestCa::new("example.net").certificate;
    let chain = [chain[0].clone(), stranger, chain[1].clone(), judge.ca.certificate.clone()];
    assert_eq!(judge.chain(&chain, Role::Client).unwrap(), id_of(WEB));
}

#[test]
fn an_svid_without_extended_key_usage_is_unrestricted() {
    // R31
    let judge = Judge::new();
    for role in [Role::Server, Role::Client] {
        judge.leaf_as(role, |params| params.extended_key_usages.clear()).unwrap();
    }
}

#[test]
fn an_svid_with_an_empty_subject_or_with_dns_names_beside_is_accepted() {
    // R27, R25
    let judge = Judge::new();
    judge.leaf(|params| params.distinguished_name = rcgen::DistinguishedName::new()).unwrap();
    let dns = rcgen::SanType::DnsName("web.example.org".try_into().unwrap());
    assert_eq!(judge.leaf(|params| params.subject_alt_names.push(dns)).unwrap(), id_of(WEB));
}

#[test]
fn an_svid_without_basic_constraints_is_no_authority() {
    // R28: go-spiffe accepts it as well; absent means false in RFC 5280.
    Judge::new().leaf(|params| params.is_ca = IsCa::NoCa).unwrap();
}

#[test]
fn key_agreement_beside_digital_signature_is_allowed() {
    // R29
    let more = [KeyUsagePurpose::KeyEncipherment, KeyUsagePurpose::KeyAgreement];
    Judge::new().leaf(|params| params.key_usages.extend(more)).unwrap();
}

// What is refused: the name.

#[test]
fn a_certificate_with_two_uri_names_is_refused_whatever_their_schemes() {
    // R23, R24
    let judge = Judge::new();
    for second in ["spiffe://example.org/db", WEB, "https://example.org/", "urn:x"] {
        assert_eq!(judge.code(|params| params.subject_alt_names.push(uri(second))), "peer-uri-count", "{second}");
        assert_eq!(judge.code(|params| params.subject_alt_names.insert(0, uri(second))), "peer-uri-count", "{second}");
    }
}

#[test]
fn a_certificate_with_no_uri_name_is_refused() {
    // R23
    let judge = Judge::new();
    assert_eq!(judge.code(|params| params.subject_alt_names.clear()), "peer-uri-count");
    let dns = rcgen::SanType::DnsName("web.example.org".try_into().unwrap());
    assert_eq!(judge.code(|params| params.subject_alt_names = vec![dns]), "peer-uri-count");
}

#[test]
fn a_certificate_with_two_name_extensions_is_refused() {
    // R23: "exactly one SubjectAltName extension"
    let judge = Judge::new();
    // SEQUENCE { [6] "spiffe://example.org/db" }
    let name = b"spiffe://example.org/db";
    let length = u8::try_from(name.len()).unwrap();
    let content = [&[0x30, length + 2, 0x86, length][..], name].concat();
    let second = CustomExtension::from_oid_content(&[2, 5, 29, 17], content);
    assert_eq!(judge.code(|params| params.custom_extensions.push(second)), "peer-certificate-malformed");
}

#[test]
fn a_uri_that_is_no_spiffe_id_of_a_workload_is_refused() {
    // R36
    let judge = Judge::new();
    for text in [
        "http://example.org/web",
        "https://example.org/web",
        "wimse://example.org/web",
        "spiffe:example.org/web",
        "urn:spiffe:example.org:web",
        "spiffe:///web",
        "spiffe://example.org:443/web",
        "spiffe://user@example.org/web",
        "spiffe://example.org/web?x=1",
        "spiffe://example.org/web#x",
        "spiffe://example.org/%77eb",
        "spiffe://example.org//web",
        "spiffe://example.org/../web",
        "",
    ] {
        assert_eq!(judge.uri_code(text), "peer-id-invalid", "{text:?}");
    }
}

#[test]
fn a_name_without_a_path_belongs_to_no_workload() {
    // R27, R36
    let judge = Judge::new();
    for text in ["spiffe://example.org", "spiffe://example.org/"] {
        assert_eq!(judge.uri_code(text), "peer-id-invalid", "{text:?}");
    }
}

#[test]
fn an_upper_case_trust_domain_or_scheme_is_refused_and_not_repaired() {
    // R7, R13
    let judge = Judge::new();
    for text in ["spiffe://EXAMPLE.ORG/web", "spiffe://Example.org/web", "SPIFFE://example.org/web"] {
        assert_eq!(judge.uri_code(text), "peer-id-invalid", "{text:?}");
    }
}

#[test]
fn the_path_is_case_sensitive() {
    // R9
    let judge = Judge::new();
    let id = judge.leaf(|params| params.subject_alt_names = vec![uri("spiffe://example.org/WEB")]).unwrap();
    assert_ne!(id, id_of(WEB));
}

#[test]
fn a_name_with_a_nul_or_a_control_character_is_refused() {
    let judge = Judge::new();
    for text in ["spiffe://example.org/web\0.evil", "spiffe://example.org/web\n", " spiffe://example.org/web"] {
        assert_eq!(judge.uri_code(text), "peer-id-invalid", "{text:?}");
    }
}

// What is refused: the leaf.

#[test]
fn a_leaf_that_may_be_an_authority_is_refused() {
    // R28, R36
    let judge = Judge::new();
    let code = judge.code(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    assert_eq!(code, "peer-certificate-is-authority");
}

#[test]
fn the_authority_itself_cannot_be_a_peer() {
    // R32
    let judge = Judge::new();
    let error = judge.chain(std::slice::from_ref(&judge.ca.certificate), Role::Server).unwrap_err();
    assert_eq!(error.code(), "peer-id-invalid", "its ID has no path");
    let mut params = ca_params("example.org");
    params.subject_alt_names = vec![uri(WEB)];
    params.key_usages.push(KeyUsagePurpose::DigitalSignature);
    let named = judge.ca.intermediate(params);
    let error = judge.chain(&[named.certificate], Role::Server).unwrap_err();
    assert_eq!(error.code(), "peer-certificate-is-authority");
}

#[test]
fn a_leaf_without_key_usage_is_refused() {
    // R29
    assert_eq!(Judge::new().code(|params| params.key_usages.clear()), "peer-key-usage");
}

#[test]
fn a_leaf_without_digital_signature_is_refused() {
    // R29
    assert_eq!(Judge::new().code(|params| params.key_usages = vec![KeyUsagePurpose::KeyAgreement]), "peer-key-usage");
}

#[test]
fn a_leaf_that_may_sign_certificates_or_crls_is_refused() {
    // R29, R36
    let judge = Judge::new();
    for usage in [KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign] {
        assert_eq!(judge.code(|params| params.key_usages.push(usage)), "peer-key-usage", "{usage:?}");
    }
}

#[test]
fn a_leaf_for_servers_only_is_no_client_and_the_other_way_round() {
    // R31, R45
    let judge = Judge::new();
    let only = |purpose| move |params: &mut CertificateParams| params.extended_key_usages = vec![purpose];
    judge.leaf_as(Role::Server, only(ExtendedKeyUsagePurpose::ServerAuth)).unwrap();
    judge.leaf_as(Role::Client, only(ExtendedKeyUsagePurpose::ClientAuth)).unwrap();
    let refused = [
        (Role::Client, ExtendedKeyUsagePurpose::ServerAuth),
        (Role::Server, ExtendedKeyUsagePurpose::ClientAuth),
        (Role::Server, ExtendedKeyUsagePurpose::Any),
        (Role::Client, ExtendedKeyUsagePurpose::EmailProtection),
    ];
    for (role, purpose) in refused {
        let error = judge.leaf_as(role, only(purpose.clone())).unwrap_err();
        assert_eq!(error.code(), "peer-key-purpose", "{role:?} {purpose:?}");
    }
}

#[test]
fn a_leaf_with_an_unknown_critical_extension_is_refused() {
    // R35
    let mut unknown = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 55555, 1], vec![5, 0]);
    unknown.set_criticality(true);
    assert_eq!(Judge::new().code(|params| params.custom_extensions.push(unknown)), "peer-untrusted");
}

// What is refused: time.

#[test]
fn an_expired_svid_is_refused() {
    // R35, R41
    let judge = Judge::new();
    let error = judge.leaf(|params| params.not_after = (now() - Duration::from_secs(1)).into()).unwrap_err();
    assert_eq!((error.code(), error.culprit()), ("peer-certificate-expired", Culprit::Peer));
    assert!(error.to_string().contains("2026-11-22T05:16:59Z"), "{error}");
}

#[test]
fn an_svid_that_is_not_yet_valid_is_refused() {
    // R35
    let code = Judge::new().code(|params| params.not_before = (now() + Duration::from_secs(60)).into());
    assert_eq!(code, "peer-certificate-not-yet-valid");
}

#[test]
fn an_svid_below_an_expired_intermediate_is_refused() {
    // R35
    let judge = Judge::new();
    let mut params = ca_params("example.org");
    params.not_after = (now() - Duration::from_secs(1)).into();
    let middle = judge.ca.intermediate(params);
    let chain = [middle.leaf(leaf_params(WEB)), middle.certificate.clone()];
    assert_eq!(judge.chain(&chain, Role::Client).unwrap_err().code(), "peer-certificate-expired");
}

#[test]
fn an_anchor_that_expired_after_it_was_loaded_is_no_anchor_any_more() {
    let judge = Judge::new();
    let leaf = judge.ca.leaf({
        let mut params = leaf_params(WEB);
        params.not_after = (now() + Duration::from_secs(10 * 24 * 3600)).into();
        params
    });
    let later = UnixTime::since_unix_epoch(Duration::from_secs(unix_now().as_secs() + 2 * 24 * 3600));
    let error = verify_peer(&[leaf], Role::Server, &judge.trust, later).unwrap_err();
    assert_eq!((error.code(), error.culprit()), ("peer-bundle-expired", Culprit::Host));
}

// What is refused: trust.

#[test]
fn a_trust_domain_without_a_bundle_is_untrusted() {
    // R61
    let judge = Judge::new();
    let stranger = TestCa::new("example.net").leaf(leaf_params("spiffe://example.net/web"));
    let error = judge.chain(&[stranger], Role::Client).unwrap_err();
    assert_eq!((error.code(), error.culprit()), ("peer-trust-domain-unknown", Culprit::Policy));
    assert!(error.to_string().contains("example.net"), "{error}");
}

#[test]
fn a_right_name_signed_by_the_authority_of_another_trust_domain_is_refused() {
    // R37, R44: both trust domains are trusted, each for itself.
    let (org, net) = (TestCa::new("example.org"), TestCa::new("example.net"));
    let trust = org.trust("example.org").with(domain_of("example.net"), net.anchors("example.net"));
    let forged = net.leaf(leaf_params(WEB));
    let error = verify_peer(&[forged], Role::Server, &trust, unix_now()).unwrap_err();
    assert_eq!(error.code(), "peer-untrusted");
    let own = net.leaf(leaf_params("spiffe://example.net/web"));
    assert!(verify_peer(&[own], Role::Server, &trust, unix_now()).is_ok());
}

#[test]
fn an_intermediate_of_another_trust_domain_cannot_vouch_even_below_the_right_anchor() {
    // R37
    let judge = Judge::new();
    let middle = judge.ca.intermediate(ca_params("example.net"));
    let chain = [middle.leaf(leaf_params(WEB)), middle.certificate.clone()];
    assert_eq!(judge.chain(&chain, Role::Client).unwrap_err().code(), "peer-untrusted");
}

#[test]
fn an_intermediate_that_may_not_sign_certificates_cannot_vouch() {
    // R29, R35
    let judge = Judge::new();
    let mut params = ca_params("example.org");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let middle = judge.ca.intermediate(params);
    let chain = [middle.leaf(leaf_params(WEB)), middle.certificate.clone()];
    assert_eq!(judge.chain(&chain, Role::Client).unwrap_err().code(), "peer-untrusted");
}

#[test]
fn a_workload_cannot_vouch_for_another() {
    // R28
    let judge = Judge::new();
    let workload = judge.ca.intermediate(leaf_params(WEB));
    let chain = [workload.leaf(leaf_params("spiffe://example.org/db")), workload.certificate.clone()];
    assert_eq!(judge.chain(&chain, Role::Client).unwrap_err().code(), "peer-untrusted");
}

#[test]
fn a_path_longer_than_the_anchor_allows_is_refused() {
    // R35
    let mut params = ca_params("example.org");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let top = TestCa::new("example.org");
    let limited = top.intermediate(params);
    let below = limited.intermediate(ca_params("example.org"));
    let chain = [below.leaf(leaf_params(WEB)), below.certificate.clone(), limited.certificate.clone()];
    let error = verify_peer(&chain, Role::Client, &top.trust("example.org"), unix_now()).unwrap_err();
    assert_eq!(error.code(), "peer-untrusted");
}

#[test]
fn a_self_signed_certificate_is_refused() {
    // R37
    let judge = Judge::new();
    let own = TestCa::with(leaf_params(WEB)).certificate;
    assert_eq!(judge.chain(&[own], Role::Client).unwrap_err().code(), "peer-untrusted");
}

#[test]
fn an_authority_of_the_same_name_with_another_key_is_another_authority() {
    // R37, R50
    let judge = Judge::new();
    let mut params = ca_params("example.org");
    let parsed = x509_parser::parse_x509_certificate(&judge.ca.certificate).unwrap().1;
    let name = parsed.subject().iter_common_name().next().unwrap().as_str().unwrap().to_owned();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    let forged = TestCa::with(params).leaf(leaf_params(WEB));
    assert_eq!(judge.chain(&[forged], Role::Client).unwrap_err().code(), "peer-untrusted");
}

#[test]
fn a_changed_byte_in_the_certificate_breaks_it() {
    let judge = Judge::new();
    let good = judge.ca.leaf(leaf_params(WEB));
    for position in 0..good.len() {
        let mut bytes = good.to_vec();
        bytes[position] ^= 0x01;
        assert!(judge.chain(&[bytes.into()], Role::Client).is_err(), "byte {position}");
    }
}

#[test]
fn garbage_and_an_empty_chain_are_refused() {
    let judge = Judge::new();
    assert_eq!(judge.chain(&[], Role::Client).unwrap_err().code(), "peer-no-certificate");
    let good = judge.ca.leaf(leaf_params(WEB));
    let trailing = [good.as_ref(), &[0]].concat();
    for bytes in [&[][..], &[0], &[0x30, 0x82, 0xff, 0xff], b"-----BEGIN CERTIFICATE-----", &good[..100], &trailing] {
        let error = judge.chain(&[bytes.to_vec().into()], Role::Client).unwrap_err();
        assert_eq!(error.code(), "peer-certificate-malformed");
    }
    // Garbage behind a leaf that an anchor signed is not needed, and so not looked at; behind a leaf that needs an
    // intermediate it does not help.
    let middle = judge.ca.intermediate(ca_params("example.org"));
    let chain = [middle.leaf(leaf_params(WEB)), vec![0x30, 0x00].into()];
    assert!(judge.chain(&chain, Role::Client).is_err());
}

#[test]
fn a_chain_without_end_is_not_walked() {
    let judge = Judge::new();
    let chain = vec![judge.ca.leaf(leaf_params(WEB)); LONGEST_CHAIN + 1];
    assert_eq!(judge.chain(&chain, Role::Client).unwrap_err().code(), "peer-chain-too-long");
}

// What is refused: what was revoked.

#[test]
fn a_revoked_certificate_is_refused_and_no_other_one() {
    // R39
    let (ca, other) = (TestCa::new("example.org"), TestCa::new("example.org"));
    let net = TestCa::new("example.net");
    let leaf = |ca: &TestCa, id: &str, serial: &[u8]| vec![ca.leaf(numbered(leaf_params(id), serial))];
    let middle = ca.intermediate(numbered(ca_params("example.org"), &[9]));
    let free = ca.intermediate(numbered(ca_params("example.org"), &[10]));
    let below = |middle: &TestCa, serial: &[u8]| [leaf(middle, WEB, serial), vec![middle.certificate.clone()]].concat();
    let with_anchor = [leaf(&ca, WEB, &[5]), vec![ca.certificate.clone()]].concat();
    let both = ca.trust("example.org").with(domain_of("example.org"), other.anchors("example.org"));
    let two_domains = ca.trust("example.org").with(domain_of("example.net"), net.anchors("example.net"));
    let revoked: [&[u8]; 3] = [&[5], &[0xff, 1], &[9]];
    let list = ca.list(list_params(&revoked));
    let own = with_list(ca.trust("example.org"), "example.org", &list);
    let both = with_list(both, "example.org", &list);
    let two_domains = with_list(two_domains, "example.org", &list);
    for (what, trust, chain, expected) in [
        ("on the list", &own, leaf(&ca, WEB, &[5]), Err("peer-certificate-revoked")),
        ("with a zero before its number", &own, leaf(&ca, WEB, &[0xff, 1]), Err("peer-certificate-revoked")),
        ("with the anchor sent along", &own, with_anchor, Err("peer-certificate-revoked")),
        ("not on the list", &own, leaf(&ca, WEB, &[6]), Ok(())),
        ("below a revoked intermediate", &own, below(&middle, &[1]), Err("peer-certificate-revoked")),
        ("below another intermediate, which has no list", &own, below(&free, &[5]), Ok(())),
        ("of the second anchor, on the list of the first", &both, leaf(&other, WEB, &[5]), Ok(())),
        ("of the first of two anchors", &both, leaf(&ca, WEB, &[5]), Err("peer-certificate-revoked")),
        ("of another trust domain", &two_domains, leaf(&net, "spiffe://example.net/x", &[5]), Ok(())),
        ("without any list", &ca.trust("example.org"), leaf(&ca, WEB, &[5]), Ok(())),
    ] {
        for role in [Role::Server, Role::Client] {
            let verdict = verify_chain(&chain, role, trust, unix_now());
            assert_eq!(verdict.as_ref().map(|_| ()).map_err(Refusal::code), expected, "{what}");
            // A peer that passes is found by its path in a list that comes later.
            if let Ok(peer) = verdict {
                assert!(trust.still_believes(&peer.id.trust_domain(), &peer.path), "{what}");
                let taken = own.revokes(&peer.id.trust_domain(), peer.path.certificates());
                assert_eq!(taken, what == "without any list", "{what}");
            }
        }
    }
}

#[test]
fn a_connection_is_known_by_its_whole_path_when_a_list_comes_later() {
    // R39
    let ca = TestCa::new("example.org");
    let middle = ca.intermediate(numbered(ca_params("example.org"), &[9]));
    let chain = [middle.leaf(numbered(leaf_params(WEB), &[1])), middle.certificate.clone()];
    let peer = verify_chain(&chain, Role::Client, &ca.trust("example.org"), unix_now()).unwrap();
    for (serial, expected) in [(9, true), (1, false)] {
        let later = ca.trust_but("example.org", &[&[serial]]);
        assert_eq!(later.revokes(&peer.id.trust_domain(), peer.path.certificates()), expected, "{serial}");
    }
}

#[test]
fn with_a_list_that_has_expired_no_peer_of_its_authority_is_let_in() {
    // R39
    let ca = TestCa::new("example.org");
    let trust = ca.trust_but("example.org", &[&[5]]);
    let mut params = leaf_params(WEB);
    params.not_after = (now() + Duration::from_secs(2 * 3600)).into();
    let leaf = [ca.leaf(params)];
    let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(unix_now().as_secs() + seconds));
    assert!(verify_peer(&leaf, Role::Server, &trust, at(3599)).is_ok());
    let error = verify_peer(&leaf, Role::Server, &trust, at(3600)).unwrap_err();
    assert_eq!((error.code(), error.culprit()), ("peer-crl-expired", Culprit::Host));
    for word in ["example.org", "2026-11-22T06:17:00Z", "--refresh", "SIGHUP"] {
        assert!(error.to_string().contains(word), "{error}");
    }
}

// In a handshake.
