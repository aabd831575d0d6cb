//! Audit records of what the kernel programs did by themselves.

use crate::audit::{Bytes, Decision, End, Method, Process, Record, Stage};
use crate::flow::Direction;
use crate::intercept::{Refused, socket_address};
use crate::policy::Policy;
use bunter_common::*;
use bunter_identity::refusal::Culprit;
use time::{Duration, OffsetDateTime};

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
        REASON_NO_CONFIG => (Culprit::Host, "no-config", "the kernel programs had no policy yet: try again"),
        REASON_UNDECIDED => (
            Culprit::Host,
            "listener-undecided",
            "it was not known yet whether whoever listens there is a workload: try again",
        ),
        REASON_DEVICE => (
            Culprit::Host,
            "device-bound",
            "the socket is bound to a device (SO_BINDTODEVICE), so that it cannot reach the agent: leave that out",
        ),
        REASON_NEVER_ARRIVED => (
            Culprit::Host,
            "never-arrived",
            "the connection was redirected to the agent and never stood: the program gave it up, or loopback did not carry it",
        ),
        REASON_PROTOCOL => (
            Culprit::Policy,
            "protocol-refused",
            "a workload reaches a mesh destination by TCP, and by UDP where a [[udp]] rule says so, and by nothing else",
        ),
        REASON_NAMESPACE => (
            Culprit::Host,
            "namespace-without-agent",
            "the program is enrolled and in a network namespace without an agent, where nobody can protect its connection: \
             run one there, or the program in the host's",
        ),
        REASON_DIRECT => (
            Culprit::Host,
            "dialled-the-agent",
            "somebody on this host dialled a listener of the agent itself: dial the destination, and the connection is \
             redirected to it by itself",
        ),
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
        protocol: protocol(event.protocol),
        decision,
        source: End { id: source, address: socket_address(&event.source, event.source_port) },
        // Nobody was authenticated at the destination, so the identity that was expected there goes into the reason.
        destination: End { id: None, address: destination },
        method: if decision == Decision::Bypassed { Method::Plaintext } else { Method::None },
        tls: None,
        engine: None,
        rule: policy.rule(event.rule).map(|rule| rule.name.clone()),
        process: (event.task.tgid != 0).then(|| Process::from(&event.task)),
        stage: Stage::Kernel,
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
    let at_a_listener = matches!(event.reason, REASON_NO_AGENT | REASON_UNDECIDED | REASON_DIRECT);
    if at_a_listener && event.task.tgid == 0 { Direction::Inbound } else { Direction::Outbound }
}

/// As IANA's registry of protocol numbers has them.
fn protocol(number: u32) -> &'static str {
    match number {
        1 => "icmp",
        17 => "udp",
        33 => "dccp",
        58 => "ipv6-icmp",
        132 => "sctp",
        136 => "udplite",
        6 => "tcp",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Accounts, Source};

    #[test]
    fn every_reason_of_the_kernel_programs_has_a_code_and_words_of_its_own() {
        let source = Source { file: "p.toml".into(), text: "trust_domain = \"td\"".into() };
        let policy = Policy::parse("p", &[source], &Accounts::default()).unwrap();
        let mut event: Event = Event {
            kind: EVENT_REFUSED,
            reason: 0,
            rule: 0,
            protocol: 6,
            task: Task { tgid: 0, uid: 0, gid: 0, workload: 0, cgroup: 0, at: 0, comm: [0; 16] },
            cookie: 0,
            source: [0; 16],
            destination: [0; 16],
            source_port: 0,
            destination_port: 1,
            destination_id: 0,
            total: 1,
            repeats: 1,
            pad: 0,
        };
        let mut codes = std::collections::HashSet::new();
        for reason in REASONS {
            event.reason = reason;
            let record = refusal(&event, &policy);
            assert!(
                record.culprit != Some(Culprit::Ourselves) && codes.insert(record.code),
                "{reason}: {}",
                record.code
            );
        }
        event.reason = u32::MAX;
        assert_eq!(refusal(&event, &policy).code, "kernel-refused");
        event.protocol = 132;
        assert_eq!(refusal(&event, &policy).protocol, "sctp");
    }
}
