//! What listens in this network namespace: found, judged by the caller, and told to the kernel.
//!
//! What the kernel programs could not see is found here: sockets that are older than the programs, sockets that were never
//! bound explicitly, processes that were given a socket.
//!
//! *Invariant:* the protection of a listener is lowered here only, and only for the socket that was looked at.

use super::{
    Error, KernelEvent, Programs,
    diagnostics::{self, Socket as Listed},
    owners,
    registry::Listening,
    tables::{canonical, listener_key, map_error},
};
use bunter_common::*;
use bunter_sys::bpf;
use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

const NOBODY: Task = Task { tgid: 0, uid: 0, gid: 0, workload: 0, cgroup: 0, at: 0, comm: [0; 16] };

impl Programs {
    /// Looks at every listening socket of the namespace: those from before the programs are recorded, those that are gone are
    /// forgotten. All that are left are to be judged, and [`Programs::set_listener_mode`] called for each.
    pub fn listeners(&mut self) -> Result<Vec<Listening>, Error> {
        let full = map_error(map::SOCKETS);
        let listed = self.listening_sockets()?;
        let mut unrecorded = Vec::new();
        for socket in &listed {
            match self.tables.sockets.get(&socket.cookie).map_err(&full)? {
                None => unrecorded.push(*socket),
                Some(row) if socket.ipv6_only && row.key.address == [0; 16] && row.key.ipv6_only == 0 => {
                    self.set(socket.cookie, &row, u32::try_from(row.mode).unwrap_or(LISTENER_PROTECTED), None, true)?;
                }
                Some(_) => {}
            }
        }
        let owners = owners::owners(&unrecorded.iter().map(|socket| socket.inode).collect(), &self.host.cgroup2);
        let mut full_of: HashMap<u32, u32> = HashMap::new();
        for socket in unrecorded {
            let owner = owners.get(&socket.inode).copied().unwrap_or(NOBODY);
            let mut key = listener_key(canonical(socket.local), self.host.netns_cookie);
            key.device = socket.interface;
            key.ipv6_only = u16::from(socket.ipv6_only && key.address == [0; 16]);
            let (kind, mode) = (COMMAND_RECORD, LISTENER_UNDECIDED);
            let said = Command { kind, mode, cookie: socket.cookie, key, owner, asked: 0, generation: 0 };
            match self.commands.run(&said) {
                Ok(_) => {}
                // The user has used up their share: the socket stays without a row, so connections to it are refused.
                Err(Error::MapFull { .. }) => *full_of.entry(owner.uid).or_default() += 1,
                Err(error) => return Err(error),
            }
        }
        for (uid, sockets) in full_of {
            tracing::warn!(
                uid,
                sockets,
                "a user listens on more sockets than one may have rows for; the others are refused"
            );
        }
        let mut found = Vec::new();
        let mut missing = Vec::new();
        let alive: HashSet<u64> = listed.iter().map(|socket| socket.cookie).collect();
        for cookie in self.tables.sockets.keys().map_err(&full)? {
            match self.tables.sockets.get(&cookie).map_err(&full)? {
                Some(row) if row.listens != 0 && alive.contains(&cookie) => found.push(Listening { cookie, row }),
                Some(row) if row.listens != 0 => missing.push(cookie),
                _ => {}
            }
        }
        if !missing.is_empty() {
            // Forget only sockets that a second listing lacks as well: one may have begun to listen after the first.
            let alive: HashSet<u64> = self.listening_sockets()?.into_iter().map(|socket| socket.cookie).collect();
            for cookie in missing.into_iter().filter(|cookie| !alive.contains(cookie)) {
                self.forget(cookie)?;
            }
        }
        Ok(found)
    }

    /// Says what a listening socket is, after it was judged: one of the `LISTENER_` modes, and for whom it listens. Says
    /// whether it was still there.
    pub fn set_listener_mode(&self, listening: &Listening, mode: u32, owner: Option<Task>) -> Result<bool, Error> {
        self.set(listening.cookie, &listening.row, mode, owner, listening.row.key.ipv6_only != 0)
    }

