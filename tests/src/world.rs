//! The lab of one test: three hosts on one link, cgroups, files, a capture, and what runs in it.
//!
//! *Invariant:* two labs share nothing: every name in the host's own name spaces (network namespaces, cgroups,
//! directories) carries the process id and a number.

use crate::agent::{Mesh, Settings};
use crate::enter;
use crate::host::{self, Host};
use crate::janitor::{Item, Kept, keep};
use crate::policy::Policy;
use crate::program::Program;
use crate::skip::{self, Skip};
use crate::wire::{Capture, Wire};
use anyhow::Context;
use bunter_sys::mounts;
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};

/// Opens the lab of the test that this is called in, or says that the test is skipped and returns from it.
#[macro_export]
macro_rules! lab {
    () => {
        $crate::or_skip!($crate::Lab::open($crate::test_name!()))
    };
}

/// The value, or an announced skip and a return from the test.
#[macro_export]
macro_rules! or_skip {
    ($value:expr) => {
        match $value {
            Ok(value) => value,
            Err(skip) => {
                skip.announce($crate::test_name!());
                return;
            }
        }
    };
}

/// Name of the function that this is called in.
#[macro_export]
macro_rules! test_name {
    () => {{
        fn here() {}
        let name = std::any::type_name_of_val(&here);
        name.strip_suffix("::here").unwrap_or(name).rsplit("::").next().unwrap_or(name)
    }};
}

/// The lab of one test. Fields are dropped in this order.
pub struct Lab {
    test: &'static str,
    number: u32,
    capture: Mutex<Option<Capture>>,
    mount: PathBuf,
    cgroups: Option<Kept>,
    /// The client's host.
    pub alpha: Host,
    /// The server's host.
    pub beta: Host,
    /// A host without an agent.
    pub stranger: Host,
    wire: String,
    _wire: Kept,
    directory: PathBuf,
    files: Option<Kept>,
    marker: String,
    pinned: Mutex<BTreeMap<String, Vec<usize>>>,
    _slot: Option<Slot>,
}

impl Lab {
    /// Makes the hosts, joins them, and starts the capture.
    pub fn open(test: &'static str) -> Result<Self, Skip> {
        static PROBE: OnceLock<Result<(), Skip>> = OnceLock::new();
        PROBE.get_or_init(probe).clone()?;
        Self::make(test, true)
    }

    /// Alpha and beta alone, joined by one veth pair: nothing on the way costs time, or could capture. Not counted among
    /// those that may be open at once: for measurements.
    pub fn open_pair(name: &'static str) -> Result<Self, Skip> {
        probe()?;
        Self::make(name, false)
    }

    fn make(test: &'static str, watched: bool) -> Result<Self, Skip> {
        let slot = watched.then(Slot::take);
        let mount = cgroup2().ok_or_else(|| Skip::because("the whole cgroup2 hierarchy is mounted nowhere"))?;
        match Self::build(test, mount, slot, watched) {
            Ok(lab) => Ok(lab),
            Err(error) => panic!("the lab itself: {error:#}"),
        }
    }

    fn build(test: &'static str, mount: PathBuf, slot: Option<Slot>, watched: bool) -> crate::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let name = format!("bunter-lab-{pid}-{number}");
        let subnet = u8::try_from((pid + number) % 250).unwrap_or(0) + 1;

        let directory = std::env::temp_dir().join(&name);
        let files = keep(Item::Directory(directory.clone()));
        std::fs::create_dir(&directory).with_context(|| format!("make {}", directory.display()))?;
        let netns = |host: &str| format!("wl{pid}-{number}-{host}");
        let wire = netns("wire");
        let wire_guard = host::make_netns(&wire)?;
        let alpha = Host::make("alpha", netns("alpha"), subnet, 1)?;
        let beta = Host::make("beta", netns("beta"), subnet, 2)?;
        let stranger = Host::make("stranger", netns("stranger"), subnet, 3)?;
        let joined = if watched { vec![&alpha, &beta, &stranger] } else { vec![&alpha, &beta] };
        if watched {
            let mut links = "link add br0 type bridge mcast_snooping 0\nlink set br0 up\n".to_owned();
            for host in &joined {
                let (name, netns) = (host.name, &host.netns);
                links +=
                    &format!("link add {name} type veth peer name eth0 netns {netns}\nlink set {name} master br0 up\n");
            }
            host::ip(&wire, &links)?;
        } else {
            let link = format!("link add eth0 type veth peer name eth0 netns {}\n", beta.netns);
            host::ip(&alpha.netns, &link)?;
        }
        for host in joined {
            host.address()?;
        }

        let cgroup = mount.join(&name);
        let cgroups = keep(Item::Cgroup(cgroup.clone()));
        std::fs::create_dir(&cgroup).with_context(|| format!("make cgroup {}", cgroup.display()))?;
        // Before the agents: a cgroup that an agent knows from its start is decided on by the kernel alone. What comes
        // later has tests of its own.
        for name in ["client", "server", "nobody", "third", "one", "crowd", "elsewhere"] {
            std::fs::create_dir(cgroup.join(name))?;
        }
        let capture = if watched { Some(Capture::start(&wire, &directory, 0, false)?) } else { None };
        Ok(Self {
            test,
            number,
            capture: Mutex::new(capture),
            mount,
            cgroups: Some(cgroups),
            alpha,
            beta,
            stranger,
            wire,
            _wire: wire_guard,
            directory,
            files: Some(files),
            marker: format!("PLAINTEXT-MARKER-{pid:08x}-{number:06x}"),
            pinned: Mutex::default(),
            _slot: slot,
        })
    }

