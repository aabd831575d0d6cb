//! The keys of one half of a connection as the kernel takes them: the structures of linux/tls.h, from `ktls-sys`.
//!
//! *Invariant:* keys are wiped when they are dropped, and never printed.

use super::tls::{TlsHalf, set_tls_keys, tls_keys};
use ktls_sys::bindings::{
    __IncompleteArrayField, TLS_1_3_VERSION_MAJOR, TLS_1_3_VERSION_MINOR, TLS_CIPHER_AES_GCM_128,
    TLS_CIPHER_AES_GCM_256, TLS_CIPHER_CHACHA20_POLY1305, tls_crypto_info, tls12_crypto_info_aes_gcm_128,
    tls12_crypto_info_aes_gcm_256, tls12_crypto_info_chacha20_poly1305,
};
use std::{
    io,
    os::fd::BorrowedFd,
    slice::{from_raw_parts, from_raw_parts_mut},
};
use zeroize::Zeroize;

/// How records are sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cipher {
    /// AES-128-GCM.
    Aes128Gcm,
    /// AES-256-GCM.
    Aes256Gcm,
    /// ChaCha20-Poly1305.
    ChaCha20Poly1305,
}

/// Keys of one half.
pub struct CryptoInfo(Structure);

enum Structure {
    Aes128(tls12_crypto_info_aes_gcm_128),
    Aes256(tls12_crypto_info_aes_gcm_256),
    ChaCha20(tls12_crypto_info_chacha20_poly1305),
}

// What `bytes` and `bytes_mut` rely on: two 16-bit integers and arrays of bytes, without padding.
const _: () = assert!(size_of::<tls12_crypto_info_aes_gcm_128>() == 4 + 8 + 16 + 4 + 8);
const _: () = assert!(size_of::<tls12_crypto_info_aes_gcm_256>() == 4 + 8 + 32 + 4 + 8);
const _: () = assert!(size_of::<tls12_crypto_info_chacha20_poly1305>() == 4 + 12 + 32 + 8);

impl CryptoInfo {
    /// For TLS 1.3: a key, the mask of the nonces (RFC 9846 section 5.3), and the number of the next record.
    pub fn new(cipher: Cipher, key: &[u8], mask: &[u8], sequence: u64) -> io::Result<Self> {
        let mut info = Self::empty(cipher);
        // Where there is a `salt`, it is the first four bytes of the mask.
        let (iv, own_key, salt, rec_seq): (&mut [u8], &mut [u8], &mut [u8], &mut [u8; 8]) = match &mut info.0 {
            Structure::Aes128(it) => (&mut it.iv, &mut it.key, &mut it.salt, &mut it.rec_seq),
            Structure::Aes256(it) => (&mut it.iv, &mut it.key, &mut it.salt, &mut it.rec_seq),
            Structure::ChaCha20(it) => (&mut it.iv, &mut it.key, &mut [], &mut it.rec_seq),
        };
        let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
        let (first, rest) = mask.split_at_checked(salt.len()).ok_or_else(wrong)?;
        if rest.len() != iv.len() || key.len() != own_key.len() {
            return Err(wrong());
        }
        salt.copy_from_slice(first);
        iv.copy_from_slice(rest);
        own_key.copy_from_slice(key);
        *rec_seq = sequence.to_be_bytes();
        Ok(info)
    }

    /// Gives them to the kernel.
    pub fn put(&self, socket: BorrowedFd<'_>, half: TlsHalf) -> io::Result<()> {
        set_tls_keys(socket, half, self.bytes())
    }

