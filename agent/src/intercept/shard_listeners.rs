//! The listeners of a shard: connections that the kernel has redirected to the agent come in, the agent's own connections
//! go out.
//!
//! An [`UnboundListeners`] is made with the programs and sent to the shard's thread, which opens it into a
//! [`ShardListeners`] on its own runtime. A connection costs one or two map calls, on descriptors that nobody locks.
//!
//! *Invariant:* a destination is never guessed. A connection of which the kernel has no record is reset.

use super::{
    Error, host, owners,
    registry::SharedAddresses,
    tables::{Tables, address, canonical, map_error, socket_address},
};
use crate::flow::{Flow, Listens, Origin, OriginalDst};
use bunter_common::*;
use bunter_sys::{self as sys, bpf};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use socket2::{Domain, Socket, Type};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::net::{TcpListener, TcpStream};

/// Nanoseconds after which the record of a `connect()` is too old to be about the connection that arrives. On loopback a
/// connection arrives at once, unless the agent does not accept: then the kernel repeats the SYN for two minutes
/// (tcp_syn_retries).
const OLDEST: u64 = 200_000_000_000;

/// Connections that may wait to be accepted, as far as `net.core.somaxconn` allows.
const BACKLOG: i32 = 4096;

/// The listeners of one shard, not yet on a runtime. Can be sent to another thread.
#[derive(Debug)]
pub struct UnboundListeners {
    shard: usize,
    outbound: Pair<std::net::TcpListener>,
    inbound: Pair<std::net::TcpListener>,
    tables: Tables,
    netns: u64,
    flows: Arc<AtomicU64>,
    congestion: Congestion,
}

/// One listener for each family. A host without IPv6 has the first only.
#[derive(Debug)]
struct Pair<T> {
    four: T,
    six: Option<T>,
}

/// The listeners of one shard, on its runtime. Dropping it closes them, and what comes then is refused by the kernel.
#[derive(Debug)]
pub struct ShardListeners {
    outbound: Pair<TcpListener>,
    inbound: Pair<TcpListener>,
    /// Addresses of the outbound listeners: each connection that is accepted there has it as its local address.
    redirected_to: Pair<SocketAddr>,
    /// Addresses of the inbound listeners: a connection to one of them was not redirected, and is reset.
    forbidden: Pair<SocketAddr>,
    dialler: Dialler,
}

/// Who comes to a listener of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// Programs of this host, that dial.
    Programs,
    /// Peers, that dial programs of this host.
    Network,
}

/// Whether there are bytes for a workload before it is dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// They are here, and go out as soon as there is a connection.
    EarlyData,
    /// There are none yet, and either end may be the first to send.
    NoData,
}

/// Makes the agent's own connections. Outlives the listeners, for flows that are under way when the agent stops to take new
/// ones.
#[derive(Clone, Debug)]
pub struct Dialler {
    tables: Tables,
    netns: u64,
    shared: SharedAddresses,
    flows: Arc<AtomicU64>,
    congestion: Congestion,
}

impl UnboundListeners {
    /// Makes the listeners of a shard and shows them to the kernel programs.
    pub(super) fn make(shard: usize, tables: &Tables, netns: u64, flows: Arc<AtomicU64>) -> Result<Self, Error> {
        let outbound = Pair::listen(tables, Side::Programs)?;
        let inbound = Pair::listen(tables, Side::Network)?;
        let congestion = Congestion::of(&inbound.four);
        outbound.show(&tables.outbound, map::OUTBOUND, shard)?;
        inbound.show(&tables.inbound, map::INBOUND, shard)?;
        Ok(Self { shard, outbound, inbound, tables: tables.clone(), netns, flows, congestion })
    }

    /// Number of the shard, from 0.
    pub fn shard(&self) -> usize {
        self.shard
    }

