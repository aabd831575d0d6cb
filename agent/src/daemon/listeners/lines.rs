//! Log lines about listening sockets: the first few of each user are written, the others are counted and the count is
//! written.
//!
//! Anybody who can listen can cause as many findings as they like, and must not fill the disk of others with them. What
//! each socket is found to be is in status.
//!
//! *Invariant:* each line is written, or counted in another line that is written.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How long what is counted waits to be written.
const INTERVAL: Duration = Duration::from_secs(10);
/// Lines of one user in an interval.
const FREE: u64 = 5;
/// Lines of all users in an interval.
const FREE_OF_ALL: u64 = 50;
/// Users that are told apart in an interval.
const USERS: usize = 32;

/// The lines of the current interval.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// When the interval began.
    since: Option<Instant>,
    written: u64,
    /// How many lines there were for a user, written or not. Without a user: for all that are too many to tell apart.
    of: HashMap<Option<u32>, Count>,
}

#[derive(Debug, Default)]
struct Count {
    written: u64,
    held: u64,
}

impl Lines {
    /// Is a line about a socket of this user to be written? If not, it is counted.
    pub fn may_write(&mut self, uid: u32, now: Instant) -> bool {
        self.write_counts(now);
        self.since.get_or_insert(now);
        let who = (self.of.len() < USERS || self.of.contains_key(&Some(uid))).then_some(uid);
        let count = self.of.entry(who).or_default();
        if count.written < FREE && self.written < FREE_OF_ALL {
            count.written += 1;
            self.written += 1;
            return true;
        }
        count.held += 1;
        false
    }

    /// Writes the counts of an interval that is over.
    pub fn write_counts(&mut self, now: Instant) {
        for (uid, findings) in self.due(now) {
            let uid = uid.map_or_else(|| "many".to_owned(), |uid| uid.to_string());
            tracing::warn!(
                uid,
                findings,
                "more listening sockets are refused, or protected late: `bunter status` names each"
            );
        }
    }

    fn due(&mut self, now: Instant) -> Vec<(Option<u32>, u64)> {
        if self.since.is_none_or(|since| now.duration_since(since) < INTERVAL) {
            return Vec::new();
        }
        (self.since, self.written) = (None, 0);
        self.of.drain().filter(|(_, count)| count.held > 0).map(|(uid, count)| (uid, count.held)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_findings_of_a_user_are_lines_and_more_are_a_count() {
        let (mut lines, now) = (Lines::default(), Instant::now());
        let written = (0..1000).filter(|_| lines.may_write(1, now)).count();
        assert_eq!(written as u64, FREE);
        assert!(lines.may_write(2, now), "others are not kept from being told");
        assert_eq!(lines.due(now), []);
        assert_eq!(lines.due(now + INTERVAL), [(Some(1), 995)]);
        assert_eq!(lines.due(now + INTERVAL * 2), []);
        assert!(lines.may_write(1, now + INTERVAL * 2));
    }

    #[test]
    fn however_many_users_there_are_the_lines_about_their_sockets_are_few() {
        let (mut lines, now) = (Lines::default(), Instant::now());
        let written = (0..10_000).filter(|uid| lines.may_write(*uid, now)).count() as u64;
        let due = lines.due(now + INTERVAL);
        assert!(written <= FREE_OF_ALL && due.len() <= USERS + 1, "{written} lines, {} counts", due.len());
        assert_eq!(written + due.iter().map(|(_, held)| held).sum::<u64>(), 10_000);
    }
}
