//! One connection after the other over one TLS connection between two agents: docs/SESSIONS.md.

use crate::foreign::openssl;
use lab::policy::{PORT, id};
use lab::{Agent, Lab, Policy, Settings, clock, lab, or_skip, skip};
use serde_json::Value;

/// Agents with one shard each, so that it is not left to the kernel which one a connection comes to.
fn one_shard() -> Settings {
    Settings { top: "shards = 1".to_owned(), ..Settings::default() }
}

/// The number of the stream, of each connection that was carried so far.
#[track_caller]
fn streams(agent: &Agent<'_>, number: usize) -> Vec<u64> {
    let mut records = agent.expect_records(PORT, number);
    records.sort_by_key(|record| record["flow"].as_u64());
    records.iter().map(|record| record["tls"]["use"].as_u64().unwrap_or(0)).collect()
}

/// A connection by a program of the standard policy that says its line and gets it back.
fn echo(lab: &Lab) {
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
}

#[test]
fn connections_of_one_pair_follow_one_another_on_one_tls_connection() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh_with(&Policy::standard(&lab), &one_shard()));
    let mut server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    for _ in 0..4 {
        echo(&lab);
        let accepted = server.event(|event| event["event"] == "accepted");
        assert_eq!(lab::world::address(&accepted, "peer").ip(), std::net::IpAddr::V4(lab.alpha.v4));
    }
    for agent in [mesh.alpha(), mesh.beta()] {
        assert_eq!(streams(agent, 4), [1, 2, 3, 4]);
        for record in agent.expect_records(PORT, 4) {
            // Each is whole, for itself.
            assert_eq!((&record["decision"], &record["code"]), (&"allowed".into(), &"complete".into()), "{record}");
            assert_eq!(record["source"]["id"], id("client"), "{record}");
            assert_eq!(record["bytes"]["sent"], record["bytes"]["received"], "{record}");
        }
    }
    lab.expect_tls(PORT);
}

#[test]
fn an_application_that_resets_ends_its_connection_and_not_the_session() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh_with(&Policy::standard(&lab), &one_shard()));
    let server = lab.serve_script(&lab.beta, "server", &["line", "to-end"]);
    let say = format!("send:{}\\n", lab.marker());
    for number in 1..4 {
        let client = lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &[&say, "sleep:100", "reset"]);
        client.outcome();
        let heard = clock::until(clock::seconds(10), || {
            (server.stdout().matches("ECONNRESET").count() == number).then_some(())
        });
        assert!(heard.is_some(), "the workload was not reset: {}", server.stdout());
    }
    assert_eq!(streams(mesh.alpha(), 3), [1, 2, 3]);
    assert_eq!(streams(mesh.beta(), 3), [1, 2, 3]);
    lab.expect_tls(PORT);
}

#[test]
fn two_workloads_never_share_a_session() {
    let lab = lab!();
    let policy = Policy::standard(&lab).workload("third").allow("third", "third", "server");
    let mesh = or_skip!(lab.only_mesh_with(&policy, &one_shard()));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    for who in ["client", "third", "client", "third"] {
        lab.expect_echo(&lab.alpha, who, lab.beta.at(PORT), &[]);
    }
    assert_eq!(streams(mesh.beta(), 4), [1, 1, 2, 2]);
    let records = mesh.beta().expect_records(PORT, 4);
    for who in ["client", "third"] {
        assert_eq!(records.iter().filter(|record| record["source"]["id"] == id(who)).count(), 2, "{records:#?}");
    }
    lab.expect_tls(PORT);
}

#[test]
fn a_change_of_policy_on_either_side_ends_what_waits_for_another_stream() {
    let lab = lab!();
    let policy = Policy::standard(&lab);
    let mesh = or_skip!(lab.only_mesh_with(&policy, &one_shard()));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    echo(&lab);
    mesh.alpha().reload(&policy);
    echo(&lab);
    echo(&lab);
    mesh.beta().reload(&policy);
    echo(&lab);
    // A client that had not heard of it yet would have made a new connection as well.
    assert_eq!(streams(mesh.alpha(), 4), [1, 1, 2, 1]);
    // And what is not allowed any more is refused, session or not.
    mesh.beta().reload(&Policy::without_rules(&lab));
    lab.expect_no_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    lab.expect_tls(PORT);
}

#[test]
fn a_session_whose_server_is_gone_costs_a_handshake_and_no_connection() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh_with(&Policy::standard(&lab), &one_shard()));
    let server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    echo(&lab);
    mesh.beta().kill();
    mesh.beta().start().unwrap();
    echo(&lab);
    // The workload's own restart is none of the session's business.
    drop(server);
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    echo(&lab);
    let of_alpha = streams(mesh.alpha(), 3);
    assert_eq!((of_alpha[0], of_alpha[1]), (1, 1), "{of_alpha:?}");
    lab.expect_tls(PORT);
}

