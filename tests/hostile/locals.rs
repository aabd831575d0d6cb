//! Programs on the host itself that try to get round.

use lab::policy::{PORT, id};
use lab::stranger::{self, Tls};
use lab::world::{events, pick};
use lab::{Host, Lab, Policy, Settings, clock, lab, or_skip, skip};
use socket2::{Domain, Socket, Type};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Instant;

/// Listening sockets of the host's namespace, but those of the workloads.
fn agents_listeners(host: &Host) -> Vec<SocketAddr> {
    let tables = host.within(|| {
        ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"].map(|path| std::fs::read_to_string(path).unwrap())
    });
    let mut found = Vec::new();
    for line in tables.iter().flat_map(|table| table.lines().skip(1)) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some((address, port)) = words[1].split_once(':') else { continue };
        let port = u16::from_str_radix(port, 16).unwrap();
        if words[3] != "0A" || port == PORT {
            continue;
        }
        let ip: IpAddr = if address.len() == 8 {
            Ipv4Addr::from(u32::from_str_radix(address, 16).unwrap().swap_bytes()).into()
        } else {
            let mut bytes = [0; 16];
            for (word, chunk) in bytes.chunks_mut(4).enumerate() {
                let text = &address[word * 8..word * 8 + 8];
                chunk.copy_from_slice(&u32::from_str_radix(text, 16).unwrap().swap_bytes().to_be_bytes());
            }
            Ipv6Addr::from(bytes).into()
        };
        let ip = match ip {
            ip if !ip.is_unspecified() => ip,
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        found.push(SocketAddr::new(ip, port));
    }
    found
}

#[test]
fn the_agents_own_ports_take_nobody_in() {
    let lab = lab!();
    let policy = Policy::standard(&lab).allow("foreign", "foreign", "server");
    let mesh = or_skip!(lab.only_mesh(&policy));
    let server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let svid = mesh.mint().svid(&id("foreign")).unwrap();
    for host in [&lab.alpha, &lab.beta] {
        let listeners = agents_listeners(host);
        assert!(listeners.len() >= 2, "{listeners:?}");
        for to in listeners {
            // From a program without identity on the same host: plaintext, and TLS with a good SVID.
            host.within(|| stranger::raw(to, b"hello")).expect_refused();
            host.within(|| Tls::default().talk(to, Some(&svid), b"hello")).expect_refused();
            // From an enrolled one: nothing but its mesh destinations.
            let error = lab.expect_no_echo(host, "client", to, &[]);
            assert!(error == "EPERM" || error == "ECONNRESET", "{to}: {error}");
            // From outside.
            let outside = SocketAddr::new(if to.is_ipv4() { host.v4.into() } else { host.v6.into() }, to.port());
            lab.stranger.within(|| stranger::raw(outside, b"hello")).expect_refused();
        }
    }
    assert!(!server.stdout().contains("accepted"), "the workload saw it: {}", server.stdout());
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    lab.expect_tls(PORT);
}

#[test]
fn the_agents_upstream_connection_cannot_be_imitated() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let mut server = lab.serve_echo(&lab.beta, "server", &[([0_u16; 8], PORT).into()]);
    // While a proper connection is open, so that there is an upstream connection to imitate.
    let say = format!("send:{}\\n", lab.marker());
    let mut open =
        lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &[&say, "line", "wait", "half-close", "to-end"]);
    open.step("line");
    server.event(|event| event["event"] == "accepted");
    let upstream = upstream(&lab.beta);
    let mut sources: Vec<SocketAddr> = vec![
        ([127, 0, 0, 6], 0).into(),
        ([127, 0, 0, 1], 0).into(),
        lab.beta.at(0),
        lab.beta.at6(0),
        (Ipv6Addr::LOCALHOST, 0).into(),
    ];
    sources.extend(upstream.map(|source| SocketAddr::new(source.ip().to_canonical(), source.port().wrapping_add(1))));
    for source in sources {
        let targets =
            [lab.beta.at(PORT), lab.beta.at6(PORT), ([127, 0, 0, 1], PORT).into(), (Ipv6Addr::LOCALHOST, PORT).into()];
        for to in targets.into_iter().filter(|to| to.is_ipv4() == source.is_ipv4()) {
            lab.beta.within(|| dial_from(source, to)).expect_refused();
        }
    }
    assert_eq!(server.stdout().matches("\"accepted\"").count(), 1, "{}", server.stdout());
    open.say("end").unwrap();
    open.outcome().good();
    assert_eq!(mesh.beta().expect_record("the open one", |r| r["decision"] == "allowed")["source"]["id"], id("client"));
    lab.expect_tls(PORT);
}

