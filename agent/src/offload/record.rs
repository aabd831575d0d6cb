//! TLS 1.3 record protection (RFC 9846 section 5) over aws-lc-rs keys, in place on buffers that the caller owns.
//!
//! In: the traffic secrets of one direction. Out: records sealed where their plaintext lies, plaintext where the record
//! lay. Nothing here reads a socket, allocates per record or knows what a record's content means.
//! *Invariant:* a sequence number is used once, and a record that fails authentication gives no byte of plaintext.

use crate::handshake::{Aead, Traffic};
use aws_lc_rs::aead;
use std::ops::Range;
use zeroize::Zeroize;

/// Bytes of a record's header.
pub const HEADER: usize = 5;
/// The most plaintext that one record carries.
pub const MAX_PLAINTEXT: usize = 1 << 14;
/// The most that may follow a header: plaintext, padding, content type and tag.
pub const MAX_BODY: usize = MAX_PLAINTEXT + 256;
/// What sealing adds behind the plaintext: the content type and the tag.
pub const TRAILER: usize = 1 + aead::MAX_TAG_LEN;
/// Bytes of a full record as this side writes it, without padding.
pub const FULL_RECORD: usize = HEADER + MAX_PLAINTEXT + TRAILER;

/// Records sealed under one AES-GCM key before a fresh one is taken: half of what rustls allows, which in turn is less than
/// RFC 9846 section 5.5 does.
const AES_GCM_REKEY: u64 = 1 << 23;

/// After how many records a fresh key is due.
pub fn rekey_after(aead: Aead) -> u64 {
    match aead {
        Aead::Aes128Gcm | Aead::Aes256Gcm => AES_GCM_REKEY,
        // Not before the sequence number ends (RFC 9846 section 5.5).
        Aead::ChaCha20Poly1305 => u64::MAX,
    }
}

/// What a record carries, by its number on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentType(pub u8);

impl ContentType {
    /// alert(21).
    pub const ALERT: Self = Self(21);
    /// handshake(22).
    pub const HANDSHAKE: Self = Self(22);
    /// application_data(23).
    pub const APPLICATION_DATA: Self = Self(23);
    /// A frame between two agents that share a connection (docs/SESSIONS.md). The number is far from those that IANA has
    /// given out, and means this only where both sides agreed on it by ALPN.
    pub const MARKER: Self = Self(0xb7);
}

/// What is wrong with a record that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRecord {
    /// Its outer type is not application_data, so it was not sealed.
    #[error("it is not protected: its outer content type is {0}")]
    Unprotected(u8),
    /// Longer than any record may be.
    #[error("it is longer than TLS 1.3 allows")]
    TooLong,
    /// It does not authenticate.
    #[error("it does not authenticate")]
    Forged,
    /// It holds nothing but padding, and so no content type.
    #[error("it carries no content type")]
    Untyped,
}

/// No further record can be sealed or opened under these keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the keys of this direction cannot be used any further")]
pub struct Spent;

/// Seals the records of one direction.
pub struct Sealer {
    keys: Keys,
    /// Records after which a fresh key is due.
    due: u64,
}

/// Opens the records of one direction.
pub struct Opener {
    keys: Keys,
}

impl Sealer {
    /// A sealer for these secrets.
    pub fn new(traffic: &Traffic) -> Result<Self, Spent> {
        Ok(Self { keys: Keys::new(traffic)?, due: rekey_after(traffic.aead()) })
    }

    /// Is it time to send a KeyUpdate?
    pub fn is_due(&self) -> bool {
        self.keys.sequence >= self.due
    }

    /// Makes a fresh key due after so many records already, so that a test can reach the limit of a connection.
    pub fn set_due(&mut self, records: u64) {
        self.due = self.due.min(records);
    }

    /// After how many records a fresh key is due here.
    pub fn due(&self) -> u64 {
        self.due
    }

