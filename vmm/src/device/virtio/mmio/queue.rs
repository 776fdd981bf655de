//! What the driver says of a queue, and the queue that the device makes of it once all is said and found to be right.

use kho_abi::document::virtio::QueueV1;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::device::virtio::{ActiveQueue, VirtioError};

/// Which half of an address.
#[derive(Clone, Copy)]
pub(super) enum Half {
    Low,
    High,
}

fn set_half(address: &mut u64, half: Half, value: u32) {
    let (mask, value) = match half {
        Half::Low => (!0xffff_ffff, u64::from(value)),
        Half::High => (0xffff_ffff, u64::from(value) << 32),
    };
    *address = *address & mask | value;
}

/// A queue's registers, and how far it was worked off when the device had it last.
pub(super) struct QueueRegisters {
    /// Readable when the driver says that there are available buffers.
    pub kick: EventFd,
    size_max: u16,
    size: u16,
    /// Whether the driver has set it up.
    pub ready: bool,
    descriptor_table: u64,
    available_ring: u64,
    used_ring: u64,
    /// The next entry to be taken.
    pub next_available: u16,
    /// The next entry to be filled.
    pub next_used: u16,
}

impl QueueRegisters {
    pub fn new(size_max: u16) -> std::io::Result<Self> {
        Ok(Self {
            kick: EventFd::new(libc::EFD_NONBLOCK)?,
            size_max,
            size: size_max,
            ready: false,
            descriptor_table: 0,
            available_ring: 0,
            used_ring: 0,
            next_available: 0,
            next_used: 0,
        })
    }

    pub fn size_max(&self) -> u16 {
        self.size_max
    }

    /// An impossible size is kept, and found out when the device is to work with it.
    pub fn set_size(&mut self, value: u32) {
        self.size = u16::try_from(value).unwrap_or(0);
    }

    pub fn set_descriptor_table(&mut self, half: Half, value: u32) {
        set_half(&mut self.descriptor_table, half, value);
    }

    pub fn set_available_ring(&mut self, half: Half, value: u32) {
        set_half(&mut self.available_ring, half, value);
    }

    pub fn set_used_ring(&mut self, half: Half, value: u32) {
        set_half(&mut self.used_ring, half, value);
    }

    /// Tells the device to look.
    pub fn kick(&self) {
        if let Err(error) = self.kick.write(1) {
            tracing::warn!(%error, "a queue cannot be kicked");
        }
    }

    pub fn reset(&mut self) {
        // What was kicked before the reset is not there any more. Nobody waits: it may have been read already.
        let _ = self.kick.read();
        (self.size, self.ready) = (self.size_max, false);
        (self.descriptor_table, self.available_ring, self.used_ring) = (0, 0, 0);
        (self.next_available, self.next_used) = (0, 0);
    }

    fn queue(&self) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size: self.size_max,
            next_avail: self.next_available,
            next_used: self.next_used,
            // The device knows by its features.
            event_idx_enabled: false,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptor_table,
            avail_ring: self.available_ring,
            used_ring: self.used_ring,
        })
    }

    /// The queue for the device to work with. One that the driver has not set up is not ready.
    pub fn activate(&self, memory: &GuestMemoryMmap) -> Result<ActiveQueue, VirtioError> {
        let unfit = |reason: String| VirtioError::Unfit { device: "a virtio queue".to_owned(), reason };
        let system = |source| VirtioError::System {
            device: "a virtio queue".to_owned(),
            operation: "duplicate an eventfd".to_owned(),
            source,
        };
        let queue = if self.ready {
            let queue = self.queue().map_err(|error| unfit(format!("the driver has set it up wrong: {error}")))?;
            if !queue.is_valid(memory) {
                return Err(unfit("the driver has put it where there is no memory".to_owned()));
            }
            queue
        } else {
            Queue::new(self.size_max).map_err(|error| unfit(format!("it cannot be made: {error}")))?
        };
        Ok(ActiveQueue { queue, kick: self.kick.try_clone().map_err(system)? })
    }

    pub fn save(&self) -> QueueV1 {
        let Self {
            kick: _,
            size_max: _,
            size,
            ready,
            descriptor_table,
            available_ring,
            used_ring,
            next_available,
            next_used,
        } = *self;
        QueueV1 { size, ready, descriptor_table, available_ring, used_ring, next_available, next_used }
    }

    /// Makes it what it was. Whether the addresses are good is found out when the device starts, as it is when a driver has
    /// written them.
    pub fn restore(&mut self, state: &QueueV1) -> Result<(), String> {
        let QueueV1 { size, ready, descriptor_table, available_ring, used_ring, next_available, next_used } = *state;
        if size > self.size_max {
            return Err(format!("a queue had {size} entries and has {} here at most", self.size_max));
        }
        (self.size, self.ready) = (size, ready);
        (self.descriptor_table, self.available_ring, self.used_ring) = (descriptor_table, available_ring, used_ring);
        (self.next_available, self.next_used) = (next_available, next_used);
        Ok(())
    }
}
