//! Agents that die, come back, reload, rotate and drain.

use lab::agent::make_authority;
use lab::policy::{DOMAIN, PORT, id};
use lab::world::events;
use lab::{Agent, Lab, Policy, Program, Settings, clock, lab, or_skip, skip};
use serde_json::Value;

/// A client that holds a connection open and says a line when told to.
fn talker(lab: &Lab, lines: usize) -> Program {
    let say = format!("send:{}\\n", lab.marker());
    let mut steps = vec![say.as_str(), "line"];
    for _ in 1..lines {
        steps.extend(["wait", say.as_str(), "line"]);
    }
    steps.extend(["wait", "half-close", "to-end"]);
    let mut client = lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &steps);
    assert_eq!(client.step("line")["text"], lab.marker());
    client
}

fn say_again(lab: &Lab, client: &mut Program) {
    client.say("go on").unwrap();
    assert_eq!(client.step("line")["text"], lab.marker());
}

#[test]
fn a_dead_agent_of_the_client_means_refused_and_never_plaintext() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT), lab.beta.at6(PORT)]);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    mesh.alpha().kill();
    let accepted = server.stdout().matches("accepted").count();
    for to in [lab.beta.at(PORT), lab.beta.at6(PORT), lab.beta.mapped(PORT)] {
        for how in ["blocking", "nonblocking"] {
            let error = lab.expect_no_echo(&lab.alpha, "client", to, &["--how", how]);
            assert!(error == "ECONNREFUSED" || error == "EPERM", "{to} {how}: {error}");
        }
    }
    assert_eq!(server.stdout().matches("accepted").count(), accepted);
    lab.expect_tls(PORT);
}

#[test]
fn a_dead_agent_of_the_server_means_refused_and_never_plaintext() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT), lab.beta.at6(PORT)]);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    mesh.beta().kill();
    let accepted = server.stdout().matches("accepted").count();
    for to in [lab.beta.at(PORT), lab.beta.at6(PORT)] {
        lab.expect_no_echo(&lab.alpha, "client", to, &[]);
        // Nobody else gets in either, from outside or from inside.
        let attempt = lab.stranger.within(|| lab::stranger::raw(to, b"hello"));
        assert!(attempt.answer.is_empty() && !attempt.connected, "{attempt:?}");
        let attempt = lab.beta.within(|| lab::stranger::raw(([127, 0, 0, 1], PORT).into(), b"hello"));
        assert!(attempt.answer.is_empty(), "{attempt:?}");
    }
    assert_eq!(server.stdout().matches("accepted").count(), accepted);
    mesh.alpha().expect_denied(PORT, "");
    // Nobody was there to write it down at that time: the next agent does.
    mesh.beta().start().unwrap();
    let record = mesh.beta().expect_denied(PORT, "no-agent");
    assert_eq!(record["direction"], "inbound", "{record}");
    lab.expect_tls(PORT);
}

#[test]
fn an_agent_that_is_killed_resets_its_connections() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    for side in ["alpha", "beta"] {
        let mut server = lab.serve_script(&lab.beta, "server", &["line", "fill:60000"]);
        let say = format!("send:{}\\n", lab.marker());
        let mut client = lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &[&say, "read:100000", "to-end"]);
        client.step("read");
        let agent = if side == "alpha" { mesh.alpha() } else { mesh.beta() };
        agent.kill();
        // Not the end of the stream: that would be half a file taken for a whole one.
        let end = client.step("to-end");
        assert_eq!(end["ok"], false, "{side} died and the client saw a clean end: {end}");
        let end = server.step("fill");
        assert_eq!(end["ok"], false, "{side} died and the server went on: {end}");
        drop((client, server));
        agent.start().unwrap();
    }
    lab.expect_marker(&lab.wire());
}

