//! The devices: serial port and power; and the image.

use guest_kernel::options::End;

use super::cpu;
use super::devicetree::{BOARD, Serial};
use crate::kept::{self, compare};

const SCRATCH: u64 = 7;

/// Writes a line in one piece. Interrupts are off.
pub fn serial_write(bytes: &[u8]) {
    let Some(board) = BOARD.get() else { return };
    let (Serial::Ns16550(address) | Serial::Pl011(address)) = board.serial;
    for byte in bytes {
        cpu::write_u8(address, *byte);
    }
}

/// Ends the machine.
pub fn end(how: End) -> ! {
    cpu::firmware_end(how);
    // No such firmware here: at least do nothing more.
    cpu::halt()
}

/// What devices and memory keep.
pub struct Platform {
    /// Where a 16550 is, and what it keeps.
    serial: Option<(u64, [u8; 4])>,
    constants: u64,
}

impl Platform {
    /// Sets up what is not set up yet and remembers it all.
    pub fn new(serial: Serial) -> Self {
        let serial = match serial {
            Serial::Ns16550(address) => {
                cpu::write_u8(address + 1, 0); // no interrupts
                cpu::write_u8(address + 3, 0x03); // 8 bits, no parity, one stop bit
                cpu::write_u8(address + 4, 0x08); // OUT2
                cpu::write_u8(address + SCRATCH, 0xa5);
                let found = read_serial(address);
                // Without a scratch register there is no such port, or not a whole one.
                (found[3] == 0xa5).then_some((address, found))
            }
            Serial::Pl011(_) => None,
        };
        Platform { serial, constants: kept::sum_of_constants() }
    }

    /// Whether the serial port is one whose registers are checked.
    pub fn has_serial(&self) -> bool {
        self.serial.is_some()
    }

    /// Compares all; what is wrong is reported once.
    pub fn check(&mut self) {
        if let Some((address, expected)) = &mut self.serial {
            let names = ["interrupt-enable", "line-control", "modem-control", "scratch"];
            compare("uart", &names, expected, read_serial(*address));
        }
        kept::check_constants(&mut self.constants);
    }

    /// Changes the serial port: for the self-test.
    pub fn strike_serial(&self) {
        if let Some((address, _)) = self.serial {
            cpu::write_u8(address + SCRATCH, 0x5a);
        }
    }

    /// Changes the image: for the self-test. The magic of its header, which nobody reads any more.
    pub fn strike_image() {
        let magic = core::ptr::with_exposed_provenance_mut::<u32>(kept::constants().start as usize + 56);
        // SAFETY: the block is writable, and the header is no Rust object.
        unsafe { magic.write_volatile(0) };
    }
}

/// Interrupt enable, line control, modem control, scratch.
fn read_serial(address: u64) -> [u8; 4] {
    [1, 3, 4, SCRATCH].map(|register| cpu::read_u8(address + register))
}
