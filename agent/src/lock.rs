//! Mutexes whose holder may have panicked.
//!
//! *Invariant:* what these mutexes guard is consistent at every step: a list, or a value that is replaced by one
//! assignment.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, also where another thread has panicked while it held the lock: the value is consistent all the same, so that
/// nobody else has to fail.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
