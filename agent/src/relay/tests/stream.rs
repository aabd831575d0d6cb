//! What goes in comes out: both ways, in any pieces, at any pace.

use super::*;
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};

/// Sends `bytes` in pieces and ends; reads everything at the same time.
async fn exchange(socket: TcpStream, bytes: Vec<u8>, piece: usize) -> Vec<u8> {
    let (mut read, mut write) = socket.into_split();
    let sending = tokio::spawn(async move {
        for piece in bytes.chunks(piece) {
            write.write_all(piece).await.unwrap();
        }
        write.shutdown().await.unwrap();
    });
    let mut received = Vec::new();
    timeout(patience(120), read.read_to_end(&mut received)).await.expect("in time").unwrap();
    sending.await.unwrap();
    received
}

#[tokio::test]
async fn sixty_four_mebibytes_arrive_unchanged_both_ways_at_once() {
    const LENGTH: usize = 64 << 20;
    for ciphers in [engine().ciphers(), Ciphers::ChaChaOnly] {
        let (client, server) = chain(ciphers).await;
        let (up, down) = (noise(LENGTH, 1), noise(LENGTH, 2));
        let (at_client, at_server) = tokio::join!(
            tokio::spawn(exchange(client.application, up.clone(), 100_000)),
            tokio::spawn(exchange(server.application, down.clone(), 1 << 20)),
        );
        assert!(at_client.unwrap() == down, "from server to client");
        assert!(at_server.unwrap() == up, "from client to server");
        let whole = Tally { sent: LENGTH as u64, received: LENGTH as u64, closed: CloseReason::Complete };
        assert_eq!(client.tally.await.unwrap(), whole);
        assert_eq!(server.tally.await.unwrap(), whole);
        assert_eq!(client.progress.sent(), LENGTH as u64);
    }
}

#[tokio::test]
async fn a_plain_pipe_carries_the_same() {
    let (left, own) = program().await;
    let (network, right) = pair().await;
    let relay = Relay::over(left, Pipe::plain(own, network).unwrap(), Limits::default());
    let (up, down) = (noise(8 << 20, 3), noise(8 << 20, 4));
    let (at_left, at_right) =
        tokio::join!(exchange(relay.application, up.clone(), 70_000), exchange(right, down.clone(), 3_000));
    assert!(at_left == down && at_right == up);
    assert_eq!(relay.tally.await.unwrap().closed, CloseReason::Complete);
}

#[tokio::test]
async fn small_questions_and_answers_are_not_held_back() {
    let (mut client, mut server) = chain(engine().ciphers()).await;
    let mut took = Vec::new();
    for round in 0..500_u32 {
        let started = std::time::Instant::now();
        let question = round.to_le_bytes();
        let mut answer = [0; 4];
        client.application.write_all(&question).await.unwrap();
        server.application.read_exact(&mut answer).await.unwrap();
        server.application.write_all(&answer).await.unwrap();
        client.application.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, question);
        took.push(started.elapsed());
    }
    // A delayed acknowledgement takes 40 ms. However busy the machine is, one round in ten is faster if none is waited for.
    took.sort();
    assert!(took[50] < Duration::from_millis(30), "{:?}", took[50]);
}