#[test]
fn a_stream_that_is_refused_is_tried_again_as_a_new_connection() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh_with(&Policy::standard(&lab), &one_shard()));
    let server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    echo(&lab);
    echo(&lab);
    drop(server);
    // Right after a stream, so that the first bytes go along.
    lab.expect_no_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    echo(&lab);
    let records = mesh.alpha().expect_records(PORT, 4);
    let refused: Vec<_> = records.iter().filter(|record| record["decision"] == "denied").collect();
    // The session told of it in order, and then it is the new connection that fails, and says why.
    assert!(refused.len() == 1 && refused[0]["stage"] == "intercept", "{refused:#?}");
    assert!(mesh.beta().records_for(PORT).iter().any(|record| record["decision"] == "denied"));
    lab.expect_tls(PORT);
}

#[test]
fn sessions_end_by_idle_time_and_by_number_of_streams() {
    let lab = lab!();
    let tables = "[sessions]\nidle = \"1s\"\nuses = 2\n".to_owned();
    let mesh = or_skip!(lab.only_mesh_with(&Policy::standard(&lab), &Settings { tables, ..one_shard() }));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    for _ in 0..3 {
        echo(&lab);
    }
    std::thread::sleep(std::time::Duration::from_millis(1500));
    echo(&lab);
    let of_alpha = streams(mesh.alpha(), 4);
    // On a slow machine a second may pass between any two of them: a second stream comes after a first one all the same.
    let in_order = of_alpha.windows(2).all(|two| two[1] == 1 || two == [1, 2]);
    assert!(of_alpha[0] == 1 && of_alpha[3] == 1 && in_order, "{of_alpha:?}");
    lab.expect_tls(PORT);
}

#[test]
fn sessions_can_be_left_out_on_either_side() {
    let lab = lab!();
    let settings = |reuse: bool| Settings { tables: format!("[sessions]\nreuse = {reuse}\n"), ..one_shard() };
    let policy = Policy::standard(&lab);
    for (at_alpha, at_beta) in [(false, true), (true, false)] {
        let agents = [(&lab.alpha, at_alpha), (&lab.beta, at_beta)];
        let agents = agents.map(|(host, reuse)| Agent::prepare(&lab, host, &policy, &settings(reuse)));
        let [alpha, beta] = agents.map(|agent| agent.unwrap_or_else(|skip| panic!("{}", skip.0)));
        let before = (alpha.records_for(PORT).len(), beta.records_for(PORT).len());
        alpha.start().unwrap();
        beta.start().unwrap();
        let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
        echo(&lab);
        echo(&lab);
        assert!(streams(&alpha, before.0 + 2).iter().all(|number| *number == 1));
        assert!(streams(&beta, before.1 + 2).iter().all(|number| *number == 1));
        alpha.terminate().unwrap();
        beta.terminate().unwrap();
    }
    lab.expect_tls(PORT);
}

#[test]
fn an_agent_that_is_told_to_end_does_not_wait_for_sessions_that_nobody_uses() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh_with(&Policy::standard(&lab), &one_shard()));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    echo(&lab);
    for agent in [mesh.beta(), mesh.alpha()] {
        let began = std::time::Instant::now();
        agent.terminate().unwrap();
        assert!(began.elapsed() < clock::seconds(5), "{:?}", began.elapsed());
    }
    lab.expect_tls(PORT);
}

#[test]
fn a_server_that_insists_on_its_own_protocols_is_reached_without_the_offer() {
    let lab = lab!();
    or_skip!(skip::need("openssl"));
    let policy = Policy::standard(&lab).destination(lab.stranger.at(PORT), "server");
    let mesh = or_skip!(lab.only_mesh_with(&policy, &one_shard()));
    let issued = mesh.issue("server");
    let at = lab.stranger.at(PORT).to_string();
    let mut server =
        openssl(&lab, &issued, &["s_server", "-accept", &at, "-Verify", "3", "-alpn", "h2,http/1.1", "-rev"]);
    server.line(clock::seconds(20), |line| line.contains("ACCEPT")).unwrap();
    let reversed: String = lab.marker().chars().rev().collect();
    for _ in 0..2 {
        let say = format!("send:{}\\n", lab.marker());
        let mut client =
            lab.talk(&lab.alpha, "client", lab.stranger.at(PORT), &[], &[&say, "line", "half-close", "to-end"]);
        assert_eq!(client.step("line")["text"], reversed);
        client.outcome();
    }
    let records = mesh.alpha().expect_records(PORT, 2);
    assert!(records.iter().all(|record: &Value| record["tls"]["use"] == 1), "{records:#?}");
    lab.expect_tls(PORT);
}
