//! The tree of cgroups: what is there now, and what appears and goes.
//!
//! The kernel tells by inotify when a directory is made or removed. A directory can be there before its parent is watched,
//! and the kernel drops events when too many come, so a task in a cgroup that is not known makes the agent look again.
//!
//! *Invariant:* a cgroup is named by its path from the root of the hierarchy and by the id that the kernel programs see,
//! which is the inode number of its directory.

use super::{Error, error::During};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use std::{
    collections::HashMap,
    ffi::OsStr,
    fs,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{DirEntryExt, MetadataExt},
        },
    },
    path::{Path, PathBuf},
};

/// A cgroup of the unified hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cgroup {
    /// `/system.slice/nginx.service`.
    pub path: String,
    /// As `bpf_get_current_cgroup_id` tells it.
    pub id: u64,
}

impl Cgroup {
    /// Path of the cgroup above, if there is one.
    pub fn parent(&self) -> Option<&str> {
        match self.path.rsplit_once('/')? {
            ("", "") => None,
            ("", _) => Some("/"),
            (parent, _) => Some(parent),
        }
    }
}

/// The tree, watched.
#[derive(Debug)]
pub(super) struct Cgroups {
    mount: PathBuf,
    inotify: OwnedFd,
    watches: HashMap<i32, PathBuf>,
    known: HashMap<PathBuf, u64>,
}

/// What has changed since the last look.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// New ones.
    pub made: Vec<Cgroup>,
    /// Ids of those that are gone.
    pub removed: Vec<u64>,
}

impl Cgroups {
    /// Walks and watches the hierarchy that is mounted here.
    pub fn watch(mount: &Path) -> Result<Self, Error> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .during(|| "making an inotify descriptor".into())?;
        let mut cgroups = Self { mount: mount.into(), inotify, watches: HashMap::new(), known: HashMap::new() };
        cgroups.rescan();
        Ok(cgroups)
    }

    /// All that are known.
    pub fn all(&self) -> Vec<Cgroup> {
        self.known.iter().map(|(path, id)| self.cgroup(path, *id)).collect()
    }

    /// What the kernel has told since the last call.
    pub fn changes(&mut self) -> Result<Changes, Error> {
        let mut changes = Changes::default();
        let mut overflow = false;
        let mut made = Vec::new();
        let mut buffer = [MaybeUninit::uninit(); 8192];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(rustix::io::Errno::WOULDBLOCK) => break,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error).during(|| "reading changes of the cgroup tree".into()),
            };
            if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                overflow = true;
            } else if event.events().contains(ReadFlags::IGNORED) {
                self.watches.remove(&event.wd());
            } else if let (Some(parent), Some(name)) = (self.watches.get(&event.wd()), event.file_name()) {
                let path = parent.join(OsStr::from_bytes(name.to_bytes()));
                if event.events().contains(ReadFlags::CREATE) {
                    made.push(path);
                } else if event.events().contains(ReadFlags::DELETE)
                    && let Some(id) = self.known.remove(&path)
                {
                    changes.removed.push(id);
                }
            }
        }
        for path in made {
            self.learn(&path, &mut changes.made);
        }
        if overflow {
            changes.made.extend(self.rescan());
        }
        Ok(changes)
    }

    /// Walks the whole tree for what is not known yet.
    pub fn rescan(&mut self) -> Vec<Cgroup> {
        let mut made = Vec::new();
        let root = self.mount.clone();
        self.learn(&root, &mut made);
        made
    }

    /// Learns a directory and everything below it. What is gone by then is skipped.
    fn learn(&mut self, path: &Path, made: &mut Vec<Cgroup>) {
        let Ok(metadata) = fs::symlink_metadata(path) else { return };
        if !metadata.is_dir() {
            return;
        }
        if !self.known.contains_key(path) {
            // The watch comes before the listing: what is made in between is reported by inotify, or listed, or both.
            let flags = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::ONLYDIR;
            match inotify::add_watch(&self.inotify, path, flags) {
                Ok(watch) => {
                    self.watches.insert(watch, path.into());
                }
                Err(error) => {
                    tracing::warn!(
                        cgroup = %path.display(), %error,
                        "cannot watch a cgroup: raise fs.inotify.max_user_watches; new ones are found when they connect"
                    );
                }
            }
            self.known.insert(path.into(), metadata.ino());
            made.push(self.cgroup(path, metadata.ino()));
        }
        let Ok(entries) = fs::read_dir(path) else { return };
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                // A directory that was removed and made again has another id.
                let path = entry.path();
                if self.known.get(&path).is_some_and(|id| *id != entry.ino()) {
                    self.known.remove(&path);
                }
                self.learn(&path, made);
            }
        }
    }

    fn cgroup(&self, path: &Path, id: u64) -> Cgroup {
        let below = path.strip_prefix(&self.mount).unwrap_or(path);
        Cgroup { path: format!("/{}", below.display()), id }
    }
}

impl AsFd for Cgroups {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The same calls on a directory of an ordinary file system: no privilege needed.
    #[test]
    fn directories_are_known_when_they_appear_and_forgotten_when_they_go() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("a")).unwrap();
        let mut cgroups = Cgroups::watch(root.path()).unwrap();
        let mut paths: Vec<String> = cgroups.all().into_iter().map(|cgroup| cgroup.path).collect();
        paths.sort();
        assert_eq!(paths, ["/", "/a"]);

        fs::create_dir_all(root.path().join("a/b/c")).unwrap();
        let mut made: Vec<String> = cgroups.changes().unwrap().made.into_iter().map(|cgroup| cgroup.path).collect();
        made.sort();
        assert_eq!(made, ["/a/b", "/a/b/c"]);

        let id = fs::metadata(root.path().join("a/b/c")).unwrap().ino();
        fs::remove_dir(root.path().join("a/b/c")).unwrap();
        assert_eq!(cgroups.changes().unwrap(), Changes { made: Vec::new(), removed: vec![id] });
    }
}
