//! What a host needs before anything can be built or run, and how it gets it.
//!
//! Every verb names what it needs; what is there already costs a look, no more. Tools that are built from source land
//! in a cache folder whose name holds their version, so another checkout and the next run find them.
//!
//! *Invariant:* nothing that a person set up before is changed: no default toolchain, no running service, no file
//! outside the cache and Debian's own packages. A BPF file system is mounted where the host has none.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{During, Failure, Fallible, is_root, merged, on_exit, quiet, step, which};

/// The one Rust toolchain. A `rust-toolchain.toml` at the root would do the same, but it would also stop the cargo that
/// starts xtask wherever rustup may not install by itself.
pub const TOOLCHAIN: &str = "1.98.0";
/// Links BPF objects; must be linked to the LLVM that the toolchain has.
pub const BPF_LINKER: &str = "0.13.0";
/// The LLVM of [`TOOLCHAIN`], as Debian's packages number it.
pub const LLVM: &str = "22";
/// Checks licences, sources, bans and advisories.
pub const CARGO_DENY: &str = "0.20.2";

/// What a verb can need.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The toolchain.
    Toolchain,
    /// Debian packages and the BPF linker.
    Build,
    /// cargo-deny.
    Check,
    /// Programs for the network namespaces, and the BPF file system.
    Lab,
    /// Peers, other load generators and what draws plots.
    Bench,
    /// QEMU and what fills a guest.
    Vm,
}

const BUILD_PACKAGES: &[&str] =
    &["gcc", "g++", "libc6-dev", "make", "llvm-22-dev", "libpolly-22-dev", "zlib1g-dev", "libzstd-dev", "libxml2-dev"];
const LAB_PACKAGES: &[&str] = &[
    "iproute2",
    "tcpdump",
    "nginx-light",
    "libnginx-mod-stream",
    "redis-server",
    "redis-tools",
    "curl",
    "openssl",
    "util-linux",
];
const BENCH_PACKAGES: &[&str] =
    &["haproxy", "stunnel4", "nftables", "wireguard-tools", "iperf3", "wrk", "librsvg2-bin", "python3", "python3-pip"];
const VM_PACKAGES: &[&str] =
    &["qemu-system-x86", "busybox-static", "dash", "kmod", "xz-utils", "binutils", "apt", "dpkg"];

/// Packages whose services Debian would start, and enable, on installation.
const SERVICES: &[(&str, &str)] = &[
    ("nginx-light", "nginx.service"),
    ("redis-server", "redis-server.service"),
    ("haproxy", "haproxy.service"),
    ("stunnel4", "stunnel4.service"),
];

/// Brings what is missing; the error names each missing piece with the command that brings it.
pub fn ensure(needs: &[Need]) -> Fallible {
    let mut missing = Vec::new();
    for need in needs {
        let brought = match need {
            Need::Toolchain => toolchain(),
            Need::Build => packages(BUILD_PACKAGES).and_then(|()| bpf_linker()),
            Need::Check => cargo_deny(),
            Need::Lab => {
                let mounted = bpf_file_system();
                packages(LAB_PACKAGES).and(mounted)
            }
            Need::Bench => packages(BENCH_PACKAGES),
            Need::Vm => packages(VM_PACKAGES),
        };
        if let Err(failure) = brought {
            missing.push(failure.to_string());
        }
    }
    if missing.is_empty() { Ok(()) } else { Err(format!("set-up is not complete:\n{}", missing.join("\n")).into()) }
}

/// Where tools and kernels are kept, shared by all checkouts of a user.
pub fn cache(name: &str) -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache");
    let path = base.unwrap_or_else(home).join("bunter").join(name);
    let _ = fs::create_dir_all(&path);
    path
}

/// Cargo of the pinned toolchain, with the tools of the cache first on PATH; standard error joins standard output.
pub fn cargo(args: &[&str]) -> Command {
    let mut command = merged("cargo");
    command.args(args).current_dir(crate::run::root());
    pin(&mut command);
    command
}

/// Makes a command use the pinned toolchain and the tools of the cache.
pub fn pin(command: &mut Command) {
    let mut path = vec![bpf_linker_dir().join("bin"), cargo_deny_dir().join("bin")];
    if let Some(old) = std::env::var_os("PATH") {
        path.extend(std::env::split_paths(&old));
    }
    if let Ok(path) = std::env::join_paths(path) {
        command.env("PATH", path);
    }
    // What cargo told xtask about xtask must not reach another cargo.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name == "CARGO" || name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name.as_ref());
        }
    }
    if which("rustup").is_some() {
        command.env("RUSTUP_TOOLCHAIN", TOOLCHAIN);
    }
}

