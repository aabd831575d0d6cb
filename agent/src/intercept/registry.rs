//! The registry of bound and listening sockets, as the agent reads it and changes it: who listens, who of them was left alone,
//! who shares an address.
//!
//! The kernel programs write a row when a socket is bound, judge binder and listener, and send events. The agent says what it
//! finds beyond that by [`Commands`], since rows and counts change in the kernel only.
//!
//! *Invariant:* what is read here is a socket's row at one moment; a command about it is refused once it has changed.

use super::{
    Error,
    cgroups::Cgroup,
    owners::holders,
    rows::KernelFacts,
    tables::{Tables, address, canonical, listener_key, map_error, socket_address},
};
use crate::lock::lock;
use bunter_common::*;
use bunter_sys::bpf;
use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex},
};

/// A listening socket, and who is behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listening {
    /// Its cookie.
    pub cookie: u64,
    /// Where it is, who bound it, for whom it listens and what it is.
    pub row: Socket,
}

impl Listening {
    /// Address and port.
    pub fn address(&self) -> SocketAddr {
        socket_address(&self.row.key.address, self.row.key.port)
    }

    /// One of the `LISTENER_` modes.
    pub fn mode(&self) -> u32 {
        u32::try_from(self.row.mode).unwrap_or(LISTENER_PROTECTED)
    }
}

/// Every listening socket that is left alone.
pub(super) fn left_alone(tables: &Tables) -> Result<Vec<Listening>, Error> {
    let full = map_error(map::SOCKETS);
    let mut found = Vec::new();
    for cookie in tables.sockets.keys().map_err(&full)? {
        let row = tables.sockets.get(&cookie).map_err(&full)?;
        let row = row.filter(|row| row.listens != 0 && row.mode == u64::from(LISTENER_LEFT_ALONE));
        found.extend(row.map(|row| Listening { cookie, row }));
    }
    found.retain(|listening| !matches!(tables.own.get(&listening.cookie), Ok(Some(_))));
    Ok(found)
}

/// Listening sockets that were left alone and stay so under a policy to come: none of its entries can match their binder,
/// listener or a holder. Finding them takes a walk through all processes.
#[derive(Debug, Default)]
pub(super) struct Cleared(HashMap<u64, u32>);

impl Cleared {
    pub fn look(tables: &Tables, cgroups: &[Cgroup], cgroup2: &Path, facts: &dyn KernelFacts) -> Self {
        let looked = left_alone(tables).and_then(|left_alone| {
            let cookies = left_alone.iter().map(|listening| listening.cookie).collect();
            let paths: HashMap<u64, &str> = cgroups.iter().map(|cgroup| (cgroup.id, cgroup.path.as_str())).collect();
            let everybody = facts.candidates(&[]);
            let may_match = |task: &Task| {
                if task.tgid == 0 {
                    return false;
                }
                let Some(path) = paths.get(&task.cgroup) else { return true };
                let of_cgroup = facts.candidates(&facts.cgroup_set(path));
                of_cgroup.iter().chain(&everybody).any(|row| row.fits(task.uid, task.gid))
            };
            let held = holders(&cookies, cgroup2, &may_match)?;
            let nobodies = left_alone.iter().filter(|listening| {
                let tasks = [listening.row.binder, listening.row.owner];
                // A socket that the kernel did not list may be held by anybody.
                let held = held.get(&listening.cookie);
                held.is_some_and(|held| held.unread.is_none() && !tasks.iter().chain(&held.holders).any(may_match))
            });
            Ok(nobodies.map(|listening| (listening.cookie, listening.row.asked)).collect())
        });
        // Where this fails, none is cleared: all are undecided for a moment.
        Self(
            looked
                .inspect_err(|error| tracing::warn!(%error, "all listeners are to be judged anew"))
                .unwrap_or_default(),
        )
    }

    /// Is it one of them, and has nobody asked for its name since?
    pub fn holds(&self, listening: &Listening) -> bool {
        self.0.get(&listening.cookie) == Some(&listening.row.asked)
    }
}

/// The program `registry`, by which the agent says what a socket is.
#[derive(Clone, Debug)]
pub(super) struct Commands(Arc<OwnedFd>);

impl Commands {
    pub fn new(program: OwnedFd) -> Self {
        Self(Arc::new(program))
    }

    /// Carries a command out. False where it was stale: there is no such socket, or it is recorded already, or it has to be
    /// judged anew.
    pub fn run(&self, command: &Command) -> Result<bool, Error> {
        match bpf::run(self.0.as_fd(), command) {
            Ok(COMMAND_DONE) => Ok(true),
            Ok(COMMAND_STALE) => Ok(false),
            Ok(COMMAND_FULL) => Err(Error::MapFull { map: map::SOCKETS }),
            Ok(other) => Err(Error::Map {
                map: map::SOCKETS,
                error: io::Error::other(format!("the program registry answered {other}")),
            }),
            Err(error) => Err(Error::Map { map: map::SOCKETS, error }),
        }
    }
}

/// The sockets at addresses that several share, remembered with the row under which they were found.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedAddresses(Arc<Mutex<HashMap<ListenerKey, AtOnce>>>);

