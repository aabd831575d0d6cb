//! Peers that take connections as programs make them: WireGuard, ztunnel, Bunter.
//!
//! *Invariant:* the client connects to the server's own address.

use super::{Absent, Site, Started, ca};
use crate::enter::Place;
use crate::policy::PORT;
use crate::program::{Outcome, Program};
use crate::{Agent, Host, Policy, Settings, clock, skip};
use anyhow::ensure;
use std::path::Path;

/// Port on which ztunnel takes what is redirected to it.
const ZTUNNEL_OUTBOUND: u16 = 15001;
/// Port on which ztunnel takes what comes from another one.
const ZTUNNEL_INBOUND: u16 = 15008;

/// The two agents, with one engine.
pub(super) fn bunter(site: &Site<'_>, engine: &str, fresh: bool, lines: &str) -> Result<Started, Absent> {
    let lab = site.lab;
    let binary = skip::bunter()?;
    if engine == "kernel" {
        let mut doctor = std::process::Command::new(&binary);
        let said = doctor.arg("doctor").output().map(|output| String::from_utf8_lossy(&output.stdout).into_owned())?;
        let line = said.lines().find(|line| line.starts_with("engine kernel: "));
        let line = line.unwrap_or("nothing of engine kernel");
        if !line.starts_with("engine kernel: possible") {
            return Err(Absent::Skipped(format!("bunter doctor says {line}")));
        }
    }
    let settings = Settings {
        engine: engine.to_owned(),
        top: format!("cgroup = \"{}\"\n{lines}", lab.cgroup_path()),
        tables: if fresh { "[sessions]\nreuse = false\n".to_owned() } else { String::new() },
        ..Settings::default()
    };
    let policy = Policy::standard(lab);
    if fresh {
        let agent = Agent::prepare(lab, &lab.alpha, &policy, &settings)?;
        if !agent.command(&["check"])?.status.success() {
            return Err(Absent::Skipped("this agent has no key [sessions] reuse".to_owned()));
        }
    }
    let mesh = lab.only_mesh_with(&policy, &settings)?;
    let running = mesh.alpha().status()["agent"]["engine"].clone();
    if running != engine {
        return Err(anyhow::anyhow!("the agent runs engine {running}").into());
    }
    let sessions = if fresh { "a full handshake for every connection" } else { "the agent's defaults" };
    let said: Vec<&str> = std::iter::once("audit log on").chain(lines.lines()).collect();
    Ok(Started {
        to: lab.beta.at(PORT),
        proxies: ["agent-alpha", "agent-beta"],
        kept: vec![Box::new(mesh)],
        note: format!("engine {engine}, {sessions}, {}", said.join(", ")),
    })
}

/// Runs a short program on a host.
fn on(site: &Site<'_>, host: &Host, program: &Path, words: &[&str]) -> crate::Result<Outcome> {
    let place = Place { netns: Some(host.netns.clone()), ..Place::default() };
    let mut command = site.lab.command_in(place, program);
    command.args(words);
    let outcome = Program::start(command, program.display().to_string())?.wait(clock::seconds(20))?;
    ensure!(outcome.status.success(), "{} {words:?}: {}", program.display(), outcome.stderr.trim());
    Ok(outcome)
}

