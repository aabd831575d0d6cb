//! The control side: one value that owns what is attached, installs policies, and passes on the events of the kernel
//! programs.
//!
//! It lives on the control runtime, in the network namespace that it was made in. No connection waits for it.
//!
//! *Invariant:* a policy is in force whole or not at all.

use super::{
    Error, Listening, UnboundListeners,
    cgroups::Cgroups,
    diagnostics::{self, Socket},
    error::During,
    host::{self, Host},
    install::Classes,
    layout, owners,
    programs::{self, Loaded, Readers, ToTracing},
    refusals::{Refusals, Refused},
    registry::Commands,
    rows::{self, KernelFacts, Rows},
    tables::{Tables, map_error, tuple_key},
    work::Work,
};
use aya::maps::{MapData, PerCpuArray, RingBuf};
use aya_log::EbpfLogger;
use bunter_common::*;
use bunter_sys::{self as sys, bpf};
use std::{
    collections::{HashSet, VecDeque},
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};
use tokio::io::unix::AsyncFd;

/// What to attach where.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the lock of this namespace is.
    pub run_dir: PathBuf,
    /// The subtree of the unified hierarchy whose connections are acted on; `/` is all of it.
    pub cgroup: PathBuf,
    /// Number of data shards, 1 to [`MAX_SHARDS`].
    pub shards: usize,
    /// Rows of maps, where other than built in. Ignored for maps that are adopted.
    pub sizes: Vec<(&'static str, u32)>,
}

/// The kernel programs of this network namespace, attached. Dropping it leaves them attached.
pub struct Programs {
    pub(super) host: Host,
    pub(super) tables: Tables,
    pub(super) cgroups: Cgroups,
    pub(super) commands: Commands,
    unbound: Vec<UnboundListeners>,
    /// Something has just failed: it is tried again only after `REST`.
    resting: bool,
    shards: u32,
    pub(super) facts: Option<Arc<dyn KernelFacts>>,
    /// What is in force: the rows for everybody, and those of classes of cgroups.
    pub(super) rows: Arc<Rows>,
    pub(super) classes: Classes,
    pub(super) generation: u32,
    pub(super) epoch: u32,
    /// Addresses that policy protects whether or not anybody listens.
    pub(super) protected: HashSet<ProtectedKey>,
    /// Every listening socket is recorded.
    pub(super) complete: bool,
    events: RingBuf<MapData>,
    /// Wakes when there are events, or changes of the cgroup tree; made on the runtime that waits first.
    wakers: Option<[AsyncFd<OwnedFd>; 2]>,
    counters: PerCpuArray<MapData, u64>,
    refusals: Refusals,
    log: Option<EbpfLogger<ToTracing>>,
    pub(super) pending_events: VecDeque<KernelEvent>,
    covered: PathBuf,
    _locks: [OwnedFd; 2],
}

/// How long to wait before what has failed is tried again.
const REST: Duration = Duration::from_millis(100);

/// Something that the daemon should know.
#[derive(Debug)]
pub enum KernelEvent {
    /// The kernel has refused something by itself, once or many times.
    Refused(Refused),
    /// Something passed by a named bypass.
    Bypassed(Event),
    /// A socket has begun to listen, or a process that may be enrolled holds one that was not protected. It is to be
    /// judged, and [`Programs::set_listener_mode`] called.
    Listening(Listening),
    /// The socket with this cookie listens no more.
    Closed(u64),
    /// Something does not work. It is tried again: cgroups by [`Programs::retry`], listeners by [`Programs::listeners`], all
    /// else by itself.
    Trouble(Work, Error),
}

/// A connection from before the agent, between this host's programs and what is protected now.
#[derive(Clone, Copy, Debug)]
pub struct OldConnection {
    /// This host's end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// This host's end dialled a mesh destination; else it serves from a protected listener.
    pub outbound: bool,
    /// Owner of the socket file.
    pub uid: u32,
    /// Inode number, as `/proc/PID/fd` shows it.
    pub inode: u32,
    socket: Socket,
}

