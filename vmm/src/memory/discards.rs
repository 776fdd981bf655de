//! Parts of guest RAM that the guest can do without for now are given back to the host: holes are punched into the memfd.
//!
//! While RAM is preserved for a live update, the kernel refuses that (EPERM), and before that a hole would only be filled again.
//! So nothing is punched from prepare on until that is undone; whoever wanted to is told, and told again when it is over.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kho_abi::document::memory::RamRangeV1;
use rustix::fs::FallocateFlags;
use vmm_sys_util::eventfd::EventFd;

/// So much is given back at once: whoever wants to prepare a live update waits for no more than that.
const STEP: u64 = 64 << 20;

/// What has become of a discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discarded {
    /// The host has the memory.
    Done,
    /// Not now, as RAM is held for a live update; a part may have been done.
    Held,
}

/// Gives guest RAM back to the host.
pub struct Discards {
    file: OwnedFd,
    ranges: Vec<RamRangeV1>,
    /// Locked while a hole is punched, so that none is under way any more once it is set.
    held: Mutex<bool>,
    released: EventFd,
}

impl Discards {
    /// For RAM in that memfd, which lies at these ranges of the guest's address space.
    pub fn new(file: OwnedFd, ranges: Vec<RamRangeV1>) -> io::Result<Self> {
        Ok(Self { file, ranges, held: Mutex::new(false), released: EventFd::new(libc::EFD_NONBLOCK)? })
    }

    fn held(&self) -> MutexGuard<'_, bool> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets nothing be discarded from now on.
    pub fn hold(&self) {
        *self.held() = true;
    }

    /// Lets discards be made again.
    pub fn release(&self) {
        *self.held() = false;
        if let Err(error) = self.released.write(1) {
            tracing::warn!(%error, "the balloon does not learn that memory can be given back again");
        }
    }

    /// Readable when discards can be made again that could not be before.
    pub fn released(&self) -> &EventFd {
        &self.released
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.ranges.iter().map(|range| range.size).sum()
    }

    /// Bytes of RAM that the host has set memory aside for.
    pub fn backed(&self) -> io::Result<u64> {
        const UNIT: u64 = 512;
        let blocks = rustix::fs::fstat(&self.file)?.st_blocks;
        Ok(u64::try_from(blocks).unwrap_or(0).saturating_mul(UNIT))
    }

    /// Where in the memfd so many bytes of the guest's address space lie, if all of them are RAM.
    pub fn offset(&self, address: u64, length: u64) -> Option<u64> {
        let range =
            self.ranges.iter().find(|range| address.checked_sub(range.gpa).is_some_and(|at| at < range.size))?;
        let at = address - range.gpa;
        (length <= range.size - at).then_some(range.offset + at)
    }

    /// Gives a part of the memfd back. The guest finds zeroes there.
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<Discarded> {
        let (mut at, end) = (offset, offset.saturating_add(length));
        while at < end {
            let part = STEP.min(end - at);
            let held = self.held();
            if *held {
                return Ok(Discarded::Held);
            }
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, at, part))?;
            at += part;
        }
        Ok(Discarded::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MEMORY_GRANULE;
    use crate::memory::Ram;
    use vm_memory::{Bytes, GuestAddress};

    const SIZE: u64 = 16 << 20;

    /// Has all of it backed, where `populate` may do nothing, as under a user-mode emulator.
    fn back(ram: &Ram) {
        for page in 0..SIZE / 4096 {
            ram.guest.write_obj(page, GuestAddress(ram.ranges()[0].gpa + page * 4096)).unwrap();
        }
    }

    #[test]
    fn discard_gives_memory_back_and_leaves_what_is_beside_it() {
        let ram = Ram::create("test", SIZE).unwrap();
        back(&ram);
        let discards = ram.discards();
        assert_eq!(discards.backed().unwrap(), SIZE);
        let base = ram.ranges()[0].gpa;
        assert_eq!(discards.discard(4 << 20, MEMORY_GRANULE).unwrap(), Discarded::Done);
        assert_eq!(discards.backed().unwrap(), SIZE - MEMORY_GRANULE);
        for page in 0..SIZE / 4096 {
            let discarded = (4 << 20..6 << 20).contains(&(page * 4096));
            let found: u64 = ram.guest.read_obj(GuestAddress(base + page * 4096)).unwrap();
            assert_eq!(found, if discarded { 0 } else { page }, "page {page}");
        }
    }

    #[test]
    fn nothing_is_discarded_while_held_and_the_release_is_told() {
        let ram = Ram::create("test", SIZE).unwrap();
        back(&ram);
        let discards = ram.discards();
        discards.hold();
        assert_eq!(discards.discard(0, SIZE).unwrap(), Discarded::Held);
        assert_eq!(discards.backed().unwrap(), SIZE);
        assert!(discards.released().read().is_err());
        discards.release();
        assert_eq!(discards.released().read().unwrap(), 1);
        assert_eq!(discards.discard(0, SIZE).unwrap(), Discarded::Done);
        assert_eq!(discards.backed().unwrap(), 0);
    }

    #[test]
    fn only_what_is_ram_has_a_place_in_the_memfd() {
        let range = |gpa, size, offset| RamRangeV1 { gpa, size, token: 0x100, offset };
        let file = crate::memory::create_memfd("test", 3 << 21).unwrap();
        let ranges = vec![range(1 << 30, 1 << 21, 0), range(1 << 32, 2 << 21, 1 << 21)];
        let discards = Discards::new(file, ranges).unwrap();
        assert_eq!(discards.size(), 3 << 21);
        assert_eq!(discards.offset(1 << 30, 1 << 21), Some(0));
        assert_eq!(discards.offset((1 << 32) + 5, 1), Some((1 << 21) + 5));
        assert_eq!(discards.offset((1 << 32) + (2 << 21) - 1, 1), Some((3 << 21) - 1));
        for (address, length) in [
            (0, 1),
            ((1 << 30) - 1, 1),
            (1 << 30, (1 << 21) + 1),
            ((1 << 30) + (1 << 21), 1),
            ((1 << 32) + (2 << 21), 1),
            (1 << 32, u64::MAX),
            (u64::MAX, 1),
            (u64::MAX, u64::MAX),
        ] {
            assert_eq!(discards.offset(address, length), None, "{address:#x} {length:#x}");
        }
    }
}
