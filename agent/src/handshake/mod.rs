//! handshake: a `Permit` in, a `Session` out. TLS 1.3 with the workload's own SVID, both ends authenticated.
//!
//! rustls runs the handshake on records that are read one by one, exactly, so that what the peer sends behind its
//! Finished stays in the socket for whoever carries the records then. No resumption, no 0-RTT, no SNI, no ALPN.
//! *Invariant:* a `Session` exists only for a peer that the permit admits, and no byte of an application passes here.

mod detect;
mod driver;
mod error;
mod secrets;
mod settings;
pub mod verify;

pub use detect::{looks_like_tls, speaks};
pub(crate) use error::alert_code;
pub use error::{Cause, Error, alert_name};
pub use secrets::{Aead, Secrets, Traffic};
pub use settings::Ciphers;

use crate::{authorize::Permit, policy::Rule};
use driver::{Finished, Machine};
use rustls::{client::UnbufferedClientConnection, pki_types::ServerName, server::UnbufferedServerConnection};
use std::sync::Arc;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout_at},
};
use verify::{PeerVerifier, Role, VerifiedPeer};

/// What a handshake needs to know besides the permit.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// When the handshake has to be over, as a whole.
    pub deadline: Instant,
    /// The cipher suites that the engine of this host can carry.
    pub ciphers: Ciphers,
}

/// A shaken hand: who the peer is, what was agreed, and the secrets of the connection.
pub struct Session {
    permit: Permit,
    /// Outbound: the connection that was dialled. Inbound: the network is the flow's own socket.
    dialled: Option<TcpStream>,
    peer: VerifiedPeer,
    rule: Arc<Rule>,
    group: &'static str,
    cipher: &'static str,
    secrets: Secrets,
}

/// Shakes hands as the client, over `network`, which was dialled for the flow in `permit`.
pub async fn connect(permit: Permit, network: TcpStream, terms: Terms) -> Result<Session, Error> {
    let judge = judge(&permit, Role::Server);
    let outcome = async {
        let config = settings::client(&permit.parties().credential, judge.clone(), terms.ciphers)?;
        // The address only fills a required argument: it is not sent (RFC 6066 section 3), and it names nobody (R48).
        let name = ServerName::IpAddress(permit.parties().flow.destination.0.ip().into());
        let machine = UnbufferedClientConnection::new(config, name).map_err(Cause::unready)?;
        shake(&network, Machine::Client(machine), terms.deadline).await
    };
    match outcome.await {
        Ok(finished) => Session::new(permit, Some(network), &judge, finished),
        Err(cause) => Err(Error::judged(cause, &judge, permit)),
    }
}

/// Shakes hands as the server, over the flow's own socket. A client without a certificate is refused.
pub async fn accept(permit: Permit, terms: Terms) -> Result<Session, Error> {
    let judge = judge(&permit, Role::Client);
    let outcome = async {
        let config = settings::server(&permit.parties().credential, judge.clone(), terms.ciphers)?;
        let machine = UnbufferedServerConnection::new(config).map_err(Cause::unready)?;
        shake(&permit.parties().flow.socket, Machine::Server(machine), terms.deadline).await
    };
    match outcome.await {
        Ok(finished) => Session::new(permit, None, &judge, finished),
        Err(cause) => Err(Error::judged(cause, &judge, permit)),
    }
}

fn judge(permit: &Permit, role: Role) -> Arc<PeerVerifier> {
    PeerVerifier::new(role, permit.parties().trust.clone(), permit.peers().clone())
}

async fn shake(network: &TcpStream, machine: Machine, deadline: Instant) -> Result<Finished, Cause> {
    // Each flight is one write; Nagle would hold the second flight back for an acknowledgement.
    network.set_nodelay(true).map_err(Cause::Network)?;
    match timeout_at(deadline, driver::run(network, machine)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Cause::Stalled),
    }
}

impl Session {
    fn new(
        permit: Permit,
        dialled: Option<TcpStream>,
        judge: &PeerVerifier,
        finished: Finished,
    ) -> Result<Self, Error> {
        let Some(Ok(admitted)) = judge.verdict() else {
            return Err(Error::judged(Cause::Unjudged, judge, permit));
        };
        let (peer, rule) = (admitted.peer.clone(), admitted.rule.clone());
        let group = finished.group.and_then(|group| group.name().as_str()).unwrap_or("unknown");
        let cipher = settings::cipher_name(finished.secrets.suite());
        Ok(Self { permit, dialled, peer, rule, group, cipher, secrets: finished.secrets })
    }

    /// The permit that it was made under, with the flow's own socket.
    pub fn permit(&self) -> &Permit {
        &self.permit
    }
    /// Who is on the other end, by which certificate.
    pub fn peer(&self) -> &VerifiedPeer {
        &self.peer
    }
    /// The rule that admits the peer.
    pub fn rule(&self) -> &Arc<Rule> {
        &self.rule
    }
    /// The key exchange group, as IANA writes it.
    pub fn group(&self) -> &'static str {
        self.group
    }
    /// The cipher suite, as IANA writes it.
    pub fn cipher(&self) -> &'static str {
        self.cipher
    }
    /// Gives it up: the flow and its socket are what is left.
    pub fn into_permit(self) -> Permit {
        self.permit
    }
    /// Takes it apart, for `offload` alone.
    pub(crate) fn into_parts(self) -> (Permit, Option<TcpStream>, Secrets) {
        (self.permit, self.dialled, self.secrets)
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
