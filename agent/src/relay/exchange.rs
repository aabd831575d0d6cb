//! How two agents carry one connection of the applications after the other over one TLS connection. Pure: words in, words
//! out. The wire format and the reasons are in docs/SESSIONS.md.
//!
//! A word is the content of a record of its own type, so it cannot be mistaken for a byte of an application, and the order
//! of records, which TLS protects, is its order. The client begins a use, the server is ready for it, both end their
//! stream or abort it.
//!
//! *Invariant:* the bytes of a use lie between its first word and the end of that direction; a word that is not the next
//! one, or carries another number, ends the connection. No use begins before both streams of the one before have ended.

use super::Violation;

/// What is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    /// The client: an application has connected; its bytes come after [`Word::Ready`].
    Begin,
    /// The server: the workload has accepted.
    Ready,
    /// Either side: its application has ended its stream, of which everything has been sent.
    End,
    /// Either side: its application has reset the connection, and what is still on the way to it is of no use.
    Abort,
}

/// A word and the number of the use that it is about; the handshake begins use 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Marker {
    pub(super) word: Word,
    pub(super) number: u32,
}

/// Bytes of a marker: the word, then the number in network order.
pub(super) const LENGTH: usize = 5;

impl Marker {
    pub(super) fn bytes(self) -> [u8; LENGTH] {
        let word = match self.word {
            Word::Begin => 1,
            Word::Ready => 2,
            Word::End => 3,
            Word::Abort => 4,
        };
        let [a, b, c, d] = self.number.to_be_bytes();
        [word, a, b, c, d]
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Violation> {
        let &[word, a, b, c, d] = bytes else { return Err(Violation::Malformed) };
        let word = match word {
            1 => Word::Begin,
            2 => Word::Ready,
            3 => Word::End,
            4 => Word::Abort,
            _ => return Err(Violation::IllegalValue),
        };
        Ok(Self { word, number: u32::from_be_bytes([a, b, c, d]) })
    }
}

/// How far the uses of one connection have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exchange {
    is_client: bool,
    number: u32,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Begun, and the server has not said that it is ready.
    Begun,
    /// Under way.
    Open { ours: bool, theirs: bool },
    /// Both streams have ended.
    Between,
}

impl Exchange {
    /// Right after the handshake: use 1 is under way.
    pub(super) fn new(is_client: bool) -> Self {
        Self { is_client, number: 1, phase: Phase::Open { ours: true, theirs: true } }
    }

    /// The number of the use that is under way, or was the last one.
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

    /// Have both streams of the last use ended?
    #[cfg(test)]
    pub(super) fn is_between(self) -> bool {
        self.phase == Phase::Between
    }

    /// Bytes of the peer's application have arrived.
    pub(super) fn hear_data(self) -> Result<(), Violation> {
        if self.is_theirs_open() { Ok(()) } else { Err(Violation::UnexpectedMessage) }
    }

    /// A word of the peer has arrived.
    pub(super) fn hear(&mut self, marker: Marker) -> Result<Word, Violation> {
        self.advance(marker, !self.is_client)?;
        Ok(marker.word)
    }

    /// The marker to send for this word; none where it is not this side's turn to say it.
    pub(super) fn say(&mut self, word: Word) -> Option<Marker> {
        let number = if word == Word::Begin { self.number.checked_add(1)? } else { self.number };
        let marker = Marker { word, number };
        self.advance(marker, self.is_client).ok()?;
        Some(marker)
    }

    /// Both sides go by the same table; `by_client`: who says it.
    fn advance(&mut self, marker: Marker, by_client: bool) -> Result<(), Violation> {
        let by_us = by_client == self.is_client;
        let expected = if marker.word == Word::Begin { self.number.checked_add(1) } else { Some(self.number) };
        if expected != Some(marker.number) {
            return Err(Violation::IllegalValue);
        }
        self.phase = match (marker.word, self.phase) {
            (Word::Begin, Phase::Between) if by_client => Phase::Begun,
            (Word::Ready, Phase::Begun) if !by_client => Phase::Open { ours: true, theirs: true },
            (Word::End | Word::Abort, Phase::Open { ours: true, theirs }) if by_us => ended(false, theirs),
            (Word::End | Word::Abort, Phase::Open { ours, theirs: true }) if !by_us => ended(ours, false),
            _ => return Err(Violation::UnexpectedMessage),
        };
        self.number = marker.number;
        Ok(())
    }
}

