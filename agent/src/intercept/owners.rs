//! Who has a socket, read from `/proc`.
//!
//! Threads may have descriptors, ids and a cgroup of their own, and outlive the first thread of their process: each thread
//! is looked at, and each table of descriptors once. Names and paths are read as bytes: a process whose name is not UTF-8
//! has sockets as well.
//!
//! *Invariant:* what is found here starts an attestation and proves nothing.

use super::{
    Error,
    diagnostics::{self, Socket as Listed},
};
use bunter_common::Task;
use bunter_sys as sys;
use rustix::{
    fs::{CWD, Mode, OFlags, RawDir, openat, readlinkat_raw},
    io::Errno,
};
use std::{
    cmp::Ordering,
    collections::{HashMap, HashSet},
    ffi::OsStr,
    fs, io,
    mem::MaybeUninit,
    os::{fd::AsFd, unix::ffi::OsStrExt, unix::fs::MetadataExt},
    path::Path,
    time::{Duration, Instant},
};

/// Who holds a listening socket, and whether it is one that takes no IPv4.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// One task for each different user, group and cgroup.
    pub holders: Vec<Task>,
    /// It does not take IPv4.
    pub ipv6_only: bool,
    /// Why there may be other holders.
    pub unread: Option<String>,
}

/// A look at who holds listening sockets. It reads `/proc`, which takes milliseconds, and where somebody has very many
/// descriptors seconds: not for a thread that others wait for.
#[derive(Debug)]
pub struct Walk {
    listed: HashMap<u64, Listed>,
    search: Search,
}

impl Walk {
    /// Begins one for these sockets, among those who `may` matter.
    pub fn begin(cookies: &HashSet<u64>, cgroup2: &Path, may: &dyn Fn(&Task) -> bool) -> Result<Self, Error> {
        let listed: HashMap<u64, Listed> = diagnostics::sockets(diagnostics::LISTENING)?
            .into_iter()
            .filter(|socket| cookies.contains(&socket.cookie))
            .map(|socket| (socket.cookie, socket))
            .collect();
        let inodes = listed.values().map(|socket| socket.inode).collect();
        Ok(Self { listed, search: Search::new(inodes, cgroup2, may) })
    }

    /// Looks on for about as long as this. True when everybody has been looked at.
    pub fn go_on(&mut self, time: Duration) -> bool {
        self.search.go_on(time)
    }

    /// Who was found so far to hold a socket. `None`: it is on no list.
    pub fn held(&self, cookie: u64) -> Option<Held> {
        let socket = self.listed.get(&cookie)?;
        let holders = self.search.holders(socket.inode);
        Some(Held { holders, ipv6_only: socket.ipv6_only, unread: self.search.unread.clone() })
    }

    /// Those of these sockets that are held by tasks other than those that `may` matter, as far as they are found within
    /// about this time.
    pub fn held_by_others(&mut self, cookies: &HashSet<u64>, time: Duration) -> HashSet<u64> {
        let inodes: HashMap<u64, u32> =
            cookies.iter().filter_map(|cookie| Some((*cookie, self.listed.get(cookie)?.inode))).collect();
        let somebody = self.search.others(&inodes.values().copied().collect(), time);
        inodes.into_iter().filter(|(_, inode)| somebody.contains(inode)).map(|(cookie, _)| cookie).collect()
    }
}

/// Looks who holds these listening sockets, of those who `may` matter, to the end.
pub fn holders(
    cookies: &HashSet<u64>,
    cgroup2: &Path,
    may: &dyn Fn(&Task) -> bool,
) -> Result<HashMap<u64, Held>, Error> {
    let mut walk = Walk::begin(cookies, cgroup2, may)?;
    while !walk.go_on(Duration::MAX) {}
    Ok(walk.listed.keys().filter_map(|cookie| Some((*cookie, walk.held(*cookie)?))).collect())
}

/// For each of these sockets, the process that has it; of several the oldest, which started the others.
pub(super) fn owners(inodes: &HashSet<u32>, cgroup2: &Path) -> HashMap<u32, Task> {
    let mut search = Search::new(inodes.clone(), cgroup2, &|_| true);
    while !search.go_on(Duration::MAX) {}
    let oldest = |holders: Vec<Holder>| holders.into_iter().min_by_key(|holder| (holder.started, holder.task.tgid));
    search.found.into_iter().filter_map(|(inode, holders)| Some((inode, oldest(holders)?.task))).collect()
}

