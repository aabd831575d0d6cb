//! The memory of a relay: one large scratch for each shard, and for each flow only what a slow receiver has not taken.
//!
//! *Invariant:* a scratch is used inside one turn of one flow and holds nothing of it afterwards.

use crate::offload::record::{FULL_RECORD, MAX_PLAINTEXT};
use bytes::{Buf, BytesMut};
use std::{cell::RefCell, io, ops::Range};

/// The most records that are read, sealed and written at once: a mebibyte, so that a system call is shared by many.
pub(super) const MAX_BATCH: usize = 64;

/// One for each thread, so for each shard.
pub(super) struct Scratch {
    /// Room for a partial record and a full batch.
    pub(super) bytes: Box<[u8]>,
    /// Where in `bytes` the content of the records lies, in order.
    pub(super) segments: Vec<Range<usize>>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        bytes: vec![0; (MAX_BATCH + 1) * FULL_RECORD].into_boxed_slice(),
        segments: Vec::new(),
    });
}

/// Lends the thread's scratch for one turn.
pub(super) fn with_scratch<T>(turn: impl FnOnce(&mut Scratch) -> T) -> T {
    SCRATCH.with_borrow_mut(turn)
}

/// How much is taken from a socket at once. It grows while the sender fills it and the receiver takes all of it, and
/// shrinks when the receiver does not: what is left over then has to be kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Batch {
    records: usize,
}

impl Batch {
    pub(super) fn new() -> Self {
        Self { records: 4 }
    }
    pub(super) fn records(self) -> usize {
        self.records
    }
    pub(super) fn bytes(self) -> usize {
        self.records * MAX_PLAINTEXT
    }
    pub(super) fn was_full(&mut self) {
        self.records = (self.records * 2).min(MAX_BATCH);
    }
    pub(super) fn was_too_much(&mut self) {
        self.records = (self.records / 2).max(1);
    }
}

/// Bytes that a socket has not taken yet.
#[derive(Default)]
pub(super) struct Pending {
    bytes: BytesMut,
    touched: bool,
}

impl Pending {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// How many bytes are still to be taken.
    pub(super) fn left(&self) -> usize {
        self.bytes.len()
    }

    /// Has the socket taken none of the bytes yet?
    pub(super) fn is_untouched(&self) -> bool {
        !self.touched
    }

    pub(super) fn keep(&mut self, rest: &[u8]) {
        self.bytes.extend_from_slice(rest);
    }

    /// Writes what it can. True: nothing is left, and no memory is held.
    pub(super) fn flush(&mut self, mut write: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<bool> {
        while !self.bytes.is_empty() {
            match write(&self.bytes)? {
                0 => return Ok(false),
                taken => self.bytes.advance(taken.min(self.bytes.len())),
            }
            self.touched = true;
        }
        *self = Self::default();
        Ok(true)
    }
}
