//! Bunter's node agent, as a library in reading order.
//!
//! The modules are listed in the order in which a connection walks them, after the words that all of them use. A module
//! imports only modules listed above it (`cargo xtask check` proves it). The stages never call each other: only
//! [`pipeline`] does, and each stage takes the output of the one before it by value:
//!
//! ```text
//! app ─connect─▶ [ebpf] ─▶ intercept ▶ identify ▶ authorize ▶ handshake ▶ offload ▶ relay ─▶ peer
//! peer ────────▶ [ebpf] ─┘  Flow       Parties    Permit      Session     Pipe      Tally
//!                              any refusal ──────────────────────────────▶ audit ◀─┘
//! ```
//!
//! *Invariant:* bytes of an application move only in [`relay`], and only through a `Pipe` that a `Session` made, which a
//! `Permit` allowed.

#![forbid(unsafe_code)]

pub mod lock;
pub mod units;
pub mod document;
pub mod policy;
pub mod config;
pub mod flow;
pub mod intercept;
pub mod attest;
pub mod credential;
pub mod identify;
pub mod authorize;
pub mod handshake;
pub mod offload;
pub mod busy_poll;
pub mod relay;
pub mod reuse;
pub mod audit;
pub mod live;
pub mod whence;
pub mod admission;
pub mod handshake_slots;
pub mod pipeline;
pub mod shard;
pub mod admin;
pub mod privilege;
pub mod daemon;
