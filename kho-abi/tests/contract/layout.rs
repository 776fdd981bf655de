//! The header, raw payloads and names, byte by byte.

use kho_abi::document::header::{CAP, Kind, SIZE};
use kho_abi::document::{EncodeError, HeaderError, PayloadError, header, payload};
use kho_abi::{names, uapi};

/// CRC-64/XZ from its definition, one bit at a time.
fn crc_64_xz(bytes: &[u8]) -> u64 {
    !bytes.iter().fold(u64::MAX, |sum, &byte| {
        (0..8).fold(sum ^ u64::from(byte), |sum, _| (sum >> 1) ^ if sum & 1 == 1 { 0xc96c_5795_d787_0f42 } else { 0 })
    })
}

#[test]
fn the_header_is_laid_out_as_documented() {
    assert_eq!(crc_64_xz(b"123456789"), 0x995d_c9bb_df19_39fa);
    let mut expected = b"KHOVMDOC\x01\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0body".to_vec();
    let sum = crc_64_xz(&expected);
    expected[24..32].copy_from_slice(&sum.to_le_bytes());
    assert_eq!(header::seal(b"body").unwrap(), expected);
}

#[test]
fn the_header_is_checked_in_its_order() {
    let sealed = header::seal(b"body").unwrap();
    let mut wrong = sealed.clone();
    wrong.extend([0, 0, 7]);
    assert_eq!(header::open(&wrong), Err(HeaderError::Tail { offset: SIZE + 6 }));
    wrong[SIZE] ^= 1;
    assert!(matches!(header::open(&wrong), Err(HeaderError::Checksum { .. })));
    wrong[23] = 1;
    assert_eq!(header::open(&wrong), Err(HeaderError::Length { stated: 1 << 56 | 4, available: 7 }));
    wrong[15] = 1;
    assert_eq!(header::open(&wrong), Err(HeaderError::Reserved { found: 1 << 24 }));
    wrong[8] = 2;
    assert_eq!(header::open(&wrong), Err(HeaderError::Version { found: 2, supported: 1 }));
    wrong[0] = b'k';
    let magic = HeaderError::Magic { expected: *b"KHOVMDOC", found: *b"kHOVMDOC" };
    assert_eq!(header::open(&wrong), Err(magic));
    wrong.resize(CAP + 1, 0);
    assert_eq!(header::open(&wrong), Err(HeaderError::TooLarge { length: CAP + 1, cap: CAP }));
}

#[test]
fn a_file_that_was_never_written_says_so() {
    let error = header::open(&[0; 4096]).unwrap_err();
    assert_eq!(error.to_string(), r#"it begins with "\x00\x00\x00\x00\x00\x00\x00\x00" instead of "KHOVMDOC""#);
}

#[test]
fn an_index_is_no_document_and_the_other_way_round() {
    let index = header::seal_as(Kind::Index, b"body").unwrap();
    assert_eq!(header::open_as(Kind::Index, &index), Ok(&b"body"[..]));
    assert!(matches!(header::open(&index), Err(HeaderError::Magic { .. })));
    let document = header::seal(b"body").unwrap();
    assert!(matches!(header::open_as(Kind::Index, &document), Err(HeaderError::Magic { .. })));
}

#[test]
fn the_length_is_told_by_the_header_alone() {
    let sealed = header::seal(b"body").unwrap();
    assert_eq!(header::length(&sealed[..SIZE]), Some(SIZE as u64 + 4));
    assert_eq!(header::length(&sealed[..SIZE - 1]), None);
    assert_eq!(header::length(&[0xff; SIZE]), None);
}

#[test]
fn a_body_beyond_the_cap_is_not_sealed() {
    assert!(header::seal(&vec![1; CAP - SIZE]).is_ok());
    let error = EncodeError::TooLarge { length: CAP + 1, cap: CAP };
    assert_eq!(header::seal(&vec![1; CAP - SIZE + 1]), Err(error));
}

#[test]
fn a_shorter_payload_is_padded_and_a_longer_one_must_end_in_zeros() {
    assert_eq!(payload::fit(&[1, 2], 4), Ok(vec![1, 2, 0, 0]));
    assert_eq!(payload::fit(&[1, 2], 2), Ok(vec![1, 2]));
    assert_eq!(payload::fit(&[1, 2, 0, 0], 2), Ok(vec![1, 2]));
    assert_eq!(payload::fit(&[1, 2, 0, 3], 2), Err(PayloadError { expected: 2, found: 4, offset: 3 }));
    assert_eq!(payload::fit(&[], 0), Ok(vec![]));
}

#[test]
fn vm_names_are_safe_in_paths_and_sessions() {
    let longest = "x".repeat(names::VM_NAME_MAX);
    for name in ["a", "0", "web-1", "A_b", &longest] {
        assert_eq!(names::session_name(name), Some(format!("kho-vmm.{name}")));
        assert!(uapi::session_name(&names::session_name(name).unwrap()).is_some());
    }
    for name in ["", "-a", "_a", ".", "..", "a.b", "a/b", "a b", "ä", "a\0", &(longest.clone() + "x")] {
        assert_eq!(names::session_name(name), None, "{name:?}");
    }
}

#[test]
fn a_session_name_leaves_room_for_its_nul() {
    assert_eq!(uapi::session_name("ab").unwrap()[..4], *b"ab\0\0");
    assert_eq!(uapi::session_name(&"x".repeat(63)).unwrap()[62..], *b"x\0");
    assert_eq!(uapi::session_name(&"x".repeat(64)), None);
    assert_eq!(uapi::session_name(&"x".repeat(65)), None);
    assert_eq!(uapi::session_name(""), None);
    assert_eq!(uapi::session_name("a\0b"), None);
}
