//! What is known of a process, in words for people.

use crate::{flow::Comm, policy::Workload};
use std::{fmt, path::PathBuf, sync::Arc};

/// What was found out about a process, for the audit line and for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its number in the initial pid namespace.
    pub pid: u32,
    /// Real user id.
    pub uid: u32,
    /// Real group id.
    pub gid: u32,
    /// What it calls itself; it proves nothing.
    pub comm: Comm,
    /// Its executable, as far as it was looked at.
    pub executable: Option<PathBuf>,
    /// Its cgroup's path from the root of the unified hierarchy.
    pub cgroup: Option<Arc<str>>,
    /// Why something could not be attested.
    pub note: Option<String>,
}

/// A process, and the entry that it is, if any.
#[derive(Clone, Debug)]
pub struct Attested {
    /// The entry.
    pub workload: Option<Workload>,
    /// The process.
    pub facts: Facts,
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.pid)?;
        if !self.comm.is_empty() {
            // Escaped: the name may hold anything, control characters included.
            write!(f, " ({})", self.comm.to_string().escape_debug())?;
        }
        write!(f, ", uid {}, gid {}", self.uid, self.gid)?;
        if let Some(executable) = &self.executable {
            write!(f, ", executable {executable:?}")?;
        }
        if let Some(cgroup) = &self.cgroup {
            write!(f, ", cgroup {cgroup:?}")?;
        }
        match &self.note {
            Some(note) => write!(f, " ({note})"),
            None => Ok(()),
        }
    }
}
