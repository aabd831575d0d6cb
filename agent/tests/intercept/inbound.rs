//! Listening sockets: who owns one, what protects it, and the agent's upstream connection to it.

use crate::world::{WORKLOAD, World, world};
use bunter::flow::{Direction, OriginalDst};
use bunter::intercept::{Error, KernelEvent, Opening, ShardListeners};
use bunter_common::*;
use std::{
    net::{SocketAddr, TcpListener},
    time::{Duration, Instant},
};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

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
        let shard = world.shard();
        let flow = world.run(shard.accept_inbound()).unwrap();
        assert_eq!(flow.direction(), Direction::Inbound);
        assert_eq!(flow.destination, OriginalDst(to.parse().unwrap()));
        assert_eq!((flow.source.ip().to_string(), flow.source.port()), (from.to_string(), 7000));
        assert_eq!(
            (flow.task().unwrap().tgid, flow.listens().map(|listens| listens.cookie)),
            (server.pid(), Some(listening.cookie))
        );
        assert!(remote.line().starts_with("connected"));

        let mut upstream = world
            .run(shard.dialler().upstream(flow.destination, flow.source, flow.listens().unwrap().who, Opening::NoData))
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
    shard: &ShardListeners,
    to: OriginalDst,
    client: SocketAddr,
    opening: Opening,
) -> Result<TcpStream, Error> {
    let dialler = shard.dialler();
    dialler.upstream(to, client, dialler.look(to, false)?.who, opening).await
}

#[test]
fn first_bytes_arrive_with_the_connection_and_without_them_it_comes_a_little_later() {
    let mut world = world!();
    let facts = world.enrol();
    world.install(facts);
    let mut server = world.client("listen 10.77.0.2:8080;accept;read;accept");
    assert_eq!(server.line(), "listening");
    let shard = world.shard();
    let (to, client) = (OriginalDst("10.77.0.2:8080".parse().unwrap()), "10.77.0.1:7000".parse().unwrap());
    let mut first = world.run(upstream(&shard, to, client, Opening::EarlyData)).unwrap();
    world.run(first.write_all(b"hello")).unwrap();
    assert!(server.line().starts_with("accepted"));
    assert_eq!(server.line(), "hello");
    let began = Instant::now();
    let _upstream = world.run(upstream(&shard, to, client, Opening::EarlyData)).unwrap();
    assert!(server.line().starts_with("accepted"));
    let took = began.elapsed();
    assert!((100..10_000).contains(&took.as_millis()), "the handshake's last segment waited {took:?}");
}

#[test]
fn nobody_imitates_the_agents_upstream_connection() {
    let mut world = world!();
    let facts = world.enrol();
    world.install(facts);
    let mut server = world.client("listen 10.77.0.2:8080;accept;read");
    assert_eq!(server.line(), "listening");
    let shard = world.shard();
    let to = OriginalDst("10.77.0.2:8080".parse().unwrap());
    let upstream = world.run(upstream(&shard, to, "10.77.0.1:7000".parse().unwrap(), Opening::NoData)).unwrap();
    let had = upstream.local_addr().unwrap();
    server.line();
    upstream.set_zero_linger().unwrap();
    drop(upstream);
    assert_eq!(server.line(), "ECONNRESET");
    // The very address that the upstream connection has just had leads to the agent now.
    let _imitator = world.stranger(&format!("connect 10.77.0.2:8080 from {had}"));
    assert_eq!(world.run(shard.accept_inbound()).unwrap().source, had);
    assert_eq!(world.count(counter::UPSTREAMS_ADMITTED), 1);
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
    let shard = world.shard();
    world.run(shard.accept_inbound()).unwrap();
    // The listener without an identity next to it is left alone.
    assert!(std::net::TcpStream::connect("10.77.0.2:9090").is_err() || world.count(counter::REDIRECTED_INBOUND) == 1);

    // Its owner cannot be said to be harmless, until policy lets go of the address.
    let listening = world.programs().listeners().unwrap();
    let row = listening.iter().find(|row| row.address().port() == 8080).unwrap();
    assert!(world.programs().set_listener_mode(row, LISTENER_LEFT_ALONE, None).unwrap());
    let _remote = world.stranger("connect 10.77.0.2:8080");
    world.run(shard.accept_inbound()).unwrap();
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
        let shard = world.shard();
        world.run(shard.accept_inbound()).unwrap()
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
    let shard = world.shard();
    let flow = world.run(shard.accept_inbound()).unwrap();
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
