//! The other end is no Bunter: OpenSSL and curl with an SVID from `bunter ca issue`, on either side.

use crate::programs::nginx;
use lab::policy::{PORT, id};
use lab::stranger::Tls;
use lab::{Lab, Mint, Policy, Program, Settings, clock, lab, or_skip, skip};
use std::path::Path;

/// OpenSSL on the host without an agent, with the SVID that was issued there.
pub(crate) fn openssl(lab: &Lab, issued: &Path, words: &[&str]) -> Program {
    let file = |name: &str| issued.join(name).display().to_string();
    let (svid, key, bundle) = (file("svid.pem"), file("key.pem"), file("bundle.pem"));
    let (what, options) = words.split_first().expect("s_client or s_server");
    let identity = ["openssl", what, "-cert", &svid, "-key", &key, "-CAfile", &bundle, "-tls1_3"];
    lab.run(&lab.stranger, "foreign", &[&identity, options].concat())
}

#[test]
fn openssl_with_an_svid_talks_to_a_protected_plaintext_server() {
    let lab = lab!();
    or_skip!(skip::need("openssl"));
    let policy = Policy::standard(&lab).allow("foreign", "foreign", "server");
    let mesh = or_skip!(lab.only_mesh(&policy));
    let mut server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let issued = mesh.issue("foreign");
    let to = lab.beta.at(PORT).to_string();
    let mut client =
        openssl(&lab, &issued, &["s_client", "-connect", &to, "-verify_return_error", "-quiet", "-no_ign_eof"]);
    client.say(lab.marker()).unwrap();
    client.line(clock::seconds(20), |line| line.contains(lab.marker())).unwrap();
    // Again, so that a ticket or anything else that came in between is behind it.
    client.say(&format!("{} once more", lab.marker())).unwrap();
    client.line(clock::seconds(20), |line| line.contains("once more")).unwrap();
    client.close_stdin();
    client.end(clock::seconds(20)).unwrap();
    let accepted = server.event(|event| event["event"] == "accepted");
    assert_eq!(lab::world::address(&accepted, "peer").ip(), std::net::IpAddr::V4(lab.stranger.v4));
    let record = &mesh.beta().expect_records(PORT, 1)[0];
    assert_eq!(record["decision"], "allowed", "{record}");
    assert_eq!(record["source"]["id"], id("foreign"), "{record}");
    assert_eq!(record["rule"], "foreign", "{record}");
    lab.expect_tls(PORT);
}

#[test]
fn openssl_may_update_its_keys() {
    let lab = lab!();
    or_skip!(skip::need("openssl"));
    let policy = Policy::standard(&lab).allow("foreign", "foreign", "server");
    let mesh = or_skip!(lab.only_mesh(&policy));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let issued = mesh.issue("foreign");
    let to = lab.beta.at(PORT).to_string();
    let mut client = openssl(&lab, &issued, &["s_client", "-connect", &to]);
    let say = |client: &mut Program, text: &str| {
        client.say(&format!("{} {text}", lab.marker())).unwrap();
        client.line(clock::seconds(20), |line| line.contains(lab.marker()) && line.ends_with(text))
    };
    say(&mut client, "before").unwrap();
    // s_client takes a line of one letter as a command: K updates both keys, k its own.
    for (command, text) in [("k", "after its own"), ("K", "after both")] {
        // A command has to be read alone: s_client drops what comes with it.
        let before = client.stderr().matches("KEYUPDATE").count();
        client.say(command).unwrap();
        let done =
            clock::until(clock::seconds(20), || (client.stderr().matches("KEYUPDATE").count() > before).then_some(()));
        assert!(done.is_some(), "no key update: {}", client.stderr());
        let answer = say(&mut client, text);
        let engine = mesh.beta().connections().first().map(|connection| connection["engine"].clone());
        match answer {
            Ok(_) => {}
            // A kernel that cannot take new keys has to end the connection, and say so.
            Err(error) => {
                assert_eq!(mesh.beta().status()["agent"]["engine"], "kernel", "{error:#} {engine:?}");
                let record = &mesh.beta().expect_records(PORT, 1)[0];
                assert_eq!(record["code"], "rekey-impossible", "{record}");
                break;
            }
        }
    }
    drop(client);
    lab.expect_tls(PORT);
}