/// Source address of an established connection to the workload's port that this host itself makes: the agent's upstream
/// connection.
fn upstream(host: &Host) -> Option<SocketAddr> {
    let text = host.within(|| std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap());
    let port = format!(":{PORT:04X}");
    text.lines().skip(1).find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words[3] != "01" || !words[2].ends_with(&port) {
            return None;
        }
        let (address, source_port) = words[1].split_once(':')?;
        let ip = Ipv4Addr::from(u32::from_str_radix(address, 16).ok()?.swap_bytes());
        Some(SocketAddr::new(ip.into(), u16::from_str_radix(source_port, 16).ok()?))
    })
}

fn dial_from(source: SocketAddr, to: SocketAddr) -> stranger::Attempt {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    let connected = socket
        .bind(&source.into())
        .and_then(|()| socket.connect_timeout(&to.into(), clock::seconds(5)))
        .and_then(|()| socket.set_read_timeout(Some(clock::seconds(15))));
    match connected {
        Ok(()) => stranger::raw_on(TcpStream::from(socket), b"hello"),
        Err(error) => stranger::Attempt { end: error.to_string(), ..Default::default() },
    }
}

#[test]
fn a_program_without_identity_is_refused_at_once() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT), lab.beta.at6(PORT)]);
    for to in [lab.beta.at(PORT), lab.beta.at6(PORT), lab.beta.mapped(PORT)] {
        for how in ["blocking", "nonblocking", "fastopen", "fastopen-connect"] {
            let began = Instant::now();
            let error = lab.expect_no_echo(&lab.alpha, "nobody", to, &["--how", how]);
            assert_eq!(error, "EPERM", "{to} {how}");
            assert!(began.elapsed() < clock::seconds(3), "{to} {how} took {:?}", began.elapsed());
        }
    }
    assert!(!server.stdout().contains("accepted"));
    for record in mesh.alpha().expect_records(PORT, 12) {
        assert_eq!(record["decision"], "denied", "{record}");
        assert_eq!(record["code"], "no-identity", "{record}");
        assert!(record["process"]["pid"].as_u64() > Some(0), "{record}");
    }
    let wire = lab.expect_no_plaintext();
    assert_eq!(wire.attempts(lab.beta.at(PORT)) + wire.attempts(lab.beta.at6(PORT)), 0, "a SYN went out");
}

#[test]
fn a_borrowed_socket_has_the_identity_of_who_connects_it() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let to = lab.beta.at(PORT).to_string();
    let say = format!("send:{}\\n", lab.marker());
    // Made by an enrolled program, used by one without identity.
    let socket = lab.directory().join("one").display().to_string();
    let _lender = lab.serve(&lab.alpha, "client", &["lend", "--socket", &socket, "--to", &to]);
    let words = ["lab-app", "borrow", "--socket", &socket, "--to", &to, &say, "line"];
    let said = events(&lab.run(&lab.alpha, "nobody", &words).outcome().stdout);
    // By the kernel, or, where it has not seen the borrower's cgroup before, by the agent.
    assert_eq!(said.last().unwrap()["ok"], false, "{said:?}");
    assert!(!server.stdout().contains("accepted"));
    assert_eq!(mesh.alpha().expect_records(PORT, 1)[0]["decision"], "denied");
    // Made by a program without identity, used by an enrolled one: by mutual TLS or not at all.
    let socket = lab.directory().join("two").display().to_string();
    let _lender = lab.serve(&lab.alpha, "nobody", &["lend", "--socket", &socket, "--to", &to]);
    let words = ["lab-app", "borrow", "--socket", &socket, "--to", &to, &say, "line", "half-close", "to-end"];
    let said = events(&lab.run(&lab.alpha, "client", &words).outcome().stdout);
    assert!(said.last().is_some_and(|last| last["ok"] == false || last["step"] == "to-end"), "{said:?}");
    mesh.alpha().expect_records(PORT, 2);
    lab.expect_no_plaintext();
}

