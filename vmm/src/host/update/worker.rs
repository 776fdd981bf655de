//! One thread per VM, so that all VMs go through each phase at the same time.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use anyhow::{Context, anyhow};
use kho_abi::document::header;
use kho_abi::document::index::IndexEntryV2;
use kho_abi::document::timeline::{Phase, TimelineV3};

use super::check::Candidate;
use crate::arch;
use crate::control::client::{Client, ClientError, Watch};
use crate::control::interface::{MachineState, MachineStatus, known_marks};
use crate::fault::{self, Process};
use crate::handover::luo::{Device, OutgoingSession};
use crate::host::digest::digest;
use crate::host::proof::{Map, Proven};

/// How often a worker with nothing to do looks whether its VM is still there.
const LOOK: Duration = Duration::from_millis(20);

/// What a worker is told.
pub enum Command {
    /// Ready the VM and preserve its files.
    Prepare {
        /// The lease to give it.
        lease: OwnedFd,
        /// Where the sessions come from.
        device: Arc<Device>,
        /// How long the VM may take.
        limit: Duration,
    },
    /// Pause the guest and have its document written.
    Freeze {
        /// Of this update.
        generation: u64,
        /// How long the VM may take.
        limit: Duration,
    },
    /// Show that all of its memory is in the map of what is handed over.
    Prove(Arc<Map>),
    /// Take the checksum of all of its memory.
    Digest,
    /// Let the guest run on, then give its files up.
    Undo,
}

/// What a worker has done.
pub enum Done {
    /// The VM is ready and its files are preserved. The entry's document is yet to come.
    Prepared(IndexEntryV2),
    /// The guest is paused, its document is written and was found complete.
    Frozen {
        /// The document's size.
        document_bytes: u64,
        /// When it happened.
        marks: Vec<(Phase, u64)>,
    },
    /// The guest has ended by itself, and takes no part any more.
    Ended,
    /// All of its memory is preserved.
    Proven(Proven),
    /// Its memory has this checksum.
    Digested {
        /// The checksum.
        content: u64,
        /// When it was known.
        counter: u64,
    },
    /// The VM was told to run on, with this outcome.
    Thawed(Result<(), ClientError>),
    /// The VM's files are no longer preserved.
    Released,
}

/// The main thread's end of a worker.
pub struct Worker {
    /// The VM.
    pub name: String,
    /// Whether it is still there.
    pub watch: Watch,
    /// What the index will say about it, once it is prepared.
    pub entry: Option<IndexEntryV2>,
    /// Whether the guest has ended by itself meanwhile.
    pub ended: bool,
    commands: Sender<Command>,
}

impl Worker {
    /// Starts one, which reports through `tell`.
    pub fn start(
        vm: Candidate,
        frequency_hz: u64,
        tell: impl Fn(Result<Done, anyhow::Error>) + Send + 'static,
    ) -> io::Result<Self> {
        let Candidate { status, client } = vm;
        let (commands, inbox) = mpsc::channel();
        let watch = client.watch().try_clone()?;
        let name = status.name;
        let work = Work { name: name.clone(), frequency_hz, client, preserved: None, ended: false };
        std::thread::Builder::new().name(format!("vm {name}")).spawn(move || work.run(&inbox, tell))?;
        Ok(Self { name, watch, entry: None, ended: false, commands })
    }

    /// Gives it something to do. One that has ended has said so.
    pub fn tell(&self, command: Command) {
        drop(self.commands.send(command));
    }
}

/// The worker's end.
struct Work {
    name: String,
    frequency_hz: u64,
    client: Client,
    preserved: Option<Preserved>,
    ended: bool,
}

/// What is to outlive this kernel. All of it is held until the reboot: a session that is closed gives up its files.
struct Preserved {
    _session: OutgoingSession,
    state: OwnedFd,
    /// With the sizes.
    ram: Vec<(OwnedFd, u64)>,
}

