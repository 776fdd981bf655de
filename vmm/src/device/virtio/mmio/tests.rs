//! The transport as a driver sees it, with a device that only remembers what it was told.

use std::sync::{Arc, Mutex};

use kho_abi::document::virtio::{RngV1, VirtioState};
use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::*;

/// What the device was told.
#[derive(Default)]
struct Told {
    starts: Vec<(u64, Vec<bool>)>,
    resets: u32,
    restored: u32,
}

#[derive(Default)]
struct Fake {
    told: Arc<Mutex<Told>>,
    queues: Vec<ActiveQueue>,
    config: [u8; 8],
}

const FEATURE: u64 = 1 << 5;

impl VirtioDevice for Fake {
    fn device_id(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        FEATURE
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 8]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (byte, own) in data.iter_mut().zip(self.config.iter().skip(offset.min(8) as usize)) {
            *byte = *own;
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (own, byte) in self.config.iter_mut().skip(offset.min(8) as usize).zip(data) {
            *own = *byte;
        }
    }
    fn start(&mut self, activation: Activation) -> Result<(), VirtioError> {
        let ready = activation.queues.iter().map(|active| active.queue.ready()).collect();
        self.told.lock().unwrap().starts.push((activation.features, ready));
        self.queues = activation.queues;
        Ok(())
    }
    fn stop(&mut self) -> Vec<ActiveQueue> {
        for active in &mut self.queues {
            // As if it had worked off some of each.
            active.queue.set_next_avail(active.queue.next_avail() + 3);
            active.queue.set_next_used(active.queue.next_used() + 3);
        }
        std::mem::take(&mut self.queues)
    }
    fn reset(&mut self) {
        self.told.lock().unwrap().resets += 1;
    }
    fn flush(&mut self) -> Result<(), VirtioError> {
        Ok(())
    }
    fn save(&self) -> VirtioState {
        VirtioState::Rng(RngV1)
    }
    fn restore(&mut self, _: &VirtioState) -> Result<(), VirtioError> {
        Ok(())
    }
    fn after_restore(&mut self) {
        self.told.lock().unwrap().restored += 1;
    }
}

const FEATURES_OK: u32 = 8;
const DRIVER: u32 = 3;
const DRIVER_OK: u32 = 4;
const NEEDS_RESET: u32 = 0x40;

struct Driver {
    transport: Transport,
    told: Arc<Mutex<Told>>,
}

impl Driver {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let device = Fake::default();
        let told = device.told.clone();
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut transport = Transport::new(Box::new(device), memory, line).unwrap();
        transport.resume();
        Self { transport, told }
    }

    fn read(&mut self, register: u32) -> u32 {
        let mut data = [0xff; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, register: u32, value: u32) {
        assert_eq!(self.transport.write(register.into(), &value.to_le_bytes()), None);
    }

    fn accept(&mut self, features: u64) {
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
        self.write(VIRTIO_MMIO_STATUS, DRIVER | FEATURES_OK);
    }

    fn set_up_queue(&mut self, number: u32, at: u32) {
        self.write(VIRTIO_MMIO_QUEUE_SEL, number);
        self.write(VIRTIO_MMIO_QUEUE_NUM, 8);
        self.write(VIRTIO_MMIO_QUEUE_DESC_LOW, at);
        self.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, at + 0x1000);
        self.write(VIRTIO_MMIO_QUEUE_USED_LOW, at + 0x2000);
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    /// With its first queue set up, and the other not.
    fn working() -> Self {
        let mut driver = Self::new();
        driver.accept(FEATURE | 1 << VIRTIO_F_VERSION_1);
        driver.set_up_queue(0, 0x1_0000);
        driver.write(VIRTIO_MMIO_STATUS, DRIVER | FEATURES_OK | DRIVER_OK);
        driver
    }

    fn starts(&self) -> usize {
        self.told.lock().unwrap().starts.len()
    }
}

