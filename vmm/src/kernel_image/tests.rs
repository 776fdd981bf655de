use std::io::Write;

use flate2::write::GzEncoder;
use proptest::prelude::*;

use super::*;

/// An ELF file for x86_64 with the text of a kernel.
fn elf(text: &str) -> Vec<u8> {
    let mut kernel = vec![0; 64];
    kernel[..4].copy_from_slice(b"\x7fELF");
    kernel[18] = 62;
    kernel.extend_from_slice(text.as_bytes());
    kernel.extend_from_slice(b"\0IKCFG_ST");
    let mut packed = GzEncoder::new(Vec::new(), flate2::Compression::default());
    packed.write_all(b"# a comment\nCONFIG_KEXEC_HANDOVER=y\nCONFIG_KVM=m\n# CONFIG_LIVEUPDATE is not set\n").unwrap();
    kernel.extend(packed.finish().unwrap());
    kernel
}

const TEXT: &str =
    "Linux version %s (%s)\0Linux version 7.2.12-lab (a@b) #1\0kho-v4\0luo-v5\0memfd-v2\0not-a-kho-v\0luo-v5x";

#[test]
fn half_an_image_is_cut_short() {
    let mut image = vec![0; 4096];
    image[0x38..0x3c].copy_from_slice(b"ARM\x64");
    image[0x10..0x18].copy_from_slice(&5000_u64.to_le_bytes());
    assert_eq!(KernelImage::read(&image).unwrap().memory, Some(5000));
    assert!(matches!(KernelImage::read(&image[..2048]), Err(ImageError::Truncated { length: 2048, .. })));
}

/// A bzImage around a payload.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 2 * 512];
    file[0x1f1] = 1;
    file[0x202..0x206].copy_from_slice(b"HdrS");
    let paragraphs = ((32 + payload.len() as u32).div_ceil(16)).to_le_bytes();
    file[0x1f4..0x1f8].copy_from_slice(&paragraphs);
    file[0x248] = 32;
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file.extend_from_slice(&[0; 32]);
    file.extend_from_slice(payload);
    file.resize(file.len().next_multiple_of(16), 0);
    file
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = GzEncoder::new(Vec::new(), flate2::Compression::default());
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

fn with_size(mut packed: Vec<u8>, size: usize) -> Vec<u8> {
    packed.extend_from_slice(&(size as u32).to_le_bytes());
    packed
}

#[test]
fn content_is_told_of_a_plain_kernel() {
    let image = KernelImage::read(&elf(TEXT)).unwrap();
    assert_eq!((image.form, image.compression), ("ELF file", None));
    let content = image.content;
    assert_eq!(content.architecture, Architecture::X86_64);
    assert_eq!(content.release.as_deref(), Some("7.2.12-lab"));
    assert_eq!(content.page_size, Some(4096));
    assert_eq!(content.formats.iter().collect::<Vec<_>>(), ["kho-v4", "luo-v5", "memfd-v2"]);
    assert_eq!(versions(&content.formats, "kho").collect::<Vec<_>>(), ["kho-v4"]);
    let config = content.config.unwrap();
    assert!(config.has("KEXEC_HANDOVER") && config.has("KVM") && !config.has("LIVEUPDATE"));
}

#[test]
fn a_kernel_is_found_in_every_wrapper() {
    let kernel = elf(TEXT);
    let lz4 = {
        let block = lz4_flex::block::compress(&kernel);
        [&[0x02, 0x21, 0x4c, 0x18][..], &(block.len() as u32).to_le_bytes(), &block].concat()
    };
    let bzip2 = {
        let mut packed = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::default());
        packed.write_all(&kernel).unwrap();
        packed.finish().unwrap()
    };
    let payloads = [
        (Compression::Gzip, gzip(&kernel)),
        (Compression::Lz4, with_size(lz4, kernel.len())),
        (Compression::Bzip2, with_size(bzip2, kernel.len())),
    ];
    for (compression, payload) in payloads {
        let image = KernelImage::read(&bzimage(&payload)).unwrap_or_else(|error| panic!("{compression:?}: {error:?}"));
        assert_eq!((image.form, image.compression), ("bzImage", Some(compression)));
        assert_eq!(image.content.release.as_deref(), Some("7.2.12-lab"), "{compression:?}");
    }
    let payload = gzip(&kernel);
    let mut zboot = b"MZ\0\0zimg".to_vec();
    zboot.extend_from_slice(&64_u32.to_le_bytes());
    zboot.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    zboot.resize(64, 0);
    zboot.extend_from_slice(&payload);
    assert_eq!(KernelImage::read(&zboot).unwrap().form, "EFI zboot");
    assert_eq!(KernelImage::read(&payload).unwrap().form, "compressed kernel");
    for file in [bzimage(&payload), zboot] {
        let length = file.len() - 40;
        assert!(matches!(KernelImage::read(&file[..length]), Err(ImageError::Truncated { .. })));
    }
}

#[test]
fn blocks_of_lzop_are_put_together() {
    let mut file = b"\x89LZO\0\r\n\x1a\n".to_vec();
    file.extend_from_slice(&[0x10, 0x30, 0x20, 0xa0, 0x09, 0x40, 3, 9]);
    // A checksum of what comes out, no name.
    file.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    // 64 zeros: a literal, a match, the end of the stream.
    let packed = [0x12, 0, 0x20, 0x1e, 0, 0, 0x11, 0, 0];
    for (unpacked, block) in [(5_u32, &b"plain"[..]), (64, &packed)] {
        file.extend_from_slice(&unpacked.to_be_bytes());
        file.extend_from_slice(&(block.len() as u32).to_be_bytes());
        file.extend_from_slice(&[0; 4]);
        file.extend_from_slice(block);
    }
    file.extend_from_slice(&[0; 4]);
    let content = Compression::Lzo.unpack(&file).unwrap();
    assert_eq!(content.get(..5), Some(&b"plain"[..]));
    assert!(content.get(5..).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn what_is_no_kernel_is_refused() {
    for file in [&b""[..], b"MZ", b"#!/bin/sh", &[0; 4096]] {
        assert!(matches!(KernelImage::read(file), Err(ImageError::Unknown)));
    }
    assert!(matches!(KernelImage::read(&gzip(b"text")), Err(ImageError::Unknown)));
    let mut cut = gzip(&elf(TEXT));
    cut.truncate(cut.len() - 20);
    assert!(matches!(KernelImage::read(&cut), Err(ImageError::Compressed { .. })));
}

proptest! {
    #[test]
    fn damage_never_panics(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
        magic in proptest::sample::select(vec![&b"\x5d\0\0"[..], b"\xfd7zXZ\0", b"\x89LZO\0", b"\x02\x21\x4c\x18", b"\x28\xb5\x2f\xfd", b"BZh9"]),
        tail in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut file = bzimage(&gzip(&elf(TEXT)));
        for (at, byte) in flips {
            let at = at.index(file.len());
            file[at] = byte;
        }
        let _ = KernelImage::read(&file);
        let _ = KernelImage::read(&[magic, &tail].concat());
    }
}
