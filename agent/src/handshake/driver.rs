//! Runs a rustls state machine over a socket, record by record.
//!
//! In: a fresh connection of either side. Out: its traffic secrets, with not one byte read beyond the peer's Finished.
//! *Invariant:* memory and bytes of a handshake are bounded, whatever the peer sends; time is bounded by the caller.

use super::{
    Cause,
    secrets::{Schedule, Secrets},
    settings::REUSE,
};
use bytes::{Buf, BytesMut};
use rustls::{
    client::UnbufferedClientConnection,
    crypto::SupportedKxGroup,
    server::{Acceptor, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, InsufficientSizeError, UnbufferedStatus},
};
use std::io::{self, ErrorKind};
use tokio::net::TcpStream;

/// A handshake with a chain of several certificates takes under 10 KiB each way.
const MAX_TOTAL: usize = 64 * 1024;
/// Header of a record.
const HEADER: usize = 5;
/// The most that may follow a header (RFC 9846 section 5.2).
const MAX_BODY: usize = (1 << 14) + 256;

/// The state machine of a handshake that is about to begin.
pub(super) enum Machine {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// What a handshake leaves when it is over.
pub(super) struct Finished {
    pub(super) secrets: Secrets,
    pub(super) group: Option<&'static dyn SupportedKxGroup>,
    /// Both sides know how to use the connection more than once.
    pub(super) reusable: bool,
}

/// What has been read before the state machine exists.
#[derive(Default)]
pub(super) struct Opening {
    incoming: BytesMut,
    total: usize,
}

/// Reads a client's first flight, and says whether it offers [`REUSE`]. A rustls server that has protocols of its own
/// refuses a client that offers only others (RFC 7301 section 3.2). Here a client may offer the protocol of its workload,
/// whatever that is, so the server is configured only when the offer is known.
pub(super) async fn hear_offer(network: &TcpStream) -> Result<(Opening, bool), Cause> {
    let (mut opening, mut acceptor) = (Opening::default(), Acceptor::default());
    loop {
        let start = opening.incoming.len();
        if let Err(cause) = read_record(network, &mut opening.incoming, &mut opening.total).await {
            leave(network, &mut BytesMut::new(), &cause).await;
            return Err(cause);
        }
        let mut fresh = opening.incoming.get(start..).unwrap_or_default();
        while !fresh.is_empty() {
            acceptor.read_tls(&mut fresh).map_err(Cause::Network)?;
        }
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                let offers =
                    accepted.client_hello().alpn().is_some_and(|mut offered| offered.any(|name| name == REUSE));
                return Ok((opening, offers));
            }
            // The state machine will fail on the same bytes, and has the right alert for that.
            Err(_) => return Ok((opening, false)),
        }
    }
}

/// Shakes hands. On failure the peer has been sent the alert that says why, as far as the socket took it.
pub(super) async fn run(network: &TcpStream, mut machine: Machine, opening: Opening) -> Result<Finished, Cause> {
    let Opening { mut incoming, mut total } = opening;
    let mut outgoing = BytesMut::new();
    loop {
        let (discard, step) = machine.step(&mut incoming, &mut outgoing);
        incoming.advance(discard.min(incoming.len()));
        match step {
            Ok(Step::Again) => {}
            Ok(Step::Blocked) => {
                write_all(network, &mut outgoing).await?;
                if let Err(cause) = read_record(network, &mut incoming, &mut total).await {
                    leave(network, &mut outgoing, &cause).await;
                    return Err(cause);
                }
            }
            Ok(Step::Done) => {
                write_all(network, &mut outgoing).await?;
                return machine.finish();
            }
            Ok(Step::Closed) => return Err(Cause::Closed),
            Err(error) => {
                machine.drain_alert(&mut incoming, &mut outgoing);
                let cause = Cause::from_rustls(error, machine.is_client());
                leave(network, &mut outgoing, &cause).await;
                return Err(cause);
            }
        }
    }
}

enum Step {
    /// Ask again.
    Again,
    /// The peer's next record is needed.
    Blocked,
    /// Application data may flow both ways.
    Done,
    /// The peer closed.
    Closed,
}

impl Machine {
    fn is_client(&self) -> bool {
        matches!(self, Self::Client(_))
    }

    fn step(&mut self, incoming: &mut [u8], outgoing: &mut BytesMut) -> (usize, Result<Step, rustls::Error>) {
        match self {
            Self::Client(machine) => advance(machine.process_tls_records(incoming), outgoing),
            Self::Server(machine) => advance(machine.process_tls_records(incoming), outgoing),
        }
    }

    /// Encodes what rustls still wants to send after an error: one alert, or nothing. To be called once, and with the very
    /// buffer on which rustls failed: otherwise it would look for messages where there are none.
    fn drain_alert(&mut self, incoming: &mut [u8], outgoing: &mut BytesMut) {
        // Besides the alert this returns the error that is known already.
        let (_discard, _step) = self.step(incoming, outgoing);
    }

