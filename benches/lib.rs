//! Benchmarks of the hot path; each file under this folder is one.