#[test]
fn an_agent_that_comes_back_takes_over() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT), lab.beta.at6(PORT)]);
    for round in 0..3 {
        lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
        lab.expect_echo(&lab.alpha, "client", lab.beta.at6(PORT), &[]);
        lab.expect_no_echo(&lab.alpha, "nobody", lab.beta.at(PORT), &[]);
        let agent = if round == 0 { mesh.alpha() } else { mesh.beta() };
        agent.kill();
        lab.expect_no_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
        agent.start().unwrap();
    }
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    // A server that started while its agent was dead is protected as well once it is back.
    mesh.beta().kill();
    let _late = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT + 1)]);
    mesh.beta().start().unwrap();
    lab.stranger.within(|| lab::stranger::raw(lab.beta.at(PORT + 1), b"hello")).expect_refused();
    lab.expect_tls(PORT);
}

#[test]
fn release_leaves_the_host_as_it_was() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    let wire = lab.expect_tls(PORT);
    drop(wire);
    for agent in [mesh.alpha(), mesh.beta()] {
        agent.terminate().unwrap();
    }
    lab.expect_no_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    for agent in [mesh.alpha(), mesh.beta()] {
        agent.command(&["release"]).unwrap().good();
    }
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    lab.expect_echo(&lab.alpha, "nobody", lab.beta.at(PORT), &[]);
    // Released twice is released.
    mesh.alpha().command(&["release"]).unwrap().good();
}

#[test]
fn release_says_that_an_agent_runs_and_which_one() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let running = format!("process {}", mesh.alpha().pid());
    let said = mesh.alpha().command(&["release"]).unwrap().bad();
    assert!(said.contains("an agent runs") && said.contains("stop it first"), "{said}");
    assert!(said.contains(&running) && !said.contains("second agent"), "{said}");
    // Also where the configuration says that locks are elsewhere.
    let config = std::fs::read_to_string(mesh.alpha().config()).unwrap();
    let other = lab.file("other.toml", config.replace("/alpha/run\"", "/alpha/run2\""));
    let place = lab::enter::Place { netns: Some(lab.alpha.netns.clone()), ..Default::default() };
    let mut command = lab.command_in(place, or_skip!(skip::wimsey()));
    command.args(["release", "--config"]).arg(other);
    let said = Program::start(command, "wimsey release").unwrap().outcome().bad();
    assert!(said.contains("an agent runs"), "{said}");
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    lab.expect_tls(PORT);
}

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
    make_authority(&lab, &or_skip!(skip::wimsey()), DOMAIN, &next);
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

#[test]
fn sigterm_drains_open_connections_and_takes_no_new_ones() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let mut open = talker(&lab, 4);
    mesh.alpha().signal(rustix::process::Signal::TERM);
    let refused = clock::until(clock::seconds(5), || {
        let said = lab.echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
        (said.last()?["ok"] == false).then_some(())
    });
    assert!(refused.is_some(), "a draining agent took new connections");
    say_again(&lab, &mut open);
    say_again(&lab, &mut open);
    open.say("skip").unwrap();
    open.say("end").unwrap();
    open.outcome().good();
    let ended = mesh.alpha().end(clock::seconds(20)).unwrap();
    assert!(ended.status.success(), "{ended:#?}");
    mesh.alpha().expect_record("the drained one", |record| record["decision"] == "allowed");
    lab.expect_no_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    lab.expect_tls(PORT);
}

#[test]
fn sigterm_ends_connections_that_outlast_the_drain() {
    let lab = lab!();
    let settings = Settings { tables: "[timeouts]\ndrain = \"1s\"\n".to_owned(), ..Settings::default() };
    let mesh = or_skip!(lab.only_mesh_with(&Policy::standard(&lab), &settings));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let say = format!("send:{}\\n", lab.marker());
    let mut open = lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &[&say, "line", "to-end"]);
    open.step("line");
    let ended = mesh.alpha().terminate().unwrap();
    assert!(ended.status.success(), "{ended:#?}");
    assert_eq!(open.step("to-end")["ok"], false, "a connection that was cut off ended cleanly");
    mesh.alpha().expect_records(PORT, 1);
    lab.expect_tls(PORT);
}

