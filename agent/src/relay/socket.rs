//! Reading and writing sockets without needless system calls.
//!
//! The sockets are edge-triggered: a read that fills less than its room, or a write that is taken in part, says that the
//! next one would block, so readiness is given back at once and the next call waits for the next edge.
//! *Invariant:* nothing here waits.

use super::buffers::with_scratch;
use crate::offload::record::MAX_PLAINTEXT;
use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};
use std::io::{self, ErrorKind};
use tokio::{io::Interest, net::TcpStream};

/// What a read gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// So many bytes.
    Bytes(usize),
    /// No bytes for now.
    Blocked,
    /// No bytes any more: the stream has ended.
    End,
}

/// Reads at most `room` bytes. `short_is_dry`: fewer than that say that the socket is empty now.
pub(super) fn read(
    socket: &TcpStream,
    room: usize,
    short_is_dry: bool,
    mut read: impl FnMut() -> Result<usize, Errno>,
) -> io::Result<Read> {
    let mut outcome = Read::Blocked;
    attempt(socket.try_io(Interest::READABLE, || {
        match read()? {
            0 => outcome = Read::End,
            length => {
                outcome = Read::Bytes(length);
                if short_is_dry && length < room {
                    return Err(ErrorKind::WouldBlock.into());
                }
            }
        }
        Ok(())
    }))?;
    Ok(outcome)
}

/// Reads like `read`, but asks the socket itself instead of what is known of its readiness: for sockets that report an
/// error without saying that they can be read.
pub(super) fn read_unasked(socket: &TcpStream, read: impl FnOnce() -> Result<usize, Errno>) -> io::Result<Read> {
    match read() {
        Ok(0) => Ok(Read::End),
        Ok(length) => Ok(Read::Bytes(length)),
        Err(Errno::AGAIN | Errno::INTR) => {
            forget(socket, Interest::READABLE)?;
            Ok(Read::Blocked)
        }
        Err(error) => Err(error.into()),
    }
}

/// The first bytes that an application has sent by now, at most what one record holds. Also empty where the application has
/// ended its stream: the next read finds that end again.
pub(crate) fn first_bytes(application: &TcpStream) -> io::Result<Vec<u8>> {
    with_scratch(|scratch| {
        let room = scratch.bytes.get_mut(..MAX_PLAINTEXT).unwrap_or_default();
        // Nothing has waited for this socket yet, so that tokio may know nothing of its readiness.
        match read_unasked(application, || Ok(recv(application, &mut *room, RecvFlags::DONTWAIT)?.1))? {
            Read::Bytes(length) => {
                if length < room.len() {
                    forget(application, Interest::READABLE)?;
                }
                Ok(room.get(..length).unwrap_or_default().to_vec())
            }
            Read::Blocked | Read::End => Ok(Vec::new()),
        }
    })
}

/// Clears the readiness that tokio has noted: the next wait for it waits for the next edge.
pub(super) fn forget(socket: &TcpStream, readiness: Interest) -> io::Result<()> {
    attempt(socket.try_io(readiness, || Err(ErrorKind::WouldBlock.into())))
}

/// Writes `length` bytes or fewer, and says how many; 0 where the socket takes none.
pub(super) fn write(
    socket: &TcpStream,
    length: usize,
    mut write: impl FnMut() -> Result<usize, Errno>,
) -> io::Result<usize> {
    let mut taken = 0;
    attempt(socket.try_io(Interest::WRITABLE, || {
        taken = write()?;
        if taken < length { Err(ErrorKind::WouldBlock.into()) } else { Ok(()) }
    }))?;
    Ok(taken)
}

/// Writes like `write`, but asks the socket itself instead of what is known of its readiness: for sockets that may forget
/// to say that they have room.
pub(super) fn write_unasked(
    socket: &TcpStream,
    length: usize,
    write: impl FnOnce() -> Result<usize, Errno>,
) -> io::Result<usize> {
    let taken = match write() {
        Ok(taken) => taken,
        Err(Errno::AGAIN | Errno::INTR) => 0,
        Err(error) => return Err(error.into()),
    };
    if taken < length {
        forget(socket, Interest::WRITABLE)?;
    }
    Ok(taken)
}

fn attempt(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.kind() != ErrorKind::WouldBlock && error.kind() != ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

/// Takes what has arrived off a socket and drops it, so that closing it does not turn into a reset.
pub(super) fn discard(socket: &TcpStream) {
    let mut rest = [0; 8192];
    for _ in 0..128 {
        match socket.try_read(&mut rest) {
            Ok(1..) => {}
            Ok(0) | Err(_) => return,
        }
    }
}
