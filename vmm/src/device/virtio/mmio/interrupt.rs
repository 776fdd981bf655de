//! How a device interrupts its driver: two registers, which nothing but the driver's interrupt handler waits for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_STATUS};
use vmm_sys_util::eventfd::EventFd;

use super::register;
use crate::bus::{BusDevice, Request};
use crate::device::virtio::Notifier;

/// The reasons for an interrupt, and the line.
pub struct Interrupt {
    line: EventFd,
    status: AtomicU32,
    generation: AtomicU32,
}

impl Interrupt {
    pub(super) fn new(line: EventFd) -> Self {
        Self { line, status: AtomicU32::new(0), generation: AtomicU32::new(0) }
    }

    pub(super) fn line(&self) -> &EventFd {
        &self.line
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Makes it what it was; reasons that there are none of are forgotten.
    pub(super) fn restore(&self, status: u32, generation: u32) {
        self.status.store(status & (VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG), Ordering::SeqCst);
        self.generation.store(generation, Ordering::SeqCst);
    }

    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
    }

    fn raise(&self, reason: u32) {
        // The reason first: the handler may run at once.
        self.status.fetch_or(reason, Ordering::SeqCst);
        if let Err(error) = self.line.write(1) {
            tracing::warn!(%error, "a virtio device cannot interrupt the guest");
        }
    }
}

impl Notifier for Interrupt {
    fn queue_used(&self, _: u16) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }
}

/// InterruptStatus and InterruptACK.
pub struct InterruptRegisters(pub(super) Arc<Interrupt>);

impl InterruptRegisters {
    /// Where they are among the device's registers.
    pub const OFFSET: u64 = VIRTIO_MMIO_INTERRUPT_STATUS as u64;
    /// How much of the guest's address space they take.
    pub const SIZE: u64 = 8;
    const ACKNOWLEDGE: u32 = 4;
}

impl BusDevice for InterruptRegisters {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = register(offset, data.len()) {
            let value = if offset == 0 { self.0.status() } else { 0 };
            data.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        if let (Some(Self::ACKNOWLEDGE), Ok(value)) = (register(offset, data.len()), data.try_into()) {
            self.0.status.fetch_and(!u32::from_le_bytes(value), Ordering::SeqCst);
        }
        None
    }
}
