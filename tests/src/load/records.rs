//! Numbered records, each flushed before its number is told: what was told must be there, whatever happens afterwards.
use super::report::Report;
use anyhow::{Context, Result, bail, ensure};
use guest_kernel::pattern::scramble;
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::Path;

/// Bytes of a record.
const SIZE: usize = 45;

/// The record of that number, a line of text.
fn record(number: u64) -> [u8; SIZE] {
    let text = format!("record {number:020} {:016x}\n", scramble(number));
    let mut bytes = [b' '; SIZE];
    bytes.iter_mut().zip(text.bytes()).for_each(|(byte, letter)| *byte = letter);
    bytes
}

/// What a file of records holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Whole records: 1, 2, 3 …
    pub whole: u64,
    /// Bytes of one more, which was never told.
    pub incomplete: usize,
}

/// Reads records, which must be in order and all there up to the last one that was told.
pub fn check(mut source: impl Read, told: u64) -> Result<Found> {
    let mut found = Found { whole: 0, incomplete: 0 };
    loop {
        let mut bytes = Vec::with_capacity(SIZE);
        let length = source.by_ref().take(SIZE as u64).read_to_end(&mut bytes).context("cannot read a record")?;
        let expected = record(found.whole + 1);
        ensure!(
            bytes == expected[..length],
            "record {} is not as it was written: {:?}",
            found.whole + 1,
            String::from_utf8_lossy(&bytes)
        );
        if length < SIZE {
            found.incomplete = length;
            break;
        }
        found.whole += 1;
    }
    if found.whole < told {
        bail!(
            "record {told} was told to be written, but there are {} records and {} bytes",
            found.whole,
            found.incomplete
        );
    }
    Ok(found)
}

/// The same for a file.
pub fn check_file(path: &Path, told: u64) -> Result<Found> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    check(BufReader::new(file), told).with_context(|| format!("{} is damaged", path.display()))
}

/// Writes for ever, after what is there already.
pub fn write(path: &Path, report: &mut Report<impl Write>) -> Result<()> {
    let mut file = open(path)?;
    let mut number = check_file(path, 0)?.whole;
    report.start(format_args!("told={number}"))?;
    loop {
        number += 1;
        append(&mut file, number).with_context(|| format!("cannot write record {number} to {}", path.display()))?;
        report.progress(format_args!("told={number}"))?;
    }
}

fn open(path: &Path) -> Result<File> {
    let file = File::options().append(true).create(true).open(path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    // The file's name has to be on the disk, too.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let flushed = File::open(folder).and_then(|folder| folder.sync_all());
    flushed.with_context(|| format!("cannot flush {}", folder.display()))?;
    Ok(file)
}

fn append(file: &mut File, number: u64) -> std::io::Result<()> {
    file.write_all(&record(number))?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(last: u64) -> Vec<u8> {
        (1..=last).flat_map(record).collect()
    }

    #[test]
    fn appended_records_are_found_in_their_order() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("records");
        let mut file = open(&path).expect("a file");
        (1..=5).try_for_each(|number| append(&mut file, number)).expect("records");
        assert_eq!(check_file(&path, 5).expect("whole records"), Found { whole: 5, incomplete: 0 });
    }

    #[test]
    fn more_than_was_told_is_fine_even_a_part() {
        let mut bytes = records(6);
        bytes.truncate(5 * SIZE + 10);
        assert_eq!(check(&bytes[..], 4).expect("records"), Found { whole: 5, incomplete: 10 });
    }

    #[test]
    fn a_missing_a_torn_and_a_changed_record_are_damage() {
        assert!(check(&records(4)[..], 5).is_err());
        assert!(check(&records(5)[..5 * SIZE - 1], 5).is_err());
        let mut gap = records(2);
        gap.extend(record(4));
        assert!(check(&gap[..], 2).is_err());
        let mut zeroes = records(3);
        zeroes.extend([0; SIZE]);
        assert!(check(&zeroes[..], 3).is_err());
    }
}
