//! Every system call that std, rustix and tokio lack. The agent itself forbids `unsafe`; this crate contains all of it.
//!
//! Functions take `BorrowedFd` and give `OwnedFd` or plain values; each `unsafe` block says why it is sound (SAFETY) and
//! why it is there at all (JUSTIFICATION).
#![allow(unsafe_code)]

use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::cmp::Ordering;
use std::io;

/// Opens a cgroup's directory (`O_PATH`) by the cgroup's id. `mount` is any descriptor on the mount of the unified
/// hierarchy. `ESTALE` where there is no such cgroup any more.
pub fn open_cgroup_by_id(mount: BorrowedFd<'_>, id: u64) -> io::Result<OwnedFd> {
    /// `struct file_handle` with the eight bytes that kernfs puts into one (fs/kernfs/mount.c, `kernfs_encode_fh`).
    #[repr(C)]
    struct Handle {
        bytes: libc::c_uint,
        kind: libc::c_int,
        id: [u8; 8],
    }
    /// `FILEID_KERNFS` in include/linux/exportfs.h.
    const FILEID_KERNFS: libc::c_int = 0xfe;
    let mut handle = Handle { bytes: 8, kind: FILEID_KERNFS, id: id.to_ne_bytes() };
    let flags = libc::O_PATH | libc::O_CLOEXEC | libc::O_DIRECTORY;
    // SAFETY: `handle` has the layout of `struct file_handle` (two 32-bit integers and `bytes` bytes) and outlives the
    // call, which only reads it; `mount` is open for as long as it is borrowed. JUSTIFICATION: rustix has no
    // open_by_handle_at, and walking the hierarchy for an inode number takes time that grows with it.
    let fd = unsafe { libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), &raw mut handle, flags) };
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call just returned this descriptor, so nobody else owns it. JUSTIFICATION: a raw system call gives no
    // owned descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Do two threads have one table of descriptors? If not: which comes first, in an order that is the kernel's own and stays
/// the same while both run. Threads by their numbers in the pid namespace of this process.
pub fn compare_descriptors(one: u32, other: u32) -> io::Result<Ordering> {
    // SAFETY: this call reads and writes no memory of this process. JUSTIFICATION: no crate offers it.
    match unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_FILES, 0, 0) } {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2.. => Ok(Ordering::Greater),
        _ => Err(io::Error::last_os_error()),
    }
}

/// From include/uapi/linux/kcmp.h: are the tables of descriptors the same?
pub const KCMP_FILES: libc::c_int = 2;

/// Gives the pages of this program's own code and constants back to the page cache, and says how many bytes they span.
/// Pages that are needed again are mapped again at the next access. A start runs through several megabytes that an agent
/// never needs later.
pub fn forget_code() -> io::Result<usize> {
    let program = std::fs::read_link("/proc/self/exe")?;
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let mut forgotten = 0;
    for (start, end) in maps.lines().filter_map(|line| code(line, &program)) {
        // SAFETY: a private mapping of a file, which was never writable (`code`), has no page of its own: the kernel maps the
        // same bytes of the file again at the next access, and refuses writes to a file that runs (ETXTBSY).
        // JUSTIFICATION: std and rustix have no safe madvise.
        let done = unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        forgotten += end - start;
    }
    Ok(forgotten)
}

/// The range of a line of /proc/PID/maps that maps this program's code, or the constants in front of it. Not the constants
/// that the loader has written addresses into (RELRO): they are read-only as well, but lie behind the code.
fn code(line: &str, program: &std::path::Path) -> Option<(usize, usize)> {
    let mut words = line.split_ascii_whitespace();
    let (range, rights, offset) = (words.next()?, words.next()?, words.next()?);
    let path = words.nth(2)?;
    let is_code = rights == "r-xp" || (rights == "r--p" && u64::from_str_radix(offset, 16).ok()? == 0);
    if !is_code || std::path::Path::new(path) != program {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    (start < end).then_some((start, end))
}

pub mod tls;
pub mod crypto_info;

pub mod mounts;

// intercept: maps of the kernel programs, and two socket options.

pub mod bpf;

/// Cookie of the network namespace that a socket is in (`SO_NETNS_COOKIE`, Linux 5.14).
pub fn netns_cookie(socket: std::os::fd::BorrowedFd<'_>) -> std::io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the buffer is as long as `length` says and lives through the call. JUSTIFICATION: rustix lacks this option.
    let result = unsafe {
        libc::getsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(cookie) }
}

/// Lets a socket that is bound to an address choose its port when it connects, so that ports are shared between
/// destinations (`IP_BIND_ADDRESS_NO_PORT`).
pub fn choose_port_late(socket: std::os::fd::BorrowedFd<'_>) -> std::io::Result<()> {
    let yes: libc::c_int = 1;
    // SAFETY: the value is a C int that lives through the call. JUSTIFICATION: rustix lacks this option.
    let result = unsafe {
        libc::setsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const yes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Waits, on the runtime of the calling thread, for a descriptor to become readable. It waits on a duplicate.
pub fn readable(
    descriptor: std::os::fd::BorrowedFd<'_>,
) -> std::io::Result<tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>> {
    let duplicate = descriptor.try_clone_to_owned()?;
    // SAFETY: an `OwnedFd` is open and the same descriptor for as long as it lives, and the result owns it. JUSTIFICATION:
    // tokio cannot know that of any type, and so asks for the promise.
    let registered =
        unsafe { tokio::io::unix::AsyncFd::register_with_interest(duplicate, tokio::io::Interest::READABLE) };
    registered.map_err(|refused| refused.into_parts().1)
}

/// Makes a system call that the sandbox is to refuse. `Some` is what the kernel answered, `None` that it was done.
#[cfg(feature = "testing")]
pub fn refused_call(number: libc::c_long, [a, b, c, d]: [usize; 4]) -> Option<i32> {
    // SAFETY: the tests pass null pointers, lengths of nothing and descriptors that are none, so that a kernel that does not
    // refuse the call finds no memory of ours to read or write. JUSTIFICATION: no crate offers all of these calls, and
    // none with arguments that are wrong.
    let answer = unsafe { libc::syscall(number, a, b, c, d, usize::MAX, 0_usize) };
    if answer < 0 { io::Error::last_os_error().raw_os_error() } else { None }
}

#[cfg(test)]
mod code_tests {
    use super::*;

    #[test]
    fn only_code_and_the_constants_in_front_of_it_are_forgotten() {
        let program = std::path::Path::new("/usr/bin/bunter");
        let line = |rights: &str, offset: &str, path: &str| format!("1000-3000 {rights} {offset} fe:00 77   {path}");
        let range = |rights, offset, path| code(&line(rights, offset, path), program);
        assert_eq!(range("r-xp", "00001000", "/usr/bin/bunter"), Some((0x1000, 0x3000)));
        assert_eq!(range("r--p", "00000000", "/usr/bin/bunter"), Some((0x1000, 0x3000)));
        for (rights, offset) in [("r--p", "00005000"), ("rw-p", "00000000"), ("rwxp", "00001000"), ("r-xs", "00001000")]
        {
            assert_eq!(range(rights, offset, "/usr/bin/bunter"), None, "{rights} {offset}");
        }
        assert_eq!(range("r-xp", "00001000", "/usr/lib/libc.so.6"), None);
        for broken in ["", "1000-3000", "x-y r-xp 0 0 0 /usr/bin/bunter", "3000-1000 r-xp 0 0 0 /usr/bin/bunter"] {
            assert_eq!(code(broken, program), None);
        }
        assert!(forget_code().unwrap() > 0, "and this test still runs");
    }
}