/// A search for those who hold sockets. It goes on for as long as it is told to, from small tables of descriptors to large
/// ones: a process with millions of descriptors does not delay what is found in others.
#[derive(Debug, Default)]
struct Search {
    wanted: HashSet<u32>,
    found: HashMap<u32, Vec<Holder>>,
    /// Tables still to be looked into, the smallest last, since it is taken first: those of tasks that may matter.
    tables: Vec<Table>,
    /// Those of all other tasks, for sockets of which no holder is known.
    others: Vec<Table>,
    /// Why it is not known which sockets some process has.
    unread: Option<String>,
}

/// Somebody who has a socket.
#[derive(Clone, Copy, Debug)]
struct Holder {
    started: u64,
    task: Task,
}

/// A table of descriptors.
#[derive(Debug)]
struct Table {
    pid: u32,
    /// Threads that have it.
    threads: Vec<u32>,
    /// How many descriptors there is room for.
    size: u64,
    /// One thread for each different user, group and cgroup.
    who: Vec<Task>,
}

/// What a thread is.
#[derive(Clone, Copy, Debug)]
struct Thread {
    task: Task,
    size: u64,
    threads: u64,
    /// It has ended, and has no descriptors any more.
    ended: bool,
}

impl Search {
    /// Begins one for these sockets. Only tables of tasks that `may` matter are looked into: others cost no time, however
    /// many descriptors they have.
    fn new(wanted: HashSet<u32>, cgroup2: &Path, may: &dyn Fn(&Task) -> bool) -> Self {
        let mut search = Self { wanted, ..Self::default() };
        if search.wanted.is_empty() {
            return search;
        }
        let mut reader = Reader { cgroup2, cgroups: HashMap::new() };
        let mut asked: HashMap<(u32, u32, u64), bool> = HashMap::new();
        let mut may = |task: &Task| *asked.entry(facts(task)).or_insert_with(|| may(task));
        let processes = match numbers(Path::new("/proc")) {
            Ok(processes) => processes,
            Err(error) => return Self { unread: Some(format!("/proc cannot be read: {error}")), ..search },
        };
        for pid in processes {
            match reader.tables(pid) {
                Ok(tables) => {
                    for mut table in tables {
                        if table.who.iter().any(&mut may) {
                            table.who.retain(&mut may);
                            search.tables.push(table);
                        } else {
                            search.others.push(table);
                        }
                    }
                }
                Err(error) if is_gone(&error) => {}
                Err(error) => search.unread = Some(unreadable(pid, &error)),
            }
        }
        for tables in [&mut search.tables, &mut search.others] {
            tables.sort_by_key(|table| std::cmp::Reverse(table.size));
        }
        search
    }

    /// Looks on for about as long as this. True when all have been looked at.
    fn go_on(&mut self, time: Duration) -> bool {
        let began = Instant::now();
        while let Some(table) = self.tables.pop() {
            self.look_into(&table);
            if began.elapsed() >= time {
                break;
            }
        }
        self.tables.is_empty()
    }

    /// Those of these sockets that are held by tasks outside of those that may matter, as far as they are found within
    /// about this time.
    fn others(&mut self, inodes: &HashSet<u32>, time: Duration) -> HashSet<u32> {
        let wanted = std::mem::replace(&mut self.wanted, inodes.clone());
        let found = std::mem::take(&mut self.found);
        let began = Instant::now();
        while !self.wanted.is_subset(&self.found.keys().copied().collect())
            && began.elapsed() < time
            && let Some(table) = self.others.pop()
        {
            self.look_into(&table);
        }
        let somebody = std::mem::replace(&mut self.found, found).into_keys().collect();
        self.wanted = wanted;
        somebody
    }

    /// Who was found so far to have a socket: one task for each different user, group and cgroup.
    fn holders(&self, inode: u32) -> Vec<Task> {
        self.found.get(&inode).into_iter().flatten().map(|holder| holder.task).collect()
    }

