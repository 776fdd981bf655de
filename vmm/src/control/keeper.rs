//! The Varlink interface of the process that keeps VMs which could not be restored. Wire types, as in [`super::interface`].

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use zlink::introspect;
use zlink::tokio::unix::{Connection, Stream};

use super::accept;
use super::client::is_hangup;
use super::interface::RamFile;
use super::socket::RunDir;

/// How long the keeper has to answer: it may start a VM three times, each of which may take a minute.
const PATIENCE: Duration = Duration::from_secs(300);

/// What `Restore` returns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, introspect::Type)]
pub struct RestoredMachine {
    /// How often its process was started, in all.
    pub attempts: u32,
    /// Milliseconds from the request to pause until the guest's first instruction.
    pub blackout_ms: Option<f64>,
}

/// What `Files` returns, beside the files themselves: the state file first, then those of `ram` in its order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, introspect::Type)]
pub struct KeptFiles {
    /// The size of the document in the state file, as the last kernel's index has it.
    pub document_bytes: u64,
    /// The RAM files.
    pub ram: Vec<RamFile>,
}

/// How a method fails.
#[derive(Clone, Debug, PartialEq, Eq, zlink::ReplyError, introspect::ReplyError)]
#[zlink(interface = "org.kho-vmm.Keeper1")]
pub enum KeeperError {
    /// No VM of this name is kept.
    NotKept {
        /// The name.
        name: String,
    },
    /// Somebody else has just asked for it.
    Busy {
        /// The name.
        name: String,
    },
    /// It does not run, and is kept as before.
    NotRestored {
        /// Why, with all causes.
        reason: String,
    },
    /// Its files could not be retrieved.
    NoFiles {
        /// Why, with all causes.
        reason: String,
    },
    /// It is kept as before.
    NotGivenUp {
        /// Why.
        reason: String,
    },
}

// By hand, as for `MachineError`.
impl fmt::Display for KeeperError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotKept { name } => write!(out, "no VM called {name} is kept"),
            Self::Busy { name } => write!(out, "VM {name} is being restored or given up by another command"),
            Self::NotRestored { reason } => write!(out, "it is not restored, and kept as before: {reason}"),
            Self::NoFiles { reason } => write!(out, "its files are not there: {reason}"),
            Self::NotGivenUp { reason } => write!(out, "it cannot be noted that it is given up, it is kept: {reason}"),
        }
    }
}

impl std::error::Error for KeeperError {}

/// The client's side of the interface.
#[zlink::proxy("org.kho-vmm.Keeper1")]
pub trait KeeperProxy {
    /// Tries again to restore a VM.
    async fn restore(&mut self, name: &str) -> zlink::Result<Result<RestoredMachine, KeeperError>>;
    /// Hands out a VM's files.
    #[zlink(return_fds)]
    async fn files(&mut self, name: &str) -> zlink::Result<(Result<KeptFiles, KeeperError>, Vec<OwnedFd>)>;
    /// Gives a VM up, and its memory back to the host.
    async fn discard(&mut self, name: &str) -> zlink::Result<Result<(), KeeperError>>;
}

/// What keeps VMs, as its thread for the socket uses it; calls block.
pub trait Keeper: Send + Sync {
    /// Somebody is connected.
    fn connected(&self);
    /// Somebody has gone.
    fn disconnected(&self);
    /// Tries again to restore a VM.
    fn restore(&self, name: &str) -> Result<RestoredMachine, KeeperError>;
    /// A VM's files.
    fn files(&self, name: &str) -> Result<(KeptFiles, Vec<OwnedFd>), KeeperError>;
    /// Gives a VM up.
    fn discard(&self, name: &str) -> Result<(), KeeperError>;
}

/// Serves a keeper, from a thread of its own, for as long as the process lives.
pub fn serve(keeper: std::sync::Arc<dyn Keeper>, listener: UnixListener) -> io::Result<()> {
    accept::serve(listener, move || {
        keeper.connected();
        Service { keeper: keeper.clone() }
    })
}

/// The service, for one connection.
struct Service {
    keeper: std::sync::Arc<dyn Keeper>,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.keeper.disconnected();
    }
}

impl Service {
    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Keeper) -> Result<T, KeeperError> + Send + 'static,
    ) -> Result<T, KeeperError> {
        let keeper = self.keeper.clone();
        let called = tokio::task::spawn_blocking(move || call(keeper.as_ref())).await;
        called.unwrap_or_else(|error| Err(KeeperError::NotRestored { reason: error.to_string() }))
    }
}

