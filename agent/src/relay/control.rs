//! What may still be said after a TLS 1.3 handshake besides data: alerts, tickets, fresh keys. Pure: bytes in, acts out.
//!
//! *Invariant:* records and messages that carry no bytes of an application are counted and limited; nothing that the peer
//! sends is stored.

use super::{
    Violation,
    exchange::{Exchange, Frame, FrameKind, LENGTH},
};
use crate::offload::record::ContentType;

/// Records without content in a row.
const MAX_EMPTY: u32 = 32;
/// Fresh keys by the peer without a byte of data between them.
const MAX_KEY_UPDATES: u32 = 32;
/// Warning alerts in a connection.
const MAX_WARNINGS: u32 = 4;
/// Bytes of tickets in a connection, all together; an empty one counts as one byte. This side uses no tickets.
const MAX_TICKETS: u32 = 256 * 1024;

/// What follows from a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// Nothing.
    Nothing,
    /// The peer's next record comes under its next key. `answer`: it wants this side to take a fresh one too.
    NextKey {
        /// `update_requested`.
        answer: bool,
    },
    /// The peer's stream is complete.
    CloseNotify,
    /// The peer gives up.
    Fatal(u8),
    /// A frame about the streams of a shared connection.
    Frame(FrameKind),
}

/// What has been sent so far on one connection.
#[derive(Debug)]
pub(super) struct Control {
    is_client: bool,
    empty: u32,
    key_updates: u32,
    warnings: u32,
    tickets: u32,
    message: Message,
    /// How far its streams have come, where the connection is shared.
    exchange: Option<Exchange>,
}

/// Where in a handshake message the last record ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Message {
    /// Between two messages.
    Between,
    /// In the four bytes of its header.
    Header { bytes: [u8; 4], have: usize },
    /// In a ticket, of which so much is still to come.
    Ticket { rest: u32 },
    /// Before the one byte of a KeyUpdate.
    KeyUpdate,
}

const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

impl Control {
    /// `shared`: both sides may use the connection more than once.
    pub(super) fn new(is_client: bool, shared: bool) -> Self {
        let exchange = shared.then(|| Exchange::new(is_client));
        Self { is_client, empty: 0, key_updates: 0, warnings: 0, tickets: 0, message: Message::Between, exchange }
    }

    /// How far the streams of the connection have come, where it is shared.
    pub(super) fn exchange(&self) -> Option<Exchange> {
        self.exchange
    }

    /// The body of the frame's record, and how far the streams will have come once it has been sent. None where the frame
    /// is not allowed now.
    pub(super) fn send(&self, kind: FrameKind) -> Option<([u8; LENGTH], Exchange)> {
        let mut exchange = self.exchange?;
        let frame = exchange.send(kind)?;
        Some((frame.bytes(), exchange))
    }

    /// The frame has been sent, with which the streams come as far as `exchange`.
    pub(super) fn sent(&mut self, exchange: Exchange) {
        self.exchange = Some(exchange);
    }

    /// A record of so many bytes of data. It may not cut a handshake message in two (RFC 9846 section 5.1).
    pub(super) fn data(&mut self, length: usize) -> Result<(), Violation> {
        if self.message != Message::Between {
            return Err(Violation::UnexpectedMessage);
        }
        self.exchange.map_or(Ok(()), Exchange::recv_data)?;
        if length > 0 {
            self.empty = 0;
            self.key_updates = 0;
            return Ok(());
        }
        self.empty += 1;
        if self.empty > MAX_EMPTY { Err(Violation::Flood) } else { Ok(()) }
    }

    /// A record of another type.
    pub(super) fn record(&mut self, content_type: ContentType, body: &[u8]) -> Result<Act, Violation> {
        match content_type {
            ContentType::MARKER if self.exchange.is_some() && self.message == Message::Between => self.frame(body),
            ContentType::ALERT if self.message != Message::Between => Err(Violation::UnexpectedMessage),
            ContentType::ALERT => self.alert(body),
            ContentType::HANDSHAKE if body.is_empty() => Err(Violation::UnexpectedMessage),
            ContentType::HANDSHAKE => self.handshake(body),
            _ => Err(Violation::UnexpectedRecord),
        }
    }

    fn frame(&mut self, body: &[u8]) -> Result<Act, Violation> {
        let frame = Frame::parse(body)?;
        let kind = self.exchange.as_mut().ok_or(Violation::UnexpectedRecord)?.recv(frame)?;
        // A frame counts as progress: a stream that begins moves bytes, or ends soon.
        self.key_updates = 0;
        Ok(Act::Frame(kind))
    }

    /// One alert fills one record (RFC 9846 section 5.1). Its level says nothing (section 6).
    fn alert(&mut self, body: &[u8]) -> Result<Act, Violation> {
        match body {
            [_, 0] => Ok(Act::CloseNotify),
            // user_canceled: a close follows.
            [_, 90] => {
                self.warnings += 1;
                if self.warnings > MAX_WARNINGS { Err(Violation::Flood) } else { Ok(Act::Nothing) }
            }
            [_, description] => Ok(Act::Fatal(*description)),
            [] => Err(Violation::UnexpectedMessage),
            _ => Err(Violation::Malformed),
        }
    }

