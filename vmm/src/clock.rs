//! The raw counter and a clock of the kernel's, read together.

use rustix::time::ClockId;

use crate::arch;

/// The counter and a clock in ns at one moment: of several tries that which was interrupted least.
pub fn read(clock: ClockId) -> (u64, u64) {
    const TRIES: usize = 5;
    let mut best = (u64::MAX, (0, 0));
    for _ in 0..TRIES {
        let before = arch::counter();
        let time = rustix::time::clock_gettime(clock);
        let width = arch::counter().wrapping_sub(before);
        let ns = (time.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(time.tv_nsec as u64);
        if width < best.0 {
            best = (width, (before.wrapping_add(width / 2), ns));
        }
    }
    best.1
}
