//! Several workloads on one host, loopback, and everything that is none of Bunter's business.

use lab::policy::{DOMAIN, PORT, id};
use lab::world::{events, pick};
use lab::{Mint, Policy, Settings, clock, lab, or_skip};
use std::net::SocketAddr;

#[test]
fn two_workloads_on_one_host_speak_as_their_identities() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let mut server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT), lab.beta.at6(PORT)]);
    for to in [lab.beta.at(PORT), lab.beta.at6(PORT)] {
        lab.expect_echo(&lab.beta, "client", to, &[]);
        let accepted = server.event(|event| event["event"] == "accepted");
        assert_eq!(lab::world::address(&accepted, "peer").ip(), to.ip(), "the server sees another client");
    }
    // Both ends are this host: two lines for each connection.
    let records = mesh.beta().expect_records(PORT, 4);
    for direction in ["outbound", "inbound"] {
        let these: Vec<_> = records.iter().filter(|record| record["direction"] == direction).collect();
        assert_eq!(these.len(), 2, "{records:#?}");
        for record in these {
            assert_eq!(record["decision"], "allowed", "{record}");
            assert_eq!(record["source"]["id"], lab::policy::id("client"), "{record}");
            assert_eq!(record["destination"]["id"], lab::policy::id("server"), "{record}");
        }
    }
    lab.expect_no_plaintext();
}

#[test]
fn one_connection_more_than_the_limit_is_refused_and_told_until_another_ends() {
    let lab = lab!();
    let settings = Settings { tables: "[limits]\nconnections = 2\n".to_owned(), ..Settings::default() };
    let mesh = or_skip!(lab.only_mesh_with(&Policy::standard(&lab), &settings));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let say = format!("send:{}\\n", lab.marker());
    let open = |_| {
        let mut client =
            lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &[&say, "line", "wait", "half-close", "to-end"]);
        assert_eq!(client.step("line")["text"], lab.marker());
        client
    };
    let [mut first, second] = [(), ()].map(open);
    lab.expect_no_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    let record = mesh.alpha().expect_denied(PORT, "too-many-connections");
    assert!(record["reason"].as_str().is_some_and(|reason| reason.starts_with("2 connections")), "{record}");
    assert_eq!(mesh.alpha().status()["connections"]["open"], 2);
    first.say("end").unwrap();
    first.outcome().good();
    mesh.alpha().expect_record("the first one", |record| record["decision"] == "allowed");
    mesh.beta().expect_record("the first one", |record| record["decision"] == "allowed");
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    drop(second);
    lab.expect_tls(PORT);
}

#[test]
fn a_client_on_loopback_is_protected_like_any_other() {
    let lab = lab!();
    let loopback: Vec<SocketAddr> = vec![([127, 0, 0, 1], PORT).into(), ([0, 0, 0, 0, 0, 0, 0, 1], PORT).into()];
    let mut policy = Policy::standard(&lab);
    for address in &loopback {
        policy = policy.destination(address, "server");
    }
    let mesh = or_skip!(lab.only_mesh(&policy));
    let _server = lab.serve_echo(&lab.beta, "server", &[([0_u16; 8], PORT).into()]);
    for to in &loopback {
        lab.expect_echo(&lab.beta, "client", *to, &[]);
        let error = lab.expect_no_echo(&lab.beta, "nobody", *to, &[]);
        assert_eq!(error, "EPERM", "a program without an identity reached {to}");
    }
    // Two connections, a line of each side. The lines are written when the connections have ended, a moment later.
    let allowed = || mesh.beta().audit().iter().filter(|record| record["decision"] == "allowed").count();
    let all = clock::until(clock::seconds(15), || (allowed() >= 4).then_some(()));
    assert!(all.is_some() && allowed() == 4, "{:#?}", mesh.beta().audit());
    lab.expect_no_plaintext();
}

