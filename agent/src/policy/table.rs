//! Destinations: which entry covers an address and port?
//!
//! Written addresses come in, the table answers as the kernel's longest-prefix trie does: the exact port first, then any
//! port, and the longest prefix within each. User space and kernel are filled from the same rows, so they agree.
//!
//! *Invariant:* a name is never an address (R51): nothing here asks DNS.

use crate::document::clip;
use ipnet::IpNet;
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// Bits that an IPv4 prefix has in front when it is mapped into IPv6.
const MAPPED_BITS: u8 = 96;
/// `::ffff:0.0.0.0`
const MAPPED: u128 = 0xffff_0000_0000;

/// Addresses and a port, or every port: `10.0.0.0/24:80`, `[fd00::2]:*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Region {
    pub network: IpNet,
    pub port: Option<u16>,
}

impl Region {
    /// Reads `address:port`; the error says what is wrong and what to write instead.
    pub fn parse(text: &str) -> Result<Self, (String, String)> {
        let usual = || "write \"10.0.0.2:80\", \"10.0.0.0/24:80\", \"[fd00::2]:80\" or \"10.0.0.2:*\"".to_owned();
        let refuse = |what: &str, instead: String| (format!("address `{}`: {what}", clip(text)), instead);
        let Some((host, port)) = text.rsplit_once(':') else {
            return Err(refuse(
                "there is no port",
                format!("write \"{}:PORT\", or \"{}:*\" for every port", clip(text), clip(text)),
            ));
        };
        let port = match port {
            "*" => None,
            digits => match digits.parse::<u16>() {
                Ok(port) if port > 0 && !digits.starts_with(['0', '+']) => Some(port),
                _ => return Err(refuse("the port is not a number from 1 to 65535, nor `*`", usual())),
            },
        };
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        if bracketed.is_none() && host.contains(':') {
            return Err(refuse("an IPv6 address needs brackets", "write \"[fd00::2]:80\"".into()));
        }
        let bare = bracketed.unwrap_or(host);
        let (address, length) = match bare.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (bare, None),
        };
        let Ok(address) = address.parse::<IpAddr>() else {
            let instead = "write its IP address: names are not authenticated".to_owned();
            return Err(refuse(&format!("`{}` is not an IP address", clip(address)), instead));
        };
        if address.is_ipv4() == bracketed.is_some() {
            return Err(refuse("brackets belong around IPv6 addresses only", usual()));
        }
        let most = if address.is_ipv4() { 32 } else { 128 };
        let length = match length.map(str::parse::<u8>) {
            None => most,
            Some(Ok(length)) if length <= most => length,
            Some(_) => return Err(refuse(&format!("the prefix length is not a number up to {most}"), usual())),
        };
        let Ok(network) = IpNet::new(address, length) else {
            return Err(refuse("the prefix length is too long", usual()));
        };
        let region = Self { network, port };
        if network != network.trunc() {
            let trunc = Self { network: network.trunc(), port };
            return Err(refuse(
                "there are bits set behind the prefix",
                format!("write \"{trunc}\" or the address without a prefix"),
            ));
        }
        if let IpAddr::V6(v6) = address {
            if let Some(v4) = v6.to_ipv4_mapped().filter(|_| length >= MAPPED_BITS) {
                let plain = Self { network: mapped_back(v4, length), port };
                return Err(refuse("an IPv4 address written as IPv6", format!("write \"{plain}\"")));
            }
            // The maps hold IPv4 as ::ffff:0:0/96, so such a network would quietly be all of IPv4 too.
            if network.contains(&IpAddr::V6(Ipv6Addr::from(MAPPED))) {
                return Err(refuse(
                    "this network would hold all of IPv4",
                    "write \"[2000::/3]\" for all global IPv6 addresses, and IPv4 on its own".into(),
                ));
            }
        }
        if address.is_unspecified() && length == most {
            return Err(refuse("the unspecified address is nobody's", "write the address that programs dial".into()));
        }
        Ok(region)
    }

    /// The key that the kernel's trie knows it by: port (0 for any), prefix length, and address in IPv6 form.
    fn key(&self) -> (u16, u8, u128) {
        let (bits, length) = match self.network {
            IpNet::V4(network) => {
                (MAPPED | u128::from(network.network().to_bits()), MAPPED_BITS + network.prefix_len())
            }
            IpNet::V6(network) => (network.network().to_bits(), network.prefix_len()),
        };
        (self.port.unwrap_or(0), length, bits)
    }

    /// Is it made of link-local IPv6 addresses (RFC 4291, section 2.5.6)? They mean something only with a device.
    pub fn is_of_a_link(&self) -> bool {
        matches!(self.network, IpNet::V6(network) if network.prefix_len() >= 10 && network.network().is_unicast_link_local())
    }

    /// Is every address and port of `other` in this region?
    pub fn covers(&self, other: &Self) -> bool {
        (self.port.is_none() || self.port == other.port) && self.network.contains(&other.network)
    }

    /// Is this address and port in this region?
    #[cfg(test)]
    pub fn contains(&self, to: SocketAddr) -> bool {
        self.port.is_none_or(|port| port == to.port()) && self.network.contains(&to.ip().to_canonical())
    }

    /// What both regions hold, if they overlap.
    pub fn overlap(&self, other: &Self) -> Option<Self> {
        let port = match (self.port, other.port) {
            (Some(a), Some(b)) if a != b => return None,
            (a, b) => a.or(b),
        };
        if self.network.contains(&other.network) {
            Some(Self { network: other.network, port })
        } else {
            other.network.contains(&self.network).then_some(Self { network: self.network, port })
        }
    }
}

