//! The wire between the hosts: what tcpdump saw on it, and the oracle that looks for plaintext.
//!
//! The capture is taken on the bridge that joins the hosts. Before it is read, a datagram with a number is sent across
//! and waited for in the file: everything that was sent before it is then there too.
//!
//! *Invariant:* packets that the capture lost are never taken for packets that were not sent: [`Wire::lost`] fails the
//! test, but for bulk flows that say otherwise.

use crate::host::Host;
use crate::program::Program;
use crate::{clock, enter, skip};
use anyhow::{Context, bail};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// First bytes of the datagram that marks the end.
const SENTINEL: &str = "LAB-CAPTURE-SENTINEL-";

/// A running capture.
pub struct Capture {
    tcpdump: Program,
    file: PathBuf,
}

impl Capture {
    /// Starts it in the namespace that joins the hosts, keeping so many bytes of each packet (0: all). For many packets
    /// the kernel hands them over in blocks, which loses fewer and may take a second.
    pub(crate) fn start(netns: &str, directory: &Path, bytes: usize, many: bool) -> crate::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let file = directory.join(format!("wire-{}.pcap", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let place = enter::Place { netns: Some(netns.to_owned()), ..enter::Place::default() };
        let tcpdump = skip::find("tcpdump").context("no tcpdump on PATH")?;
        let mut command = enter::command(&tcpdump, &place).map_err(|skip| anyhow::anyhow!(skip.0))?;
        command.args(["-i", "any", "-Q", "in", "-n", "-U", "-Z", "root"]);
        if !many {
            command.arg("--immediate-mode");
        }
        // The kernel gives every packet a slot of the largest size: what cannot occur on the link would only waste them.
        let bytes = if bytes == 0 { 66_000 } else { bytes };
        command.args(["-B", "32768", "-s", &bytes.to_string(), "-w"]).arg(&file).arg("tcp or udp");
        let tcpdump = Program::start(command, "tcpdump")?;
        let listening = clock::until(clock::seconds(20), || tcpdump.stderr().contains("listening on").then_some(()));
        if listening.is_none() {
            bail!("tcpdump does not listen: {}", tcpdump.stderr());
        }
        Ok(Self { tcpdump, file })
    }

    /// Ends the capture, with everything in it that was sent until now.
    pub(crate) fn finish(mut self, from: &Host, to: &Host) -> crate::Result<Wire> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let text = format!("{SENTINEL}{:08}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let target = to.at(9);
        let here = IpAddr::V4(from.v4);
        let arrived = clock::until(clock::seconds(20), || {
            // Sent again each time: the capture may have dropped it.
            let _ = from.within(|| UdpSocket::bind((here, 0)).and_then(|s| s.send_to(text.as_bytes(), target)));
            std::thread::sleep(clock::millis(5));
            let bytes = std::fs::read(&self.file).ok()?;
            find(tail(&bytes, 1 << 20), text.as_bytes()).map(|_| ())
        });
        if arrived.is_none() {
            bail!("the capture did not see the datagram that ends it: {}", self.tcpdump.stderr());
        }
        self.tcpdump.signal(rustix::process::Signal::INT);
        let outcome = self.tcpdump.end(clock::seconds(20))?;
        let lost = outcome
            .stderr
            .lines()
            .find_map(|line| line.split_once(" packet").filter(|(_, rest)| rest.contains("dropped by kernel")))
            .and_then(|(number, _)| number.trim().parse().ok())
            .context("tcpdump told no number of lost packets")?;
        Wire::read(&self.file, lost)
    }
}

fn tail(bytes: &[u8], length: usize) -> &[u8] {
    &bytes[bytes.len().saturating_sub(length)..]
}

/// Where the needle begins.
pub fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let first = *needle.first()?;
    let mut from = 0;
    while let Some(step) = haystack.get(from..)?.iter().position(|byte| *byte == first) {
        let at = from + step;
        if haystack[at..].starts_with(needle) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

/// One direction of one TCP connection.
#[derive(Clone, Debug)]
pub struct Stream {
    /// Who sent.
    pub source: SocketAddr,
    /// To whom.
    pub destination: SocketAddr,
    /// The bytes, as far as they follow on each other without a gap.
    pub bytes: Vec<u8>,
    /// Nothing is missing, nothing was cut off by the capture.
    pub whole: bool,
    /// A RST was sent.
    pub reset: bool,
}

/// Records of a TLS stream, by content type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    /// 22.
    pub handshake: usize,
    /// 23, version 0x0303.
    pub application: usize,
    /// 20 and 21.
    pub other: usize,
}

/// What was on the wire.
pub struct Wire {
    /// TCP and UDP packets as captured, link headers taken off.
    packets: Vec<Packet>,
    /// Packets that tcpdump says it lost.
    pub lost: u64,
    file: PathBuf,
}

struct Packet {
    source: SocketAddr,
    destination: SocketAddr,
    tcp: Option<Tcp>,
    payload: Vec<u8>,
    /// Bytes of payload on the wire; more than captured where the capture cuts.
    length: usize,
}

struct Tcp {
    sequence: u32,
    syn: bool,
    rst: bool,
}

impl Wire {
    fn read(file: &Path, lost: u64) -> crate::Result<Self> {
        let bytes = std::fs::read(file)?;
        let packets = pcap(&bytes).with_context(|| format!("read {}", file.display()))?;
        Ok(Self { packets, lost, file: file.to_owned() })
    }

