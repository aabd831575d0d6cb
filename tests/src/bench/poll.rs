//! One event loop's door: epoll with a number for each socket.
//!
//! *Invariant:* nothing here allocates once it runs; it must not be what a measurement measures.

use rustix::event::{Timespec, epoll};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

pub use rustix::event::epoll::EventFlags as Flags;

/// Something happened on the socket of this number.
#[derive(Clone, Copy, Debug)]
pub struct Ready {
    /// The number it was added with.
    pub number: usize,
    /// What happened.
    pub flags: Flags,
}

/// Waits for many sockets at once.
pub struct Poll {
    epoll: OwnedFd,
    events: Vec<epoll::Event>,
}

impl Poll {
    /// Without any sockets yet.
    pub fn new() -> crate::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self { epoll, events: Vec::with_capacity(256) })
    }

    /// Adds a socket under a number.
    pub fn add(&self, socket: impl AsFd, number: usize, flags: Flags) -> crate::Result<()> {
        Ok(epoll::add(&self.epoll, socket, epoll::EventData::new_u64(number as u64), flags)?)
    }

    /// Lends the descriptor to something that adds sockets by itself.
    pub fn with<T>(&self, work: impl FnOnce(&OwnedFd) -> T) -> T {
        work(&self.epoll)
    }

    /// Waits, at most so long, and hands each event to `each`.
    pub fn wait(
        &mut self,
        limit: Option<Duration>,
        mut each: impl FnMut(&OwnedFd, Ready) -> crate::Result<()>,
    ) -> crate::Result<usize> {
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        self.events.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut self.events), limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in &self.events {
            let number = usize::try_from(event.data.u64()).unwrap_or(usize::MAX);
            each(&self.epoll, Ready { number, flags: event.flags })?;
        }
        Ok(self.events.len())
    }
}

/// The number that a socket has anyway.
pub fn number(socket: &impl AsRawFd) -> usize {
    usize::try_from(socket.as_raw_fd()).unwrap_or(usize::MAX)
}
