//! Where a peer comes from that has not shown who it is: from a user of this host, or from a network.
//!
//! A program may take any address of its host for its source, all of 127.0.0.0/8 among them, and whoever is routed a prefix
//! has every address in it. So neither an address nor a network of one size can stand for a tenant: all addresses of this
//! host are one tenant, and an address elsewhere is in several, one for each of the wider networks around it.
//!
//! *Invariant:* an address that a program of this host can take counts as no other host's.

use crate::intercept;
use crate::lock::lock;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use socket2::{Domain, Socket, Type};
use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Where a peer comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whence {
    /// This host: the user whose socket it is, if that was still there.
    Here(Option<u32>),
    /// Somewhere else.
    Away(IpAddr),
}

impl Whence {
    /// The networks of an address elsewhere, the widest first: what an organisation has, what a site has, what a host has.
    pub fn networks(address: IpAddr) -> Box<[IpNet]> {
        match address.to_canonical() {
            IpAddr::V4(ip) => [24, 32].map(|length| Ipv4Net::new_assert(ip, length).trunc().into()).into(),
            // Whoever has one address of a /64 has all of them (RFC 6177).
            IpAddr::V6(ip) => [48, 56, 64].map(|length| Ipv6Net::new_assert(ip, length).trunc().into()).into(),
        }
    }
}

/// The addresses of this host, as they are at the moment of the question.
#[derive(Debug)]
pub struct Here {
    /// A socket that is asked of IPv4 addresses; without one only 127.0.0.0/8 is known to be here.
    four: Option<Socket>,
    six: Mutex<Six>,
}

/// The IPv6 addresses of this host, and when they were read.
#[derive(Debug, Default)]
struct Six {
    at: Option<Instant>,
    addresses: HashSet<Ipv6Addr>,
}

/// How long the list of IPv6 addresses is good. Adding an address to a host takes a privilege, so that a program without it
/// gains nothing by the delay.
const FRESH: Duration = Duration::from_secs(1);

/// The IPv6 addresses of a thread's namespace. They are read from a file, because the sandbox lets the agent open no
/// netlink socket for routing.
const SIX: &str = "/proc/thread-self/net/if_inet6";

impl Default for Here {
    fn default() -> Self {
        Self { four: Socket::new(Domain::IPV4, Type::DGRAM, None).ok(), six: Mutex::default() }
    }
}

impl Here {
    /// Where the far end of an accepted connection is.
    pub fn whence(&self, peer: SocketAddr, own: SocketAddr) -> Whence {
        match self.has(peer.ip()) {
            true => Whence::Here(intercept::user_of(peer, own)),
            false => Whence::Away(peer.ip()),
        }
    }

    /// Is this one of the host's addresses?
    pub fn has(&self, address: IpAddr) -> bool {
        match address.to_canonical() {
            ip if ip.is_loopback() => true,
            IpAddr::V4(ip) => self.has_four(ip),
            IpAddr::V6(ip) => self.has_six(ip),
        }
    }

    /// Asks the kernel: only an address of the host can name a device for multicast (ip(7), `IP_MULTICAST_IF`). The kernel
    /// looks among the addresses that programs can bind to, also where `ip_nonlocal_bind` lets them bind to more.
    fn has_four(&self, ip: Ipv4Addr) -> bool {
        self.four.as_ref().is_some_and(|socket| !ip.is_unspecified() && socket.set_multicast_if_v4(&ip).is_ok())
    }

    fn has_six(&self, ip: Ipv6Addr) -> bool {
        let mut six = lock(&self.six);
        if six.at.is_none_or(|at| at.elapsed() >= FRESH) {
            // If there is no such file, there is no IPv6.
            let text = std::fs::read_to_string(SIX).unwrap_or_default();
            *six = Six { at: Some(Instant::now()), addresses: text.lines().filter_map(first_of).collect() };
        }
        six.addresses.contains(&ip)
    }
}

/// The address at the beginning of a line of `if_inet6`: 32 hexadecimal digits.
fn first_of(line: &str) -> Option<Ipv6Addr> {
    u128::from_str_radix(line.split_ascii_whitespace().next()?, 16).ok().map(Ipv6Addr::from_bits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};

    #[test]
    fn the_addresses_of_this_host_are_here_and_others_are_not() {
        let here = Here::default();
        let has = |address: &str| here.has(address.parse().unwrap());
        for own in ["127.0.0.1", "127.77.3.1", "::1", "::ffff:127.9.9.9"] {
            assert!(has(own), "{own}");
        }
        for other in ["192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1", "0.0.0.0", "::", "255.255.255.255"] {
            assert!(!has(other), "{other}");
        }
        // Another address of this machine, if it has one: the one from which it would send a datagram.
        for (from, to) in [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")] {
            let Ok(socket) = UdpSocket::bind(from) else { continue };
            if socket.connect(to).is_ok() {
                let own = socket.local_addr().unwrap().ip();
                assert!(here.has(own), "{own}");
            }
        }
    }

    // Skipped where the kernel lacks the module for socket diagnostics.
    #[test]
    fn a_peer_on_this_host_is_whoever_has_the_socket() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (near, peer) = listener.accept().unwrap();
        match Here::default().whence(peer, near.local_addr().unwrap()) {
            Whence::Here(None) => {
                eprintln!("SKIPPED (no socket diagnostics): a_peer_on_this_host_is_whoever_has_the_socket")
            }
            found => assert_eq!(found, Whence::Here(Some(rustix::process::geteuid().as_raw()))),
        }
        drop(far);
    }

    #[test]
    fn a_network_is_in_wider_ones() {
        let networks = |of: &str| -> Vec<String> {
            Whence::networks(of.parse().unwrap()).iter().map(ToString::to_string).collect()
        };
        assert_eq!(networks("2001:db8:1:2f3:3::4"), ["2001:db8:1::/48", "2001:db8:1:200::/56", "2001:db8:1:2f3::/64"]);
        assert_eq!(networks("::ffff:10.1.2.3"), ["10.1.2.0/24", "10.1.2.3/32"]);
    }
}
