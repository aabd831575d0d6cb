//! Refusals that repeat: the first of a kind are lines of their own; where they come faster, they are one line with a
//! count.
//!
//! Anybody who can make an attempt can make very many, of very many kinds, and must not fill the disk of others with them.
//! So there is a stock of lines, which is refilled by a few a minute. The less of it is left, the longer refusals are
//! counted before a line is written. Where there are more kinds than lines, several kinds are joined into a wider one,
//! which is one line. Pure: the caller says what time it is.
//!
//! *Invariant:* every record that comes in comes out, by itself or in the count of another; and in the long run no more
//! lines come out than the stock grows by.

use super::{Decision, Direction, Record, Stage};
use crate::units::network_of;
use bunter_identity::spiffe::SpiffeId;
use ipnet::IpNet;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};
use time::OffsetDateTime;

/// How long what is counted waits to be written: while more than half of the stock is left, more than a quarter, and less.
const PATIENCE: [Duration; 3] = [INTERVAL, Duration::from_secs(10), Duration::from_secs(30)];
/// The interval in which the lines that are written at once are counted.
const INTERVAL: Duration = Duration::from_secs(2);
/// Lines of one kind in an interval that are written as they come.
const FREE: u32 = 20;
/// The same of all kinds of a class together.
const FREE_OF_ALL: u32 = 400;
/// Kinds of one width that are told apart at once. A refusal of a further kind is counted by a wider one.
const KINDS: usize = 512;
/// Lines that a class may have at once.
const STOCK: u32 = 1000;
/// How long it takes until the stock has one line more.
const REFILL: Duration = Duration::from_secs(3);

/// Classes of refusals. Each has a stock of its own, so that the refusals of one class do not hide those of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Class {
    /// Refused by the kernel programs.
    Kernel,
    /// Refused to a local workload by this process.
    Outbound,
    /// Refused to a peer that has proved its identity.
    Peer,
    /// Refused to a peer that has not.
    Stranger,
}

/// What refusals are told apart by: who was refused what. A wider kind leaves out more.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Kind {
    direction: Direction,
    code: &'static str,
    /// Outbound, the user.
    user: Option<u32>,
    /// Inbound, the network of the peer.
    network: Option<IpNet>,
    /// An identity that was proved or attested on either side.
    ids: [Option<SpiffeId>; 2],
    destination: SocketAddr,
}

/// How much kinds of each width leave out: nothing; the destination and part of the network; everything but direction and
/// code.
const WIDTHS: usize = 3;

/// What was refused of a kind in this interval.
#[derive(Debug)]
struct Seen {
    since: Instant,
    written: u32,
    held: Option<Held>,
}

/// What waits to be written.
#[derive(Debug)]
struct Held {
    /// The first.
    record: Box<Record>,
    /// How many there are, the first included.
    count: u64,
    last: OffsetDateTime,
}

/// Refusals of the last moments.
#[derive(Debug, Default)]
pub(super) struct Repeats {
    classes: HashMap<Class, Stock>,
}

/// Those of one class.
#[derive(Debug)]
struct Stock {
    /// By width.
    kinds: [HashMap<Kind, Seen>; WIDTHS],
    /// When the interval of `written` began.
    since: Instant,
    written: u32,
    left: u32,
    /// Up to when the refill is in `left`.
    filled: Instant,
}

impl Repeats {
    /// A refusal: gives it back where it is to be written at once.
    pub fn take(&mut self, record: Record, now: Instant) -> Option<Record> {
        self.classes.entry(Class::of(&record)).or_insert_with(|| Stock::new(now)).take(record, now)
    }

    /// What has waited long enough, each with its count. `all`: whatever waits.
    pub fn due(&mut self, now: Instant, all: bool) -> Vec<Record> {
        self.classes.values_mut().flat_map(|stock| stock.due(now, all)).collect()
    }
}

impl Stock {
    fn new(now: Instant) -> Self {
        Self { kinds: Default::default(), since: now, written: 0, left: STOCK, filled: now }
    }

