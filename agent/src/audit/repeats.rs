//! Refusals that repeat: the first of a kind are lines of their own, what comes faster is one line with a count.
//!
//! Whoever can make an attempt can make very many, and must not fill the disk of others with them. Pure: time comes in.
//!
//! *Invariant:* every record that comes in comes out, by itself or in the count of another.

use super::{Decision, Direction, Record};
use crate::spiffe::SpiffeId;
use crate::units::network_of;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};
use time::OffsetDateTime;

/// How long what is counted waits to be written.
const INTERVAL: Duration = Duration::from_secs(2);
/// Lines of one kind in an interval that are written as they come.
const FREE: u32 = 20;
/// The same of all kinds together.
const FREE_OF_ALL: u32 = 400;
/// Kinds that are told apart at once. What comes beyond is counted by its code alone.
const KINDS: usize = 512;

/// Who was refused what.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Kind {
    direction: Direction,
    code: &'static str,
    /// Outbound, the user; inbound, the network of the peer.
    who: (Option<u32>, IpAddr),
    /// An identity that was proved or attested on either side.
    ids: [Option<SpiffeId>; 2],
    destination: SocketAddr,
}

/// What was refused of a kind in this interval.
#[derive(Debug)]
struct Seen {
    since: Instant,
    written: u32,
    /// The first that was not written, and how many there are with it.
    held: Option<(Box<Record>, u64, OffsetDateTime)>,
}

/// Refusals of the last moments.
#[derive(Debug, Default)]
pub(super) struct Repeats {
    kinds: HashMap<Kind, Seen>,
    /// When the interval of `written` began.
    since: Option<Instant>,
    written: u32,
}

impl Repeats {
    /// A refusal: gives it back where it is to be written at once.
    pub fn take(&mut self, record: Record, now: Instant) -> Option<Record> {
        if self.since.is_none_or(|since| now.duration_since(since) >= INTERVAL) {
            (self.since, self.written) = (Some(now), 0);
        }
        let mut kind = Kind::of(&record);
        if !self.kinds.contains_key(&kind) && self.kinds.len() >= KINDS {
            kind = kind.of_many();
        }
        let seen = self.kinds.entry(kind).or_insert(Seen { since: now, written: 0, held: None });
        if let Some((_, count, last)) = &mut seen.held {
            (*count, *last) = (*count + record.count, record.time);
            return None;
        }
        if seen.written < FREE && self.written < FREE_OF_ALL {
            seen.written += 1;
            self.written += 1;
            return Some(record);
        }
        let (count, last) = (record.count, record.time);
        seen.held = Some((Box::new(record), count, last));
        None
    }

    /// What has waited long enough, each with its count. `all`: whatever waits.
    pub fn due(&mut self, now: Instant, all: bool) -> Vec<Record> {
        let mut due = Vec::new();
        self.kinds.retain(|kind, seen| {
            if !all && now.duration_since(seen.since) < INTERVAL {
                return true;
            }
            if let Some((record, count, last)) = seen.held.take() {
                due.push(together(kind, *record, count, last));
            }
            false
        });
        due
    }
}

/// A record that stands for several.
fn together(kind: &Kind, record: Record, count: u64, last: OffsetDateTime) -> Record {
    if count == 1 {
        return record;
    }
    let mut record = Record { count, last: Some(last), ..record };
    if kind.is_of_many() {
        (record.source.address, record.destination.address) = (NOWHERE, NOWHERE);
        record.process = None;
        record.reason.to_mut().push_str(" (the last of many, from and to too many places to name each)");
    }
    record
}

const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0);

impl Kind {
    fn of(record: &Record) -> Self {
        debug_assert_eq!(record.decision, Decision::Denied);
        let who = match (&record.process, record.direction) {
            (Some(process), Direction::Outbound) => (Some(process.uid), NOWHERE.ip()),
            _ => (None, network_of(record.source.address.ip())),
        };
        let ids = [&record.source.id, &record.destination.id].map(Clone::clone);
        let (direction, code, destination) = (record.direction, record.code, record.destination.address);
        Self { direction, code, who, ids, destination }
    }

    fn of_many(self) -> Self {
        Self { who: (None, NOWHERE.ip()), ids: [None, None], destination: NOWHERE, ..self }
    }

    fn is_of_many(&self) -> bool {
        self.destination == NOWHERE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::tests_support::record;
    use proptest::prelude::*;

    fn refusal(network: u8, port: u16) -> Record {
        let mut record = Record { direction: Direction::Inbound, decision: Decision::Denied, ..record(1) };
        record.source.address = SocketAddr::from(([10, 1, network, 7], 40_000));
        record.destination.address.set_port(port);
        record
    }

    #[test]
    fn a_few_are_lines_and_more_are_one_line_with_their_number() {
        let (mut repeats, now) = (Repeats::default(), Instant::now());
        let written = (0..1000).filter(|_| repeats.take(refusal(1, 80), now).is_some()).count();
        assert_eq!(written, FREE as usize);
        // Others are not kept from being told.
        assert!(repeats.take(refusal(2, 80), now).is_some());
        assert!(repeats.due(now, false).is_empty());
        let due = repeats.due(now + INTERVAL, false);
        assert_eq!(due.iter().map(|record| record.count).collect::<Vec<_>>(), [1000 - u64::from(FREE)]);
        assert!(due[0].last.is_some() && due[0].destination.address.port() == 80);
        assert!(repeats.take(refusal(1, 80), now + INTERVAL).is_some(), "an interval later it begins anew");
    }

    #[test]
    fn however_many_kinds_there_are_the_lines_are_few() {
        let (mut repeats, now) = (Repeats::default(), Instant::now());
        let mut lines = 0;
        for port in 1..=20_000 {
            lines += usize::from(repeats.take(refusal((port % 251) as u8, port), now).is_some());
        }
        let due = repeats.due(now + INTERVAL, false);
        assert!(lines + due.len() <= FREE_OF_ALL as usize + KINDS + 1, "{lines} and {}", due.len());
        assert_eq!(lines as u64 + due.iter().map(|record| record.count).sum::<u64>(), 20_000);
    }

    proptest! {
        #[test]
        fn every_refusal_is_in_one_line(
            attempts in proptest::collection::vec((0..3_u8, 1..4_u16, 0..1500_u64), 1..400)
        ) {
            let (mut repeats, mut now, mut lines) = (Repeats::default(), Instant::now(), Vec::new());
            let number = attempts.len() as u64;
            for (network, port, pause) in attempts {
                now += Duration::from_millis(pause / 100);
                lines.extend(repeats.take(refusal(network, port), now));
                if pause > 1400 {
                    lines.extend(repeats.due(now, false));
                }
            }
            lines.extend(repeats.due(now, true));
            prop_assert_eq!(lines.iter().map(|line| line.count).sum::<u64>(), number);
        }
    }
}
