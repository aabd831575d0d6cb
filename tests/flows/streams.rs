//! Bytes: all of them, in order, with the ends that TCP has.

use lab::policy::PORT;
use lab::world::{events, pick};
use lab::{Lab, Policy, Program, Settings, clock, lab, or_skip, skip};

/// Size of a bulk transfer: 1 GiB, or `LAB_BULK` bytes, less on a slow machine.
fn bulk() -> u64 {
    clock::bulk(std::env::var("LAB_BULK").ok().and_then(|text| text.parse().ok()).unwrap_or(1 << 30))
}

/// Waits long enough for a bulk transfer.
fn patient(program: Program) -> String {
    match program.wait(clock::seconds(300)) {
        Ok(outcome) => outcome.good(),
        Err(error) => panic!("{error:#}"),
    }
}

#[test]
fn a_gibibyte_arrives_whole_each_way() {
    let lab = lab!();
    lab.capture_heads();
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let size = bulk();
    let (read, pattern) = (format!("read:{size}"), format!("pattern:{size}"));
    let mut server = lab.serve_script(&lab.beta, "server", &[&read, &pattern, "half-close", "to-end"]);
    let steps = [pattern.as_str(), &read, "to-end", "half-close"];
    let said = events(&patient(lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &steps)));
    let ended = server.step("to-end");
    assert_eq!(ended["bytes"], 0);
    let there = events(&server.stdout());
    assert_eq!(pick(&said, "pattern")["sha256"], pick(&there, "read")["sha256"]);
    assert_eq!(pick(&said, "read")["sha256"], pick(&there, "pattern")["sha256"]);
    mesh.expect_allowed(PORT, 1);
    if mesh.protected() {
        for agent in [mesh.alpha(), mesh.beta()] {
            let record = &agent.records_for(PORT)[0];
            assert_eq!(
                (record["bytes"]["sent"].as_u64(), record["bytes"]["received"].as_u64()),
                (Some(size), Some(size))
            );
        }
    }
    lab.expect_marker(&lab.wire());
}

#[test]
fn bulk_both_ways_at_once_arrives_whole() {
    let lab = lab!();
    lab.capture_heads();
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let both = format!("both:{}", bulk() / 4);
    let mut server = lab.serve_script(&lab.beta, "server", &[&both, "half-close", "to-end"]);
    let steps = [both.as_str(), "half-close", "to-end"];
    let said = events(&patient(lab.talk(&lab.alpha, "client", lab.beta.at6(PORT), &[], &steps)));
    let there = server.step("both");
    let here = pick(&said, "both");
    assert_eq!(here["sha256"], there["sent"]);
    assert_eq!(here["sent"], there["sha256"]);
    mesh.expect_allowed(PORT, 1);
    lab.expect_marker(&lab.wire());
}

#[test]
fn a_client_that_is_done_sending_still_hears_the_answer() {
    let lab = lab!();
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let answer = format!("send:{} answer\\n", lab.marker());
    let mut server =
        lab.serve_script(&lab.beta, "server", &["to-end", "sleep:300", &answer, "pattern:300000", "close"]);
    let question = format!("send:{} question\\n", lab.marker());
    let steps = [question.as_str(), "half-close", "line", "to-end"];
    let said = events(&lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &steps).outcome().good());
    assert_eq!(pick(&said, "line")["text"], format!("{} answer", lab.marker()));
    assert_eq!(server.step("to-end")["text"], format!("{} question\n", lab.marker()));
    assert_eq!(pick(&said, "to-end")["sha256"], server.step("pattern")["sha256"]);
    mesh.expect_allowed(PORT, 1);
    lab.expect_tls(PORT);
}

