//! The pipeline: calls the stages in order, and makes exactly one audit record of each connection.
//!
//! A flow comes in; identify, authorize, handshake, offload and relay take it by value one after the other. Whatever stage
//! refuses, the application or peer gets a reset, never half an answer, and the record says which stage, whose fault and
//! why. Deadlines, limits and the engine's fallback live here, not in the stages.
//!
//! *Invariant:* every path out of [`serve`] goes through `Attempt::close`.

mod attempt;
mod error;
mod inbound;
mod outbound;
mod reuse;

pub use attempt::reject_stray;
pub use error::Error;

use crate::admission::{Admission, ConnectionSlot, Full};
use crate::audit::{self, Decision};
use crate::authorize::{self, Authorized, Permit};
use crate::config::Config;
use crate::flow::{Direction, Flow};
use crate::handshake::Terms;
use crate::handshake_slots::HandshakeSlots;
use crate::identify::{self, Identities, Parties, Unidentified};
use crate::intercept::Dialler;
use crate::live::{Basis, OpenConnections};
use crate::offload::{Choice, Engine, Pipe};
use crate::policy::{Policy, Rule};
use crate::relay::{self, HalfClosed, Limits, Progress, Stop};
use crate::reuse::{Bound, Pool};
use crate::whence::Here;
use arc_swap::ArcSwap;
use attempt::Attempt;
use outbound::{PoolSlot, keep};
use reuse::next_stream;
use std::cell::RefCell;
use std::collections::HashSet;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// The pauses before each new look at who listens, where the process that listened has just ended.
const SECOND_LOOKS: [Duration; 6] = [
    Duration::from_millis(5),
    Duration::from_millis(15),
    Duration::from_millis(30),
    Duration::from_millis(60),
    Duration::from_millis(120),
    Duration::from_millis(250),
];

/// What every shard of an agent shares.
#[derive(Debug)]
pub struct AgentState {
    /// Configuration.
    pub config: Config,
    /// The policy in force.
    pub policy: ArcSwap<Policy>,
    /// SVIDs and trust bundles.
    pub identities: Identities,
    /// The engine that the self-test, or the configuration, chose.
    pub engine: Choice,
    /// Open connections.
    pub registry: Arc<OpenConnections>,
    /// Places for connections.
    pub admission: Admission,
    /// The addresses of this host.
    pub here: Here,
    /// The audit log.
    pub audit: audit::Sender,
    /// Signals that policy or trust have changed: what was decided before is decided again.
    pub changed: watch::Sender<()>,
    /// How many shards there are.
    pub shards: usize,
    /// Handshakes that may be under way at once; the others wait, within their own deadline.
    pub handshake_slots: Arc<HandshakeSlots>,
}

/// What the flows of one shard share.
pub struct Site {
    /// Makes connections.
    pub dialler: Dialler,
    /// Connections to other agents that may be used again.
    pub pool: RefCell<Pool>,
    /// Destinations that decline the offer to use a connection again: it is not made to them until the policy changes.
    pub without_reuse: RefCell<HashSet<SocketAddr>>,
    /// True when the agent ends.
    pub closing: watch::Receiver<bool>,
}

/// Takes one flow through the stages, and inbound also what comes after it on the same connection. Returns when all of it
/// is over and recorded.
pub async fn serve(shared: &AgentState, site: &Site, flow: Flow) {
    let ends = (flow.source, flow.destination);
    // The memory that making a connection takes is freed before its bytes move: it is several times what carrying needs,
    // and the connection may be idle for days.
    let Some((mut place, mut made)) = Box::pin(begin(shared, site, flow)).await else { return };
    let origin = made.origin.take();
    let mut left = carry(shared, made).await;
    if let Some(origin) = origin {
        return keep(site, &origin, left).await;
    }
    while left.is_some() {
        // A connection that waits for another stream gives its place back, so that it keeps nobody out.
        drop(place);
        let Some((next, made)) = Box::pin(next_stream(shared, site, left, ends)).await else { return };
        place = next;
        left = carry(shared, made).await;
    }
}