    /// Seals the first `length` bytes behind the header in `slot`, and gives the length of the whole record.
    pub fn seal(&mut self, content_type: ContentType, slot: &mut [u8], length: usize) -> Result<usize, Spent> {
        let body = length + TRAILER;
        let length_on_wire = u16::try_from(body).map_err(|_| Spent)?;
        let (header, rest) = slot.split_at_mut_checked(HEADER).ok_or(Spent)?;
        let (plaintext, rest) = rest.split_at_mut_checked(length).ok_or(Spent)?;
        let trailer = rest.get_mut(..TRAILER).ok_or(Spent)?;
        let [high, low] = length_on_wire.to_be_bytes();
        // The legacy version of every protected record (RFC 9846 section 5.2).
        let associated = [ContentType::APPLICATION_DATA.0, 3, 3, high, low];
        header.copy_from_slice(&associated);
        let nonce = self.keys.next_nonce()?;
        self.keys
            .key
            .seal_in_place_scatter(nonce, aead::Aad::from(associated), plaintext, &[content_type.0], trailer)
            .map_err(|_| Spent)?;
        Ok(HEADER + body)
    }
}

impl Opener {
    /// An opener for these secrets.
    pub fn new(traffic: &Traffic) -> Result<Self, Spent> {
        Ok(Self { keys: Keys::new(traffic)? })
    }

    /// Opens a whole record in place: what it carries, and where in `record` the content lies.
    pub fn open(&mut self, record: &mut [u8]) -> Result<(ContentType, Range<usize>), BadRecord> {
        let (header, body) = record.split_at_mut_checked(HEADER).ok_or(BadRecord::Forged)?;
        let associated: [u8; HEADER] = (&*header).try_into().map_err(|_| BadRecord::Forged)?;
        let nonce = self.keys.next_nonce().map_err(|_| BadRecord::Forged)?;
        let inner =
            self.keys.key.open_in_place(nonce, aead::Aad::from(associated), body).map_err(|_| BadRecord::Forged)?;
        // TLSInnerPlaintext: content, one byte of type, zeroes (RFC 9846 section 5.4).
        let typed = inner.iter().rposition(|byte| *byte != 0).ok_or(BadRecord::Untyped)?;
        let content_type = ContentType(*inner.get(typed).ok_or(BadRecord::Untyped)?);
        if inner.len() > MAX_PLAINTEXT + 1 {
            return Err(BadRecord::TooLong);
        }
        Ok((content_type, HEADER..HEADER + typed))
    }
}

/// How long is the record that starts here, header included? `None`: more bytes are needed to say.
pub fn measure(bytes: &[u8]) -> Result<Option<usize>, BadRecord> {
    let Some(&[outer, _, _, high, low]) = bytes.first_chunk::<HEADER>() else {
        // The first byte is enough to know that the peer does not send protected records.
        return match bytes.first() {
            Some(&outer) if outer != ContentType::APPLICATION_DATA.0 => Err(BadRecord::Unprotected(outer)),
            _ => Ok(None),
        };
    };
    let body = usize::from(u16::from_be_bytes([high, low]));
    if outer != ContentType::APPLICATION_DATA.0 {
        Err(BadRecord::Unprotected(outer))
    } else if body > MAX_BODY {
        Err(BadRecord::TooLong)
    } else {
        Ok(Some(HEADER + body))
    }
}

struct Keys {
    key: aead::LessSafeKey,
    /// The per-connection nonce mask (`write_iv`).
    mask: [u8; aead::NONCE_LEN],
    sequence: u64,
}

impl Keys {
    fn new(traffic: &Traffic) -> Result<Self, Spent> {
        let algorithm = match traffic.aead() {
            Aead::Aes128Gcm => &aead::AES_128_GCM,
            Aead::Aes256Gcm => &aead::AES_256_GCM,
            Aead::ChaCha20Poly1305 => &aead::CHACHA20_POLY1305,
        };
        let key = aead::LessSafeKey::new(aead::UnboundKey::new(algorithm, traffic.key()).map_err(|_| Spent)?);
        Ok(Self { key, mask: *traffic.mask(), sequence: traffic.sequence() })
    }

