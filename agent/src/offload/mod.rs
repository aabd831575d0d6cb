//! offload: a `Session` in, a `Pipe` out. Decides who protects the records: the kernel's TLS, or this process.
//!
//! Both engines are fed with the same traffic secrets, and everything above the records is one state machine (`relay`).
//! *Invariant:* a pipe exists only when both directions are keyed, confirmed by the kernel where it does the work; no
//! failure here ever leads to plaintext, and no byte of the application moves before the pipe exists.

mod choice;
mod kernel;
pub mod matrix;
pub mod record;
pub mod selftest;

pub use choice::{Choice, Engine, Unavailable};
pub(crate) use kernel::KernelKeys;
pub(crate) use record::{Opener, Sealer};

use crate::{
    authorize::Permit,
    flow::Direction,
    handshake::{Agreement, Secrets, Session},
};
use bunter_identity::refusal::{Culprit, Refusal};
use socket2::{SockRef, TcpKeepalive};
use std::{fmt, io, sync::Arc, time::Duration};
use tokio::net::TcpStream;

/// Two sockets and what turns the bytes of one into the bytes of the other.
pub struct Pipe {
    pub(crate) application: TcpStream,
    pub(crate) network: TcpStream,
    pub(crate) protection: Protection,
    /// The application's first bytes, which are not in its socket any more.
    pub(crate) early: Vec<u8>,
    /// What the two ends agreed on, where the connection may be used again.
    pub(crate) agreement: Option<Arc<Agreement>>,
}

/// How the bytes of a pipe are protected on the network.
pub(crate) enum Protection {
    /// Not at all: permissive inbound.
    Plain,
    /// By this process.
    User(Box<UserKeys>),
    /// By the kernel.
    Kernel(Box<KernelKeys>),
}

/// What engine `user` keeps for a connection.
pub(crate) struct UserKeys {
    pub(crate) sealer: Sealer,
    pub(crate) opener: Opener,
    pub(crate) secrets: Secrets,
}

/// Arms the engine for a session.
///
/// Where the kernel does not even take up TLS on the socket, engine `user` carries this session. Where it fails later,
/// the connection cannot be used any further: the error gives the permit back, so that an outbound flow may dial again
/// with engine `user`.
pub fn arm(mut session: Session, choice: Choice) -> Result<Pipe, Error> {
    // Keys first: they need the sockets only by reference, and a failure gives the permit back whole.
    let (network, secrets) = session.network_and_secrets();
    let keyed = key(network, secrets, choice).inspect_err(|_| reset(network));
    let (mut permit, other, secrets, agreement) = session.into_parts();
    let protection = match keyed {
        Ok(Keyed::User(sealer, opener)) => Protection::User(Box::new(UserKeys { sealer, opener, secrets })),
        Ok(Keyed::Kernel(armed)) => Protection::Kernel(Box::new(KernelKeys::new(armed, secrets))),
        Err(cause) => return Err(Error { cause, permit: Some(Box::new(permit)) }),
    };
    let early = std::mem::take(permit.early());
    let direction = permit.parties().flow.direction();
    let own = permit.into_parties().flow.socket;
    let (application, network) = match direction {
        Direction::Outbound => (own, other),
        Direction::Inbound => (other, own),
    };
    let agreement = Some(agreement).filter(|agreement| agreement.reusable);
    Pipe::new(application, network, protection, agreement).map(|pipe| Pipe { early, ..pipe })
}

enum Keyed {
    User(Sealer, Opener),
    Kernel(kernel::Armed),
}

fn key(network: &TcpStream, secrets: &mut Secrets, choice: Choice) -> Result<Keyed, Cause> {
    let transmit = secrets.next_transmit().map_err(Cause::Secrets)?;
    let receive = secrets.next_receive().map_err(Cause::Secrets)?;
    if let Choice::Kernel(ability) = choice {
        match kernel::arm(network, &transmit, &receive, ability) {
            Ok(armed) => return Ok(Keyed::Kernel(armed)),
            // The socket is as it was.
            Err(kernel::ArmError::NotTaken(error)) => {
                tracing::warn!(%error, "the kernel takes no TLS on this socket: engine user carries it");
            }
            Err(kernel::ArmError::HalfWay { step, error }) => return Err(Cause::Kernel { step, error }),
        }
    }
    let spent = |_| Cause::Secrets(rustls::Error::General("aws-lc takes none of these keys".into()));
    let sealer = Sealer::new(&transmit).map_err(spent)?;
    let opener = Opener::new(&receive).map_err(spent)?;
    Ok(Keyed::User(sealer, opener))
}

/// A dead peer is noticed within about two and a half minutes, also where neither program would notice it.
const KEEPALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(75)).with_interval(Duration::from_secs(15)).with_retries(5);

impl Pipe {
    /// A pipe without protection, for a permissive listener: the caller has recorded the connection as plaintext.
    pub fn plain(application: TcpStream, network: TcpStream) -> Result<Self, Error> {
        Self::new(application, network, Protection::Plain, None)
    }

