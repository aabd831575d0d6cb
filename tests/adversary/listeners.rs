//! Who binds, leaves and dies.

use lab::hand::{ATTACKER, Hand, USER, WEB, expect_alive, knock};
use lab::janitor::processes;
use lab::policy::PORT;
use lab::{Host, Lab, Mesh, Policy, Skip, clock, enter, lab, or_skip, skip};
use rustix::process::Signal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The client by its cgroup, web by its user: so that the kernel needs the class of a cgroup for everybody.
pub fn policy(lab: &Lab, ports: &[u16]) -> Policy {
    with_web(lab, &[&format!("unix:uid:{WEB}")], ports)
}

/// The same where web has these selectors.
pub fn with_web(lab: &Lab, selectors: &[&str], ports: &[u16]) -> Policy {
    let policy = Policy::empty(lab)
        .workload("client")
        .workload_by("user", &[&format!("unix:uid:{USER}")])
        .workload_by("server", selectors)
        .allow("client-to-server", "client", "server")
        .allow("user-to-server", "user", "server");
    ports.iter().fold(policy, |policy, port| policy.serve(lab, *port))
}

/// The same where web is its user in its cgroup, and the user elsewhere is nobody.
pub fn with_web_in_its_cgroup(lab: &Lab) -> Policy {
    with_web(lab, &[&format!("unix:uid:{WEB}"), &format!("cgroup:{}/server", lab.cgroup_path())], &[PORT])
}

/// Web on beta, listening: `how` stands between the making of the socket and the bind.
pub fn web(lab: &Lab, cgroup: &str, name: &str, how: &str, at: &str) -> Hand {
    let mut web = lab.puppet(&lab.beta, cgroup, WEB, name);
    let family = if at.starts_with('[') { 6 } else { 4 };
    web.must(&format!("socket s {family}; {how}bind s {at}; listen s"));
    web
}

/// Long enough for an agent to have seen and judged what happened.
pub fn settle() {
    std::thread::sleep(clock::millis(400));
}

/// Strangers call on web again and again, also after a reload and after a restart of the agent.
fn expect_closed_for_good(lab: &Lab, mesh: &Mesh<'_>, port: u16, web: &Hand) {
    lab.assail(port, 2);
    web.expect_no_stranger("at once");
    mesh.beta().read_again().unwrap();
    lab.assail(port, 1);
    web.expect_no_stranger("after a reload");
    mesh.beta().terminate().unwrap();
    lab.assail(port, 1);
    web.expect_no_stranger("without an agent");
    mesh.beta().start().unwrap();
    lab.assail(port, 1);
    web.expect_no_stranger("after a restart");
}

/// An attacker listens in this way, leaves in this way and is gone; then web begins.
fn after_a_listener_that_left(lab: &Lab, how: &str, leave: &str) {
    let mesh = mesh!(lab, &policy(lab, &[PORT]));
    let mut attacker = lab.puppet(&lab.beta, "nobody", ATTACKER, "attacker");
    let (v4, v6) = (lab.beta.at(PORT), lab.beta.at6(PORT));
    attacker.must(&format!("socket a 4{how}; bind a {v4}; listen a; socket b 6{how}; bind b {v6}; listen b"));
    attacker.must(&format!("socket c 4{how}; bind c 127.0.0.1:{PORT}; listen c"));
    settle();
    attacker.must(leave);
    attacker.end();
    settle();
    let web = web(lab, "server", "web", "opt s dual; ", &format!("[::]:{PORT}"));
    expect_closed_for_good(lab, &mesh, PORT, &web);
    lab.expect_served(&mesh, lab.beta.at(PORT));
    expect_alive(&mesh);
    lab.expect_no_plaintext();
}

#[test]
fn a_listener_that_was_shut_down_leaves_nothing_that_opens_the_port() {
    after_a_listener_that_left(&lab!(), "", "shutdown a rd; shutdown b rd; shutdown c rd; close a; close b; close c");
}

#[test]
fn a_listener_that_was_closed_leaves_nothing_that_opens_the_port() {
    after_a_listener_that_left(&lab!(), "", "close a; close b; close c");
}

#[test]
fn a_multipath_listener_that_was_closed_leaves_nothing_that_opens_the_port() {
    after_a_listener_that_left(&lab!(), " mptcp", "close a; close b; close c");
}

#[test]
fn a_listener_that_a_killed_process_leaves_to_its_child_leaves_nothing_that_opens_the_port() {
    after_a_listener_that_left(&lab!(), "", "shutdown a rd; dup b twin; fork 100; name a");
}

