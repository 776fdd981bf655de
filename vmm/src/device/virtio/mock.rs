//! A driver's side of a queue, for the tests of devices.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{ActiveQueue, Notifier};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;

/// What a ring takes of memory.
pub const RING_SIZE: u64 = 0x1_0000;

/// What a device has told its driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// A queue has used buffers.
    Queue(u16),
    /// The configuration space has changed.
    Config,
}

struct Teller(Sender<Told>);

impl Notifier for Teller {
    fn queue_used(&self, queue: u16) {
        let _ = self.0.send(Told::Queue(queue));
    }

    fn config_changed(&self) {
        let _ = self.0.send(Told::Config);
    }
}

/// A notifier, and what it was used for.
pub fn notifier() -> (Arc<dyn Notifier>, Receiver<Told>) {
    let (told, heard) = mpsc::channel();
    (Arc::new(Teller(told)), heard)
}

/// A part of memory in a chain.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Where.
    pub address: u64,
    /// How much.
    pub length: u32,
    /// The device writes, and does not read.
    pub writable: bool,
}

/// For the device to read.
pub fn readable(address: u64, length: u32) -> Part {
    Part { address, length, writable: false }
}

/// For the device to write.
pub fn writable(address: u64, length: u32) -> Part {
    Part { address, length, writable: true }
}

/// A queue as its driver has it.
pub struct Ring {
    memory: GuestMemoryMmap,
    base: u64,
    size: u16,
    available: u16,
    descriptors: u16,
    seen: u16,
}

impl Ring {
    /// One at `base`, of [`RING_SIZE`] bytes, which are zero.
    pub fn new(memory: &GuestMemoryMmap, base: u64, size: u16) -> Self {
        Self { memory: memory.clone(), base, size, available: 0, descriptors: 0, seen: 0 }
    }

    /// As the device gets it.
    pub fn active(&self) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(self.base as u32), None);
        queue.set_avail_ring_address(Some((self.base + AVAILABLE) as u32), None);
        queue.set_used_ring_address(Some((self.base + USED) as u32), None);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        ActiveQueue { queue, kick: EventFd::new(libc::EFD_NONBLOCK).unwrap() }
    }

    fn write<T: vm_memory::ByteValued>(&self, value: T, offset: u64) {
        self.memory.write_obj(value, GuestAddress(self.base + offset)).unwrap();
    }

    /// Makes a chain available.
    pub fn offer(&mut self, parts: &[Part]) -> u16 {
        let head = self.descriptors % self.size;
        for (index, Part { address, length, writable }) in parts.iter().enumerate() {
            let at = u64::from(self.descriptors % self.size) * 16;
            self.descriptors += 1;
            let last = index + 1 == parts.len();
            self.write(*address, at);
            self.write(*length, at + 8);
            self.write(if last { 0 } else { NEXT } | if *writable { WRITE } else { 0 }, at + 12);
            self.write(self.descriptors % self.size, at + 14);
        }
        self.write(head, AVAILABLE + 4 + u64::from(self.available % self.size) * 2);
        self.available = self.available.wrapping_add(1);
        self.write(self.available, AVAILABLE + 2);
        head
    }

    /// Where the device counts what it has given back.
    pub fn used_index(&self) -> GuestAddress {
        GuestAddress(self.base + USED + 2)
    }

    /// Wants to hear, where it has agreed to say so, when the chain of that number in their order has been given back.
    pub fn wait_for(&self, number: u16) {
        self.write(number, AVAILABLE + 4 + u64::from(self.size) * 2);
    }

    /// The chains that the device has given back since this was last asked, with the bytes that it wrote.
    pub fn used(&mut self) -> Vec<(u16, u32)> {
        let read = |offset| self.memory.read_obj::<u32>(GuestAddress(self.base + USED + offset)).unwrap();
        let index: u16 = self.memory.read_obj(GuestAddress(self.base + USED + 2)).unwrap();
        let mut found = Vec::new();
        while self.seen != index {
            let at = 4 + u64::from(self.seen % self.size) * 8;
            found.push((read(at) as u16, read(at + 4)));
            self.seen = self.seen.wrapping_add(1);
        }
        found
    }
}
