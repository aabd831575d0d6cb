//! Why a connection ended: one word for the audit record, and whose doing it was.
//!
//! *Invariant:* exactly one reason means that the stream ended as both programs wanted: `Complete`.

use crate::{
    handshake::{alert_code, alert_name},
    offload::record::BadRecord,
};
use bunter_identity::refusal::Culprit;
use std::fmt;

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// Both programs closed their side, and everything was passed on, as far as this agent can know.
    Complete,
    /// The local program reset the connection, or is gone.
    ApplicationReset,
    /// The local program's socket failed, with this error number.
    ApplicationLost(i32),
    /// The peer reset the connection.
    PeerReset,
    /// The network failed, with this error number.
    PeerLost(i32),
    /// The connection ended without the peer having closed the stream: somebody may have cut it.
    PeerTruncated,
    /// The peer gave the connection up, with this alert.
    PeerAlert(u8),
    /// The peer did not accept this side's certificate or rights, with this alert. In TLS 1.3 a client hears this only
    /// after its own handshake is over.
    PeerRefused(u8),
    /// The peer broke the protocol.
    PeerViolation(Violation),
    /// Nothing moved for the idle timeout of the rule.
    Idle,
    /// The kernel took no bytes although it had room for them.
    Stalled,
    /// The agent was told to end it.
    Stopped(Stop),
    /// The peer took fresh keys, which this kernel cannot follow.
    RekeyImpossible,
    /// The cipher's limit was reached, and fresh keys could not be taken.
    KeysSpent,
}

/// Why the agent ends a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// What allowed the connection is no longer in force: policy, certificate or trust has changed.
    Revoked,
    /// The agent ends and the time to drain is over.
    Drained,
}

/// How a peer broke the protocol, and the alert that it is answered with (RFC 9846 sections 5 and 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A record that is not sealed, or carries no type.
    UnexpectedRecord,
    /// A record that is too long.
    RecordTooLong,
    /// A record that does not authenticate.
    BadMac,
    /// A message that has no place after the handshake.
    UnexpectedMessage,
    /// A message that cannot be read.
    Malformed,
    /// A message with a value that is not allowed.
    IllegalValue,
    /// Records or messages that do nothing, without end.
    Flood,
}

impl CloseReason {
    /// A stable code for the audit record and the metrics.
    pub fn code(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::ApplicationReset => "app-reset",
            Self::ApplicationLost(_) => "app-lost",
            Self::PeerReset => "peer-reset",
            Self::PeerLost(_) => "peer-lost",
            Self::PeerTruncated => "peer-truncated",
            Self::PeerAlert(alert) => alert_code(alert),
            Self::PeerRefused(_) => "peer-refused",
            Self::PeerViolation(violation) => violation.code(),
            Self::Idle => "idle",
            Self::Stalled => "stalled",
            Self::Stopped(Stop::Revoked) => "revoked",
            Self::Stopped(Stop::Drained) => "drained",
            Self::RekeyImpossible => "rekey-impossible",
            Self::KeysSpent => "keys-spent",
        }
    }

    /// Whose doing it was, where anything went wrong.
    pub fn culprit(self) -> Option<Culprit> {
        match self {
            Self::Complete | Self::Stopped(Stop::Drained) => None,
            Self::PeerReset
            | Self::PeerTruncated
            | Self::PeerAlert(_)
            | Self::PeerRefused(_)
            | Self::PeerViolation(_) => Some(Culprit::Peer),
            Self::Idle | Self::Stopped(Stop::Revoked) => Some(Culprit::Policy),
            Self::ApplicationReset
            | Self::ApplicationLost(_)
            | Self::PeerLost(_)
            | Self::Stalled
            | Self::RekeyImpossible
            | Self::KeysSpent => Some(Culprit::Host),
        }
    }

    /// The alert by which the peer is told of this reason; without one it gets a reset.
    ///
    /// Never close_notify: it would tell the peer's program that the stream is complete (RFC 9846 section 6.1).
    pub(super) fn alert(self) -> Option<u8> {
        match self {
            Self::PeerViolation(violation) => Some(violation.alert()),
            Self::Stopped(Stop::Revoked) => Some(49),
            Self::Stopped(Stop::Drained) | Self::Idle => Some(90),
            Self::RekeyImpossible | Self::KeysSpent => Some(80),
            _ => None,
        }
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lost = |number: i32| std::io::Error::from_raw_os_error(number);
        match *self {
            Self::Complete => f.write_str("both programs closed their side, and everything was passed on"),
            Self::ApplicationReset => f.write_str("the local program reset the connection, or is gone"),
            Self::ApplicationLost(number) => write!(f, "the local program's socket failed: {}", lost(number)),
            Self::PeerReset => f.write_str("the peer reset the connection"),
            Self::PeerLost(number) => write!(f, "the network failed: {}", lost(number)),
            Self::PeerTruncated => {
                f.write_str("the connection ended before the peer closed its stream: it may have been cut")
            }
            Self::PeerAlert(alert) => write!(f, "the peer gave the connection up with the alert {}", alert_name(alert)),
            Self::PeerRefused(alert) => {
                write!(f, "the peer refused this side's certificate or rights with the alert {}", alert_name(alert))
            }
            Self::PeerViolation(violation) => write!(f, "the peer broke the TLS protocol: {}", violation.code()),
            Self::Idle => f.write_str("nothing moved for the idle timeout of the rule"),
            Self::Stalled => f.write_str("the kernel took no more bytes although it had room for them"),
            Self::Stopped(Stop::Revoked) => {
                f.write_str("what allowed it is no longer so: policy, certificate or trust has changed")
            }
            Self::Stopped(Stop::Drained) => f.write_str("the agent ended, and the time to drain was over"),
            Self::RekeyImpossible => f.write_str("the peer took fresh keys, which this kernel cannot follow"),
            Self::KeysSpent => f.write_str("the cipher's limit was reached, and fresh keys could not be taken"),
        }
    }
}

impl Violation {
    /// The alert to answer with.
    pub fn alert(self) -> u8 {
        match self {
            Self::UnexpectedRecord | Self::UnexpectedMessage | Self::Flood => 10,
            Self::BadMac => 20,
            Self::RecordTooLong => 22,
            Self::IllegalValue => 47,
            Self::Malformed => 50,
        }
    }

    fn code(self) -> &'static str {
        match self {
            Self::UnexpectedRecord => "peer-unexpected-record",
            Self::RecordTooLong => "peer-record-too-long",
            Self::BadMac => "peer-bad-mac",
            Self::UnexpectedMessage => "peer-unexpected-message",
            Self::Malformed => "peer-malformed-message",
            Self::IllegalValue => "peer-illegal-value",
            Self::Flood => "peer-flood",
        }
    }
}

impl From<BadRecord> for Violation {
    fn from(bad: BadRecord) -> Self {
        match bad {
            BadRecord::Unprotected(_) | BadRecord::Untyped => Self::UnexpectedRecord,
            BadRecord::TooLong => Self::RecordTooLong,
            BadRecord::Forged => Self::BadMac,
        }
    }
}
