//! Benchmarks of the hot path; each file under this folder is one. `cargo bench -p bunter-benches` runs them all in about
//! a minute.

use criterion::Criterion;
use std::time::Duration;

/// Short enough to be run on every change, long enough to tell a factor of two from noise.
pub fn quick() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .without_plots()
}
