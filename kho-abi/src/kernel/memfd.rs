//! A memfd that is handed over, `memfd-v2`: its size, its seals, and where its memory is.
//!
//! Defined in the kernel's `include/linux/kho/abi/memfd.h`.
//!
//! ```
//! use kho_abi::kernel::memfd::{Folio, Memfd};
//! use kho_abi::kernel::{Image, Limits, PageSize};
//!
//! let folio = Folio { address: 0x4000_0000, index: 0, flags: Folio::DIRTY | Folio::UP_TO_DATE };
//! let mut image = Image::new(PageSize::SMALL);
//! let address = Memfd::encode(&mut image, 2 << 20, 0b1111, &[folio]);
//! let memfd = Memfd::decode(&image, address, "/memfd")?;
//! assert_eq!((memfd.size, memfd.folio_count), (2 << 20, 1));
//! assert_eq!(memfd.folios(&image, &Limits::default(), "/memfd")?, [folio]);
//! # Ok::<(), kho_abi::kernel::Error>(())
//! ```

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::memory::read;
use super::vmalloc::{self, Area};
use super::{Error, Image, Limits, PhysMem, Problem};

/// `MEMFD_LUO_FH_COMPATIBLE`.
pub const COMPATIBLE: &str = "memfd-v2";

/// `struct memfd_luo_ser`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct RawMemfd {
    /// The file's position.
    pub position: U64,
    /// Its size in bytes.
    pub size: U64,
    /// Its seals.
    pub seals: U32,
    /// None are defined.
    pub flags: U32,
    /// How many folios it has.
    pub folio_count: U64,
    /// Where the array of [`RawFolio`] is.
    pub folios: Area,
}

/// `struct memfd_luo_folio_ser`: the lower 52 bits are the page's number, the upper 12 flags.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct RawFolio {
    /// The number of its first page, and its flags.
    pub page_and_flags: U64,
    /// Which page of the file is its first.
    pub index: U64,
}

const PAGE_BITS: u32 = 52;

/// A memfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memfd {
    /// The file's position.
    pub position: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Its seals, `F_SEAL_*` of `fcntl(2)`.
    pub seals: u32,
    /// None are defined.
    pub flags: u32,
    /// How many folios it has.
    pub folio_count: u64,
    area: Area,
}

/// A folio: some pages side by side, 2^order of them. The order is in the map of preserved memory alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Folio {
    /// Where it is.
    pub address: u64,
    /// Which page of the file is its first.
    pub index: u64,
    /// [`DIRTY`](Self::DIRTY), [`UP_TO_DATE`](Self::UP_TO_DATE).
    pub flags: u16,
}

impl Folio {
    /// It holds data.
    pub const DIRTY: u16 = 1;
    /// It has been zeroed, or written.
    pub const UP_TO_DATE: u16 = 2;
}

impl Memfd {
    /// Reads what is at an address.
    ///
    /// # Errors
    /// When it is not in memory, or has more folios than room for them.
    pub fn decode(memory: &dyn PhysMem, address: u64, path: &str) -> Result<Self, Error> {
        let raw: RawMemfd = read(memory, address, path)?;
        let (folio_count, area) = (raw.folio_count.get(), raw.folios);
        let room = u64::from(area.total_pages.get()) * memory.page_size().bytes() / size_of::<RawFolio>() as u64;
        if folio_count > room {
            let reason = format!("has {folio_count} folios, and room for a list of {room}");
            return Err(Error::invalid(path, "the memfd", reason));
        }
        Ok(Self {
            position: raw.position.get(),
            size: raw.size.get(),
            seals: raw.seals.get(),
            flags: raw.flags.get(),
            folio_count,
            area,
        })
    }

    /// Its folios, in order.
    ///
    /// # Errors
    /// When their list leads where it cannot, or there are more than `limits`.
    pub fn folios(&self, memory: &dyn PhysMem, limits: &Limits, path: &str) -> Result<Vec<Folio>, Error> {
        if self.folio_count > limits.entries as u64 {
            return Err(Error::new(path, Problem::TooMany { what: "folios", max: limits.entries }));
        }
        if self.folio_count == 0 {
            return Ok(Vec::new());
        }
        let pages = vmalloc::pages(memory, &self.area, limits, path)?;
        let (mut folios, mut page) = (Vec::new(), vec![0; memory.page_size().as_usize()]);
        for address in pages {
            let left = self.folio_count as usize - folios.len();
            if left == 0 {
                break;
            }
            memory.read(address, &mut page).map_err(|unreadable| Error::new(path, unreadable))?;
            for bytes in page.chunks_exact(size_of::<RawFolio>()).take(left) {
                let raw =
                    RawFolio::read_from_bytes(bytes).map_err(|_| Error::invalid(path, "a folio", "is cut short"))?;
                let (word, shift) = (raw.page_and_flags.get(), memory.page_size().shift());
                let number = word & ((1 << PAGE_BITS) - 1);
                let address = number.checked_mul(1 << shift);
                let address = address.ok_or_else(|| Error::invalid(path, "a folio", format!("is page {number:#x}")))?;
                folios.push(Folio { address, index: raw.index.get(), flags: (word >> PAGE_BITS) as u16 });
            }
        }
        Ok(folios)
    }

    /// Writes a memfd of so many bytes, and returns where.
    pub fn encode(image: &mut Image, size: u64, seals: u32, folios: &[Folio]) -> u64 {
        let shift = image.page_size().shift();
        let raw = |folio: &Folio| RawFolio {
            page_and_flags: U64::new(folio.address >> shift | u64::from(folio.flags) << PAGE_BITS),
            index: U64::new(folio.index),
        };
        let list: Vec<RawFolio> = folios.iter().map(raw).collect();
        let raw = RawMemfd {
            position: U64::new(0),
            size: U64::new(size),
            seals: U32::new(seals),
            flags: U32::new(0),
            folio_count: U64::new(folios.len() as u64),
            folios: if folios.is_empty() { Area::default() } else { vmalloc::encode(image, list.as_bytes()) },
        };
        image.add(raw.as_bytes())
    }
}