#[test]
fn a_local_program_cannot_reach_a_protected_listener_in_plaintext() {
    let lab = lab!();
    // Loopback is no mesh destination here: nothing stops the connect, so the listener's own protection has to.
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let server = lab.serve_echo(&lab.beta, "server", &[([0_u16; 8], PORT).into()]);
    for to in [SocketAddr::from(([127, 0, 0, 1], PORT)), SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], PORT))] {
        lab.expect_no_echo(&lab.beta, "nobody", to, &[]);
    }
    assert!(!server.stdout().contains("accepted"), "the workload saw it: {}", server.stdout());
    mesh.beta().expect_denied(PORT, "");
    lab.expect_no_plaintext();
}

#[test]
fn programs_that_nobody_enrolled_are_left_alone() {
    let lab = lab!();
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    // What sshd does: a server without identity, reached by clients without identity, also by one without an agent.
    let mut server = lab.serve_echo(&lab.beta, "sshd", &[lab.beta.at(22), lab.beta.at6(22)]);
    for (host, to) in [
        (&lab.alpha, lab.beta.at(22)),
        (&lab.alpha, lab.beta.at6(22)),
        (&lab.stranger, lab.beta.at(22)),
        (&lab.stranger, lab.beta.at6(22)),
    ] {
        lab.expect_echo(host, "ssh", to, &[]);
        server.event(|event| event["event"] == "accepted");
    }
    let _other = lab.serve_echo(&lab.stranger, "sshd", &[lab.stranger.at(22)]);
    lab.expect_echo(&lab.alpha, "ssh", lab.stranger.at(22), &[]);
    if mesh.protected() {
        // And when the agents are dead they still get through: nobody is locked out.
        mesh.alpha().kill();
        mesh.beta().kill();
        lab.expect_echo(&lab.alpha, "ssh", lab.beta.at(22), &[]);
        lab.expect_echo(&lab.stranger, "ssh", lab.beta.at(22), &[]);
        let fresh = lab.serve_echo(&lab.beta, "sshd", &[lab.beta.at(23)]);
        lab.expect_echo(&lab.stranger, "ssh", lab.beta.at(23), &[]);
        drop(fresh);
    }
    // Left alone means plaintext: the marker is there, with or without Bunter.
    assert!(lab.wire().search(lab.marker().as_bytes()).is_some());
}

#[test]
fn an_enrolled_workload_reaches_nothing_else_unless_a_bypass_names_it() {
    let lab = lab!();
    let policy = Policy::standard(&lab).bypass("metrics", "client", lab.stranger.at(9001));
    let mesh = or_skip!(lab.only_mesh(&policy));
    let listen = [9000, 9001].map(|port| lab.stranger.at(port));
    let mut server = lab.serve_echo(&lab.stranger, "elsewhere", &listen);
    let error = lab.expect_no_echo(&lab.alpha, "client", lab.stranger.at(9000), &[]);
    assert_eq!(error, "EPERM");
    // Loopback is no exception.
    let _local = lab.serve_echo(&lab.alpha, "elsewhere", &[([127, 0, 0, 1], 9000).into()]);
    let error = lab.expect_no_echo(&lab.alpha, "client", ([127, 0, 0, 1], 9000).into(), &[]);
    assert_eq!(error, "EPERM");
    let wire = lab.wire();
    assert!(wire.search(lab.marker().as_bytes()).is_none(), "the marker got out");

    let said = lab.expect_echo(&lab.alpha, "client", lab.stranger.at(9001), &[]);
    assert_eq!(lab::world::address(lab::world::pick(&said, "names"), "peer"), lab.stranger.at(9001));
    server.event(|event| event["event"] == "accepted");
    mesh.alpha().expect_denied(9000, "");
    let record = mesh.alpha().expect_record("the bypass", |record| record["decision"] == "bypassed");
    assert_eq!(record["rule"], "metrics", "{record}");
    assert_eq!(lab::agent::record_port(&record), 9001, "{record}");
}

