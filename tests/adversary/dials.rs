//! Who dials, and as whom: handed sockets, fresh cgroups, devices, other namespaces, other protocols.

use crate::listeners::{policy, settle, web};
use lab::agent::attempts as attempts_of;
use lab::hand::{ATTACKER, Hand, USER, WEB, expect_alive, listening};
use lab::policy::{PORT, id};
use lab::world::pick;
use lab::{Host, Lab, Mesh, Settings, Skip, clock, lab};
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Command;

/// Audit lines of alpha that let somebody be this workload. They are written when a connection ends.
fn allowed(mesh: &Mesh<'_>, name: &str) -> usize {
    let mine = |line: &&Value| line["decision"] == "allowed" && line["source"]["id"] == id(name);
    mesh.alpha().audit().iter().filter(mine).count()
}

/// A user connects and hands the socket to an attacker, who dials with it what the kernel redirected the user to.
fn handed(lab: &Lab, before: &str, after: &str, family: u8) {
    let mesh = mesh!(lab, &policy(lab, &[PORT]));
    let web = web(lab, "server", "web", "opt s dual; ", &format!("[::]:{PORT}"));
    let to = if family == 4 { lab.beta.at(PORT) } else { lab.beta.mapped(PORT) };
    // All that listens on alpha by IPv4 is the agent's.
    let agent = listening(&lab.alpha);
    assert!(!agent.is_empty());
    for (number, door) in agent.iter().enumerate() {
        let mut user = lab.puppet(&lab.alpha, "one", USER, "user");
        let mut attacker = lab.puppet(&lab.alpha, "nobody", ATTACKER, "attacker");
        user.must(&format!("socket s {family}; connect s {to}{before}; give s attacker"));
        let port = door.port();
        let door = if family == 4 { format!("127.0.0.1:{port}") } else { format!("[::ffff:127.0.0.1]:{port}") };
        attacker.tell(&format!("take s{after}; connect s {door}; write s FORGED; read s"));
        attacker.tell(&format!("disconnect s; connect s {to}; write s FORGED; read s"));
        user.end();
        attacker.end();
        settle();
        let (dialled, allowed) = (number + 1, allowed(&mesh, "user"));
        assert!(allowed <= dialled, "the user dialled {dialled} times, and {allowed} connections are in its name");
        web.expect_unheard("FORGED", "an attacker dialled with the socket of a user");
    }
    expect_alive(&mesh);
}

#[test]
fn a_socket_that_a_user_connected_and_gave_away_is_not_the_users_any_more() {
    handed(&lab!(), "", "; disconnect s", 4);
}

#[test]
fn a_socket_that_a_user_disconnected_and_gave_away_is_not_the_users_any_more() {
    handed(&lab!(), "; disconnect s", "; name s", 4);
}

#[test]
fn an_ipv6_socket_that_a_user_connected_and_gave_away_is_not_the_users_any_more() {
    handed(&lab!(), "", "; disconnect s", 6);
}

/// An attacker in a tree of cgroups of its own, on alpha, and somebody on another host who listens.
fn fresh_cgroups(lab: &Lab) -> (Hand, String, Hand) {
    let tree = lab.delegate("delegated", ATTACKER).display().to_string();
    let attacker = lab.puppet(&lab.alpha, "delegated/start", ATTACKER, "attacker");
    let mut outside = lab.puppet(&lab.stranger, "elsewhere", 0, "outside");
    outside.must("socket s 6; opt s dual; bind s [::]:9000; listen s");
    (attacker, tree, outside)
}

