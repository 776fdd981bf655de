//! What registers are called: those of every architecture, on any machine.

pub mod aarch64;
pub mod x86_64;
