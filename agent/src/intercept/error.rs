//! What can go wrong between the kernel and the agent, at start, on reload and for one connection.
//!
//! *Invariant:* nothing here lets a connection through. A refusal of one connection has already reset it.

use bunter_identity::refusal::{Culprit, Refusal};
use std::{io, net::SocketAddr, path::PathBuf};

/// Why the kernel programs are not in place, a policy did not get into the maps, or a connection was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The build did not embed the kernel programs.
    #[error("this bunter was built without the kernel programs: run `cargo xtask build`")]
    NoObject,
    /// The process may not do what it has to do.
    #[error("the agent lacks {missing}: run it as root, or give it these capabilities")]
    Privilege {
        /// Names of the capabilities.
        missing: String,
    },
    /// No unified cgroup hierarchy.
    #[error(
        "no cgroup2 file system is mounted (looked in /proc/self/mountinfo): mount one, or start the agent where one is \
         visible (`ip netns exec` hides it, `nsenter --net=` does not)"
    )]
    NoCgroup2,
    /// The configured subtree does not exist.
    #[error("cgroup {path} does not exist: write an existing one as `cgroup` in agent.toml")]
    NoSuchCgroup {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The agent's view of the host cannot be compared with that of process 1.
    #[error(
        "cannot read what process 1 has mounted ({path}: {error}), by which the agent's own view of the host is judged: run it \
         as root, in a container with `--pid=host`"
    )]
    NoProcessOne {
        /// What was looked at.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// Process ids here are not those that the kernel programs record.
    #[error(
        "the agent is in a process namespace of its own, in which process ids are not those that the kernel records: start it \
         in the host's (`--pid=host` for a container, `hostPID: true` for a pod)"
    )]
    PidNamespace,
    /// Paths of cgroups here are not those of the host.
    #[error(
        "the agent is in a cgroup namespace of its own, in which the paths of cgroups are not the host's and it would cover only \
         a part: start it in the host's (`--cgroupns=host` for a container, `nsenter --target 1 --cgroup` for a shell)"
    )]
    CgroupNamespace,
    /// What is mounted is not the root of the unified hierarchy.
    #[error(
        "{path} is only a part of the host's cgroup2 hierarchy, or something that looks like it: give the agent the whole \
         (`--volume /sys/fs/cgroup:/sys/fs/cgroup` with `--cgroupns=host` for a container)"
    )]
    PartOfCgroup2 {
        /// The mount point.
        path: PathBuf,
    },
    /// Process 1 sees no BPF file system, and the agent mounts none: it could not say who else relies on what is there.
    #[error(
        "no BPF file system is mounted at {path} on this host, as process 1 sees it: run `mount -t bpf -o mode=0700 bpf {path}` \
         on the host (systemd does that at boot; `nsenter --target 1 --mount` in front of it reaches the host from elsewhere)"
    )]
    NoBpfFs {
        /// The mount point.
        path: PathBuf,
    },
    /// What is pinned here would go with this mount namespace, and the protection with it.
    #[error(
        "{path} is not the BPF file system that process 1 has there: what is pinned in it would be gone with this mount namespace, \
         and the protection with it; start the agent where the host's is visible (`--volume {path}:{path}` for a container; \
         `ip netns exec` hides it, `nsenter --net=` does not)"
    )]
    OtherBpfFs {
        /// The mount point.
        path: PathBuf,
    },
    /// Users other than root can write to the BPF file system, and so remove the pins.
    #[error(
        "others than root can write to {path} (mode {mode:04o}), and so could take the agent's programs away: run \
         `chmod 0700 {path}`"
    )]
    OpenBpfFs {
        /// The mount point.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A file or directory that only the agent makes belongs to another user.
    #[error("{path}, where the agent's programs are pinned, belongs to user {owner} and not to root: {advice}")]
    NotRoots {
        /// The file or directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// What to do.
        advice: String,
    },
    /// Something else stands where the agent pins.
    #[error("{path}, where the agent's programs are pinned, is no directory: remove it")]
    NoDirectory {
        /// What is there.
        path: PathBuf,
    },
    /// A lock that keeps the agent from starting is held by a process that is no agent.
    #[error(
        "process {process} of user {user}, which can be no agent, holds the lock on {lock}: end that process; from the next start \
         on only root can open the directory"
    )]
    HeldByUser {
        /// The lock.
        lock: PathBuf,
        /// Who holds it.
        process: u32,
        /// Whose process that is.
        user: u32,
    },
    /// Another agent runs in this network namespace.
    #[error("a second agent on the same network namespace: {lock} is held by {holder}; stop that one first")]
    SecondAgent {
        /// The lock file.
        lock: PathBuf,
        /// Who holds it.
        holder: Holder,
    },
    /// What is to be released is in use.
    #[error(
        "an agent runs in this network namespace ({holder}): stop it first, and then release what it leaves; nothing was \
         changed"
    )]
    AgentRuns {
        /// The agent.
        holder: Holder,
    },
    /// The kernel lacks something.
    #[error("this kernel ({running}) has no {hook}: Bunter needs Linux {since} or later for it")]
    HookMissing {
        /// The program's hook, as the kernel's documentation calls it.
        hook: &'static str,
        /// The version that has it.
        since: &'static str,
        /// `uname -r`.
        running: String,
    },
    /// The verifier refuses a program.
    #[error("the kernel refuses the program {program}: {error}; the end of its log: {log}")]
    Rejected {
        /// The program.
        program: &'static str,
        /// The error code.
        error: io::Error,
        /// The last lines of the verifier's log.
        log: String,
    },
    /// Maps or links left by another version cannot be adopted.
    #[error("cannot adopt what is pinned at {path}: {problem}; stop what depends on it and run `bunter release`")]
    Adopt {
        /// The directory.
        path: PathBuf,
        /// What does not fit.
        problem: String,
    },
    /// A map has no room for another row.
    #[error("the kernel map {map} is full: the policy has too many rows for it; nothing was changed")]
    MapFull {
        /// The map.
        map: &'static str,
    },
    /// A map cannot be read or written.
    #[error("the kernel map {map} cannot be used: {error}")]
    Map {
        /// The map.
        map: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// A policy that was never installed, or too many shards.
    #[error("{what}")]
    Misuse {
        /// What was asked for.
        what: &'static str,
    },
    /// The agent cannot listen.
    #[error("cannot listen on {address}: {error} (is the loopback interface up in this network namespace?)")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the kernel said.
        error: io::Error,
    },
    /// A file or a system call at start or in a look around the host.
    #[error("{what}: {error}")]
    Host {
        /// What was tried on what.
        what: String,
        /// What the kernel said.
        error: io::Error,
    },
    /// Netlink socket diagnostics do not answer.
    #[error("cannot list the TCP sockets of this host: {error} (is the kernel module tcp_diag there?)")]
    Diagnostics {
        /// What the kernel said.
        error: io::Error,
    },
    /// `accept()` failed.
    #[error("cannot accept a connection: {error}")]
    Accept {
        /// What the kernel said.
        error: io::Error,
    },
    /// Somebody dialled the agent's outbound listener, not a destination.
    #[error("{peer} dialled the agent itself: the kernel has no record of where that connection wanted to go")]
    NoOrigin {
        /// Who.
        peer: SocketAddr,
        /// The listener.
        at: SocketAddr,
    },
    /// Somebody dialled the agent's inbound listener, not a protected listener.
    #[error("{peer} dialled the agent itself instead of a protected listener")]
    DirectDial {
        /// Who.
        peer: SocketAddr,
        /// The listener.
        at: SocketAddr,
    },
    /// The remote address cannot be reached.
    #[error("cannot connect to {to}: {error}")]
    Dial {
        /// Where to.
        to: SocketAddr,
        /// What the kernel said.
        error: io::Error,
    },
    /// The local workload cannot be reached.
    #[error("cannot connect to the local workload at {to}: {error}")]
    Upstream {
        /// Where it listens.
        to: SocketAddr,
        /// What the kernel said.
        error: io::Error,
    },
}