    fn new(
        application: TcpStream,
        network: TcpStream,
        protection: Protection,
        agreement: Option<Arc<Agreement>>,
    ) -> Result<Self, Error> {
        let prepare = || -> io::Result<()> {
            network.set_nodelay(true)?;
            SockRef::from(&network).set_tcp_keepalive(&KEEPALIVE)
        };
        match prepare() {
            Ok(()) => Ok(Self { application, network, protection, early: Vec::new(), agreement }),
            Err(error) => {
                reset(&application);
                reset(&network);
                Err(Error { cause: Cause::Socket(error), permit: None })
            }
        }
    }

    /// Who protects the records; `None` where nobody does.
    pub fn engine(&self) -> Option<Engine> {
        match self.protection {
            Protection::Plain => None,
            Protection::User(_) => Some(Engine::User),
            Protection::Kernel(_) => Some(Engine::Kernel),
        }
    }

    /// Takes a fresh key after so many records instead of at the limit of the cipher, so that tests can reach that.
    #[doc(hidden)]
    pub fn rekey_after(mut self, records: u64) -> Self {
        match &mut self.protection {
            Protection::Plain => {}
            Protection::User(keys) => keys.sealer.set_due(records),
            Protection::Kernel(keys) => keys.set_due(records),
        }
        self
    }
}

/// Closing the socket will be a reset: the other end must not take this for the end of the stream.
fn reset(socket: &TcpStream) {
    // A socket that is gone already needs no reset.
    let _gone: io::Result<()> = socket.set_zero_linger();
}

/// Why a session got no pipe.
#[derive(Debug)]
pub struct Error {
    cause: Cause,
    permit: Option<Box<Permit>>,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The kernel took up TLS on the socket and then failed.
    #[error("the kernel took up TLS and then failed at {step}: {error}")]
    Kernel {
        /// Which system call.
        step: &'static str,
        /// What it said.
        error: io::Error,
    },
    /// rustls gave no secrets.
    #[error("the handshake gave no usable secrets: {0}")]
    Secrets(rustls::Error),
    /// A socket could not be set up.
    #[error("a socket could not be set up: {0}")]
    Socket(io::Error),
}

impl Error {
    /// What went wrong.
    pub fn cause(&self) -> &Cause {
        &self.cause
    }
    /// May the flow be dialled again, with engine `user`? No byte of the application has moved.
    pub fn may_redial(&self) -> bool {
        matches!(self.cause, Cause::Kernel { .. })
    }
    /// The permit with the flow's own socket, as long as it still exists.
    pub fn into_permit(mut self) -> Result<Permit, Self> {
        match self.permit.take() {
            Some(permit) => Ok(*permit),
            None => Err(self),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause.fmt(f)
    }
}

impl std::error::Error for Error {}

impl Refusal for Error {
    fn culprit(&self) -> Culprit {
        match self.cause {
            Cause::Kernel { .. } | Cause::Socket(_) => Culprit::Host,
            Cause::Secrets(_) => Culprit::Ourselves,
        }
    }

    fn code(&self) -> &'static str {
        match self.cause {
            Cause::Kernel { .. } => "kernel-tls-failed",
            Cause::Secrets(_) => "no-secrets",
            Cause::Socket(_) => "socket-error",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::EngineChoice;
    use crate::handshake::testing::{World, program};
    use aya::maps::{Map, MapData, SockMap};
    use tokio::io::AsyncReadExt;

    /// `BPF_MAP_TYPE_SOCKMAP`.
    const SOCKMAP: u32 = 15;

    #[tokio::test]
    async fn a_kernel_that_fails_half_way_leads_to_a_reset_and_never_to_plaintext() {
        let chosen = std::env::var("BUNTER_TEST_ENGINE").is_ok_and(|engine| engine == "kernel");
        if !chosen {
            eprintln!(
                "SKIPPED (needs a kernel with TLS): a_kernel_that_fails_half_way_leads_to_a_reset_and_never_to_plaintext"
            );
            return;
        }
        let choice = Choice::from(EngineChoice::Kernel, &selftest::run()).unwrap();
        let sessions = World::new().sessions(choice.ciphers()).await;
        // A socket in a sockmap takes up TLS, and then refuses the keys (CVE-2026-93824): as good as any other failure.
        let map = MapData::create(aya_obj::Map::new_from_params(SOCKMAP, 4, 4, 1, 0), "half_way", None).unwrap();
        let mut map = SockMap::try_from(Map::SockMap(map)).unwrap();
        map.set(0, &sessions.server.permit().parties().flow.socket, 0).unwrap();
        let (_application, upstream) = program().await;
        let error = arm(sessions.server.joined(upstream), choice).map(|_| "a pipe").unwrap_err();
        assert!(error.may_redial(), "{error}");
        assert_eq!((error.code(), error.culprit()), ("kernel-tls-failed", Culprit::Host));
        drop(error);
        let (_permit, mut network, ..) = sessions.client.into_parts();
        let heard = network.read(&mut [0; 64]).await.map_err(|error| error.kind());
        assert_eq!(heard, Err(io::ErrorKind::ConnectionReset));
    }
}
