//! What `lab-figures` measures: one stream's throughput, round trips, new connections. Clients of the echo server.
//!
//! *Invariant:* a measurement that could not be made is an error, never a number.

use crate::servers::{DONE, SINK};
use anyhow::Context;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

fn connect(to: SocketAddr) -> crate::Result<TcpStream> {
    let stream = TcpStream::connect(to).with_context(|| format!("connect to {to}"))?;
    stream.set_nodelay(true)?;
    crate::dial::limit(&stream, Duration::from_secs(30))?;
    Ok(stream)
}

/// Sends for so long on one connection; the time runs until the server has said that it has everything.
pub fn throughput(to: SocketAddr, time: Duration) -> crate::Result<Value> {
    let mut stream = connect(to)?;
    let block = vec![SINK; 256 * 1024];
    let began = Instant::now();
    let mut bytes = 0_u64;
    while began.elapsed() < time {
        stream.write_all(&block)?;
        bytes += block.len() as u64;
    }
    stream.write_all(&[DONE])?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    let seconds = began.elapsed().as_secs_f64();
    Ok(json!({ "bytes": bytes, "seconds": seconds, "megabytes_per_second": bytes as f64 / seconds / 1e6 }))
}

/// Sends 64 bytes back and forth on each of so many connections.
pub fn round_trips(to: SocketAddr, connections: usize, time: Duration) -> crate::Result<Value> {
    let streams = (0..connections).map(|_| connect(to)).collect::<crate::Result<Vec<_>>>()?;
    let threads: Vec<_> = streams
        .into_iter()
        .map(|mut stream| {
            std::thread::spawn(move || -> crate::Result<Vec<u32>> {
                let (message, mut answer) = ([b'x'; 64], [0; 64]);
                let mut micros = Vec::with_capacity(1 << 16);
                let began = Instant::now();
                while began.elapsed() < time {
                    let start = Instant::now();
                    stream.write_all(&message)?;
                    stream.read_exact(&mut answer)?;
                    micros.push(u32::try_from(start.elapsed().as_nanos() / 100).unwrap_or(u32::MAX));
                }
                Ok(micros)
            })
        })
        .collect();
    let mut tenths = Vec::new();
    for thread in threads {
        tenths.extend(thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??);
    }
    anyhow::ensure!(!tenths.is_empty(), "no round trip was done");
    tenths.sort_unstable();
    let at = |share: f64| f64::from(tenths[((tenths.len() - 1) as f64 * share) as usize]) / 10.0;
    Ok(json!({
        "connections": connections,
        "round_trips": tenths.len(),
        "per_second": tenths.len() as f64 / time.as_secs_f64(),
        "p50_us": at(0.5),
        "p99_us": at(0.99),
    }))
}

/// Connects, sends 64 bytes, reads them back, closes; again and again, so many at a time.
pub fn connects(to: SocketAddr, at_once: usize, time: Duration) -> crate::Result<Value> {
    let began = Instant::now();
    let threads: Vec<_> = (0..at_once)
        .map(|_| {
            std::thread::spawn(move || -> crate::Result<u64> {
                let (message, mut answer) = ([b'x'; 64], [0; 64]);
                let mut number = 0;
                while began.elapsed() < time {
                    let mut stream = connect(to)?;
                    stream.write_all(&message)?;
                    stream.read_exact(&mut answer)?;
                    // By RST: otherwise a fast run uses up the ports.
                    crate::dial::reset(stream)?;
                    number += 1;
                }
                Ok(number)
            })
        })
        .collect();
    let mut number = 0;
    for thread in threads {
        number += thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    }
    let seconds = began.elapsed().as_secs_f64();
    Ok(json!({ "connections": number, "at_once": at_once, "per_second": number as f64 / seconds }))
}
