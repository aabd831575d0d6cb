//! Engine `user`: records sealed and opened by this process, in place, in the shard's scratch.
//!
//! Outbound, the application's bytes are read straight into the bodies of records, sealed where they lie, and written
//! with one call. Inbound, whole records are opened where they lie and their content goes out with one call.
//! *Invariant:* between two turns a flow keeps no plaintext here, and of what the network sent at most a partial record, or
//! what came behind a frame.

use super::{
    CloseReason, Violation,
    buffers::{Batch, MAX_BATCH, Pending, Scratch},
    control::{Act, Control, KEY_UPDATE_NOT_REQUESTED},
    exchange::{Exchange, FrameKind},
    plain,
    record_layer::{ControlRecord, Fault, Inbound, Outbound, RecordLayer, Then},
    socket::{self, Read},
};
use crate::offload::{
    Opener, Sealer, UserKeys,
    record::{self, ContentType, FULL_RECORD, HEADER, MAX_PLAINTEXT, TRAILER},
};
use rustix::{
    io::readv,
    net::{RecvFlags, recv},
};
use std::{
    io::{self, IoSliceMut},
    ops::Range,
};
use tokio::net::TcpStream;

/// The most bytes that may arrive directly behind a frame other than `ready`: another frame, and the first bytes of an
/// application.
const MAX_BEHIND: usize = FULL_RECORD + 64;

/// Content shorter than this is moved up to the content before it, so that a batch of small records goes out as one
/// piece; longer content is cheaper to leave where it is and name in one more element of the vector.
const SHORT: usize = 2048;

pub(super) struct User {
    keys: Box<UserKeys>,
    control: Control,
    /// The beginning of a record whose rest has not arrived.
    partial: Vec<u8>,
    /// `partial` is what came behind a frame, and may hold whole records.
    behind: bool,
    /// The peer asked for a fresh key.
    asked: bool,
}

impl User {
    pub(super) fn new(keys: Box<UserKeys>, shared: bool) -> Self {
        let control = Control::new(keys.secrets.is_client(), shared);
        Self { keys, control, partial: Vec::new(), behind: false, asked: false }
    }

    fn next_receive_key(&mut self) -> Result<(), Fault> {
        let spent = Fault::Ours(CloseReason::KeysSpent);
        let traffic = self.keys.secrets.next_receive().map_err(|_| spent)?;
        self.keys.opener = Opener::new(&traffic).map_err(|_| spent)?;
        Ok(())
    }

    /// Opens the whole records among the first `filled` bytes. Returns how many bytes these records took, how many bytes of
    /// data they held, and what came behind the data.
    fn open(&mut self, scratch: &mut Scratch, filled: usize) -> (usize, usize, Then) {
        let (mut at, mut bytes) = (0, 0);
        loop {
            let rest = scratch.bytes.get_mut(at..filled).unwrap_or_default();
            let length = match record::measure(rest) {
                Ok(Some(length)) if length <= rest.len() => length,
                Ok(_) => return (at, bytes, Then::More),
                Err(bad) => return (at, bytes, Then::Fault(Violation::from(bad).into())),
            };
            let whole = rest.get_mut(..length).unwrap_or_default();
            match self.open_one(whole) {
                Ok(Opened::Data(content)) => {
                    bytes += content.len();
                    append(scratch, at + content.start..at + content.end);
                }
                Ok(Opened::Nothing) => {}
                Ok(Opened::End) => return (at + length, bytes, Then::End),
                Ok(Opened::Frame(kind)) => return (at + length, bytes, Then::Frame(kind)),
                Err(fault) => return (at + length, bytes, Then::Fault(fault)),
            }
            at += length;
        }
    }

