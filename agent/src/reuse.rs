//! reuse: a `Permit` and an idle connection between two agents in, a `Bound` stream out.
//!
//! A handshake costs several times what a connection costs otherwise. Between two agents a TLS connection therefore carries
//! one connection of the applications after the other, never two at a time (docs/SESSIONS.md). Each stream is authorised
//! like a new connection: what the handshake proved is checked against the present policy, trust and time.
//!
//! *Invariant:* a [`Bound`] exists only for a peer that the permit of this very stream admits and whose certificate is
//! still valid and believed, and only for the local workload that shook hands.

mod pool;

pub use pool::{Key, Pool, Spare};

use crate::authorize::Permit;
use crate::handshake::Agreement;
use crate::policy::Rule;
use crate::relay::{
    CloseReason, HalfClosed, IdleSession, Limits, Progress, SessionState, StartError, Stop, Tally, first_bytes,
};
use bunter_identity::refusal::{Culprit, Refusal};
use bunter_identity::spiffe::SpiffeId;
use bunter_identity::trust::x509::display_time;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::TcpStream;

/// Why a stream may not use a connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// No rule admits the peer any more.
    #[error("no rule lets {0} begin another connection")]
    NotPermitted(SpiffeId),
    /// The peer's certificate, or one above it, has been revoked since.
    #[error("the certificate of {0} has been revoked")]
    Revoked(SpiffeId),
    /// The peer's authority has left the trust bundle since.
    #[error("the authority of {0} has left the trust bundle")]
    Untrusted(SpiffeId),
    /// The peer's certificate has expired.
    #[error("the certificate of {0} expired at {1}")]
    Expired(SpiffeId, String),
    /// The connection was made for another workload of this host, or under a credential that has expired.
    #[error("the connection belongs to {0}, or that credential has expired")]
    NotOurs(SpiffeId),
    /// The peer did not answer in time.
    #[error("the peer did not say in time that its workload has accepted")]
    Late,
    /// The connection failed before the stream began.
    #[error("the connection ended before it was used again: {0}")]
    Closed(CloseReason),
    /// The connection failed, and nobody can say whether the workload was given the first bytes.
    #[error(
        "the peer was gone before it said that its workload has accepted, and may have given it the first bytes: {0}"
    )]
    Lost(CloseReason),
    /// The application is gone.
    #[error("the application's socket failed before its connection was made (error {0})")]
    Application(i32),
}

impl Unfit {
    /// Does this end the application's connection as well? Otherwise it can still be made in another way.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Lost(_) | Self::Application(_))
    }
}

impl Refusal for Unfit {
    fn culprit(&self) -> Culprit {
        match self {
            Self::NotPermitted(_) => Culprit::Policy,
            Self::Revoked(_)
            | Self::Untrusted(_)
            | Self::Expired(..)
            | Self::Late
            | Self::Closed(_)
            | Self::Lost(_) => Culprit::Peer,
            Self::NotOurs(_) | Self::Application(_) => Culprit::Host,
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Self::NotPermitted(_) => "peer-not-permitted",
            // The same codes as where a handshake is refused for these causes.
            Self::Revoked(_) => "peer-certificate-revoked",
            Self::Untrusted(_) => "peer-untrusted",
            Self::Expired(..) => "peer-certificate-expired",
            Self::NotOurs(_) => "session-not-ours",
            Self::Late => "session-late",
            Self::Closed(_) => "session-closed",
            Self::Lost(_) => "session-lost",
            // As the relay names it.
            Self::Application(libc::ECONNRESET | libc::EPIPE | libc::ECONNABORTED) => "app-reset",
            Self::Application(_) => "app-lost",
        }
    }
}

/// A stream that has begun: the bytes of its application may move.
pub struct Bound {
    application: TcpStream,
    /// First bytes of the application that are still to be sent.
    early: Vec<u8>,
    idle: IdleSession,
    rule: Arc<Rule>,
}

