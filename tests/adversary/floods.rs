//! Full tables, full logs and full counters.

use crate::listeners::{policy, web};
use lab::agent::attempts as attempts_of;
use lab::hand::{ATTACKER, USER, WEB, expect_alive};
use lab::janitor::{Item, keep};
use lab::policy::PORT;
use lab::world::events;
use lab::{Hand, Lab, Mesh, Settings, clock, enter, lab, or_skip, skip};
use rustix::mount::{MountFlags, mount};
use socket2::{Domain, Socket, Type};
use std::collections::VecDeque;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// An attacker leaves more sockets behind than any table of the agent has rows.
fn littered(lab: &Lab, how: &str, number: u32) {
    let mesh = mesh!(lab, &policy(lab, &[PORT]));
    let mut attacker = lab.puppet(&lab.beta, "nobody", ATTACKER, "attacker");
    let left = attacker.try_tell(&format!("litter {number} {how}"), clock::seconds(120)).unwrap();
    assert_eq!(left["ok"], true, "{left}");
    let web = web(lab, "server", "web", "opt s dual; ", &format!("[::]:{PORT}"));
    lab.assail(PORT, 2);
    web.expect_no_stranger("after tables were filled");
    expect_alive(&mesh);
    lab.expect_served(&mesh, lab.beta.at(PORT));
    mesh.beta().read_again().unwrap();
    expect_alive(&mesh);
    mesh.beta().kill();
    lab.assail(PORT, 1);
    web.expect_no_stranger("without an agent");
    mesh.beta().start().unwrap();
    lab.assail(PORT, 1);
    web.expect_no_stranger("after a restart");
    lab.expect_served(&mesh, lab.beta.at(PORT));
    expect_alive(&mesh);
}

#[test]
fn listeners_that_were_shut_down_by_the_ten_thousand_open_nothing_and_end_nobody() {
    littered(&lab!(), "shutdown", 66_000);
}

#[test]
fn multipath_listeners_that_were_closed_by_the_ten_thousand_open_nothing_and_end_nobody() {
    littered(&lab!(), "mptcp", 66_000);
}

#[test]
fn multipath_sockets_that_never_listened_take_no_room_that_others_need() {
    littered(&lab!(), "mptcp-bound", 140_000);
}

#[test]
fn listeners_that_are_held_by_the_thousand_open_nothing_and_end_nobody() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    // All at once, each on an address of its own, and all of them alive.
    let _attackers = many(&lab, &lab.beta, ATTACKER, 66_000, |count, base| format!("hold {count} {base}"));
    let web = web(&lab, "server", "web", "opt s dual; ", &format!("[::]:{PORT}"));
    lab.assail(PORT, 2);
    web.expect_no_stranger("after tables were filled");
    expect_alive(&mesh);
    mesh.beta().reload(&policy(&lab, &[PORT]));
    lab.assail(PORT, 1);
    web.expect_no_stranger("after a reload");
    lab.expect_served(&mesh, lab.beta.at(PORT));
    mesh.beta().kill();
    mesh.beta().start().unwrap();
    lab.assail(PORT, 1);
    web.expect_no_stranger("after a restart");
    lab.expect_served(&mesh, lab.beta.at(PORT));
    expect_alive(&mesh);
}

/// As many puppets of a user as it takes to hold so many sockets, which they make by this command.
fn many(lab: &Lab, host: &lab::Host, uid: u32, number: u64, command: impl Fn(u64, u64) -> String) -> Vec<Hand> {
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(20_000).min(20_000);
    let share = most - 200;
    let start = |index: u64| {
        let place = enter::Place { user: Some((uid, uid)), files: Some(most), ..lab.place(host, "nobody") };
        let mut hand = Hand::start(lab, place, &skip::lab_app().unwrap(), &format!("holder-{index}"));
        let base = index * share;
        let held = hand.try_tell(&command(share.min(number - base), base), clock::seconds(240)).unwrap();
        assert_eq!(held["ok"], true, "{held}");
        hand
    };
    (0..number.div_ceil(share)).map(start).collect()
}

/// What an attacker does in a loop is a few lines with a count.
fn refused_in_a_loop(lab: &Lab, mesh: &Mesh<'_>, log: &std::path::Path) {
    let _web = web(lab, "server", "web", "", &format!("0.0.0.0:{PORT}"));
    let mut attacker = lab.puppet(&lab.alpha, "nobody", ATTACKER, "attacker");
    let millis = clock::millis(5000).as_millis().min(20_000);
    let dials = attacker.must(&format!("dials {} {millis}", lab.beta.at(PORT)));
    let attempts = dials["attempts"].as_u64().unwrap();
    assert!(attempts > 1000, "{dials}");
    assert_eq!(dials["ends"].as_object().unwrap().len(), 1, "{dials}");
    assert!(dials["ends"]["EPERM"].is_u64(), "{dials}");
    // A legitimate workload meanwhile and afterwards.
    lab.expect_served(mesh, lab.beta.at(PORT));
    let size = std::fs::metadata(log).unwrap().len();
    assert!(size < 1 << 20, "{attempts} refusals of one kind made {size} bytes of log");
    // Each of them is counted somewhere.
    let counted = || -> u64 {
        let lines = mesh.alpha().audit();
        attempts_of(lines.iter().filter(|line| line["process"]["uid"] == ATTACKER))
    };
    let all = clock::until(clock::seconds(20), || (counted() >= attempts).then_some(()));
    assert!(all.is_some(), "{attempts} attempts, of which the log counts {}", counted());
    expect_alive(mesh);
}

