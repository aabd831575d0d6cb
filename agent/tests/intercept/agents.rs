//! One agent after another, and one beside another: what a dead one leaves, what the next one takes over, what a
//! release takes away.

use crate::{
    answer,
    world::{Facts, SERVER, World, world},
};
use bunter::flow::OriginalDst;
use bunter::intercept::{Error, KernelEvent};
use bunter_common::*;
use std::{io::Write, net::TcpListener, os::fd::AsFd, path::Path, time::Duration};

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
    assert!(matches!(bunter::intercept::Programs::load(&options), Err(Error::SecondAgent { .. })));
    let elsewhere = tempfile::tempdir().unwrap();
    options.run_dir = elsewhere.path().into();
    assert!(matches!(bunter::intercept::Programs::load(&options), Err(Error::SecondAgent { .. })));
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
    let served = format!("/sys/fs/bpf/bunter/abi{ABI}-{}", map::SERVED);
    let served: bunter_sys::bpf::Table<u64, u32> = bunter_sys::bpf::Table::open(Path::new(&served)).unwrap();
    let probe = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let own = bunter_sys::netns_cookie(probe.as_fd()).unwrap();
    assert_eq!(served.get(&own).unwrap(), Some(1));
    world.kill_agent();
    assert_eq!(served.get(&own).unwrap(), Some(1), "what a dead agent leaves protects this namespace");
    assert!(world.release());
    assert_eq!(served.get(&own).unwrap(), None);
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
