//! `vmm rescue`: what is left of a VM that cannot be restored, as a file. An ELF core dump, which debuggers and `crash` read: a
//! segment for each range of the guest's memory at its physical address, and the document as a note.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use kho_abi::document::machine::MachineV3;
use kho_abi::document::memory::RamRangeV1;
use serde_json::json;
use zerocopy::IntoBytes;

use super::report::{self, Report};
use crate::arch;
use crate::cli::{RescueArgs, status};
use crate::control::interface::RamFile;
use crate::control::keeper::KeeperClient;
use crate::control::socket::RunDir;
use crate::elf::{self, FileHeader, SegmentHeader};

/// Whose notes they are, and the kind of note that is a document.
const OWNER: &[u8; 8] = b"kho-vmm\0";
const DOCUMENT: u32 = 1;
/// What is copied at once, and left out where it is zero.
const PIECE: usize = 64 << 10;
/// Where segments begin.
const ALIGN: u64 = 4096;

/// A range of the guest's memory.
#[derive(Debug, PartialEq, Eq)]
struct Range {
    /// The guest's physical address.
    address: u64,
    size: u64,
    /// Which file it is in, and where.
    file: usize,
    offset: u64,
}

/// `vmm rescue`.
pub fn rescue(dir: &RunDir, arguments: &RescueArgs) -> anyhow::Result<u8> {
    let RescueArgs { name, to, json } = arguments;
    let mut report = Report::new(*json);
    let (kept, state, ram) = KeeperClient::connect(dir)?.files(name)?;
    let document = read(&state, kept.document_bytes).context("its document cannot be read")?;
    // Where it does not decode, nobody knows at which addresses its memory was.
    let decoded = MachineV3::from_bytes(&document);
    let ranges = match &decoded {
        Ok(machine) => ranges(machine, &kept.ram)?,
        Err(_) => one_after_another(&kept.ram),
    };
    // Under another name until it is complete. One that is there may be the only copy of another.
    if to.exists() {
        bail!("{} is there already, and is not written over", to.display());
    }
    let mut draft = to.clone().into_os_string();
    draft.push(".part");
    let draft = PathBuf::from(draft);
    let written = write(&draft, &document, &ranges, &ram, &mut report)
        .and_then(|()| fs::rename(&draft, to))
        .with_context(|| format!("cannot write {}", to.display()));
    if let Err(error) = written {
        drop(fs::remove_file(&draft));
        return Err(error.context(format!("VM {name} is kept as before")));
    }
    let bytes: u64 = ranges.iter().map(|range| range.size).sum();
    let trouble = decoded.err().map(|error| error.to_string());
    let result = json!({
        "event": "result", "result": "rescued", "name": name, "file": to, "memory_bytes": bytes,
        "document_bytes": document.len(), "document_error": trouble,
    });
    let mut text = format!("{name}: {} of memory and its document are in {}", report::bytes(bytes), to.display());
    if let Some(trouble) = trouble {
        text.push_str(&format!("\nits document does not decode ({trouble}): addresses are those within its files"));
    }
    report.result(result, &text);
    Ok(status::DONE)
}

