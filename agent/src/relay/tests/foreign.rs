//! Tests with foreign TLS stacks: rustls as others use it, and OpenSSL's own programs.

use super::*;
use crate::{
    flow::Direction,
    handshake::testing::{CURL, WEB, terms},
};
use rustls::{ClientConnection, ConnectionCommon, ServerConnection, SideData};
use std::{
    io::{Read, Write},
    ops::DerefMut,
    process::{Child, Command, Stdio},
    sync::Mutex,
};

/// Our server behind a relay, for a foreign client at `socket`. The application echoes.
async fn our_server(world: &World, socket: TcpStream, rekey: u64) -> JoinHandle<Tally> {
    let permit = world.permit(Direction::Inbound, socket, WEB, CURL);
    let session = world.accept(permit, terms(engine().ciphers())).await.unwrap();
    let (application, upstream) = program().await;
    let pipe = arm(session.joined(upstream), engine()).unwrap().rekey_after(rekey);
    tokio::spawn(echo(application));
    Relay::over(pair().await.0, pipe, Limits::default()).tally
}

/// Our client behind a relay, for a foreign server at `socket`. The application echoes.
async fn our_client(world: &World, socket: TcpStream, rekey: u64) -> JoinHandle<Tally> {
    let (application, own) = program().await;
    let permit = world.permit(Direction::Outbound, own, CURL, WEB);
    let session = world.connect(permit, socket, terms(engine().ciphers())).await.unwrap();
    let pipe = arm(session, engine()).unwrap().rekey_after(rekey);
    tokio::spawn(echo(application));
    Relay::over(pair().await.0, pipe, Limits::default()).tally
}

async fn echo(mut socket: TcpStream) {
    let (mut read, mut write) = socket.split();
    // What becomes of the connection is seen at its other end.
    let _ = tokio::io::copy(&mut read, &mut write).await;
    let _ = write.shutdown().await;
}

fn blocking(socket: TcpStream) -> std::net::TcpStream {
    let socket = socket.into_std().unwrap();
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(patience(10))).unwrap();
    socket
}

/// Sends pieces and wants each of them back, with fresh keys between them, then closes its half first.
fn converse<C, S>(tls: &mut C, socket: &mut std::net::TcpStream, refresh: bool)
where
    C: DerefMut<Target = ConnectionCommon<S>>,
    S: SideData,
{
    for (round, length) in [1, 300, 5_000, 16_384, 100_000, 7, 250_000, 60_000].into_iter().cycle().take(40).enumerate()
    {
        let bytes = noise(length, round as u64 + 1);
        let mut back = vec![0; length];
        let mut stream = rustls::Stream::new(tls, socket);
        for piece in bytes.chunks(20_000) {
            stream.write_all(piece).unwrap();
        }
        stream.read_exact(&mut back).unwrap();
        assert!(back == bytes, "round {round}");
        if refresh {
            tls.refresh_traffic_keys().unwrap();
        }
    }
    tls.send_close_notify();
    while tls.wants_write() {
        tls.write_tls(socket).unwrap();
    }
    let mut rest = Vec::new();
    let ended = rustls::Stream::new(tls, socket).read_to_end(&mut rest);
    assert!(ended.is_ok(), "the other half is closed in order too: {ended:?}");
    assert!(rest.is_empty());
}

#[tokio::test]
async fn a_rustls_client_talks_to_us_with_fresh_keys_on_both_sides() {
    let world = World::new();
    let rows = [(false, u64::MAX), (true, u64::MAX), (false, 3), (true, 3)];
    for (refresh, rekey) in rows.into_iter().take(if takes_fresh_keys() { 4 } else { 1 }) {
        let (theirs, ours) = pair().await;
        let config = Arc::new(world.foreign_client(Some(CURL)));
        let client = tokio::task::spawn_blocking(move || {
            let mut socket = blocking(theirs);
            let mut tls = ClientConnection::new(config, "web.example.org".try_into().unwrap()).unwrap();
            converse(&mut tls, &mut socket, refresh);
        });
        let tally = our_server(&world, ours, rekey).await;
        client.await.unwrap();
        assert_eq!(tally.await.unwrap().closed, CloseReason::Complete, "refresh {refresh}, rekey {rekey}");
    }
}

