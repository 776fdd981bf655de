//! x86_64: booted through PVH, 64-bit, identity-mapped, one CPU.

mod apic;
mod boot;
mod checks;
mod cpu;
mod cpuid;
mod interrupts;
mod memory;
mod platform;
mod pvclock;
mod registers;
mod system;
mod tables;
mod timer;
mod vectors;
mod watchpoints;

use guest_kernel::options::End;

pub use checks::Machine;
pub use cpu::{counter, interrupts_off};
pub use platform::{end, serial_write};

/// The architecture's name in the protocol.
pub const NAME: &str = "x86_64";
/// The ways in which this machine can end.
pub const ENDS: &[End] = &[End::PowerOff, End::Reset, End::TripleFault];
