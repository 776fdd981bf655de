//! What a driver tells of its guest's memory: pairs of a tag and a value.

use virtio_queue::Reader;

/// The names of the tags in the order of their numbers (virtio 1.2, 5.5.6.4, and those that Linux has added).
const NAMES: [&str; 16] = [
    "swap_in_bytes",
    "swap_out_bytes",
    "major_faults",
    "minor_faults",
    "free_bytes",
    "total_bytes",
    "available_bytes",
    "caches_bytes",
    "huge_allocations",
    "huge_allocation_failures",
    "oom_kills",
    "allocation_stalls",
    "async_scan_bytes",
    "direct_scan_bytes",
    "async_reclaim_bytes",
    "direct_reclaim_bytes",
];

/// Bytes of a pair: a tag of two, little-endian, and a value of eight.
const PAIR: usize = 10;
/// A driver may tell some more than are known, in any order.
const PAIRS_MAX: usize = 64;

/// The latest value of each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics([Option<u64>; NAMES.len()]);

impl Statistics {
    /// What is in a driver's buffer; what is not known, and what is no whole pair, is left out.
    pub fn read(reader: &mut Reader<'_>) -> Self {
        let mut bytes = [0; PAIR * PAIRS_MAX];
        let length = reader.available_bytes().min(bytes.len());
        let filled = &mut bytes[..length];
        match std::io::Read::read_exact(reader, filled) {
            Ok(()) => Self::parse(filled),
            Err(_) => Self::default(),
        }
    }

    fn parse(bytes: &[u8]) -> Self {
        let mut values = [None; NAMES.len()];
        for &[tag_low, tag_high, ref value @ ..] in bytes.as_chunks::<PAIR>().0 {
            let tag = u16::from_le_bytes([tag_low, tag_high]);
            if let Some(place) = values.get_mut(usize::from(tag)) {
                *place = Some(u64::from_le_bytes(*value));
            }
        }
        Self(values)
    }

    /// Names and values of what was told.
    pub fn named(&self) -> Vec<(&'static str, u64)> {
        NAMES.into_iter().zip(self.0).filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }

    #[test]
    fn known_tags_are_told_by_name_in_any_order_the_last_one_counts() {
        let told = [pair(15, 3), pair(4, 1), pair(16, 9), pair(0xffff, 9), pair(4, u64::MAX)].concat();
        assert_eq!(Statistics::parse(&told).named(), [("free_bytes", u64::MAX), ("direct_reclaim_bytes", 3)]);
    }

    #[test]
    fn lengths_that_are_not_of_whole_pairs_lose_only_the_rest() {
        let told = [pair(0, 7), pair(1, 8)].concat();
        for length in 0..=told.len() {
            let known = Statistics::parse(&told[..length]).named();
            assert_eq!(known.len(), length / PAIR, "{length}");
        }
    }
}
