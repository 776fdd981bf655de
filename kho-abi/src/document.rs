//! The document: all of a VM but its RAM, as one value, and the index that names the VMs of a host.
//!
//! From the inside out: a [`Record`](record::Record) encodes itself into a [`Node`](node::Node) and decodes itself from
//! one; a tree of nodes is written as a flattened device tree ([`fdt`]); that is sealed behind a [`header`].

pub mod aarch64;
pub mod device;
pub mod error;
pub mod fdt;
pub mod header;
pub mod index;
pub mod machine;
pub mod memory;
pub mod node;
pub mod payload;
pub mod platform;
pub mod record;
pub mod timeline;
pub mod vcpu;
pub mod virtio;
pub mod x86_64;

pub use error::{DecodeError, DocumentError, EncodeError, HeaderError, PayloadError, Problem};
