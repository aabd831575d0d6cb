//! A turn of a flow: what goes from one socket to the other now, and what the flow can use next.
//!
//! *Invariant:* nothing here waits; bytes that a socket has not taken are pending, and go before any others.

use super::{
    Greeting, Half, Transfer, Wants,
    ending::{application_fault, end},
};
use crate::relay::{
    CloseReason, Progress, Violation,
    buffers::Scratch,
    exchange::FrameKind,
    plain,
    record_layer::{ControlRecord, Fault, Outbound, RecordLayer, Then},
    socket,
};
use rustix::{
    io::writev,
    net::{SendFlags, send},
};
use std::{
    io::{self, IoSlice},
    ops::Range,
    sync::atomic::Ordering,
};

/// If a layer took fewer bytes than this from the network and cannot tell whether there are more, it is asked again in the
/// same turn, ...
const SMALL: usize = 4096;

/// ... at most this often.
const MAX_SMALL: u32 = 16;

/// Pieces of one vectored write.
const PIECES: usize = 64;

impl<L: RecordLayer> Transfer<L> {
    pub(super) fn pump(&mut self, scratch: &mut Scratch, progress: &Progress) -> Result<Wants, CloseReason> {
        let mut wants = Wants::default();
        if self.greeting == Greeting::Waits {
            self.greeting = Greeting::Joins;
            self.pump_downstream(scratch, progress, &mut wants)?;
            wants.more = true;
            return Ok(wants);
        }
        self.pump_upstream(scratch, progress, &mut wants)?;
        self.pump_downstream(scratch, progress, &mut wants)?;
        Ok(wants)
    }

    /// From the application to the network.
    fn pump_upstream(
        &mut self,
        scratch: &mut Scratch,
        progress: &Progress,
        wants: &mut Wants,
    ) -> Result<(), CloseReason> {
        let early = std::mem::take(&mut self.early);
        if !early.is_empty() {
            progress.sent.fetch_add(early.len() as u64, Ordering::Relaxed);
            let sealed = self.layer.seal(&early, &mut self.up_pending);
            sealed.map_err(|fault| self.network_fault(fault))?;
        }
        let joins = std::mem::replace(&mut self.greeting, Greeting::Said) == Greeting::Joins;
        if !joins && !self.flush_up()? {
            wants.network_write = true;
            return Ok(());
        }
        if self.up == Half::Open && self.layer.owes_key_update() {
            let sent = self.layer.send(&self.network, ControlRecord::KeyUpdate, &mut self.up_pending);
            if !sent.map_err(|fault| self.network_fault(fault))? || !self.flush_up()? {
                wants.network_write = true;
                return Ok(());
            }
        }
        if self.up == Half::Open {
            let outbound = self.layer.outbound(&self.application, self.up_batch, scratch);
            match outbound.map_err(application_fault)? {
                Outbound::Blocked => {
                    wants.application_read = true;
                    wants.network_write = !self.flush_up()?;
                }
                Outbound::End => self.up = Half::Ended,
                Outbound::Bytes { taken, wire } => {
                    progress.sent.fetch_add(taken as u64, Ordering::Relaxed);
                    self.send(scratch, wire, taken, wants)?;
                }
            }
        }
        if self.up == Half::Ended {
            let end = if self.is_shared() { ControlRecord::Frame(FrameKind::End) } else { ControlRecord::CloseNotify };
            let sent = self.layer.send(&self.network, end, &mut self.up_pending);
            if !sent.map_err(|fault| self.network_fault(fault))? {
                wants.network_write = true;
                return Ok(());
            }
            self.up = Half::Draining;
        }
        if self.up == Half::Draining {
            if !self.flush_up()? {
                wants.network_write = true;
            } else if self.is_shared() {
                self.up = Half::Closed;
            } else if self.layer.has_drained(&self.network).map_err(|error| self.network_fault(error.into()))? {
                end(&self.network);
                self.up = Half::Closed;
            }
        }
        Ok(())
    }

    pub(super) fn flush_up(&mut self) -> Result<bool, CloseReason> {
        if self.up_pending.is_empty() {
            return Ok(true);
        }
        let flushed = self.up_pending.flush(|bytes| self.layer.write(&self.network, bytes));
        flushed.map_err(|error| self.network_fault(error.into()))
    }

    fn send(
        &mut self,
        scratch: &Scratch,
        wire: Range<usize>,
        taken: usize,
        wants: &mut Wants,
    ) -> Result<(), CloseReason> {
        let bytes = scratch.bytes.get(wire).unwrap_or_default();
        let all = if self.up_pending.is_empty() {
            let written = self.layer.write(&self.network, bytes).map_err(|error| self.network_fault(error.into()))?;
            self.up_pending.keep(bytes.get(written..).unwrap_or_default());
            self.up_pending.is_empty()
        } else {
            // The greeting is still pending: these bytes are added behind it, and both go out together.
            self.up_pending.keep(bytes);
            self.flush_up()?
        };
        let full = taken == self.up_batch.bytes();
        if !all {
            self.up_batch.was_too_much();
            wants.network_write = true;
        } else if full {
            self.up_batch.was_full();
            wants.more = true;
        } else {
            // A short read: the socket is empty until the next edge.
            wants.application_read = true;
        }
        Ok(())
    }

