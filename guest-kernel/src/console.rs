//! Writes the protocol's lines: each is put together first and goes out in one piece.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use guest_kernel::protocol::Report;

use crate::{arch, processors};

/// After so many lines about damage the guest has made its point; more would only bury the first.
const DAMAGE_LINES: u32 = 100;

/// For how many turns one CPU waits until another has said its line: one that stands still must not silence the others.
const TURNS: u32 = 1_000_000_000;

static DAMAGE: AtomicU32 = AtomicU32::new(0);
static BUSY: AtomicBool = AtomicBool::new(false);

/// Writes a line.
pub fn report(report: &Report<'_>) {
    let mut line = Buffer { bytes: [0; 400], length: 0 };
    // An overlong line is cut: the buffer swallows what does not fit and never fails.
    let _ = write!(line, "{report}");
    line.bytes[line.length] = b'\n';
    // An interrupt in the midst of it might write a line of its own.
    arch::interrupts_off(|| {
        let is_free = || BUSY.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok();
        let _ = (0..TURNS).any(|_| is_free());
        arch::serial_write(&line.bytes[..=line.length]);
        BUSY.store(false, Ordering::Release);
    });
}

/// Writes a line about damage.
pub fn damage(what: &str, details: fmt::Arguments<'_>) {
    if DAMAGE.fetch_add(1, Ordering::Relaxed) < DAMAGE_LINES {
        let vcpu = (processors::count() > 1).then(arch::number);
        report(&Report::Damage { what, details, vcpu });
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
