//! Loading, attaching, pinning and removing the kernel programs.
//!
//! Links and maps are pinned, so that they outlive the agent: while it is gone, what it protects is refused. A starting
//! agent adopts the maps that are there, attaches its own programs beside the old ones and then drops those.
//!
//! *Invariant:* from the first agent's start until [`release`], there is no moment without the programs.

use super::{
    Error,
    error::During,
    host::{self, Host, hook_missing},
};
use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{MapData, MapError, PerCpuArray, RingBuf},
    programs::{
        CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSock, CgroupSockAddr, Program, ProgramError, SkLookup,
        SockOps, links::FdLink,
    },
};
use aya_log::EbpfLogger;
use bunter_common::{QUOTA_SHARE, map};
use bunter_sys::bpf::Table;
use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

/// The kernel programs, compiled. Empty where they were not built.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bunter-ebpf"));

/// The buffer for what the programs log, in bytes: it holds a warning now and then, which is read soon. aya's default is
/// eight times as large.
const LOG: (&str, u32) = ("AYA_LOGS", 16 << 10);

/// Maps of which one user may have only a share, and the name of that share in the programs.
const SHARES: [(&str, &str); 2] = [(map::FLOWS, "FLOWS_PER_UID"), (map::SOCKETS, "SOCKETS_PER_UID")];

/// Where a program is attached.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    /// The cgroup that the configuration names.
    Covered,
    /// The root of the hierarchy, for programs that have to see every socket.
    Everywhere,
    /// The network namespace.
    Namespace,
    /// Nowhere: the agent runs it by itself.
    Nowhere,
}

/// A program, the hook as the kernel's documentation calls it, the first version that has all that the program needs, and
/// where it goes. In the order of attaching: what records comes before what relies on the records.
const PROGRAMS: [(&str, &str, &str, At); 15] = [
    ("registry", "xdp by BPF_PROG_TEST_RUN", "5.12", At::Nowhere),
    ("sock_release", "cgroup/sock_release", "5.9", At::Everywhere),
    ("post_bind4", "cgroup/post_bind4", "4.17", At::Everywhere),
    ("post_bind6", "cgroup/post_bind6", "4.17", At::Everywhere),
    ("tcp_events", "sock_ops with network namespace cookies", "5.15", At::Everywhere),
    ("guard", "cgroup_skb/egress with socket lookup", "5.8", At::Everywhere),
    ("redirect_inbound", "sk_lookup", "5.9", At::Namespace),
    ("getpeername4", "cgroup/getpeername4", "5.8", At::Everywhere),
    ("getpeername6", "cgroup/getpeername6", "5.8", At::Everywhere),
    ("getsockname4", "cgroup/getsockname4", "5.8", At::Everywhere),
    ("getsockname6", "cgroup/getsockname6", "5.8", At::Everywhere),
    ("sendmsg4", "cgroup/sendmsg4", "4.18", At::Covered),
    ("sendmsg6", "cgroup/sendmsg6", "4.18", At::Covered),
    ("connect4", "cgroup/connect4 with bpf_set_retval", "5.18", At::Covered),
    ("connect6", "cgroup/connect6 with bpf_set_retval", "5.18", At::Covered),
];

/// What only aya can open: the ring buffer and the per-CPU counters.
pub(super) struct Readers {
    pub events: RingBuf<MapData>,
    pub counters: PerCpuArray<MapData, u64>,
    pub log: Option<EbpfLogger<ToTracing>>,
    /// The program `registry`, which the agent runs.
    pub registry: OwnedFd,
}

/// Hands what the programs log to the agent's own log.
pub(super) struct ToTracing;

impl log::Log for ToTracing {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        tracing::warn!(target: "bunter::ebpf", "{}", record.args());
    }
    fn flush(&self) {}
}

/// Programs that are loaded and not attached yet.
pub(super) struct Loaded {
    object: Ebpf,
}

