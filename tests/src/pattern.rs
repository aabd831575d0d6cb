//! Bulk payload: blocks that are numbered, so that a swapped, doubled or lost one changes the checksum, and full of the
//! marker, so that any piece of it on the wire is found.
//!
//! *Invariant:* 128 bytes from anywhere in the stream hold the whole marker at least once.

use sha2::{Digest, Sha256};
use std::io::{self, Read, Write};

const BLOCK: usize = 64 * 1024;

/// Bytes and their checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sum {
    /// How many.
    pub bytes: u64,
    /// SHA-256, in hexadecimal.
    pub sha256: String,
}

/// Checksum of bytes as they come.
#[derive(Default)]
pub struct Summing {
    hash: Sha256,
    bytes: u64,
}

impl Summing {
    /// More bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    /// The sum.
    pub fn sum(self) -> Sum {
        let sha256 = self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Sum { bytes: self.bytes, sha256 }
    }
}

/// Writes so many bytes of the pattern.
pub fn write(sink: &mut impl Write, marker: &str, bytes: u64) -> io::Result<Sum> {
    let mut block: Vec<u8> = marker.bytes().chain(*b"\n").cycle().take(BLOCK).collect();
    let mut sum = Summing::default();
    let mut left = bytes;
    let mut number = 0_u64;
    while left > 0 {
        block[..17].copy_from_slice(format!("{number:016x}\n").as_bytes());
        number += 1;
        let piece = &block[..usize::try_from(left).unwrap_or(BLOCK).min(BLOCK)];
        sink.write_all(piece)?;
        sum.add(piece);
        left -= piece.len() as u64;
    }
    Ok(sum.sum())
}

/// Reads exactly so many bytes, or to the end.
pub fn read(source: &mut impl Read, limit: Option<u64>) -> io::Result<Sum> {
    let mut buffer = vec![0; 4 * BLOCK];
    let mut sum = Summing::default();
    let mut left = limit.unwrap_or(u64::MAX);
    while left > 0 {
        let room = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        match source.read(&mut buffer[..room]) {
            Ok(0) if limit.is_some() => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(0) => break,
            Ok(size) => {
                sum.add(&buffer[..size]);
                left -= size as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sum.sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_what_is_read_and_every_piece_holds_the_marker() {
        let marker = "PLAINTEXT-MARKER-0123456789abcd";
        let mut bytes = Vec::new();
        let sum = write(&mut bytes, marker, 200_000).unwrap();
        assert_eq!(read(&mut bytes.as_slice(), None).unwrap(), sum);
        assert_eq!(read(&mut bytes.as_slice(), Some(200_000)).unwrap(), sum);
        assert!(read(&mut bytes.as_slice(), Some(200_001)).is_err());
        for start in (0..bytes.len() - 128).step_by(97) {
            assert!(crate::wire::find(&bytes[start..start + 128], marker.as_bytes()).is_some(), "at {start}");
        }
        bytes.swap(70_000, 70_001);
        assert_ne!(read(&mut bytes.as_slice(), None).unwrap(), sum);
    }
}
