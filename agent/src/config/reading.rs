//! From the tables of agent.toml to a [`Config`]: each key with its default, and what is wrong with it.

use super::{Audit, Config, EngineChoice, Limits, Provider, Sessions, Shards, Timeouts, Trust, WhenFull};
use crate::{
    document::{Problems, SourceLocation, Table, clip, nearest},
    units,
};
use bunter_identity::spiffe::TrustDomain;
use std::{collections::BTreeMap, num::NonZeroUsize, path::PathBuf, time::Duration};

/// Keys that the file has.
pub(super) const ROOT: [&str; 13] = [
    "policy_dir",
    "state_dir",
    "run_dir",
    "cgroup",
    "engine",
    "shards",
    "busy_poll",
    "identity",
    "trust",
    "audit",
    "timeouts",
    "limits",
    "sessions",
];
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Reads the whole file. `None`: the problems say why.
pub(super) fn read(root: &Table<'_>, problems: &mut Problems) -> Option<Config> {
    let policy_dir = path(root, "policy_dir", "/etc/bunter/policies", problems);
    let state_dir = path(root, "state_dir", "/var/lib/bunter", problems);
    let run_dir = path(root, "run_dir", "/run/bunter", problems);
    let cgroup = cgroup(root, problems);
    let engines = [("auto", EngineChoice::Auto), ("kernel", EngineChoice::Kernel), ("user", EngineChoice::User)];
    let engine = choice(root, "engine", &engines, problems);
    let shards = shards(root, problems);
    let busy_poll = match root.boolean("busy_poll", problems) {
        Some(busy_poll) => Some(busy_poll.value),
        None => or_default(root, "busy_poll", false),
    };
    let identity = identity(root, problems);
    let trust = trust(root, problems);
    let audit = audit(root, problems);
    let timeouts = timeouts(root, problems);
    let limits = limits(root, problems);
    let sessions = sessions(root, problems);
    Some(Config {
        policy_dir: policy_dir?,
        state_dir: state_dir?,
        run_dir: run_dir?,
        cgroup: cgroup?,
        engine: engine?,
        shards: shards?,
        busy_poll: busy_poll?,
        identity: identity?,
        trust,
        audit: audit?,
        timeouts: timeouts?,
        limits: limits?,
        sessions: sessions?,
    })
}

/// A key that was written wrongly has no value; one that was not written has the default.
fn or_default<T>(table: &Table<'_>, key: &str, default: T) -> Option<T> {
    (!table.has(key)).then_some(default)
}

fn path(table: &Table<'_>, key: &'static str, default: &str, problems: &mut Problems) -> Option<PathBuf> {
    let Some(text) = table.text(key, problems) else { return or_default(table, key, default.into()) };
    if text.value.starts_with('/') {
        return Some(text.value.into());
    }
    let instead = format!("write an absolute path, such as {key} = \"{default}\"");
    problems.add(&text.place, format!("`{key}` cannot be `{}`", clip(text.value)), instead);
    None
}

fn cgroup(root: &Table<'_>, problems: &mut Problems) -> Option<String> {
    let Some(text) = root.text("cgroup", problems) else { return or_default(root, "cgroup", "/".into()) };
    let inside = text.value.strip_prefix('/');
    if inside.is_some_and(|inside| inside.is_empty() || inside.split('/').all(|part| !matches!(part, "" | "." | "..")))
    {
        return Some(text.value.to_owned());
    }
    let instead = "write a path on the unified hierarchy, such as cgroup = \"/system.slice\", or \"/\" for all";
    problems.add(&text.place, format!("`cgroup` cannot be `{}`", clip(text.value)), instead);
    None
}