fn mapped_back(address: Ipv4Addr, length: u8) -> IpNet {
    let length = length.saturating_sub(MAPPED_BITS);
    IpNet::new(address.into(), length).map_or(IpNet::from(IpAddr::V4(address)), |network| network.trunc())
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.network {
            IpNet::V4(network) if network.prefix_len() == 32 => write!(f, "{}", network.addr())?,
            IpNet::V4(network) => write!(f, "{network}")?,
            IpNet::V6(network) if network.prefix_len() == 128 => write!(f, "[{}]", network.addr())?,
            IpNet::V6(network) => write!(f, "[{network}]")?,
        }
        match self.port {
            Some(port) => write!(f, ":{port}"),
            None => f.write_str(":*"),
        }
    }
}

/// Regions, numbered in the order in which they were added.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    regions: Vec<Region>,
    by_key: HashMap<(u16, u8, u128), usize>,
    /// Prefix lengths that a port has, the longest first.
    lengths: HashMap<u16, Vec<u8>>,
    /// Regions for every port, by address and prefix length.
    any_port: BTreeMap<(u128, u8), usize>,
}

impl Table {
    /// Adds a region and gives its index; the index it already has, if it is there.
    pub fn add(&mut self, region: Region) -> usize {
        let key = region.key();
        if let Some(index) = self.by_key.get(&key) {
            return *index;
        }
        let index = self.regions.len();
        self.regions.push(region);
        self.by_key.insert(key, index);
        if region.port.is_none() {
            self.any_port.insert((key.2, key.1), index);
        }
        let lengths = self.lengths.entry(key.0).or_default();
        if let Err(at) = lengths.binary_search_by(|length| key.1.cmp(length)) {
            lengths.insert(at, key.1);
        }
        index
    }

    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The index of exactly this region.
    pub fn position(&self, region: &Region) -> Option<usize> {
        self.by_key.get(&region.key()).copied()
    }

    /// The region that decides for this address and port: exact port before any port, then the longest prefix.
    pub fn lookup(&self, to: SocketAddr) -> Option<usize> {
        let address = match to.ip().to_canonical() {
            IpAddr::V4(address) => MAPPED | u128::from(address.to_bits()),
            IpAddr::V6(address) => address.to_bits(),
        };
        self.search(to.port(), address, 128).or_else(|| self.search(0, address, 128))
    }

    /// The regions that cover another region, itself included, the one that decides for it first.
    pub fn ancestors(&self, region: &Region) -> impl Iterator<Item = usize> {
        let (port, length, address) = region.key();
        let exact = if port == 0 { None } else { Some(self.chain(port, address, length)) };
        exact.into_iter().flatten().chain(self.chain(0, address, length))
    }

    /// The any-port regions whose addresses are all in `outer`.
    pub fn any_port_within(&self, outer: &Region) -> impl Iterator<Item = usize> {
        let (_, length, first) = outer.key();
        let last = first | u128::MAX.checked_shr(length.into()).unwrap_or(0);
        self.any_port
            .range((first, 0)..=(last, u8::MAX))
            .filter(move |((_, inner), _)| *inner >= length)
            .map(|(_, index)| *index)
    }

    /// The longest prefix of at most `most` bits for exactly this port.
    fn search(&self, port: u16, address: u128, most: u8) -> Option<usize> {
        self.chain(port, address, most).next()
    }

