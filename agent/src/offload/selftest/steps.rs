//! The steps of the self-test, on a loopback connection: kernel TLS at one end, our own record layer at the other.
//!
//! *Invariant:* every wait has an end; nothing but loopback is touched, and no key is used for anything else.

use crate::{
    handshake::{Aead, Traffic},
    offload::{
        kernel::{self, ArmError, crypto_info},
        matrix::{Ability, Outcome, Row},
        record::{self, ContentType, Opener, Sealer},
    },
};
use bunter_sys::tls::{self, TlsHalf};
use socket2::{Domain, Socket, Type};
use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    thread::sleep,
    time::{Duration, Instant},
};
use zeroize::Zeroizing;

/// The longest that a step may wait.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often a connection is tried where others reach the listener first, and the pause before the next try.
const ATTEMPTS: usize = 20;
const PAUSE: Duration = Duration::from_millis(20);
/// What must never be seen on the wire.
const MARKER: &[u8] = b"plaintext of the self-test ";
/// More than two records.
const LENGTH: usize = 40_000;
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];
const CLOSE_NOTIFY: [u8; 2] = [1, 0];

/// Does the kernel take up TLS on a socket?
pub(super) fn protocol() -> io::Result<()> {
    let (socket, _other) = pair()?;
    tls::set_tls_protocol(socket.as_fd())
}

/// All steps for one cipher; a step that fails leaves the ones behind it untried.
pub(super) fn cipher(aead: Aead) -> Row {
    let mut row = Row::new(aead);
    let mut bench = match Bench::new(aead) {
        Ok(bench) => bench,
        Err((half, why)) => {
            let failed = Outcome::Failed(why);
            if half == "setsockopt TLS_RX" {
                (row.transmit, row.receive) = (Outcome::Passed, failed);
            } else {
                row.transmit = failed;
            }
            return row;
        }
    };
    type Step = fn(&mut Bench) -> io::Result<()>;
    let steps: [(&mut Outcome, Step); 5] = [
        (&mut row.transmit, Bench::transmit),
        (&mut row.receive, Bench::receive),
        (&mut row.control, Bench::control),
        (&mut row.rekey, Bench::rekey),
        (&mut row.drain, Bench::drain),
    ];
    for (outcome, step) in steps {
        *outcome = judge(step(&mut bench));
        // A kernel without fresh keys refuses them and goes on with the old ones.
        if *outcome != Outcome::Passed && !bench.usable {
            break;
        }
    }
    if !bench.usable {
        return row;
    }
    row.forgery = match Bench::new(aead) {
        Ok(mut bench) => judge(bench.forgery()),
        Err((_, why)) => Outcome::Failed(why),
    };
    row
}

