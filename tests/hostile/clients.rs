//! Clients of a protected server that should not get in.

use lab::agent::attempts;
use lab::policy::{PORT, id};
use lab::stranger::{self, Attempt, Break, Tls};
use lab::{Lab, Mint, Policy, Program, Settings, Skip, Svid, Terms, clock, lab, or_skip};
use rcgen::ExtendedKeyUsagePurpose;
use std::net::SocketAddr;
use time::Duration;

/// Short, so that a peer that stalls is refused while the test waits.
fn impatient() -> Settings {
    let seconds = 3 * clock::slowness();
    Settings { tables: format!("[timeouts]\nhandshake = \"{seconds}s\"\n"), ..Settings::default() }
}

/// Starts a mesh with a server, lets the stranger try by both families, and checks that it was refused and audited with
/// the code (any if empty), that the workload never saw it, and that proper clients are served before and after.
fn refuses(lab: &Lab, code: &str, attempt: impl Fn(SocketAddr, &Mint) -> Attempt + Send + Sync) -> Result<(), Skip> {
    let mesh = lab.only_mesh_with(&Policy::standard(lab), &impatient())?;
    let server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT), lab.beta.at6(PORT)]);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    let mint = mesh.mint();
    for to in [lab.beta.at(PORT), lab.beta.at6(PORT)] {
        let came = lab.stranger.within(|| attempt(to, &mint));
        came.expect_refused();
    }
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    expect_unseen(&server, 2);
    let records = mesh.beta().expect_records(PORT, 4);
    let denied: Vec<_> = records.iter().filter(|record| record["decision"] == "denied").collect();
    assert_eq!(denied.len(), 2, "{records:#?}");
    for record in denied {
        assert!(code.is_empty() || record["code"] == code, "want {code}: {record}");
        assert_eq!(record["direction"], "inbound", "{record}");
        assert_eq!(record["destination"]["id"], id("server"), "{record}");
        assert!(record["culprit"] == "peer" || record["culprit"] == "policy", "{record}");
        let source: SocketAddr = record["source"]["address"].as_str().unwrap().parse().unwrap();
        assert!(source.ip() == lab.stranger.v4 || source.ip() == lab.stranger.v6, "{record}");
    }
    lab.expect_no_plaintext();
    Ok(())
}

/// The workload has seen so many connections and not one more.
fn expect_unseen(server: &Program, proper: usize) {
    let stdout = server.stdout();
    assert_eq!(stdout.matches("\"accepted\"").count(), proper, "the workload saw a stranger: {stdout}");
}

fn svid(mint: &Mint, terms: &Terms) -> Svid {
    mint.issue(terms).unwrap()
}

#[test]
fn a_stranger_that_speaks_plaintext_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-not-tls", |to, _| stranger::raw(to, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")));
}

#[test]
fn garbage_is_refused() {
    let lab = lab!();
    let garbage: Vec<u8> = (0..20_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8 | 128).collect();
    or_skip!(refuses(&lab, "peer-not-tls", move |to, _| stranger::raw(to, &garbage)));
}

#[test]
fn garbage_in_a_handshake_record_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "", |to, _| {
        let mut bytes = vec![22, 3, 1, 2, 0];
        bytes.extend((0..512_u32).map(|n| (n * 7) as u8));
        stranger::raw(to, &bytes)
    }));
}

#[test]
fn tls_1_2_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-tls-version", |to, mint| {
        Tls::old().talk(to, Some(&svid(mint, &Terms::of(&id("client")))), b"hello")
    }));
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-no-certificate", |to, _| Tls::default().talk(to, None, b"hello")));
}

#[test]
fn an_expired_svid_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-certificate-expired", |to, mint| {
        let terms = Terms { from: Duration::hours(-2), until: Duration::hours(-1), ..Terms::of(&id("client")) };
        Tls::default().talk(to, Some(&svid(mint, &terms)), b"hello")
    }));
}

#[test]
fn an_svid_that_is_not_valid_yet_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-certificate-not-yet-valid", |to, mint| {
        let terms = Terms { from: Duration::hours(1), until: Duration::hours(2), ..Terms::of(&id("client")) };
        Tls::default().talk(to, Some(&svid(mint, &terms)), b"hello")
    }));
}

#[test]
fn an_svid_of_an_unknown_authority_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-untrusted", |to, _| {
        let (other, ..) = Mint::found(lab::policy::DOMAIN, Duration::hours(-1), Duration::hours(1)).unwrap();
        Tls::default().talk(to, Some(&svid(&other, &Terms::of(&id("client")))), b"hello")
    }));
}

#[test]
fn an_svid_of_another_trust_domain_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "", |to, _| {
        let (other, ..) = Mint::found("other.test", Duration::hours(-1), Duration::hours(1)).unwrap();
        Tls::default().talk(to, Some(&svid(&other, &Terms::of("spiffe://other.test/client"))), b"hello")
    }));
}

#[test]
fn the_own_authority_cannot_speak_for_another_trust_domain() {
    let lab = lab!();
    or_skip!(refuses(&lab, "", |to, mint| {
        Tls::default().talk(to, Some(&svid(mint, &Terms::of("spiffe://other.test/client"))), b"hello")
    }));
}

