//! virtio devices (virtio 1.2): what each has to offer, whatever bus it sits on.
//!
//! A device knows nothing of its transport. The transport owns feature negotiation, the queues while the device does not work,
//! and interrupts; between [`VirtioDevice::start`] and [`VirtioDevice::stop`] the device owns its queues and works in threads of
//! its own.

pub mod balloon;
pub mod block;
pub mod mmio;
#[cfg(test)]
mod mock;
pub mod net;
pub mod rng;
mod serve;
pub mod vsock;
pub mod worker;

use std::io;
use std::sync::Arc;

use kho_abi::document::virtio::VirtioState;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use self::balloon::Balloon;
use self::block::Block;
use self::net::Net;
use self::rng::Rng;
use self::vsock::Vsock;
use crate::config::device::DeviceConfig;

/// What can go wrong with a virtio device.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// The host refused something.
    #[error("{device}: cannot {operation}")]
    System {
        /// Which device, in the operator's words.
        device: String,
        /// What was tried.
        operation: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The state handed over, or what it refers to on this host, does not fit.
    #[error("{device}: {reason}")]
    Unfit {
        /// Which device, in the operator's words.
        device: String,
        /// What does not fit, and what to do.
        reason: String,
    },
}

impl VirtioError {
    /// The state handed over is not this kind of device's.
    pub fn other_kind(device: &str) -> Self {
        let reason = "the state handed over is that of another kind of device".to_owned();
        Self::Unfit { device: device.to_owned(), reason }
    }
}

/// The devices that an operator has asked for, by slot, with what they need of this host open: images, taps, sockets. Of guest RAM
/// they need nothing yet, but for the balloon, which is missing here.
pub struct Devices(Vec<Option<Box<dyn VirtioDevice>>>);

impl Devices {
    /// Opens all of them.
    pub fn open(configs: &[DeviceConfig]) -> Result<Self, VirtioError> {
        configs.iter().map(open).collect::<Result<_, _>>().map(Self)
    }

    /// All of them. `balloon` is what the operator has hold of the balloon by.
    pub fn complete(self, balloon: &Arc<balloon::Control>) -> impl Iterator<Item = Box<dyn VirtioDevice>> {
        self.0.into_iter().map(|device| device.unwrap_or_else(|| Box::new(Balloon::new(balloon))))
    }
}

fn open(config: &DeviceConfig) -> Result<Option<Box<dyn VirtioDevice>>, VirtioError> {
    Ok(match config {
        DeviceConfig::Rng => Some(Box::new(Rng::new())),
        DeviceConfig::Block(config) => Some(Box::new(Block::new(config)?)),
        DeviceConfig::Net(config) => Some(Box::new(Net::new(config)?)),
        DeviceConfig::Balloon => None,
        DeviceConfig::Vsock(config) => Some(Box::new(Vsock::new(config)?)),
    })
}

/// Reads what there is of a configuration space.
fn read_space(space: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}

/// How a device reaches its driver.
pub trait Notifier: Send + Sync {
    /// There are used buffers in a queue.
    fn queue_used(&self, queue: u16);
    /// The device's configuration space has changed.
    fn config_changed(&self);
}

/// A queue that the driver has set up.
pub struct ActiveQueue {
    /// The queue.
    pub queue: Queue,
    /// Readable when the driver says that there are available buffers.
    pub kick: EventFd,
}

/// What a device works with.
pub struct Activation {
    /// Guest RAM.
    pub memory: GuestMemoryMmap,
    /// The features that the driver has accepted.
    pub features: u64,
    /// As many as [`VirtioDevice::queue_sizes`] has; one that the driver did not set up is not ready.
    pub queues: Vec<ActiveQueue>,
    /// Tells the driver.
    pub notifier: Arc<dyn Notifier>,
}

/// A device. Nothing here has a default, so that no device forgets a part of a live update.
pub trait VirtioDevice: Send {
    /// Its number in the virtio specification.
    fn device_id(&self) -> u32;
    /// The features it offers, its own and those of its queues. The transport adds its own.
    fn features(&self) -> u64;
    /// The largest size of each of its queues.
    fn queue_sizes(&self) -> Vec<u16>;
    /// The driver reads the configuration space. Bytes outside of it stay as they are (zero).
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// The driver writes to the configuration space.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Begins to work: the driver is ready, or the guest goes on after a pause or under a new kernel. Available buffers may be
    /// waiting without a kick.
    fn start(&mut self, activation: Activation) -> Result<(), VirtioError>;
    /// Stops work and gives the queues back, with no request in flight: each that was taken off a queue is completed in it, or
    /// put back. For a pause, a freeze, or a reset by the driver. Without a start before there is nothing to give back.
    fn stop(&mut self) -> Vec<ActiveQueue>;
    /// Forgets what the driver has told it: it has reset the device, which is stopped.
    fn reset(&mut self);
    /// Makes durable what would be lost with the host's kernel. Called while the device works, so that little is left to do,
    /// and once more when it has stopped.
    fn flush(&mut self) -> Result<(), VirtioError>;
    /// Its state. It has stopped.
    fn save(&self) -> VirtioState;
    /// Makes it what it was. It has not started yet.
    fn restore(&mut self, state: &VirtioState) -> Result<(), VirtioError>;
    /// Something to be told to the driver once it runs again after a live update, such as that the network has changed.
    fn after_restore(&mut self);
}