    fn look_into(&mut self, table: &Table) {
        let mut held = Vec::new();
        for thread in &table.threads {
            let read = read_table(table.pid, *thread, &mut |inode| {
                if self.wanted.contains(&inode) {
                    held.push(inode);
                }
            });
            match read {
                // A thread that ends while its table is read shows only a part of it: then the next thread that has the
                // table is read. With the last thread the table is gone.
                Ok(()) if table.threads.len() == 1 || !has_ended(table.pid, *thread) => break,
                Ok(()) => {}
                Err(error) if is_gone(&error) => {}
                Err(error) => self.unread = Some(unreadable(table.pid, &error)),
            }
        }
        if held.is_empty() {
            return;
        }
        let started = start_time(table.pid).unwrap_or(u64::MAX);
        for inode in held {
            let holders = self.found.entry(inode).or_default();
            for task in &table.who {
                match holders.iter_mut().find(|other| facts(&other.task) == facts(task)) {
                    Some(other) if (other.started, other.task.tgid) <= (started, task.tgid) => {}
                    Some(other) => *other = Holder { started, task: *task },
                    None => holders.push(Holder { started, task: *task }),
                }
            }
        }
    }
}

/// What makes two tasks the same for every registration entry, as far as the kernel knows them.
fn facts(task: &Task) -> (u32, u32, u64) {
    (task.uid, task.gid, task.cgroup)
}

fn unreadable(pid: u32, error: &io::Error) -> String {
    format!("process {pid} cannot be looked at, which may hold it: {error}")
}

/// The errors by which `/proc` says that a process or a thread is gone.
fn is_gone(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::SRCH | Errno::NOENT))
}

/// Reads processes, and remembers the cgroups that they are in.
struct Reader<'h> {
    cgroup2: &'h Path,
    cgroups: HashMap<Vec<u8>, u64>,
}

impl Reader<'_> {
    /// The tables of a process: one, unless some thread has its own.
    fn tables(&mut self, pid: u32) -> io::Result<Vec<Table>> {
        let first = self.thread(pid, pid)?;
        if first.threads <= 1 {
            let table = Table { pid, threads: vec![pid], size: first.size, who: vec![first.task] };
            return Ok(if first.ended { Vec::new() } else { vec![table] });
        }
        let mut tables: Vec<Table> = Vec::new();
        for thread in numbers(Path::new(&format!("/proc/{pid}/task")))? {
            let read = if thread == pid { Ok(first) } else { self.thread(pid, thread) };
            let found = match read {
                Ok(found) => found,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(error),
            };
            if found.ended {
                continue;
            }
            // Kept sorted by the kernel's order of tables, to be searched quickly: a process may have very many threads
            // with a table each. Where the kernel does not say whether two tables are one, each is read.
            let order = |table: &Table| {
                let known = table.threads.last().map(|other| sys::compare_descriptors(*other, thread));
                known.and_then(Result::ok).unwrap_or(Ordering::Less)
            };
            let place = tables.binary_search_by(order);
            let Some(table) = place.ok().and_then(|index| tables.get_mut(index)) else {
                let table = Table { pid, threads: vec![thread], size: found.size, who: vec![found.task] };
                tables.insert(place.unwrap_or_else(|index| index), table);
                continue;
            };
            table.threads.push(thread);
            if !table.who.iter().any(|other| facts(other) == facts(&found.task)) {
                table.who.push(found.task);
            }
        }
        Ok(tables)
    }

    /// What the kernel programs would record about this thread now.
    fn thread(&mut self, pid: u32, thread: u32) -> io::Result<Thread> {
        let read = |file: &str| fs::read(format!("/proc/{pid}/task/{thread}/{file}"));
        let status = Status::parse(&read("status")?)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "its status does not read as documented"))?;
        // A task in a cgroup that is not found may be any workload, so what it holds is refused. It may just have left a
        // cgroup that is gone by now: look again. A path that is too long for the kernel to show counts as not found. It
        // must not be an error, because then what others hold would be refused as well.
        let mut cgroup = 0;
        for _ in 0..3 {
            cgroup = match read("cgroup") {
                Ok(membership) => self.cgroup(&membership).unwrap_or(0),
                Err(error) if is_gone(&error) => return Err(error),
                Err(_) => 0,
            };
            if cgroup != 0 || status.ended {
                break;
            }
        }
        let Status { comm, uid, gid, size, threads, ended } = status;
        let task = Task { tgid: pid, uid, gid, workload: 0, cgroup, at: now(), comm };
        Ok(Thread { task, size, threads, ended })
    }

    /// The number of the cgroup in `/proc/PID/cgroup`.
    fn cgroup(&mut self, membership: &[u8]) -> Option<u64> {
        let path = membership.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"0::/"))?;
        if let Some(known) = self.cgroups.get(path) {
            return Some(*known);
        }
        let number = fs::metadata(self.cgroup2.join(OsStr::from_bytes(path))).ok()?.ino();
        self.cgroups.insert(path.to_vec(), number);
        Some(number)
    }
}