#[test]
fn a_certificate_with_two_uri_names_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "", |to, mint| {
        let terms = Terms { uris: vec![id("client"), id("other")], ..Terms::default() };
        Tls::default().talk(to, Some(&svid(mint, &terms)), b"hello")
    }));
}

#[test]
fn a_certificate_without_a_uri_name_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "", |to, mint| Tls::default().talk(to, Some(&svid(mint, &Terms::default())), b"hello")));
}

#[test]
fn a_certificate_whose_name_is_no_spiffe_id_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "", |to, mint| {
        Tls::default().talk(to, Some(&svid(mint, &Terms::of("https://lab.test/client"))), b"hello")
    }));
}

#[test]
fn an_authority_certificate_is_no_svid() {
    let lab = lab!();
    or_skip!(refuses(&lab, "", |to, mint| {
        let terms = Terms { authority: true, ..Terms::of(&id("client")) };
        Tls::default().talk(to, Some(&svid(mint, &terms)), b"hello")
    }));
}

#[test]
fn a_certificate_for_servers_alone_is_no_clients() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-key-purpose", |to, mint| {
        let terms = Terms { usages: vec![ExtendedKeyUsagePurpose::ServerAuth], ..Terms::of(&id("client")) };
        Tls::default().talk(to, Some(&svid(mint, &terms)), b"hello")
    }));
}

#[test]
fn a_valid_svid_that_policy_does_not_allow_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-not-permitted", |to, mint| {
        Tls::default().talk(to, Some(&svid(mint, &Terms::of(&id("somebody-else")))), b"hello")
    }));
}

#[test]
fn an_id_that_only_begins_like_an_allowed_one_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-not-permitted", |to, mint| {
        Tls::default().talk(to, Some(&svid(mint, &Terms::of(&id("client/2")))), b"hello")
    }));
}

#[test]
fn a_client_that_says_nothing_is_cut_off() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-stalled", |to, _| stranger::raw(to, b"")));
}

#[test]
fn a_client_that_stalls_in_the_middle_of_its_hello_is_cut_off() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-stalled", |to, _| {
        let hello = Tls::default().hello();
        stranger::raw(to, &hello[..hello.len() / 2])
    }));
}

#[test]
fn a_client_that_drips_is_cut_off() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-stalled", |to, mint| {
        let svid = svid(mint, &Terms::of(&id("client")));
        Tls::dripping(clock::millis(50)).talk(to, Some(&svid), b"hello")
    }));
}

#[test]
fn a_record_that_is_too_long_is_refused() {
    let lab = lab!();
    or_skip!(refuses(&lab, "peer-record-too-long", |to, _| {
        let mut bytes = vec![22, 3, 1, 0xff, 0xff];
        bytes.resize(65540, 1);
        stranger::raw(to, &bytes)
    }));
}

#[test]
fn a_handshake_in_single_bytes_works() {
    let lab = lab!();
    let policy = Policy::standard(&lab).allow("foreign", "foreign", "server");
    // So many wake-ups take their time on a slow machine, and are not what the limit is for.
    let tables = format!("[timeouts]\nhandshake = \"{}s\"\n", clock::seconds(10).as_secs());
    let mesh = or_skip!(lab.only_mesh_with(&policy, &Settings { tables, ..Settings::default() }));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let svid = mesh.mint().svid(&id("foreign")).unwrap();
    // Slowly enough for the capture to keep up with a packet for each byte.
    let pause = std::time::Duration::from_micros(300);
    let said =
        lab.stranger.within(|| Tls::dripping(pause).talk(lab.beta.at(PORT), Some(&svid), lab.marker().as_bytes()));
    assert_eq!(said.answer, lab.marker().as_bytes(), "{said:?}");
    assert_eq!(mesh.beta().expect_records(PORT, 1)[0]["decision"], "allowed");
    lab.expect_tls(PORT);
}

