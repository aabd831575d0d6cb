//! Servers and clients of many connections.
//!
//! The echo server is one thread with an event loop: it must not be what a measurement measures. Its first byte from a
//! client may choose what it does; see `Task`.
//!
//! *Invariant:* `READY address` on standard output means that the socket listens.

use crate::{dial, script};
use anyhow::Context;
use serde_json::json;
use std::io::{self, BufRead, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// First byte of a client that wants all it sends to be thrown away, and one byte when it has sent [`DONE`]. Not a
/// half-close: what stands in between may not pass that on.
pub const SINK: u8 = 1;
/// Last byte of such a client.
pub const DONE: u8 = 2;

/// What a connection of the echo server is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    Echo,
    Sink,
}

/// Sends back what comes, on all these addresses. With `report`, prints a JSON line for each connection and its end.
pub fn echo(addresses: &[SocketAddr], report: bool) -> crate::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async move {
        for address in addresses {
            let listener = dial::listen(*address).with_context(|| format!("listen on {address}"))?;
            listener.set_nonblocking(true)?;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            ready(&listener.local_addr()?.to_string());
            tokio::spawn(async move {
                loop {
                    match listener.accept().await {
                        Ok((stream, peer)) => drop(tokio::spawn(echo_one(stream, peer, report))),
                        Err(error) => {
                            eprintln!("accept: {error}");
                            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                        }
                    }
                }
            });
        }
        std::future::pending().await
    })
}

async fn echo_one(mut stream: tokio::net::TcpStream, peer: SocketAddr, report: bool) {
    let local = stream.local_addr().map(|address| address.to_string()).unwrap_or_default();
    if report {
        script::say(&json!({ "event": "accepted", "peer": peer.to_string(), "local": local }));
    }
    let mut bytes = 0_u64;
    let outcome = pump(&mut stream, &mut bytes).await;
    if report {
        let end = outcome.map_or_else(|error| dial::name(&error), |()| "eof".to_owned());
        script::say(&json!({ "event": "ended", "peer": peer.to_string(), "bytes": bytes, "end": end }));
    }
}

async fn pump(stream: &mut tokio::net::TcpStream, bytes: &mut u64) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // Small until it is needed: two thousand idle connections shall not cost the server much.
    let mut buffer = vec![0; 2048];
    let mut task = None;
    loop {
        let size = stream.read(&mut buffer).await?;
        let task = *task.get_or_insert(if buffer[0] == SINK { Task::Sink } else { Task::Echo });
        if size == 0 {
            return stream.shutdown().await;
        }
        *bytes += size as u64;
        match task {
            Task::Echo => stream.write_all(&buffer[..size]).await?,
            Task::Sink if buffer[size - 1] == DONE => stream.write_all(&[DONE]).await?,
            Task::Sink => {}
        }
        if size == buffer.len() && size < 256 * 1024 {
            buffer.resize(256 * 1024, 0);
        }
    }
}

/// Says that a server listens.
pub fn ready(address: &str) {
    let _ = io::stdout().lock().write_all(format!("READY {address}\n").as_bytes());
}

/// Runs a script on every connection, each on a thread of its own; ends after so many if a number is given.
pub fn serve(
    addresses: &[SocketAddr],
    steps: Vec<script::Step>,
    number: Option<usize>,
    marker: &str,
) -> crate::Result<()> {
    let steps = Arc::new(steps);
    let counter = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let mut acceptors = Vec::new();
    for address in addresses {
        let listener = dial::listen(*address).with_context(|| format!("listen on {address}"))?;
        ready(&listener.local_addr()?.to_string());
        let (steps, counter, marker) = (steps.clone(), counter.clone(), marker.to_owned());
        acceptors.push(std::thread::spawn(move || -> crate::Result<()> {
            let mut threads = Vec::new();
            while number.is_none_or(|number| threads.len() < number) {
                let (stream, peer) = listener.accept()?;
                let connection = counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                dial::limit(&stream, script::patience())?;
                script::say(&json!({
                    "event": "accepted", "connection": connection,
                    "peer": peer.to_string(), "local": stream.local_addr()?.to_string(),
                }));
                let (steps, marker) = (steps.clone(), marker.clone());
                threads.push(std::thread::spawn(move || script::run(stream, &steps, connection, &marker)));
            }
            for thread in threads {
                let _ = thread.join();
            }
            Ok(())
        }));
    }
    for acceptor in acceptors {
        acceptor.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    }
    Ok(())
}

/// Opens connections to an echo server and holds them. Each line on standard input uses every one of them once more.
pub fn hold(to: SocketAddr, number: usize, marker: &str) -> crate::Result<()> {
    let mut streams = Vec::with_capacity(number);
    for index in 0..number {
        let stream = TcpStream::connect(to).with_context(|| format!("connection {index}"))?;
        dial::limit(&stream, script::patience())?;
        stream.set_nodelay(true)?;
        streams.push(stream);
    }
    use_all(&mut streams, marker, 0)?;
    script::say(&json!({ "step": "held", "connections": number }));
    for (round, line) in io::stdin().lock().lines().enumerate() {
        line?;
        use_all(&mut streams, marker, round + 1)?;
        script::say(&json!({ "step": "used", "connections": number, "round": round + 1 }));
    }
    Ok(())
}

/// Says something on each connection, then reads the answer of each: all of them are under way at once.
fn use_all(streams: &mut [TcpStream], marker: &str, round: usize) -> crate::Result<()> {
    let text = |index: usize| format!("{marker} {round} {index}\n");
    for (index, stream) in streams.iter_mut().enumerate() {
        stream.write_all(text(index).as_bytes()).with_context(|| format!("round {round}, send {index}"))?;
    }
    for (index, stream) in streams.iter_mut().enumerate() {
        let mut answer = vec![0; text(index).len()];
        stream.read_exact(&mut answer).with_context(|| format!("round {round}, answer {index}"))?;
        anyhow::ensure!(answer == text(index).as_bytes(), "round {round}: connection {index} got another's bytes");
    }
    Ok(())
}

/// Sends back every datagram.
pub fn udp_echo(at: SocketAddr) -> crate::Result<()> {
    let socket = UdpSocket::bind(at)?;
    ready(&socket.local_addr()?.to_string());
    let mut buffer = vec![0; 65536];
    loop {
        let (size, peer) = socket.recv_from(&mut buffer)?;
        script::say(&json!({ "event": "datagram", "peer": peer.to_string(), "bytes": size }));
        socket.send_to(&buffer[..size], peer)?;
    }
}

/// Sends a datagram, connected or not, and waits for the answer.
pub fn udp_talk(to: SocketAddr, connected: bool, text: &str) -> crate::Result<()> {
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(crate::clock::seconds(3)))?;
    let sent = if connected {
        socket.connect(to).and_then(|()| socket.send(text.as_bytes()))
    } else {
        socket.send_to(text.as_bytes(), to)
    };
    let mut buffer = vec![0; 65536];
    let answer = sent.and_then(|_| socket.recv_from(&mut buffer));
    script::say(&match answer {
        Ok((size, from)) => json!({
            "step": "udp", "ok": true, "from": from.to_string(), "text": String::from_utf8_lossy(&buffer[..size]),
        }),
        Err(error) => json!({ "step": "udp", "ok": false, "error": dial::name(&error) }),
    });
    Ok(())
}
