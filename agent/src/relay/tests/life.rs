//! How connections live and end: half-closes, resets, limits, and orders to stop.

use super::*;
use crate::relay::buffers::{Batch, Scratch};
use crate::{
    flow::Direction,
    handshake::testing::{CURL, WEB, terms},
};
use bunter_identity::refusal::Culprit;

#[tokio::test]
async fn either_side_may_end_first_and_still_hear_the_other() {
    for client_first in [true, false] {
        let (mut client, mut server) = chain(engine().ciphers()).await;
        let (first, second) = if client_first {
            (&mut client.application, &mut server.application)
        } else {
            (&mut server.application, &mut client.application)
        };
        first.write_all(b"question").await.unwrap();
        first.shutdown().await.unwrap();
        assert_eq!(read_to_end(second).await, b"question");
        for _ in 0..3 {
            sleep(Duration::from_millis(30)).await;
            second.write_all(b"answer").await.unwrap();
        }
        second.shutdown().await.unwrap();
        assert_eq!(read_to_end(first).await, b"answer".repeat(3));
        assert_eq!(client.closed().await.closed, CloseReason::Complete);
        assert_eq!(server.closed().await.closed, CloseReason::Complete);
    }
}

#[tokio::test]
async fn a_reset_goes_through_to_the_other_program() {
    for client_first in [true, false] {
        let (mut client, mut server) = chain(engine().ciphers()).await;
        // Bytes have gone through, so that the connection is known to be open at both ends.
        client.application.write_all(b"hello").await.unwrap();
        server.application.read_exact(&mut [0; 5]).await.unwrap();
        let (dying, living) = if client_first {
            (client, &mut server)
        } else {
            let Relay { application, tally, progress, stop, polls } = server;
            server = client;
            (Relay { application, tally, progress, stop, polls }, &mut server)
        };
        dying.application.set_zero_linger().unwrap();
        assert_eq!(dying.closed().await.closed, CloseReason::ApplicationReset);
        assert!(is_reset(&mut living.application).await, "client first: {client_first}");
        assert_eq!(server.closed().await.closed, CloseReason::PeerReset);
    }
}

#[tokio::test]
async fn a_reset_is_noticed_by_a_side_that_only_waits_for_its_own_program() {
    // The client ended its stream; the server's program thinks about the answer; the client dies.
    let (mut client, mut server) = chain(engine().ciphers()).await;
    client.application.write_all(b"question").await.unwrap();
    client.application.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut server.application).await, b"question");
    sleep(Duration::from_millis(50)).await;
    client.application.set_zero_linger().unwrap();
    drop(client.application);
    let client = timeout(patience(5), client.tally).await.expect("noticed").unwrap();
    assert_eq!(client.closed, CloseReason::ApplicationReset);
    let server = timeout(patience(5), server.tally).await.expect("passed on").unwrap();
    assert_eq!(server.closed, CloseReason::PeerReset);
}

#[tokio::test]
async fn a_program_that_goes_away_with_bytes_unread_resets_its_peer() {
    let (client, mut server) = chain(engine().ciphers()).await;
    server.application.write_all(&noise(1 << 20, 1)).await.unwrap();
    sleep(Duration::from_millis(100)).await;
    assert_eq!(client.closed().await.closed, CloseReason::ApplicationReset);
    assert!(is_reset(&mut server.application).await);
    assert_eq!(server.closed().await.closed, CloseReason::PeerReset);
}

#[tokio::test]
async fn waiting_costs_nothing_in_any_state() {
    let (mut client, mut server) = chain(engine().ciphers()).await;
    let quiet = async |relay: &Relay, state: &str| {
        sleep(Duration::from_millis(100)).await;
        let before = relay.polls.load(Relaxed);
        sleep(Duration::from_millis(300)).await;
        let polls = relay.polls.load(Relaxed) - before;
        assert!(polls <= 2, "{state}: woken {polls} times");
    };
    quiet(&client, "idle").await;
    client.application.write_all(b"question").await.unwrap();
    quiet(&client, "one question on its way").await;
    client.application.shutdown().await.unwrap();
    quiet(&client, "this side ended").await;
    quiet(&server, "the other side ended").await;
    server.application.write_all(b"answer").await.unwrap();
    quiet(&server, "the other side ended, and this side has sent").await;
}

#[tokio::test]
async fn a_flow_is_small() {
    let sessions = World::new().sessions(engine().ciphers()).await;
    let pipe = arm(sessions.client, engine()).unwrap();
    let (limits, progress) = (Limits::default(), Progress::default());
    let flow = carry(pipe, &limits, pending(), &progress);
    let size = size_of_val(&flow);
    assert!(size < 2048, "{size} bytes for each flow");
}

