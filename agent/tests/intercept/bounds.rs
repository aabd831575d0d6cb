//! What has a bound: the tables of the kernel, one user's share of them, and what is told of refusals.

use crate::{
    answer,
    world::{self, Client, Facts, WORKLOAD, World, world},
};
use bunter::intercept::{Error, KernelEvent, KernelFacts, Work};
use bunter_common::*;
use std::{sync::Arc, time::Duration};

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
