//! Evidence about a process that is gathered only as far as the policy asks for it.

use super::{AttestError, EntrySource, Facts};
use crate::policy::{Evidence, Workload};
use std::{
    cell::Cell,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Evidence that notes what it was asked for and did not have.
#[derive(Debug)]
pub(super) struct Gathered {
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub cgroup: Known<Arc<str>>,
    pub path: Known<PathBuf>,
    pub sha256: Known<[u8; 32]>,
    asked: Cell<Option<Need>>,
}

#[derive(Debug)]
pub(super) enum Known<T> {
    NotYet,
    Is(Option<T>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    Cgroup,
    Path,
    Sha256,
}

pub(super) enum Decision {
    /// It does not depend on anything that is not known.
    Final(Option<Workload>),
    Needs(Need),
}

impl Gathered {
    pub fn new(uid: Option<u32>, gid: Option<u32>, cgroup: Option<Arc<str>>) -> Self {
        let cgroup = cgroup.map_or(Known::NotYet, |cgroup| Known::Is(Some(cgroup)));
        Self { uid, gid, cgroup, path: Known::NotYet, sha256: Known::NotYet, asked: Cell::new(None) }
    }

    /// Asks the entries. An answer that depends on evidence that is not known yet is not final, even if it is that entries
    /// are ambiguous: one with more selectors may still win.
    pub fn decide(&self, entries: &dyn EntrySource, facts: &Facts) -> Result<Decision, AttestError> {
        self.asked.set(None);
        let answer = entries.workload(self);
        match self.asked.get() {
            Some(need) => Ok(Decision::Needs(need)),
            None => answer
                .map(Decision::Final)
                .map_err(|source| AttestError::Ambiguous { facts: Box::new(facts.clone()), source }),
        }
    }

    fn look<'a, T>(&self, known: &'a Known<T>, need: Need) -> Option<&'a T> {
        match known {
            Known::Is(value) => value.as_ref(),
            Known::NotYet => {
                self.asked.set(Some(need));
                None
            }
        }
    }
}

impl Evidence for Gathered {
    fn uid(&self) -> Option<u32> {
        self.uid
    }
    fn gid(&self) -> Option<u32> {
        self.gid
    }
    fn cgroup(&self) -> Option<&str> {
        self.look(&self.cgroup, Need::Cgroup).map(AsRef::as_ref)
    }
    fn path(&self) -> Option<&Path> {
        self.look(&self.path, Need::Path).map(AsRef::as_ref)
    }
    fn sha256(&self) -> Option<[u8; 32]> {
        self.look(&self.sha256, Need::Sha256).copied()
    }
}
