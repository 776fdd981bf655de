//! The proof that guests' memory will be there under the next kernel: every frame of it is in the kernel's own map of preserved
//! memory, and none in scratch, which the next kernel boots in and into which it is loaded.
//!
//! Frames are told by this process's page map, over a mapping of its own that can only read: guests run on meanwhile. The kernel
//! takes segments of the next one out of scratch alone (`kho_locate_mem_hole`), so that what is not in scratch is in none of them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};

use super::inspect;
use super::kcore::Kcore;
use kho_abi::document::header;
use kho_abi::kernel::{Limits, Ranges, handover};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

/// Why a proof could not be had, or what it has found.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// The memory or its page map cannot be looked at.
    #[error("cannot {operation}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel does not tell frames to those without `CAP_SYS_ADMIN`.
    #[error("the kernel hides where memory is: run vmm as root")]
    Hidden,
    /// A page that nobody has ever touched and that was not filled in.
    #[error("the page at {offset:#x} of the guest's memory is nowhere")]
    Absent {
        /// Where in the file.
        offset: u64,
    },
    /// The kernel would not hand it over.
    #[error("the frame at {frame:#x}, which is {offset:#x} of the guest's memory, is not preserved")]
    Missing {
        /// The frame.
        frame: u64,
        /// Where in the file.
        offset: u64,
    },
    /// The next kernel would boot in it.
    #[error("the frame at {frame:#x}, which is {offset:#x} of the guest's memory, is in scratch")]
    Scratch {
        /// The frame.
        frame: u64,
        /// Where in the file.
        offset: u64,
    },
}

/// Why there is nothing to prove it by.
#[derive(Debug, thiserror::Error)]
#[error("the kernel's map of preserved memory cannot be read")]
pub struct NoMapError(#[source] pub anyhow::Error);

/// Where the kernel has its side of the handover. To find that takes longer than to read it, and it does not change.
pub struct Source {
    memory: Kcore,
    root: u64,
    scratch: Ranges,
}

impl Source {
    /// Finds it.
    pub fn find() -> Result<Self, NoMapError> {
        let find = || {
            let memory = Kcore::open()?;
            let root = inspect::outgoing_root(&memory)?;
            Ok(Self { memory, root, scratch: inspect::scratch_areas()?.into_iter().collect() })
        };
        find().map_err(NoMapError)
    }

    /// Reads what the kernel would hand over now.
    pub fn map(&self) -> Result<Map, NoMapError> {
        let read = || {
            let found = handover::read(&self.memory, self.root, &Limits::default())?;
            Ok(Map { preserved: found.preserved?.ranges, scratch: self.scratch.clone() })
        };
        read().map_err(NoMapError)
    }
}

/// What the kernel would hand over.
pub struct Map {
    preserved: Ranges,
    scratch: Ranges,
}

impl Map {
    /// Looks for each page of some files in the map.
    pub fn prove<'a>(&self, files: impl IntoIterator<Item = (&'a OwnedFd, u64)>) -> Result<Proven, ProofError> {
        let (mut pages, mut found) = (0, Frames::default());
        for (file, size) in files {
            let pieces = frames(file, size)?;
            pages += prove(&pieces, &self.preserved, &self.scratch)?;
            found.add(&pieces);
        }
        Ok(Proven { pages, frames: found.checksum() })
    }
}

/// What a proof has shown.
pub struct Proven {
    /// So many pages are preserved.
    pub pages: u64,
    /// The checksum of where they are.
    pub frames: u64,
}

/// Where files are in physical memory, for a checksum of it: memory that is handed over is neither copied nor moved.
#[derive(Default)]
pub struct Frames(Vec<u8>);

impl Frames {
    /// Adds a file.
    pub fn add(&mut self, pieces: &[Piece]) {
        for Piece { offset, frames } in pieces {
            self.0.extend([*offset, frames.start, frames.end].iter().flat_map(|number| number.to_le_bytes()));
        }
    }

    /// The checksum of all that were added.
    pub fn checksum(&self) -> u64 {
        header::checksum_of(&self.0)
    }
}

/// Neighbours in a file that are neighbours in physical memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where in the file.
    pub offset: u64,
    /// Where in physical memory.
    pub frames: Range<u64>,
}

/// A mapping that can only be read.
struct Mapping {
    address: NonNull<std::ffi::c_void>,
    size: usize,
}

impl Mapping {
    fn new(file: &OwnedFd, size: usize) -> io::Result<Self> {
        // SAFETY: a new mapping, of which only this value knows, and through which nothing is read.
        let address = unsafe { mmap(ptr::null_mut(), size, ProtFlags::READ, MapFlags::SHARED, file, 0) }?;
        let address = NonNull::new(address).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapping = Self { address, size };
        // SAFETY: it is this mapping, and to look all pages up changes none of them.
        unsafe { madvise(address.as_ptr(), size, Advice::LinuxPopulateRead) }?;
        Ok(mapping)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and not used any more.
        if let Err(error) = unsafe { munmap(self.address.as_ptr(), self.size) } {
            tracing::warn!(%error, "a mapping stays behind");
        }
    }
}

