//! Who binds, joins, leaves and dies.

use lab::hand::{ATTACKER, Hand, USER, WEB, expect_alive, knock};
use lab::janitor::processes;
use lab::policy::PORT;
use lab::{Host, Lab, Mesh, Policy, Skip, clock, enter, lab, or_skip, skip};
use rustix::process::Signal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

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

/// Web and the same user in a cgroup that is nobody's share a port.
fn joined(lab: &Lab, web_first: bool) {
    let mesh = mesh!(lab, &with_web_in_its_cgroup(lab));
    let how = "opt s reuseport; opt s reuseaddr; ";
    let at = format!("0.0.0.0:{PORT}");
    let (web, joiner) = if web_first {
        let web = web(lab, "server", "web", how, &at);
        settle();
        (web, self::web(lab, "elsewhere", "joiner", how, &at))
    } else {
        let joiner = self::web(lab, "elsewhere", "joiner", how, &at);
        settle();
        (web(lab, "server", "web", how, &at), joiner)
    };
    lab.assail(PORT, 8);
    web.expect_no_stranger("at once");
    settle();
    lab.assail(PORT, 8);
    web.expect_no_stranger("a moment later");
    lab.expect_served_or_told(&mesh, lab.beta.at(PORT));
    // The joiner goes, and comes again and goes by a shutdown: web stays what it is.
    joiner.end();
    let mut joiner = self::web(lab, "elsewhere", "joiner", how, &at);
    joiner.must("shutdown s rd");
    lab.assail(PORT, 8);
    web.expect_no_stranger("after the joiner left");
    joiner.end();
    lab.expect_served(&mesh, lab.beta.at(PORT));
    expect_alive(&mesh);
}

#[test]
fn who_joins_a_port_by_reuseport_never_lowers_its_protection() {
    joined(&lab!(), true);
}

#[test]
fn who_had_a_port_before_by_reuseport_never_lowers_its_protection() {
    joined(&lab!(), false);
}

/// Web is bound to the link, and an attacker listens on the same port of another device.
fn on_another_device(lab: &Lab, web_first: bool, family: u8, any: &str) {
    let mesh = mesh!(lab, &policy(lab, &[PORT]));
    let at = format!("{any}:{PORT}");
    let attack = |attacker: &mut Hand| {
        attacker.must(&format!("socket a {family}; opt a reuseaddr; opt a device:lo; bind a {at}; listen a"));
    };
    let mut attacker = lab.puppet(&lab.beta, "nobody", ATTACKER, "attacker");
    if !web_first {
        attack(&mut attacker);
        settle();
    }
    let web = web(lab, "server", "web", "opt s device:eth0; ", &at);
    if web_first {
        settle();
        attack(&mut attacker);
    }
    lab.assail(PORT, 2);
    web.expect_no_stranger("at once");
    settle();
    lab.assail(PORT, 2);
    web.expect_no_stranger("a moment later");
    attacker.must("shutdown a rd; close a");
    lab.assail(PORT, 1);
    web.expect_no_stranger("after the attacker left");
    attack(&mut attacker);
    lab.expect_served_or_told(&mesh, if family == 4 { lab.beta.at(PORT) } else { lab.beta.at6(PORT) });
    // What a client says to web is for nobody else who has the port on another device.
    attacker.expect_unheard(lab.marker(), "a client of web spoke");
    expect_alive(&mesh);
}

#[test]
fn a_port_that_another_has_on_another_device_stays_protected() {
    on_another_device(&lab!(), true, 4, "0.0.0.0");
}

#[test]
fn a_port_that_another_had_on_another_device_before_is_protected() {
    on_another_device(&lab!(), false, 4, "0.0.0.0");
}

