//! What one kernel hands over to the next: the formats of Kexec HandOver (KHO) and of the Live Update Orchestrator (LUO).
//!
//! All of it lies in physical memory, and is read through [`PhysMem`]: a live host, a saved dump and a test are the same to a
//! decoder. What a decoder reads, an encoder writes into an [`Image`], so that tests can build what no kernel would.
//!
//! | module | kernel's name | defined in |
//! |---|---|---|
//! | [`root`] | the KHO FDT | `include/linux/kho/abi/kexec_handover.h` |
//! | [`radix`] | preserved pages, from `kho-v3` on | `include/linux/kho/abi/kexec_handover.h` |
//! | [`bitmaps`] | preserved pages, `kho-v1` | `kexec_handover.c` of 6.16 to 7.0, in `kernel/` and later in `kernel/liveupdate/` |
//! | [`vmalloc`] | `struct kho_vmalloc` | `include/linux/kho/abi/kexec_handover.h` |
//! | [`blocks`] | `struct kho_block_header_ser` | `include/linux/kho/abi/block.h` |
//! | [`luo`] | `struct luo_ser` and what it leads to | `include/linux/kho/abi/luo.h` |
//! | [`memfd`] | `struct memfd_luo_ser` | `include/linux/kho/abi/memfd.h` |
//! | [`memblock`] | the FDT of `reserve_mem=` | `include/linux/kho/abi/memblock.h` |
//! | [`metadata`] | `struct kho_kexec_metadata` | `include/linux/kho/abi/kexec_metadata.h` |
//! | [`scratch`] | `struct kho_scratch` | `include/linux/kexec_handover.h` |
//! | [`handover`] | all of it together | |
//! | [`dump`] | a file with the pages of all of it | there |
//!
//! Integers are in the kernel's native byte order, also within FDTs: little-endian on x86_64 and aarch64. Both kernels have
//! the same page size, or there is no handover.
//!
//! Nothing is trusted: what leads outside of memory, in circles, or to more than [`Limits`] is an [`Error`] that names the
//! path to it.
//!
//! Each module has an example of its format; [`handover`] has one that goes from the root to the preserved pages.

pub mod bitmaps;
pub mod blocks;
pub mod dump;
pub mod error;
pub mod handover;
pub mod luo;
pub mod memblock;
pub mod memfd;
pub mod memory;
pub mod metadata;
pub mod radix;
pub mod ranges;
pub mod root;
pub mod scratch;
pub mod vmalloc;

pub use error::{Error, Problem};
pub use memory::{Image, PageSize, PhysMem, Unreadable};
pub use ranges::Ranges;

/// How much of something a decoder takes in before it takes it for hostile.
///
/// The defaults are more than any host has, and little enough to be gone through in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pages that make up a tree or a list.
    pub pages: usize,
    /// Entries: runs of preserved pages, folios of a file, sessions and files.
    pub entries: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { pages: 1 << 17, entries: 1 << 22 }
    }
}
