//! The channel between the supervisor that restores and a VM's new process: a UNIX stream socket.
//!
//! The supervisor sends two lines of JSON, each with files (SCM_RIGHTS): first who the VM is, with its state file; then its memory,
//! as soon as the kernel has given that back. In between the VM decodes its document and opens its disks and taps. It answers with a
//! line of JSON per event. With the memory comes the VM's record in the [ledger](super::ledger), where it notes *before* its guest
//! runs that it does, as from then on it may never be started again from that memory. It does so when it is told to go, and not before:
//! until then it can be ended without a look at what it was about to do.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use kho_abi::document::timeline::TimelineV3;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::ledger::Record;
use crate::control::interface::{Mark, RamFile, known_marks, marks};

/// The most files in one message: the kernel's `SCM_MAX_FD`.
const MAX_FILES: usize = 253;
/// The longest line that is read: the marks and the ranges of one VM are a few kilobytes.
const MAX_LINE: u64 = 64 << 10;

/// What can go wrong on the channel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket failed.
    #[error("cannot {operation} the restore channel")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The other end said something else than agreed.
    #[error("the restore channel carries something else than a VM: {0}")]
    Malformed(String),
    /// The other end went before it was done.
    #[error("the process that restores this VM has ended")]
    Closed,
}

impl ChannelError {
    fn io(operation: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |source| Self::Io { operation, source: source.into() }
    }

    /// Whether the other end has closed the channel.
    pub fn is_gone(&self) -> bool {
        let gone = |source: &io::Error| matches!(source.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset);
        matches!(self, Self::Closed) || matches!(self, Self::Io { source, .. } if gone(source))
    }
}

/// What the supervisor says first of a VM that it hands over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// The VM's name.
    pub name: String,
    /// Which attempt to restore it this is, from 1.
    pub attempt: u32,
}

/// What it says when the VM's memory is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Counts per second of the counter behind `marks`.
    pub counter_hz: u64,
    /// What is known of the live update so far.
    pub marks: Vec<Mark>,
    /// The RAM files, in the order in which they come; behind them is the ledger.
    pub ram: Vec<RamFile>,
    /// Where in the ledger the VM's record begins.
    pub record: u64,
}

impl Memory {
    /// Memory in files of those tokens and sizes, at that point of the update.
    pub fn new(timeline: &TimelineV3, ram: Vec<RamFile>) -> Self {
        Self { counter_hz: timeline.frequency_hz, marks: marks(&timeline.marks), ram, record: 0 }
    }

    /// What is known of the live update so far.
    pub fn timeline(&self) -> TimelineV3 {
        TimelineV3 { frequency_hz: self.counter_hz, marks: known_marks(&self.marks) }
    }
}

/// What it says when nothing is in the way of the guest any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Word {
    Go,
}

/// What the VM says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The machine is rebuilt; nothing has run.
    MachineBuilt,
    /// The guest runs from here on, whatever happens next.
    FirstInstruction {
        /// When the machine was built and the guest ran, with all marks before.
        marks: Vec<Mark>,
    },
    /// This document cannot be restored here; trying again is no use.
    Refused {
        /// Why, with all causes.
        reason: String,
    },
    /// Restoring failed; it may work another time.
    Failed {
        /// Why, with all causes.
        reason: String,
    },
}

/// Sends who a VM is, and its state file.
pub fn send_handover(channel: &UnixStream, handover: &Handover, state: &OwnedFd) -> Result<(), ChannelError> {
    send(channel, handover, &[state.as_fd()])
}

/// Sends a VM's memory, and its record in the ledger.
pub fn send_memory(
    channel: &UnixStream,
    memory: &Memory,
    ram: &[OwnedFd],
    record: &Record,
) -> Result<(), ChannelError> {
    let (ledger, record) = record.parts();
    let files: Vec<_> = ram.iter().map(AsFd::as_fd).chain([ledger]).collect();
    send(channel, &Memory { record, ..memory.clone() }, &files)
}

/// Tells a VM whose machine is built that its guest may run.
pub fn send_go(channel: &UnixStream) -> Result<(), ChannelError> {
    write(channel, &Word::Go)
}

fn send(channel: &UnixStream, value: &impl Serialize, files: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
    let line = line(value)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if files.len() > MAX_FILES || !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(ChannelError::Malformed(format!("{} files at once, at most {MAX_FILES} can be sent", files.len())));
    }
    let sent = rustix::net::sendmsg(channel, &[IoSlice::new(&line)], &mut control, SendFlags::NOSIGNAL);
    let sent = sent.map_err(ChannelError::io("write to"))?;
    // The files went with the first byte; what is left is plain text.
    let mut rest = channel;
    rest.write_all(line.get(sent..).unwrap_or_default())
        .map_err(|source| ChannelError::Io { operation: "write to", source })
}

/// A VM's memory, as the VM has it.
#[derive(Debug)]
pub struct Arrived {
    /// What is known of the live update so far.
    pub timeline: TimelineV3,
    /// The RAM files by token.
    pub ram: Vec<(u64, OwnedFd)>,
    /// Where to note that the guest runs.
    pub record: Record,
}