fn judge(outcome: io::Result<()>) -> Outcome {
    match outcome {
        Ok(()) => Outcome::Passed,
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

/// One connection: `kernel` has kernel TLS, `wire` is bare, with what it takes to seal and open on it.
struct Bench {
    kernel: TcpStream,
    wire: TcpStream,
    sealer: Sealer,
    opener: Opener,
    aead: Aead,
    base: u64,
    plaintext: u64,
    earlier_records: u64,
    /// The connection is still in order after the last step.
    usable: bool,
}

impl Bench {
    fn new(aead: Aead) -> Result<Self, (&'static str, String)> {
        let host = |error: io::Error| ("setup", error.to_string());
        let (kernel, wire) = pair().map_err(host)?;
        let (transmit, receive) = (fresh(aead).map_err(host)?, fresh(aead).map_err(host)?);
        let opener = Opener::new(&transmit).map_err(|error| host(io::Error::other(error)))?;
        let sealer = Sealer::new(&receive).map_err(|error| host(io::Error::other(error)))?;
        let base = tls::bytes_queued_ever(kernel.as_fd()).map_err(host)?;
        kernel::arm(&kernel, &transmit, &receive, Ability { rekey: false }).map_err(|error| match error {
            ArmError::NotTaken(error) => ("TCP_ULP", error.to_string()),
            ArmError::HalfWay { step, error } => (step, format!("{step}: {error}")),
        })?;
        Ok(Self { kernel, wire, sealer, opener, aead, base, plaintext: 0, earlier_records: 0, usable: true })
    }

    /// The kernel seals what is written, all of it.
    fn transmit(&mut self) -> io::Result<()> {
        self.usable = false;
        let text = marked(LENGTH);
        self.kernel.write_all(&text)?;
        self.plaintext += text.len() as u64;
        let mut arrived = Vec::new();
        while arrived.len() < LENGTH {
            arrived.extend(self.opened(ContentType::APPLICATION_DATA)?);
        }
        require(arrived == text, "what arrived is not what was written")?;
        self.usable = true;
        Ok(())
    }

    /// The kernel opens what it is sent, empty and small and full records alike.
    fn receive(&mut self) -> io::Result<()> {
        self.usable = false;
        let text = marked(LENGTH);
        let mut sealed = Vec::new();
        for piece in text.chunks(record::MAX_PLAINTEXT) {
            sealed.extend(self.sealed(ContentType::APPLICATION_DATA, piece)?);
        }
        sealed.extend(self.sealed(ContentType::APPLICATION_DATA, b"")?);
        sealed.extend(self.sealed(ContentType::APPLICATION_DATA, b"end")?);
        self.wire.write_all(&sealed)?;
        let expected = [&text[..], b"end"].concat();
        let mut arrived = Vec::new();
        while arrived.len() < expected.len() {
            let (content_type, bytes) = self.received()?;
            require(content_type == ContentType::APPLICATION_DATA.0, "data arrived as something else")?;
            arrived.extend(bytes);
        }
        require(arrived == expected, "what arrived is not what was sent")?;
        self.usable = true;
        Ok(())
    }

    /// Control records are told apart from data, in both directions, and never mixed with it.
    fn control(&mut self) -> io::Result<()> {
        self.usable = false;
        let mut sealed = self.sealed(ContentType::APPLICATION_DATA, b"before")?;
        sealed.extend(self.sealed(ContentType::HANDSHAKE, &[4, 0, 0, 1, 9])?);
        sealed.extend(self.sealed(ContentType::APPLICATION_DATA, b"after")?);
        self.wire.write_all(&sealed)?;
        for expected in [(23, &b"before"[..]), (22, &[4, 0, 0, 1, 9]), (23, b"after")] {
            let (content_type, bytes) = self.received()?;
            require((content_type, &bytes[..]) == expected, "control records and data are not told apart")?;
        }
        self.tell(ContentType::HANDSHAKE, &[4, 0, 0, 1, 7])?;
        self.kernel.write_all(b"data")?;
        self.plaintext += 4;
        require(self.opened(ContentType::HANDSHAKE)? == [4, 0, 0, 1, 7], "a control record was changed")?;
        require(self.opened(ContentType::APPLICATION_DATA)? == b"data", "data behind a control record was changed")?;
        self.usable = true;
        Ok(())
    }

    /// Fresh keys in both directions, each behind its KeyUpdate.
    fn rekey(&mut self) -> io::Result<()> {
        let (transmit, receive) = (fresh(self.aead)?, fresh(self.aead)?);
        let records = kernel::sequence(self.kernel.as_fd())?;
        self.tell(ContentType::HANDSHAKE, &KEY_UPDATE)?;
        require(self.opened(ContentType::HANDSHAKE)? == KEY_UPDATE, "the KeyUpdate was changed")?;
        // Where this is refused the old keys are still in force at both ends, so that the other steps can go on.
        crypto_info(&transmit)?.put(self.kernel.as_fd(), TlsHalf::Transmit)?;
        self.usable = false;
        self.earlier_records = records + 1;
        self.opener = Opener::new(&transmit).map_err(io::Error::other)?;
        self.kernel.write_all(MARKER)?;
        self.plaintext += MARKER.len() as u64;
        require(self.opened(ContentType::APPLICATION_DATA)? == MARKER, "data under the fresh key was changed")?;

        let mut sealed = self.sealed(ContentType::HANDSHAKE, &KEY_UPDATE)?;
        self.sealer = Sealer::new(&receive).map_err(io::Error::other)?;
        sealed.extend(self.sealed(ContentType::APPLICATION_DATA, MARKER)?);
        self.wire.write_all(&sealed)?;
        require(self.received()? == (22, KEY_UPDATE.to_vec()), "the KeyUpdate did not arrive")?;
        crypto_info(&receive)?.put(self.kernel.as_fd(), TlsHalf::Receive)?;
        require(self.received()? == (23, MARKER.to_vec()), "data under the fresh key did not arrive")?;
        self.usable = true;
        Ok(())
    }

    /// The bytes that have left the socket are counted right, and the end arrives behind them.
    fn drain(&mut self) -> io::Result<()> {
        self.usable = false;
        self.kernel.write_all(&marked(LENGTH))?;
        self.plaintext += LENGTH as u64;
        self.tell(ContentType::ALERT, &CLOSE_NOTIFY)?;
        let (base, plaintext, earlier) = (self.base, self.plaintext, self.earlier_records);
        eventually("what has left is never counted as left", || {
            let records = earlier + kernel::sequence(self.kernel.as_fd())?;
            Ok(kernel::has_left(self.kernel.as_fd(), base, plaintext, records)?.then_some(()))
        })?;
        self.kernel.shutdown(Shutdown::Write)?;
        let mut arrived = 0;
        while arrived < LENGTH {
            arrived += self.opened(ContentType::APPLICATION_DATA)?.len();
        }
        require(self.opened(ContentType::ALERT)? == CLOSE_NOTIFY, "close_notify was changed")?;
        require(self.wire.read(&mut [0])? == 0, "something came behind close_notify")?;
        self.usable = true;
        Ok(())
    }

    /// A record that was tampered with is refused.
    fn forgery(&mut self) -> io::Result<()> {
        let mut sealed = self.sealed(ContentType::APPLICATION_DATA, MARKER)?;
        if let Some(byte) = sealed.get_mut(record::HEADER) {
            *byte ^= 1;
        }
        self.wire.write_all(&sealed)?;
        match self.received() {
            Err(error) if error.raw_os_error() == Some(libc::EBADMSG) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(io::Error::other("a forged record was taken for a good one")),
        }
    }

    fn tell(&mut self, content_type: ContentType, body: &[u8]) -> io::Result<()> {
        let sent = eventually("a control record was not taken", || {
            match tls::send_tls_record(self.kernel.as_fd(), content_type.0, body) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                sent => sent.map(Some),
            }
        })?;
        self.plaintext += sent as u64;
        require(sent == body.len(), "a control record was taken in part")
    }

    fn received(&self) -> io::Result<(u8, Vec<u8>)> {
        let mut room = vec![0; 64 * 1024];
        eventually("nothing arrived", || match tls::receive_tls_record(self.kernel.as_fd(), &mut room, false) {
            // A record without content.
            Ok((0, Some(_))) => Ok(None),
            Ok((length, Some(content_type))) => {
                Ok(Some((content_type, room.get(..length).unwrap_or_default().to_vec())))
            }
            Ok((_, None)) => Err(io::Error::other("the kernel does not tell the type of a record")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        })
    }

    fn sealed(&mut self, content_type: ContentType, body: &[u8]) -> io::Result<Vec<u8>> {
        let mut slot = vec![0; record::HEADER + body.len() + record::TRAILER];
        slot.iter_mut().skip(record::HEADER).zip(body).for_each(|(to, from)| *to = *from);
        self.sealer.seal(content_type, &mut slot, body.len()).map_err(io::Error::other)?;
        Ok(slot)
    }

    /// The content of the next record on the wire, which has to be of this type and to hide the marker.
    fn opened(&mut self, expected: ContentType) -> io::Result<Vec<u8>> {
        let mut whole = vec![0; record::HEADER];
        self.wire.read_exact(&mut whole)?;
        let length = record::measure(&whole).map_err(io::Error::other)?.unwrap_or_default();
        whole.resize(length, 0);
        self.wire.read_exact(whole.get_mut(record::HEADER..).unwrap_or_default())?;
        let shows = whole.windows(MARKER.len()).any(|window| window == MARKER);
        require(!shows, "plaintext was seen on the wire")?;
        let (content_type, at) = self.opener.open(&mut whole).map_err(io::Error::other)?;
        require(content_type == expected, "a record of another type was sent")?;
        Ok(whole.get(at).unwrap_or_default().to_vec())
    }
}

fn pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    // Kernel programs that an earlier agent has left would refuse connections to a listener of root until an agent has
    // judged it.
    crate::intercept::claim_listener(&listener);
    listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    listener.listen(16)?;
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from(listener);
    let (dialled, accepted) = (0..ATTEMPTS).find_map(|_| meet(&listener).transpose()).unwrap_or_else(|| {
        Err(io::Error::other("connections on loopback arrive from elsewhere: a running agent covers this program"))
    })?;
    for socket in [&dialled, &accepted] {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
    }
    Ok((dialled, accepted))
}

/// Dials the listener. `None`: somebody else came first. Any local program may dial as well, and an agent that runs and
/// does not know the cgroup of this process yet redirects the connection to itself; it knows it the next time.
fn meet(listener: &TcpListener) -> io::Result<Option<(TcpStream, TcpStream)>> {
    let dialled = TcpStream::connect(listener.local_addr()?)?;
    let end = Instant::now() + PATIENCE;
    loop {
        match listener.accept() {
            Ok((accepted, from)) if from == dialled.local_addr()? => return Ok(Some((dialled, accepted))),
            Ok(_) => {
                sleep(PAUSE);
                return Ok(None);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => sleep(PAUSE),
            Err(error) => return Err(error),
        }
    }
}

fn fresh(aead: Aead) -> io::Result<Traffic> {
    let (mut key, mut mask) = (Zeroizing::new([0; 32]), Zeroizing::new([0; 12]));
    let random = |bytes: &mut [u8]| aws_lc_rs::rand::fill(bytes).map_err(io::Error::other);
    random(&mut *key)?;
    random(&mut *mask)?;
    Ok(Traffic::new(aead, 0, key, mask))
}

fn marked(length: usize) -> Vec<u8> {
    MARKER.iter().copied().cycle().take(length).collect()
}

fn require(holds: bool, otherwise: &'static str) -> io::Result<()> {
    if holds { Ok(()) } else { Err(io::Error::other(otherwise)) }
}

/// Asks again until there is an answer, but not for ever.
fn eventually<T>(otherwise: &'static str, mut ask: impl FnMut() -> io::Result<Option<T>>) -> io::Result<T> {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        require(Instant::now() < end, otherwise)?;
        sleep(Duration::from_millis(1));
    }
}