#[test]
fn what_a_process_in_a_fresh_cgroup_dials_beside_the_mesh_is_dialled_by_itself() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let (mut attacker, tree, outside) = fresh_cgroups(&lab);
    let to = lab.stranger.at(9000);
    let number = clock::count(50).max(5);
    let ports: BTreeMap<String, SocketAddr> = super::loaded(|| {
        let one = |index: usize| {
            let line = format!(
                "mkdir {tree}/{index}; cgroup {tree}/{index}; socket s{index} 4; connect s{index} {to}; \
                 write s{index} CALL-{index}-; name s{index}"
            );
            let local = attacker.must(&line)["local"].as_str().unwrap().parse().unwrap();
            (format!("CALL-{index}-"), local)
        };
        (0..number).map(one).collect()
    });
    clock::until(clock::seconds(10), || (outside.heard().len() >= number).then_some(()));
    let heard = outside.heard();
    let relayed: Vec<String> = heard
        .iter()
        .filter(|call| {
            let own = ports.get(call["text"].as_str().unwrap_or_default().trim());
            let peer = call["peer"].as_str().and_then(|peer| peer.parse::<SocketAddr>().ok());
            own.map(SocketAddr::port) != peer.map(|peer| peer.port())
        })
        .map(Value::to_string)
        .collect();
    let first = relayed.first();
    assert!(relayed.is_empty(), "{} of {number} calls came from another socket, as {first:?}", relayed.len());
    assert_eq!(heard.len(), number, "every call is heard");
    expect_alive(&mesh);
}

#[test]
fn the_hosts_own_rules_for_a_user_hold_in_a_fresh_cgroup() {
    let lab = lab!();
    let words = ["-n", &lab.alpha.netns, "rule", "add", "uidrange", &format!("{ATTACKER}-{ATTACKER}"), "unreachable"];
    let added = Command::new("ip").args(words).output();
    if !added.is_ok_and(|output| output.status.success()) {
        Skip::because("ip rule has no uidrange here").announce(lab.test());
        return;
    }
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let (mut attacker, tree, outside) = fresh_cgroups(&lab);
    let to = lab.stranger.at(9000);
    for index in 0..clock::count(20).max(4) {
        let line =
            format!("mkdir {tree}/{index}; cgroup {tree}/{index}; socket s 4; connect s {to}; write s ESCAPED; read s");
        attacker.tell(&line);
        outside.expect_unheard("ESCAPED", &format!("in fresh cgroup {index}, though a rule forbids it"));
    }
    expect_alive(&mesh);
}

/// A client bound to the link dials a mesh destination. Gives what came of it.
fn bound_to_the_link(lab: &Lab, words: &str) {
    let mesh = mesh!(lab, &policy(lab, &[PORT]));
    for host in [&lab.alpha, &lab.beta] {
        host.sysctl("net/ipv4/tcp_fastopen", "1543").unwrap();
    }
    let _web = web(lab, "server", "web", "opt s dual; ", &format!("[::]:{PORT}"));
    let mut user = lab.puppet(&lab.alpha, "one", USER, "user");
    let (to, marker) = (lab.beta.at(PORT), lab.marker());
    let line = words.replace("TO", &to.to_string()).replace("MARKER", marker);
    let answer = user.tell(&format!("socket s 4; opt s device:eth0; {line}"));
    assert!(answer["error"] != "ETIMEDOUT", "it hangs: {answer}");
    user.tell("close s");
    mesh.alpha().expect_record("of a client bound to the link", |line| {
        line["destination"]["address"] == to.to_string() && line["decision"].is_string()
    });
    expect_alive(&mesh);
    let wire = lab.expect_no_plaintext();
    let strays: Vec<SocketAddr> =
        wire.streams().iter().map(|stream| stream.destination).filter(|to| to.ip().is_loopback()).collect();
    assert!(strays.is_empty(), "packets for {strays:?} left the host");
}

#[test]
fn a_client_that_is_bound_to_the_link_does_not_hang_and_leaves_a_line() {
    bound_to_the_link(&lab!(), "connect s TO; write s MARKER; read s");
}

#[test]
fn a_client_that_is_bound_to_the_link_puts_nothing_into_its_syn() {
    bound_to_the_link(&lab!(), "fastopen s TO MARKER; read s");
}

#[test]
fn a_connection_that_is_given_up_before_it_arrives_leaves_a_line() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let to = lab.beta.at(PORT);
    let mut user = lab.puppet(&lab.alpha, "one", USER, "user");
    // The link that everything is redirected to is down.
    let link = |state: &str| {
        let words = ["-n", &lab.alpha.netns, "link", "set", "lo", state];
        assert!(Command::new("ip").args(words).status().unwrap().success());
    };
    link("down");
    user.tell(&format!("socket s 4; connect s {to}"));
    user.tell("close s");
    link("up");
    mesh.alpha().expect_record("of a connection that never arrived", |line| {
        line["destination"]["address"] == to.to_string() && line["decision"] == "denied"
    });
    expect_alive(&mesh);
}