    fn open_one(&mut self, whole: &mut [u8]) -> Result<Opened, Fault> {
        let (content_type, content) = self.keys.opener.open(whole).map_err(Violation::from)?;
        if content_type == ContentType::APPLICATION_DATA {
            self.control.data(content.len())?;
            return Ok(if content.is_empty() { Opened::Nothing } else { Opened::Data(content) });
        }
        match self.control.record(content_type, whole.get(content).unwrap_or_default())? {
            Act::Nothing => Ok(Opened::Nothing),
            Act::NextKey { answer } => {
                self.asked |= answer;
                self.next_receive_key()?;
                Ok(Opened::Nothing)
            }
            Act::CloseNotify => Ok(Opened::End),
            Act::Frame(kind) => Ok(Opened::Frame(kind)),
            Act::Fatal(alert) => Err(Fault::Alert(alert)),
        }
    }

    /// Copies the beginning of a record to the front of the scratch, so that its rest is read behind it, and returns its
    /// length.
    fn restore(&mut self, scratch: &mut Scratch) -> usize {
        let before = self.partial.len();
        if let Some(front) = scratch.bytes.get_mut(..before) {
            front.copy_from_slice(&self.partial);
        }
        self.partial.clear();
        before
    }

    /// Opens what has been filled in, and keeps what cannot be opened yet.
    fn take(&mut self, scratch: &mut Scratch, filled: usize) -> (usize, Then) {
        let (came, bytes, then) = self.open(scratch, filled);
        let rest = scratch.bytes.get(came..filled).unwrap_or_default();
        match then {
            Then::More => self.partial.extend_from_slice(rest),
            Then::Frame(kind) if kind != FrameKind::Ready && rest.len() > MAX_BEHIND => {
                return (bytes, Then::Fault(Violation::UnexpectedMessage.into()));
            }
            Then::Frame(_) => {
                self.partial.extend_from_slice(rest);
                self.behind = !rest.is_empty();
            }
            _ => {}
        }
        (bytes, then)
    }
}

enum Opened {
    Data(Range<usize>),
    Nothing,
    End,
    Frame(FrameKind),
}

/// Adds content to the segments of the scratch.
fn append(scratch: &mut Scratch, content: Range<usize>) {
    if content.len() < SHORT
        && let Some(last) = scratch.segments.last_mut()
    {
        let end = last.end;
        last.end += content.len();
        // Each content lies behind its own header, so this moves it towards the front.
        scratch.bytes.copy_within(content, end);
    } else {
        scratch.segments.push(content);
    }
}

impl RecordLayer for User {
    const TLS: bool = true;

    fn outbound(&mut self, application: &TcpStream, batch: Batch, scratch: &mut Scratch) -> Result<Outbound, Fault> {
        let taken = match read_into_bodies(application, batch, scratch)? {
            Read::Blocked => return Ok(Outbound::Blocked),
            Read::End => return Ok(Outbound::End),
            Read::Bytes(taken) => taken,
        };
        let spent = Fault::Ours(CloseReason::KeysSpent);
        let (mut rest, mut end) = (taken, 0);
        for slot in scratch.bytes.as_chunks_mut::<FULL_RECORD>().0 {
            let length = rest.min(MAX_PLAINTEXT);
            end += self.keys.sealer.seal(ContentType::APPLICATION_DATA, slot, length).map_err(|_| spent)?;
            rest -= length;
            if rest == 0 {
                break;
            }
        }
        Ok(Outbound::Bytes { taken, wire: 0..end })
    }

    fn inbound(&mut self, network: &TcpStream, batch: Batch, scratch: &mut Scratch) -> Result<Inbound, Fault> {
        scratch.segments.clear();
        if std::mem::take(&mut self.behind) {
            let filled = self.restore(scratch);
            let (bytes, then) = self.take(scratch, filled);
            if bytes > 0 || then != Then::More {
                return Ok(Inbound { bytes, taken: filled, then });
            }
        }
        let before = self.partial.len();
        let want = batch.bytes();
        let room = scratch.bytes.get_mut(before..before + want).unwrap_or_default();
        let taken = match socket::read(network, want, true, || Ok(recv(network, &mut *room, RecvFlags::DONTWAIT)?.1))? {
            Read::Blocked => return Ok(Inbound { bytes: 0, taken: 0, then: Then::Blocked }),
            // Also in the middle of a record: a FIN is not close_notify.
            Read::End => return Err(Fault::Truncated),
            Read::Bytes(taken) => taken,
        };
        let filled = self.restore(scratch) + taken;
        let (bytes, then) = self.take(scratch, filled);
        let then = if then == Then::More && taken < want { Then::Blocked } else { then };
        Ok(Inbound { bytes, taken, then })
    }

