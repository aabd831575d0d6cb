//! handshake: a `Permit` in, a `Session` out. TLS 1.3 with the workload's own SVID, both ends authenticated.
//!
//! rustls runs the handshake on records that are read exactly, one by one, so that what the peer sends behind its Finished
//! stays in the socket for the engine that carries the records. No resumption, no 0-RTT, no SNI; ALPN offers another agent
//! to use the connection more than once, and nothing else.
//! *Invariant:* a `Session` exists only for a peer that the permit admits, and no byte of an application passes here.

mod detect;
mod driver;
mod error;
mod secrets;
mod settings;
pub mod verify;

pub use detect::{looks_like_tls, received_any};
pub(crate) use error::alert_code;
pub use error::{Cause, Error, alert_name};
pub use secrets::{Aead, Secrets, Traffic};
pub use settings::Ciphers;

use crate::{authorize::Permit, credential::Credential, flow::Direction, policy::Rule};
use bunter_identity::trust::verify::{Role, VerifiedPeer};
use driver::{Finished, Machine, Opening};
use rustls::{client::UnbufferedClientConnection, pki_types::ServerName, server::UnbufferedServerConnection};
use std::{future::Future, sync::Arc};
use tokio::{
    net::TcpStream,
    time::{Instant, timeout_at},
};
use verify::PeerVerifier;

/// What a handshake needs to know besides the permit.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// When the handshake has to be over, as a whole.
    pub deadline: Instant,
    /// The cipher suites that the engine of this host can carry.
    pub ciphers: Ciphers,
    /// May the connection be used again, where the peer can do that too?
    pub reuse: bool,
}

/// What two ends agreed on: who they proved to be, and how the connection is protected. It stays with the connection.
#[derive(Debug)]
pub struct Agreement {
    /// The credential of this side.
    pub local: Arc<Credential>,
    /// The other side, and by which certificate.
    pub peer: VerifiedPeer,
    /// The key exchange group, as IANA writes it.
    pub group: &'static str,
    /// The cipher suite, as IANA writes it.
    pub cipher: &'static str,
    /// Both sides know how to use the connection more than once.
    pub reusable: bool,
    /// When they agreed.
    pub since: std::time::Instant,
}

/// A handshake that is over: who the peer is, what was agreed, and the secrets of the connection. An inbound flow has no
/// connection to the workload yet, because the workload hears only of peers that are admitted.
pub struct Accepted {
    permit: Permit,
    agreement: Arc<Agreement>,
    rule: Arc<Rule>,
    secrets: Secrets,
}

/// A handshake that is over, and both sockets of the flow.
pub struct Session {
    accepted: Accepted,
    /// The socket beside the flow's own: outbound, the one to the network; inbound, the one to the workload.
    other: TcpStream,
}

/// Shakes hands as the client, over `network`, which was dialled for the flow in `permit`. `credential`: that of the permit's
/// own workload.
pub async fn connect(
    permit: Permit,
    credential: Arc<Credential>,
    network: TcpStream,
    terms: Terms,
) -> Result<Session, Error> {
    let judge = judge(&permit, Role::Server);
    let outcome = async {
        let config = settings::client(&credential, judge.clone(), terms.ciphers, terms.reuse)?;
        // The address only fills a required argument: it is not sent (RFC 6066 section 3), and it names nobody (R48).
        let name = ServerName::IpAddress(permit.parties().flow.destination.0.ip().into());
        let machine = UnbufferedClientConnection::new(config, name).map_err(Cause::unready)?;
        driver::run(&network, Machine::Client(machine), Opening::default()).await
    };
    match in_time(&network, terms.deadline, outcome).await {
        Ok(finished) => Ok(Accepted::new(permit, credential, &judge, finished)?.joined(network)),
        Err(cause) => Err(Error::judged(cause, &judge, permit)),
    }
}