/// The process that holds a lock, if the kernel tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder(pub Option<u32>);

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(process) => write!(f, "process {process}"),
            None => write!(f, "another process"),
        }
    }
}

impl Error {
    /// A connection to a workload was refused: nobody listens there, or others than were asked for.
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Upstream { error, .. } if error.kind() == io::ErrorKind::ConnectionRefused)
    }

    /// Who dialled the agent instead of a destination, and which of its addresses.
    pub fn stranger(&self) -> Option<(SocketAddr, SocketAddr)> {
        match self {
            Self::NoOrigin { peer, at } | Self::DirectDial { peer, at } => Some((*peer, *at)),
            _ => None,
        }
    }
}

impl Refusal for Error {
    fn culprit(&self) -> Culprit {
        match self {
            Self::NoObject | Self::Rejected { .. } | Self::Misuse { .. } => Culprit::Ourselves,
            Self::NoSuchCgroup { .. } | Self::MapFull { .. } => Culprit::Policy,
            Self::NoOrigin { .. } | Self::DirectDial { .. } | Self::Dial { .. } => Culprit::Peer,
            Self::Privilege { .. }
            | Self::NoCgroup2
            | Self::NoProcessOne { .. }
            | Self::PidNamespace
            | Self::CgroupNamespace
            | Self::PartOfCgroup2 { .. }
            | Self::NoBpfFs { .. }
            | Self::OtherBpfFs { .. }
            | Self::OpenBpfFs { .. }
            | Self::NotRoots { .. }
            | Self::NoDirectory { .. }
            | Self::HeldByUser { .. }
            | Self::SecondAgent { .. }
            | Self::AgentRuns { .. }
            | Self::HookMissing { .. }
            | Self::Adopt { .. }
            | Self::Map { .. }
            | Self::Listen { .. }
            | Self::Host { .. }
            | Self::Diagnostics { .. }
            | Self::Accept { .. }
            | Self::Upstream { .. } => Culprit::Host,
        }
    }

