//! What is shown of the demo: its claims, two answers side by side, a line of an audit log in short.
//!
//! *Invariant:* a claim that does not hold is an error, never a line on the screen.

use crate::run::Fallible;
use crate::wire;

pub(super) fn title(text: &str) {
    println!("\n{}", bold(text));
}

pub(super) const BOLD: &str = "\x1b[1m";
pub(super) const NORMAL: &str = "\x1b[0m";

pub(super) fn bold(text: &str) -> String {
    if terminal() { format!("{BOLD}{text}{NORMAL}") } else { text.to_owned() }
}

pub(super) fn terminal() -> bool {
    use std::io::IsTerminal;
    std::io::stdout().is_terminal()
}

/// One claim of the demo.
pub(super) fn expect(holds: bool, claim: &str, otherwise: &str) -> Fallible {
    if holds {
        println!("   ok: {claim}");
        return Ok(());
    }
    Err(format!("NOT so: {claim}\n  {}", otherwise.trim()).into())
}

/// The end of nginx's answer as the wire had it, twice.
pub(super) fn side_by_side(plain: &[u8], sealed: &[u8]) {
    let answer =
        |file: &[u8]| wire::streams(file).into_iter().rfind(|stream| stream.from == 80 && !stream.bytes.is_empty());
    let end = |bytes: &[u8]| bytes[bytes.len().saturating_sub(48)..].to_vec();
    let left = answer(plain).map(|stream| end(&stream.bytes)).unwrap_or_default();
    // The record that carries the answer is the longest after the handshake's; alerts and tickets are shorter.
    let record = answer(sealed).and_then(|stream| {
        let records = wire::records(&stream.bytes)?;
        records.iter().rev().find(|record| record.len() > 200).map(|record| end(record))
    });
    let right = record.unwrap_or_default();
    println!("\n   {:<38}the same with Bunter:", "the end of nginx's answer, without:");
    for (left, right) in wire::dump(&left).iter().zip(wire::dump(&right)) {
        println!("   {left:<38}{right}");
    }
}

/// The parts of an audit line that a screen has room for.
pub(super) fn summary(line: &str) -> String {
    let field = |key: &str| text_of(line, key).unwrap_or_default();
    let part = |name: &str, key: &str| {
        let inner =
            line.split_once(&format!("\"{name}\":{{")).map_or("", |(_, rest)| rest.split('}').next().unwrap_or(""));
        text_of(inner, key).unwrap_or_default()
    };
    let who = |name: &str| {
        let id = part(name, "id");
        if id.is_empty() { part(name, "address") } else { id.replace("spiffe://example.org/", "") }
    };
    let mut words = vec![field("decision"), format!("{} > {}", who("source"), who("destination"))];
    if field("decision") == "allowed" {
        words.extend([field("method"), part("tls", "group"), part("tls", "cipher")]);
        words.extend([format!("engine {}", field("engine")), format!("rule {}", field("rule"))]);
    } else {
        words.extend([field("code"), field("reason")]);
    }
    words.retain(|word| !word.is_empty());
    words.join(", ")
}

fn text_of(line: &str, key: &str) -> Option<String> {
    Some(line.split_once(&format!("\"{key}\":\""))?.1.split('"').next()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::summary;

    #[test]
    fn an_audit_line_is_summed_up_with_both_identities() {
        let line = r#"{"time":"2026-11-22T05:00:00Z","flow":1,"decision":"allowed","source":{"id":"spiffe://example.org/curl","address":"10.77.0.1:1"},"destination":{"id":"spiffe://example.org/web","address":"10.77.0.2:80"},"method":"mtls","tls":{"group":"X25519MLKEM768","cipher":"TLS13_AES_128_GCM_SHA256"},"engine":"user","rule":"curl-to-web","code":"closed"}"#;
        let words = summary(line);
        assert_eq!(
            words,
            "allowed, curl > web, mtls, X25519MLKEM768, TLS13_AES_128_GCM_SHA256, engine user, rule curl-to-web"
        );
    }

    #[test]
    fn a_refusal_is_summed_up_with_its_reason() {
        let line = r#"{"decision":"denied","source":{"address":"10.77.0.1:1"},"destination":{"address":"10.77.0.2:80"},"code":"no-identity","reason":"no entry"}"#;
        assert_eq!(summary(line), "denied, 10.77.0.1:1 > 10.77.0.2:80, no-identity, no entry");
    }
}
