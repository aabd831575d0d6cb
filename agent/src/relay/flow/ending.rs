//! How a flow ends: for what reason, what the peer is told, and whether the connection may be used again.
//!
//! *Invariant:* a receiver that misses the rest of a stream gets a reset, an alert or an abort, and never an orderly end.

use super::{Half, Transfer, waiting::Side};
use crate::relay::{
    CloseReason, control,
    record_layer::{ControlRecord, Fault, RecordLayer},
    socket,
};
use rustix::net::{Shutdown, shutdown};
use socket2::SockRef;
use tokio::{io::Interest, net::TcpStream};

impl<L: RecordLayer> Transfer<L> {
    /// A socket reported an error. Where the flow still reads that socket, the next read returns the error.
    pub(super) fn failure(&mut self, side: Side) -> Option<CloseReason> {
        let socket = match side {
            Side::Network => &self.network,
            Side::Application => &self.application,
        };
        _ = socket::forget(socket, Interest::ERROR);
        match side {
            Side::Network if self.down == Half::Open => {
                self.layer.ask_again();
                None
            }
            Side::Network => self.network.take_error().ok().flatten().map(|error| self.network_fault(error.into())),
            Side::Application => {
                self.application.take_error().ok().flatten().map(|error| application_fault(error.into()))
            }
        }
    }

    pub(super) fn network_fault(&self, fault: Fault) -> CloseReason {
        match fault {
            Fault::Alert(alert) if !self.received_any && control::is_refusal(alert) => CloseReason::PeerRefused(alert),
            fault => network_fault(fault),
        }
    }

    /// Can the connection be used again, after this stream of it has ended in this way?
    pub(super) fn can_be_left(&self, reason: CloseReason) -> bool {
        let Some(exchange) = self.layer.exchange().filter(|_| !self.peer_eof) else { return false };
        match reason {
            CloseReason::Complete => true,
            // Once this side has ended its direction, no frame can tell the peer of the reset; only resetting the
            // connection can.
            CloseReason::ApplicationReset | CloseReason::ApplicationLost(_) => exchange.is_ours_open(),
            CloseReason::PeerReset => self.aborted,
            _ => false,
        }
    }

    pub(super) fn close(&mut self, reason: CloseReason) {
        if self.can_be_left(reason) {
            if reason != CloseReason::Complete {
                reset(&self.application);
            }
            return;
        }
        if reason == CloseReason::Complete {
            // What comes behind close_notify is ignored (RFC 9846 section 6.1). It is dropped here, because closing a
            // socket with unread bytes sends a reset, which could overtake our last bytes.
            socket::discard(&self.network);
            return;
        }
        reset(&self.application);
        if !(L::TLS && self.tell(reason)) {
            reset(&self.network);
        }
    }

    /// Tells the peer the reason by an alert. False: there is no alert for it, or it could not be sent.
    fn tell(&mut self, reason: CloseReason) -> bool {
        let Some(alert) = reason.alert() else { return false };
        if !matches!(self.up, Half::Open | Half::Ended) || !matches!(self.flush_up(), Ok(true)) {
            return false;
        }
        let sent = self.layer.send(&self.network, ControlRecord::Alert(alert), &mut self.up_pending);
        if !matches!(sent, Ok(true)) || !matches!(self.flush_up(), Ok(true)) {
            return false;
        }
        socket::discard(&self.network);
        end(&self.network);
        true
    }
}

pub(in crate::relay) fn network_fault(fault: Fault) -> CloseReason {
    match fault {
        Fault::Io(libc::ECONNRESET | libc::EPIPE | libc::ECONNABORTED) => CloseReason::PeerReset,
        Fault::Io(number) => CloseReason::PeerLost(number),
        Fault::Truncated => CloseReason::PeerTruncated,
        Fault::Violation(violation) => CloseReason::PeerViolation(violation),
        Fault::Alert(alert) => CloseReason::PeerAlert(alert),
        Fault::Ours(reason) => reason,
    }
}

pub(super) fn application_fault(fault: Fault) -> CloseReason {
    match fault {
        Fault::Io(libc::ECONNRESET | libc::EPIPE | libc::ECONNABORTED) => CloseReason::ApplicationReset,
        Fault::Io(number) => CloseReason::ApplicationLost(number),
        Fault::Ours(reason) => reason,
        // A record layer finds these only in what comes from the network.
        Fault::Truncated | Fault::Violation(_) | Fault::Alert(_) => CloseReason::PeerTruncated,
    }
}

/// Lets the receiver read the end of the stream, after everything that is still on its way.
pub(in crate::relay) fn end(socket: &TcpStream) {
    // Closing the socket sends no reset any more. If this call fails the socket is gone, and its next read or write says
    // so.
    _ = SockRef::from(socket).set_linger(None);
    // If the socket is not connected any more, there is nobody to tell; its next read or write says so.
    _ = shutdown(socket, Shutdown::Write);
}

/// From now on closing the socket sends a reset.
pub(super) fn reset(socket: &TcpStream) {
    // A socket that is gone already needs no reset.
    _ = socket.set_zero_linger();
}
