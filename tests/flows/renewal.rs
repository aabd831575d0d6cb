//! What an agent takes up while it runs: another policy, fresh SVIDs, another authority.

use crate::lifecycle::{say_again, talker};
use lab::agent::make_authority;
use lab::policy::{DOMAIN, PORT, id};
use lab::{Agent, Lab, Policy, Settings, clock, lab, or_skip, skip};

#[test]
fn a_reload_changes_new_connections_and_leaves_allowed_open_ones() {
    let lab = lab!();
    let allowed = Policy::standard(&lab);
    let mesh = or_skip!(lab.only_mesh(&Policy::without_rules(&lab)));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    assert_eq!(lab.expect_no_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]), "EPERM");
    for agent in [mesh.alpha(), mesh.beta()] {
        agent.reload(&allowed);
    }
    let mut open = talker(&lab, 4);
    // Another rule, the same connections: the open one is not touched.
    let other = allowed.clone().workload("third").allow("third-to-server", "third", "server");
    for agent in [mesh.alpha(), mesh.beta()] {
        agent.reload(&other);
    }
    say_again(&lab, &mut open);
    lab.expect_echo(&lab.alpha, "third", lab.beta.at(PORT), &[]);
    for agent in [mesh.alpha(), mesh.beta()] {
        agent.reload(&allowed);
    }
    say_again(&lab, &mut open);
    assert_eq!(lab.expect_no_echo(&lab.alpha, "third", lab.beta.at(PORT), &[]), "EPERM");
    say_again(&lab, &mut open);
    open.say("end").unwrap();
    open.outcome().good();
    lab.expect_tls(PORT);
}

#[test]
fn a_server_that_no_longer_allows_a_client_refuses_its_new_connections() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let mut server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    server.event(|event| event["event"] == "accepted");
    mesh.beta().reload(&Policy::without_rules(&lab));
    // The client's side still allows it: the connect succeeds, and the server's side refuses.
    let error = lab.expect_no_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    assert!(error == "ECONNRESET" || error == "EPIPE", "{error}");
    assert_eq!(server.stdout().matches("accepted").count(), 1);
    let record = mesh.beta().expect_denied(PORT, "");
    assert_eq!(record["direction"], "inbound", "{record}");
    mesh.alpha().expect_denied(PORT, "");
    lab.expect_tls(PORT);
}

/// A reload that takes away what allowed an open connection ends it, on whichever side.
fn revokes(lab: &Lab, side: &str) -> Result<(), lab::Skip> {
    let mesh = lab.only_mesh(&Policy::standard(lab))?;
    let mut server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let say = format!("send:{}\\n", lab.marker());
    let mut open = lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &[&say, "line", "to-end"]);
    open.step("line");
    let agent = if side == "alpha" { mesh.alpha() } else { mesh.beta() };
    let began = std::time::Instant::now();
    agent.reload(&Policy::without_rules(lab));
    let end = open.step("to-end");
    assert!(began.elapsed() < clock::seconds(3), "it took {:?}", began.elapsed());
    assert_eq!(end["ok"], false, "a connection that was cut off ended cleanly: {end}");
    let end = server.event(|event| event["event"] == "ended");
    assert_eq!(end["end"], "ECONNRESET", "{end}");
    let record = &agent.expect_records(PORT, 1)[0];
    assert_eq!((&record["decision"], &record["code"]), (&"allowed".into(), &"revoked".into()), "{record}");
    assert_eq!(record["culprit"], "policy", "{record}");
    let other = if side == "alpha" { mesh.beta() } else { mesh.alpha() };
    other.expect_records(PORT, 1);
    lab.expect_tls(PORT);
    Ok(())
}

#[test]
fn a_connection_that_the_clients_policy_no_longer_allows_is_closed() {
    let lab = lab!();
    or_skip!(revokes(&lab, "alpha"));
}

#[test]
fn a_connection_that_the_servers_policy_no_longer_allows_is_closed() {
    let lab = lab!();
    or_skip!(revokes(&lab, "beta"));
}

