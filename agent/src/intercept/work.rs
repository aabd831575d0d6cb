//! The agent's work beside the connections, by name: where some of it fails, that is a state to report and does not end the
//! agent.

/// Something that may fail and is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    /// Telling the kernel programs what new cgroups are.
    Cgroups,
    /// Keeping the list of listening sockets.
    Listeners,
    /// Receiving events of the kernel programs.
    Events,
    /// Reading refusals that were counted and of which no event tells.
    Refusals,
    /// Finding and closing connections from before enrolment.
    OldConnections,
    /// Removing rows of sockets whose end no hook has seen.
    Tidying,
    /// Reading the counters.
    Counters,
}

impl Work {
    /// Stable name.
    pub fn code(self) -> &'static str {
        match self {
            Self::Cgroups => "cgroups",
            Self::Listeners => "listeners",
            Self::Events => "events",
            Self::Refusals => "refusals",
            Self::OldConnections => "connections-from-before",
            Self::Tidying => "tidying",
            Self::Counters => "counters",
        }
    }

    /// What it means for the host that this does not work.
    pub fn means(self) -> &'static str {
        match self {
            Self::Cgroups => {
                "programs in cgroups that the kernel programs do not know yet are treated as undecided: they are asked about \
                 or refused"
            }
            Self::Listeners => {
                "a listening socket that was not looked at keeps the mode it has, and an undecided one takes no plaintext"
            }
            Self::Events => "what the kernel programs tell is read late, or counted as lost",
            Self::Refusals => "refusals are counted in the kernel and not all of them are in the audit log yet",
            Self::OldConnections => "connections from before enrolment may be open that should be listed or closed",
            Self::Tidying => "rows of sockets that are gone keep their room in the kernel's tables",
            Self::Counters => "the counters below are missing or old, and lost events are not noticed",
        }
    }
}
