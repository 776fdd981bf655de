//! What the outside world does with a serial port: attaches, types, reads, detaches.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::net::sockopt::set_socket_send_buffer_size;
use vmm_sys_util::terminal::Terminal;

use super::{Backend, Serial, SerialError};
use crate::config::SerialConfig;

/// How much a client may have been sent and not yet read, roughly: what it leaves unread when it goes is lost, as nobody can tell
/// how much that was. What is not sent waits for it, and is counted when it has to go.
const IN_FLIGHT: usize = 4 << 10;

const LISTENER: u32 = 1;
const SOURCE: u32 = 2;
const SINK: u32 = 3;
const DRAINED: u32 = 4;

/// Brings what the operator types to the port, and to a client of its socket what waits for it. Lives in the event loop.
pub struct SerialInput {
    serial: Arc<Mutex<Serial>>,
    source: Option<OwnedFd>,
    /// The client once more, to be told when it takes more. Another descriptor, so that it can be watched by itself.
    sink: Option<OwnedFd>,
    /// Whether the source is not watched, until the guest has read its input.
    held: bool,
    raw_terminal: bool,
}

impl SerialInput {
    /// Input for `serial`, which was made from `config`. A terminal is switched to raw mode until this is dropped.
    pub fn new(serial: Arc<Mutex<Serial>>, config: &SerialConfig) -> Result<Self, SerialError> {
        let mut input = Self { serial, source: None, sink: None, held: false, raw_terminal: false };
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

    /// The newest client is the one: an older one may be stuck.
    fn accept(&mut self, ops: &mut EventOps) {
        let accepted = match &self.serial().backend {
            Backend::Socket { listener, .. } => listener.accept(),
            _ => return,
        };
        let Ok((client, _)) = accepted else { return };
        let prepare = |client: &UnixStream| {
            // Never wait for a client that does not read.
            client.set_nonblocking(true)?;
            set_socket_send_buffer_size(client, IN_FLIGHT)?;
            Ok::<_, io::Error>((OwnedFd::from(client.try_clone()?), OwnedFd::from(client.try_clone()?)))
        };
        let (source, sink) = match prepare(&client) {
            Ok(both) => both,
            Err(error) => {
                tracing::warn!(%error, "serial port: a client cannot be attached");
                return;
            }
        };
        self.close(ops);
        if ops.add(Events::with_data(&source, SOURCE, EventSet::IN)).is_ok() {
            self.source = Some(source);
        }
        // Told when it has room again, not for as long as it has.
        let room = EventSet::OUT | EventSet::EDGE_TRIGGERED;
        if ops.add(Events::with_data(&sink, SINK, room)).is_ok() {
            self.sink = Some(sink);
        }
        let mut serial = self.serial();
        if let Backend::Socket { client: slot, .. } = &mut serial.backend {
            *slot = Some(client);
        }
        serial.send_backlog();
    }

    fn stop_reading(&mut self, ops: &mut EventOps) {
        let watched = !std::mem::take(&mut self.held);
        if let Some(source) = self.source.take().filter(|_| watched)
            && let Err(error) = ops.remove(Events::empty(&source))
        {
            tracing::debug!(?error, "serial port: its input was not being watched");
        }
    }

    fn close(&mut self, ops: &mut EventOps) {
        self.stop_reading(ops);
        if let Some(sink) = self.sink.take()
            && let Err(error) = ops.remove(Events::empty(&sink))
        {
            tracing::debug!(?error, "serial port: its client was not being watched");
        }
        if let Backend::Socket { client, .. } = &mut self.serial().backend {
            *client = None;
        }
    }

    fn receive(&mut self, gone: bool, ops: &mut EventOps) {
        let Some(source) = &self.source else { return };
        let mut buffer = [0; 64];
        let mut serial = self.serial();
        let room = serial.uart.fifo_capacity().min(buffer.len());
        if room == 0 {
            // What follows waits where it is, until the guest has read what it has.
            drop(serial);
            self.held = ops.remove(Events::empty(source)).is_ok();
            return;
        }
        match rustix::io::read(source, &mut buffer[..room]) {
            Ok(0) if gone => {
                drop(serial);
                self.close(ops);
            }
            Ok(0) => {
                // It has nothing more to say, and may still listen.
                drop(serial);
                self.stop_reading(ops);
            }
            Ok(count) => {
                if let Err(error) = serial.uart.enqueue_raw_bytes(&buffer[..count]) {
                    tracing::debug!(?error, "serial port: input has been lost");
                }
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(_) => {
                drop(serial);
                self.close(ops);
            }
        }
    }

    /// The client takes more, or has gone.
    fn send(&mut self, gone: bool, ops: &mut EventOps) {
        // What one that has gone has typed is still to be read; then it is closed.
        if gone && self.source.is_none() {
            self.close(ops);
        } else {
            self.serial().send_backlog();
        }
    }

    /// The guest has read its input.
    fn go_on(&mut self, ops: &mut EventOps) {
        if let Err(error) = self.serial().drained.read() {
            tracing::debug!(%error, "serial port: nothing to be told");
        }
        if !std::mem::take(&mut self.held) {
            return;
        }
        if let Some(source) = &self.source
            && let Err(error) = ops.add(Events::with_data(source, SOURCE, EventSet::IN))
        {
            tracing::warn!(?error, "serial port: no more input until somebody attaches anew");
            self.held = true;
            self.close(ops);
        }
    }
}

impl MutEventSubscriber for SerialInput {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let gone = events.event_set().contains(EventSet::HANG_UP);
        match events.data() {
            LISTENER => self.accept(ops),
            SOURCE => self.receive(gone, ops),
            SINK => self.send(gone, ops),
            _ => self.go_on(ops),
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        // A regular file as standard input cannot be watched (EPERM): the guest then gets no input.
        if let Some(source) = &self.source
            && ops.add(Events::with_data(source, SOURCE, EventSet::IN)).is_err()
        {
            self.source = None;
        }
        let (listener, drained) = {
            let serial = self.serial();
            let listener = match &serial.backend {
                Backend::Socket { listener, .. } => Some(listener.as_raw_fd()),
                _ => None,
            };
            (listener, serial.drained.as_raw_fd())
        };
        let watched = listener.map(|listener| (listener, LISTENER)).into_iter().chain([(drained, DRAINED)]);
        for (descriptor, number) in watched {
            if let Err(error) = ops.add(Events::with_data_raw(descriptor, number, EventSet::IN)) {
                tracing::warn!(?error, number, "serial port: its socket or its input will be of no use");
            }
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
