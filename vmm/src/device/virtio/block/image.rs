//! A disk's image on the host: opened, locked against a second user, recognised after a live update; and how it is read, written
//! and made durable.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};

use kho_abi::document::virtio::{BlockV1, ImageKind};
use rustix::fs::{FallocateFlags, OFlags};

use super::buffers::{Buffers, Direction};
use crate::config::block::BlockConfig;
use crate::device::virtio::VirtioError;

/// Bytes of a sector, in which a guest counts.
pub const SECTOR: u64 = 512;

/// The system's limit on the buffers of one call (UIO_MAXIOV).
pub const VECTORS_MAX: usize = 1024;

/// What is copied or written at once where the guest's own buffers cannot be used.
const CHUNK: usize = 256 << 10;

/// An image that only this process may use, or may write to.
pub struct Image {
    /// The file, for whoever reads and writes by other means.
    pub file: File,
    /// In the operator's words.
    pub name: String,
    /// Nothing is ever written.
    pub readonly: bool,
    /// The page cache is bypassed, so that memory and lengths must be multiples of a sector.
    pub direct: bool,
    identity: BlockV1,
}

impl Image {
    /// Opens the image and locks it.
    pub fn open(config: &BlockConfig) -> Result<Self, VirtioError> {
        let BlockConfig { path, readonly, id: _, direct } = config;
        let name = format!("disk {}", path.display());
        let system = |operation: &str| {
            let (device, operation) = (name.clone(), operation.to_owned());
            move |source| VirtioError::System { device, operation, source }
        };
        let unfit = |reason: &str| VirtioError::Unfit { device: name.clone(), reason: reason.to_owned() };
        let purpose = match (direct, readonly) {
            (true, _) => "open the image for direct I/O (does its file system have it? else leave out `direct`)",
            (false, true) => "open the image",
            (false, false) => "open the image for writing (if that is not wanted, add `readonly`)",
        };
        // Without O_NONBLOCK a path that turns out to be a FIFO would wait for its other end for ever.
        let flags = libc::O_NONBLOCK | if *direct { libc::O_DIRECT } else { 0 };
        let mut file =
            OpenOptions::new().read(true).write(!readonly).custom_flags(flags).open(path).map_err(system(purpose))?;
        let metadata = file.metadata().map_err(system("stat the image"))?;
        let (kind, device, inode) = match metadata.file_type() {
            kind if kind.is_file() => (ImageKind::File, metadata.dev(), metadata.ino()),
            kind if kind.is_block_device() => (ImageKind::BlockDevice, metadata.rdev(), 0),
            _ => return Err(unfit("it is neither a regular file nor a block device")),
        };
        // io_uring would take it to mean that reads must fail rather than wait.
        let flags =
            rustix::fs::fcntl_getfl(&file).map_err(|errno| system("ask for the image's flags")(errno.into()))?;
        rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK)
            .map_err(|errno| system("set the image's flags")(errno.into()))?;
        // The end of a block device is not in its metadata.
        let size = file.seek(SeekFrom::End(0)).map_err(system("find out the image's size"))?;
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(unfit(&format!(
                "the image has {size} bytes, which is not one or more sectors of 512 bytes; `truncate --size %512` rounds \
                 it up, and an image of another format than raw must be converted"
            )));
        }
        // Whoever uses it may soon be gone, so this says nothing of the image itself.
        lock(&file, *readonly).map_err(match readonly {
            true => system("lock the image; another process, such as another VM, may write to it: stop that first"),
            false => system(
                "lock the image; another process, such as another VM, uses it: stop that first, or attach the image with \
                 `readonly` to all of them",
            ),
        })?;
        if *direct {
            probe_direct(&file).map_err(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => {
                    unfit("direct I/O is not possible here in sectors of 512 bytes; leave out `direct`")
                }
                _ => system("read the image")(error),
            })?;
        }
        let identity = BlockV1 {
            kind,
            device_major: rustix::fs::major(device),
            device_minor: rustix::fs::minor(device),
            inode,
            size,
        };
        Ok(Self { file, name, readonly: *readonly, direct: *direct, identity })
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.identity.size
    }

    /// Which image it is, so that it is known again.
    pub fn identity(&self) -> BlockV1 {
        self.identity
    }

    /// Refuses an image that is not the one the guest was using: it would find other data under the file systems that it has
    /// mounted.
    pub fn check_identity(&self, before: &BlockV1) -> Result<(), VirtioError> {
        let mut differences = Vec::new();
        let mut compare = |what: &str, before: &dyn std::fmt::Display, now: &dyn std::fmt::Display, same: bool| {
            if !same {
                differences.push(format!("its {what} is {now} and was {before}"));
            }
        };
        let BlockV1 { kind, device_major, device_minor, inode, size } = *before;
        let now = &self.identity;
        compare("kind", &kind.name(), &now.kind.name(), kind == now.kind);
        let lasting = has_lasting_number(device_major) && has_lasting_number(now.device_major);
        compare(
            "device",
            &format_args!("{device_major}:{device_minor}"),
            &format_args!("{}:{}", now.device_major, now.device_minor),
            !lasting || (device_major, device_minor) == (now.device_major, now.device_minor),
        );
        compare("inode", &inode, &now.inode, inode == now.inode);
        compare("size in bytes", &size, &now.size, size == now.size);
        if differences.is_empty() {
            return Ok(());
        }
        Err(VirtioError::Unfit {
            device: self.name.clone(),
            reason: format!(
                "the image is not the one that the guest was using: {}; put that image back at this path",
                differences.join(", ")
            ),
        })
    }

    /// Whether the kernel cannot read or write these buffers by itself.
    pub fn must_copy(&self, buffers: &Buffers) -> bool {
        self.direct && !buffers.are_aligned(SECTOR as usize)
    }

    /// Reads or writes all of the buffers, at an offset in bytes.
    pub fn transfer(&self, direction: Direction, buffers: &mut Buffers, mut offset: u64) -> io::Result<()> {
        if self.must_copy(buffers) {
            return self.transfer_copied(direction, buffers, offset);
        }
        while !buffers.is_empty() {
            let vectors = buffers.vectors();
            let (vectors, count) = (vectors.as_ptr(), vectors.len().min(VECTORS_MAX) as libc::c_int);
            let position = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            let descriptor = self.file.as_raw_fd();
            let done = match direction {
                // SAFETY: `Buffers` holds vectors that point into guest RAM, which is never unmapped; whatever is written to
                // RAM, nothing in this process has a reference into it.
                Direction::FromImage => unsafe { libc::preadv(descriptor, vectors, count, position) },
                // SAFETY: as above; RAM is only read.
                Direction::ToImage => unsafe { libc::pwritev(descriptor, vectors, count, position) },
            };
            match usize::try_from(done) {
                // The image has become shorter than it was.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(done) => {
                    buffers.advance(done);
                    offset += done as u64;
                }
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// The same by way of memory of our own, for a guest whose buffers direct I/O cannot use.
    fn transfer_copied(&self, direction: Direction, buffers: &mut Buffers, mut offset: u64) -> io::Result<()> {
        let mut chunk = AlignedChunk::new();
        while !buffers.is_empty() {
            let length = buffers.length().min(CHUNK);
            let chunk = &mut chunk.bytes()[..length];
            match direction {
                Direction::FromImage => {
                    self.file.read_exact_at(chunk, offset)?;
                    buffers.fill_from(chunk);
                }
                Direction::ToImage => {
                    buffers.drain_to(chunk);
                    self.file.write_all_at(chunk, offset)?;
                }
            }
            offset += length as u64;
        }
        Ok(())
    }

    /// Gives the storage of a part of the image back to the host. What is read there afterwards is not defined, so a host that
    /// cannot do it need not.
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            done => done,
        }
    }

    /// Makes a part of the image zeroes; with `unmap` it may lose its storage.
    pub fn write_zeroes(&self, mut offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let flags = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match self.allocate(flags | FallocateFlags::KEEP_SIZE, offset, length) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            done => return done,
        }
        let mut chunk = AlignedChunk::new();
        let mut left = length;
        while left > 0 {
            let length = left.min(CHUNK as u64);
            self.file.write_all_at(&chunk.bytes()[..length as usize], offset)?;
            offset += length;
            left -= length;
        }
        Ok(())
    }

    fn allocate(&self, flags: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        loop {
            match rustix::fs::fallocate(&self.file, flags, offset, length) {
                Err(rustix::io::Errno::INTR) => {}
                done => return Ok(done?),
            }
        }
    }

    /// Makes durable what was written.
    pub fn flush(&self) -> io::Result<()> {
        if self.readonly {
            return Ok(());
        }
        self.file.sync_data()
    }
}