#[tokio::test]
async fn a_connection_that_says_nothing_for_the_idle_timeout_is_closed() {
    let sessions = World::new().sessions(engine().ciphers()).await;
    let limits = Limits { idle: Some(Duration::from_millis(400)), ..Limits::default() };
    let pipe = arm(sessions.client, engine()).unwrap();
    let mut client = Relay::over(sessions.client_application, pipe, limits);
    let mut server = Relay::server(sessions.server).await;
    for _ in 0..4 {
        sleep(Duration::from_millis(200)).await;
        client.application.write_all(b"still here").await.unwrap();
        server.application.read_exact(&mut [0; 10]).await.unwrap();
    }
    let started = std::time::Instant::now();
    assert!(is_reset(&mut client.application).await, "the program hears of it");
    assert!(started.elapsed() > Duration::from_millis(300));
    assert_eq!(client.closed().await.closed, CloseReason::Idle);
    assert!(is_reset(&mut server.application).await, "a stream that was cut does not look complete");
    assert_eq!(server.closed().await.closed, CloseReason::PeerTruncated);
}

#[tokio::test]
async fn an_order_to_stop_reaches_both_programs_and_the_peer_at_once_also_in_full_flow() {
    for (stop, code, seen) in
        [(Stop::Revoked, "revoked", CloseReason::PeerAlert(49)), (Stop::Drained, "drained", CloseReason::PeerTruncated)]
    {
        let (mut client, mut server) = chain(engine().ciphers()).await;
        client.application.write_all(b"before").await.unwrap();
        server.application.read_exact(&mut [0; 6]).await.unwrap();
        server.application.write_all(b"before").await.unwrap();
        client.application.read_exact(&mut [0; 6]).await.unwrap();
        client.stop.send(stop).unwrap();
        assert!(is_reset(&mut client.application).await);
        assert!(is_reset(&mut server.application).await, "{code}");
        let tally = client.tally.await.unwrap();
        assert_eq!((tally.closed.code(), tally.sent, tally.received), (code, 6, 6));
        assert_eq!(server.closed().await.closed, seen);
    }
    let (client, server) = chain(engine().ciphers()).await;
    let (mut read, mut write) = (client.application, server.application);
    let flood = tokio::spawn(async move { while write.write_all(&[7; 100_000]).await.is_ok() {} });
    read.read_exact(&mut vec![0; 10_000_000]).await.unwrap();
    client.stop.send(Stop::Revoked).unwrap();
    let tally = timeout(patience(1), client.tally).await.expect("at once").unwrap();
    assert_eq!(tally.closed, CloseReason::Stopped(Stop::Revoked));
    flood.await.unwrap();
}

#[tokio::test]
async fn a_server_that_refuses_the_client_afterwards_is_reported_as_a_refusal() {
    let world = World::new();
    let (network_client, network_server) = pair().await;
    let (mut application, own) = program().await;
    let client = world.permit(Direction::Outbound, own, CURL, WEB);
    let server = world.permit(Direction::Inbound, network_server, WEB, "spiffe://example.org/somebody-else");
    let (client, server) = tokio::join!(
        world.connect(client, network_client, terms(engine().ciphers())),
        world.accept(server, terms(engine().ciphers()))
    );
    assert!(server.is_err());
    // The application has asked already; it must see a reset, and the record must say why.
    application.write_all(b"GET /").await.unwrap();
    let relay = Relay::client(client.unwrap(), application).await;
    drop(server);
    let closed = timeout(patience(5), relay.tally).await.expect("in time").unwrap().closed;
    assert_eq!(closed, CloseReason::PeerRefused(49));
    assert_eq!((closed.code(), closed.culprit()), ("peer-refused", Some(Culprit::Peer)));
    assert_eq!(closed.code(), "peer-refused");
    assert!(closed.to_string().ends_with("access_denied"), "{closed}");
}

#[tokio::test]
async fn a_plain_pipe_passes_resets_and_half_closes_on_too() {
    let plain = async || {
        let (left, own) = program().await;
        let (network, right) = pair().await;
        (Relay::over(left, Pipe::plain(own, network).unwrap(), Limits::default()), right)
    };
    let (mut relay, mut right) = plain().await;
    right.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut relay.application).await, b"");
    relay.application.write_all(b"after").await.unwrap();
    relay.application.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut right).await, b"after");
    assert_eq!(relay.tally.await.unwrap().closed, CloseReason::Complete);

    let (mut relay, right) = plain().await;
    right.set_zero_linger().unwrap();
    drop(right);
    assert!(is_reset(&mut relay.application).await);
    assert_eq!(relay.closed().await.closed, CloseReason::PeerReset);

    let (relay, mut right) = plain().await;
    relay.application.set_zero_linger().unwrap();
    assert_eq!(relay.closed().await.closed, CloseReason::ApplicationReset);
    assert!(is_reset(&mut right).await);
}