#[test]
fn an_ipv6_port_that_another_had_on_another_device_before_is_protected() {
    on_another_device(&lab!(), false, 6, "[::]");
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
fn bound_by_root(lab: &Lab, when: &str) {
    let mut web = lab.puppet(&lab.beta, "server", 0, "web");
    let millis = clock::millis(4000).as_millis();
    let flapped = besieged(lab, PORT, || web.must(&format!("flap 0.0.0.0:{PORT} {millis} as {WEB}")));
    assert!(flapped["listens"].as_u64() > Some(50), "{flapped}");
    web.expect_no_stranger(when);
}

/// The same while an attacker listens for IPv6 only on the same port.
fn beside_an_ipv6_listener(lab: &Lab) {
    let mut attacker = lab.puppet(&lab.beta, "nobody", ATTACKER, "attacker");
    attacker.must(&format!("socket s 6; opt s v6only; bind s [::]:{PORT}; listen s"));
    bound_by_root(lab, "root binds, web listens, and somebody listens for IPv6 only");
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

#[test]
fn a_listener_for_ipv6_only_opens_nothing_for_ipv4() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    beside_an_ipv6_listener(&lab);
    expect_alive(&mesh);
}

#[test]
fn a_listener_for_ipv6_only_opens_nothing_for_ipv4_without_an_agent() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    mesh.beta().kill();
    beside_an_ipv6_listener(&lab);
}

#[test]
fn the_upstream_connection_reaches_only_those_who_were_found_to_listen() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    let attacker = lab.puppet(&lab.beta, "nobody", ATTACKER, "attacker");
    upstreams(&lab, &mesh, &mut web, attacker, "");
}

#[test]
fn whoever_shares_a_port_and_listens_now_and_then_hears_no_client() {
    let lab = lab!();
    let mesh = mesh!(lab, &with_web_in_its_cgroup(&lab));
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    let joiner = lab.puppet(&lab.beta, "elsewhere", WEB, "joiner");
    upstreams(&lab, &mesh, &mut web, joiner, " shared");
}

