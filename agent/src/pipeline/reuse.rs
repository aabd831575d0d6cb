//! A connection from another agent that has served one client waits for the next.
//!
//! *Invariant:* who listens, who may connect and who the peer is are checked for each stream as for a new connection.

use super::{AgentState, Carriage, Error, Made, Pipeline, Site, attempt::reject_stray, enter};
use crate::admission::ConnectionSlot;
use crate::flow::{Direction, OriginalDst};
use crate::intercept::Opening;
use crate::relay::{HalfClosed, IdleSession};
use crate::reuse;
use std::net::SocketAddr;
use std::time::SystemTime;

/// How much longer than the client the server keeps an unused connection, so that it is the client who closes it.
const SERVER_PATIENCE: u32 = 2;

/// Waits for the next stream of a connection, and prepares it to be carried: who listens, who may connect and who the peer
/// is are checked as for a new connection. A refusal ends the connection; the peer may make a new one and hear the reason
/// there.
pub(super) async fn next_stream<'a>(
    shared: &'a AgentState,
    site: &'a Site,
    left: Option<HalfClosed>,
    (source, destination): (SocketAddr, OriginalDst),
) -> Option<(ConnectionSlot, Made<'a>)> {
    let mut idle = drained(left).await?;
    if !is_asked(shared, site, &mut idle).await {
        idle.close();
        return None;
    }
    let (network, session) = idle.into_parts();
    let agreement = session.agreement().clone();
    let flow = match site.dialler.inbound(network, source, destination) {
        Ok(flow) => flow,
        Err(error) => {
            reject_stray(shared, Direction::Inbound, &error);
            return None;
        }
    };
    let peer = agreement.peer.id.clone();
    let (place, mut attempt, flow) = enter(shared, flow, |admission, _| admission.inbound(peer))?;
    attempt.session = Some(Box::new(session));
    let pipeline = Pipeline::new(shared, site);
    let (mut attempt, permit) = pipeline.admit(attempt, flow).await?;
    let basis = attempt.agreed(&agreement, attempt.session.as_ref().map_or(0, |session| session.streams()));
    let admission = match reuse::admit(&permit, &agreement, SystemTime::now()) {
        Ok(admission) => admission,
        Err(unfit) => {
            attempt.refuse(permit.into_parties().flow.socket, &Error::Reuse(unfit));
            return None;
        }
    };
    let opening = match &attempt.session {
        Some(session) if session.has_early_data() => Opening::EarlyData,
        _ => Opening::NoData,
    };
    let upstream = match pipeline.upstream(permit.parties(), opening).await {
        Ok(upstream) => upstream,
        Err(error) => {
            attempt.refuse(permit.into_parties().flow.socket, &error);
            return None;
        }
    };
    let session = attempt.session.take()?;
    match reuse::ready(admission, permit, *session, upstream).await {
        Ok(bound) => {
            let rule = Some(bound.rule().clone());
            Some((place, Made { attempt, carriage: Carriage::Bound(bound), basis, rule, origin: None }))
        }
        Err(unfit) => {
            attempt.refuse(None, &Error::Reuse(unfit));
            None
        }
    }
}

/// Waits for the client to begin a stream. False: the client has closed the connection, or this side has to.
async fn is_asked(shared: &AgentState, site: &Site, idle: &mut IdleSession) -> bool {
    let sessions = &shared.config.sessions;
    let (mut changed, mut closing) = (shared.changed.subscribe(), site.closing.clone());
    let Some(_place) = shared.registry.wait(shared.config.limits.connections) else { return false };
    if *closing.borrow() || !sessions.allows(idle.agreement().since, idle.streams()) {
        return false;
    }
    tokio::select! {
        next = idle.next() => next.is_ok(),
        _ = changed.changed() => false,
        _ = closing.wait_for(|closing| *closing) => false,
        () = tokio::time::sleep(sessions.idle * SERVER_PATIENCE) => false,
    }
}

async fn drained(left: Option<HalfClosed>) -> Option<IdleSession> {
    left?.drain().await
}