impl Loaded {
    /// Loads the programs. Maps that are pinned are adopted, others made and pinned; `sizes` overrides how many rows they
    /// have where they are made.
    pub fn load(host: &Host, sizes: &[(&'static str, u32)]) -> Result<Self, Error> {
        if OBJECT.is_empty() {
            return Err(Error::NoObject);
        }
        // A pinned map is adopted with the rows that it has; a new one gets as many as are asked for, or as are built in.
        let mut shares = Vec::new();
        for (map, share) in SHARES {
            let asked = sizes.iter().find(|(asked, _)| *asked == map).map(|(_, rows)| *rows);
            let rows = rows_of(&host.pins.join(map))?.or(asked);
            shares.extend(rows.map(|rows| (share, rows.div_ceil(QUOTA_SHARE))));
        }
        let mut loader = EbpfLoader::new();
        for (name, rows) in &shares {
            loader.override_global(name, rows, true);
        }
        loader.default_map_pin_directory(&host.pins);
        loader.map_max_entries(LOG.0, LOG.1);
        // All agents of the host share the map that says which namespaces have an agent.
        loader.map_pin_path(map::SERVED, host::shared_pin(map::SERVED));
        for (map, rows) in sizes {
            loader.map_max_entries(map, *rows);
        }
        // The number of rows is not part of the layout: maps that an agent with other sizes has made are adopted as they
        // are.
        for map in sizes.iter().map(|(map, _)| *map).chain([map::EVENTS]) {
            if let Some(rows) = rows_of(&host.pins.join(map))? {
                loader.map_max_entries(map, rows);
            }
        }
        let mut object = loader.load(OBJECT).map_err(|error| not_adopted(&host.pins, error))?;
        for (name, hook, since, _) in PROGRAMS {
            let program = object.program_mut(name).ok_or(Error::NoObject)?;
            match load(program) {
                Err(ProgramError::LoadError { io_error, verifier_log }) => {
                    return Err(refused(name, hook, since, io_error, &verifier_log.to_string()));
                }
                Err(error) => return Err(io::Error::other(error)).during(|| format!("loading {name}")),
                Ok(()) => {}
            }
        }
        Ok(Self { object })
    }

    /// Attaches every program and pins its link over the one of the agent before, which is thereby detached.
    pub fn attach(mut self, host: &Host, covered: &Path) -> Result<Readers, Error> {
        let everywhere = host.open_cgroup(Path::new("/"))?;
        let covered = host.open_cgroup(covered)?;
        for (name, hook, since, at) in PROGRAMS {
            let program = self.object.program_mut(name).ok_or(Error::NoObject)?;
            if at == At::Nowhere {
                continue;
            }
            let cgroup = if at == At::Covered { &covered } else { &everywhere };
            let link = attach(program, cgroup, &host.netns).map_err(|error| match code(&error) {
                Some(libc::EINVAL | libc::EOPNOTSUPP) => hook_missing(hook, since),
                _ => Error::Host { what: format!("attaching {name}"), error: io::Error::other(error) },
            })?;
            pin(link, &host.pins, name)?;
        }
        let missing = |map| Error::Map { map, error: io::ErrorKind::NotFound.into() };
        let events = self.object.take_map(map::EVENTS).ok_or_else(|| missing(map::EVENTS))?;
        let counters = self.object.take_map(map::COUNTERS).ok_or_else(|| missing(map::COUNTERS))?;
        let unusable = |map| move |error: MapError| Error::Map { map, error: io::Error::other(error) };
        let unusable_program = |error: ProgramError| Error::Host {
            what: "using the program registry".into(),
            error: io::Error::other(error),
        };
        let registry = self.object.program("registry").ok_or(Error::NoObject)?;
        let registry = registry.fd().map_err(unusable_program)?.as_fd().try_clone_to_owned();
        let registry = registry.during(|| "using the program registry".into())?;
        // The programs of the agent before log to a map of their own, which nobody reads any more.
        let log = EbpfLogger::init_with_logger(&mut self.object, ToTracing).ok();
        Ok(Readers {
            events: RingBuf::try_from(events).map_err(unusable(map::EVENTS))?,
            counters: PerCpuArray::try_from(counters).map_err(unusable(map::COUNTERS))?,
            log,
            registry,
        })
    }
}

/// Removes what an agent has left in this network namespace: the host is then as if Bunter had never been there, and the
/// workloads' connections are theirs again, unprotected. Says whether there was anything.
pub fn release(run_dir: &Path) -> Result<bool, Error> {
    let (_, inode) = host::netns()?;
    let Some(pins) = host::hosts_pins(inode)? else { return Ok(false) };
    let in_use = |error| match error {
        Error::SecondAgent { holder, .. } => Error::AgentRuns { holder },
        error => error,
    };
    let _lock = host::lock(run_dir, inode).map_err(in_use)?;
    let _pins_lock = host::lock_pins(&pins).map_err(in_use)?;
    // First of all, so that other agents of the host refuse enrolled processes of this namespace, which are no longer
    // protected.
    is_served_no_more()?;
    remove_pins(&pins)
}

/// Tells the other agents of the host that none protects this network namespace.
fn is_served_no_more() -> Result<(), Error> {
    let failed = |error| Error::Map { map: map::SERVED, error };
    let served = host::shared_pin(map::SERVED);
    if !served.exists() {
        return Ok(());
    }
    let served: Table<u64, u32> = Table::open(&served).map_err(failed)?;
    served.remove(&host::netns_cookie()?).map(drop).map_err(failed)
}

/// Detaches the programs, then lets go of the maps. The connect hooks go first: they rely on all the others.
pub(super) fn remove_pins(pins: &Path) -> Result<bool, Error> {
    let entries = match fs::read_dir(pins) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).during(|| format!("reading {}", pins.display())),
    };
    for (name, ..) in PROGRAMS.iter().rev() {
        unpin(&link_path(pins, name))?;
    }
    for entry in entries {
        unpin(&entry.during(|| format!("reading {}", pins.display()))?.path())?;
    }
    fs::remove_dir(pins).during(|| format!("removing {}", pins.display()))?;
    Ok(true)
}