#[tokio::test]
async fn a_rustls_server_with_tickets_talks_to_us_with_fresh_keys_on_both_sides() {
    let world = World::new();
    for (refresh, rekey) in [(false, u64::MAX), (true, 3)].into_iter().take(if takes_fresh_keys() { 2 } else { 1 }) {
        let (theirs, ours) = pair().await;
        let mut config = world.foreign_server(WEB);
        config.send_tls13_tickets = 4;
        let config = Arc::new(config);
        let server = tokio::task::spawn_blocking(move || {
            let mut socket = blocking(theirs);
            let mut tls = ServerConnection::new(config).unwrap();
            while tls.is_handshaking() {
                tls.complete_io(&mut socket).unwrap();
            }
            converse(&mut tls, &mut socket, refresh);
        });
        let tally = our_client(&world, ours, rekey).await;
        server.await.unwrap();
        assert_eq!(tally.await.unwrap().closed, CloseReason::Complete, "refresh {refresh}, rekey {rekey}");
    }
}

#[tokio::test]
async fn data_in_the_same_segment_as_the_end_of_the_handshake_is_not_lost() {
    let world = World::new();
    let (theirs, ours) = pair().await;
    let config = Arc::new(world.foreign_client(Some(CURL)));
    let client = tokio::task::spawn_blocking(move || {
        let mut socket = blocking(theirs);
        let mut tls = ClientConnection::new(config, "web.example.org".try_into().unwrap()).unwrap();
        // rustls buffers this until it may be sent, and then puts it behind Finished in the same write.
        tls.writer().write_all(b"first words").unwrap();
        let mut flight = Vec::new();
        tls.write_tls(&mut socket).unwrap();
        while tls.is_handshaking() {
            tls.read_tls(&mut socket).unwrap();
            tls.process_new_packets().unwrap();
        }
        tls.send_close_notify();
        while tls.wants_write() {
            tls.write_tls(&mut flight).unwrap();
        }
        socket.write_all(&flight).unwrap();
        let mut back = Vec::new();
        rustls::Stream::new(&mut tls, &mut socket).read_to_end(&mut back).unwrap();
        back
    });
    let tally = our_server(&world, ours, u64::MAX).await;
    assert_eq!(client.await.unwrap(), b"first words");
    assert_eq!(tally.await.unwrap().closed, CloseReason::Complete);
}

/// An `openssl` that is fed with lines.
struct Openssl {
    child: Child,
    said: Arc<Mutex<String>>,
    reading: std::thread::JoinHandle<()>,
}

