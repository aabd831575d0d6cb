//! The relay between real sockets: with itself, with a foreign TLS stack, and with peers that break every rule.

use super::*;
use crate::{
    handshake::{
        Accepted, Ciphers, Secrets, Session,
        testing::{World, pair, program},
    },
    offload::{Choice, Opener, Sealer, arm, record, selftest},
};
use std::{
    future::pending,
    pin::{Pin, pin},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
    task::JoinHandle,
    time::{sleep, timeout},
};

/// The engine that these tests run with: `user`, or, in a guest whose kernel has TLS, what BUNTER_TEST_ENGINE=kernel asks
/// for. Then it has to be there: a test of the kernel that quietly runs in user space proves nothing.
fn engine() -> Choice {
    static ENGINE: OnceLock<Choice> = OnceLock::new();
    *ENGINE.get_or_init(|| match std::env::var("BUNTER_TEST_ENGINE").as_deref() {
        Ok("kernel") => {
            let matrix = selftest::run();
            eprintln!("{matrix}");
            Choice::from(crate::config::EngineChoice::Kernel, &matrix).unwrap()
        }
        _ => Choice::User,
    })
}

fn in_kernel() -> bool {
    engine() != Choice::User
}

fn takes_fresh_keys() -> bool {
    engine().ciphers() == Ciphers::All
}

mod foreign;
mod hostile;
mod life;
mod shared;
mod smoke;
mod stream;

/// How much slower this machine is than a fast one, as for the lab.
fn slowness() -> u32 {
    std::env::var("LAB_SLOW").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// So many seconds on a fast machine.
fn patience(seconds: u64) -> Duration {
    Duration::from_secs(seconds) * slowness()
}

/// A relay that runs, with the socket that its application holds.
struct Relay {
    application: TcpStream,
    tally: JoinHandle<Tally>,
    progress: Arc<Progress>,
    stop: oneshot::Sender<Stop>,
    /// How often it was woken.
    polls: Arc<AtomicUsize>,
}

impl Relay {
    fn over(application: TcpStream, pipe: Pipe, limits: Limits) -> Self {
        let (stop, stopped) = oneshot::channel();
        let (progress, polls) = (Arc::new(Progress::default()), Arc::new(AtomicUsize::new(0)));
        let (shown, counted) = (progress.clone(), polls.clone());
        let tally = tokio::spawn(async move {
            let stop = async {
                match stopped.await {
                    Ok(stop) => stop,
                    Err(_) => pending().await,
                }
            };
            let carried = carry(pipe, &limits, stop, &shown);
            let (tally, _) = Counted { inner: pin!(carried), polls: counted }.await;
            tally
        });
        Self { application, tally, progress, stop, polls }
    }

    async fn client(session: Session, application: TcpStream) -> Self {
        Self::over(application, arm(session, engine()).unwrap(), Limits::default())
    }

    async fn server(session: Accepted) -> Self {
        let (application, upstream) = program().await;
        Self::over(application, arm(session.joined(upstream), engine()).unwrap(), Limits::default())
    }

    async fn closed(self) -> Tally {
        drop(self.application);
        timeout(patience(20), self.tally).await.expect("the relay ends").unwrap()
    }
}

struct Counted<'a, F> {
    inner: Pin<&'a mut F>,
    polls: Arc<AtomicUsize>,
}

impl<F: Future> Future for Counted<'_, F> {
    type Output = F::Output;
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        self.polls.fetch_add(1, Relaxed);
        self.inner.as_mut().poll(context)
    }
}

/// Two relays with mutual TLS between them: `client`'s application talks to `server`'s.
async fn chain(ciphers: Ciphers) -> (Relay, Relay) {
    let sessions = World::new().sessions(ciphers).await;
    let server = Relay::server(sessions.server).await;
    (Relay::client(sessions.client, sessions.client_application).await, server)
}

/// A relay as the client, and the naked records of its server.
async fn against_records() -> (Relay, Peer) {
    let sessions = World::new().sessions(engine().ciphers()).await;
    (Relay::client(sessions.client, sessions.client_application).await, Peer::server(sessions.server).await)
}

/// The other end of a session, as naked records.
struct Peer {
    socket: TcpStream,
    sealer: Sealer,
    opener: Opener,
    secrets: Secrets,
}

impl Peer {
    /// Of a client.
    fn client(session: Session) -> Self {
        let (_, network, secrets, _) = session.into_parts();
        Self::over(network, secrets)
    }

    /// Of a server that has no workload behind it.
    async fn server(accepted: Accepted) -> Self {
        let (permit, _, secrets, _) = accepted.joined(pair().await.0).into_parts();
        Self::over(permit.into_parties().flow.socket, secrets)
    }

    fn over(socket: TcpStream, mut secrets: Secrets) -> Self {
        let (transmit, receive) = (secrets.next_transmit().unwrap(), secrets.next_receive().unwrap());
        let sealer = Sealer::new(&transmit).unwrap();
        let opener = Opener::new(&receive).unwrap();
        Self { socket, sealer, opener, secrets }
    }

    fn seal(&mut self, content_type: u8, body: &[u8]) -> Vec<u8> {
        let mut slot = vec![0; record::HEADER + body.len() + record::TRAILER];
        slot[record::HEADER..][..body.len()].copy_from_slice(body);
        let length = self.sealer.seal(record::ContentType(content_type), &mut slot, body.len()).unwrap();
        slot.truncate(length);
        slot
    }

    async fn send(&mut self, content_type: u8, body: &[u8]) {
        let record = self.seal(content_type, body);
        // A relay that has given up does not read any more.
        let _ = self.socket.write_all(&record).await;
    }

    /// The next record, or `None` at the end of the connection.
    async fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut header = [0; record::HEADER];
        timeout(patience(5), self.socket.read_exact(&mut header)).await.expect("in time").ok()?;
        let mut whole = header.to_vec();
        whole.resize(record::measure(&header).unwrap().unwrap(), 0);
        self.socket.read_exact(&mut whole[record::HEADER..]).await.ok()?;
        let (content_type, at) = self.opener.open(&mut whole).unwrap();
        Some((content_type.0, whole[at].to_vec()))
    }
}

/// Bytes that differ everywhere, so that a lost, doubled or swapped piece is seen.
fn noise(length: usize, mut seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        bytes.extend_from_slice(&seed.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

async fn read_to_end(socket: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    timeout(patience(30), socket.read_to_end(&mut bytes)).await.expect("in time").unwrap();
    bytes
}

/// The socket was reset, not ended.
async fn is_reset(socket: &mut TcpStream) -> bool {
    let mut bytes = Vec::new();
    match timeout(patience(10), socket.read_to_end(&mut bytes)).await {
        Ok(Err(error)) => error.kind() == std::io::ErrorKind::ConnectionReset,
        _ => false,
    }
}
