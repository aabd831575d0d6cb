//! Who binds is not who holds: what is protected is both.

use crate::listeners::{policy, settle, web, with_web, with_web_in_its_cgroup};
use lab::hand::{ATTACKER, Hand, USER, WEB, expect_alive, knock};
use lab::janitor::processes;
use lab::policy::PORT;
use lab::{Lab, Settings, clock, enter, lab, or_skip, skip};
use rustix::process::Signal;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Web has the socket of somebody else: no stranger is heard any more, with an agent and without.
fn expect_protected(lab: &Lab, mesh: &lab::Mesh<'_>, web: &Hand, port: u16) {
    lab.assail(port, 2);
    web.expect_no_stranger("at once");
    settle();
    lab.assail(port, 2);
    web.expect_no_stranger("a moment later");
    mesh.beta().kill();
    lab.assail(port, 1);
    web.expect_no_stranger("without an agent");
    mesh.beta().start().unwrap();
    lab.assail(port, 1);
    web.expect_no_stranger("with the next agent");
    lab.expect_served(mesh, lab.beta.at(port));
    lab.assail(port, 1);
    web.expect_no_stranger("at last");
    expect_alive(mesh);
}

#[test]
fn who_binds_as_root_and_listens_as_a_workload_is_protected() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let mut web = lab.puppet(&lab.beta, "one", 0, "web");
    web.must(&format!("socket s 4; opt s reuseaddr; bind s 0.0.0.0:{PORT}; setuid {WEB}; listen s"));
    expect_protected(&lab, &mesh, &web, PORT);
}

#[test]
fn who_binds_and_listens_as_root_and_then_is_a_workload_is_protected() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let mut web = lab.puppet(&lab.beta, "one", 0, "web");
    // As servers do that answer nobody before they have given up what they may.
    web.must("serve off");
    web.must(&format!("socket s 6; opt s dual; bind s [::]:{PORT}; listen s; setuid {WEB}; name s"));
    web.must("sleep 10; serve on");
    std::thread::sleep(clock::millis(2500));
    expect_protected(&lab, &mesh, &web, PORT);
}

#[test]
fn a_workload_that_forks_from_root_and_inherits_a_bound_socket_is_protected() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let mut manager = lab.puppet(&lab.beta, "one", 0, "manager");
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    // A manager that binds, and a workload that listens.
    manager.must(&format!("socket s 4; opt s reuseaddr; bind s 0.0.0.0:{PORT}; give s web; close s"));
    web.must("take s; listen s");
    expect_protected(&lab, &mesh, &web, PORT);
}

#[test]
fn a_socket_that_a_manager_listens_on_and_hands_to_a_workload_is_protected() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT, PORT + 1]));
    let mut manager = lab.puppet(&lab.beta, "one", 0, "manager");
    manager.must("serve off");
    manager.must(&format!(
        "socket s 4; bind s 0.0.0.0:{PORT}; listen s; socket t 4; bind t 0.0.0.0:{}; listen t",
        PORT + 1
    ));
    settle();
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    // Who asks for the name of the socket is seen at once.
    manager.must("give s web");
    web.must("take s; name s");
    lab.assail(PORT, 2);
    web.expect_no_stranger("after it asked for the name");
    // Who does not is seen within a moment.
    manager.must("give t web");
    web.must("serve off");
    web.must("take t");
    std::thread::sleep(clock::millis(2500));
    web.must("serve on");
    lab.assail(PORT + 1, 2);
    web.expect_no_stranger("a moment after it took the socket");
    expect_protected(&lab, &mesh, &web, PORT);
    lab.expect_served(&mesh, lab.beta.at(PORT + 1));
}

#[test]
fn a_multipath_listener_whose_name_a_workload_asks_for_is_protected() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let mut manager = lab.puppet(&lab.beta, "one", 0, "manager");
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    for number in 0..8 {
        let port = 9000 + number;
        manager.must(&format!("serve off; socket s 4 mptcp; bind s 0.0.0.0:{port}; listen s"));
        settle();
        manager.must("give s web; close s");
        web.must(&format!("take s{number}; name s{number}"));
        lab.stranger.within(|| knock(lab.beta.at(port)));
    }
    web.expect_no_stranger("after it asked for the name");
    expect_alive(&mesh);
}

