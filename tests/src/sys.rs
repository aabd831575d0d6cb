//! The system calls that std, rustix and socket2 lack. The only file of the lab that may say `unsafe`.
#![allow(unsafe_code)]

use socket2::SockAddr;
use std::io;
use std::net::Ipv6Addr;
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

/// Kernel TLS on a connected socket, both halves, AES-128-GCM with one fixed key that is no secret: for measurements.
pub fn set_fixed_tls(socket: BorrowedFd<'_>) -> io::Result<()> {
    const SOL_TLS: libc::c_int = 282;
    const TLS_TX: libc::c_int = 1;
    const TLS_RX: libc::c_int = 2;
    // struct tls12_crypto_info_aes_gcm_128 of linux/tls.h: version, cipher, iv, key, salt, number of the next record.
    let mut info = [0x5a_u8; 40];
    info[..2].copy_from_slice(&0x0304_u16.to_ne_bytes());
    info[2..4].copy_from_slice(&51_u16.to_ne_bytes());
    info[32..].fill(0);
    let options = [(libc::IPPROTO_TCP, libc::TCP_ULP, &b"tls"[..]), (SOL_TLS, TLS_TX, &info), (SOL_TLS, TLS_RX, &info)];
    for (level, name, value) in options {
        let length = value.len() as libc::socklen_t;
        // SAFETY: the pointer and the length are those of a slice that lives across the call.
        // JUSTIFICATION: neither rustix nor socket2 knows these options.
        let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), length) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Sends what a socket sends by another host first, which its header names as the destination (`IPV6_RTHDR`, a segment routing
/// header, RFC 8754): the one kind that needs no right.
pub fn set_route(socket: BorrowedFd<'_>, hop: Ipv6Addr) -> io::Result<()> {
    const SEGMENT_ROUTING: u8 = 4;
    // Next header, length in units of eight bytes beyond the first, type, segments left, last entry, flags, tag. The kernel
    // puts the destination of the socket into the first segment.
    let mut header = vec![0, 4, SEGMENT_ROUTING, 1, 1, 0, 0, 0];
    header.extend(Ipv6Addr::UNSPECIFIED.octets());
    header.extend(hop.octets());
    // SAFETY: the pointer and the length are those of a vector that lives across the call.
    // JUSTIFICATION: neither rustix nor socket2 knows this option.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_RTHDR,
            header.as_ptr().cast(),
            header.len() as libc::socklen_t,
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

/// `setsockopt` with a number, for options that no library has.
pub fn set_number(socket: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    let size = libc::socklen_t::try_from(size_of::<i32>()).map_err(io::Error::other)?;
    // SAFETY: pointer and size are those of an integer that lives across the call.
    // JUSTIFICATION: neither std nor rustix nor socket2 has TCP_FASTOPEN_CONNECT and TCP_FASTOPEN_NO_COOKIE.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `fork`: 0 in the copy, the copy's process id in the other one.
pub fn fork() -> io::Result<u32> {
    // SAFETY: whoever calls this has one thread, so that the copy holds no lock that nobody gives back.
    // JUSTIFICATION: neither std nor rustix has it.
    let child = unsafe { libc::fork() };
    u32::try_from(child).map_err(|_| io::Error::last_os_error())
}

/// Gives the calling thread a table of descriptors of its own, with all that was in the one that it shared.
pub fn own_descriptors() -> io::Result<()> {
    // SAFETY: only the calling thread has another table, and what it has open is the same as before.
    // JUSTIFICATION: rustix says so by an unsafe function as well.
    let result = unsafe { libc::unshare(libc::CLONE_FILES) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Ends the calling thread alone, also where it is the one that the process began with.
pub fn end_thread() -> ! {
    // SAFETY: the thread runs no more code, and what is on its stack stays there for others. JUSTIFICATION: no library has it.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!("a thread that has ended goes on")
}

/// Closes what has this number in the calling thread's table of descriptors.
pub fn close(number: std::os::fd::RawFd) {
    // SAFETY: whoever calls this has given the value that owned the number to a thread with another table, where it owns
    // the same number. JUSTIFICATION: no type knows of two tables.
    unsafe { libc::close(number) };
}
