//! The load: bulk on one or many streams, round trips, new connections. Clients of [`crate::bench::serve`].
//!
//! One connection is driven by blocking calls, many by one event loop for each thread: the generator shares its processor
//! with the server and must cost as little as it can.
//!
//! *Invariant:* a measurement that could not be made is an error, never a number, and both ends of a bulk flow agree on
//! how many bytes went through.

use crate::bench::poll::{Flags, Poll, number};
use crate::bench::stats::{percentile, sorted};
use crate::servers::{DONE, SINK};
use anyhow::{Context, bail, ensure};
use rustix::event::epoll;
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// Bytes of one write of a bulk flow.
const BLOCK: usize = 256 * 1024;
/// What is not counted at the start of round trips and of new connections.
const WARM_UP: Duration = Duration::from_millis(200);
/// The longest that anything may say nothing.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Load {
    /// Bulk on so many streams.
    Bulk(usize),
    /// Round trips of so many bytes on so many connections.
    RoundTrips(usize, usize),
    /// Connect, 64 bytes there and back, close; so many at a time.
    Connects(usize),
}

/// What is connected to.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Address.
    pub to: SocketAddr,
    /// Put kernel TLS with a fixed key on each socket; the server has to do the same.
    pub sealed: bool,
}

/// Does it for so long, on so many threads, and says what came of it.
///
/// When every connection has been used once, so that no handshake is left to do, `began` is called; the clock starts when
/// it comes back.
pub fn run(
    load: Load,
    to: Target,
    time: Duration,
    threads: usize,
    began: impl FnOnce() -> crate::Result<()>,
) -> crate::Result<Value> {
    let all = match load {
        Load::Bulk(number) | Load::RoundTrips(_, number) | Load::Connects(number) => number,
    };
    let threads = threads.clamp(1, all.max(1));
    let gate = Gate { primed: Barrier::new(threads + 1), go: Barrier::new(threads + 1) };
    let gate = &gate;
    let mut parts = std::thread::scope(|scope| {
        let started: Vec<_> = (0..threads)
            .map(|thread| {
                // The first ones take what is left over.
                let share = all / threads + usize::from(thread < all % threads);
                scope.spawn(move || match load {
                    Load::Bulk(1) => bulk_of_one(to, time, gate),
                    Load::Bulk(_) => bulk(to, share, time, gate),
                    Load::RoundTrips(size, 1) => round_trips_of_one(to, size, time, gate),
                    Load::RoundTrips(size, _) => round_trips(to, size, share, time, gate),
                    Load::Connects(_) => connects(to.to, share, time, gate),
                })
            })
            .collect();
        gate.open(began)?;
        let ended =
            started.into_iter().map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?);
        ended.collect::<crate::Result<Vec<Part>>>()
    })?;
    let count: u64 = parts.iter().map(|part| part.count).sum();
    let total: u64 = parts.iter().map(|part| part.total).sum();
    let seconds = parts.iter().map(|part| part.seconds).fold(0.0, f64::max);
    ensure!(count > 0, "nothing was done in {time:?}");
    let mut micros: Vec<f64> =
        parts.iter_mut().flat_map(|part| part.tenths.drain(..)).map(|t| t as f64 / 10.0).collect();
    micros = sorted(&micros);
    Ok(match load {
        Load::Bulk(_) => json!({ "bytes": total, "seconds": seconds, "per_second": count as f64 / seconds }),
        _ => json!({
            "count": count, "total": total, "seconds": seconds, "per_second": count as f64 / seconds,
            "p50": percentile(&micros, 0.5), "p99": percentile(&micros, 0.99),
        }),
    })
}

/// Where the threads wait for each other, and for the word to begin.
struct Gate {
    primed: Barrier,
    go: Barrier,
}

impl Gate {
    /// In a thread: its connections are ready or have failed, and it waits for the word.
    fn pass<T>(&self, prime: impl FnOnce() -> crate::Result<T>) -> crate::Result<T> {
        let primed = prime();
        self.primed.wait();
        self.go.wait();
        primed
    }

    fn open(&self, began: impl FnOnce() -> crate::Result<()>) -> crate::Result<()> {
        self.primed.wait();
        let told = began();
        self.go.wait();
        told
    }
}

/// What one thread did. `total` counts what came before the clock ran as well: it cost processor time too.
struct Part {
    count: u64,
    total: u64,
    seconds: f64,
    /// Tenths of a microsecond that each took.
    tenths: Vec<u32>,
}

fn connect(target: Target) -> crate::Result<TcpStream> {
    let to = target.to;
    let stream = TcpStream::connect(to).with_context(|| format!("connect to {to}"))?;
    if target.sealed {
        crate::sys::set_fixed_tls(stream.as_fd()).context("TLS of the kernel")?;
    }
    stream.set_nodelay(true)?;
    crate::dial::limit(&stream, PATIENCE)?;
    Ok(stream)
}

