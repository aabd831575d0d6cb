//! reuse: a `Permit` and an idle connection between two agents in, a `Bound` one out.
//!
//! A handshake costs several times what a connection costs otherwise. Between two agents a TLS connection therefore
//! carries one connection of the applications after the other, never two at a time (docs/SESSIONS.md). Each use is
//! authorised like a new connection: what the handshake proved is held against the policy, the trust and the time of now.
//!
//! *Invariant:* a [`Bound`] exists only for a peer that the permit of this very use admits, whose certificate is still
//! valid and believed, and for the same local workload that shook hands.

mod pool;

pub use pool::{Key, Pool};

use crate::authorize::Permit;
use crate::handshake::Agreement;
use crate::identify::x509::display_time;
use crate::policy::Rule;
use crate::refusal::{Culprit, Refusal};
use crate::relay::{CloseReason, Idle, Left, Limits, Progress, Shared, Stop, Tally};
use crate::spiffe::SpiffeId;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::TcpStream;

/// Why a use is not let onto a connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// No rule admits the peer any more.
    #[error("no rule lets {0} begin another connection")]
    NotPermitted(SpiffeId),
    /// Its certificate is revoked, or its authority is not trusted any more.
    #[error("{0} is no longer believed: its certificate is revoked, or its authority has left the trust bundle")]
    NotBelieved(SpiffeId),
    /// Its certificate is over.
    #[error("the certificate of {0} expired at {1}")]
    Expired(SpiffeId, String),
    /// The connection was made for another workload of this host, or under a credential that is over.
    #[error("the connection belongs to {0}, or that credential is over")]
    NotOurs(SpiffeId),
    /// The peer did not answer in time.
    #[error("the peer did not say in time that its workload has accepted")]
    Late,
    /// The connection failed before the use began.
    #[error("the connection ended before it was used again: {0}")]
    Closed(CloseReason),
}

impl Refusal for Unfit {
    fn culprit(&self) -> Culprit {
        match self {
            Self::NotPermitted(_) => Culprit::Policy,
            Self::NotBelieved(_) | Self::Expired(..) | Self::Late | Self::Closed(_) => Culprit::Peer,
            Self::NotOurs(_) => Culprit::Host,
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Self::NotPermitted(_) => "peer-not-permitted",
            Self::NotBelieved(_) => "peer-revoked",
            Self::Expired(..) => "peer-certificate-expired",
            Self::NotOurs(_) => "session-not-ours",
            Self::Late => "session-late",
            Self::Closed(_) => "session-closed",
        }
    }
}

/// A use that has begun: the bytes of its application may move.
pub struct Bound {
    application: TcpStream,
    idle: Idle,
    rule: Arc<Rule>,
}

/// The client: begins a use of `idle` for the application in the permit. Where that does not come about, both ends of the
/// application are as they were, and it can be dialled for as if there had been no idle connection.
pub async fn begin(
    permit: Permit,
    mut idle: Idle,
    now: SystemTime,
    patience: Duration,
) -> Result<Bound, Box<(Unfit, Permit)>> {
    let rule = match fit(&permit, idle.agreement(), now) {
        Ok(rule) => rule,
        Err(unfit) => {
            idle.close();
            return Err(Box::new((unfit, permit)));
        }
    };
    let Ok(begun) = tokio::time::timeout(patience, idle.begin()).await else {
        return Err(Box::new((Unfit::Late, permit)));
    };
    let prepared = begun.and_then(|()| {
        let socket = &permit.parties().flow.socket;
        crate::offload::prepare(socket)
            .map_err(|error| CloseReason::ApplicationLost(error.raw_os_error().unwrap_or(libc::EIO)))
    });
    match prepared {
        Ok(()) => Ok(Bound { application: permit.into_parties().flow.socket, idle, rule }),
        Err(reason) => Err(Box::new((Unfit::Closed(reason), permit))),
    }
}

/// The server: may the client of `shared` have what it has asked for? The permit's flow has the socket.
pub fn admit(permit: &Permit, shared: &Shared, now: SystemTime) -> Result<Arc<Rule>, Unfit> {
    fit(permit, shared.agreement(), now)
}

