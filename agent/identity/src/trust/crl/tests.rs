use super::{
    super::{bundle::Trust, testing::*},
    *,
};
use rcgen::{CertificateRevocationListParams, CrlDistributionPoint, CrlIssuingDistributionPoint, KeyUsagePurpose};
use std::{os::unix::fs::PermissionsExt, time::Duration};

const HOUR: Duration = Duration::from_secs(3600);

/// Authorities of example.org in one bundle, and what a file of lists is taken for there.
fn code_in(authorities: &[&TestCa], file: &str) -> &'static str {
    let domain = domain_of("example.org");
    let trust =
        authorities.iter().fold(Trust::new(), |trust, ca| trust.with(domain.clone(), ca.anchors("example.org")));
    let anchors = trust.anchors(&domain).unwrap();
    let check = |lists: Vec<Arc<List>>| lists.iter().try_for_each(|list| list.check_time(now()));
    match parse(&domain, Path::new("/etc/bunter/ca/crl.pem"), file.as_bytes(), &anchors.authorities(), &[]) {
        Err(error) => error.code(),
        Ok(lists) => check(lists).map_or_else(|fault| in_file(fault).code(), |()| "taken"),
    }
}

fn in_file(fault: ListFault) -> CrlError {
    CrlError::List { domain: domain_of("example.org"), path: "/crl.pem".into(), number: 1, fault }
}

fn pem(der: &[u8]) -> String {
    files::pem("X509 CRL", der).to_string()
}

fn signed(ca: &TestCa, change: impl FnOnce(&mut CertificateRevocationListParams)) -> String {
    let mut params = list_params(&[&[5]]);
    change(&mut params);
    pem(&ca.list(params))
}

/// The same name, another key.
fn twin(ca: &TestCa, change: impl FnOnce(&mut rcgen::CertificateParams)) -> TestCa {
    let mut params = ca_params("example.org");
    let parsed = x509_parser::parse_x509_certificate(&ca.certificate).unwrap().1;
    let name = parsed.subject().iter_common_name().next().unwrap().as_str().unwrap().to_owned();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    change(&mut params);
    TestCa::with(params)
}

#[test]
fn a_list_is_taken_if_an_anchor_of_its_trust_domain_signed_it_and_it_is_current() {
    let (ca, other) = (TestCa::new("example.org"), TestCa::new("example.org"));
    let (one, two) = (signed(&ca, |_| {}), signed(&other, |_| {}));
    let none_revoked = signed(&ca, |params| params.revoked_certs.clear());
    let late = signed(&ca, |params| params.this_update = (now() + HOUR / 2).into());
    let over = signed(&ca, |params| params.next_update = now().into());
    for (what, authorities, file, expected) in [
        ("its own", &[&ca][..], one.clone(), "taken"),
        ("one that revokes nothing", &[&ca], none_revoked, "taken"),
        ("two of two authorities", &[&ca, &other], format!("{one}{two}"), "taken"),
        ("one of two authorities", &[&ca, &other], two.clone(), "taken"),
        ("of an authority of another bundle", &[&ca], two, "crl-other-authority"),
        ("of another trust domain", &[&ca], signed(&TestCa::new("example.net"), |_| {}), "crl-other-authority"),
        ("signed by somebody else in its name", &[&ca], signed(&twin(&ca, |_| {}), |_| {}), "crl-forged"),
        ("of a name that two keys have", &[&ca, &twin(&ca, |_| {})], one.clone(), "crl-ambiguous"),
        ("twice", &[&ca], format!("{one}{one}"), "crl-twice"),
        ("over", &[&ca], over, "crl-expired"),
        ("of the future", &[&ca], late, "crl-not-yet-valid"),
        ("nothing", &[&ca], String::new(), "crl-empty"),
        ("no PEM", &[&ca], "rubbish".into(), "crl-empty"),
        ("a certificate", &[&ca], ca.pem(), "crl-malformed"),
        ("half a PEM", &[&ca], one[..one.len() / 2].into(), "crl-malformed"),
        ("a certificate that says that it is a list", &[&ca], pem(&ca.certificate), "crl-malformed"),
        ("no DER", &[&ca], pem(b"rubbish"), "crl-malformed"),
        ("bytes after the list", &[&ca], pem(&[&ca.list(list_params(&[]))[..], &[0]].concat()), "crl-malformed"),
    ] {
        assert_eq!(code_in(authorities, &file), expected, "{what}");
    }
}

/// Extension: OID below id-ce, critical or not, value.
fn extension(number: u8, critical: bool, value: &[u8]) -> Vec<u8> {
    let critical = if critical { tlv(1, &[0xff]) } else { Vec::new() };
    tlv(0x30, &[tlv(6, &[0x55, 0x1d, number]), critical, tlv(4, value)].concat())
}

