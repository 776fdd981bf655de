//! The client's side of a VM's socket, blocking and with a time-out on every call.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::runtime::Runtime;
use zlink::tokio::unix::{Connection, Stream};

use super::balloon::{BalloonError, BalloonProxy, BalloonStatus};
use super::interface::{FrozenDocument, MachineError, MachineProxy, MachineStatus, PreparedFiles};
use super::socket::RunDir;

/// What can go wrong between a client and a VM.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no such VM.
    #[error("there is no VM called {name}")]
    NotThere {
        /// The name asked for.
        name: String,
    },
    /// It does not let us in.
    #[error("cannot connect to VM {name}")]
    Connect {
        /// The VM.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// Its process ended, or closed the connection.
    #[error("VM {name} closed the connection during {operation}: its process has ended")]
    Closed {
        /// The VM.
        name: String,
        /// What was asked of it.
        operation: &'static str,
    },
    /// It did not answer in time.
    #[error("VM {name} did not answer to {operation} within {} s", limit.as_secs_f32())]
    TimedOut {
        /// The VM.
        name: String,
        /// What was asked of it.
        operation: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// It said no.
    #[error("VM {name} refused {operation}")]
    Refused {
        /// The VM.
        name: String,
        /// What was asked of it.
        operation: &'static str,
        /// Its reason.
        source: MachineError,
    },
    /// It answered something else than the interface says.
    #[error("VM {name} does not speak org.kho-vmm.Machine1 as this vmm does ({operation})")]
    Protocol {
        /// The VM.
        name: String,
        /// What was asked of it.
        operation: &'static str,
        /// What was wrong.
        source: zlink::Error,
    },
}

impl ClientError {
    /// What the operator can do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::NotThere { .. } => Some("`vmm list` shows the VMs of this host".to_owned()),
            Self::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some("run vmm as root".to_owned())
            }
            _ => None,
        }
    }

    /// Whether the VM is not there (any more), rather than unwilling.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::NotThere { .. } | Self::Closed { .. })
    }
}

/// Whether it means that whoever was asked has gone.
pub(super) fn is_hangup(error: &zlink::Error) -> bool {
    use zlink::Error::{Io, SocketRead, SocketWrite, UnexpectedEof};
    match error {
        UnexpectedEof | SocketRead | SocketWrite => true,
        Io(error) => matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset),
        _ => false,
    }
}

/// A connection to a VM.
pub struct Client {
    dir: RunDir,
    name: String,
    limit: Duration,
    runtime: Runtime,
    connection: Connection,
    watch: Watch,
    /// A reply is still to come that nobody waits for any more: the next one would be taken for it.
    stale: bool,
}

/// The socket of a connection, to see whether the VM is still there without reading from it.
#[derive(Debug)]
pub struct Watch(OwnedFd);

impl Watch {
    /// Another one for the same connection.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Whether the VM has closed the connection, which it does only by ending.
    pub fn is_closed(&self) -> bool {
        let mut polled = [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::RDHUP)];
        // A poll that fails tells nothing; the next call will.
        rustix::event::poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }
}

/// One call: sends, waits, and says what went wrong in terms of VM and operation.
macro_rules! call {
    ($client:ident, $operation:literal, $future:expr) => {{
        if $client.stale {
            *$client = Self::connect(&$client.dir, &$client.name, $client.limit)?;
        }
        let outcome = {
            let limit = $client.limit;
            let future = $future;
            $client.runtime.block_on(async { tokio::time::timeout(limit, future).await })
        };
        match outcome {
            Err(_elapsed) => {
                $client.stale = true;
                Err(ClientError::TimedOut { name: $client.name.clone(), operation: $operation, limit: $client.limit })
            }
            Ok(Err(error)) => Err($client.transport($operation, error)),
            Ok(Ok(reply)) => Ok(reply),
        }
    }};
}