#[test]
fn a_multipath_listener_from_before_that_is_closed_leaves_its_port_to_others() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    mesh.beta().terminate().unwrap();
    mesh.beta().command(&["release"]).unwrap().good();
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    web.must("socket s 4 mptcp; opt s reuseaddr; bind s 0.0.0.0:9000; listen s");
    mesh.beta().start().unwrap();
    lab.assail(9000, 1);
    web.expect_no_stranger("by multipath TCP, from before the agent");
    web.must("close s");
    let mut other = lab.puppet(&lab.beta, "nobody", ATTACKER, "other");
    other.must("socket o 4; opt o reuseaddr; bind o 0.0.0.0:9000; listen o");
    let reached = || lab.stranger.within(|| knock(lab.beta.at(9000))).connected.then_some(());
    assert!(clock::until(clock::seconds(20), reached).is_some(), "{:#}", mesh.beta().status()["listeners"]);
    expect_alive(&mesh);
}

#[test]
fn what_a_workload_bound_is_its_own_when_whoever_is_left_with_it_listens_again() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    let mut heir = lab.puppet(&lab.beta, "nobody", ATTACKER, "heir");
    web.must(&format!("socket s 4; bind s 0.0.0.0:{PORT}; listen s; give s heir"));
    heir.must("take s");
    web.end();
    settle();
    heir.must("shutdown s rd; listen s");
    lab.assail(PORT, 2);
    heir.expect_no_stranger("at once");
    settle();
    lab.assail(PORT, 2);
    heir.expect_no_stranger("a moment later");
    expect_alive(&mesh);
}

/// Web is known by its cgroup, and comes into it late.
fn moved(lab: &Lab, listen_first: bool) {
    let mesh = mesh!(lab, &with_web_in_its_cgroup(lab));
    let mut web = lab.puppet(&lab.beta, "elsewhere", WEB, "web");
    web.must(&format!("serve off; socket s 4; opt s reuseaddr; bind s 0.0.0.0:{PORT}"));
    settle();
    if listen_first {
        web.must("listen s");
        settle();
    }
    lab.move_to("server", web.pid());
    if listen_first {
        std::thread::sleep(clock::millis(2500));
    } else {
        web.must("listen s");
    }
    web.must("serve on");
    expect_protected(lab, &mesh, &web, PORT);
}

#[test]
fn who_binds_and_then_moves_into_the_cgroup_of_a_workload_is_protected() {
    moved(&lab!(), false);
}

#[test]
fn who_listens_and_then_moves_into_the_cgroup_of_a_workload_is_protected() {
    moved(&lab!(), true);
}

/// A copy of the program where every user may run it.
fn copied(lab: &Lab, name: &str) -> PathBuf {
    let path = lab.directory().join(name);
    std::fs::copy(skip::lab_app().unwrap(), &path).unwrap();
    path
}

/// Puts another file in the place of the program, by rename as package managers do.
fn replace(lab: &Lab, path: &Path) {
    std::fs::rename(copied(lab, "new"), path).unwrap();
}

/// Status says within a moment why web is refused, by one of these words.
fn expect_status(mesh: &lab::Mesh<'_>, words: &[&str]) {
    let says = || {
        let status = mesh.beta().status().to_string();
        words.iter().any(|word| status.contains(word)).then_some(())
    };
    let told = clock::until(clock::seconds(4), says);
    assert!(told.is_some(), "status does not say why ({words:?}): {:#}", mesh.beta().status());
}

#[test]
fn a_workload_whose_file_was_replaced_stays_protected_and_status_says_why() {
    let lab = lab!();
    let program = copied(&lab, "web-program");
    let (uid, path) = (format!("unix:uid:{WEB}"), format!("unix:path:{}", program.display()));
    let mesh = mesh!(lab, &with_web(&lab, &[&uid, &path], &[PORT]));
    let place = || lab::enter::Place { user: Some((WEB, WEB)), ..lab.place(&lab.beta, "server") };
    let mut web = Hand::start(&lab, place(), &program, "web");
    web.must(&format!("socket s 4; bind s 0.0.0.0:{PORT}; listen s"));
    lab.expect_served(&mesh, lab.beta.at(PORT));
    replace(&lab, &program);
    lab.assail(PORT, 1);
    web.expect_no_stranger("after its file was replaced");
    mesh.beta().terminate().unwrap();
    mesh.beta().start().unwrap();
    lab.assail(PORT, 2);
    web.expect_no_stranger("after its file was replaced and the agent restarted");
    // Another socket of the same process.
    web.must("socket t 4; bind t 0.0.0.0:8098; listen t");
    lab.assail(8098, 2);
    web.expect_no_stranger("on another port");
    settle();
    lab.assail(8098, 2);
    web.expect_no_stranger("on another port, a moment later");
    expect_status(&mesh, &["deleted", "replaced"]);
    lab.expect_served_or_told(&mesh, lab.beta.at(PORT));
    expect_alive(&mesh);
}

