//! Who has a socket that was there before the kernel programs, read from `/proc`.
//!
//! *Invariant:* what is found here starts an attestation and proves nothing.

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
};
use wimsey_common::Task;

/// For each of these sockets, the process that has it; of several the one that has run longest, which made the others.
pub(super) fn owners(inodes: &HashSet<u32>, cgroup2: &Path) -> HashMap<u32, Task> {
    let mut oldest: HashMap<u32, (u64, u32)> = HashMap::new();
    if inodes.is_empty() {
        return HashMap::new();
    }
    for pid in numbers(Path::new("/proc")) {
        let mut started = None;
        for inode in sockets_of(pid) {
            if !inodes.contains(&inode) {
                continue;
            }
            let started = *started.get_or_insert_with(|| start_time(pid).unwrap_or(u64::MAX));
            let best = oldest.entry(inode).or_insert((started, pid));
            *best = (*best).min((started, pid));
        }
    }
    oldest.into_iter().filter_map(|(inode, (_, pid))| Some((inode, task(pid, cgroup2)?))).collect()
}

/// For each of these sockets, the processes that have it: one for each different user, group and cgroup. Only those that `may` are
/// looked into: whoever cannot matter has descriptors as many as they like, and costs no time.
pub(super) fn holders(inodes: &HashSet<u32>, cgroup2: &Path, may: &dyn Fn(&Task) -> bool) -> HashMap<u32, Vec<Task>> {
    let mut found: HashMap<u32, Vec<Task>> = HashMap::new();
    let mut asked: HashMap<(u32, u32, u64), bool> = HashMap::new();
    if inodes.is_empty() {
        return found;
    }
    for pid in numbers(Path::new("/proc")) {
        let Some(task) = task(pid, cgroup2) else { continue };
        if !*asked.entry((task.uid, task.gid, task.cgroup)).or_insert_with(|| may(&task)) {
            continue;
        }
        let mut held = sockets_of(pid);
        held.retain(|inode| inodes.contains(inode));
        for inode in held {
            let holders = found.entry(inode).or_default();
            let same = |other: &Task| (other.uid, other.gid, other.cgroup) == (task.uid, task.gid, task.cgroup);
            if !holders.iter().any(same) {
                holders.push(task);
            }
        }
    }
    found
}

/// Inode numbers of the sockets that a process has.
pub(super) fn sockets_of(pid: u32) -> Vec<u32> {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let inode = |descriptor: fs::DirEntry| {
        let target = fs::read_link(descriptor.path()).ok()?;
        target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    };
    descriptors.flatten().filter_map(inode).collect()
}

/// What the kernel programs would have recorded about this process now.
fn task(pid: u32, cgroup2: &Path) -> Option<Task> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let real = |name: &str| field(name)?.split_whitespace().next()?.parse().ok();
    let membership = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = membership.lines().find_map(|line| line.strip_prefix("0::"))?;
    let cgroup = fs::metadata(cgroup2.join(path.trim_start_matches('/'))).ok()?.ino();
    let mut comm = [0; 16];
    comm.iter_mut().zip(field("Name:")?.bytes().take(15)).for_each(|(to, from)| *to = from);
    Some(Task { tgid: pid, uid: real("Uid:")?, gid: real("Gid:")?, workload: 0, cgroup, at: now(), comm })
}

/// Nanoseconds of `CLOCK_BOOTTIME`.
pub(super) fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    (now.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec as u64)
}

/// Field 22 of proc_pid_stat(5). The name before it may hold anything, so counting begins after its last parenthesis.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

fn numbers(directory: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_socket_of_this_process_is_found_to_be_its_own() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let inode = rustix::fs::fstat(socket.as_fd()).unwrap().st_ino as u32;
        assert!(sockets_of(std::process::id()).contains(&inode));
        assert!(start_time(std::process::id()).unwrap() > 0);
    }
}
