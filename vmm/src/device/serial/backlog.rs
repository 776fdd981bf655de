//! What the guest has said and nobody has read: kept for whoever attaches next, up to a limit.

use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;

use kho_abi::document::device::SERIAL_BACKLOG_MAX;

/// The most that is kept, in bytes.
pub const CAPACITY: usize = SERIAL_BACKLOG_MAX;

/// Output without a reader.
#[derive(Default)]
pub struct Backlog(VecDeque<u8>);

impl From<&[u8]> for Backlog {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.iter().copied().collect())
    }
}

impl Backlog {
    /// All of it, oldest first.
    pub fn to_vec(&self) -> Vec<u8> {
        self.0.iter().copied().collect()
    }

    /// Adds up to [`CAPACITY`] bytes and returns how many of the oldest had to go for them.
    pub fn push(&mut self, bytes: &[u8]) -> u64 {
        let excess = (self.0.len() + bytes.len()).saturating_sub(CAPACITY).min(self.0.len());
        self.0.drain(..excess);
        self.0.extend(bytes);
        excess as u64
    }

    /// Gives a client as much as it takes without being waited for. One that has gone is let go.
    pub fn send(&mut self, client: &mut Option<UnixStream>) {
        while let (Some(stream), (bytes, _)) = (client.as_mut(), self.0.as_slices())
            && !bytes.is_empty()
        {
            match stream.write(bytes) {
                Ok(0) => *client = None,
                Ok(count) => drop(self.0.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::debug!(%error, "serial port: its client has gone");
                    *client = None;
                }
            }
        }
    }
}