#[test]
fn a_list_that_says_only_a_part_or_cannot_be_read_without_doubt_is_refused() {
    let ca = TestCa::new("example.org");
    let good = ca.list(list_params(&[&[5]]));
    let with = |more: Vec<u8>| {
        pem(&ca.changed_list(&good, |body| {
            let extensions = [parts(&parts(&body[6])[0]).concat(), more].concat();
            body[6] = tlv(0xa0, &tlv(0x30, &extensions));
        }))
    };
    // The one entry, with an extension.
    let entry = |more: Vec<u8>| {
        pem(&ca.changed_list(&good, |body| {
            let entry = [parts(&parts(&body[5])[0]).concat(), tlv(0x30, &more)].concat();
            body[5] = tlv(0x30, &tlv(0x30, &entry));
        }))
    };
    let without = |part: usize| pem(&ca.changed_list(&good, |body| drop(body.remove(part))));
    let point = signed(&ca, |params| {
        let distribution_point = CrlDistributionPoint { uris: vec!["http://example.org/crl".into()] };
        params.issuing_distribution_point = Some(CrlIssuingDistributionPoint { distribution_point, scope: None });
    });
    // [4] indirectCRL TRUE
    let indirect = with(extension(28, true, &tlv(0x30, &tlv(0x84, &[0xff]))));
    let unknown = |critical| extension(99, critical, &[5, 0]);
    let mut legacy = list_params(&[&[5]]);
    legacy.key_identifier_method = rcgen::KeyIdMethod::PreSpecified(vec![1]);
    for (what, file, expected) in [
        ("changed in nothing", pem(&ca.changed_list(&good, |_| {})), "taken"),
        ("unknown extension", with(unknown(false)), "taken"),
        ("another name for the key", pem(&ca.list(legacy)), "taken"),
        ("unknown critical extension", with(unknown(true)), "crl-unsupported"),
        ("delta", with(extension(27, true, &[2, 1, 1])), "crl-unsupported"),
        ("distribution point", point, "crl-unsupported"),
        ("indirect", indirect, "crl-unsupported"),
        ("unknown critical extension of an entry", entry(unknown(true)), "crl-unsupported"),
        ("entry of another issuer", entry(extension(29, true, &tlv(0x30, &[]))), "crl-unsupported"),
        ("extension twice", with([unknown(false), unknown(false)].concat()), "crl-malformed"),
        ("extension of an entry twice", entry([unknown(false), unknown(false)].concat()), "crl-malformed"),
        ("without extensions", without(6), "crl-malformed"),
        ("without an end", without(4), "crl-malformed"),
        ("without a version", without(0), "crl-malformed"),
    ] {
        assert_eq!(code_in(&[&ca], &file), expected, "{what}");
    }
}

#[test]
fn an_authority_that_may_not_sign_lists_has_none() {
    let ca = TestCa::new("example.org");
    let unfit = twin(&ca, |params| params.key_usages = vec![KeyUsagePurpose::KeyCertSign]);
    let list = unfit.changed_list(&ca.list(list_params(&[])), |_| {});
    assert_eq!(code_in(&[&unfit], &pem(&list)), "crl-not-a-signer");
    // Without a key usage it may (RFC 5280 section 6.3.3 (f)).
    let free = twin(&ca, |params| params.key_usages.clear());
    let list = free.changed_list(&ca.list(list_params(&[])), |_| {});
    assert_eq!(code_in(&[&free], &pem(&list)), "taken");
}

#[test]
fn a_changed_or_missing_byte_in_a_list_breaks_it() {
    let ca = TestCa::new("example.org");
    let good = ca.list(list_params(&[&[5], &[6]]));
    for position in 0..good.len() {
        let mut bytes = good.clone();
        bytes[position] ^= 0x01;
        assert_ne!(code_in(&[&ca], &pem(&bytes)), "taken", "byte {position}");
        assert_ne!(code_in(&[&ca], &pem(&good[..position])), "taken", "byte {position}");
    }
}

#[test]
fn a_missing_or_world_writable_file_of_lists_is_refused_and_named() {
    let ca = TestCa::new("example.org");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("crl.pem");
    let load = || ca.trust("example.org").with_lists(&domain_of("example.org"), &path, now());
    assert_eq!(load().unwrap_err().code(), "crl-missing");
    std::fs::write(&path, signed(&ca, |_| {})).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    let error = load().unwrap_err();
    assert_eq!((error.code(), error.culprit()), ("crl-permissions", Culprit::Host));
    assert!(error.to_string().contains("example.org: ") && error.to_string().contains("chmod 644"), "{error}");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let trust = load().unwrap();
    let about = trust.anchors(&domain_of("example.org")).unwrap().lists()[0].about().clone();
    assert_eq!((about.revoked, &*about.number, about.next_update), (1, "07", now() + HOUR));
    let later = ca.trust("example.org").with_lists(&domain_of("example.org"), &path, now() + HOUR);
    let error = later.unwrap_err();
    assert_eq!(error.code(), "crl-expired");
    for word in ["crl.pem", "example.org", "2026-11-22T06:17:00Z", "--refresh"] {
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn a_list_hits_what_its_own_authority_issued_and_nothing_else() {
    let (ca, other) = (TestCa::new("example.org"), TestCa::new("example.org"));
    let serial = |ca: &TestCa, serial: &[u8]| {
        IssuerAndSerial::of(&ca.leaf(numbered(leaf_params("spiffe://example.org/web"), serial))).unwrap()
    };
    // The second one has a highest bit, so that it is written with a zero before it.
    let list = List::read(
        &ca.list(list_params(&[&[5], &[0xff, 1]])),
        &ca.trust("example.org").anchors(&domain_of("example.org")).unwrap().authorities(),
    );
    let list = list.unwrap();
    for (certificate, expected) in [
        (serial(&ca, &[5]), true),
        (serial(&ca, &[0xff, 1]), true),
        (serial(&ca, &[6]), false),
        (serial(&ca, &[5, 0]), false),
        (serial(&other, &[5]), false),
    ] {
        assert_eq!(list.revokes(&certificate), expected, "{certificate:?}");
    }
}
