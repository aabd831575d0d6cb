//! Where on this host the programs go: the unified cgroup hierarchy, the BPF file system, the network namespace.
//!
//! *Invariant:* everything is found, nothing assumed: cgroup2 may be mounted anywhere, and one directory of pins belongs to
//! one network namespace and one layout of the maps.

use super::error::{During, Error, Holder};
use crate::{cgroup2, sys};
use rustix::{
    fs::{FlockOperation, Mode, OFlags},
    io::Errno,
    mount::MountFlags,
};
use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};
use wimsey_common::ABI;

const BPFFS: &str = "/sys/fs/bpf";
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
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
    /// Looks around.
    pub fn find() -> Result<Self, Error> {
        capable()?;
        let cgroup2 =
            cgroup2::mount_point().during(|| "reading /proc/self/mountinfo".into())?.ok_or(Error::NoCgroup2)?;
        let (netns, netns_inode) = netns()?;
        let probe = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)
            .during(|| "making a socket".into())?;
        let netns_cookie = sys::netns_cookie(probe.as_fd()).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOPROTOOPT) => hook_missing("SO_NETNS_COOKIE", "5.14"),
            _ => Error::Host { what: "asking for the cookie of the network namespace".into(), error },
        })?;
        Ok(Self { cgroup2, pins: pins(netns_inode), netns, netns_inode, netns_cookie })
    }

    /// Mounts the BPF file system where everybody looks for it, if it is not.
    pub fn mount_bpffs(&self) -> Result<(), Error> {
        let bpffs = Path::new(BPFFS);
        if rustix::fs::statfs(bpffs).is_ok_and(|found| found.f_type as u64 == BPF_FS_MAGIC) {
            return Ok(());
        }
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("bpf", bpffs, "bpf", flags, c"mode=0700")
            .map_err(|error| Error::BpfFs { path: bpffs.into(), error: error.into() })
    }

    /// Makes the directory of the pins and locks it, for an agent that has been given another `run_dir`.
    pub fn make_pins(&self) -> Result<OwnedFd, Error> {
        let what = || format!("making {}", self.pins.display());
        fs::create_dir_all(&self.pins).during(what)?;
        let directory = fs::File::open(&self.pins).during(what)?;
        exclusively(directory.into(), &self.pins)
    }

    /// Where a map is pinned that all agents of the host share.
    pub fn shared_pin(&self, map: &str) -> PathBuf {
        Path::new(BPFFS).join("wimsey").join(format!("abi{ABI}-{map}"))
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

/// Directory of the pins of the namespace with this inode number.
pub(super) fn pins(netns_inode: u64) -> PathBuf {
    Path::new(BPFFS).join("wimsey").join(format!("abi{ABI}-{netns_inode}"))
}

/// This thread's network namespace and its inode number.
pub(super) fn netns() -> Result<(OwnedFd, u64), Error> {
    let netns = fs::File::open(NETNS).during(|| format!("opening {NETNS}"))?;
    let inode = netns.metadata().during(|| format!("looking at {NETNS}"))?.ino();
    Ok((netns.into(), inode))
}

/// Takes the lock that says: one agent for this namespace. It is held until the descriptor is closed.
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
        Err(Errno::WOULDBLOCK) => Err(Error::SecondAgent { lock: path.into(), holder: Holder(holder(&file)) }),
        Err(error) => Err(error).during(|| format!("locking {}", path.display())),
    }
}

/// Which process has locked this file, as far as the kernel tells.
fn holder(file: &OwnedFd) -> Option<u32> {
    let found = rustix::fs::fstat(file).ok()?;
    let (major, minor) = (rustix::fs::major(found.st_dev), rustix::fs::minor(found.st_dev));
    holder_of(&format!("{major:02x}:{minor:02x}:{}", found.st_ino), &fs::read_to_string("/proc/locks").ok()?)
}

/// The process behind the lock of a file in proc_locks(5). Those who wait for it have an arrow in front; one of another
/// process namespace is 0 or less.
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
