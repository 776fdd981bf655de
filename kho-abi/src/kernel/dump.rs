//! A dump: the pages that a handover consists of, in a file. Guests' memory is not among them, as no decoder looks at it.
//!
//! All integers are little-endian:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic: `KHODUMP1` |
//! | 8 | 4 | the logarithm of the page size |
//! | 12 | 4 | number of pages |
//! | 16 | 8 | the address of the KHO FDT |
//! | 24 | 8 | the address of the scratch areas, 0 for none |
//! | 32 | 8 | their size in bytes |
//! | 40 | | per page: its address (8), how many bytes follow (4), 0 (4), and these bytes; the rest of the page is zero |
//!
//! ```
//! use kho_abi::kernel::dump::{Dump, Recorder};
//! use kho_abi::kernel::root::{Root, Version};
//! use kho_abi::kernel::{Image, Limits, PageSize, handover, radix};
//!
//! let mut memory = Image::new(PageSize::SMALL);
//! let memory_map = radix::encode(&mut memory, [(0x20_0000, 9)]).expect("an address that fits its order");
//! let root = Root { version: Version::V4, memory_map, subtrees: vec![] };
//! let root = memory.add(&root.encode().expect("a tree"));
//! memory.add(b"nobody looks at this");
//!
//! // Whatever is read through the recorder becomes part of the dump.
//! let recorder = Recorder::new(&memory);
//! handover::read(&recorder, root, &Limits::default())?;
//! let dump = Dump { image: recorder.into_image(), root, scratch: (0, 0) };
//! let found = Dump::decode(&dump.encode()).expect("a dump");
//! assert_eq!(found, dump);
//! assert!(handover::read(&found.image, found.root, &Limits::default())?.preserved.is_ok());
//! # Ok::<(), kho_abi::kernel::Error>(())
//! ```

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Image, PageSize, PhysMem, Unreadable};

const MAGIC: [u8; 8] = *b"KHODUMP1";

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    page_shift: U32,
    pages: U32,
    root: U64,
    scratch: U64,
    scratch_bytes: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct PageHeader {
    address: U64,
    bytes: U32,
    reserved: U32,
}

/// Bytes that are no dump.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DumpError {
    /// Something else.
    #[error("it is no dump of a handover")]
    Magic,
    /// It ends before it should.
    #[error("the dump is cut short")]
    Truncated,
    /// All is there, but it cannot be true.
    #[error("the dump is damaged: {reason}")]
    Invalid {
        /// Why not.
        reason: String,
    },
}

/// A dump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dump {
    /// The pages.
    pub image: Image,
    /// Where the KHO FDT is.
    pub root: u64,
    /// Where the list of scratch areas is, and its bytes.
    pub scratch: (u64, u64),
}

impl Dump {
    /// Whether bytes look like a dump.
    pub fn is_one(bytes: &[u8]) -> bool {
        bytes.starts_with(&MAGIC)
    }

    /// Reads a file's bytes.
    ///
    /// # Errors
    /// When they are no dump, or not all of one.
    pub fn decode(bytes: &[u8]) -> Result<Self, DumpError> {
        if !Self::is_one(bytes) {
            return Err(DumpError::Magic);
        }
        let (header, mut rest) = Header::read_from_prefix(bytes).map_err(|_| DumpError::Truncated)?;
        let shift = header.page_shift.get();
        let invalid = |reason: String| DumpError::Invalid { reason };
        let page_size =
            PageSize::from_shift(shift).ok_or_else(|| invalid(alloc::format!("pages of 2^{shift} bytes")))?;
        let mut image = Image::new(page_size);
        for _ in 0..header.pages.get() {
            let (page, behind) = PageHeader::read_from_prefix(rest).map_err(|_| DumpError::Truncated)?;
            let (address, count) = (page.address.get(), page.bytes.get() as usize);
            if !address.is_multiple_of(page_size.bytes()) || count > page_size.as_usize() || page.reserved != 0 {
                return Err(invalid(alloc::format!("a page of {count} bytes at {address:#x}")));
            }
            let (content, behind) = behind.split_at_checked(count).ok_or(DumpError::Truncated)?;
            image.set_page(address, content);
            rest = behind;
        }
        if !rest.is_empty() {
            return Err(invalid(alloc::format!("{} bytes behind its end", rest.len())));
        }
        Ok(Self { image, root: header.root.get(), scratch: (header.scratch.get(), header.scratch_bytes.get()) })
    }

    /// Writes it.
    pub fn encode(&self) -> Vec<u8> {
        let header = Header {
            magic: MAGIC,
            page_shift: U32::new(self.image.page_size().shift()),
            pages: U32::new(self.image.pages().count() as u32),
            root: U64::new(self.root),
            scratch: U64::new(self.scratch.0),
            scratch_bytes: U64::new(self.scratch.1),
        };
        let mut bytes = header.as_bytes().to_vec();
        for (address, page) in self.image.pages() {
            let count = page.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            let header =
                PageHeader { address: U64::new(address), bytes: U32::new(count as u32), reserved: U32::new(0) };
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend_from_slice(page.get(..count).unwrap_or_default());
        }
        bytes
    }
}

/// Memory that remembers which pages of it were read.
pub struct Recorder<'a> {
    memory: &'a dyn PhysMem,
    image: RefCell<Image>,
}

impl<'a> Recorder<'a> {
    /// Nothing was read yet.
    pub fn new(memory: &'a dyn PhysMem) -> Self {
        Self { memory, image: RefCell::new(Image::new(memory.page_size())) }
    }

    /// The pages that were read.
    pub fn into_image(self) -> Image {
        self.image.into_inner()
    }
}

impl PhysMem for Recorder<'_> {
    fn page_size(&self) -> PageSize {
        self.memory.page_size()
    }

    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), Unreadable> {
        let size = self.page_size().bytes();
        let mut image = self.image.borrow_mut();
        let (mut page, last) = (address & !(size - 1), address.saturating_add(buffer.len().max(1) as u64 - 1));
        while page <= last {
            if !image.has_page(page) {
                let mut content = vec![0; size as usize];
                self.memory.read(page, &mut content)?;
                image.set_page(page, &content);
            }
            let Some(next) = page.checked_add(size) else { break };
            page = next;
        }
        image.read(address, buffer)
    }
}
