//! Where on this host the programs go: the unified cgroup hierarchy, the BPF file system, the network namespace.
//!
//! *Invariant:* everything is found, nothing assumed: cgroup2 may be mounted anywhere, and one directory of pins belongs to
//! one network namespace and one layout of the maps. What is found is the host's own, or the agent does not start.

mod facts;

use super::error::{During, Error, Holder};
use bunter_common::ABI;
use bunter_sys as sys;
use facts::{BPFFS, Facts};
use rustix::{
    fs::{FlockOperation, Mode, OFlags},
    io::Errno,
};
use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

/// The namespace of this thread: a process may have threads in several.
const NETNS: &str = "/proc/thread-self/ns/net";

/// This host, as far as the programs are concerned.
#[derive(Debug)]
pub(super) struct Host {
    /// Where the unified hierarchy is mounted.
    pub cgroup2: PathBuf,
    /// Directory of the pins of this namespace.
    pub pins: PathBuf,
    /// The namespace.
    pub netns: OwnedFd,
    /// Its inode number.
    pub netns_inode: u64,
    /// Its cookie, which no other namespace has had since the host was booted.
    pub netns_cookie: u64,
}

impl Host {
    /// Looks around, and holds what is there against what process 1 sees.
    pub fn find() -> Result<Self, Error> {
        capable()?;
        let (netns, netns_inode) = netns()?;
        let pins = pins(netns_inode);
        let cgroup2 = Facts::gather(&pins)?.judge()?;
        let netns_cookie = netns_cookie()?;
        Ok(Self { cgroup2, pins, netns, netns_inode, netns_cookie })
    }

    /// Takes the permissions of other users from those pins that exist.
    pub fn close_pins(&self) -> Result<(), Error> {
        facts::narrow(Path::new(BPFFS), &self.pins)
    }

    /// Makes the directory of the pins and locks it, to keep out an agent with another `run_dir`.
    pub fn make_pins(&self) -> Result<OwnedFd, Error> {
        let what = || format!("making {}", self.pins.display());
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.pins).during(what)?;
        // Where other users can write to the root of the file system, one of them may have made the directory first.
        self.close_pins()?;
        let directory = fs::File::open(&self.pins).during(what)?;
        exclusively(directory.into(), &self.pins)
    }

    /// Opens a directory of the hierarchy; `/` is its root.
    pub fn open_cgroup(&self, path: &Path) -> Result<OwnedFd, Error> {
        let path = self.cgroup2.join(path.strip_prefix("/").unwrap_or(path));
        match rustix::fs::open(&path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(cgroup) => Ok(cgroup),
            Err(Errno::NOENT | Errno::NOTDIR) => Err(Error::NoSuchCgroup { path }),
            Err(error) => Err(error).during(|| format!("opening {}", path.display())),
        }
    }
}

/// What `bunter doctor` says about one condition.
#[derive(Debug)]
pub struct Finding {
    /// What was looked at.
    pub item: &'static str,
    /// What is there, or why the agent does not start.
    pub outcome: Result<String, Error>,
}

/// Does the agent see the host itself, or only a part of it, as in a container? Gives the first reason not to start.
pub fn hold_against_host() -> Result<(), Error> {
    capable()?;
    Facts::gather(&pins(netns()?.1))?.judge().map(drop)
}

/// Everything that has to be the host's own, one by one.
pub fn findings() -> Vec<Finding> {
    let finding = |item, outcome| Finding { item, outcome };
    let privilege = finding("privilege", capable().map(|()| "all capabilities that the agent needs".into()));
    let found = netns().and_then(|(_, inode)| Facts::gather(&pins(inode)).map(|facts| (pins(inode), facts)));
    let (pins, facts) = match found {
        Ok(found) => found,
        Err(error) => return vec![privilege, finding("host", Err(error))],
    };
    let open = facts
        .too_open()
        .map(|step| format!("; {} is {:04o}, closed at the next start", step.path.display(), step.mode));
    let pinned = format!("{} can be changed by root alone{}", pins.display(), open.collect::<String>());
    vec![
        privilege,
        finding("process namespace", facts.processes().map(|()| "the host's".into())),
        finding("cgroup namespace", facts.cgroups().map(|()| "the host's".into())),
        finding("cgroup2", facts.cgroup2().map(|path| format!("{} is the whole hierarchy", path.display()))),
        finding("bpffs", facts.bpffs().map(|()| format!("{BPFFS} is the host's"))),
        finding("pins", facts.openness().map(|()| pinned)),
    ]
}

/// The directory of this namespace's pins, if it is on the host's file system: `None` where that has none.
pub(super) fn hosts_pins(netns_inode: u64) -> Result<Option<PathBuf>, Error> {
    let pins = pins(netns_inode);
    match Facts::gather(&pins)?.bpffs() {
        Ok(()) => Ok(Some(pins)),
        Err(Error::NoBpfFs { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Directory of the pins of the namespace with this inode number.
pub(super) fn pins(netns_inode: u64) -> PathBuf {
    Path::new(BPFFS).join("bunter").join(format!("abi{ABI}-{netns_inode}"))
}

/// Where a map is pinned that all agents of the host share.
pub(super) fn shared_pin(map: &str) -> PathBuf {
    Path::new(BPFFS).join("bunter").join(format!("abi{ABI}-{map}"))
}

/// The cookie of this thread's network namespace.
pub(super) fn netns_cookie() -> Result<u64, Error> {
    let probe =
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).during(|| "making a socket".into())?;
    sys::netns_cookie(probe.as_fd()).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOPROTOOPT) => hook_missing("SO_NETNS_COOKIE", "5.14"),
        _ => Error::Host { what: "asking for the cookie of the network namespace".into(), error },
    })
}

