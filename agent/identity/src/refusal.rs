//! Whose fault is it? Every module's error answers that, with a stable code and a sentence for the operator.
//!
//! *Invariant:* there is no catch-all. A refusal that names nobody cannot be written.

/// Who has to act so that it works next time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Culprit {
    /// The other end of the connection.
    Peer,
    /// The policy, registration entries or configuration of this host.
    Policy,
    /// This host: kernel, file system, resources, the local program.
    Host,
    /// Bunter itself: a defect.
    Ourselves,
}

/// An error that ends a connection attempt, or a start or reload.
pub trait Refusal: std::error::Error + Send + Sync + 'static {
    /// Who has to act.
    fn culprit(&self) -> Culprit;
    /// A stable, lower-case, hyphenated code: the same in the audit line, the metrics and `bunter status`.
    fn code(&self) -> &'static str;
}
