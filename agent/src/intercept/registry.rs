//! The registry of listening sockets: who bound them, and what they are.
//!
//! The kernel programs write a row when a socket begins to listen and say so. What they could not see is found here: sockets
//! from before, sockets that were never bound by hand, sockets that share an address.
//!
//! *Invariant:* the protection of a listener is lowered here only, and only for the socket that was looked at.

use super::{
    Error, Notice, Programs,
    diagnostics::{self, Socket},
    owners,
    tables::{canonical, listener_key, map_error, socket_address},
};
use crate::sys::bpf;
use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
};
use wimsey_common::*;

/// A listening socket and its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listening {
    /// Where it listens.
    pub key: ListenerKey,
    /// Owner, cookie and mode.
    pub row: Listener,
}

impl Listening {
    /// Address and port.
    pub fn address(&self) -> SocketAddr {
        socket_address(&self.key.address, self.key.port)
    }
}

impl Programs {
    /// Looks at every listening socket of the namespace: those from before the programs are recorded, those that are gone are
    /// forgotten. All that are left are to be attested, and [`Programs::set_listener_mode`] called for each.
    pub fn listeners(&mut self) -> Result<Vec<Listening>, Error> {
        let sockets = self.listening_sockets()?;
        let mut by_key: HashMap<ListenerKey, Vec<Socket>> = HashMap::new();
        for socket in sockets {
            by_key.entry(key_of(&socket)).or_default().push(socket);
        }
        let tables = self.tables.clone();
        let full = map_error(map::LISTENERS);
        let mut unrecorded = Vec::new();
        let mut found = Vec::new();
        for (key, sockets) in &by_key {
            let row = tables.listeners.get(key).map_err(&full)?;
            match row.filter(|row| row.owner.tgid != 0 && sockets.iter().any(|socket| socket.cookie == row.cookie)) {
                Some(row) => found.push(Listening { key: *key, row }),
                None => unrecorded.extend(sockets.first().map(|socket| (*key, *socket, row))),
            }
        }
        let inodes = unrecorded.iter().map(|(_, socket, _)| socket.inode).collect();
        let owners = owners::owners(&inodes, &self.host.cgroup2);
        for (key, socket, row) in unrecorded {
            let owner = owners.get(&socket.inode).copied();
            found.push(self.record(key, &socket, owner, row)?);
        }
        for key in tables.listeners.keys().map_err(&full)? {
            if !by_key.contains_key(&key) {
                self.forget(&key)?;
            }
        }
        Ok(found)
    }

    /// Says what a listening socket is, after its owner was attested: one of the `LISTENER_` modes. Says whether it was still
    /// the same socket. An address that policy protects by itself stays protected.
    pub fn set_listener_mode(&self, listening: &Listening, mode: u32, workload: u32) -> Result<bool, Error> {
        let full = map_error(map::LISTENERS);
        let Some(mut row) = self.tables.listeners.get(&listening.key).map_err(&full)? else { return Ok(false) };
        if row.cookie != listening.row.cookie {
            return Ok(false);
        }
        row.mode = if self.protected.contains(&listening.key) { LISTENER_PROTECTED } else { mode };
        row.owner.workload = workload;
        match self.tables.listeners.put(&listening.key, &row, bpf::REPLACE) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            done => done.map(|()| true).map_err(full),
        }
    }

    pub(super) fn somebody_listens(&mut self, event: &Event) -> Result<(), Error> {
        let key = ListenerKey { address: event.destination, port: event.destination_port, pad: [0; 3] };
        let row = self.tables.listeners.get(&key).map_err(map_error(map::LISTENERS))?;
        let listening = match row {
            Some(row) if row.cookie != event.cookie && row.cookie != 0 => return Ok(()),
            Some(row) if row.cookie != 0 && row.owner.tgid != 0 => Some(Listening { key, row }),
            // A socket that was never bound by hand, or a row that did not fit.
            row => {
                let socket = self.listening_sockets()?.into_iter().find(|socket| socket.cookie == event.cookie);
                match socket {
                    Some(socket) => {
                        let owners = owners::owners(&HashSet::from([socket.inode]), &self.host.cgroup2);
                        Some(self.record(key, &socket, owners.get(&socket.inode).copied(), row)?)
                    }
                    None => None,
                }
            }
        };
        self.notices.extend(listening.map(Notice::Listening));
        Ok(())
    }

    pub(super) fn somebody_closed(&mut self, event: &Event) -> Result<(), Error> {
        let key = ListenerKey { address: event.destination, port: event.destination_port, pad: [0; 3] };
        let Some(row) = self.tables.listeners.get(&key).map_err(map_error(map::LISTENERS))? else { return Ok(()) };
        if row.cookie != 0 {
            return Ok(());
        }
        // Another socket may share the address (SO_REUSEPORT).
        if let Some(socket) = self.listening_sockets()?.into_iter().find(|socket| key_of(socket) == key) {
            let owners = owners::owners(&HashSet::from([socket.inode]), &self.host.cgroup2);
            let listening = self.record(key, &socket, owners.get(&socket.inode).copied(), Some(row))?;
            self.notices.push_back(Notice::Listening(listening));
            return Ok(());
        }
        self.forget(&key)?;
        self.notices.push_back(Notice::Closed(key));
        Ok(())
    }

    /// Writes down a listening socket that the programs have not, or not completely, seen.
    fn record(
        &self,
        key: ListenerKey,
        socket: &Socket,
        owner: Option<Task>,
        before: Option<Listener>,
    ) -> Result<Listening, Error> {
        let nobody = Task { tgid: 0, uid: 0, gid: 0, workload: 0, cgroup: 0, at: 0, comm: [0; 16] };
        let wildcard = key.address == [0; 16];
        let row = Listener {
            owner: owner.unwrap_or(nobody),
            cookie: socket.cookie,
            // Never lower than it was.
            mode: before.map_or(LISTENER_UNKNOWN, |row| row.mode.max(LISTENER_UNKNOWN)),
            dual: u32::from(wildcard && !socket.ipv6_only),
        };
        self.tables.listening.put(&socket.cookie, &key, bpf::ANY).map_err(map_error(map::LISTENING))?;
        self.tables.listeners.put(&key, &row, bpf::ANY).map_err(map_error(map::LISTENERS))?;
        Ok(Listening { key, row })
    }

    /// Forgets an address on which nobody listens, unless policy protects it by itself.
    fn forget(&self, key: &ListenerKey) -> Result<(), Error> {
        if self.protected.contains(key) {
            return Ok(());
        }
        if let Some(row) = self.tables.listeners.take(key).map_err(map_error(map::LISTENERS))?
            && row.cookie != 0
            && self.tables.listening.get(&row.cookie).map_err(map_error(map::LISTENING))?.is_some()
        {
            // Somebody has begun to listen since we looked.
            self.tables.listeners.put(key, &row, bpf::NEW).map_err(map_error(map::LISTENERS))?;
        }
        Ok(())
    }

    /// Listening sockets of everybody but the agent.
    fn listening_sockets(&self) -> Result<Vec<Socket>, Error> {
        let mut sockets = diagnostics::sockets(diagnostics::LISTENING)?;
        let own = |socket: &Socket| matches!(self.tables.own.get(&socket.cookie), Ok(Some(_)));
        sockets.retain(|socket| !own(socket));
        Ok(sockets)
    }
}

/// Where a listening socket is in `LISTENERS`. An IPv6 socket that is bound to an IPv4 address is listed under that.
fn key_of(socket: &Socket) -> ListenerKey {
    listener_key(canonical(socket.local))
}
