//! The root of all that is handed over: the KHO FDT, which names the map of preserved memory and the subtrees.
//!
//! Defined in the kernel's `include/linux/kho/abi/kexec_handover.h`.
//!
//! ```
//! use kho_abi::kernel::root::{Root, Subtree, Version};
//!
//! let root = Root {
//!     version: Version::V4,
//!     memory_map: 0x10_0000,
//!     subtrees: vec![Subtree { name: "LUO".into(), address: 0x20_0000, size: Some(32) }],
//! };
//! let bytes = root.encode().expect("a tree");
//! assert_eq!(Root::decode(&bytes, "/")?, root);
//! # Ok::<(), kho_abi::kernel::Error>(())
//! ```

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use alloc::{format, vec};

use super::{Error, PhysMem, Problem};
use crate::document::node::Node;
use crate::document::{EncodeError, fdt};

/// A version of the KHO ABI, as `compatible` of the root names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// `kho-v1`, Linux 6.16 to 7.0: the map is a list of [`bitmaps`](super::bitmaps), and subtrees are FDTs.
    V1,
    /// `kho-v3`, Linux 7.1: the map is a [`radix`](super::radix) tree.
    V3,
    /// `kho-v4`, Linux 7.2 and 7.3: as before, and subsystems may use [`blocks`](super::blocks).
    V4,
}

impl Version {
    const ALL: [Self; 3] = [Self::V1, Self::V3, Self::V4];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1 => "kho-v1",
            Self::V3 => "kho-v3",
            Self::V4 => "kho-v4",
        }
    }

    /// The property that holds a subtree's address.
    fn subtree_property(self) -> &'static str {
        match self {
            Self::V1 => "fdt",
            Self::V3 | Self::V4 => "preserved-data",
        }
    }

    /// The version of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.name() == name)
    }
}

const MAP: &str = "preserved-memory-map";
const SIZE: &str = "blob-size";
/// The kernel writes the tree into one page.
const MAX_SIZE: u32 = 1 << 16;

/// What a subsystem of the kernel hands over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subtree {
    /// The subsystem's name for it.
    pub name: String,
    /// Where it is.
    pub address: u64,
    /// How many bytes it has; None in `kho-v1`, where each is an FDT, which tells its size itself.
    pub size: Option<u64>,
}

/// The KHO FDT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// Its version.
    pub version: Version,
    /// Where the map of preserved memory is.
    pub memory_map: u64,
    /// The subtrees, in order.
    pub subtrees: Vec<Subtree>,
}

impl Root {
    /// Reads the tree's bytes.
    ///
    /// # Errors
    /// When they are no tree, or one of another version, or something is missing.
    pub fn decode(bytes: &[u8], path: &str) -> Result<Self, Error> {
        let tree = fdt::read(bytes).map_err(|error| Error::new(path, error))?;
        let found = text(&tree, "compatible", path)?;
        let version = Version::from_name(&found)
            .ok_or_else(|| Error::new(path, Problem::Version { found, known: "kho-v1, kho-v3, kho-v4" }))?;
        let subtree = |node: &Node| {
            let path = format!("{}/{}", path.trim_end_matches('/'), node.name);
            let size = match version {
                Version::V1 => None,
                Version::V3 | Version::V4 => Some(native(node, SIZE, &path)?),
            };
            Ok(Subtree { name: node.name.clone(), address: native(node, version.subtree_property(), &path)?, size })
        };
        let subtrees = tree.children.iter().map(subtree).collect::<Result<_, Error>>()?;
        Ok(Self { version, memory_map: native(&tree, MAP, path)?, subtrees })
    }

    /// Reads the tree at an address.
    ///
    /// # Errors
    /// As [`decode`](Self::decode), and when it is not in memory.
    pub fn read(memory: &dyn PhysMem, address: u64, path: &str) -> Result<Self, Error> {
        Self::decode(&read_tree(memory, address, path)?, path)
    }

    /// The subtree of that name.
    pub fn subtree(&self, name: &str) -> Option<&Subtree> {
        self.subtrees.iter().find(|subtree| subtree.name == name)
    }

    /// Writes the tree.
    ///
    /// # Errors
    /// When a name is none that [`decode`](Self::decode) would read.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        let subtree = |subtree: &Subtree| {
            let node = Node::new(subtree.name.as_str())
                .with_bytes(self.version.subtree_property(), subtree.address.to_le_bytes());
            match subtree.size {
                Some(size) => node.with_bytes(SIZE, size.to_le_bytes()),
                None => node,
            }
        };
        let root = Node::new("")
            .with_str("compatible", self.version.name())
            .with_bytes(MAP, self.memory_map.to_le_bytes())
            .with_children(self.subtrees.iter().map(subtree));
        fdt::write(&root)
    }
}

/// An integer in the kernel's byte order.
pub(super) fn native(node: &Node, name: &'static str, path: &str) -> Result<u64, Error> {
    let value = node.property(name).ok_or_else(|| Error::invalid(path, name, "is missing"))?;
    let bytes =
        value.try_into().map_err(|_| Error::invalid(path, name, format!("has {} bytes instead of 8", value.len())))?;
    Ok(u64::from_le_bytes(bytes))
}

/// Text of a property, ended by its only NUL.
pub(super) fn text(node: &Node, name: &'static str, path: &str) -> Result<String, Error> {
    let value = node.property(name).ok_or_else(|| Error::invalid(path, name, "is missing"))?;
    let text = core::ffi::CStr::from_bytes_with_nul(value).ok().and_then(|text| text.to_str().ok());
    text.map(ToString::to_string).ok_or_else(|| Error::invalid(path, name, "is no text ended by a NUL"))
}

/// The bytes of a flattened device tree in memory: as many as its header says.
pub(super) fn read_tree(memory: &dyn PhysMem, address: u64, path: &str) -> Result<Vec<u8>, Error> {
    let mut header = [0; 8];
    memory.read(address, &mut header).map_err(|unreadable| Error::new(path, unreadable))?;
    let [magic, size] = [0, 4].map(|at| header[at..at + 4].iter().fold(0, |value, byte| value << 8 | u32::from(*byte)));
    if magic != 0xd00d_feed || size > MAX_SIZE {
        return Err(Error::invalid(path, "the memory", format!("at {address:#x} is no flattened device tree")));
    }
    let mut bytes = vec![0; size as usize];
    memory.read(address, &mut bytes).map_err(|unreadable| Error::new(path, unreadable))?;
    Ok(bytes)
}