/// A network that takes nothing although it has room: kernel TLS without memory.
struct Stuck;

impl record_layer::RecordLayer for Stuck {
    const TLS: bool = true;
    fn outbound(
        &mut self,
        from: &TcpStream,
        batch: Batch,
        scratch: &mut Scratch,
    ) -> Result<record_layer::Outbound, record_layer::Fault> {
        Plain.outbound(from, batch, scratch)
    }
    fn inbound(
        &mut self,
        from: &TcpStream,
        batch: Batch,
        scratch: &mut Scratch,
    ) -> Result<record_layer::Inbound, record_layer::Fault> {
        Plain.inbound(from, batch, scratch)
    }
    fn seal(&mut self, _bytes: &[u8], _pending: &mut buffers::Pending) -> Result<(), record_layer::Fault> {
        Ok(())
    }

    fn write(&mut self, to: &TcpStream, bytes: &[u8]) -> std::io::Result<usize> {
        crate::relay::socket::write_unasked(to, bytes.len(), || Err(rustix::io::Errno::AGAIN))
    }
    fn send(
        &mut self,
        _: &TcpStream,
        _: record_layer::ControlRecord,
        _: &mut buffers::Pending,
    ) -> Result<bool, record_layer::Fault> {
        Ok(false)
    }
    fn needs_ticks(&self) -> bool {
        true
    }
}

/// No patience with what is stuck.
const IMPATIENT: Limits = Limits { idle: None, stall: Duration::from_millis(300) };

/// Checks that a relay which never gets a byte out is given up, and that its sockets are closed with it.
async fn given_up(own: TcpStream, network: TcpStream) -> Progress {
    let progress = Progress::default();
    let flow = async {
        Transfer::new(own, network, Stuck, Start::default()).run(&IMPATIENT, std::pin::pin!(pending()), &progress).await
    };
    assert_eq!(timeout(patience(5), flow).await.expect("given up"), CloseReason::Stalled);
    progress
}

#[tokio::test]
async fn one_direction_that_is_stuck_is_given_up_though_the_other_moves() {
    let (mut left, own) = program().await;
    let (network, mut right) = pair().await;
    left.write_all(b"never sent").await.unwrap();
    let trickle = tokio::spawn(async move {
        while right.write_all(b".").await.is_ok() {
            sleep(Duration::from_millis(50)).await;
        }
    });
    let progress = given_up(own, network).await;
    assert!(progress.received() > 2, "the other direction did not move");
    trickle.await.unwrap();
}

#[tokio::test]
async fn one_direction_that_is_stuck_is_given_up_though_the_other_never_rests() {
    let (mut left, own) = program().await;
    let (network, mut right) = pair().await;
    left.write_all(b"never sent").await.unwrap();
    let (mut read, _write) = left.into_split();
    let reading = tokio::spawn(async move { while read.read(&mut [0; 65_536]).await.is_ok_and(|taken| taken > 0) {} });
    let flood = tokio::spawn(async move { while right.write_all(&[7; 65_536]).await.is_ok() {} });
    let progress = given_up(own, network).await;
    assert!(progress.received() > 2, "the other direction did not move");
    flood.await.unwrap();
    reading.await.unwrap();
}

#[tokio::test]
async fn a_kernel_that_has_room_and_takes_nothing_is_given_up_and_a_slow_reader_is_not() {
    let limits = IMPATIENT;
    let (mut left, own) = program().await;
    let (network, _right) = pair().await;
    left.write_all(b"never sent").await.unwrap();
    given_up(own, network).await;
    assert!(is_reset(&mut left).await);

    let (left, own) = program().await;
    let (network, mut right) = pair().await;
    let relay = Relay::over(left, Pipe::plain(own, network).unwrap(), limits);
    let (mut read, mut write) = relay.application.into_split();
    let sending = tokio::spawn(async move {
        write.write_all(&noise(32 << 20, 1)).await.unwrap();
        write.shutdown().await.unwrap();
    });
    sleep(Duration::from_secs(3)).await;
    assert!(!relay.tally.is_finished(), "nobody reads, and that is their right");
    assert_eq!(read_to_end(&mut right).await.len(), 32 << 20);
    right.shutdown().await.unwrap();
    sending.await.unwrap();
    assert_eq!(read.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(relay.tally.await.unwrap().closed, CloseReason::Complete);
}
