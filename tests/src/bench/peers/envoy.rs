//! Envoy, as its PyPI wheel has it: a TCP proxy on each host with TLS between them.
//!
//! *Invariant:* a full handshake for every connection unless the peer is the variant that resumes sessions.

use super::{Absent, Identity, Site, Started};
use crate::policy::id;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;

pub(super) fn start(site: &Site<'_>, program: &Path, resumed: bool) -> Result<Started, Absent> {
    let (client, server) = (site.identity("client")?, site.identity("server")?);
    let downstream = json!({
        "name": "tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "require_client_certificate": true,
            "disable_stateless_session_resumption": !resumed,
            "disable_stateful_session_resumption": !resumed,
            "common_tls_context": common(&server, &id("client")),
        },
    });
    let upstream = json!({
        "name": "tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            // A TLS 1.3 session is used once: as many as there are connections on their way.
            "max_session_keys": if resumed { 100 } else { 0 },
            "sni": server.name,
            "common_tls_context": common(&client, &id("server")),
        },
    });
    let run = |host, name: &str, config: Value| {
        let config = site.lab.file(&format!("envoy-{name}.json"), config.to_string()).display().to_string();
        let threads = site.layout.cores.to_string();
        let words = ["-c", &config, "--concurrency", &threads, "--disable-hot-restart", "--log-level", "error"];
        site.proxy(host, program, &words, &[])
    };
    let second = run(&site.lab.beta, "server", relay(site.second(), Site::behind(), Some(downstream), None))?;
    let first = run(&site.lab.alpha, "client", relay(site.first(), site.second(), None, Some(upstream)))?;
    site.chain(first, second, if resumed { "sessions are resumed" } else { "a full handshake for every connection" })
}

fn common(identity: &Identity, peer: &str) -> Value {
    json!({
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "tls_certificates": [{
            "certificate_chain": { "filename": identity.certificate },
            "private_key": { "filename": identity.key },
        }],
        "validation_context": {
            "trusted_ca": { "filename": identity.authority },
            "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "exact": peer } }],
        },
    })
}

fn relay(at: SocketAddr, to: SocketAddr, taken: Option<Value>, dialled: Option<Value>) -> Value {
    let address =
        |of: SocketAddr| json!({ "socket_address": { "address": of.ip().to_string(), "port_value": of.port() } });
    let mut chain = json!({ "filters": [{
        "name": "relay",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "relay", "cluster": "next", "idle_timeout": "0s",
        },
    }] });
    let most = json!({ "thresholds": [{
        "max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000,
    }] });
    let mut cluster = json!({
        "name": "next", "type": "STATIC", "connect_timeout": "10s", "circuit_breakers": most,
        "load_assignment": {
            "cluster_name": "next",
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address(to) } }] }],
        },
    });
    if let Some(taken) = taken {
        chain["transport_socket"] = taken;
    }
    if let Some(dialled) = dialled {
        cluster["transport_socket"] = dialled;
    }
    json!({ "static_resources": {
        "listeners": [{ "name": "relay", "address": address(at), "tcp_backlog_size": 4096, "filter_chains": [chain] }],
        "clusters": [cluster],
    } })
}