    /// Binds the listeners to the runtime of the calling thread.
    pub fn open(self) -> Result<ShardListeners, Error> {
        let redirected_to = self.outbound.addresses().map_err(|error| Error::Accept { error })?;
        let forbidden = self.inbound.addresses().map_err(|error| Error::Accept { error })?;
        let outbound = self.outbound.register().map_err(|error| Error::Accept { error })?;
        let inbound = self.inbound.register().map_err(|error| Error::Accept { error })?;
        let dialler = Dialler {
            tables: self.tables,
            netns: self.netns,
            shared: SharedAddresses::default(),
            flows: self.flows,
            congestion: self.congestion,
        };
        Ok(ShardListeners { outbound, inbound, redirected_to, forbidden, dialler })
    }
}

impl ShardListeners {
    /// What makes this shard's own connections.
    pub fn dialler(&self) -> Dialler {
        self.dialler.clone()
    }

    /// The next connection of a local program that the kernel has redirected to the agent. An error refuses one connection, or
    /// says that accepting failed; the caller goes on. Cancel safe.
    pub async fn accept_outbound(&self) -> Result<Flow, Error> {
        let (socket, peer) = self.outbound.accept().await.map_err(|error| Error::Accept { error })?;
        let local = match self.redirected_to.six.filter(|_| peer.is_ipv6()) {
            Some(six) => six,
            None => self.redirected_to.four,
        };
        // By the cookie of the socket: if its other end is gone, another connection may have the same addresses by now.
        let cookie = socket_cookie(&socket);
        let taken = |cookie| self.dialler.tables.accepted.take(&cookie).map_err(map_error(map::ACCEPTED));
        let origin = cookie.and_then(taken);
        let origin = match origin {
            Ok(Some(origin)) if owners::now().saturating_sub(origin.task.at) <= OLDEST => origin,
            Ok(_) => {
                reset(socket);
                return Err(Error::NoOrigin { peer: canonical(peer), at: canonical(local) });
            }
            Err(error) => {
                reset(socket);
                return Err(error);
            }
        };
        let dial_from = (origin.source != [0; 16]).then(|| socket_address(&origin.source, origin.source_port));
        let source = dial_from.map_or_else(
            || SocketAddr::new(canonical(peer).ip(), origin.source_port),
            |from| SocketAddr::new(from.ip(), peer.port()),
        );
        Ok(Flow {
            id: self.dialler.next_id(),
            socket,
            destination: OriginalDst(socket_address(&origin.destination, origin.destination_port)),
            source,
            origin: Origin::Outbound { task: origin.task, dial_from },
        })
    }

    /// The next connection for a protected listener of this host. Errors as in [`ShardListeners::accept_outbound`]. Cancel
    /// safe.
    pub async fn accept_inbound(&self) -> Result<Flow, Error> {
        let (socket, peer) = self.inbound.accept().await.map_err(|error| Error::Accept { error })?;
        let local = canonical(socket.local_addr().map_err(|error| Error::Accept { error })?);
        if local == self.forbidden.four || Some(local) == self.forbidden.six {
            reset(socket);
            return Err(Error::DirectDial { peer: canonical(peer), at: local });
        }
        self.dialler.inbound(socket, canonical(peer), OriginalDst(local))
    }
}

impl Dialler {
    /// A connection from `source` to a listener of this host, on a socket that is here already: who listens there is asked
    /// now. An error resets the socket.
    pub fn inbound(&self, socket: TcpStream, source: SocketAddr, destination: OriginalDst) -> Result<Flow, Error> {
        let origin = Origin::Inbound(Listens::default());
        let mut flow = Flow { id: self.next_id(), socket, destination, source, origin };
        match self.look_again(&mut flow) {
            Ok(_) => Ok(flow),
            Err(error) => {
                reset(flow.socket);
                Err(error)
            }
        }
    }

