//! Sockets between the guest and programs of its host (virtio 1.2, 5.10), as Firecracker has them: a program connects to one UNIX
//! socket and says which port of the guest it wants, and the guest's own connections go to one UNIX socket for each port.
//!
//! A kexec ends all connections, as it ends the programs' sockets. After a restore the driver is told so, and the UNIX socket is
//! there again. A pause keeps them.
//!
//! The crate virtio-vsock would read a packet's data from one buffer only, and Linux sends it in many.

mod connection;
mod listener;
mod packet;
mod room;
mod table;
#[cfg(test)]
mod tests;
mod work;

use kho_abi::document::virtio::{VirtioState, VsockV1};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;

use self::table::Table;
use self::work::{News, VsockWork};
use super::worker::Worker;
use super::{Activation, ActiveQueue, VirtioDevice, VirtioError, read_space};
use crate::config::vsock::VsockConfig;

/// Entries of the queues: packets to the guest, packets from it, and events.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];

/// The bit says that there are sockets that are streams.
const FEATURE_STREAM: u32 = 0;

/// A vsock device.
pub struct Vsock {
    config: VsockConfig,
    /// None while the thread has it.
    table: Option<Table>,
    news: News,
    running: Option<Worker<VsockWork>>,
}

impl Vsock {
    /// Listens at its UNIX socket. Who connects waits until the guest is ready.
    pub fn new(config: &VsockConfig) -> Result<Self, VirtioError> {
        let table = Some(Table::open(config)?);
        Ok(Self { config: config.clone(), table, news: News::default(), running: None })
    }

    fn name(&self) -> String {
        listener::name(&self.config.socket)
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        [FEATURE_STREAM, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC]
            .iter()
            .fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&u64::from(self.config.cid).to_le_bytes(), offset, data);
    }

    /// A driver can only read it.
    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn start(&mut self, activation: Activation) -> Result<(), VirtioError> {
        let Activation { memory, features, mut queues, notifier } = activation;
        for active in &mut queues {
            active.queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        }
        // Only a thread that could not be started, or has panicked, has not given it back.
        let table = match self.table.take() {
            Some(table) => table,
            None => Table::open(&self.config)?,
        };
        let name = self.name();
        let worker = VsockWork::new(table, self.news, memory, queues, notifier)
            .and_then(|work| Worker::start("vsock", work))
            .map_err(|source| VirtioError::System { device: name, operation: "start its thread".to_owned(), source })?;
        self.running = Some(worker);
        Ok(())
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        let Some(work) = self.running.take().and_then(Worker::stop) else { return Vec::new() };
        let (table, news, queues) = work.into_parts();
        (self.table, self.news) = (Some(table), news);
        queues
    }

    /// With the driver its connections are gone.
    fn reset(&mut self) {
        self.news = News::default();
        if let Some(table) = &mut self.table {
            table.clear();
        }
    }

    /// Nothing of it lasts.
    fn flush(&mut self) -> Result<(), VirtioError> {
        Ok(())
    }

    fn save(&self) -> VirtioState {
        let Self { config, table, news: _, running: _ } = self;
        let next_port = table.as_ref().map_or(VsockV1::PORT_FIRST, Table::next_port);
        VirtioState::Vsock(VsockV1 { cid: config.cid, next_port })
    }

    fn restore(&mut self, state: &VirtioState) -> Result<(), VirtioError> {
        let VirtioState::Vsock(VsockV1 { cid, next_port }) = state else {
            return Err(VirtioError::other_kind(&self.name()));
        };
        if *cid != self.config.cid {
            let reason = format!("the guest's number was {cid} and is {} here", self.config.cid);
            return Err(VirtioError::Unfit { device: self.name(), reason });
        }
        if let Some(table) = &mut self.table {
            table.set_next_port(*next_port);
        }
        self.news = News::GONE;
        Ok(())
    }

    /// The thread tells it before it does anything else.
    fn after_restore(&mut self) {}
}