#[test]
fn curl_with_an_svid_talks_to_a_protected_nginx() {
    let lab = lab!();
    or_skip!(skip::need("nginx"));
    or_skip!(skip::need("curl"));
    let policy = Policy::standard(&lab).allow("foreign", "foreign", "server");
    let mesh = or_skip!(lab.only_mesh(&policy));
    let _nginx = nginx(&lab, &lab.beta, "server");
    let issued = mesh.issue("foreign");
    let file = |name: &str| issued.join(name).display().to_string();
    let url = format!("https://{}/", lab.beta.at(PORT));
    // curl knows host names and no SPIFFE IDs: -k leaves that check out, the certificate is what counts here.
    let words =
        ["curl", "-sSk", "--http1.1", "--max-time", "20", "--cert", &file("svid.pem"), "--key", &file("key.pem"), &url];
    let page = lab.run(&lab.stranger, "foreign", &words).outcome().good();
    assert_eq!(page.trim(), lab.marker());
    let without = ["curl", "-sSk", "--http1.1", "--max-time", "20", &url];
    lab.run(&lab.stranger, "foreign", &without).outcome().bad();
    let records = mesh.beta().expect_records(PORT, 2);
    assert_eq!(records[0]["decision"], "allowed", "{records:#?}");
    assert_eq!(records[1]["decision"], "denied", "{records:#?}");
    lab.expect_tls(PORT);
}

#[test]
fn a_protected_client_talks_to_a_foreign_tls_server() {
    let lab = lab!();
    or_skip!(skip::need("openssl"));
    let policy =
        Policy::standard(&lab).destination(lab.stranger.at(PORT), "foreign").allow("to-foreign", "client", "foreign");
    let mesh = or_skip!(lab.only_mesh(&policy));
    let issued = mesh.issue("foreign");
    let port = PORT.to_string();
    let mut server =
        openssl(&lab, &issued, &["s_server", "-accept", &port, "-Verify", "2", "-verify_return_error", "-rev"]);
    server.line(clock::seconds(20), |line| line.contains("ACCEPT")).unwrap();
    let say = format!("send:{}\\n", lab.marker());
    let client =
        lab.talk(&lab.alpha, "client", lab.stranger.at(PORT), &[], &[&say, "line", "names", "half-close", "to-end"]);
    let said = lab::world::events(&client.outcome().stdout);
    let backwards: String = lab.marker().chars().rev().collect();
    assert_eq!(lab::world::pick(&said, "line")["text"], backwards, "{said:#?}");
    assert_eq!(lab::world::address(lab::world::pick(&said, "names"), "peer"), lab.stranger.at(PORT));
    let record = &mesh.alpha().expect_records(PORT, 1)[0];
    assert_eq!(record["decision"], "allowed", "{record}");
    assert_eq!(record["destination"]["id"], id("foreign"), "{record}");
    lab.expect_tls(PORT);
}

#[test]
fn what_bunter_ca_issues_is_an_svid_that_openssl_verifies() {
    let lab = lab!();
    or_skip!(skip::need("openssl"));
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let issued = mesh.issue("somebody");
    let file = |name: &str| issued.join(name).display().to_string();
    let openssl = |words: &[&str]| {
        let words = [&["openssl"][..], words].concat();
        lab.run(&lab.stranger, "foreign", &words).outcome().good()
    };
    openssl(&["verify", "-CAfile", &file("bundle.pem"), "-purpose", "sslclient", &file("svid.pem")]);
    openssl(&["verify", "-CAfile", &file("bundle.pem"), "-purpose", "sslserver", &file("svid.pem")]);
    let text = openssl(&["x509", "-in", &file("svid.pem"), "-noout", "-text"]);
    assert!(text.contains(&format!("URI:{}", id("somebody"))), "{text}");
    assert!(text.contains("Digital Signature") && !text.contains("CA:TRUE"), "{text}");
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(issued.join("key.pem")).unwrap().permissions());
    assert_eq!(mode & 0o077, 0, "the key is readable by others");
}

