//! Engine `kernel`: the socket seals and opens records. This module handles control records, fresh keys, and the
//! peculiarities of a kernel TLS socket.
//!
//! Bytes go by recv and send through the shard's scratch, not by splice: docs/adr/0003-records-in-user-space.md says why.
//! *Invariant:* the first hard error of the socket is final, and nothing is written between a KeyUpdate and the new key.

use super::{
    CloseReason, Violation,
    buffers::{Batch, Pending, Scratch},
    control::{Act, Control, KEY_UPDATE_NOT_REQUESTED},
    exchange::Exchange,
    plain,
    record_layer::{ControlRecord, Fault, Inbound, Outbound, RecordLayer, Then},
    socket::{self, Read},
};
use crate::offload::{KernelKeys, record::ContentType};
use bunter_sys::tls;
use rustix::{
    io::Errno,
    net::{SendFlags, send},
};
use std::{io, os::fd::AsFd};
use tokio::net::TcpStream;

pub(super) struct Kernel {
    keys: Box<KernelKeys>,
    control: Control,
    /// The peer asked for a fresh key.
    asked: bool,
    /// A KeyUpdate has been handed to the socket, and the key that belongs to it has not.
    half_updated: bool,
    /// The socket has reported an error. Since Linux 6.5 (net/tls/tls_strp.c) an invalid record header stops the socket
    /// with an error and nothing to read, so that a poll reports `EPOLLERR` alone.
    failed: bool,
}

impl Kernel {
    pub(super) fn new(keys: Box<KernelKeys>, shared: bool) -> Self {
        let control = Control::new(keys.is_client(), shared);
        Self { keys, control, asked: false, half_updated: false, failed: false }
    }

    fn control_record(&mut self, network: &TcpStream, content_type: u8, body: &[u8]) -> Result<Then, Fault> {
        match self.control.record(ContentType(content_type), body)? {
            Act::Nothing => Ok(Then::More),
            Act::NextKey { answer } => {
                // A kernel before 6.14 would go on with the old key, and every record would look forged.
                if !self.keys.can_rekey() {
                    return Err(Fault::Ours(CloseReason::RekeyImpossible));
                }
                self.asked |= answer;
                self.keys.next_receive(network.as_fd()).map_err(|_| Fault::Ours(CloseReason::RekeyImpossible))?;
                Ok(Then::More)
            }
            Act::CloseNotify => Ok(Then::End),
            Act::Frame(kind) => Ok(Then::Frame(kind)),
            Act::Fatal(alert) => Err(Fault::Alert(alert)),
        }
    }

    fn send_record(&mut self, network: &TcpStream, content_type: ContentType, body: &[u8]) -> io::Result<bool> {
        let sent = socket::write_unasked(network, body.len(), || {
            tls::send_tls_record(network.as_fd(), content_type.0, body).map_err(|error| errno(&error))
        })?;
        self.keys.count(sent);
        Ok(sent == body.len())
    }
}

impl RecordLayer for Kernel {
    const TLS: bool = true;
    const FAILS_UNREAD: bool = true;

    fn outbound(&mut self, application: &TcpStream, batch: Batch, scratch: &mut Scratch) -> Result<Outbound, Fault> {
        plain::Plain.outbound(application, batch, scratch)
    }

    fn inbound(&mut self, network: &TcpStream, batch: Batch, scratch: &mut Scratch) -> Result<Inbound, Fault> {
        scratch.segments.clear();
        let room = scratch.bytes.get_mut(..batch.bytes()).unwrap_or_default();
        let mut told = None;
        // A short read does not mean that the socket is empty: one call never returns both data and a control record.
        let length = room.len();
        let mut receive = || {
            let (length, content_type) =
                tls::receive_tls_record(network.as_fd(), room, false).map_err(|error| errno(&error))?;
            told = content_type;
            Ok(length)
        };
        let read = if std::mem::take(&mut self.failed) {
            socket::read_unasked(network, receive)
        } else {
            socket::read(network, length, false, &mut receive)
        };
        let taken = match read.map_err(failure)? {
            Read::Blocked => return Ok(Inbound { bytes: 0, taken: 0, then: Then::Blocked }),
            Read::End if told.is_none() && !is_at_end(network)? => 0,
            Read::End if told.is_none() => return Err(Fault::Truncated),
            Read::End => 0,
            Read::Bytes(taken) => taken,
        };
        match told {
            Some(content_type) if content_type != ContentType::APPLICATION_DATA.0 => {
                let body = scratch.bytes.get(..taken).unwrap_or_default();
                let then = self.control_record(network, content_type, body)?;
                Ok(Inbound { bytes: 0, taken, then })
            }
            None if taken > 0 => Err(Fault::Io(libc::EPROTO)),
            _ => {
                self.control.data(taken)?;
                if taken > 0 {
                    scratch.segments.push(0..taken);
                }
                Ok(Inbound { bytes: taken, taken, then: Then::More })
            }
        }
    }

    fn seal(&mut self, bytes: &[u8], pending: &mut Pending) -> Result<(), Fault> {
        // The socket seals it.
        pending.keep(bytes);
        Ok(())
    }

    fn write(&mut self, network: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
        let written = socket::write_unasked(network, bytes.len(), || {
            send(network, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
        })?;
        self.keys.count(written);
        Ok(written)
    }

    fn owes_key_update(&self) -> bool {
        self.asked || self.keys.is_due()
    }

    fn send(&mut self, network: &TcpStream, what: ControlRecord, _pending: &mut Pending) -> Result<bool, Fault> {
        if let Some(body) = what.alert() {
            return Ok(!self.half_updated && self.send_record(network, ContentType::ALERT, &body)?);
        }
        if let ControlRecord::Frame(kind) = what {
            let (body, exchange) = self.control.send(kind).ok_or(Fault::Io(libc::EPROTO))?;
            if !self.send_record(network, ContentType::MARKER, &body)? {
                return Ok(false);
            }
            self.control.sent(exchange);
            return Ok(true);
        }
        if !self.keys.can_rekey() {
            return Err(Fault::Ours(CloseReason::KeysSpent));
        }
        if !self.send_record(network, ContentType::HANDSHAKE, &KEY_UPDATE_NOT_REQUESTED)? {
            return Ok(false);
        }
        // If the kernel refuses the key now, the connection has to end: the peer opens only records under the new key.
        self.half_updated = true;
        self.keys.next_transmit(network.as_fd()).map_err(|_| Fault::Ours(CloseReason::KeysSpent))?;
        self.half_updated = false;
        self.asked = false;
        Ok(true)
    }

    fn exchange(&self) -> Option<Exchange> {
        self.control.exchange()
    }

    fn has_drained(&self, network: &TcpStream) -> io::Result<bool> {
        self.keys.has_drained(network.as_fd())
    }

    fn needs_ticks(&self) -> bool {
        true
    }

    fn ask_again(&mut self) {
        self.failed = true;
    }
}

/// A record without content and the end of the connection both give 0: a peek tells them apart.
fn is_at_end(network: &TcpStream) -> io::Result<bool> {
    match tls::receive_tls_record(network.as_fd(), &mut [0], true) {
        Ok((length, told)) => Ok(length == 0 && told.is_none()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

/// What the kernel's error says about the record (net/tls/tls_sw.c).
fn failure(error: io::Error) -> Fault {
    match error.raw_os_error() {
        Some(libc::EBADMSG) => Violation::BadMac.into(),
        Some(libc::EMSGSIZE) => Violation::RecordTooLong.into(),
        Some(libc::EINVAL) => Violation::UnexpectedRecord.into(),
        _ => error.into(),
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