    fn fill(&mut self, now: Instant) {
        let more = now.duration_since(self.filled).as_secs() / REFILL.as_secs();
        let more = u32::try_from(more).unwrap_or(STOCK).min(STOCK);
        self.left = (self.left + more).min(STOCK);
        // The time that is left over counts towards the next line, unless the stock is full.
        self.filled = if self.left == STOCK { now } else { self.filled + REFILL * more };
    }

    fn patience(&self) -> Duration {
        match self.left {
            left if left > STOCK / 2 => PATIENCE[0],
            left if left > STOCK / 4 => PATIENCE[1],
            _ => PATIENCE[2],
        }
    }

    fn take(&mut self, record: Record, now: Instant) -> Option<Record> {
        self.fill(now);
        if now.duration_since(self.since) >= INTERVAL {
            (self.since, self.written) = (now, 0);
        }
        // When the stock is low, the first line of a new kind is worth more than a further one of a known kind.
        let free = match self.left {
            left if left > STOCK / 2 => FREE,
            left if left > STOCK / 4 => 1,
            _ => 0,
        };
        let may_write = self.written < FREE_OF_ALL;
        let seen = self.seen(Kind::of(&record), now);
        if let Some(held) = &mut seen.held {
            held.add(record.count, record.time, record.last);
            return None;
        }
        if seen.written < free && may_write {
            seen.written += 1;
            self.written += 1;
            self.left -= 1;
            return Some(record);
        }
        seen.held = Some(Held::new(record));
        None
    }

    /// The narrowest kind that there is room for. Of the widest there are only as many as there are codes, each way.
    fn seen(&mut self, kind: Kind, now: Instant) -> &mut Seen {
        let has_room = |kinds: &HashMap<Kind, Seen>, kind: &Kind| kinds.len() < KINDS || kinds.contains_key(kind);
        let [narrow, wide, widest] = &mut self.kinds;
        let wider = kind.widened(1);
        let (kinds, kind) = match () {
            () if has_room(narrow, &kind) => (narrow, kind),
            () if has_room(wide, &wider) => (wide, wider),
            () => (widest, wider.widened(2)),
        };
        kinds.entry(kind).or_insert(Seen { since: now, written: 0, held: None })
    }

    fn due(&mut self, now: Instant, all: bool) -> Vec<Record> {
        self.fill(now);
        let patience = self.patience();
        let mut due: Vec<(usize, Kind, Held)> = Vec::new();
        for (width, kinds) in self.kinds.iter_mut().enumerate() {
            let over = kinds.extract_if(|_, seen| all || now.duration_since(seen.since) >= patience);
            due.extend(over.filter_map(|(kind, seen)| Some((width, kind, seen.held?))));
        }
        if due.is_empty() {
            return Vec::new();
        }
        // At most a quarter of what is left goes to narrow kinds, and half to wider ones.
        let few = |width: &usize| {
            let kinds: HashSet<Kind> = due.iter().map(|(own, kind, _)| kind.widened(*own.max(width))).collect();
            u32::try_from(kinds.len()).is_ok_and(|lines| lines <= self.left >> (2 - *width))
        };
        let width = (0..WIDTHS - 1).find(few).unwrap_or(WIDTHS - 1);
        let mut lines = Vec::new();
        for (kind, whole, held) in merged(due, width) {
            if self.left == 0 && !all {
                // There are too few lines even so: this kind goes on being counted.
                self.kinds[WIDTHS - 1].insert(kind, Seen { since: now, written: 0, held: Some(held) });
                continue;
            }
            self.left = self.left.saturating_sub(1);
            lines.push(held.line(&kind, whole));
        }
        lines
    }
}

