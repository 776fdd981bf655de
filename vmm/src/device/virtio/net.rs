//! A network device (virtio 1.2, 5.1): a tap on the host, and one thread that moves frames between it and the driver.
//!
//! A kexec destroys the tap and all that the bridge behind it has learned. After a restore a tap of the same name is opened anew,
//! and the driver is asked to announce itself, so that switches learn where it is.

mod announce;
mod tap;
#[cfg(test)]
mod tests;
mod work;

use std::sync::Arc;

use kho_abi::document::virtio::{NetV1, VirtioState};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;

use self::announce::Announcements;
use self::tap::Tap;
use self::work::NetWork;
use super::worker::Worker;
use super::{Activation, ActiveQueue, Notifier, VirtioDevice, VirtioError, read_space};
use crate::config::net::{MacAddress, NetConfig};

/// Entries of the queues: frames to the guest, frames from it, and what it has to say. The first is long, as a large frame takes
/// many of a driver's small buffers.
const QUEUE_SIZES: [u16; 3] = [512, 256, 64];

/// Bytes of `struct virtio_net_hdr_v1`, which stands before each frame.
const HEADER: usize = 12;

/// What a tap's frames may lack, and the feature by which a driver says that it can take such frames.
const OFFLOADS: [(libc::c_uint, u32); 4] = [
    (libc::TUN_F_CSUM, VIRTIO_NET_F_GUEST_CSUM),
    (libc::TUN_F_TSO4, VIRTIO_NET_F_GUEST_TSO4),
    (libc::TUN_F_TSO6, VIRTIO_NET_F_GUEST_TSO6),
    (libc::TUN_F_TSO_ECN, VIRTIO_NET_F_GUEST_ECN),
];

/// Who has the queues.
enum Running {
    /// Nobody here.
    Stopped,
    /// The thread. With the features, and how to reach the driver.
    Working(Worker<NetWork>, u64, Arc<dyn Notifier>),
}

/// The device in the operator's words.
fn called(tap: &str) -> String {
    format!("network tap={tap}")
}

fn unfit(tap: &str, reason: &str) -> VirtioError {
    VirtioError::Unfit { device: called(tap), reason: reason.to_owned() }
}

/// A network device.
pub struct Net {
    tap: Arc<Tap>,
    mac: MacAddress,
    /// What the tap can leave undone (TUN_F_*).
    offloads: libc::c_uint,
    announcements: Arc<Announcements>,
    running: Running,
}

impl Net {
    /// Opens the tap.
    pub fn new(config: &NetConfig) -> Result<Self, VirtioError> {
        let NetConfig { tap, mac } = config;
        // Settled when the VM was first started.
        let mac = mac.ok_or_else(|| unfit(tap, "it has no address"))?;
        let device = Tap::open(tap)?;
        // Each is tried, as the kernel says no more than that it does not know all that it was asked for.
        let mut offloads = 0;
        for (offload, _) in OFFLOADS {
            if device.set_offloads(offloads | offload).is_ok() {
                offloads |= offload;
            }
        }
        let (tap, announcements) = (Arc::new(device), Arc::default());
        let net = Self { tap, mac, offloads, announcements, running: Running::Stopped };
        net.set_offloads(0)?;
        Ok(net)
    }

    fn error(&self, operation: &str, source: std::io::Error) -> VirtioError {
        VirtioError::System { device: called(&self.tap.name), operation: operation.to_owned(), source }
    }

    /// Has the tap hand over what a driver with these features takes.
    fn set_offloads(&self, features: u64) -> Result<(), VirtioError> {
        let wanted = OFFLOADS.iter().filter(|(_, feature)| features & (1 << feature) != 0);
        let offloads = wanted.fold(0, |offloads, (offload, _)| offloads | offload);
        self.tap.set_offloads(offloads).map_err(|source| self.error("have it leave work to the guest", source))
    }

    fn config_space(&self) -> [u8; 8] {
        let announce = if self.announcements.are_asked_for() { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let [a, b, c, d, e, f] = self.mac.0;
        let [low, high] = ((VIRTIO_NET_S_LINK_UP | announce) as u16).to_le_bytes();
        [a, b, c, d, e, f, low, high]
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let taken = OFFLOADS.iter().filter(|(offload, _)| self.offloads & offload != 0).map(|(_, feature)| feature);
        [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_CTRL_RX,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
            // Any tap takes these.
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
        ]
        .iter()
        .chain(taken)
        .fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.config_space(), offset, data);
    }

    /// A driver can only write to the address of a device of old.
    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn start(&mut self, activation: Activation) -> Result<(), VirtioError> {
        let Activation { memory, features, mut queues, notifier } = activation;
        self.set_offloads(features)?;
        for active in &mut queues {
            active.queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        }
        let (tap, announcements) = (self.tap.clone(), self.announcements.clone());
        let work = NetWork::new(tap, memory, queues, notifier.clone(), features, announcements);
        let work = work.map_err(|source| self.error("make a timer for it", source))?;
        let worker = Worker::start("network", work).map_err(|source| self.error("start its thread", source))?;
        self.running = Running::Working(worker, features, notifier);
        Ok(())
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        match std::mem::replace(&mut self.running, Running::Stopped) {
            Running::Stopped => Vec::new(),
            Running::Working(worker, ..) => worker.stop().map(NetWork::into_queues).unwrap_or_default(),
        }
    }

    fn reset(&mut self) {
        self.announcements.end(false);
        if let Err(error) = self.set_offloads(0) {
            tracing::warn!(%error, "the next driver may get frames that it cannot take");
        }
    }

    /// A frame is on its way or lost, as in any network.
    fn flush(&mut self) -> Result<(), VirtioError> {
        Ok(())
    }

    fn save(&self) -> VirtioState {
        let Self { tap: _, mac, offloads: _, announcements, running: _ } = self;
        VirtioState::Net(NetV1 { mac: mac.0, announce: announcements.are_asked_for() })
    }

    fn restore(&mut self, state: &VirtioState) -> Result<(), VirtioError> {
        let VirtioState::Net(NetV1 { mac, announce }) = state else {
            return Err(VirtioError::other_kind(&called(&self.tap.name)));
        };
        if *mac != self.mac.0 {
            return Err(unfit(&self.tap.name, "its state has another address than its configuration"));
        }
        self.announcements.end(*announce);
        Ok(())
    }

    fn after_restore(&mut self) {
        let Running::Working(_, features, notifier) = &self.running else { return };
        if features & (1 << VIRTIO_NET_F_GUEST_ANNOUNCE) != 0 {
            self.announcements.start();
            notifier.config_changed();
        }
    }
}
