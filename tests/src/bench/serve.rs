//! The server under load: echo, sink and a page of HTTP, on one event loop for each thread.
//!
//! The first byte of a connection chooses: [`SINK`] throws everything away until [`DONE`] and answers how many bytes came;
//! `G`, as in `GET`, is answered in HTTP, for wrk; everything else is sent back.
//!
//! *Invariant:* every byte is copied out of the kernel, as a real program would.

use crate::bench::poll::{Flags, Poll, Ready, number};
use crate::dial;
use crate::servers::{DONE, SINK};
use anyhow::Context;
use rustix::event::epoll;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};

/// Bytes that are read at once.
const READ: usize = 256 * 1024;
/// Reads of one connection before another one gets its turn.
const TURNS: usize = 8;
/// What a `GET` is answered with; its body has the 64 bytes of a round trip.
const PAGE: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\nContent-Type: text/plain\r\n\r\n\
                      xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx";

/// Serves on all these addresses with so many threads, for ever; `sealed` with kernel TLS under a fixed key.
pub fn run(addresses: &[SocketAddr], threads: usize, sealed: bool) -> crate::Result<()> {
    let mut listeners = Vec::new();
    for address in addresses {
        let listener = dial::listen(*address).with_context(|| format!("listen on {address}"))?;
        listener.set_nonblocking(true)?;
        crate::servers::ready(&listener.local_addr()?.to_string());
        listeners.push(listener);
    }
    std::thread::scope(|scope| {
        let started: Vec<_> =
            (0..threads.max(1)).map(|_| scope.spawn(|| Loop::new(&listeners, sealed)?.run())).collect();
        for thread in started {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(())
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    Unknown,
    Echo,
    Sink,
    Page,
}

struct Connection {
    stream: TcpStream,
    task: Task,
    bytes: u64,
    /// What the kernel had no room for.
    pending: Vec<u8>,
}

struct Loop<'a> {
    poll: Poll,
    listeners: &'a [TcpListener],
    sealed: bool,
    /// By number of the socket.
    connections: Vec<Option<Connection>>,
    buffer: Vec<u8>,
}

impl<'a> Loop<'a> {
    fn new(listeners: &'a [TcpListener], sealed: bool) -> crate::Result<Self> {
        let poll = Poll::new()?;
        for listener in listeners {
            poll.add(listener, number(listener), Flags::IN | Flags::EXCLUSIVE)?;
        }
        Ok(Self { poll, listeners, sealed, connections: Vec::new(), buffer: vec![0; READ] })
    }

    fn run(mut self) -> crate::Result<()> {
        let Self { poll, listeners, sealed, connections, buffer } = &mut self;
        loop {
            poll.wait(None, |epoll, ready| {
                if let Some(listener) = listeners.iter().find(|listener| number(*listener) == ready.number) {
                    return accept(epoll, listener, *sealed, connections);
                }
                let Some(slot) = connections.get_mut(ready.number) else { return Ok(()) };
                let Some(connection) = slot else { return Ok(()) };
                if !connection.turn(epoll, ready, buffer).unwrap_or(false) {
                    *slot = None;
                }
                Ok(())
            })?;
        }
    }
}

fn accept(
    epoll: &OwnedFd,
    listener: &TcpListener,
    sealed: bool,
    connections: &mut Vec<Option<Connection>>,
) -> crate::Result<()> {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // The client may have gone already.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error).context("accept"),
        };
        if sealed {
            crate::sys::set_fixed_tls(stream.as_fd()).context("TLS of the kernel")?;
        }
        if stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).is_err() {
            continue;
        }
        let at = number(&stream);
        epoll::add(epoll, &stream, epoll::EventData::new_u64(at as u64), Flags::IN)?;
        if connections.len() <= at {
            connections.resize_with(at + 1, || None);
        }
        connections[at] = Some(Connection { stream, task: Task::Unknown, bytes: 0, pending: Vec::new() });
    }
}

impl Connection {
    /// False when the connection is over.
    fn turn(&mut self, epoll: &OwnedFd, ready: Ready, buffer: &mut [u8]) -> io::Result<bool> {
        if !self.pending.is_empty() {
            if !ready.flags.contains(Flags::OUT) {
                return Ok(!ready.flags.intersects(Flags::ERR | Flags::HUP));
            }
            let left = std::mem::take(&mut self.pending);
            self.send(epoll, &left)?;
            if self.pending.is_empty() {
                epoll::modify(epoll, &self.stream, epoll::EventData::new_u64(ready.number as u64), Flags::IN)?;
            }
            return Ok(true);
        }
        for _ in 0..TURNS {
            let size = match self.stream.read(buffer) {
                Ok(0) => return Ok(false),
                Ok(size) => size,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            };
            self.bytes += size as u64;
            let came = &buffer[..size];
            if self.task == Task::Unknown {
                self.task = match came[0] {
                    SINK => Task::Sink,
                    b'G' => Task::Page,
                    _ => Task::Echo,
                };
            }
            match self.task {
                Task::Sink if came[size - 1] == DONE => self.send(epoll, &self.bytes.to_le_bytes())?,
                Task::Sink | Task::Unknown => {}
                Task::Echo => self.send(epoll, came)?,
                Task::Page if came.ends_with(b"\r\n\r\n") => {
                    self.send(epoll, PAGE)?;
                    if came.windows(6).any(|window| window.eq_ignore_ascii_case(b": clos")) {
                        return Ok(false);
                    }
                }
                Task::Page => {}
            }
            if size < buffer.len() || !self.pending.is_empty() {
                return Ok(true);
            }
        }
        Ok(true)
    }

    fn send(&mut self, epoll: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
        let mut left = bytes;
        while !left.is_empty() {
            match (&self.stream).write(left) {
                Ok(size) => left = &left[size..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.pending.extend_from_slice(left);
                    let at = number(&self.stream) as u64;
                    epoll::modify(epoll, &self.stream, epoll::EventData::new_u64(at), Flags::OUT)?;
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