impl Programs {
    /// Loads, attaches and pins the programs, and makes the listeners of every shard. With maps adopted from an agent before,
    /// its policy stays in force until [`Programs::install`]; without, nothing is touched until then.
    pub fn load(options: &Options) -> Result<Self, Error> {
        let shards = u32::try_from(options.shards).unwrap_or(u32::MAX);
        if shards == 0 || shards as usize > MAX_SHARDS {
            return Err(Error::Misuse { what: "the number of shards must be 1 to 64" });
        }
        let host = Host::find()?;
        let lock = host::lock(&options.run_dir, host.netns_inode)?;
        host.open_cgroup(&options.cgroup)?;
        host.close_pins()?;
        discard_foreign(&host)?;
        let pins_lock = host.make_pins()?;
        let loaded = Loaded::load(&host, &options.sizes)?;
        let tables = Tables::open(&host.pins, &host::shared_pin(map::SERVED))?;
        let config = tables.config.get(&0).map_err(map_error(map::CONFIG))?;
        let config = config.filter(|config| config.abi == ABI && config.epoch != 0);
        let (generation, epoch) = config.map_or((0, 0), |config| (config.generation, config.epoch));
        for (what, by) in
            [(QUOTA_FLOWS, QUOTA_BY_PROGRAMS), (QUOTA_FLOWS, QUOTA_BY_AGENT), (QUOTA_SOCKETS, QUOTA_BY_PROGRAMS)]
        {
            let row = QuotaKey { uid: ANY, what, by };
            if tables.quotas.get(&row).map_err(map_error(map::QUOTAS))?.is_none() {
                tables.quotas.put(&row, &0, bpf::NEW).map_err(map_error(map::QUOTAS))?;
            }
        }
        // Remove what an agent that was killed in the middle of an installation has left.
        rows::sweep(&tables, |of| of == epoch)?;
        let rows = Arc::new(Self::adopt_verdicts(&tables)?);
        let before = config.unwrap_or(Config {
            abi: ABI,
            generation: 0,
            netns_cookie: host.netns_cookie,
            shards,
            flags: 0,
            epoch: 0,
            namespace: rows::NAMESPACE,
        });
        // Sockets are recorded from the moment that the programs are attached.
        tables.layout.put(&0, &layout::running(), bpf::ANY).map_err(map_error(map::LAYOUT))?;
        tables.config.put(&0, &before, bpf::ANY).map_err(map_error(map::CONFIG))?;
        let Readers { events, counters, log, registry } = loaded.attach(&host, &options.cgroup)?;
        tables.served.put(&host.netns_cookie, &1, bpf::ANY).map_err(map_error(map::SERVED))?;
        for stale in tables.accepted.keys().map_err(map_error(map::ACCEPTED))? {
            tables.accepted.remove(&stale).map_err(map_error(map::ACCEPTED))?;
        }
        for stale in tables.origins.keys().map_err(map_error(map::ORIGINS))? {
            tables.origins.remove(&stale).map_err(map_error(map::ORIGINS))?;
        }
        let flows = Arc::new(AtomicU64::new(0));
        let unbound: Result<Vec<UnboundListeners>, Error> = (0..options.shards)
            .map(|shard| UnboundListeners::make(shard, &tables, host.netns_cookie, Arc::clone(&flows)))
            .collect();
        let cgroups = Cgroups::watch(&host.cgroup2)?;
        let protected = tables.protected.keys().map_err(map_error(map::PROTECTED))?.into_iter().collect();
        let refusals = Refusals::adopt(&tables.refusals)?;
        let programs = Self {
            covered: host.cgroup2.join(options.cgroup.strip_prefix("/").unwrap_or(&options.cgroup)),
            host,
            tables,
            cgroups,
            commands: Commands::new(registry),
            unbound: unbound?,
            shards,
            facts: None,
            rows,
            classes: Classes::default(),
            resting: false,
            generation,
            epoch,
            protected,
            complete: before.flags & FLAG_REGISTRY_COMPLETE != 0,
            events,
            wakers: None,
            counters,
            refusals,
            log,
            pending_events: VecDeque::new(),
            _locks: [lock, pins_lock],
        };
        let config = programs.config(generation, epoch, before.flags);
        programs.tables.config.put(&0, &config, bpf::ANY).map_err(map_error(map::CONFIG))?;
        Ok(programs)
    }

    /// The listeners of the shards, to be sent to their threads. They can be taken once.
    pub fn take_listeners(&mut self) -> Vec<UnboundListeners> {
        std::mem::take(&mut self.unbound)
    }

