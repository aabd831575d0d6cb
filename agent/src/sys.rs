//! Every system call that std, rustix and tokio lack. The only file of the agent that may say `unsafe`.
//!
//! Functions take `BorrowedFd` and give `OwnedFd` or plain values; each `unsafe` block says why it is sound (SAFETY) and
//! why it is there at all (JUSTIFICATION).
#![allow(unsafe_code)]

// ---------------------------------------------------------------------------------------------------------------------
// cgroups by id

use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
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
