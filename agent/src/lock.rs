//! Mutexes whose holder may have panicked.
//!
//! *Invariant:* what they guard is consistent at every step: a list, or a value that is replaced by one assignment.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks. What a panic of another thread has left behind is still what it was, so that nobody else has to fail for it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