/// Ways to be bound to one port of beta: family, options, address.
fn ways(lab: &Lab) -> [(u8, &'static str, String); 8] {
    let (v4, v6) = (lab.beta.v4, lab.beta.v6);
    [
        (4, "", "0.0.0.0".to_owned()),
        (4, "", v4.to_string()),
        (6, "dual", "[::]".to_owned()),
        (6, "v6only", "[::]".to_owned()),
        (6, "dual", "[::ffff:0.0.0.0]".to_owned()),
        (6, "dual", format!("[::ffff:{v4}]")),
        (6, "v6only", format!("[{v6}]")),
        (6, "dual", format!("[{v6}]")),
    ]
}

/// Of several sockets that share a port the kernel chooses by rules of its own, which differ by family, address, device and age:
/// each pair is tried, from another one on each time.
#[test]
fn however_somebody_shares_a_port_they_hear_no_client() {
    let lab = lab!();
    let mesh = mesh!(lab, &with_web_in_its_cgroup(&lab));
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    let mut joiner = lab.puppet(&lab.beta, "elsewhere", WEB, "joiner");
    let mut user = lab.puppet(&lab.alpha, "one", USER, "user");
    let alone = format!("socket s 6; opt s reuseport; opt s reuseaddr; opt s dual; bind s [::]:{PORT}; listen s");
    web.must(&alone);
    lab.expect_served(&mesh, lab.beta.at(PORT));
    web.must("close s");
    let mut pairs = Vec::new();
    for own in ways(&lab) {
        for other in ways(&lab) {
            for device in ["", "device:lo"] {
                for order in ["listens before", "binds before", "listens after"] {
                    pairs.push((own.clone(), other.clone(), device, order));
                }
            }
        }
    }
    // On a slow machine some of them, others each time.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let first = usize::try_from(now.as_nanos() % pairs.len() as u128).unwrap_or(0);
    let (all, end) = (pairs.len(), Instant::now() + Duration::from_secs(30));
    let (mut both, mut before) = (0, String::new());
    for (tried, number) in (0..all).map(|step| (first + step * 131) % all).enumerate() {
        if Instant::now() >= end && tried >= 20 {
            break;
        }
        let ((own, how, own_ip), (other, other_how, other_ip), device, order) = &pairs[number];
        let opt = |name: &str, word: &str| match word {
            "" => String::new(),
            _ => format!("opt {name} {word}; "),
        };
        let own_options = if *own == 6 { opt("s", how) } else { String::new() };
        let other_options = if *other == 6 { opt("j", other_how) } else { String::new() } + &opt("j", device);
        let begin =
            format!("socket j {other}; opt j reuseport; opt j reuseaddr; {other_options}bind j {other_ip}:{PORT}");
        let joins = match *order {
            "listens before" => joiner.tell(&format!("{begin}; listen j"))["ok"] == true,
            "binds before" => joiner.tell(&begin)["ok"] == true,
            _ => true,
        };
        web.must(&format!(
            "socket s {own}; opt s reuseport; opt s reuseaddr; {own_options}bind s {own_ip}:{PORT}; listen s"
        ));
        let joins = match *order {
            "listens before" => joins,
            "binds before" => joins && joiner.tell("listen j")["ok"] == true,
            _ => joiner.tell(&format!("{begin}; listen j"))["ok"] == true,
        };
        both += usize::from(joins);
        for to in [lab.beta.at(PORT), lab.beta.at6(PORT)] {
            let (millis, marker) = (clock::millis(100).as_millis(), lab.marker());
            let family = if to.is_ipv4() { 4 } else { 6 };
            let _ = user.tell(&format!(
                "patience {millis}; socket u {family}; connect u {to}; write u {marker}; read u; close u"
            ));
        }
        let what = format!("pair {number}: web {how} {own_ip}, the other {other_how} {other_ip} {device} {order}");
        // What was heard of the pair before may be said late.
        joiner.expect_unheard(lab.marker(), &format!("{what}; before: {before}"));
        before = what;
        web.must("close s");
        joiner.tell("close j");
    }
    assert!(both > 0, "nobody ever shared the port");
    web.must(&alone);
    lab.expect_served(&mesh, lab.beta.at(PORT));
    expect_alive(&mesh);
}

/// Web and somebody else come and go on one port, while clients of web say something. When the other one is gone, web is
/// served.
fn upstreams(lab: &Lab, mesh: &Mesh<'_>, web: &mut Hand, mut attacker: Hand, how: &str) {
    let mut users: Vec<Hand> =
        (0..2).map(|index| lab.puppet(&lab.alpha, "one", USER, &format!("user-{index}"))).collect();
    let (millis, patience) = (clock::millis(6000).as_millis(), clock::millis(30).as_millis());
    let flap = |hand: &mut Hand| {
        let end = Instant::now() + clock::millis(6000);
        // The port is the other's now and then.
        while Instant::now() < end {
            hand.tell(&format!("flap 0.0.0.0:{PORT} {}{how}", millis / 20));
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| flap(web));
        scope.spawn(|| flap(&mut attacker));
        let end = Instant::now() + clock::millis(6000);
        for user in &mut users {
            scope.spawn(move || {
                for number in 0_u32.. {
                    if Instant::now() >= end {
                        break;
                    }
                    let (to, marker) = (lab.beta.at(PORT), lab.marker());
                    user.tell(&format!(
                        "patience {patience}; socket u 4; connect u {to}; write u {marker}-{number}; close u"
                    ));
                }
            });
        }
    });
    attacker.expect_unheard(lab.marker(), "what was meant for web");
    attacker.end();
    web.must(&format!("socket s 4; opt s reuseaddr; bind s 0.0.0.0:{PORT}; listen s"));
    lab.expect_served(mesh, lab.beta.at(PORT));
    expect_alive(mesh);
}

#[test]
fn a_socket_that_is_bound_for_ipv6_only_closes_no_ipv4_port() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let at = format!("0.0.0.0:{}", PORT + 9);
    let mut other = lab.puppet(&lab.beta, "nobody", ATTACKER, "other");
    other.must(&format!("socket o 4; bind o {at}; listen o"));
    settle();
    let mut user = lab.puppet(&lab.beta, "one", USER, "user");
    user.must(&format!("socket s 6; opt s v6only; bind s [::]:{}", PORT + 9));
    for from in [&lab.stranger, &lab.beta] {
        assert!(from.within(|| knock(lab.beta.at(PORT + 9))).connected, "what is nobody's is left alone");
    }
    expect_alive(&mesh);
}
