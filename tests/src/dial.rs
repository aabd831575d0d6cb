//! Every way in which a program can connect a TCP socket, and listen on one.
//!
//! *Invariant:* the error that the kernel gave is the error that comes out.

use crate::sys;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::Timespec;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::str::FromStr;
use std::time::Duration;

/// How a program connects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum How {
    /// `connect` on a blocking socket.
    #[default]
    Blocking,
    /// `connect` on a non-blocking socket, then `poll`, then `SO_ERROR`.
    NonBlocking,
    /// `sendto` with `MSG_FASTOPEN`.
    FastOpen,
    /// `TCP_FASTOPEN_CONNECT`, then `connect` and `write`.
    FastOpenConnect,
    /// `IORING_OP_CONNECT`.
    IoUring,
    /// An MPTCP socket.
    Multipath,
}

impl FromStr for How {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "blocking" => Self::Blocking,
            "nonblocking" => Self::NonBlocking,
            "fastopen" => Self::FastOpen,
            "fastopen-connect" => Self::FastOpenConnect,
            "io-uring" => Self::IoUring,
            "mptcp" => Self::Multipath,
            other => anyhow::bail!("no way to connect is called {other}"),
        })
    }
}

/// A new socket for this way of connecting.
pub fn socket(to: SocketAddr, bind: Option<SocketAddr>, how: How) -> io::Result<Socket> {
    let protocol = if how == How::Multipath { Protocol::MPTCP } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol))?;
    if let Some(bind) = bind {
        socket.bind(&bind.into())?;
    }
    Ok(socket)
}

/// Connects. `first` is what the program wants to say first; `FastOpen` says it in the SYN and the others leave it.
/// Gives the stream and how many bytes of it are sent.
pub fn dial(to: SocketAddr, bind: Option<SocketAddr>, how: How, first: &[u8]) -> io::Result<(TcpStream, usize)> {
    connect(socket(to, bind, how)?, to, how, first)
}

/// The same on a socket that is there already.
pub fn connect(socket: Socket, to: SocketAddr, how: How, first: &[u8]) -> io::Result<(TcpStream, usize)> {
    let address = SockAddr::from(to);
    let mut sent = 0;
    match how {
        How::Blocking | How::Multipath => socket.connect(&address)?,
        How::NonBlocking => {
            socket.set_nonblocking(true)?;
            match socket.connect(&address) {
                Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
                    let mut poll = [PollFd::new(&socket, PollFlags::OUT)];
                    let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
                    if rustix::event::poll(&mut poll, Some(&limit))? == 0 {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    if let Some(error) = socket.take_error()? {
                        return Err(error);
                    }
                }
                other => other?,
            }
            socket.set_nonblocking(false)?;
        }
        How::FastOpen => sent = sys::send_fastopen(socket.as_fd(), first, &address)?,
        How::FastOpenConnect => {
            sys::set_fastopen_connect(socket.as_fd())?;
            socket.connect(&address)?;
        }
        How::IoUring => sys::connect_io_uring(socket.as_fd(), &address)?,
    }
    Ok((socket.into(), sent))
}

/// Listens. An IPv6 wildcard takes IPv4 as well.
pub fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if at.is_ipv6() {
        socket.set_only_v6(!at.ip().is_unspecified())?;
    }
    socket.bind(&at.into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

/// A deadline on everything that the stream does.
pub fn limit(stream: &TcpStream, limit: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))
}

/// Ends a connection by RST.
pub fn reset(stream: TcpStream) -> io::Result<()> {
    let socket = Socket::from(stream);
    socket.set_linger(Some(Duration::ZERO))
}

/// Name of the error, as errno(3) has it.
pub fn name(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => "EPERM".to_owned(),
        Some(libc::EACCES) => "EACCES".to_owned(),
        Some(libc::ECONNREFUSED) => "ECONNREFUSED".to_owned(),
        Some(libc::ECONNRESET) => "ECONNRESET".to_owned(),
        Some(libc::ECONNABORTED) => "ECONNABORTED".to_owned(),
        Some(libc::EPIPE) => "EPIPE".to_owned(),
        Some(libc::ETIMEDOUT) => "ETIMEDOUT".to_owned(),
        Some(libc::EAGAIN) => "EAGAIN".to_owned(),
        Some(libc::EHOSTUNREACH) => "EHOSTUNREACH".to_owned(),
        Some(libc::ENETUNREACH) => "ENETUNREACH".to_owned(),
        Some(libc::EADDRNOTAVAIL) => "EADDRNOTAVAIL".to_owned(),
        Some(libc::EADDRINUSE) => "EADDRINUSE".to_owned(),
        Some(libc::EIO) => "EIO".to_owned(),
        Some(libc::EMFILE) => "EMFILE".to_owned(),
        Some(libc::ENOSYS) => "ENOSYS".to_owned(),
        Some(libc::EPROTONOSUPPORT) => "EPROTONOSUPPORT".to_owned(),
        Some(number) => format!("errno {number}"),
        None => format!("{:?}", error.kind()),
    }
}
