//! An entropy source (virtio 1.2, 5.4): fills the driver's buffers with the host's random numbers.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use kho_abi::document::virtio::{RngV1, VirtioState};
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};
use vmm_sys_util::epoll::{Epoll, EventSet};

use super::worker::{Work, Worker};
use super::{Activation, ActiveQueue, Notifier, VirtioDevice, VirtioError};

/// Entries of the queue.
const QUEUE_SIZE: u16 = 64;

/// A request gets no more bytes at once; the specification lets a device give fewer than were asked for.
const ANSWER_MAX: usize = 4096;

const NAME: &str = "the entropy source";

/// Who has the queue.
enum Running {
    /// Nobody here.
    Stopped,
    /// We, but the driver has not set it up.
    Idle(Vec<ActiveQueue>),
    /// The thread.
    Working(Worker<RngWork>),
}

/// An entropy source.
pub struct Rng(Running);

impl Rng {
    /// A new one.
    pub fn new() -> Self {
        Self(Running::Stopped)
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    /// There is no configuration.
    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn start(&mut self, activation: Activation) -> Result<(), VirtioError> {
        let Activation { memory, features: _, mut queues, notifier } = activation;
        if !queues.first().is_some_and(|active| active.queue.ready()) {
            self.0 = Running::Idle(queues);
            return Ok(());
        }
        let work = RngWork { memory, active: queues.swap_remove(0), notifier };
        let worker = Worker::start("rng", work).map_err(|source| VirtioError::System {
            device: NAME.to_owned(),
            operation: "start its thread".to_owned(),
            source,
        })?;
        self.0 = Running::Working(worker);
        Ok(())
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        match std::mem::replace(&mut self.0, Running::Stopped) {
            Running::Stopped => Vec::new(),
            Running::Idle(queues) => queues,
            Running::Working(worker) => worker.stop().map(|work| work.active).into_iter().collect(),
        }
    }

    fn reset(&mut self) {}

    /// Nothing of it lasts.
    fn flush(&mut self) -> Result<(), VirtioError> {
        Ok(())
    }

    fn save(&self) -> VirtioState {
        VirtioState::Rng(RngV1)
    }

    fn restore(&mut self, state: &VirtioState) -> Result<(), VirtioError> {
        match state {
            VirtioState::Rng(RngV1) => Ok(()),
            _ => Err(VirtioError::other_kind(NAME)),
        }
    }

    fn after_restore(&mut self) {}
}

struct RngWork {
    memory: GuestMemoryMmap,
    active: ActiveQueue,
    notifier: Arc<dyn Notifier>,
}

impl RngWork {
    fn serve(&mut self) {
        let Self { memory, active, notifier } = self;
        let mut answered = false;
        while let Some(chain) = active.queue.pop_descriptor_chain(&*memory) {
            let head = chain.head_index();
            let written = fill(memory, chain);
            if let Err(error) = active.queue.add_used(memory, head, written) {
                tracing::warn!(%error, "{NAME}: a request of the guest cannot be answered");
                break;
            }
            answered = true;
        }
        if answered {
            notifier.queue_used(0);
        }
    }
}

/// Fills the buffers that the device may write to; gives the number of bytes.
fn fill(memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> u32 {
    let mut bytes = [0; ANSWER_MAX];
    let mut written = 0;
    for descriptor in chain.writable() {
        let rest = &mut bytes[written..];
        let wanted = rest.len().min(descriptor.len() as usize);
        if wanted == 0 {
            break;
        }
        // A signal can cut it short; an error cannot be, as the host has long booted.
        let got = getrandom(&mut rest[..wanted], GetRandomFlags::empty()).unwrap_or(0);
        if got == 0 || memory.write_slice(&rest[..got], descriptor.addr()).is_err() {
            break;
        }
        written += got;
        if got < wanted {
            break;
        }
    }
    written as u32
}

impl Work for RngWork {
    fn sources(&self) -> Vec<(RawFd, EventSet, u64)> {
        vec![(self.active.kick.as_raw_fd(), EventSet::IN, 0)]
    }

    fn handle(&mut self, _: u64, _: EventSet, _: &Epoll) {
        if let Err(error) = self.active.kick.read() {
            tracing::debug!(%error, "{NAME}: a kick that was none");
        }
        self.serve();
    }

    fn begin(&mut self) {
        self.serve();
    }

    /// Nothing is in flight between two calls.
    fn finish(&mut self) {}
}
