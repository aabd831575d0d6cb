//! The kernel programs and the agent's doors, on the running kernel: each test in a network namespace and a cgroup of its own.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets what it did not expect has failed"
)]

mod host;
mod policies;
mod reload;
mod world;

use std::{
    io::Write,
    net::{SocketAddr, TcpListener},
    os::fd::AsFd,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use wimsey::flow::{Direction, OriginalDst};
use wimsey::intercept::{Error, KernelEvent, KernelFacts, Opening, ShardListeners, Work};
use wimsey_common::*;
use world::{Client, Facts, HERE, SERVER, SERVER6, WORKLOAD, World, world};

/// Not a test: what a client process runs.
#[test]
fn the_client_role() {
    if let Ok(script) = std::env::var("WIMSEY_TEST_CLIENT") {
        world::play(&script);
    }
}

/// Lets the client's connection in and answers on it, as a relay would.
fn answer(world: &World) -> wimsey::flow::Flow {
    let door = world.door();
    world.run(async {
        let mut flow = door.accept_outbound().await.unwrap();
        flow.socket.write_all(b"answer").await.unwrap();
        // Closing it would be a reset, which may be there before the program has read.
        socket2::SockRef::from(&flow.socket).set_linger(None).unwrap();
        flow
    })
}

#[test]
fn an_allowed_connection_comes_to_the_agent_with_its_origin() {
    let mut world = world!();
    let facts = world.enrol().allowing();
    let generation = world.install(facts);
    let mut client = world.client("connect 10.77.0.2:80;read");
    let flow = answer(&world);
    assert_eq!(flow.direction(), Direction::Outbound);
    assert_eq!(flow.destination, OriginalDst(SERVER.parse().unwrap()));
    let task = *flow.task().unwrap();
    assert_eq!((task.tgid, task.uid, task.workload), (client.pid(), 0, WORKLOAD));
    assert_eq!(generation, 1);
    // The program sees what it would see without the agent.
    assert_eq!(client.line(), "connected to 10.77.0.2:80 from 10.77.0.2");
    assert_eq!(client.line(), "answer");
    assert_eq!(world.count(counter::REDIRECTED), 1);
}

#[test]
fn ipv6_and_ipv4_mapped_addresses_take_the_same_way() {
    let mut world = world!();
    let facts = world.enrol().allowing();
    world.install(facts);
    let mut client = world.client("connect [fd77::2]:80;read");
    assert_eq!(answer(&world).destination, OriginalDst(SERVER6.parse().unwrap()));
    assert_eq!(client.line(), "connected to [fd77::2]:80 from fd77::2");
    assert_eq!(client.line(), "answer");

    let mut client = world.client("connect [::ffff:10.77.0.2]:80;read");
    assert_eq!(answer(&world).destination, OriginalDst(SERVER.parse().unwrap()));
    assert_eq!(client.line(), "connected to [::ffff:10.77.0.2]:80 from ::ffff:10.77.0.2");
    assert_eq!(client.line(), "answer");
}

#[test]
fn an_application_bound_to_an_address_keeps_it() {
    let mut world = world!();
    let facts = world.enrol().allowing();
    world.install(facts);
    let server = TcpListener::bind(SERVER).unwrap();
    let mut client = world.client(&format!("connect {SERVER} from {HERE}:4567;read"));
    let flow = answer(&world);
    assert_eq!(flow.source, "10.77.0.1:4567".parse().unwrap());
    assert_eq!(flow.dial_from(), Some("10.77.0.1:4567".parse().unwrap()));
    assert_eq!(client.line(), "connected to 10.77.0.2:80 from 10.77.0.1");
    // Its port is taken, by itself; its address is not.
    let door = world.door();
    let dialled = world.run(door.dialler().dial(SERVER.parse().unwrap(), flow.dial_from())).unwrap();
    assert_eq!(dialled.local_addr().unwrap().ip().to_string(), HERE);
    assert_eq!(server.accept().unwrap().1.ip().to_string(), HERE);
}

#[test]
fn non_blocking_and_fast_open_connections_take_the_same_way() {
    let mut world = world!();
    let facts = world.enrol().allowing();
    world.install(facts);
    let mut client = world.client("connect 10.77.0.2:80 nonblocking;read");
    answer(&world);
    assert_eq!(client.line(), "connected to 10.77.0.2:80 from 10.77.0.2");
    assert_eq!(client.line(), "answer");

    let mut client = world.client("connect 10.77.0.2:80 fastopen;read");
    let mut flow = answer(&world);
    assert_eq!(flow.destination, OriginalDst(SERVER.parse().unwrap()));
    let mut early = [0; 5];
    world.run(flow.socket.read_exact(&mut early)).unwrap();
    assert_eq!(&early, b"early");
    assert_eq!(client.line(), "connected to 10.77.0.2:80 from 10.77.0.2");
    assert_eq!(client.line(), "answer");
}

#[test]
fn a_multipath_client_takes_the_same_way() {
    let mut world = world!();
    let facts = world.enrol().allowing();
    world.install(facts);
    let probe = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, Some(socket2::Protocol::MPTCP));
    if probe.is_err() {
        eprintln!("SKIPPED (this kernel has no MPTCP): a_multipath_client_takes_the_same_way");
        return;
    }
    let mut client = world.client("connect 10.77.0.2:80 multipath;read");
    assert_eq!(answer(&world).destination, OriginalDst(SERVER.parse().unwrap()));
    assert!(client.line().starts_with("connected"));
    assert_eq!(client.line(), "answer");
    assert_eq!(world.programs().tidy().unwrap(), 0);
}

