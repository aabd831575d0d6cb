//! The `wimsey` command.
fn main() {}
