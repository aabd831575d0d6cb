//! authorize: `Parties` in, a `Permit` out.
//!
//! Asks the policy whether the local workload may have this connection at all, and with whom. It runs before the
//! handshake: the peers of the [`Permit`] are the only ones that the handshake will speak to.
//!
//! *Invariant:* no clock, no I/O, no await. A `Permit` can be made here and nowhere else, and only out of `Parties`.

use crate::{
    flow::Direction,
    identify::Parties,
    policy::{Outbound, Peers, Policy, Rule},
};
use bunter_identity::{
    refusal::{Culprit, Refusal},
    spiffe::SpiffeId,
};
use std::{net::SocketAddr, sync::Arc, time::Duration};

/// How the policy allows a connection.
#[derive(Debug)]
#[must_use = "a connection that is not carried out leaves no record"]
pub enum Authorized {
    /// By mutual TLS, with one of the permit's peers.
    Mesh(Permit),
    /// Outbound in plaintext, by a named `[[bypass]]`. The kernel lets such connections pass, and the agent carries none.
    Bypass(Bypass),
}

/// Permission to shake hands with one of a set of peers.
///
/// It comes from [`authorize`] and goes on by value:
///
/// ```
/// # use bunter::{authorize::{Authorized, Permit, authorize}, identify::Parties, policy::Policy};
/// # fn handshake(_: Permit) {}
/// fn walk(policy: &Policy, parties: Parties) {
///     if let Ok(Authorized::Mesh(permit)) = authorize(policy, parties) {
///         handshake(permit)
///     }
/// }
/// ```
///
/// It cannot be forged:
///
/// ```compile_fail,E0451
/// # use bunter::{authorize::Permit, identify::Parties, policy::Peers};
/// fn forge(parties: Parties, peers: Peers) -> Permit {
///     Permit { parties, peers, permissive: None, early: Vec::new() }
/// }
/// ```
///
/// and it cannot be left out:
///
/// ```compile_fail,E0308
/// # use bunter::{authorize::Permit, identify::Parties};
/// # fn handshake(_: Permit) {}
/// fn skip(parties: Parties) {
///     handshake(parties)
/// }
/// ```
#[derive(Debug)]
pub struct Permit {
    parties: Parties,
    peers: Peers,
    permissive: Option<Arc<Rule>>,
    /// The application's first bytes, where they have been taken off its socket already.
    early: Vec<u8>,
}

/// A connection to an address that the policy lets the workload reach in plaintext, by a named rule. It can be made by
/// [`authorize`] alone.
#[derive(Debug)]
pub struct Bypass {
    parties: Parties,
    rule: Arc<Rule>,
}

/// No rule allows this connection.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Denied {
    /// The connection that was refused, for its audit record.
    pub parties: Box<Parties>,
    /// Why.
    pub reason: Reason,
}

/// Why there is no permit, and which rule would give one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The address is a mesh destination, and this workload may not reach it.
    #[error(
        "no rule lets {from} reach {to} at {address}: \
         it would be [[allow]] from = \"{from}\" to = \"{to}\" ports = [{}]", .address.port()
    )]
    NotAllowed {
        /// The local workload.
        from: SpiffeId,
        /// Who would have to answer.
        to: SpiffeId,
        /// What was dialled.
        address: SocketAddr,
    },
    /// Nothing in the policy says who is at that address.
    #[error(
        "{address} is no destination of {from}: \
         it would be [[destination]] address = \"{address}\" with the server's id, and an [[allow]] rule; \
         or, in plaintext, a [[bypass]] from = \"{from}\" address = \"{address}\""
    )]
    NoDestination {
        /// The local workload.
        from: SpiffeId,
        /// What was dialled.
        address: SocketAddr,
    },
    /// Nobody may connect to this listener.
    #[error(
        "no rule lets anybody reach {to} on port {port}: \
         it would be [[allow]] from = \"...\" to = \"{to}\" ports = [{port}]"
    )]
    NobodyAllowed {
        /// The local workload.
        to: SpiffeId,
        /// Port of its listener.
        port: u16,
    },
}

