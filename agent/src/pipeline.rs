//! The corridor: calls the rooms in order, and makes exactly one audit record of every walk.
//!
//! A flow comes in; identify, authorize, handshake, offload and relay take it by value one after the other. Whatever room
//! refuses, the application or peer gets a reset, never half an answer, and the record says which room, whose fault and
//! why. Deadlines, limits and the engine's fallback live here, not in the rooms.
//!
//! *Invariant:* every path out of [`walk`] goes through `Attempt::close`.

mod attempt;
mod error;

pub use attempt::turned_away;
pub use error::Error;

use crate::admission::{Admission, Full, Place};
use crate::audit::{self, Decision, Method};
use crate::authorize::{self, Authorized, Permit};
use crate::config::Config;
use crate::flow::{Direction, Flow, OriginalDst};
use crate::handshake::{self, Terms};
use crate::identify::{self, Identities, Parties, Unidentified};
use crate::intercept::{Dialler, Opening};
use crate::live::{Basis, Registry};
use crate::offload::{self, Choice, Engine, Pipe};
use crate::policy::{Policy, Rule, Workload};
use crate::relay::{self, Idle, Left, Limits, Progress, Stop};
use crate::reuse::{self, Bound, Key, Pool};
use crate::turns::{Party, Turns};
use crate::whence::Here;
use arc_swap::ArcSwap;
use attempt::Attempt;
use std::cell::RefCell;
use std::collections::HashSet;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

/// How long a permissive listener waits for a client's first byte before it takes the silence for a plaintext protocol in
/// which the server speaks first.
const SILENCE: Duration = Duration::from_millis(300);

/// Pauses before it is asked again who listens, where whoever did has just ended.
const SECOND_LOOKS: [Duration; 6] = [
    Duration::from_millis(5),
    Duration::from_millis(15),
    Duration::from_millis(30),
    Duration::from_millis(60),
    Duration::from_millis(120),
    Duration::from_millis(250),
];

/// How often a last leg is tried again, each time with others who listen.
const LEGS: usize = 3;

/// How long, and for how many bytes, a refused peer is listened to so that it hears why.
const LINGER: Duration = Duration::from_millis(500);
const LINGER_BYTES: u64 = 64 * 1024;

/// What every shard of an agent shares.
#[derive(Debug)]
pub struct Shared {
    /// Configuration.
    pub config: Config,
    /// The policy in force.
    pub policy: ArcSwap<Policy>,
    /// SVIDs and trust bundles.
    pub identities: Identities,
    /// The engine that the self-test, or the configuration, chose.
    pub engine: Choice,
    /// Open connections.
    pub registry: Arc<Registry>,
    /// Places for connections.
    pub admission: Admission,
    /// The addresses of this host.
    pub here: Here,
    /// The audit log.
    pub audit: audit::Sender,
    /// Told when policy or trust have changed: what was decided before is decided again.
    pub changed: watch::Sender<()>,
    /// How many shards there are.
    pub shards: usize,
    /// Handshakes that may be under way at once; the others wait, within their own deadline.
    pub turns: Arc<Turns>,
}

/// What the flows of one shard share.
pub struct Site {
    /// Makes connections.
    pub dialler: Dialler,
    /// Connections to other agents that may be used again.
    pub pool: RefCell<Pool>,
    /// Destinations that decline what an agent offers: they are not asked again until the policy changes.
    pub foreign: RefCell<HashSet<SocketAddr>>,
    /// True when the agent ends.
    pub closing: watch::Receiver<bool>,
}

/// The most destinations that are remembered as foreign.
const MAX_FOREIGN: usize = 4096;

/// How much longer than the client the server keeps an unused connection, so that it is the client who closes it.
const SERVER_PATIENCE: u32 = 2;

/// Walks one flow through the rooms, and inbound what comes after it on the same connection. Returns when all of it is
/// over and recorded.
pub async fn walk(shared: &Shared, site: &Site, flow: Flow) {
    let ends = (flow.source, flow.destination);
    // What it takes to make a connection is given back before its bytes move: it is several times what the connection
    // needs that may be idle for days.
    let Some((mut place, mut made)) = Box::pin(begin(shared, site, flow)).await else { return };
    let origin = made.origin.take();
    let mut left = carry(shared, made).await;
    if let Some(origin) = origin {
        return keep(site, &origin, left).await;
    }
    while left.is_some() {
        // Whatever waits for another use keeps nobody out.
        drop(place);
        let Some((next, made)) = Box::pin(again(shared, site, left, ends)).await else { return };
        place = next;
        left = carry(shared, made).await;
    }
}