#[test]
fn status_and_connections_say_what_is_going_on() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let open = talker(&lab, 2);
    lab.expect_no_echo(&lab.alpha, "nobody", lab.beta.at(PORT), &[]);
    for (agent, direction) in [(mesh.alpha(), "outbound"), (mesh.beta(), "inbound")] {
        let list: Vec<Value> =
            serde_json::from_str(&agent.command(&["connections", "--json"]).unwrap().good()).unwrap();
        assert_eq!(list.len(), 1, "{list:#?}");
        assert_eq!(list[0]["direction"], direction);
        assert_eq!(list[0]["source"]["id"], id("client"));
        assert_eq!(list[0]["destination"]["id"], id("server"));
        assert_eq!(list[0]["rule"], "client-to-server");
        assert_eq!(list[0]["method"], "mtls");
        let text = agent.command(&["connections"]).unwrap().good();
        assert!(text.contains(&id("client")) && text.contains(&id("server")), "{text}");
        let text = agent.command(&["status"]).unwrap().good();
        assert!(!text.trim().is_empty());
        let status: Value = serde_json::from_str(&agent.command(&["status", "--json"]).unwrap().good()).unwrap();
        assert_eq!(status["connections"]["open"], 1);
        assert_eq!(status["agent"]["pid"].as_u64(), Some(u64::from(agent.pid())));
    }
    let status = mesh.beta().status();
    let listeners = status["listeners"].as_array().cloned().unwrap_or_default();
    assert!(listeners.iter().any(|one| one["id"] == id("server") && one["mode"] == "protected"), "{status:#}");
    let status = mesh.alpha().status();
    let refused = status["refused"].as_object().cloned().unwrap_or_default();
    assert!(refused.values().any(|one| one["count"].as_u64() > Some(0)), "{status:#}");
    assert!(status["identities"].as_array().is_some_and(|all| all.iter().any(|one| one["id"] == id("client"))));
    drop(open);
    lab.expect_tls(PORT);
}

#[test]
fn every_thread_of_a_running_agent_is_in_the_sandbox_and_keeps_few_privileges() {
    let lab = lab!();
    let policy = Policy::standard(&lab);
    let mesh = or_skip!(lab.only_mesh(&policy));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    for agent in [mesh.alpha(), mesh.beta()] {
        assert_eq!(agent.status()["agent"]["sandbox"], "on");
        let text = agent.command(&["status"]).unwrap().good();
        assert!(text.contains("sandbox    on\n"), "{text}");
        // DAC_READ_SEARCH, NET_BIND_SERVICE, NET_ADMIN, SYS_PTRACE and BPF.
        let kept = [2, 10, 12, 19, 39].iter().fold(0_u64, |kept, bit| kept | 1 << bit);
        let expected = [
            "Seccomp:\t2".to_owned(),
            "NoNewPrivs:\t1".to_owned(),
            "CapInh:\t0000000000000000".to_owned(),
            "CapAmb:\t0000000000000000".to_owned(),
            format!("CapEff:\t{kept:016x}"),
            format!("CapPrm:\t{kept:016x}"),
            format!("CapBnd:\t{kept:016x}"),
        ];
        let threads = std::fs::read_dir(format!("/proc/{}/task", agent.pid())).unwrap();
        let threads: Vec<String> =
            threads.map(|thread| std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap()).collect();
        // Control, audit and at least one shard.
        assert!(threads.len() >= 3, "{threads:?}");
        for thread in threads {
            for line in &expected {
                assert!(thread.lines().any(|one| one == line), "no {line:?} in:\n{thread}");
            }
        }
    }
    // What comes after the start: a policy to load, a listener to attest, a program to refuse.
    let other = policy.clone().workload("third").allow("third-to-server", "third", "server");
    for agent in [mesh.alpha(), mesh.beta()] {
        agent.reload(&other);
    }
    let _late = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT + 1)]);
    lab.stranger.within(|| lab::stranger::raw(lab.beta.at(PORT + 1), b"hello")).expect_refused();
    lab.expect_echo(&lab.alpha, "third", lab.beta.at(PORT), &[]);
    for agent in [mesh.alpha(), mesh.beta()] {
        let log = agent.log();
        assert!(!log.contains("not permitted"), "the agent was refused something that it needs:\n{log}");
    }
    lab.expect_tls(PORT);
}

