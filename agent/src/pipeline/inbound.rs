//! A peer dials a protected listener of this host: it proves who it is, and then the workload hears of it.
//!
//! *Invariant:* who is not admitted cannot even make the workload accept.

use super::attempt::Attempt;
use super::{Carriage, Error, Made, Pipeline};
use crate::admission::ConnectionSlot;
use crate::audit::Method;
use crate::authorize::Permit;
use crate::flow::Flow;
use crate::handshake;
use crate::handshake_slots::Tenant;
use crate::identify::Parties;
use crate::intercept::Opening;
use crate::live::Basis;
use crate::offload::{self, Pipe};
use crate::policy::{Rule, Workload};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long a permissive listener waits for a client's first byte before it takes the silence for a plaintext protocol in
/// which the server speaks first.
const SILENCE: Duration = Duration::from_millis(300);

/// How long, and for how many bytes, a refused peer is listened to so that it hears why.
const LINGER: Duration = Duration::from_millis(500);
const LINGER_BYTES: u64 = 64 * 1024;

/// How often an upstream connection is tried again, each time to those who listen by then.
const UPSTREAM_ATTEMPTS: usize = 3;

impl<'a> Pipeline<'a> {
    pub(super) async fn inbound(
        &self,
        mut attempt: Attempt<'a>,
        permit: Permit,
        place: &mut ConnectionSlot,
    ) -> Option<Made<'a>> {
        if let Some(rule) = permit.permissive().cloned() {
            // Where the socket cannot be read, the handshake will fail on it and say why.
            if !handshake::looks_like_tls(&permit.parties().flow.socket, SILENCE).await.unwrap_or(true) {
                let parties = permit.into_parties();
                match self.shared.admission.permitted(place) {
                    Ok(proven) => *place = proven,
                    Err(full) => {
                        attempt.refuse(parties.flow.socket, &Error::TooMany(full));
                        return None;
                    }
                }
                return self.plaintext(attempt, parties, rule).await;
            }
        }
        let session = {
            let credential = match self.shared.identities.credential(&permit.parties().workload).await {
                Ok(credential) => credential,
                Err(error) => {
                    attempt.refuse(permit.into_parties().flow.socket, &Error::Credential(error));
                    return None;
                }
            };
            let terms = self.terms(self.shared.engine, self.shared.config.sessions.reuse);
            // A peer that has sent nothing yet takes no slot.
            let spoke = handshake::received_any(&permit.parties().flow.socket, terms.deadline).await;
            let tenant = Tenant::peer(place.holders(), &permit.parties().workload.id);
            let slot = match spoke {
                true => match self.shared.handshake_slots.take(tenant, terms.deadline).await {
                    Ok(slot) => Some(slot),
                    Err(error) => {
                        attempt.refuse(permit.into_parties().flow.socket, &Error::HandshakeSlot(error));
                        return None;
                    }
                },
                false => None,
            };
            let outcome = handshake::accept(permit, credential, terms).await;
            drop(slot);
            match outcome {
                Ok(session) => session,
                Err(error) => {
                    let (error, permit) = attempt.failed(error);
                    attempt.refuse(None, &error);
                    linger(permit.into_parties().flow.socket).await;
                    return None;
                }
            }
        };
        let (basis, rule) = (attempt.agreed(session.agreement(), 1), session.rule().clone());
        match self.shared.admission.inbound(session.agreement().peer.id.clone()) {
            Ok(proven) => *place = proven,
            Err(full) => {
                attempt.refuse(session.into_permit().into_parties().flow.socket, &Error::TooMany(full));
                return None;
            }
        }
        // Only now does the workload hear of the peer: one that is not admitted cannot even make the workload accept.
        let upstream = match self.upstream(session.permit().parties(), Opening::NoData).await {
            Ok(upstream) => upstream,
            Err(error) => {
                attempt.refuse(session.into_permit().into_parties().flow.socket, &error);
                return None;
            }
        };
        match offload::arm(session.joined(upstream), self.shared.engine) {
            Ok(pipe) => Some(Made { attempt, carriage: Carriage::Pipe(pipe), basis, rule: Some(rule), origin: None }),
            Err(error) => {
                attempt.refuse(None, &Error::Offload(error));
                None
            }
        }
    }

    /// A connection from the network that is carried without TLS, by a permissive rule.
    async fn plaintext(&self, mut attempt: Attempt<'a>, parties: Parties, rule: Arc<Rule>) -> Option<Made<'a>> {
        let upstream = match self.upstream(&parties, Opening::NoData).await {
            Ok(upstream) => upstream,
            Err(error) => {
                attempt.refuse(parties.flow.socket, &error);
                return None;
            }
        };
        let Parties { flow, workload, .. } = parties;
        attempt.method = Method::Plaintext;
        match Pipe::plain(upstream, flow.socket) {
            Ok(pipe) => {
                let (carriage, basis) = (Carriage::Pipe(pipe), Basis::Plaintext { local: workload.id });
                Some(Made { attempt, carriage, basis, rule: Some(rule), origin: None })
            }
            Err(error) => {
                attempt.refuse(None, &Error::Offload(error));
                None
            }
        }
    }

    /// Connects to those who were found to listen. Where they refuse, it is looked up who listens now, and whether they are
    /// the same workload.
    pub(super) async fn upstream(&self, parties: &Parties, opening: Opening) -> Result<TcpStream, Error> {
        let Parties { flow, workload, .. } = parties;
        let connected = async {
            let (mut listeners, mut left) = (flow.listens().map_or(0, |listens| listens.who), UPSTREAM_ATTEMPTS);
            loop {
                let outcome = self.site.dialler.upstream(flow.destination, flow.source, listeners, opening).await;
                let refused = outcome.as_ref().is_err_and(|error| error.is_refused());
                let others = match refused && left > 0 {
                    true => Box::pin(self.others(flow, workload, listeners)).await?,
                    false => None,
                };
                let Some(others) = others else { return outcome.map_err(Error::Intercept) };
                (listeners, left) = (others, left - 1);
            }
        };
        match tokio::time::timeout(self.shared.config.timeouts.dial, connected).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::UpstreamTimeout { to: flow.destination.0, within: self.shared.config.timeouts.dial }),
        }
    }

    /// Others who listen now, if they are the same workload.
    async fn others(&self, flow: &Flow, workload: &Workload, before: u64) -> Result<Option<u64>, Error> {
        let Ok(now) = self.site.dialler.look(flow.destination, true) else { return Ok(None) };
        if now.who == before || now.cookie == 0 {
            return Ok(None);
        }
        match self.shared.identities.is_still(workload, &now, &*self.policy).await {
            Ok(()) => Ok(Some(now.who)),
            // Gone again.
            Err(error) if error.is_passing() => Ok(None),
            Err(error) => Err(Error::Identify(error)),
        }
    }
}

/// Closes a connection on which an alert was just sent so that the alert arrives: closing with unread bytes would send a
/// reset, which overtakes it (RFC 1122 section 4.2.2.13). Bounded in bytes and time.
async fn linger(mut socket: TcpStream) {
    let read = async {
        socket.shutdown().await?;
        tokio::io::copy(&mut socket.take(LINGER_BYTES), &mut tokio::io::sink()).await
    };
    // What the peer has not heard by then it will not hear.
    let _ = tokio::time::timeout(LINGER, read).await;
}
