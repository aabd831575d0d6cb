//! Who may have another connection: what goes out, what comes in, and peers that have not shown who they are each have
//! places of their own.
//!
//! A holder is who answers for a connection: the local user that dials, the peer that proved its identity, the host or the
//! networks of a peer that has not. While there is plenty, holders take what they need. Of the last eighth of the places a
//! holder gets one only while more are free than it has, so that one that takes all it can get leaves room for every other.
//! Holders within a wider holder share its seven eighths in the same way: users within this host, networks within a wider
//! one.
//!
//! *Invariant:* never more places are taken than there are; a holder without a place gets one as long as any is free.

use crate::lock::lock;
use crate::whence::Whence;
use bunter_identity::refusal::{Culprit, Refusal};
use bunter_identity::spiffe::SpiffeId;
use ipnet::IpNet;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};

/// Who answers for a connection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Holder {
    /// A local user.
    User(u32),
    /// A peer that proved its identity.
    Peer(SpiffeId),
    /// Peers that have not, and are programs of this host.
    Host,
    /// Peers that have not, by their network, or their address.
    Network(IpNet),
}

impl Holder {
    /// Who answers for a peer that has not shown who it is, the widest first.
    pub fn of_unproven(from: &Whence) -> Holders {
        match *from {
            // If the peer's socket is gone already, it counts as an unknown user's.
            Whence::Here(uid) => [Self::Host, Self::User(uid.unwrap_or(u32::MAX))].into(),
            Whence::Away(address) => Whence::networks(address).iter().copied().map(Self::Network).collect(),
        }
    }
}

/// Holders, each within the one before, the widest first. Boxed, because they are kept for as long as the connection.
pub type Holders = Box<[Holder]>;

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(uid) => write!(f, "uid {uid}"),
            Self::Peer(id) => id.fmt(f),
            Self::Host => f.write_str("programs of this host"),
            Self::Network(network) if network.prefix_len() == network.max_prefix_len() => network.addr().fmt(f),
            Self::Network(network) => network.fmt(f),
        }
    }
}

/// The places of an agent.
#[derive(Debug)]
pub struct Admission {
    outbound: Arc<ConnectionSlots>,
    inbound: Arc<ConnectionSlots>,
    unproven: Arc<ConnectionSlots>,
}

/// How many places of each kind are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// By connections of local programs.
    pub outbound: usize,
    /// By connections of peers that proved who they are, or need not because of a permissive rule.
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
        let places = |kind, all| Arc::new(ConnectionSlots { kind, all, held: Mutex::default() });
        Self {
            outbound: places(Kind::Outbound, connections),
            inbound: places(Kind::Inbound, connections),
            unproven: places(Kind::Unproven, connections),
        }
    }

    /// A place for a connection of a local user's program.
    pub fn outbound(&self, uid: u32) -> Result<ConnectionSlot, Full> {
        self.outbound.take([Holder::User(uid)].into())
    }

    /// A place for a connection of a peer that proved its identity.
    pub fn inbound(&self, who: SpiffeId) -> Result<ConnectionSlot, Full> {
        self.inbound.take([Holder::Peer(who)].into())
    }

    /// A place for a connection of a peer that need not prove its identity, because a permissive rule lets it in. It has
    /// the same holders as `unproven`.
    pub fn permitted(&self, unproven: &ConnectionSlot) -> Result<ConnectionSlot, Full> {
        self.inbound.take(unproven.who.clone())
    }

    /// A place for a connection from `from`, until its peer has proved who it is.
    pub fn unproven(&self, from: &Whence) -> Result<ConnectionSlot, Full> {
        self.unproven.take(Holder::of_unproven(from))
    }

    /// How many are taken.
    pub fn taken(&self) -> Taken {
        let taken = |places: &ConnectionSlots| lock(&places.held).taken;
        Taken { outbound: taken(&self.outbound), inbound: taken(&self.inbound), unproven: taken(&self.unproven) }
    }
}

/// There is no place for another connection.
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
struct ConnectionSlots {
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

impl ConnectionSlots {
    /// A place for these holders. Each has to leave room for others within the one before it, as the first one has to
    /// within all places.
    fn take(self: &Arc<Self>, who: Holders) -> Result<ConnectionSlot, Full> {
        let mut held = lock(&self.held);
        let (mut taken, mut all) = (held.taken, self.all);
        for holder in &who {
            let own = held.of(holder);
            if !admits(own, taken, all) {
                return Err(Full { kind: self.kind, who: holder.clone(), own, taken: held.taken, all: self.all });
            }
            (taken, all) = (own, all - all / 8);
        }
        held.taken += 1;
        for holder in &who {
            *held.by.entry(holder.clone()).or_default() += 1;
        }
        Ok(ConnectionSlot { of: self.clone(), who })
    }
}

/// May a holder that has `own` of the `taken` places take another of `all`?
pub(crate) fn admits(own: usize, taken: usize, all: usize) -> bool {
    let free = all.saturating_sub(taken);
    free > 0 && (free > all / 8 || own < free)
}

/// A place, taken until this is dropped.
#[derive(Debug)]
pub struct ConnectionSlot {
    of: Arc<ConnectionSlots>,
    who: Holders,
}

impl ConnectionSlot {
    /// Who holds it, the widest first.
    pub fn holders(&self) -> &[Holder] {
        &self.who
    }
}

impl Drop for ConnectionSlot {
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