#[test]
fn a_program_that_only_the_kernel_takes_for_a_workload_refuses_and_status_says_why() {
    let lab = lab!();
    let program = copied(&lab, "web-program");
    let (uid, path) = (format!("unix:uid:{WEB}"), format!("unix:path:{}", program.display()));
    let mesh = mesh!(lab, &with_web(&lab, &[&uid, &path], &[PORT]));
    // The right user runs another file.
    let other = web(&lab, "server", "other", "", &format!("0.0.0.0:{PORT}"));
    lab.assail(PORT, 2);
    other.expect_no_stranger("at once");
    settle();
    lab.assail(PORT, 2);
    other.expect_no_stranger("a moment later");
    expect_status(&mesh, &["unix:path"]);
    expect_alive(&mesh);
}

#[test]
fn an_enrolled_listener_that_an_attacker_is_handed_stays_protected() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let mut web = web(&lab, "server", "web", "", &format!("0.0.0.0:{PORT}"));
    let mut attacker = lab.puppet(&lab.beta, "nobody", ATTACKER, "attacker");
    web.must("give s attacker");
    attacker.must("take s; name s");
    settle();
    lab.assail(PORT, 6);
    web.expect_no_stranger("while another holds the socket as well");
    attacker.end();
    lab.assail(PORT, 2);
    web.expect_no_stranger("after the other is gone");
    lab.expect_served(&mesh, lab.beta.at(PORT));
    expect_alive(&mesh);
}

