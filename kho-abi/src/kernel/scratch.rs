//! Scratch areas: memory in which nothing is ever preserved, so that the next kernel can boot in it (`struct kho_scratch`).
//!
//! Defined in the kernel's `include/linux/kexec_handover.h`.
//!
//! ```
//! use kho_abi::kernel::{Image, PageSize, scratch};
//!
//! let areas = [0x100_0000..0x200_0000, 0x4000_0000..0x4800_0000];
//! let mut image = Image::new(PageSize::SMALL);
//! let (address, length) = scratch::encode(&mut image, &areas);
//! assert_eq!(scratch::decode(&image, address, length, "/scratch")?, areas);
//! # Ok::<(), kho_abi::kernel::Error>(())
//! ```

use alloc::format;
use alloc::vec::Vec;
use core::ops::Range;

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::memory::read;
use super::{Error, Image, PhysMem, Problem};

/// `struct kho_scratch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Area {
    /// Where it begins.
    pub address: U64,
    /// Its bytes.
    pub size: U64,
}

/// Two for the host and one for each of its NUMA nodes; Linux knows 1024 nodes at most.
pub const MAX_AREAS: usize = 1026;

/// Reads `length` bytes of areas at `address`.
///
/// # Errors
/// When they are not in memory, there are too many, or one goes beyond all addresses.
pub fn decode(memory: &dyn PhysMem, address: u64, length: u64, path: &str) -> Result<Vec<Range<u64>>, Error> {
    let size = size_of::<Area>() as u64;
    if !length.is_multiple_of(size) {
        return Err(Error::invalid(path, "the list", format!("has {length} bytes, no multiple of {size}")));
    }
    if length / size > MAX_AREAS as u64 {
        return Err(Error::new(path, Problem::TooMany { what: "scratch areas", max: MAX_AREAS }));
    }
    (0..length / size)
        .map(|number| {
            let at = address.checked_add(number * size);
            let at = at.ok_or_else(|| Error::invalid(path, "the list", "goes beyond all addresses"))?;
            let area: Area = read(memory, at, path)?;
            let end = area.address.get().checked_add(area.size.get());
            let end =
                end.ok_or_else(|| Error::invalid(path, "an area", format!("goes beyond all addresses: {area:?}")))?;
            Ok(area.address.get()..end)
        })
        .collect()
}

/// Writes areas, and returns where, and how many bytes they are.
pub fn encode(image: &mut Image, areas: &[Range<u64>]) -> (u64, u64) {
    let area = |range: &Range<u64>| Area {
        address: U64::new(range.start),
        size: U64::new(range.end.saturating_sub(range.start)),
    };
    let bytes: Vec<u8> = areas.iter().flat_map(|range| area(range).as_bytes().to_vec()).collect();
    (image.add(&bytes), bytes.len() as u64)
}
