//! The corridor: calls the rooms in order, and makes exactly one audit record of every walk.
//!
//! A flow comes in; identify, authorize, handshake, offload and relay take it by value one after the other. Whatever room
//! refuses, the application or peer gets a reset, never half an answer, and the record says which room, whose fault and
//! why. Deadlines, limits and the engine's fallback live here, not in the rooms.
//!
//! *Invariant:* every path out of [`walk`] goes through `Attempt::close`.

use crate::audit::{self, Bytes, Decision, End, Method, Process, Record};
use crate::authorize::{self, Authorized, Permit};
use crate::config::Config;
use crate::handshake::{self, Session, Terms};
use crate::identify::{self, Identities, Parties};
use crate::intercept::{self, Dialler, Direction, Flow};
use crate::live::{Basis, Live, Place, Registry};
use crate::offload::{self, Choice, Engine, Pipe};
use crate::policy::{Policy, Rule};
use crate::refusal::{Culprit, Refusal};
use crate::relay::{self, Limits, Progress, Stop, Tally};
use crate::turns::{self, Party, Turns};
use arc_swap::ArcSwap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

/// How long a permissive listener waits for a client's first byte before it takes the silence for a plaintext protocol in
/// which the server speaks first.
const SILENCE: Duration = Duration::from_millis(300);

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
    /// The audit log.
    pub audit: audit::Sender,
    /// Handshakes that may be under way at once; the others wait, within their own deadline.
    pub turns: Arc<Turns>,
}

/// Why a walk ended before the relay did.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No room was reached: the agent has as many connections as it may have.
    #[error(
        "{0} connections are open or under way, which is [limits] connections, or what the limit of open files allows"
    )]
    TooMany(usize),
    /// The other end was not there in time.
    #[error("the connection was not made within {0:?} ([timeouts] dial)")]
    DialTimeout(Duration),
    /// The agent is ending.
    #[error("the agent is ending")]
    Closing,
    /// No room was reached: nobody could be told about this connection.
    #[error("the audit log cannot be written, and [audit] when_full is \"refuse\"")]
    AuditUnwritable,
    /// identify refused.
    #[error(transparent)]
    Identify(identify::Error),
    /// authorize refused.
    #[error(transparent)]
    Authorize(authorize::Reason),
    /// intercept could not connect to the other end.
    #[error(transparent)]
    Intercept(intercept::Error),
    /// It was not this handshake's turn.
    #[error(transparent)]
    Turn(turns::Error),
    /// handshake refused.
    #[error(transparent)]
    Handshake(handshake::Cause),
    /// offload refused.
    #[error(transparent)]
    Offload(offload::Error),
}

impl Error {
    /// The room that refused.
    pub fn stage(&self) -> &'static str {
        match self {
            Self::TooMany(_) | Self::AuditUnwritable | Self::DialTimeout(_) | Self::Closing | Self::Intercept(_) => {
                "intercept"
            }
            Self::Identify(_) => "identify",
            Self::Authorize(_) => "authorize",
            Self::Turn(_) | Self::Handshake(_) => "handshake",
            Self::Offload(_) => "offload",
        }
    }
}

impl Refusal for Error {
    fn culprit(&self) -> Culprit {
        match self {
            Self::TooMany(_) | Self::AuditUnwritable | Self::Closing => Culprit::Host,
            Self::DialTimeout(_) => Culprit::Peer,
            Self::Identify(error) => error.culprit(),
            Self::Authorize(error) => error.culprit(),
            Self::Intercept(error) => error.culprit(),
            Self::Turn(error) => error.culprit(),
            Self::Handshake(error) => error.culprit(),
            Self::Offload(error) => error.culprit(),
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Self::TooMany(_) => "too-many-connections",
            Self::AuditUnwritable => "audit-unwritable",
            Self::DialTimeout(_) => "dial-timeout",
            Self::Closing => "agent-ending",
            Self::Identify(error) => error.code(),
            Self::Authorize(error) => error.code(),
            Self::Intercept(error) => error.code(),
            Self::Turn(error) => error.code(),
            Self::Handshake(error) => error.code(),
            Self::Offload(error) => error.code(),
        }
    }
}

