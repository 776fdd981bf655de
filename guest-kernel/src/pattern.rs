//! The values the oracle leaves behind and expects to find again.

const ADDRESS: u64 = 0x9e37_79b9_7f4a_7c15;
const PASS: u64 = 0xd6e8_feb8_6659_fd93;
const BASE: u64 = 0x5851_f42d_4c95_7f2d;

/// What the 64-bit word at a physical address holds after a pass.
///
/// Linear, with odd factors: no two addresses share a value in a pass, no address keeps its value in the next, and the sum over
/// evenly spaced words is known without reading them.
#[inline(always)]
pub const fn word(address: u64, pass: u64) -> u64 {
    (address / 8).wrapping_mul(ADDRESS).wrapping_add(pass.wrapping_mul(PASS)).wrapping_add(BASE)
}

/// The sum of [`word`] over `lines` lines of `words` words each, the first line at `first`, the lines `stride` bytes apart.
pub const fn sum(first: u64, stride: u64, lines: u64, words: u64, pass: u64) -> u64 {
    // All is modulo 2^64; the two halvings are exact only before the reduction, hence u128.
    let (n, w) = (lines as u128, words as u128);
    let starts =
        (n * (first / 8) as u128).wrapping_add((n * n.saturating_sub(1) / 2).wrapping_mul((stride / 8) as u128));
    let indices = starts.wrapping_mul(w).wrapping_add(n * (w * w.saturating_sub(1) / 2)) as u64;
    let constant = pass.wrapping_mul(PASS).wrapping_add(BASE);
    indices.wrapping_mul(ADDRESS).wrapping_add(constant.wrapping_mul((n * w) as u64))
}

/// Scrambles all bits of a number (the finisher of SplitMix64): for register patterns and for the tick's chain.
#[inline(always)]
pub const fn scramble(value: u64) -> u64 {
    let value = value.wrapping_add(ADDRESS);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sum_equals_adding_up_the_words() {
        for (first, stride, lines, words, pass) in
            [(0, 64, 1, 8, 0), (0x10_0000, 4096, 1000, 8, 3), (0x1_0000_0040, 64, 4097, 8, 77), (0x2000, 4160, 0, 8, 1)]
        {
            let mut expected = 0u64;
            for line in 0..lines {
                for index in 0..words {
                    expected = expected.wrapping_add(word(first + line * stride + index * 8, pass));
                }
            }
            assert_eq!(sum(first, stride, lines, words, pass), expected, "{first:#x} {stride} {lines}");
        }
    }

    #[test]
    fn words_differ_between_neighbours_pages_and_passes() {
        let here = word(0x20_0000, 5);
        for (address, pass) in
            [(0x20_0008, 5), (0x20_1000, 5), (0x40_0000, 5), (0x1_0020_0000, 5), (0x20_0000, 6), (0x20_0000, 4)]
        {
            assert_ne!(word(address, pass), here);
        }
    }
}
