//! Why a process cannot be attested, and whose fault that is.

use super::Facts;
use crate::policy::Ambiguous;
use bunter_identity::refusal::{Culprit, Refusal};
use std::io;

/// Why a process cannot be attested.
#[derive(Debug, thiserror::Error)]
pub enum AttestError {
    /// The agent cannot see processes as the kernel programs record them.
    #[error(
        "the agent runs in a pid namespace of its own ({0}), where processes have other numbers: run it in the host's"
    )]
    PidNamespace(String),
    /// There is no hierarchy to look cgroups up in.
    #[error(
        "no mount of the whole unified cgroup hierarchy is seen here (looked in /proc/self/mountinfo): mount -t cgroup2 none \
         /sys/fs/cgroup"
    )]
    NoCgroup2,
    /// The host cannot be looked at.
    #[error("cannot look at {what}: {error}")]
    Host {
        /// What.
        what: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// It ended before it could be looked at.
    #[error("{0} ended before it was attested: nothing to do, unless a program should wait for its connection")]
    Died(Box<Facts>),
    /// Its number belongs to a younger process by now.
    #[error("{0} ended, and another process has its number now")]
    Reused(Box<Facts>),
    /// It is in another cgroup than when it acted.
    #[error("{facts} has moved to cgroup {now} since: start it in the cgroup in which it is to run")]
    Moved {
        /// The process as recorded.
        facts: Box<Facts>,
        /// Where it is now.
        now: String,
    },
    /// It has other ids than when it acted.
    #[error("{facts} has changed to uid {uid}, gid {gid} since: name ids in the policy that it keeps")]
    IdsChanged {
        /// The process as recorded.
        facts: Box<Facts>,
        /// Real user id now.
        uid: u32,
        /// Real group id now.
        gid: u32,
    },
    /// It started another program while it was looked at.
    #[error("{0} started another program while it was attested")]
    Exec(Box<Facts>),
    /// The agent knows of no listening socket.
    #[error(
        "no listening socket is known there: the server has just ended, or the tables have no room for it (see `bunter status`)"
    )]
    NoListener,
    /// Nobody holds the listening socket.
    #[error("no process can be found that holds the listening socket (cookie {cookie}){detail}")]
    NoOwner {
        /// The socket.
        cookie: u64,
        /// Where was looked.
        detail: String,
    },
    /// Two entries match equally well.
    #[error("{facts}: {source}")]
    Ambiguous {
        /// The process.
        facts: Box<Facts>,
        /// The entries.
        source: Ambiguous,
    },
    /// The kernel does not say what it should.
    #[error("{facts}: cannot be attested: {source}. The agent needs CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH")]
    Unreadable {
        /// The process.
        facts: Box<Facts>,
        /// What happened.
        source: io::Error,
    },
}

impl AttestError {
    /// May it be different in a moment? What was looked for had just ended, and something may be about to take its place.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::NoListener | Self::NoOwner { .. } | Self::Died(_) | Self::Reused(_) | Self::Exec(_))
    }
}

impl Refusal for AttestError {
    fn culprit(&self) -> Culprit {
        match self {
            AttestError::Ambiguous { .. } => Culprit::Policy,
            _ => Culprit::Host,
        }
    }
    fn code(&self) -> &'static str {
        match self {
            AttestError::PidNamespace(_) => "pid-namespace",
            AttestError::NoCgroup2 => "no-cgroup2",
            AttestError::Host { .. } => "host-call",
            AttestError::Died(_) => "process-died",
            AttestError::Reused(_) => "pid-reused",
            AttestError::Moved { .. } => "cgroup-moved",
            AttestError::IdsChanged { .. } => "ids-changed",
            AttestError::Exec(_) => "process-exec",
            AttestError::NoListener => "no-listener",
            AttestError::NoOwner { .. } => "listener-without-owner",
            AttestError::Ambiguous { .. } => "ambiguous-entries",
            AttestError::Unreadable { .. } => "process-unreadable",
        }
    }
}