/// Joins what is of one kind of this width, or of a wider one by which it was counted. True: all of it is of one kind of
/// the narrowest width.
fn merged(due: Vec<(usize, Kind, Held)>, width: usize) -> Vec<(Kind, bool, Held)> {
    let mut kinds: HashMap<Kind, (bool, Held)> = HashMap::new();
    for (own, kind, held) in due {
        match kinds.entry(kind.widened(width.max(own))) {
            std::collections::hash_map::Entry::Vacant(place) => drop(place.insert((own == 0, held))),
            std::collections::hash_map::Entry::Occupied(mut place) => {
                let (whole, sum) = place.get_mut();
                *whole = false;
                sum.merge(held);
            }
        }
    }
    kinds.into_iter().map(|(kind, (whole, held))| (kind, whole, held)).collect()
}

impl Held {
    fn new(record: Record) -> Self {
        let (count, last) = (record.count, record.last.unwrap_or(record.time));
        Self { record: Box::new(record), count, last }
    }

    fn add(&mut self, count: u64, time: OffsetDateTime, last: Option<OffsetDateTime>) {
        (self.count, self.last) = (self.count + count, self.last.max(last.unwrap_or(time)));
    }

    fn merge(&mut self, other: Self) {
        let Self { record, count, last } = other;
        self.add(count, record.time, Some(last));
        if record.time < self.record.time {
            self.record = record;
        }
    }

    /// The record that stands for all. `whole`: all are of one kind of the narrowest width.
    fn line(self, kind: &Kind, whole: bool) -> Record {
        let Self { record, count, last } = self;
        if count == 1 {
            return *record;
        }
        let mut record = Record { count, last: Some(last), ..*record };
        if !whole {
            (record.source.address, record.destination.address) = (NOWHERE, NOWHERE);
            let [source, destination] = &kind.ids;
            (record.source.id, record.destination.id) = (source.clone(), destination.clone());
            if kind.user.is_none() {
                record.process = None;
            }
            let from = kind.network.map_or_else(String::new, |network| format!(" from {network}"));
            let why = format!(" (the first of many{from}, from or to too many places to name each)");
            record.reason.to_mut().push_str(&why);
        }
        record
    }
}

const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0);

impl Class {
    fn of(record: &Record) -> Self {
        match (record.direction, &record.source.id) {
            _ if record.stage == Stage::Kernel => Self::Kernel,
            (Direction::Outbound, _) => Self::Outbound,
            (Direction::Inbound, Some(_)) => Self::Peer,
            (Direction::Inbound, None) => Self::Stranger,
        }
    }
}

impl Kind {
    fn of(record: &Record) -> Self {
        debug_assert_eq!(record.decision, Decision::Denied);
        let (user, network) = match (&record.process, record.direction) {
            (Some(process), Direction::Outbound) => (Some(process.uid), None),
            _ => (None, Some(network_of(record.source.address.ip()))),
        };
        let ids = [&record.source.id, &record.destination.id].map(Clone::clone);
        let (direction, code, destination) = (record.direction, record.code, record.destination.address);
        Self { direction, code, user, network, ids, destination }
    }

    /// The same, leaving out more.
    fn widened(&self, width: usize) -> Self {
        let mut kind = self.clone();
        if width > 0 {
            kind.destination = NOWHERE;
            kind.ids[1] = None;
            // An identity says more than the network that it came from.
            kind.network = kind.network.filter(|_| kind.ids[0].is_none()).map(wider);
        }
        if width > 1 {
            (kind.user, kind.network, kind.ids) = (None, None, [None, None]);
        }
        kind
    }
}

