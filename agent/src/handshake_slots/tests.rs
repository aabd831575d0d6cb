use super::queue::{Answer, Entry, Queue};
use super::*;
use crate::whence::Whence;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::time::Duration;

fn id(name: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://example.org/{name}")).unwrap()
}

fn workload(name: &str) -> Tenant {
    Tenant::workload(id(name))
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

#[test]
fn a_crowd_does_not_make_others_wait() {
    let mut queue = Queue::new(8, 100);
    let mut ask = |tenant: &'static str, number: u32| queue.ask(&[tenant], number);
    // One tenant has half of the slots at most: the others are for tenants that come later.
    for number in 0..4 {
        assert_eq!(ask("crowd", number), Answer::Now);
    }
    for number in 4..50 {
        assert!(matches!(ask("crowd", number), Answer::Wait { refused: None, .. }));
    }
    assert_eq!(ask("one", 0), Answer::Now);
    assert_eq!(ask("two", 0), Answer::Now);
}

#[test]
fn those_who_wait_are_served_in_turn_and_each_line_in_order() {
    let mut queue = Queue::new(1, 100);
    assert_eq!(queue.ask(&["busy"], 0), Answer::Now);
    for number in 0..4 {
        queue.ask(&["crowd"], number);
    }
    for number in 0..2 {
        queue.ask(&["one"], number);
        queue.ask(&["two"], number);
    }
    let (mut key, mut order) = ("busy", Vec::new());
    while let Some((next, number)) = queue.done(&[key]).pop() {
        key = next[0];
        order.push((key, number));
    }
    let expected =
        [("crowd", 0), ("one", 0), ("two", 0), ("crowd", 1), ("one", 1), ("two", 1), ("crowd", 2), ("crowd", 3)];
    assert_eq!(order, expected);
    assert_eq!(queue.free(), 1);
}

#[test]
fn where_there_is_no_room_the_newest_of_the_longest_line_goes() {
    let mut queue = Queue::new(1, 4);
    queue.ask(&["busy"], 0);
    for number in 0..4 {
        queue.ask(&["crowd"], number);
    }
    // The crowd itself gets no more places; another tenant gets one until both lines are equally long.
    assert_eq!(queue.ask(&["crowd"], 4), Answer::Full { own: 4 });
    assert!(matches!(queue.ask(&["one"], 0), Answer::Wait { refused: Some((of, 3, 4)), .. } if *of == ["crowd"]));
    assert!(matches!(queue.ask(&["one"], 1), Answer::Wait { refused: Some((of, 2, 3)), .. } if *of == ["crowd"]));
    assert_eq!(queue.ask(&["one"], 2), Answer::Full { own: 2 });
    assert!(matches!(queue.ask(&["two"], 0), Answer::Wait { refused: Some((of, 1, 2)), .. } if *of == ["one"]));
    assert_eq!(queue.waiting(), 4);
}

#[derive(Clone, Copy, Debug)]
enum Deed {
    Ask(u8),
    Done(usize),
    Leave(usize),
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        5 => (0_u8..9).prop_map(|tenant| Deed::Ask(tenant.saturating_sub(1))),
        3 => any::<usize>().prop_map(Deed::Done),
        1 => any::<usize>().prop_map(Deed::Leave),
    ]
}

/// Tenants of one, two and three steps.
fn path(tenant: u8) -> Box<[u8]> {
    match tenant {
        0..3 => [tenant].into(),
        3..6 => [3, tenant].into(),
        _ => [6, 6 + tenant % 2, tenant].into(),
    }
}

