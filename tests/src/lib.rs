//! The lab: a KVM host inside QEMU whose kernel can be replaced while VMs run on it, and the developer's commands around it.
//!
//! [`host::Host`] is that machine, driven over a virtio-serial port ([`link`]) by its PID 1 ([`init`]); [`guests`] is what
//! runs on it, with [`load`] inside; [`demo`], [`mod@bench`] and the end-to-end tests put them together. [`setup`], [`kernels`], [`products`],
//! [`image`] and [`debian`] make what they need, [`outcomes`] tells what has become of it.
pub mod arch;
pub mod architecture;
pub mod bench;
pub mod cargo;
pub mod check;
pub mod debian;
pub mod demo;
pub mod emulator;
pub mod fuzz;
pub mod guests;
pub mod host;
pub mod image;
pub mod init;
pub mod kernels;
pub mod link;
pub mod load;
pub mod moment;
pub mod operator;
pub mod outcomes;
pub mod paths;
pub mod phases;
pub mod products;
pub mod run;
pub mod setup;
