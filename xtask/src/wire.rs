//! What went over a wire: a capture file of tcpdump, put together to streams and judged.
//!
//! *Invariant:* pure and total: a file that is cut off or odd gives fewer streams, never a panic.

use std::collections::BTreeMap;

/// The bytes of one direction of one connection.
pub struct Stream {
    /// The port of the sender.
    pub from: u16,
    /// The port of the receiver.
    pub to: u16,
    /// What was sent, in order and once.
    pub bytes: Vec<u8>,
}

/// The TLS record types that RFC 8446 section 5.1 knows.
const RECORD_TYPES: std::ops::RangeInclusive<u8> = 20..=23;

/// The streams of a capture of Ethernet with IPv4.
pub fn streams(file: &[u8]) -> Vec<Stream> {
    let mut found: BTreeMap<[u8; 12], Pieces> = BTreeMap::new();
    let mut rest = file.get(24..).unwrap_or_default();
    while let Some(length) = word32(rest, 8).map(|length| length as usize) {
        let Some(frame) = rest.get(16..16 + length) else { break };
        rest = rest.get(16 + length..).unwrap_or_default();
        if let Some((key, segment)) = segment(frame) {
            found.entry(key).or_default().add(segment);
        }
    }
    let stream = |(key, pieces): ([u8; 12], Pieces)| Stream {
        from: u16::from_be_bytes([key[8], key[9]]),
        to: u16::from_be_bytes([key[10], key[11]]),
        bytes: pieces.join(),
    };
    found.into_iter().map(stream).collect()
}

/// The TLS records that a stream consists of; None where it holds anything else.
pub fn records(bytes: &[u8]) -> Option<Vec<&[u8]>> {
    let mut records = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (kind, major) = (*rest.first()?, *rest.get(1)?);
        let length = usize::from(u16::from_be_bytes([*rest.get(3)?, *rest.get(4)?]));
        if !RECORD_TYPES.contains(&kind) || major != 3 || length > 16_384 + 256 {
            return None;
        }
        // A connection that was cut off ends in the middle of a record.
        let end = (5 + length).min(rest.len());
        records.push(&rest[..end]);
        rest = &rest[end..];
    }
    Some(records)
}

/// Whether the bytes are in the capture, in a stream or across none.
pub fn holds(file: &[u8], needle: &[u8]) -> bool {
    let within = |bytes: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
    within(file) || streams(file).iter().any(|stream| within(&stream.bytes))
}

/// Rows of eight bytes, in hexadecimal and as text.
pub fn dump(bytes: &[u8]) -> Vec<String> {
    let row = |bytes: &[u8]| {
        let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let text: String =
            bytes.iter().map(|b| if b.is_ascii_graphic() || *b == b' ' { *b as char } else { '.' }).collect();
        format!("{:<23}  {text:<8}", hex.join(" "))
    };
    bytes.chunks(8).map(row).collect()
}

#[derive(Default)]
struct Pieces {
    first: Option<u32>,
    parts: Vec<(u32, Vec<u8>)>,
}

struct Segment {
    sequence: u32,
    syn: bool,
    payload: Vec<u8>,
}

impl Pieces {
    fn add(&mut self, segment: Segment) {
        if segment.syn {
            self.first = Some(segment.sequence.wrapping_add(1));
        }
        if !segment.payload.is_empty() {
            self.parts.push((segment.sequence, segment.payload));
        }
    }

    /// In order of sequence numbers; what was sent again is there once.
    fn join(mut self) -> Vec<u8> {
        let first = self.first.or_else(|| self.parts.first().map(|part| part.0)).unwrap_or(0);
        self.parts.sort_by_key(|(sequence, _)| sequence.wrapping_sub(first));
        let mut bytes: Vec<u8> = Vec::new();
        for (sequence, payload) in self.parts {
            let offset = sequence.wrapping_sub(first) as usize;
            // A gap means that the capture lost something: what follows would be out of place.
            let Some(known) = bytes.len().checked_sub(offset) else { break };
            bytes.extend(payload.get(known..).unwrap_or_default());
        }
        bytes
    }
}

/// The addresses and ports, and what the segment carries.
fn segment(frame: &[u8]) -> Option<([u8; 12], Segment)> {
    if frame.get(12..14)? != [0x08, 0x00] {
        return None;
    }
    let ip = frame.get(14..)?;
    let length = usize::from(u16::from_be_bytes([*ip.get(2)?, *ip.get(3)?]));
    if *ip.get(9)? != 6 {
        return None;
    }
    let ip = ip.get(..length)?;
    let tcp = ip.get(usize::from(ip.first()? & 15) * 4..)?;
    let mut key = [0; 12];
    key[..8].copy_from_slice(ip.get(12..20)?);
    key[8..].copy_from_slice(tcp.get(..4)?);
    let sequence = u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?);
    let payload = tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?.to_vec();
    Some((key, Segment { sequence, syn: tcp.get(13)? & 2 != 0, payload }))
}

fn word32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend((40 + payload.len() as u16).to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend(1000u16.to_be_bytes());
        frame.extend(80u16.to_be_bytes());
        frame.extend(sequence.to_be_bytes());
        frame.extend([0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        let mut packet = vec![0; 8];
        packet.extend((frame.len() as u32).to_le_bytes());
        packet.extend((frame.len() as u32).to_le_bytes());
        packet.extend(frame);
        packet
    }

    fn file(packets: &[Vec<u8>]) -> Vec<u8> {
        let mut file = vec![0; 24];
        file.extend(packets.concat());
        file
    }

    #[test]
    fn segments_are_joined_in_order_and_once() {
        let all = [
            packet(u32::MAX, 2, b""),
            packet(0, 16, b"ab"),
            packet(4, 16, b"ef"),
            packet(2, 16, b"cd"),
            packet(2, 16, b"cd"),
        ];
        let streams = streams(&file(&all));
        assert_eq!((streams.len(), streams[0].from, streams[0].to), (1, 1000, 80));
        assert_eq!(streams[0].bytes, b"abcdef");
    }

    #[test]
    fn what_is_split_over_two_segments_is_found() {
        let file = file(&[packet(0, 2, b""), packet(1, 16, b"sec"), packet(4, 16, b"ret")]);
        assert!(holds(&file, b"secret"));
        assert!(!holds(&file, b"Secret"));
    }

    #[test]
    fn only_tls_records_are_taken_for_tls_records() {
        assert_eq!(records(b"\x16\x03\x01\x00\x02ab\x17\x03\x03\x00\x01c").unwrap().len(), 2);
        assert!(records(b"\x17\x03\x03\x00\x01cGET / HTTP/1.1\r\n").is_none());
        assert!(records(b"GET / HTTP/1.1\r\n").is_none());
    }

    #[test]
    fn a_capture_that_is_cut_off_is_read_as_far_as_it_goes() {
        let whole = file(&[packet(0, 2, b""), packet(1, 16, b"abc")]);
        for length in 0..whole.len() {
            let _ = streams(&whole[..length]);
        }
        assert_eq!(streams(&whole)[0].bytes, b"abc");
    }
}
