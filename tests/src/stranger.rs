//! The other end, played by hand: a TLS client or server that obeys no policy, and raw bytes.
//!
//! Everything here runs on the calling thread, in whatever namespace that is in ([`Host::within`](crate::Host::within)).
//!
//! *Invariant:* this end verifies nothing: whatever is refused, Bunter refused it.

use crate::clock;
use crate::mint::Svid;
use bunter_identity::trust::testing::Anybody;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection, SupportedProtocolVersion};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

/// What came of an attempt to talk to somebody.
#[derive(Clone, Debug, Default)]
pub struct Attempt {
    /// The TCP connection was made.
    pub connected: bool,
    /// This end holds the handshake to be complete. In TLS 1.3 that does not mean that the other end accepted.
    pub handshake: bool,
    /// Application bytes that came back.
    pub answer: Vec<u8>,
    /// How it ended: `eof`, `close_notify`, `timeout`, or what the error said.
    pub end: String,
    /// Certificate of the peer, if it showed one.
    pub peer: Option<Vec<u8>>,
}

impl Attempt {
    /// The other end cut it off, before any byte of an application came back. A TLS alert is no such byte.
    #[track_caller]
    pub fn expect_refused(&self) {
        assert!(self.refused(), "not refused: {self:?} {}", String::from_utf8_lossy(&self.answer));
    }

    fn refused(&self) -> bool {
        (self.answer.is_empty() || is_alert(&self.answer)) && self.end != "timeout" && self.end != "close_notify"
    }

    fn failed(mut self, error: &std::io::Error) -> Self {
        self.end = match error.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => "timeout".to_owned(),
            std::io::ErrorKind::ConnectionReset => "reset".to_owned(),
            std::io::ErrorKind::UnexpectedEof => "eof".to_owned(),
            _ => error.to_string(),
        };
        self
    }
}

/// One TLS record with an alert, unencrypted: what a TLS server answers to whoever does not speak TLS.
pub fn is_alert(bytes: &[u8]) -> bool {
    bytes.len() == 7 && bytes.starts_with(&[21, 3]) && bytes[3..5] == [0, 2]
}

