//! Guest memory as the kernel wants to have it for a read or write: a row of addresses in this process.

use std::ptr;

use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// Which way data go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// A read by the guest.
    FromImage,
    /// A write by the guest.
    ToImage,
}

/// A part of guest memory: where, and how many bytes.
pub type Segment = (GuestAddress, u32);

/// The part of some guest memory that is still to be read or written. All of it lies in RAM, which is never unmapped.
#[derive(Debug)]
pub struct Buffers {
    vectors: Vec<libc::iovec>,
    /// How many of the vectors are done.
    done: usize,
    length: usize,
}

// SAFETY: the addresses lie in a mapping that all threads share and that is never unmapped; nothing takes references into it.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Nothing, when a part lies outside of RAM.
    pub fn new(memory: &GuestMemoryMmap, segments: &[Segment]) -> Option<Self> {
        let mut buffers = Self { vectors: Vec::with_capacity(segments.len()), done: 0, length: 0 };
        for &(address, length) in segments {
            // A segment may go on from one range of RAM into the next.
            for slice in memory.get_slices(address, length as usize, Permissions::ReadWrite).ok()? {
                let slice = slice.ok()?;
                buffers.length = buffers.length.checked_add(slice.len())?;
                buffers
                    .vectors
                    .push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
            }
        }
        Some(buffers)
    }

    /// Bytes that are left.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// What is left.
    pub fn vectors(&self) -> &[libc::iovec] {
        &self.vectors[self.done..]
    }

    /// Whether all that is left lies at multiples of `granule`, a power of two, and has such lengths.
    pub fn are_aligned(&self, granule: usize) -> bool {
        self.vectors().iter().all(|vector| (vector.iov_base.addr() | vector.iov_len) & (granule - 1) == 0)
    }

    /// So many bytes are done, no more than are left.
    pub fn advance(&mut self, bytes: usize) {
        self.consume(bytes, |_, _, _| {});
    }

    /// Writes to the guest's memory.
    pub fn fill_from(&mut self, bytes: &[u8]) {
        self.consume(bytes.len(), |base, at, count| {
            // SAFETY: `base` has room for `count` bytes of guest RAM, which is never unmapped and of which nobody has a
            // reference; the other side is the slice `bytes[at..at + count]`.
            unsafe { ptr::copy(bytes[at..][..count].as_ptr(), base, count) }
        });
    }

    /// Reads from the guest's memory.
    pub fn drain_to(&mut self, bytes: &mut [u8]) {
        self.consume(bytes.len(), |base, at, count| {
            // SAFETY: as in `fill_from`, the other way round.
            unsafe { ptr::copy(base, bytes[at..][..count].as_mut_ptr(), count) }
        });
    }

    /// Calls `each` for each piece of the next `bytes` bytes with its address, its place in these bytes and its length.
    fn consume(&mut self, bytes: usize, mut each: impl FnMut(*mut u8, usize, usize)) {
        let mut at = 0;
        while let Some(vector) = self.vectors.get_mut(self.done) {
            let count = vector.iov_len.min(bytes - at);
            each(vector.iov_base.cast(), at, count);
            at += count;
            self.length -= count;
            if count < vector.iov_len {
                vector.iov_base = vector.iov_base.wrapping_byte_add(count);
                vector.iov_len -= count;
                break;
            }
            self.done += 1;
            // Empty vectors behind the last byte are passed over as well, so that `vectors` never begins with one.
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 0x1000),
            (GuestAddress(0x1000), 0x1000),
            (GuestAddress(0x4000), 0x1000),
        ])
        .unwrap()
    }

    #[test]
    fn bytes_go_to_where_the_segments_say_in_any_pieces() {
        let memory = memory();
        let segments = [(GuestAddress(0xff0), 0x20), (GuestAddress(0x10), 0), (GuestAddress(0x4000), 0x30)];
        let mut buffers = Buffers::new(&memory, &segments).unwrap();
        assert_eq!(buffers.length(), 0x50);
        let bytes: Vec<u8> = (1..=0x50).collect();
        buffers.fill_from(&bytes[..0x18]);
        buffers.fill_from(&bytes[0x18..0x20]);
        buffers.fill_from(&bytes[0x20..]);
        assert!(buffers.is_empty() && buffers.vectors().is_empty());
        let mut found = [0; 0x20];
        memory.read_slice(&mut found, GuestAddress(0xff0)).unwrap();
        assert_eq!(found, bytes[..0x20]);
        let mut back = [0; 0x40];
        let mut buffers = Buffers::new(&memory, &segments).unwrap();
        buffers.advance(0x10);
        buffers.drain_to(&mut back);
        assert_eq!(back, bytes[0x10..]);
    }

    #[test]
    fn memory_outside_of_ram_is_refused() {
        let memory = memory();
        for (address, length) in
            [(0x3000, 1), (0x1fff, 2), (0x4fff, 2), (u64::MAX, 2), (u64::MAX - 1, u32::MAX), (0, u32::MAX)]
        {
            assert!(Buffers::new(&memory, &[(GuestAddress(address), length)]).is_none(), "{address:#x} {length:#x}");
        }
    }

    #[test]
    fn alignment_is_that_of_addresses_and_lengths() {
        let memory = memory();
        let aligned = |segments: &[Segment]| Buffers::new(&memory, segments).unwrap().are_aligned(512);
        assert!(aligned(&[(GuestAddress(0x200), 0x200), (GuestAddress(0x4000), 0x400)]));
        assert!(!aligned(&[(GuestAddress(0x200), 0x100), (GuestAddress(0x4000), 0x100)]));
        assert!(!aligned(&[(GuestAddress(0x204), 0x200)]));
    }
}
