//! Every system call that std, rustix and tokio lack. The only file of the agent that may say `unsafe`.
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

/// Gives the pages of this program's own code and constants back to the page cache, and says how many bytes they span. What
/// is needed again is mapped again when it is: a start runs through several megabytes that an agent never needs later.
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

/// The data path: kernel TLS, and the state of a TCP connection.
pub mod tls {
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
    pub fn set_tls_keys(socket: BorrowedFd<'_>, half: TlsHalf, crypto_info: &[u8]) -> io::Result<()> {
        set_option(socket, SOL_TLS, half.option(), crypto_info)
    }

    /// Reads back the `tls12_crypto_info_*` structure of one half, keys included: the caller wipes `into`.
    pub fn tls_keys(socket: BorrowedFd<'_>, half: TlsHalf, into: &mut [u8]) -> io::Result<usize> {
        option_into(socket, SOL_TLS, half.option(), into)
    }

    /// How much has been put into the connection so far, in bytes on the wire: acknowledged, and still in the send queue.
    pub fn bytes_queued_ever(socket: BorrowedFd<'_>) -> io::Result<u64> {
        // tcpi_bytes_acked stands at this offset of struct tcp_info since Linux 4.1 (linux/tcp.h); the structure only grows.
        const BYTES_ACKED: std::ops::Range<usize> = 120..128;
        let mut info = [0_u8; 128];
        let length = option_into(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
        let acknowledged = info
            .get(..length)
            .and_then(|info| info.get(BYTES_ACKED))
            .and_then(|bytes| bytes.try_into().ok())
            .map(u64::from_ne_bytes)
            .ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))?;
        Ok(acknowledged.wrapping_add(u64::from(unacknowledged(socket)?)))
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
        let length =
            libc::socklen_t::try_from(value.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: the pointer and the length describe the live slice `value`, which the kernel only reads.
        // JUSTIFICATION: std, rustix and socket2 have neither TCP_ULP nor SOL_TLS.
        let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), length) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn option_into(
        socket: BorrowedFd<'_>,
        level: libc::c_int,
        name: libc::c_int,
        into: &mut [u8],
    ) -> io::Result<usize> {
        let mut length =
            libc::socklen_t::try_from(into.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: the pointer and `length` describe the live slice `into`; the kernel writes at most `length` bytes into it
        // and leaves in `length` how many.
        // JUSTIFICATION: std, rustix and socket2 have neither SOL_TLS nor the byte counters of TCP_INFO.
        let done =
            unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, into.as_mut_ptr().cast(), &raw mut length) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(length as usize) }
    }
}

// intercept: maps of the kernel programs, and two socket options.

pub mod bpf {
    //! Maps, one element or many at a time, from any thread: what aya's typed maps ask `&mut` or a whole program for.

    use aya::{
        Pod,
        maps::{MapData, MapError, MapInfo},
    };
    use std::{
        io,
        marker::PhantomData,
        mem::MaybeUninit,
        os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        path::Path,
        sync::Arc,
    };

    /// Make a new row or replace one.
    pub const ANY: u64 = 0;
    /// Make a new row; `EEXIST` where there is one.
    pub const NEW: u64 = 1;
    /// Replace a row; `ENOENT` where there is none.
    pub const REPLACE: u64 = 2;

    /// A handle of a map with keys `K` and values `V`. Clones share one descriptor.
    pub struct Table<K, V> {
        map: Arc<OwnedFd>,
        room: usize,
        types: PhantomData<fn(K) -> V>,
    }

