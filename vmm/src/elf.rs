//! The two structs of an ELF file of 64 bits that this program reads and writes (`elf(5)`; Linux's `include/uapi/linux/elf.h`).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// How an ELF file of 64-bit integers, the lowest byte first, begins; with the format's version.
pub const IDENT: [u8; 7] = *b"\x7fELF\x02\x01\x01";
/// A segment that is to be in memory.
pub const LOAD: u32 = 1;
/// A segment with notes.
pub const NOTE: u32 = 4;
/// A file that is the image of a process, or of a machine.
pub const CORE: u16 = 4;

/// `Elf64_Ehdr`.
#[derive(Clone, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FileHeader {
    pub ident: [u8; 16],
    pub kind: U16,
    pub machine: U16,
    pub version: U32,
    pub entry: U64,
    pub segments: U64,
    pub sections: U64,
    pub flags: U32,
    pub size: U16,
    pub segment_size: U16,
    pub segment_count: U16,
    pub section_size: U16,
    pub section_count: U16,
    pub section_names: U16,
}

/// `Elf64_Phdr`.
#[derive(Clone, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SegmentHeader {
    pub kind: U32,
    pub flags: U32,
    pub offset: U64,
    pub address: U64,
    pub physical: U64,
    pub file_size: U64,
    pub size: U64,
    pub align: U64,
}