    /// From the network to the application.
    fn pump_downstream(
        &mut self,
        scratch: &mut Scratch,
        progress: &Progress,
        wants: &mut Wants,
    ) -> Result<(), CloseReason> {
        if !self.down_pending.is_empty() {
            let flushed = self.down_pending.flush(|bytes| plain::put(&self.application, bytes));
            if !flushed.map_err(|error| application_fault(error.into()))? {
                wants.application_write = true;
                return Ok(());
            }
        }
        if let Some(fault) = self.last.take() {
            return Err(self.network_fault(fault));
        }
        let mut turns = 0;
        while self.down == Half::Open && self.receive(scratch, progress, wants)? {
            turns += 1;
            if turns == MAX_SMALL {
                wants.more = true;
                break;
            }
        }
        wants.more |= self.up == Half::Open && self.layer.owes_key_update() && !wants.network_write;
        if self.down == Half::Ended && self.down_pending.is_empty() {
            end(&self.application);
            self.down = Half::Closed;
        }
        Ok(())
    }

    /// Takes one batch. True: it was small, and there may be more right behind it.
    fn receive(&mut self, scratch: &mut Scratch, progress: &Progress, wants: &mut Wants) -> Result<bool, CloseReason> {
        let arrived = self.layer.inbound(&self.network, self.down_batch, scratch);
        let arrived = arrived.map_err(|fault| self.network_fault(fault))?;
        self.peer_eof = matches!(arrived.then, Then::End | Then::Fault(_));
        if arrived.bytes > 0 {
            self.received_any = true;
            progress.received.fetch_add(arrived.bytes as u64, Ordering::Relaxed);
            self.deliver(scratch, arrived.bytes).map_err(|error| application_fault(error.into()))?;
        }
        let delivered = self.down_pending.is_empty();
        if !delivered {
            self.down_batch.was_too_much();
            wants.application_write = true;
        } else if arrived.taken == self.down_batch.bytes() {
            self.down_batch.was_full();
        }
        // Where a shared connection ends in the middle of a stream, the stream was cut off.
        let then =
            if arrived.then == Then::End && self.is_shared() { Then::Fault(Fault::Truncated) } else { arrived.then };
        match then {
            Then::More if delivered && arrived.taken < SMALL => return Ok(true),
            Then::More => wants.more |= delivered,
            Then::Blocked => wants.network_read = delivered,
            Then::End | Then::Frame(FrameKind::End) => self.down = Half::Ended,
            Then::Frame(FrameKind::Abort) => {
                self.aborted = true;
                return Err(CloseReason::PeerReset);
            }
            Then::Frame(FrameKind::Begin | FrameKind::Ready) => {
                return Err(CloseReason::PeerViolation(Violation::UnexpectedMessage));
            }
            Then::Fault(fault) if delivered => return Err(self.network_fault(fault)),
            Then::Fault(fault) => self.last = Some(fault),
        }
        Ok(false)
    }

    /// Writes the segments of the scratch to the application, and keeps what it does not take. Nothing is pending, so there
    /// should be room. The socket itself is asked and not tokio's readiness, which is not known yet of a socket that was
    /// made a moment ago.
    fn deliver(&mut self, scratch: &Scratch, total: usize) -> io::Result<()> {
        let mut left = total;
        let mut segments = scratch.segments.iter().map(|range| scratch.bytes.get(range.clone()).unwrap_or_default());
        if scratch.segments.len() == 1 {
            let bytes = segments.next().unwrap_or_default();
            let send = || send(&self.application, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            let written = socket::write_unasked(&self.application, bytes.len(), send)?;
            self.down_pending.keep(bytes.get(written..).unwrap_or_default());
            return Ok(());
        }
        while left > 0 {
            let mut pieces = [IoSlice::new(&[]); PIECES];
            let (mut count, mut length) = (0, 0);
            for (piece, segment) in pieces.iter_mut().zip(segments.by_ref()) {
                *piece = IoSlice::new(segment);
                count += 1;
                length += segment.len();
            }
            let pieces = pieces.get(..count).unwrap_or_default();
            if pieces.is_empty() {
                break;
            }
            let mut written = if self.down_pending.is_empty() {
                socket::write_unasked(&self.application, length, || writev(&self.application, pieces))?
            } else {
                0
            };
            for piece in pieces {
                let skip = written.min(piece.len());
                written -= skip;
                self.down_pending.keep(piece.get(skip..).unwrap_or_default());
            }
            left -= length.min(left);
        }
        Ok(())
    }
}
