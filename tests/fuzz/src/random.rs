//! Choices that follow from libFuzzer's seed alone, so that a run can be repeated.

/// Where choices come from.
pub struct Random(u64);

impl Random {
    /// The same seed makes the same choices.
    pub fn new(seed: u32) -> Self {
        Self(seed.into())
    }

    /// SplitMix64.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `end`; 0 where there is none.
    pub fn below(&mut self, end: usize) -> usize {
        (self.number() % end.max(1) as u64) as usize
    }

    /// A number for a field of so many bytes: small, of all ones, near a power of two, in whole pages; or any.
    pub fn limit(&mut self, width: usize) -> u64 {
        let bit = self.below(8 * width);
        match self.below(5) {
            0 => self.below(32) as u64,
            1 => u64::MAX << bit,
            2 => (1_u64 << bit).wrapping_sub(self.below(2) as u64),
            3 => self.number() >> bit & !0xfff,
            _ => self.number(),
        }
    }

    /// One of some.
    pub fn one<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        of.get(self.below(of.len()))
    }
}

/// libFuzzer's own ways of changing bytes, which know what they were compared with. There may be `room` more of them.
pub fn changed(bytes: &[u8], room: usize) -> Vec<u8> {
    let mut buffer = bytes.to_vec();
    buffer.resize(bytes.len() + room, 0);
    let (size, most) = (bytes.len(), buffer.len());
    let size = libfuzzer_sys::fuzzer_mutate(&mut buffer, size, most);
    buffer.truncate(size);
    buffer
}

/// Puts the next input in place, unless it is too large. Returns its size.
pub fn put(input: &mut [u8], size: usize, next: &[u8]) -> usize {
    match input.get_mut(..next.len()) {
        Some(room) => {
            room.copy_from_slice(next);
            next.len()
        }
        None => size,
    }
}
