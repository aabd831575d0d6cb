//! How two agents carry one connection of the applications after the other over one TLS connection. Pure: frames in, frames
//! out. The wire format and the reasons are in docs/SESSIONS.md.
//!
//! A frame is the content of a record of its own type, so it cannot be mistaken for a byte of an application, and TLS
//! protects its place among the other records. The client begins a stream, the server is ready for it, and each ends its
//! direction of the stream or aborts it.
//!
//! *Invariant:* the bytes of a stream lie between its first frame and the end of their direction; a frame that is out of
//! turn, or carries another number, ends the connection. No stream begins before both directions of the previous one have
//! ended.

use super::Violation;

/// What a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FrameKind {
    /// The client: an application has connected; its bytes come after [`FrameKind::Ready`].
    Begin,
    /// The server: the workload has accepted.
    Ready,
    /// Either side: its application has ended its direction, of which everything has been sent.
    End,
    /// Either side: its application has reset the connection, and what is still on the way to it is of no use.
    Abort,
}

/// A frame and the number of the stream that it is about; the handshake begins stream 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) kind: FrameKind,
    pub(super) number: u32,
}

/// Bytes of a frame: its kind, then the number in network byte order.
pub(super) const LENGTH: usize = 5;

impl Frame {
    pub(super) fn bytes(self) -> [u8; LENGTH] {
        let kind = match self.kind {
            FrameKind::Begin => 1,
            FrameKind::Ready => 2,
            FrameKind::End => 3,
            FrameKind::Abort => 4,
        };
        let [a, b, c, d] = self.number.to_be_bytes();
        [kind, a, b, c, d]
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Violation> {
        let &[kind, a, b, c, d] = bytes else { return Err(Violation::Malformed) };
        let kind = match kind {
            1 => FrameKind::Begin,
            2 => FrameKind::Ready,
            3 => FrameKind::End,
            4 => FrameKind::Abort,
            _ => return Err(Violation::IllegalValue),
        };
        Ok(Self { kind, number: u32::from_be_bytes([a, b, c, d]) })
    }
}

/// How far the streams of one connection have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exchange {
    is_client: bool,
    number: u32,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The client has begun a stream, and the server has not said that it is ready.
    Begun,
    /// A stream is under way: may this side still send, and may the peer?
    Open { ours: bool, theirs: bool },
    /// Both directions of the last stream have ended.
    Idle,
}

impl Exchange {
    /// Right after the handshake: stream 1 is under way.
    pub(super) fn new(is_client: bool) -> Self {
        Self { is_client, number: 1, phase: Phase::Open { ours: true, theirs: true } }
    }

    /// The number of the stream that is under way, or was the last one.
    pub(super) fn number(self) -> u32 {
        self.number
    }

    /// May this side still send bytes or end its stream?
    pub(super) fn is_ours_open(self) -> bool {
        matches!(self.phase, Phase::Open { ours: true, .. })
    }

    /// May the peer still send bytes or end its stream?
    pub(super) fn is_theirs_open(self) -> bool {
        matches!(self.phase, Phase::Open { theirs: true, .. })
    }

    /// Have both directions of the last stream ended?
    #[cfg(test)]
    pub(super) fn is_idle(self) -> bool {
        self.phase == Phase::Idle
    }

    /// Bytes of the peer's application have arrived.
    pub(super) fn recv_data(self) -> Result<(), Violation> {
        if self.is_theirs_open() { Ok(()) } else { Err(Violation::UnexpectedMessage) }
    }

    /// A frame of the peer has arrived.
    pub(super) fn recv(&mut self, frame: Frame) -> Result<FrameKind, Violation> {
        self.advance(frame, !self.is_client)?;
        Ok(frame.kind)
    }

