//! The scrubber: goes round and round over all free RAM, verifies every word it wrote in the pass before, writes the next one's.

use crate::pattern;
use crate::ranges::{Range, Ranges};

/// The bytes that are checked at each stride: a cache line.
pub const LINE: u64 = 64;
const WORDS: u64 = LINE / 8;
const PAGE: u64 = 4096;

/// Physical memory, as words.
pub trait Memory {
    /// The word at an address.
    fn read(&self, address: u64) -> u64;
    /// Replaces the word at an address.
    fn write(&mut self, address: u64, value: u64);
}

/// A word that is not what was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mismatch {
    /// Where.
    pub address: u64,
    /// What had been written there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
    /// The pass that had written it.
    pub pass: u64,
}

/// The end of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassEnd {
    /// The running checksum over what was read.
    pub sum: u64,
    /// What it has to be, known without reading.
    pub expected: u64,
}

/// Where the scrubber stands.
#[derive(Debug, Clone)]
pub struct Scrubber {
    ranges: Ranges,
    stride: u64,
    range: usize,
    address: u64,
    pass: u64,
    sum: u64,
}

impl Scrubber {
    /// A scrubber over these ranges, whose first pass fills them.
    pub fn new(free: &Ranges, stride: u64) -> Self {
        let mut ranges = Ranges::default();
        for range in free.as_slice() {
            let start = range.start.next_multiple_of(LINE);
            let end = range.end / LINE * LINE;
            ranges.add(Range { start, end });
        }
        let address = ranges.as_slice().first().map_or(0, |range| range.start);
        Scrubber { ranges, stride, range: 0, address, pass: 0, sum: 0 }
    }

    /// How many passes have verified all of RAM; the one that fills it is not one of them.
    pub fn passes(&self) -> u64 {
        self.pass.saturating_sub(1)
    }

    /// The running checksum.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// The address of a word that is verified only after at least a whole slice from now: for the self-test.
    pub fn word_ahead(&self) -> u64 {
        let last = self.ranges.as_slice().last().copied().unwrap_or_default();
        last.start + lines(last, self.stride).saturating_sub(1) * self.stride
    }

    /// Goes on for at most so many lines and stops early at the end of a pass.
    pub fn step(
        &mut self,
        memory: &mut impl Memory,
        budget: u64,
        mut on_mismatch: impl FnMut(Mismatch),
    ) -> Option<PassEnd> {
        for _ in 0..budget {
            let range = *self.ranges.as_slice().get(self.range)?;
            if self.pass == 0 {
                self.fill(memory, range);
            } else {
                self.verify(memory, &mut on_mismatch);
            }
            self.address += self.stride;
            if self.address >= range.end {
                self.range += 1;
                match self.ranges.as_slice().get(self.range) {
                    Some(next) => self.address = next.start,
                    None => return Some(self.wrap()),
                }
            }
        }
        None
    }

    fn wrap(&mut self) -> PassEnd {
        let read = self.pass.checked_sub(1);
        let expected = read.map_or(0, |pass| {
            let sums = self.ranges.as_slice().iter();
            sums.map(|range| pattern::sum(range.start, self.stride, lines(*range, self.stride), WORDS, pass))
                .fold(0, u64::wrapping_add)
        });
        let end = PassEnd { sum: self.sum, expected };
        (self.range, self.pass, self.sum) = (0, self.pass + 1, 0);
        self.address = self.ranges.as_slice().first().map_or(0, |range| range.start);
        end
    }

    fn fill(&self, memory: &mut impl Memory, range: Range) {
        for index in 0..WORDS {
            let address = self.address + index * 8;
            memory.write(address, pattern::word(address, 0));
        }
        // With a wide stride the pages in between are touched once, so that all of RAM is really there and has to be carried.
        let next = (self.address + self.stride).min(range.end);
        let mut page = (self.address + LINE).next_multiple_of(PAGE);
        while page + PAGE <= next {
            memory.write(page, pattern::word(page, 0));
            page += PAGE;
        }
    }

    #[inline(always)]
    fn verify(&mut self, memory: &mut impl Memory, on_mismatch: &mut impl FnMut(Mismatch)) {
        let (before, now) = (self.pass - 1, self.pass);
        for index in 0..WORDS {
            let address = self.address + index * 8;
            let found = memory.read(address);
            let expected = pattern::word(address, before);
            if found != expected {
                on_mismatch(Mismatch { address, expected, found, pass: before });
            }
            self.sum = self.sum.wrapping_add(found);
            memory.write(address, pattern::word(address, now));
        }
    }
}