/// Shakes hands as the server, over the flow's own socket. A client without a certificate is refused. `credential`: that of
/// the permit's own workload.
pub async fn accept(permit: Permit, credential: Arc<Credential>, terms: Terms) -> Result<Accepted, Error> {
    let judge = judge(&permit, Role::Client);
    let outcome = async {
        let network = &permit.parties().flow.socket;
        let (opening, offers) = match terms.reuse {
            true => driver::hear_offer(network).await?,
            false => Default::default(),
        };
        let config = settings::server(&credential, judge.clone(), terms.ciphers, offers)?;
        let machine = UnbufferedServerConnection::new(config).map_err(Cause::unready)?;
        driver::run(network, Machine::Server(machine), opening).await
    };
    match in_time(&permit.parties().flow.socket, terms.deadline, outcome).await {
        Ok(finished) => Accepted::new(permit, credential, &judge, finished),
        Err(cause) => Err(Error::judged(cause, &judge, permit)),
    }
}

fn judge(permit: &Permit, role: Role) -> Arc<PeerVerifier> {
    PeerVerifier::new(role, permit.parties().trust.clone(), permit.peers().clone())
}

async fn in_time(
    network: &TcpStream,
    deadline: Instant,
    handshake: impl Future<Output = Result<Finished, Cause>>,
) -> Result<Finished, Cause> {
    // Each flight is one write; Nagle would hold the second flight back for an acknowledgement.
    network.set_nodelay(true).map_err(Cause::Network)?;
    match timeout_at(deadline, handshake).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Cause::Stalled),
    }
}

impl Accepted {
    fn new(permit: Permit, local: Arc<Credential>, judge: &PeerVerifier, finished: Finished) -> Result<Self, Error> {
        let Some(Ok(admitted)) = judge.verdict() else {
            return Err(Error::judged(Cause::Unjudged, judge, permit));
        };
        let (peer, rule) = (admitted.peer.clone(), admitted.rule.clone());
        let group = finished.group.and_then(|group| group.name().as_str()).unwrap_or("unknown");
        let cipher = settings::cipher_name(finished.secrets.suite());
        let agreement = Arc::new(Agreement {
            local,
            peer,
            group,
            cipher,
            reusable: finished.reusable,
            since: std::time::Instant::now(),
        });
        Ok(Self { permit, agreement, rule, secrets: finished.secrets })
    }

    /// The permit that the handshake was made under, with the flow's own socket.
    pub fn permit(&self) -> &Permit {
        &self.permit
    }
    /// What was agreed on.
    pub fn agreement(&self) -> &Arc<Agreement> {
        &self.agreement
    }
    /// Who is on the other end, by which certificate.
    pub fn peer(&self) -> &VerifiedPeer {
        &self.agreement.peer
    }
    /// The rule that admits the peer.
    pub fn rule(&self) -> &Arc<Rule> {
        &self.rule
    }
    /// The key exchange group, as IANA writes it.
    pub fn group(&self) -> &'static str {
        self.agreement.group
    }
    /// The cipher suite, as IANA writes it.
    pub fn cipher(&self) -> &'static str {
        self.agreement.cipher
    }
    /// Gives the handshake up, and returns the permit with the flow and its socket.
    pub fn into_permit(self) -> Permit {
        self.permit
    }
    /// Adds the other socket: outbound, the one to the network; inbound, the one to the workload.
    pub fn joined(self, other: TcpStream) -> Session {
        Session { accepted: self, other }
    }
}

impl Session {
    /// Who the peer is, and what was agreed.
    pub fn accepted(&self) -> &Accepted {
        &self.accepted
    }
    /// The socket on which the records go, and the secrets that protect them.
    pub(crate) fn network_and_secrets(&mut self) -> (&TcpStream, &mut Secrets) {
        let Accepted { permit, secrets, .. } = &mut self.accepted;
        let flow = &permit.parties().flow;
        let network = match flow.direction() {
            Direction::Outbound => &self.other,
            Direction::Inbound => &flow.socket,
        };
        (network, secrets)
    }
    /// Takes it apart, for `offload` alone: the permit with the flow's own socket, the other socket, and what was agreed on.
    pub(crate) fn into_parts(self) -> (Permit, TcpStream, Secrets, Arc<Agreement>) {
        let Accepted { permit, agreement, secrets, .. } = self.accepted;
        (permit, self.other, secrets, agreement)
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
