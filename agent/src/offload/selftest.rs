//! Does the kernel of this host do TLS, with real bytes? Asked once at start, and by `bunter doctor`.
//!
//! For each cipher a loopback connection gets kernel TLS on one end and this process's own record layer on the other, and
//! both have to agree on data, control records, what has left the socket, a forgery, fresh keys and the end.
//! *Invariant:* whatever cannot be tried counts as failed; the kernel is chosen for nothing that was not seen to work.

mod steps;

use super::matrix::{Matrix, Outcome, Row};
use crate::handshake::Aead;

/// Tries everything. Takes a fraction of a second where the kernel answers, and a few seconds where it does not.
pub fn run() -> Matrix {
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    let protocol = match steps::protocol() {
        Ok(()) => Outcome::Passed,
        Err(error) => Outcome::Failed(error.to_string()),
    };
    let ciphers = Aead::ALL.map(|aead| if protocol == Outcome::Passed { steps::cipher(aead) } else { Row::new(aead) });
    Matrix { kernel, protocol, ciphers: ciphers.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::matrix::EngineSupport;

    #[test]
    fn this_very_kernel_gives_a_verdict_with_a_reason() {
        let matrix = run();
        eprintln!("{matrix}");
        if let EngineSupport::User { why } = matrix.verdict() {
            assert!(!why.is_empty());
        }
        assert!(serde_json::to_string(&matrix).unwrap().contains("AES-256-GCM"));
    }
}
