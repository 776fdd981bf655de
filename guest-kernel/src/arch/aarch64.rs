//! aarch64: booted as Linux's `Image`, EL1, identity-mapped.

mod boot;
mod checks;
mod cpu;
mod debug;
mod devicetree;
mod exceptions;
mod gic;
mod interrupts;
mod its;
mod memory;
mod platform;
mod processors;
mod registers;
mod simd;
mod system;
mod timer;

use guest_kernel::options::End;

pub use checks::{Machine, Processor, clock_of_first};
pub use cpu::{counter, interrupts_off, pend};
pub use platform::{end, serial_write};
pub use processors::{is_off, make_startable, number, present, send_ipi, stop_if_asked, switch_off, switch_on};

/// The architecture's name in the protocol.
pub const NAME: &str = "aarch64";
/// The ways in which this machine can end: there is no fault that the processor could not handle.
pub const ENDS: &[End] = &[End::PowerOff, End::Reset];
