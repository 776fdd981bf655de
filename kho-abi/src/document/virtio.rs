//! virtio devices: the transport's state, which all have, and what each kind has beside.

mod balloon;
mod block;
mod net;
mod transport;
mod vsock;

use super::node::Node;
use super::record::{Reader, Record, to_node};
use super::{DecodeError, Problem};
use crate::names;
pub use balloon::BalloonV1;
pub use block::{BlockV1, ImageKind};
pub use net::NetV1;
pub use transport::{QueueV1, VirtioMmioV1};
pub use vsock::VsockV1;

/// What a device has of its own. `compatible` says whose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VirtioState {
    /// An entropy source.
    Rng(RngV1),
    /// A disk.
    Block(BlockV1),
    /// A network device.
    Net(NetV1),
    /// A balloon.
    Balloon(BalloonV1),
    /// A vsock device.
    Vsock(VsockV1),
}

impl VirtioState {
    /// The node `device`.
    fn to_node(&self) -> Node {
        match self {
            Self::Rng(state) => to_node(names::VIRTIO_DEVICE, state),
            Self::Block(state) => to_node(names::VIRTIO_DEVICE, state),
            Self::Net(state) => to_node(names::VIRTIO_DEVICE, state),
            Self::Balloon(state) => to_node(names::VIRTIO_DEVICE, state),
            Self::Vsock(state) => to_node(names::VIRTIO_DEVICE, state),
        }
    }

    /// Reads a node of any kind of device.
    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match reader.compatible()?.as_str() {
            RngV1::COMPATIBLE => Ok(Self::Rng(reader.record()?)),
            BlockV1::COMPATIBLE => Ok(Self::Block(reader.record()?)),
            NetV1::COMPATIBLE => Ok(Self::Net(reader.record()?)),
            BalloonV1::COMPATIBLE => Ok(Self::Balloon(reader.record()?)),
            VsockV1::COMPATIBLE => Ok(Self::Vsock(reader.record()?)),
            found => {
                let expected = [
                    RngV1::COMPATIBLE,
                    BlockV1::COMPATIBLE,
                    NetV1::COMPATIBLE,
                    BalloonV1::COMPATIBLE,
                    VsockV1::COMPATIBLE,
                ]
                .join(" or ");
                Err(reader.error(Problem::Incompatible { expected, found: found.into() }))
            }
        }
    }
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
