//! A host: a network namespace with an address of each family on the shared link.
//!
//! *Invariant:* nothing here touches the namespace that the tests were started in.

use crate::{enter, janitor, skip::Skip};
use anyhow::Context;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A network namespace that plays a host.
#[derive(Debug)]
pub struct Host {
    /// `alpha`, `beta` or `stranger`.
    pub name: &'static str,
    /// Name under /run/netns.
    pub netns: String,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
    _guard: janitor::Kept,
}

impl Host {
    /// Makes the namespace, without a link.
    pub(crate) fn make(name: &'static str, netns: String, subnet: u8, number: u8) -> crate::Result<Self> {
        let guard = make_netns(&netns)?;
        let v4 = Ipv4Addr::new(10, 77, subnet, number);
        let v6 = Ipv6Addr::new(0xfd77, u16::from(subnet), 0, 0, 0, 0, 0, u16::from(number));
        Ok(Self { name, netns, v4, v6, _guard: guard })
    }

    /// Gives the link its addresses. It has to be there already, as `eth0`.
    pub(crate) fn address(&self) -> crate::Result<()> {
        let (v4, v6) = (self.v4, self.v6);
        ip(
            &self.netns,
            &format!("link set lo up\naddr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\nlink set eth0 up\n"),
        )
    }

    /// Gives the host one more address.
    pub fn also(&self, address: &str) -> crate::Result<()> {
        ip(&self.netns, &format!("addr add {address} dev eth0\n"))
    }

    /// Tells the host which other one an address belongs to.
    pub fn routes(&self, address: &str, to: &Host) -> crate::Result<()> {
        ip(&self.netns, &format!("route add {address} via {} dev eth0\n", to.v4))
    }

    /// Makes what the host sends suffer: `loss 1% delay 1ms`, as `tc` has it.
    pub fn disturb(&self, how: &str) -> Result<(), Skip> {
        let words = ["-n", &self.netns, "qdisc", "add", "dev", "eth0", "root", "netem"];
        let output = Command::new("tc").args(words).args(how.split(' ')).output();
        match output {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                Err(Skip::because(format!("kernel has no netem: {}", said.lines().next().unwrap_or("no reason given"))))
            }
            Err(error) => Err(Skip::because(format!("no tc: {error}"))),
        }
    }

    /// IPv4 address and port.
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.v4), port)
    }

    /// IPv6 address and port.
    pub fn at6(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V6(self.v6), port)
    }

    /// IPv4-mapped IPv6 address and port.
    pub fn mapped(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V6(self.v4.to_ipv6_mapped()), port)
    }

    /// The namespace as a file.
    pub fn file(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.netns)
    }

    /// Runs something on a thread of its own inside the namespace. Sockets made there belong to it.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = self.file();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || enter::enter(&file).map(|()| work()));
            match thread.join() {
                Ok(Ok(value)) => value,
                Ok(Err(error)) => panic!("{error:#}"),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Sets a kernel parameter of the namespace: `net/ipv4/tcp_fastopen`.
    pub fn sysctl(&self, name: &str, value: &str) -> crate::Result<()> {
        let path = Path::new("/proc/sys").join(name);
        self.within(|| std::fs::write(&path, value)).with_context(|| format!("write {}", path.display()))
    }
}

/// Makes a bare network namespace.
pub(crate) fn make_netns(name: &str) -> crate::Result<janitor::Kept> {
    let guard = janitor::keep(janitor::Item::Netns(name.to_owned()));
    let output = Command::new("ip").args(["netns", "add", name]).output().context("ip netns add")?;
    anyhow::ensure!(output.status.success(), "ip netns add {name}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(guard)
}

/// Runs lines of `ip` commands in a namespace.
pub(crate) fn ip(netns: &str, lines: &str) -> crate::Result<()> {
    let mut child = Command::new("ip")
        .args(["-n", netns, "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start ip")?;
    if let Some(mut pipe) = child.stdin.take() {
        pipe.write_all(lines.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    anyhow::ensure!(output.status.success(), "ip -n {netns}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Can namespaces be made and linked here?
pub(crate) fn probe() -> Result<(), Skip> {
    crate::skip::need_root()?;
    crate::skip::need("ip")?;
    let name = format!("wl{}-probe", std::process::id());
    let guard = make_netns(&name).map_err(|error| Skip::because(format!("no network namespaces: {error:#}")))?;
    let links = "link add br0 type bridge\nlink add one type veth peer name two\n";
    ip(&name, links).map_err(|error| Skip::because(format!("no bridge or veth links: {error:#}")))?;
    drop(guard);
    Ok(())
}
