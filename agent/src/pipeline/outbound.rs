//! A local workload dials: the peer is reached, over a connection that is there already or over a new one.
//!
//! *Invariant:* after a failure before any byte of the application has moved, its socket is reset, or left for another
//! attempt.

use super::attempt::Attempt;
use super::{Carriage, Error, Made, Pipeline};
use crate::authorize::Permit;
use crate::flow::Flow;
use crate::handshake;
use crate::handshake_slots::Tenant;
use crate::live::Basis;
use crate::offload::{self, Choice};
use crate::policy::{Policy, Rule};
use crate::relay::HalfClosed;
use crate::reuse::{self, Key};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::net::TcpStream;

/// The most destinations that are remembered as declining the offer to use a connection again.
const MAX_WITHOUT_REUSE: usize = 4096;

/// The place in the pool for an outbound connection when its stream is over: whom it may serve next, and under which
/// policy.
pub(super) struct PoolSlot {
    key: Key,
    policy: Arc<Policy>,
}

/// Outbound: keeps what is left of a connection for the next one.
pub(super) async fn keep(site: &super::Site, origin: &PoolSlot, left: Option<HalfClosed>) {
    let Some(left) = left else { return };
    if let Some(idle) = Box::pin(left.drain()).await {
        site.pool.borrow_mut().put(&origin.policy, &origin.key, idle);
    }
}

impl<'a> Pipeline<'a> {
    pub(super) async fn outbound(&self, mut attempt: Attempt<'a>, permit: Permit) -> Option<Made<'a>> {
        let origin = Box::new(PoolSlot { key: Key::of(&permit), policy: self.policy.clone() });
        let established = match self.establish_pooled(&mut attempt, permit, &origin.key).await {
            Ok(Pooled::Established(established)) => Ok(established),
            // Boxed, so that the memory that only a handshake needs is held only while one is made.
            Ok(Pooled::None(permit)) => Box::pin(self.establish(&mut attempt, permit)).await,
            Err(failed) => Err(failed),
        };
        match established {
            Ok(Established { carriage, basis, rule }) => {
                Some(Made { attempt, carriage, basis, rule: Some(rule), origin: Some(origin) })
            }
            Err(failed) => {
                attempt.refuse(failed.socket, &failed.error);
                None
            }
        }
    }

    /// Over a connection that is there already.
    async fn establish_pooled(
        &self,
        attempt: &mut Attempt<'a>,
        mut permit: Permit,
        key: &Key,
    ) -> Result<Pooled, Box<Failed>> {
        loop {
            let spare = self.site.pool.borrow_mut().take(&self.policy, key);
            let Some(spare) = spare else { return Ok(Pooled::None(permit)) };
            // The peer's answer is waited for no longer than a new connection would be.
            match reuse::begin(permit, spare, SystemTime::now(), self.shared.config.timeouts.dial).await {
                Ok(bound) => {
                    let (rule, idle) = (bound.rule().clone(), bound.idle());
                    let basis = attempt.agreed(idle.agreement(), idle.streams());
                    return Ok(Pooled::Established(Established { carriage: Carriage::Bound(bound), basis, rule }));
                }
                Err(refused) => {
                    let (why, given_back) = *refused;
                    tracing::debug!(%why, "a connection was not used again");
                    if matches!(why, reuse::Unfit::Late | reuse::Unfit::Lost(_)) {
                        // The other idle connections of this key lead to the same host, and each of them would be waited
                        // for in turn.
                        self.site.pool.borrow_mut().forget(key);
                    }
                    if why.is_final() {
                        return Err(Failed::with(Error::Reuse(why), given_back));
                    }
                    permit = given_back;
                }
            }
        }
    }

    /// Dials and shakes hands; again without the offer of reuse where the peer declines it, and again with engine `user`
    /// where the kernel failed after it had taken up TLS.
    async fn establish(&self, attempt: &mut Attempt<'a>, mut permit: Permit) -> Result<Established, Box<Failed>> {
        let mut engine = self.shared.engine;
        let destination = permit.parties().flow.destination.0;
        let credential = match self.shared.identities.credential(&permit.parties().workload).await {
            Ok(credential) => credential,
            Err(error) => return Err(Failed::with(Error::Credential(error), permit)),
        };
        let mut offer = self.shared.config.sessions.reuse && !self.site.without_reuse.borrow().contains(&destination);
        loop {
            let network = match self.dial(&permit.parties().flow).await {
                Ok(network) => network,
                Err(error) => return Err(Failed::with(error, permit)),
            };
            let session = {
                let terms = self.terms(engine, offer);
                let tenant = Tenant::workload(permit.parties().workload.id.clone());
                let _slot = match self.shared.handshake_slots.take(tenant, terms.deadline).await {
                    Ok(slot) => slot,
                    Err(error) => return Err(Failed::with(Error::HandshakeSlot(error), permit)),
                };
                match handshake::connect(permit, credential.clone(), network, terms).await {
                    Ok(session) => session,
                    Err(error) if offer && error.declines_offer() => {
                        self.remember_without_reuse(destination);
                        (offer, permit) = (false, error.into_parts().1);
                        continue;
                    }
                    Err(error) => {
                        let (error, permit) = attempt.failed(error);
                        return Err(Failed::with(error, permit));
                    }
                }
            };
            let accepted = session.accepted();
            let (basis, rule) = (attempt.agreed(accepted.agreement(), 1), accepted.rule().clone());
            match offload::arm(session, engine) {
                Ok(pipe) => return Ok(Established { carriage: Carriage::Pipe(pipe), basis, rule }),
                Err(error) if error.may_redial() && engine != Choice::User => {
                    tracing::warn!(%error, "dialling again with engine user");
                    engine = Choice::User;
                    match error.into_permit() {
                        Ok(again) => permit = again,
                        Err(error) => return Err(Box::new(Failed { error: Error::Offload(error), socket: None })),
                    }
                }
                Err(error) => return Err(Box::new(Failed { error: Error::Offload(error), socket: None })),
            }
        }
    }

    fn remember_without_reuse(&self, destination: SocketAddr) {
        let mut without_reuse = self.site.without_reuse.borrow_mut();
        if without_reuse.len() >= MAX_WITHOUT_REUSE {
            without_reuse.clear();
        }
        without_reuse.insert(destination);
    }

    async fn dial(&self, flow: &Flow) -> Result<TcpStream, Error> {
        let dial = self.site.dialler.dial(flow.destination.0, flow.dial_from());
        match tokio::time::timeout(self.shared.config.timeouts.dial, dial).await {
            Ok(outcome) => outcome.map_err(Error::Intercept),
            Err(_) => Err(Error::DialTimeout(self.shared.config.timeouts.dial)),
        }
    }
}

/// A peer that was reached, and whose handshake is over.
struct Established {
    carriage: Carriage,
    basis: Basis,
    rule: Arc<Rule>,
}

/// What came of looking for a connection that is there already.
enum Pooled {
    Established(Established),
    /// There is none that serves, and the flow is as it was.
    None(Permit),
}

/// Why no peer was reached, and the application's socket where it is still open.
struct Failed {
    error: Error,
    socket: Option<TcpStream>,
}

impl Failed {
    fn with(error: Error, permit: Permit) -> Box<Self> {
        Box::new(Self { error, socket: Some(permit.into_parties().flow.socket) })
    }
}