    /// The file, for people.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Where the marker was seen, if it was: in a packet, or in a stream across packets.
    pub fn search(&self, marker: &[u8]) -> Option<String> {
        let whole = self.packets.iter().find(|packet| find(&packet.payload, marker).is_some());
        if let Some(packet) = whole {
            return Some(format!("in a packet from {} to {}", packet.source, packet.destination));
        }
        let stream = self.streams().into_iter().find(|stream| find(&stream.bytes, marker).is_some())?;
        Some(format!("in the stream from {} to {}", stream.source, stream.destination))
    }

    /// Packets with payload from or to this port.
    pub fn payload_packets(&self, port: u16) -> usize {
        let at = |packet: &&Packet| packet.source.port() == port || packet.destination.port() == port;
        self.packets.iter().filter(at).filter(|packet| packet.length > 0).count()
    }

    /// UDP datagrams to this port.
    pub fn datagrams(&self, port: u16) -> usize {
        self.packets.iter().filter(|packet| packet.tcp.is_none() && packet.destination.port() == port).count()
    }

    /// TCP connections that were attempted to this address: SYNs of different source ports.
    pub fn attempts(&self, to: SocketAddr) -> usize {
        let mut ports: Vec<u16> = self
            .packets
            .iter()
            .filter(|packet| packet.destination == to && packet.tcp.as_ref().is_some_and(|tcp| tcp.syn))
            .map(|packet| packet.source.port())
            .collect();
        ports.sort_unstable();
        ports.dedup();
        ports.len()
    }

    /// Every direction of every TCP connection, put together.
    pub fn streams(&self) -> Vec<Stream> {
        let mut directions: BTreeMap<(SocketAddr, SocketAddr), Vec<Vec<&Packet>>> = BTreeMap::new();
        for packet in &self.packets {
            let Some(tcp) = &packet.tcp else { continue };
            let connections = directions.entry((packet.source, packet.destination)).or_default();
            let again = connections.last().and_then(|packets| packets.first()).is_some_and(|first| {
                first.tcp.as_ref().is_some_and(|old| tcp.syn && (!old.syn || old.sequence != tcp.sequence))
            });
            if connections.is_empty() || again {
                connections.push(Vec::new());
            }
            if let Some(packets) = connections.last_mut() {
                packets.push(packet);
            }
        }
        directions
            .into_iter()
            .flat_map(|((source, destination), connections)| {
                connections.into_iter().map(move |packets| assemble(source, destination, &packets))
            })
            .collect()
    }

    /// The TLS records of both directions of every connection to this port. An error if anything on a connection is
    /// not a TLS record.
    pub fn records(&self, port: u16) -> crate::Result<Records> {
        let mut sum = Records::default();
        for stream in self.streams() {
            if stream.source.port() != port && stream.destination.port() != port {
                continue;
            }
            records(&stream.bytes, &mut sum)
                .with_context(|| format!("stream from {} to {}", stream.source, stream.destination))?;
        }
        Ok(sum)
    }
}

fn records(bytes: &[u8], sum: &mut Records) -> crate::Result<()> {
    let mut at = 0;
    while let Some(header) = bytes.get(at..at + 5) {
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        match header[0] {
            22 if header[1] == 3 => sum.handshake += 1,
            23 if header[1..3] == [3, 3] => sum.application += 1,
            20 | 21 if header[1] == 3 => sum.other += 1,
            _ => bail!("bytes {header:02x?} at {at} are no TLS record"),
        }
        anyhow::ensure!(length <= 16384 + 256, "a record of {length} bytes at {at}");
        at += 5 + length;
    }
    Ok(())
}

fn assemble(source: SocketAddr, destination: SocketAddr, packets: &[&Packet]) -> Stream {
    let mut stream = Stream { source, destination, bytes: Vec::new(), whole: true, reset: false };
    let mut pieces: Vec<(u32, &Packet)> = Vec::new();
    let Some(first) = packets.first().and_then(|packet| packet.tcp.as_ref()) else { return stream };
    let begin = if first.syn { first.sequence.wrapping_add(1) } else { first.sequence };
    for packet in packets {
        let Some(tcp) = &packet.tcp else { continue };
        stream.reset |= tcp.rst;
        // Data in a SYN (TCP Fast Open) begins one after the sequence number, which the SYN itself takes.
        let sequence = if tcp.syn { tcp.sequence.wrapping_add(1) } else { tcp.sequence };
        if packet.length > 0 {
            stream.whole &= packet.payload.len() == packet.length;
            pieces.push((sequence.wrapping_sub(begin), packet));
        }
    }
    pieces.sort_by_key(|(offset, _)| *offset);
    for (offset, packet) in pieces {
        let offset = offset as usize;
        let have = stream.bytes.len();
        if offset > have {
            stream.whole = false;
            break;
        }
        if let Some(new) = packet.payload.get(have - offset..) {
            stream.bytes.extend_from_slice(new);
        }
        if packet.payload.len() < packet.length {
            break;
        }
    }
    stream
}

fn pcap(bytes: &[u8]) -> crate::Result<Vec<Packet>> {
    let word = |at: usize| -> Option<u32> { Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?)) };
    let magic = word(0).context("empty file")?;
    anyhow::ensure!(magic == 0xa1b2_c3d4 || magic == 0xa1b2_3c4d, "not a little-endian pcap file: {magic:08x}");
    let link = word(20).context("no link type")?;
    let (header, protocol) = match link {
        1 => (14, 12),
        113 => (16, 14),
        276 => (20, 0),
        other => bail!("link type {other}"),
    };
    let mut packets = Vec::new();
    let mut at = 24;
    while let (Some(captured), Some(length)) = (word(at + 8), word(at + 12)) {
        let Some(frame) = bytes.get(at + 16..at + 16 + captured as usize) else { break };
        at += 16 + captured as usize;
        let kind = frame.get(protocol..protocol + 2).map(|word| u16::from_be_bytes([word[0], word[1]]));
        let Some(inner) = frame.get(header..) else { continue };
        packets.extend(network(kind, inner, length as usize - header.min(length as usize)));
    }
    Ok(packets)
}