    /// Name of the test.
    pub fn test(&self) -> &'static str {
        self.test
    }

    /// Where the test's files lie.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A file of the test, with this content.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.directory.join(name);
        if let Err(error) = std::fs::write(&path, content) {
            panic!("write {}: {error}", path.display());
        }
        path
    }

    /// What every payload of this test contains, and no other: 31 bytes that may never be on the wire.
    pub fn marker(&self) -> &str {
        &self.marker
    }

    /// Path of the lab's cgroup from the root of the hierarchy, as selectors name it.
    pub fn cgroup_path(&self) -> String {
        format!("/bunter-lab-{}-{}", std::process::id(), self.number)
    }

    /// Directory of a cgroup of this lab, made if it is not there.
    pub fn cgroup(&self, name: &str) -> PathBuf {
        let path = self.mount.join(self.cgroup_path().trim_start_matches('/')).join(name);
        if let Err(error) = std::fs::create_dir_all(&path) {
            panic!("make cgroup {}: {error}", path.display());
        }
        path
    }

    /// A command on a host, in the cgroup of this name.
    #[track_caller]
    pub fn command(&self, host: &Host, cgroup: &str, program: impl AsRef<Path>) -> Command {
        self.command_in(self.place(host, cgroup), program)
    }

    /// Where programs of this cgroup on this host run.
    pub fn place(&self, host: &Host, cgroup: &str) -> enter::Place {
        let processors = self.pinned.lock().unwrap_or_else(PoisonError::into_inner).get(cgroup).cloned();
        let (netns, cgroup) = (Some(host.netns.clone()), Some(self.cgroup(cgroup)));
        // A program that was given its processors is measured: it may have as many connections as it likes.
        let most = || rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(65536).min(65536);
        let files = processors.as_ref().map(|_| most());
        enter::Place { netns, cgroup, files, processors, ..enter::Place::default() }
    }

    /// From now on, programs of this cgroup start on these processors.
    pub fn pin(&self, cgroup: &str, processors: &[usize]) {
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        pinned.insert(cgroup.to_owned(), processors.to_vec());
    }

    /// A command somewhere else.
    #[track_caller]
    pub fn command_in(&self, place: enter::Place, program: impl AsRef<Path>) -> Command {
        match enter::command(program.as_ref(), &place) {
            Ok(mut command) => {
                command.current_dir(&self.directory);
                command
            }
            Err(skip) => panic!("{}", skip.0),
        }
    }

    /// Starts a program on a host, in the cgroup of this name. The words are the program and its arguments.
    #[track_caller]
    pub fn run(&self, host: &Host, cgroup: &str, words: &[&str]) -> Program {
        let (program, arguments) = words.split_first().unwrap_or((&"true", &[]));
        let path = if *program == "lab-app" { skip::lab_app().ok() } else { skip::find(program) };
        let Some(path) = path else { panic!("no {program}") };
        let mut command = self.command(host, cgroup, path);
        command.args(arguments);
        match Program::start(command, format!("{program} on {}", host.name)) {
            Ok(program) => program,
            Err(error) => panic!("{error:#}"),
        }
    }

    /// Starts a server of `lab-app` and waits until it listens.
    #[track_caller]
    pub fn serve(&self, host: &Host, cgroup: &str, words: &[&str]) -> Program {
        let mut words = words.to_vec();
        words.insert(0, "lab-app");
        let mut program = self.run(host, cgroup, &words);
        if let Err(error) = program.ready() {
            panic!("{error:#}");
        }
        program
    }

    /// Starts a server that runs a script on every connection, on port [`PORT`](crate::policy::PORT) of all addresses.
    #[track_caller]
    pub fn serve_script(&self, host: &Host, cgroup: &str, steps: &[&str]) -> Program {
        let listen = format!("[::]:{}", crate::policy::PORT);
        let words = ["serve", "--listen", &listen, "--marker", &self.marker];
        self.serve(host, cgroup, &[&words, steps].concat())
    }

    /// Starts an echo server that reports its connections, on these addresses.
    #[track_caller]
    pub fn serve_echo(&self, host: &Host, cgroup: &str, addresses: &[SocketAddr]) -> Program {
        let addresses: Vec<String> = addresses.iter().map(SocketAddr::to_string).collect();
        let mut words = vec!["echo", "--report", "yes"];
        for address in &addresses {
            words.extend(["--listen", address]);
        }
        self.serve(host, cgroup, &words)
    }

    /// Starts a client that connects and runs a script. Options are those of `lab-app talk`.
    #[track_caller]
    pub fn talk(&self, host: &Host, cgroup: &str, to: SocketAddr, options: &[&str], steps: &[&str]) -> Program {
        let to = to.to_string();
        let words = ["lab-app", "talk", "--to", &to, "--marker", &self.marker];
        self.run(host, cgroup, &[&words, options, steps].concat())
    }

    /// A client that says a line with the marker and wants it back. Gives what each of its steps came to.
    #[track_caller]
    pub fn echo(&self, host: &Host, cgroup: &str, to: SocketAddr, options: &[&str]) -> Vec<Value> {
        // With Fast Open the first step has to be what is sent.
        let say = format!("send:{}\\n", self.marker);
        let program = self.talk(host, cgroup, to, options, &[&say, "line", "names", "half-close", "to-end"]);
        events(&program.outcome().stdout)
    }

    /// The same, and it has to work.
    #[track_caller]
    pub fn expect_echo(&self, host: &Host, cgroup: &str, to: SocketAddr, options: &[&str]) -> Vec<Value> {
        let said = self.echo(host, cgroup, to, options);
        assert!(said.len() == 6 && said.iter().all(|event| event["ok"] == true), "{to} {options:?}: {said:#?}");
        assert_eq!(pick(&said, "line")["text"], self.marker);
        said
    }

    /// The same, and it has to be refused, either at `connect` or by a reset, before a byte came back. Gives the error,
    /// or `alert` where the client, which speaks no TLS, was told in TLS what is wrong.
    #[track_caller]
    pub fn expect_no_echo(&self, host: &Host, cgroup: &str, to: SocketAddr, options: &[&str]) -> String {
        let said = self.echo(host, cgroup, to, options);
        let alert = |event: &&Value| {
            event["step"] == "line" && event["hex"].as_str().is_some_and(|hex| hex.starts_with("1503"))
        };
        if said.iter().any(|event| alert(&event)) && !said.iter().any(|event| event["text"] == self.marker) {
            return "alert".to_owned();
        }
        let failed = said.last().filter(|event| event["ok"] == false);
        let Some(failed) = failed else { panic!("this should have been refused: {said:#?}") };
        assert!(failed["step"] != "names" && failed["step"] != "to-end", "refused too late: {said:#?}");
        failed["error"].as_str().unwrap_or_default().to_owned()
    }

    /// Agents on alpha and beta with one policy; none with `LAB_PLAIN=1`.
    pub fn mesh(&self, policy: &Policy) -> Result<Mesh<'_>, Skip> {
        self.mesh_with(policy, &Settings::default())
    }

    /// The same with other settings.
    pub fn mesh_with(&self, policy: &Policy, settings: &Settings) -> Result<Mesh<'_>, Skip> {
        if skip::plain() { Ok(Mesh::none(self)) } else { Mesh::start(self, policy, settings) }
    }

    /// Agents on alpha and beta, for a test that means nothing without them.
    pub fn only_mesh(&self, policy: &Policy) -> Result<Mesh<'_>, Skip> {
        self.only_mesh_with(policy, &Settings::default())
    }

    /// The same with other settings.
    pub fn only_mesh_with(&self, policy: &Policy, settings: &Settings) -> Result<Mesh<'_>, Skip> {
        if skip::plain() {
            return Err(Skip::because("LAB_PLAIN=1 leaves the agent out, and this test is about the agent"));
        }
        Mesh::start(self, policy, settings)
    }

    /// From now on only the first bytes of each packet are kept, for bulk flows.
    pub fn capture_heads(&self) {
        self.recapture(256);
    }

    /// From now on the capture is made for very many packets.
    pub fn capture_many(&self) {
        self.recapture(0);
    }

    fn recapture(&self, bytes: usize) {
        let mut capture = self.capture.lock().unwrap_or_else(PoisonError::into_inner);
        *capture = None;
        match Capture::start(&self.wire, &self.directory, bytes, true) {
            Ok(fresh) => *capture = Some(fresh),
            Err(error) => panic!("{error:#}"),
        }
    }

    /// Ends the capture and gives what was on the wire.
    #[track_caller]
    pub fn wire(&self) -> Wire {
        let capture = self.capture.lock().unwrap_or_else(PoisonError::into_inner).take();
        match capture.context("the capture was ended before").and_then(|c| c.finish(&self.stranger, &self.beta)) {
            Ok(wire) => wire,
            Err(error) => panic!("{error:#}"),
        }
    }

    /// Ends the capture: the marker is nowhere on the wire, and everything to and from the port is TLS, with application
    /// data. With `LAB_PLAIN=1` the marker must be there.
    #[track_caller]
    pub fn expect_tls(&self, port: u16) -> Wire {
        let wire = self.expect_no_plaintext();
        if !skip::plain() {
            match wire.records(port) {
                Ok(records) => assert!(records.application >= 2 && records.handshake >= 2, "{records:?}"),
                Err(error) => panic!("not TLS: {error:#}"),
            }
        }
        wire
    }

    /// Ends the capture: the marker is nowhere on the wire. With `LAB_PLAIN=1` it must be there.
    #[track_caller]
    pub fn expect_no_plaintext(&self) -> Wire {
        let wire = self.wire();
        assert_eq!(wire.lost, 0, "the capture lost packets: it proves nothing");
        self.expect_marker(&wire);
        wire
    }

    /// The marker is nowhere on the wire, or, with `LAB_PLAIN=1`, somewhere.
    #[track_caller]
    pub fn expect_marker(&self, wire: &Wire) {
        match (wire.search(self.marker.as_bytes()), skip::plain()) {
            (Some(place), false) => panic!("plaintext on the wire, {place}; see {}", wire.file().display()),
            (None, true) => panic!("the oracle is blind: no marker in {}", wire.file().display()),
            _ => {}
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::env::var("LAB_KEEP").is_ok_and(|value| value == "1") {
            eprintln!("lab: files of {} stay in {}", self.test, self.directory.display());
            std::mem::forget(self.files.take());
        }
        *self.capture.lock().unwrap_or_else(PoisonError::into_inner) = None;
        // Before the namespaces: a process keeps its namespace alive.
        self.cgroups = None;
    }
}