#[test]
fn a_broken_policy_is_not_taken_and_status_says_so() {
    let lab = lab!();
    let good = Policy::standard(&lab);
    let mesh = or_skip!(lab.only_mesh(&good));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let mut open = talker(&lab, 6);
    let broken = [
        "this is no policy".to_owned(),
        format!("{}\n[[allow]]\nname = \"half", good.text()),
        good.clone().raw("[[allow]]\nname = \"typo\"\nfrm = \"spiffe://lab.test/client\"\n").text().to_owned(),
        good.clone().destination(lab.beta.at(PORT), "other").text().to_owned(),
        good.clone().top("preexisting = \"drain 10 parsecs\"").text().to_owned(),
    ];
    for text in &broken {
        let generation = mesh.alpha().status()["policy"]["generation"].clone();
        let told = mesh.alpha().reload_text(text).expect_err(text);
        assert!(told.contains("lab.toml"), "the file is not named: {told}");
        assert_eq!(mesh.alpha().status()["policy"]["generation"], generation);
        lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
        lab.expect_no_echo(&lab.alpha, "nobody", lab.beta.at(PORT), &[]);
        say_again(&lab, &mut open);
        mesh.alpha().reload(&good);
    }
    drop(open);
    lab.expect_tls(PORT);
}

#[test]
fn svids_are_renewed_without_touching_connections() {
    let lab = lab!();
    let settings = Settings { identity: "svid_ttl = \"20s\"".to_owned(), ..Settings::default() };
    let mesh = or_skip!(lab.only_mesh_with(&Policy::standard(&lab), &settings));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let mut open = talker(&lab, 1000);
    let expiries = || -> Vec<serde_json::Value> {
        [(mesh.alpha(), "client"), (mesh.beta(), "server")]
            .map(|(agent, name)| {
                let status = agent.status();
                let all = status["identities"].as_array().cloned().unwrap_or_default();
                all.iter().find(|one| one["id"] == id(name)).map(|one| one["expires"].clone()).unwrap_or_default()
            })
            .to_vec()
    };
    let first = expiries();
    assert!(first.iter().all(serde_json::Value::is_string), "{first:?}");
    // Two lifetimes: the SVIDs that the open connection began with are dead by then.
    let end = std::time::Instant::now() + std::time::Duration::from_secs(42);
    while std::time::Instant::now() < end {
        say_again(&lab, &mut open);
        lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
        std::thread::sleep(std::time::Duration::from_millis(300));
    }
    let last = expiries();
    assert!(first.iter().zip(&last).all(|(first, last)| first.as_str() < last.as_str()), "{first:?} {last:?}");
    drop(open);
    lab.expect_tls(PORT);
}

#[test]
fn while_an_authority_is_replaced_both_are_trusted_and_it_is_told() {
    let lab = lab!();
    if skip::plain() {
        return lab::Skip::because("LAB_PLAIN=1 leaves the agent out").announce(lab.test());
    }
    let (old, next) = (lab.directory().join("ca"), lab.directory().join("ca-next"));
    make_authority(&lab, &or_skip!(skip::bunter()), DOMAIN, &next);
    let trust = |directory: &std::path::Path| {
        format!("[[trust]]\ntrust_domain = \"{DOMAIN}\"\nbundle = \"{}/ca.pem\"\n", directory.display())
    };
    let of_old = Settings { tables: trust(&next), ..Settings::default() };
    let of_next = Settings { tables: trust(&old), authority: Some(next), ..Settings::default() };
    let policy = Policy::standard(&lab);
    let alpha = or_skip!(Agent::prepare(&lab, &lab.alpha, &policy, &of_old));
    let beta = or_skip!(Agent::prepare(&lab, &lab.beta, &policy, &of_next));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    for agent in [&alpha, &beta] {
        agent.start().unwrap();
        let bundles = agent.status()["bundles"].clone();
        assert_eq!((&bundles[0]["trust_domain"], &bundles[0]["anchors"]), (&DOMAIN.into(), &2.into()), "{bundles}");
        agent.reload(&policy);
        assert_eq!(agent.log().matches("the policy's own trust domain").count(), 2, "{}", agent.log());
        let check = agent.command(&["check"]).unwrap();
        assert!(check.stderr.contains("warning: [[trust]]") && check.stderr.contains(DOMAIN), "{check:#?}");
        check.good();
    }
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    // Without the entry the other authority is nobody.
    let text = std::fs::read_to_string(alpha.config()).unwrap();
    std::fs::write(alpha.config(), &text[..text.find("[[trust]]").unwrap()]).unwrap();
    alpha.terminate().unwrap();
    alpha.start().unwrap();
    assert!(!alpha.log().contains("own trust domain"), "{}", alpha.log());
    lab.expect_no_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    lab.expect_tls(PORT);
}