#[test]
fn a_server_that_is_done_sending_still_hears_the_client() {
    let lab = lab!();
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let greeting = format!("send:{} that is all\\n", lab.marker());
    let mut server = lab.serve_script(&lab.beta, "server", &[&greeting, "half-close", "to-end", "close"]);
    let answer = format!("send:{} and now I\\n", lab.marker());
    let steps = ["to-end", "sleep:300", answer.as_str(), "pattern:300000", "half-close"];
    let said = events(&lab.talk(&lab.alpha, "client", lab.beta.at6(PORT), &[], &steps).outcome().good());
    assert_eq!(pick(&said, "to-end")["text"], format!("{} that is all\n", lab.marker()));
    let heard = server.step("to-end");
    assert_eq!(heard["bytes"].as_u64(), Some(300_000 + lab.marker().len() as u64 + " and now I\n".len() as u64));
    mesh.expect_allowed(PORT, 1);
    lab.expect_tls(PORT);
}

#[test]
fn a_reset_of_the_client_reaches_the_server() {
    let lab = lab!();
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let mut server = lab.serve_script(&lab.beta, "server", &["line", "send:go\\n", "to-end"]);
    let say = format!("send:{}\\n", lab.marker());
    lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &[&say, "line", "reset"]).outcome().good();
    let end = server.step("to-end");
    assert_eq!((&end["ok"], &end["error"]), (&false.into(), &"ECONNRESET".into()), "{end}");
    if mesh.protected() {
        for agent in [mesh.alpha(), mesh.beta()] {
            let record = &agent.expect_records(PORT, 1)[0];
            assert_ne!(record["code"], "complete", "{record}");
            assert!(record["reason"].as_str().is_some_and(|text| text.contains(' ')), "no sentence: {record}");
        }
    }
    lab.expect_tls(PORT);
}

#[test]
fn a_reset_of_the_server_reaches_the_client() {
    let lab = lab!();
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let _server = lab.serve_script(&lab.beta, "server", &["line", "reset"]);
    let say = format!("send:{}\\n", lab.marker());
    let outcome = lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &[&say, "to-end"]).outcome();
    let said = events(&outcome.stdout);
    let end = pick(&said, "to-end");
    assert_eq!((&end["ok"], &end["error"]), (&false.into(), &"ECONNRESET".into()), "{end}");
    if mesh.protected() {
        mesh.alpha().expect_records(PORT, 1);
        mesh.beta().expect_records(PORT, 1);
    }
    lab.expect_tls(PORT);
}

#[test]
fn a_slow_reader_slows_the_sender_and_costs_the_agents_no_memory() {
    let lab = lab!();
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let mut server = lab.serve_script(&lab.beta, "server", &["wait", "to-end", "send:done\\n", "close"]);
    let before = resident(&mesh);
    let quiet = format!("fill:{}", clock::millis(1000).as_millis());
    let mut client =
        lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &[&quiet, "wait", "half-close", "line", "to-end"]);
    let taken = client.step("fill")["bytes"].as_u64().unwrap();
    assert!(taken > 0 && taken < 100 << 20, "{taken} bytes were taken from a sender whose reader does not read");
    for ((agent, before), name) in resident(&mesh).iter().zip(before).zip(["alpha", "beta"]) {
        let more = agent.saturating_sub(before);
        assert!(more < 16 << 20, "the agent of {name} grew by {more} bytes");
    }
    server.say("read").unwrap();
    client.say("end").unwrap();
    assert_eq!(server.step("to-end")["bytes"].as_u64(), Some(taken));
    assert_eq!(client.step("line")["text"], "done");
    client.outcome().good();
    mesh.expect_allowed(PORT, 1);
    // The capture may have lost some of so much; what it has must be clean.
    lab.expect_marker(&lab.wire());
}

fn resident(mesh: &lab::Mesh) -> Vec<u64> {
    if mesh.protected() { vec![mesh.alpha().resident(), mesh.beta().resident()] } else { Vec::new() }
}

