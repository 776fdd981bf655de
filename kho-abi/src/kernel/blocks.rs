//! Linked blocks: a list of entries of one size, on pages that are linked to each other (`struct kho_block_header_ser`).
//!
//! Defined in the kernel's `include/linux/kho/abi/block.h`.
//!
//! ```
//! use kho_abi::kernel::{Image, Limits, PageSize, blocks};
//!
//! let mut image = Image::new(PageSize::SMALL);
//! let head = blocks::encode(&mut image, &[*b"one.....", *b"two....."]);
//! let entries = blocks::decode::<[u8; 8]>(&image, head, &Limits::default(), "/list")?;
//! assert_eq!(entries, [*b"one.....", *b"two....."]);
//! # Ok::<(), kho_abi::kernel::Error>(())
//! ```

use alloc::vec::Vec;

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::memory::Walk;
use super::{Error, Image, Limits, PhysMem, Problem};

/// `struct kho_block_header_ser`: entries follow behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct Header {
    /// Where the next block is; 0 for none.
    pub next: U64,
    /// How many entries of this one are in use.
    pub count: U64,
}

/// `KHO_MAX_BLOCKS`: the kernel refuses more.
pub const MAX_BLOCKS: usize = 10_000;

/// Reads the entries of the blocks that begin at `head`; 0 is the empty list.
///
/// # Errors
/// When it leads out of memory or in circles, a block counts entries that it has no room for, or there are more than `limits`.
pub fn decode<T: FromBytes + IntoBytes>(
    memory: &dyn PhysMem,
    head: u64,
    limits: &Limits,
    path: &str,
) -> Result<Vec<T>, Error> {
    decode_on(memory, head, limits, path, &mut Walk::default())
}

/// The same on a walk that other lists are on, too, and share no block with: many that do would be more than their blocks can hold.
pub(super) fn decode_on<T: FromBytes + IntoBytes>(
    memory: &dyn PhysMem,
    head: u64,
    limits: &Limits,
    path: &str,
    walk: &mut Walk,
) -> Result<Vec<T>, Error> {
    let (mut entries, mut blocks, mut next) = (Vec::new(), 0, head);
    while next != 0 {
        blocks += 1;
        if blocks > MAX_BLOCKS {
            return Err(Error::new(path, Problem::TooMany { what: "blocks", max: MAX_BLOCKS }));
        }
        let page = walk.page(memory, next, "a block", limits, path)?;
        let (header, mut rest) =
            Header::read_from_prefix(&page).map_err(|_| Error::invalid(path, "a block", "has no header"))?;
        let (count, room) = (header.count.get(), rest.len() / size_of::<T>().max(1));
        if count == 0 || count > room as u64 {
            let reason = alloc::format!("at {next:#x} counts {count} entries, and has room for {room}");
            return Err(Error::invalid(path, "a block", reason));
        }
        for _ in 0..count {
            if entries.len() >= limits.entries {
                return Err(Error::new(path, Problem::TooMany { what: "entries", max: limits.entries }));
            }
            let mut entry = T::new_zeroed();
            let (bytes, others) = rest.split_at(size_of::<T>());
            entry.as_mut_bytes().copy_from_slice(bytes);
            entries.push(entry);
            rest = others;
        }
        next = header.next.get();
    }
    Ok(entries)
}

/// Writes a list, and returns where its first block is.
pub fn encode<T: IntoBytes + Immutable>(image: &mut Image, entries: &[T]) -> u64 {
    let size = image.page_size().as_usize();
    let room = (size - size_of::<Header>()) / size_of::<T>().max(1);
    // From the last to the first, as each knows the next.
    entries.chunks(room.max(1)).rev().fold(0, |next, entries| {
        let header = Header { next: U64::new(next), count: U64::new(entries.len() as u64) };
        let block = image.allocate(size);
        image.write(block, header.as_bytes());
        image.write(block + size_of::<Header>() as u64, entries.as_bytes());
        block
    })
}
