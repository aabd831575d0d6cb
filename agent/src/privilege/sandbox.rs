//! The sandbox: a seccomp filter that refuses system calls which a running agent never makes, and an intruder in it would.
//!
//! It is a list of what is refused, not of what is allowed, and system calls younger than Linux 6.1 are answered as if they
//! did not exist (docs/adr/0008-a-sandbox-that-lists-what-is-refused.md). A refused call gets EPERM; the agent lives on,
//! and says so where it matters.
//!
//! *Invariant:* the sandbox is reported to be on only after it was seen to refuse a call.

use rustix::fs::{MemfdFlags, memfd_create};
use seccompiler::{
    BackendError, BpfProgram, BpfProgramRef, SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, sock_filter,
};
use std::collections::BTreeMap;
use std::fmt;

/// Whether the sandbox holds this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sandbox {
    /// It does.
    On,
    /// It does not.
    Off {
        /// Why.
        why: String,
    },
}

impl fmt::Display for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::On => write!(f, "on"),
            Self::Off { why } => write!(f, "off: {why}"),
        }
    }
}

/// Closes the sandbox around every thread of this process, for good.
pub(super) fn close() -> Sandbox {
    close_by(seccompiler::apply_filter_all_threads)
}

/// Would this kernel close it? Tried on a thread that ends afterwards.
pub fn probe() -> Sandbox {
    let thread = std::thread::Builder::new().spawn(|| close_by(seccompiler::apply_filter));
    match thread.map(std::thread::JoinHandle::join) {
        Ok(Ok(sandbox)) => sandbox,
        Ok(Err(_)) => Sandbox::Off { why: "the thread that tried it has panicked".into() },
        Err(error) => Sandbox::Off { why: format!("no thread to try it on: {error}") },
    }
}

fn close_by(apply: fn(BpfProgramRef) -> seccompiler::Result<()>) -> Sandbox {
    let applied = programs()
        .map_err(|error| format!("there is no filter for this machine: {error}"))
        .and_then(|programs| programs.iter().try_for_each(|program| apply(program).map_err(|error| explain(&error))));
    match applied {
        Ok(()) if memfd_create("bunter", MemfdFlags::CLOEXEC).is_ok() => {
            Sandbox::Off { why: "this kernel took the filter and refuses nothing by it".into() }
        }
        Ok(()) => Sandbox::On,
        Err(why) => Sandbox::Off { why },
    }
}

fn explain(error: &seccompiler::Error) -> String {
    match error {
        seccompiler::Error::Seccomp(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) => {
            "this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)".into()
        }
        error => format!("this kernel takes no seccomp filter: {error}"),
    }
}

/// Both filters. The kernel runs each, and the stricter answer counts.
fn programs() -> Result<[BpfProgram; 2], BackendError> {
    let machine: TargetArch = std::env::consts::ARCH.try_into()?;
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    // At system calls of another architecture (32-bit ones on x86) this filter ends the process.
    let refused = SeccompFilter::new(refused()?, SeccompAction::Allow, refuse, machine)?;
    Ok([refused.try_into()?, unknown()])
}

/// The youngest system call of Linux 6.1. Since 424 they have the same numbers on all machines.
const YOUNGEST: u32 = libc::SYS_set_mempolicy_home_node as u32;

/// ENOSYS for system calls that Linux 6.1 does not have, as 6.1 itself would say: the agent runs there, so it needs none
/// of them, whatever the C library tries first. The calls of the x32 ABI are beyond that number as well. Also for
/// `clone3`, whose flags are in memory, where no filter can look; the C library then uses `clone`.
fn unknown() -> BpfProgram {
    let (load, jump_if_greater, jump_if_equal, answer) = (
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        libc::BPF_JMP | libc::BPF_JGT,
        libc::BPF_JMP | libc::BPF_JEQ,
        libc::BPF_RET,
    );
    let step = |code: u32, jt, jf, k| sock_filter { code: code as u16, jt, jf, k };
    vec![
        // The number comes first in struct seccomp_data.
        step(load, 0, 0, 0),
        step(jump_if_greater, 2, 0, YOUNGEST),
        step(jump_if_equal, 1, 0, libc::SYS_clone3 as u32),
        step(answer, 0, 0, libc::SECCOMP_RET_ALLOW),
        step(answer, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned()),
    ]
}