#[test]
fn a_name_that_is_asked_for_while_a_socket_is_looked_at_counts() {
    let lab = lab!();
    let ports: Vec<u16> = (9000..9030).collect();
    let mesh = mesh!(lab, &policy(&lab, &ports));
    let mut manager = lab.puppet(&lab.beta, "one", 0, "manager");
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    manager.must("serve off");
    for (index, port) in ports.iter().enumerate() {
        manager.must(&format!("socket s{index} 4; bind s{index} 0.0.0.0:{port}; listen s{index}"));
        // While the agent looks who has it.
        std::thread::sleep(Duration::from_millis(1 + index as u64 % 8));
        manager.must(&format!("give s{index} web; close s{index}"));
        web.must(&format!("take s{index}; name s{index}"));
        let end = Instant::now() + clock::millis(150);
        while Instant::now() < end {
            lab.stranger.within(|| knock(lab.beta.at(*port)));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    web.expect_no_stranger("after it asked for the name");
    expect_alive(&mesh);
}

#[test]
fn while_an_agent_drains_listening_sockets_are_judged() {
    let lab = lab!();
    let patient = Settings { tables: "[timeouts]\ndrain = \"10m\"\n".to_owned(), ..Settings::default() };
    let mesh = mesh!(lab, &policy(&lab, &[PORT, PORT + 1]), &patient);
    let _web = web(&lab, "server", "web", "", &format!("0.0.0.0:{PORT}"));
    let mut manager = lab.puppet(&lab.beta, "one", 0, "manager");
    manager.must(&format!("serve off; socket t 4; bind t 0.0.0.0:{}; listen t", PORT + 1));
    let mut user = lab.puppet(&lab.alpha, "one", USER, "user");
    user.must(&format!("socket s 4; connect s {}; write s hello; read s", lab.beta.at(PORT)));
    settle();
    mesh.beta().signal(Signal::TERM);
    settle();
    let mut second = lab.puppet(&lab.beta, "server", WEB, "second");
    manager.must("give t second; close t");
    second.must("take t");
    let mut other = lab.puppet(&lab.beta, "one", 0, "other");
    other.must("socket o 4; bind o 0.0.0.0:8099; listen o");
    std::thread::sleep(clock::seconds(4));
    assert!(mesh.beta().runs(), "a connection is open, and there is time to drain");
    let before = second.strangers().len();
    lab.assail(PORT + 1, 2);
    assert_eq!(second.strangers().len(), before, "handed on four seconds ago");
    assert!(lab.stranger.within(|| knock(lab.beta.at(8099))).connected, "what is nobody's is left alone");
}

#[test]
fn what_nobody_holds_by_the_thousand_delays_nothing() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let place =
        enter::Place { user: Some((ATTACKER, ATTACKER)), files: Some(20_000), ..lab.place(&lab.beta, "nobody") };
    let mut holder = Hand::start(&lab, place, &or_skip!(skip::lab_app()), "holder");
    holder.try_tell(&format!("hold {} 0", clock::count(15_000)), clock::seconds(240)).unwrap();
    for _ in 0..100 {
        holder.must("fork 60000");
    }
    let began = Instant::now();
    let mut other = lab.puppet(&lab.beta, "one", 0, "other");
    other.must("socket o 4; bind o 0.0.0.0:8099; listen o");
    let reached = || lab.stranger.within(|| knock(lab.beta.at(8099))).connected.then_some(());
    assert!(clock::until(clock::seconds(20), reached).is_some(), "what is nobody's is left alone");
    assert!(began.elapsed() < clock::seconds(2), "after {:?}", began.elapsed());
    for pid in processes(&lab.cgroup("nobody")) {
        let _: Result<(), _> = rustix::process::kill_process(pid, Signal::KILL);
    }
    expect_alive(&mesh);
}

/// The workload that listens on this port from before the agent is protected, and served where its name can be told.
fn expect_found(lab: &Lab, web: &Hand, port: u16) {
    settle();
    lab.assail(port, 2);
    web.expect_no_stranger("at once");
    std::thread::sleep(clock::millis(2500));
    lab.assail(port, 2);
    web.expect_no_stranger("a moment later");
}

#[test]
fn a_workload_from_before_with_a_name_that_is_no_text_is_protected() {
    let lab = lab!();
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    let mut other = lab.puppet(&lab.beta, "server", WEB, "other");
    // `web-` and a byte that is no text; a name of 16 bytes, which the kernel cuts within its last letter.
    web.must(&format!("call 7765622dff; socket s 4; bind s 0.0.0.0:{PORT}; listen s"));
    let port = PORT + 1;
    other.must(&format!("call 6161616161616161616161616161c3bc; socket s 4; bind s 0.0.0.0:{port}; listen s"));
    let mesh = mesh!(lab, &policy(&lab, &[PORT, port]));
    for (web, port) in [(&web, PORT), (&other, port)] {
        expect_found(&lab, web, port);
        lab.expect_served(&mesh, lab.beta.at(port));
    }
    expect_alive(&mesh);
}

#[test]
fn a_workload_from_before_in_a_cgroup_with_a_name_that_is_no_text_is_refused() {
    let lab = lab!();
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    let directory = lab.cgroup("server").join(OsStr::from_bytes(b"\xffx"));
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("cgroup.procs"), web.pid().to_string()).unwrap();
    web.must(&format!("socket s 4; bind s 0.0.0.0:{PORT}; listen s"));
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    expect_found(&lab, &web, PORT);
    expect_status(&mesh, &["a name that is no text"]);
    expect_alive(&mesh);
    web.end();
    let gone = clock::until(clock::seconds(5), || std::fs::remove_dir(&directory).ok());
    assert!(gone.is_some(), "{} is in use", directory.display());
}

/// Web listens before the agent starts, and is moved out of sight by this.
fn hidden(lab: &Lab, how: &str) {
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    web.must(&format!("socket s 4; bind s 0.0.0.0:{PORT}; listen s; {how}"));
    let mesh = mesh!(lab, &policy(lab, &[PORT, PORT + 1]));
    expect_found(lab, &web, PORT);
    lab.expect_served(&mesh, lab.beta.at(PORT));
    // And a socket that it is handed.
    let mut manager = lab.puppet(&lab.beta, "one", 0, "manager");
    let mut second = lab.puppet(&lab.beta, "server", WEB, "second");
    let port = PORT + 1;
    manager.must(&format!("serve off; socket t 4; bind t 0.0.0.0:{port}; listen t"));
    settle();
    manager.must("give t second; close t");
    second.must(&format!("take s; {how}"));
    std::thread::sleep(clock::millis(2500));
    lab.assail(port, 2);
    second.expect_no_stranger("a moment after it was handed the socket");
    expect_alive(&mesh);
}