    /// Asks again who listens where an inbound flow goes: a socket may have taken the place of another. True where others
    /// listen now, or more is known about them.
    pub fn look_again(&self, flow: &mut Flow) -> Result<bool, Error> {
        let now = self.look(flow.destination, false)?;
        let is_as_before = flow.listens().is_some_and(|before| before.is_the_same(&now));
        flow.origin = Origin::Inbound(now);
        Ok(!is_as_before)
    }

    /// Who listens there now. `everywhere`: also on the loopback device, beside those on any device.
    pub fn look(&self, to: OriginalDst, everywhere: bool) -> Result<Listens, Error> {
        let found = self.shared.reached(&self.tables, to.0, self.netns, everywhere);
        let (listeners, who) = found.map_err(|error| Error::Map { map: map::LISTENERS, error })?;
        let mut listeners = listeners.into_iter();
        let first = listeners.next();
        Ok(Listens {
            task: first.map(|listening| listening.row.owner).filter(|owner| owner.tgid != 0),
            cookie: first.map_or(0, |listening| listening.cookie),
            sharers: listeners.map(|listening| (listening.row.owner, listening.cookie)).collect(),
            who,
        })
    }

    fn next_id(&self) -> u64 {
        self.flows.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Connects to a remote peer. `from` is a flow's `dial_from`: its address is used if the host still has it, its port if
    /// it is free.
    pub async fn dial(&self, to: SocketAddr, from: Option<SocketAddr>) -> Result<TcpStream, Error> {
        let failed = |error| Error::Dial { to, error };
        let own = Own { kind: OWN_DIAL, pad: 0, client_port: 0, client: [0; 16], listeners: 0 };
        let socket = self.own_socket(to, own, failed)?;
        if let Some(from) = from.filter(|from| from.is_ipv4() == to.is_ipv4()) {
            bind(&socket, from).map_err(failed)?;
        }
        socket.set_tcp_nodelay(true).map_err(failed)?;
        connect(socket, to).await.map_err(failed)
    }

    /// Connects to the local workload's own socket, which is shown `client` as its peer. No other program can make a
    /// connection that passes as this one. Closing it is a reset, until that is switched off. `opening`: whether its first
    /// bytes are there. `listeners`: the sockets that may be reached, from [`Origin::Inbound`](crate::flow::Origin). Where
    /// others listen, it is refused.
    pub async fn upstream(
        &self,
        to: OriginalDst,
        client: SocketAddr,
        listeners: u64,
        opening: Opening,
    ) -> Result<TcpStream, Error> {
        let OriginalDst(to) = to;
        let failed = |error| Error::Upstream { to, error };
        let (client, client_port) = (address(client.ip()), client.port());
        let own = Own { kind: OWN_UPSTREAM, pad: 0, client_port, client, listeners };
        let socket = self.own_socket(to, own, failed)?;
        prepare(&socket, self.congestion).map_err(failed)?;
        if opening == Opening::EarlyData {
            // The last ACK of the handshake goes with the first bytes, so that the workload is woken up once for both. This
            // holds for that ACK only (net/ipv4/tcp_input.c, `tcp_rcv_synsent_state_process`), and if no bytes come after
            // all, it goes by itself after 0.2 s.
            rustix::net::sockopt::set_tcp_quickack(&socket, false).map_err(|error| failed(error.into()))?;
        }
        connect(socket, to).await.map_err(failed)
    }

    /// A socket that the kernel programs know to be the agent's. They forget it when it is closed.
    fn own_socket(&self, to: SocketAddr, own: Own, failed: impl Fn(io::Error) -> Error) -> Result<Socket, Error> {
        let kind = Type::STREAM.nonblocking().cloexec();
        let socket = Socket::new(Domain::for_address(to), kind, None).map_err(&failed)?;
        register(&self.tables, &socket, &own)?;
        Ok(socket)
    }
}

impl Pair<std::net::TcpListener> {
    fn listen(tables: &Tables, side: Side) -> Result<Self, Error> {
        let four = listen(tables, side, IpAddr::V4(Ipv4Addr::LOCALHOST))?;
        let six = match listen(tables, side, IpAddr::V6(Ipv6Addr::LOCALHOST)) {
            Ok(listener) => Some(listener),
            Err(Error::Listen { error, .. })
                if matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT)) =>
            {
                tracing::warn!("this network namespace has no IPv6 loopback address: IPv6 connections are refused");
                None
            }
            Err(error) => return Err(error),
        };
        Ok(Self { four, six })
    }

    /// Puts the listeners where the programs look for them. They leave these maps by themselves when they are closed.
    fn show(&self, to: &bpf::Table<u32, u32>, map: &'static str, shard: usize) -> Result<(), Error> {
        let slot = u32::try_from(shard * 2).map_err(|_| Error::Misuse { what: "too many shards" })?;
        let put = |slot: u32, listener: &std::net::TcpListener| {
            to.put(&slot, &listener.as_raw_fd().cast_unsigned(), bpf::ANY).map_err(map_error(map))
        };
        put(slot, &self.four)?;
        self.six.iter().try_for_each(|six| put(slot + 1, six))
    }

    fn addresses(&self) -> io::Result<Pair<SocketAddr>> {
        let six = self.six.as_ref().map(std::net::TcpListener::local_addr).transpose()?;
        Ok(Pair { four: self.four.local_addr()?, six })
    }

    fn register(self) -> io::Result<Pair<TcpListener>> {
        Ok(Pair { four: TcpListener::from_std(self.four)?, six: self.six.map(TcpListener::from_std).transpose()? })
    }
}

