//! Agents under test: configuration, policy, start, reload, end, and what they wrote into their audit logs.
//!
//! *Invariant:* an agent is ended and its pinned programs are released when its guard is dropped.

use crate::clock;
use crate::host::Host;
use crate::janitor::{Item, Kept, keep};
use crate::mint::Mint;
use crate::policy::{DOMAIN, Policy, id};
use crate::program::{Outcome, Program};
use crate::skip::{self, Skip};
use crate::world::Lab;
use anyhow::{Context, bail};
use rustix::process::Signal;
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What a test wants to have otherwise in agent.toml.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `auto`, `kernel` or `user`; `BUNTER_ENGINE` unless said otherwise.
    pub engine: String,
    /// More lines of the top level.
    pub top: String,
    /// More lines of `[identity]`.
    pub identity: String,
    /// Path of the audit log, if not in the test's own directory.
    pub audit: Option<PathBuf>,
    /// More lines of `[audit]`.
    pub audit_lines: String,
    /// More tables.
    pub tables: String,
    /// Directory of the authority, if not the one that all agents of the lab share.
    pub authority: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            engine: std::env::var("BUNTER_ENGINE").unwrap_or_else(|_| "auto".to_owned()),
            top: String::new(),
            identity: String::new(),
            audit: None,
            audit_lines: String::new(),
            tables: String::new(),
            authority: None,
        }
    }
}

/// An agent of one host.
pub struct Agent<'a> {
    lab: &'a Lab,
    host: &'a Host,
    binary: PathBuf,
    directory: PathBuf,
    audit: PathBuf,
    program: Mutex<Option<Program>>,
    // Declared after the program: released once it has ended.
    _pins: Kept,
}

impl<'a> Agent<'a> {
    /// Writes configuration and policy, and starts nothing yet.
    pub fn prepare(lab: &'a Lab, host: &'a Host, policy: &Policy, settings: &Settings) -> Result<Self, Skip> {
        let binary = skip::bunter()?;
        let authority = match &settings.authority {
            Some(directory) => directory.clone(),
            None => authority(lab, &binary),
        };
        match Self::write(lab, host, binary, policy, settings, &authority) {
            Ok(agent) => Ok(agent),
            Err(error) => panic!("the lab itself: {error:#}"),
        }
    }

    fn write(
        lab: &'a Lab,
        host: &'a Host,
        binary: PathBuf,
        policy: &Policy,
        settings: &Settings,
        authority: &Path,
    ) -> crate::Result<Self> {
        let directory = lab.directory().join(host.name);
        std::fs::create_dir_all(directory.join("policies"))?;
        for private in ["state", "run"] {
            std::fs::create_dir_all(directory.join(private))?;
            std::fs::set_permissions(directory.join(private), PermissionsExt::from_mode(0o700))?;
        }
        let audit = settings.audit.clone().unwrap_or_else(|| directory.join("audit.jsonl"));
        let text = format!(
            "policy_dir = \"{d}/policies\"\nstate_dir = \"{d}/state\"\nrun_dir = \"{d}/run\"\nengine = \"{engine}\"\n\
             {top}\n[identity]\nprovider = \"embedded\"\nca_dir = \"{authority}\"\n{identity}\n\
             [audit]\npath = \"{audit}\"\n{audit_lines}\n{tables}\n",
            d = directory.display(),
            engine = settings.engine,
            top = settings.top,
            authority = authority.display(),
            identity = settings.identity,
            audit = audit.display(),
            audit_lines = settings.audit_lines,
            tables = settings.tables,
        );
        std::fs::write(directory.join("agent.toml"), text)?;
        std::fs::write(directory.join("policies/lab.toml"), policy.text())?;
        let pins = keep(Item::Pins(host.netns.clone(), binary.clone(), directory.join("agent.toml")));
        Ok(Self { lab, host, binary, directory, audit, program: Mutex::new(None), _pins: pins })
    }

    /// Starts it and waits until it is ready, as systemd would (sd_notify(3)).
    pub fn start(&self) -> crate::Result<()> {
        let path = self.directory.join("run/notify.sock");
        // From the start before this one.
        let _ = std::fs::remove_file(&path);
        let told = UnixDatagram::bind(&path)?;
        told.set_nonblocking(true)?;
        *self.running() = Some(self.spawn(&[("NOTIFY_SOCKET", &path)])?);
        let ready = clock::until(clock::seconds(30), || {
            if told.recv(&mut [0; 64]).is_ok() {
                return Some(true);
            }
            self.running().as_mut().is_none_or(Program::ended).then_some(false)
        });
        match ready {
            Some(true) => Ok(()),
            ended => {
                let stderr = self.log();
                let what = if ended.is_some() { "ended" } else { "does not get ready" };
                bail!("the agent of {} {what}:\n{stderr}", self.host.name)
            }
        }
    }

