//! Every system call that std, rustix and tokio lack. The only file of the agent that may say `unsafe`.
//!
//! Functions take `BorrowedFd` and give `OwnedFd` or plain values; each `unsafe` block says why it is sound (SAFETY) and
//! why it is there at all (JUSTIFICATION).
#![allow(unsafe_code)]

// ---------------------------------------------------------------------------------------------------------------------
// intercept: maps of the kernel programs, and two socket options.

pub mod bpf {
    //! Maps, one element at a time, from any thread: what aya's typed maps ask `&mut` or a whole program for.

    use aya::{
        Pod,
        maps::{MapData, MapError},
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
        types: PhantomData<fn(K) -> V>,
    }

    impl<K, V> std::fmt::Debug for Table<K, V> {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_tuple("Table").field(&self.map).finish()
        }
    }

    impl<K, V> Clone for Table<K, V> {
        fn clone(&self) -> Self {
            Self { map: Arc::clone(&self.map), types: PhantomData }
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
            Ok(Self { map, types: PhantomData })
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

        fn call(&self, command: libc::c_long, key: usize, value: usize, flags: u64) -> io::Result<()> {
            let attributes = ElementAttributes {
                map: self.map.as_raw_fd().cast_unsigned(),
                pad: 0,
                key: key as u64,
                value: value as u64,
                flags,
            };
            // SAFETY: `attributes` is what bpf(2) takes for these commands. The callers pass the addresses of a live key and
            // value of types `K` and `V`, whose sizes `open` has compared with the map's, or 0 where the command takes none.
            // JUSTIFICATION: no crate offers these calls on a shared handle.
            let result =
                unsafe { libc::syscall(libc::SYS_bpf, command, &raw const attributes, size_of::<ElementAttributes>()) };
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        }
    }

    impl<K, V> AsFd for Table<K, V> {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.map.as_fd()
        }
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