impl Pair<TcpListener> {
    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let Some(six) = &self.six else { return self.four.accept().await };
        tokio::select! {
            accepted = self.four.accept() => accepted,
            accepted = six.accept() => accepted,
        }
    }
}

/// A listener of the agent, on a port of its own.
fn listen(tables: &Tables, side: Side, ip: IpAddr) -> Result<std::net::TcpListener, Error> {
    let at = SocketAddr::new(ip, 0);
    let failed = |error| Error::Listen { address: at, error };
    let socket = Socket::new(Domain::for_address(at), Type::STREAM.nonblocking().cloexec(), None).map_err(failed)?;
    if ip.is_ipv6() {
        socket.set_only_v6(true).map_err(failed)?;
    }
    // Accepted sockets inherit it.
    match side {
        Side::Programs => prepare(&socket, Congestion::of(&socket)),
        Side::Network => socket.set_tcp_nodelay(true),
    }
    .map_err(failed)?;
    register(tables, &socket, &Own { kind: OWN_LISTENER, pad: 0, client_port: 0, client: [0; 16], listeners: 0 })?;
    socket.bind(&at.into()).map_err(failed)?;
    socket.listen(BACKLOG).map_err(failed)?;
    // Accepted sockets inherit this option too, and those of an inbound listener are bound to the workload's own address
    // and port: without it a workload could not listen there again after a restart. It is set after the bind, which has to
    // choose a free port.
    socket.set_reuse_address(true).map_err(failed)?;
    Ok(socket.into())
}

/// To be called before a socket is bound that will be a listener which the agent dials itself: registers it as such with
/// the kernel programs that an agent has left in this network namespace, if there are any. Where that fails, it is a
/// listener like any other.
pub fn claim_listener(socket: &impl AsFd) {
    let own = Own { kind: OWN_TRIAL, pad: 0, client_port: 0, client: [0; 16], listeners: 0 };
    let claimed = host::netns().and_then(|(_, inode)| {
        let table = bpf::Table::<u64, Own>::open(&host::pins(inode).join(map::OWN));
        let table = table.map_err(|error| Error::Map { map: map::OWN, error })?;
        claim(&table, socket, &own)
    });
    if let Err(error) = claimed {
        tracing::debug!(%error, "no kernel programs to tell of a listener of the agent's own");
    }
}

