//! Kernel TLS on a connected socket: keys in, confirmed; fresh keys; and the question whether everything has left.
//!
//! The structures are those of linux/tls.h. Nothing here sends or receives.
//! *Invariant:* a failure after the protocol was put on the socket is reported as such: the caller gives the socket up.

use super::{matrix::Ability, record};
use crate::handshake::{Aead, Secrets, Traffic};
use bunter_sys::crypto_info::{Cipher, CryptoInfo};
use bunter_sys::tls::{self, TlsHalf};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

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

/// Why the kernel does not have the keys.
pub(super) enum ArmError {
    /// The kernel does not do TLS; the socket is untouched.
    NotTaken(io::Error),
    /// The kernel does TLS, and then something failed: the socket must not be used any further.
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
        let info = crypto_info(traffic).map_err(half_way(step))?;
        info.put(socket, half).map_err(half_way(step))?;
        confirm(&info, socket, half).map_err(half_way("getsockopt"))?;
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
    /// Records under the present key: there may be fewer, but not more.
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
        crypto_info(&traffic)?.put(socket, TlsHalf::Transmit)?;
        self.earlier_records = self.earlier_records.saturating_add(records);
        self.records = 0;
        Ok(())
    }

    /// A KeyUpdate was received: what follows comes under the next key.
    pub(crate) fn next_receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let traffic = self.secrets.next_receive().map_err(io::Error::other)?;
        crypto_info(&traffic)?.put(socket, TlsHalf::Receive)
    }

    /// Has every byte that was handed to the socket been put into the connection? The kernel may hold back the last
    /// records of a non-blocking sender, and loses them when the socket is shut down before that.
    pub(crate) fn has_drained(&self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        let records = self.earlier_records.wrapping_add(sequence(socket)?);
        has_left(socket, self.armed.base, self.plaintext, records)
    }
}

/// Has the connection taken so many bytes of plaintext in so many records, besides `base` bytes from before the keys?
pub(super) fn has_left(socket: BorrowedFd<'_>, base: u64, plaintext: u64, records: u64) -> io::Result<bool> {
    let expected = base.wrapping_add(plaintext).wrapping_add(OVERHEAD.wrapping_mul(records));
    Ok(tls::bytes_queued_ever(socket)? == expected)
}

/// Records sent under the present key.
pub(super) fn sequence(socket: BorrowedFd<'_>) -> io::Result<u64> {
    CryptoInfo::read(socket, TlsHalf::Transmit).map(|info| info.sequence())
}

/// The keys of one direction, as the kernel takes them.
pub(super) fn crypto_info(traffic: &Traffic) -> io::Result<CryptoInfo> {
    let cipher = match traffic.aead() {
        Aead::Aes128Gcm => Cipher::Aes128Gcm,
        Aead::Aes256Gcm => Cipher::Aes256Gcm,
        Aead::ChaCha20Poly1305 => Cipher::ChaCha20Poly1305,
    };
    CryptoInfo::new(cipher, traffic.key(), traffic.mask(), traffic.sequence())
}

/// Checks that the kernel reports the keys that it was given.
fn confirm(info: &CryptoInfo, socket: BorrowedFd<'_>, half: TlsHalf) -> io::Result<()> {
    if CryptoInfo::read(socket, half)?.is_like(info) { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}