/// Keeps the memory of VMs that could not be restored after a live update.
#[zlink::service(
    interface = "org.kho-vmm.Keeper1",
    vendor = "kho-vmm",
    product = "vmm",
    version = env!("CARGO_PKG_VERSION")
)]
impl Service {
    /// Tries again to restore a VM, from the same memory. Returns when its guest runs.
    #[zlink(interface = "org.kho-vmm.Keeper1", types = [RamFile])]
    async fn restore(&self, name: String) -> Result<RestoredMachine, KeeperError> {
        self.call(move |keeper| keeper.restore(&name)).await
    }

    /// Hands out a VM's files: the state file, then those of its RAM. They are the VM's own: to write to them is to change it.
    #[zlink(return_fds)]
    async fn files(&self, name: String) -> (Result<KeptFiles, KeeperError>, Vec<OwnedFd>) {
        match self.call(move |keeper| keeper.files(&name)).await {
            Ok((files, descriptors)) => (Ok(files), descriptors),
            Err(error) => (Err(error), Vec::new()),
        }
    }

    /// Gives a VM up: its memory is lost, and the host has it back.
    async fn discard(&self, name: String) -> Result<(), KeeperError> {
        self.call(move |keeper| keeper.discard(&name)).await
    }
}

/// What can go wrong between a client and the keeper.
#[derive(Debug, thiserror::Error)]
pub enum KeeperClientError {
    /// No VM is kept on this host, or what keeps it does not answer any more.
    #[error("no VM is kept on this host")]
    NotThere,
    /// It does not let us in.
    #[error("cannot connect to the process that keeps VMs")]
    Connect(#[source] io::Error),
    /// It did not answer in time.
    #[error("the process that keeps VMs did not answer within {} s", PATIENCE.as_secs())]
    TimedOut,
    /// It said no.
    #[error(transparent)]
    Refused(#[from] KeeperError),
    /// It ended before it answered.
    #[error("the process that keeps VMs has ended and not answered")]
    Ended,
    /// It answered something else than the interface says.
    #[error("the process that keeps VMs does not speak org.kho-vmm.Keeper1 as this vmm does")]
    Protocol(#[source] zlink::Error),
}

impl KeeperClientError {
    /// What the operator can do about it.
    pub fn help(&self) -> Option<String> {
        let ended = "where a guardian is left, it holds what was kept and has another go on; `vmm list` shows what runs and what is kept";
        matches!(self, Self::Ended).then(|| ended.to_owned())
    }
}

impl From<zlink::Error> for KeeperClientError {
    fn from(error: zlink::Error) -> Self {
        if is_hangup(&error) { Self::Ended } else { Self::Protocol(error) }
    }
}

/// A connection to what keeps VMs.
pub struct KeeperClient {
    runtime: tokio::runtime::Runtime,
    connection: Connection,
}

impl KeeperClient {
    /// Connects.
    pub fn connect(dir: &RunDir) -> Result<Self, KeeperClientError> {
        let socket = UnixStream::connect(dir.supervisor_socket()).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => KeeperClientError::NotThere,
            _ => KeeperClientError::Connect(error),
        })?;
        let failed = KeeperClientError::Connect;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let connection = {
            // The stream registers itself with the runtime it is made in.
            let _inside = runtime.enter();
            Stream::try_from(socket).map(Connection::new).map_err(|error| failed(io::Error::other(error)))?
        };
        Ok(Self { runtime, connection })
    }

    fn wait<T>(&mut self, call: impl AsyncFnOnce(&mut Connection) -> zlink::Result<T>) -> Result<T, KeeperClientError> {
        let Self { runtime, connection } = self;
        let answered = runtime.block_on(async { tokio::time::timeout(PATIENCE, call(connection)).await });
        Ok(answered.map_err(|_elapsed| KeeperClientError::TimedOut)??)
    }

    /// `Restore`.
    pub fn restore(&mut self, name: &str) -> Result<RestoredMachine, KeeperClientError> {
        Ok(self.wait(async |connection| connection.restore(name).await)??)
    }

    /// `Files`, with the state file and those of RAM, as many as the reply names.
    pub fn files(&mut self, name: &str) -> Result<(KeptFiles, OwnedFd, Vec<OwnedFd>), KeeperClientError> {
        let (reply, mut files) = self.wait(async |connection| connection.files(name).await)?;
        let kept = reply?;
        if files.len() != kept.ram.len() + 1 {
            return Err(KeeperClientError::Protocol(zlink::Error::MissingParameters));
        }
        let state = files.remove(0);
        Ok((kept, state, files))
    }

    /// `Discard`.
    pub fn discard(&mut self, name: &str) -> Result<(), KeeperClientError> {
        Ok(self.wait(async |connection| connection.discard(name).await)??)
    }
}
