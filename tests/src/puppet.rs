//! A process that makes the socket calls it is told to, one line each, and tells what it hears meanwhile.
//!
//! Several commands in one line, separated by `;`, are made without anything between them; the first that fails ends the
//! line. Each line is answered by `{"reply":N,"ok":...,"steps":[...]}`. Whatever a listening socket of the process accepts
//! is read and sent back, and told: `{"event":"read","uid":2001,...}`.
//!
//! *Invariant:* one thread until `thread` is told, so that a fork is a whole copy and a change of user is that of the process.

mod known;
mod calls;
mod repeated;

use crate::{clock, dial, script, sys};
use anyhow::Context;
use calls::{connect, local, make, option, read};
use known::{Accepted, Known, give, inbox};
use repeated::{dials, litter};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::Timespec;
use rustix::process::{getegid, geteuid};
use serde_json::{Value, json};
use socket2::Socket;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
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

    /// A copy of the process that serves for a while with all that it inherits. It does nothing else with it and stays the
    /// user that it is, so that what is known of the sockets stays true.
    fn fork(&mut self, millis: u64) -> io::Result<Value> {
        let child = sys::fork()?;
        if child == 0 {
            self.ends = Some(Instant::now() + Duration::from_millis(millis));
        }
        Ok(json!({ "child": child }))
    }
}

/// Bytes that are written as pairs of hexadecimal digits.
fn bytes(text: &str) -> io::Result<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).ok());
    let byte = |pair: Option<&str>| pair.and_then(|pair| u8::from_str_radix(pair, 16).ok());
    pairs.map(|pair| byte(pair).ok_or_else(|| io::Error::other("want hexadecimal digits"))).collect()
}

fn told(error: &io::Error) -> String {
    if error.raw_os_error().is_some() { dial::name(error) } else { error.to_string() }
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