fn tenths(since: Instant) -> u32 {
    u32::try_from(since.elapsed().as_nanos() / 100).unwrap_or(u32::MAX)
}

/// A connection of a bulk flow that the sink has answered on, once, so that it is really there.
fn sink(to: Target) -> crate::Result<TcpStream> {
    let mut stream = connect(to)?;
    stream.write_all(&[SINK])?;
    agree(&mut stream, PRIMED - 1)?;
    Ok(stream)
}

/// Bytes that it took.
const PRIMED: u64 = 2;

/// Ends a bulk flow: the other end says how much it got.
fn agree(stream: &mut TcpStream, sent: u64) -> crate::Result<()> {
    stream.set_nonblocking(false)?;
    stream.write_all(&[DONE])?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer).context("no word from the sink")?;
    let got = u64::from_le_bytes(answer);
    ensure!(got == sent + 1, "{} bytes were sent and {got} came", sent + 1);
    Ok(())
}

fn bulk_of_one(to: Target, time: Duration, gate: &Gate) -> crate::Result<Part> {
    let mut stream = gate.pass(|| sink(to))?;
    let block = vec![SINK; BLOCK];
    let began = Instant::now();
    let mut bytes = 0;
    while began.elapsed() < time {
        stream.write_all(&block)?;
        bytes += block.len() as u64;
    }
    agree(&mut stream, bytes + PRIMED)?;
    Ok(Part { count: bytes, total: bytes, seconds: began.elapsed().as_secs_f64(), tenths: Vec::new() })
}

fn bulk(to: Target, streams: usize, time: Duration, gate: &Gate) -> crate::Result<Part> {
    let mut poll = Poll::new()?;
    let mut flows = gate.pass(|| {
        let sinks = (0..streams).map(|_| Ok((sink(to)?, 0_u64)));
        sinks.collect::<crate::Result<Vec<_>>>()
    })?;
    for (index, (stream, _)) in flows.iter().enumerate() {
        stream.set_nonblocking(true)?;
        poll.add(stream, index, Flags::OUT)?;
    }
    let block = vec![SINK; BLOCK];
    let began = Instant::now();
    while began.elapsed() < time {
        let ready = poll.wait(Some(PATIENCE), |_, ready| {
            let (stream, bytes) = &mut flows[ready.number];
            match stream.write(&block) {
                Ok(size) => *bytes += size as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("send"),
            }
            Ok(())
        })?;
        ensure!(ready > 0, "nothing could be sent for {PATIENCE:?}");
    }
    let mut count = 0;
    for (stream, bytes) in &mut flows {
        agree(stream, *bytes + PRIMED)?;
        count += *bytes;
    }
    Ok(Part { count, total: count, seconds: began.elapsed().as_secs_f64(), tenths: Vec::new() })
}

/// Counts round trips from the end of the warm-up on.
struct Tally {
    began: Instant,
    counted_from: Option<Instant>,
    part: Part,
}

impl Tally {
    fn new() -> Self {
        let part = Part { count: 0, total: 0, seconds: 0.0, tenths: Vec::with_capacity(1 << 20) };
        Self { began: Instant::now(), counted_from: None, part }
    }

    fn add(&mut self, since: Instant) {
        self.part.total += 1;
        match self.counted_from {
            Some(_) => {
                self.part.count += 1;
                self.part.tenths.push(tenths(since));
            }
            None if self.began.elapsed() >= WARM_UP => self.counted_from = Some(Instant::now()),
            None => {}
        }
    }

    fn over(&self, time: Duration) -> bool {
        self.counted_from.is_some_and(|from| from.elapsed() >= time) || self.began.elapsed() >= time + PATIENCE
    }

    fn end(mut self) -> Part {
        self.part.seconds = self.counted_from.map_or(f64::NAN, |from| from.elapsed().as_secs_f64());
        self.part
    }
}

/// A connection on which 64 bytes have gone there and back.
fn used_once(to: Target) -> crate::Result<TcpStream> {
    let mut stream = connect(to)?;
    let (message, mut answer) = ([b'x'; 64], [0; 64]);
    stream.write_all(&message)?;
    stream.read_exact(&mut answer)?;
    ensure!(answer == message, "another's bytes came back");
    Ok(stream)
}

fn round_trips_of_one(to: Target, size: usize, time: Duration, gate: &Gate) -> crate::Result<Part> {
    let mut stream = gate.pass(|| used_once(to))?;
    let (message, mut answer) = (vec![b'x'; size], vec![0; size]);
    let mut tally = Tally::new();
    while !tally.over(time) {
        let began = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut answer)?;
        tally.add(began);
    }
    Ok(tally.end())
}

