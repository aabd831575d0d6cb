//! What a test needs, and how it says that it could not run.
//!
//! *Invariant:* a skipped test prints `SKIPPED (reason): name` past the test harness's own capture of output, so that
//! whoever runs the tests can count it. It is never silently green.

use std::io::Write;
use std::path::{Path, PathBuf};

/// Why a test cannot run here.
#[derive(Clone, Debug)]
pub struct Skip(pub String);

impl Skip {
    /// A reason.
    pub fn because(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }

    /// Says it.
    pub fn announce(&self, test: &str) {
        // Not by `println!`, which the test harness swallows for tests that pass.
        let line = format!("\nSKIPPED ({}): {test}\n", self.0);
        let _ = std::io::stdout().lock().write_all(line.as_bytes());
    }
}

/// Finds a program on PATH, and in the sbin directories that Debian leaves out of a user's.
pub fn find(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        let path = PathBuf::from(program);
        return path.is_file().then_some(path);
    }
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"])
        .map(|directory| Path::new(directory).join(program))
        .find(|candidate| candidate.is_file())
}

/// The program's path, or the reason why the test cannot run.
pub fn need(program: &str) -> Result<PathBuf, Skip> {
    find(program).ok_or_else(|| Skip::because(format!("no {program} on PATH")))
}

/// Network namespaces and cgroups need root.
pub fn need_root() -> Result<(), Skip> {
    if rustix::process::geteuid().is_root() { Ok(()) } else { Err(Skip::because("needs root")) }
}

/// What a test changes on the whole machine it may change in a guest only.
pub fn need_guest() -> Result<(), Skip> {
    if std::env::var_os("BUNTER_GUEST").is_some() {
        Ok(())
    } else {
        Err(Skip::because("changes the whole machine: in guests only"))
    }
}

/// What takes minutes runs only where a person names it.
pub fn by_name(word: &str) -> Result<(), Skip> {
    if std::env::args().skip(1).any(|argument| argument.contains(word)) {
        return Ok(());
    }
    Err(Skip::because(format!("takes minutes: by name only, cargo xtask test namespaces -- {word}")))
}

/// So many files may a program open that the tests start.
pub fn need_files(number: u64) -> Result<(), Skip> {
    match rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum {
        Some(most) if most < number => {
            Err(Skip::because(format!("needs {number} open files, and the limit here is {most}")))
        }
        _ => Ok(()),
    }
}

/// True where the tests run without Bunter, to test the lab and its oracle.
pub fn plain() -> bool {
    std::env::var("LAB_PLAIN").is_ok_and(|value| value == "1")
}

/// A file that lies next to the test binary, or one directory up, or where the environment says.
pub fn sibling(variable: &str, candidates: &[&str]) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        let path = PathBuf::from(path);
        // A test runs its programs from other directories than its own.
        return std::path::absolute(&path).ok().filter(|path| path.is_file());
    }
    let here = std::env::current_exe().ok()?;
    for candidate in candidates {
        for directory in here.ancestors().skip(1).take(4) {
            let path = directory.join(candidate);
            if path.is_file() {
                return Some(path);
            }
        }
    }
    None
}

/// `lab-app`: `LAB_APP`, or next to the test binary.
pub fn lab_app() -> Result<PathBuf, Skip> {
    sibling("LAB_APP", &["lab-app"])
        .ok_or_else(|| Skip::because("no lab-app next to the test binary and LAB_APP does not name one"))
}

/// The agent: `BUNTER_BIN`, else `release/bunter` or `debug/bunter` of the same target directory.
pub fn bunter() -> Result<PathBuf, Skip> {
    sibling("BUNTER_BIN", &["release/bunter", "debug/bunter", "bunter"])
        .ok_or_else(|| Skip::because("no bunter binary in the target directory and BUNTER_BIN does not name one"))
}
