//! `bunter run`: a program in a cgroup of its own, so that a registration entry can name it by `cgroup:/bunter/NAME`.
//!
//! The program replaces this process, so signals, exit code and terminal are its own. Its cgroup stays until it is empty
//! and the next `bunter run` or `bunter release` removes it; `release` removes the cgroup above as well.

use anyhow::{Context, bail};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The cgroup under which the programs get theirs.
const PARENT: &str = "bunter";

/// Starts the program; returns only if that failed.
pub fn run(name: Option<&str>, command: &[OsString]) -> anyhow::Result<ExitCode> {
    let Some((program, arguments)) = command.split_first() else { bail!("no program given: bunter run -- CMD") };
    let name = match name {
        Some(name) => name.to_owned(),
        None => Path::new(program).file_name().unwrap_or(program).to_string_lossy().into_owned(),
    };
    if name.is_empty() || name.starts_with('.') || name.contains(|c: char| c == '/' || c.is_control()) {
        bail!("{name:?} cannot name a cgroup: use letters, digits, '-', '_' and '.', or give --name");
    }
    let cgroup = parent()?.join(&name);
    sweep();
    enter(&cgroup)
        .with_context(|| format!("cannot start a program in cgroup {}: bunter run needs root", cgroup.display()))?;
    let error = std::process::Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("cannot start {}", program.to_string_lossy()))
}

/// Removes the empty cgroups that earlier programs left behind.
pub fn sweep() {
    let Ok(entries) = parent().and_then(|parent| Ok(std::fs::read_dir(parent)?)) else {
        return;
    };
    for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
        // This fails for a cgroup that still holds a process, so nothing else has to be checked.
        let _ = std::fs::remove_dir(entry.path());
    }
}

/// Removes these, and the cgroup above them where nothing is left in it.
pub fn sweep_all() {
    sweep();
    if let Ok(parent) = parent() {
        // Fails where there is none, and while a program of `bunter run` lives.
        let _ = std::fs::remove_dir(parent);
    }
}

fn parent() -> anyhow::Result<PathBuf> {
    let mount = bunter_sys::mounts::cgroup2().context("cannot read /proc/self/mountinfo")?;
    Ok(mount.context("the whole cgroup2 hierarchy is mounted nowhere: mount it")?.join(PARENT))
}

fn enter(cgroup: &Path) -> std::io::Result<()> {
    // Between making and entering it, another sweep may remove an empty cgroup: try again then. Where its file was open
    // already, the kernel says that there is no such device (kernel/cgroup/cgroup.c, cgroup_kn_lock_live).
    for _ in 0..16 {
        match std::fs::create_dir_all(cgroup).and_then(|()| std::fs::write(cgroup.join("cgroup.procs"), "0")) {
            Err(error)
                if error.kind() == std::io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV) => {}
            outcome => return outcome,
        }
    }
    Err(std::io::ErrorKind::NotFound.into())
}
