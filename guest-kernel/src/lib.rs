//! What the oracle knows that has nothing to do with an architecture: its protocol, its options, and the arithmetic of its
//! checks. `no_std` and without an allocator, so that the guest and the lab share it, and its tests run on any host.
#![no_std]
#![forbid(unsafe_code)]

pub mod clock;
pub mod options;
pub mod pattern;
pub mod protocol;
pub mod ranges;
pub mod ring;
pub mod scrub;
pub mod tick;
