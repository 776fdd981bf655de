//! A disk's state: which image it is, so that no other is taken for it.

use alloc::format;

use crate::document::DecodeError;
use crate::document::node::Node;
use crate::document::record::{Reader, Record};

/// The size of a sector, in which capacities are counted.
const SECTOR: u64 = 512;

/// What kind of file an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
}

impl ImageKind {
    const ALL: [Self; 2] = [Self::File, Self::BlockDevice];

    /// As the document names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::BlockDevice => "block-device",
        }
    }
}

/// A disk. What the guest can change lies in the image; what is left is which image that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockV1 {
    /// What the image is.
    pub kind: ImageKind,
    /// The device that a file lies on, or that the block device is: major number.
    pub device_major: u32,
    /// The same: minor number.
    pub device_minor: u32,
    /// A file's inode; 0 of a block device, whose node is made anew at each boot.
    pub inode: u64,
    /// Bytes. The guest knows the number, as its capacity.
    pub size: u64,
}

impl Record for BlockV1 {
    const COMPATIBLE: &'static str = "kho-vmm,virtio-block-v1";

    fn encode(&self, node: Node) -> Node {
        let Self { kind, device_major, device_minor, inode, size } = self;
        node.with_str("kind", kind.name())
            .with_u32("device-major", *device_major)
            .with_u32("device-minor", *device_minor)
            .with_u64("inode", *inode)
            .with_u64("size", *size)
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let kind = reader.string("kind")?;
        let Some(kind) = ImageKind::ALL.into_iter().find(|known| known.name() == kind) else {
            return Err(reader.invalid("kind", format!("{kind} is none of an image")));
        };
        let state = Self {
            kind,
            device_major: reader.u32("device-major")?,
            device_minor: reader.u32("device-minor")?,
            inode: reader.u64("inode")?,
            size: reader.u64("size")?,
        };
        if state.size == 0 || !state.size.is_multiple_of(SECTOR) {
            return Err(reader.invalid("size", format!("of {} bytes is not one of whole sectors", state.size)));
        }
        if kind == ImageKind::BlockDevice && state.inode != 0 {
            return Err(reader.invalid("inode", "is not one of a block device"));
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::record::{from_node, to_node};

    const FILE: BlockV1 =
        BlockV1 { kind: ImageKind::File, device_major: 8, device_minor: 1, inode: 77, size: 3 * SECTOR };

    #[test]
    fn disk_round_trips() {
        for state in [FILE, BlockV1 { kind: ImageKind::BlockDevice, inode: 0, ..FILE }] {
            assert_eq!(from_node::<BlockV1>(&to_node("device", &state)), Ok(state));
        }
    }

    #[test]
    fn disk_that_cannot_be_is_refused() {
        for state in [
            BlockV1 { size: 0, ..FILE },
            BlockV1 { size: SECTOR + 1, ..FILE },
            BlockV1 { kind: ImageKind::BlockDevice, ..FILE },
        ] {
            assert!(from_node::<BlockV1>(&to_node("device", &state)).is_err(), "{state:?}");
        }
        assert!(from_node::<BlockV1>(&to_node("device", &FILE).with_str("kind", "tape")).is_err());
    }
}