/// The client: begins a stream of `spare` for the application in the permit. Where that fails, the permit comes back with
/// the application's socket and first bytes, and the peer can be dialled as if there had been no spare connection, unless
/// the reason [is final](Unfit::is_final).
///
/// What the application has sent by now goes with `begin` where the server was heard of a moment ago. Otherwise it waits
/// for `ready`: the server may have been gone unnoticed for long, and bytes sent to it would cost the application its
/// connection.
pub async fn begin(
    mut permit: Permit,
    spare: Spare,
    now: SystemTime,
    patience: Duration,
) -> Result<Bound, Box<(Unfit, Permit)>> {
    let recent = spare.is_recent();
    let mut idle = spare.into_idle();
    let rule = match fit(&permit, idle.agreement(), now) {
        Ok(rule) => rule,
        Err(unfit) => {
            idle.close();
            return Err(Box::new((unfit, permit)));
        }
    };
    if recent && permit.early().is_empty() {
        let application = &permit.parties().flow.socket;
        let mut early = first_bytes(application);
        if early.as_ref().is_ok_and(Vec::is_empty) {
            // Most programs send something right after they have connected.
            tokio::task::yield_now().await;
            early = first_bytes(application);
        }
        match early {
            Ok(early) => *permit.early() = early,
            Err(error) => {
                idle.close();
                let number = error.raw_os_error().unwrap_or(libc::EIO);
                return Err(Box::new((Unfit::Application(number), permit)));
            }
        }
    }
    let along = if recent { std::mem::take(permit.early()) } else { Vec::new() };
    let unfit = match tokio::time::timeout(patience, idle.begin(&along)).await {
        Ok(Ok(())) => {
            let early = std::mem::take(permit.early());
            let application = permit.into_parties().flow.socket;
            return Ok(Bound { application, early, idle, rule });
        }
        Ok(Err(StartError { reason, lost: true })) => Unfit::Lost(reason),
        Ok(Err(StartError { reason, lost: false })) => Unfit::Closed(reason),
        Err(_) if along.is_empty() => Unfit::Late,
        Err(_) => Unfit::Lost(CloseReason::Stalled),
    };
    if !along.is_empty() {
        *permit.early() = along;
    }
    Err(Box::new((unfit, permit)))
}

/// The rule by which a stream of a connection was admitted.
pub struct Admission(Arc<Rule>);

/// The server: may the client have the stream that it has asked for? `agreement` is that of its connection.
pub fn admit(permit: &Permit, agreement: &Agreement, now: SystemTime) -> Result<Admission, Unfit> {
    fit(permit, agreement, now).map(Admission)
}

/// The server: its workload has accepted on `upstream`, and the client will be told. The permit holds the socket of
/// `shared`.
pub async fn ready(
    Admission(rule): Admission,
    permit: Permit,
    shared: SessionState,
    upstream: TcpStream,
) -> Result<Bound, Unfit> {
    let network = permit.into_parties().flow.socket;
    let idle = shared.ready(network).await.map_err(Unfit::Closed)?;
    Ok(Bound { application: upstream, early: Vec::new(), idle, rule })
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
        let revoked = parties.trust.revokes(&peer.id.trust_domain(), peer.path.certificates());
        return Err(if revoked { Unfit::Revoked(peer.id.clone()) } else { Unfit::Untrusted(peer.id.clone()) });
    }
    permit.rule(&peer.id).cloned().ok_or_else(|| Unfit::NotPermitted(peer.id.clone()))
}

impl Bound {
    /// The rule that admits the peer.
    pub fn rule(&self) -> &Arc<Rule> {
        &self.rule
    }
    /// The connection.
    pub fn idle(&self) -> &IdleSession {
        &self.idle
    }
    /// Carries the stream to its end.
    pub fn carry(
        self,
        limits: &Limits,
        stop: impl Future<Output = Stop>,
        progress: &Progress,
    ) -> impl Future<Output = (Tally, Option<HalfClosed>)> {
        self.idle.carry(self.application, self.early, limits, stop, progress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Direction;
    use crate::handshake::testing::{CURL, WEB, World, program, terms};
    use crate::handshake::{Ciphers, Terms};
    use std::time::Instant;

    #[tokio::test]
    async fn a_further_stream_needs_what_a_handshake_would() {
        let (world, elsewhere) = (World::new(), World::new());
        let sessions = world.sessions_by(Terms { reuse: true, ..terms(Ciphers::All) }).await;
        let agreement = sessions.client.accepted().agreement();
        let ask = async |world: &World, local: &str, peer: &str, now: SystemTime| {
            let (_application, own) = program().await;
            fit(&world.permit(Direction::Outbound, own, local, peer), agreement, now).map(|rule| rule.name.to_string())
        };
        let now = SystemTime::now();
        assert_eq!(ask(&world, CURL, WEB, now).await.unwrap(), "test");
        let code = |outcome: Result<String, Unfit>| outcome.unwrap_err().code();
        // The rule for this stream admits somebody else.
        assert_eq!(code(ask(&world, CURL, CURL, now).await), "peer-not-permitted");
        // Another workload of this host never gets it.
        assert_eq!(code(ask(&world, WEB, WEB, now).await), "session-not-ours");
        // Nobody believes the peer's authority any more.
        assert_eq!(code(ask(&elsewhere, CURL, WEB, now).await), "peer-untrusted");
        // The own credential ends after an hour, the peer's certificate later.
        let later = agreement.local.not_after;
        assert_eq!(code(ask(&world, CURL, WEB, later).await), "session-not-ours");
        let server = sessions.server.agreement();
        assert!(server.peer.not_after > later);
        // As a handshake says it.
        let revoking = world.revoking(WEB);
        assert_eq!(code(ask(&revoking, CURL, WEB, now).await), "peer-certificate-revoked");
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