fn unpin(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).during(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn link_path(pins: &Path, program: &str) -> PathBuf {
    pins.join(format!("link-{program}"))
}

/// Pins a link over the one that is there: one rename, and the old link is closed by it.
fn pin(link: FdLink, pins: &Path, program: &str) -> Result<(), Error> {
    let to = link_path(pins, program);
    let next = pins.join(format!("next-{program}"));
    unpin(&next)?;
    link.pin(&next).map_err(io::Error::other).during(|| format!("pinning {}", next.display()))?;
    fs::rename(&next, &to).during(|| format!("pinning {}", to.display()))
}

fn load(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSkb(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::Xdp(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// A link of a cgroup lets other programs be attached to the same hook, whatever the mode says.
fn attach(program: &mut Program, cgroup: &OwnedFd, netns: &OwnedFd) -> Result<FdLink, ProgramError> {
    const MODE: CgroupAttachMode = CgroupAttachMode::Single;
    match program {
        Program::CgroupSockAddr(program) => {
            let program: &mut CgroupSockAddr = program;
            let id = program.attach(cgroup, MODE)?;
            Ok(program.take_link(id)?.try_into()?)
        }
        Program::CgroupSock(program) => {
            let program: &mut CgroupSock = program;
            let id = program.attach(cgroup, MODE)?;
            Ok(program.take_link(id)?.try_into()?)
        }
        Program::CgroupSkb(program) => {
            let program: &mut CgroupSkb = program;
            let id = program.attach(cgroup, CgroupSkbAttachType::Egress, MODE)?;
            Ok(program.take_link(id)?.try_into()?)
        }
        Program::SockOps(program) => {
            let program: &mut SockOps = program;
            let id = program.attach(cgroup, MODE)?;
            Ok(program.take_link(id)?.try_into()?)
        }
        Program::SkLookup(program) => {
            let program: &mut SkLookup = program;
            let id = program.attach(netns)?;
            Ok(program.take_link(id)?.into())
        }
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// The error code of a system call that aya made.
fn code(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    }
}

/// How many rows a pinned map has room for; of a ring buffer, bytes. `None` where there is none.
fn rows_of(pin: &Path) -> Result<Option<u32>, Error> {
    if !pin.exists() {
        return Ok(None);
    }
    let info = MapData::from_pin(pin).and_then(|map| map.info());
    let info = info.map_err(io::Error::other).during(|| format!("looking at {}", pin.display()))?;
    Ok(Some(info.max_entries()))
}

/// A program that does not load: the hook is missing, or the verifier has said why.
fn refused(program: &'static str, hook: &'static str, since: &'static str, error: io::Error, log: &str) -> Error {
    if error.raw_os_error() == Some(libc::EINVAL) && log.trim().is_empty() {
        return hook_missing(hook, since);
    }
    let lines: Vec<&str> = log.lines().filter(|line| !line.is_empty()).collect();
    let end = lines.get(lines.len().saturating_sub(6)..).unwrap_or_default();
    Error::Rejected { program, error, log: end.join(" | ") }
}

/// The object does not load at all: most likely because of maps that another version has left.
fn not_adopted(pins: &Path, error: EbpfError) -> Error {
    match error {
        EbpfError::MapError(MapError::CreateError { name, io_error }) => {
            Error::Host { what: format!("making the kernel map {name}"), error: io_error }
        }
        EbpfError::MapError(error) => Error::Adopt { path: pins.into(), problem: error.to_string() },
        error => Error::Host { what: "loading the kernel programs".into(), error: io::Error::other(error) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aya_obj::{Object, generated::bpf_insn};
    use std::collections::{BTreeMap, HashSet};

    /// The frame pointer, below which a function's variables lie.
    const FRAME: u8 = 10;
    /// `BPF_JMP | BPF_CALL`, with `BPF_PSEUDO_CALL` as its source: a call of another function of the program.
    const CALL: u8 = 0x85;
    const OWN_FUNCTION: u8 = 1;
    /// `MAX_BPF_STACK`: what all functions of a chain of calls have together.
    const STACK: u32 = 512;

    /// How deep a function's stack is at most: the lowest offset from the frame pointer at which it reads or writes, or that
    /// it adds to a copy of it.
    fn frame(function: &[bpf_insn]) -> u32 {
        let mut copies = HashSet::new();
        let mut lowest = 0;
        for it in function {
            let (class, to, from) = (it.code & 7, it.dst_reg(), it.src_reg());
            match class {
                1 if from == FRAME => lowest = lowest.min(it.off.into()),
                2 | 3 if to == FRAME => lowest = lowest.min(it.off.into()),
                // BPF_ALU64 | BPF_MOV | BPF_X, and BPF_ALU64 | BPF_ADD | BPF_K
                7 if it.code == 0xbf && from == FRAME => _ = copies.insert(to),
                7 if it.code == 0x07 && copies.contains(&to) => {
                    lowest = lowest.min(it.imm);
                    copies.remove(&to);
                }
                _ => {}
            }
        }
        lowest.unsigned_abs()
    }

    /// The deepest chain of calls from the function that begins here, each frame rounded up as 6.1 does: newer kernels round
    /// less (`check_max_stack_depth` and `round_up_stack_depth` in kernel/bpf/verifier.c).
    fn deepest(all: &[bpf_insn], starts: &BTreeMap<usize, usize>, at: usize) -> (u32, Vec<u32>) {
        let own = frame(&all[at..starts[&at]]);
        let called = (at..starts[&at]).filter_map(|index| calls(all, index));
        let (below, mut chain) = called.map(|to| deepest(all, starts, to)).max().unwrap_or_default();
        chain.insert(0, own);
        (own.max(1).next_multiple_of(32) + below, chain)
    }

    /// The function that is called here, if one is.
    fn calls(all: &[bpf_insn], index: usize) -> Option<usize> {
        let it = all[index];
        let target = || usize::try_from(index as i64 + 1 + i64::from(it.imm)).unwrap();
        (it.code == CALL && it.src_reg() == OWN_FUNCTION).then(target)
    }

    #[test]
    fn the_programs_fit_the_stack_of_the_oldest_kernel() {
        if OBJECT.is_empty() {
            return eprintln!("SKIPPED (no kernel programs): the_programs_fit_the_stack_of_the_oldest_kernel");
        }
        let mut object = Object::parse(OBJECT).unwrap();
        let text: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
        object.relocate_calls(&text).unwrap();
        for (name, ..) in PROGRAMS {
            let all = &object.functions[&object.programs[name].function_key()].instructions;
            let mut firsts: Vec<usize> = (0..all.len()).filter_map(|index| calls(all, index)).chain([0]).collect();
            firsts.sort_unstable();
            firsts.dedup();
            let ends = firsts.iter().skip(1).copied().chain([all.len()]);
            let starts = firsts.iter().copied().zip(ends).collect();
            let (together, chain) = deepest(all, &starts, 0);
            println!("{name}: {together} bytes, {chain:?}");
            assert!(together <= STACK, "{name} has {together} bytes of stack in the chain {chain:?}");
        }
    }
}
