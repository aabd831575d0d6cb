//! The system calls that std, rustix and socket2 lack. The only file of the lab that may say `unsafe`.
#![allow(unsafe_code)]

use socket2::SockAddr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Asks for data in the SYN by a plain `connect` and `write` (`TCP_FASTOPEN_CONNECT`).
pub fn set_fastopen_connect(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the pointer and the length are those of a c_int that lives across the call.
    // JUSTIFICATION: neither rustix nor socket2 knows this option.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_FASTOPEN_CONNECT,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `sendto` with `MSG_FASTOPEN`: connects and puts the first bytes into the SYN.
pub fn send_fastopen(socket: BorrowedFd<'_>, bytes: &[u8], address: &SockAddr) -> io::Result<usize> {
    // SAFETY: both pointers and lengths are those of slices and addresses that live across the call.
    // JUSTIFICATION: rustix's `sendto` takes no socket2 address, and its flags do not name MSG_FASTOPEN.
    let result = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            libc::MSG_FASTOPEN,
            address.as_ptr().cast(),
            address.len(),
        )
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// `connect` by io_uring: no system call of that name happens.
pub fn connect_io_uring(socket: BorrowedFd<'_>, address: &SockAddr) -> io::Result<()> {
    let mut ring = io_uring::IoUring::new(2)?;
    let entry =
        io_uring::opcode::Connect::new(io_uring::types::Fd(socket.as_raw_fd()), address.as_ptr().cast(), address.len())
            .build();
    // SAFETY: the descriptor and the address outlive the operation, which is waited for below.
    // JUSTIFICATION: io_uring takes pointers by design; there is no safe wrapper for one connect.
    unsafe { ring.submission().push(&entry) }.map_err(|_| io::Error::other("submission queue full"))?;
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().map_or(-libc::EIO, |completion| completion.result());
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
}
