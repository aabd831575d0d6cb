//! Very many connections: bursts of them, and how little they cost while they do nothing. A test program of its own, since
//! it measures memory of the whole machine: its tests run one after the other.

use lab::agent::attempts;
use lab::policy::{PORT, id};
use lab::{Agent, Lab, Mesh, Policy, Program, Settings, clock, lab, or_skip, skip};
use serde_json::Value;
use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// More than a client needs from one address to one listener.
const PORTS: (&str, &str) = ("net/ipv4/ip_local_port_range", "1024 65535");

#[test]
fn a_burst_is_served_and_each_connection_has_its_line() {
    let _alone = alone();
    let lab = lab!();
    burst(&lab, clock::count(2000));
}

#[test]
fn ten_thousand_at_once_are_served_and_each_connection_has_its_line() {
    or_skip!(skip::by_name("ten_thousand"));
    let number = wanted(10_000);
    or_skip!(skip::need_files(files(number)));
    let _alone = alone();
    let lab = lab!();
    burst(&lab, number);
}

/// As many as the test is named for, or `LAB_CONNECTIONS`, for a machine that has no room for so many.
fn wanted(number: usize) -> usize {
    std::env::var("LAB_CONNECTIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(number)
}

/// Files of an agent with so many connections.
fn files(connections: usize) -> u64 {
    2 * connections as u64 + 1024
}

/// All at once; with time enough all of them are served.
fn burst(lab: &Lab, number: usize) {
    lab.capture_heads();
    let settings = Settings { tables: "[timeouts]\ndial = \"1m\"\nhandshake = \"1m\"\n".into(), ..Settings::default() };
    let mesh = or_skip!(lab.mesh_with(&Policy::standard(lab), &settings));
    let _server = server(lab, number);
    let mut crowd = crowd(lab, "client", number, number);
    let came = crowd.line(clock::seconds(200), |line| line.contains("crowd")).unwrap();
    println!("{came}");
    let came: Value = serde_json::from_str(&came).unwrap();
    let refused = || [mesh.alpha(), mesh.beta()].map(|agent| agent.status()["refused"].to_string());
    assert_eq!(came["served"].as_u64(), Some(number as u64), "{came} {:#?}", refused());
    crowd.say("use").unwrap();
    crowd.line(clock::seconds(60), |line| line.contains("used")).unwrap();
    crowd.close_stdin();
    crowd.outcome().good();
    mesh.expect_allowed(PORT, number);
    lab.expect_marker(&lab.wire());
}

#[test]
fn a_burst_beyond_the_queue_is_refused_by_name_and_leaves_room_for_others() {
    let _alone = alone();
    let lab = lab!();
    lab.capture_many();
    let tables = "[limits]\nhandshakes = 8\nwaiting = 100\n[timeouts]\nhandshake = \"1m\"\n";
    let settings = Settings { tables: tables.into(), ..Settings::default() };
    let policy = Policy::standard(&lab).workload("third").allow("third-to-server", "third", "server");
    let mesh = or_skip!(lab.only_mesh_with(&policy, &settings));
    let _server = server(&lab, 4000);
    let (number, few) = (clock::count(2000), clock::count(50));
    let mut flood = crowd(&lab, "client", number, number);
    let mut other = crowd(&lab, "third", few, 1);
    let answer = |program: &mut Program| -> Value {
        let line = program.line(clock::seconds(200), |line| line.contains("crowd")).unwrap();
        println!("{line}");
        serde_json::from_str(&line).unwrap()
    };
    let (calm, flooded) = (answer(&mut other), answer(&mut flood));
    // Who does not flood is served, whatever others do.
    let of_third = |line: &Value| line["decision"] == "denied" && line["source"]["id"] == id("third");
    let cut: Vec<Value> = mesh.alpha().audit().into_iter().filter(of_third).collect();
    // The server's agent, which on a busy machine gets behind, cannot tell them from the others by their address.
    assert!(cut.iter().all(|line| line["code"] == "peer-reset"), "{cut:#?}");
    assert_eq!(calm["served"].as_u64(), Some((few - cut.len()) as u64), "{calm} {cut:#?}");
    assert!(cut.len() < few / 2, "{cut:#?}");
    let (served, reset) = (flooded["served"].as_u64().unwrap(), flooded["refused"]["ECONNRESET"].as_u64().unwrap_or(0));
    assert_eq!(served + reset, number as u64, "each is served or refused: {flooded}");
    assert!(served > 0 && reset > 0, "{flooded}");
    for program in [&mut flood, &mut other] {
        program.close_stdin();
    }
    let _ended = (flood.outcome().good(), other.outcome().good());
    let records = mesh.alpha().expect_records(PORT, number + few);
    let denied: Vec<&Value> = records.iter().filter(|record| record["decision"] == "denied").collect();
    assert_eq!(attempts(denied.iter().copied()), reset + cut.len() as u64);
    // On a busy machine the server's agent gets behind the client's, and its queue may be the one that is full.
    let by_code = |code: &'static str| denied.iter().filter(move |record| record["code"] == code);
    for record in by_code("handshake-queue-full") {
        assert_eq!(record["culprit"], "host", "{record}");
        assert!(record["reason"].as_str().is_some_and(|reason| reason.contains(&id("client"))), "{record}");
    }
    let number_of = |code| attempts(by_code(code).copied());
    let (own, far) = (number_of("handshake-queue-full"), number_of("peer-reset"));
    assert_eq!(own + far, reset + cut.len() as u64, "{denied:#?}");
    assert_eq!(mesh.alpha().status()["refused"]["handshake-queue-full"]["count"].as_u64(), Some(own));
    let refused_there = || {
        let lines = mesh.beta().audit();
        attempts(lines.iter().filter(|record| record["code"] == "handshake-queue-full"))
    };
    let told = clock::until(clock::seconds(15), || (refused_there() >= far).then_some(()));
    assert!(told.is_some(), "{far} were reset by the other agent, and it refused {} by name", refused_there());
    lab.expect_tls(PORT);
}

#[test]
fn idle_connections_cost_little_memory_and_no_processor_time() {
    let _alone = alone();
    let lab = lab!();
    idle(&lab, clock::count(2000), clock::millis(5000).min(Duration::from_secs(10)));
}

#[test]
fn fifty_thousand_idle_connections_cost_little_memory_and_no_processor_time() {
    or_skip!(skip::by_name("fifty_thousand"));
    let number = wanted(50_000);
    or_skip!(skip::need_files(files(number)));
    let _alone = alone();
    let lab = lab!();
    idle(&lab, number, Duration::from_secs(30));
}

/// The most that an agent may take for an idle connection, in its own memory and in the kernel's.
const MOST: u64 = 40_000;
/// The most of it in its own memory.
const MOST_OWN: u64 = 12_000;

fn idle(lab: &Lab, number: usize, rest: Duration) {
    lab.capture_heads();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(lab)));
    let agents = [mesh.alpha(), mesh.beta()];
    for host in [&lab.alpha, &lab.beta] {
        host.sysctl(PORTS.0, PORTS.1).unwrap();
    }
    let _server = server(lab, number);
    warm_up(lab, &mesh);
    let (own, kernel) = (agents.map(anonymous), kernel_memory());
    let mut crowd = crowd(lab, "client", number, 64);
    let came: Value = serde_json::from_str(&patiently(&mut crowd, "crowd")).unwrap();
    assert_eq!(came["served"].as_u64(), Some(number as u64), "{came}");
    // Each connection is six sockets on this machine: the programs have one each, the agents two each.
    let kernel = kernel_memory().saturating_sub(kernel) / 3 / number as u64;
    let before = agents.map(activity);
    std::thread::sleep(rest);
    let after = agents.map(activity);
    for (at, agent) in agents.iter().enumerate() {
        let own = anonymous(agent).saturating_sub(own[at]) / number as u64;
        let (busy, switches) = done(&before[at], &after[at]);
        println!(
            "{number} idle connections, agent {at}: {own} bytes each in the agent, {kernel} in the kernel; in {rest:?} \
             {busy} ms of processor time, {switches} context switches"
        );
        assert_eq!(agent.status()["connections"]["open"].as_u64(), Some(number as u64));
        if number >= 1000 {
            assert!(own <= MOST_OWN && own + kernel <= MOST, "{own} and {kernel} bytes for each idle connection");
        }
        // What the agent does now and then for itself, and nothing for any connection.
        let few = number.max(3000) as u64 / 10;
        assert!(switches < few && busy < few, "{busy} ms and {switches} switches in {rest:?}");
    }
    crowd.say("use").unwrap();
    patiently(&mut crowd, "used");
    crowd.close_stdin();
    drop(crowd.end(clock::seconds(100)).unwrap().good());
    for agent in agents {
        let closed = clock::until(clock::seconds(60), || {
            (agent.status()["connections"]["open"].as_u64() == Some(0)).then_some(())
        });
        assert!(closed.is_some(), "connections stay open in the agent");
    }
    lab.expect_marker(&lab.wire());
}

