//! Sets of physical memory: what is preserved, what is scratch, what a kernel is loaded into.
//!
//! ```
//! use kho_abi::kernel::Ranges;
//!
//! let mut preserved = Ranges::default();
//! preserved.add(0x1000, 0x1000);
//! preserved.add(0x2000, 0x1000);
//! assert_eq!(preserved.iter().collect::<Vec<_>>(), [0x1000..0x3000]);
//! assert!(preserved.contains(&(0x1800..0x2800)));
//! assert_eq!(preserved.overlap(&(0x2800..0x9000)), Some(0x2800..0x3000));
//! ```

use alloc::collections::BTreeMap;
use core::ops::Range;

/// Ranges of addresses that neither overlap nor touch each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds so many bytes from `start` on, as far as addresses go. What was there already stays.
    pub fn add(&mut self, start: u64, bytes: u64) {
        let (mut start, mut end) = (start, start.saturating_add(bytes));
        if start == end {
            return;
        }
        // All that it touches becomes one with it.
        while let Some((&other, &other_end)) = self.0.range(..=end).next_back().filter(|&(_, &ends)| ends >= start) {
            self.0.remove(&other);
            start = start.min(other);
            end = end.max(other_end);
        }
        self.0.insert(start, end);
    }

    /// How many ranges there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many bytes are in it.
    pub fn bytes(&self) -> u64 {
        self.0.iter().fold(0, |sum, (start, end)| sum.saturating_add(end - start))
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().map(|(start, end)| *start..*end)
    }

    /// Whether all of a range is in it.
    pub fn contains(&self, range: &Range<u64>) -> bool {
        range.is_empty() || self.0.range(..=range.start).next_back().is_some_and(|(_, &end)| end >= range.end)
    }

    /// The first part of a range that is in it.
    pub fn overlap(&self, range: &Range<u64>) -> Option<Range<u64>> {
        if range.is_empty() {
            return None;
        }
        let before = self.0.range(..=range.start).next_back().filter(|&(_, &end)| end > range.start);
        let (&start, &end) = before.or_else(|| self.0.range(range.start..range.end).next())?;
        Some(start.max(range.start)..end.min(range.end))
    }
}

impl FromIterator<Range<u64>> for Ranges {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut all = Self::default();
        for range in ranges {
            all.add(range.start, range.end.saturating_sub(range.start));
        }
        all
    }
}
