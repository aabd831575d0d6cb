//! What the self-test saw: cipher by cipher and step by step, and what follows from it.
//!
//! *Invariant:* whatever was not tried counts as failed.

use crate::handshake::Aead;
use serde::Serialize;
use std::fmt;

/// What became of one step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The test did not come that far.
    #[default]
    Untried,
    /// It works.
    Passed,
    /// It does not work, for this reason.
    Failed(String),
}

/// What the kernel does with one cipher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Its name.
    pub cipher: &'static str,
    /// `TLS_TX`: what it sends is sealed, all of it, and opens to what was written.
    pub transmit: Outcome,
    /// `TLS_RX`: what it is sent arrives.
    pub receive: Outcome,
    /// Alerts and handshake records go through, apart from the data.
    pub control: Outcome,
    /// It can be told when the last byte has left, also behind close_notify.
    pub drain: Outcome,
    /// A record that was tampered with is refused.
    pub forgery: Outcome,
    /// Both directions take fresh keys.
    pub rekey: Outcome,
}

/// What the kernel of this host does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Matrix {
    /// `uname -r`.
    pub kernel: String,
    /// The kernel takes up TLS on a socket at all (`TCP_ULP`).
    pub protocol: Outcome,
    /// Each cipher.
    pub ciphers: Vec<Row>,
}

/// Which engine could carry connections here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "engine", rename_all = "lowercase")]
pub enum EngineSupport {
    /// The kernel as well.
    Kernel {
        /// With fresh keys, so with every cipher.
        rekey: bool,
    },
    /// This process.
    User {
        /// The first thing that failed.
        why: String,
    },
}

/// What the kernel was seen to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ability {
    /// It takes fresh keys in an open connection, so that KeyUpdate works (Linux 6.14 on).
    pub rekey: bool,
}

impl Row {
    pub(super) fn new(aead: Aead) -> Self {
        Self {
            cipher: aead.name(),
            transmit: Outcome::Untried,
            receive: Outcome::Untried,
            control: Outcome::Untried,
            drain: Outcome::Untried,
            forgery: Outcome::Untried,
            rekey: Outcome::Untried,
        }
    }

    fn steps(&self) -> [(&'static str, &Outcome); 6] {
        [
            ("transmit", &self.transmit),
            ("receive", &self.receive),
            ("control", &self.control),
            ("drain", &self.drain),
            ("forgery", &self.forgery),
            ("rekey", &self.rekey),
        ]
    }

    /// Why the kernel cannot carry this cipher, if it cannot.
    fn fault(&self, with_rekey: bool) -> Option<String> {
        self.steps().into_iter().filter(|(step, _)| with_rekey || *step != "rekey").find_map(|(step, outcome)| {
            match outcome {
                Outcome::Passed => None,
                Outcome::Untried => Some(format!("{}: {step} was not tried", self.cipher)),
                Outcome::Failed(why) => Some(format!("{}: {step}: {why}", self.cipher)),
            }
        })
    }
}

impl Matrix {
    /// The kernel with fresh keys if it carries every cipher; without them if it carries ChaCha20-Poly1305, which needs
    /// none; otherwise this process.
    pub fn verdict(&self) -> EngineSupport {
        if let Outcome::Failed(why) = &self.protocol {
            return EngineSupport::User { why: format!("there is no TLS in this kernel (TCP_ULP: {why})") };
        }
        if self.ciphers.iter().all(|row| row.fault(true).is_none()) && !self.ciphers.is_empty() {
            return EngineSupport::Kernel { rekey: true };
        }
        let chacha = self.ciphers.iter().find(|row| row.cipher == Aead::ChaCha20Poly1305.name());
        match chacha.map(|row| row.fault(false)) {
            Some(None) => EngineSupport::Kernel { rekey: false },
            Some(Some(why)) => EngineSupport::User { why },
            None => EngineSupport::User { why: "no cipher was tried".into() },
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Untried => "-",
            Self::Passed => "yes",
            Self::Failed(_) => "NO",
        })
    }
}

impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "kernel {}", self.kernel)?;
        writeln!(f, "{:<20}{}", "TLS on a socket", self.protocol)?;
        if self.protocol == Outcome::Passed {
            write!(f, "{:<20}", "")?;
            for (step, _) in self.ciphers.first().iter().flat_map(|row| row.steps()) {
                write!(f, "{step:<10}")?;
            }
            writeln!(f)?;
            for row in &self.ciphers {
                write!(f, "{:<20}", row.cipher)?;
                for (_, outcome) in row.steps() {
                    write!(f, "{outcome:<10}")?;
                }
                writeln!(f)?;
            }
            for row in &self.ciphers {
                if let Some(fault) = row.fault(true) {
                    writeln!(f, "  {fault}")?;
                }
            }
        }
        match self.verdict() {
            EngineSupport::Kernel { rekey: true } => write!(f, "engine kernel: possible, with every cipher"),
            EngineSupport::Kernel { rekey: false } => {
                write!(f, "engine kernel: possible, with ChaCha20-Poly1305 alone, because it takes no fresh keys")
            }
            EngineSupport::User { why } => write!(f, "engine kernel: not possible, because {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rekey: &Outcome, chacha: &Outcome) -> Matrix {
        let row = |aead: Aead, all: &Outcome| Row {
            cipher: aead.name(),
            transmit: all.clone(),
            receive: all.clone(),
            control: all.clone(),
            drain: all.clone(),
            forgery: all.clone(),
            rekey: rekey.clone(),
        };
        let passed = Outcome::Passed;
        Matrix {
            kernel: "6.12.117".into(),
            protocol: Outcome::Passed,
            ciphers: vec![
                row(Aead::Aes128Gcm, &passed),
                row(Aead::Aes256Gcm, &passed),
                row(Aead::ChaCha20Poly1305, chacha),
            ],
        }
    }

    #[test]
    fn the_kernel_is_chosen_for_what_it_was_seen_to_do() {
        let (yes, no) = (Outcome::Passed, Outcome::Failed("Device or resource busy".into()));
        assert_eq!(matrix(&yes, &yes).verdict(), EngineSupport::Kernel { rekey: true });
        assert_eq!(matrix(&no, &yes).verdict(), EngineSupport::Kernel { rekey: false });
        for (rekey, chacha) in [(&yes, &no), (&no, &no), (&yes, &Outcome::Untried)] {
            assert!(matches!(matrix(rekey, chacha).verdict(), EngineSupport::User { .. }));
        }
        let mut nothing = matrix(&yes, &yes);
        nothing.protocol = Outcome::Failed("No such file or directory".into());
        assert!(matches!(nothing.verdict(), EngineSupport::User { why } if why.contains("no TLS in this kernel")));
    }

    #[test]
    fn it_is_printed_as_a_table_with_the_reason() {
        let (yes, no) = (Outcome::Passed, Outcome::Failed("Device or resource busy".into()));
        let printed = matrix(&no, &yes).to_string();
        assert!(
            printed.contains("AES-128-GCM         yes       yes       yes       yes       yes       NO"),
            "{printed}"
        );
        assert!(printed.ends_with("possible, with ChaCha20-Poly1305 alone, because it takes no fresh keys"));
        assert!(printed.contains("AES-128-GCM: rekey: Device or resource busy"));
    }
}