/// Connects, with deadlines on everything.
pub fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, clock::seconds(5))?;
    stream.set_read_timeout(Some(clock::seconds(15)))?;
    stream.set_write_timeout(Some(clock::seconds(15)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Sends bytes as they are, and reads what comes until the end.
pub fn raw(to: SocketAddr, bytes: &[u8]) -> Attempt {
    let attempt = Attempt::default();
    match connect(to) {
        Ok(stream) => raw_on(stream, bytes),
        Err(error) => attempt.failed(&error),
    }
}

/// Sends bytes as they are, says that it is done, and reads the answer.
pub fn say(to: SocketAddr, bytes: &[u8]) -> Attempt {
    let done = |mut stream: TcpStream| {
        stream.write_all(bytes).and_then(|()| stream.shutdown(Shutdown::Write)).map(|()| stream)
    };
    match connect(to).and_then(done) {
        Ok(stream) => raw_on(stream, b""),
        Err(error) => Attempt::default().failed(&error),
    }
}

/// The same as [`raw`] on a connection that is there already.
pub fn raw_on(mut stream: TcpStream, bytes: &[u8]) -> Attempt {
    let mut attempt = Attempt { connected: true, ..Attempt::default() };
    if let Err(error) = stream.write_all(bytes) {
        return attempt.failed(&error);
    }
    match stream.read_to_end(&mut attempt.answer) {
        Ok(_) => Attempt { end: "eof".to_owned(), ..attempt },
        Err(error) => attempt.failed(&error),
    }
}

/// What a peer does wrong after a good handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// FIN without close_notify.
    Truncate,
    /// Plaintext where a record should be.
    Plaintext,
    /// A record whose tag is wrong.
    Tamper,
    /// A record longer than TLS allows.
    Oversized,
    /// A record that ends in the middle, and FIN.
    HalfRecord,
}

/// How a TLS client or server is set up.
#[derive(Clone)]
pub struct Tls {
    versions: Vec<&'static SupportedProtocolVersion>,
    /// Bytes per write on the socket; 0 for as many as there are.
    pub piece: usize,
    /// Pause between two writes.
    pub pause: Duration,
}

impl Default for Tls {
    fn default() -> Self {
        Self { versions: vec![&rustls::version::TLS13], piece: 0, pause: Duration::ZERO }
    }
}

impl Tls {
    /// TLS 1.2 and nothing newer.
    pub fn old() -> Self {
        Self { versions: vec![&rustls::version::TLS12], ..Self::default() }
    }

    /// In single bytes, with a pause after each.
    pub fn dripping(pause: Duration) -> Self {
        Self { piece: 1, pause, ..Self::default() }
    }

    fn client(&self, svid: Option<&Svid>) -> Arc<ClientConfig> {
        let trusting = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&self.versions)
            .unwrap_or_else(|error| panic!("{error}"))
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody));
        Arc::new(match svid {
            Some(svid) => {
                trusting.with_client_auth_cert(svid.chain.clone(), svid.key()).unwrap_or_else(|error| panic!("{error}"))
            }
            None => trusting.with_no_client_auth(),
        })
    }

    fn server(&self, svid: &Svid) -> Arc<ServerConfig> {
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&self.versions)
            .unwrap_or_else(|error| panic!("{error}"))
            .with_client_cert_verifier(Arc::new(Anybody))
            .with_single_cert(svid.chain.clone(), svid.key());
        Arc::new(config.unwrap_or_else(|error| panic!("{error}")))
    }

    /// Connects by TLS, with or without a certificate, sends bytes, says that it is done, and reads the answer.
    pub fn talk(&self, to: SocketAddr, svid: Option<&Svid>, bytes: &[u8]) -> Attempt {
        match connect(to) {
            Ok(stream) => self.talk_on(stream, svid, bytes),
            Err(error) => Attempt::default().failed(&error),
        }
    }

    /// The same on a connection that is there already.
    pub fn talk_on(&self, stream: TcpStream, svid: Option<&Svid>, bytes: &[u8]) -> Attempt {
        let mut attempt = Attempt { connected: true, ..Attempt::default() };
        let name = ServerName::try_from("lab.invalid").unwrap_or_else(|error| panic!("{error}"));
        let mut connection = match ClientConnection::new(self.client(svid), name) {
            Ok(connection) => connection,
            Err(error) => return Attempt { end: error.to_string(), ..attempt },
        };
        let mut stream = Pieces { stream, piece: self.piece, pause: self.pause };
        while connection.is_handshaking() {
            if let Err(error) = connection.complete_io(&mut stream) {
                return attempt.failed(&error);
            }
        }
        attempt.handshake = true;
        attempt.peer = connection.peer_certificates().and_then(|list| list.first()).map(|leaf| leaf.to_vec());
        let mut tls = rustls::Stream::new(&mut connection, &mut stream);
        if let Err(error) = tls.write_all(bytes).and_then(|()| tls.flush()) {
            // The alert that says why may still be there to be read.
            let mut rest = Vec::new();
            return match tls.read_to_end(&mut rest) {
                Ok(_) => attempt.failed(&error),
                Err(second) => attempt.failed(&second),
            };
        }
        tls.conn.send_close_notify();
        let _ = tls.conn.complete_io(&mut tls.sock);
        match tls.read_to_end(&mut attempt.answer) {
            Ok(_) => Attempt { end: "close_notify".to_owned(), ..attempt },
            Err(error) => attempt.failed(&error),
        }
    }

    /// Sends its last handshake message and its first bytes in one segment, then reads as many bytes back.
    pub fn talk_at_once(&self, to: SocketAddr, svid: &Svid, bytes: &[u8]) -> Attempt {
        let mut attempt = Attempt::default();
        let mut stream = match connect(to) {
            Ok(stream) => stream,
            Err(error) => return attempt.failed(&error),
        };
        attempt.connected = true;
        let name = ServerName::try_from("lab.invalid").unwrap_or_else(|error| panic!("{error}"));
        let mut connection =
            ClientConnection::new(self.client(Some(svid)), name).unwrap_or_else(|error| panic!("{error}"));
        if let Err(error) = connection.write_tls(&mut stream) {
            return attempt.failed(&error);
        }
        while connection.is_handshaking() {
            let read = connection.read_tls(&mut stream);
            if let Err(error) = read {
                return attempt.failed(&error);
            }
            if let Err(error) = connection.process_new_packets() {
                return Attempt { end: error.to_string(), ..attempt };
            }
        }
        attempt.handshake = true;
        let _ = connection.writer().write_all(bytes);
        let mut segment = Vec::new();
        while connection.wants_write() {
            let _ = connection.write_tls(&mut segment);
        }
        if let Err(error) = stream.write_all(&segment) {
            return attempt.failed(&error);
        }
        attempt.answer = vec![0; bytes.len()];
        match rustls::Stream::new(&mut connection, &mut stream).read_exact(&mut attempt.answer) {
            Ok(()) => Attempt { end: "close_notify".to_owned(), ..attempt },
            Err(error) => attempt.failed(&error),
        }
    }

    /// Completes the handshake, sends bytes and hears them back, says that it is open, and listens until it ends.
    pub fn hold(&self, to: SocketAddr, svid: &Svid, bytes: &[u8], open: impl FnOnce()) -> Attempt {
        let (mut connection, mut stream, attempt) = match self.greet(to, svid, bytes) {
            Ok(greeted) => greeted,
            Err(attempt) => return attempt,
        };
        open();
        match rustls::Stream::new(&mut connection, &mut stream).read_to_end(&mut Vec::new()) {
            Ok(_) => Attempt { end: "close_notify".to_owned(), ..attempt },
            Err(error) => attempt.failed(&error),
        }
    }

    /// Completes the handshake, sends bytes as records, and then breaks the protocol in one way.
    pub fn talk_and_break(&self, to: SocketAddr, svid: &Svid, bytes: &[u8], how: Break) -> Attempt {
        let (mut connection, mut stream, attempt) = match self.greet(to, svid, bytes) {
            Ok(greeted) => greeted,
            Err(attempt) => return attempt,
        };
        let broken = match how {
            Break::Truncate => stream.shutdown(Shutdown::Write),
            Break::Plaintext => stream.write_all(b"GET /plaintext HTTP/1.1\r\n\r\n"),
            Break::Tamper => {
                let mut record = Vec::new();
                let _ = connection.writer().write_all(b"tampered with");
                let _ = connection.write_tls(&mut record);
                if let Some(last) = record.last_mut() {
                    *last ^= 1;
                }
                stream.write_all(&record)
            }
            Break::Oversized => {
                let mut record = vec![23, 3, 3, 0xff, 0xff];
                record.resize(65540, 0);
                stream.write_all(&record)
            }
            Break::HalfRecord => {
                stream.write_all(&[23, 3, 3, 1, 0, 1, 2, 3]).and_then(|()| stream.shutdown(Shutdown::Write))
            }
        };
        if let Err(error) = broken {
            return attempt.failed(&error);
        }
        match stream.read_to_end(&mut Vec::new()) {
            Ok(_) => Attempt { end: "eof".to_owned(), ..attempt },
            Err(error) => attempt.failed(&error),
        }
    }

    /// Connects by TLS, and has the bytes echoed: all went well until then.
    fn greet(
        &self,
        to: SocketAddr,
        svid: &Svid,
        bytes: &[u8],
    ) -> Result<(ClientConnection, TcpStream, Attempt), Attempt> {
        let mut attempt = Attempt::default();
        let mut stream = connect(to).map_err(|error| attempt.clone().failed(&error))?;
        attempt.connected = true;
        let name = ServerName::try_from("lab.invalid").unwrap_or_else(|error| panic!("{error}"));
        let mut connection =
            ClientConnection::new(self.client(Some(svid)), name).unwrap_or_else(|error| panic!("{error}"));
        while connection.is_handshaking() {
            connection.complete_io(&mut stream).map_err(|error| attempt.clone().failed(&error))?;
        }
        attempt.handshake = true;
        let mut tls = rustls::Stream::new(&mut connection, &mut stream);
        let mut back = vec![0; bytes.len()];
        let echoed = tls.write_all(bytes).and_then(|()| tls.flush()).and_then(|()| tls.read_exact(&mut back));
        echoed.map_err(|error| attempt.clone().failed(&error))?;
        Ok((connection, stream, attempt))
    }

    /// The first flight of a client, as bytes.
    pub fn hello(&self) -> Vec<u8> {
        let name = ServerName::try_from("lab.invalid").unwrap_or_else(|error| panic!("{error}"));
        let mut connection = ClientConnection::new(self.client(None), name).unwrap_or_else(|error| panic!("{error}"));
        let mut bytes = Vec::new();
        connection.write_tls(&mut bytes).unwrap_or_else(|error| panic!("{error}"));
        bytes
    }

    /// Takes one connection by TLS, reads until the end of what is sent, and answers with the same bytes.
    pub fn answer(&self, listener: &TcpListener, svid: &Svid) -> Attempt {
        let mut attempt = Attempt::default();
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => return attempt.failed(&error),
        };
        attempt.connected = true;
        let _ = stream.set_read_timeout(Some(clock::seconds(15)));
        let mut connection = match ServerConnection::new(self.server(svid)) {
            Ok(connection) => connection,
            Err(error) => return Attempt { end: error.to_string(), ..attempt },
        };
        let mut stream = Pieces { stream, piece: self.piece, pause: self.pause };
        while connection.is_handshaking() {
            if let Err(error) = connection.complete_io(&mut stream) {
                return attempt.failed(&error);
            }
        }
        attempt.handshake = true;
        attempt.peer = connection.peer_certificates().and_then(|list| list.first()).map(|leaf| leaf.to_vec());
        let mut tls = rustls::Stream::new(&mut connection, &mut stream);
        match tls.read_to_end(&mut attempt.answer) {
            Ok(_) => "close_notify".clone_into(&mut attempt.end),
            Err(error) => return attempt.failed(&error),
        }
        let answer = attempt.answer.clone();
        let _ = tls.write_all(&answer);
        tls.conn.send_close_notify();
        let _ = tls.conn.complete_io(&mut tls.sock);
        let _ = stream.stream.shutdown(Shutdown::Write);
        attempt
    }
}

/// A stream that writes in small pieces.
struct Pieces {
    stream: TcpStream,
    piece: usize,
    pause: Duration,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.piece == 0 {
            return self.stream.write(bytes);
        }
        std::thread::sleep(self.pause);
        self.stream.write(&bytes[..bytes.len().min(self.piece)])
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}