    impl<K, V> std::fmt::Debug for Table<K, V> {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_tuple("Table").field(&self.map).finish()
        }
    }

    impl<K, V> Clone for Table<K, V> {
        fn clone(&self) -> Self {
            Self { map: Arc::clone(&self.map), room: self.room, types: PhantomData }
        }
    }

    /// `union bpf_attr` for the commands on elements.
    #[repr(C)]
    struct ElementAttributes {
        map: u32,
        pad: u32,
        key: u64,
        /// The value, or the next key.
        value: u64,
        flags: u64,
    }

    const MAP_LOOKUP_ELEM: libc::c_long = 1;
    const MAP_UPDATE_ELEM: libc::c_long = 2;
    const MAP_DELETE_ELEM: libc::c_long = 3;
    const MAP_GET_NEXT_KEY: libc::c_long = 4;
    const MAP_LOOKUP_AND_DELETE_ELEM: libc::c_long = 21;
    const MAP_UPDATE_BATCH: libc::c_long = 26;
    const MAP_DELETE_BATCH: libc::c_long = 27;

    /// `union bpf_attr` for the commands on batches.
    #[repr(C)]
    struct BatchAttributes {
        from: u64,
        to: u64,
        keys: u64,
        values: u64,
        count: u32,
        map: u32,
        element_flags: u64,
        flags: u64,
    }

    /// Rows in one call: few enough that a reload never holds a processor for long.
    const BATCH: usize = 4096;

    impl<K: Pod, V: Pod> Table<K, V> {
        /// Opens a pinned map, if its keys and values have the size of `K` and `V`.
        pub fn open(pin: &Path) -> io::Result<Self> {
            let map = MapData::from_pin(pin).map_err(plain)?;
            let info = map.info().map_err(plain)?;
            if info.key_size() as usize != size_of::<K>() || info.value_size() as usize != size_of::<V>() {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!(
                        "{} has keys of {} and values of {} bytes, not {} and {}",
                        pin.display(),
                        info.key_size(),
                        info.value_size(),
                        size_of::<K>(),
                        size_of::<V>()
                    ),
                ));
            }
            let map = Arc::new(map.fd().as_fd().try_clone_to_owned()?);
            Ok(Self { map, room: info.max_entries() as usize, types: PhantomData })
        }

        /// How many rows it has room for.
        pub fn room(&self) -> usize {
            self.room
        }

        /// The value under a key.
        pub fn get(&self, key: &K) -> io::Result<Option<V>> {
            self.read(MAP_LOOKUP_ELEM, key)
        }

        /// The value under a key, which is removed in the same step.
        pub fn take(&self, key: &K) -> io::Result<Option<V>> {
            self.read(MAP_LOOKUP_AND_DELETE_ELEM, key)
        }

        fn read(&self, command: libc::c_long, key: &K) -> io::Result<Option<V>> {
            let mut value = MaybeUninit::<V>::uninit();
            let done = self.call(command, (&raw const *key).addr(), value.as_mut_ptr().addr(), 0);
            match done {
                // SAFETY: the kernel has written the whole value, whose size `open` has compared, and `V: Pod` says that
                // any bytes are one. JUSTIFICATION: see `call`.
                Ok(()) => Ok(Some(unsafe { value.assume_init() })),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
                Err(error) => Err(error),
            }
        }

        /// Writes a row; `flags` is [`ANY`], [`NEW`] or [`REPLACE`].
        pub fn put(&self, key: &K, value: &V, flags: u64) -> io::Result<()> {
            self.call(MAP_UPDATE_ELEM, (&raw const *key).addr(), (&raw const *value).addr(), flags)
        }

        /// Removes a row. Says whether there was one.
        pub fn remove(&self, key: &K) -> io::Result<bool> {
            match self.call(MAP_DELETE_ELEM, (&raw const *key).addr(), 0, 0) {
                Ok(()) => Ok(true),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
                Err(error) => Err(error),
            }
        }

        /// Writes many rows, in this order, new ones and others. When it fails, some are written.
        pub fn put_all(&self, keys: &[K], values: &[V]) -> io::Result<()> {
            for (keys, values) in keys.chunks(BATCH).zip(values.chunks(BATCH)) {
                let done = self.batch(MAP_UPDATE_BATCH, keys, values);
                for (key, value) in keys.iter().zip(values).skip(done) {
                    self.put(key, value, ANY)?;
                }
            }
            Ok(())
        }

        /// Removes many rows, in this order; those that are not there are nobody's error. When it fails, some are removed.
        pub fn remove_all(&self, keys: &[K]) -> io::Result<()> {
            for keys in keys.chunks(BATCH) {
                let done = self.batch(MAP_DELETE_BATCH, keys, &[]);
                for key in keys.iter().skip(done) {
                    self.remove(key)?;
                }
            }
            Ok(())
        }

        /// How many of these rows were dealt with in one call: not all where one is an error, and none where the kernel has no
        /// batches for this kind of map. The caller goes on one by one, and meets the error again.
        fn batch(&self, command: libc::c_long, keys: &[K], values: &[V]) -> usize {
            if keys.len() < 2 || (command == MAP_UPDATE_BATCH && keys.len() != values.len()) {
                return 0;
            }
            let mut attributes = BatchAttributes {
                from: 0,
                to: 0,
                keys: keys.as_ptr().addr() as u64,
                values: values.as_ptr().addr() as u64,
                count: u32::try_from(keys.len()).unwrap_or(0),
                map: self.map.as_raw_fd().cast_unsigned(),
                element_flags: ANY,
                flags: 0,
            };
            let asked = attributes.count;
            // SAFETY: `attributes` is what bpf(2) takes for these commands. It points to `count` live keys, and for an update
            // to as many values, of the sizes that `open` has compared with the map's; the kernel only reads them, and
            // writes `count`. JUSTIFICATION: no crate offers these calls on a shared handle.
            let result =
                unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attributes, size_of::<BatchAttributes>()) };
            match result {
                0 => keys.len(),
                // The kernel says how far it came, unless it refused to begin and left what was asked.
                _ if attributes.count < asked => attributes.count as usize,
                _ => 0,
            }
        }

        /// Every key that is there from the beginning of the walk to its end. A row that is removed meanwhile makes the
        /// walk start again, so a key can come twice.
        pub fn keys(&self) -> io::Result<Vec<K>> {
            let mut keys: Vec<K> = Vec::new();
            let mut last: Option<K> = None;
            // A map that changes all the time could be walked for ever.
            let mut budget = 4_000_000;
            loop {
                let mut next = MaybeUninit::<K>::uninit();
                let from = last.as_ref().map_or(0, |key| (&raw const *key).addr());
                match self.call(MAP_GET_NEXT_KEY, from, next.as_mut_ptr().addr(), 0) {
                    // SAFETY: as in `read`. JUSTIFICATION: see `call`.
                    Ok(()) => last = Some(unsafe { next.assume_init() }),
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(keys),
                    Err(error) => return Err(error),
                }
                budget -= 1;
                if budget == 0 {
                    return Err(io::Error::other("the map changes faster than it can be read"));
                }
                keys.extend(last);
            }
        }

        /// The callers pass the addresses of a live key and value of types `K` and `V`, whose sizes `open` has compared.
        fn call(&self, number: libc::c_long, key: usize, value: usize, flags: u64) -> io::Result<()> {
            command(self.map.as_fd(), number, key, value, flags)
        }
    }

    impl<K, V> AsFd for Table<K, V> {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.map.as_fd()
        }
    }

    /// `union bpf_attr` for a run of a program by hand.
    #[repr(C)]
    #[derive(Default)]
    struct RunAttributes {
        program: u32,
        result: u32,
        data_size_in: u32,
        data_size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        context_size_in: u32,
        context_size_out: u32,
        context_in: u64,
        context_out: u64,
        flags: u32,
        cpu: u32,
        batch_size: u32,
        pad: u32,
    }

    const PROG_TEST_RUN: libc::c_long = 10;

    /// Runs a program once, on these bytes, and gives what it returned.
    pub fn run<T: Pod>(program: BorrowedFd<'_>, input: &T) -> io::Result<u32> {
        let mut attributes = RunAttributes {
            program: program.as_raw_fd().cast_unsigned(),
            data_size_in: u32::try_from(size_of::<T>()).map_err(io::Error::other)?,
            data_in: (&raw const *input).addr() as u64,
            ..RunAttributes::default()
        };
        // SAFETY: `attributes` is what bpf(2) takes for this command, and `input` lives through the call and has as many
        // bytes as said; nothing is written but the result and the duration. JUSTIFICATION: aya does not offer this call.
        let done =
            unsafe { libc::syscall(libc::SYS_bpf, PROG_TEST_RUN, &raw mut attributes, size_of::<RunAttributes>()) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(attributes.result) }
    }

    /// A map of any type, to count its rows.
    #[derive(Debug)]
    pub struct Rows {
        map: MapData,
        /// What the kernel says of it.
        pub info: MapInfo,
    }

    impl Rows {
        /// Opens a pinned map.
        pub fn open(pin: &Path) -> io::Result<Self> {
            let map = MapData::from_pin(pin).map_err(plain)?;
            let info = map.info().map_err(plain)?;
            Ok(Self { map, info })
        }

        /// Counts one by one, as long as `go_on` says, which is asked now and then. Rows that come and go meanwhile make it
        /// inexact. Says whether it came to the end.
        pub fn count(&self, go_on: impl Fn() -> bool) -> io::Result<(u32, bool)> {
            let (size, most) = (self.info.key_size() as usize, self.info.max_entries());
            let (mut first, mut last, mut next) = (Vec::new(), vec![0_u8; size], vec![0_u8; size]);
            let (mut rows, mut steps) = (0, 0_u32);
            while rows < most && (steps % 1024 != 0 || go_on()) {
                let from = if rows == 0 { 0 } else { last.as_ptr().addr() };
                match command(self.map.fd().as_fd(), MAP_GET_NEXT_KEY, from, next.as_mut_ptr().addr(), 0) {
                    Ok(()) => {}
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok((rows, true)),
                    Err(error) => return Err(error),
                }
                std::mem::swap(&mut last, &mut next);
                if rows == 0 {
                    first.clone_from(&last);
                }
                // Behind a row that has gone meanwhile the kernel begins again with the first.
                rows = if last == first { 1 } else { rows + 1 };
                steps = steps.wrapping_add(1);
            }
            Ok((rows, rows == most))
        }
    }

    fn command(map: BorrowedFd<'_>, command: libc::c_long, key: usize, value: usize, flags: u64) -> io::Result<()> {
        let map = map.as_raw_fd().cast_unsigned();
        let attributes = ElementAttributes { map, pad: 0, key: key as u64, value: value as u64, flags };
        // SAFETY: `attributes` is what bpf(2) takes for these commands. The callers pass the addresses of a live key and value
        // that are as long as the map's, or 0 where the command takes none. JUSTIFICATION: no crate offers these calls on a
        // shared handle.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, command, &raw const attributes, size_of::<ElementAttributes>()) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Reads a value from bytes that the kernel has written, if there are exactly as many as it has.
    pub fn read<T: Pod>(bytes: &[u8]) -> Option<T> {
        if bytes.len() != size_of::<T>() {
            return None;
        }
        // SAFETY: as many bytes as `T` has, of any alignment, and `T: Pod` says that any bytes are one. JUSTIFICATION: the
        // ring buffer gives bytes.
        Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }

    fn plain(error: MapError) -> io::Error {
        match error {
            MapError::IoError(error) => error,
            MapError::SyscallError(error) => error.io_error,
            error => io::Error::other(error),
        }
    }
}

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
#[cfg(test)]
pub(crate) fn refused_call(number: libc::c_long, [a, b, c, d]: [usize; 4]) -> Option<i32> {
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
        let program = std::path::Path::new("/usr/bin/wimsey");
        let line = |rights: &str, offset: &str, path: &str| format!("1000-3000 {rights} {offset} fe:00 77   {path}");
        let range = |rights, offset, path| code(&line(rights, offset, path), program);
        assert_eq!(range("r-xp", "00001000", "/usr/bin/wimsey"), Some((0x1000, 0x3000)));
        assert_eq!(range("r--p", "00000000", "/usr/bin/wimsey"), Some((0x1000, 0x3000)));
        for (rights, offset) in [("r--p", "00005000"), ("rw-p", "00000000"), ("rwxp", "00001000"), ("r-xs", "00001000")]
        {
            assert_eq!(range(rights, offset, "/usr/bin/wimsey"), None, "{rights} {offset}");
        }
        assert_eq!(range("r-xp", "00001000", "/usr/lib/libc.so.6"), None);
        for broken in ["", "1000-3000", "x-y r-xp 0 0 0 /usr/bin/wimsey", "3000-1000 r-xp 0 0 0 /usr/bin/wimsey"] {
            assert_eq!(code(broken, program), None);
        }
        assert!(forget_code().unwrap() > 0, "and this test still runs");
    }
}