/// Refused whatever the arguments are.
const ALWAYS: &[&[libc::c_long]] = &[
    // Other programs: starting one, looking into one, telling one what to do.
    &[
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_process_madvise,
        libc::SYS_process_mrelease,
        libc::SYS_kill,
        libc::SYS_tkill,
        libc::SYS_rt_sigqueueinfo,
        libc::SYS_rt_tgsigqueueinfo,
        libc::SYS_pidfd_send_signal,
        libc::SYS_migrate_pages,
        libc::SYS_move_pages,
    ],
    // Another view of the system: mounts, roots, namespaces, devices.
    &[
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_open_tree,
        libc::SYS_move_mount,
        libc::SYS_fsopen,
        libc::SYS_fsconfig,
        libc::SYS_fsmount,
        libc::SYS_fspick,
        libc::SYS_mount_setattr,
        libc::SYS_mknodat,
        libc::SYS_name_to_handle_at,
        libc::SYS_fanotify_init,
        libc::SYS_fanotify_mark,
        libc::SYS_quotactl,
        libc::SYS_quotactl_fd,
    ],
    // Another kernel, or another state of this one.
    &[
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_kexec_load,
        libc::SYS_kexec_file_load,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_acct,
        libc::SYS_syslog,
        libc::SYS_vhangup,
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_adjtimex,
        libc::SYS_clock_adjtime,
        libc::SYS_sethostname,
        libc::SYS_setdomainname,
        libc::SYS_nfsservctl,
        libc::SYS_lookup_dcookie,
    ],
    // Another user.
    &[
        libc::SYS_personality,
        libc::SYS_capset,
        libc::SYS_setuid,
        libc::SYS_setgid,
        libc::SYS_setreuid,
        libc::SYS_setregid,
        libc::SYS_setresuid,
        libc::SYS_setresgid,
        libc::SYS_setfsuid,
        libc::SYS_setfsgid,
        libc::SYS_setgroups,
    ],
    // Large parts of the kernel that the agent has no use for, and where many holes have been.
    &[
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_userfaultfd,
        libc::SYS_perf_event_open,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_keyctl,
        libc::SYS_memfd_create,
        libc::SYS_memfd_secret,
        libc::SYS_remap_file_pages,
        libc::SYS_splice,
        libc::SYS_vmsplice,
        libc::SYS_tee,
        libc::SYS_shmget,
        libc::SYS_shmat,
        libc::SYS_shmctl,
        libc::SYS_semget,
        libc::SYS_semctl,
        libc::SYS_semop,
        libc::SYS_semtimedop,
        libc::SYS_msgget,
        libc::SYS_msgsnd,
        libc::SYS_msgrcv,
        libc::SYS_msgctl,
        libc::SYS_mq_open,
        libc::SYS_mq_unlink,
    ],
    OF_THIS_MACHINE,
];

/// System calls that newer architectures do not have.
#[cfg(target_arch = "x86_64")]
const OF_THIS_MACHINE: &[libc::c_long] = &[
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_mknod,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_uselib,
    libc::SYS__sysctl,
];
#[cfg(not(target_arch = "x86_64"))]
const OF_THIS_MACHINE: &[libc::c_long] = &[];