/// Strangers on both hosts call on the port without a pause while this runs.
pub fn besieged<T>(lab: &Lab, port: u16, work: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    let call = |host: &Host, to| {
        host.within(|| {
            while !done.load(Ordering::Relaxed) {
                if !knock(to).connected {
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
        });
    };
    std::thread::scope(|scope| {
        for (host, to) in [
            (&lab.stranger, lab.beta.at(port)),
            (&lab.stranger, lab.beta.at(port)),
            (&lab.stranger, lab.beta.at6(port)),
            (&lab.beta, ([127, 0, 0, 1], port).into()),
        ] {
            let call = &call;
            scope.spawn(move || call(host, to));
        }
        struct Done<'a>(&'a AtomicBool);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _ends = Done(&done);
        work()
    })
}

/// Web listens and closes in a loop while strangers call.
fn flapping(lab: &Lab, at: &str, again: &str) {
    let mesh = mesh!(lab, &policy(lab, &[PORT]));
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    let millis = clock::millis(4000).as_millis().min(15_000);
    let line = format!("flap {at}:{PORT} {millis}{again}");
    let flapped = besieged(lab, PORT, || web.tell(&line));
    assert_eq!(flapped["ok"], true, "{flapped}");
    let listens = flapped["steps"][0]["listens"].as_u64();
    assert!(listens > Some(50), "{flapped}");
    web.expect_no_stranger(&format!("in {listens:?} listens"));
    let family = if at.starts_with('[') { 6 } else { 4 };
    web.must(&format!("socket s {family}; opt s reuseaddr; bind s {at}:{PORT}; listen s"));
    lab.assail(PORT, 1);
    web.expect_no_stranger("afterwards");
    lab.expect_served(&mesh, lab.beta.at(PORT));
    expect_alive(&mesh);
}

#[test]
fn a_listener_that_comes_and_goes_is_never_open_for_a_moment() {
    flapping(&lab!(), "0.0.0.0", "");
}

#[test]
fn a_listener_for_both_families_that_comes_and_goes_is_never_open_for_a_moment() {
    flapping(&lab!(), "[::]", "");
}

#[test]
fn a_socket_that_listens_again_after_it_was_shut_down_is_never_open_for_a_moment() {
    flapping(&lab!(), "0.0.0.0", " again");
}

/// Web is started in a new cgroup while no agent runs.
fn without_an_agent(lab: &Lab, cgroup: &str, selectors: &[&str]) {
    let mesh = mesh!(lab, &with_web(lab, selectors, &[PORT]));
    let at = format!("0.0.0.0:{PORT}");
    let first = web(lab, "server", "web", "", &at);
    lab.expect_served(&mesh, lab.beta.at(PORT));
    mesh.beta().kill();
    first.end();
    let second = web(lab, cgroup, "web", "opt s reuseaddr; ", &at);
    lab.assail(PORT, 2);
    second.expect_no_stranger("without an agent");
    // A port that nobody protected before.
    let other = web(lab, cgroup, "other", "", "[::]:8099");
    lab.assail(8099, 2);
    other.expect_no_stranger("on another port without an agent");
    mesh.beta().start().unwrap();
    lab.assail(PORT, 1);
    lab.assail(8099, 1);
    second.expect_no_stranger("with the next agent");
    other.expect_no_stranger("on another port with the next agent");
    lab.expect_served(&mesh, lab.beta.at(PORT));
    expect_alive(&mesh);
}

#[test]
fn a_workload_restarted_in_a_new_cgroup_without_an_agent_is_not_open() {
    let lab = lab!();
    let uid = format!("unix:uid:{WEB}");
    without_an_agent(&lab, "made-while-nobody-looked", &[&uid]);
}

#[test]
fn a_workload_known_by_cgroup_and_restarted_below_it_without_an_agent_is_not_open() {
    let lab = lab!();
    let cgroup = format!("cgroup:{}/server", lab.cgroup_path());
    without_an_agent(&lab, "server/made-while-nobody-looked", &[&cgroup]);
}

#[test]
fn programs_that_are_nobodys_stay_reachable() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let mut other = lab.puppet(&lab.beta, "nobody", ATTACKER, "other");
    let reached = |other: &Hand| {
        clock::until(clock::seconds(10), || {
            let attempts = lab.assail(9001, 1);
            let answered = |attempt: &lab::stranger::Attempt| !attempt.answer.is_empty();
            (attempts.iter().filter(|attempt| answered(attempt)).count() == attempts.len()).then_some(())
        })
        .is_some_and(|()| !other.strangers().is_empty())
    };
    other.must("socket s 6; opt s dual; bind s [::]:9001; listen s");
    assert!(reached(&other), "by nobody while the agent runs");
    mesh.beta().kill();
    assert!(reached(&other), "by nobody once the agent is gone");
    mesh.beta().start().unwrap();
    assert!(reached(&other), "by nobody once the agent is back");
}