    /// Inode number of the network namespace.
    pub fn netns(&self) -> u64 {
        self.host.netns_inode
    }

    /// Generation of the policy in force; 0 before the first.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// The cgroup subtree that is covered, and the directory of the pins: what `bunter status` tells.
    pub fn places(&self) -> (&std::path::Path, &std::path::Path) {
        (&self.covered, &self.host.pins)
    }

    /// Counters by the numbers of [`bunter_common::counter`], all CPUs added up.
    pub fn counters(&self) -> Result<[u64; counter::COUNT as usize], Error> {
        let mut sums = [0_u64; counter::COUNT as usize];
        for (index, sum) in (0..).zip(sums.iter_mut()) {
            *sum = self.counter(index)?;
        }
        Ok(sums)
    }

    /// How many events the kernel had no room for, since the maps were made.
    pub fn events_lost(&self) -> Result<u64, Error> {
        self.counter(counter::EVENTS_LOST)
    }

    fn counter(&self, index: u32) -> Result<u64, Error> {
        let values = self.counters.get(&index, 0);
        let values = values.map_err(|error| Error::Map { map: map::COUNTERS, error: io::Error::other(error) })?;
        Ok(values.iter().sum())
    }

    /// The next thing that the daemon should know. Cgroups that appear are classified on the way. Cancel safe.
    ///
    /// It never fails: what goes wrong on the way is a [`KernelEvent::Trouble`].
    ///
    /// When [`Programs::events_lost`] has risen, something was not told: [`Programs::listeners`] then finds what listens.
    pub async fn next_event(&mut self) -> KernelEvent {
        loop {
            // More is read only when these have been passed on: in a flood the ring buffer fills and events are counted as
            // lost, not hoarded here.
            if let Some(notice) = self.pending_events.pop_front() {
                return notice;
            }
            if self.resting {
                tokio::time::sleep(REST).await;
                self.resting = false;
            }
            let watched = self.watch_cgroups();
            self.observe(Work::Cgroups, watched);
            self.read_events();
            if self.pending_events.is_empty() {
                let woken = self.wait().await;
                self.observe(Work::Events, woken);
            }
        }
    }

    async fn wait(&mut self) -> Result<(), Error> {
        let failed = || "waiting for events of the kernel programs".into();
        let [events, cgroups] = match &mut self.wakers {
            Some(wakers) => wakers,
            none => none.insert([
                sys::readable(self.events.as_fd()).during(failed)?,
                sys::readable(self.cgroups.as_fd()).during(failed)?,
            ]),
        };
        tokio::select! {
            ready = events.readable() => ready.during(failed)?.clear_ready(),
            ready = cgroups.readable() => ready.during(failed)?.clear_ready(),
        }
        Ok(())
    }

    /// Queues a [`KernelEvent::Trouble`] for what has failed.
    pub(super) fn observe(&mut self, work: Work, outcome: Result<(), Error>) {
        if let Err(error) = outcome {
            self.resting = true;
            self.pending_events.push_back(KernelEvent::Trouble(work, error));
        }
    }

    /// An event that has been read already, if there is one.
    pub fn waiting(&mut self) -> Option<KernelEvent> {
        self.pending_events.pop_front()
    }

    /// Passes on, as events, the refusals that the kernel programs have counted without an event for each; to be called now
    /// and then. `last`: this agent ends, and the next one must not pass on the same refusals again.
    pub fn collect_refusals(&mut self, last: bool) -> Result<(), Error> {
        self.read_events();
        let found = self.refusals.collect(last)?;
        self.pending_events.extend(found.into_iter().map(KernelEvent::Refused));
        Ok(())
    }

    /// Connections that were open before, between this host's programs and mesh destinations or from protected listeners,
    /// and that the agent does not carry.
    pub fn preexisting(&self, is_mesh: impl Fn(SocketAddr) -> bool) -> Result<Vec<OldConnection>, Error> {
        let mut found = Vec::new();
        let ours: HashSet<u32> = owners::sockets_of(std::process::id()).into_iter().collect();
        for socket in diagnostics::sockets(diagnostics::CONNECTED)? {
            if ours.contains(&socket.inode)
                || self.tables.own.get(&socket.cookie).map_err(map_error(map::OWN))?.is_some()
                || self.is_upstream(&socket)?
            {
                continue;
            }
            let outbound = is_mesh(socket.remote);
            if outbound || self.is_protected(socket.local)? {
                let Socket { local, remote, uid, inode, .. } = socket;
                found.push(OldConnection { local, remote, outbound, uid, inode, socket });
            }
        }
        Ok(found)
    }