/// Waits for a line with this word, and says now and then that it does: in an emulated guest it takes long, and whoever is
/// silent for long is taken for dead.
fn patiently(crowd: &mut Program, word: &str) -> String {
    let line = (0..clock::seconds(1000).as_secs() / 60).find_map(|_| {
        let line = crowd.line(Duration::from_secs(60), |line| line.contains(word));
        println!("{}", line.as_deref().unwrap_or("not all of them yet"));
        line.ok()
    });
    line.unwrap_or_else(|| panic!("no line says {word}: {}", crowd.stderr()))
}

/// What the first connections need once: credentials, scratch, pages of the code.
fn warm_up(lab: &Lab, mesh: &Mesh<'_>) {
    let mut few = crowd(lab, "client", 20, 4);
    few.line(clock::seconds(60), |line| line.contains("crowd")).unwrap();
    few.close_stdin();
    few.outcome().good();
    mesh.expect_allowed(PORT, 20);
}

fn server(lab: &Lab, connections: usize) -> Program {
    let words = ["echo", "--listen", &lab.beta.at(PORT).to_string(), "--listen", &lab.beta.at6(PORT).to_string()];
    let mut server = many_files(lab, &lab.beta, "server", connections, &words);
    server.ready().unwrap();
    server.ready().unwrap();
    server
}

