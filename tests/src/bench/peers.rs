//! The peers: what stands between client and server, each in a lab of its own, started once and kept for all rounds.
//!
//! Every chain is client -> first proxy = mutual TLS 1.3 = second proxy -> server, with certificates of ECDSA P-256 from
//! one authority, checked on both sides, and AES-128-GCM where the peer lets choose. The client and the server are on the
//! same hosts as their proxies.
//!
//! *Invariant:* a peer that cannot be started is a reason, never a missing row without one.

mod ca;
mod classic;
mod envoy;
mod mesh;

use crate::bench::facts::Layout;
use crate::bench::plan::Given;
use crate::clock;
use crate::policy::{DOMAIN, PORT, id};
use crate::program::Program;
use crate::{Host, Lab, Mint, Skip, Terms};
use anyhow::{Context, ensure};
use std::any::Any;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Port on which the client's proxy listens, where it has to be told.
const FIRST: u16 = 7002;
/// Port on which the server's proxy takes TLS.
const SECOND: u16 = 7443;

/// Something to compare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// As rows have it.
    pub name: &'static str,
    /// Bunter's engine.
    pub engine: Option<&'static str>,
    /// Differs from another one only in how connections begin, so nothing else of it is measured unless it is asked for.
    pub variant: bool,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Plain,
    Sealed,
    HaproxyTcp,
    Stunnel { resumed: bool },
    Nginx { resumed: bool },
    Haproxy { resumed: bool },
    Envoy { resumed: bool },
    Wireguard,
    Ztunnel { pooled: bool },
    Ghostunnel,
    Bunter { fresh: bool },
}

/// All of them, in the order of the table.
pub fn all() -> Vec<Peer> {
    let peer = |name, variant, kind| Peer { name, engine: None, variant, kind };
    let bunter = |name, variant, engine, fresh| {
        let kind = Kind::Bunter { fresh };
        Peer { name, engine: Some(engine), variant, kind }
    };
    vec![
        peer("plain", false, Kind::Plain),
        peer("ktls-own", false, Kind::Sealed),
        peer("haproxy-tcp", false, Kind::HaproxyTcp),
        peer("wireguard", false, Kind::Wireguard),
        peer("stunnel", false, Kind::Stunnel { resumed: false }),
        peer("stunnel-resumed", true, Kind::Stunnel { resumed: true }),
        peer("nginx", false, Kind::Nginx { resumed: false }),
        peer("nginx-resumed", true, Kind::Nginx { resumed: true }),
        peer("haproxy", false, Kind::Haproxy { resumed: false }),
        peer("haproxy-resumed", true, Kind::Haproxy { resumed: true }),
        peer("envoy", false, Kind::Envoy { resumed: false }),
        peer("envoy-resumed", true, Kind::Envoy { resumed: true }),
        peer("ghostunnel", false, Kind::Ghostunnel),
        peer("ztunnel", false, Kind::Ztunnel { pooled: true }),
        peer("ztunnel-unpooled", true, Kind::Ztunnel { pooled: false }),
        bunter("bunter", false, "user", false),
        bunter("bunter-fresh", true, "user", true),
        bunter("bunter", false, "kernel", false),
        bunter("bunter-fresh", true, "kernel", true),
    ]
}

impl Peer {
    /// Client and server do kernel TLS on their own sockets: what a relay's kernel TLS is compared to.
    pub fn sealed(&self) -> bool {
        self.kind == Kind::Sealed
    }

    /// Name and engine, for people.
    pub fn title(&self) -> String {
        match self.engine {
            Some(engine) => format!("{} ({engine})", self.name),
            None => self.name.to_owned(),
        }
    }
}

/// Where a peer is started.
struct Site<'a> {
    lab: &'static Lab,
    layout: &'a Layout,
    authority: &'a Authority,
}

/// The authority of all peers but Bunter, whose agents have their own.
#[derive(Clone)]
pub struct Authority {
    mint: Arc<Mint>,
    pem: String,
}