/// An IPv4 or IPv6 packet, of which `length` bytes were on the wire. IPv6 extension headers are not followed: nothing in
/// the lab sends them.
fn network(kind: Option<u16>, bytes: &[u8], length: usize) -> Option<Packet> {
    let (source, destination, protocol, header, length): (IpAddr, IpAddr, u8, usize, usize) = match kind? {
        0x0800 => {
            let header = usize::from(bytes.first()? & 15) * 4;
            let total = usize::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?));
            let source: [u8; 4] = bytes.get(12..16)?.try_into().ok()?;
            let destination: [u8; 4] = bytes.get(16..20)?.try_into().ok()?;
            // Segments that were put together by the card's offloads can be too long for the field: it is 0 then.
            let total = if total == 0 { length } else { total };
            (Ipv4Addr::from(source).into(), Ipv4Addr::from(destination).into(), *bytes.get(9)?, header, total)
        }
        0x86dd => {
            let payload = usize::from(u16::from_be_bytes(bytes.get(4..6)?.try_into().ok()?));
            let source: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
            let destination: [u8; 16] = bytes.get(24..40)?.try_into().ok()?;
            let total = if payload == 0 { length } else { 40 + payload };
            (Ipv6Addr::from(source).into(), Ipv6Addr::from(destination).into(), *bytes.get(6)?, 40, total)
        }
        _ => return None,
    };
    let bytes = bytes.get(header..length.min(bytes.len()))?;
    let length = length.checked_sub(header)?;
    let port = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let (source, destination) = (SocketAddr::new(source, port(0)?), SocketAddr::new(destination, port(2)?));
    let (tcp, header) = match protocol {
        6 => {
            let flags = *bytes.get(13)?;
            let sequence = u32::from_be_bytes(bytes.get(4..8)?.try_into().ok()?);
            let tcp = Tcp { sequence, syn: flags & 2 != 0, rst: flags & 4 != 0 };
            (Some(tcp), usize::from(bytes.get(12)? >> 4) * 4)
        }
        17 => (None, 8),
        _ => return None,
    };
    let payload = bytes.get(header..).unwrap_or_default().to_vec();
    Some(Packet { source, destination, tcp, payload, length: length.saturating_sub(header) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_needle_is_found_wherever_it_lies() {
        assert_eq!(find(b"hay hay needle", b"needle"), Some(8));
        assert_eq!(find(b"nnneedle", b"needle"), Some(2));
        assert_eq!(find(b"nee", b"needle"), None);
        assert_eq!(find(b"", b"needle"), None);
    }

    #[test]
    fn what_is_no_tls_record_is_told() {
        let mut sum = Records::default();
        records(&[22, 3, 1, 0, 1, 0, 23, 3, 3, 0, 2, 9, 9], &mut sum).unwrap();
        assert_eq!(sum, Records { handshake: 1, application: 1, other: 0 });
        assert!(records(b"GET / HTTP/1.1\r\n", &mut sum).is_err());
        assert!(records(&[23, 3, 3, 0, 1, 0, b'G', b'E', b'T', b' ', b'/'], &mut sum).is_err());
    }
}
