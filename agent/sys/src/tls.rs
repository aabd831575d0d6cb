//! The data path: kernel TLS, and the state of a TCP connection.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// `SOL_TLS` of linux/socket.h.
const SOL_TLS: libc::c_int = 282;
/// `TLS_SET_RECORD_TYPE` of linux/tls.h.
const TLS_SET_RECORD_TYPE: libc::c_int = 1;
/// `TLS_GET_RECORD_TYPE` of linux/tls.h.
const TLS_GET_RECORD_TYPE: libc::c_int = 2;

/// Which half of a kernel TLS socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsHalf {
    /// What the socket sends: `TLS_TX`.
    Transmit,
    /// What the socket receives: `TLS_RX`.
    Receive,
}

impl TlsHalf {
    fn option(self) -> libc::c_int {
        match self {
            Self::Transmit => 1,
            Self::Receive => 2,
        }
    }
}

/// Puts the kernel's TLS protocol on a connected TCP socket. Without keys it passes bytes through unchanged.
pub fn set_tls_protocol(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_ULP, b"tls")
}

/// Gives the kernel the keys of one half: `crypto_info` is one of the `tls12_crypto_info_*` structures of linux/tls.h.
pub(crate) fn set_tls_keys(socket: BorrowedFd<'_>, half: TlsHalf, crypto_info: &[u8]) -> io::Result<()> {
    set_option(socket, SOL_TLS, half.option(), crypto_info)
}

/// Reads back the `tls12_crypto_info_*` structure of one half, keys included: the caller wipes `into`.
pub(crate) fn tls_keys(socket: BorrowedFd<'_>, half: TlsHalf, into: &mut [u8]) -> io::Result<usize> {
    option_into(socket, SOL_TLS, half.option(), into)
}

/// How much has been put into the connection so far, in bytes on the wire: acknowledged, and still in the send queue.
pub fn bytes_queued_ever(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut acknowledged = bytes_acknowledged(socket)?;
    loop {
        let queued = unacknowledged(socket)?;
        let since = bytes_acknowledged(socket)?;
        if since == acknowledged {
            return Ok(acknowledged.wrapping_add(u64::from(queued)));
        }
        // An acknowledgement came between the two readings: what it took from the queue was not yet in the first.
        acknowledged = since;
    }
}

fn bytes_acknowledged(socket: BorrowedFd<'_>) -> io::Result<u64> {
    // tcpi_bytes_acked stands at this offset of struct tcp_info since Linux 4.1 (linux/tcp.h); the structure only grows.
    const BYTES_ACKED: std::ops::Range<usize> = 120..128;
    let mut info = [0_u8; 128];
    let length = option_into(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    info.get(..length)
        .and_then(|info| info.get(BYTES_ACKED))
        .and_then(|bytes| bytes.try_into().ok())
        .map(u64::from_ne_bytes)
        .ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))
}

/// Bytes in the send queue of a TCP socket that the other end has not acknowledged (`SIOCOUTQ`).
pub fn unacknowledged(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut queued: libc::c_int = 0;
    // SAFETY: SIOCOUTQ (= TIOCOUTQ) writes one int through the pointer, which is to a live local int.
    // JUSTIFICATION: neither std, rustix nor socket2 has this ioctl.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut queued) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(u32::try_from(queued).unwrap_or(0)) }
}

