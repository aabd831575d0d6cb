//! What must work, as sentences: unmodified programs on two hosts, whose connections are mutual TLS between their
//! identities on the wire and nothing else.
//!
//! Every test here ends by searching the capture for its marker. With `LAB_PLAIN=1` those that are not about the agent
//! run without it, and the marker must be found.

#[path = "flows/programs.rs"]
mod programs;
#[path = "flows/streams.rs"]
mod streams;
#[path = "flows/addresses.rs"]
mod addresses;
#[path = "flows/neighbours.rs"]
mod neighbours;
#[path = "flows/sessions.rs"]
mod sessions;
#[path = "flows/foreign.rs"]
mod foreign;
#[path = "flows/lifecycle.rs"]
mod lifecycle;
#[path = "flows/renewal.rs"]
mod renewal;
#[path = "flows/commands.rs"]
mod commands;
