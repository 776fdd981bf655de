//! All that a kernel hands over, read as far as it can be: what cannot says why, and does not hide the rest.
//!
//! ```
//! use kho_abi::kernel::root::{Root, Version};
//! use kho_abi::kernel::{Image, Limits, PageSize, handover, radix};
//!
//! let mut image = Image::new(PageSize::SMALL);
//! let memory_map = radix::encode(&mut image, [(0x20_0000, 9)]).expect("an address that fits its order");
//! let root = Root { version: Version::V4, memory_map, subtrees: vec![] };
//! let address = image.add(&root.encode().expect("a tree"));
//! let found = handover::read(&image, address, &Limits::default())?;
//! assert_eq!(found.preserved.expect("a map").ranges.bytes(), 2 << 20);
//! assert!(found.luo.is_none());
//! # Ok::<(), kho_abi::kernel::Error>(())
//! ```

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use super::luo::{self, Luo};
use super::memblock::{self, Region};
use super::memfd::{self, Memfd};
use super::metadata::{self, Metadata};
use super::radix::{self, Preserved};
use super::root::{Root, Subtree, Version, read_tree};
use super::{Error, Limits, PhysMem};

/// What is handed over.
#[derive(Clone, Debug)]
pub struct Handover {
    /// The KHO FDT.
    pub root: Root,
    /// The preserved pages. Those of `kho-v1` are not told, as the size of its bitmaps is not: see
    /// [`bitmaps`](super::bitmaps).
    pub preserved: Result<Preserved, Error>,
    /// `kexec-metadata`, where there is such a subtree.
    pub metadata: Option<Result<Metadata, Error>>,
    /// `memblock`, where there is such a subtree.
    pub memblock: Option<Result<Vec<Region>, Error>>,
    /// `LUO`, where there is such a subtree.
    pub luo: Option<Result<Luo, Error>>,
    /// The memfds of LUO's sessions, by the addresses in their files.
    pub memfds: BTreeMap<u64, Result<Memfd, Error>>,
}

impl Handover {
    /// Subtrees that nothing is known of here.
    pub fn unknown(&self) -> impl Iterator<Item = &Subtree> {
        let known = [metadata::NAME, memblock::NAME, luo::NAME];
        self.root.subtrees.iter().filter(move |subtree| !known.contains(&subtree.name.as_str()))
    }
}

/// The largest struct among subtrees.
const MOST_BYTES: u64 = 1 << 16;

/// Reads all that the tree at an address leads to.
///
/// # Errors
/// When there is no KHO FDT of a known version. What it leads to has results of its own.
pub fn read(memory: &dyn PhysMem, address: u64, limits: &Limits) -> Result<Handover, Error> {
    let root = Root::read(memory, address, "/")?;
    let preserved = match root.version {
        Version::V1 => Err(Error::invalid(
            "/preserved-memory-map",
            "the map",
            "consists of bitmaps of a size that kho-v1 does not tell",
        )),
        Version::V3 | Version::V4 => radix::decode(memory, root.memory_map, limits, "/preserved-memory-map"),
    };
    let metadata = root.subtree(metadata::NAME).map(|subtree| {
        let path = path(subtree);
        Metadata::decode(&content(memory, subtree, &path)?, &path)
    });
    let memblock = root.subtree(memblock::NAME).map(|subtree| {
        let path = path(subtree);
        memblock::decode(&read_tree(memory, subtree.address, &path)?, &path)
    });
    let luo = root.subtree(luo::NAME).map(|subtree| Luo::decode(memory, subtree.address, limits, &path(subtree)));
    let mut memfds = BTreeMap::new();
    for session in luo.iter().flatten().flat_map(|luo| &luo.sessions) {
        for file in session.files.iter().filter(|file| file.compatible == memfd::COMPATIBLE) {
            let path = format!("/{}/sessions/{}/files/{}", luo::NAME, session.name, file.token);
            memfds.insert(file.data, Memfd::decode(memory, file.data, &path));
        }
    }
    Ok(Handover { root, preserved, metadata, memblock, luo, memfds })
}

fn path(subtree: &Subtree) -> String {
    format!("/{}", subtree.name)
}

/// The bytes of a subtree that is a struct.
fn content(memory: &dyn PhysMem, subtree: &Subtree, path: &str) -> Result<Vec<u8>, Error> {
    let size = subtree.size.unwrap_or_default();
    if size > MOST_BYTES {
        return Err(Error::invalid(path, "it", format!("claims to have {size} bytes")));
    }
    let mut bytes = vec![0; size as usize];
    memory.read(subtree.address, &mut bytes).map_err(|unreadable| Error::new(path, unreadable))?;
    Ok(bytes)
}
