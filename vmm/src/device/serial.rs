//! The 16550 UART: vm-superio's model between the guest's ports and a file, a socket or the terminal.
//!
//! The guest never waits for whoever reads a socket: what cannot be written is dropped and counted. A terminal or pipe on the
//! standard output sets the pace itself.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use kho_abi::document::device::SerialV1;
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::terminal::Terminal;

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
pub struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The far end of the port.
enum Backend {
    Stdio,
    File(std::fs::File),
    Socket { listener: UnixListener, client: Option<UnixStream> },
    Off,
}

/// Collects what one exit of the guest writes, so that a string instruction costs one system call and not one per byte.
#[derive(Default)]
pub struct Output(Vec<u8>);

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
    uart: Uart<Interrupt, NoEvents, Output>,
    backend: Backend,
    dropped: u64,
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
                Backend::Socket { listener, client: None }
            }
            SerialConfig::Off => Backend::Off,
        };
        Ok(Self { uart: Uart::new(Interrupt(interrupt), Output::default()), backend, dropped: 0 })
    }

    /// The port's registers and the input it has not been asked for yet.
    pub fn save(&self) -> SerialV1 {
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
        SerialV1 {
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
        }
    }

    /// Makes the port what it was. The interrupt controllers must have been restored before, as a pending interrupt is raised
    /// again: it may have been on its way when the state was taken.
    pub fn restore(&mut self, state: &SerialV1) -> Result<(), SerialError> {
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
        } = state.clone();
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
        let interrupt = self
            .uart
            .interrupt_evt()
            .0
            .try_clone()
            .map_err(|source| SerialError::System { operation: "duplicate its eventfd", source })?;
        self.uart = Uart::from_state(&state, Interrupt(interrupt), NoEvents, Output::default())
            .map_err(|error| SerialError::State(error.to_string()))?;
        Ok(())
    }

    fn flush_output(&mut self) {
        let Output(bytes) = self.uart.writer_mut();
        if bytes.is_empty() {
            return;
        }
        let written = match &mut self.backend {
            Backend::Stdio => io::stdout().write_all(bytes).and_then(|()| io::stdout().flush()),
            Backend::File(file) => file.write_all(bytes),
            Backend::Socket { client: Some(client), .. } => client.write_all(bytes),
            Backend::Socket { client: None, .. } | Backend::Off => Ok(()),
        };
        if let Err(error) = written {
            if self.dropped == 0 {
                tracing::warn!(%error, "serial port: output is being dropped; the guest runs on");
            }
            self.dropped += bytes.len() as u64;
        }
        bytes.clear();
    }
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

/// Removes the socket that a dead process left; one that somebody serves stays.
fn remove_stale_socket(path: &PathBuf) -> io::Result<()> {
    match UnixStream::connect(path) {
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EADDRINUSE)),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Brings what the operator types to the port. Lives in the event loop.
pub struct SerialInput {
    serial: Arc<Mutex<Serial>>,
    source: Option<OwnedFd>,
    raw_terminal: bool,
}

const LISTENER: u32 = 1;
const SOURCE: u32 = 2;

impl SerialInput {
    /// Input for `serial`, which was made from `config`. A terminal is switched to raw mode until this is dropped.
    pub fn new(serial: Arc<Mutex<Serial>>, config: &SerialConfig) -> Result<Self, SerialError> {
        let mut input = Self { serial, source: None, raw_terminal: false };
        if *config == SerialConfig::Stdio {
            let stdin = io::stdin();
            let duplicate = stdin
                .as_fd()
                .try_clone_to_owned()
                .map_err(|source| SerialError::System { operation: "duplicate the standard input", source })?;
            input.raw_terminal = rustix::termios::isatty(&stdin) && stdin.lock().set_raw_mode().is_ok();
            input.source = Some(duplicate);
        }
        Ok(input)
    }