#[test]
fn wimsey_run_gives_a_program_a_cgroup_that_policy_can_name() {
    let lab = lab!();
    let name = format!("lab-{}", lab.test().len() + std::process::id() as usize);
    let policy = Policy::empty(&lab)
        .workload_by("client", &[&format!("cgroup:/wimsey/{name}")])
        .workload("server")
        .serve(&lab, PORT)
        .allow("client-to-server", "client", "server");
    let mesh = or_skip!(lab.only_mesh(&policy));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let place = lab::enter::Place { netns: Some(lab.alpha.netns.clone()), ..Default::default() };
    let mut command = lab.command_in(place, or_skip!(skip::wimsey()));
    command.args(["run", "--name", &name, "--"]).arg(or_skip!(skip::lab_app()));
    command.args(["talk", "--to", &lab.beta.at(PORT).to_string(), &format!("send:{}\\n", lab.marker()), "line"]);
    command.args(["half-close", "to-end"]);
    let outcome = Program::start(command, "wimsey run").unwrap().outcome();
    let said = events(&outcome.stdout);
    assert!(outcome.status.success(), "{outcome:#?}");
    assert!(said.iter().any(|event| event["text"] == lab.marker()), "{outcome:#?}");
    mesh.expect_allowed(PORT, 1);
    let cgroup = lab::world::cgroup2().unwrap().join("wimsey").join(&name);
    // The program was the last process of its own; what it leaves is swept by the next one, or by `release`.
    assert!(cgroup.exists());
    mesh.alpha().terminate().unwrap();
    mesh.alpha().command(&["release"]).unwrap().good();
    assert!(!cgroup.exists(), "an empty cgroup stays behind");
    // The one above it goes as well, unless a program of another test is in there.
    let above = cgroup.parent().unwrap();
    let gone = clock::until(clock::seconds(5), || match std::fs::read_dir(above) {
        Ok(entries) => entries.flatten().any(|entry| entry.path().is_dir()).then_some(()),
        Err(error) => (error.kind() == std::io::ErrorKind::NotFound).then_some(()),
    });
    assert!(gone.is_some(), "{} stays behind", above.display());
    lab.expect_tls(PORT);
}

#[test]
fn wimsey_run_gives_the_exit_code_of_the_program() {
    let lab = lab!();
    if skip::plain() {
        return lab::Skip::because("LAB_PLAIN=1 leaves the agent out").announce(lab.test());
    }
    for (script, code) in [("exit 0", Some(0)), ("exit 7", Some(7))] {
        let place = lab::enter::Place { netns: Some(lab.alpha.netns.clone()), ..Default::default() };
        let mut command = lab.command_in(place, or_skip!(skip::wimsey()));
        command.args(["run", "--", "sh", "-c", script]);
        let outcome = Program::start(command, "wimsey run").unwrap().outcome();
        assert_eq!(outcome.status.code(), code, "{outcome:#?}");
    }
}