impl Work {
    fn run(mut self, inbox: &Receiver<Command>, tell: impl Fn(Result<Done, anyhow::Error>)) {
        let mut gone = false;
        loop {
            let command = inbox.recv_timeout(LOOK);
            if self.ended {
                match command {
                    Ok(Command::Undo) => tell(Ok(Done::Released)),
                    Ok(_) => tell(Ok(Done::Ended)),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                continue;
            }
            match command {
                Ok(Command::Prepare { lease, device, limit }) => {
                    self.client.set_limit(limit);
                    let done = self.prepare(lease, &device);
                    tell(self.unless_ended(done));
                }
                Ok(Command::Freeze { generation, limit }) => {
                    self.client.set_limit(limit);
                    let done = self.freeze(generation);
                    tell(self.unless_ended(done));
                }
                Ok(Command::Prove(map)) => tell(self.prove(&map)),
                Ok(Command::Digest) => tell(self.digest()),
                Ok(Command::Undo) => {
                    // A guest waits for nothing: it runs on before its files are given up, which takes longer.
                    tell(Ok(Done::Thawed(self.thaw())));
                    self.preserved = None;
                    tell(Ok(Done::Released));
                }
                Err(RecvTimeoutError::Timeout) => {
                    if !gone && self.client.watch().is_closed() {
                        gone = true;
                        tell(Err(anyhow!("its process has ended")));
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// A guest that ends by itself is no failure. Its process waits to be asked; then it is let go, and its files are given up.
    fn unless_ended(&mut self, done: Result<Done, anyhow::Error>) -> Result<Done, anyhow::Error> {
        let ended = |vm: MachineStatus| vm.state == MachineState::Ended;
        if done.is_ok() || !self.client.status().is_ok_and(ended) {
            return done;
        }
        if let Err(error) = self.client.thaw() {
            tracing::debug!(%error, vm = self.name, "it has ended, and does not answer");
        }
        self.preserved = None;
        self.ended = true;
        Ok(Done::Ended)
    }

    fn prepare(&mut self, lease: OwnedFd, device: &Device) -> Result<Done, anyhow::Error> {
        let (prepared, files) = self.client.prepare(lease)?;
        let session_name = kho_abi::names::session_name(&self.name).context("no session can have its name")?;
        let mut files = files.into_iter();
        let state = files.next().context("it sent no state file")?;
        let ram_files: Vec<OwnedFd> = files.collect();
        let session = device.create_session(&session_name)?;
        session.preserve(prepared.state_token, state.as_fd())?;
        for (range, file) in prepared.ram.iter().zip(&ram_files) {
            // As if it had been forgotten: no session would know that it is a guest's memory.
            if !fault::is_flipped(Process::Update, Phase::Prepared, Some(&self.name)) {
                session.preserve(range.token, file.as_fd())?;
            }
        }
        let entry = IndexEntryV2 {
            name: self.name.clone(),
            session: session.name().to_owned(),
            state_token: prepared.state_token,
            // Until it is known: what the largest would have, so that a draft of the index is no smaller than the index.
            document_bytes: header::CAP as u64,
            ram: prepared.ram.iter().map(|range| (range.token, range.size)).collect(),
            marks: TimelineV3::new(self.frequency_hz),
            frames: None,
            content: None,
        };
        let sizes = prepared.ram.iter().map(|range| range.size);
        let ram = ram_files.into_iter().zip(sizes).collect();
        self.preserved = Some(Preserved { _session: session, state, ram });
        Ok(Done::Prepared(entry))
    }

    fn freeze(&mut self, generation: u64) -> Result<Done, anyhow::Error> {
        let frozen = self.client.freeze(generation)?;
        let preserved = self.preserved.as_ref().context("it was frozen without being prepared")?;
        let document_bytes = frozen.document_bytes;
        let mut document = vec![0; usize::try_from(document_bytes)?.min(header::CAP)];
        let state = std::fs::File::from(preserved.state.try_clone()?);
        state.read_exact_at(&mut document, 0).context("cannot read its document back")?;
        header::open(&document).context("its document is incomplete")?;
        if fault::is_flipped(Process::Update, Phase::DocumentWritten, Some(&self.name)) {
            fault::spoil(&preserved.state, document_bytes)?;
        }
        Ok(Done::Frozen { document_bytes, marks: known_marks(&frozen.marks) })
    }

    fn prove(&self, map: &Map) -> Result<Done, anyhow::Error> {
        Ok(Done::Proven(map.prove(self.ram()?)?))
    }

    fn digest(&self) -> Result<Done, anyhow::Error> {
        let content = digest(self.ram()?).context("its memory cannot be read")?;
        Ok(Done::Digested { content, counter: arch::counter() })
    }

    fn ram(&self) -> Result<impl Iterator<Item = (&OwnedFd, u64)>, anyhow::Error> {
        let preserved = self.preserved.as_ref().context("it has nothing that is preserved")?;
        Ok(preserved.ram.iter().map(|(file, size)| (file, *size)))
    }

    /// Only a VM that was asked to prepare has anything to take back, but it does no harm to ask.
    fn thaw(&mut self) -> Result<(), ClientError> {
        match self.client.thaw() {
            // It was never prepared, or has thawed already: then all is well.
            Err(refused @ ClientError::Refused { .. }) => match self.client.status()?.state {
                MachineState::Running | MachineState::Paused | MachineState::Ended => Ok(()),
                MachineState::Prepared | MachineState::Frozen => Err(refused),
            },
            other => other,
        }
    }
}