impl Openssl {
    /// Starts `openssl` with these arguments, and the certificate and key of `id`. After a line of text the next one is
    /// written once the text has come back; after a letter that is an order to `openssl`, once it has been read.
    fn start(
        world: &World,
        id: &str,
        directory: &std::path::Path,
        arguments: &[&str],
        lines: &'static [&'static str],
    ) -> Option<Self> {
        let pem = |label: &str, der: &[u8]| {
            let encoded = pem_body(der);
            format!("-----BEGIN {label}-----\n{encoded}-----END {label}-----\n")
        };
        let (certificate, key) = world.svid(id);
        let path = |name: &str| directory.join(name);
        std::fs::write(path("svid.pem"), pem("CERTIFICATE", &certificate)).unwrap();
        std::fs::write(path("key.pem"), pem("PRIVATE KEY", &key)).unwrap();
        std::fs::write(path("ca.pem"), pem("CERTIFICATE", world.ca_der())).unwrap();
        let mut child = Command::new("openssl")
            .args(arguments)
            .args(["-tls1_3", "-cert", "svid.pem", "-key", "key.pem", "-CAfile", "ca.pem"])
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .ok()?;
        let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let said = Arc::new(Mutex::new(String::new()));
        let (heard, seen) = (said.clone(), said.clone());
        let reading = std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut piece) {
                seen.lock().unwrap().push_str(&String::from_utf8_lossy(&piece[..length]));
            }
        });
        std::thread::spawn(move || {
            for line in lines {
                if writeln!(input, "{line}").is_err() {
                    break;
                }
                let latest = std::time::Instant::now() + patience(10);
                // `openssl` obeys an order only if it reads it by itself: what was written before has to be out of the pipe
                // first.
                let is_read = || rustix::io::ioctl_fionread(&input).is_ok_and(|waiting| waiting == 0);
                let is_back = || line.len() == 1 || heard.lock().unwrap().contains(line);
                while !(is_read() && is_back()) && std::time::Instant::now() < latest {
                    std::thread::sleep(Duration::from_millis(20));
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        Some(Self { child, said, reading })
    }

    /// Standard output and standard error, when it has ended.
    async fn end(self) -> (String, String) {
        let wait = move || {
            let output = self.child.wait_with_output().unwrap();
            self.reading.join().unwrap();
            let said = self.said.lock().unwrap().clone();
            (said, String::from_utf8_lossy(&output.stderr).into_owned())
        };
        tokio::task::spawn_blocking(wait).await.unwrap()
    }
}

fn pem_body(der: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut body = String::new();
    for (at, three) in der.chunks(3).enumerate() {
        let value = three.iter().fold(0_u32, |value, byte| value << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for digit in 0..4 {
            let bits = value >> (18 - 6 * digit) & 63;
            body.push(if digit > three.len() { '=' } else { char::from(DIGITS[bits as usize]) });
        }
        if at % 16 == 15 {
            body.push('\n');
        }
    }
    body + "\n"
}

/// Lines that begin with K ask for fresh keys on both sides, with k on one.
const LINES: &[&str] = &["first line", "K", "second line", "k", "third line", "K", "fourth line", "Q"];

#[tokio::test]
async fn openssl_s_client_talks_to_us_and_takes_fresh_keys() {
    let world = World::new();
    let directory = tempfile::tempdir().unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let arguments = ["s_client", "-connect", &address, "-verify_return_error"];
    let Some(openssl) = Openssl::start(&world, CURL, directory.path(), &arguments, LINES) else {
        eprintln!("SKIPPED (no openssl on PATH): openssl_s_client_talks_to_us_and_takes_fresh_keys");
        return;
    };
    let (socket, _) = listener.accept().await.unwrap();
    let tally = our_server(&world, socket, if takes_fresh_keys() { 2 } else { u64::MAX }).await;
    let (output, complaints) = openssl.end().await;
    let closed = tally.await.unwrap().closed;
    if !takes_fresh_keys() {
        assert!(output.contains(LINES[0]), "{output} {complaints}");
        return assert_eq!(closed, CloseReason::RekeyImpossible, "a clean end, and not a forged record");
    }
    for line in LINES.iter().filter(|line| line.ends_with("line")) {
        assert!(output.contains(line), "{line} came back: {output} {complaints}");
    }
    assert!(complaints.contains("KEYUPDATE"), "{complaints}");
    assert_eq!(closed, CloseReason::Complete);
}

#[tokio::test]
async fn openssl_s_server_talks_to_us_gives_tickets_and_takes_fresh_keys() {
    let world = World::new();
    let directory = tempfile::tempdir().unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let arguments = ["s_server", "-accept", &free, "-Verify", "2", "-verify_return_error", "-naccept", "1"];
    let Some(openssl) = Openssl::start(&world, WEB, directory.path(), &arguments, LINES) else {
        eprintln!("SKIPPED (no openssl on PATH): openssl_s_server_talks_to_us_gives_tickets_and_takes_fresh_keys");
        return;
    };
    let socket = loop {
        match TcpStream::connect(&free).await {
            Ok(socket) => break socket,
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    };
    let tally = our_client(&world, socket, if takes_fresh_keys() { 2 } else { u64::MAX }).await;
    let (output, complaints) = openssl.end().await;
    let closed = tally.await.unwrap().closed;
    if !takes_fresh_keys() {
        assert!(output.contains(LINES[0]), "{output} {complaints}");
        return assert_eq!(closed, CloseReason::RekeyImpossible, "a clean end, and not a forged record");
    }
    for line in LINES.iter().filter(|line| line.ends_with("line")) {
        assert!(output.contains(line), "{line} came back: {output} {complaints}");
    }
    // `openssl` ends without close_notify, and the reason has to say so.
    assert!(matches!(closed, CloseReason::PeerTruncated | CloseReason::PeerReset), "{closed}: {complaints}");
}