/// The wider network that a network is in: the /16, or the /48.
fn wider(network: IpNet) -> IpNet {
    let length = if network.addr().is_ipv4() { 16 } else { 48 }.min(network.prefix_len());
    IpNet::new(network.addr(), length).map_or(network, |wider| wider.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::tests_support::record;
    use proptest::prelude::*;

    fn refusal(network: u8, port: u16) -> Record {
        let mut record = Record { direction: Direction::Inbound, decision: Decision::Denied, ..record(1) };
        record.source.id = None;
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
        assert!(lines + due.len() <= KINDS + 1, "{lines} and {}", due.len());
        assert_eq!(lines as u64 + due.iter().map(|record| record.count).sum::<u64>(), 20_000);
        // For those that there was no room to tell apart, at least the wider network is named.
        let wide: Vec<&Record> = due.iter().filter(|line| line.reason.contains("from 10.1.0.0/16")).collect();
        assert!(matches!(*wide, [line] if line.count > 19_000 && line.destination.address == NOWHERE));
    }

    #[test]
    fn in_the_long_run_the_lines_are_few_and_every_refusal_is_counted() {
        let (mut repeats, start) = (Repeats::default(), Instant::now());
        let (mut lines, mut counted, mut made) = (0_u32, 0, 0);
        let hours = 3;
        for second in 0..hours * 3600_u64 {
            let now = start + Duration::from_secs(second);
            let mut write = |line: Record| (lines, counted) = (lines + 1, counted + line.count);
            for number in 0..100 {
                let mut record = refusal((number * 7 + second) as u8, (second + number) as u16);
                // The sources are all over the world, so that no one network covers them.
                record.source.address.set_ip([(second % 200) as u8 + 1, number as u8, 7, 7].into());
                record.code = ["one", "two", "three"][(number % 3) as usize];
                made += 1;
                repeats.take(record, now).into_iter().for_each(&mut write);
            }
            repeats.due(now, false).into_iter().for_each(&mut write);
        }
        repeats.due(start + Duration::from_secs(hours * 3600), true).iter().for_each(|line| {
            lines += 1;
            counted += line.count;
        });
        assert_eq!(counted, made);
        let minutes = hours as u32 * 60;
        assert!(lines <= STOCK + minutes * 20 + 1100, "{lines}");
    }

    #[test]
    fn what_strangers_are_refused_hides_nobody_elses_refusals() {
        let (mut repeats, now) = (Repeats::default(), Instant::now());
        let mut moment = now;
        for number in 0..100_000_u32 {
            moment = now + Duration::from_millis(u64::from(number));
            repeats.take(refusal((number % 256) as u8, (number % 60_000) as u16), moment);
            if number % 1000 == 0 {
                repeats.due(moment, false);
            }
        }
        let peer = || Record { direction: Direction::Inbound, decision: Decision::Denied, ..record(1) };
        assert!(repeats.take(peer(), moment).is_some());
        assert!(repeats.take(Record { direction: Direction::Outbound, ..peer() }, moment).is_some());
        assert!(repeats.take(Record { stage: Stage::Kernel, ..peer() }, moment).is_some());
    }

    #[test]
    fn all_of_the_loopback_network_is_one() {
        let (mut repeats, now) = (Repeats::default(), Instant::now());
        let mut written = 0;
        for number in 0..10_000_u32 {
            let mut record = refusal(1, 80);
            record.source.address.set_ip([127, (number / 100) as u8, (number % 100) as u8, 1].into());
            written += u32::from(repeats.take(record, now).is_some());
        }
        assert_eq!(written, FREE);
        let due = repeats.due(now + INTERVAL, false);
        assert_eq!(due.iter().map(|line| line.count).collect::<Vec<_>>(), [u64::from(10_000 - FREE)]);
    }

    /// A record of several counts as that many, and ends when its last did.
    #[test]
    fn what_was_counted_by_the_kernel_stays_counted() {
        let (mut repeats, now) = (Repeats::default(), Instant::now());
        let several = |count| {
            let mut record = Record { stage: Stage::Kernel, count, ..refusal(1, 80) };
            record.last = Some(record.time + Duration::from_secs(count));
            record
        };
        let written = (0..FREE).filter_map(|_| repeats.take(several(3), now)).map(|line| line.count).sum::<u64>();
        assert_eq!(written, 3 * u64::from(FREE));
        (0..5).for_each(|number| assert!(repeats.take(several(10 - number), now).is_none()));
        let due = repeats.due(now + INTERVAL, false);
        assert_eq!((due.len(), due[0].count), (1, 10 + 9 + 8 + 7 + 6));
        assert_eq!(due[0].last, Some(due[0].time + Duration::from_secs(10)));
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
