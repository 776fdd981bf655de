//! A small sorted set of address ranges: the RAM the memory map names, less what is in use.

/// How many ranges a set can hold: more than any memory map we boot on has.
const CAPACITY: usize = 64;

/// Addresses from `start` up to, not including, `end`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Range {
    /// The first address.
    pub start: u64,
    /// The address after the last.
    pub end: u64,
}

/// A set of ranges that do not overlap.
#[derive(Debug, Clone)]
pub struct Ranges {
    entries: [Range; CAPACITY],
    count: usize,
}

impl Default for Ranges {
    fn default() -> Self {
        Ranges { entries: [Range::default(); CAPACITY], count: 0 }
    }
}

impl Ranges {
    /// The ranges.
    pub fn as_slice(&self) -> &[Range] {
        &self.entries[..self.count]
    }

    /// The sum of their sizes in bytes.
    pub fn bytes(&self) -> u64 {
        self.as_slice().iter().map(|range| range.end - range.start).sum()
    }

    /// The address after the last one of all.
    pub fn end(&self) -> u64 {
        self.as_slice().iter().map(|range| range.end).max().unwrap_or(0)
    }

    /// Whether a range has an address in common with the set.
    pub fn overlaps(&self, range: Range) -> bool {
        self.as_slice().iter().any(|entry| entry.start < range.end && range.start < entry.end)
    }

    /// Adds a range; empty ones and those beyond the capacity are left out. The caller sees to it that none overlap.
    pub fn add(&mut self, range: Range) {
        if range.start < range.end && self.count < CAPACITY {
            self.entries[self.count] = range;
            self.count += 1;
        }
    }

    /// Takes a range out of the set.
    pub fn remove(&mut self, hole: Range) {
        let before = core::mem::take(self);
        for range in before.as_slice() {
            if hole.end <= range.start || range.end <= hole.start {
                self.add(*range);
            } else {
                self.add(Range { start: range.start, end: hole.start });
                self.add(Range { start: hole.end, end: range.end });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> Range {
        Range { start, end }
    }

    #[test]
    fn removing_cuts_splits_and_leaves_alone() {
        let mut ranges = Ranges::default();
        ranges.add(range(0x1000, 0x9000));
        ranges.add(range(0x10000, 0x20000));
        ranges.add(range(0x30000, 0x30000));
        ranges.remove(range(0x0, 0x2000));
        ranges.remove(range(0x14000, 0x15000));
        ranges.remove(range(0x1f000, 0x40000));
        ranges.remove(range(0x9000, 0x10000));
        assert_eq!(ranges.as_slice(), [range(0x2000, 0x9000), range(0x10000, 0x14000), range(0x15000, 0x1f000)]);
        assert_eq!((ranges.bytes(), ranges.end()), (0x7000 + 0x4000 + 0xa000, 0x1f000));
        assert!(ranges.overlaps(range(0x13fff, 0x14001)));
        assert!(!ranges.overlaps(range(0x14000, 0x15000)));
    }

    #[test]
    fn removing_everything_leaves_nothing() {
        let mut ranges = Ranges::default();
        ranges.add(range(0x1000, 0x2000));
        ranges.remove(range(0, u64::MAX));
        assert!(ranges.as_slice().is_empty());
    }
}
