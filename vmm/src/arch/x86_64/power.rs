//! Power-off and reset: the sleep control, sleep status and reset registers of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7 and
//! 4.8.3.6), and the reset line of the keyboard controller, which is how kernels without ACPI reset a PC.
//!
//! Neither holds state: what the guest asks for takes effect at once.

use crate::bus::{BusDevice, Request};

/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register.
pub const RESET: u64 = 2;
/// Number of registers, one byte each.
pub const SIZE: u64 = 4;
/// What the guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of "soft off", which the guest reads from `\_S5`.
pub const SLEEP_TYPE_OFF: u8 = 5;

/// SLP_EN with the sleep type in bits 2 to 4.
const SLEEP_OFF: u8 = (1 << 5) | (SLEEP_TYPE_OFF << 2);

/// The registers.
pub struct Power;

impl BusDevice for Power {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        match (offset, data) {
            (SLEEP_CONTROL, &[SLEEP_OFF]) => Some(Request::PowerOff),
            (RESET, &[RESET_VALUE]) => Some(Request::Reset),
            _ => None,
        }
    }
}

/// The two ports of an 8042 keyboard controller without a keyboard.
pub struct KeyboardController;

/// Offset of the command and status port from the data port.
const COMMAND: u64 = 4;
/// "Pulse output line 0", which is wired to the reset of the CPU.
const PULSE_RESET: u8 = 0xfe;

/// Number of ports that the controller spans, most of which are not its own.
pub const KEYBOARD_SIZE: u64 = COMMAND + 1;

impl BusDevice for KeyboardController {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // An empty controller that is ready for commands: a guest that waits for it does not wait for ever.
        if offset == COMMAND || offset == 0 {
            data.fill(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        (offset == COMMAND && data == [PULSE_RESET]).then_some(Request::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_values_power_off_and_reset() {
        assert_eq!(Power.write(SLEEP_CONTROL, &[0x34]), Some(Request::PowerOff));
        assert_eq!(Power.write(SLEEP_CONTROL, &[0x14]), None);
        assert_eq!(Power.write(SLEEP_CONTROL, &[0x34, 0x34]), None);
        assert_eq!(Power.write(RESET, &[1]), Some(Request::Reset));
        assert_eq!(Power.write(RESET, &[0]), None);
        assert_eq!(KeyboardController.write(COMMAND, &[0xfe]), Some(Request::Reset));
        assert_eq!(KeyboardController.write(0, &[0xfe]), None);
    }
}
