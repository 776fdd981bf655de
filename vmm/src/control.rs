//! How a VM is talked to: one Varlink socket per VM, served by the VM, used by the `vmm` verbs.

mod accept;
pub mod balloon;
pub mod client;
pub mod interface;
pub mod keeper;
pub mod lease;
pub mod server;
pub mod socket;
