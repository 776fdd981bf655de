//! A PL031 real-time clock: tells the host's time, as far as the guest has not set it. Its alarm never rings, so its
//! interrupt is never raised.

use kho_abi::document::device::RtcV1;
use vm_superio::rtc_pl031::{NoEvents, Rtc as Pl031, RtcState};

use crate::bus::{BusDevice, Request};

/// Size of the registers in bytes.
pub const SIZE: u64 = 0x1000;

/// The clock.
pub struct Rtc(Pl031<NoEvents>);

impl Default for Rtc {
    fn default() -> Self {
        Self(Pl031::new())
    }
}

impl Rtc {
    /// Takes the state.
    pub fn save(&self) -> RtcV1 {
        let RtcState { lr, offset, mr, imsc, ris } = self.0.state();
        RtcV1 { load: lr, offset_seconds: offset as u64, match_value: mr, interrupt_mask: imsc, interrupt: ris }
    }

    /// Puts the state back.
    pub fn restore(&mut self, state: &RtcV1) {
        let RtcV1 { load, offset_seconds, match_value, interrupt_mask, interrupt } = *state;
        let state =
            RtcState { lr: load, offset: offset_seconds as i64, mr: match_value, imsc: interrupt_mask, ris: interrupt };
        self.0 = Pl031::from_state(&state, NoEvents);
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let (Ok(offset), Ok(data)) = (u16::try_from(offset), data.try_into()) else { return };
        self.0.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        if let (Ok(offset), Ok(data)) = (u16::try_from(offset), data.try_into()) {
            self.0.write(offset, data);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u64 = 0;
    const LOAD: u64 = 8;

    fn read(rtc: &mut Rtc, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        rtc.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn time_that_the_guest_has_set_goes_on_after_a_restore() {
        let mut rtc = Rtc::default();
        rtc.write(LOAD, &1_000_000u32.to_le_bytes());
        let mut other = Rtc::default();
        other.restore(&rtc.save());
        assert!((1_000_000..1_000_060).contains(&read(&mut other, DATA)));
        assert_eq!(rtc.save(), other.save());
    }

    #[test]
    fn accesses_of_any_size_and_offset_are_survived() {
        let mut rtc = Rtc::default();
        for size in 0..16 {
            for offset in [0, 2, SIZE - 1, u64::MAX] {
                let mut data = vec![0; size];
                rtc.read(offset, &mut data);
                rtc.write(offset, &data);
            }
        }
    }
}
