//! The next kernel's initial RAM file system: whether there is a `vmm` in it, and one that reads what this one writes.
//!
//! It consists of cpio archives behind each other, each as it is or compressed.

use std::collections::BTreeSet;
use std::io;

use kho_abi::document::machine::MachineV3;
use kho_abi::document::record::Record;

use super::Finding;
use crate::kernel_image::Compression;

const CHECK: &str = "next-initrd";
/// An entry's header: the magic and 13 numbers of 8 digits.
const HEADER: usize = 110;

/// What is in it.
pub fn check(bytes: &[u8]) -> Finding {
    let mut found = Found::default();
    if let Err(error) = archives(bytes, false, &mut found) {
        return Finding::failure(CHECK, format!("it cannot be read: {error}"), "give an initramfs in cpio's format");
    }
    let writes = MachineV3::COMPATIBLE;
    match found.programs.as_slice() {
        [] => Finding::warning(
            CHECK,
            format!("none of its {} files is a vmm", found.files.len()),
            "guests wait until `vmm restore --all` runs from the root file system",
        ),
        programs if programs.iter().any(|program| program.reads(writes)) => {
            Finding::ok(CHECK, format!("its vmm reads {writes}, which this one writes"))
        }
        [program, ..] => Finding::failure(
            CHECK,
            format!("its /{} does not read {writes}, which this one writes", program.path),
            "put a vmm into it that is not older than this one",
        ),
    }
}

#[derive(Default)]
struct Found {
    files: BTreeSet<String>,
    programs: Vec<Program>,
}

/// Something called `vmm`.
struct Program {
    path: String,
    content: Vec<u8>,
}

impl Program {
    /// Names of versions are text in the program.
    fn reads(&self, compatible: &str) -> bool {
        memchr::memmem::find(&self.content, compatible.as_bytes()).is_some()
    }
}

/// Within what is compressed the kernel takes nothing compressed, and something could unpack to itself for ever.
fn archives(bytes: &[u8], within: bool, found: &mut Found) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        if rest.starts_with(b"070701") || rest.starts_with(b"070702") {
            rest = archive(rest, found)?;
        } else if let Some(compression) = Compression::detect(rest).filter(|_| !within) {
            // The kernel would look for more behind it, but no tool puts anything there: what has to come first is not compressed.
            let unpacked = compression.unpack(rest)?;
            return archives(&unpacked, true, found);
        } else if rest[0] == 0 {
            rest = &rest[1..];
        } else {
            return Err(io::Error::other("there is something that is no archive"));
        }
    }
    Ok(())
}

/// One archive; gives what is behind it. Not with the crate `cpio`, which takes a file that ends too early for whole, and refuses names
/// that are no text.
fn archive<'a>(bytes: &'a [u8], found: &mut Found) -> io::Result<&'a [u8]> {
    let cut = || io::Error::other("an archive in it is cut short");
    let mut at = 0;
    loop {
        let header = bytes.get(at..at + HEADER).ok_or_else(cut)?;
        let field = |number: usize| {
            let digits =
                header.get(6 + 8 * number..14 + 8 * number).and_then(|digits| std::str::from_utf8(digits).ok());
            digits.and_then(|digits| usize::from_str_radix(digits, 16).ok()).ok_or_else(cut)
        };
        let (size, name_size) = (field(6)?, field(11)?);
        let name_at = at + HEADER;
        let content_at = (name_at.checked_add(name_size).ok_or_else(cut)?).next_multiple_of(4);
        let end = content_at.checked_add(size).ok_or_else(cut)?;
        let name = bytes.get(name_at..name_at + name_size).ok_or_else(cut)?;
        let name = String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();
        let content = bytes.get(content_at..end).ok_or_else(cut)?;
        at = end.next_multiple_of(4);
        if name == "TRAILER!!!" {
            return Ok(bytes.get(at..).unwrap_or_default());
        }
        if !content.is_empty() && name.rsplit('/').next() == Some("vmm") {
            found
                .programs
                .push(Program { path: name.trim_start_matches(['.', '/']).to_owned(), content: content.to_vec() });
        }
        found.files.insert(name);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::Verdict;
    use super::*;

    fn entry(name: &str, content: &[u8]) -> Vec<u8> {
        let numbers = [1, 0o100755, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        let mut bytes = b"070701".to_vec();
        numbers.iter().for_each(|number| write!(bytes, "{number:08X}").unwrap());
        bytes.extend_from_slice(name.as_bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn archive_of(entries: &[(&str, &[u8])]) -> Vec<u8> {
        entries.iter().chain(&[("TRAILER!!!", &b""[..])]).flat_map(|(name, content)| entry(name, content)).collect()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        packed.write_all(bytes).unwrap();
        packed.finish().unwrap()
    }

    fn program() -> Vec<u8> {
        format!("\x7fELF...{}...", MachineV3::COMPATIBLE).into_bytes()
    }

    #[test]
    fn a_vmm_that_reads_the_document_is_found_in_any_archive() {
        let first = archive_of(&[("kernel/x86/microcode/a.bin", b"1")]);
        let second = archive_of(&[("init", b"#!"), ("usr/bin/vmm", &program())]);
        let packed = gzip(&second);
        for initrd in [second.clone(), [&first[..], &[0; 9], &second].concat(), [&first[..], &packed].concat()] {
            assert_eq!(check(&initrd).verdict, Verdict::Ok);
        }
    }

    #[test]
    fn an_older_vmm_is_refused_and_none_is_a_warning() {
        let older = archive_of(&[("bin/vmm", b"\x7fELF...kho-vmm,vm-v1...")]);
        let finding = check(&older);
        assert_eq!(finding.verdict, Verdict::Failure);
        assert!(finding.found.contains("/bin/vmm"), "{finding}");
        assert_eq!(check(&archive_of(&[("init", b"#!"), ("bin/vmm", b"")])).verdict, Verdict::Warning);
    }

    #[test]
    fn what_is_compressed_twice_is_refused() {
        let finding = check(&gzip(&gzip(&archive_of(&[("bin/vmm", &program())]))));
        assert_eq!(finding.verdict, Verdict::Failure, "{finding}");
    }

    #[test]
    fn what_is_no_archive_or_half_of_one_is_refused() {
        let whole = archive_of(&[("bin/vmm", &program())]);
        for bytes in [&b"#!/bin/sh"[..], &whole[..whole.len() - 20], &whole[..150], b"070701"] {
            assert_eq!(check(bytes).verdict, Verdict::Failure);
        }
    }
}