    /// Reads back what the kernel has. The kernel answers only if it is asked for exactly the structure that it has.
    pub fn read(socket: BorrowedFd<'_>, half: TlsHalf) -> io::Result<Self> {
        let mut kind = [0; size_of::<tls_crypto_info>()];
        tls_keys(socket, half, &mut kind)?;
        let [_, _, low, high] = kind;
        let cipher = match u32::from(u16::from_ne_bytes([low, high])) {
            TLS_CIPHER_AES_GCM_128 => Cipher::Aes128Gcm,
            TLS_CIPHER_AES_GCM_256 => Cipher::Aes256Gcm,
            TLS_CIPHER_CHACHA20_POLY1305 => Cipher::ChaCha20Poly1305,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        let mut info = Self::empty(cipher);
        let expected = info.bytes().len();
        let length = tls_keys(socket, half, info.bytes_mut())?;
        if length == expected { Ok(info) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    /// The number of the next record.
    pub fn sequence(&self) -> u64 {
        u64::from_be_bytes(match &self.0 {
            Structure::Aes128(it) => it.rec_seq,
            Structure::Aes256(it) => it.rec_seq,
            Structure::ChaCha20(it) => it.rec_seq,
        })
    }

    /// Are these the same version, cipher and next record? In older kernels the nonce mask comes back elsewhere in the
    /// structure; these say enough about which keys are there.
    pub fn is_like(&self, other: &Self) -> bool {
        self.bytes().get(..4) == other.bytes().get(..4) && self.sequence() == other.sequence()
    }

    fn empty(cipher: Cipher) -> Self {
        let version = (TLS_1_3_VERSION_MAJOR << 8 | TLS_1_3_VERSION_MINOR) as u16;
        let info = |cipher: u32| tls_crypto_info { version, cipher_type: cipher as u16 };
        Self(match cipher {
            Cipher::Aes128Gcm => Structure::Aes128(tls12_crypto_info_aes_gcm_128 {
                info: info(TLS_CIPHER_AES_GCM_128),
                iv: [0; 8],
                key: [0; 16],
                salt: [0; 4],
                rec_seq: [0; 8],
            }),
            Cipher::Aes256Gcm => Structure::Aes256(tls12_crypto_info_aes_gcm_256 {
                info: info(TLS_CIPHER_AES_GCM_256),
                iv: [0; 8],
                key: [0; 32],
                salt: [0; 4],
                rec_seq: [0; 8],
            }),
            Cipher::ChaCha20Poly1305 => Structure::ChaCha20(tls12_crypto_info_chacha20_poly1305 {
                info: info(TLS_CIPHER_CHACHA20_POLY1305),
                iv: [0; 12],
                key: [0; 32],
                salt: __IncompleteArrayField::new(),
                rec_seq: [0; 8],
            }),
        })
    }

    fn bytes(&self) -> &[u8] {
        let (start, length): (*const u8, usize) = match &self.0 {
            Structure::Aes128(it) => ((&raw const *it).cast(), size_of_val(it)),
            Structure::Aes256(it) => ((&raw const *it).cast(), size_of_val(it)),
            Structure::ChaCha20(it) => ((&raw const *it).cast(), size_of_val(it)),
        };
        // SAFETY: a live C structure without padding (asserted above), all of whose bytes are initialised, borrowed for as
        // long as the slice. JUSTIFICATION: the kernel takes the structure by its bytes, and `ktls-sys` has no safe view.
        unsafe { from_raw_parts(start, length) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let (start, length): (*mut u8, usize) = match &mut self.0 {
            Structure::Aes128(it) => ((&raw mut *it).cast(), size_of_val(it)),
            Structure::Aes256(it) => ((&raw mut *it).cast(), size_of_val(it)),
            Structure::ChaCha20(it) => ((&raw mut *it).cast(), size_of_val(it)),
        };
        // SAFETY: as in `bytes`, borrowed for this slice alone; any bytes are a valid structure. JUSTIFICATION: as there.
        unsafe { from_raw_parts_mut(start, length) }
    }
}

impl Drop for CryptoInfo {
    fn drop(&mut self) {
        self.bytes_mut().zeroize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_for_the_kernel_is_laid_out_as_in_linux_tls_h() {
        let mask = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
        let info = CryptoInfo::new(Cipher::Aes256Gcm, &[0xaa; 32], &mask, 5).unwrap();
        let bytes = info.bytes();
        assert_eq!((bytes.len(), info.sequence()), (56, 5));
        assert_eq!(bytes[..2], 0x0304_u16.to_ne_bytes());
        assert_eq!(bytes[2..4], 52_u16.to_ne_bytes());
        assert_eq!(bytes[4..12], [4, 5, 6, 7, 8, 9, 10, 11], "iv");
        assert_eq!(bytes[12..44], [0xaa; 32], "key");
        assert_eq!(bytes[44..48], [0, 1, 2, 3], "salt");
        assert_eq!(bytes[48..], [0, 0, 0, 0, 0, 0, 0, 5], "rec_seq");
        let info = CryptoInfo::new(Cipher::ChaCha20Poly1305, &[0xbb; 32], &[9; 12], 0).unwrap();
        assert_eq!((info.bytes().len(), &info.bytes()[4..16]), (56, &[9; 12][..]));
        assert_eq!(CryptoInfo::new(Cipher::Aes128Gcm, &[0xcc; 16], &[9; 12], 0).unwrap().bytes().len(), 40);
    }

    #[test]
    fn keys_of_another_length_are_refused() {
        for (key, mask) in [(&[0; 16][..], &[0; 12][..]), (&[0; 32], &[0; 8]), (&[0; 32], &[]), (&[], &[0; 12])] {
            assert!(CryptoInfo::new(Cipher::Aes256Gcm, key, mask, 0).is_err());
        }
    }
}