#[tokio::test]
async fn any_pieces_in_any_rhythm_arrive_byte_for_byte_with_half_closes_in_any_order() {
    #[derive(Clone, Debug)]
    struct Side {
        pieces: Vec<usize>,
        read: usize,
        /// Reads everything before it sends anything.
        reads_first: bool,
    }
    let side = |may_wait| {
        let reads_first = if may_wait { any::<bool>().boxed() } else { Just(false).boxed() };
        let piece = prop_oneof![1..40_usize, 16_000..17_000_usize, 60_000..300_000_usize];
        (prop::collection::vec(piece, 0..12), prop_oneof![1..50_usize, 1_000..100_000_usize], reads_first)
            .prop_map(|(pieces, read, reads_first)| Side { pieces, read, reads_first })
    };
    async fn act(mut socket: TcpStream, side: Side, seed: u64) -> Vec<u8> {
        let bytes = noise(side.pieces.iter().sum(), seed);
        let (mut read, mut write) = socket.split();
        let sending = async |write: &mut tokio::net::tcp::WriteHalf<'_>| {
            let mut at = 0;
            for piece in side.pieces {
                write.write_all(&bytes[at..at + piece]).await.unwrap();
                at += piece;
                tokio::task::yield_now().await;
            }
            write.shutdown().await.unwrap();
        };
        let reading = async {
            let (mut all, mut room) = (Vec::new(), vec![0; side.read]);
            loop {
                match read.read(&mut room).await.unwrap() {
                    0 => return all,
                    length => all.extend_from_slice(&room[..length]),
                }
            }
        };
        if side.reads_first {
            let all = reading.await;
            sending(&mut write).await;
            all
        } else {
            tokio::join!(sending(&mut write), reading).1
        }
    }
    let world = World::new();
    let mut runner = TestRunner::deterministic();
    for _ in 0..40 {
        let strategy = (side(false), side(true), any::<bool>());
        let (first, second, swapped) = strategy.new_tree(&mut runner).unwrap().current();
        let shown = format!("{first:?} {second:?} {swapped}");
        let (left, right) = if swapped { (second, first) } else { (first, second) };
        let sessions = world.sessions(engine().ciphers()).await;
        let server = Relay::server(sessions.server).await;
        let client = Relay::client(sessions.client, sessions.client_application).await;
        let (up, down) = (noise(left.pieces.iter().sum(), 5), noise(right.pieces.iter().sum(), 6));
        let both = async { tokio::join!(act(client.application, left, 5), act(server.application, right, 6)) };
        let (at_left, at_right) = timeout(patience(30), both).await.expect(&shown);
        assert!(at_left == down && at_right == up, "{shown}");
        assert_eq!(client.tally.await.unwrap().closed, CloseReason::Complete, "{shown}");
        assert_eq!(server.tally.await.unwrap().closed, CloseReason::Complete, "{shown}");
    }
}

#[tokio::test]
async fn a_slow_reader_holds_its_sender_back_and_costs_no_memory() {
    let (client, mut server) = chain(engine().ciphers()).await;
    let bytes = noise(96 << 20, 7);
    let expected = bytes.clone();
    let (mut read, mut write) = client.application.into_split();
    let sent = Arc::new(AtomicUsize::new(0));
    let counter = sent.clone();
    let sending = tokio::spawn(async move {
        for piece in bytes.chunks(64 << 10) {
            write.write_all(piece).await.unwrap();
            counter.fetch_add(piece.len(), Relaxed);
        }
        write.shutdown().await.unwrap();
    });
    // Until nothing moves any more.
    let a_while = Duration::from_millis(300) * slowness();
    let mut before = usize::MAX;
    while before != sent.load(Relaxed) {
        before = sent.load(Relaxed);
        sleep(a_while).await;
    }
    assert!(before < 64 << 20, "{before} bytes were taken from the sender while nobody read");
    let (polled, moved) = (client.polls.load(Relaxed), client.progress.sent());
    sleep(a_while).await;
    // What is stuck is asked again after 20 ms, 40 ms, 80 ms and so on from when it last moved.
    let polls = client.polls.load(Relaxed) - polled;
    assert!(polls < 20, "it waits and does not spin: {polls} times in {a_while:?}");
    // A zero window is probed now and then, and takes a little each time.
    assert!(client.progress.sent() - moved < 1 << 20);
    let received = read_to_end(&mut server.application).await;
    assert!(received == expected);
    sending.await.unwrap();
    drop(server.application);
    assert_eq!(read.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(client.tally.await.unwrap().closed, CloseReason::Complete);
}
