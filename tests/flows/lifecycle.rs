//! Agents that die, come back, are released and drain, and what was connected before they came.

use lab::policy::PORT;
use lab::{Lab, Policy, Program, Settings, clock, lab, or_skip, skip};

/// A client that holds a connection open and says a line when told to.
pub(super) fn talker(lab: &Lab, lines: usize) -> Program {
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

pub(super) fn say_again(lab: &Lab, client: &mut Program) {
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
    let mut command = lab.command_in(place, or_skip!(skip::bunter()));
    command.args(["release", "--config"]).arg(other);
    let said = Program::start(command, "bunter release").unwrap().outcome().bad();
    assert!(said.contains("an agent runs"), "{said}");
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
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
