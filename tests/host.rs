//! The lab itself, and the wire oracle: without them no other test proves anything. None of this needs an agent.

use lab::policy::PORT;
use lab::stranger::Tls;
use lab::world::{events, pick};
use lab::{Mint, clock, lab, or_skip, skip};
use std::io::Write;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use time::Duration;

#[test]
fn hosts_reach_each_other_by_both_families_and_see_true_addresses() {
    let lab = lab!();
    let mut server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT), lab.beta.at6(PORT)]);
    for (host, to) in [
        (&lab.alpha, lab.beta.at(PORT)),
        (&lab.alpha, lab.beta.at6(PORT)),
        (&lab.alpha, lab.beta.mapped(PORT)),
        (&lab.stranger, lab.beta.at(PORT)),
        (&lab.stranger, lab.beta.at6(PORT)),
    ] {
        let said = lab.expect_echo(host, "client", to, &[]);
        let accepted = server.event(|event| event["event"] == "accepted");
        let local: std::net::SocketAddr = pick(&said, "names")["local"].as_str().unwrap().parse().unwrap();
        let seen: std::net::SocketAddr = accepted["peer"].as_str().unwrap().parse().unwrap();
        assert_eq!(local.port(), seen.port());
        assert_eq!(local.ip().to_canonical(), seen.ip());
    }
}

#[test]
fn the_oracle_finds_a_marker_in_a_packet() {
    let lab = lab!();
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    let wire = lab.wire();
    assert_eq!(wire.lost, 0);
    assert!(wire.search(lab.marker().as_bytes()).unwrap().starts_with("in a packet"));
    assert!(wire.search(b"PLAINTEXT-MARKER-of-somebody-else").is_none());
    assert!(wire.records(PORT).is_err(), "plaintext was taken for TLS");
    assert_eq!(wire.attempts(lab.beta.at(PORT)), 1);
}

#[test]
fn the_oracle_finds_a_marker_that_lies_across_packets() {
    let lab = lab!();
    let _server = lab.serve_script(&lab.beta, "server", &["to-end"]);
    let (head, tail) = lab.marker().split_at(13);
    let (head, tail) = (format!("send:xx{head}"), format!("send:{tail}"));
    lab.talk(&lab.alpha, "client", lab.beta.at6(PORT), &[], &[&head, "sleep:50", &tail, "half-close", "to-end"])
        .outcome()
        .good();
    let wire = lab.wire();
    assert!(wire.search(lab.marker().as_bytes()).unwrap().starts_with("in the stream"));
    assert!(wire.streams().iter().all(|stream| stream.whole));
}

#[test]
fn the_oracle_tells_tls_from_everything_else() {
    let lab = lab!();
    let (mint, ..) = Mint::found("lab.test", Duration::hours(-1), Duration::hours(1)).unwrap();
    let svid = mint.svid("spiffe://lab.test/server").unwrap();
    let (listener, at) = lab.beta.within(|| {
        let listener = TcpListener::bind(lab.beta.at(PORT)).unwrap();
        let at = listener.local_addr().unwrap();
        (listener, at)
    });
    std::thread::scope(|scope| {
        let server = scope.spawn(|| lab.beta.within(|| Tls::default().answer(&listener, &svid)));
        let said = lab.alpha.within(|| Tls::default().talk(at, Some(&svid), lab.marker().as_bytes()));
        assert_eq!(said.end, "close_notify", "{said:?}");
        assert_eq!(said.answer, lab.marker().as_bytes());
        assert!(server.join().unwrap().handshake);
    });
    let wire = lab.wire();
    assert!(wire.search(lab.marker().as_bytes()).is_none());
    let records = wire.records(PORT).unwrap();
    assert!(records.application >= 2 && records.handshake >= 2, "{records:?}");
}

#[test]
fn a_capture_of_heads_finds_the_marker_in_bulk() {
    let lab = lab!();
    lab.capture_heads();
    let size = clock::bulk(64 << 20);
    let _server = lab.serve_script(&lab.beta, "server", &["to-end"]);
    let send = format!("pattern:{size}");
    lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &[&send, "half-close", "to-end"]).outcome().good();
    let wire = lab.wire();
    assert!(wire.search(lab.marker().as_bytes()).is_some());
    assert!(wire.payload_packets(PORT) > 10);
}