impl Client {
    /// From now on `limit` holds for each call.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Connects to the VM of that name; `limit` holds for each call.
    pub fn connect(dir: &RunDir, name: &str, limit: Duration) -> Result<Self, ClientError> {
        let socket = UnixStream::connect(dir.socket(name)).map_err(|source| match source.kind() {
            // A socket that refuses is a dead VM's: it counts as much as none.
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NotThere { name: name.to_owned() }
            }
            _ => ClientError::Connect { name: name.to_owned(), source },
        })?;
        let failed = |source| ClientError::Connect { name: name.to_owned(), source };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let watch = Watch(socket.try_clone().map_err(failed)?.into());
        let connection = {
            // The stream registers itself with the runtime it is made in.
            let _inside = runtime.enter();
            Stream::try_from(socket).map(Connection::new).map_err(|error| failed(io::Error::other(error)))?
        };
        Ok(Self { dir: dir.clone(), name: name.to_owned(), limit, runtime, connection, watch, stale: false })
    }

    fn transport(&self, operation: &'static str, source: zlink::Error) -> ClientError {
        let name = self.name.clone();
        if is_hangup(&source) {
            ClientError::Closed { name, operation }
        } else {
            ClientError::Protocol { name, operation, source }
        }
    }

    fn refused<T>(&self, operation: &'static str, reply: Result<T, MachineError>) -> Result<T, ClientError> {
        reply.map_err(|source| ClientError::Refused { name: self.name.clone(), operation, source })
    }

    /// Sees whether the VM is still there.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// `Status`.
    pub fn status(&mut self) -> Result<MachineStatus, ClientError> {
        let reply = call!(self, "status", self.connection.status())?;
        self.refused("status", reply)
    }

    /// `Pause`.
    pub fn pause(&mut self) -> Result<(), ClientError> {
        let reply = call!(self, "pause", self.connection.pause())?;
        self.refused("pause", reply)
    }

    /// `Resume`.
    pub fn resume(&mut self) -> Result<(), ClientError> {
        let reply = call!(self, "resume", self.connection.resume())?;
        self.refused("resume", reply)
    }

    /// `Stop`.
    pub fn stop(&mut self) -> Result<(), ClientError> {
        let reply = call!(self, "stop", self.connection.stop())?;
        self.refused("stop", reply)
    }

    /// `Get` of the balloon, if the VM has one.
    pub fn balloon(&mut self) -> Result<Option<BalloonStatus>, ClientError> {
        match call!(self, "balloon", self.connection.get()) {
            Ok(Err(BalloonError::NoBalloon)) => Ok(None),
            Ok(reply) => self.balloon_refused(reply).map(Some),
            // Of a VM that a `vmm` started which knew of no balloons.
            Err(ClientError::Protocol { source: zlink::Error::VarlinkService(_), .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// `SetTarget` of the balloon.
    pub fn set_balloon(&mut self, bytes: u64) -> Result<(), ClientError> {
        let reply = call!(self, "balloon", self.connection.set_target(bytes))?;
        self.balloon_refused(reply)
    }

    fn balloon_refused<T>(&self, reply: Result<T, BalloonError>) -> Result<T, ClientError> {
        let operation = "balloon";
        let refused = |error: BalloonError| MachineError::OperationFailed {
            operation: operation.to_owned(),
            reason: error.to_string(),
        };
        self.refused(operation, reply.map_err(refused))
    }

    /// `Prepare`, under `lease`; the files are the state file and those of RAM, as many as the reply names.
    pub fn prepare(&mut self, lease: OwnedFd) -> Result<(PreparedFiles, Vec<OwnedFd>), ClientError> {
        let (reply, files) = call!(self, "prepare", self.connection.prepare(vec![lease]))?;
        let prepared = self.refused("prepare", reply)?;
        if files.len() != prepared.ram.len() + 1 {
            return Err(ClientError::Protocol {
                name: self.name.clone(),
                operation: "prepare",
                source: zlink::Error::MissingParameters,
            });
        }
        Ok((prepared, files))
    }

    /// `Freeze`.
    pub fn freeze(&mut self, generation: u64) -> Result<FrozenDocument, ClientError> {
        let reply = call!(self, "freeze", self.connection.freeze(generation))?;
        self.refused("freeze", reply)
    }

    /// `Thaw`.
    pub fn thaw(&mut self) -> Result<(), ClientError> {
        let reply = call!(self, "thaw", self.connection.thaw())?;
        self.refused("thaw", reply)
    }
}