/// Tells the kernel programs that a socket is the agent's, before it does anything.
fn register(tables: &Tables, socket: &impl AsFd, own: &Own) -> Result<(), Error> {
    claim(&tables.own, socket, own)
}

fn claim(table: &bpf::Table<u64, Own>, socket: &impl AsFd, own: &Own) -> Result<(), Error> {
    let cookie = socket_cookie(socket)?;
    table.put(&cookie, own, bpf::ANY).map_err(map_error(map::OWN))
}

fn socket_cookie(socket: &impl AsFd) -> Result<u64, Error> {
    rustix::net::sockopt::socket_cookie(socket)
        .map_err(|error| Error::Host { what: "asking for the cookie of a socket".into(), error: error.into() })
}

/// Binds to an address as far as that is possible: a port that is taken is left to the kernel, and so is an address that
/// the host does not have any more.
fn bind(socket: &Socket, from: SocketAddr) -> io::Result<()> {
    if from.port() != 0 {
        socket.set_reuse_address(true)?;
        match socket.bind(&from.into()) {
            Err(error) if error.raw_os_error() == Some(Errno::ADDRINUSE.raw_os_error()) => {}
            done => return allow_gone(done),
        }
    }
    sys::choose_port_late(socket.as_fd())?;
    allow_gone(socket.bind(&SocketAddr::new(from.ip(), 0).into()))
}

/// Connects. The loopback device delivers at once, so a connection on this host is established when the call returns, and
/// there is nothing to wait for.
async fn connect(socket: Socket, to: SocketAddr) -> io::Result<TcpStream> {
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error()) => return Err(error),
        _ => {}
    }
    let mut asked = [PollFd::new(&socket, PollFlags::OUT)];
    poll(&mut asked, Some(&Timespec::default()))?;
    let said = asked.map(|asked| asked.revents());
    let stream = TcpStream::from_std(socket.into())?;
    if said != [PollFlags::OUT] {
        stream.writable().await?;
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
    }
    Ok(stream)
}

fn allow_gone(bound: io::Result<()>) -> io::Result<()> {
    match bound {
        Err(error) if error.raw_os_error() == Some(Errno::ADDRNOTAVAIL.raw_os_error()) => Ok(()),
        done => done,
    }
}

/// The kind of congestion control that the host uses by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Congestion {
    /// It goes by losses, or by the length of queues.
    Ordinary,
    /// It paces what is sent, as BBR does.
    Paced,
}

impl Congestion {
    /// That of a socket on which none has been chosen.
    fn of(socket: &impl AsFd) -> Self {
        match rustix::net::sockopt::tcp_congestion(socket) {
            Ok(name) if name.starts_with("bbr") => Self::Paced,
            _ => Self::Ordinary,
        }
    }
}

/// Sets up a socket whose other end is a program of this host, so that all its bytes are passed on, and at once. Closing it
/// is a reset from now on, even if the kernel closes it because the agent was killed: no stream looks complete unless it
/// was ended in order.
pub(crate) fn prepare(socket: &impl AsFd, congestion: Congestion) -> io::Result<()> {
    rustix::net::sockopt::set_tcp_nodelay(socket, true)?;
    // Without this, urgent bytes would be missing from the stream.
    rustix::net::sockopt::set_socket_oobinline(socket, true)?;
    rustix::net::sockopt::set_socket_linger(socket, Some(Duration::ZERO))?;
    if congestion == Congestion::Paced {
        // On the host there is no congestion, and pacing would only cost a timer for each burst. Every kernel has reno, and
        // every process may choose it (net/ipv4/tcp_cong.c); if this fails the bytes arrive all the same.
        let _ = rustix::net::sockopt::set_tcp_congestion(socket, "reno");
    }
    Ok(())
}

/// Closes a connection so that its other end sees a reset.
fn reset(socket: TcpStream) {
    // Without the option the other end sees an orderly end of a connection that carried nothing, which is no worse.
    let _ = socket.set_zero_linger();
}