/// Opens a connection, then starts the agents, with what policy says about connections from before.
fn from_before<'a>(lab: &'a Lab, preexisting: &str) -> Result<(Program, Program, lab::Mesh<'a>), lab::Skip> {
    if skip::plain() {
        return Err(lab::Skip::because("LAB_PLAIN=1 leaves the agent out, and this test is about the agent"));
    }
    let server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    // Not the marker: these connections are in plaintext, and are meant to be.
    let mut old = lab.talk(
        &lab.alpha,
        "client",
        lab.beta.at(PORT),
        &[],
        &["send:old\\n", "line", "wait", "send:old\\n", "line", "to-end"],
    );
    old.step("line");
    let policy = Policy::standard(lab).top(&format!("preexisting = \"{preexisting}\""));
    let mesh = lab.only_mesh(&policy)?;
    Ok((server, old, mesh))
}

#[test]
fn connections_from_before_are_kept_and_listed() {
    let lab = lab!();
    let (_server, mut old, mesh) = or_skip!(from_before(&lab, "keep"));
    let status = mesh.alpha().status();
    let listed = status["preexisting"].as_array().cloned().unwrap_or_default();
    let to = lab.beta.at(PORT).to_string();
    assert!(listed.iter().any(|one| one["remote"] == to && one["action"] == "keep"), "{status:#}");
    old.say("go on").unwrap();
    assert_eq!(old.step("line")["text"], "old");
    // New ones are protected all the same.
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    lab.expect_no_plaintext();
}

#[test]
fn connections_from_before_are_killed_where_policy_says_so() {
    let lab = lab!();
    let (_server, mut old, _mesh) = or_skip!(from_before(&lab, "kill"));
    old.say("go on").unwrap();
    let end = old.event(|event| event["ok"] == false);
    assert!(end["error"] == "ECONNRESET" || end["error"] == "EPIPE" || end["error"] == "ECONNABORTED", "{end}");
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    lab.expect_no_plaintext();
}

#[test]
fn connections_from_before_are_drained_where_policy_says_so() {
    let lab = lab!();
    let seconds = 4 * clock::slowness();
    let (_server, mut old, mesh) = or_skip!(from_before(&lab, &format!("drain {seconds}s")));
    old.say("go on").unwrap();
    assert_eq!(old.step("line")["text"], "old");
    let end = old.event(|event| event["step"] == "to-end");
    assert_eq!(end["ok"], false, "{end}");
    let left = mesh.alpha().status()["preexisting"].as_array().map_or(0, Vec::len);
    assert_eq!(left, 0);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    lab.expect_no_plaintext();
}

#[test]
fn doctor_tells_what_this_host_can_do() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let doctor = |words: &[&str]| {
        let mut command = lab.command(&lab.alpha, "admin", skip::wimsey().unwrap_or_else(|skip| panic!("{}", skip.0)));
        command.arg("doctor").args(words);
        Program::start(command, "wimsey doctor").unwrap().outcome().good()
    };
    assert!(!doctor(&[]).trim().is_empty());
    let report = doctor(&["--json"]);
    let report: serde_json::Value = serde_json::from_str(&report).unwrap_or_else(|error| panic!("{error}: {report}"));
    assert!(report.is_object(), "{report}");
    assert_eq!(report["sandbox"], mesh.alpha().status()["agent"]["sandbox"], "{report:#}");
    assert!(report["host"].as_array().is_some_and(|items| items.len() == 6), "{report:#}");
    assert!(report["host"].as_array().unwrap().iter().all(|item| item["ok"] == true), "{report:#}");
    // Both count the same tables.
    let names = |tables: &Value| -> Vec<String> {
        let tables = tables.as_array().unwrap_or_else(|| panic!("{tables}"));
        assert!(tables.iter().all(|table| table["used"].as_u64() <= table["size"].as_u64()), "{tables:?}");
        tables.iter().map(|table| table["name"].to_string()).collect()
    };
    assert!(names(&report["tables"]).len() > 5, "{report:#}");
    assert_eq!(names(&report["tables"]), names(&mesh.alpha().status()["tables"]));
    // What it would choose is what a running agent has chosen.
    if Settings::default().engine == "auto" {
        assert_eq!(report["auto"], mesh.alpha().status()["agent"]["engine"], "{report:#}");
    }
}
