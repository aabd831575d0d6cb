//! Starting a program somewhere: in a network namespace, a cgroup, as a user.
//!
//! `lab-app in ...` goes there and then becomes the program, so the process id that was started is the program's own
//! and nothing is run between fork and exec. `ip netns exec` would also do, but it mounts another /sys over the one
//! that the agent finds its cgroups and its pinned maps in.
//!
//! *Invariant:* a place that cannot be entered is an error; no program ever runs somewhere else instead.

use crate::skip::{self, Skip};
use anyhow::Context;
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where a program runs.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// Name under /run/netns; none: where the tests run.
    pub netns: Option<String>,
    /// Directory of the cgroup; none: the cgroup of the tests.
    pub cgroup: Option<PathBuf>,
    /// Numeric user and group; none: root.
    pub user: Option<(u32, u32)>,
    /// Limit of open files; none: as it is.
    pub files: Option<u64>,
    /// Numbers of the processors it may run on; none: as it is.
    pub processors: Option<Vec<usize>>,
}

/// A command that goes to the place and becomes the program; arguments can be added to it.
pub fn command(program: &Path, place: &Place) -> Result<Command, Skip> {
    let mut command = Command::new(skip::lab_app()?);
    command.arg("in");
    if let Some(netns) = &place.netns {
        command.arg(format!("--netns=/run/netns/{netns}"));
    }
    if let Some(cgroup) = &place.cgroup {
        command.arg(format!("--cgroup={}", cgroup.display()));
    }
    if let Some((user, group)) = place.user {
        command.arg(format!("--user={user}:{group}"));
    }
    if let Some(files) = place.files {
        command.arg(format!("--files={files}"));
    }
    if let Some(processors) = &place.processors {
        let numbers: Vec<String> = processors.iter().map(usize::to_string).collect();
        command.arg(format!("--processors={}", numbers.join(",")));
    }
    command.arg("--").arg(program);
    Ok(command)
}

/// The life of `lab-app in`: goes there, then becomes the program.
pub fn become_program(arguments: impl Iterator<Item = OsString>) -> crate::Result<()> {
    let mut arguments = arguments.peekable();
    let mut user = None;
    while let Some(argument) = arguments.next_if(|argument| argument != "--") {
        let text = argument.to_str().context("argument is not UTF-8")?;
        let (name, value) = text.split_once('=').context("want --name=value")?;
        match name {
            "--netns" => enter(Path::new(value))?,
            "--cgroup" => std::fs::write(Path::new(value).join("cgroup.procs"), "0")
                .with_context(|| format!("enter cgroup {value}"))?,
            "--user" => {
                let (uid, gid) = value.split_once(':').context("want --user=uid:gid")?;
                user = Some((uid.parse::<u32>()?, gid.parse::<u32>()?));
            }
            "--files" => {
                let limit = Some(value.parse()?);
                let limit = rustix::process::Rlimit { current: limit, maximum: limit };
                rustix::process::setrlimit(rustix::process::Resource::Nofile, limit)?;
            }
            "--processors" => {
                let mut set = rustix::thread::CpuSet::new();
                for number in value.split(',') {
                    set.set(number.parse()?);
                }
                rustix::thread::sched_setaffinity(None, &set).with_context(|| format!("run on processors {value}"))?;
            }
            other => anyhow::bail!("unknown argument {other}"),
        }
    }
    arguments.next();
    let program = arguments.next().context("no program")?;
    let mut command = Command::new(&program);
    command.args(arguments);
    if let Some((uid, gid)) = user {
        command.uid(uid).gid(gid);
    }
    Err(command.exec()).with_context(|| format!("become {}", program.display()))
}

/// Moves the calling thread into a network namespace.
pub fn enter(netns: &Path) -> crate::Result<()> {
    let file = std::fs::File::open(netns).with_context(|| format!("open {}", netns.display()))?;
    rustix::thread::move_into_link_name_space(file.as_fd(), Some(rustix::thread::LinkNameSpaceType::Network))
        .with_context(|| format!("enter {}", netns.display()))
}
