//! One connection after the other over one TLS connection: between two relays, and against peers that lie.

use super::*;
use crate::handshake::testing::terms;

/// One side of a shared connection while one of its streams runs. `ended` gives the reason why the stream ended, and the
/// session that is left.
struct Use {
    application: TcpStream,
    ended: JoinHandle<(CloseReason, Option<IdleSession>)>,
}

async fn drained((tally, left): (Tally, Option<HalfClosed>)) -> (CloseReason, Option<IdleSession>) {
    match left {
        Some(left) => (tally.closed, left.drain().await),
        None => (tally.closed, None),
    }
}

impl Use {
    fn first(application: TcpStream, pipe: Pipe) -> Self {
        let ended = tokio::spawn(async move {
            drained(carry(pipe, &Limits::default(), pending(), &Progress::default()).await).await
        });
        Self { application, ended }
    }

    async fn next(idle: IdleSession) -> Self {
        let (application, own) = program().await;
        let ended = tokio::spawn(async move {
            drained(idle.carry(own, Vec::new(), &Limits::default(), pending(), &Progress::default()).await).await
        });
        Self { application, ended }
    }

    async fn end(self) -> (CloseReason, Option<IdleSession>) {
        over(self.ended).await
    }
}

async fn sessions() -> crate::handshake::testing::Sessions {
    let reuse = crate::handshake::Terms { reuse: true, ..terms(engine().ciphers()) };
    World::new().sessions_by(reuse).await
}

/// Both sides of a shared connection, in its first stream.
async fn shared() -> (Use, Use) {
    let sessions = sessions().await;
    let (application, upstream) = program().await;
    let server = Use::first(application, arm(sessions.server.joined(upstream), engine()).unwrap());
    let client = arm(sessions.client, engine()).unwrap();
    (Use::first(sessions.client_application, client), server)
}

async fn over(ended: JoinHandle<(CloseReason, Option<IdleSession>)>) -> (CloseReason, Option<IdleSession>) {
    timeout(patience(20), ended).await.expect("the stream ends").unwrap()
}

/// Begins the next stream on both sides.
async fn again(client: IdleSession, server: IdleSession) -> (Use, Use) {
    again_with(client, server, &[]).await
}

/// The same, with first bytes of the client's application.
async fn again_with(mut client: IdleSession, mut server: IdleSession, early: &[u8]) -> (Use, Use) {
    let serve = async {
        server.next().await.unwrap();
        ready(server).await
    };
    let (begun, server) = timeout(patience(20), async { tokio::join!(client.begin(early), serve) }).await.unwrap();
    begun.unwrap();
    (Use::next(client).await, server)
}

/// The server's workload accepts.
async fn ready(server: IdleSession) -> Use {
    let (network, shared) = server.into_parts();
    Use::next(shared.ready(network).await.unwrap()).await
}