/// The row of an address, and the sockets that listened there at that time.
type AtOnce = (Listeners, Vec<Listening>);

/// Most shared addresses that are remembered.
const REMEMBERED: usize = 1024;

impl SharedAddresses {
    /// The sockets that listen at exactly this address, of which this is the row.
    fn at(&self, tables: &Tables, key: &ListenerKey, row: Listeners) -> io::Result<Vec<Listening>> {
        if row.cookie == 0 {
            return Ok(Vec::new());
        }
        let listens = |found: &Socket| (found.listens != 0) == (key.device != BOUND_ONLY) && found.key == *key;
        if all_counted(row.counts) == 1
            && let Some(found) = tables.sockets.get(&row.cookie)?.filter(listens)
        {
            return Ok(vec![Listening { cookie: row.cookie, row: found }]);
        }
        if let Some((_, found)) = lock(&self.0).get(key).filter(|(known, _)| *known == row) {
            return Ok(found.clone());
        }
        let mut found = Vec::new();
        for cookie in tables.sockets.keys()? {
            found.extend(tables.sockets.get(&cookie)?.filter(listens).map(|row| Listening { cookie, row }));
        }
        let mut known = lock(&self.0);
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(*key, (row, found.clone()));
        Ok(found)
    }

    /// The sockets of which the kernel would choose one for a connection over loopback to this address: those that are bound
    /// to the address itself, else to a wildcard of either family; on any device, and on the loopback device. With them come
    /// those that may begin to listen there in this moment.
    ///
    /// Of several that share a port (`SO_REUSEPORT`) the kernel takes the one that came first, however much better another
    /// fits (`inet6_lhash2_lookup` in net/ipv6/inet6_hashtables.c), and one hash bucket holds the wildcards of both families.
    /// So all of a bucket count, not only those that fit best.
    ///
    /// With them comes the sum of [`who_listens`] over these places, read before the sockets were looked at. Sockets on the
    /// loopback device are rare, and are given only where there are no others, or where `everywhere` asks for them.
    pub fn reached(
        &self,
        tables: &Tables,
        local: SocketAddr,
        netns: u64,
        everywhere: bool,
    ) -> io::Result<(Vec<Listening>, u64)> {
        let (places, mut who) = (places(local, netns), 0_u64);
        let (mut exact, mut wildcard) = (Vec::new(), Vec::new());
        for device in [0, LOOPBACK_DEVICE] {
            for (index, place) in places.iter().enumerate() {
                let key = ListenerKey { device, ..*place };
                let Some(row) = tables.listeners.get(&key)? else { continue };
                who = who.wrapping_add(who_listens(&row));
                let bucket = if index == 0 { &mut exact } else { &mut wildcard };
                bucket.extend(self.at(tables, &key, row)?);
            }
            if !everywhere && (!exact.is_empty() || !wildcard.is_empty()) {
                break;
            }
        }
        // A socket that begins to listen at the address itself is preferred to all wildcards.
        let (mut found, may_be_preferred) = match exact.is_empty() {
            true => (wildcard, &places[..]),
            false => (exact, &places[..1]),
        };
        let user = found.first().map(|first| first.row.binder);
        for place in &places {
            let key = ListenerKey { device: BOUND_ONLY, ..*place };
            let Some(row) = tables.listeners.get(&key)? else { continue };
            who = who.wrapping_add(who_listens(&row));
            if let Some(user) = user.filter(|_| may_be_preferred.contains(place)) {
                let beside = self.at(tables, &key, row)?;
                // Only a socket of the same user may listen beside another (`inet_csk_bind_conflict`).
                found.extend(beside.into_iter().filter(|it| user.tgid == 0 || it.row.binder.uid == user.uid));
            }
        }
        Ok((found, who))
    }
}

/// Where the kernel looks for the listener of a connection to this address: the address itself, the wildcard of its family
/// (for IPv6, sockets that take nothing else), the wildcard of both. As `protection` in `ebpf/src/ingress.rs`.
fn places(local: SocketAddr, netns: u64) -> [ListenerKey; 3] {
    let exact = listener_key(local, netns);
    let both = ListenerKey { address: address(IpAddr::V6(Ipv6Addr::UNSPECIFIED)), ..exact };
    let of_family = match canonical(local).ip() {
        IpAddr::V4(_) => ListenerKey { address: address(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), ..exact },
        IpAddr::V6(_) => ListenerKey { ipv6_only: 1, ..both },
    };
    [exact, of_family, both]
}

impl Tables {
    /// What becomes of a connection to this address: the strictest mode of all that is bound there.
    pub fn strictest_at(&self, local: SocketAddr, netns: u64) -> io::Result<u32> {
        let mut counts = 0;
        for key in places(local, netns) {
            counts |= self.listeners.get(&key)?.map_or(0, |row| row.counts);
            let key = ProtectedKey { address: key.address, port: key.port, pad: [0; 3] };
            if self.protected.get(&key)?.is_some() {
                return Ok(LISTENER_PROTECTED);
            }
        }
        Ok(strictest(counts))
    }
}
