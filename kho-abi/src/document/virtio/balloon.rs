//! A balloon's state: what its driver is asked for, what it says, and which memory is in the balloon.

use alloc::vec::Vec;

use crate::document::DecodeError;
use crate::document::node::Node;
use crate::document::record::{Reader, Record};

/// The largest RAM has so many bytes of bits: 1 TiB.
const BLOCKS_MAX: usize = (1 << 40 >> 21) / 8;

/// A balloon. Which single pages are in it is not kept, as that would be 32 MiB for a large guest; which whole 2 MiB are, is: only
/// those are given back to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalloonV1 {
    /// How much the driver is asked to have in the balloon, in pages of 4 KiB.
    pub target: u32,
    /// How much it says that it has.
    pub actual: u32,
    /// A bit for each 2 MiB of RAM, in the order in which they lie in the memfd, from the lowest bit on: all of it is in the
    /// balloon.
    pub blocks: Vec<u8>,
}

impl Record for BalloonV1 {
    const COMPATIBLE: &'static str = "kho-vmm,virtio-balloon-v1";

    fn encode(&self, node: Node) -> Node {
        let Self { target, actual, blocks } = self;
        node.with_u32("target", *target).with_u32("actual", *actual).with_bytes("blocks", blocks.as_slice())
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (target, actual) = (reader.u32("target")?, reader.u32("actual")?);
        let blocks = reader.bytes("blocks")?;
        if blocks.len() > BLOCKS_MAX {
            return Err(reader.invalid("blocks", "are more than any VM has"));
        }
        Ok(Self { target, actual, blocks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::record::{from_node, to_node};

    #[test]
    fn balloon_round_trips() {
        for blocks in [Vec::new(), alloc::vec![0x80, 0, 1], alloc::vec![0xff; BLOCKS_MAX]] {
            let state = BalloonV1 { target: u32::MAX, actual: 7, blocks };
            assert_eq!(from_node::<BalloonV1>(&to_node("device", &state)).unwrap(), state);
        }
    }

    #[test]
    fn balloon_larger_than_any_ram_is_refused() {
        let state = BalloonV1 { target: 0, actual: 0, blocks: alloc::vec![0; BLOCKS_MAX + 1] };
        assert!(from_node::<BalloonV1>(&to_node("device", &state)).is_err());
    }
}
