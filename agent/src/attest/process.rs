//! A process, pinned: what the kernel says about it, and proof that it is the one that was meant.
//!
//! Two descriptors pin it. A directory of `/proc` stops answering when its process is gone, even if another process has the
//! number by then; a pidfd says whether that has happened. The parsers take the text as hostile: a process names itself as
//! it likes, with parentheses, spaces and newlines.
//!
//! *Invariant:* nothing is read through a path with a process number in it after the process has been pinned.

use rustix::{
    event::{PollFd, PollFlags, poll},
    fd::{AsFd, OwnedFd},
    fs::{AtFlags, Mode, OFlags, openat, readlinkat, statat},
    io::Errno,
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};
use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read},
    os::unix::{ffi::OsStringExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

/// One clock tick of `/proc/PID/stat` in nanoseconds. `USER_HZ` is 100 on every architecture that the kernel programs are
/// built for (include/uapi/asm-generic/param.h).
const TICK: u64 = 10_000_000;

/// Nothing that is read whole from `/proc/PID` is longer.
const TEXT_LIMIT: u64 = 64 * 1024;

/// A pinned process.
#[derive(Debug)]
pub(crate) struct Process {
    pid: u32,
    pidfd: OwnedFd,
    directory: OwnedFd,
    start: StartTime,
}

/// When a process started, in clock ticks since the boot. An exec does not change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct StartTime(u64);

/// User and group ids in the initial user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ids {
    pub(crate) real_uid: u32,
    pub(crate) effective_uid: u32,
    pub(crate) real_gid: u32,
    pub(crate) effective_gid: u32,
}

