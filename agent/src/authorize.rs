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
