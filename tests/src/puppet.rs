//! A process that makes the socket calls it is told to, one line each, and tells what it hears meanwhile.
//!
//! Several commands in one line, separated by `;`, are made without anything between them; the first that fails ends the
//! line. Each line is answered by `{"reply":N,"ok":...,"steps":[...]}`. Whatever a listening socket of the process accepts
//! is read and sent back, and told: `{"event":"read","uid":2001,...}`.
//!
//! *Invariant:* one thread until `thread` is told, so that a fork is a whole copy and a change of user is that of the process.

use crate::{clock, dial, script, sys};
use anyhow::Context;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::Timespec;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use rustix::process::{Uid, getegid, geteuid, getpid};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
use std::str::FromStr;
use std::time::{Duration, Instant};

/// What a puppet understands.
pub const COMMANDS: &str = "socket S 4|6 [tcp|mptcp|sctp|dccp|udp|icmp|ping] opt S reuseport|reuseaddr|v6only|dual|reset|deferred|device:NAME|via:IPV6
  bind S ADDRESS listen S [BACKLOG] shutdown S rd|wr|both close S dup S T give S PUPPET take T [MS] name S connect S ADDRESS disconnect S
  write S TEXT send-to S ADDRESS TEXT fastopen S ADDRESS TEXT read S fork MS setuid UID cgroup DIR mkdir DIR serve on|off
  files N call HEX thread S same|own [UID] leave
  litter N shutdown|close|mptcp|bound|mptcp-bound hold N [BASE] flap ADDRESS MS [again|shared|as UID] dials ADDRESS MS cross MS hoard N ADDRESS patience MS sleep MS";

/// Connections that a puppet has open at most; the oldest goes first.
const CONNECTIONS: usize = 64;

/// A socket, and what this process knows of its past.
struct Known {
    socket: Socket,
    /// Whose user bound it and made it listen.
    bound: Option<u32>,
    listened: Option<u32>,
    /// Another process holds it as well, and may have done anything with it.
    shared: bool,
}

/// A connection that was accepted.
struct Accepted {
    stream: Socket,
    from: String,
    bound: Option<u32>,
    listened: Option<u32>,
    shared: bool,
    uid: u32,
    peer: Option<SocketAddr>,
}

struct Puppet {
    sockets: BTreeMap<String, Known>,
    accepted: Vec<Accepted>,
    inbox: UnixDatagram,
    serves: bool,
    /// How long a connect or a read may take.
    patience: Duration,
    /// What is held for its own sake.
    hoard: Vec<Socket>,
    /// The same of files.
    files: Vec<File>,
    /// Its first thread ends, and another one goes on.
    leaves: bool,
    /// A copy made by `fork` lives as long as this and hears no commands.
    ends: Option<Instant>,
}

/// The life of a puppet of this name: until its standard input ends.
pub fn serve(name: &str) -> crate::Result<()> {
    let inbox = UnixDatagram::bind_addr(&inbox(name)?)?;
    let (sockets, accepted, hoard, files) = (BTreeMap::new(), Vec::new(), Vec::new(), Vec::new());
    let patience = clock::seconds(3);
    let mut puppet =
        Puppet { sockets, accepted, inbox, serves: true, patience, hoard, files, leaves: false, ends: None };
    crate::servers::ready(name);
    let (mut said, mut number) = (Vec::new(), 0);
    loop {
        if puppet.ends.is_some_and(|end| Instant::now() >= end) {
            return Ok(());
        }
        if puppet.wait()? {
            let mut buffer = [0; 4096];
            let size = rustix::io::read(io::stdin(), &mut buffer)?;
            if size == 0 {
                return Ok(());
            }
            said.extend_from_slice(&buffer[..size]);
        }
        puppet.hear();
        while let Some(end) = said.iter().position(|byte| *byte == b'\n').filter(|_| puppet.ends.is_none()) {
            let line = String::from_utf8_lossy(&said[..end]).into_owned();
            said.drain(..=end);
            let answer = puppet.obey(&line);
            // A copy has its parent's place in the story, but not its voice.
            if puppet.ends.is_none() {
                number += 1;
                script::say(&with(answer, "reply", json!(number)));
            }
            if puppet.leaves {
                sys::end_thread();
            }
        }
    }
}

fn with(mut value: Value, name: &str, part: Value) -> Value {
    value[name] = part;
    value
}

/// Where sockets are given to the puppet of this name. The name is one of the network namespace.
fn inbox(name: &str) -> io::Result<UnixAddr> {
    UnixAddr::from_abstract_name(format!("wimsey-lab-puppet-{name}"))
}

