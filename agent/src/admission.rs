//! Who may have another connection: places of their own for what goes out, for what comes in, and for peers that have not
//! shown who they are.
//!
//! A holder is whoever answers for a connection: the local user that dials, the peer that proved its identity, the network of
//! a peer that has not. While there is plenty, holders take what they need. The last eighth is shared: a holder gets of it
//! only while more is free than it has, so that one that takes all it can get leaves room for every other.
//!
//! *Invariant:* never more places are taken than there are; whoever has none gets one as long as any is free.

use crate::lock::lock;
use crate::refusal::{Culprit, Refusal};
use crate::spiffe::SpiffeId;
use crate::units::network_of;
use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

/// Whoever answers for a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Holder {
    /// A local user that dials.
    User(u32),
    /// A peer that proved its identity.
    Peer(SpiffeId),
    /// A peer that has not: the first address of its network.
    Network(IpAddr),
    /// A peer that has not, by itself.
    Address(IpAddr),
}

impl Holder {
    /// The network of an address: its /24, or /64.
    pub fn network(of: IpAddr) -> Self {
        Self::Network(network_of(of))
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(uid) => write!(f, "uid {uid}"),
            Self::Peer(id) => id.fmt(f),
            Self::Network(first @ IpAddr::V4(_)) => write!(f, "{first}/24"),
            Self::Network(first) => write!(f, "{first}/64"),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// The places of an agent.
#[derive(Debug)]
pub struct Admission {
    outbound: Arc<Places>,
    inbound: Arc<Places>,
    unproven: Arc<Places>,
}

/// How many places of each kind are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// By connections of local programs.
    pub outbound: usize,
    /// By connections of peers that proved who they are, or need not.
    pub inbound: usize,
    /// By connections of peers that have not proved who they are.
    pub unproven: usize,
}

/// What the places are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Outbound,
    Inbound,
    Unproven,
}

impl Admission {
    /// With so many places each way, and as many for peers that have not proved who they are.
    pub fn new(connections: usize) -> Self {
        let places = |kind, all| Arc::new(Places { kind, all, held: Mutex::default() });
        Self {
            outbound: places(Kind::Outbound, connections),
            inbound: places(Kind::Inbound, connections),
            unproven: places(Kind::Unproven, connections),
        }
    }

    /// A place for a connection of a local user's program.
    pub fn outbound(&self, uid: u32) -> Result<Place, Full> {
        self.outbound.take(Holder::User(uid))
    }

    /// A place for a connection of a peer that proved its identity, or, by a permissive rule, of a network.
    pub fn inbound(&self, who: Holder) -> Result<Place, Full> {
        self.inbound.take(who)
    }

    /// A place for a connection from this address, until it is known from whom.
    pub fn unproven(&self, from: IpAddr) -> Result<Place, Full> {
        self.unproven.take_within(Holder::Address(from.to_canonical()), Some(Holder::network(from)))
    }

    /// How many are taken.
    pub fn taken(&self) -> Taken {
        let taken = |places: &Places| lock(&places.held).taken;
        Taken { outbound: taken(&self.outbound), inbound: taken(&self.inbound), unproven: taken(&self.unproven) }
    }
}

/// There is no place for it.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.text())]
pub struct Full {
    kind: Kind,
    who: Holder,
    own: usize,
    taken: usize,
    all: usize,
}

impl Full {
    fn text(&self) -> String {
        let Self { kind, who, own, taken, all } = self;
        let (what, advice) = match kind {
            Kind::Outbound => ("connections of local programs are open or under way", "[limits] connections"),
            Kind::Inbound => ("connections of peers are open or under way", "[limits] connections"),
            Kind::Unproven => ("connections wait for their peers to prove who they are", "[limits] connections"),
        };
        let limit = format!("of {all}, which is {advice}, or what the limit of open files allows");
        format!("{taken} {what}, {limit}; {own} of them are those of {who}")
    }
}

impl Refusal for Full {
    fn culprit(&self) -> Culprit {
        match self.kind {
            Kind::Outbound => Culprit::Host,
            Kind::Inbound | Kind::Unproven => Culprit::Peer,
        }
    }
    fn code(&self) -> &'static str {
        match self.kind {
            Kind::Outbound | Kind::Inbound => "too-many-connections",
            Kind::Unproven => "too-many-unproven",
        }
    }
}

/// Places of one kind.
#[derive(Debug)]
struct Places {
    kind: Kind,
    all: usize,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    taken: usize,
    by: HashMap<Holder, usize>,
}

impl Held {
    fn of(&self, who: &Holder) -> usize {
        self.by.get(who).copied().unwrap_or(0)
    }
}

impl Places {
    fn take(self: &Arc<Self>, who: Holder) -> Result<Place, Full> {
        self.take_within(who, None)
    }

