//! What must be refused, as sentences: peers that lie, local programs that try to get round, bad input.
//!
//! Every refusal has an audit line that says whose fault it was; nothing reaches the workload; and the marker, which only
//! proper connections carry, is never on the wire.

#[path = "hostile/clients.rs"]
mod clients;
#[path = "hostile/servers.rs"]
mod servers;
#[path = "hostile/locals.rs"]
mod locals;
#[path = "hostile/inputs.rs"]
mod inputs;
#[path = "hostile/disks.rs"]
mod disks;
