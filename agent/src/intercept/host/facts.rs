//! Does the agent see the host itself, or only a part of it, as in a container? Facts are gathered first, and judged
//! without looking again.
//!
//! Programs that are attached to a part of the cgroup tree cover that part alone, and what is pinned in a file system of a
//! private mount namespace is gone with that namespace: in either case the host would seem to be protected and would not
//! be. So the agent's view is compared with that of process 1.
//!
//! *Invariant:* what could not be looked at counts as not the host's.

use super::super::error::{During, Error};
use bunter_sys::mounts;
use rustix::{
    fs::{AtFlags, FileType, Mode, stat, statat},
    io::Errno,
};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Where the BPF file system is, on every host.
pub(super) const BPFFS: &str = "/sys/fs/bpf";
/// What process 1 has mounted. Neither its namespaces nor its root directory are looked at: a security module may keep those
/// even from root, and a mount with the same device number is the same file system.
const ONE: &str = "/proc/1/mountinfo";
/// Inode numbers of the namespaces that the kernel boots with (`PID_NS_INIT_INO`, `CGROUP_NS_INIT_INO` in linux/nsfs.h). In
/// the initial process namespace, process 1 is the host's.
const FIRST_PROCESSES: u64 = 0xefff_fffc;
const FIRST_CGROUPS: u64 = 0xefff_fffb;

/// What the agent sees.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Own {
    /// Its cgroup namespace.
    cgroups: u64,
    /// Its process namespace.
    processes: u64,
    /// The last mount of cgroup2, and its device where that is the whole hierarchy.
    cgroup2: Option<(PathBuf, Option<u64>)>,
    /// Device of the BPF file system, where all of it is mounted.
    bpffs: Option<u64>,
}

/// What process 1 sees.
#[derive(Clone, Debug, PartialEq, Eq)]
struct One {
    /// Device of the unified hierarchy, if it has it mounted.
    cgroup2: Option<u64>,
    /// Device of the BPF file system.
    bpffs: Option<u64>,
}

/// What could not be looked at, and why.
type Unseen = (PathBuf, Errno);

/// What a step on the way to the pins is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The root of the file system, which others may use as well.
    Root,
    /// A directory that the agent makes.
    Directory,
    /// A pinned map, program or link.
    Pin,
}

/// A step on the way down to the pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub place: Place,
    pub path: PathBuf,
    owner: u32,
    pub mode: u32,
    directory: bool,
}

/// All that was found.
#[derive(Debug)]
pub(super) struct Facts {
    own: Own,
    one: Result<One, Unseen>,
    /// From the root of the BPF file system down.
    way: Result<Vec<Step>, Unseen>,
}

impl Facts {
    /// Looks around.
    pub fn gather(pins: &Path) -> Result<Self, Error> {
        Ok(Self { own: Own::see().map_err(unseen)?, one: One::see(), way: way(Path::new(BPFFS), pins) })
    }

    fn one(&self) -> Result<&One, Error> {
        self.one.as_ref().map_err(|(path, error)| Error::NoProcessOne { path: path.clone(), error: (*error).into() })
    }

    /// Are process ids here those that the kernel programs record?
    pub fn processes(&self) -> Result<(), Error> {
        if self.own.processes == FIRST_PROCESSES { Ok(()) } else { Err(Error::PidNamespace) }
    }

    /// Are paths of cgroups here the host's? In a cgroup namespace of its own they are not, even where the whole hierarchy
    /// is mounted: `/proc/PID/cgroup` counts from the namespace's root.
    pub fn cgroups(&self) -> Result<(), Error> {
        if self.own.cgroups == FIRST_CGROUPS { Ok(()) } else { Err(Error::CgroupNamespace) }
    }

    /// Where is the hierarchy mounted, as a whole?
    pub fn cgroup2(&self) -> Result<PathBuf, Error> {
        let (path, device) = self.own.cgroup2.clone().ok_or(Error::NoCgroup2)?;
        // Process 1 may have none mounted: a mount that has the hierarchy's root is the host's nevertheless.
        let hosts = self.one()?.cgroup2;
        if device.is_some() && hosts.is_none_or(|hosts| Some(hosts) == device) {
            Ok(path)
        } else {
            Err(Error::PartOfCgroup2 { path })
        }
    }

