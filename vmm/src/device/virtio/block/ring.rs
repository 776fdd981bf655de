//! Many requests at once: io_uring, where the host has it and lets us use it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::buffers::{Buffers, Direction};
use super::image::{Image, VECTORS_MAX};
use super::request::Answer;

/// So many requests are in flight at most.
const DEPTH: u32 = 64;

/// What is in flight.
#[derive(Debug)]
pub enum Pending {
    /// A read or write: which way, where, what is left of it, and how many bytes it was.
    Transfer(Direction, u64, Buffers, u32),
    /// To make durable what was written.
    Flush,
}

/// A request that the kernel has done, or not.
#[derive(Debug)]
pub struct Finished {
    /// Where its answer goes.
    pub answer: Answer,
    /// What it was.
    pub pending: Pending,
    /// How it ended.
    pub result: io::Result<()>,
}

/// The ring, and what is in flight in it.
pub struct Ring {
    ring: IoUring,
    image: Arc<Image>,
    finished: EventFd,
    slots: Vec<Option<(Answer, Pending)>>,
    free: Vec<usize>,
}

impl Ring {
    /// Fails where the host has no io_uring, an old one, or forbids it.
    pub fn new(image: Arc<Image>) -> io::Result<Self> {
        let ring = IoUring::new(DEPTH)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if ![opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE]
            .iter()
            .all(|code| probe.is_supported(*code))
        {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let finished = EventFd::new(libc::EFD_NONBLOCK)?;
        ring.submitter().register_eventfd(finished.as_raw_fd())?;
        let slots = (0..DEPTH).map(|_| None).collect();
        Ok(Self { ring, image, finished, slots, free: (0..DEPTH as usize).collect() })
    }

    /// Readable when something has finished.
    pub fn event(&self) -> RawFd {
        self.finished.as_raw_fd()
    }

    /// Whether another request can be taken on.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether nothing is in flight.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Takes a request on. Without room it is given back.
    pub fn push(&mut self, answer: Answer, pending: Pending) -> Result<(), (Answer, Pending)> {
        let Some(slot) = self.free.pop() else { return Err((answer, pending)) };
        let entry = self.entry(&pending).user_data(slot as u64);
        // SAFETY: the vectors that the entry points to live, and do not move, in `slots` until the request has finished; they
        // point to guest RAM, which is never unmapped. The file is kept open by `image`.
        match unsafe { self.ring.submission().push(&entry) } {
            Ok(()) => {
                self.slots[slot] = Some((answer, pending));
                Ok(())
            }
            Err(_) => {
                self.free.push(slot);
                Err((answer, pending))
            }
        }
    }

    fn entry(&self, pending: &Pending) -> squeue::Entry {
        let file = types::Fd(self.image.file.as_raw_fd());
        match pending {
            Pending::Transfer(direction, offset, buffers, _) => {
                let vectors = buffers.vectors();
                let (vectors, count) = (vectors.as_ptr().cast(), vectors.len().min(VECTORS_MAX) as u32);
                match direction {
                    Direction::FromImage => opcode::Readv::new(file, vectors, count).offset(*offset).build(),
                    Direction::ToImage => opcode::Writev::new(file, vectors, count).offset(*offset).build(),
                }
            }
            Pending::Flush => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
        }
    }

    /// Hands what was pushed to the kernel.
    pub fn submit(&mut self) -> io::Result<()> {
        self.enter(0)
    }

    /// The same, and waits until something has finished.
    pub fn wait(&mut self) -> io::Result<()> {
        self.enter(1)
    }

    fn enter(&mut self, wanted: usize) -> io::Result<()> {
        if wanted == 0 && self.ring.submission().is_empty() {
            return Ok(());
        }
        loop {
            match self.ring.submit_and_wait(wanted) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return done.map(drop),
            }
        }
    }

    /// What has finished since. What the kernel has done in part goes on; hand it to the kernel with [`Self::submit`].
    pub fn finished(&mut self) -> Vec<Finished> {
        // Before the ring is looked at: what finishes afterwards makes it readable again. It may not be readable at all.
        let _ = self.finished.read();
        let completions: Vec<_> = self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        let mut finished = Vec::new();
        for (slot, result) in completions {
            let slot = slot as usize;
            let Some((answer, mut pending)) = self.slots.get_mut(slot).and_then(Option::take) else { continue };
            self.free.push(slot);
            let result = self.take(&mut pending, result);
            match result {
                Some(result) => finished.push(Finished { answer, pending, result }),
                None => {
                    if let Err((answer, pending)) = self.push(answer, pending) {
                        let result = Err(io::ErrorKind::ResourceBusy.into());
                        finished.push(Finished { answer, pending, result });
                    }
                }
            }
        }
        finished
    }

    /// How a request has ended, if it has.
    fn take(&self, pending: &mut Pending, result: i32) -> Option<io::Result<()>> {
        match (pending, u32::try_from(result)) {
            (Pending::Transfer(_, _, buffers, _), Ok(_)) if buffers.is_empty() => Some(Ok(())),
            // The image has become shorter than it was.
            (Pending::Transfer(..), Ok(0)) => Some(Err(io::ErrorKind::UnexpectedEof.into())),
            (Pending::Transfer(_, offset, buffers, _), Ok(done)) => {
                buffers.advance(done as usize);
                *offset += u64::from(done);
                buffers.is_empty().then_some(Ok(()))
            }
            (Pending::Flush, Ok(_)) => Some(Ok(())),
            (pending, Err(_)) => match (io::Error::from_raw_os_error(-result), pending) {
                // What cannot be done without waiting, the kernel may leave to us.
                (error, Pending::Transfer(direction, offset, buffers, _))
                    if [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted].contains(&error.kind()) =>
                {
                    Some(self.image.transfer(*direction, buffers, *offset))
                }
                (error, _) => Some(Err(error)),
            },
        }
    }
}