/// One of a few words; the first is the default.
fn choice<T: Copy>(table: &Table<'_>, key: &'static str, words: &[(&str, T)], problems: &mut Problems) -> Option<T> {
    let Some(text) = table.text(key, problems) else {
        return or_default(table, key, words.first().map(|(_, value)| *value)).flatten();
    };
    if let Some((_, value)) = words.iter().find(|(word, _)| *word == text.value) {
        return Some(*value);
    }
    let known = || words.iter().map(|(word, _)| *word);
    let instead = match nearest(text.value, known()) {
        Some(near) => format!("write \"{near}\""),
        None => format!("write {}", known().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(" or ")),
    };
    problems.add(&text.place, format!("`{key}` cannot be `{}`", clip(text.value)), instead);
    None
}

fn shards(root: &Table<'_>, problems: &mut Problems) -> Option<Shards> {
    let Some(text) = root.text_or_digits("shards", problems) else { return or_default(root, "shards", Shards::Auto) };
    let number = text.value.parse::<usize>().ok().filter(|number| *number <= bunter_common::MAX_SHARDS);
    match (text.value.as_str(), number.and_then(NonZeroUsize::new)) {
        ("auto", _) => Some(Shards::Auto),
        (_, Some(number)) => Some(Shards::Exactly(number)),
        _ => {
            let instead = format!("write shards = \"auto\", or a number from 1 to {}", bunter_common::MAX_SHARDS);
            problems.add(&text.place, format!("`shards` cannot be `{}`", clip(&text.value)), instead);
            None
        }
    }
}

fn identity(root: &Table<'_>, problems: &mut Problems) -> Option<Provider> {
    root.require("identity", "[identity] and provider = \"embedded\" below it", problems);
    let table = root.table("identity", &["provider", "ca_dir", "svid_ttl"], problems)?;
    table.require("provider", "provider = \"embedded\"", problems);
    let provider = choice(&table, "provider", &[("embedded", ())], problems);
    let ca_dir = path(&table, "ca_dir", "/etc/bunter/ca", problems);
    let svid_ttl = duration(&table, "svid_ttl", "1h", (Duration::from_secs(1), 30 * DAY), problems);
    provider.and(Some(Provider::Embedded { ca_dir: ca_dir?, svid_ttl: svid_ttl? }))
}

fn trust(root: &Table<'_>, problems: &mut Problems) -> Vec<Trust> {
    let mut trust = Vec::new();
    let mut seen: BTreeMap<TrustDomain, SourceLocation> = BTreeMap::new();
    for table in root.tables("trust", &["trust_domain", "bundle", "crl"], problems) {
        let name = table.required_text("trust_domain", "trust_domain = \"example.net\"", problems);
        table.require("bundle", "bundle = \"/etc/bunter/example.net.pem\"", problems);
        let bundle = path(&table, "bundle", "/etc/bunter/example.net.pem", problems);
        let crl = table.has("crl").then(|| path(&table, "crl", "/etc/bunter/example.net.crl.pem", problems)).flatten();
        let Some(name) = name else { continue };
        match TrustDomain::parse(name.value) {
            Ok(trust_domain) => {
                if let Some(first) = seen.insert(trust_domain.clone(), name.place.clone()) {
                    let what = format!("trust domain {trust_domain} is there twice, first at {first}");
                    problems.add(&name.place, what, "put all its authorities into one bundle file, and remove one");
                }
                trust.extend(bundle.map(|bundle| Trust { trust_domain, bundle, crl }));
            }
            Err(error) => {
                let what = format!("trust domain `{}`: {error}", clip(name.value));
                problems.add(&name.place, what, "write a name such as \"example.net\"");
            }
        }
    }
    trust
}

fn audit(root: &Table<'_>, problems: &mut Problems) -> Option<Audit> {
    let default = "/var/log/bunter/audit.jsonl";
    let Some(table) = root.table("audit", &["path", "when_full"], problems) else {
        return or_default(root, "audit", Audit { path: default.into(), when_full: WhenFull::Refuse });
    };
    let path = path(&table, "path", default, problems);
    let words = [("refuse", WhenFull::Refuse), ("continue", WhenFull::Continue)];
    let when_full = choice(&table, "when_full", &words, problems);
    Some(Audit { path: path?, when_full: when_full? })
}

