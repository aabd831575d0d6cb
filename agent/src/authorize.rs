//! authorize: `Parties` in, a `Permit` out.

use crate::{identify::Parties, policy::Peers};

/// Leave to shake hands with one of a set of peers.
#[derive(Debug)]
pub struct Permit {
    parties: Parties,
    peers: Peers,
}

impl Permit {
    /// The parties.
    pub fn parties(&self) -> &Parties {
        &self.parties
    }
    /// Who may be on the other end.
    pub fn peers(&self) -> &Peers {
        &self.peers
    }
    /// Takes it apart.
    pub fn into_parties(self) -> Parties {
        self.parties
    }
}

#[cfg(test)]
impl Permit {
    /// A permit that no policy gave, for the tests of the rooms behind this one.
    pub(crate) fn forged(parties: Parties, peers: Peers) -> Self {
        Self { parties, peers }
    }
}