#[test]
fn an_enrolled_program_in_another_namespace_of_the_host_is_refused() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let web = web(&lab, "server", "web", "opt s dual; ", &format!("[::]:{PORT}"));
    // The kernel asks who dials, not where: a container without an agent.
    for to in [lab.beta.at(PORT), lab.beta.at6(PORT), lab.beta.mapped(PORT)] {
        for how in ["blocking", "nonblocking", "mptcp"] {
            let said = lab.echo(&lab.stranger, "client", to, &["--how", how]);
            assert_eq!(pick(&said, "connect")["error"], "EPERM", "{to} {how}: {said:?}");
        }
    }
    let words = ["lab-app", "udp-talk", "--to", &lab.beta.at(PORT).to_string(), "--text", lab.marker()];
    let said = lab.run(&lab.stranger, "client", &words).outcome().json();
    assert_eq!(said["error"], "EPERM", "{said}");
    web.expect_unheard(lab.marker(), "from another namespace");
    // The rest is counted, and told.
    lab.stranger.within(|| lab::hand::knock(lab.beta.at(PORT)));
    let told =
        clock::until(clock::seconds(10), || mesh.alpha().status().to_string().contains("namespace").then_some(()));
    assert!(told.is_some(), "status says nothing of other namespaces: {:#}", mesh.alpha().status());
    lab.expect_served(&mesh, lab.beta.at(PORT));
    expect_alive(&mesh);
    lab.expect_no_plaintext();
}

/// ICMP echo requests that a host has had.
fn echo_requests(host: &Host) -> u64 {
    let (four, six) = host.within(|| {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
        (read("snmp"), read("snmp6"))
    });
    let mut lines = four.lines().filter(|line| line.starts_with("Icmp:"));
    let names = lines.next().unwrap_or_default().split(' ');
    let values = lines.next().unwrap_or_default().split(' ');
    let four = names.zip(values).find(|(name, _)| *name == "InEchos").and_then(|(_, value)| value.parse::<u64>().ok());
    let six = six.lines().find_map(|line| line.strip_prefix("Icmp6InEchos")?.trim().parse::<u64>().ok());
    four.unwrap_or(0) + six.unwrap_or(0)
}

#[test]
fn icmp_of_a_workload_carries_nothing_to_a_mesh_destination() {
    let lab = lab!();
    for host in [&lab.alpha, &lab.beta] {
        if host.sysctl("net/ipv4/ping_group_range", "0 4000").is_err() {
            Skip::because("kernel has no ping sockets").announce(lab.test());
            return;
        }
    }
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let mut user = lab.puppet(&lab.alpha, "one", USER, "user");
    let mut other = lab.puppet(&lab.alpha, "nobody", ATTACKER, "other");
    let marker = lab.marker();
    let call = |family: u8, kind: char, to: SocketAddr| {
        format!("socket s {family} ping; send-to s {to} {kind}\0\0\0\0\0\0\u{1}{marker}")
    };
    // The oracle: who is nobody may ping.
    other.must(&call(4, '\u{8}', lab.beta.at(0)));
    other.must(&format!("socket t 4 ping; connect t {}; write t \u{8}\0\0\0\0\0\0\u{1}x", lab.beta.at(0)));
    let reached = clock::until(clock::seconds(5), || (echo_requests(&lab.beta) >= 2).then_some(()));
    assert!(reached.is_some(), "the oracle is blind");
    let before = echo_requests(&lab.beta);
    user.tell(&call(4, '\u{8}', lab.beta.at(0)));
    user.tell(&call(6, '\u{80}', lab.beta.at6(0)));
    user.tell(&format!("socket t 4 ping; connect t {}; write t \u{8}\0\0\0\0\0\0\u{1}{marker}", lab.beta.at(0)));
    settle();
    assert_eq!(echo_requests(&lab.beta), before, "echo requests of a workload arrived");
    expect_alive(&mesh);
}

