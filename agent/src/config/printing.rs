//! A [`Config`] as a file that says the same, defaults included.

use super::{Config, EngineChoice, Limits, Provider, Sessions, Shards, Timeouts, WhenFull};
use crate::units;
use std::{fmt, path::Path};

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = |path: &Path| quoted(&path.display().to_string());
        writeln!(f, "policy_dir = {}", path(&self.policy_dir))?;
        writeln!(f, "state_dir = {}", path(&self.state_dir))?;
        writeln!(f, "run_dir = {}", path(&self.run_dir))?;
        writeln!(f, "cgroup = {}", quoted(&self.cgroup))?;
        let engine = match self.engine {
            EngineChoice::Auto => "auto",
            EngineChoice::Kernel => "kernel",
            EngineChoice::User => "user",
        };
        writeln!(f, "engine = \"{engine}\"")?;
        match self.shards {
            Shards::Auto => writeln!(f, "shards = \"auto\"")?,
            Shards::Exactly(number) => writeln!(f, "shards = {number}")?,
        }
        writeln!(f, "busy_poll = {}", self.busy_poll)?;
        let Provider::Embedded { ca_dir, svid_ttl } = &self.identity;
        writeln!(f, "\n[identity]\nprovider = \"embedded\"\nca_dir = {}", path(ca_dir))?;
        writeln!(f, "svid_ttl = \"{}\"", units::print(*svid_ttl))?;
        for trust in &self.trust {
            writeln!(f, "\n[[trust]]\ntrust_domain = \"{}\"\nbundle = {}", trust.trust_domain, path(&trust.bundle))?;
            if let Some(crl) = &trust.crl {
                writeln!(f, "crl = {}", path(crl))?;
            }
        }
        let when_full = match self.audit.when_full {
            WhenFull::Refuse => "refuse",
            WhenFull::Continue => "continue",
        };
        writeln!(f, "\n[audit]\npath = {}\nwhen_full = \"{when_full}\"", path(&self.audit.path))?;
        let Timeouts { dial, handshake, drain, stall } = self.timeouts;
        writeln!(f, "\n[timeouts]\ndial = \"{}\"\nhandshake = \"{}\"", units::print(dial), units::print(handshake))?;
        writeln!(f, "drain = \"{}\"\nstall = \"{}\"", units::print(drain), units::print(stall))?;
        let Limits { connections, handshakes, waiting } = self.limits;
        writeln!(f, "\n[limits]\nconnections = {connections}\nhandshakes = {handshakes}\nwaiting = {waiting}")?;
        let Sessions { reuse, idle, age, uses, spares } = self.sessions;
        writeln!(
            f,
            "\n[sessions]\nreuse = {reuse}\nidle = \"{}\"\nage = \"{}\"",
            units::print(idle),
            units::print(age)
        )?;
        writeln!(f, "uses = {uses}\nspares = {spares}")
    }
}

/// A TOML basic string: control characters, quotes and backslashes escaped.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            control if control.is_control() => quoted.push_str(&format!("\\u{:04X}", u32::from(control))),
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    quoted
}
