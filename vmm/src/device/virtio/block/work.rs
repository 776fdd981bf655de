//! The thread of a disk: takes requests off the queue, has them done, and answers them.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestMemoryMmap};
use vmm_sys_util::epoll::{Epoll, EventSet};

use super::ID_SIZE;
use super::buffers::Direction;
use super::image::Image;
use super::request::{Answer, Limits, Operation, Request};
use super::ring::{Finished, Pending, Ring};
use crate::device::virtio::worker::Work;
use crate::device::virtio::{ActiveQueue, Notifier};

const KICK: u64 = 0;
const FINISHED: u64 = 1;

/// So many requests are done before the thread looks whether it is to stop. What is left in the queue then is done when work
/// goes on, under the next kernel if need be.
const BATCH: usize = 16;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Malformed(&'static str),
    #[error(transparent)]
    Host(#[from] std::io::Error),
}

/// How a request ended.
enum Outcome {
    /// With so many bytes written to the guest's memory, without the status.
    Done(u32),
    /// This disk cannot do it.
    Unsupported,
    /// Nothing, or not all, was done.
    Failed(Failure),
}

impl From<std::io::Result<u32>> for Outcome {
    fn from(result: std::io::Result<u32>) -> Self {
        result.map_or_else(|error| Self::Failed(error.into()), Self::Done)
    }
}

/// What the thread works with.
pub struct BlockWork {
    /// The image.
    pub image: Arc<Image>,
    /// The disk's name.
    pub id: [u8; ID_SIZE],
    /// Guest RAM.
    pub memory: GuestMemoryMmap,
    /// Where the requests are.
    pub active: ActiveQueue,
    /// Tells the driver of the answers.
    pub notifier: Arc<dyn Notifier>,
    /// The driver does not know of a cache that it would have to flush, so that there must be none.
    pub write_through: bool,
    /// Where the host has none, one request is done after the other, by system calls.
    pub ring: Option<Ring>,
}

impl Work for BlockWork {
    fn sources(&self) -> Vec<(RawFd, EventSet, u64)> {
        let kick = (self.active.kick.as_raw_fd(), EventSet::IN, KICK);
        std::iter::once(kick).chain(self.ring.as_ref().map(|ring| (ring.event(), EventSet::IN, FINISHED))).collect()
    }

    fn handle(&mut self, source: u64, _: EventSet, _: &Epoll) {
        if source == FINISHED {
            self.complete_finished();
        } else if let Err(error) = self.active.kick.read() {
            tracing::debug!(%error, disk = self.image.name, "a kick that was none");
        }
        // What has finished may have made room for more.
        self.serve();
    }

    fn begin(&mut self) {
        self.serve();
    }

    fn finish(&mut self) {
        while let Some(ring) = self.ring.as_mut().filter(|ring| !ring.is_idle()) {
            if let Err(error) = ring.wait() {
                match error.raw_os_error() {
                    // Short of memory for a moment, or something has finished that must be taken first.
                    Some(libc::EAGAIN | libc::EBUSY) => std::thread::yield_now(),
                    _ => {
                        tracing::error!(%error, disk = self.image.name, "requests in flight cannot be awaited");
                        return;
                    }
                }
            }
            self.complete_finished();
        }
    }
}

impl BlockWork {
    /// Does the next requests, and asks to be called again where there are more.
    fn serve(&mut self) {
        let memory = self.memory.clone();
        let mut rest = BATCH;
        let mut more = true;
        while rest > 0 {
            if self.ring.as_ref().is_some_and(|ring| !ring.has_room()) {
                self.submit();
                return;
            }
            if let Some(chain) = self.active.queue.pop_descriptor_chain(&memory) {
                let limits = Limits { size: self.image.size(), readonly: self.image.readonly };
                let request = Request::parse(&memory, chain, limits);
                self.serve_one(request);
                (rest, more) = (rest - 1, true);
                continue;
            }
            // A ring that says twice that there is something, and has nothing, is broken.
            match self.active.queue.enable_notification(&memory) {
                Ok(true) if more => more = false,
                Ok(false) => return self.submit(),
                Ok(true) => {
                    tracing::warn!(disk = self.image.name, "the guest's queue is broken");
                    return self.submit();
                }
                Err(error) => {
                    tracing::warn!(%error, disk = self.image.name, "the guest's queue is broken");
                    return self.submit();
                }
            }
        }
        self.submit();
        if let Err(error) = self.active.kick.write(1) {
            tracing::error!(%error, disk = self.image.name, "requests may wait for the guest's next one");
        }
    }

    fn submit(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        if let Err(error) = ring.submit() {
            // It stays in the ring and goes to the kernel with the next, or when the disk stops.
            tracing::warn!(%error, disk = self.image.name, "the kernel does not take requests on");
        }
    }

    fn serve_one(&mut self, request: Request) {
        let Request { answer, operation } = request;
        let pending = match (&mut self.ring, operation) {
            (Some(_), Operation::Transfer(direction, offset, buffers))
                if !buffers.is_empty() && !self.image.must_copy(&buffers) =>
            {
                let length = u32::try_from(buffers.length()).unwrap_or(u32::MAX);
                Pending::Transfer(direction, offset, buffers, length)
            }
            (Some(_), Operation::Flush) if !self.image.readonly => Pending::Flush,
            (_, operation) => {
                let outcome = self.execute(operation);
                return self.complete(answer, outcome);
            }
        };
        if let Some(Err((answer, _))) = self.ring.as_mut().map(|ring| ring.push(answer, pending)) {
            // There was room a moment ago.
            self.complete(answer, Outcome::Failed(Failure::Host(std::io::ErrorKind::ResourceBusy.into())));
        }
    }

    fn complete_finished(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        for Finished { answer, pending, result } in ring.finished() {
            let result = match (result, pending) {
                (Ok(()), Pending::Transfer(Direction::FromImage, _, _, length)) => Ok(length),
                (Ok(()), Pending::Transfer(Direction::ToImage, ..)) => self.wrote().map(|()| 0),
                (Ok(()), Pending::Flush) => Ok(0),
                (Err(error), _) => Err(error),
            };
            self.complete(answer, result.into());
        }
        self.submit();
    }

    fn complete(&mut self, answer: Answer, outcome: Outcome) {
        let Answer { head, status, writable } = answer;
        // What a failed read has written has gaps, so that then only a status that comes first counts.
        let alone = u32::from(writable == 1);
        let (code, used) = match outcome {
            Outcome::Done(bytes) => (VIRTIO_BLK_S_OK, bytes.saturating_add(1)),
            Outcome::Unsupported => (VIRTIO_BLK_S_UNSUPP, alone),
            Outcome::Failed(error) => {
                tracing::debug!(%error, disk = self.image.name, "a request of the guest failed");
                (VIRTIO_BLK_S_IOERR, alone)
            }
        };
        let told = status.is_some_and(|status| self.memory.write_obj(code as u8, status).is_ok());
        if let Err(error) = self.active.queue.add_used(&self.memory, head, if told { used } else { 0 }) {
            tracing::warn!(%error, disk = self.image.name, "a request of the guest cannot be answered");
            return;
        }
        // Where it cannot be known whether the driver wants to be told, it is told.
        if self.active.queue.needs_notification(&self.memory).unwrap_or(true) {
            self.notifier.queue_used(0);
        }
    }

    fn execute(&self, operation: Operation) -> Outcome {
        let done = match operation {
            Operation::Transfer(direction, offset, mut buffers) => {
                let length = u32::try_from(buffers.length()).unwrap_or(u32::MAX);
                let done = self.image.transfer(direction, &mut buffers, offset);
                done.and_then(|()| match direction {
                    Direction::FromImage => Ok(length),
                    Direction::ToImage => self.wrote().map(|()| 0),
                })
            }
            Operation::Flush => self.image.flush().map(|()| 0),
            Operation::Discard(ranges) => {
                ranges.iter().try_for_each(|range| self.image.discard(range.offset, range.length)).map(|()| 0)
            }
            Operation::WriteZeroes(ranges) => ranges
                .iter()
                .try_for_each(|range| self.image.write_zeroes(range.offset, range.length, range.unmap))
                .and_then(|()| self.wrote())
                .map(|()| 0),
            Operation::Id(mut buffers) => {
                let length = buffers.length().min(ID_SIZE);
                buffers.fill_from(&self.id[..length]);
                Ok(length as u32)
            }
            Operation::Unsupported => return Outcome::Unsupported,
            Operation::Malformed(reason) => return Outcome::Failed(Failure::Malformed(reason)),
        };
        done.into()
    }

    fn wrote(&self) -> std::io::Result<()> {
        if self.write_through { self.image.flush() } else { Ok(()) }
    }
}