/// A protocol beside TCP and UDP, where the kernel has it.
fn other_protocol(lab: &Lab, protocol: &str) {
    let mesh = mesh!(lab, &policy(lab, &[PORT]));
    let mut user = lab.puppet(&lab.alpha, "one", USER, "user");
    let made = user.tell(&format!("socket s 4 {protocol}"));
    if made["ok"] == false {
        let reason = format!("kernel has no {}: {}", protocol.to_uppercase(), made["error"]);
        Skip::because(reason).announce(lab.test());
        return;
    }
    let mut server = lab.puppet(&lab.beta, "nobody", ATTACKER, "server");
    server.must(&format!("socket s 4 {protocol}; bind s {}; listen s", lab.beta.at(PORT)));
    let answer = user.tell(&format!("connect s {}; write s {}", lab.beta.at(PORT), lab.marker()));
    assert_eq!(answer["ok"], false, "{answer}");
    settle();
    server.expect_unheard(lab.marker(), "from a workload");
    expect_alive(&mesh);
}

#[test]
fn sctp_of_a_workload_is_refused() {
    other_protocol(&lab!(), "sctp");
}

#[test]
fn dccp_of_a_workload_is_refused() {
    other_protocol(&lab!(), "dccp");
}

#[test]
fn a_datagram_socket_that_was_connected_by_nobody_carries_nothing_of_a_workload() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let mut user = lab.puppet(&lab.alpha, "one", USER, "user");
    let mut other = lab.puppet(&lab.alpha, "nobody", ATTACKER, "other");
    for (family, to) in [(4, lab.beta.at(PORT)), (6, lab.beta.at6(PORT)), (6, lab.beta.mapped(PORT))] {
        other.must(&format!("socket s {family} udp; connect s {to}; give s user"));
        user.must("take s");
        let answer = user.tell(&format!("write s {}", lab.marker()));
        assert_eq!(answer["ok"], false, "{to}: {answer}");
    }
    expect_alive(&mesh);
    lab.expect_no_plaintext();
}

#[test]
fn a_datagram_socket_that_was_connected_before_the_agent_carries_nothing_of_a_workload() {
    let lab = lab!();
    let mut user = lab.puppet(&lab.alpha, "one", USER, "user");
    user.must(&format!("socket s 4 udp; connect s {}", lab.beta.at(PORT)));
    user.must(&format!("socket t 6 udp; connect t {}", lab.beta.at6(PORT)));
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    for name in ["s", "t"] {
        let answer = user.tell(&format!("write {name} {}", lab.marker()));
        assert_eq!(answer["ok"], false, "{name}: {answer}");
    }
    expect_alive(&mesh);
    lab.expect_no_plaintext();
}

#[test]
fn whoever_dials_the_agent_itself_is_refused_and_counted_not_written_each_time() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let mut attacker = lab.puppet(&lab.alpha, "nobody", ATTACKER, "attacker");
    let log = mesh.alpha().directory().join("audit.jsonl");
    let size = || std::fs::metadata(&log).map_or(0, |it| it.len());
    let (before, mut attempts) = (size(), 0);
    for door in listening(&lab.alpha) {
        let told = attacker.tell(&format!("socket a 4; connect a {door}"));
        assert_eq!(told["error"], "ECONNREFUSED", "{told}");
        let told = attacker.must(&format!("dials {door} {}", clock::millis(500).as_millis()));
        attempts += 1 + told["attempts"].as_u64().unwrap();
    }
    assert!(attempts > 100);
    let counted = || {
        let lines = mesh.alpha().audit();
        attempts_of(lines.iter().filter(|line| line["code"] == "dialled-the-agent"))
    };
    assert!(clock::until(clock::seconds(15), || (counted() == attempts).then_some(())).is_some(), "{}", counted());
    assert!(size() - before < 50_000, "{} bytes for {attempts} dials", size() - before);
    let web = web(&lab, "server", "web", "", &format!("0.0.0.0:{PORT}"));
    lab.expect_served(&mesh, lab.beta.at(PORT));
    web.expect_unheard("FORGED", "nobody wrote it");
}