    /// Starts one that should not be able to run, and gives how it ended.
    #[track_caller]
    pub fn expect_refused(&self) -> String {
        match self.spawn(&[]).and_then(|program| program.wait(clock::seconds(30))) {
            Ok(outcome) => outcome.bad(),
            Err(error) => panic!("{error:#}"),
        }
    }

    fn spawn(&self, environment: &[(&str, &Path)]) -> crate::Result<Program> {
        let mut command = self.lab.command(self.host, &format!("agent-{}", self.host.name), &self.binary);
        command.envs(environment.iter().copied());
        command.args(["agent", "--config"]).arg(self.config());
        Program::start(command, format!("agent of {}", self.host.name))
    }

    fn running(&self) -> MutexGuard<'_, Option<Program>> {
        self.program.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Path of agent.toml.
    pub fn config(&self) -> PathBuf {
        self.directory.join("agent.toml")
    }

    /// The directory with its configuration and policy.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Process id, 0 if it does not run.
    pub fn pid(&self) -> u32 {
        self.running().as_ref().map_or(0, Program::pid)
    }

    /// Was it started, and has it not ended since?
    pub fn runs(&self) -> bool {
        self.running().as_mut().is_some_and(|program| !program.ended())
    }

    /// Resident memory, in bytes.
    pub fn resident(&self) -> u64 {
        crate::program::resident(self.pid())
    }

    /// What it wrote to standard error.
    pub fn log(&self) -> String {
        self.running().as_ref().map(Program::stderr).unwrap_or_default()
    }

    /// Runs another verb of the command with this agent's configuration, in this host's namespace.
    pub fn command(&self, words: &[&str]) -> crate::Result<Outcome> {
        let place = crate::enter::Place { netns: Some(self.host.netns.clone()), ..Default::default() };
        let mut command = self.lab.command_in(place, &self.binary);
        command.args(words).arg("--config").arg(self.config());
        Program::start(command, format!("bunter {words:?}"))?.wait(clock::seconds(30))
    }

