//! What the subcommands do, one file each.

pub mod agent;
pub mod ca;
pub mod check;
pub mod run;
pub mod show;

/// The command line, the configuration or the policy is wrong. The text says why, unless that has been reported already.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Wrong(pub String);

/// Exit code of an error; see the module documentation of `main`.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<Wrong>() { 2 } else { 1 }
}