#[test]
fn what_waits_for_the_agent_is_not_taken_for_what_comes_from_the_same_address_later() {
    let lab = lab!();
    let second = policy(&lab, &[PORT]).workload_by("second", &["unix:uid:2003"]);
    let mesh = mesh!(lab, &second.allow("second-to-server", "second", "server"));
    let web = web(&lab, "server", "web", "opt s dual; ", &format!("[::]:{PORT}"));
    let to = lab.beta.at(PORT);
    let mut user = lab.puppet(&lab.alpha, "one", USER, "user");
    let mut second = lab.puppet(&lab.alpha, "one", 2003, "second");
    for round in 0..3 {
        let from = 5755 + round;
        mesh.alpha().signal(Signal::STOP);
        for _ in 0..8 {
            let bound = format!("socket a 4; opt a reuseaddr; opt a reset; bind a 0.0.0.0:{from}");
            second.tell(&format!("{bound}; connect a {to}; write a OF-SECOND; close a"));
        }
        let bound = format!("patience 100; socket s{round} 4; opt s{round} reuseaddr; bind s{round} 0.0.0.0:{from}");
        user.tell(&format!("{bound}; connect s{round} {to}"));
        mesh.alpha().signal(Signal::CONT);
        settle();
    }
    user.end();
    settle();
    let lines = mesh.alpha().audit();
    let bytes_of_user = lines.iter().filter(|line| line["source"]["id"] == id("user"));
    let sent: u64 = bytes_of_user.map(|line| line["bytes"]["sent"].as_u64().unwrap_or(0)).sum();
    assert_eq!(sent, 0, "the user has written nothing: {lines:#?}");
    expect_alive(&mesh);
    drop(web);
}