#[test]
fn a_loop_of_refused_connects_is_a_few_lines_with_a_count() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    refused_in_a_loop(&lab, &mesh, &mesh.alpha().directory().join("audit.jsonl"));
}

#[test]
fn a_loop_of_refused_connects_fills_no_small_disk() {
    let lab = lab!();
    let disk = lab.directory().join("small");
    std::fs::create_dir(&disk).unwrap();
    let _mounted = keep(Item::Mount(disk.clone()));
    mount("tmpfs", &disk, "tmpfs", MountFlags::empty(), Some(c"size=4m")).unwrap();
    // Each host's agent has a log of its own: the one that matters is on the small disk.
    let settings = Settings { audit_lines: "when_full = \"refuse\"".to_owned(), ..Settings::default() };
    let small = Settings { audit: Some(disk.join("audit.jsonl")), ..settings.clone() };
    let mesh = or_skip!(mesh_of(&lab, &small, &settings));
    refused_in_a_loop(&lab, &mesh, &disk.join("audit.jsonl"));
}

fn mesh_of<'a>(lab: &'a Lab, alpha: &Settings, beta: &Settings) -> Result<Mesh<'a>, lab::Skip> {
    if skip::plain() {
        return Err(lab::Skip::because("LAB_PLAIN=1 leaves the agent out, and this test is about the agent"));
    }
    Mesh::start_with(lab, &policy(lab, &[PORT]), alpha, beta)
}

#[test]
fn one_users_sockets_take_no_room_that_others_need() {
    hoarded(&lab!(), ATTACKER, 140_000);
}

#[test]
fn one_workloads_sockets_take_no_room_that_others_need() {
    hoarded(&lab!(), USER, 140_000);
}

/// A user holds more sockets than any table has rows, each bound, and dialled with in vain.
fn hoarded(lab: &Lab, uid: u32, number: u64) {
    let mesh = mesh!(lab, &policy(lab, &[PORT]));
    let to = lab.beta.at(PORT);
    let _hoarders = many(lab, &lab.alpha, uid, number, |count, _| format!("hoard {count} {to}"));
    let web = web(lab, "server", "web", "", &format!("0.0.0.0:{PORT}"));
    lab.expect_served(&mesh, lab.beta.at(PORT));
    lab.assail(PORT, 1);
    web.expect_no_stranger("while somebody holds many sockets");
    expect_alive(&mesh);
    // And on the host of the hoarder a new listener is protected.
    let mut near = lab.puppet(&lab.alpha, "one", WEB, "near");
    near.must("socket s 4; bind s 0.0.0.0:8097; listen s");
    lab.stranger.within(|| lab::hand::knock(lab.alpha.at(8097)));
    near.expect_no_stranger("on the host of the hoarder");
    expect_alive(&mesh);
}

#[test]
fn silent_connections_take_no_place_that_others_need() {
    let lab = lab!();
    let settings = Settings { tables: "[limits]\nconnections = 300\n".to_owned(), ..Settings::default() };
    // Alpha is a destination as well.
    let policy = policy(&lab, &[PORT]).destination(lab.alpha.at(PORT), "server");
    let mesh = mesh!(lab, &policy, &settings);
    let _web = web(&lab, "server", "web", "", &format!("0.0.0.0:{PORT}"));
    let mut far = lab.puppet(&lab.alpha, "one", WEB, "far");
    far.must(&format!("socket s 4; bind s 0.0.0.0:{PORT}; listen s"));
    let silent: Vec<TcpStream> = lab.stranger.within(|| {
        let call = |_| TcpStream::connect_timeout(&lab.beta.at(PORT), clock::seconds(2)).ok();
        (0..320).filter_map(call).collect()
    });
    assert!(silent.len() > 200, "only {} connected", silent.len());
    // Others are let in, and workloads of this host dial out.
    lab.expect_served(&mesh, lab.beta.at(PORT));
    let out = clock::until(clock::seconds(10), || {
        let say = format!("send:{}\\n", lab.marker());
        let said = lab.talk(&lab.beta, "client", lab.alpha.at(PORT), &[], &[&say, "line"]).outcome();
        let line = events(&said.stdout).into_iter().find(|event| event["step"] == "line");
        line.filter(|line| line["text"] == lab.marker())
    });
    assert!(out.is_some(), "a workload cannot dial out while strangers say nothing");
    drop(silent);
    expect_alive(&mesh);
}

