//! The map of preserved pages of `kho-v1` (Linux 6.16 to 7.0): a list of pages that point to bitmaps, each for one order.
//!
//! How large a bitmap is the format does not say: 512 bytes in the first kernels, a page in later ones (which took that for no
//! change of version). So whoever asks for pages has to know it.
//!
//! No header defines it. The kernel's `kernel/kexec_handover.c`, later in `kernel/liveupdate/`, has its `struct khoser_mem_chunk`
//! and what that points to.
//!
//! ```
//! use kho_abi::kernel::bitmaps::{self, Bitmap};
//! use kho_abi::kernel::{Image, Limits, PageSize};
//!
//! let mut image = Image::new(PageSize::SMALL);
//! let bits = image.add(&[0b101]);
//! let map = [Bitmap { order: 0, start: 0x100_0000, bits }];
//! let head = bitmaps::encode(&mut image, &map);
//! assert_eq!(bitmaps::decode(&image, head, &Limits::default(), "/map")?, map);
//! let preserved = bitmaps::pages(&image, &map, 512, &Limits::default(), "/map")?;
//! assert_eq!(preserved.ranges.iter().collect::<Vec<_>>(), [0x100_0000..0x100_1000, 0x100_2000..0x100_3000]);
//! # Ok::<(), kho_abi::kernel::Error>(())
//! ```

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::memory::Walk;
use super::radix::Preserved;
use super::{Error, Image, Limits, PhysMem, Problem};

/// `struct khoser_mem_chunk_hdr`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    next: U64,
    order: U32,
    count: U32,
}

/// `struct khoser_mem_bitmap_ptr`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Element {
    start: U64,
    bits: U64,
}

/// A bitmap: each bit stands for 2^order pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// The order of its pages.
    pub order: u32,
    /// What its first bit stands for.
    pub start: u64,
    /// Where the bitmap is.
    pub bits: u64,
}

/// Reads the list that begins at `head`; 0 is the empty one.
///
/// # Errors
/// When it leads out of memory or in circles, counts more than a page has room for, or is longer than `limits`.
pub fn decode(memory: &dyn PhysMem, head: u64, limits: &Limits, path: &str) -> Result<Vec<Bitmap>, Error> {
    let (mut bitmaps, mut walk, mut next) = (Vec::new(), Walk::default(), head);
    while next != 0 {
        let page = walk.page(memory, next, "a page of bitmaps", limits, path)?;
        let wrong = |reason| Error::invalid(path, "a page of bitmaps", reason);
        let (header, rest) =
            Header::read_from_prefix(&page).map_err(|_| wrong(format!("at {next:#x} has no header")))?;
        let (order, count) = (header.order.get(), header.count.get() as usize);
        if order >= 64 - memory.page_size().shift() {
            return Err(wrong(format!("at {next:#x} is of order {order}")));
        }
        let elements = <[Element]>::ref_from_prefix_with_elems(rest, count);
        let (elements, _) =
            elements.map_err(|_| wrong(format!("at {next:#x} counts {count}, more than it has room for")))?;
        if bitmaps.len() + count > limits.entries {
            return Err(Error::new(path, Problem::TooMany { what: "bitmaps", max: limits.entries }));
        }
        let bitmap = |element: &Element| Bitmap { order, start: element.start.get(), bits: element.bits.get() };
        bitmaps.extend(elements.iter().map(bitmap));
        next = header.next.get();
    }
    Ok(bitmaps)
}

/// The pages of bitmaps that have `size` bytes each.
///
/// # Errors
/// When one is not in memory, or its pages go beyond all addresses.
pub fn pages(
    memory: &dyn PhysMem,
    bitmaps: &[Bitmap],
    size: usize,
    limits: &Limits,
    path: &str,
) -> Result<Preserved, Error> {
    let (mut preserved, mut bits, mut found) = (Preserved::default(), vec![0; size], 0_usize);
    for Bitmap { order, start, bits: address } in bitmaps {
        memory.read(*address, &mut bits).map_err(|unreadable| Error::new(path, unreadable))?;
        let set = bits
            .iter()
            .enumerate()
            .flat_map(|(at, byte)| (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| 8 * at + bit));
        let block = memory.page_size().bytes().checked_shl(*order).filter(|&block| block != 0);
        for bit in set {
            found += 1;
            if found > limits.entries {
                return Err(Error::new(path, Problem::TooMany { what: "preserved pages", max: limits.entries }));
            }
            let address = block.and_then(|block| start.checked_add((bit as u64).checked_mul(block)?));
            let beyond = || {
                Error::invalid(
                    path,
                    "a bitmap",
                    format!("of order {order} from {start:#x} on goes beyond all addresses"),
                )
            };
            preserved.add(address.ok_or_else(beyond)?, *order, 1, memory.page_size());
        }
    }
    preserved.map_pages = bitmaps.len();
    Ok(preserved)
}

/// Writes a list, and returns where its first page is.
pub fn encode(image: &mut Image, bitmaps: &[Bitmap]) -> u64 {
    let size = image.page_size().as_usize();
    let room = (size - size_of::<Header>()) / size_of::<Element>();
    let same_order = bitmaps.chunk_by(|one, next| one.order == next.order);
    let chunks: Vec<&[Bitmap]> = same_order.flat_map(|bitmaps| bitmaps.chunks(room)).collect();
    chunks.into_iter().rev().fold(0, |next, bitmaps| {
        let order = bitmaps.first().map_or(0, |bitmap| bitmap.order);
        let header = Header { next: U64::new(next), order: U32::new(order), count: U32::new(bitmaps.len() as u32) };
        let page = image.allocate(size);
        image.write(page, header.as_bytes());
        let element = |bitmap: &Bitmap| Element { start: U64::new(bitmap.start), bits: U64::new(bitmap.bits) };
        let elements: Vec<Element> = bitmaps.iter().map(element).collect();
        image.write(page + size_of::<Header>() as u64, elements.as_bytes());
        page
    })
}