/// Sends `bytes` both ways at once, ends both streams, and gives both sides back.
async fn talk(client: Use, server: Use, bytes: &[u8]) -> (IdleSession, IdleSession) {
    let (mut client, mut server) = (client, server);
    let half = async |one: &mut TcpStream| {
        let (mut reader, mut writer) = one.split();
        let mut heard = Vec::new();
        let write = async {
            writer.write_all(bytes).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let (_, read) = tokio::join!(write, reader.read_to_end(&mut heard));
        read.unwrap();
        heard
    };
    let both = async { tokio::join!(half(&mut client.application), half(&mut server.application)) };
    let (at_client, at_server) = timeout(patience(60), both).await.expect("in time");
    assert!(at_client == bytes && at_server == bytes, "every byte of this stream and of no other");
    let (client, server) = (client.end().await, server.end().await);
    assert_eq!((client.0, server.0), (CloseReason::Complete, CloseReason::Complete));
    let (client, server) = (client.1.expect("it can be used again"), server.1.expect("it can be used again"));
    assert_eq!(client.streams(), server.streams());
    (client, server)
}

#[tokio::test]
async fn one_connection_after_the_other_arrives_whole_and_apart() {
    let (mut client, mut server) = shared().await;
    for (number, length) in [64, 0, 1 << 20, 1, 300_000, 16384].into_iter().enumerate() {
        let (idle_client, idle_server) = talk(client, server, &noise(length, 7 + number as u64)).await;
        assert_eq!(idle_client.streams() as usize, number + 1);
        (client, server) = again(idle_client, idle_server).await;
    }
}

#[tokio::test]
async fn a_reset_on_either_side_is_passed_on_and_costs_the_connection_nothing() {
    let (mut client, mut server) = shared().await;
    for from_client in [true, false, true, false] {
        let (gone, mut other) = if from_client { (client, server) } else { (server, client) };
        let mut first = [0; 4];
        let mut application = gone.application;
        application.write_all(b"some").await.unwrap();
        other.application.read_exact(&mut first).await.unwrap();
        // Bytes on their way to the application that is gone must not turn up in the next stream.
        other.application.write_all(&noise(200_000, 3)).await.unwrap();
        application.set_zero_linger().unwrap();
        drop(application);
        assert!(is_reset(&mut other.application).await);
        drop(other.application);
        let (gone, other) = (over(gone.ended).await, over(other.ended).await);
        assert_eq!((gone.0, other.0), (CloseReason::ApplicationReset, CloseReason::PeerReset));
        let (gone, other) = (gone.1.unwrap(), other.1.unwrap());
        (client, server) = if from_client { again(gone, other).await } else { again(other, gone).await };
    }
    talk(client, server, b"and still whole").await;
}

#[tokio::test]
async fn a_half_closed_stream_goes_on_in_the_other_direction() {
    let (client, server) = shared().await;
    let (idle_client, idle_server) = talk(client, server, b"first").await;
    let (mut client, mut server) = again(idle_client, idle_server).await;
    client.application.shutdown().await.unwrap();
    assert!(read_to_end(&mut server.application).await.is_empty());
    server.application.write_all(b"still here").await.unwrap();
    server.application.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut client.application).await, b"still here");
    let (client, server) = (client.end().await, server.end().await);
    again(client.1.unwrap(), server.1.unwrap()).await;
}

#[tokio::test]
async fn a_reset_behind_the_own_end_ends_the_whole_connection() {
    let (mut client, mut server) = shared().await;
    client.application.shutdown().await.unwrap();
    assert!(read_to_end(&mut server.application).await.is_empty());
    client.application.set_zero_linger().unwrap();
    drop(client.application);
    // Only writing finds out.
    let block = noise(1 << 20, 5);
    while server.application.write_all(&block).await.is_ok() {}
    let (closed, left) = over(client.ended).await;
    assert!(left.is_none() && closed == CloseReason::ApplicationReset, "{closed}");
    assert!(server.end().await.1.is_none());
}

#[tokio::test]
async fn an_idle_connection_that_the_peer_closes_begins_nothing_and_loses_nothing() {
    let (client, server) = shared().await;
    let (mut client, server) = talk(client, server, b"bytes").await;
    server.close();
    let begun = timeout(patience(20), client.begin(b"first")).await.unwrap();
    assert!(!begun.unwrap_err().lost);
}

#[tokio::test]
async fn first_bytes_go_with_the_frame_that_begins_a_stream() {
    let (mut client, mut server) = shared().await;
    for length in [1, 64, 16_384] {
        let (idle_client, idle_server) = talk(client, server, b"before").await;
        let early = noise(length, 11);
        (client, server) = again_with(idle_client, idle_server, &early).await;
        let mut heard = vec![0; length];
        server.application.read_exact(&mut heard).await.unwrap();
        assert!(heard == early);
    }
    talk(client, server, b"and what comes behind them").await;
}

