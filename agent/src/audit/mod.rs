//! audit: one [`Record`] per connection attempt, allowed or denied, as one JSON line.
//!
//! A record is made by the pipeline when an attempt is over, or by the control thread for what the kernel refused by
//! itself. Fields are a stable format: the snapshot test below is its definition. Who reads the log must be able to tell
//! the two ends, what authenticated them, who decided and why it ended (R104, R108 to R114).
//!
//! *Invariant:* no key, token or payload byte has a way into a record: its fields are identifiers, numbers and codes.

mod log;
mod repeats;

pub use log::{Health, Log, OpenError, Sender};

use crate::flow::{Comm, Direction};
use bunter_identity::refusal::Culprit;
use bunter_identity::spiffe::SpiffeId;
use serde::Serialize;
use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use time::OffsetDateTime;

/// What became of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// Authenticated, permitted, and carried by mutual TLS.
    Allowed,
    /// Refused; `culprit`, `code` and `reason` say why.
    Denied,
    /// In plaintext by a named rule: a bypass, which the kernel let pass, or a permissive listener.
    Bypassed,
}

/// How the peers were authenticated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// TLS 1.3 mutual authentication with X.509-SVIDs.
    Mtls,
    /// Not at all (R15).
    Plaintext,
    /// The attempt ended before anybody was authenticated.
    None,
}

/// One end of the connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct End {
    /// SPIFFE ID: attested for the local end, verified on the wire for the other; absent if neither happened.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<SpiffeId>,
    /// Address and port as the dialling application knows them; `[::]:0`, and absent, where they are not known or the record
    /// stands for several.
    #[serde(skip_serializing_if = "is_nowhere")]
    pub address: SocketAddr,
}

fn is_nowhere(address: &SocketAddr) -> bool {
    address.ip().is_unspecified() && address.port() == 0
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.id {
            Some(id) => write!(f, "{id} ({})", self.address),
            None => self.address.fmt(f),
        }
    }
}

/// What the handshake agreed on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tls {
    /// Key exchange group.
    pub group: &'static str,
    /// Cipher suite.
    pub cipher: &'static str,
    /// Which connection of the applications on this TLS connection: 1 made the handshake, the others came after it.
    #[serde(rename = "use")]
    pub number: u32,
}

/// The local process, as the kernel recorded it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Process {
    /// Process id in the initial pid namespace.
    pub pid: u32,
    /// Real user id.
    pub uid: u32,
    /// Cgroup id on the unified hierarchy.
    pub cgroup: u64,
    /// Name of the task: a hint for people, chosen by the program itself.
    pub comm: Comm,
}

impl From<&bunter_common::Task> for Process {
    fn from(task: &bunter_common::Task) -> Self {
        Self { pid: task.tgid, uid: task.uid, cgroup: task.cgroup, comm: Comm::of(task) }
    }
}

/// Bytes of the application, seen from this host's workload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Bytes {
    /// From the local workload to the peer.
    pub sent: u64,
    /// From the peer to the local workload.
    pub received: u64,
}

/// Where an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// In the kernel programs, before the agent saw it.
    Kernel,
    /// Accepting and dialling connections, and finding a place for them.
    Intercept,
    /// Finding out whose the connection is.
    Identify,
    /// Asking the policy.
    Authorize,
    /// Finding out who the peer is.
    Handshake,
    /// Handing the keys to the engine.
    Offload,
    /// While bytes moved, or after.
    Relay,
}

/// One connection attempt.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// When the attempt began; the first, where the record stands for several.
    #[serde(serialize_with = "rfc3339")]
    pub time: OffsetDateTime,
    /// How many attempts the record stands for; absent where it is 1, as it is unless something is refused again and again.
    #[serde(skip_serializing_if = "is_one")]
    pub count: u64,
    /// When the last of several was.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "rfc3339_of_last")]
    pub last: Option<OffsetDateTime>,
    /// Number of the flow on this agent; 0 for what the kernel refused by itself.
    pub flow: u64,
    /// Which way, seen from this host's workload.
    pub direction: Direction,
    /// Transport: `tcp` or `udp`.
    pub protocol: &'static str,
    /// What became of it.
    pub decision: Decision,
    /// The dialling end.
    pub source: End,
    /// The dialled end.
    pub destination: End,
    /// How the ends were authenticated.
    pub method: Method,
    /// What TLS agreed on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// `kernel` or `user`: who carried the records.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine: Option<&'static str>,
    /// The policy rule that let it pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(serialize_with = "name")]
    pub rule: Option<Arc<str>>,
    /// The local process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<Process>,
    /// Where it ended.
    pub stage: Stage,
    /// Who has to act, where something went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub culprit: Option<Culprit>,
    /// Stable code of the close reason or of the refusal.
    pub code: &'static str,
    /// The same for people.
    pub reason: Cow<'static, str>,
    /// Bytes carried.
    pub bytes: Bytes,
    /// From accept, or from the kernel's refusal, to the end, in milliseconds.
    pub duration_ms: u64,
}

impl Record {
    /// Appends the JSON line, newline included.
    fn write(&self, line: &mut Vec<u8>) {
        // A record is strings and integers: the only errors serde_json knows here are a failing writer and maps with
        // keys that are no strings, and there is neither.
        _ = serde_json::to_writer(&mut *line, self);
        line.push(b'\n');
    }
}

fn name<S: serde::Serializer>(name: &Option<Arc<str>>, serializer: S) -> Result<S::Ok, S::Error> {
    name.as_deref().serialize(serializer)
}

