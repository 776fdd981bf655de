//! A writer that never flushes. What it has written is pushed out of the guest's page cache, so that it is the host's to keep; the
//! host's kernel keeps it in a page cache of its own, which does not survive a kexec by itself. It is read back half a round later.
//!
//! On a block device nothing else flushes. A file works too, but its file system's journal flushes every few seconds.
use super::pattern::{difference, fill};
use super::report::Report;
use anyhow::{Context, Result, ensure};
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::io::Write;
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What is written at once.
const CHUNK: usize = 64 << 10;

/// The ring: where the next chunk goes, and which one is to be read back.
#[derive(Clone, Copy, Debug)]
struct Ring {
    places: u64,
    written: u64,
}

impl Ring {
    /// The seed of a place's content tells which round wrote it: an old round's content is damage.
    fn seed(&self, number: u64) -> u64 {
        1 + number / self.places
    }

    fn offset(&self, number: u64) -> u64 {
        number % self.places * CHUNK as u64
    }

    /// The number of the chunk whose turn to be checked it is.
    fn due(&self) -> Option<u64> {
        self.written.checked_sub(self.places / 2)
    }
}

/// Writes for ever.
pub fn run(path: &Path, size: u64, report: &mut Report<impl Write>) -> Result<()> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    let mut ring = Ring { places: size / CHUNK as u64, written: 0 };
    ensure!(ring.places >= 2, "{size} bytes are too few to go round in: {} are the least", 2 * CHUNK);
    report.start(format_args!("bytes={size}"))?;
    loop {
        step(&file, &mut ring, report).with_context(|| format!("cannot use {}", path.display()))?;
    }
}

fn step(file: &File, ring: &mut Ring, report: &mut Report<impl Write>) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    let offset = ring.offset(ring.written);
    fill(ring.seed(ring.written), offset, &mut buffer);
    file.write_all_at(&buffer, offset).with_context(|| format!("cannot write at {offset}"))?;
    push_out(file, offset)?;
    if let Some(number) = ring.due() {
        let offset = ring.offset(number);
        // Again, as reading ahead may have brought it back before it was written last.
        forget(file, offset)?;
        file.read_exact_at(&mut buffer, offset).with_context(|| format!("cannot read at {offset}"))?;
        if let Some(at) = difference(ring.seed(number), offset, &buffer) {
            let (round, at) = (ring.seed(number), offset + at as u64);
            report.damage("unflushed", format_args!("offset={at} round={round}"))?;
        }
    }
    ring.written += 1;
    report.progress(format_args!("chunks={}", ring.written))
}

/// Has the guest's kernel write a chunk to its device, without asking the device to flush, and forget it.
fn push_out(file: &File, offset: u64) -> Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    let (start, length) = (offset.cast_signed(), CHUNK as i64);
    // SAFETY: the descriptor is open, and the call takes no pointers.
    let status = unsafe { libc::sync_file_range(file.as_raw_fd(), start, length, flags) };
    if status != 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("cannot write back at {offset}"));
    }
    forget(file, offset)
}

fn forget(file: &File, offset: u64) -> Result<()> {
    fadvise(file, offset, NonZeroU64::new(CHUNK as u64), Advice::DontNeed)
        .with_context(|| format!("cannot drop the page cache at {offset}"))
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::ALWAYS;
    use super::*;

    /// What is said about damage when a chunk is spoilt after so many steps.
    fn said_after(spoil: impl Fn(&File)) -> String {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("target");
        let file = File::options().read(true).write(true).create_new(true).open(path).expect("a file");
        let (mut said, mut ring) = (Vec::new(), Ring { places: 4, written: 0 });
        let mut report = Report::new("unflushed", ALWAYS, &mut said);
        for number in 0..12 {
            if number == 8 {
                spoil(&file);
            }
            step(&file, &mut ring, &mut report).expect("a step");
        }
        String::from_utf8(said).expect("text").lines().filter(|line| line.starts_with("DAMAGE")).collect()
    }

    #[test]
    fn what_was_written_is_read_back_round_after_round() {
        assert_eq!(said_after(|_| {}), "");
    }

    #[test]
    fn a_changed_byte_and_an_old_round_are_damage() {
        let at = 3 * CHUNK as u64;
        assert_eq!(
            said_after(|file| file.write_all_at(b"x", at + 100).expect("a byte")),
            format!("DAMAGE unflushed of=unflushed offset={} round=2", at + 100)
        );
        let old = |file: &File| {
            let mut buffer = vec![0; CHUNK];
            fill(1, at, &mut buffer);
            file.write_all_at(&buffer, at).expect("a chunk");
        };
        assert_eq!(said_after(old), format!("DAMAGE unflushed of=unflushed offset={at} round=2"));
    }
}
