//! The benchmarking lab: Bunter and its peers on the same two hosts, one after the other, in interleaved rounds.
//!
//! [`load`] and [`serve`] are the two ends of every flow, [`peers`] starts what stands between them, [`measure`] takes one
//! measurement and judges whether something else disturbed it, [`report`] and [`plot`] show what came of it.
//!
//! *Invariant:* a peer that could not be measured is named with the reason; a benchmark that a peer wins is shown.

pub mod poll;
pub mod stats;
pub mod serve;
pub mod load;
pub mod facts;
pub mod plan;
pub mod peers;
pub mod measure;
pub mod report;
pub mod plot;