fn is_one(count: &u64) -> bool {
    *count == 1
}

fn rfc3339_of_last<S: serde::Serializer>(time: &Option<OffsetDateTime>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => rfc3339(time, serializer),
        None => serializer.serialize_none(),
    }
}

fn rfc3339<S: serde::Serializer>(time: &OffsetDateTime, serializer: S) -> Result<S::Ok, S::Error> {
    let format =
        time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");
    match time.to_offset(time::UtcOffset::UTC).format(&format) {
        Ok(text) => serializer.serialize_str(&text),
        Err(error) => Err(serde::ser::Error::custom(error)),
    }
}

#[cfg(test)]
pub(crate) mod tests_support {
    use super::*;

    impl Record {
        pub(crate) fn line(&self) -> Vec<u8> {
            let mut line = Vec::new();
            self.write(&mut line);
            line
        }
    }

    pub(crate) fn record(flow: u64) -> Record {
        Record {
            time: time::macros::datetime!(2026-11-22 05:06:07.000089 UTC),
            count: 1,
            last: None,
            flow,
            direction: Direction::Outbound,
            protocol: "tcp",
            decision: Decision::Allowed,
            source: End {
                id: Some("spiffe://example.org/curl".parse().unwrap()),
                address: "10.0.0.1:40000".parse().unwrap(),
            },
            destination: End {
                id: Some("spiffe://example.org/web".parse().unwrap()),
                address: "10.0.0.2:80".parse().unwrap(),
            },
            method: Method::Mtls,
            tls: Some(Tls { group: "X25519MLKEM768", cipher: "TLS_AES_128_GCM_SHA256", number: 1 }),
            engine: Some("user"),
            rule: Some("curl-to-web".into()),
            process: Some(Process { pid: 4242, uid: 1000, cgroup: 77, comm: Comm::from("curl") }),
            stage: Stage::Relay,
            culprit: None,
            code: "complete",
            reason: "complete".into(),
            bytes: Bytes { sent: 80, received: 612 },
            duration_ms: 12,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::tests_support::record;
    use super::*;

    #[test]
    fn an_allowed_connection_is_one_stable_json_line() {
        let line = String::from_utf8(record(17).line()).unwrap();
        assert_eq!(
            line,
            concat!(
                r#"{"time":"2026-11-22T05:06:07.000089Z","flow":17,"direction":"outbound","protocol":"tcp","#,
                r#""decision":"allowed","source":{"id":"spiffe://example.org/curl","address":"10.0.0.1:40000"},"#,
                r#""destination":{"id":"spiffe://example.org/web","address":"10.0.0.2:80"},"method":"mtls","#,
                r#""tls":{"group":"X25519MLKEM768","cipher":"TLS_AES_128_GCM_SHA256","use":1},"engine":"user","#,
                r#""rule":"curl-to-web","process":{"pid":4242,"uid":1000,"cgroup":77,"comm":"curl"},"stage":"relay","#,
                r#""code":"complete","reason":"complete","bytes":{"sent":80,"received":612},"#,
                r#""duration_ms":12}"#,
                "\n"
            )
        );
    }

    #[test]
    fn a_denied_attempt_names_stage_culprit_and_code_and_leaves_out_what_never_was() {
        let record = Record {
            decision: Decision::Denied,
            destination: End { id: None, address: "[fd00::2]:80".parse().unwrap() },
            method: Method::None,
            tls: None,
            engine: None,
            rule: None,
            process: None,
            stage: Stage::Handshake,
            culprit: Some(Culprit::Peer),
            code: "peer-not-tls",
            reason: "the peer answered with something that is not TLS".into(),
            bytes: Bytes::default(),
            ..record(17)
        };
        let line = String::from_utf8(record.line()).unwrap();
        assert_eq!(
            line,
            concat!(
                r#"{"time":"2026-11-22T05:06:07.000089Z","flow":17,"direction":"outbound","protocol":"tcp","#,
                r#""decision":"denied","source":{"id":"spiffe://example.org/curl","address":"10.0.0.1:40000"},"#,
                r#""destination":{"address":"[fd00::2]:80"},"method":"none","stage":"handshake","culprit":"peer","#,
                r#""code":"peer-not-tls","reason":"the peer answered with something that is not TLS","#,
                r#""bytes":{"sent":0,"received":0},"duration_ms":12}"#,
                "\n"
            )
        );
    }

    #[test]
    fn a_line_for_many_attempts_says_how_many_and_until_when_and_names_no_address_that_is_not_theirs() {
        let record = Record {
            count: 5000,
            last: Some(time::macros::datetime!(2026-11-22 05:06:17 UTC)),
            destination: End { id: None, address: "[::]:0".parse().unwrap() },
            ..record(0)
        };
        let line = String::from_utf8(record.line()).unwrap();
        let begin =
            r#"{"time":"2026-11-22T05:06:07.000089Z","count":5000,"last":"2026-11-22T05:06:17.000000Z","flow":0,"#;
        assert!(line.starts_with(begin) && line.contains(r#""destination":{},"#), "{line}");
    }

    #[test]
    fn a_program_name_with_quotes_and_newlines_stays_one_line() {
        let process = Process { pid: 1, uid: 0, cgroup: 1, comm: Comm::from("a\"b\n{") };
        let line = Record { process: Some(process), ..record(17) }.line();
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        serde_json::from_slice::<serde_json::Value>(&line).unwrap();
    }
}
