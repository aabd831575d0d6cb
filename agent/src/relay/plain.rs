//! Plaintext, for permissive listeners: bytes pass unchanged.
//!
//! *Invariant:* a plain pipe is made only where policy said so; nothing falls back to this layer.

use super::{
    buffers::{Batch, Pending, Scratch},
    record_layer::{ControlRecord, Fault, Inbound, Outbound, RecordLayer, Then},
    socket::{self, Read},
};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::io;
use tokio::net::TcpStream;

pub(super) struct Plain;

impl RecordLayer for Plain {
    const TLS: bool = false;

    fn outbound(&mut self, application: &TcpStream, batch: Batch, scratch: &mut Scratch) -> Result<Outbound, Fault> {
        Ok(match take(application, batch, scratch)? {
            Read::Blocked => Outbound::Blocked,
            Read::End => Outbound::End,
            Read::Bytes(taken) => Outbound::Bytes { taken, wire: 0..taken },
        })
    }

    fn inbound(&mut self, network: &TcpStream, batch: Batch, scratch: &mut Scratch) -> Result<Inbound, Fault> {
        scratch.segments.clear();
        Ok(match take(network, batch, scratch)? {
            Read::Blocked => Inbound { bytes: 0, taken: 0, then: Then::Blocked },
            Read::End => Inbound { bytes: 0, taken: 0, then: Then::End },
            Read::Bytes(taken) => {
                scratch.segments.push(0..taken);
                let then = if taken < batch.bytes() { Then::Blocked } else { Then::More };
                Inbound { bytes: taken, taken, then }
            }
        })
    }

    fn seal(&mut self, bytes: &[u8], pending: &mut Pending) -> Result<(), Fault> {
        pending.keep(bytes);
        Ok(())
    }

    fn write(&mut self, network: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
        put(network, bytes)
    }

    fn send(&mut self, _network: &TcpStream, _what: ControlRecord, _pending: &mut Pending) -> Result<bool, Fault> {
        Ok(true)
    }
}

/// Reads a batch into the scratch.
pub(super) fn take(from: &TcpStream, batch: Batch, scratch: &mut Scratch) -> io::Result<Read> {
    let room = scratch.bytes.get_mut(..batch.bytes()).unwrap_or_default();
    let length = room.len();
    socket::read(from, length, true, || Ok(recv(from, &mut *room, RecvFlags::DONTWAIT)?.1))
}

/// Writes bytes as they are.
pub(super) fn put(to: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    socket::write(to, bytes.len(), || send(to, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL))
}
