use super::*;
use crate::trust::testing::*;
use rustls::pki_types::pem::PemObject;
use std::os::unix::fs::PermissionsExt;
use x509_parser::prelude::{FromDer, X509Certificate};

const HOUR: Duration = Duration::from_secs(3600);

fn made() -> (tempfile::TempDir, PathBuf) {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("etc/ca");
    init(&dir, &domain_of("example.org"), DEFAULT_LIFE, now()).unwrap();
    (scratch, dir)
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn issued() -> Issued {
    let (_scratch, dir) = made();
    let authority = Authority::load(&dir, Some(&domain_of("example.org")), now()).unwrap();
    authority.issue(&id_of("spiffe://example.org/web"), HOUR, now()).unwrap()
}

#[test]
fn init_makes_a_directory_for_root_alone_and_a_key_for_root_alone() {
    let (_scratch, dir) = made();
    assert_eq!((mode(&dir), mode(&dir.join(KEY_FILE)), mode(&dir.join(CERTIFICATE_FILE))), (0o700, 0o600, 0o644));
}

#[test]
fn the_authority_names_its_trust_domain_and_may_only_sign_leaves() {
    let (_scratch, dir) = made();
    let authority = Authority::load(&dir, None, now()).unwrap();
    let (_, certificate) = X509Certificate::from_der(&authority.certificate).unwrap();
    let constraints = certificate.basic_constraints().unwrap().unwrap();
    assert!(constraints.critical && constraints.value.ca);
    assert_eq!(constraints.value.path_len_constraint, Some(0));
    assert!(certificate.key_usage().unwrap().unwrap().value.key_cert_sign());
    // R32: the signing certificate's SPIFFE ID has no path.
    assert_eq!(Parsed::parse(&authority.certificate).unwrap().uris().unwrap(), ["spiffe://example.org"]);
    assert_eq!(authority.trust_domain(), &domain_of("example.org"));
}

#[test]
fn init_never_overwrites_an_authority() {
    let (_scratch, dir) = made();
    let before = std::fs::read(dir.join(KEY_FILE)).unwrap();
    let error = init(&dir, &domain_of("example.org"), DEFAULT_LIFE, now()).unwrap_err();
    assert_eq!(error.code(), "ca-exists");
    std::fs::remove_file(dir.join(CERTIFICATE_FILE)).unwrap();
    assert_eq!(init(&dir, &domain_of("example.org"), DEFAULT_LIFE, now()).unwrap_err().code(), "ca-exists");
    assert_eq!(std::fs::read(dir.join(KEY_FILE)).unwrap(), before);
}

#[test]
fn an_issued_svid_carries_exactly_one_uri() {
    // R23, R24
    assert_eq!(Parsed::parse(&issued().certificate).unwrap().uris().unwrap(), ["spiffe://example.org/web"]);
}

#[test]
fn an_issued_svid_has_a_subject_and_so_its_names_are_not_critical() {
    // R27
    let issued = issued();
    let (_, certificate) = X509Certificate::from_der(&issued.certificate).unwrap();
    assert!(certificate.subject().iter().count() > 0);
    assert!(!certificate.subject_alternative_name().unwrap().unwrap().critical);
}

#[test]
fn an_issued_svid_says_explicitly_that_it_is_no_authority() {
    // R28
    let issued = issued();
    let (_, certificate) = X509Certificate::from_der(&issued.certificate).unwrap();
    assert!(!certificate.basic_constraints().unwrap().expect("explicit").value.ca);
}

#[test]
fn an_issued_svid_may_sign_handshakes_and_nothing_else() {
    // R29
    let issued = issued();
    let (_, certificate) = X509Certificate::from_der(&issued.certificate).unwrap();
    let usage = certificate.key_usage().unwrap().unwrap();
    assert!(usage.critical && usage.value.digital_signature());
    assert!(!usage.value.key_cert_sign() && !usage.value.crl_sign());
    // R30
    let purposes = certificate.extended_key_usage().unwrap().unwrap().value;
    assert!(purposes.server_auth && purposes.client_auth && !purposes.any);
}

#[test]
fn an_issued_svid_begins_a_little_early_and_lasts_as_long_as_asked() {
    let issued = issued();
    let parsed = Parsed::parse(&issued.certificate).unwrap();
    assert_eq!(parsed.not_before(), now() - LEEWAY);
    assert_eq!(parsed.not_after(), now() + HOUR);
    assert_eq!((issued.not_before, issued.not_after), (parsed.not_before(), parsed.not_after()));
    assert_eq!(issued.serial, parsed.serial());
}

#[test]
fn every_svid_has_a_fresh_key_and_a_fresh_serial_number() {
    // R41
    let (_scratch, dir) = made();
    let authority = Authority::load(&dir, None, now()).unwrap();
    let id = id_of("spiffe://example.org/web");
    let (one, two) = (authority.issue(&id, HOUR, now()).unwrap(), authority.issue(&id, HOUR, now()).unwrap());
    assert_ne!(one.serial, two.serial);
    assert_ne!(*one.key, *two.key);
    assert!(one.certified().unwrap().keys_match().is_ok());
}

#[test]
fn no_svid_outlives_its_authority() {
    let (scratch, _) = made();
    let dir = scratch.path().join("short");
    init(&dir, &domain_of("example.org"), Duration::from_secs(600), now()).unwrap();
    let authority = Authority::load(&dir, None, now()).unwrap();
    let issued = authority.issue(&id_of("spiffe://example.org/web"), HOUR, now()).unwrap();
    assert_eq!(issued.not_after, now() + Duration::from_secs(600));
}

#[test]
fn an_identity_of_another_trust_domain_is_not_issued() {
    let (_scratch, dir) = made();
    let authority = Authority::load(&dir, None, now()).unwrap();
    let error = authority.issue(&id_of("spiffe://example.net/web"), HOUR, now()).unwrap_err();
    assert_eq!((error.code(), error.culprit()), ("ca-foreign-id", Culprit::Policy));
    assert!(authority.issue(&id_of("spiffe://example.org/web"), Duration::ZERO, now()).is_err());
}

#[test]
fn a_missing_authority_is_named() {
    let error = Authority::load(Path::new("/nonexistent/ca"), None, now()).unwrap_err();
    assert_eq!((error.code(), error.culprit()), ("ca-missing", Culprit::Host));
    assert!(error.to_string().contains("/nonexistent/ca/ca.pem"), "{error}");
}

#[test]
fn an_expired_authority_and_one_of_the_future_are_refused() {
    let (_scratch, dir) = made();
    let load = |at| Authority::load(&dir, None, at).unwrap_err().code();
    assert_eq!(load(now() + DEFAULT_LIFE), "ca-expired");
    assert_eq!(load(now() - HOUR), "ca-not-yet-valid");
}

#[test]
fn an_authority_of_another_trust_domain_is_refused_and_both_are_named() {
    let (_scratch, dir) = made();
    let error = Authority::load(&dir, Some(&domain_of("example.net")), now()).unwrap_err();
    assert_eq!(error.code(), "ca-other-domain");
    assert!(error.to_string().contains("example.org") && error.to_string().contains("example.net"), "{error}");
}

#[test]
fn an_authority_whose_key_the_group_may_read_is_refused() {
    let (_scratch, dir) = made();
    for (file, wrong) in [(KEY_FILE, 0o640), (KEY_FILE, 0o604), (CERTIFICATE_FILE, 0o666), (".", 0o777)] {
        let path = dir.join(file);
        let right = mode(&path);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(wrong)).unwrap();
        let error = Authority::load(&dir, None, now()).unwrap_err();
        assert_eq!((error.code(), error.culprit()), ("ca-permissions", Culprit::Host), "{file}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(right)).unwrap();
    }
    assert!(Authority::load(&dir, None, now()).is_ok());
}

#[test]
fn a_key_of_another_authority_and_garbage_are_refused() {
    let (_scratch, dir) = made();
    let (_other_scratch, other) = made();
    let original = std::fs::read(dir.join(KEY_FILE)).unwrap();
    std::fs::copy(other.join(KEY_FILE), dir.join(KEY_FILE)).unwrap();
    assert_eq!(Authority::load(&dir, None, now()).unwrap_err().code(), "ca-key-mismatch");
    std::fs::write(dir.join(KEY_FILE), "garbage").unwrap();
    assert_eq!(Authority::load(&dir, None, now()).unwrap_err().code(), "ca-malformed");
    std::fs::write(dir.join(KEY_FILE), original).unwrap();
    std::fs::write(dir.join(CERTIFICATE_FILE), "garbage").unwrap();
    assert_eq!(Authority::load(&dir, None, now()).unwrap_err().code(), "ca-malformed");
}

#[test]
fn a_leaf_in_the_place_of_the_authority_is_refused() {
    let (_scratch, dir) = made();
    let issued = Authority::load(&dir, None, now()).unwrap().issue(&id_of("spiffe://example.org/web"), HOUR, now());
    std::fs::write(dir.join(CERTIFICATE_FILE), &*files::pem("CERTIFICATE", &issued.unwrap().certificate)).unwrap();
    assert_eq!(Authority::load(&dir, None, now()).unwrap_err().code(), "ca-not-an-authority");
}

#[test]
fn issue_writes_three_files_that_openssl_can_read_and_replaces_them_whole() {
    let (scratch, dir) = made();
    let out = scratch.path().join("peer");
    let id = id_of("spiffe://example.org/peer");
    let first = issue_files(&dir, &id, &out, HOUR, now()).unwrap();
    let second = issue_files(&dir, &id, &out, HOUR, now()).unwrap();
    assert_ne!(first.serial, second.serial);
    assert_eq!(mode(&out.join("key.pem")), 0o600);
    let svid = CertificateDer::from_pem_file(out.join("svid.pem")).unwrap();
    assert_eq!(svid, second.certificate);
    let key = PrivateKeyDer::from_pem_file(out.join("key.pem")).unwrap();
    let key = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&key).unwrap();
    assert!(rustls::sign::CertifiedKey::new(vec![svid], key).keys_match().is_ok());
    let bundle = std::fs::read(out.join("bundle.pem")).unwrap();
    assert!(Anchors::parse(&domain_of("example.org"), Path::new("b"), &bundle, now()).is_ok());
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 3);
}

#[test]
fn secrets_are_not_in_the_debug_text() {
    let issued = issued();
    assert!(!format!("{issued:?}").contains("key"), "{issued:?}");
}
