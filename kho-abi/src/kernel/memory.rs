//! Physical memory, and an image of some of it.
//!
//! ```
//! use kho_abi::kernel::{Image, PageSize, PhysMem};
//!
//! let mut image = Image::new(PageSize::SMALL);
//! let address = image.add(b"preserved");
//! let mut found = [0; 9];
//! image.read(address, &mut found)?;
//! assert_eq!(&found, b"preserved");
//! // Nothing is known of the memory around it.
//! assert!(image.read(address + 4096, &mut found).is_err());
//! # Ok::<(), kho_abi::kernel::Unreadable>(())
//! ```

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec;
use alloc::vec::Vec;

use zerocopy::{FromBytes, IntoBytes};

use super::{Error, Limits, Problem};

/// The size of a page, which both kernels of a handover share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageSize(u32);

impl PageSize {
    /// 4 KiB: all of x86_64, and most of aarch64.
    pub const SMALL: Self = Self(12);

    /// A page of 2^`shift` bytes: 12, 14 or 16; None for all else.
    pub fn from_shift(shift: u32) -> Option<Self> {
        matches!(shift, 12 | 14 | 16).then_some(Self(shift))
    }

    /// Its logarithm.
    pub fn shift(self) -> u32 {
        self.0
    }

    /// Its bytes.
    pub fn bytes(self) -> u64 {
        1 << self.0
    }

    /// The same, for sizes of buffers.
    pub fn as_usize(self) -> usize {
        1 << self.0
    }
}

/// There is no memory, or none that can be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{length} bytes at {address:#x} cannot be read{}", .reason.as_ref().map(|reason| alloc::format!(": {reason}")).unwrap_or_default())]
pub struct Unreadable {
    /// Where.
    pub address: u64,
    /// How many bytes were wanted.
    pub length: usize,
    /// Why not, where it is known.
    pub reason: Option<alloc::string::String>,
}

/// Physical memory.
pub trait PhysMem {
    /// The size of its pages.
    fn page_size(&self) -> PageSize;

    /// Fills `buffer` with what is at `address`, all of it or none.
    ///
    /// # Errors
    /// When there is no memory in some part of it.
    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), Unreadable>;
}

/// Reads a struct.
pub(crate) fn read<T: FromBytes + IntoBytes>(memory: &dyn PhysMem, address: u64, path: &str) -> Result<T, Error> {
    let mut value = T::new_zeroed();
    memory.read(address, value.as_mut_bytes()).map_err(|unreadable| Error::new(path, unreadable))?;
    Ok(value)
}

/// Pages of a tree or a list that may lead in circles or have no end, in which no page may occur twice.
#[derive(Debug, Default)]
pub(crate) struct Walk {
    seen: BTreeSet<u64>,
}

impl Walk {
    /// How many pages there were so far.
    pub fn pages(&self) -> usize {
        self.seen.len()
    }

    /// Reads the next one, `what` it is.
    pub fn page(
        &mut self,
        memory: &dyn PhysMem,
        address: u64,
        what: &'static str,
        limits: &Limits,
        path: &str,
    ) -> Result<Vec<u8>, Error> {
        if !self.seen.insert(address) {
            return Err(Error::new(path, Problem::Again { address }));
        }
        if self.seen.len() > limits.pages {
            return Err(Error::new(path, Problem::TooMany { what: "pages", max: limits.pages }));
        }
        read_page(memory, address, what, path)
    }
}

/// Reads a page that is part of a tree or a list.
fn read_page(memory: &dyn PhysMem, address: u64, what: &'static str, path: &str) -> Result<Vec<u8>, Error> {
    let alignment = memory.page_size().bytes();
    if !address.is_multiple_of(alignment) {
        return Err(Error::new(path, Problem::Misaligned { what, address, alignment }));
    }
    let mut page = vec![0; memory.page_size().as_usize()];
    memory.read(address, &mut page).map_err(|unreadable| Error::new(path, unreadable))?;
    Ok(page)
}

/// The 64-bit words of a page.
pub(crate) fn words(page: &[u8]) -> impl Iterator<Item = u64> + '_ {
    page.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word))
}

/// Some pages of physical memory: a dump, or what an encoder has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    page_size: PageSize,
    pages: BTreeMap<u64, Vec<u8>>,
    next: u64,
}

impl Image {
    /// No memory yet. What is added begins at 1 MiB.
    pub fn new(page_size: PageSize) -> Self {
        Self { page_size, pages: BTreeMap::new(), next: 1 << 20 }
    }

    /// The pages, by their addresses.
    pub fn pages(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.pages.iter().map(|(address, page)| (*address, page.as_slice()))
    }

    /// Adds pages of zeroes that hold so many bytes, next to no others, and returns where.
    pub fn allocate(&mut self, bytes: usize) -> u64 {
        let address = self.next;
        let pages = (bytes.max(1) as u64).div_ceil(self.page_size.bytes());
        for number in 0..pages {
            self.page_mut(address + number * self.page_size.bytes());
        }
        // The gap makes a read beyond the end an error.
        self.next = address + (pages + 1) * self.page_size.bytes();
        address
    }

    /// Adds bytes on pages of their own, and returns where.
    pub fn add(&mut self, bytes: &[u8]) -> u64 {
        let address = self.allocate(bytes.len());
        self.write(address, bytes);
        address
    }

    /// Writes bytes, wherever that is: pages that are not there yet come into being.
    pub fn write(&mut self, mut address: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let start = address & !(self.page_size.bytes() - 1);
            let offset = (address - start) as usize;
            let count = bytes.len().min(self.page_size.as_usize() - offset);
            let (now, later) = bytes.split_at(count);
            if let Some(part) = self.page_mut(start).get_mut(offset..offset + count) {
                part.copy_from_slice(now);
            }
            address = address.wrapping_add(count as u64);
            bytes = later;
        }
    }

    /// Whether there is a page at that address.
    pub fn has_page(&self, address: u64) -> bool {
        self.pages.contains_key(&address)
    }

    /// Makes a page what its first bytes are told to be, and zero behind them.
    pub fn set_page(&mut self, address: u64, content: &[u8]) {
        let page = self.page_mut(address);
        page.fill(0);
        page.iter_mut().zip(content).for_each(|(to, from)| *to = *from);
    }

    /// Takes a page away.
    pub fn remove(&mut self, address: u64) {
        self.pages.remove(&address);
    }

    fn page_mut(&mut self, start: u64) -> &mut Vec<u8> {
        let size = self.page_size.as_usize();
        self.pages.entry(start).or_insert_with(|| vec![0; size])
    }
}

impl PhysMem for Image {
    fn page_size(&self) -> PageSize {
        self.page_size
    }

    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), Unreadable> {
        let unreadable = Unreadable { address, length: buffer.len(), reason: None };
        let (mut at, mut rest) = (address, buffer);
        while !rest.is_empty() {
            let start = at & !(self.page_size.bytes() - 1);
            let offset = (at - start) as usize;
            let count = rest.len().min(self.page_size.as_usize() - offset);
            let page = self.pages.get(&start).ok_or_else(|| unreadable.clone())?;
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(page.get(offset..offset + count).ok_or_else(|| unreadable.clone())?);
            at = at.checked_add(count as u64).ok_or_else(|| unreadable.clone())?;
            rest = later;
        }
        Ok(())
    }
}
