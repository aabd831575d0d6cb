//! agent.toml: where things are, which engine, how much and how long. What is allowed is the policy's business.
//!
//! One file comes in, a [`Config`] of real types goes out, or everything that is wrong with the file. Every key has a
//! default but `[identity]`, which has to be chosen.
//!
//! *Invariant:* unknown keys are refused, and no setting makes the agent less strict about who its peers are.

use crate::{
    document::{self, Document, Place, Problems, Purpose, Table, clip, nearest},
    refusal::{Culprit, Refusal},
    spiffe::TrustDomain,
    units,
};
use std::{
    collections::BTreeMap,
    fmt,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Directory of the policy.
    pub policy_dir: PathBuf,
    /// What must outlive a restart.
    pub state_dir: PathBuf,
    /// Admin socket and lock; root only.
    pub run_dir: PathBuf,
    /// Root of the covered cgroups, on the unified hierarchy: `/` is all of them.
    pub cgroup: String,
    /// Which engine carries records.
    pub engine: EngineChoice,
    /// How many data shards.
    pub shards: Shards,
    /// Do shards stay awake for a moment where bytes follow one another closely?
    pub busy_poll: bool,
    /// Who issues the identities of this host.
    pub identity: Provider,
    /// Bundles of further trust domains; or, while an authority is replaced, the other one of the host's own.
    pub trust: Vec<Trust>,
    /// Where audit records go.
    pub audit: Audit,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// How many there may be.
    pub limits: Limits,
    /// Connections between two agents that are used again.
    pub sessions: Sessions,
}

/// Which engine carries records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineChoice {
    /// The kernel where it passes the self-test at start, otherwise this process.
    Auto,
    /// The kernel, or the agent does not start.
    Kernel,
    /// This process.
    User,
}

/// How many data shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shards {
    /// One for each CPU that the agent may use.
    Auto,
    /// So many.
    Exactly(NonZeroUsize),
}

/// Who issues the identities of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Provider {
    /// A local authority, made by `wimsey ca init`.
    Embedded {
        /// Directory of its key, certificate and bundle.
        ca_dir: PathBuf,
        /// Lifetime of an SVID.
        svid_ttl: Duration,
    },
}

/// A further trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trust {
    /// Its name.
    pub trust_domain: TrustDomain,
    /// PEM file of its authorities.
    pub bundle: PathBuf,
    /// PEM file of what they revoked, where there is one.
    pub crl: Option<PathBuf>,
}

/// Where audit records go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audit {
    /// File of JSON lines.
    pub path: PathBuf,
    /// What happens when it cannot be written.
    pub when_full: WhenFull,
}

/// What happens to connections when no audit record can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// New connections are refused.
    Refuse,
    /// Connections go on; lost records are counted.
    Continue,
}

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP connect to a peer or to a local workload.
    pub dial: Duration,
    /// The TLS handshake as a whole.
    pub handshake: Duration,
    /// From SIGTERM until the connections that are left are closed.
    pub drain: Duration,
    /// Until a connection is given up whose kernel has room for its bytes and takes none of them.
    pub stall: Duration,
}

/// How many there may be at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections, those included that are still being made.
    pub connections: usize,
    /// Handshakes under way.
    pub handshakes: usize,
    /// Handshakes that wait until others are over.
    pub waiting: usize,
}

/// Connections between two agents that are used again: whether, how many, how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sessions {
    /// Whether at all.
    pub reuse: bool,
    /// How long an unused one is kept.
    pub idle: Duration,
    /// How long after its handshake one is used again.
    pub age: Duration,
    /// How often one is used.
    pub uses: u32,
    /// Unused ones that a shard keeps for one workload and destination.
    pub spares: usize,
}

impl Default for Sessions {
    fn default() -> Self {
        let (idle, age) = (Duration::from_secs(30), Duration::from_secs(10 * 60));
        Self { reuse: true, idle, age, uses: 10_000, spares: 64 }
    }
}

