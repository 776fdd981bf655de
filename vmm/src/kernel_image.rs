//! A kernel's image file, looked into before anybody boots it: what it is for, which version it is, and what it would understand.
//!
//! From the outside in: a [`container`] (bzImage, EFI zboot, or none) holds a payload, which may be [compressed](compression); what
//! comes out is the kernel itself (ELF, or arm64's Image), and its [`content`] is text and numbers that the build has left in it.

mod compression;
mod container;
mod content;

use std::fs;
use std::io;
use std::path::Path;

pub use compression::Compression;
pub use content::{Architecture, Content, formats, versions};

/// The largest file that is looked into: distributions' are a tenth of it.
const MOST_BYTES: u64 = 1 << 30;

/// What cannot be looked into.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be read.
    #[error("it cannot be read")]
    Read(#[from] io::Error),
    /// Larger than any kernel.
    #[error("it has {bytes} bytes, more than any kernel")]
    TooLarge {
        /// How many it has.
        bytes: u64,
    },
    /// It is no kernel of a known form.
    #[error(
        "it is no kernel: neither a bzImage, nor an ELF file, nor arm64's Image, nor one of these in an EFI zboot or compressed"
    )]
    Unknown,
    /// Something is not there that the header speaks of.
    #[error("it is cut short: {what} ends at byte {end}, and the file at {length}")]
    Truncated {
        /// What.
        what: &'static str,
        /// Where that ends.
        end: u64,
        /// Where the file ends.
        length: u64,
    },
    /// What is compressed does not come out.
    #[error("its content, compressed with {}, cannot be read", compression.name())]
    Compressed {
        /// How it is compressed.
        compression: Compression,
        /// Why not.
        source: io::Error,
    },
}

/// A kernel that was looked into.
#[derive(Clone, Debug)]
pub struct KernelImage {
    /// What the file is, in a few words.
    pub form: &'static str,
    /// How the kernel in it is compressed.
    pub compression: Option<Compression>,
    /// The bytes of memory that it takes when it starts, where that is known.
    pub memory: Option<u64>,
    /// The kernel itself.
    pub content: Content,
}

impl KernelImage {
    /// Reads a file.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let bytes = fs::metadata(path)?.len();
        if bytes > MOST_BYTES {
            return Err(ImageError::TooLarge { bytes });
        }
        Self::read(&read_file(path)?)
    }

    /// Looks into a file's bytes.
    pub fn read(file: &[u8]) -> Result<Self, ImageError> {
        let container::Payload { form, bytes, memory } = container::open(file)?;
        let compression = Compression::detect(bytes);
        let unpacked = match compression {
            Some(compression) => {
                Some(compression.unpack(bytes).map_err(|source| ImageError::Compressed { compression, source })?)
            }
            None => None,
        };
        let kernel = unpacked.as_deref().unwrap_or(bytes);
        Ok(Self {
            form,
            compression,
            memory: memory.or_else(|| content::memory(kernel)),
            content: Content::read(kernel).ok_or(ImageError::Unknown)?,
        })
    }
}

/// All of a regular file. Of what is none there may be no end.
pub fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    fs::read(path)
}

/// A little-endian integer of so many bytes, where there are that many.
fn integer<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(N)?)?;
    Some(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests;