impl Authority {
    /// A fresh one.
    pub fn found() -> crate::Result<Self> {
        let (mint, pem, _) = Mint::found(DOMAIN, time::Duration::hours(-1), time::Duration::days(1))?;
        Ok(Self { mint: Arc::new(mint), pem })
    }
}

/// What a peer's start came to.
pub enum Start {
    /// It runs.
    Running(Box<Chain>),
    /// It cannot run here.
    Skipped(String),
    /// It should have run.
    Failed(String),
}

/// A running peer with its client's and its server's host.
pub struct Chain {
    /// Which.
    pub peer: Peer,
    /// Its lab. It outlives this, and the janitor removes it: proxies that borrow it can then be kept beside it.
    pub lab: &'static Lab,
    /// What the client connects to.
    pub to: SocketAddr,
    /// Cgroups of the first and the second proxy.
    pub proxies: Vec<String>,
    /// How it is driven, for the report.
    pub note: String,
    /// Threads of the client.
    pub threads: usize,
    server: Option<Program>,
    _kept: Vec<Box<dyn Any>>,
}

/// What a kind of peer gives: what the client connects to, the proxies' cgroups, what to keep, how it is driven.
struct Started {
    to: SocketAddr,
    proxies: [&'static str; 2],
    kept: Vec<Box<dyn Any>>,
    note: String,
}

/// Why a peer is not there.
enum Absent {
    Skipped(String),
    Failed(anyhow::Error),
}

impl From<Skip> for Absent {
    fn from(skip: Skip) -> Self {
        Self::Skipped(skip.0)
    }
}

impl From<anyhow::Error> for Absent {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

impl From<std::io::Error> for Absent {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error.into())
    }
}

/// Starts a peer, and tries one connection through it.
pub fn start(peer: &Peer, layout: &Layout, given: &Given, authority: &Authority) -> Start {
    // The lab's own helpers panic where a test would have failed.
    let work = std::panic::AssertUnwindSafe(|| try_start(peer, layout, given, authority));
    match std::panic::catch_unwind(work) {
        Ok(Ok(chain)) => Start::Running(Box::new(chain)),
        Ok(Err(Absent::Skipped(reason))) => Start::Skipped(reason),
        Ok(Err(Absent::Failed(error))) => Start::Failed(format!("{error:#}")),
        Err(panic) => Start::Failed(said(&*panic)),
    }
}

/// Can this kernel do TLS on a socket?
fn probe_tls() -> Result<(), Absent> {
    use std::os::fd::AsFd;
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let stream = std::net::TcpStream::connect(listener.local_addr()?)?;
    let done = crate::sys::set_fixed_tls(stream.as_fd());
    done.map_err(|error| Absent::Skipped(format!("the kernel has no TLS: {error}")))
}

/// What a panic said.
pub fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_else(|| "a panic".to_owned())
}

