//! Kernel TLS on a connected socket: keys in, confirmed; fresh keys; and the question whether everything has left.
//!
//! The structures are those of linux/tls.h. Nothing here sends or receives.
//! *Invariant:* a failure after the protocol was put on the socket is reported as such: the caller gives the socket up.

use super::{matrix::Ability, record};
use crate::handshake::{Aead, Secrets, Traffic};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};
use wimsey_sys::tls::{self, TlsHalf};
use zeroize::Zeroizing;

/// `TLS_1_3_VERSION`.
const VERSION: u16 = 0x0304;
/// `TLS_CIPHER_AES_GCM_128`, `TLS_CIPHER_AES_GCM_256`, `TLS_CIPHER_CHACHA20_POLY1305`.
const AES_128: u16 = 51;
const AES_256: u16 = 52;
const CHACHA: u16 = 54;
/// The largest of the three structures.
const MAX_INFO: usize = 56;
/// Length of `rec_seq`, which ends each of the structures.
const SEQUENCE: usize = 8;
/// What the kernel adds to the plaintext of a record: header, content type, tag.
const OVERHEAD: u64 = 22;

/// A socket that the kernel has the keys of.
pub(super) struct Armed {
    ability: Ability,
    /// Bytes that had been put into the connection before the keys.
    base: u64,
    /// After how many records a fresh key is due.
    due: u64,
}

/// Why the kernel has not the keys.
pub(super) enum ArmError {
    /// The kernel does not do TLS; the socket is untouched.
    NotTaken(io::Error),
    /// It does, and then something failed: the socket must not be used any further.
    HalfWay {
        /// Which system call.
        step: &'static str,
        /// What it said.
        error: io::Error,
    },
}

/// Gives the kernel both directions of a connection whose handshake is written out and whose next unread byte begins a
/// record, and makes sure that it has them.
pub(super) fn arm(
    socket: &impl AsFd,
    transmit: &Traffic,
    receive: &Traffic,
    ability: Ability,
) -> Result<Armed, ArmError> {
    let socket = socket.as_fd();
    let half_way = |step| move |error| ArmError::HalfWay { step, error };
    let base = tls::bytes_queued_ever(socket).map_err(ArmError::NotTaken)?;
    tls::set_tls_protocol(socket).map_err(ArmError::NotTaken)?;
    for (half, traffic, step) in
        [(TlsHalf::Transmit, transmit, "setsockopt TLS_TX"), (TlsHalf::Receive, receive, "setsockopt TLS_RX")]
    {
        let info = CryptoInfo::new(traffic).map_err(half_way(step))?;
        tls::set_tls_keys(socket, half, info.as_bytes()).map_err(half_way(step))?;
        info.confirm(socket, half).map_err(half_way("getsockopt"))?;
    }
    Ok(Armed { ability, base, due: record::rekey_after(transmit.aead()) })
}

/// What engine `kernel` keeps for a connection.
pub(crate) struct KernelKeys {
    secrets: Secrets,
    armed: Armed,
    /// Application and control bytes handed to the socket.
    plaintext: u64,
    /// Records under earlier keys.
    earlier_records: u64,
    /// Records under the present key, not fewer than there are.
    records: u64,
}

impl KernelKeys {
    pub(super) fn new(armed: Armed, secrets: Secrets) -> Self {
        Self { secrets, armed, plaintext: 0, earlier_records: 0, records: 0 }
    }

    pub(super) fn set_due(&mut self, records: u64) {
        self.armed.due = self.armed.due.min(records);
    }

    /// Is this side the client?
    pub(crate) fn is_client(&self) -> bool {
        self.secrets.is_client()
    }

    /// Does the kernel take fresh keys?
    pub(crate) fn can_rekey(&self) -> bool {
        self.armed.ability.rekey
    }

    /// Is it time for a fresh key?
    pub(crate) fn is_due(&self) -> bool {
        self.records >= self.armed.due
    }

    /// So many bytes were handed to the socket in one call.
    pub(crate) fn count(&mut self, plaintext: usize) {
        let plaintext = plaintext as u64;
        self.plaintext = self.plaintext.saturating_add(plaintext);
        self.records = self.records.saturating_add(plaintext.div_ceil(1 << 14));
    }

    /// A KeyUpdate was handed to the socket: what follows goes under the next key.
    pub(crate) fn next_transmit(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let records = sequence(socket)?;
        let traffic = self.secrets.next_transmit().map_err(io::Error::other)?;
        tls::set_tls_keys(socket, TlsHalf::Transmit, CryptoInfo::new(&traffic)?.as_bytes())?;
        self.earlier_records = self.earlier_records.saturating_add(records);
        self.records = 0;
        Ok(())
    }

    /// A KeyUpdate was received: what follows comes under the next key.
    pub(crate) fn next_receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let traffic = self.secrets.next_receive().map_err(io::Error::other)?;
        tls::set_tls_keys(socket, TlsHalf::Receive, CryptoInfo::new(&traffic)?.as_bytes())
    }

    /// Has every byte that was handed to the socket been put into the connection? The kernel may hold back the last
    /// records of a non-blocking sender, and loses them when the socket is shut down before that.
    pub(crate) fn has_drained(&self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        let records = self.earlier_records.wrapping_add(sequence(socket)?);
        has_left(socket, self.armed.base, self.plaintext, records)
    }
}

