//! offload: a `Session` in, a `Pipe` out.

pub mod record;