#[test]
fn a_client_without_a_rule_is_refused_and_audited_on_the_client_side() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::without_rules(&lab)));
    let server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT), lab.beta.at6(PORT)]);
    for to in [lab.beta.at(PORT), lab.beta.at6(PORT), lab.beta.mapped(PORT)] {
        for how in ["blocking", "nonblocking"] {
            let error = lab.expect_no_echo(&lab.alpha, "client", to, &["--how", how]);
            assert_eq!(error, "EPERM", "{to} {how}");
        }
    }
    assert!(!server.stdout().contains("accepted"));
    let records = mesh.alpha().expect_records(PORT, 6);
    for record in records {
        assert_eq!(record["decision"], "denied", "{record}");
        assert_eq!(record["source"]["id"], lab::policy::id("client"), "{record}");
    }
    let wire = lab.expect_no_plaintext();
    assert_eq!(wire.attempts(lab.beta.at(PORT)), 0, "a SYN went out");
}

#[test]
fn identities_come_from_users_as_well() {
    let lab = lab!();
    let policy = Policy::empty(&lab)
        .workload_by("client", &["unix:uid:12345"])
        .workload("server")
        .serve(&lab, PORT)
        .allow("client-to-server", "client", "server");
    let mesh = or_skip!(lab.only_mesh(&policy));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let echo_as = |uid: u32| {
        let mut place = lab.place(&lab.alpha, "anywhere");
        place.user = Some((uid, uid));
        let mut command = lab.command_in(place, or_panic(lab::skip::lab_app()));
        command.current_dir("/");
        command.args(["talk", "--to", &lab.beta.at(PORT).to_string(), &format!("send:{}\\n", lab.marker()), "line"]);
        let outcome = lab::Program::start(command, "talk").unwrap().outcome();
        lab::world::events(&outcome.stdout)
    };
    let said = echo_as(12345);
    assert_eq!(said.last().unwrap()["text"], lab.marker(), "{said:?}");
    let said = echo_as(12346);
    assert_eq!(said.last().unwrap()["error"], "EPERM", "{said:?}");
    mesh.alpha().expect_records(PORT, 2);
    lab.expect_tls(PORT);
}

fn or_panic<T>(value: Result<T, lab::Skip>) -> T {
    value.unwrap_or_else(|skip| panic!("{}", skip.0))
}

#[test]
fn identities_come_from_the_programs_file_as_well() {
    let lab = lab!();
    let app = or_panic(lab::skip::lab_app());
    let copy = lab.directory().join("the-client");
    std::fs::copy(&app, &copy).unwrap();
    let (group, path) = (format!("cgroup:{}/apps", lab.cgroup_path()), format!("unix:path:{}", copy.display()));
    let policy = Policy::empty(&lab)
        .workload_by("client", &[&group, &path])
        .workload("server")
        .serve(&lab, PORT)
        .allow("client-to-server", "client", "server");
    let mesh = or_skip!(lab.only_mesh(&policy));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let echo_by = |program: &std::path::Path| {
        let mut command = lab.command(&lab.alpha, "apps", program);
        command.args(["talk", "--to", &lab.beta.at(PORT).to_string(), &format!("send:{}\\n", lab.marker()), "line"]);
        lab::world::events(&lab::Program::start(command, "talk").unwrap().outcome().stdout)
    };
    let said = echo_by(&copy);
    assert_eq!(said.last().unwrap()["text"], lab.marker(), "{said:?}");
    // The same cgroup, another file: the kernel alone cannot tell, the agent does.
    let said = echo_by(&app);
    assert_eq!(said.last().unwrap()["ok"], false, "{said:?}");
    let records = mesh.alpha().expect_records(PORT, 2);
    assert!(records.iter().any(|record| record["decision"] == "denied"), "{records:#?}");
    lab.expect_tls(PORT);
}

