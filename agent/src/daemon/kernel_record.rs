//! Audit records of what the kernel programs did by themselves.

use crate::audit::{Bytes, Decision, End, Method, Process, Record};
use crate::intercept::{Direction, Refused, socket_address};
use crate::policy::Policy;
use crate::refusal::Culprit;
use time::{Duration, OffsetDateTime};
use wimsey_common::*;

/// Connections or datagrams that were refused.
pub(super) fn refused(refused: &Refused, policy: &Policy) -> Record {
    let Refused { event, count, age, last_age } = refused;
    let ago = |age: u64| OffsetDateTime::now_utc() - Duration::nanoseconds(i64::try_from(age).unwrap_or(i64::MAX));
    let mut record = refusal(event, policy);
    if event.destination_port == 0 && event.destination == [0; 16] {
        record.reason.to_mut().push_str(" (too many destinations in one second to name each)");
    }
    if *count == 1 {
        return record;
    }
    Record { time: ago(*age), count: *count, last: Some(ago(*last_age)), ..record }
}

fn refusal(event: &Event, policy: &Policy) -> Record {
    let (culprit, code, reason) = match event.reason {
        REASON_NO_IDENTITY => (
            Culprit::Policy,
            "no-identity",
            "no registration entry can match this process, and the destination takes identities only: add a [[workload]]",
        ),
        REASON_NOT_ALLOWED => (
            Culprit::Policy,
            "not-allowed",
            "no rule lets this workload reach this destination: add an [[allow]] or [[bypass]]",
        ),
        REASON_MAP_FULL => (
            Culprit::Host,
            "map-full",
            "a map of the kernel programs is full: fewer connections, or an agent with larger maps",
        ),
        REASON_QUOTA => (
            Culprit::Host,
            "quota",
            "this user has as many connections through the agent as one user may have, a quarter of all: close some, or run \
             workloads under users of their own",
        ),
        REASON_GUARD => (
            Culprit::Host,
            "guard",
            "a SYN to a mesh destination did not come through the agent: the socket is older than the agent, or from a cgroup \
             that is not covered",
        ),
        REASON_UDP => (
            Culprit::Policy,
            "udp-refused",
            "no [[udp]] rule lets this workload send datagrams to this mesh destination",
        ),
        REASON_NO_AGENT => (Culprit::Host, "no-agent", "no agent was there to speak for this connection"),
        _ => (
            Culprit::Ourselves,
            "kernel-refused",
            "the kernel programs refused it for a reason this agent does not know",
        ),
    };
    record(event, policy, Decision::Denied, Some(culprit), code, reason)
}

/// A connection that passed by a named bypass.
pub(super) fn bypassed(event: &Event, policy: &Policy) -> Record {
    record(event, policy, Decision::Bypassed, None, "bypassed", "passed in plaintext by a named rule")
}

fn record(
    event: &Event,
    policy: &Policy,
    decision: Decision,
    culprit: Option<Culprit>,
    code: &'static str,
    reason: &'static str,
) -> Record {
    let source = policy.workload(event.task.workload).map(|workload| workload.id.clone());
    let destination = socket_address(&event.destination, event.destination_port);
    let expected = policy.expected(destination).map(ToString::to_string);
    Record {
        time: OffsetDateTime::now_utc(),
        count: 1,
        last: None,
        flow: 0,
        direction: direction(event),
        protocol: if event.protocol == 17 { "udp" } else { "tcp" },
        decision,
        source: End { id: source, address: socket_address(&event.source, event.source_port) },
        // Nobody was authenticated there: who was expected belongs into the reason.
        destination: End { id: None, address: destination },
        method: if decision == Decision::Bypassed { Method::Plaintext } else { Method::None },
        tls: None,
        engine: None,
        rule: policy.rule(event.rule).map(|rule| rule.name.clone()),
        process: (event.task.tgid != 0).then(|| Process::from(&event.task)),
        stage: "kernel",
        culprit,
        code,
        reason: match expected {
            Some(expected) => format!("{reason} (expected there: {expected})").into(),
            None => reason.into(),
        },
        bytes: Bytes::default(),
        duration_ms: 0,
    }
}

/// Only a connection that came from the network is refused without a task that asked for it.
fn direction(event: &Event) -> Direction {
    if event.reason == REASON_NO_AGENT && event.task.tgid == 0 { Direction::Inbound } else { Direction::Outbound }
}