fn round_trips(to: Target, size: usize, connections: usize, time: Duration, gate: &Gate) -> crate::Result<Part> {
    let message = vec![b'x'; size];
    let mut buffer = vec![0; size];
    let mut poll = Poll::new()?;
    let mut flows = gate.pass(|| {
        let streams = (0..connections).map(|_| Ok((used_once(to)?, Instant::now(), 0)));
        streams.collect::<crate::Result<Vec<_>>>()
    })?;
    for (index, (stream, ..)) in flows.iter().enumerate() {
        stream.set_nonblocking(true)?;
        poll.add(stream, index, Flags::IN)?;
    }
    for (stream, began, _) in &mut flows {
        *began = Instant::now();
        stream.write_all(&message)?;
    }
    let mut tally = Tally::new();
    while !tally.over(time) {
        let ready = poll.wait(Some(PATIENCE), |_, ready| {
            let (stream, began, got) = &mut flows[ready.number];
            match stream.read(&mut buffer[*got..]) {
                Ok(0) => bail!("a connection was closed"),
                Ok(more) => *got += more,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("receive"),
            }
            if *got == size {
                tally.add(*began);
                *got = 0;
                *began = Instant::now();
                stream.write_all(&message).context("send")?;
            }
            Ok(())
        })?;
        ensure!(ready > 0, "no answer for {PATIENCE:?}");
    }
    Ok(tally.end())
}

/// A new connection on its way.
struct Attempt {
    socket: Socket,
    began: Instant,
    sent: bool,
    got: usize,
}

fn attempt(epoll: &OwnedFd, to: SocketAddr, slots: &mut Vec<Option<Attempt>>) -> crate::Result<()> {
    let began = Instant::now();
    let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    match socket.connect(&to.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(error) => return Err(error).with_context(|| format!("connect to {to}")),
    }
    let at = number(&socket);
    // Edges: one call for each connection, not one for each step of it.
    epoll::add(epoll, &socket, epoll::EventData::new_u64(at as u64), Flags::IN | Flags::OUT | Flags::ET)?;
    if slots.len() <= at {
        slots.resize_with(at + 1, || None);
    }
    slots[at] = Some(Attempt { socket, began, sent: false, got: 0 });
    Ok(())
}

fn connects(to: SocketAddr, at_once: usize, time: Duration, gate: &Gate) -> crate::Result<Part> {
    gate.pass(|| Ok(()))?;
    let (message, mut buffer) = ([b'x'; 64], [0; 64]);
    let mut poll = Poll::new()?;
    let mut slots: Vec<Option<Attempt>> = Vec::new();
    let mut tally = Tally::new();
    poll.with(|epoll| (0..at_once).try_for_each(|_| attempt(epoll, to, &mut slots)))?;
    while !tally.over(time) {
        let ready = poll.wait(Some(PATIENCE), |epoll, ready| {
            let Some(slot) = slots.get_mut(ready.number) else { return Ok(()) };
            let Some(one) = slot else { return Ok(()) };
            if !one.sent && ready.flags.contains(Flags::OUT) {
                if let Some(error) = one.socket.take_error()? {
                    return Err(error).with_context(|| format!("connect to {to}"));
                }
                (&one.socket).write_all(&message).context("send on a new connection")?;
                one.sent = true;
            }
            if one.sent && ready.flags.intersects(Flags::IN | Flags::HUP | Flags::ERR) {
                match (&one.socket).read(&mut buffer[one.got..]) {
                    Ok(0) => bail!("a new connection was closed without an answer"),
                    Ok(more) => one.got += more,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error).context("receive on a new connection"),
                }
            }
            if one.got == message.len() {
                tally.add(one.began);
                *slot = None;
                attempt(epoll, to, &mut slots)?;
            }
            Ok(())
        })?;
        ensure!(ready > 0, "no new connection for {PATIENCE:?}");
    }
    Ok(tally.end())
}

/// 64 bytes there and back on one connection.
pub fn attempt_once(to: Target) -> crate::Result<()> {
    used_once(to).map(drop)
}

/// Opens so many connections, uses each once, says `held`, and keeps them until standard input ends.
pub fn hold(to: Target, number: usize) -> crate::Result<()> {
    let mut streams = Vec::with_capacity(number);
    for index in 0..number {
        streams.push(used_once(to).with_context(|| format!("connection {index}"))?);
    }
    crate::script::say(&json!({ "step": "held", "connections": number }));
    io::copy(&mut io::stdin().lock(), &mut io::sink())?;
    Ok(())
}
