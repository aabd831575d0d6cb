//! Peers that break the rules: each gets the alert that the standard has for it, and the program gets a reset.

use super::*;

/// What the relay answers to these bytes, sent behind a good record, and the reason that it gives for its end.
async fn answer(prepare: impl FnOnce(&mut Peer) -> Vec<u8>) -> (Option<(u8, Vec<u8>)>, CloseReason) {
    let (mut relay, mut peer) = against_records().await;
    let mut bytes = peer.seal(23, b"good");
    bytes.extend(prepare(&mut peer));
    let _ = peer.socket.write_all(&bytes).await;
    let mut good = [0; 4];
    relay.application.read_exact(&mut good).await.unwrap();
    assert_eq!(&good, b"good", "what came before is delivered");
    let answer = peer.receive().await;
    assert!(is_reset(&mut relay.application).await, "the program sees a reset and not an end");
    let closed = timeout(patience(5), relay.tally).await.expect("it ends").unwrap().closed;
    (answer, closed)
}

async fn expect(violation: Violation, alert: u8, prepare: impl FnOnce(&mut Peer) -> Vec<u8>) {
    let (answer, closed) = answer(prepare).await;
    if in_kernel() && matches!(violation, Violation::UnexpectedRecord | Violation::RecordTooLong | Violation::BadMac) {
        // The kernel does not tell these apart as finely, and may have less to say to the peer.
        return assert!(matches!(closed, CloseReason::PeerViolation(_)), "{violation:?}: {closed}");
    }
    assert_eq!(closed, CloseReason::PeerViolation(violation));
    assert_eq!(answer, Some((21, vec![2, alert])), "{violation:?}");
}

#[tokio::test]
async fn a_record_that_was_tampered_with_is_not_delivered() {
    for at in [5, 20, 40] {
        expect(Violation::BadMac, 20, |peer| {
            let mut record = peer.seal(23, &[7; 40]);
            record[at] ^= 1;
            record
        })
        .await;
    }
    expect(Violation::BadMac, 20, |peer| {
        let _lost = peer.seal(23, b"never sent");
        peer.seal(23, b"out of order")
    })
    .await;
}

#[tokio::test]
async fn what_is_not_a_sealed_record_is_refused_at_its_first_byte() {
    for garbage in
        [&b"G"[..], b"HTTP/1.1 200 OK\r\n\r\n", &[22, 3, 3, 0, 1, 0], &[21, 3, 3, 0, 2, 2, 80], &[20, 3, 3, 0, 1, 1]]
    {
        if in_kernel() && garbage.len() < record::HEADER {
            // The kernel looks at whole headers only.
            continue;
        }
        expect(Violation::UnexpectedRecord, 10, |_| garbage.to_vec()).await;
    }
    expect(Violation::RecordTooLong, 22, |_| vec![23, 3, 3, 0x41, 1]).await;
    expect(Violation::UnexpectedRecord, 10, |peer| peer.seal(20, &[1])).await;
    expect(Violation::UnexpectedRecord, 10, |peer| peer.seal(0, &[0; 30])).await;
    expect(Violation::BadMac, 20, |_| vec![23, 3, 3, 0, 3, 1, 2, 3]).await;
}

#[tokio::test]
async fn what_is_not_a_record_is_noticed_by_a_relay_at_rest() {
    for garbage in [&b"HTTP/1.1 200 OK\r\n\r\n"[..], &[23, 3, 3, 0xff, 0xff, 0, 0, 0]] {
        let (mut relay, mut peer) = against_records().await;
        peer.send(23, b"good").await;
        relay.application.read_exact(&mut [0; 4]).await.unwrap();
        // Nothing is under way, so nothing but the socket itself can wake it.
        sleep(Duration::from_millis(300)).await;
        peer.socket.write_all(garbage).await.unwrap();
        let closed = timeout(patience(5), relay.tally).await.expect("it is noticed").unwrap().closed;
        assert!(matches!(closed, CloseReason::PeerViolation(_)), "{closed}");
        assert!(is_reset(&mut relay.application).await);
    }
}

#[tokio::test]
async fn messages_that_have_no_place_after_the_handshake_are_refused() {
    expect(Violation::UnexpectedMessage, 10, |peer| peer.seal(22, &[13, 0, 0, 0])).await;
    expect(Violation::UnexpectedMessage, 10, |peer| peer.seal(22, &[])).await;
    expect(Violation::UnexpectedMessage, 10, |peer| {
        let mut records = peer.seal(22, &[4, 0, 0, 9, 1]);
        records.extend(peer.seal(23, b"in between"));
        records
    })
    .await;
    expect(Violation::IllegalValue, 47, |peer| peer.seal(22, &[24, 0, 0, 1, 7])).await;
    expect(Violation::Malformed, 50, |peer| peer.seal(22, &[24, 0, 0, 2, 0, 0])).await;
    expect(Violation::Malformed, 50, |peer| peer.seal(21, &[2])).await;
}

#[tokio::test]
async fn floods_of_nothing_come_to_an_end() {
    if !in_kernel() {
        // The kernel swallows these by itself.
        expect(Violation::Flood, 10, |peer| (0..100).flat_map(|_| peer.seal(23, b"")).collect()).await;
    }
    expect(Violation::Flood, 10, |peer| (0..10).flat_map(|_| peer.seal(21, &[1, 90])).collect()).await;
    expect(Violation::Flood, 10, |peer| {
        let ticket = [&[4, 0, 0x20, 0][..], &[0; 0x2000]].concat();
        (0..40).flat_map(|_| peer.seal(22, &ticket)).collect()
    })
    .await;
    if !takes_fresh_keys() {
        return;
    }
    let (mut relay, mut peer) = against_records().await;
    for _ in 0..100 {
        peer.send(22, &[24, 0, 0, 1, 1]).await;
        let traffic = peer.secrets.next_transmit().unwrap();
        peer.sealer = Sealer::new(&traffic).unwrap();
    }
    assert!(is_reset(&mut relay.application).await);
    assert_eq!(relay.closed().await.closed, CloseReason::PeerViolation(Violation::Flood));
}