    /// The frame of this kind that is to be sent now; none where it is not this side's turn to send it.
    pub(super) fn send(&mut self, kind: FrameKind) -> Option<Frame> {
        let number = if kind == FrameKind::Begin { self.number.checked_add(1)? } else { self.number };
        let frame = Frame { kind, number };
        self.advance(frame, self.is_client).ok()?;
        Some(frame)
    }

    /// Takes the step that a frame stands for, by the table that both sides go by. `by_client`: the client sent it.
    fn advance(&mut self, frame: Frame, by_client: bool) -> Result<(), Violation> {
        let by_us = by_client == self.is_client;
        let expected = if frame.kind == FrameKind::Begin { self.number.checked_add(1) } else { Some(self.number) };
        if expected != Some(frame.number) {
            return Err(Violation::IllegalValue);
        }
        self.phase = match (frame.kind, self.phase) {
            (FrameKind::Begin, Phase::Idle) if by_client => Phase::Begun,
            (FrameKind::Ready, Phase::Begun) if !by_client => Phase::Open { ours: true, theirs: true },
            (FrameKind::End | FrameKind::Abort, Phase::Open { ours: true, theirs }) if by_us => ended(false, theirs),
            (FrameKind::End | FrameKind::Abort, Phase::Open { ours, theirs: true }) if !by_us => ended(ours, false),
            _ => return Err(Violation::UnexpectedMessage),
        };
        self.number = frame.number;
        Ok(())
    }
}

fn ended(ours: bool, theirs: bool) -> Phase {
    if ours || theirs { Phase::Open { ours, theirs } } else { Phase::Idle }
}

#[cfg(test)]
mod tests {
    use super::*;
    use FrameKind::*;
    use proptest::prelude::*;

    /// Both ends of a connection, and the frames on their way.
    #[derive(Debug)]
    struct Two {
        ends: [Exchange; 2],
        to: [std::collections::VecDeque<Frame>; 2],
    }

    impl Two {
        fn new() -> Self {
            Self { ends: [Exchange::new(true), Exchange::new(false)], to: Default::default() }
        }
        fn send(&mut self, who: usize, kind: FrameKind) -> bool {
            let sent = self.ends[who].send(kind);
            self.to[1 - who].extend(sent);
            sent.is_some()
        }
        fn recv(&mut self, who: usize) -> Option<FrameKind> {
            let frame = self.to[who].pop_front()?;
            Some(self.ends[who].recv(Frame::parse(&frame.bytes()).unwrap()).expect("what one may say, the other takes"))
        }
    }

    #[test]
    fn one_stream_after_the_other() {
        let mut two = Two::new();
        for number in 1..5 {
            assert!(two.send(0, End) && two.recv(1) == Some(End));
            assert!(!two.send(0, Begin), "the server has not ended");
            assert!(two.ends[0].recv_data().is_ok() && two.ends[1].recv_data().is_err());
            assert!(two.send(1, Abort) && two.recv(0) == Some(Abort));
            assert!(two.ends.iter().all(|end| end.is_idle() && end.number() == number));
            assert!(!two.send(1, Begin), "only the client begins");
            assert!(two.send(0, Begin) && two.recv(1) == Some(Begin));
            assert!(two.ends.iter().all(|end| end.recv_data().is_err()), "not before the server is ready");
            assert!(!two.send(0, End) && !two.send(0, Ready));
            assert!(two.send(1, Ready) && two.recv(0) == Some(Ready));
        }
    }

    #[test]
    fn both_may_abort_at_once() {
        let mut two = Two::new();
        assert!(two.send(0, Abort) && two.send(1, Abort));
        assert!(two.recv(0) == Some(Abort) && two.recv(1) == Some(Abort));
        assert!(two.ends.iter().all(|end| end.is_idle()));
    }