#[tokio::test]
async fn bytes_that_did_not_go_with_the_frame_are_the_first_of_the_stream() {
    let (client, server) = shared().await;
    let (mut client, mut server) = talk(client, server, b"before").await;
    let (begun, server) = tokio::join!(client.begin(&[]), async {
        server.next().await.unwrap();
        ready(server).await
    });
    begun.unwrap();
    let (mut application, own) = program().await;
    application.write_all(b" and last").await.unwrap();
    application.shutdown().await.unwrap();
    let progress = Progress::default();
    let limits = Limits::default();
    let carried = client.carry(own, b"first".to_vec(), &limits, pending(), &progress);
    let Use { application: mut workload, ended } = server;
    let (_, heard) = tokio::join!(carried, async {
        workload.shutdown().await.unwrap();
        read_to_end(&mut workload).await
    });
    assert_eq!((heard.as_slice(), progress.sent()), (&b"first and last"[..], 14));
    over(ended).await;
}

/// A relay as the client of a shared connection between two streams, and a server that says what it wants.
async fn against_server() -> (IdleSession, Peer) {
    let sessions = sessions().await;
    let mut relay = Use::first(sessions.client_application, arm(sessions.client, engine()).unwrap());
    let mut peer = Peer::server(sessions.server).await;
    relay.application.shutdown().await.unwrap();
    assert_eq!(peer.receive().await, Some((FRAME, vec![3, 0, 0, 0, 1])));
    peer.send(FRAME, &[3, 0, 0, 0, 1]).await;
    (relay.end().await.1.expect("it can be used again"), peer)
}

#[tokio::test]
async fn only_a_sealed_end_says_that_the_first_bytes_went_nowhere() {
    type Records = &'static [(u8, &'static [u8])];
    let said: &[(&str, Records, Option<bool>)] = &[
        ("ready", &[(FRAME, &[2, 0, 0, 0, 2])], None),
        ("ready after an empty record", &[(23, &[]), (FRAME, &[2, 0, 0, 0, 2])], Some(true)),
        ("close_notify", &[(21, &[1, 0])], Some(false)),
        ("internal_error", &[(21, &[2, 80])], Some(false)),
        ("nothing", &[], Some(true)),
        ("data", &[(23, b"an answer")], Some(true)),
        ("ready for another stream", &[(FRAME, &[2, 0, 0, 0, 3])], Some(true)),
        ("end", &[(FRAME, &[3, 0, 0, 0, 2])], Some(true)),
        ("a broken frame", &[(FRAME, &[2])], Some(true)),
    ];
    for (what, records, lost) in said {
        for early in [&b""[..], b"GET / HTTP/1.1"] {
            let (mut client, mut peer) = against_server().await;
            let serve = async {
                assert_eq!(peer.receive().await, Some((FRAME, vec![1, 0, 0, 0, 2])), "{what}");
                if !early.is_empty() {
                    assert_eq!(peer.receive().await, Some((23, early.to_vec())), "{what}");
                }
                // In one write, because the kernel tells of an empty record only where something is behind it
                // (net/tls/tls_sw.c, `tls_sw_recvmsg`).
                let said: Vec<u8> =
                    records.iter().flat_map(|(content_type, body)| peer.seal(*content_type, body)).collect();
                peer.socket.write_all(&said).await.unwrap();
                peer.socket.shutdown().await.unwrap();
            };
            let (begun, ()) = timeout(patience(20), async { tokio::join!(client.begin(early), serve) }).await.unwrap();
            let lost = lost.map(|lost| lost && !early.is_empty());
            assert_eq!(begun.as_ref().err().map(|unbegun| unbegun.lost), lost, "{what}: {begun:?}");
        }
    }
}