#[tokio::test]
async fn padded_empty_and_tiny_records_are_data_like_any_other() {
    let (mut relay, mut peer) = against_records().await;
    let mut bytes = Vec::new();
    for letter in b'a'..=b'z' {
        bytes.extend(peer.seal(23, b""));
        // Type 0 with zeroes behind the true type is padding.
        bytes.extend(peer.seal(0, &[&[letter, 23][..], &[0; 200]].concat()));
    }
    bytes.extend(peer.seal(22, &[&[4, 0, 0, 100][..], &[1; 100]].concat()));
    for length in 1..100 {
        bytes.extend(peer.seal(23, &vec![b'.'; length]));
    }
    bytes.extend(peer.seal(23, &[b'!'; record::MAX_PLAINTEXT]));
    bytes.extend(peer.seal(21, &[1, 0]));
    // One byte at a time for a while, then the rest.
    let (slow, rest) = bytes.split_at(600);
    let (slow, rest) = (slow.to_vec(), rest.to_vec());
    let sending = tokio::spawn(async move {
        for byte in slow {
            peer.socket.write_all(&[byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        peer.socket.write_all(&rest).await.unwrap();
        peer
    });
    let received = read_to_end(&mut relay.application).await;
    let mut expected: Vec<u8> = (b'a'..=b'z').collect();
    expected.extend(vec![b'.'; (1..100).sum()]);
    expected.extend([b'!'; record::MAX_PLAINTEXT]);
    assert!(received == expected);
    let mut peer = sending.await.unwrap();
    relay.application.shutdown().await.unwrap();
    assert_eq!(peer.receive().await, Some((21, vec![1, 0])), "the other half is still ours to close");
    assert_eq!(peer.receive().await, None);
    assert_eq!(relay.closed().await.closed, CloseReason::Complete);
}

#[tokio::test]
async fn an_end_without_close_notify_is_a_cut_and_not_an_end() {
    for half_a_record in [false, true] {
        let (mut relay, mut peer) = against_records().await;
        peer.send(23, b"part of it").await;
        if half_a_record {
            let record = peer.seal(23, b"never whole");
            peer.socket.write_all(&record[..10]).await.unwrap();
        }
        relay.application.read_exact(&mut [0; 10]).await.unwrap();
        peer.socket.shutdown().await.unwrap();
        assert!(is_reset(&mut relay.application).await);
        assert_eq!(relay.closed().await.closed, CloseReason::PeerTruncated);
    }
}

#[tokio::test]
async fn an_alert_of_the_peer_ends_it_by_name() {
    let (answered, closed) = answer(|peer| peer.seal(21, &[2, 80])).await;
    assert_eq!((answered, closed), (None, CloseReason::PeerAlert(80)));
    assert_eq!(closed.code(), "peer-alert:internal_error");
    let (_, closed) = answer(|peer| peer.seal(21, &[1, 42])).await;
    assert_eq!(closed, CloseReason::PeerAlert(42), "behind data it is no refusal of the certificate any more");
}

#[tokio::test]
async fn what_comes_behind_close_notify_is_ignored_and_does_not_spoil_our_own_end() {
    let (mut relay, mut peer) = against_records().await;
    peer.send(21, &[1, 0]).await;
    peer.send(23, b"too late").await;
    if !in_kernel() {
        // The kernel gives a connection up as soon as bytes arrive that cannot be a record.
        let _ = peer.socket.write_all(&[0xff; 5000]).await;
    }
    assert_eq!(read_to_end(&mut relay.application).await, b"");
    let last = noise(500_000, 9);
    let expected = last.clone();
    let sending = tokio::spawn(async move {
        relay.application.write_all(&last).await.unwrap();
        relay.application.shutdown().await.unwrap();
        relay
    });
    let mut received = Vec::new();
    while let Some((23, body)) = peer.receive().await {
        received.extend(body);
    }
    assert!(received == expected, "everything arrives, no reset overtakes it");
    assert_eq!(sending.await.unwrap().closed().await.closed, CloseReason::Complete);
}

#[tokio::test]
async fn a_key_update_is_followed_and_answered_before_the_next_data() {
    if !takes_fresh_keys() {
        let (_, closed) = answer(|peer| peer.seal(22, &[24, 0, 0, 1, 1])).await;
        return assert_eq!(closed, CloseReason::RekeyImpossible);
    }
    let (mut relay, mut peer) = against_records().await;
    for round in 0..5_u8 {
        peer.send(22, &[24, 0, 0, 1, 1]).await;
        let traffic = peer.secrets.next_transmit().unwrap();
        peer.sealer = Sealer::new(&traffic).unwrap();
        peer.send(23, &[round; 3]).await;
        let mut three = [0; 3];
        relay.application.read_exact(&mut three).await.unwrap();
        assert_eq!(three, [round; 3]);
        relay.application.write_all(b"answer").await.unwrap();
        assert_eq!(peer.receive().await, Some((22, vec![24, 0, 0, 1, 0])), "not asking back");
        let traffic = peer.secrets.next_receive().unwrap();
        peer.opener = Opener::new(&traffic).unwrap();
        assert_eq!(peer.receive().await, Some((23, b"answer".to_vec())));
    }
}
