//! The devices: serial port, the old interrupt controllers, power.

use guest_kernel::options::End;

use super::{apic, cpu, tables, timer};
use crate::kept::{self, compare};

const SERIAL: u16 = 0x3f8;
const SCRATCH: u16 = SERIAL + 7;
const PIC_MASKS: [u16; 2] = [0x21, 0xa1];
const SLEEP_CONTROL: u16 = 0x600;
const SLEEP_S5: u8 = 0x34;
const RESET: u16 = 0x602;
const KEYBOARD_CONTROLLER: u16 = 0x64;

/// Writes a line in one piece. Interrupts are off.
pub fn serial_write(bytes: &[u8]) {
    cpu::write_port_string(SERIAL, bytes);
}

/// Ends the machine.
pub fn end(how: End) -> ! {
    match how {
        End::PowerOff => cpu::write_port(SLEEP_CONTROL, SLEEP_S5),
        End::Reset => {
            cpu::write_port(RESET, 1);
            cpu::write_port(KEYBOARD_CONTROLLER, 0xfe);
        }
        End::TripleFault => tables::triple_fault(),
    }
    // No such device here: at least do nothing more.
    cpu::halt()
}

/// Keeps the old interrupt controllers, and with them whatever firmware has left running, from interrupting.
pub fn mask_pics() {
    for port in PIC_MASKS {
        cpu::write_port(port, 0xff);
    }
}

/// What devices and memory keep.
pub struct Platform {
    serial: Option<[u8; 4]>,
    pic_masks: [u8; 2],
    redirections: [u32; 2],
    constants: u64,
}

impl Platform {
    /// Sets up what is not set up yet and remembers it all.
    pub fn new() -> Self {
        cpu::write_port(SERIAL + 1, 0); // no interrupts
        cpu::write_port(SERIAL + 3, 0x03); // 8 bits, no parity, one stop bit
        cpu::write_port(SERIAL + 4, 0x08); // OUT2
        cpu::write_port(SCRATCH, 0xa5);
        let serial = read_serial();
        Platform {
            // Without a scratch register there is no such port, or not a whole one.
            serial: (serial[3] == 0xa5).then_some(serial),
            pic_masks: PIC_MASKS.map(cpu::read_port),
            redirections: timer::PINS.map(apic::read_redirection),
            constants: kept::sum_of_constants(),
        }
    }

    /// Compares all; what is wrong is reported once.
    pub fn check(&mut self) {
        if let Some(expected) = &mut self.serial {
            compare("uart", &["interrupt-enable", "line-control", "modem-control", "scratch"], expected, read_serial());
        }
        compare("pic", &["master", "slave"], &mut self.pic_masks, PIC_MASKS.map(cpu::read_port));
        compare("ioapic", &["pin0", "pin2"], &mut self.redirections, timer::PINS.map(apic::read_redirection));
        kept::check_constants(&mut self.constants);
    }

    /// Changes the serial port: for the self-test.
    pub fn strike_serial() {
        cpu::write_port(SCRATCH, 0x5a);
    }

    /// Changes the image: for the self-test. A word of the note, which nobody reads any more.
    pub fn strike_image() {
        let note = core::ptr::with_exposed_provenance_mut::<u32>(kept::constants().start as usize);
        // SAFETY: the page is writable, and the note is no Rust object.
        unsafe { note.write_volatile(0) };
    }
}

/// Interrupt enable, line control, modem control, scratch.
fn read_serial() -> [u8; 4] {
    [1, 3, 4, 7].map(|register| cpu::read_port(SERIAL + register))
}