#[test]
fn a_server_that_is_killed_and_started_again_on_a_loaded_machine_has_an_owner() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let at = format!("0.0.0.0:{PORT}");
    let rounds = clock::count(24).max(4);
    super::loaded(|| {
        let mut server = web(&lab, "server", "web-0", "opt s reuseaddr; ", &at);
        for round in 1..=rounds {
            let say = format!("send:{}\\n", lab.marker());
            let mut open = lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &[&say, "line", "wait"]);
            open.step("connect");
            server.end();
            server = web(&lab, "server", &format!("web-{round}"), "opt s reuseaddr; ", &at);
            lab.expect_served(&mesh, lab.beta.at(PORT));
        }
    });
    let lines = mesh.beta().records_for(PORT);
    let lost = lines.iter().find(|line| line["code"] == "listener-without-owner");
    assert!(lost.is_none(), "the owner was there all the time: {}", lost.unwrap());
    expect_alive(&mesh);
}

#[test]
fn when_a_policy_is_in_force_no_listener_that_it_enrols_is_open() {
    let lab = lab!();
    let mesh = mesh!(lab, &with_web(&lab, &["unix:uid:4444"], &[PORT]));
    // Somebody enrolled has so many descriptors that it takes long to find out what they hold.
    let place = enter::Place { user: Some((USER, USER)), files: Some(20_000), ..lab.place(&lab.beta, "one") };
    let mut holder = Hand::start(&lab, place, &or_skip!(skip::lab_app()), "holder");
    holder.try_tell(&format!("hold {} 0", clock::count(15_000)), clock::seconds(240)).unwrap();
    for _ in 0..20 {
        holder.must("fork 60000");
    }
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    let ports = 9000..9000 + u16::try_from(clock::count(200)).unwrap_or(200).max(40);
    std::thread::scope(|scope| {
        let (web, ports) = (&mut web, ports.clone());
        scope.spawn(move || {
            for port in ports {
                web.must(&format!("socket s{port} 4; bind s{port} 0.0.0.0:{port}; listen s{port}"));
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        std::thread::sleep(Duration::from_millis(200));
        mesh.beta().reload(&policy(&lab, &[PORT]));
        for port in 9000..9010 {
            lab.stranger.within(|| knock(lab.beta.at(port)));
        }
    });
    for port in ports {
        lab.stranger.within(|| knock(lab.beta.at(port)));
    }
    web.expect_no_stranger("by a policy that is in force");
    for pid in processes(&lab.cgroup("one")) {
        let _: Result<(), _> = rustix::process::kill_process(pid, Signal::KILL);
    }
    expect_alive(&mesh);
}

#[test]
fn when_an_agent_is_ready_it_serves_what_listened_before_it() {
    let lab = lab!();
    // An enrolled user has so many descriptors that it takes long to find out who holds the server's socket.
    let place = enter::Place { user: Some((USER, USER)), files: Some(20_000), ..lab.place(&lab.beta, "one") };
    let mut holder = Hand::start(&lab, place, &or_skip!(skip::lab_app()), "holder");
    holder.try_tell("files 15000", clock::seconds(60)).unwrap();
    for _ in 0..10 {
        holder.must("fork 60000");
    }
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let mesh = mesh!(lab, &Policy::standard(&lab).workload_by("user", &[&format!("unix:uid:{USER}")]));
    for _ in 0..3 {
        lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
        mesh.beta().terminate().unwrap();
        mesh.beta().start().unwrap();
    }
    for pid in processes(&lab.cgroup("one")) {
        let _: Result<(), _> = rustix::process::kill_process(pid, Signal::KILL);
    }
    expect_alive(&mesh);
}

/// Root binds and web listens, in a loop.
pub(super) fn bound_by_root(lab: &Lab, when: &str) {
    let mut web = lab.puppet(&lab.beta, "server", 0, "web");
    let millis = clock::millis(4000).as_millis();
    let flapped = besieged(lab, PORT, || web.must(&format!("flap 0.0.0.0:{PORT} {millis} as {WEB}")));
    assert!(flapped["listens"].as_u64() > Some(50), "{flapped}");
    web.expect_no_stranger(when);
}

#[test]
fn a_socket_on_which_no_note_can_be_made_is_never_open_for_a_moment() {
    let lab = lab!();
    // A limit of the network namespace since Linux 6.9; before, of the host.
    let limited = lab.beta.sysctl("net/core/optmem_max", "1");
    or_skip!(limited.map_err(|_| Skip::because("no room for options by network namespace")));
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    bound_by_root(&lab, "root binds and web listens, and no note tells who bound");
    expect_alive(&mesh);
}