/// Domains of sockets that the agent makes: the admin socket, what it carries, socket diagnostics.
const DOMAINS: [libc::c_int; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
/// Commands of bpf(2) on what is open: lookup, update, delete, next key, a run of a program, lookup and delete.
const ON_ELEMENTS: [u64; 6] = [1, 2, 3, 4, 10, 21];
/// The numbers of `ioctl` for sockets, interfaces and routes begin with this byte, and tokio and std use none of them.
const SOCKET_REQUESTS: (u64, u64) = (0xff00, 0x8900);
/// `IPT_SO_SET_REPLACE` and `IP6T_SO_SET_REPLACE`.
const REPLACE_FIREWALL: u64 = 64;
/// The one way in which `sys::open_cgroup_by_id` opens.
const DIRECTORY_ALONE: libc::c_int = libc::O_PATH | libc::O_CLOEXEC | libc::O_DIRECTORY;

/// Everything that is refused: a call with no rules always, another where one of its rules holds.
fn refused() -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let mut refused: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    refused.extend(ALWAYS.iter().copied().flatten().map(|call| (*call, Vec::new())));
    let executable = |argument| rule([masked(argument, libc::PROT_EXEC, libc::PROT_EXEC)]);
    let other_domains = rule(DOMAINS.map(|domain| (0, SeccompCmpOp::Ne, number(domain))));
    let other_netlink =
        rule([(0, SeccompCmpOp::Eq, number(libc::AF_NETLINK)), (2, SeccompCmpOp::Ne, number(libc::NETLINK_SOCK_DIAG))]);
    let firewall = |level| rule([(1, SeccompCmpOp::Eq, number(level)), (2, SeccompCmpOp::Eq, REPLACE_FIREWALL)]);
    let (mask, family) = SOCKET_REQUESTS;
    let own = u64::from(std::process::id());
    refused.extend([
        // New processes; threads may be made.
        (libc::SYS_clone, vec![rule([masked(0, libc::CLONE_THREAD, 0)])?]),
        // Code that was not in the program when it started.
        (libc::SYS_mmap, vec![executable(2)?]),
        (libc::SYS_mprotect, vec![executable(2)?]),
        (libc::SYS_pkey_mprotect, vec![executable(2)?]),
        // Sockets for packets, virtual machines and devices; routes, addresses and packet filters, which the agent's
        // capabilities would allow it to change.
        (libc::SYS_socket, vec![other_domains?, other_netlink?]),
        (
            libc::SYS_ioctl,
            vec![rule([(1, SeccompCmpOp::MaskedEq(mask), family)])?, rule([(1, SeccompCmpOp::Eq, libc::TIOCSTI)])?],
        ),
        (libc::SYS_setsockopt, vec![firewall(libc::IPPROTO_IP)?, firewall(libc::IPPROTO_IPV6)?]),
        // The programs and maps are loaded and attached already.
        (libc::SYS_bpf, vec![rule(ON_ELEMENTS.map(|command| (0, SeccompCmpOp::Ne, command)))?]),
        (libc::SYS_open_by_handle_at, vec![rule([(2, SeccompCmpOp::Ne, number(DIRECTORY_ALONE))])?]),
        // The agent compares only tables of descriptors, to find who holds a socket.
        (libc::SYS_kcmp, vec![rule([(2, SeccompCmpOp::Ne, number(bunter_sys::KCMP_FILES))])?]),
        // abort() sends a signal, to this process.
        (libc::SYS_tgkill, vec![rule([(0, SeccompCmpOp::Ne, own)])?]),
        (libc::SYS_prlimit64, vec![rule([(0, SeccompCmpOp::Ne, 0), (0, SeccompCmpOp::Ne, own)])?]),
    ]);
    Ok(refused)
}

/// A rule that holds where all of these hold: number of the argument, comparison, value. The kernel looks at the lower
/// half of each of these arguments alone, and so do the comparisons.
fn rule<const N: usize>(conditions: [(u8, SeccompCmpOp, u64); N]) -> Result<SeccompRule, BackendError> {
    let condition = |(argument, comparison, value)| SeccompCondition::new(argument, Dword, comparison, value);
    SeccompRule::new(conditions.into_iter().map(condition).collect::<Result<_, _>>()?)
}

fn masked(argument: u8, mask: libc::c_int, value: libc::c_int) -> (u8, SeccompCmpOp, u64) {
    (argument, SeccompCmpOp::MaskedEq(number(mask)), number(value))
}

