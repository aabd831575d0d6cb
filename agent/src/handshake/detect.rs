//! Does the client on a permissive listener speak TLS? Its first byte says, and is left in the socket.
//!
//! *Invariant:* nothing is taken from the socket: the stage that carries the connection sees the stream from its first
//! byte.

use rustix::net::{RecvFlags, recv};
use std::{io, time::Duration};
use tokio::{
    io::Interest,
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};

/// The first byte of every TLS client: a handshake record (RFC 9846 section 5.1).
const CLIENT_HELLO: u8 = 22;

/// True if the client's first byte opens a TLS handshake. False for any other byte, for a client that closes, and for
/// one that says nothing within `wait`: then the server may be the one that speaks first, which no TLS server does.
pub async fn looks_like_tls(socket: &TcpStream, wait: Duration) -> io::Result<bool> {
    let first = socket.async_io(Interest::READABLE, || {
        let mut byte = [0];
        let (_, length) = recv(socket, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
        Ok((length == 1).then_some(byte[0]))
    });
    match timeout(wait, first).await {
        Ok(first) => Ok(first? == Some(CLIENT_HELLO)),
        Err(_) => Ok(false),
    }
}

/// Waits until the peer has sent anything, or has ended. False: it was silent until the deadline.
///
/// The socket itself is asked, because readiness may be reported without a byte being there. A silent peer must not get a
/// slot: it would be missing for a peer whose own agent is waiting for this one's answer.
pub async fn received_any(socket: &TcpStream, deadline: Instant) -> bool {
    let first =
        socket.async_io(Interest::READABLE, || Ok(recv(socket, &mut [0], RecvFlags::PEEK | RecvFlags::DONTWAIT)?));
    timeout_at(deadline, first).await.is_ok()
}