#[test]
fn a_stranger_that_speaks_tls_1_2_speaks_tls_1_2() {
    let lab = lab!();
    let (mint, ..) = Mint::found("lab.test", Duration::hours(-1), Duration::hours(1)).unwrap();
    let svid = mint.svid("spiffe://lab.test/server").unwrap();
    let listener = lab.beta.within(|| TcpListener::bind(lab.beta.at(PORT)).unwrap());
    std::thread::scope(|scope| {
        let server = scope.spawn(|| Tls::default().answer(&listener, &svid));
        let said = lab.stranger.within(|| Tls::old().talk(lab.beta.at(PORT), None, b"x"));
        assert!(!said.handshake, "{said:?}");
        assert!(!server.join().unwrap().handshake);
    });
    std::thread::scope(|scope| {
        let server = scope.spawn(|| Tls::old().answer(&listener, &svid));
        let said = lab.stranger.within(|| Tls::old().talk(lab.beta.at(PORT), Some(&svid), b"x"));
        assert!(said.handshake && said.answer == b"x", "{said:?}");
        assert!(server.join().unwrap().handshake);
    });
}

#[test]
fn programs_run_where_and_as_whom_they_are_told() {
    let lab = lab!();
    let mut place = lab.place(&lab.alpha, "somewhere");
    place.user = Some((12345, 23456));
    place.files = Some(77);
    let mut command = lab.command_in(place, or_skip!(skip::need("sh")));
    command.args(["-c", "id -u; id -g; ulimit -n; grep 0:: /proc/self/cgroup; cat /proc/net/dev | grep -c eth0"]);
    let output = lab::Program::start(command, "sh").unwrap().outcome().good();
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines[..3], ["12345", "23456", "77"]);
    assert!(lines[3].ends_with(&format!("{}/somewhere", lab.cgroup_path())), "{output}");
    assert_eq!(lines[4], "1");
}

#[test]
fn a_socket_can_be_lent_to_another_program() {
    let lab = lab!();
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let socket = lab.directory().join("lent").display().to_string();
    let to = lab.beta.at(PORT).to_string();
    let _lender = lab.serve(&lab.alpha, "outside", &["lend", "--socket", &socket, "--to", &to]);
    let words = ["lab-app", "borrow", "--socket", &socket, "--to", &to, "send:hello\\n", "line"];
    let said = events(&lab.run(&lab.alpha, "client", &words).outcome().good());
    assert_eq!(said.last().unwrap()["text"], "hello");
}

#[test]
fn what_a_killed_run_left_behind_is_removed() {
    or_skip!(skip::need_root());
    let app = or_skip!(skip::lab_app());
    or_skip!(skip::need("ip"));
    let Some(mount) = lab::world::cgroup2() else {
        skip::Skip::because("the whole cgroup2 hierarchy is mounted nowhere").announce(lab::test_name!());
        return;
    };
    let name = format!("bunter-lab-{}-leftover", std::process::id());
    let (cgroup, directory) = (mount.join(&name), std::env::temp_dir().join(&name));
    let netns = format!("wl{}-leftover", std::process::id());
    std::fs::create_dir_all(cgroup.join("deep/er")).unwrap();
    std::fs::create_dir(&directory).unwrap();
    assert!(Command::new("ip").args(["netns", "add", &netns]).status().unwrap().success());
    let mut sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
    std::fs::write(cgroup.join("deep/er/cgroup.procs"), sleeper.id().to_string()).unwrap();

    let mut janitor = Command::new(app).arg("janitor").stdin(Stdio::piped()).spawn().unwrap();
    let kept = directory.with_extension("kept");
    std::fs::create_dir(&kept).unwrap();
    let lines = format!(
        "+directory\t{d}\n+netns\t{netns}\n+cgroup\t{c}\n+directory\t{k}\n-directory\t{k}\n",
        d = directory.display(),
        c = cgroup.display(),
        k = kept.display()
    );
    janitor.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(janitor.wait().unwrap().success());
    assert!(!sleeper.wait().unwrap().success(), "the sleeper slept to its end");
    assert!(!cgroup.exists() && !directory.exists());
    assert!(!std::path::Path::new("/run/netns").join(&netns).exists());
    assert!(kept.exists(), "what was taken back was removed");
    std::fs::remove_dir(&kept).unwrap();
}
