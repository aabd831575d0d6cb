//! What a stock ztunnel asks for its certificate: Istio's certificate service, gRPC over HTTP/2 over TLS, in as little as
//! it takes. The request's headers are not even decoded: there is one method.
//!
//! *Invariant:* it signs whatever it is asked to, for the lab's own trust domain; it listens on loopback of a lab's host.

use super::Authority;
use crate::{Host, Terms};
use anyhow::{Context, ensure};
use rustls::ServerConfig;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;

/// Where it listens.
pub(super) const PORT: u16 = 15012;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
/// END_STREAM of DATA and HEADERS, ACK of SETTINGS and PING.
const END: u8 = 1;
const END_HEADERS: u8 = 4;

/// Serves on the host for as long as this program runs.
pub(super) fn serve(host: &Host, authority: &Authority) -> crate::Result<()> {
    let own = authority.mint.issue(&Terms { names: vec!["localhost".to_owned()], ..Terms::default() })?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(own.chain.clone(), own.key())?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let config = Arc::new(config);
    let listener = host.within(|| TcpListener::bind((Ipv4Addr::LOCALHOST, PORT)))?;
    let authority = authority.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (config, authority) = (config.clone(), authority.clone());
            std::thread::spawn(move || {
                // A proxy that ends closes it as it likes.
                let _ = converse(stream, config, &authority);
            });
        }
    });
    Ok(())
}

fn converse(stream: TcpStream, config: Arc<ServerConfig>, authority: &Authority) -> crate::Result<()> {
    let mut stream = rustls::StreamOwned::new(rustls::ServerConnection::new(config)?, stream);
    let mut preface = [0; 24];
    stream.read_exact(&mut preface)?;
    ensure!(preface.starts_with(b"PRI * HTTP/2.0"), "not HTTP/2");
    frame(&mut stream, SETTINGS, 0, 0, &[])?;
    let mut body = Vec::new();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head)?;
        let size = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let stream_number = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        let mut payload = vec![0; size];
        stream.read_exact(&mut payload)?;
        let ends = head[4] & END != 0;
        match head[3] {
            SETTINGS | PING if !ends => {
                frame(&mut stream, head[3], END, 0, if head[3] == PING { &payload } else { &[] })?
            }
            DATA => {
                body.extend_from_slice(&payload);
                if ends {
                    let answer = answer(&std::mem::take(&mut body), authority)?;
                    // :status 200 is in HPACK's static table.
                    let headers = [&[0x88][..], &literal("content-type", "application/grpc")].concat();
                    frame(&mut stream, HEADERS, END_HEADERS, stream_number, &headers)?;
                    frame(&mut stream, DATA, 0, stream_number, &answer)?;
                    frame(&mut stream, HEADERS, END_HEADERS | END, stream_number, &literal("grpc-status", "0"))?;
                }
            }
            _ => {}
        }
    }
}

fn frame(stream: &mut impl Write, kind: u8, flags: u8, number: u32, payload: &[u8]) -> crate::Result<()> {
    let size = u32::try_from(payload.len())?.to_be_bytes();
    let head = [&size[1..], &[kind, flags], &number.to_be_bytes()[..]].concat();
    stream.write_all(&[&head, payload].concat())?;
    Ok(stream.flush()?)
}

/// A header as HPACK's literal that nobody remembers.
fn literal(name: &str, value: &str) -> Vec<u8> {
    [&[0, name.len() as u8][..], name.as_bytes(), &[value.len() as u8], value.as_bytes()].concat()
}

/// A message of gRPC in, one out: `csr = 1` and `cert_chain = 1`.
fn answer(request: &[u8], authority: &Authority) -> crate::Result<Vec<u8>> {
    let request = text_of_first_field(request.get(5..).context("no message")?).context("no request in it")?;
    let mut message = Vec::new();
    for certificate in [authority.mint.sign(&request)?, authority.pem.clone()] {
        message.push(0x0a);
        let mut size = certificate.len();
        while size >= 0x80 {
            message.push(size as u8 | 0x80);
            size >>= 7;
        }
        message.push(size as u8);
        message.extend_from_slice(certificate.as_bytes());
    }
    let size = u32::try_from(message.len())?.to_be_bytes();
    Ok([&[0][..], &size, &message].concat())
}

fn text_of_first_field(message: &[u8]) -> Option<String> {
    let (&tag, mut rest) = message.split_first()?;
    let (mut size, mut shift) = (0_usize, 0);
    loop {
        let (&byte, after) = rest.split_first()?;
        rest = after;
        size |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 || shift > 28 {
            break;
        }
    }
    let text = rest.get(..size).filter(|_| tag == 0x0a)?;
    String::from_utf8(text.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_signed_with_the_names_it_asks_for() {
        let authority = Authority::found().unwrap();
        let mut params = rcgen::CertificateParams::default();
        let uri = "spiffe://cluster.local/ns/default/sa/client";
        params.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into().unwrap())];
        let csr = params.serialize_request(&rcgen::KeyPair::generate().unwrap()).unwrap().pem().unwrap();
        let size = csr.len();
        let field = [&[0x0a, size as u8 | 0x80, (size >> 7) as u8][..], csr.as_bytes(), &[0x18, 1]].concat();
        let request = [&[0_u8; 5][..], &field].concat();
        let answer = answer(&request, &authority).unwrap();
        let leaf = text_of_first_field(&answer[5..]).unwrap();
        assert!(leaf.starts_with("-----BEGIN CERTIFICATE-----"), "{leaf}");
        assert!(answer.windows(authority.pem.len()).any(|window| window == authority.pem.as_bytes()));
    }
}
