//! The virtio-mmio transport (virtio 1.2, 4.2): the registers through which a driver finds a device, agrees with it on features and
//! sets up its queues.
//!
//! While the device works, it owns its queues, and what the driver has said of them stays here. Kicks reach the device by an
//! ioeventfd for each queue and interrupts the guest by an irqfd, so that neither waits for this lock, and nor does the guest's
//! interrupt handler, which needs two registers: they are a bus device of their own, [`InterruptRegisters`].

mod interrupt;
mod queue;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use kho_abi::document::virtio::VirtioMmioV1;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH,
    VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS,
    VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use self::interrupt::Interrupt;
pub use self::interrupt::InterruptRegisters;
use self::queue::{Half, QueueRegisters};
use super::{Activation, ActiveQueue, Notifier, VirtioDevice, VirtioError};
use crate::bus::{BusDevice, Request};

/// How much of the guest's address space a device takes.
pub const SIZE: u64 = 0x1000;

/// Where in it the driver kicks a queue.
pub const NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"KHOV");

/// All that a driver may write to Status.
const STATUS_OF_DRIVER: u32 = 0x0f | VIRTIO_CONFIG_S_FAILED;

/// A device and its registers.
pub struct Transport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemoryMmap,
    interrupt: Arc<Interrupt>,
    queues: Vec<QueueRegisters>,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    status: u32,
    /// Whether the device has its queues.
    working: bool,
    /// Whether it has to wait, as the machine stands still.
    paused: bool,
}