#[test]
fn a_permissive_listener_takes_plaintext_and_says_so() {
    let lab = lab!();
    let inbound = format!("[[inbound]]\nid = \"{}\"\nmode = \"permissive\"\nname = \"moving\"\n", id("server"));
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab).raw(&inbound)));
    let mut server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    server.event(|event| event["event"] == "accepted");
    let record = &mesh.beta().expect_records(PORT, 1)[0];
    assert_eq!((&record["decision"], &record["method"]), (&"allowed".into(), &"mtls".into()), "{record}");
    lab.expect_tls(PORT);

    let said = lab.stranger.within(|| lab::stranger::say(lab.beta.at(PORT), b"in plaintext\n"));
    assert_eq!(said.answer, b"in plaintext\n", "{said:?}");
    let accepted = server.event(|event| event["event"] == "accepted");
    assert_eq!(lab::world::address(&accepted, "peer").ip(), std::net::IpAddr::V4(lab.stranger.v4));
    let record = mesh.beta().expect_record("plaintext", |record| record["decision"] == "bypassed");
    assert_eq!((&record["method"], &record["rule"]), (&"plaintext".into(), &"moving".into()), "{record}");
    assert!(record["source"]["id"].is_null(), "{record}");
    // A wrong identity is worse than none.
    let svid = mesh.mint().svid(&id("somebody-else")).unwrap();
    let attempt = lab.stranger.within(|| lab::stranger::Tls::default().talk(lab.beta.at(PORT), Some(&svid), b"hello"));
    attempt.expect_refused();
}

#[test]
fn what_is_carried_in_plaintext_needs_no_svid() {
    let lab = lab!();
    // An authority that ends soon: from then on nobody gets an SVID.
    let life = clock::seconds(12);
    let authority = lab.directory().join("ca");
    lab::agent::make_authority(&lab, &or_skip!(lab::skip::bunter()), DOMAIN, &authority);
    let (_, certificate, key) = Mint::found(DOMAIN, time::Duration::hours(-1), life.try_into().unwrap()).unwrap();
    let over = std::time::Instant::now() + life;
    std::fs::write(authority.join("ca.pem"), certificate).unwrap();
    std::fs::write(authority.join("ca.key"), key).unwrap();
    // Whose program it is only the agent can find out.
    let app = or_skip!(lab::skip::lab_app());
    let (group, path) = (format!("cgroup:{}/client", lab.cgroup_path()), format!("unix:path:{}", app.display()));
    let policy = Policy::empty(&lab)
        .workload_by("client", &[&group, &path])
        .workload("server")
        .serve(&lab, PORT)
        .allow("client-to-server", "client", "server")
        .bypass("metrics", "client", lab.stranger.at(9001))
        .raw(&format!("[[inbound]]\nid = \"{}\"\nmode = \"permissive\"\nname = \"moving\"\n", id("server")));
    let mesh = or_skip!(lab.only_mesh(&policy));
    let _metrics = lab.serve_echo(&lab.stranger, "elsewhere", &[lab.stranger.at(9001)]);
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    std::thread::sleep(over.saturating_duration_since(std::time::Instant::now()) + std::time::Duration::from_secs(1));

    lab.expect_no_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    mesh.alpha().expect_denied(PORT, "credential-unavailable");
    lab.expect_echo(&lab.alpha, "client", lab.stranger.at(9001), &[]);
    let said = lab.stranger.within(|| lab::stranger::say(lab.beta.at(PORT), b"in plaintext\n"));
    assert_eq!(said.answer, b"in plaintext\n", "{said:?}");
    mesh.beta().expect_record("plaintext", |record| record["decision"] == "bypassed" && record["rule"] == "moving");
}

#[test]
fn a_declared_port_is_protected_before_anybody_listens() {
    let lab = lab!();
    let inbound = format!("[[inbound]]\nid = \"{}\"\nlisten = [\"0.0.0.0:{PORT}\", \"[::]:{PORT}\"]\n", id("server"));
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab).raw(&inbound)));
    for to in [lab.beta.at(PORT), lab.beta.at6(PORT)] {
        lab.stranger.within(|| lab::stranger::raw(to, b"hello")).expect_refused();
        lab.expect_no_echo(&lab.alpha, "client", to, &[]);
    }
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    // Somebody else on that port is not the server, but the port stays protected.
    assert!(mesh.beta().records_for(PORT).iter().any(|record| record["decision"] == "denied"));
    lab.expect_no_plaintext();
}

