//! Time and size on slow machines: under an emulated processor everything takes ten times as long.
//!
//! `LAB_SLOW=10` multiplies every deadline and divides every bulk size.
//!
//! *Invariant:* a deadline is only ever a limit. No test is right because something took long enough.

use std::time::{Duration, Instant};

/// How slow this machine is said to be: 1 unless `LAB_SLOW` says more.
pub fn slowness() -> u32 {
    std::env::var("LAB_SLOW").ok().and_then(|text| text.parse().ok()).unwrap_or(1).max(1)
}

/// A deadline of so many seconds on a fast machine.
pub fn seconds(number: u64) -> Duration {
    Duration::from_secs(number) * slowness()
}

/// A deadline of so many milliseconds on a fast machine.
pub fn millis(number: u64) -> Duration {
    Duration::from_millis(number) * slowness()
}

/// A bulk size, smaller where the machine is slow, a whole number of 64 KiB.
pub fn bulk(bytes: u64) -> u64 {
    let block = 64 * 1024;
    (bytes / u64::from(slowness()) / block).max(1) * block
}

/// A number of things, smaller where the machine is slow.
pub fn count(number: usize) -> usize {
    (number / slowness() as usize).max(1)
}

/// Asks until the answer is there or the time is up.
pub fn until<T>(limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
