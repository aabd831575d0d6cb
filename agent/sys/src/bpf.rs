//! Maps, one element or many at a time, from any thread: aya's typed maps allow that only with `&mut`, or with the whole
//! loaded object.

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

    /// Removes many rows, in this order; those that are not there are skipped. When it fails, some are removed.
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
    let done = unsafe { libc::syscall(libc::SYS_bpf, PROG_TEST_RUN, &raw mut attributes, size_of::<RunAttributes>()) };
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
            // After a row that was removed meanwhile, the kernel begins again with the first.
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
