//! TCP sockets of this network namespace, as the kernel lists them, and a way to close one that is not ours
//! (sock_diag(7), `SOCK_DESTROY`).
//!
//! *Invariant:* a socket is closed only under its cookie, so that a new connection with the same addresses is never hit.

use super::{Error, tables::canonical};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType,
    netlink::{SOCK_DIAG, SocketAddrNetlink},
};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const DUMP: u16 = 0x300;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const INET_DIAG_SKV6ONLY: u16 = 11;

/// `1 << state`, by the numbers of `include/net/tcp_states.h`.
pub(super) const LISTENING: u32 = 1 << 10;
/// Established, or on the way there, or half closed.
pub(super) const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8;
/// Every state that a program's socket may be in. `TCP_TIME_WAIT` is none: only the ports are left of such a socket, and
/// where connections come and go there are tens of thousands of them.
pub(super) const ALIVE: u32 = !(1 << 6);
/// Every state.
const ALL: u32 = u32::MAX;

/// A TCP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Socket {
    /// Own end.
    pub local: SocketAddr,
    /// Other end.
    pub remote: SocketAddr,
    /// Socket cookie.
    pub cookie: u64,
    /// Inode number, as `/proc/PID/fd` shows it; 0 where no process has it any more.
    pub inode: u32,
    /// Owner of the socket file.
    pub uid: u32,
    /// An IPv6 socket that does not take IPv4.
    pub ipv6_only: bool,
    /// The family, which tells `[::]` from `0.0.0.0` mapped.
    pub family: u8,
    /// The device that it is bound to, or 0.
    pub interface: u32,
}

/// Lists the TCP sockets in these states.
pub(super) fn sockets(states: u32) -> Result<Vec<Socket>, Error> {
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        dump(family, states, &mut found).map_err(|error| Error::Diagnostics { error })?;
    }
    Ok(found)
}

/// Closes a socket that any process has, as if its connection had been reset. Says whether it was still there.
pub(super) fn destroy(socket: &Socket) -> Result<bool, Error> {
    let request = request(SOCK_DESTROY, REQUEST | ACKNOWLEDGE, socket.family, ALL, Some(socket));
    let answered = open().and_then(|netlink| {
        send(&netlink, &request)?;
        let mut buffer = vec![0; 8192];
        let length = receive(&netlink, &mut buffer)?;
        for (kind, body) in messages(buffer.get(..length).unwrap_or_default()) {
            if kind == NLMSG_ERROR {
                return error_code(body);
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    });
    match answered {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(Error::Diagnostics { error }),
    }
}

/// The user of the socket at the far end of a connection both ends of which are on this host. `None`: it is gone, or the
/// kernel does not say.
pub fn user_of(far: SocketAddr, near: SocketAddr) -> Option<u32> {
    let (far, near) = (canonical(far), canonical(near));
    let family = if far.is_ipv4() { AF_INET } else { AF_INET6 };
    // All ones stands for a cookie that is not known.
    let ends =
        Socket { local: far, remote: near, cookie: u64::MAX, inode: 0, uid: 0, ipv6_only: false, family, interface: 0 };
    let netlink = open().ok()?;
    send(&netlink, &request(SOCK_DIAG_BY_FAMILY, REQUEST, family, ALL, Some(&ends))).ok()?;
    let mut buffer = vec![0; 8192];
    let length = receive(&netlink, &mut buffer).ok()?;
    let answers = messages(buffer.get(..length)?);
    let (_, body) = answers.into_iter().find(|(kind, _)| *kind == SOCK_DIAG_BY_FAMILY)?;
    // Where the connection is gone, the kernel gives the socket that listens on its port.
    socket(body).filter(|found| (found.local, found.remote) == (far, near)).map(|found| found.uid)
}

fn dump(family: u8, states: u32, found: &mut Vec<Socket>) -> io::Result<()> {
    let netlink = open()?;
    send(&netlink, &request(SOCK_DIAG_BY_FAMILY, REQUEST | DUMP, family, states, None))?;
    let mut buffer = vec![0; 65536];
    loop {
        let length = receive(&netlink, &mut buffer)?;
        for (kind, body) in messages(buffer.get(..length).unwrap_or_default()) {
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => return error_code(body).and(Err(io::ErrorKind::InvalidData.into())),
                SOCK_DIAG_BY_FAMILY => found.extend(socket(body)),
                _ => {}
            }
        }
    }
}

fn open() -> io::Result<OwnedFd> {
    let netlink =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(SOCK_DIAG))?;
    let patience = std::time::Duration::from_secs(5);
    rustix::net::sockopt::set_socket_timeout(&netlink, rustix::net::sockopt::Timeout::Recv, Some(patience))?;
    Ok(netlink)
}