#[test]
fn a_socket_from_outside_the_covered_subtree_gets_nothing_out_in_plaintext() {
    let lab = lab!();
    let settings = Settings { top: format!("cgroup = \"{}\"", lab.cgroup_path()), ..Settings::default() };
    let mesh = or_skip!(lab.only_mesh_with(&Policy::standard(&lab), &settings));
    let server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    let to = lab.beta.at(PORT).to_string();
    let socket = lab.directory().join("lent").display().to_string();
    // The lender's cgroup is not below the one that the agent covers: no connect hook runs for its sockets.
    let place = lab::enter::Place { netns: Some(lab.alpha.netns.clone()), ..Default::default() };
    let mut command = lab.command_in(place, or_skip!(skip::lab_app()));
    command.args(["lend", "--socket", &socket, "--to", &to]);
    let mut lender = lab::Program::start(command, "lend").unwrap();
    lender.ready().unwrap();
    let say = format!("send:{}\\n", lab.marker());
    let mut borrower =
        lab.run(&lab.alpha, "client", &["lab-app", "borrow", "--socket", &socket, "--to", &to, &say, "line"]);
    // The connect may hang (the SYN is dropped) or fail; it must not get through.
    let ended = clock::until(clock::seconds(4), || borrower.ended().then_some(()));
    if ended.is_some() {
        let said = events(&borrower.stdout());
        assert!(said.last().is_none_or(|last| last["ok"] == false), "{said:?}");
    }
    assert_eq!(server.stdout().matches("\"accepted\"").count(), 1, "{}", server.stdout());
    drop((borrower, lender));
    drop(mesh);
    lab.expect_tls(PORT);
}

#[test]
fn udp_to_a_mesh_destination_is_denied_and_counted_unless_policy_names_it() {
    let lab = lab!();
    let policy = Policy::standard(&lab).serve(&lab, 8443).udp("quic", "client", lab.beta.at(8443));
    let mesh = or_skip!(lab.only_mesh(&policy));
    let at = |port: u16| lab.beta.at(port).to_string();
    let mut server = lab.serve(&lab.beta, "server", &["udp-echo", "--listen", &at(PORT)]);
    let mut other = lab.serve(&lab.beta, "server", &["udp-echo", "--listen", &at(8443)]);
    let talk = |to: &str, options: &[&str], text: &str| {
        let words = [&["lab-app", "udp-talk", "--to", to, "--text", text][..], options].concat();
        lab.run(&lab.alpha, "client", &words).outcome().json()
    };
    for options in [&[][..], &["--connected", "yes"]] {
        let said = talk(&at(PORT), options, lab.marker());
        assert_eq!((&said["ok"], &said["error"]), (&false.into(), &"EPERM".into()), "{said}");
    }
    let status = mesh.alpha().status();
    let counted = status["kernel"]
        .as_object()
        .is_some_and(|counters| counters.iter().any(|(name, count)| name.contains("udp") && count.as_u64() >= Some(2)));
    assert!(counted, "{status:#}");
    let record = mesh.alpha().expect_record("UDP", |r| r["protocol"] == "udp" && r["decision"] == "denied");
    assert_eq!(record["source"]["id"], id("client"), "{record}");
    assert!(!server.stdout().contains("datagram"), "{}", server.stdout());
    // What policy names passes, and others are none of our business.
    let said = talk(&at(8443), &[], "quic is TLS already");
    assert_eq!(said["text"], "quic is TLS already", "{said}");
    other.event(|event| event["event"] == "datagram");
    let words = ["lab-app", "udp-talk", "--to", &at(PORT), "--text", "not enrolled"];
    let said = lab.run(&lab.alpha, "nobody", &words).outcome().json();
    assert_eq!(said["text"], "not enrolled", "{said}");
    server.event(|event| event["event"] == "datagram");
    let wire = lab.expect_no_plaintext();
    assert_eq!(wire.datagrams(PORT), 1);
}

