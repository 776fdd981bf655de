//! Which pages are in the balloon: a bit for each page of RAM. The kernel gives memory to those bits only where one is set, so that
//! they take a 32768th of the balloon, rounded up.

use std::ops::Range;

use crate::config::MEMORY_GRANULE;

/// Bytes of a page, whatever the guest's own are.
pub const PAGE: u64 = 4096;
/// Bytes of what is given back at once.
pub const BLOCK: u64 = MEMORY_GRANULE;

/// Words of bits for a block.
const WORDS: usize = (BLOCK / PAGE / u64::BITS as u64) as usize;

/// The pages in the balloon, by their place in the memfd.
pub struct Pages(Vec<u64>);

impl Pages {
    /// None of so many bytes of RAM.
    pub fn new(size: u64) -> Self {
        Self(vec![0; WORDS * (size / BLOCK) as usize])
    }

    /// Whether there can be such blocks in so many bytes of RAM, and if so, those.
    pub fn restored(size: u64, blocks: &[u8]) -> Result<Self, String> {
        let mut pages = Self::new(size);
        let count = pages.blocks();
        if blocks.len() as u64 != count.div_ceil(8) {
            return Err(format!("the state handed over is of {} x 8 blocks, and RAM has {count}", blocks.len()));
        }
        for number in 0..blocks.len() as u64 * 8 {
            if blocks[(number / 8) as usize] & 1 << (number % 8) == 0 {
                continue;
            }
            let Some(words) = pages.words_mut(number) else {
                return Err(format!("the state handed over has block {number}, and RAM has {count}"));
            };
            words.fill(u64::MAX);
        }
        Ok(pages)
    }

    /// A bit for each block that is wholly in the balloon.
    pub fn save(&self) -> Vec<u8> {
        let mut blocks = vec![0; self.blocks().div_ceil(8) as usize];
        for number in (0..self.blocks()).filter(|&number| self.is_whole(number)) {
            blocks[(number / 8) as usize] |= 1 << (number % 8);
        }
        blocks
    }

    fn blocks(&self) -> u64 {
        (self.0.len() / WORDS) as u64
    }

    fn words(&self, block: u64) -> Option<&[u64]> {
        let at = usize::try_from(block).ok()?.checked_mul(WORDS)?;
        self.0.get(at..)?.get(..WORDS)
    }

    fn words_mut(&mut self, block: u64) -> Option<&mut [u64]> {
        let at = usize::try_from(block).ok()?.checked_mul(WORDS)?;
        self.0.get_mut(at..)?.get_mut(..WORDS)
    }

    fn is_whole(&self, block: u64) -> bool {
        self.words(block).is_some_and(|words| words.iter().all(|word| *word == u64::MAX))
    }

    fn word_mut(&mut self, page: u64) -> Option<(&mut u64, u64)> {
        let word = self.0.get_mut(usize::try_from(page / u64::from(u64::BITS)).ok()?)?;
        Some((word, 1 << (page % u64::from(u64::BITS))))
    }

    /// Puts a page in. Gives the block that is whole with it, if it was not before.
    pub fn insert(&mut self, page: u64) -> Option<u64> {
        let (word, bit) = self.word_mut(page)?;
        if *word & bit != 0 {
            return None;
        }
        *word |= bit;
        let block = page / (BLOCK / PAGE);
        self.is_whole(block).then_some(block)
    }

    /// Takes a page out.
    pub fn remove(&mut self, page: u64) {
        if let Some((word, bit)) = self.word_mut(page) {
            *word &= !bit;
        }
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        self.0 = vec![0; self.0.len()];
    }

    /// The first whole blocks from `from` on that lie in a row, not more than `most`.
    pub fn whole(&self, from: u64, most: u64) -> Option<Range<u64>> {
        let start = (from..self.blocks()).find(|&block| self.is_whole(block))?;
        let last = start.saturating_add(most).min(self.blocks());
        let end = (start..last).find(|&block| !self.is_whole(block)).unwrap_or(last);
        Some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IN_BLOCK: u64 = BLOCK / PAGE;

    fn with(blocks: &[u64]) -> Pages {
        let mut pages = Pages::new(20 * BLOCK);
        for block in blocks {
            for page in 0..IN_BLOCK {
                assert_eq!(pages.insert(block * IN_BLOCK + page), (page == IN_BLOCK - 1).then_some(*block));
            }
        }
        pages
    }

    #[test]
    fn block_is_whole_only_with_all_of_its_pages() {
        let mut pages = with(&[3, 4, 7]);
        assert_eq!(pages.whole(0, 10), Some(3..5));
        assert_eq!(pages.whole(0, 1), Some(3..4));
        assert_eq!(pages.whole(5, 10), Some(7..8));
        assert_eq!(pages.whole(8, 10), None);
        pages.remove(4 * IN_BLOCK + 100);
        assert_eq!(pages.whole(0, 10), Some(3..4));
        assert_eq!(pages.insert(4 * IN_BLOCK + 99), None);
        assert_eq!(pages.insert(4 * IN_BLOCK + 100), Some(4));
        assert_eq!(pages.insert(4 * IN_BLOCK + 100), None);
        pages.clear();
        assert_eq!(pages.whole(0, 10), None);
    }

    #[test]
    fn pages_beyond_ram_are_in_no_balloon() {
        let mut pages = Pages::new(BLOCK);
        for page in [IN_BLOCK, u64::MAX, u64::MAX / 64] {
            assert_eq!(pages.insert(page), None);
            pages.remove(page);
        }
        assert_eq!(pages.save(), [0]);
        assert_eq!(pages.whole(u64::MAX, u64::MAX), None);
    }

    #[test]
    fn whole_blocks_are_restored_and_parts_forgotten() {
        let mut pages = with(&[0, 9, 19]);
        pages.insert(5 * IN_BLOCK);
        let saved = pages.save();
        assert_eq!(saved, [1, 2, 8]);
        let restored = Pages::restored(20 * BLOCK, &saved).unwrap();
        assert_eq!(restored.save(), saved);
        assert_eq!(restored.whole(1, 10), Some(9..10));
    }

    #[test]
    fn blocks_that_ram_does_not_have_are_refused() {
        for blocks in [&[][..], &[0, 0], &[0; 4], &[0, 0, 0x10], &[0xff; 3]] {
            assert!(Pages::restored(20 * BLOCK, blocks).is_err(), "{blocks:?}");
        }
        assert!(Pages::restored(20 * BLOCK, &[0xff, 0xff, 0x0f]).is_ok());
    }
}