    /// Does what is pinned here outlive this mount namespace?
    pub fn bpffs(&self) -> Result<(), Error> {
        let path = || BPFFS.into();
        match (self.one()?.bpffs, self.own.bpffs) {
            (None, _) => Err(Error::NoBpfFs { path: path() }),
            (Some(hosts), own) if own != Some(hosts) => Err(Error::OtherBpfFs { path: path() }),
            _ => Ok(()),
        }
    }

    /// Can nobody but root put anything between the agent and its pins? Modes that are too open below the root are narrowed
    /// at the start and are no reason to refuse.
    pub fn openness(&self) -> Result<(), Error> {
        judge(self.way.as_deref().map_err(|found| unseen(found.clone()))?)
    }

    /// What the next start narrows.
    pub fn too_open(&self) -> impl Iterator<Item = &Step> {
        self.way.iter().flatten().filter(|step| step.too_open())
    }

    /// Judges all of it, and gives the first reason not to start.
    pub fn judge(&self) -> Result<PathBuf, Error> {
        self.processes()?;
        self.cgroups()?;
        let cgroup2 = self.cgroup2()?;
        self.bpffs()?;
        self.openness()?;
        Ok(cgroup2)
    }
}

impl Own {
    fn see() -> Result<Self, Unseen> {
        let namespace = |name: &str| {
            let path = PathBuf::from(format!("/proc/thread-self/ns/{name}"));
            stat(&path).map(|found| found.st_ino).map_err(|error| (path, error))
        };
        let mountinfo = read(mounts::MOUNTINFO)?;
        let mounts = mounts::of_type(&mountinfo, "cgroup2");
        let whole = |mount: &mounts::Mount| mounts::device_of_whole_cgroup2(&mount.point);
        let found = mounts.iter().rev().find(|mount| whole(mount).is_some()).or(mounts.last());
        // Another file system may be mounted over it.
        let reached = stat(BPFFS).ok().map(|found| found.st_dev);
        Ok(Self {
            cgroups: namespace("cgroup")?,
            processes: namespace("pid")?,
            cgroup2: found.map(|mount| (mount.point.clone(), whole(mount))),
            bpffs: bpffs(&mountinfo).filter(|device| Some(*device) == reached),
        })
    }
}

impl One {
    fn see() -> Result<Self, Unseen> {
        let mountinfo = read(ONE)?;
        let whole = |mount: &&mounts::Mount| mount.root == Path::new("/");
        let cgroup2 = mounts::of_type(&mountinfo, "cgroup2").iter().rfind(whole).map(|mount| mount.device);
        Ok(Self { cgroup2, bpffs: bpffs(&mountinfo) })
    }
}

/// The device of the BPF file system that is mounted where it belongs, as a whole.
fn bpffs(mountinfo: &[u8]) -> Option<u64> {
    let mounts = mounts::of_type(mountinfo, "bpf");
    let last = mounts.iter().rfind(|mount| mount.point == Path::new(BPFFS))?;
    (last.root == Path::new("/")).then_some(last.device)
}

impl Step {
    /// `None` where there is nothing.
    fn at(place: Place, path: &Path) -> Result<Option<Self>, Unseen> {
        match statat(rustix::fs::CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => Ok(Some(Self {
                place,
                path: path.into(),
                owner: found.st_uid,
                mode: found.st_mode & 0o7777,
                directory: FileType::from_raw_mode(found.st_mode) == FileType::Directory,
            })),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err((path.into(), error)),
        }
    }

    /// Do others have any permission on what is the agent's alone?
    fn too_open(&self) -> bool {
        self.place != Place::Root && self.mode & 0o077 != 0
    }

    fn judge(&self) -> Result<(), Error> {
        let path = self.path.clone();
        if self.owner != 0 {
            let advice = match self.place {
                Place::Root => format!("run `chown root {}`", path.display()),
                _ => format!("remove it (`rm -r {}`); the agent makes its own", path.display()),
            };
            return Err(Error::NotRoots { path, owner: self.owner, advice });
        }
        if self.place != Place::Pin && !self.directory {
            return Err(Error::NoDirectory { path });
        }
        // In a sticky directory only root can move what is root's, and the directory below it is for root alone.
        if self.place == Place::Root && self.mode & 0o022 != 0 && self.mode & 0o1000 == 0 {
            return Err(Error::OpenBpfFs { path, mode: self.mode });
        }
        Ok(())
    }
}

/// Can nobody but root put anything in the way?
pub(super) fn judge(way: &[Step]) -> Result<(), Error> {
    way.iter().try_for_each(Step::judge)
}

