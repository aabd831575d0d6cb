//! The sockets of a puppet with what it knows of their past: served to whoever calls, and given from one puppet to another.
//!
//! *Invariant:* a socket that was given away, or that somebody gave, is known to be shared.

use super::{Puppet, become_user};
use crate::{script, sys};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::Timespec;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use rustix::process::{geteuid, getpid};
use serde_json::{Value, json};
use socket2::Socket;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
use std::time::Duration;

/// A socket, and what this process knows of its past.
pub(super) struct Known {
    pub(super) socket: Socket,
    /// Whose user bound it and made it listen.
    pub(super) bound: Option<u32>,
    pub(super) listened: Option<u32>,
    /// Another process holds it as well, and may have done anything with it.
    pub(super) shared: bool,
}

/// A connection that was accepted.
pub(super) struct Accepted {
    pub(super) stream: Socket,
    pub(super) from: String,
    pub(super) bound: Option<u32>,
    pub(super) listened: Option<u32>,
    pub(super) shared: bool,
    pub(super) uid: u32,
    pub(super) peer: Option<SocketAddr>,
}

impl Known {
    /// Another thread has the socket from here on, and serves whoever calls: with descriptors of its own or those of the
    /// process, as another user or the same.
    pub(super) fn serve_beside(self, own: bool, user: Option<u32>) -> io::Result<()> {
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

impl Accepted {
    pub(super) fn tell(&self, event: &str, more: Value) {
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
    pub(super) fn hear(&mut self) -> bool {
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

impl Puppet {
    /// Takes a socket that somebody gave, with what the giver knows of its past.
    pub(super) fn take(&mut self, millis: i64) -> io::Result<Known> {
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
}

/// Where sockets are given to the puppet of this name. The name is one of the network namespace.
pub(super) fn inbox(name: &str) -> io::Result<UnixAddr> {
    UnixAddr::from_abstract_name(format!("bunter-lab-puppet-{name}"))
}

pub(super) fn give(known: &mut Known, to: &str) -> io::Result<()> {
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
