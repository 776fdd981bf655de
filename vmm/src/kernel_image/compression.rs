//! All that Linux offers to compress a kernel with.

use std::io::{self, Read};

/// How a kernel is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// `CONFIG_KERNEL_GZIP`.
    Gzip,
    /// `CONFIG_KERNEL_BZIP2`.
    Bzip2,
    /// `CONFIG_KERNEL_LZMA`.
    Lzma,
    /// `CONFIG_KERNEL_XZ`.
    Xz,
    /// `CONFIG_KERNEL_LZO`.
    Lzo,
    /// `CONFIG_KERNEL_LZ4`.
    Lz4,
    /// `CONFIG_KERNEL_ZSTD`.
    Zstd,
}

/// A kernel with all its symbols comes near, nothing else does. To fuzz is to wait for bombs to go off otherwise.
const MOST_BYTES: usize = if cfg!(fuzzing) { 16 << 20 } else { 1 << 30 };
/// What a format may want for its window: the kernel's own limit for zstd.
const MOST_WINDOW: u64 = 128 << 20;
const MOST_WINDOW_KIB: u32 = 256 << 10;

impl Compression {
    const ALL: [(Self, &'static str, &'static [u8]); 7] = [
        (Self::Gzip, "gzip", &[0x1f, 0x8b]),
        (Self::Bzip2, "bzip2", b"BZh"),
        (Self::Lzma, "lzma", &[0x5d, 0, 0]),
        (Self::Xz, "xz", b"\xfd7zXZ\0"),
        (Self::Lzo, "lzo", b"\x89LZO\0"),
        (Self::Lz4, "lz4", &[0x02, 0x21, 0x4c, 0x18]),
        (Self::Zstd, "zstd", &[0x28, 0xb5, 0x2f, 0xfd]),
    ];

    /// By the first bytes; None for what is not compressed.
    pub fn detect(bytes: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, _, magic)| bytes.starts_with(magic)).map(|(compression, ..)| compression)
    }

    /// As the kernel's configuration calls it.
    pub fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(compression, ..)| *compression == self).map_or("", |(_, name, _)| name)
    }

    /// What comes out. What follows behind it is left alone.
    pub fn unpack(self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            Self::Gzip => all(flate2::read::GzDecoder::new(bytes)),
            Self::Bzip2 => all(bzip2::read::BzDecoder::new(bytes)),
            Self::Lzma => {
                all(lzma_rust2::LzmaReader::new_mem_limit(bytes, MOST_WINDOW_KIB, None).map_err(io::Error::other)?)
            }
            Self::Xz => all(lzma_rust2::XzReader::new_mem_limit(bytes, false, MOST_WINDOW_KIB)),
            Self::Lzo => lzop(bytes),
            Self::Lz4 => lz4(bytes),
            Self::Zstd => {
                let decoder = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(bytes, MOST_WINDOW);
                all(decoder.map_err(io::Error::other)?)
            }
        }
    }
}

fn all(reader: impl Read) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    reader.take(MOST_BYTES as u64 + 1).read_to_end(&mut content)?;
    if content.len() > MOST_BYTES {
        return Err(io::Error::other("more comes out than any kernel has"));
    }
    Ok(content)
}

/// The older of lz4's file formats, which the kernel's build uses: blocks behind each other, without an end.
fn lz4(bytes: &[u8]) -> io::Result<Vec<u8>> {
    const BLOCK: usize = 8 << 20;
    let mut rest = bytes.get(4..).unwrap_or_default();
    let (mut content, mut block) = (Vec::new(), vec![0; BLOCK]);
    while !rest.is_empty() {
        let size = u32::from_le_bytes(take(&mut rest, 4)?.try_into().map_err(io::Error::other)?);
        let packed = take(&mut rest, size as usize)?;
        let count = lz4_flex::block::decompress_into(packed, &mut block).map_err(io::Error::other)?;
        if content.len() + count > MOST_BYTES {
            return Err(io::Error::other("more comes out than any kernel has"));
        }
        content.extend_from_slice(block.get(..count).unwrap_or_default());
    }
    Ok(content)
}

/// lzop's file format, of which the kernel's build makes use: a header, then blocks with checksums, which are left to the kernel.
fn lzop(bytes: &[u8]) -> io::Result<Vec<u8>> {
    const MAGIC: usize = 9;
    const NEWER: u32 = 0x940;
    const FILTER: u32 = 0x800;
    /// Checksums of a block before and after compression, Adler's and CRC.
    const BEFORE: [u32; 2] = [0x1, 0x100];
    const AFTER: [u32; 2] = [0x2, 0x200];
    const MOST_BLOCK: u32 = 64 << 20;
    let mut rest = bytes.get(MAGIC..).unwrap_or_default();
    let rest = &mut rest;
    let version = number(rest, 2)?;
    number(rest, 2)?;
    if version >= NEWER {
        number(rest, 2)?;
    }
    number(rest, 1)?;
    if version >= NEWER {
        number(rest, 1)?;
    }
    let flags = number(rest, 4)?;
    if flags & FILTER != 0 {
        number(rest, 4)?;
    }
    number(rest, 4)?;
    number(rest, if version >= NEWER { 8 } else { 4 })?;
    let name = number(rest, 1)?;
    take(rest, name as usize)?;
    number(rest, 4)?;
    let mut content = Vec::new();
    loop {
        let unpacked = number(rest, 4)?;
        if unpacked == 0 {
            return Ok(content);
        }
        let packed = number(rest, 4)?;
        if unpacked > MOST_BLOCK || packed > unpacked || content.len() + unpacked as usize > MOST_BYTES {
            return Err(io::Error::other("a block is larger than any"));
        }
        let sums = |which: [u32; 2]| which.into_iter().filter(|sum| flags & sum != 0).count() * 4;
        take(rest, sums(BEFORE))?;
        if packed < unpacked {
            take(rest, sums(AFTER))?;
        }
        let block = take(rest, packed as usize)?;
        if packed == unpacked {
            content.extend_from_slice(block);
            continue;
        }
        let start = content.len();
        content.resize(start + unpacked as usize, 0);
        let room = content.get_mut(start..).unwrap_or_default();
        let count =
            lzokay::decompress::decompress(block, room).map_err(|error| io::Error::other(format!("{error:?}")))?;
        content.truncate(start + count);
    }
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> io::Result<&'a [u8]> {
    let (taken, behind) = rest.split_at_checked(count).ok_or(io::ErrorKind::UnexpectedEof)?;
    *rest = behind;
    Ok(taken)
}

/// A big-endian integer; of more than four bytes the last four.
fn number(rest: &mut &[u8], bytes: usize) -> io::Result<u32> {
    Ok(take(rest, bytes)?.iter().fold(0, |value, byte| value << 8 | u32::from(*byte)))
}