/// A workload's `connect()` sends nothing, the agent goes, and somebody takes its ports; then the workload writes.
fn put_off(lab: &Lab, gone: impl FnOnce(&Mesh<'_>)) {
    let mesh = mesh!(lab, &policy(lab, &[PORT]));
    let _web = web(lab, "server", "web", "", &format!("0.0.0.0:{PORT}"));
    let mut user = lab.puppet(&lab.alpha, "one", USER, "user");
    let mut attacker = lab.puppet(&lab.alpha, "nobody", ATTACKER, "attacker");
    let doors = listening(&lab.alpha);
    user.must(&format!("socket s 4; opt s deferred; connect s {}", lab.beta.at(PORT)));
    gone(&mesh);
    for (index, door) in doors.iter().enumerate() {
        attacker.tell(&format!("socket a{index} 4; opt a{index} reuseaddr; bind a{index} {door}; listen a{index}"));
    }
    user.tell(&format!("write s {}; read s", lab.marker()));
    settle();
    attacker.expect_unheard(lab.marker(), "on the port of an agent that is gone");
    lab.expect_no_plaintext();
}

#[test]
fn a_connection_that_was_put_off_does_not_go_to_whoever_has_the_port_of_a_dead_agent() {
    put_off(&lab!(), |mesh| mesh.alpha().kill());
}

#[test]
fn a_connection_that_was_put_off_does_not_go_to_whoever_has_the_port_of_the_agent_before() {
    put_off(&lab!(), |mesh| {
        mesh.alpha().terminate().unwrap();
        mesh.alpha().start().unwrap();
    });
}

#[test]
fn a_syn_that_waits_for_an_agent_that_dies_meets_nobody_else() {
    let lab = lab!();
    lab.alpha.sysctl("net/core/somaxconn", "8").unwrap();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let _web = web(&lab, "server", "web", "", &format!("0.0.0.0:{PORT}"));
    let mut user = lab.puppet(&lab.alpha, "one", USER, "user");
    let mut attacker = lab.puppet(&lab.alpha, "nobody", ATTACKER, "attacker");
    mesh.alpha().signal(Signal::STOP);
    user.must("patience 10");
    // More than the agent's queues have room for, so that some wait for an answer.
    let all: Vec<String> = (0..60).map(|number| format!("u{number}")).collect();
    for name in &all {
        user.must(&format!("socket {name} 4"));
        user.tell(&format!("connect {name} {}", lab.beta.at(PORT)));
    }
    mesh.alpha().kill();
    let crossed = attacker.tell(&format!("cross {}", clock::millis(2500).as_millis()));
    assert!(crossed["steps"][0]["tries"].as_u64() > Some(0), "nobody waited: {crossed}");
    for name in &all {
        user.tell(&format!("write {name} {}", lab.marker()));
    }
    attacker.tell("sleep 100");
    attacker.expect_unheard(lab.marker(), "in the place of an agent that is gone");
    lab.expect_no_plaintext();
}

#[test]
fn an_upstream_connection_that_waits_for_its_workload_meets_nobody_else() {
    let lab = lab!();
    let settings = Settings { tables: "[sessions]\nreuse = false\n".to_owned(), ..Settings::default() };
    let mesh = mesh!(lab, &policy(&lab, &[PORT]), &settings);
    let mut busy = lab.puppet(&lab.beta, "server", WEB, "busy");
    busy.must(&format!("serve off; socket s 4; opt s reuseaddr; bind s 0.0.0.0:{PORT}; listen s 1"));
    let mut attacker = lab.puppet(&lab.beta, "nobody", ATTACKER, "attacker");
    let mut user = lab.puppet(&lab.alpha, "one", USER, "user");
    for number in 0..8 {
        user.must(&format!("socket u{number} 4"));
        user.tell(&format!("connect u{number} {}; write u{number} {}", lab.beta.at(PORT), lab.marker()));
    }
    settle();
    let crossed = std::thread::scope(|scope| {
        let crossing = scope.spawn(|| attacker.tell(&format!("cross {}", clock::millis(2500).as_millis())));
        std::thread::sleep(clock::millis(100));
        busy.end();
        crossing.join().unwrap()
    });
    assert!(crossed["steps"][0]["tries"].as_u64() > Some(0), "no upstream connection waited: {crossed}");
    attacker.tell("sleep 100");
    attacker.expect_unheard(lab.marker(), "in the place of a workload that is gone");
    expect_alive(&mesh);
}

#[test]
fn a_packet_that_is_routed_by_its_source_carries_nothing_past_the_guard() {
    let lab = lab!();
    for host in [&lab.alpha, &lab.beta] {
        host.sysctl("net/ipv4/tcp_fastopen", "1543").unwrap();
    }
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    lab.capture_many();
    let (via, to, marker) = (lab.beta.v6, lab.stranger.at6(PORT), lab.marker());
    let mut user = lab.puppet(&lab.alpha, "one", USER, "user");
    let mut other = lab.puppet(&lab.alpha, "nobody", ATTACKER, "other");
    user.must(&format!("socket d 6 udp; opt d via:{via}"));
    user.tell(&format!("send-to d {to} {marker}"));
    user.tell(&format!("socket e 6 udp; connect e {to}; opt e via:{via}; write e {marker}"));
    for hand in [&mut user, &mut other] {
        hand.must(&format!("socket t 6; opt t via:{via}"));
        hand.tell(&format!("fastopen t {to} {marker}"));
    }
    settle();
    assert!(mesh.alpha().status()["kernel"]["guard-dropped"].as_u64() > Some(0), "{:#}", mesh.alpha().status());
    lab.expect_no_plaintext();
    expect_alive(&mesh);
}

#[test]
fn a_device_that_is_chosen_after_connect_puts_nothing_on_the_link() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let _web = web(&lab, "server", "web", "opt s dual; ", &format!("[::]:{PORT}"));
    for (family, via) in [("-4", lab.beta.v4.to_string()), ("-6", lab.beta.v6.to_string())] {
        let mut command = Command::new("ip");
        command.args([family, "-n", &lab.alpha.netns, "route", "add", "default", "via", &via]);
        assert!(command.status().unwrap().success());
    }
    let mut user = lab.puppet(&lab.alpha, "one", USER, "user");
    for (family, own, to) in [(4, lab.alpha.at(0), lab.beta.at(PORT)), (6, lab.alpha.at6(0), lab.beta.at6(PORT))] {
        let connected = format!("socket s {family}; opt s deferred; bind s {own}; connect s {to}");
        user.tell(&format!("{connected}; opt s device:eth0; write s {}; close s", lab.marker()));
    }
    settle();
    lab.expect_no_plaintext();
    expect_alive(&mesh);
}
