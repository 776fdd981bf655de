//! A disk (virtio 1.2, 5.2): an image on the host, raw, and one thread that reads and writes it, by io_uring where the host has it.
//!
//! What the guest has written without a flush lies in the host's page cache, and the guest relies on reading it back. A kexec
//! destroys that cache, so [`VirtioDevice::flush`] makes all of it durable, whether or not the guest has asked for it.

mod buffers;
mod image;
mod request;
mod ring;
#[cfg(test)]
mod tests;
mod work;

use std::sync::Arc;

use kho_abi::document::virtio::VirtioState;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;

use self::image::{Image, SECTOR};
use self::request::{DISCARD_SECTORS_MAX, RANGES_MAX, SEGMENTS_MAX, ZEROES_SECTORS_MAX};
use self::ring::Ring;
use self::work::BlockWork;
use super::worker::Worker;
use super::{Activation, ActiveQueue, VirtioDevice, VirtioError, read_space};
use crate::config::block::{BlockConfig, ID_MAX};

/// Entries of the queue.
const QUEUE_SIZE: u16 = 256;

/// Bytes of a disk's name: VIRTIO_BLK_ID_BYTES.
const ID_SIZE: usize = ID_MAX;

/// Bytes of `struct virtio_blk_config` as far as the offered features define it.
const CONFIG_SIZE: usize = 60;

/// Who has the queue.
enum Running {
    /// Nobody here.
    Stopped,
    /// We, but the driver has not set it up.
    Idle(Vec<ActiveQueue>),
    /// The thread.
    Working(Worker<BlockWork>),
}

/// A disk.
pub struct Block {
    image: Arc<Image>,
    id: [u8; ID_SIZE],
    running: Running,
}

impl Block {
    /// Opens and locks the image.
    pub fn new(config: &BlockConfig) -> Result<Self, VirtioError> {
        let mut id = [0; ID_SIZE];
        for (to, from) in id.iter_mut().zip(config.id.iter().flat_map(|id| id.bytes())) {
            *to = from;
        }
        Ok(Self { image: Arc::new(Image::open(config)?), id, running: Running::Stopped })
    }

    fn config_space(&self) -> [u8; CONFIG_SIZE] {
        let mut space = [0; CONFIG_SIZE];
        let mut put = |offset: usize, bytes: &[u8]| space[offset..][..bytes.len()].copy_from_slice(bytes);
        put(0, &(self.image.size() / SECTOR).to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        if !self.image.readonly {
            put(36, &DISCARD_SECTORS_MAX.to_le_bytes());
            put(40, &RANGES_MAX.to_le_bytes());
            // Storage is given back in pages; less than one has none of its own.
            put(44, &(4096 / SECTOR as u32).to_le_bytes());
            put(48, &ZEROES_SECTORS_MAX.to_le_bytes());
            put(52, &RANGES_MAX.to_le_bytes());
            put(56, &[1]);
        }
        space
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let changing: &[u32] = match self.image.readonly {
            true => &[VIRTIO_BLK_F_RO],
            false => &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES],
        };
        [
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
        ]
        .iter()
        .chain(changing)
        .fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.config_space(), offset, data);
    }

    /// The driver can only write to `writeback`, which it is not offered.
    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn start(&mut self, activation: Activation) -> Result<(), VirtioError> {
        let Activation { memory, features, mut queues, notifier } = activation;
        if !queues.first().is_some_and(|active| active.queue.ready()) {
            self.running = Running::Idle(queues);
            return Ok(());
        }
        let mut active = queues.swap_remove(0);
        active.queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        let ring = Ring::new(self.image.clone());
        if let Err(error) = &ring {
            tracing::info!(%error, disk = self.image.name, "no io_uring: requests are done one by one");
        }
        let work = BlockWork {
            ring: ring.ok(),
            image: self.image.clone(),
            id: self.id,
            memory,
            active,
            notifier,
            write_through: features & (1 << VIRTIO_BLK_F_FLUSH) == 0,
        };
        let worker = Worker::start("disk", work).map_err(|source| VirtioError::System {
            device: self.image.name.clone(),
            operation: "start its thread".to_owned(),
            source,
        })?;
        self.running = Running::Working(worker);
        Ok(())
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        match std::mem::replace(&mut self.running, Running::Stopped) {
            Running::Stopped => Vec::new(),
            Running::Idle(queues) => queues,
            Running::Working(worker) => worker.stop().map(|work| work.active).into_iter().collect(),
        }
    }

    /// All that the driver tells a disk is in the features.
    fn reset(&mut self) {}

    fn flush(&mut self) -> Result<(), VirtioError> {
        self.image.flush().map_err(|source| VirtioError::System {
            device: self.image.name.clone(),
            operation: "make durable what the guest has written".to_owned(),
            source,
        })
    }

    fn save(&self) -> VirtioState {
        let Self { image, id: _, running: _ } = self;
        VirtioState::Block(image.identity())
    }

    fn restore(&mut self, state: &VirtioState) -> Result<(), VirtioError> {
        match state {
            VirtioState::Block(before) => self.image.check_identity(before),
            _ => Err(VirtioError::other_kind(&self.image.name)),
        }
    }

    /// The disk is what it was.
    fn after_restore(&mut self) {}
}
