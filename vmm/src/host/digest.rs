//! A checksum of all of a guest's memory, taken in the pause before and after: whether what is found is what was left.

use std::hash::Hasher;
use std::io;
use std::os::fd::OwnedFd;
use std::thread::{self, ScopedJoinHandle};

use twox_hash::XxHash3_64;

/// How much one thread takes at a time. The checksum is made of those of the parts, so this must stay as it is.
const PART: u64 = 16 << 20;
/// Read at once.
const BUFFER: usize = 1 << 20;

/// A part of a file: where it begins, and its size.
type Part<'a> = (&'a OwnedFd, u64, u64);

/// The checksum of some files with their sizes: XXH3 of the XXH3 of each part, as one is made at the speed of memory. It finds what
/// was lost or mixed up on the way, and is not there against forgers.
pub fn digest<'a>(files: impl IntoIterator<Item = (&'a OwnedFd, u64)>) -> io::Result<u64> {
    let cut = |(file, size): (&'a OwnedFd, u64)| {
        (0..size).step_by(PART as usize).map(move |start| (file, start, PART.min(size - start)))
    };
    let parts: Vec<Part<'_>> = files.into_iter().flat_map(cut).collect();
    let threads = thread::available_parallelism().map_or(1, usize::from).min(parts.len().max(1));
    let share = parts.len().div_ceil(threads).max(1);
    let digests = thread::scope(|scope| {
        let work = |parts: &[Part<'_>]| parts.iter().map(part).collect::<io::Result<Vec<u64>>>();
        // Where there is no thread to be had, this one does its part.
        let start = |parts| thread::Builder::new().spawn_scoped(scope, move || work(parts)).map_err(|_| work(parts));
        let running: Vec<_> = parts.chunks(share).map(start).collect();
        let mut all = Vec::new();
        for started in running {
            let ended = |thread: ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread has ended early")))
            };
            all.extend(started.map_or_else(|digests| digests, ended)?);
        }
        io::Result::Ok(all)
    })?;
    let bytes: Vec<u8> = digests.iter().flat_map(|digest| digest.to_le_bytes()).collect();
    Ok(XxHash3_64::oneshot(&bytes))
}

fn part((file, start, size): &Part<'_>) -> io::Result<u64> {
    let (mut hasher, mut buffer) = (XxHash3_64::new(), vec![0; BUFFER]);
    let (mut at, end) = (*start, start + size);
    while at < end {
        let wanted = BUFFER.min(usize::try_from(end - at).unwrap_or(BUFFER));
        let count =
            rustix::io::retry_on_intr(|| rustix::io::pread(file, buffer.get_mut(..wanted).unwrap_or_default(), at))?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        hasher.write(buffer.get(..count).unwrap_or_default());
        at += count as u64;
    }
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    fn file(size: u64) -> OwnedFd {
        let file = memfd_create("digest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, size).unwrap();
        file
    }

    #[test]
    fn one_bit_anywhere_makes_another_digest() {
        let size = 2 * PART + 4096;
        let memory = file(size);
        let empty = digest([(&memory, size)]).unwrap();
        assert_eq!(digest([(&file(size), size)]).unwrap(), empty);
        for at in [0, PART - 1, PART, size - 1] {
            let write = |byte: u8| File::from(memory.try_clone().unwrap()).write_all_at(&[byte], at).unwrap();
            write(1);
            assert_ne!(digest([(&memory, size)]).unwrap(), empty, "{at}");
            write(0);
        }
        assert_eq!(digest([(&memory, size)]).unwrap(), empty);
    }

    #[test]
    fn memory_in_another_order_has_another_digest() {
        let (one, other) = (file(4096), file(8192));
        assert_ne!(digest([(&one, 4096), (&other, 8192)]).unwrap(), digest([(&other, 8192), (&one, 4096)]).unwrap());
        assert!(digest([(&one, 4097)]).is_err());
    }
}