/// The server: tells the client that its workload has accepted. `permit` holds the socket of `shared`.
pub async fn ready(permit: Permit, shared: Shared, leg: TcpStream, now: SystemTime) -> Result<Bound, Unfit> {
    let rule = fit(&permit, shared.agreement(), now)?;
    let network = permit.into_parties().flow.socket;
    let prepared = crate::offload::prepare(&leg);
    prepared.map_err(|error| Unfit::Closed(CloseReason::ApplicationLost(error.raw_os_error().unwrap_or(libc::EIO))))?;
    let idle = shared.ready(network).await.map_err(Unfit::Closed)?;
    Ok(Bound { application: leg, idle, rule })
}

fn fit(permit: &Permit, agreement: &Agreement, now: SystemTime) -> Result<Arc<Rule>, Unfit> {
    let (parties, peer) = (permit.parties(), &agreement.peer);
    if agreement.local.id != parties.workload.id || !agreement.local.is_valid(now) {
        return Err(Unfit::NotOurs(agreement.local.id.clone()));
    }
    if now >= peer.not_after {
        return Err(Unfit::Expired(peer.id.clone(), display_time(peer.not_after)));
    }
    if !parties.trust.still_believes(&peer.id.trust_domain(), &peer.path) {
        return Err(Unfit::NotBelieved(peer.id.clone()));
    }
    permit.rule(&peer.id).cloned().ok_or_else(|| Unfit::NotPermitted(peer.id.clone()))
}

impl Bound {
    /// The rule that admits the peer.
    pub fn rule(&self) -> &Arc<Rule> {
        &self.rule
    }
    /// The connection.
    pub fn idle(&self) -> &Idle {
        &self.idle
    }
    /// Carries the use to its end.
    pub fn carry(
        self,
        limits: &Limits,
        stop: impl Future<Output = Stop>,
        progress: &Progress,
    ) -> impl Future<Output = (Tally, Option<Left>)> {
        self.idle.carry(self.application, limits, stop, progress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handshake::testing::{CURL, WEB, World, pair, terms};
    use crate::handshake::{Ciphers, Terms};
    use crate::intercept::Direction;
    use std::time::Instant;

    #[tokio::test]
    async fn a_further_use_needs_what_a_handshake_would() {
        let (world, elsewhere) = (World::new(), World::new());
        let sessions = world.sessions_by(Terms { reuse: true, ..terms(Ciphers::All) }).await;
        let agreement = sessions.client.agreement();
        let ask = async |world: &World, local: &str, peer: &str, now: SystemTime| {
            let (_application, own) = pair().await;
            fit(&world.permit(Direction::Outbound, own, local, peer), agreement, now).map(|rule| rule.name.to_string())
        };
        let now = SystemTime::now();
        assert_eq!(ask(&world, CURL, WEB, now).await.unwrap(), "test");
        let code = |outcome: Result<String, Unfit>| outcome.unwrap_err().code();
        // The rule of this very connection admits somebody else.
        assert_eq!(code(ask(&world, CURL, CURL, now).await), "peer-not-permitted");
        // Another workload of this host never gets it.
        assert_eq!(code(ask(&world, WEB, WEB, now).await), "session-not-ours");
        // Nobody believes the peer's authority any more.
        assert_eq!(code(ask(&elsewhere, CURL, WEB, now).await), "peer-revoked");
        // The own credential ends after an hour, the peer's certificate later.
        let later = agreement.local.not_after;
        assert_eq!(code(ask(&world, CURL, WEB, later).await), "session-not-ours");
        let server = sessions.server.agreement();
        assert!(server.peer.not_after > later);
    }

    #[test]
    fn a_session_ends_by_age_and_by_number() {
        let limits = crate::config::Sessions { uses: 3, age: Duration::from_secs(60), ..Default::default() };
        let now = Instant::now();
        assert!(limits.allows(now, 2) && !limits.allows(now, 3));
        let Some(old) = now.checked_sub(Duration::from_secs(61)) else { return };
        assert!(!limits.allows(old, 1));
        assert!(!crate::config::Sessions { reuse: false, ..limits }.allows(now, 1));
    }
}
