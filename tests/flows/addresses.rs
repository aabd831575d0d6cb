//! Every way to connect and to listen, and the addresses that both programs see.

use lab::policy::PORT;
use lab::world::{address, pick};
use lab::{Host, Lab, Policy, clock, lab, or_skip};
use std::net::SocketAddr;

/// Connects to an echo server on these addresses in one way, and checks what both ends are shown.
fn connects_by(lab: &Lab, listen: &[SocketAddr], to: SocketAddr, options: &[&str]) {
    let mesh = or_skip_in(lab);
    let Some(mesh) = mesh else { return };
    let mut server = lab.serve_echo(&lab.beta, "server", listen);
    let said = lab.expect_echo(&lab.alpha, "client", to, options);
    shows_true_addresses(lab, &mut server, &said, to);
    mesh.expect_allowed(PORT, 1);
    lab.expect_tls(PORT);
}

fn or_skip_in(lab: &Lab) -> Option<lab::Mesh<'_>> {
    match lab.mesh(&Policy::standard(lab)) {
        Ok(mesh) => Some(mesh),
        Err(skip) => {
            skip.announce(lab.test());
            None
        }
    }
}

fn shows_true_addresses(lab: &Lab, server: &mut lab::Program, said: &[serde_json::Value], to: SocketAddr) {
    let accepted = server.event(|event| event["event"] == "accepted");
    let names = pick(said, "names");
    let own = |host: &Host| if to.ip().to_canonical().is_ipv4() { host.v4.into() } else { host.v6.into() };
    let alpha: std::net::IpAddr = own(&lab.alpha);
    let beta: std::net::IpAddr = own(&lab.beta);
    assert_eq!(address(names, "peer"), to, "the client sees another server: {names}");
    assert_eq!(address(names, "local").ip().to_canonical(), alpha, "the client sees another self: {names}");
    assert_eq!(address(&accepted, "peer").ip().to_canonical(), alpha, "the server sees another client: {accepted}");
    let local = address(&accepted, "local");
    assert_eq!((local.ip().to_canonical(), local.port()), (beta, PORT), "the server sees another self: {accepted}");
}

#[test]
fn ipv4_works_and_both_ends_see_true_addresses() {
    let lab = lab!();
    connects_by(&lab, &[lab.beta.at(PORT)], lab.beta.at(PORT), &[]);
}

#[test]
fn ipv6_works_and_both_ends_see_true_addresses() {
    let lab = lab!();
    connects_by(&lab, &[lab.beta.at6(PORT)], lab.beta.at6(PORT), &[]);
}

#[test]
fn an_ipv6_socket_reaches_an_ipv4_server_by_a_mapped_address() {
    let lab = lab!();
    connects_by(&lab, &[lab.beta.at(PORT)], lab.beta.mapped(PORT), &[]);
}

#[test]
fn an_ipv4_client_reaches_a_server_that_listens_on_the_ipv6_wildcard() {
    let lab = lab!();
    connects_by(&lab, &[SocketAddr::from(([0_u16; 8], PORT))], lab.beta.at(PORT), &[]);
}

#[test]
fn an_ipv6_client_reaches_a_server_that_listens_on_the_ipv6_wildcard() {
    let lab = lab!();
    connects_by(&lab, &[SocketAddr::from(([0_u16; 8], PORT))], lab.beta.at6(PORT), &[]);
}

#[test]
fn a_server_that_listens_on_the_ipv4_wildcard_is_protected() {
    let lab = lab!();
    connects_by(&lab, &[SocketAddr::from(([0; 4], PORT))], lab.beta.at(PORT), &[]);
}

#[test]
fn a_non_blocking_client_connects() {
    let lab = lab!();
    connects_by(&lab, &[lab.beta.at(PORT)], lab.beta.at(PORT), &["--how", "nonblocking"]);
}

#[test]
fn a_non_blocking_ipv6_client_connects() {
    let lab = lab!();
    connects_by(&lab, &[lab.beta.at6(PORT)], lab.beta.at6(PORT), &["--how", "nonblocking"]);
}

#[test]
fn a_client_with_data_in_its_syn_connects() {
    let lab = lab!();
    with_fast_open(&lab);
    connects_by(&lab, &[lab.beta.at(PORT)], lab.beta.at(PORT), &["--how", "fastopen"]);
}

#[test]
fn a_client_with_data_in_its_first_write_connects() {
    let lab = lab!();
    with_fast_open(&lab);
    connects_by(&lab, &[lab.beta.at(PORT)], lab.beta.at(PORT), &["--how", "fastopen-connect"]);
}

/// Data in the SYN without a cookie, for clients and servers alike: the hardest case.
fn with_fast_open(lab: &Lab) {
    for host in [&lab.alpha, &lab.beta] {
        host.sysctl("net/ipv4/tcp_fastopen", "1543").unwrap();
    }
}

#[test]
fn an_io_uring_client_connects() {
    let lab = lab!();
    or_skip!(io_uring());
    connects_by(&lab, &[lab.beta.at(PORT)], lab.beta.at(PORT), &["--how", "io-uring"]);
}