    fn serial(&self) -> MutexGuard<'_, Serial> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(&mut self, ops: &mut EventOps) {
        let accepted = match &self.serial().backend {
            Backend::Socket { listener, .. } => listener.accept(),
            _ => return,
        };
        let Ok((client, _)) = accepted else { return };
        // Never wait for a client that does not read.
        let prepared = client.set_nonblocking(true).and_then(|()| client.try_clone());
        let Ok(duplicate) = prepared else { return };
        self.close(ops);
        if let Backend::Socket { client: slot, .. } = &mut self.serial().backend {
            *slot = Some(client);
        }
        let source = OwnedFd::from(duplicate);
        if ops.add(Events::with_data(&source, SOURCE, EventSet::IN)).is_ok() {
            self.source = Some(source);
        }
    }

    fn close(&mut self, ops: &mut EventOps) {
        if let Some(source) = self.source.take()
            && let Err(error) = ops.remove(Events::empty(&source))
        {
            tracing::debug!(?error, "serial port: its input was not being watched");
        }
        if let Backend::Socket { client, .. } = &mut self.serial().backend {
            *client = None;
        }
    }

    fn receive(&mut self, ops: &mut EventOps) {
        let Some(source) = &self.source else { return };
        let mut buffer = [0; 64];
        let mut serial = self.serial();
        // Bytes that the UART cannot take are read and lost, as on a real line without flow control.
        match rustix::io::read(source, &mut buffer) {
            Ok(0) => {
                drop(serial);
                self.close(ops);
            }
            Ok(count) => {
                let _ = serial.uart.enqueue_raw_bytes(&buffer[..count]);
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(_) => {
                drop(serial);
                self.close(ops);
            }
        }
    }
}

impl MutEventSubscriber for SerialInput {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            LISTENER => self.accept(ops),
            _ => self.receive(ops),
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        // A regular file as standard input cannot be watched (EPERM): the guest then gets no input.
        if let Some(source) = &self.source
            && ops.add(Events::with_data(source, SOURCE, EventSet::IN)).is_err()
        {
            self.source = None;
        }
        let listener = match &self.serial().backend {
            Backend::Socket { listener, .. } => Some(listener.as_raw_fd()),
            _ => None,
        };
        if let Some(listener) = listener
            && let Err(error) = ops.add(Events::with_data_raw(listener, LISTENER, EventSet::IN))
        {
            tracing::warn!(?error, "serial port: nobody will be able to connect to its socket");
        }
    }
}

impl Drop for SerialInput {
    fn drop(&mut self) {
        if self.raw_terminal && io::stdin().lock().set_canon_mode().is_err() {
            tracing::debug!("serial port: the terminal stays in raw mode");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serial(config: &SerialConfig) -> Serial {
        Serial::new(config, EventFd::new(libc::EFD_NONBLOCK).unwrap()).unwrap()
    }

    #[test]
    fn string_output_reaches_the_file_whole() {
        let path = tempfile::tempdir().unwrap().keep().join("log");
        let mut port = serial(&SerialConfig::File(path.clone()));
        assert_eq!(port.write(0, b"hello\n"), None);
        assert_eq!(std::fs::read(&path).unwrap(), b"hello\n");
    }

    #[test]
    fn restored_port_still_holds_its_unread_input() {
        let mut port = serial(&SerialConfig::Off);
        port.uart.enqueue_raw_bytes(b"ab").unwrap();
        port.write(7, &[0x5a]);
        let state = port.save();
        let mut other = serial(&SerialConfig::Off);
        other.restore(&state).unwrap();
        assert_eq!(other.save(), state);
        let mut data = [0, 0];
        other.read(0, &mut data);
        assert_eq!(&data, b"ab");
    }

    #[test]
    fn state_with_more_input_than_the_queue_holds_is_refused() {
        let mut port = serial(&SerialConfig::Off);
        let state = SerialV1 { in_buffer: vec![0; 1000], ..port.save() };
        assert!(matches!(port.restore(&state), Err(SerialError::State(_))));
    }

    #[test]
    fn socket_of_a_live_process_is_not_taken_over_but_that_of_a_dead_one_is() {
        let directory = tempfile::tempdir().unwrap();
        let config = SerialConfig::Socket(directory.path().join("s"));
        let first = serial(&config);
        assert!(Serial::new(&config, EventFd::new(0).unwrap()).is_err());
        drop(first);
        serial(&config);
    }

    #[test]
    fn full_backend_does_not_stop_the_guest() {
        let mut port = serial(&SerialConfig::File("/dev/full".into()));
        port.write(0, b"lost");
        assert_eq!(port.dropped, 4);
    }
}