/// Walks one flow through the rooms. Returns when it is over and recorded.
pub async fn walk(shared: &Shared, dialler: &Dialler, flow: Flow) {
    // What it takes to make a connection is given back before its bytes move: it is many times as much as a connection
    // needs that may be idle for days.
    if let Some((_place, made)) = Box::pin(begin(shared, dialler, flow)).await {
        carry(shared, made).await;
    }
}

/// Makes a connection. `None`: it was refused, and is recorded.
async fn begin<'a>(shared: &'a Shared, dialler: &'a Dialler, flow: Flow) -> Option<(Place, Made<'a>)> {
    let attempt = Attempt::new(shared, &flow);
    let place = match shared.registry.begin(shared.config.limits.connections) {
        _ if shared.audit.refuses() => Err(Error::AuditUnwritable),
        place => place.map_err(Error::TooMany),
    };
    let place = match place {
        Ok(place) => place,
        Err(error) => {
            attempt.refuse(flow.socket, &error);
            return None;
        }
    };
    let walk = Walk { shared, dialler, policy: shared.policy.load_full() };
    walk.make(attempt, flow).await.map(|made| (place, made))
}

/// What one walk goes by: the policy is the one that was in force when it began.
struct Walk<'a> {
    shared: &'a Shared,
    dialler: &'a Dialler,
    policy: Arc<Policy>,
}