impl Transport {
    /// Puts a device behind registers. `interrupt` is written to where the guest is to be interrupted. It waits until
    /// [`Self::resume`].
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryMmap,
        interrupt: EventFd,
    ) -> Result<Self, std::io::Error> {
        let queues = device.queue_sizes().into_iter().map(QueueRegisters::new).collect::<Result<_, _>>()?;
        Ok(Self {
            device,
            memory,
            interrupt: Arc::new(Interrupt::new(interrupt)),
            queues,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            status: 0,
            working: false,
            paused: true,
        })
    }

    /// What becomes readable when the driver kicks a queue, for each queue.
    pub fn kicks(&self) -> impl Iterator<Item = &EventFd> {
        self.queues.iter().map(|queue| &queue.kick)
    }

    /// Where it interrupts the guest.
    pub fn interrupt_line(&self) -> &EventFd {
        self.interrupt.line()
    }

    /// The registers that do not wait for the others, to be put on the bus before these.
    pub fn interrupt_registers(&self) -> InterruptRegisters {
        InterruptRegisters(self.interrupt.clone())
    }

    /// Stops work; nothing is in flight any more.
    pub fn pause(&mut self) {
        self.paused = true;
        self.stop();
    }

    /// Lets the device work, if the driver has set it up.
    pub fn resume(&mut self) {
        self.paused = false;
        self.start_if_ready();
    }

    /// Makes durable what would be lost with the host's kernel.
    pub fn flush(&mut self) -> Result<(), VirtioError> {
        self.device.flush()
    }

    /// Lets the device work after a live update. Whatever was under way between it and its driver, in either direction, may have
    /// been lost with the host's kernel, so both are told to look.
    pub fn resume_restored(&mut self) {
        self.resume();
        if !self.working {
            return;
        }
        self.device.after_restore();
        for (number, queue) in (0..).zip(&self.queues) {
            if queue.ready {
                queue.kick();
                self.interrupt.queue_used(number);
            }
        }
    }

    /// Its state. The device is paused.
    pub fn save(&self) -> VirtioMmioV1 {
        let Self {
            device,
            memory: _,
            interrupt,
            queues,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            status,
            working: _,
            paused: _,
        } = self;
        VirtioMmioV1 {
            device_features_select: *device_features_select,
            driver_features_select: *driver_features_select,
            driver_features: *driver_features,
            queue_select: *queue_select,
            status: *status,
            interrupt_status: interrupt.status(),
            config_generation: interrupt.generation(),
            queues: queues.iter().map(QueueRegisters::save).collect(),
            device: device.save(),
        }
    }

    /// Makes it what it was. The device has not started yet.
    pub fn restore(&mut self, state: &VirtioMmioV1) -> Result<(), VirtioError> {
        let VirtioMmioV1 {
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            status,
            interrupt_status,
            config_generation,
            queues,
            device,
        } = state;
        let unfit = |reason: String| VirtioError::Unfit { device: "a virtio device".to_owned(), reason };
        if queues.len() != self.queues.len() {
            return Err(unfit(format!("it had {} queues and has {} here", queues.len(), self.queues.len())));
        }
        // The guest would go on to use what is not there.
        let missing = driver_features & !self.offered();
        if missing != 0 {
            return Err(unfit(format!("its driver uses features {missing:#x}, which it does not have here")));
        }
        if status & !(STATUS_OF_DRIVER | VIRTIO_CONFIG_S_NEEDS_RESET) != 0 {
            return Err(unfit(format!("its status is {status:#x}, which none can be")));
        }
        for (queue, state) in self.queues.iter_mut().zip(queues) {
            queue.restore(state).map_err(unfit)?;
        }
        self.device.restore(device)?;
        self.device_features_select = *device_features_select;
        self.driver_features_select = *driver_features_select;
        self.driver_features = *driver_features;
        self.queue_select = *queue_select;
        self.status = *status;
        self.interrupt.restore(*interrupt_status, *config_generation);
        Ok(())
    }

    fn offered(&self) -> u64 {
        self.device.features() | 1 << VIRTIO_F_VERSION_1
    }

    fn has_status(&self, bit: u32) -> bool {
        self.status & bit != 0
    }

    fn start_if_ready(&mut self) {
        let ready = self.has_status(VIRTIO_CONFIG_S_DRIVER_OK) && !self.has_status(VIRTIO_CONFIG_S_NEEDS_RESET);
        if self.working || self.paused || !ready {
            return;
        }
        match self.start() {
            Ok(()) => self.working = true,
            Err(error) => self.give_up(&error),
        }
    }

    fn start(&mut self) -> Result<(), VirtioError> {
        let queues = self.queues.iter().map(|queue| queue.activate(&self.memory)).collect::<Result<_, _>>()?;
        let notifier: Arc<dyn Notifier> = self.interrupt.clone();
        let activation = Activation { memory: self.memory.clone(), features: self.driver_features, queues, notifier };
        self.device.start(activation)
    }

    /// The device cannot work: the driver is told that only a reset helps.
    fn give_up(&mut self, error: &VirtioError) {
        let cause = std::error::Error::source(error);
        tracing::warn!(%error, cause, "a virtio device cannot start and asks its driver for a reset");
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        self.interrupt.config_changed();
    }

    fn stop(&mut self) {
        if !self.working {
            return;
        }
        self.working = false;
        let returned = self.device.stop();
        if returned.len() != self.queues.len() {
            // Its thread has panicked, and with it the queues are gone.
            tracing::error!("a virtio device did not give its queues back and asks its driver for a reset");
            self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
            self.interrupt.config_changed();
            return;
        }
        for (registers, ActiveQueue { queue, kick: _ }) in self.queues.iter_mut().zip(returned) {
            registers.next_available = queue.next_avail();
            registers.next_used = queue.next_used();
        }
    }

    fn reset(&mut self) {
        self.stop();
        self.device.reset();
        for queue in &mut self.queues {
            queue.reset();
        }
        self.interrupt.reset();
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.status = 0;
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // A driver only ever adds bits. NEEDS_RESET is ours, and what the driver says of it does not count.
        let mut status = self.status | value & STATUS_OF_DRIVER;
        let news = status & !self.status;
        if news & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.features_acceptable() {
            status &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            status &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.status = status;
        self.start_if_ready();
    }

    /// Whether the device can work with what the driver has accepted: nothing that it was not offered, and the modern interface.
    fn features_acceptable(&self) -> bool {
        let features = self.driver_features;
        features & !self.offered() == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn write_features(&mut self, value: u32) {
        // What was agreed upon stays so until a reset.
        let shift = match self.driver_features_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        if !self.has_status(VIRTIO_CONFIG_S_FEATURES_OK) {
            self.driver_features = self.driver_features & !(0xffff_ffff << shift) | u64::from(value) << shift;
        }
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(self.queue_select as usize)
    }

    /// The queue that is selected, if it can still be set up.
    fn selected_for_setup(&mut self) -> Option<&mut QueueRegisters> {
        let working = self.has_status(VIRTIO_CONFIG_S_DRIVER_OK);
        self.queues.get_mut(self.queue_select as usize).filter(|_| !working)
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.device_id(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_select {
                0 => self.offered() as u32,
                1 => (self.offered() >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.selected().map_or(0, |queue| queue.size_max().into()),
            VIRTIO_MMIO_QUEUE_READY => self.selected().map_or(0, |queue| queue.ready.into()),
            VIRTIO_MMIO_STATUS => self.status,
            VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.generation(),
            // No device has shared memory: its length is -1.
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.write_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            // Only where KVM cannot do it by the ioeventfd.
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                if let Some(queue) = self.queues.get(value as usize) {
                    queue.kick();
                }
            }
            VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => {
                if let Some(queue) = self.selected_for_setup() {
                    match offset {
                        VIRTIO_MMIO_QUEUE_NUM => queue.set_size(value),
                        VIRTIO_MMIO_QUEUE_READY => queue.ready = value == 1,
                        VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_descriptor_table(Half::Low, value),
                        VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_descriptor_table(Half::High, value),
                        VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_available_ring(Half::Low, value),
                        VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_available_ring(Half::High, value),
                        VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring(Half::Low, value),
                        VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring(Half::High, value),
                        _ => {}
                    }
                }
            }
        }
    }
}

/// A register's offset, if this is an access to one: 32 bits wide and aligned.
fn register(offset: u64, length: usize) -> Option<u32> {
    u32::try_from(offset).ok().filter(|offset| length == 4 && offset.is_multiple_of(4))
}

impl BusDevice for Transport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            data.fill(0);
            self.device.read_config(offset, data);
        } else if let Some(offset) = register(offset, data.len()) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            self.device.write_config(offset, data);
        } else if let (Some(offset), Ok(value)) = (register(offset, data.len()), data.try_into()) {
            self.write_register(offset, u32::from_le_bytes(value));
        }
        None
    }
}
