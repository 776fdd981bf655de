//! x86_64: a PC of which as little is left as Linux and PVH guests need.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod ioctl;
#[cfg(test)]
mod kvm_tests;
pub mod msr;
pub mod platform;
mod power;
pub mod vcpu;

use std::time::{Duration, Instant};
use std::{fs, thread};

use kvm_ioctls::{Kvm, VmFd};
use rustix::time::ClockId;

use super::ArchError;
use crate::clock;

/// The architecture's name, as in `uname -m`.
pub const NAME: &str = "x86_64";

/// Where the hole below 4 GiB begins: interrupt controllers and devices live there.
pub const HOLE_START: u64 = 3 << 30;
/// Where RAM goes on above the hole.
pub const HOLE_END: u64 = 4 << 30;

/// The raw TSC. It runs on through a kexec.
pub fn counter() -> u64 {
    // SAFETY: reading the TSC has no side effect; Linux lets user space do it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// The TSC's frequency in Hz, measured against the kernel's own raw clock, which takes a tenth of a second. What KVM tells is
/// the estimate that the kernel made first while it booted, and not the one that it uses.
pub fn counter_frequency() -> u64 {
    const WINDOW: Duration = Duration::from_millis(100);
    let (first_counter, first_ns) = clock::read(ClockId::MonotonicRaw);
    thread::sleep(WINDOW);
    let (last_counter, last_ns) = clock::read(ClockId::MonotonicRaw);
    let cycles = u128::from(last_counter.wrapping_sub(first_counter));
    (cycles * 1_000_000_000 / u128::from(last_ns.saturating_sub(first_ns).max(1))) as u64
}

/// How long a kernel that has just booted takes at most until it knows the TSC's frequency well.
const CALIBRATION_PATIENCE: Duration = Duration::from_secs(10);

/// Waits until the kernel has done measuring the TSC, which it does in the background for its first seconds. What it says before
/// is an estimate, which was seen to be off by a thousandth: a guest that boots meanwhile would take it for its clock's rate, and an
/// update would reckon the pause with it.
pub fn await_counter_calibration() {
    const POLL: Duration = Duration::from_millis(50);
    let start = Instant::now();
    // The kernel has no event for it. Where the clock is another one for good, there is nothing to wait for.
    while fs::read_to_string(CLOCK_SOURCE).is_ok_and(|name| name.trim() == "tsc-early") {
        if start.elapsed() > CALIBRATION_PATIENCE {
            tracing::warn!(
                "the kernel does not get done measuring the TSC; clocks of guests may be off by a thousandth"
            );
            return;
        }
        thread::sleep(POLL);
    }
}

/// Which clock the kernel keeps time with: "tsc-early" until the TSC has been measured.
const CLOCK_SOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";

/// Makes a VM. KVM lets every guest have all of the host's physical addresses.
pub fn create_vm(kvm: &Kvm, _end: u64) -> Result<VmFd, ArchError> {
    kvm.create_vm().map_err(ArchError::kvm("create a VM"))
}

/// RAM as (guest physical address, size) pairs.
pub fn memory_layout(size: u64) -> Vec<(u64, u64)> {
    if size <= HOLE_START { vec![(0, size)] } else { vec![(0, HOLE_START), (HOLE_END, size - HOLE_START)] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_frequency_foretells_the_counter() {
        let frequency = counter_frequency();
        let (first_counter, first_ns) = clock::read(ClockId::MonotonicRaw);
        thread::sleep(Duration::from_millis(50));
        let (last_counter, last_ns) = clock::read(ClockId::MonotonicRaw);
        let expected = u128::from(last_ns - first_ns) * u128::from(frequency) / 1_000_000_000;
        let difference = expected.abs_diff(u128::from(last_counter - first_counter));
        assert!(difference < expected / 100, "off by {difference} of {expected} cycles");
    }

    #[test]
    fn memory_goes_around_the_hole_and_none_is_lost() {
        assert_eq!(memory_layout(64 << 20), [(0, 64 << 20)]);
        assert_eq!(memory_layout(HOLE_START), [(0, HOLE_START)]);
        assert_eq!(memory_layout(3584 << 20), [(0, HOLE_START), (HOLE_END, 512 << 20)]);
    }
}