#[tokio::test]
async fn the_server_knows_of_first_bytes_that_came_with_the_frame() {
    for early in [&b""[..], b"GET / HTTP/1.1"] {
        let (client, server) = shared().await;
        let (mut client, mut server) = talk(client, server, b"bytes").await;
        let serve = async {
            server.next().await.unwrap();
            let (network, shared) = server.into_parts();
            // With engine `kernel` the first bytes are still in the socket, so that this process does not know of them.
            assert_eq!(shared.has_early_data(), !early.is_empty() && engine() == Choice::User);
            Use::next(shared.ready(network).await.unwrap()).await
        };
        let both = async { tokio::join!(client.begin(early), serve) };
        let (begun, mut server) = timeout(patience(20), both).await.unwrap();
        begun.unwrap();
        let mut heard = vec![0; early.len()];
        server.application.read_exact(&mut heard).await.unwrap();
        assert_eq!(heard, early);
    }
}

#[tokio::test]
async fn a_stream_that_the_server_refuses_leaves_the_first_bytes_with_the_client() {
    let (client, server) = shared().await;
    let (mut client, mut server) = talk(client, server, b"bytes").await;
    let refuse = async {
        server.next().await.unwrap();
        let (network, shared) = server.into_parts();
        shared.close(&network);
    };
    let (begun, ()) = timeout(patience(20), async { tokio::join!(client.begin(b"first"), refuse) }).await.unwrap();
    assert!(!begun.unwrap_err().lost);
}

#[tokio::test]
async fn without_the_offer_or_the_answer_a_connection_is_used_once() {
    let (client, server) = chain(engine().ciphers()).await;
    drop(client.application);
    drop(server.application);
    let sessions = World::new().sessions(engine().ciphers()).await;
    assert!(!sessions.client.accepted().agreement().reusable && !sessions.server.agreement().reusable);
}

/// A relay as the server of a shared connection, and a client that says what it wants.
async fn against_client() -> (Use, Peer) {
    let sessions = sessions().await;
    let (application, upstream) = program().await;
    let relay = Use::first(application, arm(sessions.server.joined(upstream), engine()).unwrap());
    (relay, Peer::client(sessions.client))
}

const FRAME: u8 = 0xb7;

#[tokio::test]
async fn frames_and_data_out_of_turn_reset_the_program() {
    let violations: &[&[(u8, &[u8])]] = &[
        &[(FRAME, &[1, 0, 0, 0, 2])],
        &[(FRAME, &[2, 0, 0, 0, 1])],
        &[(FRAME, &[3, 0, 0, 0, 2])],
        &[(FRAME, &[3, 0, 0, 0])],
        &[(FRAME, &[9, 0, 0, 0, 1])],
        &[(FRAME, &[])],
        // close_notify without the end of this stream: somebody may have cut it off.
        &[(21, &[1, 0])],
    ];
    for said in violations {
        let (mut relay, mut peer) = against_client().await;
        peer.send(23, b"good").await;
        let mut good = [0; 4];
        relay.application.read_exact(&mut good).await.unwrap();
        for (content_type, body) in *said {
            peer.send(*content_type, body).await;
        }
        assert!(is_reset(&mut relay.application).await, "{said:?}");
        let (closed, left) = relay.end().await;
        assert!(left.is_none(), "{said:?}: {closed}");
        assert!(matches!(closed, CloseReason::PeerViolation(_) | CloseReason::PeerTruncated), "{said:?}: {closed}");
    }
}

#[tokio::test]
async fn between_two_streams_nothing_but_the_next_frame_is_taken() {
    let said: &[(u8, &[u8])] = &[
        (23, b"data that belongs to no stream"),
        (FRAME, &[1, 0, 0, 0, 3]),
        (FRAME, &[1, 0, 0, 0, 1]),
        (FRAME, &[3, 0, 0, 0, 1]),
        (FRAME, &[2, 0, 0, 0, 2]),
        (21, &[1, 0]),
        (21, &[2, 80]),
    ];
    for (content_type, body) in said {
        let (mut relay, mut peer) = against_client().await;
        peer.send(FRAME, &[3, 0, 0, 0, 1]).await;
        relay.application.shutdown().await.unwrap();
        assert!(read_to_end(&mut relay.application).await.is_empty());
        assert_eq!(peer.receive().await, Some((FRAME, vec![3, 0, 0, 0, 1])));
        let mut idle = relay.end().await.1.expect("it can be used again");
        peer.send(*content_type, body).await;
        let next = timeout(patience(10), idle.next()).await.expect("it is noticed");
        assert!(next.is_err(), "{content_type} {body:?}");
    }
}