#[test]
fn a_thread_with_descriptors_of_its_own_is_a_holder() {
    hidden(&lab!(), "thread s own");
}

#[test]
fn a_workload_whose_first_thread_has_ended_is_a_holder() {
    hidden(&lab!(), "thread s same; leave");
}

#[test]
fn a_thread_that_is_another_user_than_its_process_is_a_holder() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let mut manager = lab.puppet(&lab.beta, "one", 0, "manager");
    manager.must(&format!("serve off; socket s 4; bind s 0.0.0.0:{PORT}; listen s"));
    settle();
    manager.must(&format!("thread s same {WEB}"));
    std::thread::sleep(clock::millis(2500));
    expect_protected(&lab, &mesh, &manager, PORT);
}

#[test]
fn a_socket_of_which_nobody_can_be_found_is_refused_and_status_says_why() {
    let lab = lab!();
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    let mut second = lab.puppet(&lab.beta, "server", WEB, "second");
    // On its way in a message while the agent starts.
    web.must(&format!("socket s 4; bind s 0.0.0.0:{PORT}; listen s; give s second; close s"));
    web.end();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    settle();
    lab.assail(PORT, 2);
    expect_status(&mesh, &["no process can be found"]);
    second.must("take s");
    expect_found(&lab, &second, PORT);
    lab.expect_served(&mesh, lab.beta.at(PORT));
    expect_alive(&mesh);
}

#[test]
fn a_socket_of_which_nobody_was_found_is_left_alone_once_nobodys_server_has_it() {
    let lab = lab!();
    let mut first = lab.puppet(&lab.beta, "one", ATTACKER, "first");
    let mut second = lab.puppet(&lab.beta, "one", ATTACKER, "second");
    first.must("socket s 4; bind s 0.0.0.0:8099; listen s; give s second; close s");
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    expect_status(&mesh, &["no process can be found"]);
    second.must("take s");
    expect_reached(&lab, 8099, clock::seconds(5), "a moment after somebody has it");
}

/// A stranger is heard at this port within this time.
fn expect_reached(lab: &Lab, port: u16, within: Duration, when: &str) {
    let reached = || (!lab.stranger.within(|| knock(lab.beta.at(port))).answer.is_empty()).then_some(());
    assert!(clock::until(within, reached).is_some(), "{when}: what is nobody's is left alone");
}

#[test]
fn nobodys_server_stays_reachable_when_the_cgroup_it_listened_in_is_gone() {
    let lab = lab!();
    let (scope, other) = (lab.cgroup("scope"), lab.cgroup("other"));
    let mut server = lab.puppet(&lab.beta, "scope", ATTACKER, "server");
    server.must("socket s 4; bind s 0.0.0.0:8099; listen s");
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    expect_reached(&lab, 8099, clock::seconds(5), "at first");
    // One that came later, and was not bound by hand.
    server.must("socket t 4; listen t");
    let port = |answer: serde_json::Value| {
        let local = answer["local"].as_str().and_then(|local| local.rsplit_once(':'));
        local.and_then(|(_, port)| port.parse().ok()).unwrap()
    };
    let unbound: u16 = port(server.must("name t"));
    expect_reached(&lab, unbound, clock::seconds(5), "without a bind");
    std::fs::write(other.join("cgroup.procs"), server.pid().to_string()).unwrap();
    let gone = clock::until(clock::seconds(5), || std::fs::remove_dir(&scope).ok());
    assert!(gone.is_some(), "{} is in use", scope.display());
    mesh.beta().read_again().unwrap();
    settle();
    for port in [8099, unbound] {
        expect_reached(&lab, port, clock::seconds(5), "after a reload");
    }
    mesh.beta().terminate().unwrap();
    mesh.beta().start().unwrap();
    std::thread::sleep(clock::millis(2500));
    for port in [8099, unbound] {
        expect_reached(&lab, port, clock::seconds(5), "after a restart");
    }
    expect_alive(&mesh);
}