fn try_start(peer: &Peer, layout: &Layout, given: &Given, authority: &Authority) -> Result<Chain, Absent> {
    // Asked before anything is made.
    let program = match peer.kind {
        Kind::Plain | Kind::Sealed | Kind::Wireguard | Kind::Bunter { .. } => None,
        Kind::HaproxyTcp | Kind::Haproxy { .. } => Some(given.program("haproxy")?),
        Kind::Stunnel { .. } => Some(given.program("stunnel4")?),
        Kind::Nginx { .. } => Some(given.program("nginx")?),
        Kind::Envoy { .. } => Some(given.program("envoy")?),
        Kind::Ztunnel { .. } => Some(given.program("ztunnel")?),
        Kind::Ghostunnel => Some(given.program("ghostunnel")?),
    };
    let program = program.as_deref().unwrap_or(Path::new(""));
    if peer.sealed() {
        probe_tls()?;
    }
    let lab: &'static Lab = Box::leak(Box::new(Lab::open_pair("bench")?));
    let cgroups = [
        ("client", &layout.client),
        ("server", &layout.server),
        ("proxy-alpha", &layout.first),
        ("proxy-beta", &layout.second),
        ("agent-alpha", &layout.first),
        ("agent-beta", &layout.second),
    ];
    for (cgroup, processors) in cgroups {
        lab.pin(cgroup, processors);
    }
    // New connections by the thousand: ports of ended ones are used again.
    for host in [&lab.alpha, &lab.beta] {
        for (name, value) in [("net/ipv4/tcp_tw_reuse", "1"), ("net/ipv4/ip_local_port_range", "16384 65535")] {
            host.sysctl(name, value)?;
        }
    }
    // Loss-based, as kernels have it by default; not every kernel lets a namespace have cubic. A host that paces instead
    // (BBR) would have its timers measured.
    for host in [&lab.alpha, &lab.beta] {
        let set = |name| host.sysctl("net/ipv4/tcp_congestion_control", name);
        set("cubic").or_else(|_| set("reno"))?;
    }
    let site = Site { lab, layout, authority };
    let server = Some(site.server(peer.sealed()));
    let started = match peer.kind {
        Kind::Plain => Ok(site.direct("no proxy at all")),
        Kind::Sealed => {
            Ok(site.direct("no proxy; kernel TLS under a fixed key on the programs' own sockets, no handshake"))
        }
        Kind::HaproxyTcp => classic::haproxy_tcp(&site, program),
        Kind::Haproxy { resumed } => classic::haproxy(&site, program, resumed),
        Kind::Stunnel { resumed } => classic::stunnel(&site, program, resumed),
        Kind::Nginx { resumed } => classic::nginx(&site, program, resumed),
        Kind::Ghostunnel => classic::ghostunnel(&site, program),
        Kind::Envoy { resumed } => envoy::start(&site, program, resumed),
        Kind::Wireguard => mesh::wireguard(&site),
        Kind::Ztunnel { pooled } => mesh::ztunnel(&site, program, pooled),
        Kind::Bunter { fresh } => mesh::bunter(&site, peer.engine.unwrap_or("user"), fresh, &given.agent),
    }?;
    let proxies = if started.kept.is_empty() { Vec::new() } else { started.proxies.map(str::to_owned).to_vec() };
    let Started { to, kept, note, .. } = started;
    let threads = layout.client.len();
    let chain = Chain { peer: peer.clone(), lab, to, proxies, note, threads, server, _kept: kept };
    chain.answers()?;
    Ok(chain)
}

impl Chain {
    /// Waits until the chain carries 64 bytes there and back.
    pub fn answers(&self) -> crate::Result<()> {
        let to = self.to;
        let mut last = "nothing was tried".to_owned();
        let attempt = || -> crate::Result<()> {
            let program = self.client(&["load", "--kind", "try", "--to", &to.to_string()])?.wait(clock::seconds(20))?;
            ensure!(program.status.success(), "{}", program.stderr.trim());
            Ok(())
        };
        let answer = clock::until(clock::seconds(20), || attempt().map_err(|error| last = format!("{error:#}")).ok());
        answer.with_context(|| format!("nothing goes through: {last}"))
    }

    /// Runs `lab-app` as the client.
    pub fn client(&self, words: &[&str]) -> crate::Result<Program> {
        let sealed: &[&str] = if self.peer.sealed() { &["--sealed", "yes"] } else { &[] };
        Ok(self.lab.run(&self.lab.alpha, "client", &[&["lab-app"], words, sealed].concat()))
    }

    /// Ends the server and gives its port to another program, until that one is dropped.
    pub fn replace_server(&mut self, words: &[&str]) -> Program {
        self.server = None;
        self.lab.run(&self.lab.beta, "server", words)
    }
}

