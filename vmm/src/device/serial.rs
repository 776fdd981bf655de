//! The 16550 UART: vm-superio's model between the guest's ports and a file, a socket or the terminal.
//!
//! The guest never waits for whoever reads a socket: what is not read is kept up to a limit, then the oldest of it is dropped and
//! counted. A terminal or pipe on the standard output sets the pace itself. What is typed waits with whoever types it until the
//! guest has read what came before.

mod backlog;
mod input;
#[cfg(test)]
mod tests;

pub use input::SerialInput;

use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kho_abi::document::device::{SerialV1, SerialV2};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use self::backlog::Backlog;
use crate::bus::{BusDevice, Request};
use crate::config::SerialConfig;

/// Ports of a 16550.
pub const SIZE: u64 = 8;

/// What can go wrong with a serial port.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// The file or socket behind the port cannot be opened.
    #[error("serial port: cannot open {path}")]
    Open {
        /// The file or socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// An eventfd or a duplicate of a descriptor could not be had.
    #[error("serial port: cannot {operation}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The document's state is none a UART can have.
    #[error("serial port: the state handed over is impossible ({0})")]
    State(String),
}

/// The interrupt line: an eventfd that KVM turns into an edge.
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the event loop that the guest has read all of its input.
struct Drained(Arc<EventFd>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        // It fails only where nobody has looked for 2^64 times, and then they still will.
        drop(self.0.write(1));
    }
}

/// The far end of the port.
enum Backend {
    Stdio,
    File(std::fs::File),
    Socket { listener: UnixListener, client: Option<UnixStream>, backlog: Backlog },
    Off,
}

/// Collects what one exit of the guest writes, so that a string instruction costs one system call and not one per byte.
#[derive(Default)]
struct Output(Vec<u8>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A serial port of the guest.
pub struct Serial {
    uart: Uart<Interrupt, Drained, Output>,
    backend: Backend,
    drained: Arc<EventFd>,
    dropped: Arc<AtomicU64>,
}

impl Serial {
    /// Opens what is behind the port. `interrupt` becomes the port's interrupt line.
    pub fn new(config: &SerialConfig, interrupt: EventFd) -> Result<Self, SerialError> {
        let open = |path: &PathBuf| {
            let path = path.clone();
            move |source| SerialError::Open { path, source }
        };
        let backend = match config {
            SerialConfig::Stdio => Backend::Stdio,
            SerialConfig::File(path) => {
                Backend::File(std::fs::File::options().create(true).append(true).open(path).map_err(open(path))?)
            }
            SerialConfig::Socket(path) => {
                remove_stale_socket(path).map_err(open(path))?;
                let listener = UnixListener::bind(path).map_err(open(path))?;
                listener.set_nonblocking(true).map_err(open(path))?;
                Backend::Socket { listener, client: None, backlog: Backlog::default() }
            }
            SerialConfig::Off => Backend::Off,
        };
        let drained = EventFd::new(libc::EFD_NONBLOCK)
            .map_err(|source| SerialError::System { operation: "create an eventfd", source })?;
        let drained = Arc::new(drained);
        let uart = Uart::with_events(Interrupt(interrupt), Drained(drained.clone()), Output::default());
        Ok(Self { uart, backend, drained, dropped: Arc::default() })
    }

    /// How many bytes of output have been dropped: can be looked at without waiting for the port.
    pub fn dropped(&self) -> Arc<AtomicU64> {
        self.dropped.clone()
    }

    /// The port's registers, the input it has not been asked for yet, and the output that nobody has read yet.
    pub fn save(&self) -> SerialV2 {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.uart.state();
        let port = SerialV1 {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        };
        let backlog = match &self.backend {
            Backend::Socket { listener: _, client: _, backlog } => backlog.to_vec(),
            Backend::Stdio | Backend::File(_) | Backend::Off => Vec::new(),
        };
        SerialV2 { port, backlog, dropped: self.dropped.load(Ordering::Relaxed) }
    }

    /// Makes the port what it was. The interrupt controllers must have been restored before, as a pending interrupt is raised
    /// again: it may have been on its way when the state was taken.
    pub fn restore(&mut self, state: &SerialV2) -> Result<(), SerialError> {
        let SerialV2 { port, backlog: kept, dropped } = state;
        let SerialV1 {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = port.clone();
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        };
        match &mut self.backend {
            Backend::Socket { listener: _, client: _, backlog } => *backlog = Backlog::from(kept.as_slice()),
            Backend::Stdio | Backend::File(_) | Backend::Off if !kept.is_empty() => {
                let reason = format!("{} bytes wait for a reader, and the port has no socket", kept.len());
                return Err(SerialError::State(reason));
            }
            Backend::Stdio | Backend::File(_) | Backend::Off => {}
        }
        self.dropped.store(*dropped, Ordering::Relaxed);
        let interrupt = self
            .uart
            .interrupt_evt()
            .0
            .try_clone()
            .map_err(|source| SerialError::System { operation: "duplicate its eventfd", source })?;
        // This raises what is pending: enabled, and not yet acknowledged by the guest.
        self.uart = Uart::from_state(&state, Interrupt(interrupt), Drained(self.drained.clone()), Output::default())
            .map_err(|error| SerialError::State(error.to_string()))?;
        Ok(())
    }

    fn flush_output(&mut self) {
        let Output(bytes) = self.uart.writer_mut();
        if bytes.is_empty() {
            return;
        }
        let dropped = match &mut self.backend {
            Backend::Stdio => lost(io::stdout().write_all(bytes).and_then(|()| io::stdout().flush()), bytes),
            Backend::File(file) => lost(file.write_all(bytes), bytes),
            Backend::Socket { listener: _, client, backlog } => {
                // First to whom it is for: what they take needs no room.
                let mut dropped = 0;
                for part in bytes.chunks(backlog::CAPACITY) {
                    dropped += backlog.push(part);
                    backlog.send(client);
                }
                dropped
            }
            Backend::Off => 0,
        };
        bytes.clear();
        if dropped > 0 && self.dropped.fetch_add(dropped, Ordering::Relaxed) == 0 {
            tracing::warn!("serial port: output is being dropped; the guest runs on");
        }
    }

    /// Gives the client what waits for it.
    fn send_backlog(&mut self) {
        if let Backend::Socket { listener: _, client, backlog } = &mut self.backend {
            backlog.send(client);
        }
    }
}

/// How many of these bytes are lost, as their write went.
fn lost(written: io::Result<()>, bytes: &[u8]) -> u64 {
    if let Err(error) = &written {
        tracing::debug!(%error, "serial port: output has been dropped");
    }
    if written.is_err() { bytes.len() as u64 } else { 0 }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for byte in data {
            *byte = self.uart.read(offset as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        for &byte in data {
            if let Err(error) = self.uart.write(offset as u8, byte) {
                tracing::debug!(?error, "serial port: a write of the guest had no effect");
            }
        }
        self.flush_output();
        None
    }
}

/// Removes the socket that a dead process left; one that somebody serves stays, and so does what is no socket.
fn remove_stale_socket(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {}
        // To bind there will fail, and say why.
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    // Of another kind than what is served there: so the kernel tells whether it is served, and whoever is attached stays.
    match UnixDatagram::unbound()?.connect(path) {
        Ok(()) => Err(io::Error::from_raw_os_error(libc::EADDRINUSE)),
        Err(error) if error.raw_os_error() == Some(libc::EPROTOTYPE) => {
            Err(io::Error::from_raw_os_error(libc::EADDRINUSE))
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