#[test]
fn a_revoked_svid_is_refused_and_its_open_connection_is_reset() {
    let lab = lab!();
    let policy = Policy::standard(&lab).allow("foreign", "foreign", "server");
    let mesh = or_skip!(lab.only_mesh(&policy));
    let mut server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let say = format!("send:{}\\n", lab.marker());
    let mut bystander =
        lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &[&say, "line", "wait", &say, "line", "half-close"]);
    bystander.step("line");
    let (bad, good) = (mesh.mint().svid(&id("foreign")).unwrap(), mesh.mint().svid(&id("foreign")).unwrap());
    let certificate = lab.file("bad.pem", &bad.certificate_pem);
    let talk = |svid: &Svid| {
        lab.stranger.within(|| Tls::default().talk(lab.beta.at(PORT), Some(svid), lab.marker().as_bytes()))
    };
    let (tell, told) = std::sync::mpsc::channel();
    let ended = std::thread::scope(|scope| {
        let (lab, bad) = (&lab, &bad);
        let held = scope.spawn(move || {
            let open = move || tell.send(()).unwrap();
            lab.stranger.within(|| Tls::default().hold(lab.beta.at(PORT), bad, lab.marker().as_bytes(), open))
        });
        told.recv_timeout(clock::seconds(20)).unwrap();
        let said = mesh.revoke(&certificate);
        assert!(said.contains("revoked") && said.contains("SIGHUP"), "{said}");
        let began = std::time::Instant::now();
        mesh.beta().signal(rustix::process::Signal::HUP);
        let ended = held.join().unwrap();
        assert!(began.elapsed() < clock::seconds(2), "it took {:?}: {ended:?}", began.elapsed());
        ended
    });
    assert!(ended.handshake && ended.end.contains("AccessDenied"), "{ended:?}");
    let seen = server.event(|event| event["event"] == "ended");
    assert_eq!(seen["end"], "ECONNRESET", "the workload took it for a clean end: {seen}");
    let record = &mesh.beta().expect_records(PORT, 1)[0];
    assert_eq!((&record["decision"], &record["code"]), (&"allowed".into(), &"revoked".into()), "{record}");
    assert_eq!(record["source"]["id"], id("foreign"), "{record}");

    let refused = |wanted: &Svid| {
        let came = talk(wanted);
        came.expect_refused();
        assert!(came.end.contains("CertificateRevoked"), "{came:?}");
    };
    refused(&bad);
    let record = mesh.beta().expect_denied(PORT, "peer-certificate-revoked");
    assert_eq!(record["culprit"], "peer", "{record}");
    assert!(record["reason"].as_str().is_some_and(|reason| reason.contains(&id("foreign"))), "{record}");
    // The same identity by another certificate, and everybody else, are none the worse.
    assert_eq!(talk(&good).answer, lab.marker().as_bytes());
    bystander.say("go on").unwrap();
    assert_eq!(bystander.step("line")["text"], lab.marker());

    // A broken list is not taken: the old one stays in force, and status says so.
    std::fs::write(lab.directory().join("ca/crl.pem"), "rubbish").unwrap();
    let told = mesh.beta().read_again().unwrap_err();
    assert!(told.contains("crl.pem"), "{told}");
    let bundles = mesh.beta().status()["bundles"].clone();
    assert_eq!(bundles[0]["revocations"]["revoked"], 1, "{bundles:#}");
    refused(&bad);
    lab.expect_no_plaintext();
}

/// A permitted peer that breaks the protocol in the middle: the workload sees a reset, never a clean end.
fn a_break_is_a_reset(lab: &Lab, how: Break) -> Result<(), Skip> {
    let policy = Policy::standard(lab).allow("foreign", "foreign", "server");
    let mesh = lab.only_mesh(&policy)?;
    let mut server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let svid = mesh.mint().svid(&id("foreign")).unwrap();
    let said =
        lab.stranger.within(|| Tls::default().talk_and_break(lab.beta.at(PORT), &svid, lab.marker().as_bytes(), how));
    assert!(said.handshake && said.end != "timeout", "{said:?}");
    let ended = server.event(|event| event["event"] == "ended");
    assert_eq!(ended["end"], "ECONNRESET", "{how:?}: the workload took it for a clean end: {ended}");
    assert_eq!(ended["bytes"].as_u64(), Some(lab.marker().len() as u64), "{how:?}: {ended}");
    let record = &mesh.beta().expect_records(PORT, 1)[0];
    assert_eq!(record["decision"], "allowed", "{record}");
    assert_eq!(record["culprit"], "peer", "{record}");
    lab.expect_no_plaintext();
    Ok(())
}

#[test]
fn an_end_without_close_notify_is_a_reset() {
    let lab = lab!();
    or_skip!(a_break_is_a_reset(&lab, Break::Truncate));
}

#[test]
fn half_a_record_and_an_end_is_a_reset() {
    let lab = lab!();
    or_skip!(a_break_is_a_reset(&lab, Break::HalfRecord));
}

#[test]
fn plaintext_in_the_middle_is_a_reset() {
    let lab = lab!();
    or_skip!(a_break_is_a_reset(&lab, Break::Plaintext));
}

#[test]
fn a_record_that_was_tampered_with_is_a_reset() {
    let lab = lab!();
    or_skip!(a_break_is_a_reset(&lab, Break::Tamper));
}

#[test]
fn an_oversized_record_in_the_middle_is_a_reset() {
    let lab = lab!();
    or_skip!(a_break_is_a_reset(&lab, Break::Oversized));
}

#[test]
fn many_strangers_at_once_do_not_keep_proper_clients_out() {
    let lab = lab!();
    lab.capture_many();
    let mesh = or_skip!(lab.only_mesh_with(&Policy::standard(&lab), &impatient()));
    let server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let number = clock::count(300);
    let held: Vec<_> =
        lab.stranger.within(|| (0..number).filter_map(|_| stranger::connect(lab.beta.at(PORT)).ok()).collect());
    assert_eq!(held.len(), number);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    // All of them are cut off, and each is in a line.
    let told = || attempts(&mesh.beta().records_for(PORT));
    let all = clock::until(clock::seconds(20), || (told() > number as u64).then_some(()));
    assert!(all.is_some(), "{} of {number} are told", told());
    drop(held);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    expect_unseen(&server, 2);
    lab.expect_no_plaintext();
}