/// Sends one record of another type than application data through a kernel TLS socket.
pub fn send_tls_record(socket: BorrowedFd<'_>, content_type: u8, body: &[u8]) -> io::Result<usize> {
    let mut control = ControlBuffer::new();
    let mut part = libc::iovec { iov_base: body.as_ptr().cast_mut().cast(), iov_len: body.len() };
    let mut message = control.message(&mut part);
    // SAFETY: the control buffer is aligned for cmsghdr and has room for one header and one byte, so CMSG_FIRSTHDR gives
    // a pointer into it and CMSG_DATA a pointer to one writable byte behind the header; sendmsg only reads the body.
    // JUSTIFICATION: rustix has no ancillary message for TLS record types.
    let sent = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = SOL_TLS;
        (*header).cmsg_type = TLS_SET_RECORD_TYPE;
        (*header).cmsg_len = libc::CMSG_LEN(1) as _;
        *libc::CMSG_DATA(header) = content_type;
        message.msg_controllen = (*header).cmsg_len;
        libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives from a kernel TLS socket: how many bytes, and the record type where the kernel told one. Data of one call is
/// of one type; `peek` leaves it in the socket.
pub fn receive_tls_record(socket: BorrowedFd<'_>, into: &mut [u8], peek: bool) -> io::Result<(usize, Option<u8>)> {
    let mut control = ControlBuffer::new();
    let mut part = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let mut message = control.message(&mut part);
    let flags = libc::MSG_DONTWAIT | if peek { libc::MSG_PEEK } else { 0 };
    // SAFETY: `part` covers exactly `into`, and the control buffer exactly its own bytes; recvmsg writes within both.
    // The kernel leaves msg_controllen at what it wrote, so CMSG_FIRSTHDR is null or a header inside the buffer, and its
    // data byte is read only where cmsg_len says that there is one.
    // JUSTIFICATION: rustix drops ancillary messages that it does not know, and it does not know TLS record types.
    unsafe {
        let received = libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags);
        let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        let told = !header.is_null()
            && (*header).cmsg_level == SOL_TLS
            && (*header).cmsg_type == TLS_GET_RECORD_TYPE
            && (*header).cmsg_len as usize >= libc::CMSG_LEN(1) as usize;
        Ok((received, told.then(|| *libc::CMSG_DATA(header))))
    }
}

/// Room for one control message of one byte, aligned as cmsghdr has to be.
#[repr(C, align(8))]
struct ControlBuffer([u8; 32]);

impl ControlBuffer {
    fn new() -> Self {
        Self([0; 32])
    }

    fn message(&mut self, part: &mut libc::iovec) -> libc::msghdr {
        // SAFETY: msghdr is a plain C structure for which all zeroes (null pointers, no lengths) is a valid value.
        // JUSTIFICATION: it has private padding on some targets, so that it cannot be written as a literal.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = part;
        message.msg_iovlen = 1;
        message.msg_control = self.0.as_mut_ptr().cast();
        message.msg_controllen = self.0.len() as _;
        message
    }
}

fn set_option(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: &[u8]) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the pointer and the length describe the live slice `value`, which the kernel only reads.
    // JUSTIFICATION: std, rustix and socket2 have neither TCP_ULP nor SOL_TLS.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), length) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn option_into(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, into: &mut [u8]) -> io::Result<usize> {
    let mut length = libc::socklen_t::try_from(into.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the pointer and `length` describe the live slice `into`; the kernel writes at most `length` bytes into it
    // and leaves in `length` how many.
    // JUSTIFICATION: std, rustix and socket2 have neither SOL_TLS nor the byte counters of TCP_INFO.
    let done = unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, into.as_mut_ptr().cast(), &raw mut length) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(length as usize) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        os::fd::AsFd,
        sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
        time::{Duration, Instant},
    };

    #[test]
    fn an_acknowledgement_between_two_readings_makes_no_bytes_disappear() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        let (begun, done) = (AtomicU64::new(0), AtomicU64::new(0));
        let over = AtomicBool::new(false);
        let base = bytes_queued_ever(sender.as_fd()).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut taken = vec![0; 1 << 16];
                while receiver.read(&mut taken).is_ok_and(|length| length > 0) {}
            });
            scope.spawn(|| {
                let piece = [0; 4096];
                while !over.load(SeqCst) {
                    begun.fetch_add(piece.len() as u64, SeqCst);
                    (&sender).write_all(&piece).unwrap();
                    done.fetch_add(piece.len() as u64, SeqCst);
                }
                sender.shutdown(std::net::Shutdown::Write).unwrap();
            });
            let until = Instant::now() + Duration::from_millis(500);
            let mut wrong = Vec::new();
            while Instant::now() < until {
                let least = done.load(SeqCst);
                let told = bytes_queued_ever(sender.as_fd()).unwrap() - base;
                let most = begun.load(SeqCst);
                if !(least..=most).contains(&told) {
                    wrong.push((least, told, most));
                }
            }
            over.store(true, SeqCst);
            assert!(wrong.is_empty(), "{} readings were wrong: {:?}", wrong.len(), wrong.first());
        });
    }
}