/// Is this connection allowed, and with whom?
pub fn authorize(policy: &Policy, parties: Parties) -> Result<Authorized, Denied> {
    let address = parties.flow.destination.0;
    let decision = match parties.flow.direction() {
        Direction::Outbound => outbound(policy, &parties.workload.id, address),
        Direction::Inbound => inbound(policy, &parties.workload.id, address.port()),
    };
    match decision {
        Ok(Leave::Mesh { peers, permissive }) => {
            Ok(Authorized::Mesh(Permit { parties, peers, permissive, early: Vec::new() }))
        }
        Ok(Leave::Bypass(rule)) => Ok(Authorized::Bypass(Bypass { parties, rule })),
        Err(reason) => Err(Denied { parties: Box::new(parties), reason }),
    }
}

/// Is this connection, allowed before, still allowed? For connections that are open when the policy changes. `peer` is who
/// was authenticated at the other end, if anybody was.
pub fn still_allowed(
    policy: &Policy,
    direction: Direction,
    local: &SpiffeId,
    address: SocketAddr,
    peer: Option<&SpiffeId>,
) -> Result<Arc<Rule>, Reason> {
    let leave = match direction {
        Direction::Outbound => outbound(policy, local, address)?,
        Direction::Inbound => inbound(policy, local, address.port())?,
    };
    let rule = match (leave, peer) {
        (Leave::Mesh { peers, .. }, Some(peer)) => peers.admits(peer).cloned(),
        (Leave::Mesh { permissive, .. }, None) => permissive,
        (Leave::Bypass(rule), None) => Some(rule),
        // The connection was allowed by mutual TLS. That the policy now allows plaintext there does not allow this peer.
        (Leave::Bypass(_), Some(_)) => None,
    };
    rule.ok_or_else(|| match (direction, peer) {
        (Direction::Outbound, _) => denied_outbound(policy, local, address),
        (Direction::Inbound, Some(peer)) => Reason::NotAllowed { from: peer.clone(), to: local.clone(), address },
        (Direction::Inbound, None) => Reason::NobodyAllowed { to: local.clone(), port: address.port() },
    })
}

enum Leave {
    Mesh { peers: Peers, permissive: Option<Arc<Rule>> },
    Bypass(Arc<Rule>),
}

fn outbound(policy: &Policy, from: &SpiffeId, address: SocketAddr) -> Result<Leave, Reason> {
    match policy.outbound(from, address) {
        Outbound::Mesh { peers } if !peers.is_empty() => Ok(Leave::Mesh { peers, permissive: None }),
        Outbound::Bypass(rule) => Ok(Leave::Bypass(rule)),
        Outbound::Mesh { .. } | Outbound::Deny => Err(denied_outbound(policy, from, address)),
    }
}

fn denied_outbound(policy: &Policy, from: &SpiffeId, address: SocketAddr) -> Reason {
    match policy.expected(address) {
        Some(to) => Reason::NotAllowed { from: from.clone(), to: to.clone(), address },
        None => Reason::NoDestination { from: from.clone(), address },
    }
}

fn inbound(policy: &Policy, to: &SpiffeId, port: u16) -> Result<Leave, Reason> {
    let inbound = policy.inbound(to, port);
    if inbound.is_closed() {
        return Err(Reason::NobodyAllowed { to: to.clone(), port });
    }
    Ok(Leave::Mesh { peers: inbound.peers, permissive: inbound.permissive })
}

impl Permit {
    /// The parties.
    pub fn parties(&self) -> &Parties {
        &self.parties
    }

    /// The application's first bytes, as far as they have been taken off its socket.
    pub(crate) fn early(&mut self) -> &mut Vec<u8> {
        &mut self.early
    }

    /// Who may be on the other end.
    pub fn peers(&self) -> &Peers {
        &self.peers
    }

    /// Inbound: the rule by which plaintext is accepted too, if there is one. The record of a plaintext connection says
    /// that nobody was authenticated.
    pub fn permissive(&self) -> Option<&Arc<Rule>> {
        self.permissive.as_ref()
    }

    /// The rule that admits this peer, if one does.
    pub fn rule(&self, peer: &SpiffeId) -> Option<&Arc<Rule>> {
        self.peers.admits(peer)
    }