#[test]
fn a_program_without_identity_is_refused_at_a_mesh_destination_only() {
    let mut world = world!();
    let facts = world.enrol().allowing();
    world.install(facts);
    let open = TcpListener::bind("10.77.0.2:81").unwrap();
    let mut stranger =
        world.stranger("connect 10.77.0.2:80;connect [::ffff:10.77.0.2]:80;connect [fd77::2]:80;connect 10.77.0.2:81");
    assert_eq!(stranger.line(), "EPERM");
    assert_eq!(stranger.line(), "EPERM");
    assert_eq!(stranger.line(), "EPERM");
    assert_eq!(stranger.line(), "connected to 10.77.0.2:81 from 10.77.0.2");
    drop(open);
    let event = world.refusal();
    assert_eq!((event.reason, event.task.tgid), (REASON_NO_IDENTITY, stranger.pid()));
    assert_eq!(event.destination_port, 80);
    assert_eq!(world.count(counter::REFUSED_NO_IDENTITY), 3);
    assert_eq!(world.count(counter::LEFT_ALONE), 1);
}

#[test]
fn an_enrolled_program_reaches_only_what_policy_names() {
    let mut world = world!();
    let mut facts = world.enrol().verdict(3, 6, VERDICT_BYPASS);
    facts.policy.destinations.push(world::destination(3, "10.77.0.0/24", Some(53), MODE_PLAIN));
    world.install(facts);
    let _dns = TcpListener::bind("10.77.0.2:53").unwrap();
    let mut client =
        world.client("connect 10.77.0.2:80;connect 10.77.0.2:81;connect 127.0.0.1:81;connect 10.77.0.2:53");
    assert_eq!(client.line(), "EPERM");
    assert_eq!(client.line(), "EPERM");
    assert_eq!(client.line(), "EPERM");
    assert_eq!(client.line(), "connected to 10.77.0.2:53 from 10.77.0.2");
    let event = world.refusal();
    assert_eq!((event.reason, event.task.workload), (REASON_NOT_ALLOWED, WORKLOAD));
    let rule = world.notice(|notice| match notice {
        KernelEvent::Bypassed(event) => Some(event.rule),
        _ => None,
    });
    assert_eq!(rule, 3);
    assert_eq!(world.count(counter::BYPASSED), 1);
}

#[test]
fn a_candidate_is_turned_to_the_agent_at_a_mesh_destination_only() {
    let mut world = world!();
    let facts = Facts { ask: true, ..world.enrol() };
    world.install(facts);
    let open = TcpListener::bind("10.77.0.1:9999").unwrap();
    let mut client = world.client("connect 10.77.0.2:80;read;connect 10.77.0.1:9999");
    let flow = answer(&world);
    assert_eq!(flow.destination, OriginalDst("10.77.0.2:80".parse().unwrap()));
    assert_eq!(flow.task().unwrap().workload, 0);
    assert_eq!(client.line(), "connected to 10.77.0.2:80 from 10.77.0.2");
    assert_eq!(client.line(), "answer");
    // Nobody's traffic is the agent's: it goes its own way.
    assert_eq!(client.line(), "connected to 10.77.0.1:9999 from 10.77.0.1");
    drop(open);
}

#[test]
fn whoever_dials_the_agent_itself_is_refused() {
    let mut world = world!();
    let facts = world.enrol().allowing();
    world.install(facts);
    let mut client = world.client("connect 10.77.0.2:80;pause");
    let flow = answer(&world);
    client.line();
    // The agent's outbound listener, found as any local program could find it.
    let agent = flow.socket.local_addr().unwrap();
    let mut stranger = world.stranger(&format!("connect {agent};connect {agent}"));
    assert_eq!(stranger.line(), "ECONNREFUSED");
    assert_eq!(stranger.line(), "ECONNREFUSED");
    let event = world.refusal();
    assert_eq!((event.reason, event.destination_port), (REASON_DIRECT, agent.port()));
}

#[test]
fn a_dead_agent_means_refused_and_the_next_one_takes_over() {
    let mut world = world!();
    let facts = world.enrol().allowing();
    world.install(facts.clone());
    let server = TcpListener::bind(SERVER).unwrap();
    world.kill_agent();
    let mut client = world.client("connect 10.77.0.2:80;connect [fd77::2]:80");
    assert_eq!(client.line(), "ECONNREFUSED");
    assert_eq!(client.line(), "ECONNREFUSED");
    let mut stranger = world.stranger("connect 10.77.0.2:80");
    assert_eq!(stranger.line(), "EPERM");
    server.set_nonblocking(true).unwrap();
    assert_eq!(server.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);

    // The policy before is in force until there is another.
    world.try_start().unwrap();
    assert_eq!(world.programs().generation(), 1);
    let mut client = world.client("connect 10.77.0.2:80;read");
    assert_eq!(answer(&world).destination, OriginalDst(SERVER.parse().unwrap()));
    assert_eq!(client.line(), "connected to 10.77.0.2:80 from 10.77.0.2");
    assert_eq!(world.install(facts), 2);
    assert_eq!(client.line(), "answer");
}

