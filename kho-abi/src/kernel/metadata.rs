//! `kexec-metadata`: which kernel started this one, and how many there have been since the last cold boot.
//!
//! Defined in the kernel's `include/linux/kho/abi/kexec_metadata.h`.
//!
//! ```
//! use kho_abi::kernel::metadata::Metadata;
//!
//! let metadata = Metadata { previous_release: "7.2.12".into(), kexec_count: 3 };
//! let bytes = metadata.encode();
//! assert_eq!(bytes.len(), 73);
//! assert_eq!(Metadata::decode(&bytes, "/kexec-metadata")?, metadata);
//! # Ok::<(), kho_abi::kernel::Error>(())
//! ```

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Error, Problem, luo};

/// Its subtree's name.
pub const NAME: &str = "kexec-metadata";
/// `KHO_KEXEC_METADATA_VERSION`.
pub const VERSION: u32 = 1;

/// `struct kho_kexec_metadata`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct RawMetadata {
    /// [`VERSION`].
    pub version: U32,
    /// The release, filled up with NULs.
    pub previous_release: [u8; 65],
    /// Kexecs since the last cold boot.
    pub kexec_count: U32,
}

/// What the kernel before this one has said of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Its release, as `uname -r` tells it.
    pub previous_release: String,
    /// Kexecs since the last cold boot.
    pub kexec_count: u32,
}

impl Metadata {
    /// Reads the bytes of its subtree.
    ///
    /// # Errors
    /// When there are too few, or they are of another version.
    pub fn decode(bytes: &[u8], path: &str) -> Result<Self, Error> {
        let (version, _) =
            U32::read_from_prefix(bytes).map_err(|_| Error::invalid(path, "it", "is too short for a version"))?;
        if version != VERSION {
            return Err(Error::new(path, Problem::Version { found: format!("{version}"), known: "1" }));
        }
        let (raw, _) = RawMetadata::read_from_prefix(bytes).map_err(|_| Error::invalid(path, "it", "is cut short"))?;
        let previous_release = luo::text(&raw.previous_release, "the release", path)?;
        Ok(Self { previous_release, kexec_count: raw.kexec_count.get() })
    }

    /// Writes them. What is too long for a release is cut.
    pub fn encode(&self) -> Vec<u8> {
        let raw = RawMetadata {
            version: U32::new(VERSION),
            previous_release: luo::field(&self.previous_release),
            kexec_count: U32::new(self.kexec_count),
        };
        raw.as_bytes().to_vec()
    }
}