#[tokio::test]
async fn a_client_that_says_end_and_begin_in_one_breath_is_heard() {
    let (mut relay, mut peer) = against_client().await;
    relay.application.shutdown().await.unwrap();
    assert_eq!(peer.receive().await, Some((FRAME, vec![3, 0, 0, 0, 1])));
    let mut breath = peer.seal(23, b"last");
    breath.extend(peer.seal(FRAME, &[3, 0, 0, 0, 1]));
    breath.extend(peer.seal(FRAME, &[1, 0, 0, 0, 2]));
    peer.socket.write_all(&breath).await.unwrap();
    assert_eq!(read_to_end(&mut relay.application).await, b"last");
    let mut idle = relay.end().await.1.expect("it can be used again");
    timeout(patience(10), idle.next()).await.expect("the frame is not lost").unwrap();
    assert_eq!(idle.streams(), 2);
}

#[tokio::test]
async fn data_before_the_server_is_ready_belongs_to_that_stream() {
    let (mut relay, mut peer) = against_client().await;
    relay.application.shutdown().await.unwrap();
    peer.send(FRAME, &[3, 0, 0, 0, 1]).await;
    assert!(read_to_end(&mut relay.application).await.is_empty());
    assert_eq!(peer.receive().await, Some((FRAME, vec![3, 0, 0, 0, 1])));
    let mut idle = relay.end().await.1.expect("it can be used again");
    let mut early = peer.seal(FRAME, &[1, 0, 0, 0, 2]);
    early.extend(peer.seal(23, b"GET /secret"));
    peer.socket.write_all(&early).await.unwrap();
    let begun = timeout(patience(10), idle.next()).await.unwrap();
    begun.unwrap();
    let mut relay = ready(idle).await;
    let mut bytes = [0; 11];
    timeout(patience(10), relay.application.read_exact(&mut bytes)).await.expect("in time").unwrap();
    assert_eq!(&bytes, b"GET /secret");
    assert_eq!(peer.receive().await, Some((FRAME, vec![2, 0, 0, 0, 2])));
}

#[tokio::test]
async fn a_peer_that_never_ends_an_aborted_stream_is_given_up() {
    let (relay, mut peer) = against_client().await;
    relay.application.set_zero_linger().unwrap();
    drop(relay.application);
    assert_eq!(peer.receive().await, Some((FRAME, vec![4, 0, 0, 0, 1])));
    peer.send(23, &[7; 1000]).await;
    assert!(over(relay.ended).await.1.is_none());
}

/// A random peer with a valid certificate: any number of streams of any content, in any pieces, with fresh keys in between,
/// and then mostly something that it must not say. `BUNTER_FUZZ` is how many such peers are tried, 60 if not said.
#[tokio::test]
async fn whatever_a_peer_sends_each_stream_receives_its_own_bytes_or_is_reset() {
    let peers = std::env::var("BUNTER_FUZZ").ok().and_then(|text| text.parse().ok()).unwrap_or(60 / slowness().min(12));
    for seed in 1..=u64::from(peers) {
        let (relay, peer) = against_client().await;
        timeout(patience(60), random_peer(relay, peer, Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))))
            .await
            .unwrap_or_else(|_| panic!("seed {seed} hangs"));
    }
}

struct Dice(u64);

impl Dice {
    fn below(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }
}