/// Makes a connection. `None`: it was refused, and is recorded.
async fn begin<'a>(shared: &'a AgentState, site: &'a Site, flow: Flow) -> Option<(ConnectionSlot, Made<'a>)> {
    let place = |admission: &Admission, flow: &Flow| match flow.direction() {
        Direction::Outbound => admission.outbound(flow.task().map_or(u32::MAX, |task| task.uid)),
        Direction::Inbound => admission.unproven(&shared.here.whence(flow.source, flow.destination.0)),
    };
    let (mut place, attempt, flow) = enter(shared, flow, place)?;
    Pipeline::new(shared, site).make(attempt, flow, &mut place).await.map(|made| (place, made))
}

/// Is there room for another? `None`: it was refused, and is recorded.
fn enter(
    shared: &AgentState,
    flow: Flow,
    place: impl FnOnce(&Admission, &Flow) -> Result<ConnectionSlot, Full>,
) -> Option<(ConnectionSlot, Attempt<'_>, Flow)> {
    let attempt = Attempt::new(shared, &flow);
    shared.registry.begin();
    let place = match shared.audit.refuses() {
        true => Err(Error::AuditUnwritable),
        false => place(&shared.admission, &flow).map_err(Error::TooMany),
    };
    match place {
        Ok(place) => Some((place, attempt, flow)),
        Err(error) => {
            attempt.refuse(flow.socket, &error);
            None
        }
    }
}

/// What one walk through the stages needs: the policy is the one that was in force when it began.
struct Pipeline<'a> {
    shared: &'a AgentState,
    site: &'a Site,
    policy: Arc<Policy>,
}

/// What carries a flow.
enum Carriage {
    /// A pipe of its own.
    Pipe(Pipe),
    /// A connection that others have used before.
    Bound(Bound),
}

impl<'a> Pipeline<'a> {
    fn new(shared: &'a AgentState, site: &'a Site) -> Self {
        Self { shared, site, policy: shared.policy.load_full() }
    }