impl Site<'_> {
    /// The client connects to the server, and nothing stands between them.
    fn direct(&self, note: &str) -> Started {
        let proxies = ["proxy-alpha", "proxy-beta"];
        Started { to: self.lab.beta.at(PORT), proxies, kept: Vec::new(), note: note.to_owned() }
    }

    fn server(&self, sealed: bool) -> Program {
        let (listen, threads) = (format!("[::]:{PORT}"), self.layout.server.len().to_string());
        let words = ["bench-server", "--listen", &listen, "--threads", &threads];
        let sealed: &[&str] = if sealed { &["--sealed", "yes"] } else { &[] };
        self.lab.serve(&self.lab.beta, "server", &[&words, sealed].concat())
    }

    /// Where the client's proxy listens.
    fn first(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], FIRST))
    }

    /// Where the server's proxy takes TLS.
    fn second(&self) -> SocketAddr {
        self.lab.beta.at(SECOND)
    }

    /// Where the server's proxy finds the server.
    fn behind() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], PORT))
    }

    /// Certificate, key and authority of `client` or `server`: three files.
    fn identity(&self, name: &str) -> crate::Result<Identity> {
        let terms = Terms { names: vec![format!("{name}.{DOMAIN}")], ..Terms::of(&id(name)) };
        let svid = self.authority.mint.issue(&Terms { until: time::Duration::hours(12), ..terms })?;
        let both = self.lab.file(&format!("{name}-both.pem"), format!("{}{}", svid.certificate_pem, svid.key_pem));
        Ok(Identity {
            certificate: self.lab.file(&format!("{name}.pem"), svid.certificate_pem),
            key: self.lab.file(&format!("{name}-key.pem"), svid.key_pem),
            both,
            authority: self.lab.file("authority.pem", &self.authority.pem),
            name: format!("{name}.{DOMAIN}"),
        })
    }

    /// A proxy on one of the hosts. What it says goes to a file, as a service's does.
    fn proxy(
        &self,
        host: &Host,
        program: &Path,
        words: &[&str],
        environment: &[(&str, &str)],
    ) -> crate::Result<Program> {
        let shell = crate::skip::need("sh").map_err(|skip| anyhow::anyhow!(skip.0))?;
        let mut command = self.lab.command(host, &format!("proxy-{}", host.name), shell);
        command.args(["-c", "log=$1; shift; exec \"$@\" >>\"$log\" 2>&1", "sh"]).arg(self.log_file(host));
        command.arg(program).args(words).envs(environment.iter().copied());
        Program::start(command, format!("{} on {}", program.display(), host.name))
    }

    fn log_file(&self, host: &Host) -> PathBuf {
        self.lab.directory().join(format!("proxy-{}.log", host.name))
    }

    /// What the proxy of a host said went wrong, or the last that it said.
    fn log(&self, host: &Host) -> String {
        let text = std::fs::read(self.log_file(host)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        let wrong = |line: &&&str| ["rror", "ERR", "emerg", "panic", "ALERT"].iter().any(|word| line.contains(word));
        let told: Vec<&str> = lines.iter().filter(wrong).take(3).copied().collect();
        if told.is_empty() { lines[lines.len().saturating_sub(3)..].join(" | ") } else { told.join(" | ") }
    }

    /// The two proxies, once the first listens.
    fn chain(&self, mut first: Program, second: Program, note: &str) -> Result<Started, Absent> {
        let to = self.first();
        let listens = clock::until(clock::seconds(20), || {
            let there = self.lab.alpha.within(|| std::net::TcpStream::connect(to).is_ok());
            (there || first.ended()).then_some(there)
        });
        if listens != Some(true) {
            let (first, second) = (self.log(&self.lab.alpha), self.log(&self.lab.beta));
            return Err(anyhow::anyhow!("the first proxy does not listen: {first} || {second}").into());
        }
        let kept: Vec<Box<dyn Any>> = vec![Box::new(first), Box::new(second)];
        Ok(Started { to, proxies: ["proxy-alpha", "proxy-beta"], kept, note: note.to_owned() })
    }
}

/// Files of a proxy's identity.
struct Identity {
    certificate: PathBuf,
    key: PathBuf,
    /// Certificate and key in one file, as haproxy wants it.
    both: PathBuf,
    authority: PathBuf,
    /// DNS name.
    name: String,
}