fn parse<T: FromStr>(word: Option<&str>, what: &str) -> io::Result<T> {
    word.and_then(|word| word.parse().ok()).ok_or_else(|| io::Error::other(format!("want {what}")))
}

impl Puppet {
    /// Waits until something is to be done. True if it is a command.
    fn wait(&self) -> crate::Result<bool> {
        let listening = self.listening();
        let mut polled = Vec::new();
        let stdin = io::stdin();
        // Polled for nothing where nobody may speak: what is left of the list keeps its place.
        polled.push(PollFd::new(&stdin, if self.ends.is_some() { PollFlags::empty() } else { PollFlags::IN }));
        polled.extend(listening.iter().map(|(_, known)| PollFd::new(&known.socket, PollFlags::IN)));
        polled.extend(self.accepted.iter().map(|accepted| PollFd::new(&accepted.stream, PollFlags::IN)));
        let limit = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        match rustix::event::poll(&mut polled, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        let said = PollFlags::IN | PollFlags::HUP;
        Ok(self.ends.is_none() && polled.first().is_some_and(|stdin| stdin.revents().intersects(said)))
    }

    fn listening(&self) -> Vec<(&String, &Known)> {
        let listening = |known: &Known| self.serves && known.socket.is_listener().unwrap_or(false);
        self.sockets.iter().filter(|(_, known)| listening(known)).collect()
    }

    /// Accepts and reads what there is.
    fn hear(&mut self) {
        let mut fresh = Vec::new();
        for (name, known) in self.listening() {
            while let Ok((stream, peer)) = known.socket.accept() {
                let (bound, listened, shared) = (known.bound, known.listened, known.shared);
                let (uid, peer) = (geteuid().as_raw(), peer.as_socket());
                fresh.push(Accepted { stream, from: name.clone(), bound, listened, shared, uid, peer });
            }
        }
        for accepted in fresh {
            accepted.tell("accepted", json!({}));
            let _ = accepted.stream.set_nonblocking(true);
            self.accepted.push(accepted);
        }
        self.accepted.retain_mut(Accepted::hear);
        let surplus = self.accepted.len().saturating_sub(CONNECTIONS);
        self.accepted.drain(..surplus);
    }

    fn obey(&mut self, line: &str) -> Value {
        let mut steps = Vec::new();
        for command in line.split(';').map(str::trim) {
            let outcome = self.perform(command);
            let good = outcome.is_ok();
            let step = match outcome {
                Ok(value) => with(value, "ok", json!(true)),
                Err(error) => json!({ "ok": false, "error": told(&error) }),
            };
            steps.push(with(step, "command", json!(command)));
            if !good {
                return json!({ "ok": false, "error": steps.last().map(|step| step["error"].clone()), "steps": steps });
            }
        }
        json!({ "ok": true, "steps": steps })
    }

    fn known(&mut self, name: &str) -> io::Result<&mut Known> {
        self.sockets.get_mut(name).ok_or_else(|| io::Error::other(format!("no socket {name}")))
    }

    fn perform(&mut self, command: &str) -> io::Result<Value> {
        let words: Vec<&str> = command.split(' ').filter(|word| !word.is_empty()).collect();
        let (verb, name) = (words.first().copied().unwrap_or_default(), words.get(1).copied().unwrap_or_default());
        let word = |at: usize| words.get(at).copied();
        let address = |at: usize| parse::<SocketAddr>(word(at), "an address");
        let text = |at: usize| words.get(at..).unwrap_or_default().join(" ") + "\n";
        let uid = geteuid().as_raw();
        match verb {
            "socket" => {
                let socket = make(word(2) == Some("6"), word(3).unwrap_or("tcp"))?;
                self.sockets.insert(name.to_owned(), Known { socket, bound: None, listened: None, shared: false });
            }
            "opt" => option(&self.known(name)?.socket, word(2).unwrap_or_default())?,
            "bind" => {
                let known = self.known(name)?;
                known.socket.bind(&address(2)?.into())?;
                known.bound = Some(uid);
                return Ok(json!({ "local": local(&known.socket) }));
            }
            "listen" => {
                let known = self.known(name)?;
                let again = known.socket.is_listener()?;
                known.socket.listen(word(2).map_or(Ok(1024), |_| parse(word(2), "a backlog"))?)?;
                // To listen twice changes nothing.
                if !again {
                    known.listened = Some(uid);
                }
                return Ok(json!({ "local": local(&known.socket) }));
            }
            "shutdown" => {
                let how = match word(2) {
                    Some("rd") => Shutdown::Read,
                    Some("wr") => Shutdown::Write,
                    _ => Shutdown::Both,
                };
                self.known(name)?.socket.shutdown(how)?;
            }
            "close" => drop(self.sockets.remove(name)),
            "dup" => {
                let known = self.known(name)?;
                let socket = known.socket.try_clone()?;
                let twin = Known { socket, bound: known.bound, listened: known.listened, shared: known.shared };
                self.sockets.insert(word(2).unwrap_or("twin").to_owned(), twin);
            }
            "give" => give(self.known(name)?, word(2).unwrap_or_default())?,
            "take" => {
                let known = self.take(word(2).map_or(Ok(2000), |_| parse(word(2), "milliseconds"))?)?;
                self.sockets.insert(name.to_owned(), known);
            }
            "name" => return Ok(json!({ "local": local(&self.known(name)?.socket) })),
            "connect" => {
                let patience = self.patience;
                return connect(&self.known(name)?.socket, &address(2)?.into(), patience);
            }
            "disconnect" => rustix::net::connect_unspec(&self.known(name)?.socket)?,
            "write" => {
                let size = (&self.known(name)?.socket).write(text(2).as_bytes())?;
                return Ok(json!({ "bytes": size }));
            }
            "send-to" => {
                let size = self.known(name)?.socket.send_to(text(3).as_bytes(), &address(2)?.into())?;
                return Ok(json!({ "bytes": size }));
            }
            "fastopen" => {
                let socket = &self.known(name)?.socket;
                let size = sys::send_fastopen(socket.as_fd(), text(3).as_bytes(), &address(2)?.into())?;
                return Ok(json!({ "bytes": size }));
            }
            "read" => {
                let patience = self.patience;
                return read(&self.known(name)?.socket, patience);
            }
            "patience" => self.patience = Duration::from_millis(parse(word(1), "milliseconds")?),
            "fork" => return self.fork(parse(word(1), "milliseconds")?),
            "setuid" => become_user(parse(word(1), "a user")?)?,
            "cgroup" => std::fs::write(format!("{name}/cgroup.procs"), "0")?,
            "mkdir" => std::fs::create_dir(name)?,
            "serve" => self.serves = name == "on",
            "sleep" => std::thread::sleep(Duration::from_millis(parse(word(1), "milliseconds")?)),
            "litter" => drop(litter(0, parse(word(1), "a number")?, word(2).unwrap_or("shutdown"))?),
            "flap" => {
                let listener = if word(3) == Some("as") { Some(parse(word(4), "a user")?) } else { None };
                return self.flap(address(1)?, parse(word(2), "milliseconds")?, word(3).unwrap_or_default(), listener);
            }
            "cross" => return self.cross(parse(word(1), "milliseconds")?),
            "dials" => return dials(address(1)?, parse(word(2), "milliseconds")?),
            "hold" => {
                self.hoard.extend(litter(
                    word(2).map_or(Ok(0), |_| parse(word(2), "a base"))?,
                    parse(word(1), "a number")?,
                    "hold",
                )?);
                return Ok(json!({ "held": self.hoard.len() }));
            }
            "files" => {
                let file = File::open("/dev/null")?;
                for _ in 0..parse::<usize>(word(1), "a number")? {
                    self.files.push(file.try_clone()?);
                }
            }
            "call" => std::fs::write("/proc/self/comm", bytes(name)?)?,
            "thread" => {
                let user = word(3).map(|_| parse(word(3), "a user")).transpose()?;
                let known = self.sockets.remove(name).ok_or_else(|| io::Error::other(format!("no socket {name}")))?;
                known.serve_beside(word(2) == Some("own"), user)?;
            }
            "leave" => self.leaves = true,
            "hoard" => return self.hoard(parse(word(1), "a number")?, address(2)?),
            other => return Err(io::Error::other(format!("no command is called {other}\n{COMMANDS}"))),
        }
        Ok(json!({}))
    }

    /// Takes a socket that somebody gave, with what the giver knows of its past.
    fn take(&mut self, millis: i64) -> io::Result<Known> {
        let limit = Timespec { tv_sec: millis / 1000, tv_nsec: millis % 1000 * 1_000_000 };
        if rustix::event::poll(&mut [PollFd::new(&self.inbox, PollFlags::IN)], Some(&limit))? == 0 {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut past = [0; 64];
        let slices = &mut [IoSliceMut::new(&mut past)];
        let size = rustix::net::recvmsg(&self.inbox, slices, &mut ancillary, RecvFlags::empty())?.bytes;
        let given: Option<OwnedFd> = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
            _ => None,
        });
        let socket = Socket::from(given.ok_or_else(|| io::Error::other("no socket came"))?);
        let past = String::from_utf8_lossy(past.get(..size).unwrap_or_default()).into_owned();
        let mut words = past.split(' ').map(|word| word.parse().ok());
        let (bound, listened) = (words.next().flatten(), words.next().flatten());
        Ok(Known { socket, bound, listened, shared: true })
    }

