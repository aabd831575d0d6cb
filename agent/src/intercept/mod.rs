//! intercept: sockets in, a [`Flow`](crate::flow::Flow) out.
//!
//! The kernel programs of `ebpf/` redirect connections to the agent. [`Programs`] loads and attaches them, puts policies
//! into their maps and passes on their events, on the control runtime. Each shard has a [`ShardListeners`]: accepted
//! connections come in with what the kernel recorded about them, the agent's own connections go out.
//!
//! ```text
//! control:  Programs::load ▶ take_listeners ▶ install(policy) ▶ listeners ▶ event, event, ...      release()
//! shard:    UnboundListeners::open ▶ ShardListeners ▶ accept_outbound / accept_inbound ▶ Flow ... Dialler: dial / upstream
//! ```
//!
//! In this order at start: `load`, `install`, then `listeners` and `set_listener_mode` for each, then `preexisting`. After
//! a reload: `install`, and the listeners again, since the new policy may judge their owners differently.
//!
//! *Invariant:* a flow's destination is what the kernel recorded under the connection's own addresses, never a guess.

mod cgroups;
mod control;
mod diagnostics;
mod shard_listeners;
mod error;
mod host;
mod install;
mod layout;
mod listeners;
mod owners;
mod programs;
mod refusals;
mod registry;
mod rows;
mod usage;
mod tables;
mod work;

pub use control::{KernelEvent, OldConnection, Options, Programs};
pub use diagnostics::user_of;
pub use error::{Error, Holder};
pub use host::{Finding, findings, hold_against_host};
pub use install::{Outlook, Prepared};
pub use owners::{Held, Walk};
pub use programs::release;
pub use refusals::Refused;
pub use registry::Listening;
pub use rows::KernelFacts;
#[cfg(test)]
pub(crate) use shard_listeners::{Congestion, prepare};
pub use shard_listeners::{Dialler, Opening, ShardListeners, UnboundListeners, claim_listener};
pub use tables::{address, canonical, ip, listener_key, socket_address};
pub use usage::{PinnedTables, TableUsage};
pub use work::Work;
