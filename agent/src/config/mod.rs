//! agent.toml: where things are, which engine, how much and how long. What is allowed is the policy's business.
//!
//! One file comes in, a [`Config`] of real types goes out, or everything that is wrong with the file. Every key has a
//! default but `[identity]`, which has to be chosen.
//!
//! *Invariant:* unknown keys are refused, and no setting makes the agent less strict about who its peers are.

mod printing;
mod reading;
#[cfg(test)]
mod tests;

use crate::document::{self, Document, Problems, Purpose, SourceLocation};
use bunter_identity::{
    refusal::{Culprit, Refusal},
    spiffe::TrustDomain,
};
use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Directory of the policy.
    pub policy_dir: PathBuf,
    /// For what must outlive a restart. Nothing is kept there so far.
    pub state_dir: PathBuf,
    /// Admin socket and lock; root only.
    pub run_dir: PathBuf,
    /// Root of the covered cgroups, on the unified hierarchy: `/` is all of them.
    pub cgroup: String,
    /// Which engine carries records.
    pub engine: EngineChoice,
    /// How many data shards.
    pub shards: Shards,
    /// Do shards stay awake for a moment where bytes follow one another closely?
    pub busy_poll: bool,
    /// Who issues the identities of this host.
    pub identity: Provider,
    /// Bundles of further trust domains; or, while an authority is being replaced, of the other authority of the host's own
    /// domain.
    pub trust: Vec<Trust>,
    /// Where audit records go.
    pub audit: Audit,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// How many there may be.
    pub limits: Limits,
    /// Connections between two agents that are used again.
    pub sessions: Sessions,
}

/// Which engine carries records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineChoice {
    /// The one that was measured to be cheaper: this process (docs/adr/0012).
    Auto,
    /// The kernel, or the agent does not start.
    Kernel,
    /// This process.
    User,
}

/// How many data shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shards {
    /// One for each CPU that the agent may use.
    Auto,
    /// So many.
    Exactly(NonZeroUsize),
}

/// Who issues the identities of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Provider {
    /// A local authority, made by `bunter ca init`.
    Embedded {
        /// Directory of its key, certificate and bundle.
        ca_dir: PathBuf,
        /// Lifetime of an SVID.
        svid_ttl: Duration,
    },
}

/// A further trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trust {
    /// Its name.
    pub trust_domain: TrustDomain,
    /// PEM file of its authorities.
    pub bundle: PathBuf,
    /// PEM file of what they revoked, where there is one.
    pub crl: Option<PathBuf>,
}

/// Where audit records go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audit {
    /// File of JSON lines.
    pub path: PathBuf,
    /// What happens when it cannot be written.
    pub when_full: WhenFull,
}

/// What happens to connections when no audit record can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// New connections are refused.
    Refuse,
    /// Connections go on; lost records are counted.
    Continue,
}

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP connect to a peer or to a local workload.
    pub dial: Duration,
    /// The TLS handshake as a whole.
    pub handshake: Duration,
    /// From SIGTERM until the connections that are left are closed.
    pub drain: Duration,
    /// How long a connection may have bytes to deliver to a socket that has room for them and takes none, before it is
    /// given up.
    pub stall: Duration,
}

/// How many there may be at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections, those included that are still being made.
    pub connections: usize,
    /// Handshakes under way.
    pub handshakes: usize,
    /// Handshakes that wait until others are over.
    pub waiting: usize,
}

/// Connections between two agents that are used again: whether, how many, how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sessions {
    /// Whether at all.
    pub reuse: bool,
    /// How long an unused one is kept.
    pub idle: Duration,
    /// How long after its handshake one is used again.
    pub age: Duration,
    /// How often one is used.
    pub uses: u32,
    /// Unused ones that a shard keeps for one workload and destination.
    pub spares: usize,
}

impl Default for Sessions {
    fn default() -> Self {
        let (idle, age) = (Duration::from_secs(30), Duration::from_secs(10 * 60));
        Self { reuse: true, idle, age, uses: 10_000, spares: 64 }
    }
}

impl Sessions {
    /// May a connection of this age, after so many uses, have another?
    pub fn allows(&self, since: Instant, uses: u32) -> bool {
        self.reuse && uses < self.uses && since.elapsed() < self.age
    }
}

/// A configuration that is not taken, and everything that is wrong with it: one line each.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problems}")]
pub struct InvalidConfig {
    /// What is wrong, by line.
    pub problems: Problems,
}

impl Refusal for InvalidConfig {
    fn culprit(&self) -> Culprit {
        Culprit::Policy
    }
    fn code(&self) -> &'static str {
        "config-invalid"
    }
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, InvalidConfig> {
        let file = path.display().to_string();
        document::read(path, Purpose::InForce).map_or_else(
            |(what, instead)| {
                let mut problems = Problems::default();
                problems.add(&SourceLocation { file: file.as_str().into(), line: 0 }, what, instead);
                Err(InvalidConfig { problems })
            },
            |text| Self::parse(&file, &text),
        )
    }

    /// Checks a text. No I/O: whether the paths exist is found by those who use them.
    pub fn parse(file: &str, text: &str) -> Result<Self, InvalidConfig> {
        let mut problems = Problems::default();
        let config = Document::parse(&file.into(), text, &mut problems).map(|document| {
            let root = document.root(&reading::ROOT, &mut problems);
            reading::read(&root, &mut problems)
        });
        match config {
            Some(Some(config)) if problems.is_empty() => Ok(config),
            _ => Err(InvalidConfig { problems: problems.sorted() }),
        }
    }

    /// Path of the admin socket.
    pub fn admin_socket(&self) -> PathBuf {
        self.run_dir.join("admin.sock")
    }

    /// The configuration as a whole, defaults included, as a file that would say the same.
    pub fn print(&self) -> String {
        self.to_string()
    }
}