    fn handshake(&mut self, mut body: &[u8]) -> Result<Act, Violation> {
        while let Some((&first, after)) = body.split_first() {
            match self.message {
                Message::Between => {
                    self.message = Message::Header { bytes: [first, 0, 0, 0], have: 1 };
                    body = after;
                    self.may_begin(first)?;
                }
                Message::Header { mut bytes, have } => {
                    if let Some(byte) = bytes.get_mut(have) {
                        *byte = first;
                    }
                    body = after;
                    self.message = Message::Header { bytes, have: have + 1 };
                    if have + 1 < bytes.len() {
                        continue;
                    }
                    let [kind, a, b, c] = bytes;
                    let length = u32::from_be_bytes([0, a, b, c]);
                    if kind == KEY_UPDATE {
                        self.message = Message::KeyUpdate;
                        if length == 1 { continue } else { return Err(Violation::Malformed) }
                    }
                    self.tickets = self.tickets.saturating_add(length.max(1));
                    if self.tickets > MAX_TICKETS {
                        return Err(Violation::Flood);
                    }
                    self.message = if length == 0 { Message::Between } else { Message::Ticket { rest: length } };
                }
                Message::KeyUpdate => return self.key_update(body),
                Message::Ticket { rest } => {
                    let here = u32::try_from(body.len()).unwrap_or(u32::MAX).min(rest);
                    body = body.get(here as usize..).unwrap_or_default();
                    self.message = if here == rest { Message::Between } else { Message::Ticket { rest: rest - here } };
                }
            }
        }
        Ok(Act::Nothing)
    }

    /// Tickets come from servers; no other handshake message is asked for or offered after the handshake.
    fn may_begin(&self, kind: u8) -> Result<(), Violation> {
        match kind {
            KEY_UPDATE => Ok(()),
            NEW_SESSION_TICKET if self.is_client => Ok(()),
            _ => Err(Violation::UnexpectedMessage),
        }
    }

    /// The key changes at a record's end, so the message has to end there too (RFC 9846 sections 4.7.3 and 5.1).
    fn key_update(&mut self, body: &[u8]) -> Result<Act, Violation> {
        self.message = Message::Between;
        let answer = match body {
            [0] => false,
            [1] => true,
            [_] => return Err(Violation::IllegalValue),
            _ => return Err(Violation::UnexpectedMessage),
        };
        self.key_updates += 1;
        if self.key_updates > MAX_KEY_UPDATES { Err(Violation::Flood) } else { Ok(Act::NextKey { answer }) }
    }
}

/// The body of a KeyUpdate that asks for nothing back.
pub(super) const KEY_UPDATE_NOT_REQUESTED: [u8; 5] = [KEY_UPDATE, 0, 0, 1, 0];

/// The body of an alert.
pub(super) fn alert(description: u8) -> [u8; 2] {
    // close_notify and user_canceled are warnings, everything else is fatal (RFC 9846 section 6).
    [if matches!(description, 0 | 90) { 1 } else { 2 }, description]
}