#[test]
fn driver_finds_the_device_and_sets_it_to_work() {
    let mut driver = Driver::working();
    assert_eq!(driver.read(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!((driver.read(VIRTIO_MMIO_VERSION), driver.read(VIRTIO_MMIO_DEVICE_ID)), (2, 42));
    assert_eq!(driver.read(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    let features = FEATURE | 1 << VIRTIO_F_VERSION_1;
    assert_eq!(driver.told.lock().unwrap().starts, [(features, vec![true, false])]);
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), DRIVER | FEATURES_OK | DRIVER_OK);
}

#[test]
fn features_that_were_not_offered_or_no_modern_interface_are_not_agreed_to() {
    for features in [FEATURE, 1 << VIRTIO_F_VERSION_1 | 1 << 7, 0] {
        let mut driver = Driver::new();
        driver.accept(features);
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), DRIVER, "{features:#x}");
        driver.write(VIRTIO_MMIO_STATUS, DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(driver.starts(), 0, "{features:#x}");
    }
}

#[test]
fn queue_outside_of_memory_or_of_odd_size_makes_the_device_ask_for_a_reset_and_a_reset_helps() {
    let mistakes: [fn(&mut Driver); 4] = [
        |driver| driver.set_up_queue(0, 0x00ff_f000),
        |driver| driver.set_up_queue(0, 0x1_0008),
        |driver| {
            driver.set_up_queue(0, 0x1_0000);
            driver.write(VIRTIO_MMIO_QUEUE_NUM, 7);
        },
        |driver| {
            driver.set_up_queue(0, 0x1_0000);
            driver.write(VIRTIO_MMIO_QUEUE_USED_HIGH, u32::MAX);
        },
    ];
    for (number, mistake) in mistakes.into_iter().enumerate() {
        let mut driver = Driver::new();
        driver.accept(1 << VIRTIO_F_VERSION_1);
        mistake(&mut driver);
        driver.write(VIRTIO_MMIO_STATUS, DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!((driver.read(VIRTIO_MMIO_STATUS) & NEEDS_RESET, driver.starts()), (NEEDS_RESET, 0), "{number}");
        assert_eq!(driver.transport.interrupt.status(), 2, "the driver is told, {number}");
        driver.write(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0);
        driver.accept(1 << VIRTIO_F_VERSION_1);
        driver.set_up_queue(0, 0x1_0000);
        driver.write(VIRTIO_MMIO_STATUS, DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(driver.starts(), 1, "{number}");
    }
}

#[test]
fn reset_stops_the_device_and_forgets_everything() {
    let mut driver = Driver::working();
    driver.write(VIRTIO_MMIO_STATUS, 0);
    let fresh = Driver::new().transport.save();
    assert_eq!(driver.transport.save(), fresh);
    assert_eq!(driver.told.lock().unwrap().resets, 1);
}

#[test]
fn device_under_another_kernel_goes_on_where_it_was_and_both_sides_are_told_to_look() {
    let mut before = Driver::working();
    before.write(VIRTIO_MMIO_CONFIG, 0x1234_5678);
    before.transport.pause();
    let state = before.transport.save();
    assert_eq!((state.queues[0].next_available, state.queues[0].next_used), (3, 3));
    let mut after = Driver::new();
    after.transport.pause();
    after.transport.restore(&state).unwrap();
    assert_eq!(after.transport.save(), state);
    assert_eq!(after.starts(), 0, "nothing runs before the guest does");
    after.transport.resume_restored();
    assert_eq!(after.told.lock().unwrap().starts, before.told.lock().unwrap().starts);
    assert_eq!(after.told.lock().unwrap().restored, 1);
    assert_eq!(after.transport.queues[0].kick.read().unwrap(), 1);
    assert!(after.transport.queues[1].kick.read().is_err(), "a queue that is not set up is left alone");
    assert_eq!(after.transport.interrupt.status() & 1, 1);
    assert!(after.transport.interrupt_line().read().unwrap() > 0);
}

#[test]
fn thawed_device_works_on_and_one_that_was_not_set_up_stays_idle() {
    let mut driver = Driver::working();
    driver.transport.pause();
    driver.transport.resume();
    assert_eq!(driver.starts(), 2);
    let mut idle = Driver::new();
    idle.transport.pause();
    idle.transport.resume();
    assert_eq!(idle.starts(), 0);
}

#[test]
fn state_of_another_shape_is_refused() {
    let good = Driver::working().transport.save();
    let changes: [fn(&mut VirtioMmioV1); 4] = [
        |state| state.queues.truncate(1),
        |state| state.driver_features |= 1 << 60,
        |state| state.status = 0x100,
        |state| state.queues[0].size = 32,
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut state = good.clone();
        change(&mut state);
        let mut driver = Driver::new();
        driver.transport.pause();
        assert!(matches!(driver.transport.restore(&state), Err(VirtioError::Unfit { .. })), "{number}");
    }
}

#[test]
fn interrupt_is_acknowledged_without_the_other_registers() {
    let driver = Driver::working();
    let mut registers = driver.transport.interrupt_registers();
    driver.transport.interrupt.queue_used(0);
    driver.transport.interrupt.config_changed();
    let mut data = [0; 4];
    registers.read(0, &mut data);
    assert_eq!(u32::from_le_bytes(data), 3);
    registers.write(4, &1u32.to_le_bytes());
    registers.read(0, &mut data);
    assert_eq!(u32::from_le_bytes(data), 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_access_of_a_guest_makes_the_transport_panic(
        accesses in prop::collection::vec((0u64..0x1000, prop::collection::vec(any::<u8>(), 1..9), any::<bool>()), 1..60)
    ) {
        let mut driver = Driver::working();
        for (offset, mut data, write) in accesses {
            if write {
                driver.transport.write(offset, &data);
            } else {
                driver.transport.read(offset, &mut data);
            }
        }
        driver.transport.pause();
        driver.transport.save();
    }
}
