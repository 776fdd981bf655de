//! The thread of a disk: takes requests off the queue, has them done, and answers them.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestMemoryMmap};
use vmm_sys_util::epoll::{Epoll, EventSet};

use super::ID_SIZE;
use super::buffers::{Buffers, Direction};
use super::image::Image;
use super::request::{Limits, Operation, Request};
use crate::device::virtio::worker::Work;
use crate::device::virtio::{ActiveQueue, Notifier};

const KICK: u64 = 0;

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
    Failed(Failure),
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
}

impl Work for BlockWork {
    fn sources(&self) -> Vec<(RawFd, EventSet, u64)> {
        vec![(self.active.kick.as_raw_fd(), EventSet::IN, KICK)]
    }

    fn handle(&mut self, _: u64, _: EventSet, _: &Epoll) {
        if let Err(error) = self.active.kick.read() {
            tracing::debug!(%error, disk = self.image.name, "a kick that was none");
        }
        self.serve();
    }

    fn begin(&mut self) {
        self.serve();
    }

    /// Nothing is in flight between two calls.
    fn finish(&mut self) {}
}

impl BlockWork {
    /// Does the next requests, and asks to be called again where there are more.
    fn serve(&mut self) {
        let memory = self.memory.clone();
        let mut rest = BATCH;
        let mut more = true;
        while rest > 0 {
            if let Some(chain) = self.active.queue.pop_descriptor_chain(&memory) {
                let limits = Limits { size: self.image.size(), readonly: self.image.readonly };
                let request = Request::parse(&memory, chain, limits);
                self.serve_one(&memory, request);
                (rest, more) = (rest - 1, true);
                continue;
            }
            // A ring that says twice that there is something, and has nothing, is broken.
            match self.active.queue.enable_notification(&memory) {
                Ok(true) if more => more = false,
                Ok(false) => return,
                Ok(true) => {
                    tracing::warn!(disk = self.image.name, "the guest's queue is broken");
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, disk = self.image.name, "the guest's queue is broken");
                    return;
                }
            }
        }
        if let Err(error) = self.active.kick.write(1) {
            tracing::error!(%error, disk = self.image.name, "requests may wait for the guest's next one");
        }
    }

    fn serve_one(&mut self, memory: &GuestMemoryMmap, request: Request) {
        let Request { head, status, writable, operation } = request;
        let used = match status {
            // Without a place for the answer nothing is done.
            None => 0,
            Some(status) => {
                let (code, used) = match self.execute(operation) {
                    Outcome::Done(bytes) => (VIRTIO_BLK_S_OK, bytes.saturating_add(1)),
                    Outcome::Unsupported => (VIRTIO_BLK_S_UNSUPP, u32::from(writable == 1)),
                    Outcome::Failed(error) => {
                        tracing::debug!(%error, disk = self.image.name, "a request of the guest failed");
                        // What was written, if anything, has gaps, so only a status that comes first counts.
                        (VIRTIO_BLK_S_IOERR, u32::from(writable == 1))
                    }
                };
                match memory.write_obj(code as u8, status) {
                    Ok(()) => used,
                    Err(_) => 0,
                }
            }
        };
        if let Err(error) = self.active.queue.add_used(memory, head, used) {
            tracing::warn!(%error, disk = self.image.name, "a request of the guest cannot be answered");
            return;
        }
        // Where it cannot be known whether the driver wants to be told, it is told.
        if self.active.queue.needs_notification(memory).unwrap_or(true) {
            self.notifier.queue_used(0);
        }
    }

    fn execute(&self, operation: Operation) -> Outcome {
        let done = match operation {
            Operation::Transfer(direction, offset, mut buffers) => self.transfer(direction, offset, &mut buffers),
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
        match done {
            Ok(bytes) => Outcome::Done(bytes),
            Err(error) => Outcome::Failed(error.into()),
        }
    }

    fn transfer(&self, direction: Direction, offset: u64, buffers: &mut Buffers) -> std::io::Result<u32> {
        let length = u32::try_from(buffers.length()).unwrap_or(u32::MAX);
        self.image.transfer(direction, buffers, offset)?;
        match direction {
            Direction::FromImage => Ok(length),
            Direction::ToImage => self.wrote().map(|()| 0),
        }
    }

    fn wrote(&self) -> std::io::Result<()> {
        if self.write_through { self.image.flush() } else { Ok(()) }
    }
}
