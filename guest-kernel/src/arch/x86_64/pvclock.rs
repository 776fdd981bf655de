//! kvmclock: the host's clock in a page the guest shares with it.

use core::ptr;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use guest_kernel::options::MOST_CPUS;

use super::{counter, cpu, cpuid, number};

/// MSR_KVM_SYSTEM_TIME_NEW.
pub const SYSTEM_TIME: u32 = 0x4b56_4d01;
const STOPPED: u8 = 1 << 1;

/// `struct pvclock_vcpu_time_info`: written by the host at any exit.
#[repr(C, align(64))]
struct Page {
    version: AtomicU32,
    padding: u32,
    counter: AtomicU64,
    ns: AtomicU64,
    multiplier: AtomicU32,
    shift: AtomicU8,
    flags: AtomicU8,
}

static PAGES: [Page; MOST_CPUS] = [const {
    Page {
        version: AtomicU32::new(0),
        padding: 0,
        counter: AtomicU64::new(0),
        ns: AtomicU64::new(0),
        multiplier: AtomicU32::new(0),
        shift: AtomicU8::new(0),
        flags: AtomicU8::new(0),
    }
}; MOST_CPUS];

fn own() -> &'static Page {
    &PAGES[number()]
}

/// Asks the host for its clock. False if it has none.
pub fn start() -> bool {
    if !cpuid::has_kvm_clock() {
        return false;
    }
    cpu::write_msr(SYSTEM_TIME, ptr::from_ref(own()).addr() as u64 | 1);
    own().multiplier.load(Ordering::Relaxed) != 0
}

/// The counter's frequency, as the host scales it.
pub fn khz() -> u64 {
    let multiplier = u64::from(own().multiplier.load(Ordering::Relaxed)).max(1);
    let khz = (1_000_000u64 << 32) / multiplier;
    let shift = own().shift.load(Ordering::Relaxed) as i8;
    if shift < 0 { khz << -shift } else { khz >> shift }
}

/// The counter and this CPU's clock in nanoseconds, taken together.
pub fn read() -> (u64, u64) {
    own().read()
}

/// The same with the first CPU's clock.
pub fn read_first() -> (u64, u64) {
    PAGES[0].read()
}

impl Page {
    fn read(&self) -> (u64, u64) {
        loop {
            let version = self.version.load(Ordering::Acquire);
            let now = counter();
            let since = now.saturating_sub(self.counter.load(Ordering::Relaxed));
            let shift = self.shift.load(Ordering::Relaxed) as i8;
            let shifted = if shift < 0 { since >> -shift } else { since << shift };
            let scaled = u128::from(shifted) * u128::from(self.multiplier.load(Ordering::Relaxed));
            let ns = self.ns.load(Ordering::Relaxed).wrapping_add((scaled >> 32) as u64);
            fence(Ordering::Acquire);
            if version.is_multiple_of(2) && version == self.version.load(Ordering::Relaxed) {
                return (now, ns);
            }
        }
    }
}

/// Whether the host has said that it had stopped this guest; asking clears it.
pub fn take_stopped() -> bool {
    own().flags.fetch_and(!STOPPED, Ordering::Relaxed) & STOPPED != 0
}