/// Takes the permissions of others from the pins and their directories, from the outside inwards: behind a directory that
/// only root can enter, what has been looked at stays as it is. It is an error if anything is not root's, or cannot be
/// narrowed.
pub(super) fn narrow(bpffs: &Path, pins: &Path) -> Result<(), Error> {
    // A step is looked at again after the one above was closed, because until then somebody could have changed it.
    let mut closed: Option<PathBuf> = None;
    loop {
        let way = way(bpffs, pins).map_err(unseen)?;
        judge(&way)?;
        let Some(open) = way.iter().find(|step| step.too_open()) else { return Ok(()) };
        let closing = || format!("closing {} to others", open.path.display());
        if closed.as_ref() == Some(&open.path) {
            return Err(Errno::NOTSUP).during(closing);
        }
        rustix::fs::chmod(&open.path, Mode::from_raw_mode(open.mode & 0o700)).during(closing)?;
        closed = Some(open.path.clone());
    }
}

/// The root, each directory below it down to the pins, and the pins.
pub(super) fn way(bpffs: &Path, pins: &Path) -> Result<Vec<Step>, Unseen> {
    let mut way = Vec::new();
    let mut directories: Vec<&Path> = pins.ancestors().take_while(|path| path.starts_with(bpffs)).collect();
    directories.reverse();
    for path in directories {
        let place = if path == bpffs { Place::Root } else { Place::Directory };
        let Some(step) = Step::at(place, path)? else { return Ok(way) };
        let directory = step.directory;
        way.push(step);
        if !directory {
            return Ok(way);
        }
    }
    let unread = |error: io::Error| (pins.to_path_buf(), errno(&error));
    for entry in fs::read_dir(pins).map_err(unread)? {
        way.extend(Step::at(Place::Pin, &entry.map_err(unread)?.path())?);
    }
    Ok(way)
}