#[test]
fn what_bunter_ca_revokes_is_revoked_for_openssl() {
    let lab = lab!();
    or_skip!(skip::need("openssl"));
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let (one, other) = (mesh.issue("one").join("svid.pem"), mesh.issue("other").join("svid.pem"));
    let list = lab.directory().join("ca/crl.pem");
    let verify = |leaf: &std::path::Path| {
        let (bundle, list) = (lab.directory().join("ca/ca.pem"), list.display().to_string());
        let words = ["openssl", "verify", "-crl_check", "-CAfile", &bundle.display().to_string(), "-CRLfile", &list];
        lab.run(&lab.stranger, "foreign", &[&words[..], &[&leaf.display().to_string()]].concat()).outcome()
    };
    mesh.revoke(&one);
    let said = verify(&one).bad();
    assert!(said.contains("certificate revoked"), "{said}");
    verify(&other).good();
    mesh.revoke(&other);
    let said = verify(&other).bad();
    assert!(said.contains("certificate revoked"), "{said}");
    let said = mesh.revoke(&one);
    assert!(said.contains("already"), "{said}");
}

#[test]
fn application_data_in_the_same_segment_as_the_finished_arrives() {
    let lab = lab!();
    let policy = Policy::standard(&lab).allow("foreign", "foreign", "server");
    let mesh = or_skip!(lab.only_mesh(&policy));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let svid = mesh.mint().svid(&id("foreign")).unwrap();
    for length in [1, 1000, 16_384, 50_000] {
        let bytes: Vec<u8> = lab.marker().bytes().cycle().take(length).collect();
        let said = lab.stranger.within(|| Tls::default().talk_at_once(lab.beta.at(PORT), &svid, &bytes));
        assert!(said.answer == bytes, "{length}: {}", said.end);
    }
    mesh.beta().expect_records(PORT, 4);
    lab.expect_no_plaintext();
}

#[test]
fn a_friendly_trust_domain_is_trusted_for_its_own_names_and_no_others() {
    let lab = lab!();
    let (friends, bundle, _) = Mint::found("friends.test", time::Duration::days(-1), time::Duration::days(1)).unwrap();
    let file = lab.file("friends.pem", bundle);
    let tables = format!("[[trust]]\ntrust_domain = \"friends.test\"\nbundle = \"{}\"\n", file.display());
    let rule = |name: &str, from: &str| {
        format!("[[allow]]\nname = \"{name}\"\nfrom = \"{from}\"\nto = \"{}\"\n", id("server"))
    };
    let policy = Policy::standard(&lab).raw(&rule("friend", "spiffe://friends.test/friend"));
    let mesh = or_skip!(lab.only_mesh_with(&policy, &Settings { tables, ..Settings::default() }));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let talk = |mint: &Mint, name: &str| {
        let svid = mint.svid(name).unwrap();
        lab.stranger.within(|| Tls::default().talk(lab.beta.at(PORT), Some(&svid), lab.marker().as_bytes()))
    };
    let said = talk(&friends, "spiffe://friends.test/friend");
    assert_eq!(said.answer, lab.marker().as_bytes(), "{said:?}");
    talk(&friends, "spiffe://friends.test/other").expect_refused();
    // Each authority speaks for its own trust domain alone.
    talk(&friends, &id("client")).expect_refused();
    talk(&mesh.mint(), "spiffe://friends.test/friend").expect_refused();
    let records = mesh.beta().expect_records(PORT, 4);
    let allowed: Vec<_> = records.iter().filter(|record| record["decision"] == "allowed").collect();
    assert_eq!(allowed.len(), 1, "{records:#?}");
    assert_eq!(allowed[0]["source"]["id"], "spiffe://friends.test/friend");
    lab.expect_no_plaintext();
}