    fn code(&self) -> &'static str {
        match self {
            Self::NoObject => "no-kernel-programs",
            Self::Privilege { .. } => "missing-privilege",
            Self::NoCgroup2 => "no-cgroup2",
            Self::NoSuchCgroup { .. } => "no-such-cgroup",
            Self::NoProcessOne { .. } => "no-process-1",
            Self::PidNamespace => "pid-namespace",
            Self::CgroupNamespace => "cgroup-namespace",
            Self::PartOfCgroup2 { .. } => "part-of-cgroup2",
            Self::NoBpfFs { .. } => "no-bpffs",
            Self::OtherBpfFs { .. } => "other-bpffs",
            Self::OpenBpfFs { .. } => "open-bpffs",
            Self::NotRoots { .. } => "pins-not-roots",
            Self::NoDirectory { .. } => "pins-no-directory",
            Self::HeldByUser { .. } => "pins-held-by-user",
            Self::SecondAgent { .. } => "second-agent",
            Self::AgentRuns { .. } => "agent-runs",
            Self::HookMissing { .. } => "kernel-hook-missing",
            Self::Rejected { .. } => "kernel-program-rejected",
            Self::Adopt { .. } => "pins-do-not-fit",
            Self::MapFull { .. } => "kernel-map-full",
            Self::Map { .. } => "kernel-map",
            Self::Misuse { .. } => "intercept-misuse",
            Self::Listen { .. } => "cannot-listen",
            Self::Host { .. } => "host-call",
            Self::Diagnostics { .. } => "socket-diagnostics",
            Self::Accept { .. } => "accept-failed",
            Self::NoOrigin { .. } => "no-recorded-origin",
            Self::DirectDial { .. } => "dialled-the-agent",
            Self::Dial { .. } => "destination-unreachable",
            Self::Upstream { .. } => "workload-unreachable",
        }
    }
}

/// Says what was tried when the kernel answered with an error.
pub(super) trait During<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> During<T> for Result<T, E> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|error| Error::Host { what: what(), error: error.into() })
    }
}