/// The pinned toolchain with its parts, by rustup or as the `rustc` on PATH.
fn toolchain() -> Fallible {
    let missing = toolchain_parts_missing();
    if missing.is_empty() {
        return Ok(());
    }
    let install = [
        "toolchain",
        "install",
        TOOLCHAIN,
        "--profile",
        "minimal",
        "--component",
        "rust-src",
        "--component",
        "rustfmt",
        "--component",
        "clippy",
    ];
    let mut why = String::from("rustup is not here");
    if which("rustup").is_some() {
        let mut command = merged("rustup");
        command.args(install);
        match step(format!("Rust {TOOLCHAIN}")).run(command) {
            Ok(()) if toolchain_parts_missing().is_empty() => return Ok(()),
            Ok(()) => why = format!("rustup ended well, but {} is missing", toolchain_parts_missing().join(", ")),
            Err(failure) => why = failure.to_string(),
        }
    }
    Err(format!(
        "Rust {TOOLCHAIN}: missing {}: {why}\n\
         \x20 either   rustup {}   (rustup: https://rustup.rs)\n\
         \x20 or       put a Rust {TOOLCHAIN} or newer with rust-src, rustfmt and clippy first on PATH, without rustup\n\
         \x20 Debian's rustc-web and rust-web-src are too old while they are 1.96: aya 0.16 asks for 1.98. Once \
         `apt-cache policy rustc-web` shows 1.98 or newer, this works too:\n\
         \x20          apt-get install rustc-web cargo-web rust-web-src rustfmt-web rust-web-clippy",
        missing.join(", "),
        install.join(" "),
    )
    .into())
}

fn toolchain_parts_missing() -> Vec<&'static str> {
    let ask = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        command.args(args);
        pin(&mut command);
        let output = command.output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let new_enough = ask("rustc", &["--version"]).is_some_and(|line| {
        let version = line.split(' ').nth(1).unwrap_or_default();
        at_least(version, TOOLCHAIN)
    });
    if !new_enough {
        return vec!["rustc", "cargo", "rust-src", "rustfmt", "clippy"];
    }
    let sysroot = ask("rustc", &["--print", "sysroot"]).unwrap_or_default();
    let mut missing = Vec::new();
    if !Path::new(&sysroot).join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file() {
        missing.push("rust-src");
    }
    if ask("rustfmt", &["--version"]).is_none() {
        missing.push("rustfmt");
    }
    if ask("cargo-clippy", &["--version"]).is_none() {
        missing.push("clippy");
    }
    missing
}

/// Whether a dotted version is the wanted one or newer.
fn at_least(version: &str, wanted: &str) -> bool {
    let numbers =
        |text: &str| -> Vec<u32> { text.split(['.', '-', '+']).map_while(|part| part.parse().ok()).collect() };
    numbers(version) >= numbers(wanted)
}

