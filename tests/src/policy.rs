//! Policy files for tests, written piece by piece.
//!
//! *Invariant:* this is text and nothing more: what it means is for the agent to say.

use crate::world::Lab;
use std::fmt::{Display, Write};

/// Trust domain of the lab.
pub const DOMAIN: &str = "lab.test";

/// Port of the protected server in most tests.
pub const PORT: u16 = 8080;

/// The SPIFFE ID of this name in the lab's trust domain.
pub fn id(name: &str) -> String {
    format!("spiffe://{DOMAIN}/{name}")
}

/// Text of a policy file.
#[derive(Clone, Debug)]
pub struct Policy {
    text: String,
    cgroups: String,
}

impl Policy {
    /// Nothing but the trust domain: everything is denied.
    pub fn empty(lab: &Lab) -> Self {
        Self { text: format!("trust_domain = \"{DOMAIN}\"\n"), cgroups: lab.cgroup_path() }
    }

    /// A client and a server, both known by their cgroups; the server's port on beta is a mesh destination, and the
    /// client may connect to it.
    pub fn standard(lab: &Lab) -> Self {
        Self::without_rules(lab).allow("client-to-server", "client", "server")
    }

    /// The same, but nobody may connect to anything.
    pub fn without_rules(lab: &Lab) -> Self {
        Self::empty(lab).workload("client").workload("server").serve(lab, PORT)
    }

    /// A workload that is known by the cgroup of the same name.
    #[must_use]
    pub fn workload(self, name: &str) -> Self {
        let selector = format!("cgroup:{}/{name}", self.cgroups);
        self.workload_by(name, &[&selector])
    }

    /// A workload with these selectors.
    #[must_use]
    pub fn workload_by(self, name: &str, selectors: &[&str]) -> Self {
        let selectors: Vec<String> = selectors.iter().map(|selector| format!("\"{selector}\"")).collect();
        self.raw(&format!("[[workload]]\nid = \"{}\"\nselectors = [{}]\n", id(name), selectors.join(", ")))
    }

    /// The port of beta, on both addresses, as a destination that is `server`.
    #[must_use]
    pub fn serve(self, lab: &Lab, port: u16) -> Self {
        self.destination(lab.beta.at(port), "server").destination(lab.beta.at6(port), "server")
    }

    /// A mesh destination.
    #[must_use]
    pub fn destination(self, address: impl Display, name: &str) -> Self {
        self.raw(&format!("[[destination]]\naddress = \"{address}\"\nid = \"{}\"\n", id(name)))
    }

    /// An allow rule.
    #[must_use]
    pub fn allow(self, rule: &str, from: &str, to: &str) -> Self {
        self.raw(&format!("[[allow]]\nname = \"{rule}\"\nfrom = \"{}\"\nto = \"{}\"\n", id(from), id(to)))
    }

    /// A named plaintext bypass.
    #[must_use]
    pub fn bypass(self, rule: &str, from: &str, address: impl Display) -> Self {
        self.raw(&format!("[[bypass]]\nname = \"{rule}\"\nfrom = \"{}\"\naddress = \"{address}\"\n", id(from)))
    }

    /// A UDP rule.
    #[must_use]
    pub fn udp(self, rule: &str, from: &str, address: impl Display) -> Self {
        self.raw(&format!("[[udp]]\nname = \"{rule}\"\nfrom = \"{}\"\naddress = \"{address}\"\n", id(from)))
    }

    /// Any other text: a table after the tables so far.
    #[must_use]
    pub fn raw(mut self, text: &str) -> Self {
        let _ = write!(self.text, "\n{text}");
        self
    }

    /// A key of the top level, which has to stand before every table.
    #[must_use]
    pub fn top(mut self, line: &str) -> Self {
        self.text = format!("{line}\n{}", self.text);
        self
    }

    /// The file.
    pub fn text(&self) -> &str {
        &self.text
    }
}
