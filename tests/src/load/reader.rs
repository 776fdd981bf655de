//! A reader that goes past the guest's page cache, so that every read is a request to the disk, and knows what it has to find.
use super::pattern::{aligned, difference, fill};
use super::report::Report;
use anyhow::{Context, Result, ensure};
use rustix::fs::OFlags;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// What direct I/O wants addresses, offsets and sizes to be a multiple of, at most.
const ALIGNMENT: usize = 4096;
/// What is read at once.
const CHUNK: usize = 128 << 10;
/// Tells this file from others.
const SEED: u64 = 0x0ead;

/// Reads for ever.
pub fn run(path: &Path, size: u64, report: &mut Report<impl Write>) -> Result<()> {
    ensure!(size >= CHUNK as u64, "{size} bytes are too few to read: {CHUNK} are the least");
    let size = size - size % CHUNK as u64;
    if !path.exists() {
        make(path, size)?;
    }
    let direct = OFlags::DIRECT.bits().cast_signed();
    let file = File::options().read(true).custom_flags(direct).open(path);
    let file = file.with_context(|| format!("cannot open {} for direct I/O", path.display()))?;
    report.start(format_args!("bytes={size}"))?;
    let mut buffer = vec![0; CHUNK + ALIGNMENT];
    let chunk = aligned(&mut buffer, ALIGNMENT, CHUNK);
    for passes in 0_u64.. {
        for offset in (0..size).step_by(CHUNK) {
            read(&file, offset, chunk, report).with_context(|| format!("cannot use {}", path.display()))?;
            report.progress(format_args!("passes={passes}"))?;
        }
    }
    Ok(())
}

fn read(file: &File, offset: u64, chunk: &mut [u8], report: &mut Report<impl Write>) -> Result<()> {
    // What an earlier read has left must not be taken for what this one brings.
    chunk.fill(0);
    file.read_exact_at(chunk, offset).with_context(|| format!("cannot read at {offset}"))?;
    if let Some(at) = difference(SEED, offset, chunk) {
        report.damage("reader", format_args!("offset={}", offset + at as u64))?;
    }
    Ok(())
}

/// Makes the file that [`run`] reads.
pub fn make(path: &Path, size: u64) -> Result<()> {
    let file = File::create_new(path).with_context(|| format!("cannot create {}", path.display()))?;
    let mut chunk = vec![0; CHUNK];
    for offset in (0..size).step_by(CHUNK) {
        fill(SEED, offset, &mut chunk);
        file.write_all_at(&chunk, offset).with_context(|| format!("cannot write {}", path.display()))?;
    }
    file.sync_all().with_context(|| format!("cannot flush {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::ALWAYS;
    use super::*;

    #[test]
    fn the_file_that_is_made_is_sound_and_a_changed_byte_is_damage() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("file");
        make(&path, 2 * CHUNK as u64).expect("a file");
        let file = File::options().read(true).write(true).open(&path).expect("the file");
        let mut said = Vec::new();
        let mut report = Report::new("reader", ALWAYS, &mut said);
        let mut chunk = vec![0; CHUNK];
        let second = CHUNK as u64;
        read(&file, 0, &mut chunk, &mut report).expect("a sound chunk");
        read(&file, second, &mut chunk, &mut report).expect("a sound chunk");
        file.write_all_at(&[chunk[5] ^ 1], second + 5).expect("a byte");
        read(&file, second, &mut chunk, &mut report).expect("a chunk");
        assert_eq!(String::from_utf8(said).expect("text"), format!("DAMAGE reader of=reader offset={}\n", second + 5));
    }
}