#[test]
fn rules_for_ports_and_patterns_are_obeyed() {
    let lab = lab!();
    let (from, to) = ("spiffe://lab.test/team/*", id("server"));
    let rule =
        format!("[[allow]]\nname = \"team\"\nfrom = {{ pattern = \"{from}\" }}\nto = \"{to}\"\nports = [{PORT}]\n");
    let policy = Policy::empty(&lab)
        .workload_by("team/one", &[&format!("cgroup:{}/one", lab.cgroup_path())])
        .workload_by("crowd", &[&format!("cgroup:{}/crowd", lab.cgroup_path())])
        .workload("server")
        .serve(&lab, PORT)
        .serve(&lab, PORT + 1)
        .raw(&rule);
    let mesh = or_skip!(lab.only_mesh(&policy));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT), lab.beta.at(PORT + 1)]);
    lab.expect_echo(&lab.alpha, "one", lab.beta.at(PORT), &[]);
    assert_eq!(lab.expect_no_echo(&lab.alpha, "one", lab.beta.at(PORT + 1), &[]), "EPERM");
    assert_eq!(lab.expect_no_echo(&lab.alpha, "crowd", lab.beta.at(PORT), &[]), "EPERM");
    let record = mesh.alpha().expect_record("allowed", |record| record["decision"] == "allowed");
    assert_eq!((&record["rule"], &record["source"]["id"]), (&"team".into(), &id("team/one").into()), "{record}");
    lab.expect_tls(PORT);
}

#[test]
fn an_idle_connection_is_closed_where_policy_says_so() {
    let lab = lab!();
    let seconds = 2 * clock::slowness();
    let rule = format!(
        "[[allow]]\nname = \"client-to-server\"\nfrom = \"{}\"\nto = \"{}\"\nidle_timeout = \"{seconds}s\"\n",
        id("client"),
        id("server")
    );
    let mesh = or_skip!(lab.only_mesh(&Policy::without_rules(&lab).raw(&rule)));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let say = format!("send:{}\\n", lab.marker());
    // Pauses that are shorter than the limit do no harm, whatever their sum.
    let pause = format!("sleep:{}", 700 * clock::slowness());
    let mut steps = Vec::new();
    for _ in 0..5 {
        steps.extend([say.as_str(), "line", &pause]);
    }
    steps.push("to-end");
    let outcome = lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &steps).outcome();
    let said = events(&outcome.stdout);
    assert_eq!(said.iter().filter(|event| event["text"] == lab.marker()).count(), 5, "{said:#?}");
    let end = pick(&said, "to-end");
    let waited = end["ms"].as_u64().unwrap_or(0);
    assert!(waited > 500 * u64::from(clock::slowness()), "closed after {waited} ms: {end}");
    let ends = [mesh.alpha(), mesh.beta()].map(|agent| agent.expect_records(PORT, 1)[0]["code"].clone());
    assert!(ends.iter().any(|code| code.as_str().is_some_and(|code| code.contains("idle"))), "{ends:?}");
    lab.expect_tls(PORT);
}

#[test]
fn cgroups_that_appear_later_are_known_as_well() {
    let lab = lab!();
    let policy = Policy::empty(&lab)
        .workload_by("client", &[&format!("cgroup:{}/later", lab.cgroup_path())])
        .workload("server")
        .serve(&lab, PORT)
        .allow("client-to-server", "client", "server");
    let mesh = or_skip!(lab.only_mesh(&policy));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    // At once, also below the cgroup that the entry names, and after it was removed and made again.
    for name in ["later", "later/and/deeper", "later-than-that"] {
        let outside = name == "later-than-that";
        for _ in 0..3 {
            if outside {
                // By the kernel, or by the agent where the kernel does not know the cgroup yet.
                let error = lab.expect_no_echo(&lab.alpha, name, lab.beta.at(PORT), &[]);
                assert!(["EPERM", "ECONNRESET", "EPIPE"].contains(&error.as_str()), "{error}");
            } else {
                lab.expect_echo(&lab.alpha, name, lab.beta.at(PORT), &[]);
            }
            let _ = std::fs::remove_dir(lab.cgroup(name));
        }
    }
    let records = mesh.alpha().expect_records(PORT, 9);
    assert_eq!(records.iter().filter(|record| record["decision"] == "allowed").count(), 6, "{records:#?}");
    lab.expect_tls(PORT);
}