fn read(path: &str) -> Result<Vec<u8>, Unseen> {
    fs::read(path).map_err(|error| (path.into(), errno(&error)))
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

fn unseen((path, error): Unseen) -> Error {
    Error::Host { what: format!("looking at {}", path.display()), error: error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bunter_identity::refusal::Refusal;
    use rustix::fs::{Gid, Uid, chown};

    fn step(place: Place, owner: u32, mode: u32) -> Step {
        Step { place, path: "/sys/fs/bpf/x".into(), owner, mode, directory: place != Place::Pin }
    }

    /// A host as it should be.
    fn host() -> Facts {
        let own = Own {
            cgroups: FIRST_CGROUPS,
            processes: FIRST_PROCESSES,
            cgroup2: Some(("/sys/fs/cgroup".into(), Some(38))),
            bpffs: Some(39),
        };
        let way = vec![step(Place::Root, 0, 0o1700), step(Place::Directory, 0, 0o700), step(Place::Pin, 0, 0o600)];
        Facts { own, one: Ok(One { cgroup2: Some(38), bpffs: Some(39) }), way: Ok(way) }
    }

    /// The code of what is said when one thing is otherwise.
    fn said(change: impl FnOnce(&mut Facts)) -> &'static str {
        let mut facts = host();
        change(&mut facts);
        facts.judge().map_or_else(|error| error.code(), |_| "starts")
    }

    fn one(cgroup2: Option<u64>, bpffs: Option<u64>) -> Result<One, Unseen> {
        Ok(One { cgroup2, bpffs })
    }

    #[test]
    fn a_host_that_is_process_1s_is_taken_and_any_other_is_refused_by_name() {
        assert_eq!(host().judge().unwrap(), Path::new("/sys/fs/cgroup"));
        // A container with the host's namespaces and mounts, wherever those are.
        assert_eq!(said(|facts| facts.own.cgroup2 = Some(("/host/cgroup".into(), Some(38)))), "starts");
        assert_eq!(said(|facts| facts.one = one(None, Some(39))), "starts");

        assert_eq!(said(|facts| facts.own.processes += 1), "pid-namespace");
        assert_eq!(said(|facts| facts.own.cgroups += 1), "cgroup-namespace");
        assert_eq!(said(|facts| facts.one = Err((ONE.into(), Errno::ACCESS))), "no-process-1");
        assert_eq!(said(|facts| facts.own.cgroup2 = None), "no-cgroup2");
        assert_eq!(said(|facts| facts.own.cgroup2 = Some(("/part".into(), None))), "part-of-cgroup2");
        assert_eq!(said(|facts| facts.own.cgroup2 = Some(("/other".into(), Some(40)))), "part-of-cgroup2");
        assert_eq!(said(|facts| facts.one = one(Some(38), None)), "no-bpffs");
        assert_eq!(said(|facts| (facts.one, facts.own.bpffs) = (one(Some(38), None), None)), "no-bpffs");
        assert_eq!(said(|facts| facts.own.bpffs = None), "other-bpffs");
        assert_eq!(said(|facts| facts.own.bpffs = Some(40)), "other-bpffs");
        assert_eq!(said(|facts| facts.way = Err((BPFFS.into(), Errno::ACCESS))), "host-call");
    }

    #[test]
    fn what_others_own_or_can_write_to_is_refused_and_what_is_only_too_open_is_not() {
        let way =
            |place, owner, mode| judge(&[step(place, owner, mode)]).map_or_else(|error| error.code(), |()| "starts");
        assert_eq!(way(Place::Root, 0, 0o755), "starts");
        assert_eq!(way(Place::Root, 0, 0o1777), "starts");
        for mode in [0o777, 0o770, 0o720, 0o702] {
            assert_eq!(way(Place::Root, 0, mode), "open-bpffs", "{mode:o}");
        }
        for place in [Place::Root, Place::Directory, Place::Pin] {
            assert_eq!(way(place, 3000, 0o700), "pins-not-roots", "{place:?}");
        }
        assert_eq!(way(Place::Directory, 0, 0o777), "starts");
        assert!(step(Place::Directory, 0, 0o755).too_open() && step(Place::Pin, 0, 0o644).too_open());
        assert!(!step(Place::Root, 0, 0o1777).too_open() && !step(Place::Pin, 0, 0o600).too_open());
        let file = Step { directory: false, ..step(Place::Directory, 0, 0o600) };
        assert_eq!(judge(&[file]).unwrap_err().code(), "pins-no-directory");
    }

    #[test]
    fn the_bpf_file_system_is_the_last_and_whole_one_where_it_belongs() {
        let line = |device: &str, root: &str, point: &str, kind: &str| {
            format!("1 2 {device} {root} {point} rw - {kind} x rw\n")
        };
        let found = |lines: &[String]| bpffs(lines.concat().as_bytes());
        let hosts = line("0:39", "/", BPFFS, "bpf");
        assert_eq!(found(&[hosts.clone(), line("0:40", "/", "/elsewhere", "bpf")]), Some(39));
        assert_eq!(found(&[hosts.clone(), line("0:40", "/", BPFFS, "bpf")]), Some(40));
        assert_eq!(found(&[hosts, line("0:39", "/part", BPFFS, "bpf")]), None);
        assert_eq!(found(&[line("0:41", "/", BPFFS, "tmpfs")]), None);
    }

    #[test]
    fn what_is_roots_is_closed_to_others_and_what_is_not_stops_it() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let (root, pins) = (folder.path(), folder.path().join("bunter/abi"));
        let mode = |path: &Path, mode| rustix::fs::chmod(path, Mode::from_raw_mode(mode)).unwrap();
        let owner = |path: &Path, user| chown(path, Some(Uid::from_raw(user)), None::<Gid>).unwrap();
        let modes = || way(root, &pins).unwrap().iter().map(|step| step.mode).collect::<Vec<_>>();
        mode(root, 0o1777);
        narrow(root, &pins).unwrap();

        fs::create_dir_all(&pins).unwrap();
        fs::write(pins.join("OWN"), "").unwrap();
        mode(&root.join("bunter"), 0o777);
        mode(&pins, 0o755);
        mode(&pins.join("OWN"), 0o666);
        narrow(root, &pins).unwrap();
        assert_eq!(modes(), [0o1777, 0o700, 0o700, 0o600]);

        for planted in [pins.join("OWN"), pins.clone(), root.join("bunter")] {
            owner(&planted, 3000);
            let error = narrow(root, &pins).unwrap_err();
            assert!(matches!(&error, Error::NotRoots { path, owner: 3000, .. } if *path == planted), "{error}");
            owner(&planted, 0);
        }
        mode(root, 0o777);
        assert_eq!(narrow(root, &pins).unwrap_err().code(), "open-bpffs");
        mode(root, 0o1777);
        fs::rename(root.join("bunter"), root.join("else")).unwrap();
        std::os::unix::fs::symlink(root.join("else"), root.join("bunter")).unwrap();
        assert_eq!(narrow(root, &pins).unwrap_err().code(), "pins-no-directory");
    }
}