/// The executable of a process, opened.
#[derive(Debug)]
pub(crate) struct Executable {
    pub(crate) file: File,
    /// As the kernel tells it.
    pub(crate) path: PathBuf,
    /// On this host, the same path leads to this very file.
    pub(crate) is_at_path: bool,
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

impl Process {
    /// Pins a process by its number. `None`: there is none.
    pub(crate) fn pin(pid: u32) -> io::Result<Option<Self>> {
        let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let opened = (|| {
            let pidfd = pidfd_open(number, PidfdFlags::empty())?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = rustix::fs::open(format!("/proc/{pid}"), flags, Mode::empty())?;
            Ok::<_, Errno>((pidfd, directory))
        })();
        let (pidfd, directory) = match opened {
            Ok(opened) => opened,
            // EINVAL: the number is that of a thread, which no kernel program records.
            Err(Errno::SRCH | Errno::NOENT | Errno::INVAL) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut process = Self { pid, pidfd, directory, start: StartTime(0) };
        match process.read_start() {
            Ok(start) => process.start = start,
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
        // Alive after the directory was opened: so the number was its own all the time, and both descriptors are of the
        // same process.
        Ok(process.is_alive()?.then_some(process))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn start(&self) -> StartTime {
        self.start
    }

    /// Is it still there? A pidfd becomes readable when the last thread has exited.
    pub(crate) fn is_alive(&self) -> io::Result<bool> {
        let mut wait = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let ready = poll(&mut wait, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        Ok(ready == 0)
    }

    /// Is it still there, and the same?
    pub(crate) fn is_same(&self) -> io::Result<bool> {
        let start = match self.read_start() {
            Err(error) if is_gone(&error) => return Ok(false),
            start => start?,
        };
        Ok(start == self.start && self.is_alive()?)
    }

    pub(crate) fn ids(&self) -> io::Result<Ids> {
        parse_ids(&self.read("status")?).ok_or_else(|| unexpected("status"))
    }

    /// Path of its cgroup on the unified hierarchy.
    pub(crate) fn cgroup(&self) -> io::Result<String> {
        let text = self.read("cgroup")?;
        let unreadable = || match std::str::from_utf8(&text) {
            Ok(_) => unexpected("cgroup"),
            Err(_) => io::Error::new(
                io::ErrorKind::InvalidData,
                "its cgroup has a name that is no text, as none that a policy names",
            ),
        };
        parse_cgroup(&text).map(str::to_owned).ok_or_else(unreadable)
    }

    /// Its executable. `None` for a process without one, or one that may not be read.
    pub(crate) fn executable(&self) -> io::Result<Option<Executable>> {
        let opened = openat(&self.directory, "exe", OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty());
        let file = match opened {
            Ok(file) => File::from(file),
            Err(Errno::NOENT | Errno::ACCESS | Errno::PERM) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let metadata = file.metadata()?;
        let path = OsString::from_vec(readlinkat(&self.directory, "exe", Vec::new())?.into_bytes());
        let (device, inode) = (metadata.dev(), metadata.ino());
        let path = PathBuf::from(path);
        // A deleted file has no path, and one in another mount namespace has a path that means another file here: in both
        // cases the path is not this file for the host, and so it proves nothing.
        let is_at_path = metadata.nlink() > 0 && names(&path, device, inode);
        Ok(Some(Executable { file, path, is_at_path, device, inode }))
    }

    /// Does it have a socket with this cookie open?
    pub(crate) fn holds_socket(&self, cookie: u64) -> io::Result<bool> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(&self.directory, "fd", flags, Mode::empty())?;
        for entry in rustix::fs::Dir::read_from(&directory)? {
            let entry = entry?;
            let Some(number) = entry.file_name().to_str().ok().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            // A descriptor that is closed meanwhile is not the one that is looked for.
            let Ok(target) = readlinkat(&directory, entry.file_name(), Vec::new()) else { continue };
            if !target.to_bytes().starts_with(b"socket:[") {
                continue;
            }
            let Ok(socket) = pidfd_getfd(self.pidfd.as_fd(), number, PidfdGetfdFlags::empty()) else { continue };
            if rustix::net::sockopt::socket_cookie(&socket).is_ok_and(|found| found == cookie) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn read_start(&self) -> io::Result<StartTime> {
        parse_start(&self.read("stat")?).ok_or_else(|| unexpected("stat"))
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let file = File::from(openat(&self.directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?);
        let mut bytes = Vec::with_capacity(2048);
        file.take(TEXT_LIMIT).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

impl StartTime {
    /// Did it start after this moment of `CLOCK_BOOTTIME`, in nanoseconds? The start is rounded down to whole ticks, so a
    /// process that began in the same tick passes. That is safe: numbers are given out in turn, so one cannot be used again
    /// within a hundredth of a second.
    pub(crate) fn is_after(self, boottime: u64) -> bool {
        self.0.saturating_mul(TICK) > boottime
    }
}

impl Ids {
    pub(crate) fn uid(self) -> Option<u32> {
        (self.real_uid == self.effective_uid).then_some(self.real_uid)
    }
    pub(crate) fn gid(self) -> Option<u32> {
        (self.real_gid == self.effective_gid).then_some(self.real_gid)
    }
}

/// The errors by which `/proc` says that a process is gone.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::SRCH | Errno::NOENT))
}

/// Field 22 of `/proc/PID/stat`. The name of the task is in parentheses and may hold any byte but NUL, so the fields are
/// counted from the last closing parenthesis: nothing after the name holds one.
fn parse_start(stat: &[u8]) -> Option<StartTime> {
    let close = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(stat.get(close + 1..)?).ok()?;
    // The state is field 3, so the start time is the twentieth of the rest.
    rest.split_ascii_whitespace().nth(19)?.parse().ok().map(StartTime)
}

/// `Uid:` and `Gid:` of `/proc/PID/status`: real, effective, saved and file system id. The kernel escapes newlines in the
/// name, which comes first; should there be a second line with the same label all the same, the text is refused.
fn parse_ids(status: &[u8]) -> Option<Ids> {
    let line = |label: &[u8]| -> Option<(u32, u32)> {
        let mut lines = status.split(|byte| *byte == b'\n').filter_map(|line| line.strip_prefix(label));
        let (line, None) = (lines.next()?, lines.next()) else { return None };
        let mut numbers = std::str::from_utf8(line).ok()?.split_ascii_whitespace().map(str::parse);
        let (real, effective) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        (numbers.count() == 2).then_some((real, effective))
    };
    let ((real_uid, effective_uid), (real_gid, effective_gid)) = (line(b"Uid:")?, line(b"Gid:")?);
    Some(Ids { real_uid, effective_uid, real_gid, effective_gid })
}

/// The path in the line `0::` of `/proc/PID/cgroup`. cgroup names hold no newline: `cgroup_mkdir` refuses one for the
/// sake of this file. Hierarchies of version 1 have other numbers.
fn parse_cgroup(text: &[u8]) -> Option<&str> {
    let mut lines = text.split(|byte| *byte == b'\n').filter_map(|line| line.strip_prefix(b"0::"));
    let (path, None) = (lines.next()?, lines.next()) else { return None };
    let path = std::str::from_utf8(path).ok()?;
    // Outside the agent's own cgroup namespace: no path of this hierarchy.
    (path.starts_with('/') && !path.split('/').any(|part| part == "..")).then_some(path)
}

fn names(path: &Path, device: u64, inode: u64) -> bool {
    path.is_absolute()
        && statat(rustix::fs::CWD, path, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|found| (found.st_dev, found.st_ino) == (device, inode))
}

fn unexpected(file: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("/proc/PID/{file} does not read as this kernel documents it"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stat(comm: &str) -> Vec<u8> {
        format!(
            "1234 ({comm}) S 1 1234 1234 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 1 0 987654 1000000 200 18446744073709551615 \
             1 1 0 0 0 0 0 0 0 0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
        )
        .into_bytes()
    }

    #[test]
    fn the_start_time_is_found_whatever_a_process_calls_itself() {
        for comm in ["nginx", "", ") S 1 2 3", "a) R (b", "((((", "))))", "x\ny) S 0", "tab\t) Z", " ) ( "] {
            assert_eq!(parse_start(&stat(comm)), Some(StartTime(987_654)), "{comm:?}");
        }
        let mut bytes = stat("name");
        bytes[7] = 0xff;
        assert_eq!(parse_start(&bytes), Some(StartTime(987_654)), "not UTF-8");
    }

    #[test]
    fn a_stat_that_is_cut_or_garbage_has_no_start_time() {
        for text in ["", "1234 (x", ")", "1234 (x) S 1 2 3", "1 (x) S a b c d e f g h i j k l m n o p q r s t u"] {
            assert_eq!(parse_start(text.as_bytes()), None, "{text:?}");
        }
    }

    #[test]
    fn ids_are_read_from_their_own_lines_only() {
        let good = b"Name:\tx\\nUid:\t0\t0\t0\t0\nState:\tS\nUid:\t1000\t0\t1000\t1000\nGid:\t100\t100\t100\t100\n";
        let ids = parse_ids(good).unwrap();
        assert_eq!(ids, Ids { real_uid: 1000, effective_uid: 0, real_gid: 100, effective_gid: 100 });
        assert_eq!((ids.uid(), ids.gid()), (None, Some(100)));
    }

    #[test]
    fn a_status_with_two_uid_lines_or_too_few_numbers_is_refused() {
        for text in [
            "Uid:\t0\t0\t0\t0\nUid:\t1\t1\t1\t1\nGid:\t1\t1\t1\t1\n",
            "Uid:\t0\t0\t0\nGid:\t1\t1\t1\t1\n",
            "Uid:\t0\t0\t0\t0\t0\nGid:\t1\t1\t1\t1\n",
            "Uid:\t-1\t0\t0\t0\nGid:\t1\t1\t1\t1\n",
            "Uid:\t0\t0\t0\t0\n",
            "",
        ] {
            assert_eq!(parse_ids(text.as_bytes()), None, "{text:?}");
        }
    }

    #[test]
    fn the_cgroup_is_that_of_the_unified_hierarchy() {
        let hybrid = b"5:name=systemd:/a\n1:cpu:/b\n0::/system.slice/nginx.service\n";
        assert_eq!(parse_cgroup(hybrid), Some("/system.slice/nginx.service"));
        assert_eq!(parse_cgroup(b"0::/\n"), Some("/"));
        assert_eq!(parse_cgroup(b"0::/odd:name 0::/x\n"), Some("/odd:name 0::/x"));
    }

    #[test]
    fn a_cgroup_outside_the_namespace_or_none_or_two_is_refused() {
        for text in ["0::/../other\n", "0::relative\n", "1:cpu:/b\n", "", "0::/a\n0::/b\n"] {
            assert_eq!(parse_cgroup(text.as_bytes()), None, "{text:?}");
        }
        assert_eq!(parse_cgroup(b"0::/\xff\n"), None);
    }

    #[test]
    fn a_start_is_after_a_moment_only_where_it_cannot_have_been_before() {
        assert!(!StartTime(100).is_after(1_000_000_000));
        assert!(!StartTime(100).is_after(1_005_000_000));
        assert!(StartTime(101).is_after(1_005_000_000));
        assert!(StartTime(u64::MAX).is_after(u64::MAX - 1));
    }

    #[test]
    fn this_process_can_be_pinned_and_knows_itself() {
        let own = Process::pin(std::process::id()).unwrap().unwrap();
        assert!(own.is_same().unwrap());
        assert_eq!(own.ids().unwrap().real_uid, rustix::process::getuid().as_raw());
        let executable = own.executable().unwrap().unwrap();
        assert!(executable.is_at_path);
        assert_eq!(executable.path, std::env::current_exe().unwrap());
    }

    #[test]
    fn a_pinned_process_that_ends_is_no_longer_the_same() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pinned = Process::pin(child.id()).unwrap().unwrap();
        assert!(pinned.is_same().unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!pinned.is_same().unwrap());
        assert!(pinned.ids().is_err());
        assert!(Process::pin(child.id()).unwrap().is_none());
    }

    #[test]
    fn an_executable_that_was_deleted_or_replaced_has_no_path() {
        let dir = tempfile::tempdir().unwrap();
        let copy = dir.path().join("sleep");
        let source = ["/usr/bin/sleep", "/bin/sleep"].into_iter().find(|path| Path::new(path).exists()).unwrap();
        std::fs::copy(source, &copy).unwrap();
        let mut child = std::process::Command::new(&copy).arg("60").spawn().unwrap();
        let process = Process::pin(child.id()).unwrap().unwrap();
        assert!(process.executable().unwrap().unwrap().is_at_path);
        // Replaced: another file of that name.
        std::fs::remove_file(&copy).unwrap();
        assert!(!process.executable().unwrap().unwrap().is_at_path);
        std::fs::copy(source, &copy).unwrap();
        assert!(!process.executable().unwrap().unwrap().is_at_path);
        // A file whose name is what the kernel now says does not help either.
        std::fs::copy(source, dir.path().join("sleep (deleted)")).unwrap();
        assert!(!process.executable().unwrap().unwrap().is_at_path);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_process_that_holds_a_socket_is_known_by_the_sockets_cookie() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let cookie = rustix::net::sockopt::socket_cookie(&listener).unwrap();
        let own = Process::pin(std::process::id()).unwrap().unwrap();
        assert!(own.holds_socket(cookie).unwrap());
        assert!(!own.holds_socket(u64::MAX).unwrap());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parsers_panic(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = (parse_start(&text), parse_ids(&text), parse_cgroup(&text));
        }

        #[test]
        fn no_name_changes_the_start_time(comm in "[^\0]{0,15}") {
            prop_assert_eq!(parse_start(&stat(&comm)), Some(StartTime(987_654)));
        }
    }
}
