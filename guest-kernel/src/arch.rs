//! The architecture: each one defines the same names, so that one that is missing does not compile.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "aarch64")]
use aarch64 as current;
#[cfg(target_arch = "x86_64")]
use x86_64 as current;

pub use current::{
    ENDS, Machine, NAME, Processor, clock_of_first, counter, end, interrupts_off, is_off, make_startable, number, pend,
    present, send_ipi, serial_write, stop_if_asked, switch_off, switch_on,
};
