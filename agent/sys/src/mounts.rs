//! The table of mounts, and where the unified cgroup hierarchy is mounted on this host.
//!
//! *Invariant:* only a mount of the whole hierarchy counts, so that paths below it are the paths that policy names.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const CGROUP2_MAGIC: u64 = 0x6367_7270;
/// Inode number of the hierarchy's root. A mount that was made in a cgroup namespace begins further down, which only this
/// number shows: in that namespace its root is called `/` as well.
const ROOT_INODE: u64 = 1;
/// The table as this thread sees it, which may be in a mount namespace of its own.
pub const MOUNTINFO: &str = "/proc/thread-self/mountinfo";

/// Where the unified cgroup hierarchy is mounted, as this thread sees it; `None` where the whole hierarchy is mounted nowhere.
pub fn cgroup2() -> io::Result<Option<PathBuf>> {
    let mounts = of_type(&std::fs::read(MOUNTINFO)?, "cgroup2");
    // The last one was mounted last and is the one that a path reaches.
    Ok(mounts.into_iter().rev().map(|mount| mount.point).find(|point| device_of_whole_cgroup2(point).is_some()))
}

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Device number, which no other file system has at the same time.
    pub device: u64,
    /// What of it is mounted; `/` is the whole, unless the mount was made in a cgroup namespace.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
}

/// The device of the hierarchy whose root is at this path; `None` where it is another file system, or a part.
pub fn device_of_whole_cgroup2(point: &Path) -> Option<u64> {
    let system = rustix::fs::statfs(point).ok()?;
    let root = std::fs::metadata(point).ok()?;
    (system.f_type as u64 == CGROUP2_MAGIC && root.ino() == ROOT_INODE).then(|| root.dev())
}

/// The mounts of file systems of this type, parts of them as well, in the order of mounting. Fields are separated by spaces,
/// which the kernel writes as octal escapes inside of them; the optional fields end with a lone `-` (proc_pid_mountinfo(5)).
pub fn of_type(mountinfo: &[u8], kind: &str) -> Vec<Mount> {
    let mount = |line: &[u8]| {
        let mut fields = line.split(|byte| *byte == b' ');
        let (major, minor) = std::str::from_utf8(fields.nth(2)?).ok()?.split_once(':')?;
        let device = rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?);
        let [root, point] = [fields.next()?, fields.next()?].map(|path| OsString::from_vec(unescape(path)).into());
        let fits = fields.by_ref().any(|field| field == b"-") && fields.next() == Some(kind.as_bytes());
        fits.then_some(Mount { device, root, point })
    };
    mountinfo.split(|byte| *byte == b'\n').filter_map(mount).collect()
}

fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) => {
                plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => plain.push(*first),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_unified_hierarchy_is_found_wherever_it_is_mounted() {
        let text = b"32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:4 master:1 - cgroup2 cgroup2 rw\n\
            42 31 0:38 /part /a\\040b\\134c rw - cgroup2 none rw\n";
        let mount = |device, root: &str, point: &str| Mount { device, root: root.into(), point: point.into() };
        let expected = [mount(38, "/", "/sys/fs/cgroup/unified"), mount(38, "/part", "/a b\\c")];
        assert_eq!(of_type(text, "cgroup2"), expected);
        assert_eq!(of_type(text, "cgroup"), [mount(29, "/", "/sys/fs/cgroup/cpu")]);
    }

    #[test]
    fn a_file_system_that_only_says_cgroup2_is_not_taken() {
        for text in [
            "41 31 0:38 / /sys/fs/cgroup rw - tmpfs cgroup2 rw\n",
            "41 31 0:38 / /cgroup2 rw cgroup2 - ext4 - cgroup2\n",
            "41 31 0:38 / /x rw\n",
            "41 31 0.38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            "\n\n",
            "",
        ] {
            assert!(of_type(text.as_bytes(), "cgroup2").is_empty(), "{text:?}");
        }
        assert_eq!(device_of_whole_cgroup2(Path::new("/proc")), None);
    }

    #[test]
    fn a_part_of_the_hierarchy_is_not_taken_for_the_whole() {
        let Some(whole) = cgroup2().unwrap() else {
            eprintln!("skipped: no unified cgroup hierarchy is mounted here");
            return;
        };
        assert!(device_of_whole_cgroup2(&whole).is_some());
        let parts = std::fs::read_dir(&whole).unwrap().flatten().filter(|entry| entry.path().is_dir());
        assert!(parts.map(|part| part.path()).all(|part| device_of_whole_cgroup2(&part).is_none()));
    }

    proptest! {
        #[test]
        fn no_mountinfo_makes_the_parser_panic(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = of_type(&text, "cgroup2");
        }
    }
}