/// What is of interest in `/proc/PID/status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Status {
    comm: [u8; 16],
    uid: u32,
    gid: u32,
    size: u64,
    threads: u64,
    ended: bool,
}

impl Status {
    /// The kernel escapes newlines in the name, but not bytes that are no UTF-8.
    fn parse(status: &[u8]) -> Option<Self> {
        let field = |name: &[u8]| {
            let line = status.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(name))?;
            Some(line.trim_ascii())
        };
        let number = |name: &[u8]| {
            let first = field(name)?.split(u8::is_ascii_whitespace).next()?;
            std::str::from_utf8(first).ok()?.parse::<u64>().ok()
        };
        let id = |name: &[u8]| number(name).and_then(|id| u32::try_from(id).ok());
        let mut comm = [0; 16];
        comm.iter_mut().zip(field(b"Name:")?.iter().take(15)).for_each(|(to, from)| *to = *from);
        let ended = matches!(field(b"State:")?.first(), Some(b'Z' | b'X'));
        let (uid, gid) = (id(b"Uid:")?, id(b"Gid:")?);
        // These fields are missing for a thread that has ended.
        let (size, threads) = (number(b"FDSize:").unwrap_or(0), number(b"Threads:").unwrap_or(1));
        Some(Self { comm, uid, gid, size, threads, ended })
    }
}

/// Inode numbers of the sockets that a process has.
pub(super) fn sockets_of(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let _: io::Result<()> = read_table(pid, pid, &mut |inode| found.push(inode));
    found
}

/// Calls `each` for each socket in a thread's table of descriptors. What closes meanwhile is left out.
fn read_table(pid: u32, thread: u32, each: &mut dyn FnMut(u32)) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = openat(CWD, format!("/proc/{pid}/task/{thread}/fd"), flags, Mode::empty())?;
    let (mut names, mut target) = ([MaybeUninit::uninit(); 16 * 1024], [MaybeUninit::uninit(); 64]);
    let mut entries = RawDir::new(directory.as_fd(), &mut names);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let Ok((target, _)) = readlinkat_raw(directory.as_fd(), entry.file_name(), &mut target[..]) else { continue };
        if let Some(inode) = socket(target) {
            each(inode);
        }
    }
    Ok(())
}

/// The inode number in what a descriptor of a socket links to.
fn socket(target: &[u8]) -> Option<u32> {
    let number = target.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    std::str::from_utf8(number).ok()?.parse().ok()
}

/// Is this thread one that has no descriptors any more?
fn has_ended(pid: u32, thread: u32) -> bool {
    let status = fs::read(format!("/proc/{pid}/task/{thread}/status"));
    status.ok().and_then(|status| Status::parse(&status)).is_none_or(|status| status.ended)
}

/// Nanoseconds of `CLOCK_BOOTTIME`.
pub(super) fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    (now.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec as u64)
}

/// Field 22 of proc_pid_stat(5). The name before it may hold anything, so counting begins after its last parenthesis.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    std::str::from_utf8(stat.get(end + 1..)?).ok()?.split_whitespace().nth(19)?.parse().ok()
}