#[test]
fn two_thousand_connections_are_held_and_used() {
    let lab = lab!();
    lab.capture_many();
    let settings = Settings { tables: "[timeouts]\ndial = \"1m\"\nhandshake = \"1m\"\n".into(), ..Settings::default() };
    let mesh = or_skip!(lab.mesh_with(&Policy::standard(&lab), &settings));
    let number = clock::count(2000);
    let _server = many_files(&lab, "server", &lab.beta, &["echo", "--listen", &lab.beta.at(PORT).to_string()], true);
    let (to, text) = (lab.beta.at(PORT).to_string(), number.to_string());
    let words = ["hold", "--to", &to, "--connections", &text, "--marker", lab.marker()];
    let mut client = many_files(&lab, "client", &lab.alpha, &words, false);
    let held = client.line(clock::seconds(120), |line| line.contains("held"));
    assert!(held.is_ok(), "{held:?}");
    for _ in 0..3 {
        client.say("use").unwrap();
        client.step("used");
    }
    if mesh.protected() {
        for agent in [mesh.alpha(), mesh.beta()] {
            let open = agent.connections();
            assert_eq!(open.len(), number);
            assert!(open.iter().all(|connection| connection["method"] == "mtls"), "{:#?}", open[0]);
            assert_eq!(agent.status()["connections"]["open"].as_u64(), Some(number as u64));
        }
    }
    client.close_stdin();
    client.outcome().good();
    if mesh.protected() {
        for agent in [mesh.alpha(), mesh.beta()] {
            let records = agent.expect_records(PORT, number);
            assert!(records.iter().all(|record| record["decision"] == "allowed"));
            let closed = clock::until(clock::seconds(10), || agent.connections().is_empty().then_some(()));
            assert!(closed.is_some(), "connections stay open in the agent");
        }
    }
    lab.expect_tls(PORT);
}

fn many_files(lab: &Lab, cgroup: &str, host: &lab::Host, words: &[&str], server: bool) -> Program {
    let mut place = lab.place(host, cgroup);
    place.files = Some(10_000);
    let mut command = lab.command_in(place, lab::skip::lab_app().unwrap());
    command.args(words);
    let mut program = Program::start(command, words[0]).unwrap();
    if server {
        program.ready().unwrap();
    }
    program
}

#[test]
fn small_writes_and_long_pauses_lose_nothing() {
    let lab = lab!();
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let say = format!("send:{}\\n", lab.marker());
    let mut steps = Vec::new();
    for _ in 0..20 {
        steps.extend([say.as_str(), "line"]);
    }
    steps.extend(["sleep:2500", &say, "line", "send:a", "send:b", "send:c\\n", "line", "half-close", "to-end"]);
    let said = events(&lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &steps).outcome().good());
    let lines: Vec<&serde_json::Value> = said.iter().filter(|event| event["step"] == "line").collect();
    assert_eq!(lines.len(), 22);
    assert!(lines[..21].iter().all(|line| line["text"] == lab.marker()));
    assert_eq!(lines[21]["text"], "abc");
    mesh.expect_allowed(PORT, 1);
    lab.expect_tls(PORT);
}

#[test]
fn a_wire_that_loses_and_doubles_packets_loses_no_byte() {
    let lab = lab!();
    or_skip!(skip::need("tc"));
    for host in [&lab.alpha, &lab.beta] {
        or_skip!(host.disturb("loss 1% duplicate 1% delay 1ms 1ms"));
    }
    lab.capture_heads();
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let both = format!("both:{}", clock::bulk(8 << 20));
    let mut server = lab.serve_script(&lab.beta, "server", &[&both, "half-close", "to-end"]);
    let steps = [both.as_str(), "half-close", "to-end"];
    let said = events(&patient(lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &steps)));
    let there = server.step("both");
    assert_eq!(pick(&said, "both")["sha256"], there["sent"]);
    assert_eq!(pick(&said, "both")["sent"], there["sha256"]);
    mesh.expect_allowed(PORT, 1);
    lab.expect_marker(&lab.wire());
}
