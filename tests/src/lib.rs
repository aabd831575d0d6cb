//! The lab: hosts as network namespaces, programs in cgroups of their own, a capture on the wire, agents, certificates.
//!
//! A test opens a [`Lab`], starts agents with [`Lab::mesh`], starts programs with [`Lab::run`], and ends by asking the
//! [`wire`] what was to be seen on it. With `LAB_PLAIN=1` the same flows run without Bunter, and the capture must then
//! hold the marker: that is the test of the oracle itself.
//!
//! *Invariant:* what a test made (namespaces, cgroups, processes, pinned programs, files) is gone after it, also when
//! it panicked or was killed; and a test that could not run says so by name and reason.

pub mod clock;
pub mod skip;
pub mod sys;
pub mod janitor;
pub mod enter;
pub mod program;
pub mod host;
pub mod wire;
pub mod world;
pub mod policy;
pub mod agent;
pub mod mint;
pub mod stranger;
pub mod pattern;
pub mod dial;
pub mod script;
pub mod servers;
pub mod crowd;
pub mod puppet;
pub mod hand;
pub mod bench;

pub use agent::{Agent, Mesh, Settings};
pub use hand::Hand;
pub use host::Host;
pub use mint::{Mint, Svid, Terms};
pub use policy::Policy;
pub use program::{Outcome, Program};
pub use skip::Skip;
pub use wire::Capture;
pub use world::Lab;

/// A failure of the lab itself, or of what it ran.
pub type Result<T> = anyhow::Result<T>;