/// A C int as the lower half of a register has it.
fn number(value: libc::c_int) -> u64 {
    value.cast_unsigned().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bunter_sys::refused_call;
    use std::process::Command;

    /// Set in the process that is sandboxed: a filter cannot be taken off again.
    const INSIDE: &str = "BUNTER_TEST_SANDBOX";

    /// Runs one test of this module in a process of its own.
    fn in_a_sandbox(test: &str, body: impl FnOnce()) {
        if std::env::var_os(INSIDE).is_some() {
            assert_eq!(close(), Sandbox::On);
            return body();
        }
        if let Sandbox::Off { why } = probe() {
            return eprintln!("skipped: {why}");
        }
        let name = format!("{}::{test}", module_path!().split_once("::").unwrap().1);
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &name, "--nocapture"])
            .env(INSIDE, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
        assert!(said.contains("1 passed"), "{said}");
    }

    #[test]
    fn what_an_intruder_would_do_is_refused() {
        in_a_sandbox("what_an_intruder_would_do_is_refused", || {
            let exec = libc::PROT_READ as usize | libc::PROT_EXEC as usize;
            let private = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
            let socket =
                |domain: libc::c_int, kind: libc::c_int, protocol| [domain as usize, kind as usize, protocol, 0];
            // Each of these, if it got through, would fail for its arguments with another error, or do no harm.
            for (what, call, arguments) in [
                ("execve", libc::SYS_execve, [0; 4]),
                ("execveat", libc::SYS_execveat, [0; 4]),
                ("a process", libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0, 0]),
                ("ptrace", libc::SYS_ptrace, [usize::MAX, 0, 0, 0]),
                ("process_vm_readv", libc::SYS_process_vm_readv, [0; 4]),
                ("process_vm_writev", libc::SYS_process_vm_writev, [0; 4]),
                ("kcmp of files", libc::SYS_kcmp, [usize::MAX, usize::MAX, 0, 0]),
                ("kcmp of memory", libc::SYS_kcmp, [usize::MAX, usize::MAX, 1, 0]),
                ("kill", libc::SYS_kill, [std::process::id() as usize, 0, 0, 0]),
                ("tgkill of another", libc::SYS_tgkill, [1, 1, 0, 0]),
                ("mount", libc::SYS_mount, [0; 4]),
                ("pivot_root", libc::SYS_pivot_root, [0; 4]),
                ("chroot", libc::SYS_chroot, [0; 4]),
                ("unshare", libc::SYS_unshare, [0; 4]),
                ("setns", libc::SYS_setns, [usize::MAX, 0, 0, 0]),
                ("fsopen", libc::SYS_fsopen, [0; 4]),
                ("init_module", libc::SYS_init_module, [0; 4]),
                ("finit_module", libc::SYS_finit_module, [usize::MAX, 0, 0, 0]),
                ("kexec_load", libc::SYS_kexec_load, [0, usize::MAX, 0, 0]),
                ("reboot", libc::SYS_reboot, [0; 4]),
                ("swapon", libc::SYS_swapon, [0; 4]),
                ("settimeofday", libc::SYS_settimeofday, [0; 4]),
                ("clock_settime", libc::SYS_clock_settime, [0; 4]),
                ("keyctl", libc::SYS_keyctl, [usize::MAX, 0, 0, 0]),
                ("perf_event_open", libc::SYS_perf_event_open, [0; 4]),
                ("userfaultfd", libc::SYS_userfaultfd, [usize::MAX, 0, 0, 0]),
                ("io_uring_setup", libc::SYS_io_uring_setup, [0; 4]),
                ("personality", libc::SYS_personality, [u32::MAX as usize, 0, 0, 0]),
                ("setuid", libc::SYS_setuid, [usize::MAX, 0, 0, 0]),
                ("mmap of code", libc::SYS_mmap, [0, 4096, exec, private]),
                ("mprotect to code", libc::SYS_mprotect, [0, 4096, exec, 0]),
                ("AF_PACKET", libc::SYS_socket, socket(libc::AF_PACKET, libc::SOCK_RAW, 0)),
                ("AF_VSOCK", libc::SYS_socket, socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)),
                ("AF_ALG", libc::SYS_socket, socket(libc::AF_ALG, libc::SOCK_SEQPACKET, 0)),
                ("NETLINK_ROUTE", libc::SYS_socket, socket(libc::AF_NETLINK, libc::SOCK_RAW, 0)),
                ("SIOCSIFFLAGS", libc::SYS_ioctl, [usize::MAX, 0x8914, 0, 0]),
                ("IPT_SO_SET_REPLACE", libc::SYS_setsockopt, [usize::MAX, 0, 64, 0]),
                ("BPF_MAP_CREATE", libc::SYS_bpf, [0; 4]),
                ("BPF_PROG_LOAD", libc::SYS_bpf, [5, 0, 0, 0]),
                ("open_by_handle_at for reading", libc::SYS_open_by_handle_at, [usize::MAX, 0, 0, 0]),
                ("prlimit of another", libc::SYS_prlimit64, [1, usize::MAX, 0, 0]),
            ] {
                assert_eq!(refused_call(call, arguments), Some(libc::EPERM), "{what}");
            }
            // The kernel ignores the upper half of this argument, and so does the comparison.
            let beyond = 1 << 40 | libc::AF_PACKET as usize;
            assert_eq!(refused_call(libc::SYS_socket, [beyond, libc::SOCK_RAW as usize, 0, 0]), Some(libc::EPERM));
            assert_eq!(Command::new("true").spawn().unwrap_err().raw_os_error(), Some(libc::EPERM));
            for (what, call) in [("clone3", libc::SYS_clone3), ("cachestat", 451), ("a call of tomorrow", 1000)] {
                assert_eq!(refused_call(call, [0; 4]), Some(libc::ENOSYS), "{what}");
            }
            #[cfg(target_arch = "x86_64")]
            assert_eq!(refused_call(0x4000_0000 | libc::SYS_getpid, [0; 4]), Some(libc::ENOSYS), "x32");
        });
    }

    #[test]
    fn what_the_agent_does_is_not_refused_and_its_threads_are_inside_as_well() {
        in_a_sandbox("what_the_agent_does_is_not_refused_and_its_threads_are_inside_as_well", || {
            let inside = std::thread::spawn(|| {
                assert!(memfd_create("thread", MemfdFlags::CLOEXEC).is_err());
                std::fs::read_to_string("/proc/thread-self/status").unwrap()
            });
            let status = inside.join().unwrap();
            assert!(status.contains("Seccomp:\t2") && status.contains("NoNewPrivs:\t1"), "{status}");
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("line"), "line\n").unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                let to = listener.local_addr().unwrap();
                let (dialled, accepted) = tokio::join!(tokio::net::TcpStream::connect(to), listener.accept());
                dialled.unwrap().set_nodelay(true).unwrap();
                accepted.unwrap();
                crate::admin::bind(&folder.path().join("admin.sock")).unwrap();
                drop(tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()).unwrap());
                assert_eq!(tokio::task::spawn_blocking(|| 7).await.unwrap(), 7);
            });
            assert!(bunter_sys::compare_descriptors(std::process::id(), std::process::id()).unwrap().is_eq());
            let diagnostics = Some(rustix::net::netlink::SOCK_DIAG);
            rustix::net::socket(rustix::net::AddressFamily::NETLINK, rustix::net::SocketType::RAW, diagnostics)
                .unwrap();
            let matrix = crate::offload::selftest::run();
            assert!(!matrix.ciphers.is_empty());
        });
    }

    #[test]
    fn whether_it_holds_is_told_in_words() {
        assert_eq!(Sandbox::On.to_string(), "on");
        assert_eq!(Sandbox::Off { why: "no".into() }.to_string(), "off: no");
        let missing = seccompiler::Error::Seccomp(std::io::Error::from_raw_os_error(libc::EINVAL));
        assert!(explain(&missing).contains("CONFIG_SECCOMP_FILTER"));
    }
}
