//! What the kernel programs have refused, each refusal counted once.
//!
//! The programs count refusals by kind in `REFUSALS` and tell one of a kind in a second. Their totals only rise, and this
//! side remembers up to where it has passed them on: an event that was lost, came late or twice changes no sum.
//!
//! *Invariant:* as long as one agent runs, every refusal in a total is in exactly one [`Refused`]. If it is killed, the
//! next agent may pass on again what it has passed on since its last event.

use super::{Error, owners, tables::map_error};
use bunter_common::*;
use bunter_sys::bpf::Table;
use std::collections::HashMap;

/// For how long a kind of refusal is remembered after the last one, in nanoseconds.
const QUIET: u64 = 10 * REFUSAL_INTERVAL;

/// Refusals of one kind.
#[derive(Clone, Copy, Debug)]
pub struct Refused {
    /// The last one that was told; where none was, what is known of the first. Without destination where it stands for several.
    pub event: Event,
    /// How many.
    pub count: u64,
    /// They are not older than this many nanoseconds.
    pub age: u64,
    /// The last of them was that many nanoseconds ago.
    pub last_age: u64,
}

/// Passes refusals on.
#[derive(Debug)]
pub(super) struct Refusals {
    table: Table<RefusalKey, Refusal>,
    passed: HashMap<RefusalKey, Passed>,
}

/// What was passed on of a kind, and when that was.
#[derive(Clone, Copy, Debug)]
struct Passed {
    total: u64,
    at: u64,
    /// The total up to which events were sent to the agent before. It has passed on those that it read; the others come to
    /// this agent as events.
    told: u64,
}

impl Refusals {
    /// Takes over where the agent before has left off.
    pub fn adopt(table: &Table<RefusalKey, Refusal>) -> Result<Self, Error> {
        let mut refusals = Self { table: table.clone(), passed: HashMap::new() };
        for (key, row) in refusals.rows()? {
            // What that agent has not read of the ring buffer comes to this one, and is passed on then.
            refusals.passed.insert(key, Passed { total: row.told, at: row.told_at, told: row.told });
        }
        Ok(refusals)
    }

    /// An event came: how many of the refusals that it stands for have not been passed on?
    pub fn told(&mut self, event: &Event) -> Option<Refused> {
        let key = RefusalKey {
            destination: event.destination,
            destination_port: event.destination_port.into(),
            uid: event.task.uid,
            reason: event.reason,
            protocol: event.protocol,
        };
        let now = owners::now();
        let at = if event.task.at == 0 { now } else { event.task.at };
        if self.passed.get(&key).is_some_and(|passed| event.total <= passed.told) {
            // It was sent to the agent before, which has not read it.
            let ago = now.saturating_sub(at);
            return Some(Refused { event: *event, count: event.repeats.into(), age: ago, last_age: ago });
        }
        self.pass(key, event.total, event.total.saturating_sub(event.repeats.into()), at).map(|(count, since)| {
            Refused { event: *event, count, age: now.saturating_sub(since), last_age: now.saturating_sub(at) }
        })
    }

    /// The refusals that were counted and not passed on yet. To be called when all events were read; forgets kinds of which
    /// there was none for a while. `all`: forgets every kind, since another agent may go on from here.
    pub fn collect(&mut self, all: bool) -> Result<Vec<Refused>, Error> {
        let now = owners::now();
        let mut found = Vec::new();
        for (key, mut row) in self.rows()? {
            let over = all || now.saturating_sub(row.last) > QUIET;
            if over {
                let Some(last) = self.table.take(&key).map_err(map_error(map::REFUSALS))? else { continue };
                row = last;
            }
            if let Some((count, since)) = self.pass(key, row.total, 0, row.last) {
                let age = now.saturating_sub(since);
                found.push(Refused { event: event(&key, &row), count, age, last_age: now.saturating_sub(row.last) });
            }
            if over {
                self.passed.remove(&key);
            }
        }
        Ok(found)
    }

    /// Notes that a kind is passed on up to `total`. Gives how many that are, and since when.
    fn pass(&mut self, key: RefusalKey, total: u64, before: u64, at: u64) -> Option<(u64, u64)> {
        let passed = self.passed.get(&key).copied();
        let count = total.checked_sub(passed.map_or(before, |passed| passed.total)).filter(|count| *count > 0)?;
        self.passed.insert(key, Passed { total, at, told: 0 });
        Some((count, if count == 1 { at } else { passed.map_or(at, |passed| passed.at) }))
    }

    fn rows(&self) -> Result<Vec<(RefusalKey, Refusal)>, Error> {
        let mut keys = self.table.keys().map_err(map_error(map::REFUSALS))?;
        keys.sort_unstable_by_key(|key| (key.destination, key.destination_port, key.uid, key.reason, key.protocol));
        keys.dedup();
        let mut rows = Vec::with_capacity(keys.len());
        for key in keys {
            rows.extend(self.table.get(&key).map_err(map_error(map::REFUSALS))?.map(|row| (key, row)));
        }
        Ok(rows)
    }
}

/// As the programs would have told it.
fn event(key: &RefusalKey, row: &Refusal) -> Event {
    Event {
        kind: EVENT_REFUSED,
        reason: key.reason,
        rule: 0,
        protocol: key.protocol,
        task: row.task,
        cookie: 0,
        source: row.source,
        destination: key.destination,
        source_port: row.source_port as u16,
        destination_port: key.destination_port as u16,
        destination_id: row.destination_id,
        total: row.total,
        repeats: 0,
        pad: 0,
    }
}
