//! Very many connections at once, from one thread: each is made, used and held.
//!
//! *Invariant:* every connection is counted exactly once, as served, as refused with its error, or as hanging.

use crate::{dial, script};
use anyhow::Context;
use serde_json::json;
use std::collections::BTreeMap;
use std::io::{self, BufRead, ErrorKind};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::LocalSet;

/// What a crowd does.
pub struct Crowd {
    /// Where to, in turn.
    pub to: Vec<SocketAddr>,
    /// How many in all.
    pub connections: usize,
    /// How many are being made at a time.
    pub at_once: usize,
    /// What each says.
    pub marker: String,
}

/// Opens the connections, says what became of them, and holds those that were served until standard input ends. Each line
/// there uses every one of them once more.
pub fn run(crowd: Crowd) -> crate::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = LocalSet::new();
    let began = Instant::now();
    let mut outcomes =
        runtime.block_on(local.run_until(open(crowd.to, crowd.connections, crowd.at_once, crowd.marker.clone())));
    outcomes.sort_by_key(|outcome| outcome.at);
    let mut refused: BTreeMap<String, usize> = BTreeMap::new();
    let (mut streams, mut at, mut took) = (Vec::new(), Vec::new(), Vec::new());
    for outcome in outcomes {
        match outcome.stream {
            Ok(stream) => {
                streams.push(stream);
                at.push(outcome.at.duration_since(began));
                took.push(outcome.took);
            }
            Err(error) if error.kind() == ErrorKind::TimedOut && error.raw_os_error().is_none() => {
                *refused.entry("hangs".into()).or_default() += 1;
            }
            Err(error) => *refused.entry(dial::name(&error)).or_default() += 1,
        }
    }
    took.sort();
    let part = |list: &[Duration], of_hundred: usize| {
        list.get((list.len() * of_hundred / 100).min(list.len().saturating_sub(1))).map(|time| time.as_millis() as u64)
    };
    script::say(&json!({
        "step": "crowd", "served": streams.len(), "refused": refused,
        "first_ms": part(&at, 0), "half_ms": part(&at, 50), "last_ms": part(&at, 100),
        "median_ms": part(&took, 50), "slowest_ms": part(&took, 100),
    }));
    for (round, line) in io::stdin().lock().lines().enumerate() {
        line?;
        runtime.block_on(async {
            for (index, stream) in streams.iter_mut().enumerate() {
                let text = format!("{} {} {index}\n", crowd.marker, round + 1);
                stream.write_all(text.as_bytes()).await.with_context(|| format!("use {index}"))?;
                let mut answer = vec![0; text.len()];
                stream.read_exact(&mut answer).await.with_context(|| format!("use {index}"))?;
                anyhow::ensure!(answer == text.as_bytes(), "connection {index} got another's bytes");
            }
            Ok(())
        })?;
        script::say(&json!({ "step": "used", "connections": streams.len() }));
    }
    Ok(())
}

struct Outcome {
    stream: io::Result<TcpStream>,
    at: Instant,
    took: Duration,
}

async fn open(to: Vec<SocketAddr>, connections: usize, at_once: usize, marker: String) -> Vec<Outcome> {
    let places = Rc::new(Semaphore::new(at_once));
    let all: Vec<_> = (0..connections)
        .map(|index| {
            let (places, to, text) = (places.clone(), to[index % to.len()], format!("{marker} {index}\n"));
            tokio::task::spawn_local(async move {
                let _place = places.acquire().await;
                let began = Instant::now();
                let stream = match tokio::time::timeout(script::patience() * 3, one(to, &text)).await {
                    Ok(stream) => stream,
                    Err(_) => Err(ErrorKind::TimedOut.into()),
                };
                Outcome { stream, at: Instant::now(), took: began.elapsed() }
            })
        })
        .collect();
    let mut outcomes = Vec::with_capacity(connections);
    for one in all {
        outcomes.extend(one.await);
    }
    outcomes
}

async fn one(to: SocketAddr, text: &str) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    stream.write_all(text.as_bytes()).await?;
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer).await?;
    if answer == text.as_bytes() { Ok(stream) } else { Err(ErrorKind::InvalidData.into()) }
}