/// Are so many bytes of plaintext in so many records in the connection, besides `base` bytes from before the keys?
pub(super) fn has_left(socket: BorrowedFd<'_>, base: u64, plaintext: u64, records: u64) -> io::Result<bool> {
    let expected = base.wrapping_add(plaintext).wrapping_add(OVERHEAD.wrapping_mul(records));
    Ok(tls::bytes_queued_ever(socket)? == expected)
}

/// Records sent under the present key.
pub(super) fn sequence(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut info = Zeroizing::new([0; MAX_INFO]);
    let length = told(socket, TlsHalf::Transmit, &mut info)?;
    info.get(..length)
        .and_then(|info| info.last_chunk::<SEQUENCE>())
        .map(|sequence| u64::from_be_bytes(*sequence))
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// Reads the keys of one half back. The kernel wants to be asked for exactly the structure that it has.
fn told(socket: BorrowedFd<'_>, half: TlsHalf, into: &mut [u8; MAX_INFO]) -> io::Result<usize> {
    // `struct tls_crypto_info`, which begins each structure and says which one it is.
    let mut kind = [0; 4];
    tls::tls_keys(socket, half, &mut kind)?;
    let [_, _, low, high] = kind;
    let length = length_of(u16::from_ne_bytes([low, high])).ok_or(io::ErrorKind::InvalidData)?;
    tls::tls_keys(socket, half, into.get_mut(..length).unwrap_or_default())
}

/// A `tls12_crypto_info_*` structure, wiped when dropped.
pub(super) struct CryptoInfo {
    bytes: Zeroizing<[u8; MAX_INFO]>,
    length: usize,
}

impl CryptoInfo {
    pub(super) fn new(traffic: &Traffic) -> io::Result<Self> {
        let (cipher, key, mask) = (cipher(traffic.aead()), traffic.key(), traffic.mask());
        // AES-GCM: the first four bytes of the nonce mask are the `salt`, which stands behind the key.
        let (salt, mask) = mask.split_at_checked(if cipher == CHACHA { 0 } else { 4 }).unwrap_or_default();
        let mut info = Self { bytes: Zeroizing::new([0; MAX_INFO]), length: 0 };
        let (version, cipher_bytes) = (VERSION.to_ne_bytes(), cipher.to_ne_bytes());
        let sequence = traffic.sequence().to_be_bytes();
        for part in [&version[..], &cipher_bytes, mask, key, salt, &sequence] {
            let end = info.length + part.len();
            info.bytes.get_mut(info.length..end).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(part);
            info.length = end;
        }
        if length_of(cipher) == Some(info.length) { Ok(info) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    /// The kernel says back what it was told.
    pub(super) fn confirm(&self, socket: BorrowedFd<'_>, half: TlsHalf) -> io::Result<()> {
        let mut back = Zeroizing::new([0; MAX_INFO]);
        let length = told(socket, half, &mut back)?;
        // In older kernels the nonce mask comes back elsewhere in the structure; version, cipher and length say enough
        // about which keys are there, and the number of the next record that they are these.
        let same = back.get(..4) == self.bytes.get(..4)
            && length == self.length
            && back.get(length - SEQUENCE..length) == self.bytes.get(length - SEQUENCE..length);
        if same { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    }
}

fn cipher(aead: Aead) -> u16 {
    match aead {
        Aead::Aes128Gcm => AES_128,
        Aead::Aes256Gcm => AES_256,
        Aead::ChaCha20Poly1305 => CHACHA,
    }
}

fn length_of(cipher: u16) -> Option<usize> {
    match cipher {
        AES_128 => Some(40),
        AES_256 | CHACHA => Some(56),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_for_the_kernel_is_laid_out_as_in_linux_tls_h() {
        let mask = Zeroizing::new([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
        let traffic = Traffic::new(Aead::Aes256Gcm, 5, Zeroizing::new([0xaa; 32]), mask);
        let info = CryptoInfo::new(&traffic).unwrap();
        let bytes = info.as_bytes();
        assert_eq!(bytes.len(), 56);
        assert_eq!(bytes[..2], 0x0304_u16.to_ne_bytes());
        assert_eq!(bytes[2..4], 52_u16.to_ne_bytes());
        assert_eq!(bytes[4..12], [4, 5, 6, 7, 8, 9, 10, 11], "iv");
        assert_eq!(bytes[12..44], [0xaa; 32], "key");
        assert_eq!(bytes[44..48], [0, 1, 2, 3], "salt");
        assert_eq!(bytes[48..], [0, 0, 0, 0, 0, 0, 0, 5], "rec_seq");
        let traffic = Traffic::new(Aead::ChaCha20Poly1305, 0, Zeroizing::new([0xbb; 32]), Zeroizing::new([9; 12]));
        let info = CryptoInfo::new(&traffic).unwrap();
        assert_eq!((info.as_bytes().len(), &info.as_bytes()[4..16]), (56, &[9; 12][..]));
        let traffic = Traffic::new(Aead::Aes128Gcm, 0, Zeroizing::new([0xcc; 32]), Zeroizing::new([9; 12]));
        assert_eq!(CryptoInfo::new(&traffic).unwrap().as_bytes().len(), 40);
    }
}
