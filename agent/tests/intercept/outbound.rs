//! What a program dials: which connections come to the agent and with what origin, which go their own way, and which
//! are refused.

use crate::{
    answer,
    world::{self, Facts, HERE, SERVER, SERVER6, WORKLOAD, World, world},
};
use bunter::flow::{Direction, OriginalDst};
use bunter::intercept::KernelEvent;
use bunter_common::*;
use std::{net::TcpListener, time::Duration};
use tokio::io::AsyncReadExt;

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
    let shard = world.shard();
    let dialled = world.run(shard.dialler().dial(SERVER.parse().unwrap(), flow.dial_from())).unwrap();
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
    let shard = world.shard();
    world.run(shard.dialler().dial(SERVER.parse().unwrap(), None)).unwrap();
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
fn without_a_policy_everything_is_left_alone() {
    let world = world!();
    let _server = TcpListener::bind(SERVER).unwrap();
    let mut client = world.client("connect 10.77.0.2:80");
    assert_eq!(client.line(), "connected to 10.77.0.2:80 from 10.77.0.2");
}
