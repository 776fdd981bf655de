//! x86_64: booted through PVH, 64-bit, identity-mapped.

mod acpi;
mod apic;
mod boot;
mod checks;
mod cpu;
mod cpuid;
mod interrupts;
mod memory;
mod platform;
mod processors;
mod pvclock;
mod registers;
mod system;
mod tables;
mod timer;
mod vectors;
mod watchpoints;

use guest_kernel::options::End;

pub use checks::{Machine, Processor, clock_of_first};
pub use cpu::{counter, interrupts_off, pend};
pub use platform::{end, serial_write};
pub use processors::{is_off, make_startable, number, present, send_ipi, stop_if_asked, switch_off, switch_on};

/// The architecture's name in the protocol.
pub const NAME: &str = "x86_64";
/// The ways in which this machine can end.
pub const ENDS: &[End] = &[End::PowerOff, End::Reset, End::TripleFault];
