//! Writes the protocol's lines: each is put together first and goes out in one piece.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU32, Ordering};

use guest_kernel::protocol::Report;

use crate::arch;

/// After so many lines about damage the guest has made its point; more would only bury the first.
const DAMAGE_LINES: u32 = 100;

static DAMAGE: AtomicU32 = AtomicU32::new(0);

/// Writes a line.
pub fn report(report: &Report<'_>) {
    let mut line = Buffer { bytes: [0; 400], length: 0 };
    // An overlong line is cut: the buffer swallows what does not fit and never fails.
    let _ = write!(line, "{report}");
    line.bytes[line.length] = b'\n';
    arch::serial_write(&line.bytes[..=line.length]);
}

/// Writes a line about damage.
pub fn damage(what: &str, details: fmt::Arguments<'_>) {
    if DAMAGE.fetch_add(1, Ordering::Relaxed) < DAMAGE_LINES {
        report(&Report::Damage { what, details });
    }
}

struct Buffer {
    bytes: [u8; 400],
    length: usize,
}

impl Write for Buffer {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // One byte stays free for the line break.
        let room = self.bytes.len() - 1 - self.length;
        let taken = &text.as_bytes()[..text.len().min(room)];
        self.bytes[self.length..self.length + taken.len()].copy_from_slice(taken);
        self.length += taken.len();
        Ok(())
    }
}