fn io_uring() -> Result<(), lab::Skip> {
    let probe = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    // Nobody listens on port 1 of this address: any answer of the network is an answer of io_uring.
    let to = SocketAddr::from(([127, 0, 0, 1], 1)).into();
    match lab::sys::connect_io_uring(std::os::fd::AsFd::as_fd(&probe), &to) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EINVAL)) => {
            Err(lab::Skip::because(format!("kernel has no io_uring for this process: {error}")))
        }
        _ => Ok(()),
    }
}

#[test]
fn an_mptcp_client_connects() {
    let lab = lab!();
    let probe = lab::dial::socket(lab.beta.at(PORT), None, lab::dial::How::Multipath);
    or_skip!(probe.map_err(|error| lab::Skip::because(format!("kernel has no MPTCP: {error}"))));
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let mut server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &["--how", "mptcp"]);
    // What the client is shown is not checked: the kernel runs the connect hook for the subflow's socket and the name
    // hooks for the MPTCP socket, which has another cookie.
    let accepted = server.event(|event| event["event"] == "accepted");
    assert_eq!(address(&accepted, "peer").ip(), std::net::IpAddr::V4(lab.alpha.v4));
    if mesh.protected() {
        let error = lab.expect_no_echo(&lab.alpha, "nobody", lab.beta.at(PORT), &["--how", "mptcp"]);
        assert_eq!(error, "EPERM");
    }
    lab.expect_tls(PORT);
}

#[test]
fn a_client_bound_to_one_address_keeps_it() {
    let lab = lab!();
    lab.alpha.also("10.77.0.200/32").unwrap();
    lab.beta.routes("10.77.0.200/32", &lab.alpha).unwrap();
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let mut server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let said = lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &["--bind", "10.77.0.200:0"]);
    let bound: std::net::IpAddr = "10.77.0.200".parse().unwrap();
    assert_eq!(address(pick(&said, "names"), "local").ip(), bound);
    assert_eq!(address(&server.event(|event| event["event"] == "accepted"), "peer").ip(), bound);
    mesh.expect_allowed(PORT, 1);
    let wire = lab.expect_tls(PORT);
    let sources = wire.streams();
    assert!(sources.iter().any(|stream| stream.source.ip() == bound), "the wire shows another source");
}

#[test]
fn a_client_bound_to_one_port_connects() {
    let lab = lab!();
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let mut server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let bind = lab.alpha.at(34567).to_string();
    let said = lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &["--bind", &bind]);
    assert_eq!(address(pick(&said, "names"), "local"), lab.alpha.at(34567));
    let accepted = server.event(|event| event["event"] == "accepted");
    assert_eq!(address(&accepted, "peer").ip(), std::net::IpAddr::V4(lab.alpha.v4));
    mesh.expect_allowed(PORT, 1);
    lab.expect_tls(PORT);
}

#[test]
fn a_server_that_restarts_is_protected_again() {
    let lab = lab!();
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    for _ in 0..3 {
        let mut server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
        lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
        server.signal(rustix::process::Signal::KILL);
        server.end(clock::seconds(10)).unwrap();
    }
    mesh.expect_allowed(PORT, 3);
    lab.expect_tls(PORT);
}

#[test]
fn a_server_that_dies_with_connections_open_can_listen_again_at_once() {
    let lab = lab!();
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let mut server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let say = format!("send:{}\\n", lab.marker());
    let mut open = lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &[&say, "line", "to-end"]);
    open.step("line");
    server.signal(rustix::process::Signal::KILL);
    server.end(clock::seconds(10)).unwrap();
    // What carries the dead server's connections must not hold its port.
    let _again = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    let end = open.event(|event| event["step"] == "to-end");
    assert!(end["ok"] == true || end["error"] == "ECONNRESET", "{end}");
    mesh.expect_allowed(PORT, 2);
    lab.expect_tls(PORT);
}

#[test]
fn a_server_that_is_killed_and_started_again_is_reached_at_once_on_a_loaded_machine() {
    let lab = lab!();
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let over = std::sync::atomic::AtomicBool::new(false);
    let began = std::time::Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) && began.elapsed().as_secs() < 60 {
                    std::hint::spin_loop();
                }
            });
        }
        for _ in 0..12 {
            let mut server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
            lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
            server.signal(rustix::process::Signal::KILL);
            server.end(clock::seconds(10)).unwrap();
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    mesh.expect_allowed(PORT, 12);
    if mesh.protected() {
        let denied: Vec<_> = mesh.beta().audit().into_iter().filter(|record| record["decision"] == "denied").collect();
        assert!(denied.is_empty(), "{denied:#?}");
    }
}

#[test]
fn a_server_that_listened_before_the_agent_is_protected() {
    let lab = lab!();
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT), lab.beta.at6(PORT)]);
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    for to in [lab.beta.at(PORT), lab.beta.at6(PORT)] {
        lab.expect_echo(&lab.alpha, "client", to, &[]);
        lab.expect_no_echo(&lab.stranger, "stranger", to, &[]);
    }
    mesh.alpha().expect_records(PORT, 2);
    // The stranger says the marker in plaintext itself; everybody else's connections are clean.
    for stream in lab.wire().streams() {
        let strangers = [stream.source, stream.destination]
            .map(|end| [lab.stranger.v4.into(), lab.stranger.v6.into()].contains(&end.ip()));
        let found = lab::wire::find(&stream.bytes, lab.marker().as_bytes());
        assert!(
            strangers.contains(&true) || found.is_none(),
            "plaintext from {} to {}",
            stream.source,
            stream.destination
        );
    }
}
