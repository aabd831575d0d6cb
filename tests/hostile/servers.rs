//! Servers that a protected client must not talk to, though they answer at the right address.

use lab::policy::{PORT, id};
use lab::stranger::{Attempt, Tls};
use lab::{Lab, Mint, Policy, Skip, Svid, Terms, clock, lab, or_skip};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::Duration as Time;
use time::Duration;

/// The client dials an address that policy says is `right`; whoever answers there is played by hand. Not a byte of the
/// client's may come through, and the client's agent says why.
fn refuses(lab: &Lab, code: &str, play: impl FnOnce(&TcpListener, &Mint) -> Attempt + Send) -> Result<(), Skip> {
    let policy = Policy::empty(lab).workload("client").destination(lab.stranger.at(PORT), "right").allow(
        "client-to-right",
        "client",
        "right",
    );
    let mesh = lab.only_mesh(&policy)?;
    let mint = mesh.mint();
    let listener = lab.stranger.within(|| TcpListener::bind(lab.stranger.at(PORT)).unwrap());
    std::thread::scope(|scope| {
        let server = scope.spawn(|| play(&listener, &mint));
        let error = lab.expect_no_echo(&lab.alpha, "client", lab.stranger.at(PORT), &[]);
        assert!(error == "ECONNRESET" || error == "EPIPE", "{error}");
        let saw = server.join().unwrap();
        assert!(saw.answer.is_empty(), "the server got {:?}", String::from_utf8_lossy(&saw.answer));
    });
    let record = mesh.alpha().expect_denied(PORT, code);
    assert_eq!(record["direction"], "outbound", "{record}");
    assert_eq!(record["source"]["id"], id("client"), "{record}");
    mesh.alpha().expect_records(PORT, 1);
    lab.expect_no_plaintext();
    Ok(())
}

fn answer_with(listener: &TcpListener, mint: &Mint, terms: &Terms) -> Attempt {
    let svid: Svid = mint.issue(terms).unwrap();
    Tls::default().answer(listener, &svid)
}

#[test]
fn a_server_with_another_identity_than_the_destinations_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-not-permitted", |listener, mint| {
        answer_with(listener, mint, &Terms::of(&id("wrong")))
    }));
}

#[test]
fn the_clients_own_identity_is_not_the_servers() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-not-permitted", |listener, mint| {
        answer_with(listener, mint, &Terms::of(&id("client")))
    }));
}

#[test]
fn a_server_with_an_expired_svid_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-certificate-expired", |listener, mint| {
        let terms = Terms { from: Duration::hours(-2), until: Duration::minutes(-1), ..Terms::of(&id("right")) };
        answer_with(listener, mint, &terms)
    }));
}

#[test]
fn a_server_whose_svid_is_revoked_is_refused_and_its_open_connection_reset() {
    let lab = lab!();
    let policy = Policy::empty(&lab).workload("client").destination(lab.stranger.at(PORT), "right").allow(
        "client-to-right",
        "client",
        "right",
    );
    let mesh = or_skip!(lab.only_mesh(&policy));
    let svid = mesh.mint().svid(&id("right")).unwrap();
    let certificate = lab.file("right.pem", &svid.certificate_pem);
    let listener = lab.stranger.within(|| TcpListener::bind(lab.stranger.at(PORT)).unwrap());
    std::thread::scope(|scope| {
        let server = scope.spawn(|| [(); 2].map(|()| Tls::default().answer(&listener, &svid)));
        let say = format!("send:{}\\n", lab.marker());
        let mut client = lab.talk(&lab.alpha, "client", lab.stranger.at(PORT), &[], &[&say, "to-end"]);
        let open = clock::until(clock::seconds(20), || (mesh.alpha().connections().len() == 1).then_some(()));
        assert!(open.is_some(), "{}", mesh.alpha().log());
        mesh.revoke(&certificate);
        mesh.alpha().signal(rustix::process::Signal::HUP);
        let end = client.step("to-end");
        assert_eq!(end["ok"], false, "a connection that was cut off ended cleanly: {end}");
        lab.expect_no_echo(&lab.alpha, "client", lab.stranger.at(PORT), &[]);
        let [held, second] = server.join().unwrap();
        assert!(held.handshake && held.end.contains("AccessDenied"), "{held:?}");
        assert!(second.answer.is_empty() && second.end.contains("CertificateRevoked"), "{second:?}");
    });
    let record = mesh.alpha().expect_denied(PORT, "peer-certificate-revoked");
    assert_eq!((&record["direction"], &record["culprit"]), (&"outbound".into(), &"peer".into()), "{record}");
    mesh.alpha().expect_record("the revoked one", |record| record["code"] == "revoked");
    mesh.alpha().expect_records(PORT, 2);
    lab.expect_no_plaintext();
}

#[test]
fn a_server_of_an_unknown_authority_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-untrusted", |listener, _| {
        let (other, ..) = Mint::found(lab::policy::DOMAIN, Duration::hours(-1), Duration::hours(1)).unwrap();
        answer_with(listener, &other, &Terms::of(&id("right")))
    }));
}

#[test]
fn a_server_with_two_uri_names_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "", |listener, mint| {
        answer_with(listener, mint, &Terms { uris: vec![id("right"), id("client")], ..Terms::default() })
    }));
}

#[test]
fn a_server_with_a_certificate_for_clients_alone_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-key-purpose", |listener, mint| {
        let usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        answer_with(listener, mint, &Terms { usages, ..Terms::of(&id("right")) })
    }));
}

#[test]
fn a_server_that_speaks_tls_1_2_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "", |listener, mint| { Tls::old().answer(listener, &mint.svid(&id("right")).unwrap()) }));
}

#[test]
fn a_server_that_speaks_plaintext_first_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "", |listener, _| {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"220 smtp.example.org ready\r\n").unwrap();
        stream.set_read_timeout(Some(clock::seconds(15))).unwrap();
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        // The client's hello is all that it may have got: the client's own bytes are looked for on the wire.
        assert_eq!(bytes.first(), Some(&22), "{bytes:?}");
        Attempt::default()
    }));
}

#[test]
fn a_server_that_never_answers_is_given_up() {
    let lab = lab!();
    let policy = Policy::empty(&lab).workload("client").destination(lab.stranger.at(PORT), "right").allow(
        "client-to-right",
        "client",
        "right",
    );
    let settings = lab::Settings { tables: "[timeouts]\nhandshake = \"2s\"\n".to_owned(), ..Default::default() };
    let mesh = or_skip!(lab.only_mesh_with(&policy, &settings));
    let listener = lab.stranger.within(|| TcpListener::bind(lab.stranger.at(PORT)).unwrap());
    let held = std::thread::spawn(move || {
        listener.accept().map(|(stream, _)| (stream, std::thread::sleep(Time::from_secs(1))))
    });
    lab.expect_no_echo(&lab.alpha, "client", lab.stranger.at(PORT), &[]);
    drop(held.join());
    mesh.alpha().expect_denied(PORT, "peer-stalled");
    lab.expect_no_plaintext();
}

#[test]
fn a_server_that_is_not_there_is_a_refusal_with_a_reason() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let error = lab.expect_no_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    assert!(error == "ECONNRESET" || error == "EPIPE", "{error}");
    let record = mesh.alpha().expect_denied(PORT, "");
    assert_eq!(record["direction"], "outbound", "{record}");
    lab.expect_no_plaintext();
}