/// A ztunnel on each host, in its dedicated mode, with workloads from a file, its certificate from the lab's authority,
/// and the client's connections redirected to it by nftables, as in a pod.
pub(super) fn ztunnel(site: &Site<'_>, program: &Path, pooled: bool) -> Result<Started, Absent> {
    let lab = site.lab;
    let nft = skip::need("nft")?;
    let rules = format!(
        "table ip lab {{\n  chain out {{\n    type nat hook output priority -100;\n    \
         ip daddr {} tcp dport {PORT} redirect to :{ZTUNNEL_OUTBOUND}\n  }}\n}}\n",
        lab.beta.v4
    );
    let rules = lab.file("redirect.nft", rules).display().to_string();
    on(site, &lab.alpha, &nft, &["-f", &rules])?;
    // The connections that are over must not fill the kernel's table of those it has redirected.
    let _ = lab.alpha.sysctl("net/netfilter/nf_conntrack_tcp_timeout_time_wait", "1");
    let workload = |name: &str, host: &Host| {
        format!(
            "- uid: lab//v1/Pod/default/{name}\n  name: {name}\n  namespace: default\n  serviceAccount: {name}\n  \
             workloadIps: [\"{}\"]\n  protocol: HBONE\n  node: {name}\n  network: \"\"\n  services: {{}}\n",
            host.v4
        )
    };
    let text = format!("workloads:\n{}{}", workload("client", &lab.alpha), workload("server", &lab.beta));
    let workloads = lab.file("ztunnel.yaml", text).display().to_string();
    let authority = lab.file("ztunnel-authority.pem", &site.authority.pem).display().to_string();
    let address = format!("https://localhost:{}", ca::PORT);
    let threads = site.layout.cores.to_string();
    let start = |host: &Host, name: &str| -> crate::Result<Program> {
        ca::serve(host, site.authority)?;
        let who = format!("default/{name}/{name}");
        let mut environment = vec![
            ("PROXY_MODE", "dedicated"),
            ("PROXY_WORKLOAD_INFO", &who),
            ("LOCAL_XDS_PATH", &workloads),
            ("XDS_ADDRESS", ""),
            ("CA_ADDRESS", &address),
            ("CA_ROOT_CA", &authority),
            ("CLUSTER_ID", "Kubernetes"),
            ("NODE_NAME", name),
            ("ENABLE_ORIG_SRC", "false"),
            ("ZTUNNEL_WORKER_THREADS", &threads),
        ];
        if !pooled {
            environment.push(("POOL_MAX_STREAMS_PER_CONNECTION", "1"));
        }
        site.proxy(host, program, &[], &environment)
    };
    let mut second = start(&lab.beta, "server")?;
    let mut first = start(&lab.alpha, "client")?;
    for (host, port, proxy) in [(&lab.beta, ZTUNNEL_INBOUND, &mut second), (&lab.alpha, ZTUNNEL_OUTBOUND, &mut first)] {
        let listens = clock::until(clock::seconds(20), || {
            let there = host.within(|| std::net::TcpStream::connect((std::net::Ipv4Addr::LOCALHOST, port)).is_ok());
            (there || proxy.ended()).then_some(there)
        });
        if listens != Some(true) {
            return Err(anyhow::anyhow!("does not listen on port {port}: {}", site.log(host)).into());
        }
    }
    let pool = if pooled { "pooled as it is by default" } else { "one connection for each stream" };
    Ok(Started {
        to: lab.beta.at(PORT),
        proxies: ["proxy-alpha", "proxy-beta"],
        kept: vec![Box::new(first), Box::new(second)],
        note: format!("dedicated mode, redirected by nftables, {pool}, its log of connections on"),
    })
}

/// A tunnel between the hosts. Its cryptography is the kernel's: there are no proxies whose processor time could be read.
pub(super) fn wireguard(site: &Site<'_>) -> Result<Started, Absent> {
    let (lab, ip) = (site.lab, skip::need("ip")?);
    let hosts = [(&lab.alpha, "10.78.0.1"), (&lab.beta, "10.78.0.2")];
    for (host, _) in hosts {
        if let Err(error) = on(site, host, &ip, &["link", "add", "wg0", "type", "wireguard"]) {
            return Err(Absent::Skipped(format!("the kernel has no WireGuard: {error}")));
        }
    }
    let wg = skip::need("wg")?;
    let mut keys = Vec::new();
    for (host, _) in hosts {
        let key = on(site, host, &wg, &["genkey"])?.stdout;
        let file = lab.file(&format!("wireguard-{}.key", host.name), key).display().to_string();
        on(site, host, &wg, &["set", "wg0", "listen-port", "51820", "private-key", &file])?;
        keys.push(on(site, host, &wg, &["show", "wg0", "public-key"])?.stdout.trim().to_owned());
    }
    for (number, (host, address)) in hosts.into_iter().enumerate() {
        let (other, other_address) = hosts[1 - number];
        let (allowed, endpoint) = (format!("{other_address}/32"), format!("{}:51820", other.v4));
        let peer = ["set", "wg0", "peer", &keys[1 - number], "allowed-ips", &allowed, "endpoint", &endpoint];
        on(site, host, &wg, &peer)?;
        on(site, host, &ip, &["addr", "add", &format!("{address}/24"), "dev", "wg0"])?;
        on(site, host, &ip, &["link", "set", "wg0", "up"])?;
    }
    Ok(Started {
        to: std::net::SocketAddr::from(([10, 78, 0, 2], PORT)),
        proxies: ["proxy-alpha", "proxy-beta"],
        kept: Vec::new(),
        note: "in the kernel: no processes whose processor time or memory could be read".to_owned(),
    })
}
