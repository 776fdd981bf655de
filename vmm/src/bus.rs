//! Address spaces with devices in them: which device answers at which port or memory address.
//!
//! Nothing that a guest does here is an error of ours: an access that no device answers reads as all ones, as on a PC.

use std::sync::{Arc, Mutex, PoisonError};

/// What a guest asked its platform for by writing to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Power off.
    PowerOff,
    /// Start anew from the firmware; here that ends the VM, whose starter decides what comes next.
    Reset,
}

/// A device as a vCPU sees it.
pub trait BusDevice: Send {
    /// The guest reads at `offset` from the device's base address. `data` is filled with ones before.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes at `offset` from the device's base address. A string instruction writes many values to one address;
    /// `data` then holds them one behind the other.
    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request>;
}

struct Range {
    base: u64,
    size: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// One address space: ports or memory.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

impl Bus {
    /// Puts a device at `size` addresses from `base` on. Of two devices at one address the first answers.
    pub fn insert(&mut self, base: u64, size: u64, device: Arc<Mutex<dyn BusDevice>>) {
        self.ranges.push(Range { base, size, device });
    }

    fn find(&self, address: u64) -> Option<(&Range, u64)> {
        self.ranges.iter().find_map(|range| {
            let offset = address.checked_sub(range.base)?;
            (offset < range.size).then_some((range, offset))
        })
    }

    /// A vCPU reads.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((range, offset)) = self.find(address) {
            range.device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        }
    }

    /// A vCPU writes.
    pub fn write(&self, address: u64, data: &[u8]) -> Option<Request> {
        let (range, offset) = self.find(address)?;
        range.device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u64);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }
        fn write(&mut self, offset: u64, _data: &[u8]) -> Option<Request> {
            self.0 = offset;
            Some(Request::Reset)
        }
    }

    #[test]
    fn access_reaches_the_device_that_covers_the_address_and_no_other() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, Arc::new(Mutex::new(Echo(0))));
        let mut data = [0];
        bus.read(0x13, &mut data);
        assert_eq!(data, [3]);
        for outside in [0xf, 0x14, u64::MAX] {
            bus.read(outside, &mut data);
            assert_eq!(data, [0xff]);
            assert_eq!(bus.write(outside, &[0]), None);
        }
        assert_eq!(bus.write(0x10, &[0]), Some(Request::Reset));
    }
}