proptest! {
    #[test]
    fn turns_and_waiters_are_never_lost_nor_more_than_there_may_be(
        slots in 1_usize..40, room in 0_usize..12, deeds in prop::collection::vec(deed(), 1..300),
    ) {
        let mut queue = Queue::new(slots, room);
        let mut has: Vec<Box<[u8]>> = Vec::new();
        let mut waits: BTreeMap<u32, (Box<[u8]>, Entry)> = BTreeMap::new();
        // How many wait within the first steps of a tenant.
        let line = |waits: &BTreeMap<u32, (Box<[u8]>, Entry)>, tenant: &[u8]| {
            waits.values().filter(|(of, _)| of.starts_with(tenant)).count()
        };
        for (number, deed) in (0_u32..).zip(deeds) {
            match deed {
                Deed::Ask(tenant) => {
                    let tenant = path(tenant);
                    match queue.ask(&tenant, number) {
                        Answer::Now => has.push(tenant),
                        Answer::Wait { ticket, refused } => {
                            if let Some((of, lost, own)) = refused {
                                prop_assert_eq!(waits.len(), room);
                                prop_assert_eq!(own, line(&waits, &of[..1]));
                                // The first step at which they are not the same is the one that counts.
                                let apart = of.iter().zip(&tenant).take_while(|(of, own)| of == own).count() + 1;
                                prop_assert!(line(&waits, &of[..apart]) > line(&waits, &tenant[..apart]) + 1);
                                prop_assert_eq!(waits.remove(&lost).map(|(of, _)| of), Some(of.clone()));
                                // It was the newest.
                                prop_assert!(waits.iter().all(|(other, (tenant, _))| *tenant != of || *other < lost));
                            }
                            waits.insert(number, (tenant, ticket));
                        }
                        Answer::Full { own } => {
                            prop_assert_eq!((waits.len(), own), (room, line(&waits, &tenant[..1])));
                            prop_assert!((0..7).all(|other| line(&waits, &[other]) <= own + 1));
                        }
                    }
                }
                Deed::Done(at) if !has.is_empty() => {
                    let tenant = has.swap_remove(at % has.len());
                    for (next, number) in queue.done(&tenant) {
                        // The oldest of its line.
                        let first = waits.iter().find(|(_, (of, _))| *of == next).map(|(number, _)| *number);
                        prop_assert_eq!(first, Some(number));
                        waits.remove(&number);
                        has.push(next);
                    }
                }
                Deed::Leave(at) if !waits.is_empty() => {
                    let number = *waits.keys().nth(at % waits.len()).unwrap();
                    let (tenant, ticket) = waits.remove(&number).unwrap();
                    prop_assert_eq!(queue.leave(&tenant, ticket), Some(number));
                    prop_assert_eq!(queue.leave(&tenant, ticket), None);
                }
                Deed::Done(_) | Deed::Leave(_) => {}
            }
            queue.check(slots);
            prop_assert_eq!(slots - queue.free(), has.len());
            prop_assert_eq!(queue.waiting(), waits.len());
        }
        // Whoever waits is served in the end.
        while let Some(tenant) = has.pop() {
            has.extend(queue.done(&tenant).into_iter().map(|(next, number)| { waits.remove(&number); next }));
        }
        prop_assert_eq!((queue.free(), queue.waiting(), waits.len()), (slots, 0, 0));
    }
}

#[test]
fn many_within_a_party_are_one_and_leave_each_other_something() {
    let mut queue = Queue::new(256, 100);
    let (mut site, mut first) = (0, 0);
    // One network takes what it can get, then every other one of its site does.
    while queue.ask(&["site", "first"], ()) == Answer::Now {
        first += 1;
    }
    let others: Vec<String> = (0..100).map(|number| number.to_string()).collect();
    for other in &others {
        while site < 1000 && queue.ask(&["site", other], ()) == Answer::Now {
            site += 1;
        }
    }
    assert_eq!((first, first + site), (112, 128));
    // The lines of that site are long, and other tenants still get slots and room to wait.
    assert_eq!(queue.waiting(), 100);
    assert_eq!(queue.ask(&["other", "one"], ()), Answer::Now);
    for _ in 0..300 {
        queue.ask(&["other", "one"], ());
    }
    assert_eq!((queue.waiting_for(&["site"]), queue.waiting_for(&["other"])), (50, 50));
}

#[tokio::test]
async fn a_slot_passes_on_when_it_is_given_back() {
    let slots = HandshakeSlots::new(1, 10);
    let first = slots.take(workload("curl"), soon()).await.unwrap();
    let waiting = slots.take(workload("web"), soon());
    tokio::pin!(waiting);
    assert!(tokio::time::timeout(Duration::from_millis(20), &mut waiting).await.is_err());
    assert_eq!(slots.waiting(), 1);
    drop(first);
    let second = waiting.await.unwrap();
    assert_eq!((second.tenant.clone(), slots.waiting()), (workload("web"), 0));
    drop(second);
    slots.queue().check(1);
}

#[tokio::test]
async fn whoever_waits_too_long_or_has_no_room_is_told_so_by_name() {
    let slots = HandshakeSlots::new(1, 1);
    let _busy = slots.take(workload("curl"), soon()).await.unwrap();
    let late = slots.take(workload("curl"), Instant::now() + Duration::from_millis(20)).await.unwrap_err();
    assert_eq!((late.code(), late.culprit()), ("handshake-queue-late", Culprit::Host));
    assert!(late.to_string().contains("spiffe://example.org/curl"), "{late}");
    assert_eq!(slots.waiting(), 0);
    let peer = || peer("10.0.0.1", "web");
    let (one, other) = tokio::join!(
        slots.take(peer(), Instant::now() + Duration::from_millis(20)),
        slots.take(peer(), Instant::now() + Duration::from_millis(20)),
    );
    assert_eq!(one.unwrap_err().code(), "handshake-queue-late");
    let full = other.unwrap_err();
    assert_eq!((full.code(), full.culprit()), ("handshake-queue-full", Culprit::Peer));
    let text = full.to_string();
    assert!(text.contains("10.0.0.0/24 to spiffe://example.org/web") && text.contains("[limits] waiting"), "{text}");
}