    /// Closes a connection as if it had been reset. Says whether it was still there.
    pub fn kill(&self, connection: &OldConnection) -> Result<bool, Error> {
        diagnostics::destroy(&connection.socket)
    }

    /// Removes rows of sockets whose end no hook has seen (multipath TCP closes its own inner sockets). To be called now
    /// and then; gives the number of rows removed.
    pub fn tidy(&self) -> Result<usize, Error> {
        let mut gone = 0;
        let full = map_error(map::FLOWS);
        let before = self.tables.flows.keys().map_err(&full)?;
        let alive: HashSet<u64> =
            diagnostics::sockets(diagnostics::ALIVE)?.into_iter().map(|socket| socket.cookie).collect();
        for cookie in before {
            // A socket between `connect()` and its SYN is on no list yet, so rows that are young are kept.
            let young = |origin: &Origin| owners::now().saturating_sub(origin.task.at) < 60_000_000_000;
            if !alive.contains(&cookie)
                && self.tables.flows.get(&cookie).map_err(&full)?.is_some_and(|origin| !young(&origin))
                && self.tables.forget_flow(cookie).map_err(&full)?
            {
                gone += 1;
            }
        }
        Ok(gone)
    }

    pub(super) fn config(&self, generation: u32, epoch: u32, flags: u32) -> Config {
        let complete = if self.complete { FLAG_REGISTRY_COMPLETE } else { 0 };
        Config {
            abi: ABI,
            generation,
            netns_cookie: self.host.netns_cookie,
            shards: self.shards,
            flags: flags & !FLAG_REGISTRY_COMPLETE | complete,
            epoch,
            namespace: rows::NAMESPACE,
        }
    }

    fn read_events(&mut self) {
        if let Some(log) = &mut self.log {
            log.flush();
        }
        let mut events = Vec::new();
        while let Some(item) = self.events.next() {
            events.extend(bpf::read::<Event>(&item));
        }
        for event in events {
            match event.kind {
                EVENT_REFUSED => self.pending_events.extend(self.refusals.told(&event).map(KernelEvent::Refused)),
                EVENT_BYPASSED => self.pending_events.push_back(KernelEvent::Bypassed(event)),
                EVENT_LISTENING | EVENT_HELD => {
                    let seen = self.somebody_listens(&event);
                    self.observe(Work::Listeners, seen);
                }
                EVENT_CLOSED => self.somebody_closed(&event),
                EVENT_UNKNOWN_CGROUP => {
                    let known = self.classify_unknown(event.task.cgroup);
                    self.observe(Work::Cgroups, known);
                }
                _ => {}
            }
        }
    }

    fn is_upstream(&self, socket: &Socket) -> Result<bool, Error> {
        let upstream =
            self.tables.upstreams.get(&tuple_key(socket.remote, socket.local)).map_err(map_error(map::UPSTREAMS))?;
        Ok(upstream.is_some())
    }

    fn is_protected(&self, local: SocketAddr) -> Result<bool, Error> {
        let mode = self.tables.strictest_at(local, self.host.netns_cookie).map_err(map_error(map::LISTENERS))?;
        Ok(mode == LISTENER_PROTECTED)
    }
}

impl std::fmt::Debug for Programs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Programs").field("pins", &self.host.pins).field("generation", &self.generation).finish()
    }
}

/// Removes pins that belong to a namespace that is gone: inode numbers are used again, cookies are not.
fn discard_foreign(host: &Host) -> Result<(), Error> {
    let Ok(config) = bpf::Table::<u32, Config>::open(&host.pins.join(map::CONFIG)) else { return Ok(()) };
    match config.get(&0).map_err(map_error(map::CONFIG))? {
        Some(config) if config.epoch != 0 && config.netns_cookie != host.netns_cookie => {
            programs::remove_pins(&host.pins).map(|_| ())
        }
        _ => Ok(()),
    }
}
