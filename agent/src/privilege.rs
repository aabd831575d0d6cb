//! Least privilege: what the agent gives up once its programs are attached.
//!
//! *Invariant:* privileges are given up while the main thread is the only one, because capabilities belong to threads and
//! are inherited by those that are made later. It is an error if there is another thread already.

mod sandbox;

pub use sandbox::{Sandbox, probe};

use caps::{CapSet, Capability, CapsHashSet};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};

/// What stays, and what for.
const KEPT: [(Capability, &str); 5] = [
    (Capability::CAP_BPF, "map updates and lookups"),
    (Capability::CAP_NET_ADMIN, "SOCK_DESTROY, sockmap updates, TCP_ULP"),
    (Capability::CAP_NET_BIND_SERVICE, "dialling from the source port that the workload bound"),
    (Capability::CAP_SYS_PTRACE, "reading /proc/PID/exe and /proc/PID/fd of workloads"),
    (Capability::CAP_DAC_READ_SEARCH, "hashing executables that only their owner can read, opening cgroups by id"),
];

/// A privilege could not be given up, or a limit not be set.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Capabilities.
    #[error("capabilities cannot be dropped: {0}; start the agent as root")]
    Capabilities(#[from] caps::errors::CapsError),
    /// There is a thread that would keep what this one gives up.
    #[error("{0} threads run already, and would keep all privileges: this is a defect, please report it")]
    Threads(usize),
    /// Anything else.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: rustix::io::Errno,
    },
}

/// Raises the limit of open files to what the system allows: two sockets a connection.
pub fn raise_file_limit() -> Result<u64, Error> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    setrlimit(Resource::Nofile, raised).map_err(system("RLIMIT_NOFILE cannot be raised"))?;
    Ok(limit.maximum.unwrap_or(u64::MAX))
}

/// Gives up all capabilities but the kept ones, new privileges by exec, core dumps and being traced by others, and closes
/// the sandbox. Where the kernel cannot close it the agent runs all the same: nothing that a peer is promised depends on
/// it.
pub fn give_up() -> Result<Sandbox, Error> {
    let threads = threads()?;
    if threads != 1 {
        return Err(Error::Threads(threads));
    }
    let kept: CapsHashSet = KEPT.iter().map(|(capability, _)| *capability).collect();
    let held = caps::read(None, CapSet::Permitted)?;
    let keep: CapsHashSet = kept.intersection(&held).copied().collect();
    // The bounding set can only be changed while CAP_SETPCAP is held, so it goes first.
    for capability in caps::all() {
        if !keep.contains(&capability) && caps::has_cap(None, CapSet::Bounding, capability).unwrap_or(false) {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    caps::set(None, CapSet::Effective, &keep)?;
    caps::set(None, CapSet::Permitted, &keep)?;
    rustix::thread::set_no_new_privs(true).map_err(system("no_new_privs cannot be set"))?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).map_err(system("core dumps cannot be forbidden"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(system("tracing cannot be forbidden"))?;
    Ok(sandbox::close())
}

/// How many threads this process has.
fn threads() -> Result<usize, Error> {
    let unreadable = |error: std::io::Error| {
        system("/proc/self/task cannot be read")(
            rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO),
        )
    };
    Ok(std::fs::read_dir("/proc/self/task").map_err(unreadable)?.count())
}

fn system(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> Error {
    move |source| Error::System { what, source }
}