#[tokio::test]
async fn whoever_loses_its_place_to_another_is_told_at_once() {
    let slots = HandshakeSlots::new(1, 2);
    let _busy = slots.take(workload("curl"), soon()).await.unwrap();
    let crowd: Vec<_> = (0..2)
        .map(|_| {
            let slots = slots.clone();
            tokio::spawn(async move { slots.take(workload("crowd"), soon()).await.map(|_| ()) })
        })
        .collect();
    while slots.waiting() < 2 {
        tokio::task::yield_now().await;
    }
    let other = {
        let slots = slots.clone();
        tokio::spawn(async move { slots.take(workload("one"), soon()).await.map(|_| ()) })
    };
    let [first, newest] = crowd.try_into().map_err(|_| ()).unwrap();
    let refused = newest.await.unwrap().unwrap_err();
    assert_eq!(refused, Error::Full { tenant: workload("crowd"), all: 2, own: 2 });
    assert!(!first.is_finished() && !other.is_finished());
}

#[test]
fn no_turn_is_lost_by_those_who_go_away_while_it_comes() {
    // Many threads take, give up and give back at once: at the end all slots are there.
    let slots = HandshakeSlots::new(4, 16);
    let threads: Vec<_> = (0..8_u64)
        .map(|thread| {
            let slots = slots.clone();
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let many = (0..200_u64).map(|number| {
                        let slots = slots.clone();
                        tokio::spawn(async move {
                            let tenant = workload(["a", "b", "c"][usize::try_from((thread + number) % 3).unwrap()]);
                            let patience = Duration::from_micros(number * 37 % 1500);
                            let taken = slots.take(tenant, Instant::now() + Duration::from_millis(2));
                            let Ok(Ok(slot)) = tokio::time::timeout(patience, taken).await else { return };
                            tokio::time::sleep(Duration::from_micros(number % 300)).await;
                            drop(slot);
                        })
                    });
                    for task in many.collect::<Vec<_>>() {
                        task.await.unwrap();
                    }
                });
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    let queue = slots.queue();
    queue.check(4);
    assert_eq!((queue.free(), queue.waiting()), (4, 0));
}

fn peer(address: &str, to: &str) -> Tenant {
    Tenant::peer(&Holder::of_unproven(&Whence::Away(address.parse().unwrap())), &id(to))
}

#[test]
fn a_party_is_a_workload_or_a_network_of_a_peer_within_wider_ones_or_a_user_of_this_host() {
    assert_eq!(peer("10.0.0.1", "web"), peer("::ffff:10.0.0.1", "web"));
    assert_ne!(peer("10.0.0.1", "web"), peer("10.0.0.2", "web"));
    assert_eq!(peer("fd00::1", "web"), peer("fd00::ffff:1:2:3", "web"));
    assert_ne!(peer("fd00::1", "web"), peer("fd00:0:0:1::1", "web"));
    assert_eq!(peer("fd00::1", "web").0[0], peer("fd00:0:0:1::1", "web").0[0]);
    assert_ne!(peer("10.0.0.1", "web"), peer("10.0.0.1", "curl"));
    assert_eq!(peer("fd00::7", "web").to_string(), "fd00::/48 to spiffe://example.org/web");
    let user = Tenant::peer(&Holder::of_unproven(&Whence::Here(Some(3000))), &id("web"));
    assert_eq!(user.to_string(), "programs of this host to spiffe://example.org/web");
}

#[test]
fn everybody_on_every_shard_gets_a_turn() {
    let slots = HandshakeSlots::new(16, 10_000);
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let slots = slots.clone();
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let local = tokio::task::LocalSet::new();
                runtime.block_on(local.run_until(async {
                    let many: Vec<_> = (0..2000)
                        .map(|number| {
                            let slots = slots.clone();
                            tokio::task::spawn_local(async move {
                                let tenant = workload(["a", "b"][number % 2]);
                                let _slot = slots.take(tenant, soon()).await?;
                                tokio::time::sleep(Duration::from_micros(10)).await;
                                Ok::<_, Error>(())
                            })
                        })
                        .collect();
                    let mut served = 0;
                    for task in many {
                        served += usize::from(task.await.unwrap().is_ok());
                    }
                    served
                }))
            })
        })
        .collect();
    let served: usize = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
    assert_eq!(served, 4000);
}