fn read(state: &OwnedFd, length: u64) -> io::Result<Vec<u8>> {
    let file = File::from(state.try_clone()?);
    let mut bytes = vec![0; usize::try_from(length.min(file.metadata()?.len())).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Where the guest's memory is, as its document says.
fn ranges(machine: &MachineV3, files: &[RamFile]) -> anyhow::Result<Vec<Range>> {
    let range = |range: &RamRangeV1| {
        let found = files.iter().enumerate().find(|(_, file)| file.token == range.token);
        let (file, RamFile { size, .. }) =
            found.with_context(|| format!("its file {:#x} is not there", range.token))?;
        let end = range.offset.checked_add(range.size).filter(|end| end <= size);
        end.with_context(|| format!("the memory at {:#x} is not in its file", range.gpa))?;
        Ok(Range { address: range.gpa, size: range.size, file, offset: range.offset })
    };
    machine.ram.iter().map(range).collect()
}

/// Its files behind each other.
fn one_after_another(files: &[RamFile]) -> Vec<Range> {
    let mut address = 0_u64;
    let range = |(file, RamFile { size, .. }): (usize, &RamFile)| {
        let range = Range { address, size: *size, file, offset: 0 };
        address = address.saturating_add(*size);
        range
    };
    files.iter().enumerate().map(range).collect()
}

/// A note: the sizes of the owner's name and of what is noted, its kind, the two themselves.
fn note(document: &[u8]) -> Vec<u8> {
    let words = [OWNER.len() as u32, document.len() as u32, DOCUMENT];
    let mut note: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    note.extend_from_slice(OWNER);
    note.extend_from_slice(document);
    note.resize(note.len().next_multiple_of(4), 0);
    note
}

/// The headers of the file, with the note, and where the first range begins.
fn head(document: &[u8], ranges: &[Range]) -> (Vec<u8>, u64) {
    /// Linux's include/uapi/linux/elf-em.h.
    const X86_64: u16 = 62;
    const AARCH64: u16 = 183;
    let note = note(document);
    let headers = (size_of::<FileHeader>() + size_of::<SegmentHeader>() * (ranges.len() + 1)) as u64;
    let start = (headers + note.len() as u64).next_multiple_of(ALIGN);
    // It was handed over by a host of the same kind.
    let machine = if arch::NAME == "x86_64" { X86_64 } else { AARCH64 };
    let mut ident = [0; 16];
    ident[..elf::IDENT.len()].copy_from_slice(&elf::IDENT);
    let header = FileHeader {
        ident,
        kind: elf::CORE.into(),
        machine: machine.into(),
        version: 1.into(),
        segments: (size_of::<FileHeader>() as u64).into(),
        size: (size_of::<FileHeader>() as u16).into(),
        segment_size: (size_of::<SegmentHeader>() as u16).into(),
        segment_count: u16::try_from(ranges.len() + 1).unwrap_or(u16::MAX).into(),
        ..FileHeader::default()
    };
    let mut head = header.as_bytes().to_vec();
    let noted = SegmentHeader {
        kind: elf::NOTE.into(),
        offset: headers.into(),
        file_size: (note.len() as u64).into(),
        ..SegmentHeader::default()
    };
    head.extend_from_slice(noted.as_bytes());
    let mut offset = start;
    for range in ranges {
        let segment = SegmentHeader {
            kind: elf::LOAD.into(),
            // Readable, writable, executable.
            flags: 7.into(),
            offset: offset.into(),
            physical: range.address.into(),
            file_size: range.size.into(),
            size: range.size.into(),
            align: ALIGN.into(),
            ..SegmentHeader::default()
        };
        head.extend_from_slice(segment.as_bytes());
        offset += range.size.next_multiple_of(ALIGN);
    }
    head.extend_from_slice(&note);
    (head, start)
}

fn write(path: &Path, document: &[u8], ranges: &[Range], ram: &[OwnedFd], report: &mut Report) -> io::Result<()> {
    /// How often it is told how far it is.
    const STEP: u64 = 64 << 20;
    let (head, start) = head(document, ranges);
    // For root alone: it is all that a guest knows.
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(&head)?;
    let all: u64 = ranges.iter().map(|range| range.size).sum();
    let (mut at, mut done, mut buffer) = (start, 0_u64, vec![0; PIECE]);
    for range in ranges {
        let memory = ram.get(range.file).ok_or(io::ErrorKind::NotFound)?;
        let memory = File::from(memory.try_clone()?);
        for offset in (0..range.size).step_by(PIECE) {
            let count = PIECE.min(usize::try_from(range.size - offset).unwrap_or(PIECE));
            let piece = buffer.get_mut(..count).unwrap_or_default();
            memory.read_exact_at(piece, range.offset + offset)?;
            if piece.iter().any(|byte| *byte != 0) {
                file.write_all_at(piece, at + offset)?;
            }
            if done.is_multiple_of(STEP) {
                report.doing(&format!("{} of {} written", report::bytes(done), report::bytes(all)));
            }
            done += count as u64;
        }
        at += range.size.next_multiple_of(ALIGN);
    }
    // What is zero at its end belongs to it, too.
    file.set_len(at)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};
    use zerocopy::FromBytes;

    use super::*;

    #[test]
    fn what_is_rescued_is_a_core_dump_with_all_memory_at_its_address() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rescued");
        let memory = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
        let size = 3 * PIECE as u64;
        let view = File::from(memory.try_clone().unwrap());
        view.set_len(size).unwrap();
        view.write_all_at(b"low", 0).unwrap();
        view.write_all_at(b"high", size - 4).unwrap();
        let ranges = [
            Range { address: 0x4000_0000, size: PIECE as u64, file: 0, offset: 0 },
            Range { address: 0x1_0000_0000, size: 2 * PIECE as u64, file: 0, offset: PIECE as u64 },
        ];
        write(&path, b"a document", &ranges, &[memory], &mut Report::new(false)).unwrap();
        let bytes = fs::read(&path).unwrap();
        let (header, rest) = FileHeader::read_from_prefix(&bytes).unwrap();
        assert_eq!((header.kind.get(), header.segment_count.get()), (elf::CORE, 3));
        let segments = <[SegmentHeader]>::ref_from_prefix_with_elems(rest, 3).unwrap().0;
        let content = |segment: &SegmentHeader| {
            let start = segment.offset.get() as usize;
            &bytes[start..start + segment.file_size.get() as usize]
        };
        assert_eq!(segments[0].kind.get(), elf::NOTE);
        assert!(content(&segments[0]).windows(10).any(|window| window == b"a document"));
        assert_eq!(segments.iter().map(|one| one.physical.get()).collect::<Vec<_>>(), [0, 0x4000_0000, 0x1_0000_0000]);
        assert!(content(&segments[1]).starts_with(b"low") && content(&segments[2]).ends_with(b"high"));
        assert_eq!(bytes.len() as u64, segments[2].offset.get() + 2 * PIECE as u64);
    }

    #[test]
    fn memory_whose_document_is_lost_is_rescued_file_by_file() {
        let files = [RamFile { token: 1, size: 4096 }, RamFile { token: 2, size: 8192 }];
        let expected = [
            Range { address: 0, size: 4096, file: 0, offset: 0 },
            Range { address: 4096, size: 8192, file: 1, offset: 0 },
        ];
        assert_eq!(one_after_another(&files), expected);
    }
}
