//! The traffic secrets of a session, and the schedule that makes the next ones.
//!
//! *Invariant:* secrets have neither `Debug` nor `Clone`, and are wiped when they are dropped.

use rustls::{
    ConnectionTrafficSecrets, Error, ExtractedSecrets, client::ClientConnectionData, kernel::KernelConnection,
    server::ServerConnectionData,
};
use zeroize::Zeroizing;

/// The protection of records, by the AEAD of the cipher suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aead {
    /// AES-128-GCM.
    Aes128Gcm,
    /// AES-256-GCM.
    Aes256Gcm,
    /// ChaCha20-Poly1305.
    ChaCha20Poly1305,
}

impl Aead {
    /// All of them, in the order of preference.
    pub const ALL: [Self; 3] = [Self::Aes128Gcm, Self::Aes256Gcm, Self::ChaCha20Poly1305];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes128Gcm => "AES-128-GCM",
            Self::Aes256Gcm => "AES-256-GCM",
            Self::ChaCha20Poly1305 => "ChaCha20-Poly1305",
        }
    }

    /// Bytes of its key.
    pub fn key_length(self) -> usize {
        match self {
            Self::Aes128Gcm => 16,
            Self::Aes256Gcm | Self::ChaCha20Poly1305 => 32,
        }
    }
}

/// The secrets of one direction, and the number of the next record under them.
pub struct Traffic {
    aead: Aead,
    sequence: u64,
    key: Zeroizing<[u8; 32]>,
    mask: Zeroizing<[u8; 12]>,
}

impl Traffic {
    /// From bytes; of `key` only as many of the first bytes count as the AEAD needs.
    pub fn new(aead: Aead, sequence: u64, key: Zeroizing<[u8; 32]>, mask: Zeroizing<[u8; 12]>) -> Self {
        Self { aead, sequence, key, mask }
    }

    /// The AEAD that these secrets are for.
    pub fn aead(&self) -> Aead {
        self.aead
    }
    /// Number of the next record.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }
    /// The key.
    pub fn key(&self) -> &[u8] {
        self.key.get(..self.aead.key_length()).unwrap_or_default()
    }
    /// What is combined with a record's number to make its nonce (`write_iv`, RFC 9846 section 5.3).
    pub fn mask(&self) -> &[u8; 12] {
        &self.mask
    }

    fn from_rustls(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, Error> {
        let (aead, from_key, from_mask) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (Aead::Aes128Gcm, key.as_ref(), iv.as_ref()),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (Aead::Aes256Gcm, key.as_ref(), iv.as_ref()),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                (Aead::ChaCha20Poly1305, key.as_ref(), iv.as_ref())
            }
            _ => return Err(Error::General("the agreed cipher suite is not one that was offered".into())),
        };
        if from_key.len() != aead.key_length() {
            return Err(Error::General("the key is not as long as the cipher suite says".into()));
        }
        let mut key = Zeroizing::new([0; 32]);
        key.iter_mut().zip(from_key).for_each(|(to, from)| *to = *from);
        let mut mask = Zeroizing::new([0; 12]);
        mask.iter_mut().zip(from_mask).for_each(|(to, from)| *to = *from);
        Ok(Self { aead, sequence, key, mask })
    }
}

/// Everything that is needed to carry a connection on after its handshake.
pub struct Secrets {
    transmit: Option<Traffic>,
    receive: Option<Traffic>,
    schedule: Schedule,
}

pub(super) enum Schedule {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl Secrets {
    pub(super) fn new(extracted: ExtractedSecrets, schedule: Schedule) -> Result<Self, Error> {
        let (transmit, receive) = (extracted.tx, extracted.rx);
        Ok(Self {
            transmit: Some(Traffic::from_rustls(transmit.0, &transmit.1)?),
            receive: Some(Traffic::from_rustls(receive.0, &receive.1)?),
            schedule,
        })
    }

    pub(super) fn suite(&self) -> rustls::SupportedCipherSuite {
        match &self.schedule {
            Schedule::Client(schedule) => schedule.negotiated_cipher_suite(),
            Schedule::Server(schedule) => schedule.negotiated_cipher_suite(),
        }
    }

    /// Is this side the client?
    pub fn is_client(&self) -> bool {
        matches!(self.schedule, Schedule::Client(_))
    }

    /// The secrets to send with: the first time those of the handshake, then a fresh set for each KeyUpdate sent.
    pub fn next_transmit(&mut self) -> Result<Traffic, Error> {
        if let Some(first) = self.transmit.take() {
            return Ok(first);
        }
        let (sequence, secrets) = match &mut self.schedule {
            Schedule::Client(schedule) => schedule.update_tx_secret(),
            Schedule::Server(schedule) => schedule.update_tx_secret(),
        }?;
        Traffic::from_rustls(sequence, &secrets)
    }

    /// The secrets to receive with: the first time those of the handshake, then a fresh set for each KeyUpdate received.
    pub fn next_receive(&mut self) -> Result<Traffic, Error> {
        if let Some(first) = self.receive.take() {
            return Ok(first);
        }
        let (sequence, secrets) = match &mut self.schedule {
            Schedule::Client(schedule) => schedule.update_rx_secret(),
            Schedule::Server(schedule) => schedule.update_rx_secret(),
        }?;
        Traffic::from_rustls(sequence, &secrets)
    }
}