    /// How long a connection with this peer may be silent.
    pub fn idle_timeout(&self, peer: &SpiffeId) -> Option<Duration> {
        self.rule(peer)?.idle_timeout
    }

    /// Takes it apart.
    pub fn into_parties(self) -> Parties {
        self.parties
    }
}

impl Bypass {
    /// The parties.
    pub fn parties(&self) -> &Parties {
        &self.parties
    }

    /// The `[[bypass]]` rule.
    pub fn rule(&self) -> &Arc<Rule> {
        &self.rule
    }

    /// Takes it apart.
    pub fn into_parts(self) -> (Parties, Arc<Rule>) {
        (self.parties, self.rule)
    }
}

impl Refusal for Denied {
    fn culprit(&self) -> Culprit {
        self.reason.culprit()
    }
    fn code(&self) -> &'static str {
        self.reason.code()
    }
}

impl Refusal for Reason {
    fn culprit(&self) -> Culprit {
        Culprit::Policy
    }
    fn code(&self) -> &'static str {
        match self {
            Self::NotAllowed { .. } => "not-allowed",
            Self::NoDestination { .. } => "no-destination",
            Self::NobodyAllowed { .. } => "nobody-allowed",
        }
    }
}

#[cfg(test)]
impl Permit {
    /// A permit that no policy gave, for the tests of the stages behind this one.
    pub(crate) fn forged(parties: Parties, peers: Peers) -> Self {
        Self { parties, peers, permissive: None, early: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        attest::Facts,
        policy::{Accounts, Source, Workload},
    };

    const POLICY: &str = r#"
        trust_domain = "td"
        [[destination]]
        address = "10.0.0.2:80"
        id = "spiffe://td/web"
        [[allow]]
        name = "curl-to-web"
        from = "spiffe://td/curl"
        to = "spiffe://td/web"
        ports = [80]
        idle_timeout = "5m"
        [[inbound]]
        name = "moving"
        id = "spiffe://td/old"
        mode = "permissive"
        [[bypass]]
        name = "dns"
        from = "spiffe://td/curl"
        address = "10.0.0.53:53"
    "#;

    fn policy() -> Policy {
        let source = Source { file: "p.toml".into(), text: POLICY.into() };
        Policy::parse("policies", &[source], &Accounts::default()).unwrap()
    }

    fn id(path: &str) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://td/{path}")).unwrap()
    }

    /// What arrives from `identify`, with a real but unconnected socket.
    fn parties(direction: Direction, workload: &str, destination: &str) -> Parties {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let _context = runtime.enter();
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        let socket = tokio::net::TcpStream::from_std(std::net::TcpStream::from(socket)).unwrap();
        Parties {
            flow: crate::flow::testing::flow(direction, socket, destination.parse().unwrap(), None),
            workload: Workload { number: 1, id: id(workload) },
            trust: Arc::default(),
            facts: Facts { pid: 1, uid: 0, gid: 0, comm: "test".into(), executable: None, cgroup: None, note: None },
        }
    }

    fn ask(direction: Direction, workload: &str, destination: &str) -> Result<Authorized, Denied> {
        authorize(&policy(), parties(direction, workload, destination))
    }

    #[test]
    fn an_allowed_destination_gives_a_permit_for_the_one_expected_peer() {
        let Ok(Authorized::Mesh(permit)) = ask(Direction::Outbound, "curl", "10.0.0.2:80") else { panic!("no permit") };
        assert_eq!(permit.peers().0.len(), 1);
        assert_eq!(&*permit.rule(&id("web")).unwrap().name, "curl-to-web");
        assert_eq!(permit.idle_timeout(&id("web")), Some(Duration::from_secs(300)));
        assert!(permit.rule(&id("curl")).is_none() && permit.idle_timeout(&id("other")).is_none());
        assert!(permit.permissive().is_none());
        assert_eq!(permit.parties().workload.id, id("curl"));
        assert_eq!(permit.into_parties().flow.id, 1);
    }

