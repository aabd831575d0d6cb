use super::{
    testing::{CURL, WEB, World, pair, program, terms},
    *,
};
use crate::flow::Direction;
use bunter_identity::refusal::{Culprit, Refusal};
use rustls::{
    AlertDescription, CipherSuite, ClientConnection, NamedGroup, ServerConnection,
    server::Acceptor,
    version::{TLS12, TLS13},
};
use std::{
    io::{Read, Write},
    time::Duration,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn both_ends_know_each_other_and_what_was_agreed() {
    let sessions = World::new().sessions(Ciphers::All).await;
    for (accepted, peer) in [(sessions.client.accepted(), WEB), (&sessions.server, CURL)] {
        assert_eq!(accepted.peer().id.as_str(), peer);
        assert_eq!(&*accepted.rule().name, "test");
        assert_eq!(accepted.group(), "X25519MLKEM768");
        assert_eq!(accepted.cipher(), "TLS_AES_128_GCM_SHA256");
    }
}

#[tokio::test]
async fn a_host_that_cannot_take_fresh_keys_agrees_on_chacha_alone() {
    let sessions = World::new().sessions(Ciphers::ChaChaOnly).await;
    assert_eq!(sessions.client.accepted().cipher(), "TLS_CHACHA20_POLY1305_SHA256");
}

/// What `accept` says of a client that behaves as `client` does, and what that client saw.
async fn accepting<T: Send + 'static>(client: impl FnOnce(std::net::TcpStream) -> T + Send + 'static) -> (Summary, T) {
    let world = World::new();
    let (theirs, ours) = pair().await;
    let theirs = theirs.into_std().unwrap();
    theirs.set_nonblocking(false).unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let client = tokio::task::spawn_blocking(move || client(theirs));
    let permit = world.permit(Direction::Inbound, ours, WEB, CURL);
    let mut terms = terms(Ciphers::All);
    terms.deadline = Instant::now() + Duration::from_secs(1);
    let error = world.accept(permit, terms).await.err().expect("nobody may get in here");
    assert!(error.permit().parties().flow.socket.local_addr().is_ok(), "the flow is given back");
    assert!(!error.to_string().is_empty());
    let (summary, permit) = (Summary { code: error.code(), culprit: error.culprit() }, error.into_parts().1);
    // The socket goes with the permit, as in the pipeline.
    drop(permit);
    (summary, client.await.unwrap())
}

struct Summary {
    code: &'static str,
    culprit: Culprit,
}

impl Summary {
    fn code(&self) -> &'static str {
        self.code
    }
    fn culprit(&self) -> Culprit {
        self.culprit
    }
}

fn foreign_client(config: rustls::ClientConfig, socket: std::net::TcpStream) -> Result<(), std::io::Error> {
    let mut socket = socket;
    let mut tls = ClientConnection::new(Arc::new(config), "web.example.org".try_into().unwrap()).unwrap();
    while tls.is_handshaking() {
        tls.complete_io(&mut socket)?;
    }
    // In TLS 1.3 the server's judgement arrives after the client has finished.
    let mut byte = [0];
    rustls::Stream::new(&mut tls, &mut socket).read_exact(&mut byte)
}