/// Is this how a server says that it does not accept the client's certificate or rights?
pub(super) fn is_refusal(description: u8) -> bool {
    // bad_certificate to unknown_ca, access_denied, decrypt_error (a signature), certificate_required.
    matches!(description, 42..=46 | 48 | 49 | 51 | 116)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Violation::*;
    use proptest::prelude::*;

    const H: ContentType = ContentType::HANDSHAKE;
    const A: ContentType = ContentType::ALERT;

    #[test]
    fn each_record_has_the_consequence_that_the_standard_gives_it() {
        type Row = (bool, ContentType, &'static [u8], Result<Act, Violation>);
        let rows: &[Row] = &[
            (true, A, &[1, 0], Ok(Act::CloseNotify)),
            (true, A, &[2, 0], Ok(Act::CloseNotify)),
            (true, A, &[1, 90], Ok(Act::Nothing)),
            (true, A, &[1, 42], Ok(Act::Fatal(42))),
            (false, A, &[2, 20], Ok(Act::Fatal(20))),
            (true, A, &[], Err(UnexpectedMessage)),
            (true, A, &[1], Err(Malformed)),
            (true, A, &[1, 0, 1, 0], Err(Malformed)),
            (true, H, &[], Err(UnexpectedMessage)),
            (true, H, &[24, 0, 0, 1, 0], Ok(Act::NextKey { answer: false })),
            (false, H, &[24, 0, 0, 1, 1], Ok(Act::NextKey { answer: true })),
            (false, H, &[24, 0, 0, 1, 2], Err(IllegalValue)),
            (false, H, &[24, 0, 0, 2, 0, 0], Err(Malformed)),
            (false, H, &[24, 0, 0, 0], Err(Malformed)),
            (false, H, &[24, 0, 0, 1, 0, 24, 0, 0, 1, 0], Err(UnexpectedMessage)),
            (true, H, &[4, 0, 0, 2, 9, 9], Ok(Act::Nothing)),
            (true, H, &[4, 0, 0, 2, 9, 9, 4, 0, 0, 0, 24, 0, 0, 1, 1], Ok(Act::NextKey { answer: true })),
            (false, H, &[4, 0, 0, 2, 9, 9], Err(UnexpectedMessage)),
            (true, H, &[13, 0, 0, 0], Err(UnexpectedMessage)),
            (false, H, &[1, 0, 0, 0], Err(UnexpectedMessage)),
            (true, ContentType(20), &[1], Err(UnexpectedRecord)),
            (true, ContentType(24), &[1], Err(UnexpectedRecord)),
            (true, ContentType(0), &[], Err(UnexpectedRecord)),
            (true, ContentType::MARKER, &[3, 0, 0, 0, 1], Err(UnexpectedRecord)),
        ];
        for (is_client, content_type, body, expected) in rows {
            let got = Control::new(*is_client, false).record(*content_type, body);
            assert_eq!(got, *expected, "{content_type:?} {body:?}");
        }
    }

    #[test]
    fn a_ticket_may_come_in_any_number_of_records_but_nothing_else_between_them() {
        let mut ticket = vec![4, 0, 1, 0];
        ticket.extend([7; 256]);
        for cut in 1..ticket.len() {
            let mut control = Control::new(true, false);
            assert_eq!(control.record(H, &ticket[..cut]), Ok(Act::Nothing));
            assert_eq!(control.record(H, &ticket[cut..]), Ok(Act::Nothing));
            assert_eq!(control.data(1), Ok(()), "cut at {cut}");
            control.record(H, &ticket[..cut]).unwrap();
            assert_eq!(control.data(1), Err(UnexpectedMessage), "data inside a message, cut at {cut}");
            assert_eq!(control.record(A, &[1, 0]), Err(UnexpectedMessage));
        }
    }

    #[test]
    fn a_key_update_may_be_cut_as_well_and_still_counts_once() {
        for cut in 1..5 {
            let mut control = Control::new(false, false);
            assert_eq!(control.record(H, &KEY_UPDATE_NOT_REQUESTED[..cut]), Ok(Act::Nothing));
            let last = control.record(H, &KEY_UPDATE_NOT_REQUESTED[cut..]);
            assert_eq!(last, Ok(Act::NextKey { answer: false }), "cut at {cut}");
        }
    }

    #[test]
    fn what_moves_nothing_comes_to_an_end() {
        let mut control = Control::new(true, false);
        assert!((0..1000).any(|_| control.data(0) == Err(Flood)));
        let mut control = Control::new(true, false);
        assert!((0..1000).all(|n| control.data(n % 2) == Ok(())));
        assert!((0..1000).any(|_| control.record(H, &[24, 0, 0, 1, 1]) == Err(Flood)));
        let mut control = Control::new(true, false);
        assert!((0..1000).all(|_| control.data(1).is_ok() && control.record(H, &[24, 0, 0, 1, 1]).is_ok()));
        assert!((0..1000).any(|_| control.record(A, &[1, 90]) == Err(Flood)));
        assert!((0..1_000_000).any(|_| control.record(H, &[4, 0, 0, 0]) == Err(Flood)));
        assert_eq!(Control::new(true, false).record(H, &[4, 0xff, 0xff, 0xff]), Err(Flood));
    }

    #[test]
    fn data_and_frames_of_a_shared_connection_keep_their_order() {
        const W: ContentType = ContentType::MARKER;
        let mut control = Control::new(false, true);
        assert_eq!(control.data(7), Ok(()));
        assert_eq!(control.record(W, &[3, 0, 0, 0, 1]), Ok(Act::Frame(FrameKind::End)));
        assert_eq!(control.data(1), Err(UnexpectedMessage), "behind the end");
        assert_eq!(control.data(0), Err(UnexpectedMessage), "not even nothing");
        assert_eq!(control.record(W, &[1, 0, 0, 0, 2]), Err(UnexpectedMessage), "this side has not ended");
        let send = |control: &mut Control, kind| {
            let (body, exchange) = control.send(kind).unwrap();
            control.sent(exchange);
            body
        };
        assert_eq!(send(&mut control, FrameKind::End), [3, 0, 0, 0, 1]);
        assert_eq!(control.record(W, &[1, 0, 0, 0, 2]), Ok(Act::Frame(FrameKind::Begin)));
        assert_eq!(control.data(1), Err(UnexpectedMessage), "before it is ready");
        assert_eq!(send(&mut control, FrameKind::Ready), [2, 0, 0, 0, 2]);
        assert_eq!(control.data(1), Ok(()));
        assert_eq!(control.record(W, &[]), Err(Malformed));
    }

    proptest! {
        #[test]
        fn no_bytes_whatever_make_it_panic(shared: bool, records in proptest::collection::vec(
            (prop_oneof![0_u8..30, Just(ContentType::MARKER.0)], proptest::collection::vec(proptest::num::u8::ANY, 0..40)), 0..20)) {
            let mut control = Control::new(true, shared);
            for (content_type, body) in records {
                let _ = control.record(ContentType(content_type), &body);
                let _ = control.data(body.len());
            }
        }
    }
}