/// The supervisor's lines, as the VM reads them.
#[derive(Debug)]
pub struct Arrivals<'channel> {
    channel: &'channel UnixStream,
    /// What has come and belongs to no line that was read: a second line may come together with the first.
    text: Vec<u8>,
    files: VecDeque<OwnedFd>,
}

impl<'channel> Arrivals<'channel> {
    /// Reads from `channel`.
    pub fn new(channel: &'channel UnixStream) -> Self {
        Self { channel, text: Vec::new(), files: VecDeque::new() }
    }

    /// Waits to be told who the VM is, and for its state file.
    pub fn handover(&mut self) -> Result<(Handover, OwnedFd), ChannelError> {
        let handover = self.line()?;
        let Some(state) = self.files.pop_front() else {
            return Err(ChannelError::Malformed("no state file".to_owned()));
        };
        Ok((handover, state))
    }

    /// Waits for the VM's memory.
    pub fn memory(&mut self) -> Result<Arrived, ChannelError> {
        let memory: Memory = self.line()?;
        let count = self.files.len();
        let (Some(ledger), true) = (self.files.pop_back(), count == memory.ram.len() + 1) else {
            return Err(ChannelError::Malformed(format!(
                "{count} files for {} of RAM and the ledger",
                memory.ram.len()
            )));
        };
        let record = Record::adopt(ledger, memory.record);
        let ram = memory.ram.iter().map(|file| file.token).zip(self.files.drain(..)).collect();
        Ok(Arrived { timeline: memory.timeline(), ram, record })
    }

    /// Waits until the guest may run.
    pub fn go(&mut self) -> Result<(), ChannelError> {
        self.line().map(|Word::Go| ())
    }

    fn line<T: DeserializeOwned>(&mut self) -> Result<T, ChannelError> {
        loop {
            if let Some(end) = self.text.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.text.drain(..=end).collect();
                return serde_json::from_slice(&line).map_err(|error| ChannelError::Malformed(error.to_string()));
            }
            if self.text.len() as u64 >= MAX_LINE {
                return Err(ChannelError::Malformed("a line without end".to_owned()));
            }
            self.receive()?;
        }
    }

    fn receive(&mut self) -> Result<(), ChannelError> {
        let mut buffer = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            let slices = &mut [IoSliceMut::new(&mut buffer)];
            rustix::net::recvmsg(self.channel, slices, &mut control, RecvFlags::CMSG_CLOEXEC)
        });
        let received = received.map_err(ChannelError::io("read from"))?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                self.files.extend(rights);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(ChannelError::Malformed("files were lost: too many open files".to_owned()));
        }
        if received.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        self.text.extend_from_slice(buffer.get(..received.bytes).unwrap_or_default());
        Ok(())
    }
}

/// Tells the supervisor what has happened.
pub fn tell(channel: &UnixStream, event: &Event) -> Result<(), ChannelError> {
    write(channel, event)
}

fn write(mut channel: &UnixStream, value: &impl Serialize) -> Result<(), ChannelError> {
    channel.write_all(&line(value)?).map_err(|source| ChannelError::Io { operation: "write to", source })
}

fn line<T: Serialize>(value: &T) -> Result<Vec<u8>, ChannelError> {
    let mut line = serde_json::to_vec(value).map_err(|error| ChannelError::Malformed(error.to_string()))?;
    line.push(b'\n');
    Ok(line)
}

/// The VM's events, as the supervisor reads them, until the VM closes the channel by ending.
pub struct Events<'channel>(BufReader<io::Take<&'channel UnixStream>>);

impl<'channel> Events<'channel> {
    /// Reads from `channel`, no more than a VM that keeps to the protocol can send.
    pub fn new(channel: &'channel UnixStream) -> Self {
        Self(BufReader::new(channel.take(MAX_LINE)))
    }

