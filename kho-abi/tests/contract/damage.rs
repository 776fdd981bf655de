//! Bytes that have changed, are missing, or never were a document: an error, never a panic.

use std::sync::LazyLock;

use kho_abi::document::index::IndexV2;
use kho_abi::document::machine::MachineV3;
use kho_abi::document::node::Node;
use kho_abi::document::{DocumentError, HeaderError, fdt, header};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::{CHEAP, TREES, cases, sample};

/// Zeros behind the document, as in a state memfd.
const TAIL: usize = 64;

static SMALL: LazyLock<Vec<u8>> = LazyLock::new(|| sample::small_machine().to_bytes().unwrap());
static INDEX: LazyLock<Vec<u8>> = LazyLock::new(|| sample::index().to_bytes().unwrap());
static GOLDEN: LazyLock<Vec<u8>> = LazyLock::new(|| sample::machine().to_bytes().unwrap());

fn refuses_everything(bytes: &[u8]) -> bool {
    MachineV3::from_bytes(bytes).is_err() && IndexV2::from_bytes(bytes).is_err() && fdt::read(bytes).is_err()
}

/// `length` bytes that follow from `seed` (xorshift): far cheaper than a strategy for each byte.
fn random(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// A tree whose header is right and whose structure block is made of `words`; there are two names, at 0 and 2.
fn tree_of_words(words: &[u32]) -> Vec<u8> {
    let (structure, strings) = (words.len() as u32 * 4, b"a\0b\0");
    let end = 56 + structure;
    let total = end + strings.len() as u32;
    let header = [0xd00d_feed, total, 56, end, 40, 17, 16, 0, strings.len() as u32, structure, 0, 0, 0, 0];
    let mut bytes: Vec<u8> = header.iter().chain(words).flat_map(|word| word.to_be_bytes()).collect();
    bytes.extend(strings);
    bytes
}

#[test]
fn a_tree_of_words_is_one_that_can_be_read() {
    let words = [1, 0, 3, 1, 2, 0x0700_0000, 1, 0x6162_0000, 2, 2, 9];
    let child = Node::new("ab");
    assert_eq!(fdt::read(&tree_of_words(&words)).unwrap(), Node::new("").with_u8("b", 7).with_child(child));
}

#[test]
fn every_single_bit_flip_is_refused() {
    for document in [&*SMALL, &*INDEX] {
        let mut bytes = document.clone();
        bytes.resize(bytes.len() + TAIL, 0);
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(refuses_everything(&bytes), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

#[test]
fn a_truncation_at_any_length_is_refused() {
    for document in [&*GOLDEN, &*SMALL, &*INDEX] {
        for length in 0..document.len() {
            assert!(refuses_everything(&document[..length]), "{length} of {} bytes", document.len());
        }
    }
}

#[test]
fn a_body_truncated_at_any_length_before_it_was_sealed_is_refused() {
    let body = header::open(&SMALL).unwrap();
    for length in 0..body.len() {
        let error = MachineV3::from_bytes(&header::seal(&body[..length]).unwrap()).unwrap_err();
        assert!(matches!(error, DocumentError::Body(_)), "{length} bytes: {error}");
    }
}

#[test]
fn zeros_behind_the_document_are_accepted_up_to_the_cap() {
    let mut bytes = GOLDEN.clone();
    bytes.resize(header::CAP, 0);
    assert_eq!(MachineV3::from_bytes(&bytes).unwrap(), sample::machine());
    bytes.push(0);
    let error = HeaderError::TooLarge { length: header::CAP + 1, cap: header::CAP };
    assert_eq!(MachineV3::from_bytes(&bytes).unwrap_err(), DocumentError::Header(error));
}

proptest! {
    #![proptest_config(cases(CHEAP))]

    #[test]
    fn a_bit_flipped_anywhere_is_refused(at in 0..SMALL.len() + TAIL, bit in 0..8_u32) {
        let mut bytes = SMALL.clone();
        bytes.resize(bytes.len() + TAIL, 0);
        bytes[at] ^= 1_u8 << bit;
        prop_assert!(MachineV3::from_bytes(&bytes).is_err());
    }

    #[test]
    fn random_bytes_are_refused(seed: u64, length in 0..300_usize) {
        prop_assert!(refuses_everything(&random(seed, length)));
    }

    #[test]
    fn random_bytes_in_a_good_seal_are_refused(seed: u64, length in 0..300_usize) {
        let sealed = header::seal(&random(seed, length)).unwrap();
        prop_assert!(matches!(MachineV3::from_bytes(&sealed), Err(DocumentError::Body(_))));
    }

    /// Some of these are trees: those can be written again.
    #[test]
    fn random_tokens_in_a_good_tree_header_never_panic(seed: u64, length in 0..24_usize) {
        const WORDS: [u32; 16] = [1, 1, 1, 2, 2, 2, 3, 9, 0, 0, 0, 4, 2, 5, u32::from_be_bytes(*b"ab\0\0"), u32::MAX];
        let random = random(seed, length);
        let words = random.iter().map(|byte| WORDS[usize::from(byte % 16)]);
        let bytes = tree_of_words(&[1, 0].into_iter().chain(words).chain([2, 9]).collect::<Vec<_>>());
        if let Ok(node) = fdt::read(&bytes) {
            prop_assert_eq!(fdt::read(&fdt::write(&node).unwrap()).unwrap(), node);
        }
        prop_assert!(MachineV3::from_bytes(&header::seal(&bytes).unwrap()).is_err());
    }

    /// What a hostile writer can do: any change, under a checksum that is right. It may make another machine of it,
    /// which then is one that can be written and read like any.
    #[test]
    fn changes_in_a_good_seal_are_refused_or_make_another_machine(changes in vec((0..SMALL.len() - header::SIZE, any::<u8>()), 1..4)) {
        let mut body = header::open(&SMALL).unwrap().to_vec();
        for (at, byte) in changes {
            body[at] = byte;
        }
        if let Ok(machine) = MachineV3::from_bytes(&header::seal(&body).unwrap()) {
            prop_assert_eq!(MachineV3::from_bytes(&machine.to_bytes().unwrap()).unwrap(), machine);
        }
    }

}

proptest! {
    #![proptest_config(cases(TREES))]

    /// Words of the structure block replaced by words that mean something there, so that the parser gets further.
    #[test]
    fn shuffled_tokens_in_a_good_seal_never_panic(
        changes in vec((0..(SMALL.len() - header::SIZE) / 4, prop::sample::select(&[0_u32, 1, 2, 3, 4, 9, 16, 17, u32::MAX])), 1..6)
    ) {
        let mut body = header::open(&SMALL).unwrap().to_vec();
        for (word, token) in changes {
            body[word * 4..word * 4 + 4].copy_from_slice(&token.to_be_bytes());
        }
        if let Ok(node) = fdt::read(&body) {
            prop_assert_eq!(fdt::read(&fdt::write(&node).unwrap()).unwrap(), node);
        }
    }
}
