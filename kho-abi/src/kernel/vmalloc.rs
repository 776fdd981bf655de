//! Memory that is contiguous only for the kernel: `struct kho_vmalloc`, with a list of where its pages are.
//!
//! Defined in the kernel's `include/linux/kho/abi/kexec_handover.h`.
//!
//! ```
//! use kho_abi::kernel::{Image, Limits, PageSize, vmalloc};
//!
//! let mut image = Image::new(PageSize::SMALL);
//! let content = vec![7; 10_000];
//! let area = vmalloc::encode(&mut image, &content);
//! let found = vmalloc::pages(&image, &area, &Limits::default(), "/area")?;
//! assert_eq!(found.len(), 3);
//! # Ok::<(), kho_abi::kernel::Error>(())
//! ```

use alloc::format;
use alloc::vec::Vec;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::memory::{Walk, words};
use super::{Error, Image, Limits, PhysMem, Problem};

/// `struct kho_vmalloc`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct Area {
    /// Where the first page with addresses is; 0 for none.
    pub first: U64,
    /// Pages of the area.
    pub total_pages: U32,
    /// How it was allocated: [`ALLOC`], [`HUGE`].
    pub flags: U16,
    /// Each address stands for 2^order pages.
    pub order: U16,
}

/// `KHO_VMALLOC_ALLOC`.
pub const ALLOC: u16 = 1;
/// `KHO_VMALLOC_HUGE_VMAP`.
pub const HUGE: u16 = 2;

/// Where the area's pages are, one address for each page.
///
/// # Errors
/// When the list leads out of memory or in circles, does not have as many pages as the area, or has more than `limits`.
pub fn pages(memory: &dyn PhysMem, area: &Area, limits: &Limits, path: &str) -> Result<Vec<u64>, Error> {
    let (order, total) = (u32::from(area.order.get()), area.total_pages.get() as usize);
    let page_size = memory.page_size();
    // The largest order of any kernel's allocator is far below.
    if order > 20 {
        return Err(Error::invalid(path, "the area", format!("consists of blocks of 2^{order} pages")));
    }
    if total > limits.entries {
        return Err(Error::new(path, Problem::TooMany { what: "pages of an area", max: limits.entries }));
    }
    let (mut pages, mut walk, mut next) = (Vec::new(), Walk::default(), area.first.get());
    while next != 0 {
        let page = walk.page(memory, next, "a page with addresses", limits, path)?;
        let mut words = words(&page);
        next = words.next().unwrap_or_default();
        for block in words.take_while(|&address| address != 0) {
            let alignment = page_size.bytes();
            if !block.is_multiple_of(alignment) {
                return Err(Error::new(
                    path,
                    Problem::Misaligned { what: "a page of the area", address: block, alignment },
                ));
            }
            if pages.len() + (1 << order) > total {
                return Err(Error::invalid(path, "the area", format!("has more than its {total} pages")));
            }
            for number in 0..1 << order {
                let address = block.checked_add(number << page_size.shift());
                pages.push(address.ok_or_else(|| Error::invalid(path, "the area", "goes beyond all addresses"))?);
            }
        }
    }
    if pages.len() != total {
        return Err(Error::invalid(path, "the area", format!("has {} pages instead of {total}", pages.len())));
    }
    Ok(pages)
}

/// Writes an area of single pages with that content.
pub fn encode(image: &mut Image, content: &[u8]) -> Area {
    let size = image.page_size().as_usize();
    let addresses: Vec<u64> = content.chunks(size).map(|page| image.add(page)).collect();
    let first = addresses.chunks(size / 8 - 1).rev().fold(0, |next, addresses| {
        let bytes: Vec<u8> = [next].iter().chain(addresses).flat_map(|address| address.to_le_bytes()).collect();
        image.add(&bytes)
    });
    Area {
        first: U64::new(first),
        total_pages: U32::new(addresses.len() as u32),
        flags: U16::new(ALLOC),
        order: U16::new(0),
    }
}