    /// The same, if the policy of that generation is in force still, and nobody who may be enrolled has asked for the
    /// socket's name since the row was read: another process may hold the socket by now.
    pub fn judged(
        &self,
        listening: &Listening,
        mode: u32,
        owner: Option<Task>,
        generation: u32,
    ) -> Result<bool, Error> {
        let command = self.command(listening.cookie, &listening.row, mode, owner, listening.row.key.ipv6_only != 0);
        self.commands.run(&Command { generation, asked: listening.row.asked, ..command })
    }

    /// A listening socket as it is now, if it is there.
    pub fn listener(&self, cookie: u64) -> Result<Option<Listening>, Error> {
        let row = self.tables.sockets.get(&cookie).map_err(map_error(map::SOCKETS))?;
        Ok(row.filter(|row| row.listens != 0).map(|row| Listening { cookie, row }))
    }

    fn set(&self, cookie: u64, row: &Socket, mode: u32, owner: Option<Task>, ipv6_only: bool) -> Result<bool, Error> {
        self.commands.run(&self.command(cookie, row, mode, owner, ipv6_only))
    }

    fn command(&self, cookie: u64, row: &Socket, mode: u32, owner: Option<Task>, ipv6_only: bool) -> Command {
        let key = ListenerKey { ipv6_only: u16::from(ipv6_only), ..row.key };
        let owner = owner.unwrap_or(NOBODY);
        Command { kind: COMMAND_SET, mode, cookie, key, owner, asked: 0, generation: 0 }
    }

    fn forget(&self, cookie: u64) -> Result<bool, Error> {
        let key = ListenerKey { address: [0; 16], netns: 0, device: 0, port: 0, ipv6_only: 0 };
        let kind = COMMAND_FORGET;
        self.commands.run(&Command { kind, mode: 0, cookie, key, owner: NOBODY, asked: 0, generation: 0 })
    }

    /// Where the unified hierarchy is mounted: what a [`Walk`](super::Walk) asks for.
    pub fn hierarchy(&self) -> &Path {
        &self.host.cgroup2
    }

    pub(super) fn somebody_listens(&mut self, event: &Event) -> Result<(), Error> {
        // It may be gone by now.
        let row = self.tables.sockets.get(&event.cookie).map_err(map_error(map::SOCKETS))?;
        self.pending_events.extend(row.map(|row| KernelEvent::Listening(Listening { cookie: event.cookie, row })));
        Ok(())
    }

    pub(super) fn somebody_closed(&mut self, event: &Event) {
        self.pending_events.push_back(KernelEvent::Closed(event.cookie));
    }

    /// Protects these addresses, whoever listens there. Gives those that are new.
    pub(super) fn protect(&self, addresses: &HashSet<ProtectedKey>) -> Result<Vec<ProtectedKey>, Error> {
        let mut new = Vec::new();
        for key in addresses.difference(&self.protected) {
            if let Err(error) = self.tables.protected.put(key, &1, bpf::ANY) {
                self.unprotect(&new)?;
                return Err(map_error(map::PROTECTED)(error));
            }
            new.push(*key);
        }
        Ok(new)
    }

    pub(super) fn unprotect(&self, addresses: &[ProtectedKey]) -> Result<(), Error> {
        for key in addresses {
            self.tables.protected.remove(key).map_err(map_error(map::PROTECTED))?;
        }
        Ok(())
    }

    /// Takes protection back from addresses of a policy that was not installed.
    pub(super) fn unprotect_again(&self, addresses: &[ProtectedKey]) {
        if let Err(error) = self.unprotect(addresses) {
            tracing::warn!(%error, "addresses of a policy that was refused stay protected");
        }
    }

    /// Listening sockets of everybody but the agent.
    fn listening_sockets(&self) -> Result<Vec<Listed>, Error> {
        let mut sockets = diagnostics::sockets(diagnostics::LISTENING)?;
        let own = |socket: &Listed| matches!(self.tables.own.get(&socket.cookie), Ok(Some(_)));
        sockets.retain(|socket| !own(socket));
        Ok(sockets)
    }
}