impl Sessions {
    /// May a connection of this age, after so many uses, have another?
    pub fn allows(&self, since: Instant, uses: u32) -> bool {
        self.reuse && uses < self.uses && since.elapsed() < self.age
    }
}

/// A configuration that is not taken, and everything that is wrong with it: one line each.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problems}")]
pub struct InvalidConfig {
    /// What is wrong, by line.
    pub problems: Problems,
}

impl Refusal for InvalidConfig {
    fn culprit(&self) -> Culprit {
        Culprit::Policy
    }
    fn code(&self) -> &'static str {
        "config-invalid"
    }
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, InvalidConfig> {
        let file = path.display().to_string();
        document::read(path, Purpose::InForce).map_or_else(
            |(what, instead)| {
                let mut problems = Problems::default();
                problems.add(&Place { file: file.as_str().into(), line: 0 }, what, instead);
                Err(InvalidConfig { problems })
            },
            |text| Self::parse(&file, &text),
        )
    }

    /// Checks a text. No I/O: whether the paths exist is found by those who use them.
    pub fn parse(file: &str, text: &str) -> Result<Self, InvalidConfig> {
        let mut problems = Problems::default();
        let config = Document::parse(&file.into(), text, &mut problems).map(|document| {
            let root = document.root(&ROOT, &mut problems);
            read(&root, &mut problems)
        });
        match config {
            Some(Some(config)) if problems.is_empty() => Ok(config),
            _ => Err(InvalidConfig { problems: problems.sorted() }),
        }
    }

    /// Path of the admin socket.
    pub fn admin_socket(&self) -> PathBuf {
        self.run_dir.join("admin.sock")
    }

    /// The configuration as a whole, defaults included, as a file that would say the same.
    pub fn print(&self) -> String {
        self.to_string()
    }
}