    fn chain(&self, port: u16, address: u128, most: u8) -> impl Iterator<Item = usize> {
        let lengths = self.lengths.get(&port).into_iter().flatten();
        lengths.filter(move |length| **length <= most).filter_map(move |length| {
            let kept = address & u128::MAX.checked_shl(128 - u32::from(*length)).unwrap_or(0);
            self.by_key.get(&(port, *length, kept)).copied()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn region(text: &str) -> Region {
        Region::parse(text).unwrap()
    }

    #[test]
    fn regions_are_read_and_printed() {
        for text in [
            "10.0.0.2:80",
            "10.0.0.0/24:80",
            "[fd00::2]:80",
            "[fd00::/64]:80",
            "10.0.0.2:*",
            "0.0.0.0/0:443",
            "[2000::/3]:*",
        ] {
            assert_eq!(region(text).to_string(), text);
        }
        assert_eq!(region("10.0.0.2/32:80"), region("10.0.0.2:80"));
    }

    #[test]
    fn wrong_addresses_say_what_to_write() {
        let refused = |text: &str| {
            Region::parse(text).map_or_else(|(what, instead)| format!("{what}; {instead}"), |r| r.to_string())
        };
        for (text, expected) in [
            (
                "10.0.0.2",
                "address `10.0.0.2`: there is no port; write \"10.0.0.2:PORT\", or \"10.0.0.2:*\" for every port",
            ),
            ("fd00::2:80", "address `fd00::2:80`: an IPv6 address needs brackets; write \"[fd00::2]:80\""),
            (
                "db.example.org:80",
                "address `db.example.org:80`: `db.example.org` is not an IP address; write its IP address: names are not authenticated",
            ),
            (
                "10.0.0.5/24:80",
                "address `10.0.0.5/24:80`: there are bits set behind the prefix; write \"10.0.0.0/24:80\" or the address without a prefix",
            ),
            (
                "[::ffff:10.0.0.2]:80",
                "address `[::ffff:10.0.0.2]:80`: an IPv4 address written as IPv6; write \"10.0.0.2:80\"",
            ),
            (
                "[::/0]:80",
                "address `[::/0]:80`: this network would hold all of IPv4; write \"[2000::/3]\" for all global IPv6 addresses, and IPv4 on its own",
            ),
            (
                "0.0.0.0:80",
                "address `0.0.0.0:80`: the unspecified address is nobody's; write the address that programs dial",
            ),
        ] {
            assert_eq!(refused(text), expected);
        }
        for text in [
            "10.0.0.2:0",
            "10.0.0.2:65536",
            "10.0.0.2:080",
            "10.0.0.2:http",
            "[10.0.0.2]:80",
            "10.0.0.0/33:80",
            ":80",
            "",
            ":",
            "[]:1",
            "/:1",
        ] {
            assert!(Region::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_exact_port_wins_over_any_port_and_then_the_longest_prefix() {
        let mut table = Table::default();
        for text in ["10.0.0.0/8:80", "10.0.0.2:*", "10.0.0.0/24:80", "[fd00::/64]:80"] {
            table.add(region(text));
        }
        for (to, expected) in [
            ("10.0.0.2:80", Some(2)),
            ("10.0.0.2:81", Some(1)),
            ("10.9.9.9:80", Some(0)),
            ("10.9.9.9:81", None),
            ("[::ffff:10.9.9.9]:80", Some(0)),
            ("[fd00::1]:80", Some(3)),
            ("[fd01::1]:80", None),
        ] {
            assert_eq!(table.lookup(to.parse().unwrap()), expected, "{to}");
        }
    }

    fn regions() -> impl Strategy<Value = Vec<Region>> {
        let one =
            (0u8..4, 0u8..4, prop_oneof![Just(24u8), Just(30), Just(31), Just(32), Just(0)], 0u16..4, any::<bool>());
        proptest::collection::vec(one, 0..20).prop_map(|all| {
            all.into_iter()
                .map(|(c, d, length, port, v6)| {
                    let network = if v6 {
                        let address = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, c.into(), d.into());
                        IpNet::new(address.into(), 96 + length).unwrap()
                    } else {
                        IpNet::new(Ipv4Addr::new(10, 0, c, d).into(), length).unwrap()
                    };
                    Region { network: network.trunc(), port: (port > 0).then_some(port) }
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn lookup_agrees_with_a_slow_reference(all in regions(), c in 0u8..5, d in 0u8..5, port in 1u16..5, v6: bool, mapped: bool) {
            let mut table = Table::default();
            for region in &all {
                table.add(*region);
            }
            let ip: IpAddr = match (v6, mapped) {
                (true, _) => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, c.into(), d.into()).into(),
                (false, true) => Ipv4Addr::new(10, 0, c, d).to_ipv6_mapped().into(),
                (false, false) => Ipv4Addr::new(10, 0, c, d).into(),
            };
            let to = SocketAddr::new(ip, port);
            let expected = all
                .iter()
                .filter(|region| region.contains(to))
                .max_by_key(|region| (region.port.is_some(), region.network.prefix_len()));
            prop_assert_eq!(table.lookup(to).map(|index| table.regions()[index]), expected.copied());
        }

        #[test]
        fn parse_and_print_are_inverse(all in regions()) {
            for region in all {
                if let Ok(again) = Region::parse(&region.to_string()) {
                    prop_assert_eq!(again, region);
                }
            }
        }

        #[test]
        fn nothing_panics(text in any::<String>(), near in "[\\[0-9a-f:.]{0,20}[/0-9\\]]{0,5}:[0-9*]{0,6}") {
            let _ = (Region::parse(&text), Region::parse(&near));
        }
    }
}