    /// A copy of the process that serves for a while with all that it inherits. It does nothing else with it and stays the
    /// user that it is, so that what is known of the sockets stays true.
    fn fork(&mut self, millis: u64) -> io::Result<Value> {
        let child = sys::fork()?;
        if child == 0 {
            self.ends = Some(Instant::now() + Duration::from_millis(millis));
        }
        Ok(json!({ "child": child }))
    }

    /// Listens, hears for a moment who is there, closes, and again: with a new socket each time, or with the same one.
    /// `listener`: who listens, where somebody else has bound.
    fn flap(&mut self, at: SocketAddr, millis: u64, how: &str, listener: Option<u32>) -> io::Result<Value> {
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
    fn cross(&mut self, millis: u64) -> io::Result<Value> {
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
    fn hoard(&mut self, number: usize, to: SocketAddr) -> io::Result<Value> {
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

impl Known {
    /// Another thread has the socket from here on, and serves whoever calls: with descriptors of its own or those of the
    /// process, as another user or the same.
    fn serve_beside(self, own: bool, user: Option<u32>) -> io::Result<()> {
        let (ready, is_ready) = std::sync::mpsc::channel();
        let Known { socket, bound, listened, shared } = self;
        let number = socket.as_raw_fd();
        std::thread::spawn(move || {
            let begun = if own { sys::own_descriptors() } else { Ok(()) };
            let begun = begun.and_then(|()| user.map_or(Ok(()), become_user));
            let good = begun.is_ok();
            if ready.send(begun).is_err() || !good {
                return;
            }
            loop {
                let Ok((stream, peer)) = socket.accept() else {
                    std::thread::sleep(Duration::from_millis(2));
                    continue;
                };
                let (uid, from) = (geteuid().as_raw(), "beside".to_owned());
                let mut accepted = Accepted { stream, from, bound, listened, shared, uid, peer: peer.as_socket() };
                let _ = accepted.stream.set_nonblocking(true);
                while accepted.hear() {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        let begun = is_ready.recv().map_err(io::Error::other)?;
        if own {
            // The thread has a copy under the same number.
            sys::close(number);
        }
        begun
    }
}

/// Bytes that are written as pairs of hexadecimal digits.
fn bytes(text: &str) -> io::Result<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).ok());
    let byte = |pair: Option<&str>| pair.and_then(|pair| u8::from_str_radix(pair, 16).ok());
    pairs.map(|pair| byte(pair).ok_or_else(|| io::Error::other("want hexadecimal digits"))).collect()
}

impl Accepted {
    fn tell(&self, event: &str, more: Value) {
        let mut line = more;
        for (name, value) in [
            ("event", json!(event)),
            ("pid", json!(getpid().as_raw_nonzero().get())),
            ("uid", json!(geteuid().as_raw())),
            ("accepted", json!(self.uid)),
            ("socket", json!(self.from)),
            ("bound", json!(self.bound)),
            ("listened", json!(self.listened)),
            ("shared", json!(self.shared)),
            ("peer", json!(self.peer.map(|peer| peer.to_string()))),
        ] {
            line[name] = value;
        }
        script::say(&line);
    }

    /// Reads what is there and sends it back. False when the connection is over.
    fn hear(&mut self) -> bool {
        let mut buffer = [0; 2048];
        loop {
            match (&self.stream).read(&mut buffer) {
                Ok(0) => return false,
                Ok(size) => {
                    let text = String::from_utf8_lossy(&buffer[..size.min(160)]).into_owned();
                    self.tell("read", json!({ "bytes": size, "text": text }));
                    let _ = (&self.stream).write(&buffer[..size]);
                }
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
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

fn told(error: &io::Error) -> String {
    if error.raw_os_error().is_some() { dial::name(error) } else { error.to_string() }
}

fn local(socket: &Socket) -> Option<String> {
    socket.local_addr().ok()?.as_socket().map(|address| address.to_string())
}

/// A socket that never makes its process wait.
fn make(six: bool, kind: &str) -> io::Result<Socket> {
    let domain = if six { Domain::IPV6 } else { Domain::IPV4 };
    let icmp = if six { Protocol::ICMPV6 } else { Protocol::ICMPV4 };
    let (kind, protocol) = match kind {
        "tcp" => (Type::STREAM, Protocol::TCP),
        "mptcp" => (Type::STREAM, Protocol::MPTCP),
        "sctp" => (Type::STREAM, Protocol::SCTP),
        "dccp" => (Type::DCCP, Protocol::DCCP),
        "udp" => (Type::DGRAM, Protocol::UDP),
        "icmp" => (Type::RAW, icmp),
        "ping" => (Type::DGRAM, icmp),
        other => return Err(io::Error::other(format!("no kind of socket is called {other}"))),
    };
    let socket = Socket::new(domain, kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn option(socket: &Socket, option: &str) -> io::Result<()> {
    match option {
        "reuseport" => socket.set_reuse_port(true),
        "reuseaddr" => socket.set_reuse_address(true),
        "v6only" => socket.set_only_v6(true),
        "dual" => socket.set_only_v6(false),
        // Closing it is a reset.
        "reset" => socket.set_linger(Some(Duration::ZERO)),
        // Its `connect()` sends nothing: the first bytes do, in the SYN.
        "deferred" => {
            sys::set_number(socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_FASTOPEN_NO_COOKIE, 1)?;
            sys::set_number(socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1)
        }
        other => match other.split_once(':') {
            Some(("device", device)) => socket.bind_device(Some(device.as_bytes())),
            Some(("via", hop)) => sys::set_route(socket.as_fd(), parse(Some(hop), "an IPv6 address")?),
            _ => Err(io::Error::other(format!("no option is called {option}"))),
        },
    }
}

/// Whose calls this thread's are from here on, as far as the kernel's record of a task goes; its rights stay what they are.
fn real_user(uid: u32) -> io::Result<()> {
    let (real, own) = (Uid::from_raw(uid), geteuid());
    Ok(rustix::thread::set_thread_res_uid(real, own, own)?)
}

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: time.subsec_nanos().into() }
}

/// Connects, and waits a moment for what comes of it.
fn connect(socket: &Socket, to: &SockAddr, patience: Duration) -> io::Result<Value> {
    match socket.connect(to) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
            let limit = timespec(patience);
            if rustix::event::poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&limit))? == 0 {
                return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
            }
            if let Some(error) = socket.take_error()? {
                return Err(error);
            }
        }
        Err(error) => return Err(error),
    }
    Ok(json!({ "local": local(socket) }))
}

/// What comes within a moment.
fn read(socket: &Socket, patience: Duration) -> io::Result<Value> {
    let limit = timespec(patience);
    if rustix::event::poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&limit))? == 0 {
        return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
    }
    let mut buffer = [0; 2048];
    let mut stream = socket;
    let size = stream.read(&mut buffer)?;
    Ok(json!({ "bytes": size, "text": String::from_utf8_lossy(&buffer[..size]) }))
}

fn give(known: &mut Known, to: &str) -> io::Result<()> {
    let post = UnixDatagram::unbound()?;
    post.connect_addr(&inbox(to)?)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let given = [known.socket.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&given));
    let word = |uid: Option<u32>| uid.map_or("-".to_owned(), |uid| uid.to_string());
    let past = format!("{} {}", word(known.bound), word(known.listened));
    rustix::net::sendmsg(&post, &[IoSlice::new(past.as_bytes())], &mut ancillary, SendFlags::DONTWAIT)?;
    known.shared = true;
    Ok(())
}

fn become_user(uid: u32) -> io::Result<()> {
    use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    if uid != 0 && getegid().as_raw() == 0 {
        let group = rustix::process::Gid::from_raw(uid);
        set_thread_groups(&[])?;
        set_thread_res_gid(group, group, group)?;
    }
    let user = rustix::process::Uid::from_raw(uid);
    Ok(set_thread_res_uid(user, user, user)?)
}

/// Binds to so many addresses, one after the other, listens where that is not all, and leaves each in this way, or gives
/// them.
fn litter(base: u32, number: u32, how: &str) -> io::Result<Vec<Socket>> {
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
fn dials(to: SocketAddr, millis: u64) -> io::Result<Value> {
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