    /// Everything until bytes may move. `None`: it was refused, and is recorded.
    async fn make(&self, attempt: Attempt<'a>, flow: Flow, place: &mut ConnectionSlot) -> Option<Made<'a>> {
        let (attempt, permit) = self.admit(attempt, flow).await?;
        match permit.parties().flow.direction() {
            Direction::Outbound => self.outbound(attempt, permit).await,
            Direction::Inbound => Box::pin(self.inbound(attempt, permit, place)).await,
        }
    }

    /// Who is the process on this host's end, and what may it do? `None` where that was refused.
    ///
    /// A connection that is nobody's is never carried, because it would leave this host as root's. The kernel lets it pass
    /// once it knows that it is nobody's, so one that comes here is still undecided, and the program may try again.
    async fn admit(&self, mut attempt: Attempt<'a>, flow: Flow) -> Option<(Attempt<'a>, Permit)> {
        let mut outcome = identify::identify(flow, &self.policy, &self.shared.identities).await;
        if let Err(refused) = outcome {
            outcome = match refused.flow.direction() {
                Direction::Inbound if refused.error.is_passing() => Box::pin(self.ask_again(refused)).await,
                _ => Err(refused),
            };
        }
        let parties = match outcome {
            Ok(parties) => parties,
            Err(refused) => {
                let error = match self.is_nobodys_business(&refused.flow) {
                    Some(nobodys) if refused.error.is_unknown() => nobodys,
                    _ => Error::Identify(refused.error),
                };
                attempt.refuse(refused.flow.socket, &error);
                return None;
            }
        };
        attempt.local().id = Some(parties.workload.id.clone());
        match authorize::authorize(&self.policy, parties) {
            Ok(Authorized::Mesh(permit)) => Some((attempt, permit)),
            Ok(Authorized::Bypass(bypass)) => {
                let (parties, rule) = bypass.into_parts();
                let to = parties.flow.destination.0;
                attempt.refuse(parties.flow.socket, &Error::BypassNotRelayed { to, rule: rule.name.clone() });
                None
            }
            Err(denied) => {
                attempt.refuse(denied.parties.flow.socket, &Error::Authorize(denied.reason));
                None
            }
        }
    }

    /// The process that listened has ended. A server that restarts may be about to listen there, or may listen already
    /// without having been seen. Identifies anew as soon as somebody else listens, and once more after the last pause.
    async fn ask_again(&self, mut refused: Box<Unidentified>) -> Result<Parties, Box<Unidentified>> {
        for pause in SECOND_LOOKS {
            tokio::time::sleep(pause).await;
            let other = self.site.dialler.look_again(&mut refused.flow).unwrap_or(false);
            if !other && Some(&pause) != SECOND_LOOKS.last() {
                continue;
            }
            match identify::identify(refused.flow, &self.policy, &self.shared.identities).await {
                Err(again) if again.error.is_passing() => refused = again,
                done => return done,
            }
        }
        Err(refused)
    }

    /// The refusal of a connection that concerns nobody enrolled: a process without an identity dials no mesh destination,
    /// or the listener has no identity.
    fn is_nobodys_business(&self, flow: &Flow) -> Option<Error> {
        let to = flow.destination.0;
        match flow.direction() {
            Direction::Outbound => (!self.policy.is_mesh(to)).then_some(Error::NotRelayed(to)),
            Direction::Inbound => Some(Error::ListenerUndecided(to)),
        }
    }

    fn terms(&self, engine: Choice, reuse: bool) -> Terms {
        Terms {
            reuse,
            deadline: tokio::time::Instant::now() + self.shared.config.timeouts.handshake,
            ciphers: engine.ciphers(),
        }
    }
}

/// Carries what was made, to its end. Not an `async fn`, which would hold its arguments twice for as long as the
/// connection.
fn carry<'a>(shared: &'a AgentState, made: Made<'a>) -> impl Future<Output = Option<HalfClosed>> + use<'a> {
    let Made { mut attempt, carriage, basis, rule, .. } = made;
    attempt.engine = match &carriage {
        Carriage::Pipe(pipe) => pipe.engine().map(Engine::name),
        Carriage::Bound(bound) => Some(bound.idle().engine().name()),
    };
    attempt.rule = rule.as_ref().map(|rule| rule.name.clone());
    let decision = match basis {
        Basis::Mesh { .. } => Decision::Allowed,
        Basis::Plaintext { .. } => Decision::Bypassed,
    };
    let progress = Arc::new(Progress::default());
    let (stop, stopped) = watch::channel(None);
    let entered = shared.registry.enter(attempt.live(basis, progress.clone(), stop));
    // A policy or a revocation that came into force during the handshake did not find this connection in the list.
    let trust = shared.identities.provider().trust();
    if !entered.live().is_allowed_by(&shared.policy.load(), &trust) {
        entered.live().end(Stop::Revoked);
    }
    let limits = Limits { idle: rule.and_then(|rule| rule.idle_timeout), stall: shared.config.timeouts.stall };
    async move {
        let (tally, left) = match carriage {
            Carriage::Pipe(pipe) => relay::carry(pipe, &limits, stop_requested(stopped), &progress).await,
            Carriage::Bound(bound) => bound.carry(&limits, stop_requested(stopped), &progress).await,
        };
        attempt.finish(decision, &tally);
        drop(entered);
        left
    }
}

/// A connection that may move bytes.
struct Made<'a> {
    attempt: Attempt<'a>,
    carriage: Carriage,
    basis: Basis,
    rule: Option<Arc<Rule>>,
    /// Outbound: for whom the connection is kept afterwards.
    origin: Option<Box<PoolSlot>>,
}

/// Waits for the order to stop.
async fn stop_requested(mut stopped: watch::Receiver<Option<Stop>>) -> Stop {
    loop {
        if let Some(stop) = *stopped.borrow_and_update() {
            return stop;
        }
        if stopped.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size<F>(_: impl FnOnce(&'static AgentState, &'static Site, Flow) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn a_connection_that_is_carried_keeps_little_of_what_made_it() {
        // Each idle connection costs this much, besides its keys and its sockets: making it takes several times as much.
        let size = size(serve);
        assert!(size <= 3200, "{size} bytes");
    }
}