    fn finish(self) -> Result<Finished, Cause> {
        let (group, reusable, secrets) = match self {
            Self::Client(machine) => {
                let group = machine.negotiated_key_exchange_group();
                let reusable = machine.alpn_protocol() == Some(REUSE);
                let (secrets, schedule) = machine.dangerous_into_kernel_connection().map_err(Cause::unready)?;
                (group, reusable, Secrets::new(secrets, Schedule::Client(schedule)).map_err(Cause::unready)?)
            }
            Self::Server(machine) => {
                let group = machine.negotiated_key_exchange_group();
                let reusable = machine.alpn_protocol() == Some(REUSE);
                let (secrets, schedule) = machine.dangerous_into_kernel_connection().map_err(Cause::unready)?;
                (group, reusable, Secrets::new(secrets, Schedule::Server(schedule)).map_err(Cause::unready)?)
            }
        };
        Ok(Finished { secrets, group, reusable })
    }
}

fn advance<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    outgoing: &mut BytesMut,
) -> (usize, Result<Step, rustls::Error>) {
    let step = match status.state {
        Err(error) => Err(error),
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            let start = outgoing.len();
            let mut written = data.encode(&mut []);
            if let Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) = written {
                outgoing.resize(start.saturating_add(required_size), 0);
                written = data.encode(outgoing.get_mut(start..).unwrap_or_default());
            }
            outgoing.truncate(start.saturating_add(written.unwrap_or(0)));
            Ok(Step::Again)
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            // `outgoing` is written before anything further is read.
            data.done();
            Ok(Step::Again)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Step::Blocked),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Step::Done),
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Ok(Step::Closed),
        // The peer sent application data before the handshake was over: early data is not offered, and nothing beyond
        // Finished is read.
        Ok(_) => Err(rustls::Error::PeerMisbehaved(rustls::PeerMisbehaved::TooMuchEarlyDataReceived)),
    };
    (status.discard, step)
}

/// Appends exactly one record.
async fn read_record(network: &TcpStream, incoming: &mut BytesMut, total: &mut usize) -> Result<(), Cause> {
    let start = incoming.len();
    incoming.resize(start + HEADER, 0);
    let mut have = 0;
    while have < HEADER {
        have += read(network, incoming.get_mut(start + have..).unwrap_or_default()).await?;
        // A peer that does not speak TLS is told so at its first byte; rustls judges whole headers only.
        if let Some(&first) = incoming.get(start)
            && !(20..=23).contains(&first)
        {
            return Err(Cause::NotTls { first });
        }
    }
    let Some(&[_, major, _, high, low]) = incoming.get(start..).and_then(|header| header.first_chunk::<HEADER>())
    else {
        return Err(Cause::Oversized);
    };
    let body = usize::from(u16::from_be_bytes([high, low]));
    if major != 3 {
        return Err(Cause::NotTls { first: major });
    }
    *total += HEADER + body;
    if body > MAX_BODY || *total > MAX_TOTAL {
        return Err(Cause::Oversized);
    }
    incoming.resize(start + HEADER + body, 0);
    let mut have = HEADER;
    while have < HEADER + body {
        have += read(network, incoming.get_mut(start + have..).unwrap_or_default()).await?;
    }
    Ok(())
}

/// Reads at least one byte, at most as many as there is room for.
async fn read(network: &TcpStream, room: &mut [u8]) -> Result<usize, Cause> {
    loop {
        match network.try_read(room) {
            Ok(0) => return Err(Cause::Closed),
            Ok(length) => return Ok(length),
            Err(error) if error.kind() == ErrorKind::WouldBlock => network.readable().await.map_err(Cause::Network)?,
            Err(error) => return Err(Cause::from_io(error)),
        }
    }
}

async fn write_all(network: &TcpStream, outgoing: &mut BytesMut) -> Result<(), Cause> {
    while !outgoing.is_empty() {
        match network.try_write(outgoing) {
            Ok(length) => outgoing.advance(length),
            Err(error) if error.kind() == ErrorKind::WouldBlock => network.writable().await.map_err(Cause::Network)?,
            Err(error) => return Err(Cause::from_io(error)),
        }
    }
    Ok(())
}

/// Sends the last alert, and takes what has arrived off the socket: closing with unread bytes would send a reset, which may
/// overtake the alert.
async fn leave(network: &TcpStream, outgoing: &mut BytesMut, cause: &Cause) {
    if outgoing.is_empty()
        && let Some(description) = cause.plain_alert()
    {
        outgoing.extend_from_slice(&[21, 3, 3, 0, 2, 2, description]);
    }
    if write_all(network, outgoing).await.is_err() {
        return;
    }
    let mut rest = [0; 4096];
    for _ in 0..64 {
        match network.try_read(&mut rest) {
            Ok(1..) => {}
            Ok(0) | Err(_) => break,
        }
    }
    // The socket may be gone already, and then there is nobody to tell.
    let _: io::Result<()> = rustix::net::shutdown(network, rustix::net::Shutdown::Write).map_err(io::Error::from);
}