    #[test]
    fn a_frame_out_of_turn_or_about_another_stream_is_a_violation() {
        let recv = |is_client, kind, number| Exchange::new(is_client).recv(Frame { kind, number });
        assert_eq!(recv(true, Ready, 1), Err(Violation::UnexpectedMessage));
        assert_eq!(recv(false, Begin, 2), Err(Violation::UnexpectedMessage));
        assert_eq!(recv(true, Begin, 2), Err(Violation::UnexpectedMessage));
        for number in [0, 2, u32::MAX] {
            assert_eq!(recv(true, End, number), Err(Violation::IllegalValue));
            assert_eq!(recv(false, Abort, number), Err(Violation::IllegalValue));
        }
        let mut ended = Exchange::new(false);
        ended.recv(Frame { kind: End, number: 1 }).unwrap();
        assert_eq!(ended.recv(Frame { kind: Abort, number: 1 }), Err(Violation::UnexpectedMessage));
        let mut last = Exchange { is_client: true, number: u32::MAX, phase: Phase::Idle };
        assert_eq!(last.send(Begin), None, "the number never wraps");
    }

    #[test]
    fn only_five_bytes_are_a_marker() {
        for bytes in [&[][..], &[1], &[1, 0, 0, 0], &[1, 0, 0, 0, 2, 0]] {
            assert_eq!(Frame::parse(bytes), Err(Violation::Malformed));
        }
        for kind in [0, 5, 255] {
            assert_eq!(Frame::parse(&[kind, 0, 0, 0, 1]), Err(Violation::IllegalValue));
        }
        assert_eq!(Frame::parse(&[3, 0, 0, 1, 2]), Ok(Frame { kind: End, number: 258 }));
    }

    proptest! {
        /// Whatever two honest ends send, and in whatever order it arrives, they never disagree and never get stuck.
        #[test]
        fn honest_ends_understand_each_other(steps in proptest::collection::vec((0_usize..2, 0_u8..6), 0..200)) {
            let mut two = Two::new();
            for (who, what) in steps {
                match what {
                    0 => _ = two.send(who, Begin),
                    1 => _ = two.send(who, Ready),
                    2 => _ = two.send(who, End),
                    3 => _ = two.send(who, Abort),
                    _ => _ = two.recv(who),
                }
            }
            while two.recv(0).is_some() || two.recv(1).is_some() {}
            prop_assert_eq!(two.ends[0].number(), two.ends[1].number());
            prop_assert_eq!(two.ends[0].is_idle(), two.ends[1].is_idle());
            prop_assert_eq!(two.ends[0].is_ours_open(), two.ends[1].is_theirs_open());
            let moved = [Begin, Ready, End, Abort].iter().any(|kind| two.send(0, *kind) || two.send(1, *kind));
            prop_assert!(moved);
        }

        /// Whatever a hostile peer sends, data counts only inside a stream, and streams follow one another.
        #[test]
        fn a_hostile_peer_cannot_mix_two_streams(
            is_client: bool,
            steps in proptest::collection::vec((any::<bool>(), proptest::collection::vec(any::<u8>(), 4..7), 1_u8..5, 0_u32..6), 0..100),
        ) {
            let mut end = Exchange::new(is_client);
            for (by_us, noise, kind, number) in steps {
                let before = end;
                let [a, b, c, d] = number.to_be_bytes();
                let received = if by_us {
                    let kinds = [Begin, Ready, End, Abort];
                    end.send(kinds[usize::from(kind - 1)]).map(|frame| frame.kind).ok_or(Violation::UnexpectedMessage)
                } else {
                    let _ = Frame::parse(&noise);
                    Frame::parse(&[kind, a, b, c, d]).and_then(|frame| end.recv(frame))
                };
                match received {
                    Err(_) => prop_assert_eq!(end, before, "a refused kind changes nothing"),
                    Ok(Begin) => {
                        prop_assert!(before.is_idle() && end.number() == before.number() + 1);
                        prop_assert!(by_us == is_client && end.recv_data().is_err());
                    }
                    Ok(_) => prop_assert_eq!(end.number(), before.number()),
                }
            }
        }
    }
}
