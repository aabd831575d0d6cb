//! What a puppet does over and over: it listens and closes, dials, meets others half-way, and leaves or holds sockets by
//! the thousand.

use super::Puppet;
use super::calls::{connect, make};
use super::known::{Accepted, Known};
use crate::dial;
use rustix::process::{Uid, geteuid, getpid};
use serde_json::{Value, json};
use socket2::Socket;
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr};
use std::time::{Duration, Instant};

impl Puppet {
    /// Listens, hears for a moment who is there, closes, and again: with a new socket each time, or with the same one.
    /// `listener`: who listens, where somebody else has bound.
    pub(super) fn flap(&mut self, at: SocketAddr, millis: u64, how: &str, listener: Option<u32>) -> io::Result<Value> {
        let uid = geteuid().as_raw();
        let end = Instant::now() + Duration::from_millis(millis);
        let fresh = || -> io::Result<Known> {
            let socket = make(at.is_ipv6(), "tcp")?;
            socket.set_reuse_address(true)?;
            socket.set_reuse_port(how == "shared")?;
            if listener.is_some() {
                real_user(uid)?;
            }
            // What the last one has left in the kernel takes a moment to go.
            while let Err(error) = socket.bind(&at.into()) {
                if error.kind() != io::ErrorKind::AddrInUse || Instant::now() >= end {
                    return Err(error);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            listener.map_or(Ok(()), real_user)?;
            Ok(Known { socket, bound: Some(uid), listened: Some(listener.unwrap_or(uid)), shared: false })
        };
        let (mut listens, mut same) = (0, fresh()?);
        while Instant::now() < end {
            same.socket.listen(64)?;
            listens += 1;
            self.sockets.insert("flap".to_owned(), same);
            for _ in 0..2 {
                std::thread::sleep(Duration::from_millis(1));
                self.hear();
            }
            same = self.sockets.remove("flap").ok_or_else(|| io::Error::other("the socket is gone"))?;
            if how == "again" {
                same.socket.shutdown(Shutdown::Read)?;
            } else {
                drop(same);
                same = fresh()?;
            }
        }
        Ok(json!({ "listens": listens }))
    }

    /// For so long: for every socket of the host that waits for an answer to its SYN, dials from where it dialled to where
    /// it is, so that the kernel may join the two (simultaneous open). What is said there is heard like that of a client.
    pub(super) fn cross(&mut self, millis: u64) -> io::Result<Value> {
        let end = Instant::now() + Duration::from_millis(millis);
        let (mut tries, mut joined) = (0, 0);
        while Instant::now() < end {
            for (waits, dialled) in waiting()? {
                tries += 1;
                let stream = make(false, "tcp")?;
                stream.set_reuse_address(true)?;
                if stream.bind(&dialled.into()).is_err()
                    || connect(&stream, &waits.into(), Duration::from_millis(100)).is_err()
                {
                    continue;
                }
                joined += 1;
                let uid = geteuid().as_raw();
                let from = "cross".to_owned();
                let (bound, listened) = (Some(uid), Some(uid));
                self.accepted.push(Accepted { stream, from, bound, listened, shared: false, uid, peer: Some(waits) });
            }
            self.hear();
        }
        Ok(json!({ "tries": tries, "joined": joined }))
    }

    /// Makes and keeps sockets, each of which has dialled the address in vain: a thousand from each address and port, of
    /// which only the first can get anywhere.
    pub(super) fn hoard(&mut self, number: usize, to: SocketAddr) -> io::Result<Value> {
        // The kernel walks along all that are bound to one port, so that there are several.
        let [.., high, low] = getpid().as_raw_nonzero().get().to_be_bytes();
        for index in 0..number {
            let port = 5000 + u16::try_from(index / 1000).unwrap_or(0);
            let from = SocketAddr::new(Ipv4Addr::new(127, 9, high, low).into(), port);
            let socket = make(false, "tcp")?;
            socket.set_reuse_address(true)?;
            // Whoever has as many as one may is refused both.
            if let Err(error) = socket.bind(&from.into())
                && error.kind() != io::ErrorKind::PermissionDenied
            {
                return Err(error);
            }
            let _ = socket.connect(&to.into());
            self.hoard.push(socket);
        }
        Ok(json!({ "held": self.hoard.len() }))
    }
}

/// Both ends of the IPv4 sockets of this network namespace that have sent a SYN and wait, as every user can read them.
fn waiting() -> io::Result<Vec<(SocketAddr, SocketAddr)>> {
    const SYN_SENT: &str = "02";
    let table = std::fs::read_to_string("/proc/thread-self/net/tcp")?;
    let end = |text: &str| {
        let (address, port) = text.split_once(':')?;
        let address = u32::from_str_radix(address, 16).ok()?.to_ne_bytes();
        Some(SocketAddr::new(Ipv4Addr::from(address).into(), u16::from_str_radix(port, 16).ok()?))
    };
    let row = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let (own, far, state) = (fields.next()?, fields.next()?, fields.next()?);
        if state == SYN_SENT { Some((end(own)?, end(far)?)) } else { None }
    };
    Ok(table.lines().filter_map(row).collect())
}

/// Whose calls this thread's are from here on, as far as the kernel's record of a task goes; its rights stay what they are.
fn real_user(uid: u32) -> io::Result<()> {
    let (real, own) = (Uid::from_raw(uid), geteuid());
    Ok(rustix::thread::set_thread_res_uid(real, own, own)?)
}

/// Binds to so many addresses, one after the other, listens where that is not all, and leaves each in this way, or gives
/// them.
pub(super) fn litter(base: u32, number: u32, how: &str) -> io::Result<Vec<Socket>> {
    let mut held = Vec::new();
    for index in base..base + number {
        let [_, a, b, c] = index.to_be_bytes();
        let at = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, a + 1, b, c)), 7000);
        let socket = make(false, if how.starts_with("mptcp") { "mptcp" } else { "tcp" })?;
        socket.bind(&at.into())?;
        if !how.ends_with("bound") {
            socket.listen(1)?;
        }
        if how == "shutdown" {
            socket.shutdown(Shutdown::Read)?;
        }
        if how == "hold" {
            held.push(socket);
        }
    }
    Ok(held)
}

/// Connects as often as it can, and tells what came of it by name.
pub(super) fn dials(to: SocketAddr, millis: u64) -> io::Result<Value> {
    let end = Instant::now() + Duration::from_millis(millis);
    let mut ends: BTreeMap<String, u64> = BTreeMap::new();
    let mut attempts = 0_u64;
    while Instant::now() < end {
        let outcome = make(to.is_ipv6(), "tcp")?.connect(&to.into());
        attempts += 1;
        *ends.entry(outcome.map_or_else(|error| dial::name(&error), |()| "connected".to_owned())).or_default() += 1;
    }
    Ok(json!({ "attempts": attempts, "ends": ends }))
}