fn numbers(directory: &Path) -> io::Result<Vec<u32>> {
    let entries = fs::read_dir(directory)?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::sync::mpsc;

    fn socket_of_ones_own() -> (OwnedFd, u32) {
        let socket = OwnedFd::from(std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        let inode = rustix::fs::fstat(&socket).unwrap().st_ino as u32;
        (socket, inode)
    }

    fn holders(inode: u32) -> Vec<Task> {
        let hierarchy = bunter_sys::mounts::cgroup2().unwrap().unwrap_or_default();
        let own = std::process::id();
        let mut search = Search::new(HashSet::from([inode]), &hierarchy, &|_| true);
        while !search.go_on(Duration::ZERO) {}
        assert_eq!(search.unread, None);
        search.holders(inode).into_iter().filter(|task| task.tgid == own).collect()
    }

    #[test]
    fn a_socket_of_this_process_is_found_to_be_its_own() {
        let (_socket, inode) = socket_of_ones_own();
        assert!(sockets_of(std::process::id()).contains(&inode));
        assert_eq!(holders(inode).len(), 1);
        assert!(start_time(std::process::id()).unwrap() > 0);
    }

    #[test]
    fn a_socket_in_a_threads_own_table_is_found_whatever_the_thread_is_called() {
        let (ready, is_ready) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            // The kernel cuts such names in the middle of a letter.
            fs::write("/proc/thread-self/comm", b"fourteen bytes\xc3").unwrap();
            let files = libc::CLONE_FILES as usize;
            assert_eq!(sys::refused_call(libc::SYS_unshare, [files, 0, 0, 0]), None);
            let own = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
            let order = sys::compare_descriptors(own, std::process::id());
            // Made here, so that the table of the other threads has no descriptor of it.
            let (_socket, inode) = socket_of_ones_own();
            ready.send((order.unwrap().is_eq(), inode)).unwrap();
            let _ = ended.recv();
        });
        let (shared, inode) = is_ready.recv().unwrap();
        assert!(!shared);
        assert!(!holders(inode).is_empty());
        end.send(()).unwrap();
        thread.join().unwrap();
    }

    /// Processor time that it takes to look at this process while so many threads have tables of their own.
    fn cost_of(tables: usize) -> Duration {
        let clock = || {
            let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap())
        };
        let (begin, end) = (std::sync::Barrier::new(tables + 1), std::sync::Barrier::new(tables + 1));
        std::thread::scope(|scope| {
            for _ in 0..tables {
                let thread = std::thread::Builder::new().stack_size(64 * 1024);
                let stay = || {
                    // An empty table of its own: a copied descriptor would keep open what other tests close.
                    let own = libc::CLOSE_RANGE_UNSHARE as usize;
                    assert_eq!(sys::refused_call(libc::SYS_close_range, [0, u32::MAX as usize, own, 0]), None);
                    begin.wait();
                    end.wait();
                };
                thread.spawn_scoped(scope, stay).unwrap();
            }
            begin.wait();
            let before = clock();
            let found = Reader { cgroup2: Path::new("/"), cgroups: HashMap::new() }.tables(std::process::id()).unwrap();
            let cost = clock() - before;
            assert!(found.len() > tables, "{} tables", found.len());
            end.wait();
            cost
        })
    }

    #[test]
    fn many_tables_of_one_process_cost_no_more_each_than_few() {
        let (few, many) = (cost_of(100), cost_of(1600));
        assert!(many < few * 16 * 4, "100 tables took {few:?}, 1,600 took {many:?}");
    }

    #[test]
    fn a_status_is_read_whatever_the_name_is() {
        let text = |name: &[u8], state: &str| {
            let rest = format!(
                "\nState:\t{state}\nTgid:\t7\nUid:\t2001\t0\t0\t0\nGid:\t2002\t0\t0\t0\nFDSize:\t64\nThreads:\t3\n"
            );
            [b"Name:\t", name, rest.as_bytes()].concat()
        };
        for name in [b"web".as_slice(), b"web-\xff", b"fourteen bytes\xc3", b"", b"Uid:\\n0"] {
            let status = Status::parse(&text(name, "S (sleeping)")).unwrap();
            assert_eq!((status.uid, status.gid, status.size, status.threads), (2001, 2002, 64, 3));
            assert!(!status.ended && status.comm.starts_with(name));
        }
        assert!(Status::parse(&text(b"web", "Z (zombie)")).unwrap().ended);
        assert_eq!(Status::parse(b"Name:\tweb\nState:\tS\n"), None);
    }
}