fn ended(ours: bool, theirs: bool) -> Phase {
    if ours || theirs { Phase::Open { ours, theirs } } else { Phase::Between }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Word::*;
    use proptest::prelude::*;

    /// Both ends of a connection, and the words on their way.
    #[derive(Debug)]
    struct Two {
        ends: [Exchange; 2],
        to: [std::collections::VecDeque<Marker>; 2],
    }

    impl Two {
        fn new() -> Self {
            Self { ends: [Exchange::new(true), Exchange::new(false)], to: Default::default() }
        }
        fn say(&mut self, who: usize, word: Word) -> bool {
            let said = self.ends[who].say(word);
            self.to[1 - who].extend(said);
            said.is_some()
        }
        fn hear(&mut self, who: usize) -> Option<Word> {
            let marker = self.to[who].pop_front()?;
            Some(
                self.ends[who]
                    .hear(Marker::parse(&marker.bytes()).unwrap())
                    .expect("what one may say, the other takes"),
            )
        }
    }

    #[test]
    fn one_use_after_the_other() {
        let mut two = Two::new();
        for number in 1..5 {
            assert!(two.say(0, End) && two.hear(1) == Some(End));
            assert!(!two.say(0, Begin), "the server has not ended");
            assert!(two.ends[0].hear_data().is_ok() && two.ends[1].hear_data().is_err());
            assert!(two.say(1, Abort) && two.hear(0) == Some(Abort));
            assert!(two.ends.iter().all(|end| end.is_between() && end.number() == number));
            assert!(!two.say(1, Begin), "only the client begins");
            assert!(two.say(0, Begin) && two.hear(1) == Some(Begin));
            assert!(two.ends.iter().all(|end| end.hear_data().is_err()), "not before the server is ready");
            assert!(!two.say(0, End) && !two.say(0, Ready));
            assert!(two.say(1, Ready) && two.hear(0) == Some(Ready));
        }
    }

    #[test]
    fn both_may_abort_at_once() {
        let mut two = Two::new();
        assert!(two.say(0, Abort) && two.say(1, Abort));
        assert!(two.hear(0) == Some(Abort) && two.hear(1) == Some(Abort));
        assert!(two.ends.iter().all(|end| end.is_between()));
    }

    #[test]
    fn a_word_out_of_turn_or_about_another_use_is_a_violation() {
        let hear = |is_client, word, number| Exchange::new(is_client).hear(Marker { word, number });
        assert_eq!(hear(true, Ready, 1), Err(Violation::UnexpectedMessage));
        assert_eq!(hear(false, Begin, 2), Err(Violation::UnexpectedMessage));
        assert_eq!(hear(true, Begin, 2), Err(Violation::UnexpectedMessage));
        for number in [0, 2, u32::MAX] {
            assert_eq!(hear(true, End, number), Err(Violation::IllegalValue));
            assert_eq!(hear(false, Abort, number), Err(Violation::IllegalValue));
        }
        let mut ended = Exchange::new(false);
        ended.hear(Marker { word: End, number: 1 }).unwrap();
        assert_eq!(ended.hear(Marker { word: Abort, number: 1 }), Err(Violation::UnexpectedMessage));
        let mut last = Exchange { is_client: true, number: u32::MAX, phase: Phase::Between };
        assert_eq!(last.say(Begin), None, "the number never wraps");
    }

    #[test]
    fn only_five_bytes_are_a_marker() {
        for bytes in [&[][..], &[1], &[1, 0, 0, 0], &[1, 0, 0, 0, 2, 0]] {
            assert_eq!(Marker::parse(bytes), Err(Violation::Malformed));
        }
        for word in [0, 5, 255] {
            assert_eq!(Marker::parse(&[word, 0, 0, 0, 1]), Err(Violation::IllegalValue));
        }
        assert_eq!(Marker::parse(&[3, 0, 0, 1, 2]), Ok(Marker { word: End, number: 258 }));
    }

    proptest! {
        /// Whatever two honest ends say, in whatever order it arrives: they never disagree, and never get stuck.
        #[test]
        fn honest_ends_understand_each_other(steps in proptest::collection::vec((0_usize..2, 0_u8..6), 0..200)) {
            let mut two = Two::new();
            for (who, what) in steps {
                match what {
                    0 => _ = two.say(who, Begin),
                    1 => _ = two.say(who, Ready),
                    2 => _ = two.say(who, End),
                    3 => _ = two.say(who, Abort),
                    _ => _ = two.hear(who),
                }
            }
            while two.hear(0).is_some() || two.hear(1).is_some() {}
            prop_assert_eq!(two.ends[0].number(), two.ends[1].number());
            prop_assert_eq!(two.ends[0].is_between(), two.ends[1].is_between());
            prop_assert_eq!(two.ends[0].is_ours_open(), two.ends[1].is_theirs_open());
            let moved = [Begin, Ready, End, Abort].iter().any(|word| two.say(0, *word) || two.say(1, *word));
            prop_assert!(moved);
        }

        /// Whatever a hostile peer says: data counts only inside a use, and uses follow one another.
        #[test]
        fn a_hostile_peer_cannot_mix_two_uses(
            is_client: bool,
            steps in proptest::collection::vec((any::<bool>(), proptest::collection::vec(any::<u8>(), 4..7), 1_u8..5, 0_u32..6), 0..100),
        ) {
            let mut end = Exchange::new(is_client);
            for (by_us, noise, word, number) in steps {
                let before = end;
                let [a, b, c, d] = number.to_be_bytes();
                let heard = if by_us {
                    let words = [Begin, Ready, End, Abort];
                    end.say(words[usize::from(word - 1)]).map(|marker| marker.word).ok_or(Violation::UnexpectedMessage)
                } else {
                    let _ = Marker::parse(&noise);
                    Marker::parse(&[word, a, b, c, d]).and_then(|marker| end.hear(marker))
                };
                match heard {
                    Err(_) => prop_assert_eq!(end, before, "a refused word changes nothing"),
                    Ok(Begin) => {
                        prop_assert!(before.is_between() && end.number() == before.number() + 1);
                        prop_assert!(by_us == is_client && end.hear_data().is_err());
                    }
                    Ok(_) => prop_assert_eq!(end.number(), before.number()),
                }
            }
        }
    }
}