async fn random_peer(mut relay: Use, mut peer: Peer, mut dice: Dice) {
    let mut early = Vec::new();
    for number in 1_u32.. {
        let (mut wire, mut data) = (Vec::new(), std::mem::take(&mut early));
        for _ in 0..dice.below(6) {
            match dice.below(8) {
                0 => wire.extend(peer.seal(23, b"")),
                1 if takes_fresh_keys() => {
                    wire.extend(peer.seal(22, &[24, 0, 0, 1, 0]));
                    peer.sealer = Sealer::new(&peer.secrets.next_transmit().unwrap()).unwrap();
                }
                2 => wire.extend(peer.seal(21, &[1, 90])),
                _ => {
                    let length = [1, 7, 600, 5000, 16_384][dice.below(5) as usize];
                    let piece = noise(length, dice.0 | 1);
                    wire.extend(peer.seal(23, &piece));
                    data.extend(piece);
                }
            }
        }
        let frame = |kind: u8, number: u32| [&[kind][..], &number.to_be_bytes()].concat();
        let last = match dice.below(12) {
            0 => Some((FRAME, frame(4, number))),
            1 => Some((FRAME, frame(1, number + 1))),
            2 => Some((FRAME, frame(dice.below(256) as u8, dice.below(4) as u32))),
            3 => Some((FRAME, noise(dice.below(9) as usize, dice.0 | 1))),
            4 => Some((dice.below(256) as u8, noise(dice.below(300) as usize, dice.0 | 1))),
            5 => Some((21, vec![1, 0])),
            6 => None,
            _ => Some((FRAME, frame(3, number))),
        };
        let in_order = last == Some((FRAME, frame(3, number)));
        match &last {
            Some((content_type, body)) => wire.extend(peer.seal(*content_type, body)),
            None => wire.extend(noise(1 + dice.below(40) as usize, dice.0 | 1)),
        }
        // In pieces, so that a record and a frame end anywhere.
        let Peer { socket, .. } = &mut peer;
        let (mut reader, mut writer) = socket.split();
        let send = async {
            let mut rest = &wire[..];
            while !rest.is_empty() {
                let (piece, after) = rest.split_at((1 + dice.below(20_000) as usize).min(rest.len()));
                if writer.write_all(piece).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
                rest = after;
            }
            if !in_order {
                // Nothing comes any more.
                let _ = writer.shutdown().await;
            }
        };
        let Use { mut application, ended } = relay;
        let hear = async {
            let mut heard = Vec::new();
            let end = application.read_to_end(&mut heard).await;
            drop(application);
            (heard, end.is_ok())
        };
        let swallow = async {
            // What the relay says, so that it never waits for room.
            if in_order { 0 } else { reader.read(&mut [0; 4096]).await.unwrap_or(0) }
        };
        let (_, (heard, ended_well), _) = tokio::join!(send, hear, swallow);
        let (closed, left) = over(ended).await;
        assert!(data.starts_with(&heard), "stream {number}: bytes that are not its own");
        if !in_order {
            // The alert or frame may be one that is allowed here; then the end behind it cuts the stream off.
            assert!(!ended_well, "stream {number}: {last:?} looked like an end ({closed})");
            return;
        }
        assert!(ended_well && heard == data && closed == CloseReason::Complete, "stream {number}: {closed}");
        assert_eq!(peer.receive().await, Some((FRAME, frame(3, number))));
        let mut idle = left.expect("it can be used again");
        let mut breath = peer.seal(FRAME, &frame(1, number + 1));
        if dice.below(2) == 0 {
            early = noise([1, 600, 16_384][dice.below(3) as usize], dice.0 | 1);
            breath.extend(peer.seal(23, &early));
        }
        peer.socket.write_all(&breath).await.unwrap();
        idle.next().await.unwrap();
        relay = ready(idle).await;
        assert_eq!(peer.receive().await, Some((FRAME, frame(2, number + 1))));
    }
}