#[test]
fn workloads_that_die_right_after_connecting_get_nothing_and_harm_nobody() {
    let lab = lab!();
    let app = or_skip!(skip::lab_app());
    let (group, path) = (format!("cgroup:{}/client", lab.cgroup_path()), format!("unix:path:{}", app.display()));
    let policy = Policy::empty(&lab)
        .workload_by("client", &[&group, &path])
        .workload("server")
        .serve(&lab, PORT)
        .allow("client-to-server", "client", "server");
    let mesh = or_skip!(lab.only_mesh(&policy));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let number = clock::count(40);
    let programs: Vec<_> = (0..number)
        .map(|_| lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &["--how", "nonblocking"], &[]))
        .collect();
    for program in programs {
        program.outcome();
    }
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    let records = mesh.alpha().expect_records(PORT, number + 1);
    for record in records.iter().filter(|record| record["decision"] == "denied") {
        assert!(record["code"].as_str().is_some_and(|code| !code.is_empty()), "{record}");
    }
    lab.expect_tls(PORT);
}

#[test]
fn a_second_agent_in_one_namespace_does_not_start() {
    let lab = lab!();
    let policy = Policy::standard(&lab);
    let mesh = or_skip!(lab.only_mesh(&policy));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let said = mesh.alpha().expect_refused();
    assert!(said.contains("second agent") || said.contains("another agent"), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    // Also when it is configured elsewhere.
    let second = lab.alpha.netns.clone();
    let config = std::fs::read_to_string(mesh.alpha().config()).unwrap();
    let other = config.replace("/alpha/run\"", "/alpha/run2\"");
    assert_ne!(config, other);
    let path = lab.file("second.toml", other);
    let place = lab::enter::Place { netns: Some(second), ..Default::default() };
    let mut command = lab.command_in(place, or_skip!(skip::bunter()));
    command.args(["agent", "--config"]).arg(path);
    let outcome = lab::Program::start(command, "second agent").unwrap().outcome();
    let said = outcome.bad();
    assert!(!said.contains("panicked"), "{said}");
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    lab.expect_tls(PORT);
}

#[test]
fn a_process_that_changes_its_user_is_not_whom_it_was() {
    let lab: Lab = lab!();
    let policy = Policy::empty(&lab)
        .workload_by("client", &["unix:uid:12345", &format!("cgroup:{}/client", lab.cgroup_path())])
        .workload("server")
        .serve(&lab, PORT)
        .allow("client-to-server", "client", "server");
    let mesh = or_skip!(lab.only_mesh(&policy));
    let server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    // Root in the right cgroup is not the user.
    let error = lab.expect_no_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    assert_eq!(error, "EPERM");
    // The user in another cgroup is not the workload.
    let mut place = lab.place(&lab.alpha, "elsewhere");
    place.user = Some((12345, 12345));
    let mut command = lab.command_in(place, or_skip!(skip::lab_app()));
    command.current_dir("/").args(["talk", "--to", &lab.beta.at(PORT).to_string(), "send:hello\\n", "line"]);
    let said = events(&lab::Program::start(command, "talk").unwrap().outcome().stdout);
    assert_eq!(pick(&said, "connect")["error"], "EPERM", "{said:?}");
    assert!(!server.stdout().contains("accepted"));
    mesh.alpha().expect_records(PORT, 2);
    lab.expect_no_plaintext();
}