    #[test]
    fn a_named_bypass_is_told_apart_from_the_mesh() {
        let Ok(Authorized::Bypass(bypass)) = ask(Direction::Outbound, "curl", "10.0.0.53:53") else {
            panic!("no bypass")
        };
        assert_eq!(&*bypass.rule().name, "dns");
        assert_eq!(bypass.parties().workload.id, id("curl"));
        assert_eq!(bypass.into_parts().0.flow.id, 1);
    }

    #[test]
    fn an_inbound_permit_names_the_clients_of_the_port() {
        let Ok(Authorized::Mesh(permit)) = ask(Direction::Inbound, "web", "10.0.0.2:80") else { panic!("no permit") };
        assert!(
            permit.rule(&id("curl")).is_some() && permit.rule(&id("web")).is_none() && permit.permissive().is_none()
        );
    }

    #[test]
    fn a_permissive_listener_says_by_which_rule() {
        let Ok(Authorized::Mesh(permit)) = ask(Direction::Inbound, "old", "10.0.0.2:81") else { panic!("no permit") };
        assert!(permit.peers().is_empty());
        assert_eq!(&*permit.permissive().unwrap().name, "moving");
    }

    #[test]
    fn a_denial_names_the_rule_that_would_be_needed_and_keeps_the_parties() {
        for (direction, workload, destination, code, expected) in [
            (
                Direction::Outbound,
                "web",
                "10.0.0.2:80",
                "not-allowed",
                "no rule lets spiffe://td/web reach spiffe://td/web at 10.0.0.2:80: \
                 it would be [[allow]] from = \"spiffe://td/web\" to = \"spiffe://td/web\" ports = [80]",
            ),
            (
                Direction::Outbound,
                "curl",
                "10.0.0.2:81",
                "no-destination",
                "10.0.0.2:81 is no destination of spiffe://td/curl: it would be [[destination]] address = \"10.0.0.2:81\" \
                 with the server's id, and an [[allow]] rule; \
                 or, in plaintext, a [[bypass]] from = \"spiffe://td/curl\" address = \"10.0.0.2:81\"",
            ),
            (
                Direction::Inbound,
                "web",
                "10.0.0.2:81",
                "nobody-allowed",
                "no rule lets anybody reach spiffe://td/web on port 81: \
                 it would be [[allow]] from = \"...\" to = \"spiffe://td/web\" ports = [81]",
            ),
        ] {
            let denied = ask(direction, workload, destination).unwrap_err();
            assert_eq!(denied.to_string(), expected);
            assert_eq!((denied.code(), denied.culprit()), (code, Culprit::Policy));
            assert_eq!(denied.parties.workload.id, id(workload));
        }
    }

    #[test]
    fn a_living_connection_is_judged_by_the_policy_of_now() {
        let policy = policy();
        let check = |direction, local: &str, address: &str, peer: Option<&str>| {
            still_allowed(&policy, direction, &id(local), address.parse().unwrap(), peer.map(id).as_ref())
                .map(|rule| rule.name.to_string())
                .map_err(|reason| reason.code())
        };
        let (out, inn) = (Direction::Outbound, Direction::Inbound);
        assert_eq!(check(out, "curl", "10.0.0.2:80", Some("web")).as_deref(), Ok("curl-to-web"));
        assert_eq!(check(out, "curl", "10.0.0.2:80", Some("other")), Err("not-allowed"));
        assert_eq!(check(out, "curl", "10.0.0.2:80", None), Err("not-allowed"));
        assert_eq!(check(out, "curl", "10.0.0.53:53", None).as_deref(), Ok("dns"));
        assert_eq!(check(out, "curl", "10.0.0.53:53", Some("web")), Err("no-destination"));
        assert_eq!(check(inn, "web", "10.0.0.2:80", Some("curl")).as_deref(), Ok("curl-to-web"));
        assert_eq!(check(inn, "web", "10.0.0.2:80", Some("other")), Err("not-allowed"));
        assert_eq!(check(inn, "web", "10.0.0.2:80", None), Err("nobody-allowed"));
        assert_eq!(check(inn, "old", "10.0.0.2:80", None).as_deref(), Ok("moving"));
    }
}
