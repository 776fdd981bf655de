//! `memblock`: regions that `reserve_mem=` on a kernel's command line has set apart, which the next kernel gets where they were.
//!
//! Defined in the kernel's `include/linux/kho/abi/memblock.h`.
//!
//! ```
//! use kho_abi::kernel::memblock::{Region, decode, encode};
//!
//! let regions = [Region { name: "trace".into(), start: 0x8000_0000, size: 0x40_0000 }];
//! let bytes = encode(&regions).expect("a tree");
//! assert_eq!(decode(&bytes, "/memblock")?, regions);
//! # Ok::<(), kho_abi::kernel::Error>(())
//! ```

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::root::{native, text};
use super::{Error, Problem};
use crate::document::node::Node;
use crate::document::{EncodeError, fdt};

/// Its subtree's name.
pub const NAME: &str = "memblock";
const COMPATIBLE: &str = "memblock-v1";
const REGION_COMPATIBLE: &str = "reserve-mem-v1";

/// A region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its name on the command line.
    pub name: String,
    /// Where it begins.
    pub start: u64,
    /// Its bytes.
    pub size: u64,
}

/// Reads the tree's bytes.
///
/// # Errors
/// When they are no such tree, or of another version.
pub fn decode(bytes: &[u8], path: &str) -> Result<Vec<Region>, Error> {
    let tree = fdt::read(bytes).map_err(|error| Error::new(path, error))?;
    let expect = |node: &Node, known, path: &str| match text(node, "compatible", path)? {
        found if found == known => Ok(()),
        found => Err(Error::new(path, Problem::Version { found, known })),
    };
    expect(&tree, COMPATIBLE, path)?;
    let region = |node: &Node| {
        let path = format!("{path}/{}", node.name);
        expect(node, REGION_COMPATIBLE, &path)?;
        Ok(Region { name: node.name.clone(), start: native(node, "start", &path)?, size: native(node, "size", &path)? })
    };
    tree.children.iter().map(region).collect()
}

/// Writes the tree.
///
/// # Errors
/// When a name is none that [`decode`] would read.
pub fn encode(regions: &[Region]) -> Result<Vec<u8>, EncodeError> {
    let region = |region: &Region| {
        Node::new(region.name.as_str())
            .with_str("compatible", REGION_COMPATIBLE)
            .with_bytes("start", region.start.to_le_bytes())
            .with_bytes("size", region.size.to_le_bytes())
    };
    fdt::write(&Node::new("").with_str("compatible", COMPATIBLE).with_children(regions.iter().map(region)))
}