    /// The next event; `None` when the VM's process has ended. Reading fails with `TimedOut` where the socket's read
    /// time-out runs out first.
    pub fn next(&mut self) -> Result<Option<Event>, ChannelError> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            // A process that was killed with our message unread resets the connection.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
            Err(source) => return Err(ChannelError::Io { operation: "read from", source }),
            Ok(_) => {}
        }
        // A line cut off by the end of the process was never said.
        if !line.ends_with('\n') {
            return Ok(None);
        }
        serde_json::from_str(&line).map(Some).map_err(|error| ChannelError::Malformed(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use kho_abi::document::timeline::Phase;

    use super::*;
    use crate::handover::ledger::Ledger;

    fn memfd(content: &[u8]) -> OwnedFd {
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        File::from(file.try_clone().unwrap()).write_all_at(content, 0).unwrap();
        file
    }

    fn content(file: OwnedFd) -> Vec<u8> {
        let mut content = vec![0; 3];
        File::from(file).read_exact_at(&mut content, 0).unwrap();
        content
    }

    fn record() -> Record {
        Ledger::new(1).unwrap().record(0)
    }

    fn handover() -> Handover {
        Handover { name: "a".to_owned(), attempt: 2 }
    }

    fn memory(ranges: u64) -> Memory {
        let timeline = TimelineV3 { frequency_hz: 1000, marks: vec![(Phase::PauseAsked, 5), (Phase::InitReached, 9)] };
        Memory::new(&timeline, (0..ranges).map(|index| RamFile { token: 0x100 + index, size: 4096 }).collect())
    }

    #[test]
    fn vm_arrives_with_its_files_in_order() {
        for ranges in [0, 1, 64] {
            let (supervisor, vm) = UnixStream::pair().unwrap();
            let files: Vec<OwnedFd> = (0..ranges).map(|index| memfd(&[index as u8, 0, 7])).collect();
            // Both are on their way before the first is read.
            send_handover(&supervisor, &handover(), &memfd(b"doc")).unwrap();
            let ledger = Ledger::new(2).unwrap();
            send_memory(&supervisor, &memory(ranges), &files, &ledger.record(1)).unwrap();
            let mut arrivals = Arrivals::new(&vm);
            let (said, state) = arrivals.handover().unwrap();
            assert_eq!((said, content(state).as_slice()), (handover(), b"doc".as_slice()));
            let Arrived { timeline, ram, record } = arrivals.memory().unwrap();
            record.set_ran().unwrap();
            assert!(ledger.record(1).has_run().unwrap() && !ledger.record(0).has_run().unwrap());
            send_go(&supervisor).unwrap();
            arrivals.go().unwrap();
            assert_eq!((timeline.frequency_hz, timeline.counter(Phase::InitReached)), (1000, Some(9)));
            for (index, (token, file)) in ram.into_iter().enumerate() {
                assert_eq!(token, 0x100 + index as u64);
                assert_eq!(content(file), [index as u8, 0, 7]);
            }
        }
    }

    #[test]
    fn vm_with_a_file_missing_is_refused() {
        let (supervisor, vm) = UnixStream::pair().unwrap();
        send_handover(&supervisor, &handover(), &memfd(b"doc")).unwrap();
        send_memory(&supervisor, &memory(2), &[memfd(b"ram")], &record()).unwrap();
        let mut arrivals = Arrivals::new(&vm);
        arrivals.handover().unwrap();
        assert!(matches!(arrivals.memory(), Err(ChannelError::Malformed(_))));
    }

    #[test]
    fn supervisor_that_goes_or_lies_is_noticed() {
        let (supervisor, vm) = UnixStream::pair().unwrap();
        send_handover(&supervisor, &handover(), &memfd(b"doc")).unwrap();
        drop(supervisor);
        let mut arrivals = Arrivals::new(&vm);
        arrivals.handover().unwrap();
        assert!(matches!(arrivals.memory(), Err(ChannelError::Closed)));
        assert!(matches!(arrivals.go(), Err(ChannelError::Closed)));
        let (mut supervisor, vm) = UnixStream::pair().unwrap();
        supervisor.write_all(b"{\"name\":\n").unwrap();
        assert!(matches!(Arrivals::new(&vm).handover(), Err(ChannelError::Malformed(_))));
        let (mut supervisor, vm) = UnixStream::pair().unwrap();
        supervisor.write_all(b"{\"name\":\"a\",\"attempt\":1}\n").unwrap();
        assert!(matches!(Arrivals::new(&vm).handover(), Err(ChannelError::Malformed(_))));
    }

    #[test]
    fn what_a_vm_said_before_it_ended_is_heard_by_who_could_not_send_it_its_memory() {
        let (supervisor, vm) = UnixStream::pair().unwrap();
        send_handover(&supervisor, &handover(), &memfd(b"doc")).unwrap();
        let said = Event::Failed { reason: "no tap".into() };
        tell(&vm, &said).unwrap();
        drop(vm);
        assert!(send_memory(&supervisor, &memory(1), &[memfd(b"ram")], &record()).unwrap_err().is_gone());
        let mut events = Events::new(&supervisor);
        assert_eq!(events.next().unwrap(), Some(said));
        assert_eq!(events.next().unwrap(), None);
    }

    #[test]
    fn events_arrive_until_the_vm_ends() {
        let (supervisor, vm) = UnixStream::pair().unwrap();
        let said = [
            Event::MachineBuilt,
            Event::FirstInstruction { marks: vec![Mark { phase: "machine-built".into(), counter: 3 }] },
            Event::Refused { reason: "a \"quoted\"\nreason".into() },
        ];
        for event in &said {
            tell(&vm, event).unwrap();
        }
        // A line that was not finished is as if never said.
        (&vm).write_all(b"{\"event\":\"first-instr").unwrap();
        drop(vm);
        let mut events = Events::new(&supervisor);
        for event in said {
            assert_eq!(events.next().unwrap(), Some(event));
        }
        assert_eq!(events.next().unwrap(), None);
    }
}