#[test]
fn a_port_that_the_dead_agent_left_is_never_used() {
    let mut world = world!();
    let facts = world.enrol().allowing();
    world.install(facts);
    let mut client = world.client("connect 10.77.0.2:80;pause;connect 10.77.0.2:80");
    let flow = answer(&world);
    let agent = flow.socket.local_addr().unwrap();
    client.line();
    // Nothing of the connection may be left: it would keep the port from the thief.
    flow.socket.set_zero_linger().unwrap();
    drop(flow);
    world.kill_agent();
    let mut thief = world.stranger(&format!("listen {agent};accept"));
    assert_eq!(thief.line(), "listening");
    client.go_on();
    assert_eq!(client.line(), "ECONNREFUSED");
}

#[test]
fn the_guard_drops_what_did_not_come_through_the_connect_hook() {
    let mut world = world!();
    let facts = world.enrol().allowing();
    world.install(facts);
    let _server = TcpListener::bind(SERVER).unwrap();
    // This process is outside the covered cgroup.
    let dialled = std::net::TcpStream::connect_timeout(&SERVER.parse().unwrap(), Duration::from_millis(300));
    assert_eq!(dialled.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    assert!(world.count(counter::GUARD_DROPPED) >= 1);
    assert_eq!(world.refusal().reason, REASON_GUARD);
    // The agent's own connection is let through, though it comes from the same process.
    let door = world.door();
    world.run(door.dialler().dial(SERVER.parse().unwrap(), None)).unwrap();
}

#[test]
fn udp_to_a_mesh_destination_needs_a_rule() {
    let mut world = world!();
    let facts = world.enrol().allowing();
    world.install(facts.clone());
    let script = "udp-send 10.77.0.2:80;udp-connect 10.77.0.2:80;udp-send [fd77::2]:80;udp-send 10.77.0.2:81";
    let mut client = world.client(script);
    assert_eq!([client.line(), client.line(), client.line(), client.line()], ["EPERM", "EPERM", "EPERM", "sent"]);
    assert_eq!(world.refusal().reason, REASON_UDP);
    assert_eq!(world.count(counter::UDP_REFUSED), 3);
    let mut stranger = world.stranger("udp-send 10.77.0.2:80");
    assert_eq!(stranger.line(), "sent");

    world.install(facts.verdict(1, 17, VERDICT_BYPASS));
    let mut client = world.client(script);
    assert_eq!([client.line(), client.line(), client.line(), client.line()], ["sent", "connected", "EPERM", "sent"]);
    assert_eq!(world.count(counter::UDP_ALLOWED), 2);
}

#[test]
fn a_protected_listener_is_reached_through_the_agent_and_sees_the_true_client() {
    let mut world = world!();
    let facts = world.enrol();
    world.install(facts);
    for (at, to, from) in [
        ("0.0.0.0:8080", "10.77.0.2:8080", "10.77.0.1"),
        ("[::]:8081", "[fd77::2]:8081", "fd77::1"),
        ("[::]:8082", "10.77.0.2:8082", "10.77.0.1"),
    ] {
        let mut server = world.client(&format!("listen {at};accept;read;close"));
        assert_eq!(server.line(), "listening");
        let listening = world.notice(|notice| match notice {
            KernelEvent::Listening(listening) => Some(*listening),
            _ => None,
        });
        assert_eq!(listening.address(), at.parse().unwrap());
        assert_eq!(listening.mode(), LISTENER_PROTECTED);
        assert_eq!((listening.row.owner.tgid, listening.row.owner.workload), (server.pid(), WORKLOAD));

        let mut remote = world.stranger(&format!(
            "connect {to} from {}",
            if from.contains(':') { format!("[{from}]:7000") } else { format!("{from}:7000") }
        ));
        let door = world.door();
        let flow = world.run(door.accept_inbound()).unwrap();
        assert_eq!(flow.direction(), Direction::Inbound);
        assert_eq!(flow.destination, OriginalDst(to.parse().unwrap()));
        assert_eq!((flow.source.ip().to_string(), flow.source.port()), (from.to_string(), 7000));
        assert_eq!(
            (flow.task().unwrap().tgid, flow.listens().map(|listens| listens.cookie)),
            (server.pid(), Some(listening.cookie))
        );
        assert!(remote.line().starts_with("connected"));

        let mut upstream = world
            .run(door.dialler().upstream(flow.destination, flow.source, flow.listens().unwrap().who, Opening::NoData))
            .unwrap();
        world.run(upstream.write_all(b"hello")).unwrap();
        let shown = match at.starts_with('[') && !from.contains(':') {
            true => format!("[::ffff:{from}]:7000"),
            false => flow.source.to_string(),
        };
        let local = if at.starts_with('[') && !from.contains(':') {
            "[::ffff:10.77.0.2]:8082".to_string()
        } else {
            to.to_string()
        };
        assert_eq!(server.line(), format!("accepted from {shown}, peer {shown} at {local}"));
        assert_eq!(server.line(), "hello");
        assert_eq!(server.line(), "closed");
        let closed = world.notice(|notice| match notice {
            KernelEvent::Closed(cookie) => Some(*cookie),
            _ => None,
        });
        assert_eq!(closed, listening.cookie);
    }
    assert_eq!(world.count(counter::UPSTREAMS_ADMITTED), 3);
    assert_eq!(world.count(counter::REDIRECTED_INBOUND), 3);
}

/// An upstream connection to whoever listens there now.
async fn upstream(
    door: &ShardListeners,
    to: OriginalDst,
    client: SocketAddr,
    opening: Opening,
) -> Result<TcpStream, Error> {
    let dialler = door.dialler();
    dialler.upstream(to, client, dialler.look(to, false)?.who, opening).await
}

#[test]
fn first_bytes_arrive_with_the_connection_and_without_them_it_comes_a_little_later() {
    let mut world = world!();
    let facts = world.enrol();
    world.install(facts);
    let mut server = world.client("listen 10.77.0.2:8080;accept;read;accept");
    assert_eq!(server.line(), "listening");
    let door = world.door();
    let (to, client) = (OriginalDst("10.77.0.2:8080".parse().unwrap()), "10.77.0.1:7000".parse().unwrap());
    let mut first = world.run(upstream(&door, to, client, Opening::EarlyData)).unwrap();
    world.run(first.write_all(b"hello")).unwrap();
    assert!(server.line().starts_with("accepted"));
    assert_eq!(server.line(), "hello");
    let began = Instant::now();
    let _upstream = world.run(upstream(&door, to, client, Opening::EarlyData)).unwrap();
    assert!(server.line().starts_with("accepted"));
    let took = began.elapsed();
    assert!((100..10_000).contains(&took.as_millis()), "the handshake's last segment waited {took:?}");
}

#[test]
fn nobody_imitates_the_agents_last_leg() {
    let mut world = world!();
    let facts = world.enrol();
    world.install(facts);
    let mut server = world.client("listen 10.77.0.2:8080;accept;read");
    assert_eq!(server.line(), "listening");
    let door = world.door();
    let to = OriginalDst("10.77.0.2:8080".parse().unwrap());
    let upstream = world.run(upstream(&door, to, "10.77.0.1:7000".parse().unwrap(), Opening::NoData)).unwrap();
    let had = upstream.local_addr().unwrap();
    server.line();
    upstream.set_zero_linger().unwrap();
    drop(upstream);
    assert_eq!(server.line(), "ECONNRESET");
    // The very address that the upstream connection has just had leads to the agent now.
    let _imitator = world.stranger(&format!("connect 10.77.0.2:8080 from {had}"));
    assert_eq!(world.run(door.accept_inbound()).unwrap().source, had);
    assert_eq!(world.count(counter::UPSTREAMS_ADMITTED), 1);
}

#[test]
fn a_protected_listener_of_a_dead_agent_refuses() {
    let mut world = world!();
    let facts = world.enrol();
    world.install(facts);
    let mut server = world.client("listen 10.77.0.2:8080;accept");
    assert_eq!(server.line(), "listening");
    world.kill_agent();
    let mut remote = world.stranger("connect 10.77.0.2:8080");
    assert_eq!(remote.line(), "ECONNREFUSED");
}

#[test]
fn an_address_that_policy_protects_is_protected_before_anybody_listens() {
    let mut world = world!();
    let mut facts = world.enrol();
    facts.policy.protected = vec![("0.0.0.0".parse().unwrap(), 8080)];
    world.install(facts.clone());
    let mut server = world.stranger("listen 10.77.0.2:9090;listen 0.0.0.0:8080;accept");
    assert_eq!(server.line(), "listening");
    assert_eq!(server.line(), "listening");
    let _remote = world.stranger("connect 10.77.0.2:8080");
    let door = world.door();
    world.run(door.accept_inbound()).unwrap();
    // The listener without an identity next to it is left alone.
    assert!(std::net::TcpStream::connect("10.77.0.2:9090").is_err() || world.count(counter::REDIRECTED_INBOUND) == 1);

    // Its owner cannot be said to be harmless, until policy lets go of the address.
    let listening = world.programs().listeners().unwrap();
    let row = listening.iter().find(|row| row.address().port() == 8080).unwrap();
    assert!(world.programs().set_listener_mode(row, LISTENER_LEFT_ALONE, None).unwrap());
    let _remote = world.stranger("connect 10.77.0.2:8080");
    world.run(door.accept_inbound()).unwrap();
    facts.policy.protected.clear();
    world.install(facts);
    assert!(world.programs().set_listener_mode(row, LISTENER_LEFT_ALONE, None).unwrap());
    let mut remote = world.stranger("connect 10.77.0.2:8080");
    assert!(remote.line().starts_with("connected"));
    assert!(server.line().starts_with("accepted"));
}

#[test]
fn an_address_stays_protected_while_another_socket_shares_it() {
    let mut world = world!();
    let facts = world.enrol();
    world.install(facts);
    let mut server = world.client("share 10.77.0.2:8080;share 10.77.0.2:8080;pause;unshare;pause;unshare");
    assert_eq!([server.line(), server.line()], ["shared", "shared"]);
    server.go_on();
    assert_eq!(server.line(), "unshared");
    let protected = |world: &mut World| {
        let _remote = world.stranger("connect 10.77.0.2:8080");
        let door = world.door();
        world.run(door.accept_inbound()).unwrap()
    };
    protected(&mut world);
    world.listen_for(Duration::from_millis(100));
    let flow = protected(&mut world);
    assert_eq!(flow.task().unwrap().tgid, server.pid());
    server.go_on();
    assert_eq!(server.line(), "unshared");
    world.listen_for(Duration::from_millis(100));
    let mut remote = world.stranger("connect 10.77.0.2:8080");
    assert_eq!(remote.line(), "ECONNREFUSED");
    assert!(world.programs().listeners().unwrap().is_empty());
}

#[test]
fn the_owner_of_a_listener_that_was_never_bound_is_found() {
    let mut world = world!();
    let facts = world.enrol();
    world.install(facts);
    let mut server = world.client("listen-unbound");
    let at: std::net::SocketAddr = server.line().parse().unwrap();
    let listening = world.notice(|notice| match notice {
        KernelEvent::Listening(listening) => Some(*listening),
        _ => None,
    });
    assert_eq!(listening.address(), at);
    assert_eq!((listening.row.owner.tgid, listening.mode()), (server.pid(), LISTENER_PROTECTED));
}

#[test]
fn a_listener_from_before_the_agent_is_found_with_its_owner() {
    let mut world = world!();
    world.kill_agent();
    world.release();
    let mut server = world.client("listen [::]:8080;accept;read");
    assert_eq!(server.line(), "listening");
    world.try_start().unwrap();
    let facts = world.enrol();
    world.install(facts);
    let listening = world.programs().listeners().unwrap();
    let row = listening.iter().find(|row| row.address().port() == 8080).unwrap();
    assert_eq!((row.row.owner.tgid, row.mode(), row.row.key.ipv6_only), (server.pid(), LISTENER_UNDECIDED, 0));
    let owner = Task { workload: WORKLOAD, ..row.row.owner };
    assert!(world.programs().set_listener_mode(row, LISTENER_PROTECTED, Some(owner)).unwrap());
    let _remote = world.stranger("connect 10.77.0.2:8080");
    let door = world.door();
    let flow = world.run(door.accept_inbound()).unwrap();
    assert_eq!(flow.task().unwrap().workload, WORKLOAD);
}

#[test]
fn where_no_note_can_be_made_on_a_socket_its_row_tells_who_bound_it() {
    let mut world = world!();
    let facts = world.enrol().allowing();
    world.install(facts);
    // A limit of the network namespace since Linux 6.9; before, of the host.
    if std::fs::write("/proc/sys/net/core/optmem_max", "1").is_err() {
        eprintln!(
            "SKIPPED (no room for options by network namespace): \
             where_no_note_can_be_made_on_a_socket_its_row_tells_who_bound_it"
        );
        return;
    }
    let _server = TcpListener::bind("10.77.0.2:81").unwrap();
    assert_eq!(world.stranger("connect 10.77.0.2:81").line(), "connected to 10.77.0.2:81 from 10.77.0.2");
    let listening = world.programs().listeners().unwrap();
    let row = listening.iter().find(|row| row.address().port() == 81).unwrap().row;
    assert_eq!((row.binder.tgid, row.bound), (std::process::id(), LISTENER_LEFT_ALONE));
}

#[test]
fn a_connection_from_before_is_listed_and_can_be_killed() {
    let mut world = world!();
    world.kill_agent();
    world.release();
    let server = TcpListener::bind(SERVER).unwrap();
    let mut client = world.client("connect 10.77.0.2:80;read");
    assert!(client.line().starts_with("connected"));
    let (mut accepted, _) = server.accept().unwrap();
    accepted.write_all(b"").unwrap();
    world.try_start().unwrap();
    let facts = world.enrol();
    world.install(facts);
    let old = world.programs().preexisting(|to| to == SERVER.parse().unwrap()).unwrap();
    assert_eq!(old.len(), 1);
    assert!(old[0].outbound);
    assert_eq!(old[0].remote, SERVER.parse().unwrap());
    assert!(world.programs().kill(&old[0]).unwrap());
    assert_eq!(client.line(), "ECONNABORTED");
    assert!(!world.programs().kill(&old[0]).unwrap());
}

#[test]
fn a_cgroup_that_appears_later_is_classified() {
    let mut world = world!();
    world.install(Facts::enrolling("late").allowing());
    let late = world.cgroup.join("late");
    std::fs::create_dir(&late).unwrap();
    let dials_from_there = |world: &World| {
        let mut client = world.client_in(&late, "connect 10.77.0.2:80");
        let flow = answer(world);
        client.line();
        flow.task().unwrap().workload
    };
    // Before the agent has heard of the cgroup, the kernel leaves the decision to it.
    assert_eq!(dials_from_there(&world), 0);
    world.listen_for(Duration::from_millis(100));
    assert_eq!(dials_from_there(&world), WORKLOAD);
}

#[test]
fn a_cgroup_for_which_there_is_no_room_stays_unknown_and_ends_nothing() {
    let mut world = world!();
    world.kill_agent();
    world.release();
    // A quarter of it is for cgroups: one row, and a class needs two.
    world.options.sizes = vec![(map::CANDIDATES, 4)];
    world.try_start().unwrap();
    let late = world.cgroup.join("late");
    // Of other worlds there may be others of this name.
    let name = format!("{}/late", world.cgroup.file_name().unwrap().to_str().unwrap());
    world.install(Facts { uids: vec![0, 1], ..Facts::enrolling(&name).allowing() });
    std::fs::create_dir(&late).unwrap();
    let full = |notice: &KernelEvent| match notice {
        KernelEvent::Trouble(Work::Cgroups, Error::MapFull { map }) => Some(*map),
        _ => None,
    };
    assert_eq!(world.notice(full), map::CGROUPS);
    for _ in 0..2 {
        // Half a class is none: the agent is asked, whoever dials there.
        let mut client = world.client_in(&late, "connect 10.77.0.2:80");
        let flow = answer(&world);
        client.line();
        assert_eq!(flow.task().unwrap().workload, 0);
        assert!(world.programs().retry().is_err());
    }
    // There is room again.
    world.install(Facts::enrolling(&name).allowing());
    world.programs().retry().unwrap();
    let mut client = world.client_in(&late, "connect 10.77.0.2:80");
    assert_eq!(answer(&world).task().unwrap().workload, WORKLOAD);
    client.line();
}

#[test]
fn a_policy_that_does_not_fit_changes_nothing() {
    let mut world = world!();
    world.kill_agent();
    world.release();
    world.options.sizes = vec![(map::DESTINATIONS, 8)];
    world.try_start().unwrap();
    let facts = world.enrol().allowing();
    assert_eq!(world.install(facts.clone()), 1);
    let mut big = facts;
    big.policy.destinations = (1..=20)
        .map(|number| world::destination(number, &format!("10.77.0.{number}/32"), Some(80), MODE_MESH))
        .collect();
    let refused = world.programs().install(Arc::new(big) as Arc<dyn KernelFacts>).unwrap_err();
    assert!(matches!(refused, Error::MapFull { map: map::DESTINATIONS }));
    assert_eq!(world.programs().generation(), 1);
    let mut client = world.client("connect 10.77.0.2:80");
    answer(&world);
    assert_eq!(client.line(), "connected to 10.77.0.2:80 from 10.77.0.2");
    let again = world.enrol().allowing();
    assert_eq!(world.install(again), 2);
}

#[test]
fn a_connection_that_cannot_be_remembered_is_refused() {
    let mut world = world!();
    world.kill_agent();
    world.release();
    world.options.sizes = vec![(map::FLOWS, 1)];
    world.try_start().unwrap();
    let facts = world.enrol().allowing();
    world.install(facts);
    let mut first = world.client("connect 10.77.0.2:80;pause;close;pause");
    answer(&world);
    first.line();
    let mut second = world.client_of(1, "connect 10.77.0.2:80");
    assert_eq!(second.line(), "EPERM");
    assert_eq!(world.refusal().reason, REASON_MAP_FULL);
    // A closed socket gives its room back.
    first.go_on();
    first.line();
    let mut third = world.client("connect 10.77.0.2:80");
    answer(&world);
    assert_eq!(third.line(), "connected to 10.77.0.2:80 from 10.77.0.2");
}

#[test]
fn a_refusal_that_repeats_is_told_seldom_and_each_is_counted() {
    let mut world = world!();
    let facts = world.enrol().allowing();
    world.install(facts);
    let began = std::time::Instant::now();
    let mut stranger = world.stranger(&["connect 10.77.0.2:80"; 2000].join(";"));
    assert!((0..2000).all(|_| stranger.line() == "EPERM"));
    let found = world.refusals();
    assert_eq!(found.iter().map(|refused| refused.count).sum::<u64>(), 2000);
    assert!(found.len() as u64 <= 3 + began.elapsed().as_secs(), "{} events", found.len());
    assert!(found.iter().all(|refused| refused.event.task.tgid == stranger.pid() && refused.last_age <= refused.age));
    assert!(world.refusals().is_empty());
    assert_eq!(world.count(counter::REFUSED_NO_IDENTITY), 2000);
    // The next agent begins where this one has left off.
    world.kill_agent();
    world.try_start().unwrap();
    assert!(world.refusals().iter().map(|refused| refused.count).sum::<u64>() < 2000);
}

#[test]
fn a_user_who_is_refused_everywhere_is_told_of_without_destinations() {
    let mut world = world!();
    let mut facts = world.enrol().allowing();
    facts.policy.destinations[0].port = None;
    world.install(facts);
    let began = std::time::Instant::now();
    let script: Vec<String> = (1..=500).map(|port| format!("connect 10.77.0.2:{port}")).collect();
    let mut stranger = world.stranger(&script.join(";"));
    assert!((1..=500).all(|_| stranger.line() == "EPERM"));
    let found = world.refusals();
    assert_eq!(found.iter().map(|refused| refused.count).sum::<u64>(), 500);
    let most = (u64::from(REFUSALS_PER_UID) + 2) * (1 + began.elapsed().as_secs());
    assert!(found.len() as u64 <= most, "{} events", found.len());
    assert!(found.iter().any(|refused| refused.event.destination_port == 0 && refused.count > 100));
}

#[test]
fn a_refusal_that_there_is_no_room_to_count_is_counted_as_lost() {
    let mut world = world!();
    world.kill_agent();
    world.release();
    world.options.sizes = vec![(map::REFUSALS, 1)];
    world.try_start().unwrap();
    let mut facts = world.enrol().allowing();
    facts.policy.destinations[0].port = None;
    world.install(facts);
    let script: Vec<String> = (1..=20).map(|port| format!("connect 10.77.0.2:{port}")).collect();
    let mut stranger = world.stranger(&script.join(";"));
    assert!((1..=20).all(|_| stranger.line() == "EPERM"));
    let told = world.refusals().iter().map(|refused| refused.count).sum::<u64>();
    assert_eq!((told, world.programs().events_lost().unwrap()), (1, 19));
}

#[test]
fn one_user_takes_a_quarter_of_the_flows_and_leaves_the_others_to_others() {
    let mut world = world!();
    world.kill_agent();
    world.release();
    world.options.sizes = vec![(map::FLOWS, 12)];
    world.try_start().unwrap();
    let facts = world.enrol().allowing();
    world.install(facts);
    let open = |world: &mut World| {
        let mut client = world.client("connect 10.77.0.2:80;pause;close;pause");
        answer(world);
        assert_eq!(client.line(), "connected to 10.77.0.2:80 from 10.77.0.2");
        client
    };
    let mut clients: Vec<Client> = (0..3).map(|_| open(&mut world)).collect();
    let mut fourth = world.client("connect 10.77.0.2:80");
    assert_eq!(fourth.line(), "EPERM");
    assert_eq!(world.refusal().reason, REASON_QUOTA);
    let mut other = world.client_of(1, "connect 10.77.0.2:80");
    answer(&world);
    assert_eq!(other.line(), "connected to 10.77.0.2:80 from 10.77.0.2");
    // Over and over: what is taken is given back once.
    for _ in 0..5 {
        let mut closing = clients.pop().unwrap();
        closing.go_on();
        assert_eq!(closing.line(), "closed");
        clients.push(open(&mut world));
        let mut fourth = world.client("connect 10.77.0.2:80");
        assert_eq!(fourth.line(), "EPERM");
    }
}

#[test]
fn one_user_takes_a_quarter_of_the_sockets_and_leaves_the_others_to_others() {
    let mut world = world!();
    world.kill_agent();
    world.release();
    let listen = |world: &World, uid: u32, port: u16| {
        let mut server = world.client_of(uid, &format!("listen 127.0.0.1:{port};pause;close;pause"));
        (server.line(), server)
    };
    // From before the agent, and more than one may have: what has no row is refused, and ends nothing.
    let before: Vec<_> = (0..6).map(|index| listen(&world, 2, 7100 + index)).collect();
    world.options.sizes = vec![(map::SOCKETS, 16)];
    world.try_start().unwrap();
    let facts = world.enrol().allowing();
    world.install(facts);
    assert_eq!((before.len(), world.programs().listeners().unwrap().len()), (6, 4));

    let mut servers: Vec<_> = (0..4).map(|index| listen(&world, 0, 7200 + index)).collect();
    assert!(servers.iter().all(|(said, _)| said == "listening"));
    assert_eq!(listen(&world, 0, 7300).0, "EPERM");
    assert_eq!(listen(&world, 1, 7301).0, "listening");
    // Over and over: what is taken is given back once.
    for _ in 0..5 {
        let (_, mut closing) = servers.pop().unwrap();
        closing.go_on();
        assert_eq!(closing.line(), "closed");
        servers.push(listen(&world, 0, 7203));
        assert_eq!(servers.last().unwrap().0, "listening");
        assert_eq!(listen(&world, 0, 7300).0, "EPERM");
    }
    // And as many as somebody else has.
    drop(before);
    let after: Vec<_> = (0..5).map(|index| listen(&world, 2, 7100 + index)).collect();
    let said: Vec<_> = after.iter().map(|(said, _)| said).collect();
    assert_eq!(said, ["listening", "listening", "listening", "listening", "EPERM"]);
}

#[test]
fn a_listener_that_the_kernel_had_no_room_to_tell_of_is_found() {
    let mut world = world!();
    world.kill_agent();
    world.release();
    world.options.sizes = vec![(map::EVENTS, 4096)];
    world.try_start().unwrap();
    let facts = world.enrol().verdict(1, 17, VERDICT_BYPASS);
    world.install(facts);
    assert_eq!(world.programs().events_lost().unwrap(), 0);
    let mut passing = world.client(&["udp-connect 10.77.0.2:80"; 40].join(";"));
    assert!((0..40).all(|_| passing.line() == "connected"));
    let mut server = world.client("listen 10.77.0.2:8080;pause");
    assert_eq!(server.line(), "listening");
    let lost = world.count(counter::EVENTS_LOST);
    assert!((10..=41).contains(&lost), "{lost} of 41 events, each of 136 bytes");
    assert_eq!(world.programs().events_lost().unwrap(), lost);
    world.listen_for(Duration::from_millis(100));
    assert_eq!(world.programs().listeners().unwrap().len(), 1);
}

#[test]
fn a_ring_buffer_of_another_size_is_adopted() {
    let mut world = world!();
    world.kill_agent();
    world.release();
    world.options.sizes = vec![(map::EVENTS, 1 << 20)];
    world.try_start().unwrap();
    let facts = world.enrol().verdict(1, 17, VERDICT_BYPASS);
    world.install(facts);
    world.kill_agent();
    world.options.sizes = Vec::new();
    world.try_start().unwrap();
    // More than the ring that this agent would have made holds.
    let mut passing = world.client(&["udp-connect 10.77.0.2:80"; 3000].join(";"));
    for _ in 0..3000 {
        assert_eq!(passing.line(), "connected");
    }
    for _ in 0..3000 {
        let by = world.notice(|notice| match notice {
            KernelEvent::Bypassed(event) => Some(event.task.tgid),
            _ => None,
        });
        assert_eq!(by, passing.pid());
    }
    assert_eq!(world.programs().events_lost().unwrap(), 0);
}

#[test]
fn a_second_agent_on_the_namespace_is_refused() {
    let mut world = world!();
    let mut options = world.options.clone();
    assert!(matches!(wimsey::intercept::Programs::load(&options), Err(Error::SecondAgent { .. })));
    let elsewhere = tempfile::tempdir().unwrap();
    options.run_dir = elsewhere.path().into();
    assert!(matches!(wimsey::intercept::Programs::load(&options), Err(Error::SecondAgent { .. })));
    assert!(world.count(counter::REDIRECTED) == 0);
}

#[test]
fn what_is_released_is_as_if_nothing_had_been_there() {
    let mut world = world!();
    let facts = world.enrol().allowing();
    world.install(facts);
    world.kill_agent();
    let _server = TcpListener::bind(SERVER).unwrap();
    assert!(world.release());
    let mut stranger = world.stranger("connect 10.77.0.2:80");
    assert_eq!(stranger.line(), "connected to 10.77.0.2:80 from 10.77.0.2");
    assert!(!world.release());
}

#[test]
fn other_agents_of_the_host_hear_of_a_release() {
    let mut world = world!();
    let facts = world.enrol().allowing();
    world.install(facts);
    let served = format!("/sys/fs/bpf/wimsey/abi{ABI}-{}", map::SERVED);
    let served: wimsey_sys::bpf::Table<u64, u32> = wimsey_sys::bpf::Table::open(Path::new(&served)).unwrap();
    let probe = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let own = wimsey_sys::netns_cookie(probe.as_fd()).unwrap();
    assert_eq!(served.get(&own).unwrap(), Some(1));
    world.kill_agent();
    assert_eq!(served.get(&own).unwrap(), Some(1), "what a dead agent leaves protects this namespace");
    assert!(world.release());
    assert_eq!(served.get(&own).unwrap(), None);
}

#[test]
fn without_a_policy_everything_is_left_alone() {
    let world = world!();
    let _server = TcpListener::bind(SERVER).unwrap();
    let mut client = world.client("connect 10.77.0.2:80");
    assert_eq!(client.line(), "connected to 10.77.0.2:80 from 10.77.0.2");
}

#[test]
fn two_agents_in_two_namespaces_leave_each_other_alone() {
    let mut first = world!();
    let facts = first.enrol().allowing();
    first.install(facts);
    // A second namespace on another thread, where the same address is no mesh destination, dialled from outside any
    // covered cgroup: the first agent's guard sees those packets too.
    std::thread::Builder::new()
        .name("second".into())
        .spawn(|| {
            let mut second = World::new("second").unwrap();
            second.install(Facts::enrolling("nobody"));
            second.install(Facts::default());
            let _server = TcpListener::bind(SERVER).unwrap();
            std::net::TcpStream::connect_timeout(&SERVER.parse().unwrap(), Duration::from_secs(2)).unwrap();
        })
        .unwrap()
        .join()
        .unwrap();
    assert_eq!(first.count(counter::GUARD_DROPPED), 0);
}