fn crowd(lab: &Lab, cgroup: &str, connections: usize, at_once: usize) -> Program {
    let (four, six) = (lab.beta.at(PORT).to_string(), lab.beta.at6(PORT).to_string());
    let (number, at_once) = (connections.to_string(), at_once.to_string());
    let words = ["crowd", "--to", &four, "--to", &six, "--connections", &number, "--at-once", &at_once];
    let words = [&words[..], &["--marker", lab.marker()]].concat();
    many_files(lab, &lab.alpha, cgroup, connections, &words)
}

fn many_files(lab: &Lab, host: &lab::Host, cgroup: &str, connections: usize, words: &[&str]) -> Program {
    let mut place = lab.place(host, cgroup);
    place.files = Some(connections as u64 + 1000);
    let mut command = lab.command_in(place, skip::lab_app().unwrap());
    command.args(words);
    Program::start(command, words[0]).unwrap()
}

/// Memory of the agent that is nobody else's, in bytes.
fn anonymous(agent: &Agent<'_>) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    kilobytes(&text, "RssAnon:") * 1024
}

/// What the kernel has taken for its objects and for the buffers of sockets, on the whole machine, in bytes.
fn kernel_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let sockets = std::fs::read_to_string("/proc/net/sockstat").unwrap();
    let tcp = sockets.lines().find(|line| line.starts_with("TCP:")).unwrap();
    let pages: u64 = tcp.split(' ').next_back().unwrap().parse().unwrap();
    kilobytes(&text, "SUnreclaim:") * 1024 + kilobytes(&text, "SReclaimable:") * 1024 + pages * 4096
}

fn kilobytes(text: &str, name: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Milliseconds on a processor, and context switches, of each thread.
fn activity(agent: &Agent<'_>) -> HashMap<OsString, (u64, u64)> {
    let one = |task: std::fs::DirEntry| {
        let status = std::fs::read_to_string(task.path().join("status")).ok()?;
        let schedule = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        let nanoseconds: u64 = schedule.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0);
        let switches =
            kilobytes(&status, "voluntary_ctxt_switches:") + kilobytes(&status, "nonvoluntary_ctxt_switches:");
        Some((task.file_name(), (nanoseconds / 1_000_000, switches)))
    };
    std::fs::read_dir(format!("/proc/{}/task", agent.pid())).unwrap().flatten().filter_map(one).collect()
}

/// What all threads have done between two looks. What one has done that has ended meanwhile is not known.
fn done(before: &HashMap<OsString, (u64, u64)>, after: &HashMap<OsString, (u64, u64)>) -> (u64, u64) {
    let more = |(thread, now): (&OsString, &(u64, u64))| {
        let then = before.get(thread).copied().unwrap_or_default();
        (now.0.saturating_sub(then.0), now.1.saturating_sub(then.1))
    };
    after.iter().map(more).fold((0, 0), |sum, more| (sum.0 + more.0, sum.1 + more.1))
}

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}
