//! What every architecture keeps and compares: the image, values that are to stay, and the loader's command line.

use core::fmt::LowerHex;

use guest_kernel::pattern::scramble;
use guest_kernel::ranges::Range;

use crate::console::damage;
use crate::irq_cell::IrqCell;

static COMMAND_LINE: IrqCell<[u8; 1024]> = IrqCell::new([0; 1024]);

unsafe extern "C" {
    static image_start: u8;
    static image_end: u8;
    static constants_end: u8;
}

/// All of the image, with what is not in the file.
pub fn image() -> Range {
    Range { start: (&raw const image_start).addr() as u64, end: (&raw const image_end).addr() as u64 }
}

/// The image's bytes that never change: code and constants.
pub fn constants() -> Range {
    Range { start: (&raw const image_start).addr() as u64, end: (&raw const constants_end).addr() as u64 }
}

/// One number for all constants.
pub fn sum_of_constants() -> u64 {
    let range = constants();
    (range.start..range.end).step_by(8).fold(0, |sum, address| {
        // SAFETY: the image's own code and constants, whose ends are multiples of 8.
        let word = unsafe { core::ptr::with_exposed_provenance::<u64>(address as usize).read_volatile() };
        scramble(sum ^ word)
    })
}

/// Compares the constants; what was found is expected from then on.
pub fn check_constants(expected: &mut u64) {
    let found = sum_of_constants();
    if *expected != found {
        damage("image", format_args!("expected={expected:#018x} found={found:#018x}"));
        *expected = found;
    }
}

/// Reports what differs, each once: what was found is expected from then on.
pub fn compare<T: Copy + PartialEq + LowerHex, const N: usize>(
    what: &str,
    names: &[&str; N],
    expected: &mut [T; N],
    found: [T; N],
) {
    for ((name, expected), found) in names.iter().zip(&*expected).zip(&found) {
        if expected != found {
            damage(what, format_args!("name={name} expected={expected:#x} found={found:#x}"));
        }
    }
    *expected = found;
}

/// Copies the command line out of the loader's memory. To be called once.
pub fn keep_command_line(text: impl Iterator<Item = u8>) -> &'static str {
    let bytes: &'static [u8] = COMMAND_LINE.with(|buffer| {
        let mut length = 0;
        for (place, byte) in buffer.iter_mut().zip(text) {
            *place = byte;
            length += 1;
        }
        let start = buffer.as_ptr();
        // SAFETY: the buffer is a static that is written here alone, once, before this reference exists.
        unsafe { core::slice::from_raw_parts(start, length) }
    });
    str::from_utf8(bytes).unwrap_or("")
}