/// Whether a device with this major number has the same under every kernel. Major 0 is that of file systems without a block device
/// (9p, NFS, btrfs, overlayfs), 240 to 254 and 259 are those of drivers without one of their own (virtio, NVMe, device mapper): each
/// gets the next free number in the order in which they are found, and to refuse a guest its own disk for that would be its end.
fn has_lasting_number(major: u32) -> bool {
    !matches!(major, 0 | 240..=254 | 259)
}

/// Memory that direct I/O can use. Zero at first.
struct AlignedChunk {
    memory: Vec<u8>,
    start: usize,
}

impl AlignedChunk {
    fn new() -> Self {
        let memory = vec![0; CHUNK + SECTOR as usize];
        let start = memory.as_ptr().align_offset(SECTOR as usize);
        Self { memory, start }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..CHUNK]
    }
}

/// Fails with `EINVAL` where the smallest thing a guest may ask for cannot be done.
fn probe_direct(file: &File) -> io::Result<()> {
    let mut chunk = AlignedChunk::new();
    // One sector, neither in memory nor in the file at a multiple of anything larger.
    let sector = &mut chunk.bytes()[..2 * SECTOR as usize];
    let start = if sector.as_ptr().addr().is_multiple_of(2 * SECTOR as usize) { SECTOR as usize } else { 0 };
    file.read_at(&mut sector[start..][..SECTOR as usize], SECTOR).map(drop)
}