/// Outbound: keeps what is left of a connection for the next one.
async fn keep(site: &Site, origin: &Origin, left: Option<Left>) {
    let Some(left) = left else { return };
    if let Some(idle) = Box::pin(left.settle()).await {
        site.pool.borrow_mut().put(&origin.policy, &origin.key, idle);
    }
}

async fn settled(left: Option<Left>) -> Option<Idle> {
    left?.settle().await
}

/// Makes a connection. `None`: it was refused, and is recorded.
async fn begin<'a>(shared: &'a Shared, site: &'a Site, flow: Flow) -> Option<(Place, Made<'a>)> {
    let place = |admission: &Admission, flow: &Flow| match flow.direction() {
        Direction::Outbound => admission.outbound(flow.task().map_or(u32::MAX, |task| task.uid)),
        Direction::Inbound => admission.unproven(&shared.here.whence(flow.source, flow.destination.0)),
    };
    let (mut place, attempt, flow) = enter(shared, flow, place)?;
    Walk::new(shared, site).make(attempt, flow, &mut place).await.map(|made| (place, made))
}

/// Is there room for another? `None`: it was refused, and is recorded.
fn enter(
    shared: &Shared,
    flow: Flow,
    place: impl FnOnce(&Admission, &Flow) -> Result<Place, Full>,
) -> Option<(Place, Attempt<'_>, Flow)> {
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

/// Waits for the next use of a connection, and makes it: who listens, who may come and who the peer is are asked as if it
/// were a new one. What is refused ends the connection, and the peer may make a new one and hear why.
async fn again<'a>(
    shared: &'a Shared,
    site: &'a Site,
    left: Option<Left>,
    (source, destination): (SocketAddr, OriginalDst),
) -> Option<(Place, Made<'a>)> {
    let mut idle = settled(left).await?;
    if !is_asked(shared, site, &mut idle).await {
        idle.close();
        return None;
    }
    let (network, session) = idle.into_parts();
    let agreement = session.agreement().clone();
    let flow = match site.dialler.inbound(network, source, destination) {
        Ok(flow) => flow,
        Err(error) => {
            turned_away(shared, Direction::Inbound, &error);
            return None;
        }
    };
    let peer = agreement.peer.id.clone();
    let (place, mut attempt, flow) = enter(shared, flow, |admission, _| admission.inbound(peer))?;
    attempt.session = Some(Box::new(session));
    let walk = Walk::new(shared, site);
    let (mut attempt, permit) = walk.admit(attempt, flow).await?;
    let basis = attempt.agreed(&agreement, attempt.session.as_ref().map_or(0, |session| session.uses()));
    let admission = match reuse::admit(&permit, &agreement, SystemTime::now()) {
        Ok(admission) => admission,
        Err(unfit) => {
            attempt.refuse(permit.into_parties().flow.socket, &Error::Reuse(unfit));
            return None;
        }
    };
    let opening = match &attempt.session {
        Some(session) if session.speaks() => Opening::Speaks,
        _ => Opening::Waits,
    };
    let leg = match walk.leg(permit.parties(), opening).await {
        Ok(leg) => leg,
        Err(error) => {
            attempt.refuse(permit.into_parties().flow.socket, &error);
            return None;
        }
    };
    let session = attempt.session.take()?;
    match reuse::ready(admission, permit, *session, leg).await {
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

/// Waits for the client to begin. False: it has closed, or it is time that this side does.
async fn is_asked(shared: &Shared, site: &Site, idle: &mut Idle) -> bool {
    let sessions = &shared.config.sessions;
    let (mut changed, mut closing) = (shared.changed.subscribe(), site.closing.clone());
    let Some(_place) = shared.registry.wait(shared.config.limits.connections) else { return false };
    if *closing.borrow() || !sessions.allows(idle.agreement().since, idle.uses()) {
        return false;
    }
    tokio::select! {
        next = idle.next() => next.is_ok(),
        _ = changed.changed() => false,
        _ = closing.wait_for(|closing| *closing) => false,
        () = tokio::time::sleep(sessions.idle * SERVER_PATIENCE) => false,
    }
}

/// What one walk goes by: the policy is the one that was in force when it began.
struct Walk<'a> {
    shared: &'a Shared,
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

/// Whom a connection may serve after this: where it came from, outbound.
struct Origin {
    key: Key,
    policy: Arc<Policy>,
}

impl<'a> Walk<'a> {
    fn new(shared: &'a Shared, site: &'a Site) -> Self {
        Self { shared, site, policy: shared.policy.load_full() }
    }

    /// Everything until bytes may move. `None`: it was refused, and is recorded.
    async fn make(&self, attempt: Attempt<'a>, flow: Flow, place: &mut Place) -> Option<Made<'a>> {
        let (attempt, permit) = self.admit(attempt, flow).await?;
        match permit.parties().flow.direction() {
            Direction::Outbound => self.outbound(attempt, permit).await,
            Direction::Inbound => Box::pin(self.inbound(attempt, permit, place)).await,
        }
    }

    /// Who is it, and what may it do? `None` where that was refused.
    ///
    /// What is nobody's is never carried for anybody: it would leave this host as root's. The kernel lets it pass where it
    /// knows that, so what comes here all the same is undecided, and may come again.
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

    /// Whoever listened has ended: a server that starts anew may be about to listen there, or does already and was not seen
    /// yet. Asks again who it is when somebody else listens, and once more at the end.
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

    /// Nobody concerned is enrolled: a process without an identity that dials no mesh destination, or a listener without
    /// an identity that nothing protects.
    fn is_nobodys_business(&self, flow: &Flow) -> Option<Error> {
        let to = flow.destination.0;
        match flow.direction() {
            Direction::Outbound => (!self.policy.is_mesh(to)).then_some(Error::NotRelayed(to)),
            Direction::Inbound => Some(Error::ListenerUndecided(to)),
        }
    }

    async fn outbound(&self, mut attempt: Attempt<'a>, permit: Permit) -> Option<Made<'a>> {
        let origin = Box::new(Origin { key: Key::of(&permit), policy: self.policy.clone() });
        let met = match self.meet_again(&mut attempt, permit, &origin.key).await {
            Ok(Again::Met(met)) => Ok(met),
            // What only a handshake needs is there only while one is made.
            Ok(Again::Not(permit)) => Box::pin(self.meet(&mut attempt, permit)).await,
            Err(unmet) => Err(unmet),
        };
        match met {
            Ok(Met { carriage, basis, rule }) => {
                Some(Made { attempt, carriage, basis, rule: Some(rule), origin: Some(origin) })
            }
            Err(unmet) => {
                attempt.refuse(unmet.socket, &unmet.error);
                None
            }
        }
    }

    /// Over a connection that is there already.
    async fn meet_again(&self, attempt: &mut Attempt<'a>, mut permit: Permit, key: &Key) -> Result<Again, Box<Unmet>> {
        loop {
            let spare = self.site.pool.borrow_mut().take(&self.policy, key);
            let Some(spare) = spare else { return Ok(Again::Not(permit)) };
            // A peer that does not answer is waited for no longer than one that does not accept.
            match reuse::begin(permit, spare, SystemTime::now(), self.shared.config.timeouts.dial).await {
                Ok(bound) => {
                    let (rule, idle) = (bound.rule().clone(), bound.idle());
                    let basis = attempt.agreed(idle.agreement(), idle.uses());
                    return Ok(Again::Met(Met { carriage: Carriage::Bound(bound), basis, rule }));
                }
                Err(refused) => {
                    let (why, given_back) = *refused;
                    tracing::debug!(%why, "a connection was not used again");
                    if matches!(why, reuse::Unfit::Late | reuse::Unfit::Lost(_)) {
                        // The others lead to the same host, and would be waited for one after the other.
                        self.site.pool.borrow_mut().forget(key);
                    }
                    if why.is_final() {
                        return Err(Unmet::with(Error::Reuse(why), given_back));
                    }
                    permit = given_back;
                }
            }
        }
    }

    /// Dials and shakes hands; once more with engine `user` where the kernel failed after it had taken up TLS.
    async fn meet(&self, attempt: &mut Attempt<'a>, mut permit: Permit) -> Result<Met, Box<Unmet>> {
        let mut engine = self.shared.engine;
        let destination = permit.parties().flow.destination.0;
        let mut offer = self.shared.config.sessions.reuse && !self.site.foreign.borrow().contains(&destination);
        loop {
            let network = match self.dial(&permit.parties().flow).await {
                Ok(network) => network,
                Err(error) => return Err(Unmet::with(error, permit)),
            };
            let session = {
                let terms = self.terms(engine, offer);
                let party = Party::workload(permit.parties().workload.id.clone());
                let _turn = match self.shared.turns.take(party, terms.deadline).await {
                    Ok(turn) => turn,
                    Err(error) => return Err(Unmet::with(Error::Turn(error), permit)),
                };
                match handshake::connect(permit, network, terms).await {
                    Ok(session) => session,
                    Err(error) if offer && error.declines_offer() => {
                        self.remember_as_foreign(destination);
                        (offer, permit) = (false, error.into_parts().1);
                        continue;
                    }
                    Err(error) => {
                        let (error, permit) = attempt.unmet(error);
                        return Err(Unmet::with(error, permit));
                    }
                }
            };
            let accepted = session.accepted();
            let (basis, rule) = (attempt.agreed(accepted.agreement(), 1), accepted.rule().clone());
            match offload::arm(session, engine) {
                Ok(pipe) => return Ok(Met { carriage: Carriage::Pipe(pipe), basis, rule }),
                Err(error) if error.may_redial() && engine != Choice::User => {
                    tracing::warn!(%error, "dialling again with engine user");
                    engine = Choice::User;
                    match error.into_permit() {
                        Some(again) => permit = again,
                        None => return Err(Box::new(Unmet { error: Error::Closing, socket: None })),
                    }
                }
                Err(error) => return Err(Box::new(Unmet { error: Error::Offload(error), socket: None })),
            }
        }
    }

    fn remember_as_foreign(&self, destination: SocketAddr) {
        let mut foreign = self.site.foreign.borrow_mut();
        if foreign.len() >= MAX_FOREIGN {
            foreign.clear();
        }
        foreign.insert(destination);
    }

    async fn inbound(&self, mut attempt: Attempt<'a>, permit: Permit, place: &mut Place) -> Option<Made<'a>> {
        if let Some(rule) = permit.permissive().cloned() {
            // A socket that cannot be looked at is one that the handshake will fail on, and say why.
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
            let terms = self.terms(self.shared.engine, self.shared.config.sessions.reuse);
            // Whoever has said nothing yet takes nobody's turn.
            let spoke = handshake::speaks(&permit.parties().flow.socket, terms.deadline).await;
            let party = Party::peer(place.holders(), &permit.parties().workload.id);
            let turn = match spoke {
                true => match self.shared.turns.take(party, terms.deadline).await {
                    Ok(turn) => Some(turn),
                    Err(error) => {
                        attempt.refuse(permit.into_parties().flow.socket, &Error::Turn(error));
                        return None;
                    }
                },
                false => None,
            };
            let outcome = handshake::accept(permit, terms).await;
            drop(turn);
            match outcome {
                Ok(session) => session,
                Err(error) => {
                    let (error, permit) = attempt.unmet(error);
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
        // Only now does the workload hear of it: whoever is not admitted cannot even make it accept.
        let leg = match self.leg(session.permit().parties(), Opening::Waits).await {
            Ok(leg) => leg,
            Err(error) => {
                attempt.refuse(session.into_permit().into_parties().flow.socket, &error);
                return None;
            }
        };
        match offload::arm(session.joined(leg), self.shared.engine) {
            Ok(pipe) => Some(Made { attempt, carriage: Carriage::Pipe(pipe), basis, rule: Some(rule), origin: None }),
            Err(error) => {
                attempt.refuse(None, &Error::Offload(error));
                None
            }
        }
    }

    /// A connection from the network that is carried without TLS, by a permissive rule.
    async fn plaintext(&self, mut attempt: Attempt<'a>, parties: Parties, rule: Arc<Rule>) -> Option<Made<'a>> {
        let leg = match self.leg(&parties, Opening::Waits).await {
            Ok(leg) => leg,
            Err(error) => {
                attempt.refuse(parties.flow.socket, &error);
                return None;
            }
        };
        let Parties { flow, workload, .. } = parties;
        attempt.method = Method::Plaintext;
        match Pipe::plain(leg, flow.socket) {
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

    async fn dial(&self, flow: &Flow) -> Result<TcpStream, Error> {
        let dial = self.site.dialler.dial(flow.destination.0, flow.dial_from());
        match tokio::time::timeout(self.shared.config.timeouts.dial, dial).await {
            Ok(outcome) => outcome.map_err(Error::Intercept),
            Err(_) => Err(Error::DialTimeout(self.shared.config.timeouts.dial)),
        }
    }

    /// Connects to those who were found to listen. Where somebody has come or gone since, it is asked again who they are.
    async fn leg(&self, parties: &Parties, opening: Opening) -> Result<TcpStream, Error> {
        let Parties { flow, workload, .. } = parties;
        let connected = async {
            let (mut listeners, mut left) = (flow.listens().map_or(0, |listens| listens.who), LEGS);
            loop {
                let outcome = self.site.dialler.leg(flow.destination, flow.source, listeners, opening).await;
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
            Err(_) => Err(Error::DialTimeout(self.shared.config.timeouts.dial)),
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

    fn terms(&self, engine: Choice, reuse: bool) -> Terms {
        Terms {
            reuse,
            deadline: tokio::time::Instant::now() + self.shared.config.timeouts.handshake,
            ciphers: engine.ciphers(),
        }
    }
}

/// Carries what was made, to its end. Not `async fn`: what is held for as long as the connection is held once.
fn carry<'a>(shared: &'a Shared, made: Made<'a>) -> impl Future<Output = Option<Left>> + use<'a> {
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
    // A policy or a revocation that came into force during the handshake has not seen this connection in the list.
    let trust = shared.identities.provider().trust();
    if !entered.live().is_allowed_by(&shared.policy.load(), &trust) {
        entered.live().end(Stop::Revoked);
    }
    let limits = Limits { idle: rule.and_then(|rule| rule.idle_timeout), stall: shared.config.timeouts.stall };
    async move {
        let (tally, left) = match carriage {
            Carriage::Pipe(pipe) => relay::carry(pipe, &limits, told(stopped), &progress).await,
            Carriage::Bound(bound) => bound.carry(&limits, told(stopped), &progress).await,
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
    origin: Option<Box<Origin>>,
}

/// A peer that was reached, and shaken hands with.
struct Met {
    carriage: Carriage,
    basis: Basis,
    rule: Arc<Rule>,
}

/// What came of looking for a connection that is there already.
enum Again {
    Met(Met),
    /// There is none that serves, and the flow is as it was.
    Not(Permit),
}

/// A peer that was not, and the application's socket where it is still open.
struct Unmet {
    error: Error,
    socket: Option<TcpStream>,
}

impl Unmet {
    fn with(error: Error, permit: Permit) -> Box<Self> {
        Box::new(Self { error, socket: Some(permit.into_parties().flow.socket) })
    }
}

/// Closes a connection on which an alert was just sent so that the alert arrives: closing with unread bytes would be a
/// reset, which overtakes it (RFC 1122 section 4.2.2.13). Bounded in bytes and time.
async fn linger(mut socket: TcpStream) {
    let read = async {
        socket.shutdown().await?;
        tokio::io::copy(&mut socket.take(LINGER_BYTES), &mut tokio::io::sink()).await
    };
    // What is still unsaid after that stays unsaid.
    let _ = tokio::time::timeout(LINGER, read).await;
}

/// Waits until somebody says stop.
async fn told(mut stopped: watch::Receiver<Option<Stop>>) -> Stop {
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

    fn size<F>(_: impl FnOnce(&'static Shared, &'static Site, Flow) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn a_connection_that_is_carried_keeps_little_of_what_made_it() {
        // Each idle connection costs this much, besides its keys and its sockets: making it takes several times as much.
        let size = size(walk);
        assert!(size <= 3200, "{size} bytes");
    }
}