    /// What `bunter status --json` prints, from the admin socket itself: tests ask over and over, and the start of a
    /// program is dear where the processor is emulated.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.ask("status")
    }

    /// What `bunter connections --json` prints: a list.
    #[track_caller]
    pub fn connections(&self) -> Vec<Value> {
        match self.ask("connections") {
            Value::Array(list) => list,
            other => panic!("no list: {other}"),
        }
    }

    #[track_caller]
    fn ask(&self, question: &str) -> Value {
        let ask = || -> crate::Result<String> {
            let mut socket = UnixStream::connect(self.directory.join("run/admin.sock"))?;
            socket.set_read_timeout(Some(clock::seconds(10)))?;
            socket.write_all(format!("\"{question}\"\n").as_bytes())?;
            let mut answer = String::new();
            BufReader::new(socket).read_line(&mut answer)?;
            Ok(answer)
        };
        match ask() {
            Ok(answer) => parse(&answer),
            Err(error) => panic!("{}: no {question}: {error:#}\n{}", self.host.name, self.log()),
        }
    }

    /// Writes the policy and tells the agent, without waiting for what it makes of it.
    #[track_caller]
    pub fn post(&self, policy: &str) {
        self.write_policy(policy);
        self.signal(Signal::HUP);
    }

    #[track_caller]
    fn write_policy(&self, policy: &str) {
        if let Err(error) = std::fs::write(self.directory.join("policies/lab.toml"), policy) {
            panic!("write policy: {error}");
        }
    }

    /// Has it read again what is on disk, and waits until that is decided.
    ///
    /// # Errors
    /// Why it was refused.
    #[track_caller]
    pub fn read_again(&self) -> std::result::Result<(), String> {
        let policy = || self.status()["policy"].clone();
        let before = policy()["reloads"].as_u64();
        self.signal(Signal::HUP);
        let decided = clock::until(clock::seconds(20), || {
            let now = policy();
            (now["reloads"].as_u64() > before && now["reading"] == false).then_some(now)
        });
        let Some(now) = decided else { panic!("the reload was not decided: {:#}\n{}", policy(), self.log()) };
        now["refused"].as_str().map_or(Ok(()), |why| Err(why.to_owned()))
    }

    /// Puts another policy in force and waits until it is.
    #[track_caller]
    pub fn reload(&self, policy: &Policy) {
        if let Err(why) = self.reload_text(policy.text()) {
            panic!("the reload was not taken: {why}\n{}", self.log());
        }
    }

    /// Puts these words in the place of its policy, and waits until the reload is decided.
    ///
    /// # Errors
    /// Why it was refused.
    #[track_caller]
    pub fn reload_text(&self, policy: &str) -> std::result::Result<(), String> {
        self.write_policy(policy);
        self.read_again()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        if let Some(program) = self.running().as_ref() {
            program.signal(signal);
        }
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
        let _ = self.end(clock::seconds(10));
    }

    /// SIGTERM, and waits for its end.
    pub fn terminate(&self) -> crate::Result<Outcome> {
        self.signal(Signal::TERM);
        self.end(clock::seconds(40))
    }

    /// Waits for its end.
    pub fn end(&self, limit: Duration) -> crate::Result<Outcome> {
        self.running().as_mut().context("it does not run")?.end(limit)
    }

    /// Every line of its audit log. A line that is no JSON is a failure.
    #[track_caller]
    pub fn audit(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.audit).unwrap_or_default();
        // The last line may be half written.
        let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
        whole.lines().map(parse).collect()
    }

    /// Waits for an audit line that satisfies the condition.
    #[track_caller]
    pub fn expect_record(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let found = clock::until(clock::seconds(15), || self.audit().into_iter().find(|record| wanted(record)));
        found.unwrap_or_else(|| {
            let lines: Vec<String> = self.audit().iter().map(Value::to_string).collect();
            panic!("{}: no audit line: {what}; there are:\n{}\nlog:\n{}", self.host.name, lines.join("\n"), self.log())
        })
    }

    /// Waits for the line of a connection that was refused to or from this port with this code.
    #[track_caller]
    pub fn expect_denied(&self, port: u16, code: &str) -> Value {
        let record = self.expect_record(&format!("denied, port {port}, {code}"), |record| {
            record["decision"] == "denied" && record_port(record) == port && (code.is_empty() || record["code"] == code)
        });
        for field in ["culprit", "code", "reason"] {
            assert!(record[field].as_str().is_some_and(|text| !text.is_empty()), "no {field}: {record}");
        }
        assert!(record["reason"].as_str().is_some_and(|text| text.contains(' ')), "no sentence: {record}");
        record
    }

    /// Audit lines for this destination port.
    pub fn records_for(&self, port: u16) -> Vec<Value> {
        self.audit().into_iter().filter(|record| record_port(record) == port).collect()
    }

    /// Waits until there are lines for as many attempts at the port as wanted, and gives them: not one more. What the kernel
    /// refuses again and again is one line with a count.
    #[track_caller]
    pub fn expect_records(&self, port: u16, number: usize) -> Vec<Value> {
        let number = number as u64;
        let enough = clock::until(clock::seconds(20), || (attempts(&self.records_for(port)) >= number).then_some(()));
        let records = self.records_for(port);
        assert!(
            enough.is_some() && attempts(&records) == number,
            "{}: audit lines for {} attempts at port {port}, want {number}:\n{records:#?}",
            self.host.name,
            attempts(&records)
        );
        records
    }
}

/// For how many attempts these audit lines stand.
pub fn attempts<'a>(records: impl IntoIterator<Item = &'a Value>) -> u64 {
    records.into_iter().map(|record| record["count"].as_u64().unwrap_or(1)).sum()
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines.get(lines.len().saturating_sub(60)..).unwrap_or_default().join("\n");
            eprintln!("--- agent of {}:\n{tail}", self.host.name);
            let audit = std::fs::read_to_string(&self.audit).unwrap_or_default();
            let lines: Vec<&str> = audit.lines().collect();
            let tail = lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n");
            eprintln!("--- its audit log:\n{tail}\n---");
        }
        *self.running() = None;
    }
}

/// Port that an audit line is about.
pub fn record_port(record: &Value) -> u16 {
    record["destination"]["address"]
        .as_str()
        .and_then(|text| text.parse::<std::net::SocketAddr>().ok())
        .map_or(0, |address| address.port())
}

#[track_caller]
fn parse(text: &str) -> Value {
    match serde_json::from_str(text) {
        Ok(value) => value,
        Err(error) => panic!("not JSON ({error}): {text}"),
    }
}

/// The authority that all agents of a lab share, made by the command itself.
fn authority(lab: &Lab, binary: &Path) -> PathBuf {
    let directory = lab.directory().join("ca");
    if !directory.exists() {
        make_authority(lab, binary, DOMAIN, &directory);
    }
    directory
}

/// Runs `bunter ca init`.
#[track_caller]
pub fn make_authority(lab: &Lab, binary: &Path, domain: &str, directory: &Path) {
    let mut command = lab.command_in(crate::enter::Place::default(), binary);
    command.args(["ca", "init", "--trust-domain", domain, "--dir"]).arg(directory);
    match Program::start(command, "bunter ca init").and_then(|program| program.wait(clock::seconds(30))) {
        Ok(outcome) => drop(outcome.good()),
        Err(error) => panic!("{error:#}"),
    }
}