    /// A place for a holder that is one of many in another: within that one's share it leaves room as that one does in all.
    fn take_within(self: &Arc<Self>, who: Holder, within: Option<Holder>) -> Result<Place, Full> {
        let mut held = lock(&self.held);
        let (taken, own) = (held.taken, held.of(&who));
        let admitted = match &within {
            None => admits(own, taken, self.all),
            Some(outer) => {
                let (of_outer, share) = (held.of(outer), self.all - self.all / 8);
                admits(of_outer, taken, self.all) && admits(own, of_outer, share)
            }
        };
        if !admitted {
            return Err(Full { kind: self.kind, who, own, taken, all: self.all });
        }
        held.taken += 1;
        let who: Box<[Holder]> = std::iter::once(who).chain(within).collect();
        for holder in &who {
            *held.by.entry(holder.clone()).or_default() += 1;
        }
        Ok(Place { of: self.clone(), who })
    }
}

/// May a holder that has `own` of the `taken` places take another of `all`?
fn admits(own: usize, taken: usize, all: usize) -> bool {
    let free = all.saturating_sub(taken);
    free > 0 && (free > all / 8 || own < free)
}

/// A place, taken until this is dropped.
#[derive(Debug)]
pub struct Place {
    of: Arc<Places>,
    /// Boxed: a place is held for as long as its connection.
    who: Box<[Holder]>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = lock(&self.of.held);
        held.taken = held.taken.saturating_sub(1);
        for holder in &self.who {
            if let Some(own) = held.by.get_mut(holder) {
                *own -= 1;
                if *own == 0 {
                    held.by.remove(holder);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn places(all: usize) -> Arc<Places> {
        Arc::new(Places { kind: Kind::Outbound, all, held: Mutex::default() })
    }

    fn fill(places: &Arc<Places>, uid: u32) -> Vec<Place> {
        std::iter::from_fn(|| places.take(Holder::User(uid)).ok()).collect()
    }

    #[test]
    fn one_holder_leaves_an_eighth_and_each_further_one_leaves_something() {
        let places = places(800);
        let first = fill(&places, 1);
        assert_eq!(first.len(), 700);
        let second = fill(&places, 2);
        assert_eq!(second.len(), 50);
        let third = fill(&places, 3);
        assert_eq!(third.len(), 25);
        assert!(places.take(Holder::User(4)).is_ok());
        drop((first, second, third));
        assert_eq!(lock(&places.held).taken, 0);
        assert!(lock(&places.held).by.is_empty());
    }

    #[test]
    fn few_places_are_taken_to_the_last() {
        let places = places(2);
        assert_eq!(fill(&places, 1).len(), 2);
        let _held = fill(&places, 1);
        let full = places.take(Holder::User(2)).unwrap_err();
        assert!(
            full.to_string().starts_with("2 connections") && full.to_string().contains("0 of them are those of uid 2")
        );
    }

    #[test]
    fn silent_peers_take_no_place_of_those_who_proved_themselves_or_dial() {
        let admission = Admission::new(300);
        let from = |last: u8| IpAddr::from([192, 0, 2, last]);
        let silent: Vec<Place> = (0..=255).filter_map(|last| admission.unproven(from(last)).ok()).collect();
        assert_eq!(silent.len(), 256);
        let more: Vec<Place> = std::iter::from_fn(|| admission.unproven(from(1)).ok()).collect();
        // All of one network: it leaves room for others.
        assert!(more.len() < 44, "{}", more.len());
        assert_eq!(admission.unproven(from(1)).unwrap_err().code(), "too-many-unproven");
        assert!(admission.unproven([198, 51, 100, 1].into()).is_ok());
        drop((silent, more));
        // All of one address: it leaves room for its neighbours.
        let silent: Vec<Place> = std::iter::from_fn(|| admission.unproven(from(1)).ok()).collect();
        assert!((200..260).contains(&silent.len()), "{}", silent.len());
        assert!(admission.unproven(from(2)).is_ok());
        assert!(admission.outbound(1).is_ok());
        assert!(admission.inbound(Holder::network(from(1))).is_ok());
    }

    #[test]
    fn a_network_is_the_first_half_of_an_ipv6_address_and_three_parts_of_an_ipv4_one() {
        let network = |of: &str| Holder::network(of.parse().unwrap()).to_string();
        assert_eq!(network("2001:db8:1:2:3::4"), "2001:db8:1:2::/64");
        assert_eq!(network("::ffff:10.1.2.3"), "10.1.2.0/24");
    }

    proptest! {
        #[test]
        fn whoever_has_none_gets_one_while_any_is_free(all in 1_usize..200, steps in prop::collection::vec((0_u32..6, any::<bool>()), 0..600)) {
            let places = places(all);
            let mut held: Vec<(u32, Place)> = Vec::new();
            for (uid, takes) in steps {
                let own = held.iter().filter(|(by, _)| *by == uid).count();
                let free = all - held.len();
                if takes {
                    match places.take(Holder::User(uid)) {
                        Ok(place) => held.push((uid, place)),
                        Err(_) => prop_assert!(free == 0 || own >= free),
                    }
                } else if let Some(at) = held.iter().position(|(by, _)| *by == uid) {
                    held.swap_remove(at);
                }
                prop_assert!(held.len() <= all);
                prop_assert_eq!(lock(&places.held).taken, held.len());
            }
        }
    }
}