/// Locks all of the file. The lock belongs to the open file, so that it goes with the last descriptor of it, which only this
/// process has.
fn lock(file: &File, shared: bool) -> io::Result<()> {
    let kind = if shared { libc::F_RDLCK } else { libc::F_WRLCK };
    // SAFETY: a structure of integers, for which zero is a value.
    let mut request: libc::flock = unsafe { std::mem::zeroed() };
    request.l_type = kind as libc::c_short;
    request.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the command reads one `flock`, which outlives the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error;
    use tempfile::NamedTempFile;

    fn file(size: u64) -> (NamedTempFile, BlockConfig) {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        let config = BlockConfig { path: file.path().to_owned(), readonly: false, id: None, direct: false };
        (file, config)
    }

    #[test]
    fn image_in_use_is_refused_to_a_second_user_until_the_first_has_gone() {
        let (_file, config) = file(4096);
        let readonly = BlockConfig { readonly: true, ..config.clone() };
        let first = Image::open(&config).unwrap();
        for second in [&config, &readonly] {
            let error = Image::open(second).err().unwrap();
            assert!(matches!(&error, VirtioError::System { operation, .. } if operation.contains("stop that first")));
        }
        drop(first);
        let readers = [Image::open(&readonly).unwrap(), Image::open(&readonly).unwrap()];
        assert!(Image::open(&config).is_err());
        drop(readers);
        Image::open(&config).unwrap();
    }

    #[test]
    fn image_that_is_no_row_of_sectors_is_refused() {
        for size in [0, 1, 511, 513, 4097] {
            let (_file, config) = file(size);
            assert!(matches!(Image::open(&config), Err(VirtioError::Unfit { .. })), "{size}");
        }
        let config = BlockConfig { path: "/dev/null".into(), readonly: false, id: None, direct: false };
        assert!(matches!(Image::open(&config), Err(VirtioError::Unfit { .. })));
        let missing = BlockConfig { path: "/nonexistent".into(), ..config };
        assert!(Image::open(&missing).err().unwrap().source().is_some());
    }

    #[test]
    fn other_image_than_before_is_refused_with_what_differs() {
        let (_file, config) = file(4096);
        let image = Image::open(&config).unwrap();
        let same = image.identity();
        image.check_identity(&same).unwrap();
        for device_major in [0, 240, 254, 259] {
            image.check_identity(&BlockV1 { device_major, device_minor: same.device_minor + 1, ..same }).unwrap();
        }
        let lasting = has_lasting_number(same.device_major);
        let other_device = BlockV1 { device_major: 77, ..same };
        assert_eq!(image.check_identity(&other_device).is_err(), lasting);
        for (other, word) in [
            (BlockV1 { inode: same.inode + 1, ..same }, "inode"),
            (BlockV1 { size: 8192, ..same }, "size"),
            (BlockV1 { kind: ImageKind::BlockDevice, ..same }, "kind"),
        ] {
            let error = image.check_identity(&other).unwrap_err().to_string();
            assert!(error.contains(&format!("its {word}")), "{error}");
        }
    }

    #[test]
    fn zeroes_are_written_whether_or_not_storage_may_be_lost() {
        let (file, config) = file(4 << 20);
        for unmap in [false, true] {
            file.as_file().write_all_at(&vec![7; 4 << 20], 0).unwrap();
            let image = Image::open(&config).unwrap();
            image.write_zeroes(512, 3 << 20, unmap).unwrap();
            let content = std::fs::read(file.path()).unwrap();
            assert_eq!(content.len(), 4 << 20);
            assert!(content[512..][..3 << 20].iter().all(|byte| *byte == 0));
            assert!(content[..512].iter().chain(&content[512 + (3 << 20)..]).all(|byte| *byte == 7));
        }
    }
}