fn alert_of(seen: Result<(), std::io::Error>) -> AlertDescription {
    let error = seen.unwrap_err();
    match error.get_ref().and_then(|error| error.downcast_ref()) {
        Some(rustls::Error::AlertReceived(alert)) => *alert,
        other => panic!("{error}: {other:?}"),
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_told_that_one_is_required() {
    let (error, seen) = accepting(|socket| foreign_client(World::new().foreign_client(None), socket)).await;
    assert_eq!((error.code(), error.culprit()), ("peer-no-certificate", Culprit::Peer));
    assert_eq!(alert_of(seen), AlertDescription::CertificateRequired);
}

#[tokio::test]
async fn a_client_of_a_strange_authority_is_told_that_it_is_not_known() {
    let (error, seen) = accepting(|socket| foreign_client(World::new().foreign_client(Some(CURL)), socket)).await;
    assert_eq!(error.code(), "peer-untrusted");
    assert_eq!(alert_of(seen), AlertDescription::UnknownCA);
}

#[tokio::test]
async fn a_client_that_speaks_tls_1_2_is_told_which_version_it_takes() {
    let (error, seen) = accepting(|socket| {
        let mut config = World::new().foreign_client(Some(CURL));
        config = {
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let builder = rustls::ClientConfig::builder_with_provider(provider);
            let builder = builder.with_protocol_versions(&[&TLS12]).unwrap();
            let mut only = builder.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
            only.client_auth_cert_resolver = config.client_auth_cert_resolver.clone();
            only
        };
        foreign_client(config, socket)
    })
    .await;
    assert_eq!(error.code(), "peer-tls-version");
    assert_eq!(alert_of(seen), AlertDescription::ProtocolVersion);
}

#[tokio::test]
async fn a_good_certificate_that_no_rule_admits_is_denied_by_name() {
    let world = World::new();
    let (client_end, server_end) = pair().await;
    let (_application, own) = program().await;
    let client = world.permit(Direction::Outbound, own, "spiffe://example.org/stranger", WEB);
    let server = world.permit(Direction::Inbound, server_end, WEB, CURL);
    let (client, server) =
        tokio::join!(world.connect(client, client_end, terms(Ciphers::All)), world.accept(server, terms(Ciphers::All)));
    assert!(client.is_ok(), "the client learns it afterwards, from whoever carries its records");
    let error = server.err().unwrap();
    assert_eq!((error.code(), error.culprit()), ("peer-not-permitted", Culprit::Policy));
    assert_eq!(error.peer().unwrap().as_str(), "spiffe://example.org/stranger");

    // The other way round the server is told in the handshake.
    let (client_end, server_end) = pair().await;
    let (_application, own) = program().await;
    let client = world.permit(Direction::Outbound, own, CURL, "spiffe://example.org/other");
    let server = world.permit(Direction::Inbound, server_end, WEB, CURL);
    let (client, server) =
        tokio::join!(world.connect(client, client_end, terms(Ciphers::All)), world.accept(server, terms(Ciphers::All)));
    assert_eq!(client.err().unwrap().code(), "peer-not-permitted");
    assert_eq!(server.err().unwrap().code(), "peer-alert:access_denied");
}

#[tokio::test]
async fn whatever_is_not_tls_gets_an_alert_and_a_name() {
    let rows: [(&[u8], &str, &[u8]); 6] = [
        (b"GET / HTTP/1.1\r\n\r\n", "peer-not-tls", &[21, 3, 3, 0, 2, 2, 10]),
        (b"\0", "peer-not-tls", &[21, 3, 3, 0, 2, 2, 10]),
        (&[22, 9, 9, 0, 5, 1, 2, 3, 4, 5], "peer-not-tls", &[21, 3, 3, 0, 2, 2, 10]),
        (&[22, 3, 1, 0xff, 0xff, 1], "peer-record-too-long", &[21, 3, 3, 0, 2, 2, 22]),
        // A handshake message of 16 MiB, announced in a good record.
        (&[22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff], "peer-tls-protocol", &[21, 3, 3, 0, 2, 2, 50]),
        // Application data before any key.
        (&[23, 3, 3, 0, 1, 9], "peer-tls-protocol", &[21, 3, 3, 0, 2, 2, 10]),
    ];
    for (sent, code, answer) in rows {
        let (error, seen) = accepting(move |mut socket| {
            socket.write_all(sent).unwrap();
            let mut seen = Vec::new();
            let _ = socket.read_to_end(&mut seen);
            seen
        })
        .await;
        assert_eq!(error.code(), code, "{sent:?}");
        assert_eq!(error.culprit(), Culprit::Peer);
        assert_eq!(seen.get(..5), answer.get(..5), "{sent:?}: an alert");
        assert_eq!(seen.last(), answer.last(), "{sent:?}");
    }
}

#[tokio::test]
async fn silence_a_dribble_and_a_close_have_names_of_their_own() {
    let (error, ()) = accepting(|socket| {
        std::thread::sleep(Duration::from_millis(1500));
        drop(socket);
    })
    .await;
    assert_eq!(error.code(), "peer-stalled");
    let (error, ()) = accepting(|mut socket| {
        for byte in [22, 3, 1, 2, 0, 1] {
            let _ = socket.write_all(&[byte]);
            std::thread::sleep(Duration::from_millis(300));
        }
    })
    .await;
    assert_eq!(error.code(), "peer-stalled");
    let (error, ()) = accepting(drop).await;
    assert_eq!(error.code(), "peer-closed");
}

#[tokio::test]
async fn a_client_shows_neither_a_server_name_nor_protocols_and_prefers_what_it_should() {
    let world = World::new();
    let (client_end, server_end) = pair().await;
    let (_application, own) = program().await;
    let permit = world.permit(Direction::Outbound, own, CURL, WEB);
    let hello = tokio::task::spawn_blocking(move || {
        let mut socket = server_end.into_std().unwrap();
        socket.set_nonblocking(false).unwrap();
        let mut acceptor = Acceptor::default();
        loop {
            acceptor.read_tls(&mut socket).unwrap();
            if let Some(accepted) = acceptor.accept().map_err(|(error, _)| error).unwrap() {
                let hello = accepted.client_hello();
                return (
                    hello.server_name().map(str::to_owned),
                    hello.alpn().is_some(),
                    hello.cipher_suites().to_vec(),
                    hello.named_groups().unwrap().to_vec(),
                );
            }
        }
    });
    let (error, hello) = tokio::join!(world.connect(permit, client_end, terms(Ciphers::All)), hello);
    assert_eq!(error.err().unwrap().code(), "peer-closed");
    let (name, protocols, suites, groups) = hello.unwrap();
    assert_eq!((name, protocols), (None, false));
    assert_eq!(
        suites.first_chunk::<3>().unwrap(),
        &[
            CipherSuite::TLS13_AES_128_GCM_SHA256,
            CipherSuite::TLS13_AES_256_GCM_SHA384,
            CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
        ]
    );
    assert_eq!(groups, [NamedGroup::X25519MLKEM768, NamedGroup::X25519, NamedGroup::secp256r1, NamedGroup::secp384r1]);
}

#[tokio::test]
async fn an_offer_of_protocols_is_ignored_and_no_ticket_is_given() {
    let world = World::new();
    let (client_end, server_end) = pair().await;
    let mut config = world.foreign_client(Some(CURL));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.enable_early_data = true;
    let client = tokio::task::spawn_blocking(move || {
        let mut socket = client_end.into_std().unwrap();
        socket.set_nonblocking(false).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let mut tls = ClientConnection::new(Arc::new(config), "web.example.org".try_into().unwrap()).unwrap();
        while tls.is_handshaking() {
            tls.complete_io(&mut socket).unwrap();
        }
        let nothing_more = tls.read_tls(&mut socket).is_err();
        (tls.alpn_protocol().map(<[u8]>::to_vec), tls.protocol_version(), tls.tls13_tickets_received(), nothing_more)
    });
    let session = world.accept(world.permit(Direction::Inbound, server_end, WEB, CURL), terms(Ciphers::All)).await;
    assert!(session.is_ok());
    assert_eq!(client.await.unwrap(), (None, Some(TLS13.version), 0, true));
}

#[tokio::test]
async fn a_server_of_another_name_is_refused_whatever_its_address() {
    let world = World::new();
    let (client_end, server_end) = pair().await;
    let (_application, own) = program().await;
    let config = Arc::new(world.foreign_server("spiffe://example.org/impostor"));
    let server = tokio::task::spawn_blocking(move || {
        let mut socket = server_end.into_std().unwrap();
        socket.set_nonblocking(false).unwrap();
        let mut tls = ServerConnection::new(config).unwrap();
        loop {
            if let Err(error) = tls.complete_io(&mut socket) {
                return error.to_string();
            }
        }
    });
    let permit = world.permit(Direction::Outbound, own, CURL, WEB);
    let error = world.connect(permit, client_end, terms(Ciphers::All)).await.err().unwrap();
    assert_eq!(error.code(), "peer-not-permitted");
    assert!(server.await.unwrap().contains("AccessDenied"));
}

#[tokio::test]
async fn the_first_byte_tells_tls_from_plaintext_and_stays_where_it_is() {
    for (sent, expected) in [(&[22, 3, 1][..], true), (b"GET", false), (b"\x80", false)] {
        let (mut client, mut server) = pair().await;
        client.write_all(sent).await.unwrap();
        assert_eq!(looks_like_tls(&server, Duration::from_secs(5)).await.unwrap(), expected, "{sent:?}");
        let mut read = vec![0; sent.len()];
        server.read_exact(&mut read).await.unwrap();
        assert_eq!(read, sent);
    }
    let (client, server) = pair().await;
    assert!(!looks_like_tls(&server, Duration::from_millis(50)).await.unwrap(), "silence: the server speaks first");
    drop(client);
    assert!(!looks_like_tls(&server, Duration::from_secs(5)).await.unwrap(), "closed");
}