/// Which of these Debian packages are not installed.
pub fn packages_missing(wanted: &[&'static str]) -> Vec<&'static str> {
    // dpkg-query fails when it does not know one of them, and still lists the others.
    let output = Command::new("dpkg-query").args(["-W", "-f=${Package} ${db:Status-Status}\n"]).args(wanted).output();
    let listed = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    wanted.iter().copied().filter(|name| !listed.lines().any(|line| line == format!("{name} installed"))).collect()
}

fn packages(wanted: &[&'static str]) -> Fallible {
    let missing = packages_missing(wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let by_hand = format!("apt-get install -y --no-install-recommends {}", missing.join(" "));
    if which("apt-get").is_none() {
        return Err(format!("Debian packages {} (or what they are called here)", missing.join(", ")).into());
    }
    if !is_root() {
        return Err(format!("Debian packages, as root:  {by_hand}").into());
    }
    let advice = |failure: Failure| Failure::from(format!("{failure}\n  Debian packages, by hand:  {by_hand}"));
    let mut update = merged("apt-get");
    update.arg("update");
    step("apt-get update").run(update).map_err(advice)?;
    let _no_starts = no_service_starts()?;
    let mut install = merged("apt-get");
    install.env("DEBIAN_FRONTEND", "noninteractive");
    install.args(["install", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"]).args(&missing);
    step(format!("Debian packages: {}", missing.join(" "))).run(install).map_err(advice)?;
    for (package, service) in SERVICES {
        if missing.contains(package) && Path::new("/run/systemd/system").is_dir() {
            // The program is wanted, its service is not: what a boot starts stays what it was.
            let _ = quiet("systemctl", &["disable", service]);
        }
    }
    Ok(())
}

/// Debian starts a service when its package is installed unless this file says no. What was there stays.
fn no_service_starts() -> Fallible<Option<crate::run::Cleanup>> {
    let path = Path::new("/usr/sbin/policy-rc.d");
    if path.exists() {
        return Ok(None);
    }
    let undo = on_exit(move || {
        let _ = fs::remove_file(path);
    });
    fs::write(path, "#!/bin/sh\nexit 101\n").during("cannot write /usr/sbin/policy-rc.d")?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(path, mode).during("cannot make /usr/sbin/policy-rc.d executable")?;
    Ok(Some(undo))
}

/// The BPF file system, where process 1 sees it. The agent mounts none, because what is pinned in a mount of its own would go
/// with it; systemd mounts it at boot, and a host with another first process has none.
fn bpf_file_system() -> Fallible {
    // What process 1 has is for root alone to read; without root the agent does not run anyhow.
    if fs::read("/proc/1/mountinfo").is_err() || has_bpf_file_system() {
        return Ok(());
    }
    const MOUNT: &str = "mount -t bpf -o nosuid,nodev,noexec,mode=0700 bpf /sys/fs/bpf";
    if !is_root() {
        return Err(format!("the BPF file system, as root:  {MOUNT}").into());
    }
    let mut mount = merged("mount");
    mount.args(MOUNT.split(' ').skip(1));
    step(MOUNT).run(mount)?;
    if has_bpf_file_system() {
        return Ok(());
    }
    // It would hide that of the host, once there is one.
    let _ = quiet("umount", &["/sys/fs/bpf"]);
    Err(format!("the BPF file system, on the host and not in this container:  {MOUNT}").into())
}

/// Does process 1 have it where the agent looks for it?
fn has_bpf_file_system() -> bool {
    quiet("findmnt", &["--task", "1", "--types", "bpf", "--mountpoint", "/sys/fs/bpf"]).is_some()
}

fn bpf_linker_dir() -> PathBuf {
    cache("tools").join(format!("bpf-linker-{BPF_LINKER}-llvm{LLVM}"))
}

fn bpf_linker() -> Fallible {
    if bpf_linker_dir().join("bin/bpf-linker").is_file() || fitting_linker_on_path() {
        return Ok(());
    }
    let mut command = cargo(&[
        "install",
        "bpf-linker",
        "--version",
        BPF_LINKER,
        "--locked",
        "--no-default-features",
        "--features",
        &format!("llvm-{LLVM}"),
    ]);
    // The linker's build script and the bindings that it uses look for LLVM under different names.
    for name in ["LLVM_PREFIX".to_owned(), format!("LLVM_SYS_{LLVM}1_PREFIX")] {
        command.env(name, format!("/usr/lib/llvm-{LLVM}"));
    }
    install_tool(&format!("bpf-linker {BPF_LINKER} with LLVM {LLVM}"), command, &bpf_linker_dir())
}

/// A linker that the person has already, of the same version and linked to the same LLVM.
fn fitting_linker_on_path() -> bool {
    let Some(file) = which("bpf-linker") else { return false };
    let file = file.to_string_lossy();
    let version = quiet(&file, &["--version"]).unwrap_or_default();
    let libraries = quiet("ldd", &[&file]).unwrap_or_default();
    version.trim() == format!("bpf-linker {BPF_LINKER}") && libraries.contains(&format!("libLLVM.so.{LLVM}"))
}

fn cargo_deny_dir() -> PathBuf {
    cache("tools").join(format!("cargo-deny-{CARGO_DENY}"))
}

fn cargo_deny() -> Fallible {
    if cargo_deny_dir().join("bin/cargo-deny").is_file() {
        return Ok(());
    }
    let command = cargo(&["install", "cargo-deny", "--version", CARGO_DENY, "--locked"]);
    install_tool(&format!("cargo-deny {CARGO_DENY}"), command, &cargo_deny_dir())
}

/// Builds a tool beside its place and moves it there when it is whole.
fn install_tool(label: &str, mut command: Command, place: &Path) -> Fallible {
    let partial = PathBuf::from(format!("{}.partial.{}", place.display(), std::process::id()));
    let scratch = partial.join("target");
    let remove = partial.clone();
    let _undo = on_exit(move || {
        let _ = fs::remove_dir_all(&remove);
    });
    command.arg("--root").arg(&partial).env("CARGO_TARGET_DIR", &scratch);
    // The tools run for a second or two (LLVM, which does the linker's work, is compiled already): a fast program is not
    // worth minutes of optimising.
    command.envs([
        ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0"),
        ("CARGO_PROFILE_RELEASE_LTO", "off"),
        ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16"),
    ]);
    // Away from the checkout, so that its configuration does not reach the tool's build.
    command.current_dir("/");
    step(label).run(command)?;
    fs::create_dir_all(place).during(format!("cannot create {}", place.display()))?;
    let built = partial.join("bin");
    let _ = fs::remove_dir_all(place.join("bin"));
    fs::rename(&built, place.join("bin")).during(format!("cannot move {} into its place", built.display()))
}

#[cfg(test)]
mod tests {
    use super::at_least;

    #[test]
    fn versions_compare_by_number_and_not_by_letter() {
        assert!(at_least("1.98.0", "1.98.0"));
        assert!(at_least("1.100.0", "1.98.0"));
        assert!(at_least("2.0.0-nightly", "1.98.0"));
        assert!(!at_least("1.96.0", "1.98.0"));
        assert!(!at_least("", "1.98.0"));
    }
}