    fn next_nonce(&mut self) -> Result<aead::Nonce, Spent> {
        let following = self.sequence.checked_add(1).ok_or(Spent)?;
        let mut nonce = self.mask;
        for (byte, number) in nonce.iter_mut().skip(4).zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence = following;
        Ok(aead::Nonce::assume_unique_for_key(nonce))
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        // aws-lc wipes the key itself when it frees it (OPENSSL_free).
        self.mask.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zeroize::Zeroizing;

    fn traffic(aead: Aead, sequence: u64) -> Traffic {
        Traffic::new(aead, sequence, Zeroizing::new([9; 32]), Zeroizing::new([7; 12]))
    }

    fn sealer(aead: Aead, sequence: u64) -> Sealer {
        Sealer::new(&traffic(aead, sequence)).unwrap()
    }

    fn opener(aead: Aead, sequence: u64) -> Opener {
        Opener::new(&traffic(aead, sequence)).unwrap()
    }

    #[test]
    fn what_is_sealed_is_opened_in_order_and_only_once() {
        for aead in Aead::ALL {
            let mut sealer = sealer(aead, 0);
            let mut opener_in_order = opener(aead, 0);
            let mut first = [0; FULL_RECORD];
            for length in [0, 1, 100, MAX_PLAINTEXT] {
                first[HEADER..HEADER + length].fill(0xa5);
                let whole = sealer.seal(ContentType::APPLICATION_DATA, &mut first, length).unwrap();
                assert_eq!(whole, HEADER + length + TRAILER);
                assert_eq!(measure(&first), Ok(Some(whole)));
                let replay = first;
                let (content, at) = opener_in_order.open(&mut first[..whole]).unwrap();
                assert_eq!((content, at.len()), (ContentType::APPLICATION_DATA, length));
                assert!(first[at].iter().all(|byte| *byte == 0xa5));
                let mut replay = replay;
                assert_eq!(opener(aead, 9).open(&mut replay[..whole]), Err(BadRecord::Forged));
            }
        }
    }

    #[test]
    fn one_flipped_bit_anywhere_is_a_forgery() {
        let mut sealer = sealer(Aead::Aes128Gcm, 3);
        let mut record = [1; HEADER + 20 + TRAILER];
        let whole = sealer.seal(ContentType::APPLICATION_DATA, &mut record, 20).unwrap();
        for at in 0..whole {
            let mut tampered = record;
            tampered[at] ^= 0x10;
            assert_eq!(opener(Aead::Aes128Gcm, 3).open(&mut tampered), Err(BadRecord::Forged), "byte {at}");
        }
    }

    #[test]
    fn a_header_is_judged_as_early_as_it_can_be() {
        assert_eq!(measure(&[]), Ok(None));
        assert_eq!(measure(&[23, 3, 3]), Ok(None));
        assert_eq!(measure(b"G"), Err(BadRecord::Unprotected(b'G')));
        assert_eq!(measure(&[22, 3, 3, 0, 4, 0]), Err(BadRecord::Unprotected(22)));
        assert_eq!(measure(&[20, 3, 3, 0, 1]), Err(BadRecord::Unprotected(20)));
        assert_eq!(measure(&[23, 3, 3, 0x41, 0]), Ok(Some(HEADER + MAX_BODY)));
        assert_eq!(measure(&[23, 3, 3, 0x41, 1]), Err(BadRecord::TooLong));
        assert_eq!(measure(&[23, 9, 9, 0, 40]), Ok(Some(45)), "the legacy version is ignored");
    }

    #[test]
    fn padding_is_taken_off_and_padding_alone_is_refused() {
        // Sealing with type 0 and further zeroes in the content is what padding looks like from inside.
        let mut record = [0; HEADER + 8 + TRAILER];
        record[HEADER..HEADER + 3].copy_from_slice(&[b'h', b'i', 23]);
        sealer(Aead::ChaCha20Poly1305, 0).seal(ContentType(0), &mut record, 8).unwrap();
        let (content, at) = opener(Aead::ChaCha20Poly1305, 0).open(&mut record).unwrap();
        assert_eq!((content, &record[at]), (ContentType::APPLICATION_DATA, &b"hi"[..]));
        let mut record = [0; HEADER + 8 + TRAILER];
        sealer(Aead::ChaCha20Poly1305, 0).seal(ContentType(0), &mut record, 8).unwrap();
        assert_eq!(opener(Aead::ChaCha20Poly1305, 0).open(&mut record), Err(BadRecord::Untyped));
    }

    #[test]
    fn a_sequence_number_never_wraps() {
        let mut sealer = sealer(Aead::ChaCha20Poly1305, u64::MAX);
        assert_eq!(sealer.seal(ContentType::ALERT, &mut [0; 64], 2), Err(Spent));
    }

    #[test]
    fn a_fresh_aes_gcm_key_is_due_long_before_its_limit_and_a_chacha_key_never() {
        assert!(!sealer(Aead::Aes128Gcm, AES_GCM_REKEY - 1).is_due());
        assert!(sealer(Aead::Aes256Gcm, AES_GCM_REKEY).is_due());
        assert!(!sealer(Aead::ChaCha20Poly1305, 1 << 40).is_due());
    }
}
