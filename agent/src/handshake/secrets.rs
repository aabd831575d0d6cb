//! The traffic secrets of a session, and the schedule that makes the next ones.
//!
//! *Invariant:* secrets have neither `Debug` nor `Clone`; rustls wipes them when they are dropped.

use rustls::{
    ConnectionTrafficSecrets, Error, ExtractedSecrets, SupportedCipherSuite, client::ClientConnectionData,
    kernel::KernelConnection, server::ServerConnectionData,
};

/// The secrets of one direction, and the number of the next record under them.
pub struct Traffic {
    /// Record number.
    pub sequence: u64,
    /// Key and nonce mask.
    pub secrets: ConnectionTrafficSecrets,
}

/// Everything that it takes to carry on a connection after its handshake.
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
    pub(super) fn new(extracted: ExtractedSecrets, schedule: Schedule) -> Self {
        let (transmit, receive) = (extracted.tx, extracted.rx);
        Self {
            transmit: Some(Traffic { sequence: transmit.0, secrets: transmit.1 }),
            receive: Some(Traffic { sequence: receive.0, secrets: receive.1 }),
            schedule,
        }
    }

    /// The agreed cipher suite.
    pub fn suite(&self) -> SupportedCipherSuite {
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
        match self.transmit.take() {
            Some(first) => Ok(first),
            None => self.schedule.transmit(),
        }
    }

    /// The secrets to receive with: the first time those of the handshake, then a fresh set for each KeyUpdate received.
    pub fn next_receive(&mut self) -> Result<Traffic, Error> {
        match self.receive.take() {
            Some(first) => Ok(first),
            None => self.schedule.receive(),
        }
    }
}

impl Schedule {
    fn transmit(&mut self) -> Result<Traffic, Error> {
        let (sequence, secrets) = match self {
            Self::Client(schedule) => schedule.update_tx_secret(),
            Self::Server(schedule) => schedule.update_tx_secret(),
        }?;
        Ok(Traffic { sequence, secrets })
    }

    fn receive(&mut self) -> Result<Traffic, Error> {
        let (sequence, secrets) = match self {
            Self::Client(schedule) => schedule.update_rx_secret(),
            Self::Server(schedule) => schedule.update_rx_secret(),
        }?;
        Ok(Traffic { sequence, secrets })
    }
}