/// Connections from one address of the loopback network after the other, as any user of the host can make them. Each is kept
/// until there are more than this.
fn from_everywhere_here(to: SocketAddr, kept: usize, over: impl Fn() -> bool, with: impl Fn(&mut TcpStream)) -> u64 {
    let (mut held, mut made) = (VecDeque::new(), 0_u64);
    while !over() {
        let [.., high, low] = u32::try_from(made % 60_000).unwrap().to_be_bytes();
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, high.max(1), low, 1], 0)).into()).unwrap();
        if socket.connect_timeout(&to.into(), clock::seconds(2)).is_err() {
            continue;
        }
        let mut stream = TcpStream::from(socket);
        with(&mut stream);
        made += 1;
        held.push_back(stream);
        if held.len() > kept {
            held.pop_front();
        }
    }
    made
}

#[test]
fn silent_connections_from_all_of_loopback_leave_room_for_other_hosts() {
    let lab = lab!();
    let places = Settings { tables: "[limits]\nconnections = 300\n".to_owned(), ..Settings::default() };
    // Each call needs a place of its own.
    let fresh = Settings { tables: "[sessions]\nreuse = false\n".to_owned(), ..Settings::default() };
    let mesh = or_skip!(mesh_of(&lab, &fresh, &places));
    let _web = web(&lab, "server", "web", "", &format!("0.0.0.0:{PORT}"));
    lab.expect_served(&mesh, lab.beta.at(PORT));
    let over = AtomicBool::new(false);
    let (served, made) = std::thread::scope(|scope| {
        let flood = scope.spawn(|| {
            let near = SocketAddr::from(([127, 0, 0, 1], PORT));
            lab.beta.within(|| from_everywhere_here(near, 700, || over.load(Ordering::Relaxed), |_| ()))
        });
        let _full = clock::until(clock::seconds(20), || {
            (mesh.beta().status()["connections"]["unproven"].as_u64() >= Some(200)).then_some(())
        });
        let call = |_: &u32| {
            let heard = lab.echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
            heard.iter().any(|event| event["text"] == lab.marker())
        };
        let served = (0..20).filter(call).count();
        over.store(true, Ordering::Relaxed);
        (served, flood.join().unwrap())
    });
    assert!(made > 300, "{made}");
    assert_eq!(served, 20, "of 20 calls from another host, with {made} connections from this one");
    expect_alive(&mesh);
}

#[test]
fn refusals_from_all_of_loopback_are_a_few_lines_with_a_count() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let web = web(&lab, "server", "web", "", &format!("0.0.0.0:{PORT}"));
    let end = Instant::now() + clock::millis(5000);
    let attempts = lab.beta.within(|| {
        let near = SocketAddr::from(([127, 0, 0, 1], PORT));
        let speak = |stream: &mut TcpStream| drop(stream.write_all(b"STRANGER-flood\n"));
        from_everywhere_here(near, 100, || Instant::now() > end, speak)
    });
    assert!(attempts > 1000, "{attempts}");
    let counted = || attempts_of(&mesh.beta().audit());
    assert!(clock::until(clock::seconds(30), || (counted() >= attempts).then_some(())).is_some(), "{}", counted());
    let size = std::fs::metadata(mesh.beta().directory().join("audit.jsonl")).unwrap().len();
    assert!(size < 150_000, "{size} bytes for {attempts} connections");
    web.expect_no_stranger("in plaintext");
    lab.expect_served(&mesh, lab.beta.at(PORT));
    expect_alive(&mesh);
}

#[test]
fn what_a_stranger_is_refused_again_and_again_is_counted_and_not_written_each_time() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let web = web(&lab, "server", "web", "", &format!("0.0.0.0:{PORT}"));
    let log = mesh.beta().directory().join("audit.jsonl");
    let end = Instant::now() + clock::millis(2000);
    let mut attempts = 0_u64;
    lab.stranger.within(|| {
        while Instant::now() < end {
            if let Ok(mut stream) = TcpStream::connect(lab.beta.at(PORT)) {
                let _refused = stream.write_all(b"STRANGER-flood\n");
                attempts += 1;
            }
        }
    });
    assert!(attempts > 100, "{attempts}");
    let counted = || attempts_of(&mesh.beta().audit());
    assert!(clock::until(clock::seconds(20), || (counted() == attempts).then_some(())).is_some(), "{}", counted());
    let size = std::fs::metadata(&log).unwrap().len();
    assert!(size < 100_000, "{size} bytes for {attempts} connections");
    web.expect_no_stranger("in plaintext");
    lab.expect_served(&mesh, lab.beta.at(PORT));
    expect_alive(&mesh);
}
