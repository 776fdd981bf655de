//! virtio devices: the transport's state, which all have, and what each kind has beside.

mod block;

use super::DecodeError;
use super::node::Node;
use super::record::{Reader, Record};
pub use block::{BlockV1, ImageKind};

/// What a device has of its own. `compatible` says whose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VirtioState {
    /// An entropy source.
    Rng(RngV1),
    /// A disk.
    Block(BlockV1),
}

/// An entropy source has no state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RngV1;

impl Record for RngV1 {
    const COMPATIBLE: &'static str = "kho-vmm,virtio-rng-v1";

    fn encode(&self, node: Node) -> Node {
        let Self = self;
        node
    }

    fn decode(_: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self)
    }
}