/// Agents on alpha and beta; or, with `LAB_PLAIN=1`, nothing.
pub struct Mesh<'a> {
    lab: &'a Lab,
    agents: Option<(Agent<'a>, Agent<'a>)>,
}

impl<'a> Mesh<'a> {
    pub(crate) fn none(lab: &'a Lab) -> Self {
        Self { lab, agents: None }
    }

    pub(crate) fn start(lab: &'a Lab, policy: &Policy, settings: &Settings) -> Result<Self, Skip> {
        Self::start_with(lab, policy, settings, settings)
    }

    /// Agents with settings of their own.
    pub fn start_with(lab: &'a Lab, policy: &Policy, alpha: &Settings, beta: &Settings) -> Result<Self, Skip> {
        let alpha = Agent::prepare(lab, &lab.alpha, policy, alpha)?;
        let beta = Agent::prepare(lab, &lab.beta, policy, beta)?;
        for agent in [&alpha, &beta] {
            if let Err(error) = agent.start() {
                panic!("{error:#}");
            }
        }
        Ok(Self { lab, agents: Some((alpha, beta)) })
    }

    /// Are there agents?
    pub fn protected(&self) -> bool {
        self.agents.is_some()
    }

    /// The client's agent.
    #[track_caller]
    pub fn alpha(&self) -> &Agent<'a> {
        match &self.agents {
            Some((alpha, _)) => alpha,
            None => panic!("LAB_PLAIN=1: there is no agent"),
        }
    }

    /// The server's agent.
    #[track_caller]
    pub fn beta(&self) -> &Agent<'a> {
        match &self.agents {
            Some((_, beta)) => beta,
            None => panic!("LAB_PLAIN=1: there is no agent"),
        }
    }

    /// What `bunter ca issue` gives for this name: `svid.pem`, `key.pem` and `bundle.pem` in the directory.
    #[track_caller]
    pub fn issue(&self, name: &str) -> PathBuf {
        let out = self.lab.directory().join(format!("issued-{name}"));
        let mut command = self.lab.command_in(crate::enter::Place::default(), &self.alpha().binary);
        command.args(["ca", "issue", "--dir"]).arg(self.lab.directory().join("ca"));
        command.args(["--id", &id(name), "--out"]).arg(&out);
        match Program::start(command, "bunter ca issue").and_then(|program| program.wait(clock::seconds(30))) {
            Ok(outcome) => drop(outcome.good()),
            Err(error) => panic!("{error:#}"),
        }
        out
    }

    /// What `bunter ca revoke` says to this certificate. It is in force in an agent that has reloaded.
    #[track_caller]
    pub fn revoke(&self, certificate: &Path) -> String {
        let mut command = self.lab.command_in(crate::enter::Place::default(), &self.alpha().binary);
        command.args(["ca", "revoke", "--dir"]).arg(self.lab.directory().join("ca"));
        command.arg("--certificate").arg(certificate);
        match Program::start(command, "bunter ca revoke").and_then(|program| program.wait(clock::seconds(30))) {
            Ok(outcome) => outcome.good(),
            Err(error) => panic!("{error:#}"),
        }
    }

    /// Certificates of any kind from the lab's own authority.
    #[track_caller]
    pub fn mint(&self) -> Mint {
        match Mint::open(&self.lab.directory().join("ca")) {
            Ok(mint) => mint,
            Err(error) => panic!("{error:#}"),
        }
    }

    /// Both audit logs have so many lines for the port, each a connection from the client to the server that was
    /// allowed, with both identities and what TLS agreed on. Nothing to check with `LAB_PLAIN=1`.
    #[track_caller]
    pub fn expect_allowed(&self, port: u16, number: usize) {
        let Some((alpha, beta)) = &self.agents else { return };
        for (agent, direction) in [(alpha, "outbound"), (beta, "inbound")] {
            for record in agent.expect_records(port, number) {
                assert_eq!(record["decision"], "allowed", "{record}");
                assert_eq!(record["direction"], direction, "{record}");
                assert_eq!(record["source"]["id"], id("client"), "{record}");
                assert_eq!(record["destination"]["id"], id("server"), "{record}");
                assert_eq!(record["method"], "mtls", "{record}");
                assert_eq!(record["tls"]["group"], "X25519MLKEM768", "{record}");
                assert_eq!(record["rule"], "client-to-server", "{record}");
                assert!(record["engine"] == "user" || record["engine"] == "kernel", "{record}");
                assert!(record["time"].is_string() && record["duration_ms"].is_u64(), "{record}");
            }
        }
    }
}
