//! What the loop asks of an engine: bytes of the application into bytes of the network, and back.
//!
//! *Invariant:* a layer never waits and never looks at the other socket; what it could not hand on, the loop keeps.

use super::{
    CloseReason, Violation,
    buffers::{Batch, Pending, Scratch},
    control,
    exchange::{Exchange, FrameKind},
};
use std::{io, ops::Range};
use tokio::net::TcpStream;

/// One engine's way with the bytes of one connection.
pub(super) trait RecordLayer {
    /// Does the peer end its stream with close_notify? Otherwise with a FIN.
    const TLS: bool;

    /// May the network's socket fail without having anything to read?
    const FAILS_UNREAD: bool = false;

    /// Takes from the application, and leaves in the scratch what goes to the network.
    fn outbound(&mut self, application: &TcpStream, batch: Batch, scratch: &mut Scratch) -> Result<Outbound, Fault>;

    /// Takes from the network, and leaves in the scratch, in its segments, what goes to the application.
    fn inbound(&mut self, network: &TcpStream, batch: Batch, scratch: &mut Scratch) -> Result<Inbound, Fault>;

    /// Turns bytes that were taken from the application's socket earlier, at most a record of them, into bytes for the
    /// network.
    fn seal(&mut self, bytes: &[u8], pending: &mut Pending) -> Result<(), Fault>;

    /// Writes to the network what `outbound` or `seal` left; 0 where it takes none.
    fn write(&mut self, network: &TcpStream, bytes: &[u8]) -> io::Result<usize>;

    /// Is there a KeyUpdate to send before any more data?
    fn owes_key_update(&self) -> bool {
        false
    }

    /// Sends a record that is not data. `pending` is empty, unless the layer seals by itself: such a layer appends the
    /// record to it. False: the network takes nothing now.
    fn send(&mut self, network: &TcpStream, what: ControlRecord, pending: &mut Pending) -> Result<bool, Fault>;

    /// Has this side already read a whole record of the peer that it has not opened yet?
    fn has_record(&self) -> bool {
        false
    }

    /// How far the streams of the connection have come, where it is shared.
    fn exchange(&self) -> Option<Exchange> {
        None
    }

    /// Has everything left this layer, so that the network socket may be shut down?
    fn has_drained(&self, _network: &TcpStream) -> io::Result<bool> {
        Ok(true)
    }

    /// Does this layer have to be asked again now and then although its socket reports nothing?
    fn needs_ticks(&self) -> bool {
        false
    }

    /// The network's socket reports an error while it is read: the next [`RecordLayer::inbound`] asks the socket itself.
    fn ask_again(&mut self) {}

    /// The flow waits: memory that is not in use is given back.
    fn rest(&mut self) {}
}

/// What to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ControlRecord {
    /// This side's stream is complete.
    CloseNotify,
    /// This side gives up.
    Alert(u8),
    /// This side's next record comes under its next key.
    KeyUpdate,
    /// A frame about the streams of a shared connection.
    Frame(FrameKind),
}

impl ControlRecord {
    /// The body of an alert, where it is one.
    pub(super) fn alert(self) -> Option<[u8; 2]> {
        match self {
            Self::CloseNotify => Some(control::alert(0)),
            Self::Alert(description) => Some(control::alert(description)),
            Self::KeyUpdate | Self::Frame(_) => None,
        }
    }
}

/// What was taken from the application.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outbound {
    /// Nothing for now.
    Blocked,
    /// It closed its side.
    End,
    /// So many bytes, which lie in this part of the scratch as the network gets them.
    Bytes {
        /// Bytes of the application.
        taken: usize,
        /// Where they lie, sealed or not.
        wire: Range<usize>,
    },
}

/// What was taken from the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Inbound {
    /// Bytes for the application, in the segments of the scratch.
    pub(super) bytes: usize,
    /// Bytes off the network.
    pub(super) taken: usize,
    /// What came after them.
    pub(super) then: Then,
}

/// What came behind the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// There may be more now.
    More,
    /// There is no more for now.
    Blocked,
    /// The peer's stream is complete.
    End,
    /// A frame about the streams of a shared connection. What comes behind it is left for the next time.
    Frame(FrameKind),
    /// The connection is over. What came before is delivered first.
    Fault(Fault),
}

/// Why a layer cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The socket that was read or written failed, with this error number.
    Io(i32),
    /// The network ended without close_notify.
    Truncated,
    /// The peer broke the protocol.
    Violation(Violation),
    /// The peer gave up.
    Alert(u8),
    /// This side cannot go on, for this reason.
    Ours(CloseReason),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl From<Violation> for Fault {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}
