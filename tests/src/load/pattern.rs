//! Bytes that follow from where they are, so that whoever reads them knows what they should be.
use guest_kernel::pattern::scramble;

/// Bytes of a word.
const WORD: usize = 8;

fn word(seed: u64, index: u64) -> u64 {
    scramble(scramble(seed) ^ index)
}

/// Fills a buffer with what a stream of that seed holds from `offset` on. Both are multiples of 8 bytes; an end is cut.
pub fn fill(seed: u64, offset: u64, buffer: &mut [u8]) {
    for (index, part) in (offset / WORD as u64..).zip(buffer.chunks_mut(WORD)) {
        part.copy_from_slice(&word(seed, index).to_le_bytes()[..part.len()]);
    }
}

/// The first byte, counted from the buffer's beginning, that is not what [`fill`] would put there.
pub fn difference(seed: u64, offset: u64, buffer: &[u8]) -> Option<usize> {
    for (position, part) in buffer.chunks(WORD).enumerate() {
        let expected = word(seed, offset / WORD as u64 + position as u64).to_le_bytes();
        if let Some(at) = part.iter().zip(expected).position(|(found, expected)| *found != expected) {
            return Some(position * WORD + at);
        }
    }
    None
}

/// A part of `buffer` of that size which begins at a multiple of `alignment`, as direct I/O needs it. The buffer has to be larger by
/// `alignment`.
pub fn aligned(buffer: &mut [u8], alignment: usize, size: usize) -> &mut [u8] {
    let start = buffer.as_ptr().align_offset(alignment);
    &mut buffer[start..start + size]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_filled_is_recognized_wherever_it_is_cut() {
        let mut whole = [0; 100];
        fill(7, 800, &mut whole);
        assert_eq!(difference(7, 800, &whole), None);
        assert_eq!(difference(7, 824, &whole[24..93]), None);
    }

    #[test]
    fn other_seeds_other_places_and_single_bytes_are_told_apart() {
        let mut bytes = [0; 64];
        fill(7, 0, &mut bytes);
        assert_eq!(difference(8, 0, &bytes), Some(0));
        assert!(difference(7, 8, &bytes).is_some());
        bytes[61] ^= 1;
        assert_eq!(difference(7, 0, &bytes), Some(61));
    }

    #[test]
    fn an_aligned_part_has_its_alignment_and_size() {
        let mut buffer = vec![0; 3 * 4096];
        let part = aligned(&mut buffer, 4096, 8192);
        assert_eq!((part.as_ptr().addr() % 4096, part.len()), (0, 8192));
    }
}
