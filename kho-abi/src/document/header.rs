//! The header that seals a document: what it is, how long it is, and that no byte has changed.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic: `KHOVMDOC` for a VM's document, `KHOVMIDX` for the index |
//! | 8 | 4 | header version, 1 |
//! | 12 | 4 | reserved, 0 |
//! | 16 | 8 | length of the body, in bytes |
//! | 24 | 8 | checksum |
//! | 32 | | body: a flattened device tree |
//!
//! All integers are little-endian. Behind the body there may be zeros, as the file that carries a document has a fixed
//! capacity: it is preserved before the document's length is known.
//!
//! The checksum is CRC-64/XZ over header (with the checksum field as zero) and body. It is there against accidents:
//! memory that was reused or not carried over, a write that was cut short, a flipped bit. A CRC finds every single and
//! double bit error and every burst of up to 64 bits with certainty, and misses anything else once in 2^64; it costs
//! microseconds for a document, inside the pause, without a library of its own. It is not there against forgers: a
//! cryptographic hash would not keep them out either without a key, and whoever can write the state memfd of a VM has
//! that VM anyway. So what a good checksum vouches for is still decoded with mistrust.

use alloc::vec::Vec;

use crc::{CRC_64_XZ, Crc, Table};

use super::{EncodeError, HeaderError};

/// The most bytes that a sealed document may have, trailing zeros included. Read no more than this of a file.
pub const CAP: usize = 4 << 20;
/// The size of the header in bytes.
pub const SIZE: usize = 32;
/// The header version that is written, and the only one that is read.
pub const VERSION: u32 = 1;

const CHECKSUM: Crc<u64, Table<16>> = Crc::<u64, Table<16>>::new(&CRC_64_XZ);

/// The checksum, CRC-64/XZ, of some bytes.
pub fn checksum_of(bytes: &[u8]) -> u64 {
    CHECKSUM.checksum(bytes)
}

/// What is sealed, which decides the magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A VM's document.
    Machine,
    /// The host's index.
    Index,
}

impl Kind {
    /// The first eight bytes of such a document.
    pub const fn magic(self) -> [u8; 8] {
        match self {
            Self::Machine => *b"KHOVMDOC",
            Self::Index => *b"KHOVMIDX",
        }
    }
}

/// Seals a VM's document.
///
/// # Errors
/// When it exceeds [`CAP`].
pub fn seal(body: &[u8]) -> Result<Vec<u8>, EncodeError> {
    seal_as(Kind::Machine, body)
}

/// Seals a document of any kind.
///
/// # Errors
/// When it exceeds [`CAP`].
pub fn seal_as(kind: Kind, body: &[u8]) -> Result<Vec<u8>, EncodeError> {
    let length = body.len().saturating_add(SIZE);
    if length > CAP {
        return Err(EncodeError::TooLarge { length, cap: CAP });
    }
    let head = head(kind.magic(), VERSION, 0, body.len() as u64);
    let mut sealed = Vec::with_capacity(length);
    sealed.extend_from_slice(&head);
    sealed.extend_from_slice(&checksum(&head, body).to_le_bytes());
    sealed.extend_from_slice(body);
    Ok(sealed)
}

/// The body of a VM's document.
///
/// # Errors
/// When `bytes` is anything else, or anything in it has changed since it was sealed.
pub fn open(bytes: &[u8]) -> Result<&[u8], HeaderError> {
    open_as(Kind::Machine, bytes)
}

/// The body of a document of any kind.
///
/// # Errors
/// When `bytes` is anything else, or anything in it has changed since it was sealed.
pub fn open_as(kind: Kind, bytes: &[u8]) -> Result<&[u8], HeaderError> {
    if bytes.len() > CAP {
        return Err(HeaderError::TooLarge { length: bytes.len(), cap: CAP });
    }
    let Some((header, rest)) = bytes.split_first_chunk::<SIZE>() else {
        return Err(HeaderError::TooShort { length: bytes.len() });
    };
    let (magic, version, reserved, stated_length, stated_checksum) = fields(header);
    if magic != kind.magic() {
        return Err(HeaderError::Magic { expected: kind.magic(), found: magic });
    }
    if version != VERSION {
        return Err(HeaderError::Version { found: version, supported: VERSION });
    }
    if reserved != 0 {
        return Err(HeaderError::Reserved { found: reserved });
    }
    let Some((body, tail)) = usize::try_from(stated_length).ok().and_then(|length| rest.split_at_checked(length))
    else {
        return Err(HeaderError::Length { stated: stated_length, available: rest.len() });
    };
    let computed = checksum(&head(magic, version, reserved, stated_length), body);
    if computed != stated_checksum {
        return Err(HeaderError::Checksum { stated: stated_checksum, computed });
    }
    if let Some(position) = tail.iter().position(|&byte| byte != 0) {
        return Err(HeaderError::Tail { offset: SIZE + body.len() + position });
    }
    Ok(body)
}

/// The size in bytes, header included, that a sealed document of any kind says it has; `None` where not even a header is
/// there. It is what the bytes say, and true only of a document that has been opened.
pub fn length(bytes: &[u8]) -> Option<u64> {
    let (_, _, _, body, _) = fields(bytes.first_chunk::<SIZE>()?);
    body.checked_add(SIZE as u64)
}

/// The header up to its checksum.
fn head(magic: [u8; 8], version: u32, reserved: u32, length: u64) -> [u8; SIZE - 8] {
    let mut head = [0; SIZE - 8];
    head[..8].copy_from_slice(&magic);
    head[8..12].copy_from_slice(&version.to_le_bytes());
    head[12..16].copy_from_slice(&reserved.to_le_bytes());
    head[16..].copy_from_slice(&length.to_le_bytes());
    head
}

/// Magic, version, reserved, length, checksum.
fn fields(header: &[u8; SIZE]) -> ([u8; 8], u32, u32, u64, u64) {
    let four = |at: usize| [header[at], header[at + 1], header[at + 2], header[at + 3]];
    let eight =
        |at: usize| (u64::from(u32::from_le_bytes(four(at + 4))) << 32) | u64::from(u32::from_le_bytes(four(at)));
    (eight(0).to_le_bytes(), u32::from_le_bytes(four(8)), u32::from_le_bytes(four(12)), eight(16), eight(24))
}

fn checksum(head: &[u8; SIZE - 8], body: &[u8]) -> u64 {
    let mut digest = CHECKSUM.digest();
    digest.update(head);
    digest.update(&[0; 8]);
    digest.update(body);
    digest.finalize()
}
