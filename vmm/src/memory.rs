//! Guest RAM: one sealed memfd, so that it outlives the process that maps it and, handed over, the kernel that allocated it.
//!
//! The mapping lies at a multiple of 2 MiB and asks for huge pages, because what the next kernel has to do to take the memory
//! over, it does once per folio.

pub mod discards;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kho_abi::document::memory::RamRangeV1;
use kho_abi::tokens;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use self::discards::Discards;
use crate::arch;
use crate::config::MEMORY_GRANULE;

/// What RAM must be sealed with: its size can never change under a guest, and nobody can add a seal that forbids writing.
pub const SEALS: SealFlags = SealFlags::GROW.union(SealFlags::SHRINK).union(SealFlags::SEAL);

/// What can go wrong with guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A system call on the memfd or its mapping failed.
    #[error("guest RAM: cannot {operation}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The host forbids memfds without NOEXEC_SEAL, which cannot be mapped read-write after a live update.
    #[error(
        "guest RAM: the host enforces vm.memfd_noexec=2, under which memory cannot be handed over; set it to 0 or 1"
    )]
    NoExecEnforced,
    /// A memfd that came from outside is not what a document says.
    #[error("guest RAM: {0}")]
    Unfit(String),
    /// vm-memory refused the ranges.
    #[error("guest RAM: the ranges do not form a memory map")]
    Regions(#[from] vm_memory::GuestRegionCollectionError),
    /// vm-memory refused a mapping.
    #[error("guest RAM: cannot use the mapping")]
    Mapping(#[from] vm_memory::mmap::MmapRegionError),
}

fn system(operation: &'static str) -> impl Fn(rustix::io::Errno) -> MemoryError {
    move |errno| MemoryError::System { operation, source: errno.into() }
}

/// A memfd, mapped, and its place in the guest's address space.
pub struct Ram {
    file: OwnedFd,
    size: u64,
    base: NonNull<u8>,
    ranges: Vec<RamRangeV1>,
    discards: Arc<Discards>,
    /// The same memory as rust-vmm's crates see it.
    pub guest: GuestMemoryMmap,
}

// SAFETY: `base` is the start of a shared mapping that is never unmapped; it is only handed to madvise(2).
unsafe impl Send for Ram {}
// SAFETY: as above; no method gives out a reference into the mapping.
unsafe impl Sync for Ram {}

impl Ram {
    /// Makes RAM of `size` bytes, all of it holes, and lays it out for this architecture.
    pub fn create(name: &str, size: u64) -> Result<Self, MemoryError> {
        let file = create_memfd(&format!("kho-vmm:{name}"), size)?;
        Self::map(file, layout(size))
    }

    /// Takes over RAM that another process or kernel has left, after checking that it is what the document says.
    pub fn adopt(file: OwnedFd, ranges: Vec<RamRangeV1>) -> Result<Self, MemoryError> {
        let size = rustix::fs::fstat(&file).map_err(system("stat the memfd"))?.st_size;
        // Anywhere else, RAM could lie over the interrupt controller or the devices.
        if !u64::try_from(size).is_ok_and(|size| ranges == layout(size)) {
            return Err(MemoryError::Unfit(format!(
                "the memfd has {size} bytes, and the document's ranges are not those of a machine with so much memory"
            )));
        }
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(system("read the memfd's seals"))?;
        if seals != SEALS {
            return Err(MemoryError::Unfit(format!("the memfd is sealed with {seals:?}, not with {SEALS:?}")));
        }
        Self::map(file, ranges)
    }

    fn map(file: OwnedFd, ranges: Vec<RamRangeV1>) -> Result<Self, MemoryError> {
        let size: u64 = ranges.iter().map(|range| range.size).sum();
        let base = map_aligned(file.as_fd(), size)?;
        let mut regions = Vec::with_capacity(ranges.len());
        for range in &ranges {
            let end = range.offset.checked_add(range.size);
            if end.is_none_or(|end| end > size) {
                return Err(MemoryError::Unfit(format!("the range at {:#x} lies outside of the memfd", range.gpa)));
            }
            // SAFETY: offset lies inside of the mapping of `size` bytes at `base`, as checked above.
            let start = unsafe { base.add(range.offset as usize) };
            // SAFETY: the range is part of a shared mapping that is never unmapped while the process lives.
            let region = unsafe {
                MmapRegion::build_raw(
                    start.as_ptr(),
                    range.size as usize,
                    (ProtFlags::READ | ProtFlags::WRITE).bits() as i32,
                    MapFlags::SHARED.bits() as i32,
                )
            }?;
            regions.push(GuestRegionMmap::new(region, GuestAddress(range.gpa)).ok_or_else(|| {
                MemoryError::Unfit(format!("the range at {:#x} passes the end of the address space", range.gpa))
            })?);
        }
        let duplicate = file.try_clone().and_then(|file| Discards::new(file, ranges.clone()));
        let discards = duplicate
            .map_err(|source| MemoryError::System { operation: "duplicate the memfd's descriptor", source })?;
        let guest = GuestMemoryMmap::from_regions(regions)?;
        Ok(Self { file, size, base, ranges, discards: Arc::new(discards), guest })
    }

    /// The memfd.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Gives parts of it back to the host.
    pub fn discards(&self) -> &Arc<Discards> {
        &self.discards
    }

    /// Where in the guest's address space which part of the memfd lies.
    pub fn ranges(&self) -> &[RamRangeV1] {
        &self.ranges
    }

    /// The address in this process of each range, in the order of [`Self::ranges`].
    pub fn host_addresses(&self) -> impl Iterator<Item = (&RamRangeV1, u64)> {
        self.ranges.iter().map(|range| (range, self.base.as_ptr() as u64 + range.offset))
    }

    /// Backs every hole with memory. The kernel would do so itself when RAM is preserved, but with 4 KiB folios, each of which
    /// the next kernel has to take over one by one inside the pause; through this mapping the holes become huge pages. What is in
    /// small folios already, such as where the host had no huge page to spare then, is moved into huge ones, if it has now.
    pub fn populate(&self) -> Result<(), MemoryError> {
        // One call over all of it could not be interrupted for seconds.
        const STEP: u64 = 256 << 20;
        /// How often it is tried again to make huge pages: for all of the memory, as a live update waits for it.
        const TRIES: u32 = 20;
        let (mut offset, mut scattered, mut tries) = (0, None, TRIES);
        while offset < self.size {
            let length = STEP.min(self.size - offset);
            // SAFETY: offset is less than the size of the mapping.
            let start = unsafe { self.base.add(offset as usize) };
            // SAFETY: the range is inside of our own shared mapping; populating it changes no content.
            unsafe { rustix::mm::madvise(start.as_ptr().cast(), length as usize, Advice::LinuxPopulateWrite) }
                .map_err(system(
                    "back it with memory before it is handed over (does the host have enough free memory?)",
                ))?;
            // SAFETY: the range is inside of our own shared mapping.
            scattered = unsafe { collapse(start, length as usize, &mut tries) }.err().or(scattered);
            offset += length;
        }
        if let Some(error) = scattered {
            tracing::warn!(%error, "not all of the guest's memory is in huge pages: a live update will take longer");
        }
        Ok(())
    }
}

/// Makes huge pages of small ones.
///
/// # Safety
/// The range must be mapped and shared. Whoever uses it meanwhile waits for a moment and finds the same content.
unsafe fn collapse(start: NonNull<u8>, length: usize, tries: &mut u32) -> io::Result<()> {
    const BETWEEN: Duration = Duration::from_millis(10);
    loop {
        // SAFETY: the caller's word.
        if unsafe { libc::madvise(start.as_ptr().cast(), length, libc::MADV_COLLAPSE) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // The guest or the kernel is just using one of the pages.
        if error.kind() != io::ErrorKind::WouldBlock || *tries == 0 {
            return Err(error);
        }
        *tries -= 1;
        thread::sleep(BETWEEN);
    }
}

/// Where RAM of `size` bytes lies in the guest's address space and in its memfd.
fn layout(size: u64) -> Vec<RamRangeV1> {
    let mut offset = 0;
    let ranges = arch::memory_layout(size).into_iter().map(|(gpa, size)| {
        let range = RamRangeV1 { gpa, size, token: tokens::RAM_FIRST, offset };
        offset += size;
        range
    });
    ranges.collect()
}

/// Makes a memfd whose size can never change again and that may be written for ever.
pub fn create_memfd(name: &str, size: u64) -> Result<OwnedFd, MemoryError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // EXEC is asked for so that vm.memfd_noexec=1 does not add NOEXEC_SEAL, with which the next kernel refuses to map the memory
    // read-write. Kernels before 6.3 do not know the flag.
    let file = match rustix::fs::memfd_create(name, flags | MemfdFlags::EXEC) {
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        Err(rustix::io::Errno::ACCESS) => return Err(MemoryError::NoExecEnforced),
        other => other,
    }
    .map_err(system("create a memfd"))?;
    rustix::fs::ftruncate(&file, size).map_err(system("size the memfd"))?;
    rustix::fs::fcntl_add_seals(&file, SEALS).map_err(system("seal the memfd"))?;
    Ok(file)
}

/// Maps the file at a multiple of 2 MiB, as only such a mapping can be made of huge pages.
fn map_aligned(file: BorrowedFd<'_>, size: u64) -> Result<NonNull<u8>, MemoryError> {
    let size = usize::try_from(size).map_err(|_| MemoryError::Unfit(format!("{size} bytes do not fit in memory")))?;
    let granule = MEMORY_GRANULE as usize;
    let reserved = size
        .checked_add(granule)
        .filter(|_| size > 0)
        .ok_or_else(|| MemoryError::Unfit(format!("{size} bytes cannot be mapped")))?;
    // SAFETY: a new anonymous reservation, at a place the kernel chooses.
    let reservation = unsafe {
        rustix::mm::mmap_anonymous(
            ptr::null_mut(),
            reserved,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }
    .map_err(system("reserve address space"))?;
    let padding = reservation.addr().next_multiple_of(granule) - reservation.addr();
    // SAFETY: padding is less than the granule by which the reservation is larger than `size`.
    let aligned = unsafe { reservation.byte_add(padding) };
    // SAFETY: FIXED replaces a part of the reservation above, which nothing else uses.
    let base = unsafe {
        rustix::mm::mmap(aligned, size, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED, file, 0)
    }
    .map_err(system("map the memfd read-write"))?;
    // SAFETY: the range is the mapping just made. A host without huge pages for shared memory may refuse; it is slower then.
    if let Err(error) = unsafe { rustix::mm::madvise(base, size, Advice::LinuxHugepage) } {
        tracing::warn!(%error, "guest RAM gets no huge pages: a live update will take longer");
    }
    NonNull::new(base.cast()).ok_or_else(|| MemoryError::Unfit("the kernel mapped it at address 0".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn adopted_ram_holds_what_was_written_before() {
        let ram = Ram::create("test", 16 << 20).unwrap();
        let address = GuestAddress(ram.ranges()[0].gpa + 0x2000);
        ram.guest.write_obj(0x1234_5678_u32, address).unwrap();
        let adopted = Ram::adopt(ram.file().try_clone_to_owned().unwrap(), ram.ranges().to_vec()).unwrap();
        assert_eq!(adopted.guest.read_obj::<u32>(address).unwrap(), 0x1234_5678);
        assert!(adopted.host_addresses().all(|(_, address)| address % MEMORY_GRANULE == 0));
    }

    #[test]
    fn ram_can_neither_grow_nor_shrink() {
        let ram = Ram::create("test", 16 << 20).unwrap();
        assert_eq!(rustix::fs::ftruncate(ram.file(), 8 << 20), Err(rustix::io::Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(ram.file(), 32 << 20), Err(rustix::io::Errno::PERM));
    }

    #[test]
    fn memfd_of_other_size_place_or_seals_is_refused() {
        let ram = Ram::create("test", 16 << 20).unwrap();
        let changes: [fn(&mut RamRangeV1); 4] = [
            |range| range.size -= 4096,
            |range| range.size = u64::MAX,
            |range| range.gpa += MEMORY_GRANULE,
            |range| range.offset = MEMORY_GRANULE,
        ];
        for change in changes {
            let mut ranges = ram.ranges().to_vec();
            change(&mut ranges[0]);
            assert!(matches!(Ram::adopt(ram.file().try_clone_to_owned().unwrap(), ranges), Err(MemoryError::Unfit(_))));
        }
        let unsealed = rustix::fs::memfd_create("unsealed", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&unsealed, 16 << 20).unwrap();
        assert!(matches!(Ram::adopt(unsealed, ram.ranges().to_vec()), Err(MemoryError::Unfit(_))));
    }
}