impl<'a> Walk<'a> {
    /// Everything until bytes may move. `None`: it was refused, and is recorded.
    async fn make(&self, attempt: Attempt<'a>, flow: Flow) -> Option<Made<'a>> {
        let (attempt, permit) = match self.admit(attempt, flow).await? {
            Admitted::Mesh(attempt, permit) => (attempt, permit),
            Admitted::Plaintext(made) => return Some(made),
        };
        match permit.parties().flow.direction {
            Direction::Outbound => self.outbound(attempt, permit).await,
            Direction::Inbound => self.inbound(attempt, permit).await,
        }
    }

    /// Who is it, and what may it do? `None` where that was refused.
    async fn admit(&self, mut attempt: Attempt<'a>, flow: Flow) -> Option<Admitted<'a>> {
        let parties = match identify::identify(flow, &self.policy, &self.shared.identities).await {
            Ok(parties) => parties,
            Err(refused) => {
                if refused.error.is_unknown() && self.is_nobodys_business(&refused.flow) {
                    let made = self.plaintext(attempt, refused.flow, Basis::LeftAlone, None).await;
                    return made.map(Admitted::Plaintext);
                }
                attempt.refuse(refused.flow.socket, &Error::Identify(refused.error));
                return None;
            }
        };
        attempt.local().id = Some(parties.workload.id.to_string());
        match authorize::authorize(&self.policy, parties) {
            Ok(Authorized::Mesh(permit)) => Some(Admitted::Mesh(attempt, permit)),
            Ok(Authorized::Bypass(bypass)) => {
                let (parties, rule) = bypass.into_parts();
                let basis = Basis::Plaintext { local: parties.workload.id.clone() };
                self.plaintext(attempt, parties.flow, basis, Some(rule)).await.map(Admitted::Plaintext)
            }
            Err(denied) => {
                attempt.refuse(denied.parties.flow.socket, &Error::Authorize(denied.reason));
                None
            }
        }
    }

    /// The kernel turned it here because it could not know that nobody concerned is enrolled: a process without an
    /// identity that dials no mesh destination, or a listener without an identity that nothing protects.
    fn is_nobodys_business(&self, flow: &Flow) -> bool {
        match flow.direction {
            Direction::Outbound => !self.policy.is_mesh(flow.destination.0),
            Direction::Inbound => !flow.protected,
        }
    }

    async fn outbound(&self, mut attempt: Attempt<'a>, permit: Permit) -> Option<Made<'a>> {
        match self.meet(&mut attempt, permit).await {
            Ok(Met { pipe, basis, rule }) => Some(Made { attempt, pipe, basis, rule: Some(rule) }),
            Err(unmet) => {
                attempt.refuse(unmet.socket, &unmet.error);
                None
            }
        }
    }

    /// Dials and shakes hands; once more with engine `user` where the kernel failed after it had taken up TLS.
    async fn meet(&self, attempt: &mut Attempt<'a>, mut permit: Permit) -> Result<Met, Box<Unmet>> {
        let mut engine = self.shared.engine;
        loop {
            let network = match self.dial(&permit.parties().flow).await {
                Ok(network) => network,
                Err(error) => return Err(Unmet::with(error, permit)),
            };
            let session = {
                let terms = self.terms(engine);
                let party = Party::Workload(permit.parties().workload.id.clone());
                let _turn = match self.shared.turns.take(party, terms.deadline).await {
                    Ok(turn) => turn,
                    Err(error) => return Err(Unmet::with(Error::Turn(error), permit)),
                };
                match handshake::connect(permit, network, terms).await {
                    Ok(session) => session,
                    Err(error) => {
                        let (error, permit) = attempt.unmet(error);
                        return Err(Unmet::with(error, permit));
                    }
                }
            };
            let (basis, rule) = attempt.agreed(&session);
            match offload::arm(session, None, engine) {
                Ok(pipe) => return Ok(Met { pipe, basis, rule }),
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

    async fn inbound(&self, mut attempt: Attempt<'a>, permit: Permit) -> Option<Made<'a>> {
        if let Some(rule) = permit.permissive().cloned() {
            // A socket that cannot be looked at is one that the handshake will fail on, and say why.
            if !handshake::looks_like_tls(&permit.parties().flow.socket, SILENCE).await.unwrap_or(true) {
                let parties = permit.into_parties();
                let basis = Basis::Plaintext { local: parties.workload.id.clone() };
                return self.plaintext(attempt, parties.flow, basis, Some(rule)).await;
            }
        }
        let session = {
            let terms = self.terms(self.shared.engine);
            // Whoever has said nothing yet takes nobody's turn.
            let spoke = handshake::speaks(&permit.parties().flow.socket, terms.deadline).await;
            let Parties { flow, workload, .. } = permit.parties();
            let party = Party::peer(flow.source.ip(), workload.id.clone());
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
        let (basis, rule) = attempt.agreed(&session);
        // Only now does the workload hear of it: whoever is not admitted cannot even make it accept.
        let leg = match self.leg(&session.permit().parties().flow).await {
            Ok(leg) => leg,
            Err(error) => {
                attempt.refuse(session.into_permit().into_parties().flow.socket, &error);
                return None;
            }
        };
        match offload::arm(session, Some(leg), self.shared.engine) {
            Ok(pipe) => Some(Made { attempt, pipe, basis, rule: Some(rule) }),
            Err(error) => {
                attempt.refuse(None, &Error::Offload(error));
                None
            }
        }
    }

    /// A flow that is carried without TLS: by a named rule, or because it is none of our business.
    async fn plaintext(
        &self,
        mut attempt: Attempt<'a>,
        flow: Flow,
        basis: Basis,
        rule: Option<Arc<Rule>>,
    ) -> Option<Made<'a>> {
        let other = match flow.direction {
            Direction::Outbound => self.dial(&flow).await,
            Direction::Inbound => self.leg(&flow).await,
        };
        let other = match other {
            Ok(other) => other,
            Err(error) => {
                attempt.refuse(flow.socket, &error);
                return None;
            }
        };
        let pipe = match flow.direction {
            Direction::Outbound => Pipe::plain(flow.socket, other),
            Direction::Inbound => Pipe::plain(other, flow.socket),
        };
        attempt.method = Method::Plaintext;
        match pipe {
            Ok(pipe) => Some(Made { attempt, pipe, basis, rule }),
            Err(error) => {
                attempt.refuse(None, &Error::Offload(error));
                None
            }
        }
    }

    async fn dial(&self, flow: &Flow) -> Result<TcpStream, Error> {
        let dial = self.dialler.dial(flow.destination.0, flow.dial_from);
        match tokio::time::timeout(self.shared.config.timeouts.dial, dial).await {
            Ok(outcome) => outcome.map_err(Error::Intercept),
            Err(_) => Err(Error::DialTimeout(self.shared.config.timeouts.dial)),
        }
    }

    async fn leg(&self, flow: &Flow) -> Result<TcpStream, Error> {
        let leg = self.dialler.leg(flow.destination, flow.source);
        match tokio::time::timeout(self.shared.config.timeouts.dial, leg).await {
            Ok(outcome) => outcome.map_err(Error::Intercept),
            Err(_) => Err(Error::DialTimeout(self.shared.config.timeouts.dial)),
        }
    }

    fn terms(&self, engine: Choice) -> Terms {
        Terms {
            deadline: tokio::time::Instant::now() + self.shared.config.timeouts.handshake,
            ciphers: engine.ciphers(),
        }
    }
}

/// Carries what was made, to its end. Not `async fn`: what is held for as long as the connection is held once.
fn carry(shared: &Shared, made: Made<'_>) -> impl Future<Output = ()> {
    let Made { mut attempt, pipe, basis, rule } = made;
    attempt.engine = pipe.engine().map(Engine::name);
    attempt.rule = rule.as_ref().map(|rule| rule.name.clone());
    let decision = match basis {
        Basis::Mesh { .. } => Decision::Allowed,
        Basis::Plaintext { .. } => Decision::Bypassed,
        Basis::LeftAlone => Decision::LeftAlone,
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
        let tally = relay::carry(pipe, &limits, told(stopped), &progress).await;
        attempt.finish(decision, &tally);
        drop(entered);
    }
}

/// Who was admitted to what.
#[expect(clippy::large_enum_variant, reason = "it is returned once, and taken apart at once")]
enum Admitted<'a> {
    Mesh(Attempt<'a>, Permit),
    Plaintext(Made<'a>),
}

/// A connection that may move bytes.
struct Made<'a> {
    attempt: Attempt<'a>,
    pipe: Pipe,
    basis: Basis,
    rule: Option<Arc<Rule>>,
}

/// A peer that was reached, and shaken hands with.
struct Met {
    pipe: Pipe,
    basis: Basis,
    rule: Arc<Rule>,
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

/// A connection that came to an agent's listener and is no flow: nobody turned it there.
pub fn turned_away(shared: &Shared, direction: Direction, error: &intercept::Error) {
    let Some(source) = error.stranger() else {
        return tracing::warn!(%error, "a connection was not accepted");
    };
    let attempt = Attempt {
        shared,
        began: Instant::now(),
        time: OffsetDateTime::now_utc(),
        flow: 0,
        direction,
        source: End { id: None, address: source.0 },
        destination: End { id: None, address: source.1 },
        process: None,
        method: Method::None,
        tls: None,
        engine: None,
        rule: None,
    };
    attempt.close(
        Decision::Denied,
        "intercept",
        Ending {
            culprit: Some(error.culprit()),
            code: error.code(),
            reason: error.to_string(),
            bytes: Bytes::default(),
        },
    );
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

/// What is known about an attempt so far: the audit record in the making.
struct Attempt<'a> {
    shared: &'a Shared,
    began: Instant,
    time: OffsetDateTime,
    flow: u64,
    direction: Direction,
    source: End,
    destination: End,
    process: Option<Process>,
    method: Method,
    tls: Option<audit::Tls>,
    engine: Option<&'static str>,
    rule: Option<Arc<str>>,
}

impl<'a> Attempt<'a> {
    fn new(shared: &'a Shared, flow: &Flow) -> Self {
        Self {
            shared,
            began: Instant::now(),
            time: OffsetDateTime::now_utc(),
            flow: flow.id,
            direction: flow.direction,
            source: End { id: None, address: flow.source },
            destination: End { id: None, address: flow.destination.0 },
            process: flow.task.as_ref().map(Process::from),
            method: Method::None,
            tls: None,
            engine: None,
            rule: None,
        }
    }

    fn local(&mut self) -> &mut End {
        match self.direction {
            Direction::Outbound => &mut self.source,
            Direction::Inbound => &mut self.destination,
        }
    }

    fn peer(&mut self) -> &mut End {
        match self.direction {
            Direction::Outbound => &mut self.destination,
            Direction::Inbound => &mut self.source,
        }
    }

    /// Notes what the handshake came to.
    fn agreed(&mut self, session: &Session) -> (Basis, Arc<Rule>) {
        let (local, peer) = (session.permit().parties().workload.id.clone(), session.peer().id.clone());
        self.peer().id = Some(peer.to_string());
        self.method = Method::Mtls;
        self.tls = Some(audit::Tls { group: session.group().to_owned(), cipher: session.cipher().to_owned() });
        (Basis::Mesh { local, peer, path: session.peer().path.clone() }, session.rule().clone())
    }

    /// Notes who the peer proved to be although the handshake failed.
    fn unmet(&mut self, error: handshake::Error) -> (Error, Permit) {
        self.peer().id = error.peer().map(ToString::to_string);
        let (cause, permit) = error.into_parts();
        (Error::Handshake(cause), permit)
    }

    fn live(&self, basis: Basis, progress: Arc<Progress>, stop: watch::Sender<Option<Stop>>) -> Live {
        Live {
            flow: self.flow,
            direction: self.direction,
            source: self.source.clone(),
            destination: self.destination.clone(),
            basis,
            rule: self.rule.clone(),
            tls: self.tls.clone(),
            engine: self.engine,
            process: self.process.clone(),
            since: self.time,
            progress,
            stop,
        }
    }

    fn close(self, decision: Decision, stage: &'static str, end: Ending) {
        let record = Record {
            time: self.time,
            flow: self.flow,
            direction: self.direction,
            protocol: "tcp",
            decision,
            source: self.source,
            destination: self.destination,
            method: self.method,
            tls: self.tls,
            engine: self.engine,
            rule: self.rule.map(|name| name.to_string()),
            process: self.process,
            stage,
            culprit: end.culprit,
            code: end.code,
            reason: end.reason,
            bytes: end.bytes,
            duration_ms: u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        if decision == Decision::Denied {
            self.shared.registry.count_refused(&record);
        }
        self.shared.audit.send(&record);
    }

    /// Refuses the flow that `socket` was accepted for: whoever is on it gets a reset. Without one, it is closed already.
    fn refuse(self, socket: impl Into<Option<TcpStream>>, error: &Error) {
        if let Some(socket) = socket.into() {
            // A socket that cannot be reset is closed by the drop, and carries no byte either way.
            let _ = socket.set_zero_linger();
        }
        let end = Ending {
            culprit: Some(error.culprit()),
            code: error.code(),
            reason: error.to_string(),
            bytes: Bytes::default(),
        };
        self.close(Decision::Denied, error.stage(), end);
    }

    fn finish(self, decision: Decision, tally: &Tally) {
        let end = Ending {
            culprit: tally.closed.culprit(),
            code: tally.closed.code(),
            reason: tally.closed.to_string(),
            bytes: Bytes { sent: tally.sent, received: tally.received },
        };
        // In TLS 1.3 a client has finished before the server judges its certificate: what looked like a session was none.
        let refused = matches!(tally.closed, relay::CloseReason::PeerRefused(_));
        self.close(if refused { Decision::Denied } else { decision }, "relay", end);
    }
}

/// How an attempt ended.
struct Ending {
    culprit: Option<Culprit>,
    code: &'static str,
    reason: String,
    bytes: Bytes,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size<F>(_: impl FnOnce(&'static Shared, &'static Dialler, Flow) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn a_connection_that_is_carried_keeps_little_of_what_made_it() {
        // Each idle connection costs this much, besides its keys and its sockets: making it takes four times as much.
        let size = size(walk);
        assert!(size <= 2560, "{size} bytes");
    }
}
