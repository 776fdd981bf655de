//! The channel between the supervisor that restores and a VM's new process: a UNIX stream socket.
//!
//! The supervisor sends one line of JSON with the VM's files (SCM_RIGHTS: the state file, then those of RAM); the VM
//! answers with a line of JSON per event. What matters is `first-instruction`, which the VM sends *before* its guest
//! runs: once it is sent, the VM may never be started again from that memory. A supervisor that reads the end of the
//! channel without having seen it can be sure that no guest has run.

use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use kho_abi::document::timeline::TimelineV1;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::{Deserialize, Serialize};

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
}

/// What the supervisor says about the VM it hands over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// The VM's name.
    pub name: String,
    /// Which attempt to restore it this is, from 1.
    pub attempt: u32,
    /// Counts per second of the counter behind `marks`.
    pub counter_hz: u64,
    /// What is known of the live update so far.
    pub marks: Vec<Mark>,
    /// The RAM files, in the order in which they come.
    pub ram: Vec<RamFile>,
}

impl Handover {
    /// What is known of the live update so far.
    pub fn timeline(&self) -> TimelineV1 {
        TimelineV1 { frequency_hz: self.counter_hz, marks: known_marks(&self.marks) }
    }

    /// The handover of one VM.
    pub fn new(name: &str, attempt: u32, timeline: &TimelineV1, ram: Vec<RamFile>) -> Self {
        let (counter_hz, marks) = (timeline.frequency_hz, marks(&timeline.marks));
        Self { name: name.to_owned(), attempt, counter_hz, marks, ram }
    }
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

/// Sends a VM: the state file, then its RAM.
pub fn send(
    channel: &UnixStream,
    handover: &Handover,
    state: BorrowedFd<'_>,
    ram: &[OwnedFd],
) -> Result<(), ChannelError> {
    let line = line(handover)?;
    let files: Vec<BorrowedFd<'_>> = std::iter::once(state).chain(ram.iter().map(AsFd::as_fd)).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if files.len() > MAX_FILES || !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(ChannelError::Malformed(format!("{} files at once, at most {MAX_FILES} can be sent", files.len())));
    }
    let sent = rustix::net::sendmsg(channel, &[IoSlice::new(&line)], &mut control, SendFlags::NOSIGNAL);
    let sent = sent.map_err(ChannelError::io("write to"))?;
    // The files went with the first byte; what is left is plain text.
    let mut rest = channel;
    rest.write_all(line.get(sent..).unwrap_or_default())
        .map_err(|source| ChannelError::Io { operation: "write to", source })
}

/// A VM that has arrived.
#[derive(Debug)]
pub struct Received {
    /// What is said about it.
    pub handover: Handover,
    /// The state file.
    pub state: OwnedFd,
    /// The RAM files, by token.
    pub ram: Vec<(u64, OwnedFd)>,
}

/// Receives a VM.
pub fn receive(channel: &UnixStream) -> Result<Received, ChannelError> {
    let mut files = Vec::new();
    let mut text = Vec::new();
    while text.last() != Some(&b'\n') {
        if text.len() as u64 >= MAX_LINE {
            return Err(ChannelError::Malformed("a line without end".to_owned()));
        }
        let mut buffer = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let slices = &mut [IoSliceMut::new(&mut buffer)];
        let received = match rustix::net::recvmsg(channel, slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.map_err(ChannelError::io("read from"))?,
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(ChannelError::Malformed("files were lost: too many open files".to_owned()));
        }
        if received.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        text.extend_from_slice(buffer.get(..received.bytes).unwrap_or_default());
    }
    let handover: Handover =
        serde_json::from_slice(&text).map_err(|error| ChannelError::Malformed(error.to_string()))?;
    if files.len() != handover.ram.len() + 1 {
        return Err(ChannelError::Malformed(format!("{} files for {} of RAM", files.len(), handover.ram.len())));
    }
    let mut files = files.into_iter();
    let Some(state) = files.next() else { return Err(ChannelError::Malformed("no state file".to_owned())) };
    let ram = handover.ram.iter().map(|file| file.token).zip(files).collect();
    Ok(Received { handover, state, ram })
}

/// Tells the supervisor what has happened.
pub fn tell(mut channel: &UnixStream, event: &Event) -> Result<(), ChannelError> {
    channel.write_all(&line(event)?).map_err(|source| ChannelError::Io { operation: "write to", source })
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
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
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

    fn handover(ranges: u64) -> Handover {
        let timeline = TimelineV1 { frequency_hz: 1000, marks: vec![(Phase::PauseAsked, 5), (Phase::InitReached, 9)] };
        let ram = (0..ranges).map(|index| RamFile { token: 0x100 + index, size: 4096 }).collect();
        Handover::new("a", 2, &timeline, ram)
    }

    #[test]
    fn vm_arrives_with_its_files_in_order() {
        for ranges in [0, 1, 64] {
            let (supervisor, vm) = UnixStream::pair().unwrap();
            let ram: Vec<OwnedFd> = (0..ranges).map(|index| memfd(&[index as u8, 0, 7])).collect();
            let sent = handover(ranges);
            send(&supervisor, &sent, memfd(b"doc").as_fd(), &ram).unwrap();
            let Received { handover, state, ram } = receive(&vm).unwrap();
            assert_eq!(handover, sent);
            assert_eq!(handover.timeline().counter(Phase::InitReached), Some(9));
            assert_eq!(content(state), b"doc");
            for (index, (token, file)) in ram.into_iter().enumerate() {
                assert_eq!(token, 0x100 + index as u64);
                assert_eq!(content(file), [index as u8, 0, 7]);
            }
        }
    }

    #[test]
    fn vm_with_a_file_missing_is_refused() {
        let (supervisor, vm) = UnixStream::pair().unwrap();
        send(&supervisor, &handover(2), memfd(b"doc").as_fd(), &[memfd(b"ram")]).unwrap();
        assert!(matches!(receive(&vm), Err(ChannelError::Malformed(_))));
    }

    #[test]
    fn supervisor_that_goes_or_lies_is_noticed() {
        let (supervisor, vm) = UnixStream::pair().unwrap();
        drop(supervisor);
        assert!(matches!(receive(&vm), Err(ChannelError::Closed)));
        let (mut supervisor, vm) = UnixStream::pair().unwrap();
        supervisor.write_all(b"{\"name\":\n").unwrap();
        assert!(matches!(receive(&vm), Err(ChannelError::Malformed(_))));
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
