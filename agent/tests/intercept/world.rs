//! A host of its own for each test: a network namespace with two addresses of each family, a cgroup, an agent's programs, and
//! client processes, which are this very test binary started again in another role.
//!
//! *Invariant:* whatever a world has made is gone when it is dropped: processes, pins, namespace, cgroup.

use bunter::{
    intercept::{Error, KernelEvent, KernelFacts, Options, Programs, Refused, ShardListeners},
    policy::{KernelCandidate, KernelDestination, KernelPolicy, KernelVerdict},
};
use bunter_common::*;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

pub const HERE: &str = "10.77.0.1";
pub const SERVER: &str = "10.77.0.2:80";
pub const SERVER6: &str = "[fd77::2]:80";
pub const WORKLOAD: u32 = 7;
/// Number of its identity.
pub const SOURCE: u64 = 77;
const TCP: u16 = 6;

/// Says why a test cannot run here, if it cannot.
pub fn unable(test: &str) -> bool {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED (needs root): {test}");
        return true;
    }
    false
}

/// Begins a test, or skips it.
macro_rules! world {
    () => {{
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        if crate::world::unable(&name) {
            return;
        }
        match crate::world::World::new(&name) {
            Some(world) => world,
            None => return,
        }
    }};
}
pub(crate) use world;

pub struct World {
    pub cgroup: PathBuf,
    pub runtime: tokio::runtime::Runtime,
    pub options: Options,
    netns: String,
    programs: Option<Programs>,
    shard: Option<std::rc::Rc<ShardListeners>>,
    _run_dir: tempfile::TempDir,
}

/// The kernel's part of a policy, written by hand.
#[derive(Clone, Default)]
pub struct Facts {
    pub policy: KernelPolicy,
    /// Cgroups whose path ends so are [`WORKLOAD`].
    pub cgroup: String,
    /// They have to be attested first.
    pub ask: bool,
    /// Users of them that are; empty for all.
    pub uids: Vec<u32>,
}

impl KernelFacts for Facts {
    fn kernel(&self) -> Arc<KernelPolicy> {
        let unseen = if self.cgroup.is_empty() { Vec::new() } else { vec![(None, None)] };
        Arc::new(KernelPolicy { unseen, ..self.policy.clone() })
    }
    fn who(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.cgroup, self.ask, self.policy.cgroup_classes).hash(&mut hasher);
        hasher.finish()
    }
    fn cgroup_open(&self, cgroup: &str) -> bool {
        !self.cgroup.is_empty() && self.cgroup_set(cgroup).is_empty()
    }
    fn cgroup_set(&self, cgroup: &str) -> Vec<u32> {
        if !self.cgroup.is_empty() && cgroup.ends_with(&self.cgroup) { vec![0] } else { Vec::new() }
    }
    fn candidates(&self, set: &[u32]) -> Vec<KernelCandidate> {
        let row = if self.ask {
            KernelCandidate { attested: 2, ..KernelCandidate::default() }
        } else {
            KernelCandidate { workload: WORKLOAD, source: SOURCE, certain: 1, ..KernelCandidate::default() }
        };
        let uids = match self.uids.as_slice() {
            [] => vec![None],
            uids => uids.iter().copied().map(Some).collect(),
        };
        set.iter().flat_map(|_| uids.iter().map(|uid| KernelCandidate { uid: *uid, ..row })).collect()
    }
}

/// A destination with this number.
pub fn destination(number: u64, network: &str, port: Option<u16>, mode: u32) -> KernelDestination {
    KernelDestination { network: network.parse().unwrap(), port, mode, target: number, group: 0, datagrams: number }
}

impl Facts {
    /// Tasks in cgroups that end so are enrolled; the servers are mesh destinations; nothing is allowed.
    pub fn enrolling(cgroup: &str) -> Self {
        let policy = KernelPolicy {
            destinations: vec![
                destination(1, "10.77.0.2/32", Some(80), MODE_MESH),
                destination(2, "fd77::2/128", Some(80), MODE_MESH),
            ],
            cgroup_classes: true,
            ..KernelPolicy::default()
        };
        Self { policy, cgroup: cgroup.into(), ask: false, uids: Vec::new() }
    }

    pub fn verdict(mut self, target: u64, protocol: u16, action: u32) -> Self {
        self.policy.verdicts.push(KernelVerdict { source: SOURCE, target, port: 0, protocol, action, rule: 3 });
        self
    }

