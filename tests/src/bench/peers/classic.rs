//! Proxies that are configured with two addresses and two certificates: haproxy, stunnel, nginx, ghostunnel.
//!
//! *Invariant:* a full handshake for every connection unless the peer is the variant that resumes sessions.

use super::{Absent, Site, Started};
use std::path::Path;

const NOTE_FULL: &str = "a full handshake for every connection";
const NOTE_RESUMED: &str = "sessions are resumed";

fn note(resumed: bool) -> &'static str {
    if resumed { NOTE_RESUMED } else { NOTE_FULL }
}

fn haproxy_head(site: &Site<'_>) -> String {
    format!(
        "global\n  nbthread {}\n  maxconn 4000\n  ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256\n  \
         ssl-default-server-ciphersuites TLS_AES_128_GCM_SHA256\n  ssl-default-bind-options ssl-min-ver TLSv1.3\n\
         defaults\n  mode tcp\n  timeout connect 20s\n  timeout client 1h\n  timeout server 1h\n  maxconn 4000\n",
        site.layout.cores
    )
}

fn haproxy_pair(
    site: &Site<'_>,
    program: &Path,
    first: (&str, &str),
    second: (&str, &str),
    note: &str,
) -> Result<Started, Absent> {
    let head = haproxy_head(site);
    let start = |host, bind: String, (bound, server): (&str, &str), to: String| {
        let text = format!("{head}listen relay\n  bind {bind} {bound}\n  server next {to} {server}\n");
        let config = site.lab.file(&format!("haproxy-{bind}.cfg"), text).display().to_string();
        site.proxy(host, program, &["-db", "-q", "-f", &config], &[])
    };
    let second = start(&site.lab.beta, site.second().to_string(), second, Site::behind().to_string())?;
    let first = start(&site.lab.alpha, site.first().to_string(), first, site.second().to_string())?;
    site.chain(first, second, note)
}

pub(super) fn haproxy_tcp(site: &Site<'_>, program: &Path) -> Result<Started, Absent> {
    haproxy_pair(site, program, ("", ""), ("", ""), "two plain relays, no TLS")
}

pub(super) fn haproxy(site: &Site<'_>, program: &Path, resumed: bool) -> Result<Started, Absent> {
    let (client, server) = (site.identity("client")?, site.identity("server")?);
    let reuse = if resumed { "" } else { "no-ssl-reuse" };
    let tickets = if resumed { "" } else { "no-tls-tickets" };
    let dial = format!(
        "ssl verify required verifyhost {} ca-file {} crt {} {reuse}",
        server.name,
        client.authority.display(),
        client.both.display()
    );
    let bind =
        format!("ssl verify required ca-file {} crt {} {tickets}", server.authority.display(), server.both.display());
    haproxy_pair(site, program, ("", &dial), (&bind, ""), note(resumed))
}

pub(super) fn stunnel(site: &Site<'_>, program: &Path, resumed: bool) -> Result<Started, Absent> {
    let start = |host, name: &str, text: String| -> crate::Result<_> {
        let identity = site.identity(name)?;
        let resume = if resumed { "yes" } else { "no" };
        let text = format!(
            "foreground = yes\npid =\ndebug = 3\nsocket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n[relay]\n{text}\
             cert = {}\nkey = {}\nCAfile = {}\nverifyChain = yes\nsslVersion = TLSv1.3\n\
             ciphersuites = TLS_AES_128_GCM_SHA256\nsessionResume = {resume}\n",
            identity.certificate.display(),
            identity.key.display(),
            identity.authority.display(),
        );
        let config = site.lab.file(&format!("stunnel-{name}.conf"), text).display().to_string();
        site.proxy(host, program, &[&config], &[])
    };
    let server = format!("accept = {}\nconnect = {}\n", site.second(), Site::behind());
    let client = format!("client = yes\naccept = {}\nconnect = {}\n", site.first(), site.second());
    let second = start(&site.lab.beta, "server", server)?;
    let first = start(&site.lab.alpha, "client", client)?;
    site.chain(first, second, note(resumed))
}

pub(super) fn nginx(site: &Site<'_>, program: &Path, resumed: bool) -> Result<Started, Absent> {
    let module = "/usr/lib/nginx/modules/ngx_stream_module.so";
    let module = if Path::new(module).exists() { format!("load_module {module};\n") } else { String::new() };
    let head = |name: &str| {
        format!(
            "{module}daemon off;\nuser root;\nworker_processes {};\n\n\
             pid {}/{name}.pid;\nerror_log stderr;\nevents {{ worker_connections 8000; }}\n",
            site.layout.cores,
            site.lab.directory().display(),
        )
    };
    let (client, server) = (site.identity("client")?, site.identity("server")?);
    let cipher = "TLS_AES_128_GCM_SHA256";
    let tickets =
        if resumed { "ssl_session_cache shared:tls:10m;" } else { "ssl_session_tickets off; ssl_session_cache off;" };
    let second = format!(
        "{}stream {{ server {{ listen {} ssl backlog=4096; proxy_pass {}; tcp_nodelay on; ssl_protocols TLSv1.3;\n\
         ssl_conf_command Ciphersuites {cipher}; ssl_certificate {}; ssl_certificate_key {};\n\
         ssl_client_certificate {}; ssl_verify_client on; {tickets} }} }}\n",
        head("server"),
        site.second(),
        Site::behind(),
        server.certificate.display(),
        server.key.display(),
        server.authority.display(),
    );
    let first = format!(
        "{}stream {{ server {{ listen {} backlog=4096; proxy_pass {}; tcp_nodelay on; proxy_ssl on;\n\
         proxy_ssl_protocols TLSv1.3; proxy_ssl_conf_command Ciphersuites {cipher}; proxy_ssl_certificate {};\n\
         proxy_ssl_certificate_key {}; proxy_ssl_session_reuse {}; proxy_ssl_trusted_certificate {};\n\
         proxy_ssl_verify on; proxy_ssl_name {}; }} }}\n",
        head("client"),
        site.first(),
        site.second(),
        client.certificate.display(),
        client.key.display(),
        if resumed { "on" } else { "off" },
        client.authority.display(),
        server.name,
    );
    let start = |host, name: &str, text: String| {
        let config = site.lab.file(&format!("nginx-{name}.conf"), text).display().to_string();
        site.proxy(host, program, &["-c", &config], &[])
    };
    let second = start(&site.lab.beta, "server", second)?;
    let first = start(&site.lab.alpha, "client", first)?;
    site.chain(first, second, note(resumed))
}

pub(super) fn ghostunnel(site: &Site<'_>, program: &Path) -> Result<Started, Absent> {
    let start = |host, name: &str, words: &[&str]| -> crate::Result<_> {
        let identity = site.identity(name)?;
        let files = [&identity.certificate, &identity.key, &identity.authority].map(|path| path.display().to_string());
        let common = ["--cert", &files[0], "--key", &files[1], "--cacert", &files[2], "--quiet=all"];
        site.proxy(host, program, &[words, &common].concat(), &[])
    };
    let (first, second, behind) = (site.first().to_string(), site.second().to_string(), Site::behind().to_string());
    let (client, server) = (crate::policy::id("client"), format!("server.{}", crate::policy::DOMAIN));
    let server_words = ["server", "--listen", &second, "--target", &behind, "--allow-uri", &client];
    let client_words = ["client", "--listen", &first, "--target", &second, "--override-server-name", &server];
    let second = start(&site.lab.beta, "server", &server_words)?;
    let first = start(&site.lab.alpha, "client", &client_words)?;
    site.chain(first, second, NOTE_FULL)
}
