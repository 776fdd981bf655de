//! The few things the lab must ask the processor itself. Each architecture's module defines the same names.
#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "aarch64")]
pub use aarch64::counter;

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::counter;

use rustix::time::{ClockId, clock_gettime};
use std::thread;
use std::time::Duration;

/// The counter's frequency in kHz, measured against the kernel's raw clock, which takes a fifth of a second.
pub fn counter_khz() -> u64 {
    const WINDOW: Duration = Duration::from_millis(200);
    let now = || {
        let before = counter();
        let time = clock_gettime(ClockId::MonotonicRaw);
        // In the middle of the two, so that most of what the call takes cancels out.
        let middle = before + (counter() - before) / 2;
        (middle, u128::from(time.tv_sec.unsigned_abs()) * 1_000_000_000 + u128::from(time.tv_nsec.unsigned_abs()))
    };
    let (first_counter, first_ns) = now();
    thread::sleep(WINDOW);
    let (last_counter, last_ns) = now();
    let khz = u128::from(last_counter - first_counter) * 1_000_000 / (last_ns - first_ns).max(1);
    u64::try_from(khz).unwrap_or(u64::MAX)
}
