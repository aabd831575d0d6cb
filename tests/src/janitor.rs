//! Cleaning up, also after a test that was killed.
//!
//! A helper process of its own session (`lab-app janitor`) reads from a pipe what was made and what is gone again. When
//! the pipe closes, because the tests ended, panicked or were killed, it removes what is left, newest first.
//!
//! *Invariant:* nothing is removed that was not registered here by this run.

use crate::{clock, skip};
use std::collections::HashSet;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

/// Something to remove.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Item {
    /// A network namespace by name.
    Netns(String),
    /// A cgroup with everything below it, processes included.
    Cgroup(PathBuf),
    /// A directory tree.
    Directory(PathBuf),
    /// A mount point.
    Mount(PathBuf),
    /// What an agent pinned: namespace, program, configuration.
    Pins(String, PathBuf, PathBuf),
}

impl Item {
    fn line(&self) -> String {
        match self {
            Self::Netns(name) => format!("netns\t{name}"),
            Self::Cgroup(path) => format!("cgroup\t{}", path.display()),
            Self::Directory(path) => format!("directory\t{}", path.display()),
            Self::Mount(path) => format!("mount\t{}", path.display()),
            Self::Pins(netns, program, config) => {
                format!("pins\t{netns}\t{}\t{}", program.display(), config.display())
            }
        }
    }

    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split('\t');
        Some(match words.next()? {
            "netns" => Self::Netns(words.next()?.to_owned()),
            "cgroup" => Self::Cgroup(words.next()?.into()),
            "directory" => Self::Directory(words.next()?.into()),
            "mount" => Self::Mount(words.next()?.into()),
            "pins" => Self::Pins(words.next()?.to_owned(), words.next()?.into(), words.next()?.into()),
            _ => return None,
        })
    }

    /// Removes it. Errors are told and survived: the rest has to go too.
    pub fn remove(&self) {
        let outcome = match self {
            Self::Netns(name) => quietly(Command::new("ip").args(["netns", "del", name])),
            Self::Cgroup(path) => remove_cgroup(path),
            Self::Directory(path) => std::fs::remove_dir_all(path).map_err(|error| error.to_string()),
            Self::Mount(path) => {
                rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH).map_err(|error| error.to_string())
            }
            Self::Pins(netns, program, config) => crate::enter::command(
                program,
                &crate::enter::Place { netns: Some(netns.clone()), ..crate::enter::Place::default() },
            )
            .map_err(|skip| skip.0)
            .and_then(|mut command| quietly(command.arg("release").arg("--config").arg(config))),
        };
        if let Err(error) = outcome {
            eprintln!("lab: cannot remove {self:?}: {error}");
        }
    }
}

/// A registered item, removed when dropped.
#[derive(Debug)]
pub struct Kept(Item);

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.remove();
        tell('-', &self.0);
    }
}

/// Registers an item before it is made. It is removed when the guard is dropped, or by the janitor after the run.
pub fn keep(item: Item) -> Kept {
    tell('+', &item);
    Kept(item)
}

static JANITOR: OnceLock<Option<Mutex<Child>>> = OnceLock::new();

fn tell(sign: char, item: &Item) {
    let janitor = JANITOR.get_or_init(|| {
        let program = skip::lab_app().ok()?;
        let mut command = Command::new(program);
        command.arg("janitor").stdin(Stdio::piped()).stdout(Stdio::null());
        match command.spawn() {
            Ok(child) => Some(Mutex::new(child)),
            Err(error) => {
                eprintln!("lab: no janitor: {error}");
                None
            }
        }
    });
    if let Some(janitor) = janitor
        && let Ok(mut child) = janitor.lock()
        && let Some(pipe) = &mut child.stdin
        && let Err(error) = pipe.write_all(format!("{sign}{}\n", item.line()).as_bytes())
    {
        eprintln!("lab: the janitor is gone: {error}");
    }
}

/// The janitor's life: `lab-app janitor`.
pub fn serve() -> crate::Result<()> {
    // A session of its own: Ctrl-C on the terminal is for the tests, and what follows is for this process.
    let _ = rustix::process::setsid();
    let mut order: Vec<Item> = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let Some(item) = line.get(1..).and_then(Item::parse) else { continue };
        if line.starts_with('+') {
            order.push(item);
        } else {
            order.retain(|kept| *kept != item);
        }
    }
    // Processes first: a running agent does not let its pinned programs be released.
    order.sort_by_key(|item| matches!(item, Item::Cgroup(_)));
    let mut seen = HashSet::new();
    for item in order.iter().rev() {
        if seen.insert(item.clone()) {
            item.remove();
        }
    }
    Ok(())
}

fn quietly(command: &mut Command) -> Result<(), String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()))
    }
}

/// Processes in a cgroup and below it.
pub fn processes(cgroup: &Path) -> Vec<rustix::process::Pid> {
    let mut found = Vec::new();
    if let Ok(text) = std::fs::read_to_string(cgroup.join("cgroup.procs")) {
        found.extend(text.lines().filter_map(|line| line.parse().ok().and_then(rustix::process::Pid::from_raw)));
    }
    for child in subdirectories(cgroup) {
        found.extend(processes(&child));
    }
    found
}

fn subdirectories(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(path) else { return Vec::new() };
    entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

fn remove_cgroup(path: &Path) -> Result<(), String> {
    let empty = clock::until(clock::seconds(5), || {
        for pid in processes(path) {
            // A process that ended meanwhile is what was wanted.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(1));
        processes(path).is_empty().then_some(())
    });
    if empty.is_none() {
        return Err(format!("processes {:?} do not end", processes(path)));
    }
    // The directory stays busy until the kernel has let the last task go.
    clock::until(clock::seconds(5), || remove_tree(path).ok()).ok_or_else(|| "the cgroup stays busy".to_owned())
}

fn remove_tree(path: &Path) -> std::io::Result<()> {
    for child in subdirectories(path) {
        remove_tree(&child)?;
    }
    match std::fs::remove_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
