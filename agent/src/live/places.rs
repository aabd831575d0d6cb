//! How many connections may wait for another stream: each takes a place when it begins to wait.
//!
//! *Invariant:* never more places are taken than there are, whatever the number of shards.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Places that are taken.
#[derive(Debug, Default)]
pub struct ConnectionSlots {
    taken: AtomicUsize,
}

impl ConnectionSlots {
    /// Takes one of `all` places; where none is free, says how many are taken.
    pub fn take(self: &Arc<Self>, all: usize) -> Result<ConnectionSlot, usize> {
        // The counter guards no other memory, so that no ordering is needed.
        let more = |taken: usize| (taken < all).then_some(taken + 1);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)?;
        Ok(ConnectionSlot { of: self.clone() })
    }
}

/// A place, taken until this is dropped.
#[derive(Debug)]
pub struct ConnectionSlot {
    of: Arc<ConnectionSlots>,
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.of.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_places_are_taken_than_there_are() {
        let places = Arc::new(ConnectionSlots::default());
        let held = [places.take(2).unwrap(), places.take(2).unwrap()];
        assert_eq!(places.take(2).unwrap_err(), 2);
        drop(held);
        places.take(1).unwrap();
        assert_eq!(places.take(0).unwrap_err(), 0);
    }

    #[test]
    fn shards_that_come_at_once_get_exactly_as_many_as_there_are() {
        let places = Arc::new(ConnectionSlots::default());
        let shards: Vec<_> = (0..8)
            .map(|_| {
                let places = places.clone();
                std::thread::spawn(move || (0..1000).filter_map(|_| places.take(500).ok()).collect::<Vec<_>>())
            })
            .collect();
        let held: Vec<ConnectionSlot> = shards.into_iter().flat_map(|shard| shard.join().unwrap()).collect();
        assert_eq!(held.len(), 500);
        drop(held);
        assert_eq!(places.taken.load(Ordering::Relaxed), 0);
    }
}