    fn places(all: usize) -> Arc<ConnectionSlots> {
        Arc::new(ConnectionSlots { kind: Kind::Outbound, all, held: Mutex::default() })
    }

    fn fill(places: &Arc<ConnectionSlots>, uid: u32) -> Vec<ConnectionSlot> {
        std::iter::from_fn(|| places.take([Holder::User(uid)].into()).ok()).collect()
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
        assert!(places.take([Holder::User(4)].into()).is_ok());
        drop((first, second, third));
        assert_eq!(lock(&places.held).taken, 0);
        assert!(lock(&places.held).by.is_empty());
    }

    #[test]
    fn few_places_are_taken_to_the_last() {
        let places = places(2);
        assert_eq!(fill(&places, 1).len(), 2);
        let _held = fill(&places, 1);
        let full = places.take([Holder::User(2)].into()).unwrap_err();
        assert!(
            full.to_string().starts_with("2 connections") && full.to_string().contains("0 of them are those of uid 2")
        );
    }

    #[test]
    fn silent_peers_take_no_place_of_those_who_proved_themselves_or_dial() {
        let admission = Admission::new(300);
        let from = |last: u8| Whence::Away([192, 0, 2, last].into());
        let silent: Vec<ConnectionSlot> = (0..=255).filter_map(|last| admission.unproven(&from(last)).ok()).collect();
        assert_eq!(silent.len(), 256);
        let more = fill_from(&admission, &from(1));
        // All of one network: it leaves room for others.
        assert!(more.len() < 44, "{}", more.len());
        assert_eq!(admission.unproven(&from(1)).unwrap_err().code(), "too-many-unproven");
        assert!(admission.unproven(&Whence::Away([198, 51, 100, 1].into())).is_ok());
        drop((silent, more));
        // All of one address: it leaves room for its neighbours.
        let silent = fill_from(&admission, &from(1));
        assert!((200..260).contains(&silent.len()), "{}", silent.len());
        let neighbour = admission.unproven(&from(2)).unwrap();
        assert!(admission.outbound(1).is_ok());
        assert!(admission.inbound("spiffe://example.org/web".parse().unwrap()).is_ok());
        assert!(admission.permitted(&neighbour).is_ok());
    }

    fn fill_from(admission: &Admission, from: &Whence) -> Vec<ConnectionSlot> {
        std::iter::from_fn(|| admission.unproven(from).ok()).collect()
    }

    #[test]
    fn programs_of_this_host_leave_room_for_every_network_and_one_user_for_the_others() {
        let admission = Admission::new(300);
        let flood = fill_from(&admission, &Whence::Here(Some(3000)));
        assert!((200..263).contains(&flood.len()), "{}", flood.len());
        let other = admission.unproven(&Whence::Here(Some(0)));
        assert!(other.is_ok(), "{other:?}");
        let users: Vec<Vec<ConnectionSlot>> =
            (0..50).map(|uid| fill_from(&admission, &Whence::Here(Some(uid)))).collect();
        let held = |users: &[Vec<ConnectionSlot>]| users.iter().map(Vec::len).sum::<usize>();
        assert!(flood.len() + held(&users) < 264, "{}", held(&users));
        for network in 0..5 {
            let remote = admission.unproven(&Whence::Away([198, 51, network, 1].into()));
            assert!(remote.is_ok(), "{remote:?}");
        }
        let full = admission.unproven(&Whence::Here(Some(3000))).unwrap_err();
        assert!(full.to_string().ends_with("are those of programs of this host"), "{full}");
    }

    #[test]
    fn many_networks_in_a_wider_one_leave_room_for_others() {
        let admission = Admission::new(300);
        let at = |site: u16, network: u16| Whence::Away([0x2001, 0xdb8, site, network, 0, 0, 0, 1].into());
        // Every /64 of a /56, then of the /48.
        let few: Vec<ConnectionSlot> =
            (0..1000).filter_map(|number| admission.unproven(&at(1, number % 256)).ok()).collect();
        assert!((200..240).contains(&few.len()), "{}", few.len());
        let more: Vec<ConnectionSlot> =
            (0..65_535).filter_map(|number| admission.unproven(&at(1, number)).ok()).collect();
        assert!(few.len() + more.len() < 264 && !more.is_empty(), "{}", more.len());
        assert!(admission.unproven(&at(2, 1)).is_ok());
        assert!(admission.unproven(&Whence::Away([198, 51, 100, 1].into())).is_ok());
    }

    proptest! {
        #[test]
        fn whoever_has_none_gets_one_while_any_is_free(all in 1_usize..200, steps in prop::collection::vec((0_u32..6, any::<bool>()), 0..600)) {
            let places = places(all);
            let mut held: Vec<(u32, ConnectionSlot)> = Vec::new();
            for (uid, takes) in steps {
                let own = held.iter().filter(|(by, _)| *by == uid).count();
                let free = all - held.len();
                if takes {
                    match places.take([Holder::User(uid)].into()) {
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