/// Where the memory of a file is, all of it.
pub fn frames(file: &OwnedFd, size: u64) -> Result<Vec<Piece>, ProofError> {
    /// Entries that are read at once.
    const ENTRIES: usize = 1 << 15;
    const PRESENT: u64 = 1 << 63;
    const NUMBER: u64 = (1 << 55) - 1;
    let failed = |operation| move |source| ProofError::System { operation, source };
    let bytes =
        usize::try_from(size).map_err(|_| failed("map the guest's memory")(io::ErrorKind::OutOfMemory.into()))?;
    let mapping = Mapping::new(file, bytes).map_err(failed("map the guest's memory"))?;
    let map = File::open("/proc/self/pagemap").map_err(failed("open the page map"))?;
    let page = rustix::param::page_size();
    let first = mapping.address.as_ptr().addr() / page;
    let (mut pieces, mut buffer) = (Vec::<Piece>::new(), vec![0; ENTRIES * 8]);
    let pages = bytes / page;
    for start in (0..pages).step_by(ENTRIES) {
        let count = ENTRIES.min(pages - start);
        let part = buffer.get_mut(..count * 8).unwrap_or_default();
        map.read_exact_at(part, ((first + start) * 8) as u64).map_err(failed("read the page map"))?;
        for (number, entry) in part.as_chunks::<8>().0.iter().enumerate() {
            let entry = u64::from_le_bytes(*entry);
            let offset = ((start + number) * page) as u64;
            if entry & PRESENT == 0 {
                return Err(ProofError::Absent { offset });
            }
            // No guest's memory is in the first frame, which is what the kernel shows instead of others.
            let frame = (entry & NUMBER) * page as u64;
            if frame == 0 {
                return Err(ProofError::Hidden);
            }
            match pieces.last_mut() {
                Some(piece) if piece.frames.end == frame => piece.frames.end += page as u64,
                _ => pieces.push(Piece { offset, frames: frame..frame + page as u64 }),
            }
        }
    }
    Ok(pieces)
}

/// Counts frames that are preserved and not in scratch. Any other is an error.
pub fn prove(pieces: &[Piece], preserved: &Ranges, scratch: &Ranges) -> Result<u64, ProofError> {
    let page = rustix::param::page_size() as u64;
    let mut proven = 0;
    for Piece { offset, frames } in pieces {
        if let Some(part) = scratch.overlap(frames) {
            return Err(ProofError::Scratch { frame: part.start, offset: offset + (part.start - frames.start) });
        }
        if !preserved.contains(frames) {
            let mut each = (frames.start..frames.end).step_by(page as usize);
            let frame = each.find(|frame| !preserved.contains(&(*frame..frame + page))).unwrap_or(frames.start);
            return Err(ProofError::Missing { frame, offset: offset + (frame - frames.start) });
        }
        proven += (frames.end - frames.start) / page;
    }
    Ok(proven)
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    const PAGES: u64 = 600;

    #[test]
    #[ignore = "needs root, and the page map of a kernel of this architecture; run in the lab's host"]
    fn frames_of_a_memfd_cover_all_of_it() {
        let page = rustix::param::page_size() as u64;
        let file = memfd_create("proof", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, PAGES * page).unwrap();
        let pieces = frames(&file, PAGES * page).unwrap();
        let all: u64 = pieces.iter().map(|piece| piece.frames.end - piece.frames.start).sum();
        assert_eq!(all, PAGES * page);
        let preserved: Ranges = pieces.iter().map(|piece| piece.frames.clone()).collect();
        assert_eq!(prove(&pieces, &preserved, &Ranges::default()).unwrap(), PAGES);
        assert_eq!(frames(&file, PAGES * page).unwrap(), pieces, "memory has moved");
        let checksum = |pieces: &[Piece]| {
            let mut frames = Frames::default();
            frames.add(pieces);
            frames.checksum()
        };
        let mut moved = pieces.clone();
        moved[0].frames.start ^= page;
        assert_ne!(checksum(&moved), checksum(&pieces));
    }

    #[test]
    fn one_frame_that_is_left_out_or_in_scratch_is_found() {
        let page = rustix::param::page_size() as u64;
        let at = |number: u64| number * page;
        let pieces = [Piece { offset: 0, frames: at(100)..at(110) }, Piece { offset: at(10), frames: at(50)..at(60) }];
        let preserved: Ranges = [at(50)..at(60), at(100)..at(107), at(108)..at(110)].into_iter().collect();
        let error = prove(&pieces, &preserved, &Ranges::default()).unwrap_err();
        assert!(
            matches!(error, ProofError::Missing { frame, offset } if frame == at(107) && offset == at(7)),
            "{error}"
        );
        let all = Ranges::from_iter([at(0)..at(100), at(100)..at(200)]);
        let scratch = Ranges::from_iter([at(55)..at(60), at(60)..at(70)]);
        let error = prove(&pieces, &all, &scratch).unwrap_err();
        assert!(
            matches!(error, ProofError::Scratch { frame, offset } if frame == at(55) && offset == at(15)),
            "{error}"
        );
        assert_eq!(prove(&pieces, &all, &Ranges::default()).unwrap(), 20);
    }
}