/// The JSON lines of an output.
pub fn events(text: &str) -> Vec<Value> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// What this step came to.
#[track_caller]
pub fn pick<'a>(events: &'a [Value], step: &str) -> &'a Value {
    match events.iter().find(|event| event["step"] == step) {
        Some(event) => event,
        None => panic!("no step {step}: {events:#?}"),
    }
}

/// The address that an event tells.
#[track_caller]
pub fn address(event: &Value, name: &str) -> SocketAddr {
    match event[name].as_str().and_then(|text| text.parse().ok()) {
        Some(address) => address,
        None => panic!("no address {name}: {event}"),
    }
}

fn probe() -> Result<(), Skip> {
    skip::need_root()?;
    skip::lab_app()?;
    skip::need("tcpdump")?;
    need_bpf_file_system()?;
    host::probe()
}

/// An agent pins its programs in the host's file system or does not start.
fn need_bpf_file_system() -> Result<(), Skip> {
    let mounts = std::fs::read("/proc/1/mountinfo").unwrap_or_default();
    let there = mounts::of_type(&mounts, "bpf").iter().any(|mount| mount.point == Path::new("/sys/fs/bpf"));
    let missing = "process 1 has no BPF file system at /sys/fs/bpf: `cargo xtask setup` mounts it";
    if there || skip::plain() { Ok(()) } else { Err(Skip::because(missing)) }
}

/// Mount point of the whole cgroup2 hierarchy, wherever it is.
pub fn cgroup2() -> Option<PathBuf> {
    mounts::cgroup2().ok()?
}

/// So many labs at once, two unless `LAB_PARALLEL` says otherwise: more only fight for the processor.
struct Slot;

static SLOTS: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

impl Slot {
    fn take() -> Self {
        let most = std::env::var("LAB_PARALLEL").ok().and_then(|text| text.parse().ok()).unwrap_or(2).max(1);
        let mut taken = SLOTS.0.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken >= most {
            taken = SLOTS.1.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        *taken += 1;
        Self
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *SLOTS.0.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        SLOTS.1.notify_one();
    }
}