#[test]
fn a_workload_whose_cgroup_is_gone_stays_protected() {
    let lab = lab!();
    let selectors = [format!("unix:uid:{WEB}"), format!("cgroup:{}/scope", lab.cgroup_path())];
    let mut web = lab.puppet(&lab.beta, "scope", WEB, "web");
    web.must(&format!("socket s 4; bind s 0.0.0.0:{PORT}; listen s"));
    let mesh = mesh!(lab, &with_web(&lab, &[&selectors[0], &selectors[1]], &[PORT]));
    lab.expect_served(&mesh, lab.beta.at(PORT));
    lab.move_to("other", web.pid());
    let scope = lab.cgroup("scope");
    let gone = clock::until(clock::seconds(5), || std::fs::remove_dir(&scope).ok());
    assert!(gone.is_some(), "{} is in use", scope.display());
    lab.assail(PORT, 1);
    mesh.beta().terminate().unwrap();
    mesh.beta().start().unwrap();
    expect_found(&lab, &web, PORT);
    expect_alive(&mesh);
}

#[test]
fn an_enrolled_user_with_very_many_files_delays_findings_and_stops_none() {
    /// A user whom no other test enrols: the descriptors are seen by every agent of the machine.
    const HOLDER: u32 = 2077;
    let lab = lab!();
    let enrolled = policy(&lab, &[PORT]).workload_by("holder", &[&format!("unix:uid:{HOLDER}")]);
    let mesh = mesh!(lab, &enrolled);
    let mut manager = lab.puppet(&lab.beta, "one", 0, "manager");
    manager.must(&format!("serve off; socket t 4; bind t 0.0.0.0:{PORT}; listen t"));
    settle();
    let place = enter::Place { user: Some((HOLDER, HOLDER)), files: Some(20_000), ..lab.place(&lab.beta, "holder") };
    let mut holder = Hand::start(&lab, place, &or_skip!(skip::lab_app()), "holder");
    holder.must("files 19000");
    for _ in 0..50 {
        holder.must("fork 60000");
    }
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    manager.must("give t web; close t");
    web.must("take t");
    let began = Instant::now();
    let mut other = lab.puppet(&lab.beta, "one", 0, "other");
    other.must("socket o 4; bind o 0.0.0.0:8099; listen o");
    // While all of them are looked at.
    let protected = || {
        let status = mesh.beta().status();
        let all = status["listeners"].as_array().cloned().unwrap_or_default();
        all.iter().any(|one| one["id"].as_str().is_some_and(|id| id.ends_with("/server"))).then(|| began.elapsed())
    };
    let protected = clock::until(clock::seconds(60), protected);
    assert!(protected.is_some(), "a socket that web was handed is not seen");
    expect_reached(&lab, 8099, clock::seconds(60), "when all were looked at");
    println!("a workload's is found after {protected:?}, and nobody's is left alone after {:?}", began.elapsed());
    lab.assail(PORT, 2);
    web.expect_no_stranger("a moment after it took the socket");
    for pid in processes(&lab.cgroup("holder")) {
        let _: Result<(), _> = rustix::process::kill_process(pid, Signal::KILL);
    }
    expect_alive(&mesh);
}

#[test]
fn findings_about_sockets_by_the_hundred_are_a_few_lines() {
    let lab = lab!();
    let uid = format!("unix:uid:{WEB}");
    let mesh = mesh!(lab, &with_web(&lab, &[&uid, "unix:path:/usr/bin/no-such-program"], &[PORT]));
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    web.must("hold 300 0");
    let refused = || mesh.beta().status()["listeners"].as_array().is_some_and(|all| all.len() >= 300).then_some(());
    assert!(clock::until(clock::seconds(20), refused).is_some(), "status names each");
    let counted = || mesh.beta().log().contains("more listening sockets are refused").then_some(());
    assert!(clock::until(clock::seconds(30), counted).is_some(), "{}", mesh.beta().log());
    let lines = mesh.beta().log().lines().filter(|line| line.contains("listening socket")).count();
    assert!(lines < 30, "{lines} lines about 300 sockets");
    expect_alive(&mesh);
}
