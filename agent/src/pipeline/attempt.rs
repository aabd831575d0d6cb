//! An attempt: the audit record in the making.
//!
//! *Invariant:* an attempt ends in exactly one record, by `refuse`, `finish` or `reject_stray`.

use super::{AgentState, Error};
use crate::audit::{self, Bytes, Decision, End, Method, Process, Record, Stage};
use crate::authorize::Permit;
use crate::flow::{Direction, Flow};
use crate::handshake::{self, Agreement};
use crate::intercept;
use crate::live::{Basis, Live};
use crate::relay::{self, Progress, Stop, Tally};
use bunter_identity::refusal::{Culprit, Refusal};
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;
use time::OffsetDateTime;
use tokio::net::TcpStream;
use tokio::sync::watch;

/// Records a connection that came to the agent's listener and is no flow, because nobody redirected it there.
pub fn reject_stray(shared: &AgentState, direction: Direction, error: &intercept::Error) {
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
        session: None,
    };
    attempt.close(
        Decision::Denied,
        Stage::Intercept,
        Ending {
            culprit: Some(error.culprit()),
            code: error.code(),
            reason: error.to_string().into(),
            bytes: Bytes::default(),
        },
    );
}

/// What is known about an attempt so far: the audit record in the making.
pub(super) struct Attempt<'a> {
    shared: &'a AgentState,
    began: Instant,
    time: OffsetDateTime,
    flow: u64,
    direction: Direction,
    source: End,
    destination: End,
    process: Option<Process>,
    pub(super) method: Method,
    tls: Option<audit::Tls>,
    pub(super) engine: Option<&'static str>,
    pub(super) rule: Option<Arc<str>>,
    /// The shared connection of which this is a further stream, until the stream is carried. A refusal ends it in order, so
    /// that the peer knows that no byte has gone further; it may make a new connection and hear the reason there.
    pub(super) session: Option<Box<relay::SessionState>>,
}

impl<'a> Attempt<'a> {
    pub(super) fn new(shared: &'a AgentState, flow: &Flow) -> Self {
        Self {
            shared,
            began: Instant::now(),
            time: OffsetDateTime::now_utc(),
            flow: flow.id,
            direction: flow.direction(),
            source: End { id: None, address: flow.source },
            destination: End { id: None, address: flow.destination.0 },
            process: flow.task().map(Process::from),
            method: Method::None,
            tls: None,
            engine: None,
            rule: None,
            session: None,
        }
    }

    pub(super) fn local(&mut self) -> &mut End {
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

    /// Notes what the handshake agreed on, be it of this stream of the connection or of an earlier one. `number`: which
    /// stream this is.
    pub(super) fn agreed(&mut self, agreement: &Agreement, number: u32) -> Basis {
        let (local, peer) = (agreement.local.id.clone(), agreement.peer.id.clone());
        self.peer().id = Some(peer.clone());
        self.method = Method::Mtls;
        self.tls = Some(audit::Tls { group: agreement.group, cipher: agreement.cipher, number });
        Basis::Mesh { local, peer, path: agreement.peer.path.clone() }
    }

    /// Notes who the peer proved to be although the handshake failed.
    pub(super) fn failed(&mut self, error: handshake::Error) -> (Error, Permit) {
        self.peer().id = error.peer().cloned();
        let (cause, permit) = error.into_parts();
        (Error::Handshake(cause), permit)
    }

    pub(super) fn live(&self, basis: Basis, progress: Arc<Progress>, stop: watch::Sender<Option<Stop>>) -> Live {
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

    fn close(self, decision: Decision, stage: Stage, end: Ending) {
        let record = Record {
            time: self.time,
            count: 1,
            last: None,
            flow: self.flow,
            direction: self.direction,
            protocol: "tcp",
            decision,
            source: self.source,
            destination: self.destination,
            method: self.method,
            tls: self.tls,
            engine: self.engine,
            rule: self.rule,
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
            self.shared.audit.send_refusal(record);
        } else {
            self.shared.audit.send(&record);
        }
    }

    /// Refuses the flow that `socket` was accepted for: its other end gets a reset, or the orderly end of a shared
    /// connection. Without a socket: it is closed already.
    pub(super) fn refuse(mut self, socket: impl Into<Option<TcpStream>>, error: &Error) {
        match (socket.into(), self.session.take()) {
            (Some(socket), Some(session)) => session.close(&socket),
            // A socket that cannot be reset is closed by the drop, and carries no byte either way.
            (Some(socket), None) => _ = socket.set_zero_linger(),
            (None, _) => {}
        }
        let end = Ending {
            culprit: Some(error.culprit()),
            code: error.code(),
            reason: error.to_string().into(),
            bytes: Bytes::default(),
        };
        self.close(Decision::Denied, error.stage(), end);
    }

    pub(super) fn finish(self, decision: Decision, tally: &Tally) {
        let end = Ending {
            culprit: tally.closed.culprit(),
            code: tally.closed.code(),
            reason: tally.closed.to_string().into(),
            bytes: Bytes { sent: tally.sent, received: tally.received },
        };
        // In TLS 1.3 a client has finished before the server judges its certificate: what looked like a session was none.
        let refused = matches!(tally.closed, relay::CloseReason::PeerRefused(_));
        self.close(if refused { Decision::Denied } else { decision }, Stage::Relay, end);
    }
}

/// How an attempt ended.
struct Ending {
    culprit: Option<Culprit>,
    code: &'static str,
    reason: Cow<'static, str>,
    bytes: Bytes,
}
