//! What a puppet does with one socket: it makes it, sets it up, connects it and reads from it, and waits a moment at most.

use super::parse;
use crate::sys;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::Timespec;
use serde_json::{Value, json};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::time::Duration;

pub(super) fn local(socket: &Socket) -> Option<String> {
    socket.local_addr().ok()?.as_socket().map(|address| address.to_string())
}

/// A socket that never makes its process wait.
pub(super) fn make(six: bool, kind: &str) -> io::Result<Socket> {
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

pub(super) fn option(socket: &Socket, option: &str) -> io::Result<()> {
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

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: time.subsec_nanos().into() }
}

/// Connects, and waits a moment for what comes of it.
pub(super) fn connect(socket: &Socket, to: &SockAddr, patience: Duration) -> io::Result<Value> {
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
pub(super) fn read(socket: &Socket, patience: Duration) -> io::Result<Value> {
    let limit = timespec(patience);
    if rustix::event::poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&limit))? == 0 {
        return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
    }
    let mut buffer = [0; 2048];
    let mut stream = socket;
    let size = stream.read(&mut buffer)?;
    Ok(json!({ "bytes": size, "text": String::from_utf8_lossy(&buffer[..size]) }))
}
