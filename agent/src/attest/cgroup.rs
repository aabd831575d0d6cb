//! The unified cgroup hierarchy: from a cgroup's id to its path and back.
//!
//! A cgroup's id is the inode number of its directory. Ids are not used again and cgroups of version 2 cannot be renamed,
//! so the path of an id can be remembered.
//!
//! *Invariant:* nothing here looks at a hierarchy of version 1; where no unified one is mounted, there is an error.

use super::AttestError;
use bunter_sys::{self as sys, mounts};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{Mode, OFlags, ResolveFlags, fstat, openat, openat2, readlinkat},
    io::Errno,
};
use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

/// Remembered paths; beyond that all are forgotten and read again.
const REMEMBERED: usize = 8192;

/// The unified hierarchy as it is mounted.
#[derive(Debug)]
pub(crate) struct Hierarchy {
    mount: PathBuf,
    root: OwnedFd,
    paths: RwLock<HashMap<u64, Arc<str>>>,
}

impl Hierarchy {
    /// Finds where it is mounted.
    pub(crate) fn discover() -> Result<Self, AttestError> {
        let unseen = |error| AttestError::Host { what: "the unified cgroup hierarchy", error };
        let mount = mounts::cgroup2().map_err(unseen)?.ok_or(AttestError::NoCgroup2)?;
        let root = rustix::fs::open(&mount, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| unseen(error.into()))?;
        Ok(Self { mount, root, paths: RwLock::default() })
    }

    /// Where it is mounted.
    #[cfg(test)]
    pub(crate) fn mount(&self) -> &Path {
        &self.mount
    }

    /// Id of the cgroup that now has this path. `None`: there is none.
    pub(crate) fn id_of(&self, path: &str) -> io::Result<Option<u64>> {
        let relative = match path.trim_start_matches('/') {
            "" => ".",
            relative => relative,
        };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match openat2(&self.root, relative, flags, Mode::empty(), resolve) {
            Ok(directory) => Ok(Some(fstat(&directory)?.st_ino)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Path of the cgroup with this id. `None`: it is gone and was never asked for, or its name is not UTF-8.
    pub(crate) fn path_of(&self, id: u64) -> io::Result<Option<Arc<str>>> {
        if let Some(path) = self.paths.read().unwrap_or_else(PoisonError::into_inner).get(&id) {
            return Ok(Some(path.clone()));
        }
        let Some(directory) = self.open(id)? else { return Ok(None) };
        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&directory));
        let full = readlinkat(rustix::fs::CWD, link, Vec::new())?;
        let Some(path) = below(&self.mount, full.to_bytes()) else { return Ok(None) };
        // If the cgroup was removed since it was opened, the link reads `... (deleted)`, which is not its path.
        if self.id_of(&path)? != Some(id) {
            return Ok(None);
        }
        let path: Arc<str> = path.into();
        let mut paths = self.paths.write().unwrap_or_else(PoisonError::into_inner);
        if paths.len() >= REMEMBERED {
            paths.clear();
        }
        paths.insert(id, path.clone());
        Ok(Some(path))
    }

    /// Was there such a cgroup, and is it gone?
    pub(crate) fn is_gone(&self, id: u64) -> io::Result<bool> {
        Ok(id != 0 && self.open(id)?.is_none())
    }

    /// Processes in exactly this cgroup.
    pub(crate) fn processes(&self, id: u64) -> io::Result<Vec<u32>> {
        let Some(directory) = self.open(id)? else { return Ok(Vec::new()) };
        let mut text = String::new();
        File::from(openat(&directory, "cgroup.procs", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
            .read_to_string(&mut text)?;
        Ok(text.lines().filter_map(|line| line.trim().parse().ok()).collect())
    }

    fn open(&self, id: u64) -> io::Result<Option<OwnedFd>> {
        match sys::open_cgroup_by_id(self.root.as_fd(), id) {
            Ok(directory) => Ok(Some(directory)),
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::STALE | Errno::NOENT) => Ok(None),
                _ => Err(error),
            },
        }
    }
}

/// The path below the mount, from the root of the hierarchy.
fn below(mount: &Path, full: &[u8]) -> Option<String> {
    let rest = match mount.as_os_str().as_bytes() {
        b"/" => full,
        mount => full.strip_prefix(mount)?,
    };
    let path = match rest {
        b"" => "/",
        rest => std::str::from_utf8(rest).ok()?,
    };
    path.starts_with('/').then(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_count_from_the_root_of_the_hierarchy() {
        let mount = Path::new("/sys/fs/cgroup");
        assert_eq!(below(mount, b"/sys/fs/cgroup/a/b"), Some("/a/b".into()));
        assert_eq!(below(mount, b"/sys/fs/cgroup"), Some("/".into()));
        assert_eq!(below(mount, b"/sys/fs/cgroup2/a"), None);
        assert_eq!(below(mount, b"/elsewhere"), None);
    }

    #[test]
    fn this_process_cgroup_is_found_both_ways() {
        let Ok(hierarchy) = Hierarchy::discover() else {
            eprintln!("skipped: no unified cgroup hierarchy is mounted here");
            return;
        };
        let own = super::super::process::Process::pin(std::process::id()).unwrap().unwrap();
        let path = own.cgroup().unwrap();
        let id = hierarchy.id_of(&path).unwrap().unwrap();
        assert_eq!(hierarchy.id_of("/no such cgroup").unwrap(), None);
        match hierarchy.path_of(id) {
            Ok(found) => assert_eq!(found.as_deref(), Some(path.as_str())),
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
                eprintln!("skipped: cgroups cannot be opened by id without root");
                return;
            }
        }
        assert!(hierarchy.processes(id).unwrap().contains(&std::process::id()));
        assert_eq!(hierarchy.path_of(u64::MAX - 5).unwrap(), None);
    }
}