fn timeouts(root: &Table<'_>, problems: &mut Problems) -> Option<Timeouts> {
    let ten = Duration::from_secs(10);
    let Some(table) = root.table("timeouts", &["dial", "handshake", "drain", "stall"], problems) else {
        let (drain, stall) = (Duration::from_secs(30), Duration::from_secs(60));
        let default = Timeouts { dial: ten, handshake: ten, drain, stall };
        return or_default(root, "timeouts", default);
    };
    let (least, most) = (Duration::from_millis(10), Duration::from_secs(60 * 60));
    let dial = duration(&table, "dial", "10s", (least, most), problems);
    let handshake = duration(&table, "handshake", "10s", (least, most), problems);
    let drain = duration(&table, "drain", "30s", (Duration::ZERO, DAY), problems);
    let stall = duration(&table, "stall", "1m", (Duration::from_secs(1), most), problems);
    Some(Timeouts { dial: dial?, handshake: handshake?, drain: drain?, stall: stall? })
}

fn limits(root: &Table<'_>, problems: &mut Problems) -> Option<Limits> {
    let default = Limits { connections: 65_536, handshakes: 256, waiting: 16_384 };
    let Some(table) = root.table("limits", &["connections", "handshakes", "waiting"], problems) else {
        return or_default(root, "limits", default);
    };
    let mut number = |key, default: usize, most| match table.number(key, 1, most, problems) {
        Some(number) => usize::try_from(number.value).ok(),
        None => or_default(&table, key, default),
    };
    let connections = number("connections", default.connections, 1 << 20);
    let handshakes = number("handshakes", default.handshakes, 1 << 16);
    let waiting = number("waiting", default.waiting, 1 << 20);
    Some(Limits { connections: connections?, handshakes: handshakes?, waiting: waiting? })
}

fn sessions(root: &Table<'_>, problems: &mut Problems) -> Option<Sessions> {
    let default = Sessions::default();
    let Some(table) = root.table("sessions", &["reuse", "idle", "age", "uses", "spares"], problems) else {
        return or_default(root, "sessions", default);
    };
    let reuse = match table.boolean("reuse", problems) {
        Some(reuse) => Some(reuse.value),
        None => or_default(&table, "reuse", default.reuse),
    };
    let idle = duration(&table, "idle", "30s", (Duration::from_secs(1), DAY), problems);
    let age = duration(&table, "age", "10m", (Duration::from_secs(1), DAY), problems);
    let uses = match table.number("uses", 1, 1 << 30, problems) {
        Some(uses) => u32::try_from(uses.value).ok(),
        None => or_default(&table, "uses", default.uses),
    };
    let spares = match table.number("spares", 1, 1 << 16, problems) {
        Some(spares) => usize::try_from(spares.value).ok(),
        None => or_default(&table, "spares", default.spares),
    };
    Some(Sessions { reuse: reuse?, idle: idle?, age: age?, uses: uses?, spares: spares? })
}

fn duration(
    table: &Table<'_>,
    key: &'static str,
    default: &str,
    (least, most): (Duration, Duration),
    problems: &mut Problems,
) -> Option<Duration> {
    let Some(text) = table.text(key, problems) else {
        return or_default(table, key, units::duration(default).ok()).flatten();
    };
    match units::duration(text.value) {
        Ok(value) if (least..=most).contains(&value) => Some(value),
        Ok(value) => {
            let instead =
                format!("write {} to {}, such as {key} = \"{default}\"", units::print(least), units::print(most));
            problems.add(&text.place, format!("`{key}` cannot be {}", units::print(value)), instead);
            None
        }
        Err(error) => {
            problems.add(&text.place, format!("`{key}`: {error}"), format!("write {key} = \"{default}\""));
            None
        }
    }
}