    /// The workload may reach both servers by mutual TLS.
    pub fn allowing(self) -> Self {
        self.verdict(1, TCP, VERDICT_MESH).verdict(2, TCP, VERDICT_MESH)
    }
}

impl World {
    pub fn new(test: &str) -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("wit-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        run("ip", &["netns", "add", &name]);
        let netns = fs::File::open(format!("/run/netns/{name}")).unwrap();
        rustix::thread::move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&netns),
            Some(rustix::thread::LinkNameSpaceType::Network),
        )
        .unwrap();
        run("ip", &["link", "set", "lo", "up"]);
        for address in ["10.77.0.1/32", "10.77.0.2/32", "fd77::1/128", "fd77::2/128"] {
            run("ip", &["address", "add", address, "dev", "lo"]);
        }
        let cgroup = bunter_sys::mounts::cgroup2().unwrap().expect("cgroup2 is mounted").join(&name);
        fs::create_dir_all(cgroup.join("outside")).unwrap();
        let run_dir = tempfile::tempdir().unwrap();
        let options = Options {
            run_dir: run_dir.path().into(),
            cgroup: Path::new("/").join(&name),
            shards: 1,
            sizes: Vec::new(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut world = Self { cgroup, runtime, options, netns: name, programs: None, shard: None, _run_dir: run_dir };
        match world.try_start() {
            Ok(()) => Some(world),
            Err(Error::NoObject) => {
                eprintln!("SKIPPED (the kernel programs are not built): {test}");
                None
            }
            Err(
                error @ (Error::NoBpfFs { .. }
                | Error::OtherBpfFs { .. }
                | Error::PidNamespace
                | Error::CgroupNamespace),
            ) => {
                eprintln!("SKIPPED ({error}): {test}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Starts the agent's part: programs and the listeners of its one shard.
    pub fn try_start(&mut self) -> Result<(), Error> {
        let mut programs = patiently(|| Programs::load(&self.options))?;
        let unbound = programs.take_listeners().pop().unwrap();
        let _inside = self.runtime.enter();
        self.shard = Some(unbound.open()?.into());
        self.programs = Some(programs);
        Ok(())
    }

    /// Removes what a dead agent has left.
    pub fn release(&self) -> bool {
        patiently(|| bunter::intercept::release(&self.options.run_dir)).unwrap()
    }

    /// The agent dies: its descriptors are closed, nothing else happens.
    pub fn kill_agent(&mut self) {
        self.programs = None;
        self.shard = None;
        // Another test's thread may be starting a process, which has this one's listeners until it runs its program.
        std::thread::sleep(Duration::from_millis(100));
    }

    pub fn programs(&mut self) -> &mut Programs {
        self.programs.as_mut().unwrap()
    }

    pub fn shard(&self) -> std::rc::Rc<ShardListeners> {
        self.shard.clone().unwrap()
    }

    pub fn install(&mut self, facts: Facts) -> u32 {
        self.programs().install(Arc::new(facts)).unwrap()
    }

    /// Enrols what runs in the world's cgroup.
    pub fn enrol(&mut self) -> Facts {
        Facts::enrolling(self.cgroup.file_name().unwrap().to_str().unwrap())
    }

    pub fn count(&mut self, counter: u32) -> u64 {
        self.programs().counters().unwrap()[counter as usize]
    }

    /// Runs a future of the agent, with a limit.
    pub fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(async { tokio::time::timeout(Duration::from_secs(10), future).await.expect("in time") })
    }

    /// The next notice that `wanted` accepts; others are dropped.
    pub fn notice<T>(&mut self, wanted: impl Fn(&KernelEvent) -> Option<T>) -> T {
        let mut programs = self.programs.take().unwrap();
        let found = self.run(async {
            loop {
                let notice = programs.next_event().await;
                if let Some(found) = wanted(&notice) {
                    return found;
                }
            }
        });
        self.programs = Some(programs);
        found
    }

    /// Lets the agent hear what the kernel tells, for a while.
    pub fn listen_for(&mut self, time: Duration) {
        let mut programs = self.programs.take().unwrap();
        let _ = self.runtime.block_on(async {
            tokio::time::timeout(time, async {
                loop {
                    programs.next_event().await;
                }
            })
            .await
        });
        self.programs = Some(programs);
    }

    /// All that the kernel has refused and nobody has heard of yet.
    pub fn refusals(&mut self) -> Vec<Refused> {
        let mut found = Vec::new();
        for _ in 0..2 {
            let mut programs = self.programs.take().unwrap();
            let _ = self.runtime.block_on(async {
                tokio::time::timeout(Duration::from_millis(100), async {
                    loop {
                        if let KernelEvent::Refused(refused) = programs.next_event().await {
                            found.push(refused);
                        }
                    }
                })
                .await
            });
            programs.collect_refusals(false).unwrap();
            self.programs = Some(programs);
        }
        found
    }

    /// The next refusal by the kernel.
    pub fn refusal(&mut self) -> Event {
        self.notice(|notice| match notice {
            KernelEvent::Refused(refused) => Some(refused.event),
            _ => None,
        })
    }

    /// Starts a client in the world's cgroup.
    pub fn client(&self, script: &str) -> Client {
        self.client_in(&self.cgroup, script)
    }

    /// Starts a client in the world's cgroup, as this user.
    pub fn client_of(&self, uid: u32, script: &str) -> Client {
        Client::start(&self.cgroup, &format!("setpriv --reuid={uid} --clear-groups"), script)
    }

    /// Starts a client outside it: a program without an identity.
    pub fn stranger(&self, script: &str) -> Client {
        self.client_in(&self.cgroup.join("outside"), script)
    }

    /// Starts a client in this cgroup.
    pub fn client_in(&self, cgroup: &Path, script: &str) -> Client {
        Client::start(cgroup, "", script)
    }
}

/// Another test's thread may be starting a process, which has this one's descriptors until it runs its program: locks are
/// held for a moment longer than their owners live.
fn patiently<T>(mut attempt: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    for _ in 0..200 {
        match attempt() {
            Err(Error::SecondAgent { .. } | Error::AgentRuns { .. }) => std::thread::sleep(Duration::from_millis(10)),
            done => return done,
        }
    }
    attempt()
}

impl Drop for World {
    fn drop(&mut self) {
        self.kill_agent();
        let released = patiently(|| bunter::intercept::release(&self.options.run_dir));
        // Children of this cgroup, deepest first; their processes have ended with their `Client`s.
        for inner in ["outside", "late"] {
            let _ = fs::remove_dir(self.cgroup.join(inner));
        }
        let _ = fs::remove_dir(&self.cgroup);
        let _ = Command::new("ip").args(["netns", "delete", &self.netns]).status();
        if !std::thread::panicking() {
            assert!(!self.cgroup.exists(), "the cgroup is still in use");
            released.unwrap();
        }
    }
}

/// A process that does what its script says, one line of output for each step.
pub struct Client {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Client {
    fn start(cgroup: &Path, as_whom: &str, script: &str) -> Self {
        let exe = std::env::current_exe().unwrap();
        let join = format!("echo $$ > {}/cgroup.procs", cgroup.display());
        let mut child = Command::new("sh")
            .arg("-c")
            .arg(format!(
                "{join} && exec {as_whom} {} the_client_role --exact --nocapture --test-threads=1",
                exe.display()
            ))
            .env("BUNTER_TEST_CLIENT", script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line that the script has printed.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the client has ended without a word");
            if let Some((_, said)) = line.split_once("CLIENT ") {
                return said.trim_end().to_owned();
            }
        }
    }

    /// Lets a script go on that waits at `pause`.
    pub fn go_on(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The client's side: runs the script that the environment holds.
pub fn play(script: &str) {
    let mut stream = None;
    let mut listener = None;
    let mut shared = Vec::new();
    for step in script.split(';') {
        let words: Vec<&str> = step.split_whitespace().collect();
        let said = match words.as_slice() {
            ["connect", to, how @ ..] => connect(to.parse().unwrap(), how, &mut stream),
            ["send", text] => told(stream.as_mut().unwrap().write_all(text.as_bytes()).map(|()| "sent".into())),
            ["read"] => {
                let mut buffer = [0; 64];
                let read = stream.as_mut().unwrap().read(&mut buffer);
                told(read.map(|length| String::from_utf8_lossy(&buffer[..length]).into_owned()))
            }
            ["udp-send", to] => {
                let socket = UdpSocket::bind(if to.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" }).unwrap();
                told(socket.send_to(b"x", to).map(|_| "sent".into()))
            }
            ["udp-connect", to] => {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                told(socket.connect(to).map(|()| "connected".into()))
            }
            ["listen", at] => match TcpListener::bind(at) {
                Ok(bound) => {
                    listener = Some(bound);
                    "listening".into()
                }
                Err(error) => told(Err(error)),
            },
            ["share", at] => {
                let at: SocketAddr = at.parse().unwrap();
                let socket = Socket::new(Domain::for_address(at), Type::STREAM, None).unwrap();
                socket.set_reuse_port(true).unwrap();
                socket.bind(&at.into()).unwrap();
                socket.listen(16).unwrap();
                shared.push(socket);
                "shared".into()
            }
            ["unshare"] => {
                shared.pop();
                "unshared".into()
            }
            ["listen-unbound"] => {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                socket.listen(16).unwrap();
                let at = TcpListener::from(socket);
                let said = at.local_addr().unwrap().to_string();
                listener = Some(at);
                said
            }
            ["accept"] => {
                let (accepted, peer) = listener.as_ref().unwrap().accept().unwrap();
                let said = format!(
                    "accepted from {peer}, peer {} at {}",
                    accepted.peer_addr().unwrap(),
                    accepted.local_addr().unwrap()
                );
                stream = Some(accepted);
                said
            }
            ["dial-for", to, millis] => dials(to.parse().unwrap(), Duration::from_millis(millis.parse().unwrap())),
            ["close"] => {
                stream = None;
                listener = None;
                "closed".into()
            }
            ["pause"] => {
                std::io::stdin().read_exact(&mut [0]).unwrap();
                continue;
            }
            other => panic!("{other:?}"),
        };
        println!("CLIENT {said}");
    }
    // Keeps its sockets until it is told, or killed.
    let _ = std::io::stdin().read(&mut [0]);
}

/// How many connections to an address ended how, within so long.
fn dials(to: SocketAddr, long: Duration) -> String {
    let mut ends: std::collections::BTreeMap<String, u32> = std::collections::BTreeMap::new();
    let end = Instant::now() + long;
    while Instant::now() < end {
        *ends.entry(connect(to, &[], &mut None)).or_default() += 1;
    }
    ends.into_iter().map(|(end, count)| format!("{end}: {count}")).collect::<Vec<_>>().join(", ")
}

fn connect(to: SocketAddr, how: &[&str], stream: &mut Option<TcpStream>) -> String {
    let protocol = matches!(how, ["multipath"]).then_some(Protocol::MPTCP);
    let socket = match Socket::new(Domain::for_address(to), Type::STREAM, protocol) {
        Ok(socket) => socket,
        Err(error) => return told(Err(error)),
    };
    if let ["from", from] = how {
        // A client before this one may have used the port.
        socket.set_reuse_address(true).unwrap();
        socket.bind(&SockAddr::from(from.parse::<SocketAddr>().unwrap())).unwrap();
    }
    let connected = match how {
        ["nonblocking"] => {
            socket.set_nonblocking(true).unwrap();
            match socket.connect(&to.into()) {
                Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
                    let mut waiting = [rustix::event::PollFd::new(&socket, rustix::event::PollFlags::OUT)];
                    let limit = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
                    rustix::event::poll(&mut waiting, Some(&limit)).unwrap();
                    socket.set_nonblocking(false).unwrap();
                    match socket.take_error().unwrap() {
                        Some(error) => Err(error),
                        None => Ok(()),
                    }
                }
                done => done,
            }
        }
        ["fastopen"] => socket.send_to_with_flags(b"early", &to.into(), libc::MSG_FASTOPEN).map(drop),
        _ => socket.connect(&to.into()),
    };
    if let Err(error) = connected {
        return told(Err(error));
    }
    let connected = TcpStream::from(socket);
    let said = match (connected.peer_addr(), connected.local_addr()) {
        (Ok(peer), Ok(local)) => format!("connected to {peer} from {}", local.ip()),
        _ => "connected and gone".into(),
    };
    *stream = Some(connected);
    said
}

/// What a call gave, errors by their names.
fn told(result: std::io::Result<String>) -> String {
    result.unwrap_or_else(|error| match error.raw_os_error() {
        Some(libc::EPERM) => "EPERM".into(),
        Some(libc::ECONNREFUSED) => "ECONNREFUSED".into(),
        Some(libc::ECONNRESET) => "ECONNRESET".into(),
        Some(libc::ECONNABORTED) => "ECONNABORTED".into(),
        Some(libc::EPROTONOSUPPORT | libc::ENOPROTOOPT) => "no such protocol".into(),
        Some(libc::EADDRINUSE) => "EADDRINUSE".into(),
        _ => error.to_string(),
    })
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}