    fn seal(&mut self, bytes: &[u8], pending: &mut Pending) -> Result<(), Fault> {
        let mut slot = vec![0; HEADER + bytes.len() + TRAILER];
        slot.iter_mut().skip(HEADER).zip(bytes).for_each(|(to, from)| *to = *from);
        let sealed = self.keys.sealer.seal(ContentType::APPLICATION_DATA, &mut slot, bytes.len());
        let length = sealed.map_err(|_| Fault::Ours(CloseReason::KeysSpent))?;
        pending.keep(slot.get(..length).unwrap_or_default());
        Ok(())
    }

    fn write(&mut self, network: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
        plain::put(network, bytes)
    }

    fn owes_key_update(&self) -> bool {
        self.asked || self.keys.sealer.is_due()
    }

    fn send(&mut self, _network: &TcpStream, what: ControlRecord, pending: &mut Pending) -> Result<bool, Fault> {
        let spent = Fault::Ours(CloseReason::KeysSpent);
        let mut slot = [0; HEADER + 8 + TRAILER];
        let mut seal = |content_type, body: &[u8]| {
            slot.iter_mut().skip(HEADER).zip(body).for_each(|(to, from)| *to = *from);
            let length = self.keys.sealer.seal(content_type, &mut slot, body.len()).map_err(|_| spent)?;
            pending.keep(slot.get(..length).unwrap_or_default());
            Ok(true)
        };
        if let Some(body) = what.alert() {
            return seal(ContentType::ALERT, &body);
        }
        if let ControlRecord::Frame(kind) = what {
            let (body, exchange) = self.control.send(kind).ok_or(Fault::Io(libc::EPROTO))?;
            let sent = seal(ContentType::MARKER, &body);
            self.control.sent(exchange);
            return sent;
        }
        seal(ContentType::HANDSHAKE, &KEY_UPDATE_NOT_REQUESTED)?;
        self.asked = false;
        let traffic = self.keys.secrets.next_transmit().map_err(|_| spent)?;
        let due = self.keys.sealer.due();
        self.keys.sealer = Sealer::new(&traffic).map_err(|_| spent)?;
        self.keys.sealer.set_due(due);
        Ok(true)
    }

    fn has_record(&self) -> bool {
        self.behind && matches!(record::measure(&self.partial), Ok(Some(length)) if length <= self.partial.len())
    }

    fn exchange(&self) -> Option<Exchange> {
        self.control.exchange()
    }

    fn rest(&mut self) {
        if self.partial.is_empty() {
            self.partial = Vec::new();
        }
    }
}

/// Reads the application's bytes to where the bodies of up to a batch of records will be.
fn read_into_bodies(application: &TcpStream, batch: Batch, scratch: &mut Scratch) -> io::Result<Read> {
    let bodies = scratch
        .bytes
        .as_chunks_mut::<FULL_RECORD>()
        .0
        .iter_mut()
        .take(batch.records())
        .filter_map(|slot| slot.get_mut(HEADER..HEADER + MAX_PLAINTEXT));
    let mut parts: [IoSliceMut<'_>; MAX_BATCH] = std::array::from_fn(|_| IoSliceMut::new(&mut []));
    for (part, body) in parts.iter_mut().zip(bodies) {
        *part = IoSliceMut::new(body);
    }
    let parts = parts.get_mut(..batch.records()).unwrap_or_default();
    socket::read(application, batch.bytes(), true, || readv(application, parts))
}