const ROOT: [&str; 13] = [
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

fn read(root: &Table<'_>, problems: &mut Problems) -> Option<Config> {
    let policy_dir = path(root, "policy_dir", "/etc/wimsey/policies", problems);
    let state_dir = path(root, "state_dir", "/var/lib/wimsey", problems);
    let run_dir = path(root, "run_dir", "/run/wimsey", problems);
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
    let number = text.value.parse::<usize>().ok().filter(|number| *number <= wimsey_common::MAX_SHARDS);
    match (text.value.as_str(), number.and_then(NonZeroUsize::new)) {
        ("auto", _) => Some(Shards::Auto),
        (_, Some(number)) => Some(Shards::Exactly(number)),
        _ => {
            let instead = format!("write shards = \"auto\", or a number from 1 to {}", wimsey_common::MAX_SHARDS);
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
    let ca_dir = path(&table, "ca_dir", "/etc/wimsey/ca", problems);
    let svid_ttl = duration(&table, "svid_ttl", "1h", (Duration::from_secs(1), 30 * DAY), problems);
    provider.and(Some(Provider::Embedded { ca_dir: ca_dir?, svid_ttl: svid_ttl? }))
}

fn trust(root: &Table<'_>, problems: &mut Problems) -> Vec<Trust> {
    let mut trust = Vec::new();
    let mut seen: BTreeMap<TrustDomain, Place> = BTreeMap::new();
    for table in root.tables("trust", &["trust_domain", "bundle", "crl"], problems) {
        let name = table.required_text("trust_domain", "trust_domain = \"example.net\"", problems);
        table.require("bundle", "bundle = \"/etc/wimsey/example.net.pem\"", problems);
        let bundle = path(&table, "bundle", "/etc/wimsey/example.net.pem", problems);
        let crl = table.has("crl").then(|| path(&table, "crl", "/etc/wimsey/example.net.crl.pem", problems)).flatten();
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
    let default = "/var/log/wimsey/audit.jsonl";
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LEAST: &str = "[identity]\nprovider = \"embedded\"\n";

    fn refusal(text: &str) -> String {
        Config::parse("agent.toml", text).map_or_else(|error| error.to_string(), |_| "accepted".into())
    }

    #[test]
    fn everything_but_the_provider_has_a_default() {
        let config = Config::parse("agent.toml", LEAST).unwrap();
        assert_eq!(config.admin_socket(), Path::new("/run/wimsey/admin.sock"));
        insta::assert_snapshot!(config.print(), @r#"
        policy_dir = "/etc/wimsey/policies"
        state_dir = "/var/lib/wimsey"
        run_dir = "/run/wimsey"
        cgroup = "/"
        engine = "auto"
        shards = "auto"
        busy_poll = false

        [identity]
        provider = "embedded"
        ca_dir = "/etc/wimsey/ca"
        svid_ttl = "1h"

        [audit]
        path = "/var/log/wimsey/audit.jsonl"
        when_full = "refuse"

        [timeouts]
        dial = "10s"
        handshake = "10s"
        drain = "30s"
        stall = "1m"

        [limits]
        connections = 65536
        handshakes = 256
        waiting = 16384

        [sessions]
        reuse = true
        idle = "30s"
        age = "10m"
        uses = 10000
        spares = 64
        "#);
    }

    #[test]
    fn the_page_in_docs_names_every_key_and_its_default() {
        let page = include_str!("../../docs/CONFIGURATION.md");
        let mut blocks = page.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next());
        let (keys, trust) = (blocks.next().unwrap(), blocks.next().unwrap());
        assert_eq!(Config::parse("agent.toml", keys), Config::parse("agent.toml", LEAST));
        let printed = Config::parse("agent.toml", LEAST).unwrap().print();
        for key in printed.lines().filter_map(|line| line.split(" = ").next().filter(|key| !key.is_empty())) {
            assert!(keys.lines().any(|line| line.starts_with(key)), "{key} is not on the page");
        }
        let trust = Config::parse("agent.toml", &format!("{keys}{trust}")).unwrap().trust;
        assert!(trust.len() == 1 && trust[0].crl.is_some());
    }

    #[test]
    fn what_is_printed_reads_the_same() {
        let text = "policy_dir = \"/p \\\"q\\\"\\\\\"\ncgroup = \"/a.slice\"\nengine = \"user\"\nshards = 3\n\
            [identity]\nprovider = \"embedded\"\nsvid_ttl = \"1h30m\"\n\
            [[trust]]\ntrust_domain = \"example.net\"\nbundle = \"/b.pem\"\ncrl = \"/c.pem\"\n[audit]\nwhen_full = \"continue\"\n\
            [timeouts]\ndrain = \"0s\"\n[limits]\nconnections = 5\n";
        let config = Config::parse("agent.toml", text).unwrap();
        assert_eq!(config.shards, Shards::Exactly(NonZeroUsize::new(3).unwrap()));
        assert_eq!(config.limits, Limits { connections: 5, handshakes: 256, waiting: 16_384 });
        assert_eq!(Config::parse("agent.toml", &config.print()), Ok(config));
    }

    #[test]
    fn each_mistake_gets_one_line_that_says_what_to_write() {
        for (text, expected) in [
            ("", "agent.toml: the file has no `identity`; write [identity] and provider = \"embedded\" below it"),
            ("[identity]\n", "agent.toml:1: [identity] has no `provider`; write provider = \"embedded\""),
            ("[identity]\nprovider = \"spire\"\n", "agent.toml:2: `provider` cannot be `spire`; write \"embedded\""),
            ("policy_dri = \"/x\"", "agent.toml:1: unknown key `policy_dri` in the file; write `policy_dir`"),
            (
                "policy_dir = \"x\"",
                "agent.toml:1: `policy_dir` cannot be `x`; write an absolute path, such as policy_dir = \"/etc/wimsey/policies\"",
            ),
            ("engine = \"kernal\"", "agent.toml:1: `engine` cannot be `kernal`; write \"kernel\""),
            ("engine = \"fast\"", "agent.toml:1: `engine` cannot be `fast`; write \"auto\" or \"kernel\" or \"user\""),
            ("shards = 65", "agent.toml:1: `shards` cannot be `65`; write shards = \"auto\", or a number from 1 to 64"),
            ("shards = 0", "agent.toml:1: `shards` cannot be `0`; write shards = \"auto\", or a number from 1 to 64"),
            (
                "cgroup = \"system.slice\"",
                "agent.toml:1: `cgroup` cannot be `system.slice`; \
                 write a path on the unified hierarchy, such as cgroup = \"/system.slice\", or \"/\" for all",
            ),
            (
                "[timeouts]\ndial = 5",
                "agent.toml:2: `dial` must be a text, and this is a whole number; \
                 put it in double quotes, with its unit if it has one",
            ),
            (
                "[timeouts]\ndial = \"5\"",
                "agent.toml:2: `dial`: the number 5 has no unit: write \"5s\" for seconds (units are ms, s, m, h and d); \
                 write dial = \"10s\"",
            ),
            (
                "[timeouts]\nhandshake = \"2h\"",
                "agent.toml:2: `handshake` cannot be 2h; write 10ms to 1h, such as handshake = \"10s\"",
            ),
            (
                "[limits]\nconnections = 0",
                "agent.toml:2: `connections` cannot be 0; write a whole number from 1 to 1048576, without quotes",
            ),
            (
                "[audit]\nwhen_full = \"drop\"",
                "agent.toml:2: `when_full` cannot be `drop`; write \"refuse\" or \"continue\"",
            ),
            (
                "[[trust]]\ntrust_domain = \"example.net\"",
                "agent.toml:1: [[trust]] has no `bundle`; write bundle = \"/etc/wimsey/example.net.pem\"",
            ),
            (
                "[[trust]]\ntrust_domain = \"a\"\nbundle = \"/a\"\ncrl = \"a.crl\"",
                "agent.toml:4: `crl` cannot be `a.crl`; \
                 write an absolute path, such as crl = \"/etc/wimsey/example.net.crl.pem\"",
            ),
            (
                "[[trust]]\ntrust_domain = \"a\"\nbundle = \"/a\"\n[[trust]]\ntrust_domain = \"a\"\nbundle = \"/b\"",
                "agent.toml:5: trust domain a is there twice, first at agent.toml:2; \
                 put all its authorities into one bundle file, and remove one",
            ),
            (
                "[trust]\ntrust_domain = \"a\"",
                "agent.toml:1: `trust` must be a list of tables, and this is a table; write [[trust]], with two brackets",
            ),
        ] {
            let whole =
                if text.contains("[identity]") || text.is_empty() { text.into() } else { format!("{text}\n{LEAST}") };
            assert_eq!(refusal(&whole), expected, "{text}");
        }
    }

    #[test]
    fn all_mistakes_are_told_at_once() {
        let text = "engine = 1\nshards = \"many\"\n[identity]\nprovider = \"embedded\"\nca_dir = \"x\"\n[timeouts]\ndail = \"5s\"\n";
        assert_eq!(refusal(text).lines().count(), 4);
    }

    #[test]
    fn a_missing_or_world_writable_file_is_one_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.toml");
        let shown = path.display().to_string();
        assert_eq!(
            Config::load(&path).unwrap_err().to_string(),
            format!(
                "{shown}: the file cannot be read (No such file or directory (os error 2)); write it, or name another file"
            )
        );
        std::fs::write(&path, LEAST).unwrap();
        assert!(Config::load(&path).is_ok());
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        assert_eq!(
            Config::load(&path).unwrap_err().to_string(),
            format!("{shown}: everybody can write to this file; run: chmod o-w {shown}")
        );
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in any::<String>(), key in "[a-z_]{1,9}", value in "\\PC{0,12}") {
            let _ = (Config::parse("f", &text), Config::parse("f", &format!("{key} = {value}\n{LEAST}")));
        }
    }
}