fn send(netlink: &OwnedFd, request: &[u8]) -> io::Result<()> {
    rustix::net::sendto(netlink, request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    Ok(())
}

fn receive(netlink: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match rustix::net::recv(netlink, &mut *buffer, RecvFlags::empty()) {
            Ok((length, _)) => return Ok(length),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`.
fn request(kind: u16, flags: u16, family: u8, states: u32, socket: Option<&Socket>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(72);
    bytes.extend(72_u32.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, IPPROTO_TCP, 0, 0]);
    bytes.extend(states.to_ne_bytes());
    let Some(socket) = socket else {
        bytes.extend([0; 40]);
        // INET_DIAG_NOCOOKIE, twice.
        bytes.extend([0xff; 8]);
        return bytes;
    };
    bytes.extend(socket.local.port().to_be_bytes());
    bytes.extend(socket.remote.port().to_be_bytes());
    for end in [socket.local, socket.remote] {
        match end.ip() {
            IpAddr::V4(ip) if family == AF_INET => {
                bytes.extend(ip.octets());
                bytes.extend([0; 12]);
            }
            IpAddr::V4(ip) => bytes.extend(ip.to_ipv6_mapped().octets()),
            IpAddr::V6(ip) => bytes.extend(ip.octets()),
        }
    }
    bytes.extend(socket.interface.to_ne_bytes());
    // The lower half comes first, whatever the byte order of the machine (inet_diag.h, sock_diag_save_cookie).
    bytes.extend((socket.cookie as u32).to_ne_bytes());
    bytes.extend(((socket.cookie >> 32) as u32).to_ne_bytes());
    bytes
}

/// The messages in a datagram: kind and body.
fn messages(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while let (Some(length), Some(kind)) = (u32_at(bytes, 0), u16_at(bytes, 4)) {
        let length = length as usize;
        let Some(body) = bytes.get(16..length) else { break };
        found.push((kind, body));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// `struct nlmsgerr`: a negative error code, or zero.
fn error_code(body: &[u8]) -> io::Result<()> {
    match u32_at(body, 0).map(u32::cast_signed) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// `struct inet_diag_msg` and its attributes.
fn socket(body: &[u8]) -> Option<Socket> {
    let family = *body.first()?;
    let port = |at| body.get(at..at + 2)?.try_into().ok().map(u16::from_be_bytes);
    let end = |at: usize, port| -> Option<SocketAddr> {
        let ip: IpAddr = match family {
            AF_INET => Ipv4Addr::from(<[u8; 4]>::try_from(body.get(at..at + 4)?).ok()?).into(),
            _ => Ipv6Addr::from(<[u8; 16]>::try_from(body.get(at..at + 16)?).ok()?).into(),
        };
        Some(SocketAddr::new(ip, port))
    };
    let (local, remote) = (end(8, port(4)?)?, end(24, port(6)?)?);
    let mut attributes = body.get(72..).unwrap_or_default();
    let mut ipv6_only = false;
    while let (Some(length), Some(kind)) = (u16_at(attributes, 0), u16_at(attributes, 2)) {
        let length = usize::from(length).max(4);
        if kind == INET_DIAG_SKV6ONLY {
            ipv6_only = attributes.get(4).is_some_and(|yes| *yes != 0);
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(Socket {
        local: canonical(local),
        remote: canonical(remote),
        cookie: u64::from(u32_at(body, 44)?) | u64::from(u32_at(body, 48)?) << 32,
        inode: u32_at(body, 68)?,
        uid: u32_at(body, 64)?,
        ipv6_only,
        family,
        interface: u32_at(body, 40)?,
    })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truncated_or_mad_answer_is_read_to_its_end_and_no_further() {
        assert!(messages(&[]).is_empty());
        assert!(messages(&[255; 40]).is_empty());
        assert!(messages(&[0; 40]).is_empty());
        assert_eq!(socket(&[AF_INET; 30]), None);
        let mut message = vec![0_u8; 72];
        message[0] = AF_INET6;
        message.extend([0, 0, 0, 0]);
        assert!(socket(&message).is_some());
    }

    // No privilege needed to list sockets; the kernel may lack the module.
    #[test]
    fn a_listener_of_this_process_is_listed() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let local = listener.local_addr().unwrap();
        match sockets(LISTENING) {
            Ok(found) => assert!(found.iter().any(|socket| socket.local == local)),
            Err(error) => eprintln!("SKIPPED (no socket diagnostics: {error}): a_listener_of_this_process_is_listed"),
        }
    }
}
