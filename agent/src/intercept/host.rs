//! Where on this host the programs go: the unified cgroup hierarchy, the BPF file system, the network namespace.
//!
//! *Invariant:* everything is found, nothing assumed: cgroup2 may be mounted anywhere, and one directory of pins belongs to
//! one network namespace and one layout of the maps.

use super::error::{During, Error};
use crate::sys;
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
        let cgroup2 = cgroup_mount()?;
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
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(directory.into()),
            Err(Errno::WOULDBLOCK) => Err(Error::SecondAgent { lock: self.pins.clone() }),
            Err(error) => Err(error).during(|| format!("locking {}", self.pins.display())),
        }
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
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(Errno::WOULDBLOCK) => Err(Error::SecondAgent { lock: path }),
        Err(error) => Err(error).during(|| format!("locking {}", path.display())),
    }
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

/// Where the unified cgroup hierarchy is mounted.
pub fn cgroup_mount() -> Result<PathBuf, Error> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").during(|| "reading /proc/self/mountinfo".into())?;
    cgroup2_mount(&mounts).ok_or(Error::NoCgroup2)
}

/// The mount point of the unified hierarchy, the one that shows most of it first (proc_pid_mountinfo(5)).
fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    let mut found: Vec<(&str, PathBuf)> = mountinfo
        .lines()
        .filter_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            if kind.split(' ').next()? != "cgroup2" {
                return None;
            }
            let mut fields = mount.split(' ').skip(3);
            Some((fields.next()?, unescape(fields.next()?)))
        })
        .collect();
    found.sort_by_key(|(root, _)| root.len());
    found.into_iter().next().map(|(_, at)| at)
}

/// Mount points have their white space written in octal.
fn unescape(path: &str) -> PathBuf {
    PathBuf::from(path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_wherever_it_is_mounted() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
                      32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_mount(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        let odd =
            "41 31 0:38 /a /srv/inner rw - cgroup2 none rw\n42 31 0:38 / /srv/my\\040cgroups rw - cgroup2 none rw\n";
        assert_eq!(cgroup2_mount(odd), Some(PathBuf::from("/srv/my cgroups")));
        assert_eq!(cgroup2_mount("31 23 0:28 / /sys/fs/cgroup rw - tmpfs cgroup2 rw\n"), None);
    }
}