/// How many lines a range has. Its ends are multiples of a line, so the last one fits.
fn lines(range: Range, stride: u64) -> u64 {
    (range.end - range.start).div_ceil(stride)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::{vec, vec::Vec};

    struct Ram(Vec<u64>);

    impl Memory for Ram {
        fn read(&self, address: u64) -> u64 {
            self.0[address as usize / 8]
        }
        fn write(&mut self, address: u64, value: u64) {
            self.0[address as usize / 8] = value;
        }
    }

    fn free() -> Ranges {
        let mut free = Ranges::default();
        free.add(Range { start: 0x1010, end: 0x9ff8 });
        free.add(Range { start: 0xa000, end: 0xa020 }); // too small for a line
        free.add(Range { start: 0x1_0000, end: 0x3_0000 });
        free
    }

    fn pass(scrubber: &mut Scrubber, ram: &mut Ram) -> (PassEnd, Vec<Mismatch>) {
        let mut found = vec![];
        loop {
            if let Some(end) = scrubber.step(ram, 7, |mismatch| found.push(mismatch)) {
                return (end, found);
            }
        }
    }

    #[test]
    fn untouched_ram_verifies_at_every_stride() {
        for stride in [64, 128, 4096, 4160, 65536] {
            let mut ram = Ram(vec![0; 0x3_0000 / 8]);
            let mut scrubber = Scrubber::new(&free(), stride);
            for number in 0..4 {
                let (end, found) = pass(&mut scrubber, &mut ram);
                assert_eq!((end.sum, found.len()), (end.expected, 0), "stride {stride} pass {number}");
                assert_eq!(scrubber.passes(), number);
            }
        }
    }

    #[test]
    fn stride_of_a_line_covers_every_word() {
        let mut ram = Ram(vec![0; 0x3_0000 / 8]);
        pass(&mut Scrubber::new(&free(), 64), &mut ram);
        let words = (0x1040..0x9fc0).chain(0x1_0000..0x3_0000).step_by(8);
        assert!(words.map(|address| ram.read(address)).all(|word| word != 0));
        assert_eq!((ram.read(0x1008), ram.read(0xa000)), (0, 0));
    }

    #[test]
    fn one_wrong_bit_is_found_where_it_is() {
        let mut ram = Ram(vec![0; 0x3_0000 / 8]);
        let mut scrubber = Scrubber::new(&free(), 4096);
        pass(&mut scrubber, &mut ram);
        let address = scrubber.word_ahead();
        ram.write(address, ram.read(address) ^ 1 << 40);
        let (end, found) = pass(&mut scrubber, &mut ram);
        assert_eq!(found.iter().map(|mismatch| mismatch.address).collect::<Vec<_>>(), [address]);
        assert_ne!(end.sum, end.expected);
        let (end, found) = pass(&mut scrubber, &mut ram);
        assert_eq!((end.sum, found.len()), (end.expected, 0), "reported once, then put right");
    }

    #[test]
    fn pages_swapped_with_each_other_are_found() {
        let mut ram = Ram(vec![0; 0x3_0000 / 8]);
        let mut scrubber = Scrubber::new(&free(), 4096);
        pass(&mut scrubber, &mut ram);
        for word in 0..512 {
            ram.0.swap(0x1_0000 / 8 + word, 0x2_0000 / 8 + word);
        }
        let (end, found) = pass(&mut scrubber, &mut ram);
        assert_eq!(found.len(), 16);
        assert_eq!(end.sum, end.expected, "a swap leaves the sum as it was: words are compared one by one too");
    }

    #[test]
    fn wide_stride_touches_every_page_once() {
        let mut ram = Ram(vec![0; 0x3_0000 / 8]);
        pass(&mut Scrubber::new(&free(), 0x8000), &mut ram);
        for page in (0x1_0000..0x3_0000).step_by(4096) {
            assert_ne!(ram.read(page), 0, "{page:#x}");
        }
    }

    #[test]
    fn no_free_ram_is_no_work() {
        let mut scrubber = Scrubber::new(&Ranges::default(), 64);
        assert_eq!(scrubber.step(&mut Ram(vec![]), 10, |_| ()), None);
    }
}
