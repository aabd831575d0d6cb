//! handshake

pub mod verify;