/// This thread's network namespace and its inode number.
pub(super) fn netns() -> Result<(OwnedFd, u64), Error> {
    let netns = fs::File::open(NETNS).during(|| format!("opening {NETNS}"))?;
    let inode = netns.metadata().during(|| format!("looking at {NETNS}"))?.ino();
    Ok((netns.into(), inode))
}

/// Takes the lock by which there is only one agent for this namespace. It is held until the descriptor is closed.
pub(super) fn lock(run_dir: &Path, netns_inode: u64) -> Result<OwnedFd, Error> {
    fs::create_dir_all(run_dir).during(|| format!("making {}", run_dir.display()))?;
    let path = run_dir.join(format!("netns-{netns_inode}.lock"));
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let lock =
        rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR).during(|| format!("opening {}", path.display()))?;
    exclusively(lock, &path)
}

/// Takes the lock on the pins that an agent with any `run_dir` holds, if there are pins.
pub(super) fn lock_pins(pins: &Path) -> Result<Option<OwnedFd>, Error> {
    match fs::File::open(pins) {
        Ok(directory) => exclusively(directory.into(), pins).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).during(|| format!("opening {}", pins.display())),
    }
}

fn exclusively(file: OwnedFd, path: &Path) -> Result<OwnedFd, Error> {
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => {
            let (lock, holder) = (path.into(), holder(&file));
            // An agent runs as root: a process of another user is none.
            let user =
                |process: u32| Some(fs::metadata(format!("/proc/{process}")).ok()?.uid()).filter(|user| *user != 0);
            match holder.and_then(|process| Some((process, user(process)?))) {
                Some((process, user)) => Err(Error::HeldByUser { lock, process, user }),
                None => Err(Error::SecondAgent { lock, holder: Holder(holder) }),
            }
        }
        Err(error) => Err(error).during(|| format!("locking {}", path.display())),
    }
}

/// Which process has locked this file, as far as the kernel tells.
fn holder(file: &OwnedFd) -> Option<u32> {
    let found = rustix::fs::fstat(file).ok()?;
    let (major, minor) = (rustix::fs::major(found.st_dev), rustix::fs::minor(found.st_dev));
    holder_of(&format!("{major:02x}:{minor:02x}:{}", found.st_ino), &fs::read_to_string("/proc/locks").ok()?)
}

/// The process behind the lock of a file in proc_locks(5). The lines of processes that wait for the lock have an arrow; a
/// process of another process namespace is shown as 0 or less.
fn holder_of(file: &str, locks: &str) -> Option<u32> {
    let holder = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        (fields.next()? == "FLOCK").then_some(())?;
        let process = fields.nth(2)?.parse().ok().filter(|process| *process > 0);
        (fields.next()? == file).then_some(process)?
    };
    locks.lines().find_map(holder)
}

/// The error for something that this kernel does not have.
pub(super) fn hook_missing(hook: &'static str, since: &'static str) -> Error {
    let running = rustix::system::uname().release().to_string_lossy().into_owned();
    Error::HookMissing { hook, since, running }
}

/// May this process load and attach programs, see every process and close sockets?
fn capable() -> Result<(), Error> {
    use caps::{CapSet, Capability};
    let needed = [
        Capability::CAP_BPF,
        Capability::CAP_NET_ADMIN,
        Capability::CAP_PERFMON,
        Capability::CAP_SYS_ADMIN,
        Capability::CAP_SYS_PTRACE,
    ];
    let has = caps::read(None, CapSet::Effective)
        .map_err(|error| io::Error::other(error.to_string()))
        .during(|| "reading the capabilities of this process".into())?;
    let missing: Vec<String> =
        needed.iter().filter(|capability| !has.contains(capability)).map(ToString::to_string).collect();
    if missing.is_empty() { Ok(()) } else { Err(Error::Privilege { missing: missing.join(", ") }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_a_lock_is_found_among_others() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 fe:00:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 12 fe:00:78 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 13 fe:00:77 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 14 fe:00:77 0 EOF\n\
                     4: FLOCK  ADVISORY  WRITE -1 00:1c:9 0 EOF\n5: FLOCK\n\n";
        assert_eq!(holder_of("fe:00:77", locks), Some(14));
        assert_eq!(holder_of("00:1c:9", locks), None);
        assert_eq!(holder_of("fe:00:7", locks), None);
        let folder = tempfile::tempdir().unwrap();
        let held = lock(folder.path(), 1).unwrap();
        let Err(Error::SecondAgent { holder, .. }) = lock(folder.path(), 1) else { panic!("it was taken twice") };
        assert!(holder.0.is_none_or(|holder| holder == std::process::id()), "{holder:?}");
        drop(held);
        lock(folder.path(), 1).unwrap();
    }
}
